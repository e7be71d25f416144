"""Accuracy of NNCF's post-training quantization in torch: 8 bits, and lower bits where it takes them.

It takes 4 bits, as its description of Intel's NPU has them (depthwise convolutions: 4-bit weights only), and nothing lower.
It has no bit-width by layer; below 8 bits the first and the last layer are therefore left in float, which is in its
favour. Biases are corrected from statistics of the float model, the one way that NNCF has for torch.

Run in an environment that holds nncf, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.nncf_accuracy --out nncf.json
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS
from benchmarks.peers.common import (
    ACCURACY_BITS,
    Rows,
    accuracy_parser,
    accuracy_split,
    bits_of,
    score,
    timed,
)

METHODS = ("fast",)


def quantize(
    model: nn.Module, w_bits: int, a_bits: int, calibration: Tensor, method: str, batch: int
) -> nn.Module:
    """Quantize `model` post training."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    low = (w_bits, a_bits) != (8, 8)
    advanced: dict[str, Any] = {"overflow_fix": nncf.quantization.advanced_parameters.OverflowFix.DISABLE}
    ignored = None
    if low:
        advanced["weights_quantization_params"] = QuantizationParameters(num_bits=w_bits, per_channel=True)
        advanced["activations_quantization_params"] = QuantizationParameters(num_bits=a_bits)
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        ends = (layers[0].replace(".", "/"), layers[-1].replace(".", "/"))
        ignored = nncf.IgnoredScope(
            patterns=[f"^{end}/.*" for end in ends],
            types=["adaptive_avg_pool2d"] if a_bits < 8 else [],  # known to NNCF at 8 bits only
            validate=False,
        )
    # Only the NPU is described to NNCF as having convolutions below 8 bits, and its 4-bit inputs are symmetric.
    device = nncf.TargetDevice.NPU if low else nncf.TargetDevice.ANY
    return nncf.quantize(
        model,
        nncf.Dataset(calibration.split(batch)),
        preset=nncf.QuantizationPreset.MIXED if a_bits == 8 else nncf.QuantizationPreset.PERFORMANCE,
        target_device=device,
        subset_size=len(calibration) // batch,
        fast_bias_correction=method == "fast",
        ignored_scope=ignored,
        advanced_parameters=AdvancedQuantizationParameters(**advanced),
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = accuracy_parser(__doc__, METHODS)
    parser.add_argument("--batch", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "nncf")
    for name in options.models:
        split = accuracy_split(name, options.data, options.samples)
        for bits in options.bits or dict.fromkeys(("w8a8", *ACCURACY_BITS[name])):
            w_bits, a_bits = bits_of(bits)
            for method in options.methods:
                key = {
                    "model": name,
                    "w_bits": w_bits,
                    "a_bits": a_bits,
                    "method": f"{method} bias correction",
                }
                ends = 8 if bits == "w8a8" else "float"
                with rows.row(**key, first_last_bits=ends, calibration=len(split.calibration)) as row:
                    with timed(row):
                        model = MODELS[name](options.data)
                        quantized = quantize(model, w_bits, a_bits, split.calibration, method, options.batch)
                    score(row, quantized, split, options)


if __name__ == "__main__":
    main()
