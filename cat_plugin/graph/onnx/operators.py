"""What an implementation of an ONNX operator works with: a step of the graph, values, and the registry.

Values are tensors, or numbers that are known when the graph is read or traced: constants, sizes, and what is computed
from them. A size that is not known yet (the batch) is one of torch's symbolic integers inside of an object array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cat_plugin.errors import CATValueError

__all__ = ["KNOWN_ONLY", "OPERATORS", "Known", "Step", "Value", "implements", "number_or_tensor", "to_tensor"]


@dataclass(eq=False)
class Known:
    """Numbers that are known without running the graph.

    Attributes
    ----------
    array : ndarray
        Of dtype object where symbolic sizes are among them.
    tensor : Tensor or None
        The parameter or buffer that holds them, where there is one.
    """

    array: np.ndarray[Any, Any]
    tensor: Tensor | None = None

    def numbers(self) -> list[Any]:
        """The values in one row."""
        return list(self.array.reshape(-1).tolist())


Value: TypeAlias = "Tensor | Known | None"
Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One node of an ONNX graph.

    Attributes
    ----------
    op, name : str
        Operator and node; `name` is the first output's where the node has none.
    inputs, outputs : tuple of str
        Names of values; an empty one is left out.
    attributes : dict
        Python values, arrays for tensors.
    opset : int
        Version of the standard operators.
    fixed_batch : int or None
        The batch size that the file declares, when it is one number; sizes that equal it stand for the batch.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 0
    fixed_batch: int | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> CATValueError:
        """An error about this node."""
        return CATValueError(f"node {self.name!r} ({self.op}) cannot be read: {what}")

    def known(self, value: Value, what: str) -> list[Any]:
        """The numbers of an input that must not depend on the data.

        Raises
        ------
        CATValueError
            When it does.
        """
        if not isinstance(value, Known):
            raise self.refuse(f"{what} is computed from the data; expected a constant or a size")
        return value.numbers()

    def option(self, name: str, value: Value) -> list[Any] | None:
        """What newer opsets give as an input and older ones as an attribute; None where it is not given."""
        if value is not None:
            return self.known(value, name)
        given = self.get(name)
        return None if given is None else list(np.atleast_1d(given).tolist())


#: Implementations on tensors, by operator: called with the step and its values.
OPERATORS: dict[str, Implementation] = {}
#: Implementations on known numbers, which are used where all inputs are known.
KNOWN_ONLY: dict[str, Implementation] = {}


def implements(*operators: str, table: dict[str, Implementation] = OPERATORS) -> Callable[[Any], Any]:
    """Register a function as the implementation of operators."""

    def register(function: Implementation) -> Implementation:
        table.update(dict.fromkeys(operators, function))
        return function

    return register


def to_tensor(value: Value) -> Tensor:
    """A value as a tensor."""
    if isinstance(value, Tensor):
        return value
    assert value is not None
    if value.tensor is not None:
        return value.tensor
    if value.array.dtype == object:
        return torch.tensor(value.array.tolist(), dtype=torch.int64)
    return torch.from_numpy(np.array(value.array))


def number_or_tensor(value: Value, other: Value) -> Any:
    """A single known number as such, where that broadcasts against `other` as a tensor would; else a tensor."""
    if isinstance(value, Known) and value.array.size == 1 and isinstance(other, Tensor):
        same_kind = (value.array.dtype.kind in "f") == other.is_floating_point()
        if value.array.ndim <= other.ndim and same_kind:
            return value.array.reshape(-1).tolist()[0]
    return to_tensor(value)
