"""How images become a model's inputs: recorded where the model was calibrated, and done the same wherever it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CATValueError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preparation", "are_class_names", "is_preparation", "preparation_of", "square"]

_ORDERS = ("RGB", "BGR")
_SOURCES = ("images", "arrays")
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class Preparation:
    """What is done to images on the way to a model.

    Parameters
    ----------
    mean, std : sequence of float, optional
        One for each channel in the model's order, for values in [0, 1].
    image_size : int, optional
        Images of other sizes are scaled so that the shorter side is 8/7 of it, and a square of it is cut out of the middle.
    channel_order : str
        ``"RGB"`` or ``"BGR"``: what the model takes; images are RGB.
    source : str
        ``"images"`` where the model was calibrated on bytes (N, H, W, C), ``"arrays"`` where on numbers that had been
        prepared elsewhere.

    Raises
    ------
    CATValueError
        A value is out of range, or `mean` and `std` differ in length.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    channel_order: str = "RGB"
    source: str = "images"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is None:
                continue
            values = tuple(float(value) for value in given)
            if not values or not all(map(math.isfinite, values)):
                raise CATValueError(f"{name} is {_text(values)}; give a finite number for each channel")
            object.__setattr__(self, name, values)
        if self.std is not None and min(self.std) <= 0:
            raise CATValueError(
                f"std is {_text(self.std)}, and inputs are divided by it; give numbers above 0"
            )
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise CATValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give one of each for each channel"
            )
        if self.image_size is not None and (type(self.image_size) is not int or self.image_size < 1):
            raise CATValueError(f"image_size is {self.image_size!r}; expected a whole number from 1 on")
        for name, known in (("channel_order", _ORDERS), ("source", _SOURCES)):
            if getattr(self, name) not in known:
                raise CATValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")

    def __str__(self) -> str:
        parts = [f"{name} {_text(v)}" for name, v in (("mean", self.mean), ("std", self.std)) if v]
        if self.image_size is not None:
            parts.append(f"image size {self.image_size}")
        if self.source == "arrays":
            return ", ".join(["arrays", *parts] if parts else ["arrays as they are"])
        return ", ".join([f"images in {self.channel_order}, scaled to [0, 1]", *parts])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        fields = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Make a model's inputs.

        Parameters
        ----------
        values : ndarray of shape (N, H, W, C), uint8, or of any shape and other type
            Bytes are images: scaled to [0, 1] and moved to (N, C, H, W). Other numbers are only normalised.

        Returns
        -------
        ndarray, float32
            New unless there is nothing to do.

        Raises
        ------
        CATValueError
            `mean` or `std` has not one value for each channel.
        """
        images = values.dtype == np.uint8 and values.ndim == 4
        if self.channel_order == "BGR":
            if not images or values.shape[3] != 3:
                raise CATValueError(
                    f"channel order BGR is for images of three channels; the data are {values.dtype} of shape {values.shape}"
                )
            values = values[..., ::-1]
        if images:
            values = np.ascontiguousarray(values.transpose(0, 3, 1, 2), dtype=np.float32) / 255
        inputs: NDArray[np.float32] = values.astype(np.float32, copy=False)
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and (inputs.ndim != 4 or len(given) != inputs.shape[1]):
                raise CATValueError(
                    f"{name} has {len(given)} values for data of shape {inputs.shape}; give one for each channel"
                )
        if self.mean is not None:
            inputs = inputs - np.asarray(self.mean, np.float32).reshape(1, -1, 1, 1)
        if self.std is not None:
            inputs = inputs / np.asarray(self.std, np.float32).reshape(1, -1, 1, 1)
        return inputs

    def restore(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """The images in [0, 1], RGB, (N, C, H, W), that inputs (N, C, H, W) were made of."""
        std, mean = (np.asarray(v).reshape(1, -1, 1, 1) for v in (self.std or (1.0,), self.mean or (0.0,)))
        images: NDArray[Any] = inputs * std + mean
        return images[:, ::-1] if self.channel_order == "BGR" else images


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def square(image: Image, size: int) -> Image:
    """Scale the shorter side to 8/7 of `size` (256 for 224) and cut a square out of the middle."""
    scale = size * 8 / 7 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=2)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _read(value: Any) -> Preparation | None:
    if not isinstance(value, Mapping):
        return None
    fields: dict[str, Any] = {key: value[key] for key in Preparation.__dataclass_fields__ if key in value}
    for name in ("mean", "std"):
        numbers = fields.get(name)
        if numbers is None:
            continue
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            return None
        fields[name] = tuple(numbers)
    try:
        return Preparation(**fields)
    except (CATValueError, TypeError):  # a value that cannot be hashed, where a name belongs
        return None


def is_preparation(value: Any) -> bool:
    """Whether a value read from JSON is a preparation, or null."""
    return value is None or _read(value) is not None


def are_class_names(value: Any) -> bool:
    """Whether a value read from JSON is a list of names, or null."""
    return value is None or (
        isinstance(value, list)
        and all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in value)
    )


def preparation_of(manifest: Mapping[str, Any]) -> Preparation | None:
    """How a model's inputs are prepared, as the manifest of its bundle or library says; None where it says nothing.

    Bundles of earlier releases have mean, deviation and size among what is told of the calibration.
    """
    if manifest.get("preparation") is not None:
        return _read(manifest["preparation"])
    earlier = (manifest.get("calibration") or {}).get("preparation")
    return _read(earlier) if earlier else None
