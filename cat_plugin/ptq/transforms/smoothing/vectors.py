"""LRQuant+'s rotation vectors: steps of a weight that differ from element to element by a product of low rank.

The dequantized weight is multiplied element by element by ``r1 r2``, (O, k) times (k, I) (LRQuant+, IEEE TPAMI 2025, doi
10.1109/TPAMI.2025.3599479).  Integers are chosen for the weight over the product, so that the full-precision network stays as
it is whatever the vectors are.  With k = 1 they are a factor for each row, which is part of its scale, and one for each
column, which is the scale of a channel where a place has one: they cost nothing, and are trained as those.  Beyond that they
are k (O + I) numbers more, and a multiplication for each element when the weight is unpacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_vectors"]


def first_vectors(shape: torch.Size, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(O, k) and (k, I) to be trained, whose product is one: ones, then nothing against random signs.

    Were all rows alike, their gradients would be too, and the rank would stay at one.
    """
    rows, columns = shape
    signs = torch.randint(2, (rank, columns), generator=torch.Generator().manual_seed(rank)) * 2.0 - 1.0
    left, right = torch.zeros(rows, rank), signs
    left[:, 0], right[0] = 1.0, 1.0
    return left.to(device).requires_grad_(), right.to(device).requires_grad_()
