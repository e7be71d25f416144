"""Bias correction: what rounding does to the mean of each output channel, taken out of the bias.

With ``y = W x + b`` in full precision and ``W_q`` on quantized inputs ``x_q``, the bias becomes ``E[y] - W_q E[x_q]``,
both means over the calibration set (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv 1906.04721, section 4.2, equation 17; here with measured instead of analytic means).  Default: on.

A weight that was fitted to too few samples is pulled towards less than it should give.  Where ReLU or ReLU6 follows, that
shows behind it: :func:`shift_behind_clip` gives the bias of least squared error there, where what is clipped in full
precision and quantized alike is no error (the non-linear reconstruction of Zhang et al., "Accelerating Very Deep
Convolutional Networks for Classification and Detection", arXiv 1505.06798, section 3.2, of which only the bias is fitted).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cat_plugin.ptq.closed_form.moments import Moments
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.ranks import ALONE, Ranks

__all__ = ["corrected_bias", "shift_behind_clip"]

_PULL = 0.1  # towards no shift, as a share of the positions: a channel that is rarely active shows little of its error


def corrected_bias(layer: QuantOp, moments: Moments) -> Tensor:
    """Bias that gives every output channel its full-precision mean.

    Parameters
    ----------
    layer : QuantOp
        With integers chosen.
    moments : Moments
        Of its quantized inputs and full-precision outputs.

    Returns
    -------
    Tensor
        (O,) of the weight's dtype.
    """
    groups, width = moments.mean_x.shape
    weight = layer.dequantized().reshape(groups, -1, width).double()
    bias = moments.mean_y - torch.einsum("grk,gk->gr", weight, moments.mean_x)
    return bias.reshape(-1).to(layer.weight.dtype)


def shift_behind_clip(
    parts: Iterable[tuple[Tensor, Tensor]], low: float, high: float, ranks: Ranks = ALONE
) -> Tensor:
    """What to add to the bias for less squared error behind a clip to [low, high].

    Minimises ``sum_p m_p (clip(y_p) - u_p - b)^2 + 0.1 P b^2`` for each channel, ``m_p`` being 0 where ``u`` and ``y``
    are clipped at the same end and 1 elsewhere.

    Parameters
    ----------
    parts : iterable of pairs of Tensor
        (O, p) quantized and full-precision outputs ``u`` and ``y`` of the layer, before it; P in all, of which one part at a
        time is held.
    low, high : float
        Its ends; infinity where there is none.
    ranks : Ranks
        The processes over whose parts the sum runs.

    Returns
    -------
    Tensor
        (O,) shift ``b``.
    """
    total: Tensor | None = None
    shown = torch.zeros(())
    for outputs, wanted in parts:
        hidden = ((outputs <= low) & (wanted <= low)) | ((outputs >= high) & (wanted >= high))
        errors = (wanted.clamp(low, high) - outputs).masked_fill_(hidden, 0.0)
        total = errors.sum(1).double() + (0.0 if total is None else total)
        shown = shown.to(outputs.device) + (~hidden).sum(1) + _PULL * outputs.shape[1]
    assert total is not None
    ranks.sum_([total, shown])
    return (total / shown).to(errors.dtype)
