"""Further unlabelled inputs from the calibration images: mirrored and shifted.

The full-precision network is the teacher of the whole-model stage, so any plausible input will do as long as its
logits are asked for anew; a few hundred images seen from many sides keep the stage from learning them by heart.
Default: on for inputs (N, 1 or 3, H, W) with H and W of 16 or more where the preset trains the whole model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["looks_like_images", "mirrored_and_shifted"]


def looks_like_images(x: Tensor) -> bool:
    """Whether ``x`` (N, ...) can be taken for natural images."""
    return x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= 16


def mirrored_and_shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each half of the batch mirrored with probability 1/2, the batch shifted by up to a tenth, edges reflected.

    Parameters
    ----------
    x : Tensor
        (N, C, H, W).
    generator : torch.Generator
        CPU generator.

    Returns
    -------
    Tensor
        (N, C, H, W).
    """
    height, width = x.shape[2:]
    reach_y, reach_x = max(1, height // 10), max(1, width // 10)
    halves = []
    for part in x.chunk(2):
        mirrored = bool(torch.randint(2, (1,), generator=generator))
        dy = int(torch.randint(-reach_y, reach_y + 1, (1,), generator=generator))
        dx = int(torch.randint(-reach_x, reach_x + 1, (1,), generator=generator))
        view = part.flip(3) if mirrored else part
        view = F.pad(view, (reach_x, reach_x, reach_y, reach_y), mode="reflect")
        top, left = reach_y + dy, reach_x + dx
        halves.append(view[:, :, top : top + height, left : left + width])
    return torch.cat(halves)
