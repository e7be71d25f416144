"""Whether a rewritten model still computes what the caller's model does, on real rows and at two batch sizes.

Every step that rewrites a graph is followed by such a comparison: what a step breaks is then an error that names it, and
never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATError, QuantizationError
from cat_plugin.models import without_autocast

__all__ = ["Equivalence"]

# Rounding of float32, reordered sums included, stays orders of magnitude below this share of the largest output; faults
# in the reading of a graph are above it by as much.
_TOLERANCE = 1e-3


class Equivalence:
    """The caller's model on a few rows, for comparison.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode and float32.
    inputs : Tensor
        (N, ...) inputs; one row and three rows of them are run.
    error : type of CATError
        What is raised where outputs differ.

    Raises
    ------
    CATError
        If the model gives different outputs when it is run twice on the same rows.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, error: type[CATError] = QuantizationError) -> None:
        self.model, self.error = model, error
        self.rows = [inputs[:1], inputs[torch.arange(3) % len(inputs)]]
        with torch.no_grad(), without_autocast():
            self.expected = [model(rows.clone()) for rows in self.rows]
            again = model(self.rows[-1].clone())
        if (distance := self._distance(again, self.expected[-1])) > _TOLERANCE:
            raise self.error(
                f"the model gives different outputs for the same inputs ({distance:.2g} of the largest apart); expected "
                "a function of its inputs. Remove what draws random numbers, or counts its calls, in evaluation mode."
            )

    @staticmethod
    def _distance(found: Tensor, expected: Tensor) -> float:
        """Largest difference as a share of the largest expected value."""
        if found.shape != expected.shape:
            return float("inf")
        if not expected.numel():
            return 0.0
        scale = float(expected.abs().max().clamp_min(1e-6))
        return float((found - expected).abs().max().nan_to_num(torch.inf)) / scale

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
        device = next((t.device for t in module.buffers()), self.rows[0].device)
        for rows, expected in zip(self.rows, self.expected, strict=True):
            with torch.no_grad():
                found = _full_precision(module)(rows.to(device, copy=True)).to(expected.device)
            distance = self._distance(found, expected)
            if distance <= _TOLERANCE:
                continue
            shapes = (
                ""
                if found.shape == expected.shape
                else f" (shape {tuple(found.shape)} for {tuple(expected.shape)})"
            )
            place = (
                self._first_difference(module, rows)
                if locate and isinstance(module, fx.GraphModule)
                else None
            )
            raise self.error(
                f"after the step {stage!r} the model's outputs are {distance:.2g} of the largest output away from the "
                f"original's on {len(rows)} calibration row{'s' if len(rows) > 1 else ''}{shapes}; expected less than "
                f"{_TOLERANCE:g}{f', and the first module whose output differs is {place!r}' if place else ''}. This is "
                "a fault of this package, not of the model: please report it with the model's code."
            )

    def _first_difference(self, module: fx.GraphModule, rows: Tensor) -> str | None:
        """Name of the first of the caller's modules whose output the graph does not reproduce."""
        outputs: dict[str, Tensor] = {}
        hooks = []
        for name, child in self.model.named_modules():
            if name:
                hooks.append(child.register_forward_hook(_keep(outputs, name)))
        try:
            with torch.no_grad(), without_autocast():
                self.model(rows.clone())
        finally:
            for hook in hooks:
                hook.remove()
        last = {path: node for node in module.graph.nodes if (path := _path(node)) in outputs}
        values = _Recorder(module, last.values())
        with torch.no_grad():
            values.run(rows.clone())
        for name, expected in outputs.items():  # in the order in which the modules finished
            found = values.kept.get(last[name]) if name in last else None
            if (
                found is not None
                and found.shape == expected.shape
                and self._distance(found, expected) > _TOLERANCE
            ):
                return name
        return None


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output.detach().clone()

    return hook


def _full_precision(module: nn.Module) -> Callable[..., Tensor]:
    """The module as full precision runs it: some parts of a graph with quantizers compute otherwise once quantized."""
    differs = any(hasattr(child, "full_precision") for child in module.modules())
    return _Recorder(module).run if differs else module


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
