"""Accuracy of aimet-torch on transformers: rounding to nearest and sequential MSE.

Layers are quantized as in the table of convolutional networks: symmetric per-channel weights, asymmetric inputs of every convolution
and linear layer with one grid each, 8 bits in the first and the last, ranges by aimet's SQNR search. Attention stays in float.

Run in an environment that holds aimet-torch, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.aimet_transformers --out aimet.json
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.bits import Bits
from benchmarks.peers import aimet_accuracy
from benchmarks.peers.transformer_rows import Variant, measure_variants

_SEARCHED = 64  # images


def images(method: str) -> Callable[[nn.Module, Bits, list[Tensor]], nn.Module]:
    """Return what quantizes ViT-S by one of aimet's methods."""

    def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
        assert bits.activations is not None
        options = Namespace(batch=32, search=_SEARCHED // 32, iterations=0)
        given = torch.cat(calibration)
        return aimet_accuracy.quantize(
            model, bits.weights, bits.activations, given, method, options, equalize=False, functional=False
        )

    return quantize


VARIANTS = tuple(
    Variant("vit_s", bits, name, images(method))
    for method, name in (("rtn", "rounding to nearest"), ("seq-mse", f"sequential MSE, {_SEARCHED} images"))
    for bits in ("w8a8", "w4a8", "w4a4")
)

if __name__ == "__main__":
    measure_variants("aimet-torch", VARIANTS, __doc__, aimet_accuracy.import_torchvision)
