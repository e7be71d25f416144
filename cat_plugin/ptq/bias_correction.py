"""Bias correction: what rounding does to the mean of each output channel, taken out of the bias.

With ``y = W x + b`` in full precision and ``W_q`` on quantized inputs ``x_q``, the bias becomes ``E[y] - W_q E[x_q]``,
both means over the calibration set (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv 1906.04721, section 4.2, equation 17; here with measured instead of analytic means).  Default: on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_plugin.ptq.modules import QuantOp
from cat_plugin.ptq.moments import Moments

__all__ = ["corrected_bias"]


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
