"""Calibration inputs: from any iterable to one checked tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cat_plugin.batches import ModelCall, as_calls, stacked
from cat_plugin.errors import CalibrationError

__all__ = ["gather_inputs"]


def _only_tensor(call: ModelCall, index: int) -> Tensor:
    given = [*call.args, *call.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise CalibrationError(
            f"calibration batch {index} gives the model {call}; the engine takes models of one input tensor. Wrap the "
            "model in a module of one input, or quantize it with an algorithm of a host."
        )
    item = given[0]
    if item.ndim < 2:
        raise CalibrationError(
            f"calibration batch {index} has shape {tuple(item.shape)}; expected (N, ...) with a batch axis."
        )
    return item


def gather_inputs(calibration: Iterable[Any] | Tensor, num_samples: int) -> Tensor:
    """Collect at most ``num_samples`` inputs.

    Parameters
    ----------
    calibration : iterable or Tensor
        Input batches (N_i, ...) as :func:`cat_plugin.batches.as_calls` reads them; all of one shape apart from N_i.
    num_samples : int
        Inputs wanted; fewer are used when there are no more.

    Returns
    -------
    Tensor
        (N, ...), N <= num_samples; a view of the inputs where they are portions of one tensor.

    Raises
    ------
    CalibrationError
        If there is nothing, a batch is not of one tensor, shapes differ, or a value is not finite.
    CATTypeError
        If `calibration` or a batch cannot be read.
    """
    batches: list[Tensor] = []
    count = 0
    for index, call in enumerate(as_calls(calibration)):
        inputs = _only_tensor(call, index).detach()
        if batches and inputs.shape[1:] != batches[0].shape[1:]:
            raise CalibrationError(
                f"calibration batch {index} holds inputs of shape {tuple(inputs.shape[1:])}, batch 0 of shape "
                f"{tuple(batches[0].shape[1:])}; expected one shape. Resize the inputs, or calibrate on one size."
            )
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            raise CalibrationError(
                f"calibration batch {index} has NaN or infinite values; remove or repair these inputs."
            )
        batches.append(inputs[: num_samples - count])
        count += len(batches[-1])
        if count >= num_samples:
            break
    if count == 0:
        raise CalibrationError("the calibration set yielded no inputs; expected at least one batch.")
    return stacked(batches)
