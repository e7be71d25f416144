"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cat_plugin.errors import CATError, CATValueError

if TYPE_CHECKING:
    from cat_plugin.cli.data import Samples
    from cat_plugin.report.scoring import Labelled

__all__ = [
    "BatchSize",
    "Data",
    "ImageSize",
    "Mean",
    "MetricName",
    "Model",
    "NumClasses",
    "Std",
    "Weights",
    "labelled",
    "library_exists",
    "preparation",
    "samples_of",
    "sources_exist",
    "tvm_backend",
    "whole_numbers",
]

Data = Annotated[
    str,
    typer.Option(
        "--data", help="An .npz file, a .csv of file and class, or a folder with a folder of images a class."
    ),
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Per-channel mean, comma-separated, for images in [0, 1].")
]
Std = Annotated[str | None, typer.Option("--std", help="Per-channel standard deviation, comma-separated.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        min=1,
        help="Image files: scale the shorter side to 8/7 of this and cut out a square of this size.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The full-precision model: module:factory, timm:NAME, torchvision:NAME, hf:FOLDER, or a .onnx file.",
    ),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="A .safetensors state dict.")]
MetricName = Annotated[
    str,
    typer.Option(
        "--metric",
        help="What to score by: top1, top5, macro_f1, miou, or a function of logits and labels as module:function.",
    ),
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=1, help="Classes of a timm or torchvision model.")
]


def _floats(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise CATValueError(f"{option} {text!r} is not a comma-separated list of numbers") from error


def preparation(
    mean: str | None,
    std: str | None,
    image_size: int | None,
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How inputs are made ready for the model: as the options say, and where they say nothing as the bundle does.

    Parameters
    ----------
    mean, std : str or None
        The options' texts.
    image_size : int or None
    recorded : mapping, optional
        What a bundle's manifest has under ``calibration.preparation``.

    Returns
    -------
    dict
        ``mean`` and ``std`` (tuples of float or None) and ``image_size``, as :func:`load_samples` takes them.
    """
    known = dict(recorded or {})

    def kept(key: str) -> tuple[float, ...] | None:
        values = known.get(key)
        numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        return tuple(map(float, values)) if numbers else None  # type: ignore[arg-type]

    size = known.get("image_size")
    return {
        "mean": _floats(mean, "--mean") or kept("mean"),
        "std": _floats(std, "--std") or kept("std"),
        "image_size": image_size or (size if isinstance(size, int) and size > 0 else None),
    }


def sources_exist(
    *, recipe: Path | None = None, data: Iterable[str | None] = (), weights: Path | None = None
) -> None:
    """Refuse names of files that are not there: before torch is imported, which takes seconds.

    Raises
    ------
    CATValueError
        One of them does not exist.
    """
    if recipe is not None and not recipe.is_file():
        raise CATValueError(f"no recipe at {recipe}; give a YAML file, such as 'cat-ptq recipe new' writes")
    for source in data:
        if source is not None and not Path(source).exists():
            raise CATValueError(f"no data at {source}; give an .npz file, a .csv list or a folder of images")
    if weights is not None and not weights.is_file():
        raise CATValueError(f"no weights at {weights}; give a .safetensors file")


def library_exists(path: Path) -> None:
    """Refuse what is no library, before TVM is imported; a bundle is named as what it is.

    Raises
    ------
    CATValueError
        It is not there, or is a directory.
    """
    from cat_plugin.graph.manifest import MANIFEST

    if (path / MANIFEST).is_file():
        raise CATValueError(
            f"{path} is a bundle: compile it first, with 'cat-ptq compile {path} --out model.so', and give the library"
        )
    if not path.is_file():
        raise CATValueError(f"no compiled library at {path}; give the .so that 'cat-ptq compile' wrote")


def samples_of(source: str, prepared: Mapping[str, Any]) -> Samples:
    """Load data with what :func:`preparation` returned."""
    from cat_plugin.cli.data import load_samples

    return load_samples(source, **prepared)


def labelled(source: str, prepared: Mapping[str, Any]) -> Labelled:
    """Load data that must have labels."""
    from cat_plugin.report.scoring import Labelled, known

    samples = samples_of(source, prepared)
    return Labelled(samples.inputs, known(samples.labels), samples.names, Path(source).name)


def tvm_backend() -> Any:
    """The backend's package, or an error that says what to install."""
    import importlib.util

    if importlib.util.find_spec("tvm") is None:
        raise CATError("TVM is not installed; install it with pip install 'cat-ptq[tvm]'")
    import tvm_backend

    return tvm_backend


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of a comma-separated list, each once; `option` is its name in messages."""
    try:
        sizes = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        raise CATValueError(f"{option} {text!r} is not a comma-separated list of whole numbers from 1 on")
    return list(dict.fromkeys(sizes))
