"""Pictures inside a page, read back."""

from __future__ import annotations

import io

import numpy as np
import pytest

from cat_plugin.graph.preparation import Preparation
from cat_plugin.report.images import png, thumbnails


def test_png_is_read_back() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(pixels)))), pixels)
    grey = pixels[..., 0].copy()
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(grey)))), grey)


def test_thumbnails_undo_the_normalisation() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    inputs = (pixels / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    addresses = thumbnails(inputs, Preparation(mean=mean, std=std))
    assert addresses is not None
    import base64

    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(addresses[1].partition(",")[2]))))
    np.testing.assert_array_equal(shown, pixels[1].transpose(1, 2, 0))
    assert thumbnails(np.zeros((2, 10))) is None
    assert thumbnails(np.zeros((2, 4, 8, 8))) is None
    assert len(thumbnails(np.zeros((1, 1, 300, 200)))[0]) < 2000  # type: ignore[index]
