"""Varied inputs."""

from __future__ import annotations

import numpy as np
import torch

from cat_plugin.ptq.learned.augment import mirrored_and_shifted, with_patches
from tests.ptq.models import small_inputs


def test_every_image_is_mirrored_and_shifted_by_itself():
    x = small_inputs(64, 3, 20, 24, seed=3)
    y = mirrored_and_shifted(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    seen = set()
    for image, view in zip(x.numpy(), y.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        views = {
            (dy, dx, step): padded[:, dy : dy + 20, dx : dx + 24][:, :, ::step]
            for dy in range(5)
            for dx in range(5)
            for step in (1, -1)
        }
        found = [place for place, expected in views.items() if np.array_equal(expected, view)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 30  # of 50
    assert torch.equal(y, mirrored_and_shifted(x, torch.Generator().manual_seed(0)))


def test_patches_are_squares_of_the_preceding_image():
    x = small_inputs(5, 3, 20, 24, seed=4)
    generator = torch.Generator().manual_seed(0)
    unchanged = 0
    for _ in range(40):
        y = with_patches(x, generator)
        moved = (y != x).any(1)
        unchanged += not bool(moved.any())
        if not moved.any():
            continue
        assert bool((moved == moved[0]).all())  # one place for the whole batch
        rows, columns = moved[0].any(1).nonzero().flatten(), moved[0].any(0).nonzero().flatten()
        inside = (
            slice(None),
            slice(int(rows[0]), int(rows[-1]) + 1),
            slice(int(columns[0]), int(columns[-1]) + 1),
        )
        assert abs(len(rows) / 20 - len(columns) / 24) < 0.05
        for before, image, view in zip(x.roll(1, 0), x, y, strict=True):
            assert torch.equal(view[inside], before[inside])
            assert int((view != image).any(0).sum()) == len(rows) * len(columns)
    assert 10 < unchanged < 32
