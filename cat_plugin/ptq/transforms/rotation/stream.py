"""Residual streams that may be rotated: what layers add to, and norms that do not see the basis read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.graph.ops import constant, is_call

__all__ = ["ResidualStream", "find_streams"]

_aten = torch.ops.aten
_RMS_NORM = _aten.rms_norm.default


@dataclass
class ResidualStream:
    """One stream, and all that touches it.

    With an orthogonal ``R``, ``x`` becomes ``x R``: makers' weights ``W`` (out, in) become ``R' W``, tables ``E R``; a norm
    without weight commutes with ``R``, its weight ``g`` goes into its readers', which become ``W diag(g) R``.

    Attributes
    ----------
    width : int
        Channels.
    makers : list of fx.Node
        Linear layers and embeddings whose results are added.
    norms : list of fx.Node
        RMSNorms that read it.
    readers : list of fx.Node
        Linear layers behind these, or behind nothing.
    """

    width: int
    makers: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)

    def rotate(self, module: fx.GraphModule, rotation: Tensor) -> None:
        """Fold a (C, C) float64 orthogonal matrix, in place; the function of the graph stays as it is."""
        for node in self.makers:
            linear = is_call(node, {_aten.linear.default})
            weight = own_constant(module, node, 1 if linear else 0)
            r = rotation.to(weight.device)
            weight.copy_(r.T @ weight.double() if linear else weight.double() @ r)
            if linear and len(node.args) > 2 and node.args[2] is not None:
                bias = own_constant(module, node, 2)
                bias.copy_(bias.double() @ r)
        for norm in self.norms:
            gain = own_constant(module, norm, 2) if len(norm.args) > 2 and norm.args[2] is not None else None
            if gain is None:
                continue
            for reader in norm.users:
                weight = own_constant(module, reader, 1)
                weight.copy_(weight.double() * gain.double())
            gain.fill_(1.0)
        for reader in self.readers:
            weight = own_constant(module, reader, 1)
            weight.copy_(weight.double() @ rotation.to(weight.device))


def _is_layer(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether the node is a linear layer of parameters that reads ``source`` as its input."""
    linear = is_call(node, {_aten.linear.default}) and node.args[0] is source
    biased = len(node.args) > 2 and node.args[2] is not None
    return (
        linear
        and constant(module, node.args[1]) is not None
        and (not biased or constant(module, node.args[2]) is not None)
    )


def _is_norm(module: fx.GraphModule, node: fx.Node, source: fx.Node, width: int) -> bool:
    """Whether the node is an RMSNorm of the stream's channels that linear layers alone read."""
    if not is_call(node, {_RMS_NORM}) or node.args[0] is not source or list(node.args[1]) != [width]:  # type: ignore[arg-type]
        return False
    weighted = len(node.args) > 2 and node.args[2] is not None
    known = not weighted or constant(module, node.args[2]) is not None
    return known and all(_is_layer(module, user, node) for user in node.users)


def _is_maker(module: fx.GraphModule, node: fx.Node) -> bool:
    if is_call(node, {_aten.embedding.default}):
        return constant(module, node.args[0]) is not None
    return is_call(node, {_aten.linear.default}) and _is_layer(module, node, node.args[0])  # type: ignore[arg-type]


def _stream(module: fx.GraphModule, start: fx.Node) -> ResidualStream | None:
    """The stream that ``start`` belongs to; None where something touches it that is not known to commute."""
    width = start.meta["val"].shape[-1]
    found, waiting, seen = ResidualStream(int(width)), [start], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, {_aten.add.Tensor}) and not node.kwargs and len(node.args) == 2:
            for term in node.args:
                if not isinstance(term, fx.Node) or term.meta["val"].shape != node.meta["val"].shape:
                    return None
                waiting.append(term)
        elif _is_maker(module, node):
            found.makers.append(node)
        else:
            return None
        for user in node.users:
            if is_call(user, {_aten.add.Tensor}):
                waiting.append(user)
            elif _is_norm(module, user, node, found.width):
                found.norms.append(user)
                found.readers += [reader for reader in user.users if reader not in found.readers]
            elif _is_layer(module, user, node):
                found.readers.append(user)
            else:
                return None
    return found if found.norms else None


def find_streams(module: fx.GraphModule) -> list[ResidualStream]:
    """Residual streams of an ATen graph that may be rotated, in order of execution."""
    streams: list[ResidualStream] = []
    for node in module.graph.nodes:
        known = any(node in stream.norms for stream in streams)
        if is_call(node, {_RMS_NORM}) and not known:
            stream = _stream(module, node.args[0])
            if stream is not None:
                streams.append(stream)
    return streams
