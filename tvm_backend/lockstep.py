"""Whether the levels that a library chooses follow from what it computed before them, quantizer by quantizer.

Compared as wholes, a library and its program say little where one value lies on the edge between two levels: the last bit of a
sum decides, and in a deep network of few bits that moves every output.  So the library is compiled once more, with the levels
of all its quantizers as further outputs, and the program computes each quantizer's input anew from the library's own levels.
Nothing adds up then: a level is what rounding makes of that input, give or take float32's last bits, or there is a fault.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument

from cat_plugin.graph.sampling import Runner
from cat_plugin.structures import leaves_of
from cat_plugin.torch_compat import pytree

__all__ = ["Arrays", "levels_of", "quantizers_of", "structure_of", "unexplained", "with_levels"]

Arrays = Sequence[np.ndarray[Any, Any]]

# Nearly always no value lies farther off than _LEAST allows.  Else how far rounding moves it is asked of the program, as in
# cat_plugin.graph.sampling.  Where a value is chosen in steps that no quantizer makes (argmax, floor, a comparison) few draws
# may all stay on one side: then many larger ones are made.
_ATTEMPTS = ((0, 0.0), (3, 2.0**-23), (12, 2.0**-21))
_FACTOR = 8.0
_LEAST = 1e-5  # of a tensor's largest value; the same that is rounding in a whole library


def levels_of(program: Any) -> list[fx.Node]:
    """The quantizers of a program's own graph; see :func:`quantizers_of`."""
    return quantizers_of(program.graph, program.graph_signature.user_inputs)


def quantizers_of(graph: fx.Graph, inputs: Collection[Any] | None = None) -> list[fx.Node]:
    """The nodes that choose levels of what depends on the inputs, in order: on all placeholders, or on those named."""
    computed: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and (inputs is None or node.name in inputs)
        if given or any(each in computed for each in node.all_input_nodes):
            computed.add(node)
    return [node for node in graph.nodes if node in computed and _is_quantizer(node)]


def _is_quantizer(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("quantized_decomposed.quantize_")


def structure_of(program: Any) -> str:
    """All of a program's graph but the values of its constants, scales and zero points: what code is made for.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        What is compiled.

    Returns
    -------
    str
        The same for two models that differ in their numbers only.
    """
    lines = []
    for node in program.graph.nodes:
        args = list(node.args)
        if "quantized_decomposed" in str(node.target):
            args[1:3] = [each if isinstance(each, fx.Node) else type(each).__name__ for each in args[1:3]]
        given = fx.node.map_aggregate(
            (args, dict(node.kwargs)), lambda each: "float" if isinstance(each, float) else str(each)
        )
        made = fx.node.map_aggregate(
            node.meta.get("val"),
            lambda each: str((each.shape, each.dtype)) if isinstance(each, Tensor) else "",
        )
        lines.append(f"{node.op} {node.name} {node.target} {given} {made}")
    return "\n".join(lines)


def with_levels(program: Any) -> Any:
    """A program that returns its levels as well.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        What is compiled.

    Returns
    -------
    torch.export.ExportedProgram
        Of the same inputs to the outputs and, after them, the integers of :func:`quantizers_of`.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    returned = leaves_of(graph.graph_copy(program.graph, copies))
    for (
        node,
        copy,
    ) in copies.items():  # a graph names no node as Python names a function, which an argument may be called
        copy.name = node.name
    levels = [copies[node] for node in levels_of(program)]
    graph.output((*returned, *levels))
    arguments = [TensorArgument(name=node.name) for node in levels]
    specs = [OutputSpec(OutputKind.USER_OUTPUT, each, None) for each in arguments]
    described, (whole, *parts) = program.graph_signature, program.module_call_graph
    called = replace(
        whole.signature,
        outputs=[*whole.signature.outputs, *arguments],
        out_spec=pytree.tree_structure((0,) * (whole.signature.out_spec.num_leaves + len(levels))),
    )
    return torch.export.ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=replace(described, output_specs=[*described.output_specs, *specs]),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[replace(whole, signature=called), *parts],
        constants=program.constants,
        verifiers=program.verifiers,
    )


def unexplained(program: Any, inputs: Arrays, found: Arrays) -> fx.Node | None:
    """Find the first result of a library that does not follow from its earlier levels.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        What was compiled.
    inputs : sequence of ndarray
        Flat and in order.
    found : sequence of ndarray
        What the library of :func:`with_levels` makes of them.

    Returns
    -------
    Node or None
        Of the program's module: where the computation of that result begins.  None where all follow.
    """
    run = Runner(program)
    for draws, noise in _ATTEMPTS:
        node = _first(run, inputs, [torch.from_numpy(np.array(each)) for each in found], draws, noise)
        if node is None:
            return None
    return node


class _Disturbed(fx.Interpreter):
    """Run node by node; floating-point values are multiplied by one plus a normal number of that deviation."""

    def __init__(self, module: fx.GraphModule, noise: float, seed: int, inputs: Iterable[Any]) -> None:
        super().__init__(module)
        self.noise, self.generator, self.inputs = noise, torch.Generator().manual_seed(seed), iter(inputs)

    def step(self, node: fx.Node) -> None:
        """Compute a node's value, which is in ``env`` then."""
        value = next(self.inputs) if node.op == "placeholder" else self.run_node(node)
        self.give(node, fx.node.map_aggregate(value, self._moved) if self.noise else value)

    def give(self, node: fx.Node, value: Any) -> None:
        """Say what a node's value is, and drop the values that no later node reads."""
        self.env[node] = value
        for last in self.user_to_last_uses.get(node, ()):
            if last is not node:
                del self.env[last]

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        # of numbers of 16 bits a library may keep more bits in between, never fewer than float32 has
        noise = self.noise * max(1.0, torch.finfo(value.dtype).eps / torch.finfo(torch.float32).eps)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        drawn = torch.randn(value.shape, generator=self.generator).to(wide)
        return torch.addcmul(wide, wide, drawn, value=noise).to(value.dtype)


def _first(run: Runner, inputs: Arrays, found: list[Tensor], draws: int, noise: float) -> fx.Node | None:
    given = iter([torch.from_numpy(np.array(each)).to(run.device) for each in inputs])
    leaves = [
        next(given) if isinstance(each, TensorArgument) else getattr(each, "value", None)
        for each in run.arguments
    ]
    copies = [_Disturbed(run.module, noise * bool(i), i, leaves) for i in range(draws + 1)]
    still = copies[0]
    chosen = quantizers_of(run.module.graph)
    levels = dict(zip(chosen, found[len(found) - len(chosen) :], strict=True))
    settled: set[fx.Node] = set()
    with torch.no_grad():
        for node in run.module.graph.nodes:
            if node.op == "output":
                break
            if node not in levels:
                for each in copies:
                    each.step(node)
                continue
            wanted, level = still.run_node(node), levels[node].to(run.device)
            if not _same(level, wanted):
                source: Any = node.args[0]
                grid: Any = fx.node.map_arg((node.args[1:], dict(node.kwargs)), still.env.__getitem__)
                ends = _ends(*(each.env[source] for each in copies))
                if not _between(level, *(node.target(end, *grid[0], **grid[1]) for end in ends)):
                    return _beginning(node, settled)
            settled |= _computation(node)
            for each in copies:
                each.give(node, level.to(wanted.dtype))
        results = [leaf for leaf in leaves_of(node.args[0]) if isinstance(leaf, fx.Node)]
        for result, value in zip(results, found, strict=False):
            low, high = _ends(*(each.env[result] for each in copies))
            if not _between(value.to(run.device), low, high):
                return result if result in levels else _beginning(result, settled)
    return None


def _ends(still: Tensor, *moved: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that rounding may make of each."""
    if not still.is_floating_point():
        everything = torch.stack([still, *moved]).double()
        return everything.amin(0), everything.amax(0)
    if not still.numel():
        return still, still
    margin: Any = _LEAST * float(still.nan_to_num(0.0, 0.0, 0.0).abs().max())
    exact = still.double() if moved else still.to(torch.promote_types(still.dtype, torch.float32))
    if moved:
        apart = (torch.stack(moved).double() - exact).abs().nan_to_num(0.0, 0.0, 0.0)
        margin = margin + _FACTOR * (apart.amax(0) + apart.square().mean().sqrt())
    return (exact - margin).to(still.dtype), (exact + margin).to(still.dtype)


def _same(value: Tensor, wanted: Tensor) -> bool:
    return value.dtype == wanted.dtype and torch.equal(value, wanted)


def _between(value: Tensor, low: Tensor, high: Tensor) -> bool:
    value, low, high = value.double(), low.double(), high.double()
    inside = (torch.minimum(low, high) <= value) & (value <= torch.maximum(low, high))
    return bool((inside | (value == low) | (value.isnan() & low.isnan())).all())


def _computation(node: fx.Node) -> set[fx.Node]:
    """What a result is computed from, back to the levels before it."""
    left, found = [node], {node}
    while left:
        for each in left.pop().all_input_nodes:
            if each not in found and not _is_quantizer(each) and each.op == "call_function":
                found.add(each)
                left.append(each)
    return found


def _beginning(node: fx.Node, settled: set[fx.Node]) -> fx.Node:
    """The first node of a result's computation that is in no other's that came out right."""
    suspects = _computation(node) - settled
    order = list(node.graph.nodes)
    return min(
        (each for each in suspects if each is node or "dequantize" not in str(each.target)), key=order.index
    )
