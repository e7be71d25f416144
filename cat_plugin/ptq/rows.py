"""Tensors that hold rows of the same samples: what a model, or a part of its graph, is given or makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_plugin.batches import ModelCall
from cat_plugin.ptq.ranks import ALONE, Ranks
from cat_plugin.structures import names_of
from cat_plugin.torch_compat import pytree

__all__ = ["Inputs", "Rows"]


class Rows:
    """One or more tensors (N, ...), indexed together.

    Parameters
    ----------
    tensors : sequence of Tensor
        At least one, with one row for each sample.

    Attributes
    ----------
    ranks : Ranks
        The processes of whose rows these are this one's share; one alone holds all.
    """

    ranks: Ranks = ALONE

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    @classmethod
    def of(cls, value: Tensor | Rows) -> Rows:
        """A tensor as the only one; rows as they are."""
        return cls((value,)) if isinstance(value, Tensor) else value

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some rows of each tensor."""
        return self.mapped(lambda x: x[rows if isinstance(rows, slice) else rows.to(x.device)])

    def leading(self, count: int) -> Rows:
        """The first rows of all processes, on each of them."""
        extent = self.ranks.extent(len(self))
        mine = self[: min(max(count - extent.start, 0), len(self))]
        return mine.mapped(self.ranks.gather)

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return self.tensors[0].device

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """What `change` makes of each tensor."""
        return Rows([change(x) for x in self.tensors])

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return self.mapped(lambda x: x.to(device))


class Inputs(Rows):
    """Calibration inputs, and how the model is called with them.

    Parameters
    ----------
    tensors : sequence of Tensor
        (N, ...) one for each tensor among the arguments, in their order.
    example : ModelCall
        A call with the same structure; its tensors do not matter.
    ranks : Ranks
        The processes of whose rows these are this one's share.
    """

    def __init__(self, tensors: Sequence[Tensor], example: ModelCall, ranks: Ranks = ALONE) -> None:
        super().__init__(tensors)
        self.example, self.ranks = example, ranks

    @classmethod
    def of(cls, value: Tensor | Rows) -> Inputs:
        """One tensor as the only argument; inputs as they are."""
        if isinstance(value, Inputs):
            return value
        tensors = Rows.of(value).tensors
        return cls(tensors, ModelCall(tensors))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """What `change` makes of each tensor, given by the same call."""
        return Inputs([change(x) for x in self.tensors], self.example, self.ranks)

    def __getitem__(self, rows: slice | Tensor) -> Inputs:
        """Some rows of each tensor, given by the same call, and this process's alone."""
        return Inputs(super().__getitem__(rows).tensors, self.example)

    def to(self, device: torch.device) -> Inputs:
        """The same on a device, given by the same call."""
        return self.mapped(lambda x: x.to(device))

    @property
    def structure(self) -> tuple[list[Any], pytree.TreeSpec]:
        """The leaves of (args, kwargs), tensors among them those of :attr:`example`, and their structure."""
        return pytree.tree_flatten((self.example.args, self.example.kwargs))

    @property
    def names(self) -> list[str]:
        """A name for each tensor: place or keyword, and what leads to it inside."""
        leaves, _ = self.structure
        names = names_of([*self.example.args]) if self.example.args else []
        names += names_of(self.example.kwargs) if self.example.kwargs else []
        return [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]

    @property
    def call(self) -> ModelCall:
        """The call of the model with all rows."""
        leaves, spec = self.structure
        tensors = iter(self.tensors)
        filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return ModelCall(args, kwargs)
