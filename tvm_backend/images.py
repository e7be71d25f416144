"""Images for a compiled library, and the classes that it sees in them; numpy alone, and Pillow where sizes differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import LibraryError
from cat_plugin.graph.preparation import Preparation, square

__all__ = ["Top", "prepared", "top_of"]


class Top(NamedTuple):
    """The likeliest classes of each sample, the likeliest first.

    Attributes
    ----------
    classes : ndarray of shape (N, k), int64
        Their indices.
    probabilities : ndarray of shape (N, k), float32
        Of the softmax over all classes.
    names : list of list of str, or None
        None where the library does not know the names of its classes.
    """

    classes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    names: list[list[str]] | None


def prepared(images: Any, how: Preparation | None) -> NDArray[np.float32]:
    """Images as the inputs of a model.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C), uint8, or sequence of such of shape (H, W, C)
        RGB, or grey with one channel.
    how : Preparation or None
        What the library's description says.

    Returns
    -------
    ndarray of shape (N, C, H, W), float32

    Raises
    ------
    LibraryError
        These are no images, or the library does not say how to prepare them.
    """
    if how is None or how.source != "images":
        raise LibraryError(
            "the library does not say how images are prepared for it; prepare them yourself and call it with the result, or "
            "compile a bundle that was written with export_bundle(..., preparation=Preparation(mean=..., std=...))"
        )
    if len(images) == 0:
        raise LibraryError("no images were given; give at least one, (N, H, W, C)")
    pictures = [np.asarray(image) for image in images]
    size = how.image_size
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise LibraryError(
                f"an image has dtype {picture.dtype} and shape {picture.shape}; give bytes, uint8, of shape (N, H, W, C)"
            )
        if picture.shape != pictures[0].shape and size is None:
            raise LibraryError(
                f"images of shapes {pictures[0].shape} and {picture.shape} are in one batch; make them of one size first"
            )
    if size is not None:
        pictures = [_of_size(picture, size) for picture in pictures]
    return how.apply(np.stack(pictures))


def _of_size(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if picture.shape[:2] == (size, size):
        return picture
    try:
        from PIL import Image
    except ImportError as error:
        raise LibraryError(
            f"an image of shape {picture.shape} is to be made {size} x {size}, which needs Pillow: pip install pillow"
        ) from error
    grey = picture.shape[2] == 1
    scaled = np.asarray(square(Image.fromarray(picture[..., 0] if grey else picture), size))
    return scaled[..., None] if grey else scaled


def top_of(logits: NDArray[Any], number: int, names: Sequence[str] | None) -> Top:
    """The `number` likeliest classes of each row of logits (N, C); among equals the lower class first."""
    if logits.ndim != 2 or not 1 <= number <= logits.shape[1]:
        raise LibraryError(
            f"top={number} of an output of shape {logits.shape}; give 1 to the number of classes"
        )
    classes = np.argsort(-logits, axis=1, kind="stable")[:, :number]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares = np.take_along_axis(powers / powers.sum(1, keepdims=True), classes, axis=1).astype(np.float32)
    named = None if names is None else [[names[index] for index in row] for row in classes.tolist()]
    return Top(classes, shares, named)
