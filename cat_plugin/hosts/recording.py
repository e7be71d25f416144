"""What a host's calibration function feeds the model, kept so that other models can be fed the same.

The calls have one owner. What a recipe was given is passed on as it is, by :class:`Replay`; only the calls of somebody
else's function are recorded, and their copies lie in one tensor, of which the engine gets a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from cat_plugin.batches import ModelCall, gathered
from cat_plugin.calls import collect_logits, evaluating, logits_array
from cat_plugin.errors import CalibrationError, CATTypeError

__all__ = ["InputRecorder", "Replay", "record_run"]


class Replay:
    """The calibration function of whoever holds the calls already: nothing of it needs to be recorded.

    Parameters
    ----------
    calls : list of ModelCall
        Each is run once.
    """

    def __init__(self, calls: list[ModelCall]) -> None:
        self.calls = calls

    def __call__(self, model: nn.Module) -> None:
        for call in self.calls:
            model(*call.args, **call.kwargs)


class InputRecorder:
    """A forward pre-hook that keeps the arguments of every call of a module.

    Copies of the module made by ``copy.deepcopy`` share the recorder, so that nothing is lost when a
    host copies a model between preparation and conversion.
    """

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: loaders may fill one buffer again and again.
        self.calls.append(ModelCall(args, kwargs).copied())

    def __deepcopy__(self, memo: dict[int, Any]) -> InputRecorder:
        return self

    def attach(self, module: nn.Module) -> None:
        """Record the calls of `module` from now on."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self, module: nn.Module) -> None:
        """Record no more; also works on a copy of the module that it was attached to."""
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def record_run(
    model: nn.Module, run_fn: Callable[..., Any], run_args: Any = None
) -> tuple[list[ModelCall], np.ndarray]:
    """Let a calibration function run a model, and keep the inputs and the logits.

    Parameters
    ----------
    model : torch.nn.Module
        The full-precision model.
    run_fn : callable
        The host's calibration function: ``run_fn(model)`` or ``run_fn(model, *run_args)``. A :class:`Replay` is not
        run: its calls are taken over.
    run_args : sequence, optional
        Its further arguments.

    Returns
    -------
    calls : list of ModelCall
    logits : numpy.ndarray
        Shape (N, C), in the order of the calls.

    Raises
    ------
    CalibrationError
        When `run_fn` never calls the model, or the model returns anything but finite logits (N, C).
    """
    if not callable(run_fn):
        raise CATTypeError(
            f"run_fn is a {type(run_fn).__name__}; expected a function that runs the model it is given"
        )
    if isinstance(run_fn, Replay):
        return run_fn.calls, collect_logits(model, run_fn.calls, "full-precision")
    recorder = InputRecorder()
    parts: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        n_classes = parts[0].shape[1] if parts else None
        parts.append(logits_array(output, len(parts), "full-precision", n_classes))

    handle = model.register_forward_hook(keep)
    recorder.attach(model)
    try:
        with torch.no_grad(), evaluating(model):
            run_fn(model, *run_args) if run_args else run_fn(model)
    finally:
        handle.remove()
        recorder.detach(model)
    if not parts or not sum(len(part) for part in parts):
        raise CalibrationError(
            "run_fn did not run the model on any sample, so there is nothing to calibrate on; it must call the model "
            "that it is given, once a batch (a generator that was read before is empty the second time)"
        )
    return gathered(recorder.calls), np.concatenate(parts)
