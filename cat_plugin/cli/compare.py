"""``cat-ptq compare``: two bundles, or two recipes, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cat_plugin.cli.console import state
from cat_plugin.cli.options import (
    BatchSize,
    ChannelOrder,
    Force,
    ImageSize,
    Mean,
    Model,
    NumClasses,
    Std,
    Threads,
    Weights,
    labelled,
    library_exists,
    preparation,
    samples_of,
    sources_exist,
    whole_numbers,
)
from cat_plugin.errors import CATValueError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from cat_plugin.graph.preparation import Preparation
    from cat_plugin.report.scoring import IntArray, Labelled

__all__ = ["compare"]

_LISTED = 10


@dataclass
class _Side:
    """One of the two: where its graph comes from, and what is known of it."""

    name: str
    layers: list[dict[str, Any]]
    correction: str
    program: Callable[[], ExportedProgram] | None = None
    recorded: Preparation | None = None
    names: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    classes: IntArray | None = None


def compare(
    first: Annotated[Path, typer.Argument(help="A bundle, or a recipe (YAML).")],
    second: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Labelled samples to compare the accuracy and the classes on."),
    ] = None,
    library: Annotated[
        list[Path] | None,
        typer.Option("--library", help="Compiled libraries, one for each in their order, to time."),
    ] = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Recipes: the data to quantize --model with.")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    force: Force = False,
    batch_size: BatchSize = 64,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes to time the libraries at.")] = "1,16",
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="For each of them.")] = 1.0,
    threads: Threads = None,
) -> None:
    """Show two bundles side by side: bits, sizes, accuracy, the samples that they disagree on, latencies.

    Two recipes are compared by their options; with --model and --calibration both are run and then compared as bundles are.
    """
    sources_exist(data=(data, calibration), weights=weights)
    libraries = library or []
    if len(libraries) not in (0, 2):
        raise CATValueError(
            f"--library is given {len(libraries)} times; give the library of each, in their order"
        )
    for path in libraries:
        library_exists(path)
    prepared = preparation(mean, std, image_size, channel_order)
    recipes = [path.is_file() for path in (first, second)]
    if all(recipes):
        if (model is None) != (calibration is None):
            raise CATValueError("--model and --calibration belong together: the recipes are run with both")
        if model is None or calibration is None:
            sides = [_recipe(path) for path in (first, second)]
        else:
            made = (model, weights, num_classes)
            sides = [_quantized(path, made, calibration, prepared, batch_size) for path in (first, second)]
    elif any(recipes):
        raise CATValueError(
            f"{first} and {second} are a file and a directory; give two bundles, or two recipes"
        )
    else:
        sides = [_bundle(path) for path in (first, second)]
    for side, letter in zip(sides, "AB", strict=True):
        side.name = f"{letter}: {side.name}"
    rows = _facts(sides)
    values: dict[str, Any] = {"first": str(first), "second": str(second), "rows": rows}
    if data is not None:
        if sides[0].program is None:
            raise CATValueError(
                "recipes have no accuracy before they are run; give --model and --calibration"
            )
        recorded = sides[0].recorded
        if sides[1].recorded != recorded and not force:
            raise CATValueError(
                f"the two take their inputs differently ({recorded or 'not recorded'}; {sides[1].recorded or 'not recorded'}): "
                "one set of samples cannot serve both, unless --force has them prepared by the options alone"
            )
        how = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
        samples = labelled(data, how, same=recorded is not None and not force)
        rows += _scores(sides, samples, batch_size)
        values["differ"] = _differing(sides, samples)
    if libraries:
        rows += _latencies(libraries, whole_numbers(batch, "--batch"), seconds, threads)
    state.report(values, lambda: _shown(sides, values), "rows")


def _bundle(path: Path) -> _Side:
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.graph.preparation import preparation_of
    from cat_plugin.report.figures import correction

    bundle = read_bundle(path)
    manifest, step = bundle.manifest, bundle.manifest["cluster_affine"]
    return _Side(
        path.name,
        manifest["layers"],
        "none" if step is None else correction(step["shapes"].get("beta", ["?"])[0], step["alpha"]),
        bundle.program,
        preparation_of(manifest),
        manifest.get("class_names"),
    )


def _only_configuration(path: Path) -> dict[str, Any]:
    from cat_plugin import load_recipe
    from cat_plugin.errors import RecipeError
    from cat_plugin.recipe.options import expand, with_defaults

    found = [params for entry in load_recipe(path).configurations for params in expand(entry)]
    if len(found) > 1:
        raise RecipeError(
            f"{path} describes {len(found)} configurations; give each option one value, or tune with 'cat-ptq quantize --tune' "
            "and compare bundles"
        )
    return with_defaults(found[0])


def _recipe(path: Path) -> _Side:
    return _Side(path.name, [], "", options=_only_configuration(path))


def _quantized(
    path: Path,
    model: tuple[str, Path | None, int | None],
    calibration: str,
    prepared: Preparation | None,
    batch_size: int,
) -> _Side:
    import dataclasses

    import torch

    from cat_plugin import load_recipe
    from cat_plugin.cli.models import load_model
    from cat_plugin.graph.export import export_program
    from cat_plugin.graph.inspect import quantized_layers
    from cat_plugin.graph.preparation import Preparation
    from cat_plugin.recipe.progress import Watch, watching
    from cat_plugin.report.figures import correction

    side = _recipe(path)
    samples = samples_of(calibration, prepared)
    batches = list(torch.split(torch.from_numpy(samples.inputs), batch_size))
    with watching(Watch(console=state.console)):
        corrected: Any = load_recipe(path).run(load_model(*model), batches)
    program = export_program(corrected, batches[0][:2])
    step = corrected.correction
    side.layers = [layer.to_dict() for layer in quantized_layers(program)]
    side.correction = correction(len(step.beta), step.alpha)
    side.program = lambda: program
    side.recorded = dataclasses.replace(prepared or Preparation(), source=samples.source)
    return side


def _row(what: str, first: Any, second: Any) -> dict[str, Any]:
    """A line of the table; numbers keep their values, and have a difference."""
    row = {"what": what, "first": first, "second": second}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return {**row, "difference": second - first if numbers else None}


def _facts(sides: list[_Side]) -> list[dict[str, Any]]:
    from cat_plugin.report.content import as_text, bits_of, short_name, weight_bytes

    rows = []
    names = list(dict.fromkeys(name for side in sides for name in side.options))
    for name in names:
        first, second = (side.options.get(name) for side in sides)
        if first != second:
            rows.append(_row(name, as_text(first), as_text(second)))
    if not sides[0].layers:
        return rows
    rows.append(_row("bits", *(bits_of(side.layers) for side in sides)))
    rows.append(_row("weight bytes", *(weight_bytes(side.layers) for side in sides)))
    rows.append(_row("correction", *(side.correction for side in sides)))
    bits = [{short_name(layer["name"]): _bits(layer) for layer in side.layers} for side in sides]
    for name in dict.fromkeys([*bits[0], *bits[1]]):
        first, second = (found.get(name, "not there") for found in bits)
        if first != second:
            rows.append(_row(f"layer {name}", first, second))
    return rows


def _bits(layer: dict[str, Any]) -> str:
    return f"W{layer['w_bits'] or 'float'}A{layer['a_bits'] or 'float'}"


def _scores(sides: list[_Side], samples: Labelled, batch_size: int) -> list[dict[str, Any]]:
    from cat_plugin.report.outputs import both_logits
    from cat_plugin.report.scoring import batches_of, top1

    scores: list[float] = []
    plain: list[float | None] = []
    for side in sides:
        assert side.program is not None
        with state.working(f"evaluating {side.name}", len(samples)) as at:
            batches = at.over(batches_of(samples.inputs, batch_size), len)
            corrected, before = both_logits(side.program(), batches)
        side.classes = corrected.argmax(1)
        scores.append(top1(corrected, samples.labels))
        plain.append(None if before is None else top1(before, samples.labels))
    return [_row("top-1 percent", *scores), _row("without the correction", *plain)]


def _differing(sides: list[_Side], samples: Labelled) -> dict[str, Any]:
    """The samples that the two give different classes, and who is right."""
    import numpy as np

    first, second = (side.classes for side in sides)
    assert first is not None and second is not None  # noqa: PT018
    numbers = np.flatnonzero(first != second)
    labels = samples.labels
    right = {"first": int((first == labels)[numbers].sum()), "second": int((second == labels)[numbers].sum())}
    names = sides[0].names or sides[1].names

    def called(index: int) -> str | int:
        return names[index] if names is not None and 0 <= index < len(names) else index

    return {
        "samples": len(samples),
        "differing": len(numbers),
        "right": right | {"neither": len(numbers) - right["first"] - right["second"]},
        "rows": [
            {
                "sample": samples.names[number] if samples.names else number,
                "label": called(int(labels[number])),
                "first": called(int(first[number])),
                "second": called(int(second[number])),
            }
            for number in numbers.tolist()
        ],
    }


def _latencies(
    libraries: list[Path], batches: list[int], seconds: float, threads: int | None
) -> list[dict[str, Any]]:
    from cat_plugin.cli.latencies import measured_latencies

    found = [measured_latencies(path, None, None, batches, seconds, threads) for path in libraries]
    rows = [_row("library bytes", *(path.stat().st_size for path in libraries))]
    for first, second in zip(*found, strict=True):
        rows.append(_row(f"ms, batch {first['batch']}", first["median_ms"], second["median_ms"]))
    return rows


def _shown(sides: list[_Side], values: dict[str, Any]) -> Group:
    from cat_plugin.report.figures import short

    table = Table(box=None)
    table.add_column("")
    for side in sides:
        table.add_column(escape(side.name), justify="right", overflow="fold")
    table.add_column("difference", justify="right")
    for row in values["rows"]:
        cells = [
            short(v, 4) if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
            for v in (row["first"], row["second"], row["difference"])
        ]
        table.add_row(escape(row["what"]), *(escape("" if cell == "None" else cell) for cell in cells))
    if not values["rows"]:
        return Group("They are the same.")
    if "differ" not in values:
        return Group(table)
    differ = values["differ"]
    right = differ["right"]
    found = (
        f"{differ['differing']} of {differ['samples']} samples have another class: A is right in {right['first']}, "
        f"B in {right['second']}, neither in {right['neither']}"
    )
    if not differ["differing"]:
        return Group(table, "", found)
    more = f"\n{differ['differing'] - _LISTED} more with --json" if differ["differing"] > _LISTED else ""
    lines = Table(box=None)
    for heading in ("sample", "label", "A", "B"):
        lines.add_column(heading)
    for row in differ["rows"][:_LISTED]:
        lines.add_row(*(escape(str(row[key])) for key in ("sample", "label", "first", "second")))
    return Group(table, "", found, lines, more)
