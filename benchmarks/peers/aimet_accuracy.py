"""Accuracy of aimet-torch: rounding to nearest, sequential MSE, and AdaRound.

Layers are quantized as in the rest of the table: symmetric per-channel weights, asymmetric per-tensor inputs of every
convolution and linear layer, 8 bits in the first and the last, ranges by aimet's SQNR search; shortcuts and pooling
stay in float (ours quantizes these too). aimet's own placement would quantize what enters an addition at the low
bit-width as well, which costs it tens of points at 2 bits. MobileNetV2's channels are equalized
across layers first, where aimet does so by itself: not across ReLU6, which its manual has the user replace by ReLU if
the model stands that, and this one falls from 87.6 to 74.8 %. AdaRound runs ``--iterations`` steps a layer; aimet's
default of 15000 takes hours on a small machine.

Run in an environment that holds aimet-torch, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.aimet_accuracy --out aimet.json
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
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

METHODS = ("rtn", "seq-mse", "adaround")
NAMES = {"rtn": "rounding to nearest", "seq-mse": "sequential MSE", "adaround": "AdaRound"}


def import_torchvision() -> None:
    """Import torchvision, which aimet does, also where its binary was built for another torch than the one here.

    pip pairs the CPU build of torch with a CUDA build of torchvision, whose operators then do not load; the import
    fails at the ones that are declared without asking whether they did. aimet needs none of them on these models.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401


_KEPT: list[torch.library.Library] = []  # a library's operators vanish with it


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _simulate(model: nn.Module, example: Tensor, w_bits: int, a_bits: int) -> Any:
    """Return aimet's simulation of `model`, with quantizers at the inputs of layers and nowhere else."""
    from aimet_torch import QuantizationSimModel
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.nn import BaseQuantizationMixin
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantization.encoding_analyzer import SqnrEncodingAnalyzer

    simulation = QuantizationSimModel(
        model,
        example,
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_output_bw=8,
        default_param_bw=w_bits,
        config_file=get_path_for_per_channel_config(),
    )
    for module in simulation.model.modules():
        if isinstance(module, BaseQuantizationMixin):
            for quantizers in (module.input_quantizers, module.output_quantizers):
                for index in range(len(quantizers)):
                    quantizers[index] = None
    layers = _layers(simulation.model)
    for layer in layers:
        end = layer in (layers[0], layers[-1])
        layer.input_quantizers[0] = QuantizeDequantize(
            shape=(),
            bitwidth=8 if end else a_bits,
            symmetric=False,
            encoding_analyzer=SqnrEncodingAnalyzer(shape=()),
        )
        if end:
            layer.param_quantizers["weight"].bitwidth = 8
    return simulation


def quantize(
    model: nn.Module,
    w_bits: int,
    a_bits: int,
    calibration: Tensor,
    method: str,
    options: Namespace,
    equalize: bool,
    functional: bool = True,
) -> nn.Module:
    """Quantize `model` by one of `METHODS` and return the simulation's module; `functional` models have operations that are no modules."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.seq_mse import apply_seq_mse

    example = calibration[:1]
    batches = list(calibration.split(options.batch))
    if functional:
        model = prepare_model(model).eval()
    if equalize:
        equalize_model(model, dummy_input=example)  # folds BatchNorm as well
    else:
        fold_all_batch_norms(model, None, dummy_input=example)
    with tempfile.TemporaryDirectory() as folder:
        if method == "adaround":
            layers = _layers(model)
            model = Adaround.apply_adaround(
                model,
                example,
                AdaroundParameters(batches, len(batches), default_num_iterations=options.iterations),
                folder,
                "adaround",
                default_param_bw=w_bits,
                param_bw_override_list=[(layers[0], 8), (layers[-1], 8)],
                default_quant_scheme=QuantScheme.post_training_tf_enhanced,
                default_config_file=get_path_for_per_channel_config(),
            )
        simulation = _simulate(model, example, w_bits, a_bits)
        if method == "adaround":
            simulation.set_and_freeze_param_encodings(str(next(Path(folder).glob("*.encodings"))))
    if method == "seq-mse":
        equal = [batch for batch in batches if len(batch) == len(batches[0])]  # it stacks them
        apply_seq_mse(simulation, equal[: options.search])

    def run(module: nn.Module) -> None:
        with torch.no_grad():
            for images in batches:
                module(images)

    simulation.compute_encodings(run)
    return simulation.model


def main() -> None:
    """Measure what the command line asks for."""
    parser = accuracy_parser(__doc__, METHODS)
    parser.add_argument(
        "--iterations", type=int, default=1000, help="of AdaRound, a layer (default: %(default)s)"
    )
    parser.add_argument(
        "--search", type=int, default=4, help="batches for sequential MSE (default: %(default)s)"
    )
    parser.add_argument(
        "--equalize",
        nargs="*",
        choices=tuple(ACCURACY_BITS),
        default=["mobilenet_v2"],
        help="models whose channels are equalized across layers first (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "aimet-torch")
    import_torchvision()
    for name in options.models:
        split = accuracy_split(name, options.data, options.samples)
        for bits in options.bits or ACCURACY_BITS[name]:
            w_bits, a_bits = bits_of(bits)
            for method in options.methods:
                equalize = name in options.equalize
                called = f"{NAMES[method]}, equalization" if equalize else NAMES[method]
                key = {"model": name, "w_bits": w_bits, "a_bits": a_bits, "method": called}
                with rows.row(**key, first_last_bits=8, calibration=len(split.calibration)) as row:
                    torch.manual_seed(0)
                    with timed(row):
                        model = MODELS[name](options.data)
                        quantized = quantize(
                            model, w_bits, a_bits, split.calibration, method, options, equalize
                        )
                    score(row, quantized, split, options)


if __name__ == "__main__":
    main()
