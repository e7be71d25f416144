"""Calibration inputs: from any iterable of batches to one checked tensor for each input of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cat_plugin.batches import ModelCall, as_calls, stacked
from cat_plugin.errors import CalibrationError, no_calibration_batch
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


def gather_inputs(calibration: Iterable[Any] | Tensor, num_samples: int) -> Inputs:
    """Collect at most ``num_samples`` inputs.

    Parameters
    ----------
    calibration : iterable or Tensor
        Input batches as :func:`cat_plugin.batches.as_calls` reads them; every tensor is (N_i, ...), all of one shape apart
        from N_i, in arguments of one structure.
    num_samples : int
        Inputs wanted; fewer are used when there are no more.

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
    batches: list[list[Tensor]] = []
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
        for tensor, first in zip(inputs, batches[0] if batches else inputs, strict=True):
            if tensor.shape[1:] != first.shape[1:]:
                raise CalibrationError(
                    f"calibration batch {index} holds inputs of shape {tuple(tensor.shape[1:])}, batch 0 of shape "
                    f"{tuple(first.shape[1:])}; expected one shape. Resize the inputs, or calibrate on one size."
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {index} has NaN or infinite values; remove or repair these inputs."
                )
        batches.append([tensor[: num_samples - count] for tensor in inputs])
        count += len(batches[-1][0])
        if count >= num_samples:
            break
    if example is None or count == 0:
        raise no_calibration_batch()
    return Inputs([stacked(parts) for parts in zip(*batches, strict=True)], example)
