"""Scales and shifts of channels trained block by block, the weights as they are.

What is trained of a block: for each place its scales and shifts, which begin at 1 and 0 on top of what the closed form has
folded; for each linear layer two shares of every row's range (their sigmoid begins at 0.98), and vectors where they are asked for; for each quantized activation the
two ends of its range, or the share of a token's own that is kept.  Weights are rounded to nearest.  Afterwards
scales and shifts are folded like any others.  The ranges have served their purpose: the layers are fitted in closed form to
what is then quantized, which searches ranges anew.

Adam without weight decay is what AdamW with none is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.graph.insert import group_of, layer_widths
from cat_plugin.ptq.graph.modules import modulation
from cat_plugin.ptq.graph.ops import PRODUCTS, arguments, is_call, operand
from cat_plugin.ptq.learned.descent import Outcome, Schedule, TrainedInPlace, descend, split_rows
from cat_plugin.ptq.learned.soft_unit import run_nodes
from cat_plugin.ptq.quantizers.observers import search_activation_range, search_token_share, subsample
from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from cat_plugin.ptq.quantizers.uniform import integer_range
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.transforms.smoothing.blocks import Block
from cat_plugin.ptq.transforms.smoothing.fake import between, clipped_weight
from cat_plugin.ptq.transforms.smoothing.fold import fold_place
from cat_plugin.ptq.transforms.smoothing.losses import BLOCK_LOSSES, BlockLoss
from cat_plugin.ptq.transforms.smoothing.matrices import MATRICES, Matrix
from cat_plugin.ptq.transforms.smoothing.places import Side
from cat_plugin.ptq.transforms.smoothing.starts import STARTS
from cat_plugin.ptq.transforms.smoothing.vectors import first_vectors

__all__ = ["Streams", "rows_of_a_step", "train_block", "widths_of"]

_aten = torch.ops.aten
_START = 4.0  # of the logit of a share
_LEAST = 1e-2  # no scale falls below
_SCALE_RATE, _CLIP_RATE, _VECTOR_RATE = 5e-3, 1e-2, 1e-3
_ROWS, _POSITIONS = 8, 4096  # inputs in a step at most, and tokens of them
_TOKENS = 2048  # that a share is searched on
_LOOKS = 8
_SAMPLE = 1 << 16


def rows_of_a_step(inputs: Tensor) -> int:
    """Of inputs (N, tokens..., C) to a block, or of the model, how many a gradient step takes."""
    sequences = inputs.ndim == 3 or not inputs.is_floating_point()
    return max(1, min(_ROWS, _POSITIONS // max(1, inputs.shape[1]))) if sequences else _ROWS


def widths_of(module: fx.GraphModule, spec: QuantSpec) -> dict[fx.Node, tuple[int, int]]:
    """Linear layer that is to be quantized -> bits of its weights and of its input."""
    widths = layer_widths(module, spec)
    return {n: bits for n, (_, bits) in widths.items() if bits and n.target is _aten.linear.default}


@dataclass
class Streams:
    """Values in front of a block.

    Attributes
    ----------
    full, quantized : Tensor
        (N, ...) in full precision, and with everything before the block rounded.
    store : TensorStore
        Where those behind the next blocks are kept.
    """

    full: Tensor
    quantized: Tensor
    store: TensorStore = field(default_factory=TensorStore)

    def over(self, run: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
        """What `run` makes of all rows of (N, ...), kept in the store."""
        kept: Tensor | None = None
        for start in range(0, len(x), batch_size):
            part = run(x[start : start + batch_size])
            if kept is None:
                kept = self.store.allocate((len(x), *part.shape[1:]), part.dtype, part.device)
            kept[start : start + len(part)] = part
            self.store.settle()
        assert kept is not None
        return kept


def _logits(*shape: int, device: torch.device) -> Tensor:
    return torch.full(shape, _START, device=device, requires_grad=True)


@dataclass
class _Range:
    """The range of one activation.

    Attributes
    ----------
    bits : int
        Of the activation.
    ends : list of Tensor
        Logarithms of factors of the ends; empty before the first value is seen.
    """

    bits: int
    ends: list[Tensor] = field(default_factory=list)
    first: tuple[float, float] = (0.0, 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.ends:
            sample = subsample(x.detach(), _SAMPLE, torch.Generator().manual_seed(0))
            scale, zero, signed = search_activation_range(sample, self.bits, False)
            least, most = integer_range(self.bits, signed)
            self.first = ((least - zero) * scale, (most - zero) * scale)
            self.ends = [torch.zeros((), device=x.device, requires_grad=True) for _ in range(2)]
        low, high = (end * factor.exp() for end, factor in zip(self.first, self.ends, strict=True))
        return between(x, low, high, self.bits)


@dataclass
class _TokenRange:
    """The share of its range that each token is rounded over.

    Attributes
    ----------
    bits : int
        Of the activation.
    ends : list of Tensor
        The logarithm of a factor of the share; empty before the first value is seen.
    """

    bits: int
    ends: list[Tensor] = field(default_factory=list)
    first: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        quantizer = TokenQuantizer(self.bits)
        if not self.ends:
            tokens = x.detach().reshape(-1, x.shape[-1])
            self.first = search_token_share(tokens[:: max(1, len(tokens) // _TOKENS)], quantizer)
            self.ends = [torch.zeros((), device=x.device, requires_grad=True)]
        return quantizer.rounded(x, (self.first * self.ends[0].exp()).clamp(max=1.0))


class _SmoothedBlock(TrainedInPlace):
    """A block of the float graph, run with its places scaled and its weights and activations rounded."""

    def __init__(
        self,
        module: fx.GraphModule,
        block: Block,
        widths: Mapping[fx.Node, tuple[int, int]],
        spec: QuantSpec,
    ) -> None:
        self.module, self.block, self.widths = module, block, widths
        device = next((tensor.device for tensor in module.buffers()), torch.device("cpu"))
        self.scales = [torch.ones(p.count, device=device, requires_grad=True) for p in block.places]
        moves = spec.smoothing is not None and STARTS[spec.smoothing].moves
        self.shifts = [
            torch.zeros(p.count, device=device, requires_grad=True) if p.shifted and moves else None
            for p in block.places
        ]
        self.shares: dict[fx.Node, list[Tensor]] = {}
        self.vectors: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.ranges: dict[tuple[fx.Node, int], _Range | _TokenRange] = {}
        kind = _TokenRange if spec.a_granularity == "token" else _Range
        self.functions: dict[fx.Node, Any] = {}
        self.matrices: dict[fx.Node, Matrix] = {}  # by what layers read
        makers = {s.node for p in block.places for s in p.sources}
        for node in block.nodes:
            if node in widths:
                weight = getattr(module, str(arguments(node)[1].target))
                group = group_of(weight.shape[1], spec.weight_groups) or weight.shape[1]
                self.shares[node] = [_logits(weight.numel() // group, 1, device=device) for _ in range(2)]
                if spec.rotation_vectors > 1:
                    self.vectors[node] = first_vectors(weight.shape, spec.rotation_vectors, device)
                source = operand(node)
                if spec.smoothing in MATRICES and source not in self.matrices:
                    self.matrices[source] = MATRICES[spec.smoothing](weight.shape[1], device)
                if not spec.weight_only:
                    self.ranges[node, 0] = kind(widths[node][1])
            elif is_call(node, PRODUCTS) and spec.attention_bits is not None and not spec.weight_only:
                for index in range(PRODUCTS[node.target]):
                    self.ranges[node, index] = kind(spec.attention_bits)
            if (
                node in makers
                or node in self.shares
                or (node, 0) in self.ranges
                or is_call(node, {_aten.linear.default})
            ):
                self.functions[node] = partial(self._call, node)

    def _sides(self, node: fx.Node, readers: bool) -> Iterator[tuple[Side, Tensor, Tensor | None]]:
        for place, scales, shifts in zip(self.block.places, self.scales, self.shifts, strict=True):
            for side in place.readers if readers else place.sources:
                if side.node is node:
                    some = scales.clamp(min=_LEAST)[side.scales]
                    factors = torch.where(side.exponents.to(some.device) > 0, some, 1 / some)
                    yield side, factors, None if shifts is None else shifts[side.scales]

    def _call(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """A node's operation as the quantized block computes it."""
        target: Any = node.target
        if target is _aten.linear.default:
            y = self._linear(node, *args)
        else:
            rounded = [self.ranges[node, i](x) if (node, i) in self.ranges else x for i, x in enumerate(args)]
            y = target(*rounded, **kwargs)
        for side, factors, shifts in self._sides(node, readers=False):
            scale = torch.ones(y.shape[-1], device=y.device).index_put((side.channels.to(y.device),), factors)
            if shifts is not None:
                y = y - torch.zeros_like(scale).index_put((side.channels.to(y.device),), shifts)
            y = y / scale
        return y

    def _linear(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for side, factors, shifts in self._sides(node, readers=True):
            columns = side.channels.to(weight.device)
            if shifts is not None and bias is not None:
                bias = bias + weight[:, columns] @ shifts
            weight = weight * torch.ones(weight.shape[1], device=weight.device).index_put((columns,), factors)
        if node in self.widths:
            matrix = self.matrices.get(operand(node))
            if matrix is not None:
                x, weight = matrix(x), matrix.on_weight(weight)
            low_share, high_share = self.shares[node]
            factor = modulation(*self.vectors[node]) if node in self.vectors else None
            weight = clipped_weight(weight, low_share, high_share, self.widths[node][0], factor)
        if (node, 0) in self.ranges:
            x = self.ranges[node, 0](x)
        return torch.nn.functional.linear(x, weight, bias)

    def run(self, x: Tensor) -> Tensor:
        """Output of the block for the input ``x``."""
        env: dict[fx.Node, Any] = {self.block.source: x}
        run_nodes(self.module, self.block.nodes, env, lambda child, value: child(value), self.functions)
        result: Tensor = env[self.block.output]
        return result

    def full(self, x: Tensor) -> Tensor:
        """The same in full precision."""
        env: dict[fx.Node, Any] = {self.block.source: x}
        run_nodes(self.module, self.block.nodes, env, lambda child, value: child(value))
        result: Tensor = env[self.block.output]
        return result

    def groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        moved = [*self.scales, *(z for z in self.shifts if z is not None)]
        moved += [part for matrix in self.matrices.values() for part in matrix.trained]
        vectors = [vector for pair in self.vectors.values() for vector in pair]
        clips = [share for shares in self.shares.values() for share in shares]
        clips += [end for each in self.ranges.values() for end in each.ends]
        groups = [{"params": moved, "lr": _SCALE_RATE}, {"params": clips, "lr": _CLIP_RATE}]
        return [*groups, {"params": vectors, "lr": _VECTOR_RATE}] if vectors else groups

    def regularizers(self, share: float) -> list[Tensor]:
        """Nothing is added to the loss; matrices that grow are told how far they may."""
        for matrix in self.matrices.values():
            matrix.share = share
        return []

    def harden(self) -> None:
        """Nothing is written before the block is finished."""

    @torch.no_grad()
    def fold(self) -> None:
        """Fold scales and shifts into the graph; vectors that were trained are left with their layers."""
        for node, (left, right) in self.vectors.items():
            if bool((modulation(left, right) != 1).any()):
                node.meta["rotation_vectors"] = (left.detach(), right.detach())
        for place, scales, shifts in zip(self.block.places, self.scales, self.shifts, strict=True):
            fold_place(
                self.module,
                place,
                scales.detach().clamp(min=_LEAST).cpu(),
                None if shifts is None else shifts.detach().cpu(),
            )
        for source, matrix in self.matrices.items():
            matrix.share = 1.0
            layers = [node for node in self.shares if operand(node) is source]
            matrix.fold(self.module, source, layers)


class _BlockError:
    """The loss of some rows, judged by the same on the rows held out.

    There each of its terms is divided by what it was at first, so that looks can be compared.
    """

    def __init__(
        self, soft: _SmoothedBlock, inputs: Tensor, accumulated: Tensor, own: Tensor, loss: BlockLoss
    ) -> None:
        self.soft, self.inputs, self.accumulated, self.own, self.loss = soft, inputs, accumulated, own, loss
        self.count, self.judged = split_rows(len(inputs))
        self.first: list[float] = []
        self.batch = rows_of_a_step(inputs)

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        rows = rows.to(self.inputs.device)
        yield self.loss(self.soft.run(self.inputs[rows]), self.accumulated[rows], self.own[rows])

    def _held_out(self) -> Iterator[slice]:
        for start in range(self.judged.start, self.judged.stop, self.batch):
            yield slice(start, min(start + self.batch, self.judged.stop))

    def judge(self) -> Tensor:
        sums: list[float] = []
        for rows in self._held_out():
            terms = self.loss.terms(self.soft.run(self.inputs[rows]), self.accumulated[rows], self.own[rows])
            now = [float(term) * (rows.stop - rows.start) for term in terms]
            sums = [a + b for a, b in zip(sums or [0.0] * len(now), now, strict=True)]
        self.first = self.first or [max(term, 1e-20) for term in sums]
        return torch.tensor([sum(a / b for a, b in zip(sums, self.first, strict=True)) / len(sums)])

    @torch.no_grad()
    def squared_error(self) -> float:
        """Relative, of the block's outputs on the rows held out."""
        error = power = 0.0
        for rows in self._held_out():
            error += float((self.soft.run(self.inputs[rows]) - self.accumulated[rows]).square().sum())
            power += float(self.accumulated[rows].square().sum())
        return error / max(power, 1e-20)


def train_block(
    module: fx.GraphModule,
    block: Block,
    streams: Streams,
    spec: QuantSpec,
    epochs: int,
    generator: torch.Generator,
    widths: Mapping[fx.Node, tuple[int, int]],
    kept: list[Tensor] | None = None,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[Outcome | None, list[Tensor]]:
    """Train a block's scales and shifts and fold them, in place; ``streams`` are then those behind it.

    Parameters
    ----------
    module : fx.GraphModule
        BatchNorm-folded graph, whose function stays as it is.
    block : Block
        Of :func:`~cat_plugin.ptq.transforms.smoothing.blocks.find_blocks`.
    streams : Streams
        Values in front of it.
    spec : QuantSpec
        Bits and method.
    epochs : int
        Passes over the rows that are trained on.
    generator : torch.Generator
        CPU generator of the order of the rows.
    widths : mapping
        From :func:`widths_of`.
    kept : list of Tensor or None
        What an interrupted run has trained here: taken over, nothing is trained.
    tick : callable or None
        Called with the number of each finished gradient step.

    Returns
    -------
    outcome : Outcome or None
        Relative squared error of the block's output on the rows held out before, and that times the share to which the method's
        own loss fell there; None where the block has nothing to train, or it was trained before.
    trained : list of Tensor
        What is to be kept of it.
    """
    soft = _SmoothedBlock(module, block, widths, spec)
    with torch.no_grad():
        accumulated = streams.over(soft.full, streams.full, spec.batch_size)
        own = streams.over(soft.full, streams.quantized, spec.batch_size)
        soft.run(streams.quantized[: spec.batch_size])  # the ranges begin where they are searched
    outcome = None
    if kept is not None:
        soft.load(kept)
    elif block.places:
        assert spec.smoothing is not None
        objective = _BlockError(soft, streams.quantized, accumulated, own, BLOCK_LOSSES[spec.smoothing]())
        steps, before = epochs * math.ceil(objective.count / objective.batch), objective.squared_error()
        schedule = Schedule(steps, objective.batch, _LOOKS)
        outcome = descend(soft, soft.groups(), objective, schedule, generator, tick=tick)
        fallen = outcome.after / max(outcome.before, 1e-20)
        outcome = dataclasses.replace(outcome, before=before, after=before * fallen)
    trained = soft.snapshot()
    with torch.no_grad():
        streams.store.release(own)
        behind = streams.over(soft.run, streams.quantized, spec.batch_size)
        for old in (streams.full, streams.quantized):  # no matter if it is the caller's
            streams.store.release(old)
        streams.full, streams.quantized = accumulated, behind
        soft.fold()
    return outcome, trained
