"""The commands of ``cat-ptq``; each is a thin layer over the public Python API."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from cat_plugin.cli.app import app, state
from cat_plugin.errors import CATError, CATValueError

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.cli.data import Samples

recipe_app = typer.Typer(help="Write and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

Data = Annotated[
    str, typer.Option("--data", help="An .npz file, a .csv of file and class, or a folder of images.")
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Per-channel mean, comma-separated, for images in [0, 1].")
]
Std = Annotated[str | None, typer.Option("--std", help="Per-channel standard deviation, comma-separated.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]


def _floats(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise CATValueError(f"{option} {text!r} is not a comma-separated list of numbers") from error


def _samples(data: str, mean: str | None, std: str | None) -> Samples:
    from cat_plugin.cli.data import load_samples

    return load_samples(data, mean=_floats(mean, "--mean"), std=_floats(std, "--std"))


def _logits(model: nn.Module, samples: Samples, batch_size: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(batch)).numpy() for batch in samples.batches(batch_size)]
        )


def _top1(logits: np.ndarray, labels: np.ndarray | None) -> float:
    if labels is None:
        raise CATValueError(
            "the data has no labels; add an array named labels, or class folders, to measure accuracy"
        )
    return float((logits.argmax(1) == labels).mean() * 100)


@app.command()
def quantize(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    model: Annotated[str, typer.Option("--model", help="module:factory of the full-precision model.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Directory for the bundle.")],
    weights: Annotated[Path | None, typer.Option("--weights", help="A .safetensors state dict.")] = None,
    tune: Annotated[
        str | None, typer.Option("--tune", help="Labelled data for the tuning criterion, as --data.")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = 64,
) -> None:
    """Quantize a model as a recipe says and write the best result as a bundle."""
    import torch

    from cat_plugin import export_bundle, load_recipe
    from cat_plugin.cli.models import load_model

    loaded = load_recipe(recipe)
    network = load_model(model, weights)
    samples = _samples(data, mean, std)
    eval_fn = None
    if tune is not None:
        tuning = _samples(tune, mean, std)
        _top1(np.zeros((len(tuning), 1)), tuning.labels)

        def eval_fn(candidate: nn.Module) -> float:
            return _top1(_logits(candidate, tuning, batch_size), tuning.labels) / 100

    batches = [torch.from_numpy(batch) for batch in samples.batches(batch_size)]
    corrected = loaded.run(network, calibration=batches, eval_fn=eval_fn)
    bundle = export_bundle(
        corrected, batches[0][:2], out, calibration={"samples": len(samples), "recipe": recipe.name}
    )
    state.report({"bundle": str(bundle), "calibration_samples": len(samples)})


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Data,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure the top-1 accuracy of a bundle with PyTorch."""
    from cat_plugin.graph.bundle import read_bundle

    samples = _samples(data, mean, std)
    module = read_bundle(bundle).program().module()
    accuracy = _top1(_logits(module, samples, batch_size), samples.labels)
    state.report({"top1_percent": accuracy, "samples": len(samples)})


@app.command("compile")
def compile_(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    target: Annotated[str, typer.Option("--target", help="native, portable, or a TVM target.")] = "native",
    out: Annotated[Path, typer.Option("--out", help="The library to write.")] = Path("model.so"),
) -> None:
    """Compile a bundle with TVM to a library that runs without PyTorch."""
    tvm_backend = _tvm_backend()
    tvm_backend.compile(bundle, target=target, out=out)
    state.report({"library": str(out), "bytes": out.stat().st_size, "target": target})


@app.command()
def run(
    library: Annotated[Path, typer.Argument(help="A compiled library.")],
    inputs: Annotated[str, typer.Option("--input", help="An .npz file, a .csv list or a folder of images.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the logits here, as .npz.")] = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = 64,
) -> None:
    """Run a compiled library on data (PyTorch is not imported)."""
    tvm_backend = _tvm_backend()
    samples = _samples(inputs, mean, std)
    call = tvm_backend.load(library)
    logits = np.concatenate([call(batch) for batch in samples.batches(batch_size)])
    values: dict[str, Any] = {"samples": len(samples), "predictions": logits.argmax(1).tolist()}
    if samples.labels is not None:
        values["top1_percent"] = _top1(logits, samples.labels)
    if out is not None:
        np.savez(out, logits=logits)
        values["logits"] = str(out)
    state.report(values)


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Show what a bundle holds: layers, bit-widths, the correction, versions."""
    from cat_plugin.graph.bundle import read_bundle

    manifest = read_bundle(bundle).manifest

    def table() -> Table:
        shown = Table(title=str(bundle), caption=f"cluster-affine: {manifest['cluster_affine'] or 'none'}")
        for heading in ("layer", "kind", "weight", "W bits", "A bits"):
            shown.add_column(heading)
        for layer in manifest["layers"]:
            shape = " x ".join(map(str, layer["weight_shape"]))
            bits = [str(layer[key] or "float") for key in ("w_bits", "a_bits")]
            shown.add_row(layer["name"], layer["kind"], shape, *bits)
        return shown

    state.report(manifest, table)


@recipe_app.command("check")
def recipe_check(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]) -> None:
    """Check a recipe without running it."""
    from cat_plugin import load_recipe

    load_recipe(recipe)
    state.report({"recipe": str(recipe), "valid": True})


@app.command()
def doctor() -> None:
    """Say which parts are installed and what to install for the rest."""
    wanted = {
        "torch": "quantizing: pip install 'cat-ptq[torch]'",
        "neural-compressor": "recipes and autotune: pip install 'cat-ptq[inc]'",
        "apache-tvm": "compiling and running: pip install 'cat-ptq[tvm]'",
        "apache-tvm-ffi": "compiling and running: pip install 'cat-ptq[tvm]'",
        "matplotlib": "charts: pip install 'cat-ptq[report]'",
    }
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name, hint in wanted.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"not installed ({hint})"
    state.report(found)


def _tvm_backend() -> Any:
    if importlib.util.find_spec("tvm") is None:
        raise CATError("TVM is not installed; install it with pip install 'cat-ptq[tvm]'")
    import tvm_backend

    return tvm_backend
