"""CAT for language models: the cluster-affine map acts on the last hidden state of each token, before the vocabulary.

A map of logits has parameters for every word and cluster; the hidden state has a hundredth of their columns, and what it is
mapped to decides all of them.  The target is expressed in the basis of the quantized output layer, which may be rotated or have
taken up a norm's weights: with ``h`` the full-precision state, ``W`` and ``b`` the full-precision layer and ``V`` and ``c`` the
quantized one, it is the ``t`` of least ``|V t + c - W h - b|``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.logits import as_rows, from_rows
from cat_plugin.models import evaluating
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.graph.ops import is_call, operand, output_leaves
from cat_plugin.ptq.graph.trace import trace

if TYPE_CHECKING:
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

__all__ = ["TokenMap", "correct_tokens"]

_COMPONENTS = 200  # of the hidden states
_DAMPING = 1e-6  # of the output layer's second moments


class TokenMap(nn.Module):
    """A fitted map applied to every token.

    Parameters
    ----------
    map : ClusterAffineModule
        Of as many columns as a hidden state has.
    """

    def __init__(self, map: ClusterAffineModule) -> None:
        super().__init__()
        self.map = map

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) hidden states to (N, T, C)."""
        return from_rows(self.map(as_rows(x, x.ndim - 1)), x, x.ndim - 1)


def correct_tokens(
    quantized: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any] | Tensor,
    estimator: ClusterAffine | None = None,
    *,
    num_samples: int = 1024,
) -> tuple[fx.GraphModule, ClusterAffine]:
    """Fit a cluster-affine map of the last hidden state and put it in front of the output layer.

    Parameters
    ----------
    quantized : nn.Module
        Of :func:`cat_plugin.ptq.quantize`, or whatever else rounded the model, which is then traced and what depends on its
        parameters alone computed; left as it is.
    reference : nn.Module
        The full-precision model.
    calibration : iterable or Tensor
        (N, T) windows of tokens, at least two, or batches of them; those that the model was quantized on will do, others are better.
    estimator : ClusterAffine, optional
        Fitted in place; by default one map of low rank (200 components at most), blended in fully, whose strength
        generalised cross-validation chooses. More clusters gained nothing on text that was not fitted to
        (docs/benchmarks/ptq_history.md).
    num_samples : int
        Windows used at most.

    Returns
    -------
    module : fx.GraphModule
        A copy of `quantized`, or its trace, with the map in it.
    estimator : ClusterAffine
        What it was fitted by.

    Raises
    ------
    CATTypeError
        If `quantized` is no module.
    CalibrationError
        If a model does not end in a linear layer, or the two hidden states do not go with each other.
    """
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

    if not isinstance(quantized, nn.Module):
        raise CATTypeError(
            f"the quantized model is a {type(quantized).__name__}; expected a torch.nn.Module."
        )
    estimator = (
        ClusterAffine(mode="lowrank", n_clusters=1, n_components=_COMPONENTS, alpha=1.0, random_state=0)
        if estimator is None
        else estimator
    )
    inputs = gather_inputs(calibration, num_samples)
    with evaluating(reference), evaluating(quantized), torch.no_grad():
        full = trace(reference, inputs[:2])
        if isinstance(quantized, fx.GraphModule):
            module = copy.deepcopy(quantized)
        else:
            module = trace(quantized, inputs[:2])
        mine, other = _Head(module), _Head(full)
        if mine.weight.shape[0] != other.weight.shape[0]:
            raise CalibrationError(
                f"the output layer of the quantized model makes {len(mine.weight)} logits, that of the reference "
                f"{len(other.weight)}; expected two models of one vocabulary."
            )
        target = mine.basis_of(other)
        states = list(_states(mine, other, target, inputs.tensors))
        estimator.fit_batches(states)
        step = TokenMap(ClusterAffineModule(estimator.parameters_).to(mine.weight.device))
    module.add_submodule("token_map", step)
    with module.graph.inserting_after(mine.hidden):
        mapped = module.graph.call_module("token_map", (mine.hidden,))
    mine.hidden.replace_all_uses_with(mapped, delete_user_cb=lambda user: user is not mapped)
    module.graph.lint()
    module.recompile()
    return module, estimator


class _Head:
    """The output layer of a graph, and what stands in front of it.

    Parameters
    ----------
    module : fx.GraphModule
        A language model's.

    Attributes
    ----------
    hidden : fx.Node
        The last hidden state, in front of its quantizer.
    weight, bias : Tensor
        (V, C) and (V,) float64, dequantized.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        (node, *others) = output_leaves(module.graph)
        while not others and isinstance(node, fx.Node) and not is_call(node, {torch.ops.aten.linear.default}):
            node = next((n for n in node.all_input_nodes if n.op != "get_attr"), None)
        if others or not isinstance(node, fx.Node):
            raise CalibrationError(
                "the model does not end in one linear layer that makes the logits of tokens; expected a language model's. Use "
                "cat_plugin.correct for others."
            )
        self.module = module
        self.weight = self._constant(node.args[1]).double()
        biased = len(node.args) > 2 and node.args[2] is not None
        self.bias = (
            self._constant(node.args[2]).double() if biased else self.weight.new_zeros(len(self.weight))
        )
        source = operand(node)
        while "quantize_per_t" in str(source.target):
            source = operand(source)
        self.hidden = source

    def _constant(self, node: Any) -> Any:
        """Value of what depends on the graph's buffers alone."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self.module.get_buffer(str(node.target))
        if node.op != "call_function":
            raise CalibrationError(
                "the weight of the output layer is computed from the inputs; expected a parameter."
            )
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constant)
        target: Any = node.target
        return target(*args, **kwargs)

    def body(self) -> fx.GraphModule:
        """The graph up to the hidden state."""
        graph = fx.Graph()
        known: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.module.graph, known)
        graph.output(known[self.hidden])
        graph.eliminate_dead_code()
        return fx.GraphModule(self.module, graph)

    def basis_of(self, other: _Head) -> tuple[Tensor, Tensor]:
        """(C, C') matrix and (C,) offset that take hidden states of another model to those that give its logits here."""
        moments = self.weight.T @ self.weight
        damping = _DAMPING * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
        right = torch.cat(
            [self.weight.T @ other.weight, self.weight.T @ (other.bias - self.bias)[:, None]], 1
        )
        found = torch.linalg.solve(moments + damping, right)
        return found[:, :-1], found[:, -1]


def _states(
    mine: _Head, other: _Head, target: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[Any, Any]]:
    """(tokens, C) states of the quantized model, and what they should be, window by window."""
    quantized, full = mine.body(), other.body()
    matrix, offset = target
    for row in range(len(inputs[0])):
        window = [x[row : row + 1].to(mine.weight.device) for x in inputs]
        given = quantized(*window).flatten(0, -2)
        wanted = full(*window).flatten(0, -2).double() @ matrix.T + offset
        yield given.float().cpu().numpy(), wanted.float().cpu().numpy()
