"""Makes the inputs and outputs by which a program's other implementations are checked, and measures how far those may be off.

Two right implementations add floating-point numbers in different orders, so that a value close to the edge between two
quantization levels can fall on either side; every later layer carries that on.  How much it does is asked of the program
itself: its numbers are disturbed as rounding disturbs them, and a thousand times more, and its outputs are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.func import functional_call

from cat_plugin.errors import ExportError
from cat_plugin.graph.checks import Checks, Run, row_distances
from cat_plugin.graph.inspect import signature
from cat_plugin.torch_compat import pytree

__all__ = ["Runner", "made_up_inputs", "make_checks"]

_ROWS = 5
_BYTES = 4 * 2**20
_LEAST = 1e-3
_MARGIN = 2.0
_ROUNDING = 2.0**-23
_FLIPS = 1000 * _ROUNDING


class Runner:
    """A program as a function of arrays.

    Parameters
    ----------
    program : ExportedProgram
        Of the model.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.module = program.module(check_guards=False)
        self.spec = program.call_spec.in_spec
        self.arguments = [
            each.arg for each in program.graph_signature.input_specs if each.kind is InputKind.USER_INPUT
        ]
        self.state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self.device = next((value.device for value in self.state.values()), torch.device("cpu"))

    def __call__(
        self, *inputs: np.ndarray[Any, Any], noise: float = 0.0, seed: int = 0
    ) -> tuple[np.ndarray[Any, Any], ...]:
        """Return the outputs, flat and in order.

        Parameters
        ----------
        *inputs : numpy.ndarray
            Flat and in order.
        noise : float
            Inputs and all floating-point numbers of the program are multiplied by one plus a normal number of this
            standard deviation.
        seed : int
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.from_numpy(np.array(each)) for each in inputs]

        def disturbed(value: Tensor) -> Tensor:
            if not noise or not value.is_floating_point():
                return value
            factor = 1 + noise * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return (value.detach().double() * factor.to(value.device)).to(value.dtype)

        given = iter([disturbed(each).to(self.device) for each in tensors])
        leaves = [
            next(given) if isinstance(each, TensorArgument) else getattr(each, "value", None)
            for each in self.arguments
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.no_grad():
            if noise:
                state = {name: disturbed(value) for name, value in self.state.items()}
                found = functional_call(self.module, state, args, kwargs)
            else:
                found = self.module(*args, **kwargs)
        return tuple(
            each.detach().cpu().numpy() for each in pytree.tree_leaves(found) if isinstance(each, Tensor)
        )


def make_checks(program: ExportedProgram, example_inputs: Any) -> Checks:
    """Run a program on a few rows, and measure how far rounding moves what comes out.

    Parameters
    ----------
    program : ExportedProgram
        Of the model.
    example_inputs : tensors
        Any structure of the program's inputs; the first five rows are taken, fewer of inputs so large that five would take
        more than 4 MiB with their outputs.  Fewer rows than five are completed with copies, rolled along the last axis.

    Returns
    -------
    Checks
        The program's outputs for one row and for all.  The median row is bound by twice what float32's rounding does, the
        worst by twice what a thousand times that does, which moves values over the edges of levels for certain; neither is
        below 1e-3 of the largest output.

    Raises
    ------
    ExportError
        The program does not run on these inputs.
    """
    given = [
        each for each in pytree.tree_leaves(_in_order(program, example_inputs)) if isinstance(each, Tensor)
    ]
    arrays = [each.detach().cpu().numpy() for each in given]
    described = signature(program)["inputs"]
    batched = [bool(entry["shape"]) and isinstance(entry["shape"][0], str) for entry in described]
    if len(arrays) != len(described) or any(
        free and not len(each) for free, each in zip(batched, arrays, strict=True)
    ):
        raise ExportError(
            f"example_inputs holds {len(arrays)} tensors of shapes {[each.shape for each in arrays]}; the program takes "
            f"{[entry['shape'] for entry in described]}"
        )
    run = Runner(program)
    try:
        if not any(batched):
            runs = [Run(tuple(arrays), run(*arrays))]
        else:
            one = _rows(arrays, batched, 1)
            first = Run(one, run(*one))
            size = sum(each.nbytes for each in (*one, *first.outputs))
            many = _rows(arrays, batched, max(1, min(_ROWS, _BYTES // max(size, 1))))
            runs = [first, Run(many, run(*many))]
    except Exception as error:
        raise ExportError(
            f"the program does not run on example_inputs: {type(error).__name__}: {error}"
        ) from error
    largest = runs[-1]
    settled, flipped = (
        [row_distances([run(*largest.inputs, noise=noise, seed=i)], [largest.outputs]) for i in range(draws)]
        for noise, draws in ((_ROUNDING, 2), (_FLIPS, 3))
    )
    middle = np.sort(np.max(settled, axis=0))[(len(settled[0]) - 1) // 2]
    return Checks(
        tuple(runs),
        typical=_bound(float(middle)),
        worst=_bound(float(np.max([*settled, *flipped]))),
    )


def _in_order(program: ExportedProgram, example_inputs: Any) -> Any:
    """Keyword arguments in the order of the program's, whichever they were given in."""
    spec = program.call_spec.in_spec
    names = spec.children()[1].context if spec is not None else ()
    if isinstance(example_inputs, Mapping) and set(example_inputs) == set(names):
        return [example_inputs[name] for name in names]
    return example_inputs


def _bound(displacement: float) -> float:
    return max(_LEAST, _MARGIN * displacement) if np.isfinite(displacement) else 1.0


def _rows(
    arrays: Sequence[np.ndarray[Any, Any]], batched: Sequence[bool], count: int
) -> tuple[np.ndarray[Any, Any], ...]:
    """`count` rows of each input that has rows, rolled copies where there are fewer."""

    def row(array: np.ndarray[Any, Any], i: int) -> np.ndarray[Any, Any]:
        turns, source = divmod(i, len(array))
        return np.roll(array[source], turns, axis=-1) if array[source].ndim else array[source]

    return tuple(
        np.stack([row(each, i) for i in range(count)]) if free else each
        for each, free in zip(arrays, batched, strict=True)
    )


def made_up_inputs(program: ExportedProgram) -> tuple[Tensor, ...]:
    """Return inputs of the program's shapes for want of real ones: normal numbers, and zeros and ones for integers."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for entry in signature(program)["inputs"]:
        shape = [_ROWS if isinstance(size, str) else size for size in entry["shape"]]
        dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
        values = torch.randn(shape, generator=generator)
        inputs.append(values.to(dtype) if dtype.is_floating_point else (values > 0).to(dtype))
    return tuple(inputs)
