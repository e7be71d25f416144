"""The one reader of input batches: from whatever a data loader yields to the calls of a model that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cat_plugin.errors import CATTypeError

__all__ = ["ModelCall", "as_calls", "gathered", "map_tensors", "read_batch", "stacked", "tensors_in"]

# A bare tensor of many samples is given to the model in portions of so many rows.
_PORTION = 64


@dataclass(frozen=True)
class ModelCall:
    """One call of a model: what it was given, kept so that another model can be given the same.

    Parameters
    ----------
    args : tuple
        Positional arguments.
    kwargs : dict, optional
        Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the arguments, positional ones first."""
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def rows(self) -> int:
        """Samples in the batch: the length of the first tensor, 0 without one."""
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), 0)

    def to(self, device: torch.device | None) -> ModelCall:
        """The same call with every tensor on `device`; itself for None."""
        return self if device is None else self._mapped(lambda tensor: tensor.to(device))

    def first(self, rows: int) -> ModelCall:
        """The call with the first `rows` samples only: views of the tensors that have a row for each sample."""
        whole = self.rows
        return self._mapped(lambda tensor: tensor[:rows] if tensor.ndim and len(tensor) == whole else tensor)

    def select(self, rows: torch.Tensor) -> ModelCall:
        """The call with some samples only, given by number (n,), of the tensors that have a row for each sample."""
        whole = self.rows
        return self._mapped(
            lambda tensor: tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == whole else tensor
        )

    def copied(self) -> ModelCall:
        """The call with copies of its tensors, which later changes of the originals do not reach."""
        return self._mapped(lambda tensor: tensor.detach().clone())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelCall:
        args, kwargs = map_tensors(change, (self.args, self.kwargs))
        return ModelCall(args, kwargs)

    def __str__(self) -> str:
        given = [_described(arg) for arg in self.args]
        given += [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return ", ".join(given) or "no argument"


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A structure of tuples, lists and dicts with every tensor in it replaced by what `change` makes of it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a structure of tuples, lists and dicts, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def stacked(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches (N_i, ...) as one tensor (N, ...).

    It is a view where they already lie one behind the other in one storage, as the portions of one tensor do, and a copy
    otherwise.
    """
    first, end = batches[0], batches[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for batch in batches:
        here = batch.untyped_storage().data_ptr() == storage and batch.storage_offset() == end
        if not (here and batch.is_contiguous() and batch.dtype == first.dtype):
            return torch.cat(list(batches))
        end += batch.numel()
    rows = sum(len(batch) for batch in batches)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def gathered(calls: list[ModelCall]) -> list[ModelCall]:
    """The same calls with their rows in one storage, where each gives one tensor and only their number of rows differs.

    The list given is emptied on the way, so that memory is needed once and not twice.
    """
    given = [call.args[0] for call in calls if len(call.args) == 1 and not call.kwargs]
    plain = [each for each in given if isinstance(each, torch.Tensor) and each.ndim and each.is_contiguous()]
    kinds = {(each.shape[1:], each.dtype, each.device) for each in plain}
    if len(plain) != len(calls) or len(kinds) != 1:
        return calls
    del plain
    ((shape, dtype, device),) = kinds
    lengths = [len(tensor) for tensor in given]
    whole = torch.empty((sum(lengths), *shape), dtype=dtype, device=device)
    calls.clear()
    given.reverse()
    portions = torch.split(whole, lengths)
    for portion in portions:
        portion.copy_(given.pop())
    return [ModelCall((portion,)) for portion in portions]


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    return f"{value!r:.40}"


def _as_tensors(value: Any) -> Any:
    """Inputs with numpy arrays as tensors, which share their memory where they can."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        usable = value.flags.writeable and all(step >= 0 for step in value.strides) and value.dtype.isnative
        return torch.from_numpy(value if usable else np.array(value, value.dtype.newbyteorder("=")))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_as_tensors, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_as_tensors, value))
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    return value


def read_batch(batch: Any, name: str) -> ModelCall:
    """Read one batch of inputs as a call of a model.

    Parameters
    ----------
    batch : object
        A tensor or array (N, ...), the one positional argument; a mapping, the keyword arguments; a tuple or list whose
        first item is the inputs and whose others (labels) are left out, where inputs that are a tuple or list are
        several positional arguments; or a :class:`ModelCall`.
    name : str
        What the batch is called in a message.

    Returns
    -------
    ModelCall
        With tensors in the place of arrays.

    Raises
    ------
    CATTypeError
        When `batch` is none of these, or holds no tensor.
    """
    if isinstance(batch, ModelCall):
        return batch
    given = batch
    if isinstance(given, list | tuple) and given:
        given = given[0]
    given = _as_tensors(given)
    call = None
    if isinstance(given, torch.Tensor):
        call = ModelCall((given,))
    elif isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        call = ModelCall((), dict(given))
    elif isinstance(given, list | tuple):
        call = ModelCall(tuple(given))
    if call is None or not call.tensors:
        raise CATTypeError(
            f"{name} is a {type(batch).__name__}; expected a tensor, or a tuple or list whose first item is the input "
            "tensor, or a mapping of keyword arguments to tensors"
        )
    return call


def as_calls(calibration: Iterable[Any]) -> Iterator[ModelCall]:
    """Read calibration batches as calls of a model.

    Parameters
    ----------
    calibration : iterable, tensor or array
        Of batches, each of which is what :func:`read_batch` takes. One tensor or array (N, ...) is all inputs, and is
        read in portions of 64 rows; one mapping is a single batch.

    Yields
    ------
    ModelCall

    Raises
    ------
    CATTypeError
        When `calibration` is not iterable, or a batch cannot be read.
    """
    batches: Iterator[Any]
    if isinstance(calibration, np.ndarray):
        calibration = _as_tensors(calibration)
    if isinstance(calibration, torch.Tensor) and calibration.ndim:
        batches = iter(torch.split(calibration, _PORTION))
    elif isinstance(calibration, Mapping | ModelCall):
        batches = iter([calibration])
    else:
        try:
            batches = iter(calibration)
        except TypeError:
            raise CATTypeError(
                f"calibration is a {type(calibration).__name__}, which cannot be iterated; give a DataLoader or a "
                "list of input batches"
            ) from None
    for number, batch in enumerate(batches):
        yield read_batch(batch, f"calibration batch {number}")
