"""Further unlabelled inputs from the calibration images: mirrored, shifted, with patches of each other.

The full-precision network is the teacher of what is trained on the logits, so any plausible input will do as long as its
logits are asked for anew; a few hundred images seen from many sides, and in pieces, keep the stage from learning them by heart.
Default: on for inputs (N, 3, H, W) with H and W of 16 or more where the logits are trained on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["looks_like_images", "mirrored_and_shifted", "with_patches"]


def looks_like_images(x: Tensor) -> bool:
    """Whether ``x`` (N, ...) can be taken for natural images."""
    return x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= 16


def mirrored_and_shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2 and shifted by up to a tenth each way, edges reflected.

    Parameters
    ----------
    x : Tensor
        (N, C, H, W).
    generator : torch.Generator
        CPU generator.

    Returns
    -------
    Tensor
        (N, C, H, W), stored with the channels last.
    """
    height, width = x.shape[2:]
    reach_y, reach_x = max(1, height // 10), max(1, width // 10)
    padded = F.pad(x, (reach_x, reach_x, reach_y, reach_y), mode="reflect")

    def draw(values: int) -> Tensor:
        return torch.randint(values, (len(x), 1), generator=generator)

    rows = draw(2 * reach_y + 1) + torch.arange(height)
    columns = draw(2 * reach_x + 1) + torch.arange(width)
    columns = torch.where(draw(2) > 0, columns.flip(1), columns)
    image = torch.arange(len(x)).reshape(-1, 1, 1)
    place = (image.to(x.device), rows.unsqueeze(2).to(x.device), columns.unsqueeze(1).to(x.device))
    return padded.permute(0, 2, 3, 1)[place].permute(0, 3, 1, 2)


def with_patches(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image with one and the same square replaced by its predecessor's, in every other batch on average.

    The square's share of the image is uniform between 0 and 1 (Yun et al., "CutMix", arXiv 1905.04899, section 3.1;
    the labels are the teacher's here).

    Parameters
    ----------
    x : Tensor
        (N, C, H, W).
    generator : torch.Generator
        CPU generator.

    Returns
    -------
    Tensor
        (N, C, H, W); ``x`` itself if nothing is replaced.
    """
    chance, share, top, left = torch.rand(4, generator=generator).tolist()
    height, width = (round(size * share**0.5) for size in x.shape[2:])
    if chance < 0.5 or height == 0 or width == 0:
        return x
    y, x0 = int(top * (x.shape[2] - height + 1)), int(left * (x.shape[3] - width + 1))
    square = (slice(None), slice(None), slice(y, y + height), slice(x0, x0 + width))
    mixed = x.clone()
    mixed[square] = x.roll(1, 0)[square]
    return mixed
