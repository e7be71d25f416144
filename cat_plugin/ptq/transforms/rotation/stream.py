"""Residual streams that may be rotated: what layers add to, and norms that do not see the basis read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import constant, is_call
from cat_plugin.ptq.transforms.rotation.moves import moved, numbered, path_from

__all__ = ["Maker", "Norm", "ResidualStream", "find_streams"]

_aten = torch.ops.aten
_NORMS = {_aten.layer_norm.default, _aten.rms_norm.default}
_CONVOLUTIONS = {_aten.conv1d.default, _aten.conv2d.default}
#: A share of a layer norm's largest gain, below which a channel's shift is not written as a multiple of its gain.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Maker:
    """What a stream begins with, or what is added to it.

    Attributes
    ----------
    node : fx.Node
        A linear layer, a convolution, or whatever reads a table of rows.
    weight : int
        Its argument that is the weight or the table.
    bias : int or None
        Its argument that is the bias.
    """

    node: fx.Node
    weight: int
    bias: int | None = None

    def rotate(self, module: fx.GraphModule, rotation: Tensor) -> None:
        """Have it make ``x R`` where it made ``x``."""
        weight = own_constant(module, self.node, self.weight)
        r = rotation.to(weight.device)
        if is_call(self.node, {_aten.linear.default} | _CONVOLUTIONS):
            weight.copy_((r.T @ weight.double().flatten(1)).view_as(weight))
        else:
            weight.copy_(weight.double() @ r)
        if self.bias is not None:
            bias = own_constant(module, self.node, self.bias)
            bias.copy_(bias.double() @ r)


@dataclass(frozen=True)
class Norm:
    """A norm over the stream's channels, and the linear layers that alone read it."""

    node: fx.Node
    readers: tuple[fx.Node, ...]

    def unfold(self, module: fx.GraphModule) -> Tensor | None:
        """Give its gain, and where they have biases its shift, to its readers; the shift that is left, a multiple of the gain."""
        gain, shift = (_own(module, self.node, index) for index in (2, 3))
        if is_call(self.node, {_aten.rms_norm.default}):
            shift = None
        biased = all(_given(reader, 2) is not None for reader in self.readers)
        for reader in self.readers:
            weight = own_constant(module, reader, 1)
            if shift is not None and biased:
                bias = own_constant(module, reader, 2)
                bias.copy_(bias.double() + weight.double() @ shift.double())
            if gain is not None:
                weight.copy_(weight.double() * gain.double())
        left = None
        if shift is not None:
            left = None if biased else shift.double() / (1.0 if gain is None else gain.double())
            shift.zero_()
        if gain is not None:
            gain.fill_(1.0)
        return left


@dataclass
class ResidualStream:
    """One stream, and all that touches it.

    With an orthogonal ``R``, ``x`` becomes ``x R``: makers' weights ``W`` (out, in) become ``R' W``, tables ``E R``; a norm
    without weight commutes with ``R``, its weight ``g`` goes into its readers', which become ``W diag(g) R``.  An RMSNorm commutes
    with every ``R``, a LayerNorm with those that leave the vector of ones, and so the mean of the channels, as it is.

    Attributes
    ----------
    width : int
        Channels.
    makers : list of Maker
        Linear layers, convolutions, embeddings and constants whose values are added.
    norms : list of Norm
        RMSNorms and LayerNorms that read it.
    readers : list of fx.Node
        Linear layers behind these, or behind nothing.
    """

    width: int
    makers: list[Maker] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)

    @property
    def centred(self) -> bool:
        """Whether something subtracts the mean of the channels."""
        return any(is_call(norm.node, {_aten.layer_norm.default}) for norm in self.norms)

    def rotate(self, module: fx.GraphModule, rotation: Tensor) -> None:
        """Fold a (C, C) float64 orthogonal matrix, in place; the function of the graph stays as it is."""
        for maker in self.makers:
            maker.rotate(module, rotation)
        for norm in self.norms:
            shift = norm.unfold(module)
            if shift is not None:
                own = own_constant(module, norm.node, 3)
                own.copy_(shift @ rotation.to(own.device))
        for reader in self.readers:
            weight = own_constant(module, reader, 1)
            weight.copy_(weight.double() @ rotation.to(weight.device))


def _given(node: fx.Node, index: int) -> object:
    return node.args[index] if len(node.args) > index else None


def _own(module: fx.GraphModule, node: fx.Node, index: int) -> Tensor | None:
    absent = not isinstance(_given(node, index), fx.Node)
    return None if absent else own_constant(module, node, index)


def _known(module: fx.GraphModule, node: fx.Node, *indices: int) -> bool:
    """Whether arguments are constants, where they are given."""
    return all(_given(node, i) is None or constant(module, node.args[i]) is not None for i in indices)


def _is_layer(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether the node is a linear layer of parameters that reads ``source`` as its input."""
    return is_call(node, {_aten.linear.default}) and node.args[0] is source and _known(module, node, 1, 2)


def _keeps_channels(node: fx.Node) -> bool:
    """Whether the node takes or joins rows of the stream, each with all of its channels."""
    if is_call(node, {_aten.select.int, _aten.slice.Tensor, _aten.cat.default, _aten.mean.dim}):
        axis = _given(node, 1) or 0
        value = (node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]).meta["val"]  # type: ignore[union-attr]
        axes = axis if isinstance(axis, list | tuple) else [axis]
        return all(isinstance(each, int) and each % value.ndim != value.ndim - 1 for each in axes)
    return False


def _whole(labels: Tensor | None, width: int) -> bool:
    """Whether the last axis has the stream's channels in their order, everywhere."""
    return labels is not None and labels.shape[-1] == width and bool((labels == torch.arange(width)).all())


def _readers(module: fx.GraphModule, node: fx.Node, width: int) -> list[fx.Node] | None:
    """The linear layers that read a norm, or what moves rows of its result; None where anything else does."""
    found: list[fx.Node] = []
    for user in node.users:
        if _is_layer(module, user, node):
            found.append(user)
        elif (_keeps_channels(user) and len(user.all_input_nodes) == 1) or _whole(
            moved(numbered(node), [user]), width
        ):
            further = _readers(module, user, width)
            if further is None:
                return None
            found += further
        elif not is_call(user, {_aten.sym_size.int}):
            return None
    return found


def _norm(module: fx.GraphModule, node: fx.Node, source: fx.Node, width: int) -> Norm | None:
    """A norm of the stream's channels, where linear layers alone read it."""
    if not is_call(node, _NORMS) or node.args[0] is not source or list(node.args[1]) != [width]:  # type: ignore[arg-type]
        return None
    centred = is_call(node, {_aten.layer_norm.default})
    if not _known(module, node, 2, *([3] if centred else [])):
        return None
    readers = _readers(module, node, width)
    if not readers:
        return None
    gain = constant(module, _given(node, 2))  # type: ignore[arg-type]
    if centred and _given(node, 3) is not None and gain is not None:
        small = float(gain.abs().min()) < _LEAST_GAIN * float(gain.abs().max())
        if small and any(_given(reader, 2) is None for reader in readers):
            return None
    return Norm(node, tuple(readers))


def _maker(module: fx.GraphModule, node: fx.Node, width: int) -> Maker | None:
    """What makes the value of a node, whose last axis has the stream's channels."""
    if is_call(node, {_aten.embedding.default}) and _known(module, node, 0):
        return Maker(node, 0)
    if is_call(node, {_aten.expand.default}) and constant(module, node.args[0]) is not None:
        table = constant(module, node.args[0])
        return Maker(node, 0) if table is not None and table.shape[-1] == width else None
    path = path_from(node, {_aten.linear.default} | _CONVOLUTIONS)
    if path is None or any(len(each.users) != 1 for each in path[:-1]) or not _known(module, path[0], 1, 2):
        return None
    layer = path[0]
    convolution = is_call(layer, _CONVOLUTIONS)
    if convolution and (_given(layer, 6) or 1) != 1:
        return None  # the outputs of a group are made of its own inputs alone
    if not _whole(moved(numbered(layer, 1 if convolution else -1), path[1:]), width):
        return None
    return Maker(layer, 1, 2 if _given(layer, 2) is not None else None)


def _terms(module: fx.GraphModule, node: fx.Node, width: int) -> tuple[list[fx.Node], list[Maker]] | None:
    """The values that a node of the stream adds, joins or takes rows of, and its constants; None for any other node."""
    if is_call(node, {_aten.add.Tensor}) and not node.kwargs and len(node.args) == 2:
        tables = [Maker(node, i) for i, each in enumerate(node.args) if constant(module, each) is not None]
        for table in tables:
            value = constant(module, node.args[table.weight])
            assert value is not None
            if not value.ndim or value.shape[-1] != width:
                return None
        rest = [each for i, each in enumerate(node.args) if i not in {table.weight for table in tables}]
        if all(isinstance(each, fx.Node) and each.meta["val"].shape[-1] == width for each in rest):
            return rest, tables  # type: ignore[return-value]
    elif _keeps_channels(node):
        return list(node.all_input_nodes), []
    return None


def _stream(module: fx.GraphModule, start: fx.Node) -> ResidualStream | None:
    """The stream that ``start`` belongs to; None where something touches it that is not known to commute."""
    found, waiting, seen = ResidualStream(int(start.meta["val"].shape[-1])), [start], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        terms = _terms(module, node, found.width)
        if terms is not None:
            waiting += terms[0]
            found.makers += terms[1]
        elif (maker := _maker(module, node, found.width)) is not None:
            found.makers.append(maker)
        else:
            return None
        for user in node.users:
            norm = _norm(module, user, node, found.width)
            if norm is not None:
                found.norms.append(norm)
                found.readers += [reader for reader in norm.readers if reader not in found.readers]
            elif is_call(user, {_aten.add.Tensor}) or _keeps_channels(user):
                waiting.append(user)
            elif _is_layer(module, user, node):
                found.readers.append(user)
            elif not is_call(user, {_aten.sym_size.int}):
                return None
    return found if found.norms else None


def find_streams(module: fx.GraphModule) -> list[ResidualStream]:
    """Residual streams of an ATen graph that may be rotated, in order of execution."""
    streams: list[ResidualStream] = []
    for node in module.graph.nodes:
        known = any(node is norm.node for stream in streams for norm in stream.norms)
        if is_call(node, _NORMS) and not known:
            stream = _stream(module, node.args[0])
            if stream is not None:
                streams.append(stream)
    return streams
