"""Calibration inputs: from any iterable of batches to one checked tensor for each input of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cat_plugin.batches import ModelCall, as_calls, stacked
from cat_plugin.errors import CalibrationError, no_calibration_batch
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.ranks import ALONE, Ranks
from cat_plugin.ptq.rows import Inputs
from cat_plugin.torch_compat import pytree

__all__ = ["gather_inputs"]


def _tensors(call: ModelCall, index: int) -> list[Tensor]:
    """The tensors of a call, one row for each sample in every one of them."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    found = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    if len(found) == 1 and found[0].ndim < 2 and found[0].is_floating_point():
        raise CalibrationError(
            f"calibration batch {index} has shape {tuple(found[0].shape)}; expected (N, ...) with a batch axis."
        )
    if any(each.ndim == 0 or len(each) != len(found[0]) for each in found):
        raise CalibrationError(
            f"calibration batch {index} gives the model {call}; expected a row for each sample in every tensor. Make "
            "what all samples share a buffer of the model, or repeat it for each of them."
        )
    return found


def _fixed(call: ModelCall) -> tuple[list[Any], pytree.TreeSpec]:
    """What must be equal in all batches: the structure of the arguments, and what is no tensor among them."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


class _Rows:
    """One of the inputs, gathered batch by batch.

    Portions of one tensor stay a view of it.  Of others a copy is needed, which the store keeps within its budget, so that
    of batches that are made one by one no more than two are held.
    """

    def __init__(self, store: TensorStore | None, most: int) -> None:
        self._store, self._most = store, most
        self._batches: list[Tensor] = []
        self._kept: Tensor | None = None
        self._count = 0

    def add(self, batch: Tensor) -> None:
        if self._kept is None:
            if self._store is None or not self._batches or self._goes_on(batch):
                self._batches.append(batch)
                return
            self._grow(stacked(self._batches), len(batch), self._store)
            self._batches = []
        assert self._kept is not None
        assert self._store is not None
        if self._count + len(batch) > len(self._kept):
            self._grow(self._kept, len(batch), self._store)
        self._kept[self._count : self._count + len(batch)] = batch
        self._count += len(batch)
        self._store.settle()

    def _grow(self, rows: Tensor, more: int, store: TensorStore) -> None:
        """Move rows to a place for twice as many; how many there will be is not known."""
        count = self._count or len(rows)
        room = min(self._most, max(2 * count, count + more))
        kept = store.allocate((room, *rows.shape[1:]), rows.dtype, rows.device)
        kept[:count] = rows[:count]
        store.release(rows)
        self._kept, self._count = kept, count

    def _goes_on(self, batch: Tensor) -> bool:
        """Whether a batch lies behind the one before it in one storage."""
        last = self._batches[-1]
        return (
            batch.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and batch.storage_offset() == last.storage_offset() + last.numel()
            and batch.is_contiguous()
            and batch.dtype == last.dtype
        )

    def whole(self) -> Tensor:
        """All rows."""
        return stacked(self._batches) if self._kept is None else self._kept[: self._count]


def gather_inputs(
    calibration: Iterable[Any] | Tensor,
    num_samples: int,
    store: TensorStore | None = None,
    ranks: Ranks = ALONE,
) -> Inputs:
    """Collect at most ``num_samples`` inputs.

    Parameters
    ----------
    calibration : iterable or Tensor
        Input batches as :func:`cat_plugin.batches.as_calls` reads them; every tensor is (N_i, ...), all of one shape apart
        from N_i, in arguments of one structure.
    num_samples : int
        Inputs wanted; fewer are used when there are no more.
    store : TensorStore or None
        Where copies are kept; None is in memory.
    ranks : Ranks
        The processes of whose inputs these are this one's share.

    Returns
    -------
    Inputs
        N <= num_samples rows; a view of the inputs where they are portions of one tensor.

    Raises
    ------
    CalibrationError
        If there is nothing, a tensor has no row for each sample, shapes or structures differ, or a value is not finite.
    CATTypeError
        If `calibration` or a batch cannot be read.
    """
    gathered: list[_Rows] = []
    shapes: list[torch.Size] = []
    example: ModelCall | None = None
    count = 0
    for index, call in enumerate(as_calls(calibration)):
        inputs = _tensors(call, index)
        if example is None:
            example = call
        elif _fixed(call) != _fixed(example):
            raise CalibrationError(
                f"calibration batch {index} gives the model {call}, batch 0 {example}; expected the same arguments in "
                "every batch."
            )
        if not gathered:
            gathered = [_Rows(store, num_samples) for _ in inputs]
            shapes = [tensor.shape[1:] for tensor in inputs]
        for tensor, shape in zip(inputs, shapes, strict=True):
            if tensor.shape[1:] != shape:
                raise CalibrationError(
                    f"calibration batch {index} holds inputs of shape {tuple(tensor.shape[1:])}, batch 0 of shape "
                    f"{tuple(shape)}; expected one shape. Resize the inputs, or calibrate on one size."
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {index} has NaN or infinite values; remove or repair these inputs."
                )
        left = num_samples - count
        for rows, tensor in zip(gathered, inputs, strict=True):
            rows.add(tensor[:left])
        count += min(left, len(inputs[0]))
        if count >= num_samples:
            break
    if example is None or count == 0:
        raise no_calibration_batch()
    return Inputs([rows.whole() for rows in gathered], example, ranks)
