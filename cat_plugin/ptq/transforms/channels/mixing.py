"""A matrix for the channels of a linear stream, by descent on sampled positions.

What is minimised is the error that rounding makes at the outputs of the layers that read the stream, behind their ReLU where
they have one, over the outputs' variance: of the activations exactly, with gradients through the rounding as if it were the
identity (Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, section 2.1) for the matrix and the grids at once;
of the weights, of those that make the stream as of those that read it, by a model, an error without correlation of a step for each row.
The last quarter of the samples, which is of other inputs, decides whether the result is kept, on grids searched as those of
the network will be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_plugin.ptq.quantizers.observers import search_activation_range
from cat_plugin.ptq.quantizers.uniform import integer_range
from cat_plugin.ptq.transforms.channels.gains import COMPENSATED
from cat_plugin.ptq.transforms.rotation.hadamard import orthogonal

__all__ = ["Maker", "Reader", "balancing", "mixing_matrix"]

_STEPS = 200
_BATCH = 1024
_RATE = 0.005  # of steps, in the logarithm, and of zero points
_MATRIX_RATE = 0.015  # over the mean magnitude of its entries
_JUDGED = 4  # one in so many samples
_RIDGE = 1e-3  # share of a covariance's mean variance that is added to it
_STILL = 1e-12  # summed variance of outputs that do not vary
_RANGED = 1 << 15  # values that a range is searched on


class Reader:
    """A layer that reads the stream at one position at a time.

    Parameters
    ----------
    values : Tensor
        (n, C) what it reads in full precision.
    weight : Tensor
        (O, C)
    bias : Tensor
        (O,)
    w_bits, a_bits : int
        Of its weights and its input.
    top : float or None
        Where the activation behind it, which begins at 0, clips; None where there is none.
    """

    def __init__(
        self, values: Tensor, weight: Tensor, bias: Tensor, w_bits: int, a_bits: int, top: float | None
    ) -> None:
        self.weight, self.bias, self.w_bits, self.a_bits, self.top = weight, bias, w_bits, a_bits, top
        self.centre = values.mean(0)
        self.deviations = values - self.centre
        self.judged = len(values) - max(1, len(values) // _JUDGED)
        self.wanted = self._outputs(values)
        self.power = float(self.wanted.var(0, unbiased=False).sum())

    def _outputs(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.top is None else (y + self.bias).clamp(0.0, self.top)

    def error(self, rows: Tensor, found: Tensor) -> Tensor:
        """() squared error of outputs for (n, C) deviations as they arrive; what a bias takes back is none."""
        error = self._outputs(found + self.centre) - self.wanted[rows]
        total: Tensor = (error - error.mean(0)).square().mean(0).sum()
        return total / self.power


@dataclass
class Maker:
    """A layer that makes the stream, or a term of it.

    Attributes
    ----------
    weight : Tensor
        (C, I), taps among the inputs.
    power : float
        Summed mean squares of what its rows are multiplied with.
    w_bits : int
        Of its weights.
    """

    weight: Tensor
    power: float
    w_bits: int


def _row_noise(weight: Tensor, bits: int) -> Tensor:
    """(O,) variance of the rounding error of each weight of a row, which has one step."""
    step: Tensor = weight.abs().amax(1) / 2 ** (bits - 1)
    return step.square() * (COMPENSATED / 12)


class _Grid:
    """The uniform grid of a whole tensor, its step and zero point learned from where a search leaves them."""

    def __init__(self, values: Tensor, bits: int) -> None:
        self.low, self.high = (float(end) for end in integer_range(bits, True))
        some = values.flatten()[:: max(1, values.numel() // _RANGED)]
        step, zero, _ = search_activation_range(some, bits, False)
        self.log_step = torch.tensor(math.log(step), device=values.device, requires_grad=True)
        self.zero = torch.tensor(float(zero), device=values.device, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        step = self.log_step.exp()
        inside = (x / step + self.zero).clamp(self.low, self.high)
        rounded = inside + (inside.round() - inside).detach()
        zero = self.zero + (self.zero.round() - self.zero).detach()
        found: Tensor = (rounded - zero) * step
        return found


def _noise(
    readers: Sequence[Reader],
    makers: Sequence[Maker],
    matrix: Tensor,
    rows: Sequence[Tensor],
    grids: Sequence[_Grid],
) -> Tensor:
    """() what rounding errs by at all readers, each over the variance of its outputs."""
    inverse = torch.linalg.inv_ex(matrix).inverse  # of a singular matrix, nothing that could be chosen
    made = matrix.new_zeros(len(matrix))
    for maker in makers:
        made = made + maker.power * _row_noise(matrix @ maker.weight, maker.w_bits)
    total = matrix.new_zeros(())
    for reader, some, grid in zip(readers, rows, grids, strict=True):
        mixed, weight = reader.deviations[some] @ matrix.T, reader.weight @ inverse
        total = total + reader.error(some, grid(mixed) @ inverse.T)
        read = _row_noise(weight, reader.w_bits).sum() * mixed.square().mean(0).sum()
        total = total + (read + weight.square().sum(0) @ made) / reader.power
    return total


def _power_of(a: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(a)
    powers = values.clamp(min=float(values.max()) * 1e-12) ** exponent
    found: Tensor = (vectors * powers) @ vectors.T
    return found


def balancing(covariance: Tensor, gram: Tensor) -> Tensor:
    """Symmetric ``M`` with ``M covariance M = M^-1 gram M^-1``, for which the product of the traces of both is least.

    Once rotated such that channels are alike, the first trace is their range, and the second what noise of one size in all of them
    does behind ``M^-1``.

    Parameters
    ----------
    covariance : Tensor
        (C, C) float64, positive: of the channels.
    gram : Tensor
        (C, C) float64, positive: ``W' W`` of what reads them.

    Returns
    -------
    Tensor
        (C, C) float64.
    """
    root = _power_of(gram, 0.5)
    return _power_of(root @ _power_of(root @ covariance @ root, -0.5) @ root, 0.5)


def _ridged(a: Tensor) -> Tensor:
    """A covariance over its mean variance, with a share of the identity."""
    a = a.double()
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return a / a.diagonal().mean().clamp(min=1e-20) + _RIDGE * eye


def _balanced(readers: Sequence[Reader], generator: torch.Generator) -> Tensor:
    """(C, C) float64 random rotation behind what balances all readers."""
    grams = [(each.deviations.T @ each.deviations, each.weight.T @ each.weight) for each in readers]
    covariance, gram = (torch.stack([_ridged(a) for a in some]).sum(0) for some in zip(*grams, strict=True))
    return orthogonal(len(gram), generator).to(gram.device) @ balancing(covariance, gram)


def mixing_matrix(readers: Sequence[Reader], makers: Sequence[Maker], generator: torch.Generator) -> Tensor:
    """The matrix that a stream's channels are to be multiplied by.

    Readers whose outputs do not vary have no say.

    Parameters
    ----------
    readers : sequence of Reader
        Each has a grid of its own.
    makers : sequence of Maker
        All of them.
    generator : torch.Generator
        CPU generator of what is drawn.

    Returns
    -------
    Tensor
        (C, C) float64, invertible; the identity where nothing better was found.
    """
    width = readers[0].weight.shape[1]
    identity = torch.eye(width, dtype=torch.float64, device=readers[0].weight.device)
    readers = [reader for reader in readers if reader.power > _STILL]
    if not readers:
        return identity
    start = _balanced(readers, generator)
    found = _descended(readers, makers, start, generator)
    rows = [torch.arange(r.judged, len(r.wanted), device=start.device) for r in readers]

    def judged(matrix: Tensor) -> float:
        matrix = matrix.float()
        grids = [_Grid(r.deviations @ matrix.T, r.a_bits) for r in readers]
        return float(_noise(readers, makers, matrix, rows, grids))

    with torch.no_grad():
        return min((identity, start, found), key=judged)


@torch.enable_grad()
def _descended(
    readers: Sequence[Reader], makers: Sequence[Maker], start: Tensor, generator: torch.Generator
) -> Tensor:
    """(C, C) float64, from ``start`` on."""
    matrix = start.float().requires_grad_()
    with torch.no_grad():
        grids = [_Grid(r.deviations @ matrix.T, r.a_bits) for r in readers]
    steps = [parameter for grid in grids for parameter in (grid.log_step, grid.zero)]
    optimizer = torch.optim.Adam(
        [
            {"params": [matrix], "lr": _MATRIX_RATE * float(start.abs().mean())},
            {"params": steps, "lr": _RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        rows = [
            torch.randint(max(1, r.judged), (min(_BATCH, len(r.wanted)),), generator=generator).to(
                matrix.device
            )
            for r in readers
        ]
        loss = _noise(readers, makers, matrix, rows, grids)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return matrix.detach().double()
