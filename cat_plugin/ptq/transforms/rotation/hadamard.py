"""Orthogonal matrices whose entries are all of one size, so that no channel keeps an outlier to itself."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["factors_of", "hadamard", "mean_keeping", "orthogonal", "orthogonal_factors"]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))


def _jacobsthal(q: int) -> Tensor:
    """(q, q) of 1 where the difference of row and column is a square modulo the prime q, -1 where not, 0 where they agree."""
    squares = {k * k % q for k in range(1, q)}
    row = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, q))], dtype=torch.float64)
    return torch.stack([row.roll(k) for k in range(q)])


@lru_cache(maxsize=32)
def hadamard(n: int) -> Tensor | None:
    """(n, n) float64 matrix of entries 1 and -1 with orthogonal rows; None where none is constructed here.

    By Sylvester's doubling, by both of Paley's constructions over primes (R. E. A. C. Paley, "On orthogonal matrices", 1933), and
    as Kronecker products of these.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    half = hadamard(n // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if _is_prime(n - 1):  # n - 1 is 3 modulo 4
        bordered = torch.ones(n, n, dtype=torch.float64)
        bordered[1:, 1:] = _jacobsthal(n - 1) + torch.eye(n - 1, dtype=torch.float64)
        bordered[1:, 0] = -1.0
        return bordered
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:] = core[1:, 0] = 1.0
        core[1:, 1:] = _jacobsthal(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    for a in range(4, math.isqrt(n) + 1, 4):
        first, second = (hadamard(a), hadamard(n // a)) if n % a == 0 else (None, None)
        if first is not None and second is not None:
            return torch.kron(first, second)
    return None


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """(n, n) float64 orthogonal matrix: a Hadamard matrix with random signs, or where there is none a random one."""
    known = hadamard(n)
    signs = torch.randint(2, (n, 1), generator=generator).double() * 2 - 1
    if known is not None:
        return signs * known / math.sqrt(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return torch.mul(q, r.diagonal().sign())


def mean_keeping(n: int, generator: torch.Generator) -> Tensor:
    """(n, n) float64 orthogonal matrix that leaves the vector of ones, and so the mean of what it rotates, as it is."""
    columns = torch.randn(n, n, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1.0
    rest = torch.linalg.qr(columns).Q[:, 1:]
    within: Tensor = rest @ orthogonal(n - 1, generator) @ rest.T
    return within.add(1.0 / n)


def factors_of(n: int) -> tuple[int, int]:
    """``a b = n`` with ``a + b`` small, of sizes that have Hadamard matrices where there are such.

    The second, along which memory lies, is a power of two where one will do, of 16 and more if possible: processors take it by
    butterflies of vectors.
    """
    pairs = [(a, n // a) for a in range(math.isqrt(n), 0, -1) if n % a == 0]
    # A Hadamard matrix is not worth many times the multiplications.
    pairs = [pair for pair in pairs if sum(pair) <= 8 * math.isqrt(n)] or pairs[:1]
    known = [(a, b) for a, b in pairs if a > 1 and hadamard(a) is not None and hadamard(b) is not None]
    ordered = [pair for a, b in known or pairs for pair in ((a, b), (b, a))]
    doubled = ((a, b) for least in (16, 4) for a, b in ordered if b >= least and b & (b - 1) == 0)
    return next(doubled, ordered[0])


def orthogonal_factors(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthogonal float64 matrices (a, a) and (b, b), ``a b = n``: their Kronecker product is one of n columns."""
    a, b = factors_of(n)
    return orthogonal(a, generator), orthogonal(b, generator)
