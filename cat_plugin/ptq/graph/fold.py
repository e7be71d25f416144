"""BatchNorm and factors of channels folded into the layer in front, found from the graph.

A BatchNorm in evaluation mode is the affine map ``y = g (x - m) / sqrt(v + e) + b`` per channel; behind a
convolution or linear layer that nothing else reads it becomes part of that layer's weight and bias (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv 1712.05877, equation 14).  A constant factor for each channel behind a linear layer, as LayerScale is (Touvron et al.,
"Going deeper with Image Transformers", arXiv 2103.17239, equation 3), does as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.ops import BATCH_NORM, WEIGHTED, constant, is_call

__all__ = ["fold_batch_norm", "fold_factors"]


def fold_batch_norm(module: fx.GraphModule) -> int:
    """Fold every BatchNorm that follows a weighted operation, in place.

    Each folded layer gets a weight and bias of its own, so that a module the model calls twice, with different
    normalisation behind it, stays right.

    Parameters
    ----------
    module : fx.GraphModule
        From :func:`cat_plugin.ptq.graph.trace.trace`.

    Returns
    -------
    int
        Number of BatchNorms folded.
    """
    graph = module.graph
    folded = 0
    for node in list(graph.nodes):
        if not is_call(node, BATCH_NORM):
            continue
        conv = node.args[0]
        if not is_call(conv, WEIGHTED) or len(conv.users) != 1:
            continue
        gamma, beta, mean, var, training, _, eps = node.args[1:8]
        if training:
            continue  # it normalises by the batch's own statistics
        weight, running_mean, running_var = (constant(module, n) for n in (conv.args[1], mean, var))
        if weight is None or running_mean is None or running_var is None:
            continue
        if conv.target is torch.ops.aten.linear.default and conv.meta["val"].ndim != 2:
            continue  # BatchNorm normalises axis 1, the linear layer's outputs are the last axis
        bias_node = conv.args[2] if len(conv.args) > 2 else None
        bias, g, b = (constant(module, n) for n in (bias_node, gamma, beta))
        factor = torch.rsqrt(running_var.double() + eps)
        if g is not None:
            factor = factor * g.double()
        shift = -running_mean.double() if bias is None else bias.double() - running_mean.double()
        new_bias = shift * factor if b is None else shift * factor + b.double()
        new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        _replace_parameters(module, conv, new_weight.to(weight.dtype), new_bias.to(weight.dtype))
        node.replace_all_uses_with(conv)
        folded += 1
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return folded


def fold_factors(module: fx.GraphModule) -> int:
    """Fold every multiplication of a linear layer's output, which nothing else reads, by a constant for each channel, in place.

    Parameters
    ----------
    module : fx.GraphModule
        From :func:`cat_plugin.ptq.graph.trace.trace`.

    Returns
    -------
    int
        Number of multiplications folded.
    """
    graph = module.graph
    folded = 0
    for node in list(graph.nodes):
        if not is_call(node, {torch.ops.aten.mul.Tensor}):
            continue
        factors = [factor for arg in node.args if (factor := constant(module, arg)) is not None]
        linear = next((n for n in node.all_input_nodes if is_call(n, {torch.ops.aten.linear.default})), None)
        if len(factors) != 1 or linear is None or len(linear.users) != 1:
            continue
        weight, bias = (constant(module, n) for n in (*linear.args[1:], None)[:2])
        (factor,) = factors
        if weight is None or factor.shape[-1:] != (len(weight),) or factor.numel() != len(weight):
            continue
        if factor.ndim > node.meta["val"].ndim:
            continue
        if len(linear.args) > 2 and linear.args[2] is not None and bias is None:
            continue
        scale = factor.reshape(-1).double()
        new_weight = (weight.double() * scale.unsqueeze(1)).to(weight.dtype)
        new_bias = None if bias is None else (bias.double() * scale).to(weight.dtype)
        _replace_parameters(module, linear, new_weight, new_bias)
        node.replace_all_uses_with(linear)
        folded += 1
    graph.eliminate_dead_code()
    module.recompile()
    return folded


def _replace_parameters(module: fx.GraphModule, conv: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    graph = module.graph
    with graph.inserting_before(conv):
        nodes: list[fx.Node | None] = []
        for suffix, value in (("weight", weight), ("bias", bias)):
            if value is None:
                nodes.append(None)
                continue
            name = f"_folded_{conv.name}_{suffix}"
            module.register_buffer(name, value.contiguous())
            nodes.append(graph.create_node("get_attr", name))
    args = list(conv.args) + [None] * (3 - len(conv.args))
    args[1:3] = nodes
    conv.args = tuple(args)
