"""Test-time adaptation: the last block of a quantized model learned again on unlabelled inputs of its deployment.

LRQuant+ (IEEE TPAMI 2025, doi 10.1109/TPAMI.2025.3599479) trains the scales of the last block for a few epochs on what the model
is given where it runs, against the full-precision model, by squared error and the negative logarithm of the cosine similarity.
Here the scales of the weights and the biases of a graph that is quantized already are trained; integers and the grids of
activations stay, so that the result is of the same form and size.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.expectations import nearest
from cat_plugin.models import evaluating
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.closed_form.sequence import generator_for
from cat_plugin.ptq.graph.ops import arguments
from cat_plugin.ptq.learned.descent import Outcome, Schedule, TrainedInPlace, descend, split_rows
from cat_plugin.ptq.rows import Inputs
from cat_plugin.ptq.transforms.smoothing.losses import TwoBranches, negative_log_cosine

__all__ = ["adapt"]

_SCALE_RATE, _BIAS_RATE = 1e-3, 1e-3
_ROWS, _LOOKS = 8, 5


def adapt(
    model: fx.GraphModule,
    inputs: Iterable[Any] | Tensor,
    reference: nn.Module,
    *,
    layers: Sequence[str] = (),
    epochs: int = 5,
    num_samples: int = 1024,
    seed: int = 0,
) -> tuple[fx.GraphModule, Outcome]:
    """Learn the last block again.

    Parameters
    ----------
    model : fx.GraphModule
        Of :func:`cat_plugin.ptq.quantize`, with one result (N, ..., C); left as it is.
    inputs : iterable or Tensor
        Unlabelled inputs as the deployment has them; as for the calibration.
    reference : nn.Module
        The full-precision model.
    layers : sequence of str
        Name patterns of the layers that are trained; none is the last of those blocks whose names end in a number, or
        the layer in front of the output layer.
    epochs : int
        Passes over the inputs.
    num_samples : int
        Inputs used at most.
    seed : int
        Of their order.

    Returns
    -------
    module : fx.GraphModule
        A copy with other scales and biases, or the same where these gain nothing on the rows held out.
    outcome : Outcome
        The loss on these rows before and after, over what it was before.

    Raises
    ------
    CATTypeError
        If `model` is no graph of the engine's, or has several results.
    CATValueError
        If a pattern matches no quantized layer, or `epochs` is no positive number.
    """
    if not isinstance(model, fx.GraphModule):
        raise CATTypeError(
            f"the quantized model is a {type(model).__name__}; expected the graph that cat_plugin.ptq.quantize returns."
        )
    if epochs < 1:
        raise CATValueError(f"epochs is {epochs}; expected 1 or more.")
    given = gather_inputs(inputs, num_samples)
    with evaluating(reference), torch.no_grad():
        module = copy.deepcopy(model)
        soft = _LastBlock(module, layers)
        calls = [given[i : i + _ROWS].call for i in range(0, len(given), _ROWS)]
        targets = [reference(*call.args, **call.kwargs) for call in calls]
        if not all(isinstance(target, Tensor) for target in targets):
            raise CATTypeError(
                "the full-precision model returns several results; expected one tensor (N, ..., C)."
            )
        objective = _Error(soft, given, torch.cat(targets))
        steps = epochs * math.ceil(objective.count / _ROWS)
        schedule = Schedule(steps, _ROWS, min(_LOOKS, steps))
        outcome = descend(soft, soft.groups(), objective, schedule, generator_for(seed, "adapt"))
    return module, outcome


def _chosen(names: list[str], patterns: Sequence[str]) -> list[str]:
    """Of quantized layers in order of execution, those that are trained."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise CATValueError(
                f"layers has the pattern {pattern!r}, which matches no layer; {nearest(pattern, names)}"
            )
    if patterns:
        return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    blocks = [found.group() for name in names if (found := re.match(r".*?\.\d+(?=\.)", name))]
    if blocks:  # blocks.11 of blocks.11.mlp.fc2
        return [name for name in names if name.startswith(f"{blocks[-1]}.")]
    return names[-2:-1] or names


class _LastBlock(fx.Interpreter, TrainedInPlace):
    """A QDQ graph that gradients pass, with the scales and biases that are trained."""

    def __init__(self, module: fx.GraphModule, layers: Sequence[str]) -> None:
        super().__init__(module)
        self.graph_module = module
        self.rounded: dict[fx.Node, Tensor] = {}
        found = {
            str(arguments(node)[0].target).removesuffix(".weight"): node
            for node in module.graph.nodes
            if "dequantize_per_channel" in str(node.target) and arguments(node)[0].op == "get_attr"
        }
        if not found:
            raise CATTypeError(
                "the graph has no quantized weights; expected one that cat_plugin.ptq.quantize returns."
            )
        chosen = [found[name] for name in _chosen(list(found), layers)]
        self.scales = {node: self._buffer(node, 1).log().requires_grad_() for node in chosen}
        readers = [user for node in chosen for user in node.users if len(user.args) > 2]
        biases = [user.args[2] for user in readers if isinstance(user.args[2], fx.Node)]
        self.biases = {node: self._value(node).clone().requires_grad_() for node in biases}

    def _value(self, node: fx.Node) -> Tensor:
        return self.graph_module.get_buffer(str(node.target)).detach()

    def _buffer(self, node: fx.Node, index: int) -> Tensor:
        return self._value(arguments(node)[index])

    def run_node(self, n: fx.Node) -> Any:
        if n in self.biases:
            return self.biases[n]
        if n in self.scales:
            return self._weight(n)
        if "quantized_decomposed" not in str(n.target) or not torch.is_grad_enabled():
            return super().run_node(n)
        with torch.no_grad():
            value = super().run_node(n)
        source = arguments(n)[0]
        if "quantized_decomposed.quantize" in str(n.target):
            self.rounded[n] = self.env[source]  # which the interpreter forgets
        elif source in self.rounded:
            before = self.rounded.pop(source) if len(source.users) == 1 else self.rounded[source]
            return before + (value - before).detach()  # rounding counts as the identity
        return value

    def _weight(self, node: fx.Node) -> Tensor:
        integers, zero = self._buffer(node, 0), self._buffer(node, 2)
        scale = self.scales[node].exp()
        rows = integers.reshape(scale.numel(), -1) - zero.reshape(-1, 1)
        return (rows * scale.reshape(-1, 1)).reshape(integers.shape)

    def results(self, rows: Inputs) -> Tensor:
        """(n, ..., C) of some inputs."""
        self.rounded.clear()
        result: Tensor = self.run(*rows.tensors)
        return result

    def groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        groups = [{"params": list(self.scales.values()), "lr": _SCALE_RATE}]
        return groups + ([{"params": list(self.biases.values()), "lr": _BIAS_RATE}] if self.biases else [])

    @torch.no_grad()
    def harden(self) -> None:
        """Write scales and biases into the graph's buffers."""
        for node, scale in self.scales.items():
            self._buffer(node, 1).copy_(scale.exp())
        for node, bias in self.biases.items():
            self._value(node).copy_(bias)


class _Error:
    """Squared error and negative logarithm of the cosine of the results, each over its running mean."""

    def __init__(self, soft: _LastBlock, inputs: Inputs, targets: Tensor) -> None:
        self.soft, self.inputs, self.targets = soft, inputs, targets
        self.count, self.judged = split_rows(len(inputs))
        self.means: list[Tensor] = []
        self.first: list[float] = []

    def _terms(self, rows: slice | Tensor) -> list[Tensor]:
        y, target = self.soft.results(self.inputs[rows]), self.targets[rows]
        return [F.mse_loss(y, target), negative_log_cosine(y, target)]

    def losses(self, rows: Tensor) -> Iterator[Tensor]:
        terms = self._terms(rows)
        self.means = TwoBranches.running(self.means, terms)
        yield torch.stack([term / mean for term, mean in zip(terms, self.means, strict=True)]).sum()

    def judge(self) -> Tensor:
        sums = [0.0, 0.0]
        for start in range(self.judged.start, self.judged.stop, _ROWS):
            rows = slice(start, min(start + _ROWS, self.judged.stop))
            sums = [
                a + float(b) * (rows.stop - rows.start) for a, b in zip(sums, self._terms(rows), strict=True)
            ]
        self.first = self.first or [max(each, 1e-20) for each in sums]
        return torch.tensor([sum(a / b for a, b in zip(sums, self.first, strict=True)) / len(sums)])
