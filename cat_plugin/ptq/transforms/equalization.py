"""Channels of one tensor brought to one range, or mixed, before it is quantized as a whole.

For two layers with ReLU or nothing between them, ``W2 f(W1 x + b1) = (W2 S^-1) f(S W1 x + S b1)`` for every positive
diagonal ``S`` (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
equation 7).  Their ``S`` evens the ranges of per-tensor weights; here weights have a scale for each channel anyway, and
``S`` is chosen for what lies between and has one scale for all channels.

Before a depthwise layer, whose weights' own scales take ``S`` up without a trace, ``s_i = max_j r_j / r_i``, ``r_i`` being
the clipping range of least squared error of channel i at the activation's bits, but no less than bits / 8 of the greatest
calibration value, or a channel that is rarely active would be clipped when it is.  A dense layer has one scale for a whole row: a
column of large weights coarsens all others, and ``s_i`` that grows with it evens the row (the exchange between weights and
activations of Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4, the other way round).  There ``s_i`` is a power of
the above times a power of the column's greatest weight, both of 0, 1/4, .., 1, as a model of the noise of rounding either
finds best, and 1 where that is not half of what it is without.

Where nothing but additions lie between dense layers, as in the linear bottlenecks of inverted residuals (Sandler et al.,
"MobileNetV2", arXiv 1801.04381), not only a diagonal but every invertible matrix will do: all layers that make the stream are multiplied
by it, all that read it by its inverse.  It evens the channels, makes values that few of them have large bell-shaped, and
turns what rounding errs by to where no reader looks.  (Ma et al., "AffineQuant", arXiv 2403.12544, and Sun et al., "FlatQuant", arXiv
2410.09426, train such matrices for transformers, where functions in between leave products to run time.)  The channels' means go into
biases.  See :mod:`~cat_plugin.ptq.transforms.channels.mixing`.

ReLU6 commutes with ``S`` if channel i is clipped at ``6 s_i``: full precision is computed so (:class:`Ceiling`).  Quantized,
ReLU6 stays what it is: no range is scaled beyond 6, so that what it clips more, the quantizer behind it would clip, and what
it clips less of a channel scaled down is part of the modelled noise.  Default: on for models with depthwise convolutions, where
activations, or those of a stream or the weights behind it, have less than 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx, nn

from cat_plugin.ptq.graph.insert import layer_widths
from cat_plugin.ptq.graph.ops import constant, is_relu6, operand, weight_of
from cat_plugin.ptq.memory import rows_of_the_model
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.channels.gains import gains_of
from cat_plugin.ptq.transforms.channels.mixing import Maker, Reader, mixing_matrix
from cat_plugin.ptq.transforms.channels.places import (
    LinearStream,
    Pair,
    activation_behind,
    find_linear_streams,
    find_pairs,
    has_depthwise,
    top_of,
)
from cat_plugin.ptq.transforms.channels.sampler import ChannelSampler
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["Ceiling", "Equalization", "has_depthwise"]

_aten = torch.ops.aten
_IMAGES = 128  # calibration inputs looked at
_SAMPLES = 4096  # values of each channel, beside its extremes

Widths = dict[fx.Node, tuple[int, int]]


class Ceiling(nn.Module):
    """ReLU6 behind channels that were scaled up.

    Parameters
    ----------
    limit : Tensor
        (C, 1, 1) what full precision clips each channel at.
    """

    limit: Tensor

    def __init__(self, limit: Tensor) -> None:
        super().__init__()
        self.register_buffer("limit", limit)

    def full_precision(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape, clipped at each channel's own limit."""
        return torch.minimum(x.clamp(min=0.0), self.limit)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape, as the quantized model computes it."""
        return _aten.relu6.default(x)  # type: ignore[no-any-return]


class Equalization(Transform):
    """Mixes the channels of linear streams, and scales those between two layers, where it is exact."""

    name = "equalization"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        if spec.equalization is not None:
            return spec.equalization
        return not spec.weight_only and min(spec.w_bits, spec.a_bits) < 8 and has_depthwise(module)

    def places(self, module: fx.GraphModule) -> list[LinearStream | Pair]:
        streams = find_linear_streams(module)
        mixed = {reader for stream in streams for reader in stream.readers}
        return [*streams, *(pair for pair in find_pairs(module) if pair.second not in mixed)]

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        """Change weights and biases on both sides of every place; ReLU6 in a pair becomes a :class:`Ceiling` later."""
        widths = {node: bits for node, (_, bits) in layer_widths(module, spec).items() if bits is not None}
        places = [place for place in self.places(module) if _is_worth_it(place, widths, spec)]
        if not places:
            return None
        sampler = _sampled(module, places, inputs.leading(_IMAGES), spec, generator)
        ceilings: dict[fx.Node, Tensor] = {}
        for place in places:
            if isinstance(place, LinearStream):
                _mix(module, place, sampler, widths, generator)
                continue
            gains = _gains(module, place, sampler, widths[place.second])
            if bool((gains == 1.0).all()):
                continue
            _scale(module, place, gains)
            if place.activation is not None and is_relu6(place.activation):
                axes = weight_of(module, place.first).ndim - 2
                ceilings[place.activation] = 6.0 * gains.reshape(-1, *[1] * axes)
        return partial(_insert_ceilings, ceilings=ceilings) if ceilings else None


def _is_worth_it(place: LinearStream | Pair, widths: Widths, spec: QuantSpec) -> bool:
    """Whether few enough levels read the channels.

    8 bits have levels enough for every channel, and a range made to fit clips what calibration did not show; but a matrix
    evens the weights as well.
    """
    bits = [widths[node] for node in place.readers if node in widths]
    fewest = [min(pair) if isinstance(place, LinearStream) else pair[1] for pair in bits]
    return bool(fewest) and (bool(spec.equalization) or min(fewest) < 8)


def _sampled(
    module: fx.GraphModule,
    places: list[LinearStream | Pair],
    inputs: Rows,
    spec: QuantSpec,
    generator: torch.Generator,
) -> ChannelSampler:
    """What the channels of all places hold."""
    streams = [place for place in places if isinstance(place, LinearStream)]
    makers = [node for stream in streams for node in stream.makers]
    nodes = {operand(node) for stream in streams for node in stream.readers}
    nodes |= {place.first for place in places if isinstance(place, Pair)}
    starts = range(0, len(inputs), spec.batch_size)
    averaged = {*makers, *(operand(node) for node in makers)}
    sampler = ChannelSampler(module, nodes, -(-_SAMPLES // len(starts)), generator, averaged)
    budget = None if spec.memory_mb is None else spec.memory_mb << 20
    piece = rows_of_the_model(module.graph, spec.batch_size, budget)
    for start in starts:
        sampler.run_batch(inputs[start : start + spec.batch_size], piece)
    return sampler


def _gains(module: fx.GraphModule, pair: Pair, sampler: ChannelSampler, bits: tuple[int, int]) -> Tensor:
    """(C,) factors of the channels between two layers."""
    values, extremes = sampler.taken(pair.first), torch.cat(sampler.extremes[pair.first], 1)
    levels, top = 2 ** bits[1] - 1, top_of(pair.activation)
    if pair.activation is None:
        power = values.var(1)
        values, extremes, levels = values.abs(), extremes.abs(), levels // 2
    else:
        values, extremes = values.clamp(min=0.0), extremes.clamp(0.0, top)
        power = values.clamp(max=top).var(1)
    least = extremes.amax(1) * (bits[1] / 8)
    dense = None if pair.depthwise else weight_of(module, pair.second)
    return gains_of(values, power, least, levels, dense, bits[0], top)


def _mix(
    module: fx.GraphModule,
    stream: LinearStream,
    sampler: ChannelSampler,
    widths: Widths,
    generator: torch.Generator,
) -> None:
    """Multiply the channels of a stream by a matrix and take their means from them, in place."""
    readers, makers = [], []
    for node in stream.readers:
        behind = activation_behind(node)
        values = sampler.taken(operand(node)).T.contiguous()
        weight, bias = weight_of(module, node).flatten(1), _bias_of(module, node)
        top = None if behind is None else top_of(behind)
        readers.append(Reader(values, weight, bias, *widths.get(node, (8, 8)), top))
    for node in stream.makers:
        weight = weight_of(module, node)
        power = float(sampler.mean_squares(operand(node)).sum()) * weight[0, 0].numel()
        makers.append(Maker(weight.flatten(1), power, widths.get(node, (8, 8))[0]))
    matrix = mixing_matrix(readers, makers, generator)
    inverse = torch.linalg.inv(matrix)
    for node in stream.readers:
        weight, bias = weight_of(module, node), _bias_of(module, node)
        flat = weight.double().flatten(1)
        bias.copy_(bias.double() + flat @ _mean_of(operand(node), stream, sampler))
        weight.copy_((flat @ inverse).view_as(weight))
    for node in stream.makers:
        weight, bias = weight_of(module, node), _bias_of(module, node)
        weight.copy_((matrix @ weight.double().flatten(1)).view_as(weight))
        bias.copy_(matrix @ (bias.double() - sampler.means(node)))


def _mean_of(node: fx.Node, stream: LinearStream, sampler: ChannelSampler) -> Tensor:
    """(C,) float64 mean of a tensor of the stream, the sum of what is taken from its terms."""
    if node in stream.makers:
        return sampler.means(node)
    return _mean_of(operand(node, 0), stream, sampler) + _mean_of(operand(node, 1), stream, sampler)


def _bias_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    bias = constant(module, node.args[2])
    assert bias is not None
    return bias


def _scale(module: fx.GraphModule, pair: Pair, gains: Tensor) -> None:
    """Multiply the first layer's outputs by the (C,) ``gains`` and the second's inputs by their inverse, in place."""
    first, second = weight_of(module, pair.first), weight_of(module, pair.second)
    first *= gains.reshape(-1, *[1] * (first.ndim - 1))
    bias = constant(module, pair.first.args[2]) if len(pair.first.args) > 2 else None
    if bias is not None:
        bias.mul_(gains)
    shape = [-1, *[1] * (second.ndim - 1)] if pair.depthwise else [1, -1, *[1] * (second.ndim - 2)]
    second /= gains.reshape(shape)


def _insert_ceilings(module: fx.GraphModule, ceilings: dict[fx.Node, Tensor]) -> None:
    """Put a :class:`Ceiling` in the place of each ReLU6 behind scaled channels, in place.

    Parameters
    ----------
    module : fx.GraphModule
        Graph with quantizers.
    ceilings : dict
        ReLU6 node -> (C, 1, ...) what its channels are clipped at in full precision.
    """
    for node, limit in ceilings.items():
        name = f"ceiling_{node.name}"
        module.add_submodule(name, Ceiling(limit))
        with module.graph.inserting_before(node):
            new = module.graph.call_module(name, (node.args[0],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()
