"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cat_plugin.errors import CATError, CATValueError

if TYPE_CHECKING:
    from cat_plugin.cli.data import Samples
    from cat_plugin.graph.preparation import Preparation
    from cat_plugin.ptq.cache import TensorStore
    from cat_plugin.report.scoring import Labelled

__all__ = [
    "BatchSize",
    "ChannelOrder",
    "Classes",
    "Data",
    "Force",
    "ImageSize",
    "Mean",
    "MetricName",
    "Model",
    "NumClasses",
    "Std",
    "Threads",
    "Weights",
    "class_names",
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
ChannelOrder = Annotated[
    str | None, typer.Option("--channel-order", help="What the model takes: rgb (the default) or bgr.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Prepare inputs by the options alone, though the model was calibrated with others."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option("--classes", help="A text file with the name of a class in each line, in their order."),
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
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads at most; by default TVM_NUM_THREADS, or the runtime's own choice."
    ),
]
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
    channel_order: str | None,
    *,
    recorded: Preparation | None = None,
    force: bool = False,
) -> Preparation | None:
    """How inputs are made ready for the model: as the model's manifest says, or where it says nothing as the options do.

    Parameters
    ----------
    mean, std, channel_order : str or None
        The options' texts.
    image_size : int or None
        Side of the square that images are scaled to; None: as recorded, or as they are.
    recorded : Preparation, optional
        What the manifest says.
    force : bool
        Whether the options count alone, whatever the manifest says.

    Returns
    -------
    Preparation or None
        None when neither says anything.

    Raises
    ------
    CATValueError
        The options say something else than the manifest, or nothing that can be done.
    """
    from cat_plugin.graph.preparation import Preparation

    given = {
        "mean": _floats(mean, "--mean"),
        "std": _floats(std, "--std"),
        "image_size": image_size,
        "channel_order": None if channel_order is None else channel_order.upper(),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if recorded is None or force:
        return Preparation(**given) if given else None  # type: ignore[arg-type]
    for name, value in given.items():
        if value != getattr(recorded, name):
            option = f"--{name.replace('_', '-')}"
            raise CATValueError(
                f"{option} is not what the model was calibrated with ({recorded}); leave {option} out, or prepare the inputs by "
                "the options alone with --force"
            )
    return recorded


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


def samples_of(
    source: str, prepared: Preparation | None, *, same: bool = False, store: TensorStore | None = None
) -> Samples:
    """Load data with what :func:`preparation` returned.

    Parameters
    ----------
    source : str
        What ``--data`` names.
    prepared : Preparation or None
        How images are made ready.
    same : bool
        Whether they must be of the kind that the model was calibrated on: images, or arrays prepared elsewhere.
    store : TensorStore or None
        Where they are kept; None is in memory.

    Raises
    ------
    CATValueError
        They are of the other kind, for which the preparation would be wrong.
    """
    from cat_plugin.cli.data import load_samples

    samples = load_samples(source, prepared, store)
    if same and prepared is not None and samples.source != prepared.source:
        raise CATValueError(
            f"{source} holds {samples.source} and the model was calibrated on {prepared}; give {prepared.source}, or prepare "
            "the inputs by the options alone with --force"
        )
    return samples


def labelled(
    source: str, prepared: Preparation | None, *, same: bool = False, store: TensorStore | None = None
) -> Labelled:
    """Load data that must have labels, as :func:`samples_of` does."""
    from cat_plugin.report.scoring import Labelled, known

    samples = samples_of(source, prepared, same=same, store=store)
    return Labelled(samples.inputs, known(samples.labels), samples.names, Path(source).name)


def class_names(path: Path | None) -> list[str] | None:
    """The lines of a file of class names.

    Raises
    ------
    CATValueError
        It cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CATValueError(
            f"--classes {path} cannot be read: {error}; give a text file, a name a line"
        ) from error
    while names and not names[-1]:
        names.pop()
    if not names:
        raise CATValueError(f"--classes {path} is empty; give a text file, a name a line")
    return names


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
