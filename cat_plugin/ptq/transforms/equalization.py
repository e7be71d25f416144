"""Channels of one tensor brought to one range before it is quantized as a whole.

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
finds best.

ReLU6 commutes with ``S`` if channel i is clipped at ``6 s_i``: full precision is computed so (:class:`Ceiling`).  Quantized,
ReLU6 stays what it is: no range is scaled beyond 6, so that what it clips more, the quantizer behind it would clip, and what
it clips less of a channel scaled down is part of the modelled noise.  Default: on for models with depthwise convolutions whose
activations have less than 8 bits, there where they have.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.ptq.graph.ops import (
    WEIGHTED,
    arguments,
    constant,
    groups_of,
    is_call,
    is_depthwise,
    is_relu6,
    operand,
    weight_of,
)
from cat_plugin.ptq.memory import rows_of_the_model
from cat_plugin.ptq.rows import Rows
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.transform import Transform

__all__ = ["Ceiling", "Equalization", "Pair", "has_depthwise"]

_aten = torch.ops.aten
_IMAGES = 128  # calibration inputs looked at
_SAMPLES = 2048  # values of each channel, beside its extremes
_FRACTIONS = tuple(0.05 * i for i in range(4, 21))  # of a channel's greatest value, tried as its range
_COARSE = (0.3, 0.45, 0.6, 0.8, 1.0)  # the same of the whole tensor's, where gains are compared
_NOISE_SAMPLES = 128  # of each channel, for that
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# shares of the channels that gains leave within their reach; those of the others are clipped to it
_WITHIN_REACH = (0.9, 1.0)
_MOST = 8.0  # no channel is scaled by more
# what is left of the weights' rounding noise once its errors compensate each other: the order measured on 1x1 layers
_COMPENSATED = 0.3


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


@dataclass
class Pair:
    """Two layers between which channels may be scaled.

    Attributes
    ----------
    first, second : fx.Node
        The layers; the second alone reads the first.
    activation : fx.Node or None
        ReLU or ReLU6 between them.
    depthwise : bool
        Whether the second has a filter for each channel.
    """

    first: fx.Node
    second: fx.Node
    activation: fx.Node | None
    depthwise: bool = False


def _is_weighted(node: fx.Node) -> bool:
    return is_call(node, WEIGHTED) and operand(node, 1).op == "get_attr"


def _is_zero_padding(node: fx.Node) -> bool:
    """Whether the node pads at most the last two axes, with zeros."""
    if not is_call(node, {_aten.constant_pad_nd.default, _aten.pad.default}):
        return False
    _, widths, *rest = arguments(node)
    mode = rest.pop(0) if rest and node.target is _aten.pad.default else "constant"
    return len(widths) <= 4 and mode == "constant" and not any(rest)


def _pair(node: fx.Node) -> Pair | None:
    """The layer that alone reads ``node``, with at most one ReLU or ReLU6 and zero padding between."""
    first, activation = node, None
    while len(node.users) == 1:
        (user,) = node.users
        if activation is None and node is first and (is_call(user, {_aten.relu.default}) or is_relu6(user)):
            activation = user
        elif _is_weighted(user) and user.args[0] is node:
            return Pair(first, user, activation)
        elif not _is_zero_padding(user):
            return None
        node = user
    return None


def has_depthwise(module: fx.GraphModule) -> bool:
    """Whether a convolution of the graph has a filter for each channel."""
    return any(is_depthwise(module, n) for n in module.graph.nodes if _is_weighted(n))


def _bits(pair: Pair, spec: QuantSpec) -> int:
    """Bits of what lies between the layers, where nothing overrides them."""
    return spec.bits_before_depthwise if pair.depthwise else spec.a_bits


class _Sampler(fx.Interpreter):
    """Keeps values of some nodes at positions drawn at random, and each channel's extremes: (C, n) for each node.

    Positions are drawn for a batch, which is run in pieces: what is drawn does not depend on how large these are.
    """

    def __init__(
        self, module: fx.GraphModule, nodes: set[fx.Node], share: int, generator: torch.Generator
    ) -> None:
        super().__init__(module)
        self.nodes, self.share, self.generator = nodes, share, generator
        self.samples: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        self.extremes: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        self._drawn: dict[fx.Node, Tensor] = {}
        self._rows, self._start = 0, 0

    def run_batch(self, batch: Rows, piece: int) -> None:
        """Run a batch, `piece` rows at a time."""
        self._rows, self._drawn = len(batch), {}
        for self._start in range(0, len(batch), piece):
            self.run(*batch[self._start : self._start + piece].tensors)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            channels = value.ndim - 1 if n.target is _aten.linear.default else 1
            rows = value.movedim(channels, -1).flatten(1, -2) if value.ndim > 2 else value.unsqueeze(1)
            if n not in self._drawn:
                count = self._rows * rows.shape[1]
                self._drawn[n] = torch.randint(count, (self.share,), generator=self.generator)
                self.samples[n].append(rows.new_empty(rows.shape[2], self.share))
            index = self._drawn[n] - self._start * rows.shape[1]
            here = (index >= 0) & (index < rows.shape[:2].numel())
            row, position = index[here] // rows.shape[1], index[here] % rows.shape[1]
            found = rows[row.to(rows.device), position.to(rows.device)]
            self.samples[n][-1][:, here.to(rows.device)] = found.T
            self.extremes[n].append(torch.stack([rows.amin((0, 1)), rows.amax((0, 1))], 1))
        return value


def _rounding_error(values: Tensor, clip: Tensor, levels: int) -> Tensor:
    """(C,) mean squared error of rounding (C, n) magnitudes to ``levels`` steps up to ``clip``, (C, 1) or ()."""
    step = clip.clamp(min=1e-12) / levels
    return ((values / step).round_().clamp_(max=levels).mul_(step) - values).square_().mean(1)


def _ranges(values: Tensor, levels: int) -> Tensor:
    """(C,) clipping range of least squared error of each channel's (C, n) magnitudes."""
    high = values.amax(1, keepdim=True)
    errors = torch.stack([_rounding_error(values, f * high, levels) for f in _FRACTIONS])
    return high.squeeze(1) * torch.tensor(_FRACTIONS, device=values.device)[errors.argmin(0)]


def _candidates(full: Tensor, columns: Tensor, reach: Tensor | None) -> Iterator[Tensor]:
    """(C,) gains to choose from: powers of what evens the activation's ranges times powers of the columns' reach.

    ``reach`` is the most that a channel may be scaled by without being clipped earlier than it was, where there is a clip.
    """
    for a, b in itertools.product(_EXPONENTS, repeat=2):
        gains = full**a * columns**b
        if reach is None:
            yield gains
            continue
        for share in _WITHIN_REACH:
            yield torch.minimum(gains / (gains / reach).quantile(share), reach)


def _activation_noise(values: Tensor, gains: Tensor, levels: int, top: float, importance: Tensor) -> float:
    """Squared error at the second layer's outputs that rounding (C, n) scaled values, and clipping them, makes."""
    gains = gains.unsqueeze(1)
    scaled = (values * gains).clamp_(max=top)
    wanted = values.clamp(max=top)
    end = float(scaled.max())
    errors = []
    for fraction in _COARSE:
        step = max(fraction * end / levels, 1e-12)
        rounded = (scaled / step).round_().clamp_(max=levels).mul_(step).div_(gains)
        errors.append(float((rounded.sub_(wanted).square_().mean(1) * importance).sum()))
    return min(errors)


def _weight_noise(weight: Tensor, gains: Tensor, power: Tensor, w_bits: int) -> float:
    """The same for rounding the (O, C, k) weight, each row with one step for all of its columns."""
    step = (weight / gains.reshape(1, -1, 1)).abs().amax((1, 2)) / 2 ** (w_bits - 1)
    noise = float(step.square().sum() / 12 * (gains.square() * power).sum() * weight.shape[2])
    return _COMPENSATED * noise


def _gains(
    values: Tensor,
    power: Tensor,
    least: Tensor,
    levels: int,
    weight: Tensor | None,
    w_bits: int,
    top: float,
) -> Tensor:
    """(C,) factors of the channels; 1 or more before a depthwise layer.

    Parameters
    ----------
    values : Tensor
        (C, n) magnitudes of the tensor that is quantized, before it is clipped.
    power : Tensor
        (C,) its variance.
    least : Tensor
        (C,) what each channel's range covers at least.
    levels : int
        Steps from 0 to the end of its range.
    weight : Tensor or None
        (O, C, ...) of the dense layer that reads it; None for a depthwise one.
    w_bits : int
        Its bits.
    top : float
        Where the values are clipped, infinity if they are not.
    """
    ranges = torch.maximum(_ranges(values.clamp(max=top), levels), least)
    most = ranges.max()
    alive = ranges > most / _MOST**3
    full = torch.where(alive, most / ranges.clamp(min=1e-12), torch.ones_like(ranges)).clamp(max=_MOST)
    if weight is None:
        return full
    flat = weight.reshape(*weight.shape[:2], -1)
    columns = flat.abs().amax((0, 2))
    columns = (columns / columns.median().clamp(min=1e-12)).clamp(1 / _MOST, _MOST)
    reach = None if math.isinf(top) else top / ranges.clamp(min=1e-3 * top)
    importance = flat.square().sum((0, 2))
    values = values[:, :_NOISE_SAMPLES]
    return min(
        _candidates(full, columns, reach),
        key=lambda gains: (
            _activation_noise(values, gains, levels, top, importance)
            + _weight_noise(flat, gains, power, w_bits)
        ),
    )


class Equalization(Transform):
    """Scales the channels between every pair of layers for which it is exact."""

    name = "equalization"

    def applies(self, module: fx.GraphModule, spec: QuantSpec) -> bool:
        wanted = spec.a_bits < 8 and has_depthwise(module)
        return wanted if spec.equalization is None else spec.equalization

    def places(self, module: fx.GraphModule) -> list[Pair]:
        layers = [n for n in module.graph.nodes if _is_weighted(n)]
        uses = Counter(operand(node, 1).target for node in layers)
        found = []
        for node in layers:
            pair = _pair(node)
            if pair is None or max(uses[operand(n, 1).target] for n in (pair.first, pair.second)) > 1:
                continue
            width, second = len(weight_of(module, node)), weight_of(module, pair.second)
            pair.depthwise = groups_of(pair.second) == width == second.shape[0]
            if pair.depthwise or (groups_of(pair.second) == 1 and second.shape[1] == width):
                found.append(pair)
        return found

    @torch.no_grad()
    def fold(
        self, module: fx.GraphModule, inputs: Rows, spec: QuantSpec, generator: torch.Generator
    ) -> Callable[[fx.GraphModule], None] | None:
        """Scale weights and biases on both sides of every pair; ReLU6 between them becomes a :class:`Ceiling` later."""
        # 8 bits have levels enough for every channel, and a range made to fit clips what calibration did not show
        pairs = [p for p in self.places(module) if spec.equalization or _bits(p, spec) < 8]
        if not pairs:
            return None
        inputs = inputs.leading(_IMAGES)
        starts = range(0, len(inputs), spec.batch_size)
        sampler = _Sampler(module, {p.first for p in pairs}, -(-_SAMPLES // len(starts)), generator)
        piece = rows_of_the_model(
            module.graph, spec.batch_size, None if spec.memory_mb is None else spec.memory_mb << 20
        )
        for start in starts:
            sampler.run_batch(inputs[start : start + spec.batch_size], piece)
        ceilings: dict[fx.Node, Tensor] = {}
        for pair in pairs:
            values, extremes = (
                torch.cat(kept.pop(pair.first), 1) for kept in (sampler.samples, sampler.extremes)
            )
            bits = _bits(pair, spec)
            levels = 2**bits - 1
            top = 6.0 if is_relu6(pair.activation) else math.inf
            if pair.activation is None:
                power = values.var(1)
                values, extremes, levels = values.abs(), extremes.abs(), levels // 2
            else:
                values, extremes = values.clamp(min=0.0), extremes.clamp(0.0, top)
                power = values.clamp(max=top).var(1)
            least = extremes.amax(1) * (bits / 8)
            dense = None if pair.depthwise else weight_of(module, pair.second)
            gains = _gains(values, power, least, levels, dense, spec.w_bits, top)
            _scale(module, pair, gains)
            if pair.activation is not None and is_relu6(pair.activation):
                axes = weight_of(module, pair.first).ndim - 2
                ceilings[pair.activation] = 6.0 * gains.reshape(-1, *[1] * axes)
        return partial(_insert_ceilings, ceilings=ceilings) if ceilings else None


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
