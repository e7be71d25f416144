"""Further unlabelled inputs from the calibration images: mirrored, shifted, with patches of each other.

The full-precision network is the teacher of what is trained on the logits, so any plausible input will do as long as its
logits are computed anew; variations of a few hundred images keep the stage from overfitting to them.
Default: on where the loss is that of the logits and the inputs look like images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["looks_like_images", "mirrored_and_shifted", "with_patches"]


def looks_like_images(x: Tensor) -> bool:
    """Whether ``x`` can be taken for colour images: (N, 3, H, W), H and W 16 or more."""
    return x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= 16


def mirrored_and_shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image by itself mirrored or not, evenly, and shifted by whole pixels, up to a tenth of each side.

    The tenth is a pixel at least; what a shift leaves bare is filled by reflection.

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
    """Half of the batches with a rectangle of every image replaced by what the preceding image has there.

    It is drawn once for the batch, with the images' proportions, its share of the area uniform between 0 and 1 and its
    place uniform (Yun et al., "CutMix", arXiv 1905.04899, section 3.1; the labels are the teacher's here). The first
    image takes from the last. The other half of the batches, and those whose rectangle rounds to nothing, come back
    as they are. Arguments are those of :func:`mirrored_and_shifted`.
    """
    chance, share, top, left = torch.rand(4, generator=generator).tolist()
    height, width = (round(size * share**0.5) for size in x.shape[2:])
    if chance < 0.5 or height == 0 or width == 0:
        return x
    y, x0 = int(top * (x.shape[2] - height + 1)), int(left * (x.shape[3] - width + 1))
    patch = (slice(None), slice(None), slice(y, y + height), slice(x0, x0 + width))
    mixed = x.clone()
    mixed[patch] = x.roll(1, 0)[patch]
    return mixed
