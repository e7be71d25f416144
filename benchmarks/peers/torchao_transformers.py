"""Accuracy of torchao on transformers: rounding to nearest, activations by token where they are quantized.

Linear layers are quantized and nothing else: attention, the patches and SmolLM2's output layer, which is its embedding, stay in
float. torchao has 8 bits for activations and no fewer on a processor.

Run in an environment that holds torchao, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.torchao_transformers --out torchao.json
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.bits import Bits
from benchmarks.peers.transformer_rows import Variant, measure_variants


def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
    """Quantize the linear layers of `model` in place; nothing is calibrated."""
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    del calibration
    dtype = getattr(torch, f"int{bits.weights}")
    by = PerGroup(bits.group) if bits.group else PerAxis(0)
    if bits.activations is None:
        quantize_(model, IntxWeightOnlyConfig(dtype, by))
    else:
        quantize_(model, Int8DynamicActivationIntxWeightConfig(dtype, by))
    return model


_ROUNDED = "rounding to nearest"
VARIANTS = (
    *(Variant("vit_s", bits, f"{_ROUNDED}, by token", quantize) for bits in ("w8a8", "w4a8")),
    *(Variant("smollm2", bits, _ROUNDED, quantize) for bits in ("w4", "w3g64", "w2g64")),
    Variant("smollm2", "w4a8", f"{_ROUNDED}, by token", quantize),
)

if __name__ == "__main__":
    measure_variants("torchao", VARIANTS, __doc__)
