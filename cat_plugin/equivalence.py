"""Whether a rewritten model still computes what the caller's model does, on real rows and at two batch sizes.

Every step that rewrites a graph is followed by such a comparison: what a step breaks is then an error that names it, and
never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.batches import ModelCall
from cat_plugin.errors import CATError, QuantizationError
from cat_plugin.models import device_of, full_float32, without_autocast
from cat_plugin.structures import leaves_of

__all__ = ["TOLERANCE", "Equivalence", "distance"]

# Rounding of float32, reordered sums included, stays orders of magnitude below this share of the largest output; faults
# in the reading of a graph are above it by as much.
TOLERANCE = 1e-3
"""Largest difference of two outputs that compute the same, as a share of the largest output."""


class Equivalence:
    """The caller's model on a few rows, for comparison.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode and float32.
    inputs : Tensor or ModelCall
        (N, ...) inputs, or a call with a row for each sample in its tensors; one row and three rows of them are run.
    error : type of CATError
        What is raised where outputs differ.

    Attributes
    ----------
    rows_are_independent : bool
        Whether a row gives the same among others as alone; False as well where an output has no row for each input.

    Raises
    ------
    CATError
        If the model gives different outputs when it is run twice on the same rows.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | ModelCall,
        error: type[CATError] = QuantizationError,
    ) -> None:
        call = inputs if isinstance(inputs, ModelCall) else ModelCall((inputs,))
        self.model, self.error = model, error
        self.calls = [call.first(1), call.select(torch.arange(3) % call.rows)]
        with torch.no_grad(), without_autocast():
            self.expected = [_outputs(model, rows) for rows in self.calls]
            again = _outputs(model, self.calls[-1])
        alone = [leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in self.expected[-1]]
        self.rows_are_independent = _farthest(alone, self.expected[0]) <= TOLERANCE
        if (apart := _farthest(again, self.expected[-1])) > TOLERANCE:
            raise self.error(
                f"the model gives different outputs for the same inputs ({apart:.2g} of the largest apart); expected "
                "a function of its inputs. Remove what draws random numbers, or counts its calls, in evaluation mode."
            )

    def check(self, stage: str, module: nn.Module, *, locate: bool = True) -> None:
        """Compare.

        Parameters
        ----------
        stage : str
            What was done to the graph, for the message.
        module : nn.Module
            The rewritten model; a graph, where a fault is to be located.
        locate : bool
            Whether values inside the graph still are those of the caller's modules, so that the first module whose
            output differs can be named.

        Raises
        ------
        CATError
            If outputs differ by more than rounding.
        """
        device = device_of(module)
        for call, expected in zip(self.calls, self.expected, strict=True):
            with torch.no_grad():
                found = _outputs(module, call.to(device))
            apart = _farthest(found, expected)
            if apart <= TOLERANCE:
                continue
            rows = call.rows
            blame = (
                "This is a fault of this package, not of the model: please report it with the model's code."
            )
            if any(getattr(child, "use_nested_tensor", False) for child in self.model.modules()):
                blame = (
                    "The model's nn.TransformerEncoder returns zeros for padded tokens in evaluation mode and other values in "
                    "training mode; make it with enable_nested_tensor=False."
                )
            place = (
                self._first_difference(module, call.to(device))
                if locate and isinstance(module, fx.GraphModule)
                else None
            )
            raise self.error(
                f"after the step {stage!r} the model's outputs are {apart:.2g} of the largest output away from the "
                f"original's on {rows} calibration row{'s' if rows > 1 else ''}{_shapes(found, expected)}; expected less than "
                f"{TOLERANCE:g}{f', and the first module whose output differs is {place!r}' if place else ''}. {blame}"
            )

    def _first_difference(self, module: fx.GraphModule, call: ModelCall) -> str | None:
        """Name of the first of the caller's modules whose output the graph does not reproduce."""
        outputs: dict[str, Tensor] = {}
        hooks = []
        for name, child in self.model.named_modules():
            if name:
                hooks.append(child.register_forward_hook(_keep(outputs, name)))
        try:
            with torch.no_grad(), without_autocast():
                _outputs(self.model, call.to(device_of(self.model)))
        finally:
            for hook in hooks:
                hook.remove()
        last = {path: node for node in module.graph.nodes if (path := _path(node)) in outputs}
        values = _Recorder(module, last.values())
        with torch.no_grad():
            values.run(*call.copied().tensors)
        for name, expected in outputs.items():  # in the order in which the modules finished
            found = values.kept.get(last[name]) if name in last else None
            if found is not None and found.shape == expected.shape and distance(found, expected) > TOLERANCE:
                return name
        return None


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_nested:
            outputs[name] = output.detach().clone()

    return hook


def _outputs(module: nn.Module, call: ModelCall) -> list[Any]:
    """Leaves of what a module returns for copies of a call's tensors, as full precision computes it.

    Graphs of the engine's own take the tensors alone, and some parts of one with quantizers compute otherwise once quantized.
    """
    call = call.copied()
    with full_float32():
        if "interface" not in getattr(module, "meta", {}):
            return leaves_of(module(*call.args, **call.kwargs))
        differs = any(hasattr(child, "full_precision") for child in module.modules())
        return leaves_of((_Recorder(module).run if differs else module)(*call.tensors))


def _farthest(found: list[Any], expected: list[Any]) -> float:
    """Largest of the distances of the leaves; infinity where there are more, fewer or other ones."""
    if len(found) != len(expected):
        return float("inf")
    return max(map(distance, found, expected), default=0.0)


def distance(found: Any, expected: Any) -> float:
    """Largest difference as a share of the largest expected value; of what is no real number, whether it differs."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        same = type(found) is type(expected) and found == expected
        return 0.0 if same else float("inf")
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    found = found.to(expected.device)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    scale = float(expected.abs().max().clamp_min(1e-6))
    return float((found - expected).abs().max().nan_to_num(torch.inf)) / scale


def _shapes(found: list[Any], expected: list[Any]) -> str:
    """The first two shapes that differ, in words."""
    for mine, other in zip(found, expected, strict=False):
        if isinstance(mine, Tensor) and isinstance(other, Tensor) and mine.shape != other.shape:
            return f" (shape {tuple(mine.shape)} for {tuple(other.shape)})"
    return ""


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


class _Recorder(fx.Interpreter):
    """Runs a graph in full precision and keeps the values of some nodes."""

    def __init__(self, module: nn.Module, nodes: Iterable[fx.Node] = ()) -> None:
        super().__init__(module)
        self.nodes, self.kept = set(nodes), dict[fx.Node, Tensor]()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        child = self.fetch_attr(target)
        return getattr(child, "full_precision", child)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes and isinstance(value, Tensor):
            self.kept[n] = value
        return value
