"""Accuracy of brevitas: rounding to nearest, GPTQ, GPFQ and learned rounding, as its own ImageNet example uses them.

Layers are quantized as in the rest of the table: per-channel weights, per-tensor asymmetric inputs of every
convolution and linear layer, 8 bits in the first and the last; shortcuts and pooling stay in float (ours quantizes
these too). Preprocessing is brevitas's own: BatchNorm merged, and 20 iterations of cross-layer equalization where
``--equalize`` asks for them (default: for MobileNetV2 only, whose channels differ most in range). All
methods but plain rounding end with bias correction. Seconds cover quantizer placement up to the last correction.

Run in an environment that holds brevitas, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.brevitas_accuracy --out brevitas.json
"""

from __future__ import annotations

from argparse import Namespace
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS, Split
from benchmarks.peers.common import (
    ACCURACY_BITS,
    Rows,
    accuracy_parser,
    accuracy_split,
    bits_of,
    score,
    timed,
)

METHODS = {
    "rtn": "rounding to nearest, MSE ranges",
    "gptq": "GPTQ, MSE ranges, bias correction",
    "gpfq": "GPFQ, MSE ranges, bias correction",
    "gpfq-stats": "GPFQ, percentile ranges, bias correction",
    "learned-round": "AdaRound, MSE ranges, bias correction",
}


def _recipes() -> ModuleType:
    """Return the module with the steps of brevitas's ImageNet example."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    return ptq_common


def quantize(
    model: nn.Module, w_bits: int, a_bits: int, calibration: Tensor, method: str, options: Namespace
) -> nn.Module:
    """Quantize `model` by one of `METHODS` and return it, calibrated and corrected."""
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas.inject import value

    steps = _recipes()
    ranges = "stats" if method.endswith("-stats") else "mse"
    model = preprocess_for_quantize(model, equalize_iters=options.equalize, merge_bn=True)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ends = {id(layers[0]), id(layers[-1])}

    # brevitas calls these with the layer that a quantizer belongs to.
    @value
    def weight_bits(module: nn.Module) -> int:
        return 8 if is_end(module) else w_bits

    @value
    def input_bits(module: nn.Module) -> int:
        return 8 if is_end(module) else a_bits

    shapes = {tuple(layer.weight.shape) for layer in layers if id(layer) in ends}

    def is_end(module: nn.Module) -> bool:
        return tuple(module.weight.shape) in shapes

    assert sum(tuple(layer.weight.shape) in shapes for layer in layers) == len(shapes), (
        "the ends' shapes are not unique"
    )

    _, layer_map, _, _ = steps.create_quant_maps(
        dtype=torch.float32,
        bias_bit_width=32 if options.bias_int32 else None,
        weight_bit_width=weight_bits,
        weight_param_method=ranges,
        weight_scale_type="float_scale",
        weight_quant_type=options.weight_type,
        weight_quant_granularity="per_channel",
        weight_narrow_range=False,
        weight_quant_format="int",
        act_quant_format="int",
        act_bit_width=input_bits,
        act_scale_type="float_scale",
        act_scale_computation_type="static",
        act_param_method=ranges,
        act_quant_type="asym",
        act_quant_granularity="per_tensor",
        act_quant_percentile=options.percentile,
    )
    quantized = layerwise_quantize(model, compute_layer_map=layer_map).eval()
    loader = [(batch, None) for batch in calibration.split(options.batch)]
    with torch.no_grad():
        quantized(loader[0][0])
    steps.calibrate(loader, quantized)
    if method == "gptq":
        steps.apply_gptq(
            loader, quantized, act_order=True, use_quant_activations=True, create_weight_orig=True
        )
    elif method.startswith("gpfq"):
        steps.apply_gpfq(loader, quantized, act_order=True)
    elif method == "learned-round":
        _learn_rounding(quantized, calibration, options)
    if method != "rtn":
        steps.apply_bias_correction(loader, quantized)
    return quantized


def _learn_rounding(quantized: nn.Module, calibration: Tensor, options: Namespace) -> None:
    """Learn the rounding of each layer's weights, with the settings of brevitas's example."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils

    pairs = torch.utils.data.TensorDataset(calibration, torch.zeros(len(calibration)))
    settings = Namespace(
        learned_round="hard_sigmoid",
        learned_round_loss="regularised_mse",
        learned_round_mode="layerwise",
        learned_round_lr_scheduler=None,
        learned_round_lr=1e-3,
        learned_round_batch_size=32,
        learned_round_iters=options.iterations,
    )
    learned_round_utils.apply_learned_round(
        quantized, torch.utils.data.DataLoader(pairs, batch_size=options.batch), settings
    )


def measure(rows: Rows, name: str, split: Split, options: Namespace) -> None:
    """Measure one model at each bit-width by each method."""
    for bits in options.bits or ACCURACY_BITS[name]:
        w_bits, a_bits = bits_of(bits)
        for method in options.methods:
            key = {"model": name, "w_bits": w_bits, "a_bits": a_bits, "method": METHODS[method]}
            with rows.row(**key, first_last_bits=8, calibration=len(split.calibration)) as row:
                torch.manual_seed(0)
                with timed(row):
                    quantized = quantize(
                        MODELS[name](options.data), w_bits, a_bits, split.calibration, method, options
                    )
                score(row, quantized, split, options)


def main() -> None:
    """Measure what the command line asks for."""
    parser = accuracy_parser(__doc__, tuple(METHODS))
    parser.add_argument(
        "--equalize", type=int, help="iterations of equalization (default: 20 for MobileNetV2, else 0)"
    )
    parser.add_argument("--weight-type", choices=("sym", "asym"), default="sym")
    parser.add_argument("--percentile", type=float, default=99.999)
    parser.add_argument("--bias-int32", action="store_true", help="quantize biases to 32 bits")
    parser.add_argument("--iterations", type=int, default=1000, help="of learned rounding, a layer")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "brevitas")
    equalize = options.equalize
    for name in options.models:
        options.equalize = equalize if equalize is not None else (20 if name == "mobilenet_v2" else 0)
        measure(rows, name, accuracy_split(name, options.data, options.samples), options)


if __name__ == "__main__":
    main()
