"""Bias correction: what rounding does to the mean of each output channel, taken out of the bias.

With ``y`` the full-precision output and ``y_q`` the quantized one on the calibration set, ``b += E[y] - E[y_q]`` per
output channel (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv 1906.04721, section 4.2, equation 17; here with measured instead of analytic means).  Default: on.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["channel_means"]


def channel_means(y: Tensor, kind: str) -> Tensor:
    """Mean of each output channel over everything else.

    Parameters
    ----------
    y : Tensor
        Output of the layer: (N, O, ...) of a convolution, (..., O) of a linear layer.
    kind : str
        ``conv1d``, ``conv2d`` or ``linear``.

    Returns
    -------
    Tensor
        (O,) float64.
    """
    if kind == "linear":
        return y.reshape(-1, y.shape[-1]).double().mean(0)
    return y.double().mean([d for d in range(y.ndim) if d != 1])
