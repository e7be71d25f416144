"""Accuracy of NNCF on transformers: 8 bits with ``model_type=TRANSFORMER`` in torch, weights alone through OpenVINO.

For ``TRANSFORMER`` it smooths activations (SmoothQuant) and quantizes of attention what its own patterns choose. Weights alone are rounded with what it has
for them: AWQ, scales fitted to the outputs, and GPTQ, which it has for OpenVINO's models only; that model is scored in float32.
SmolLM2's embedding, which is also its output layer, has 8 bits.

Run in an environment that holds nncf and openvino, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.nncf_transformers --out nncf.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bits import Bits
from benchmarks.peers.transformer_rows import Variant, measure_variants


def static(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
    """Quantize weights and activations to 8 bits, in torch."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    del bits
    quantized: nn.Module = nncf.quantize(
        model,
        nncf.Dataset(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.ANY,
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
    )
    return quantized


def weight_only(**options: Any) -> Callable[[nn.Module, Bits, list[Tensor]], Callable[[Tensor], Tensor]]:
    """Return what compresses weights to 4 bits in an OpenVINO model and runs that."""

    def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> Callable[[Tensor], Tensor]:
        import nncf
        import openvino

        converted = openvino.convert_model(model, example_input=calibration[0])
        compressed = nncf.compress_weights(
            converted,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=1.0,
            group_size=bits.group or -1,
            dataset=nncf.Dataset(calibration) if options else None,
            **options,
        )
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        run = openvino.Core().compile_model(compressed, "CPU", exact)
        return lambda x: torch.from_numpy(run(x)[0])

    return quantize


VARIANTS = (
    Variant("vit_s", "w8a8", "TRANSFORMER, SmoothQuant", static),
    Variant("minilm", "w8a8", "TRANSFORMER, SmoothQuant", static),
    Variant("smollm2", "w4", "rounding to nearest", weight_only()),
    Variant("smollm2", "w4", "AWQ, scale estimation", weight_only(awq=True, scale_estimation=True)),
    Variant("smollm2", "w4", "GPTQ, scale estimation", weight_only(gptq=True, scale_estimation=True)),
    Variant("smollm2", "w4g64", "AWQ, scale estimation", weight_only(awq=True, scale_estimation=True)),
    Variant("smollm2", "w4g64", "GPTQ, scale estimation", weight_only(gptq=True, scale_estimation=True)),
)

if __name__ == "__main__":
    measure_variants("nncf", VARIANTS, __doc__)
