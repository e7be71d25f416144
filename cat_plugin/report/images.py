"""Small pictures inside a page: arrays of pixels as PNG data addresses, by the standard library alone."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cat_plugin.graph.preparation import Preparation

__all__ = ["data_address", "png", "thumbnails"]

_LONGEST = 96


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Encode an image.

    Parameters
    ----------
    pixels : ndarray of shape (height, width) or (height, width, 3), uint8
        Grey, or red, green and blue.

    Returns
    -------
    bytes
        A PNG file (ISO/IEC 15948), every line without a filter.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    content = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def data_address(pixels: np.ndarray[Any, Any]) -> str:
    """The image as a ``data:`` address for an ``img`` element."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def thumbnails(inputs: np.ndarray[Any, Any], preparation: Preparation | None = None) -> list[str] | None:
    """Model inputs as pictures.

    Parameters
    ----------
    inputs : ndarray of shape (n, channels, height, width), float
        As the model gets them.
    preparation : Preparation, optional
        What made them of images; where it says nothing each image is stretched to the full range of grey.

    Returns
    -------
    list of str, or None
        One ``data:`` address each; None when these are no images of one or three channels.
    """
    if inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    known = preparation is not None and bool(preparation.mean or preparation.std)
    images = inputs.astype(np.float64)
    if preparation is not None:
        images = preparation.restore(images)
    addresses = []
    for image in images:
        if not known:
            low, high = image.min(), image.max()
            image = (image - low) / (high - low if high > low else 1.0)
        step = max(1, -(-max(image.shape[1:]) // _LONGEST))
        pixels = np.clip(np.rint(image[:, ::step, ::step] * 255), 0, 255).astype(np.uint8)
        addresses.append(data_address(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
    return addresses
