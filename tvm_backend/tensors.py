"""Tensors on their way into a library and out of it: checked, and of the caller's kind."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cat_plugin.errors import LibraryError

__all__ = ["as_numpy", "check", "check_finite", "like"]


def check(value: Any, expected: dict[str, Any], sizes: dict[str, int]) -> None:
    """Compare an input with what the model takes; `sizes` are those of the named axes so far."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None or not (isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")):
        raise LibraryError(
            f"input {expected['name']!r} is a {type(value).__name__}; give a numpy array or a DLPack tensor"
        )
    found = str(dtype).rpartition(".")[2]
    if found == "uint8" and expected["dtype"] == "float32" and len(shape) == 4:
        raise LibraryError(
            f"input {expected['name']!r} has dtype uint8, the model takes float32: give images (N, H, W, C) to predict(), "
            "which prepares them as the model was calibrated"
        )
    if found != expected["dtype"]:
        raise LibraryError(
            f"input {expected['name']!r} has dtype {found}, the model takes {expected['dtype']}: convert it first"
        )
    _check_shape(tuple(int(size) for size in shape), expected, sizes)


def check_finite(value: Any, expected: dict[str, Any]) -> None:
    """Refuse an input that holds a NaN or an infinity, and say which row is the first."""
    if not expected["dtype"].startswith("float"):
        return
    finite = np.isfinite(value if isinstance(value, np.ndarray) else as_numpy(value))
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0]) if finite.ndim else 0
        raise LibraryError(
            f"input {expected['name']!r} holds a NaN or an infinity, the first of them in row {row}; expected finite numbers. "
            "Mend the row or leave it out; a library loaded without check_finite runs on it"
        )


def as_numpy(value: Any) -> np.ndarray:
    """Any DLPack tensor as contiguous numpy, in place where it is so already."""
    value = value.detach() if hasattr(value, "detach") else value
    value = value.cpu() if hasattr(value, "cpu") and callable(value.cpu) else value
    return np.ascontiguousarray(np.from_dlpack(value))


def _check_shape(shape: tuple[int, ...], expected: dict[str, Any], sizes: dict[str, int]) -> None:
    wanted = expected["shape"]
    good = len(shape) == len(wanted)
    for size, want in zip(shape, wanted, strict=False):
        good = good and (sizes.setdefault(want, size) if isinstance(want, str) else want) == size
    if not good:
        text = ", ".join(map(str, wanted))
        raise LibraryError(f"input {expected['name']!r} has shape {shape}, the model takes ({text})")


def like(example: Any, tensor: Any) -> Any:
    """A result in the kind of tensor that the input was."""
    if isinstance(example, np.ndarray):
        return np.from_dlpack(tensor) if str(tensor.device).startswith("cpu") else tensor.numpy()
    package = type(example).__module__.partition(".")[0]
    module = sys.modules.get(package)
    if package not in ("tvm", "tvm_ffi") and hasattr(module, "from_dlpack"):
        return module.from_dlpack(tensor)  # type: ignore[union-attr]
    return tensor
