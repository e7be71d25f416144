"""What is asked of a model whoever runs it: its mode, its device, its fingerprint, and a clear error when it fails."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cat_plugin.batches import ModelCall
from cat_plugin.errors import CalibrationError, CATError

__all__ = ["device_of", "evaluating", "fingerprint", "full_float32", "run_call", "without_autocast"]


@contextmanager
def evaluating(model: nn.Module, *, warn: bool = False) -> Iterator[None]:
    """Put `model` in evaluation mode for a while, and every submodule back as it was afterwards.

    Exported modules refuse to change mode; they are left as they are.

    Parameters
    ----------
    model : torch.nn.Module
        Any.
    warn : bool, default False
        Whether to warn when it is in training mode.
    """
    modes = {module: module.training for module in model.modules()}
    if warn and any(modes.values()):
        warnings.warn(
            "the model is in training mode; it is quantized in evaluation mode (BatchNorm uses its running "
            "statistics, dropout is off). Call model.eval() first to silence this.",
            stacklevel=3,
        )
    try:
        model.eval()
    except NotImplementedError:
        modes = {}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_autocast() -> Iterator[None]:
    """Regions of ``torch.autocast`` inside the model compute in the types that their inputs have."""
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__ = lambda self: self  # type: ignore[method-assign]
    kind.__exit__ = lambda self, *exception: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def full_float32() -> Iterator[None]:
    """A GPU computes float32 as float32, the same each time; by default its convolutions round inputs to ten bits.

    PyTorch's settings hold for the process and are put back afterwards.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's first parameter, or else its first buffer, is; None for a model without either."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)


def run_call(model: nn.Module, call: ModelCall, name: str, role: str) -> Any:
    """What a model returns for a call; an error of its own is raised again as one that says what it was given.

    Parameters
    ----------
    model : torch.nn.Module
        Run as it is: mode and gradients are the caller's business.
    call : ModelCall
        Its tensors are moved to the model's device.
    name, role : str
        What the call and the model are called in a message.

    Raises
    ------
    CalibrationError
        When the model raises anything but an error of this project or the lack of memory.
    """
    try:
        here = call.to(device_of(model))
        return model(*here.args, **here.kwargs)
    except (CATError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = "inputs need a batch axis in front, and the shape and dtype that the model was trained on"
        if isinstance(error, TypeError) and call.kwargs and not call.args:
            hint = "a mapping is keyword arguments; where the model takes it as one argument, a batch is ((mapping,),)"
        raise CalibrationError(
            f"the {role} model raised {type(error).__name__} for {name}, which gives it {call}: {reason:.400} ({hint})"
        ) from error


def fingerprint(*parts: Any) -> str:
    """SHA-256 over models, tensors and plain data, to recognise the same again.

    Parameters
    ----------
    *parts : torch.nn.Module, torch.Tensor, str, or what JSON takes
        Of a model its structure and every value in its state count.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            # Without the addresses that functions have in it, which are others in another process.
            structure = re.sub(r" at 0x[0-9a-f]+", "", repr(part))
            digest.update(f"{type(part).__qualname__}\n{structure}".encode())
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                if isinstance(value, torch.Tensor):
                    _add(digest, value)
        elif isinstance(part, torch.Tensor):
            _add(digest, part)
        else:
            plain = dict(part) if isinstance(part, Mapping) else part
            digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()


def _add(digest: Any, value: torch.Tensor) -> None:
    plain = value.detach().cpu().contiguous()
    digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
