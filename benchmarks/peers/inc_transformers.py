"""Accuracy of Neural Compressor's own algorithms on transformers: static int8, and weights alone by RTN, GPTQ and AWQ.

Weights alone: symmetric, all linear layers; SmolLM2's output layer, which is its embedding, stays in float, and so does attention.
SmoothQuant needs Intel's extension for PyTorch, which is not made for this PyTorch: the row says what happens.

Run in an environment that holds neural-compressor, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.inc_transformers --out inc.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bits import Bits
from benchmarks.peers import inc_accuracy
from benchmarks.peers.transformer_rows import Variant, measure_variants


def static(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
    """Quantize to 8 bits by the host's default static configuration, as convolutional networks are."""
    del bits
    return inc_accuracy.quantize(model, torch.cat(calibration), len(calibration[0]))


def smooth_quant(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
    """Quantize to 8 bits by SmoothQuant."""
    from neural_compressor.torch.quantization import SmoothQuantConfig, convert, prepare

    del bits
    prepared = prepare(model, SmoothQuantConfig(alpha=0.5), example_inputs=(calibration[0],))
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    quantized: nn.Module = convert(prepared)
    return quantized


def weight_only(algorithm: str, **options: Any) -> Callable[[nn.Module, Bits, list[Tensor]], nn.Module]:
    """Return what rounds weights by one of the host's algorithms."""

    def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
        from neural_compressor.torch import quantization

        config = getattr(quantization, f"{algorithm}Config")
        given = {"bits": bits.weights, "use_sym": True, "group_size": bits.group or -1, **options}
        prepared = quantization.prepare(model, config(**given), example_inputs=calibration[0])

        with torch.no_grad():
            for batch in calibration if algorithm != "RTN" else ():
                prepared(batch)
        quantized: nn.Module = quantization.convert(prepared)
        return quantized

    return quantize


_WEIGHTS = ("w4", "w3g64")
VARIANTS = (
    Variant("vit_s", "w8a8", "static, pt2e", static),
    Variant("vit_s", "w8a8", "SmoothQuant", smooth_quant),
    *(Variant("smollm2", bits, "RTN", weight_only("RTN")) for bits in _WEIGHTS),
    *(
        Variant("smollm2", bits, "GPTQ", weight_only("GPTQ", act_order=True, model_path="."))
        for bits in _WEIGHTS
    ),
    *(Variant("smollm2", bits, "AWQ", weight_only("AWQ", folding=False)) for bits in _WEIGHTS),
)

if __name__ == "__main__":
    measure_variants("neural-compressor", VARIANTS, __doc__)
