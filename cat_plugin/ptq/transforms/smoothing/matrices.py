"""Matrices in front of linear layers, computed while the network runs, whose inverses are folded into the weights.

``y = x W' = (x P) (W P^-T)'``: any invertible ``P`` leaves the function as it is.  AffineQuant (Ma et al., arXiv 2403.12544)
trains a whole one, diagonally dominant so that it stays invertible, from the diagonal outwards; it costs as many
multiplications for each feature as there are features.  FlatQuant (Sun et al., arXiv 2410.09426) trains the two factors of a
Kronecker product, which cost about twice the root of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from cat_plugin.ptq.graph.constants import own_constant
from cat_plugin.ptq.transforms.rotation.hadamard import factors_of, orthogonal

__all__ = ["MATRICES", "Affine", "Kronecker", "Matrix"]

_aten = torch.ops.aten
_DOMINANCE = 0.9  # of the diagonal, what the rest of a row adds up to at most
_OFF_DIAGONAL = 0.1  # of a step of the diagonal, one of the rest


class Matrix(ABC):
    """An invertible matrix for one tensor that linear layers read.

    Attributes
    ----------
    trained : list of Tensor
        What is trained of it.
    share : float
        How much of the training is done, 0..1.
    """

    trained: list[Tensor]
    share: float = 1.0

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """Matrices whose Kronecker product it is, one or two, differentiable."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) values times the matrix."""
        return _applied(x, self.parts())

    def on_weight(self, weight: Tensor) -> Tensor:
        """(O, I) weight times the inverse of the transposed matrix."""
        return _applied(weight, [torch.linalg.inv(part).T for part in self.parts()])

    @torch.no_grad()
    def fold(self, module: fx.GraphModule, source: fx.Node, layers: Sequence[fx.Node]) -> None:
        """Put it between a tensor and layers that read it, in place; the graph's function stays as it is."""
        parts = [part.double() for part in self.parts()]
        graph, value = module.graph, source.meta["val"]
        inverses = [torch.linalg.inv(part).T for part in parts]
        for layer in layers:
            weight = own_constant(module, layer, 1)
            weight.copy_(_applied(weight.double(), inverses))
        names = [f"_matrix_{place}_of_{layers[0].name}" for place in range(len(parts))]
        for name, part in zip(names, (parts[0].T, *parts[1:]) if len(parts) == 2 else parts, strict=True):
            module.register_buffer(name, part.to(value.dtype).contiguous())
        made: list[fx.Node] = []
        with graph.inserting_before(min(layers, key=list(graph.nodes).index)):
            constants = [graph.create_node("get_attr", name) for name in names]
            if len(parts) == 1:
                new = graph.call_function(_aten.matmul.default, (source, constants[0]))
            else:
                sizes = [len(part) for part in parts]
                made.append(graph.call_function(_aten.unflatten.int, (source, -1, sizes)))
                made.append(graph.call_function(_aten.matmul.default, (made[-1], constants[1])))
                made.append(graph.call_function(_aten.matmul.default, (constants[0], made[-1])))
                new = graph.call_function(_aten.flatten.using_ints, (made[-1], -2, -1))
        for node in made:
            node.meta = {**source.meta, "val": value.unflatten(-1, [len(part) for part in parts])}
        new.meta = dict(source.meta)
        for layer in layers:
            layer.replace_input_with(source, new)
        module.recompile()


def _applied(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """(..., I) times a matrix, or times the Kronecker product of two."""
    if len(parts) == 1:
        return x @ parts[0]
    left, right = parts
    apart = x.reshape(*x.shape[:-1], len(left), len(right))
    result: Tensor = (left.T @ (apart @ right)).flatten(-2)
    return result


class Affine(Matrix):
    """AffineQuant's: the diagonal first, and more and more of the diagonals beside it (equation 7, the gradual mask)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.trained = [torch.eye(width, device=device, requires_grad=True)]
        place = torch.arange(width, device=device)
        self._distance = (place.unsqueeze(1) - place).abs()

    def parts(self) -> list[Tensor]:
        (raw,) = self.trained
        diagonal = raw.diagonal().clamp(min=1e-2)
        # outside of the mask the matrix is zero still, as no gradient has reached it
        mask = (self._distance > 0) & (self._distance <= self.share * len(raw))
        rest = raw * mask * _OFF_DIAGONAL
        limit = _DOMINANCE * diagonal / rest.abs().sum(1).clamp(min=1e-12)
        return [torch.diag(diagonal) + rest * limit.clamp(max=1.0).unsqueeze(1)]


class Kronecker(Matrix):
    """FlatQuant's: two factors near the root of the width, from Hadamard matrices with random signs on."""

    def __init__(self, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(width)
        self.trained = [
            orthogonal(size, generator).float().to(device).requires_grad_() for size in factors_of(width)
        ]

    def parts(self) -> list[Tensor]:
        return list(self.trained)


#: By the method, as ``smoothing`` names it.
MATRICES: dict[str, Callable[[int, torch.device], Matrix]] = {"affinequant": Affine, "flatquant": Kronecker}
