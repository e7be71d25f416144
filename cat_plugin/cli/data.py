"""Samples for the command line: ``.npz`` files, image folders, and CSV lists of files."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cat_plugin.errors import CATValueError
from cat_plugin.graph.preparation import Preparation, square

if TYPE_CHECKING:
    from cat_plugin.ptq.cache import TensorStore

__all__ = ["NamedArrays", "Samples", "arrays_in", "load_arrays", "load_samples"]

_INPUT_KEYS = ("inputs", "images", "x")
_LABEL_KEYS = ("labels", "y")
_PORTION = 64  # samples prepared at a time
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


@dataclass(frozen=True)
class Samples:
    """Model inputs and, where known, their labels.

    Attributes
    ----------
    inputs : ndarray of shape (n, ...), float32
        Ready for the model: images are (n, channels, height, width), scaled and normalised.
    labels : ndarray of shape (n,), int64, or None
        Class indices.
    names : list of str or None
        The images' files.
    source : str
        ``"images"`` where they were bytes or files of images, else ``"arrays"``.
    classes : list of str or None
        The names of the folders that the labels number.
    """

    inputs: np.ndarray
    labels: np.ndarray | None
    names: list[str] | None = None
    source: str = "arrays"
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int) -> list[np.ndarray]:
        """Cut the inputs into batches of at most `size`."""
        return [self.inputs[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class NamedArrays:
    """Inputs of a model that takes several, and their labels where known.

    Attributes
    ----------
    inputs : tuple of ndarray of shape (n, ...)
        In the model's order.
    labels : ndarray of shape (n, ...), int64, or None
        Class indices.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int) -> list[tuple[np.ndarray, ...]]:
        """Cut the inputs into batches of at most `size`."""
        starts = range(0, len(self), size)
        return [tuple(array[start : start + size] for array in self.inputs) for start in starts]


def load_arrays(source: str | Path, described: Sequence[Mapping[str, Any]]) -> NamedArrays:
    """Load the inputs of a model that takes several.

    Parameters
    ----------
    source : path
        An ``.npz`` file with an array for each input, under its name, and labels (``labels``/``y``) where there are any.
    described : sequence of mapping
        The ``inputs`` of the model's manifest: name and dtype of each.

    Raises
    ------
    CATValueError
        When it is no such file, or the arrays do not have a row for each sample.
    """
    path, names = Path(source), [str(entry["name"]) for entry in described]
    if path.suffix != ".npz" or not path.is_file():
        raise CATValueError(
            f"{source} is no .npz file; the model takes {', '.join(names)}: give an .npz file with an array for each"
        )
    *found, labels = _arrays(path, [*((name,) for name in names), _LABEL_KEYS])[0]
    inputs: list[np.ndarray] = []
    for array, entry in zip(found, described, strict=True):
        if array is None or not array.ndim:
            raise CATValueError(
                f"{path} has no array {entry['name']!r} with a row for each sample; the model takes {', '.join(names)}: give "
                "an array for each"
            )
        dtype = np.dtype(str(entry["dtype"]))
        inputs.append(array.astype(dtype, copy=False) if array.dtype.kind == dtype.kind else array)
    if len({len(array) for array in (*inputs, *([] if labels is None else [labels]))}) != 1 or not len(
        inputs[0]
    ):
        counts = ", ".join(f"{name} of {len(array)} rows" for name, array in zip(names, inputs, strict=True))
        raise CATValueError(
            f"{path} holds {counts}; expected a row of each for every sample, a label where there are labels, and at least one "
            "sample"
        )
    return NamedArrays(tuple(inputs), None if labels is None else labels.astype(np.int64))


def arrays_in(source: str | Path) -> list[str]:
    """Names of the arrays of an ``.npz`` file; none where it is something else."""
    path = Path(source)
    return _arrays(path, [])[1] if path.suffix == ".npz" and path.is_file() else []


def _arrays(path: Path, wanted: Iterable[Sequence[str]]) -> tuple[list[np.ndarray | None], list[str]]:
    """Of each group of names the first array that an ``.npz`` file has, and the names of all that it has."""
    try:
        with zipfile.ZipFile(path):
            pass  # numpy would try to read anything else as a single array, or as a pickle
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            found = [next((archive[key] for key in keys if key in names), None) for keys in wanted]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise CATValueError(f"{path} cannot be read as .npz: {error}; write it with numpy.savez") from error
    for array in found:
        # What is in the archive and is no array, numpy returns as bytes.
        if array is not None and (not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf"):
            raise CATValueError(
                f"{path} holds a {getattr(array, 'dtype', type(array).__name__)}; expected numbers, "
                "write it with numpy.savez"
            )
    return found, names


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    (inputs, labels), names = _arrays(path, [_INPUT_KEYS, _LABEL_KEYS])
    if inputs is None:
        raise CATValueError(
            f"{path} holds {names}; expected an array named one of {', '.join(_INPUT_KEYS)}, or, of a model of several inputs, an "
            "array for each, under its name"
        )
    return inputs, labels


class _Prepared:
    """Inputs made ready a portion at a time, so that raw and prepared ones are never held whole together.

    Parameters
    ----------
    how : Preparation
        What is done to them.
    count : int
        Samples in all.
    store : TensorStore or None
        Where they are kept; None is in memory.
    """

    def __init__(self, how: Preparation, count: int, store: TensorStore | None) -> None:
        self._how, self._count, self._store = how, count, store
        self._filled = 0
        self.inputs: np.ndarray | None = None

    def add(self, raw: np.ndarray) -> None:
        """Some samples, as :meth:`Preparation.apply` takes them."""
        ready = self._how.apply(raw)
        if self.inputs is None:
            self.inputs = self._room((self._count, *ready.shape[1:]))
        self.inputs[self._filled : self._filled + len(ready)] = ready
        self._filled += len(ready)
        if self._store is not None:
            self._store.settle()

    def _room(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._store is None:
            return np.empty(shape, np.float32)
        import torch

        return self._store.allocate(shape, torch.float32, torch.device("cpu")).numpy()


def _images(paths: list[Path], size: int | None) -> Iterator[np.ndarray]:
    """Each image, (1, height, width, 3) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise CATValueError(
            "reading image files needs Pillow: pip install pillow, or store the data as .npz"
        ) from error
    first: tuple[int, ...] = ()
    for path in paths:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise anything on damaged files, SyntaxError among it
            raise CATValueError(f"{path} cannot be read as an image: {error}") from error
        pixels = np.asarray(image if size is None else square(image, size))
        first = first or pixels.shape
        if pixels.shape != first:
            raise CATValueError(
                f"{path} is {pixels.shape[1]} x {pixels.shape[0]} and {paths[0]} is "
                f"{first[1]} x {first[0]}; resize all images to the model's input, "
                "or have it done with --image-size"
            )
        yield pixels[None]


_Listed = tuple[list[Path], np.ndarray | None]


def _from_csv(path: Path) -> _Listed:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CATValueError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if rows and len(rows[0]) > 1 and not rows[0][1].strip().lstrip("-").isdigit():
        rows = rows[1:]  # a header
    try:
        labels = np.array([int(row[1]) for row in rows], np.int64)
    except (IndexError, ValueError, OverflowError) as error:
        raise CATValueError(f"{path}: every row must be FILE,CLASS_INDEX; {error}") from error
    if not rows:
        raise CATValueError(f"{path} lists no files; expected rows of FILE,CLASS_INDEX")
    return [path.parent / row[0] for row in rows], labels


def _from_folder(path: Path) -> _Listed:
    """List one folder per class, classes numbered in the order of their names; or images alone, without labels."""
    classes = sorted(child for child in path.iterdir() if child.is_dir())
    found = [
        (image, index)
        for index, folder in enumerate(classes)
        for image in sorted(folder.rglob("*"))
        if image.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if found:
        return [image for image, _ in found], np.array([index for _, index in found], np.int64)
    alone = sorted(image for image in path.iterdir() if image.suffix.lower() in _IMAGE_SUFFIXES)
    if not alone:
        raise CATValueError(f"{path} holds no images; expected one folder per class with image files in it")
    return alone, None


def load_samples(
    source: str | Path, preparation: Preparation | None = None, store: TensorStore | None = None
) -> Samples:
    """Load inputs and labels.

    Parameters
    ----------
    source : path
        An ``.npz`` file (arrays ``inputs``/``images``/``x`` and ``labels``/``y``), a ``.csv`` of file and class
        index, a folder with one folder of images per class, or a folder of images (without labels).
    preparation : Preparation, optional
        What is done to them; without it images are scaled to [0, 1] and arrays taken as they are.
    store : TensorStore, optional
        Where the inputs are kept; without it in memory.

    Raises
    ------
    CATValueError
        When the source is missing, empty, or of none of these forms.
    """
    path, how = Path(source), preparation or Preparation()
    names: list[str] | None = None
    classes: list[str] | None = None
    if path.is_dir() or (path.is_file() and path.suffix == ".csv"):
        listed, labels = _from_folder(path) if path.is_dir() else _from_csv(path)
        root = path if path.is_dir() else path.parent
        names = [str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in listed]
        prepared = _Prepared(how, len(listed), store)
        for image in _images(listed, how.image_size):
            prepared.add(image)
        assert prepared.inputs is not None
        inputs, kind = prepared.inputs, "images"
        if path.is_dir() and labels is not None:
            classes = sorted(child.name for child in path.iterdir() if child.is_dir())
    elif not path.is_file():
        raise CATValueError(f"no data at {source}; give an .npz file, a .csv list or a folder of images")
    elif path.suffix == ".npz":
        inputs, labels = _from_npz(path)
        kind = "images" if inputs.dtype == np.uint8 and inputs.ndim == 4 else "arrays"
    else:
        raise CATValueError(
            f"{source} is of no known kind; give an .npz file, a .csv list or a folder of images"
        )
    if inputs.ndim < 2 or not len(inputs):
        raise CATValueError(
            f"{source} holds inputs of shape {inputs.shape}; expected (samples, ...) and at least one"
        )
    if labels is not None and labels.shape[:1] != (len(inputs),):
        raise CATValueError(
            f"{source} holds {len(inputs)} inputs and labels of shape {labels.shape}; expected one each"
        )
    if path.suffix == ".npz" and path.is_file():
        inputs = _ready(inputs, how, store)
    known = None if labels is None else labels.astype(np.int64)
    return Samples(inputs, known, names, kind, classes)


def _ready(arrays: np.ndarray, how: Preparation, store: TensorStore | None) -> np.ndarray:
    """What stood in a file, prepared."""
    if store is None and np.shares_memory(how.apply(arrays[:1]), arrays):
        return arrays  # there is nothing to do
    prepared = _Prepared(how, len(arrays), store)
    for start in range(0, len(arrays), _PORTION):
        prepared.add(arrays[start : start + _PORTION])
    assert prepared.inputs is not None
    return prepared.inputs
