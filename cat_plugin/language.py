"""The score of language models: perplexity of token logits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_plugin.errors import CATValueError

__all__ = ["perplexity"]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor | Iterable[Tensor]) -> float:
    """Exponential of the mean loss of predicting each token from those before it in its window; lower is better.

    Parameters
    ----------
    model : nn.Module
        Takes token numbers (N, T) and gives logits (N, T, V); in the mode it is in.
    windows : Tensor or iterable of Tensor
        (N, T) integers, or batches of them; T of 2 or more.  A batch passes through the model at a time, a tensor row by row.

    Returns
    -------
    float
        1 or more.  A score that is to grow, as ``eval_fn`` of a recipe is, is its negative.

    Raises
    ------
    CATValueError
        If there are no tokens to predict, or the logits do not go with them.
    """
    batches = torch.split(windows, 1) if isinstance(windows, Tensor) else windows
    total, count = 0.0, 0
    for batch in batches:
        if batch.ndim != 2 or batch.is_floating_point() or batch.shape[1] < 2:
            raise CATValueError(
                f"a window of tokens has shape {tuple(batch.shape)} and type {batch.dtype}; expected integers (N, T), T of 2 "
                "or more. Cut the text into windows of one length."
            )
        logits = model(batch)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != batch.shape:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CATValueError(
                f"the model gives {given} for tokens of shape {tuple(batch.shape)}; expected logits (N, T, V). Wrap it in "
                "a module that returns the logits of every token."
            )
        loss = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].reshape(-1).long(), reduction="sum"
        )
        total, count = total + float(loss), count + batch[:, 1:].numel()
    if count == 0:
        raise CATValueError("there are no windows of tokens; expected at least one. Check the text.")
    return math.exp(total / count)
