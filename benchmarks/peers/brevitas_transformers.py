"""Accuracy of brevitas on transformers: rounding to nearest, GPTQ and GPFQ, block by block.

Symmetric weights with a scale a channel or a group, ranges of least squared error; ViT-S's activations have a grid for each layer's
input, asymmetric, of least squared error, 8 bits in the first layer and the last. Attention and SmolLM2's output layer, which is its
embedding, stay in float.

Run in an environment that holds brevitas, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.brevitas_transformers --out brevitas.json
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bits import Bits
from benchmarks.peers import brevitas_accuracy
from benchmarks.peers.transformer_rows import Variant, measure_variants

_IMAGES = 64  # for what runs the whole network once for each of its layers


def images(method: str) -> Callable[[nn.Module, Bits, list[Tensor]], nn.Module]:
    """Return what quantizes ViT-S by one of the methods for convolutional networks, as the table of those has it."""

    def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
        assert bits.activations is not None
        given = torch.cat(calibration)
        options = Namespace(equalize=0, weight_type="sym", percentile=99.999, bias_int32=False, batch=32)
        seen = given if method == "rtn" else given[:_IMAGES]
        return brevitas_accuracy.quantize(model, bits.weights, bits.activations, seen, method, options)

    return quantize


def weight_only(method: str) -> Callable[[nn.Module, Bits, list[Tensor]], nn.Module]:
    """Return what rounds the weights of a language model's blocks, one block after the other."""

    def quantize(model: nn.Module, bits: Bits, calibration: list[Tensor]) -> nn.Module:
        import brevitas.nn as qnn
        from brevitas.graph.quantize import layerwise_quantize
        from brevitas_examples.common.generative.quantize import generate_quantizers

        weight_quant = generate_quantizers(
            weight_bit_width=bits.weights,
            weight_param_method="mse",
            weight_scale_precision="float_scale",
            weight_quant_type="sym",
            weight_quant_granularity="per_group" if bits.group else "per_channel",
            weight_group_size=bits.group,
            quantize_weight_zero_point=False,
            input_scale_precision="float_scale",  # there are none, but it is read
        )["weight_quant"]
        layers = {nn.Linear: (qnn.QuantLinear, {"weight_quant": weight_quant, "dtype": torch.float32})}
        quantized: nn.Module = layerwise_quantize(model, compute_layer_map=layers).eval()
        with torch.no_grad():
            quantized(calibration[0][:, :8])
            if method != "rtn":
                _by_block(quantized, calibration, method)
        return quantized

    return quantize


class _Stop(Exception):
    """What the first block would be given is known."""


def _by_block(model: nn.Module, calibration: list[Tensor], method: str) -> None:
    """Round block after block, each on what the rounded ones before it give."""
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode

    blocks = model.get_submodule("blocks")
    given: list[tuple[Any, ...]] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs)
        raise _Stop

    hook = blocks[0].register_forward_pre_hook(keep)
    for batch in calibration:
        try:
            model(batch)
        except _Stop:
            continue
    hook.remove()
    mode = {"gptq": gptq_mode, "gpfq": gpfq_mode}[method]
    for block in blocks:
        with mode(
            block, act_order=True, use_quant_activations=False, create_weight_orig=method == "gpfq"
        ) as rounding:
            for _ in range(rounding.num_layers):
                for inputs in given:
                    rounding.model(*inputs)
                rounding.update()
        given = [(block(*inputs), *inputs[1:]) for inputs in given]


_IMAGE_METHODS = {
    "rtn": "rounding to nearest",
    "gptq": f"GPTQ, {_IMAGES} images",
    "gpfq": f"GPFQ, {_IMAGES} images",
}
VARIANTS = (
    *(
        Variant("vit_s", bits, name, images(method))
        for method, name in _IMAGE_METHODS.items()
        for bits in (("w8a8", "w4a8", "w4a4") if method == "rtn" else ("w4a4",))
    ),
    *(
        Variant("smollm2", bits, name, weight_only(method))
        for bits in ("w4", "w3g64")
        for method, name in (("rtn", "rounding to nearest"), ("gptq", "GPTQ"), ("gpfq", "GPFQ"))
    ),
)

if __name__ == "__main__":
    measure_variants("brevitas", VARIANTS, __doc__)
