"""``cat-ptq report``: a bundle, what it was made of and what it can do, as one HTML file."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from cat_plugin.cli.console import key_value_table, state
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
    sources_exist,
    whole_numbers,
)
from cat_plugin.cli.places import PAGE, may_write
from cat_plugin.errors import CATError, CATValueError

if TYPE_CHECKING:
    from cat_plugin.graph.bundle import Bundle
    from cat_plugin.graph.preparation import Preparation
    from cat_plugin.report.content import Content
    from cat_plugin.report.scoring import Labelled

__all__ = ["report"]

_PICTURES = 400


def report(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Labelled data to measure accuracy on, as for 'evaluate'.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option("--library", help="The compiled library, to time beside PyTorch.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="Another bundle; may be given several times.")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("report.html"),
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    force: Force = False,
    batch_size: BatchSize = 64,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes to time the library at.")] = "1,16",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Time for each runtime and batch size.")
    ] = 1.0,
    threads: Threads = None,
) -> None:
    """Write a report as one HTML file that needs nothing else: no network, no server.

    The bundle alone gives what was recorded while quantizing. --data adds accuracy and changed labels, --model and
    --weights the full-precision model beside them, --library latencies, --compare further bundles.
    """
    from cat_plugin.files import write_errors, write_text
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.graph.preparation import preparation_of
    from cat_plugin.report.content import Content
    from cat_plugin.report.page import render
    from cat_plugin.report.record import read_record

    if compare and data is None:
        raise CATValueError(
            "--compare measures the bundles on the same samples; give labelled ones with --data"
        )
    if weights is not None and model is None:
        raise CATValueError("--weights without --model; name the full-precision model with --model")
    if out.is_dir():
        raise CATValueError(f"--out {out} is a directory; give a file such as report.html")
    if library is not None:
        library_exists(library)
    sources_exist(data=(data,), weights=weights)
    may_write(out, PAGE)
    sizes = whole_numbers(batch, "--batch")
    opened = read_bundle(bundle)
    content = Content(
        name=Path(bundle).absolute().name,
        manifest=opened.manifest,
        record=read_record(opened) or {},
        arrays=opened.cluster_affine(),
        written=_written(),
    )
    if data is not None:
        recorded = preparation_of(opened.manifest)
        prepared = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
        samples = labelled(data, prepared, same=recorded is not None and not force)
        with state.working("measuring the accuracy"):
            _measure(content, opened, compare or [], samples, batch_size, (model, weights, num_classes))
        content.source = samples.source
        _add_pictures(content, samples, prepared)
    if library is not None:
        _time(content, bundle, library, (model, weights, num_classes), sizes, seconds, threads)
    page = render(content)
    with write_errors(CATValueError, f"the report {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    values: dict[str, Any] = {"report": str(out), "bytes": out.stat().st_size}
    if content.evaluations:
        values["evaluations"] = [vars(each) for each in content.evaluations]
    if content.latency:
        values["latency"] = content.latency
    if content.notes:
        values["notes"] = content.notes
    shown = {"report": str(out.absolute()), "size": f"{out.stat().st_size / 1024:.0f} KiB"}
    state.report(
        values, lambda: key_value_table(shown | ({"left out": content.notes} if content.notes else {}))
    )


def _written() -> str:
    from cat_plugin.version import __version__

    today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"cat-ptq {__version__}, {today}, {os.cpu_count()} {platform.machine()} processors"


def _measure(
    content: Content,
    bundle: Bundle,
    compared: list[Path],
    samples: Labelled,
    batch_size: int,
    full: tuple[str | None, Path | None, int | None],
) -> None:
    """Fill in the accuracies, and which samples the models disagree on."""
    from cat_plugin.cli.models import load_model
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.evaluation import evaluated
    from cat_plugin.report.record import label_changes
    from cat_plugin.report.scoring import logits_of

    if samples.labels.ndim != 1:
        raise CATValueError(
            f"the labels have shape {samples.labels.shape}; a report compares the classes of whole samples, (N,): leave --data "
            "out, and measure with 'cat-ptq evaluate --metric miou'"
        )
    said: dict[str, np.ndarray] = {}
    if full[0] is not None:
        network = load_model(full[0], full[1], full[2])
        said["full"] = logits_of(network, samples.inputs, batch_size).argmax(1)
        content.full_score = float((said["full"] == samples.labels).mean())
    own, classes = evaluated(content.name, bundle, samples, batch_size)
    content.evaluations = [own]
    content.samples = len(samples)
    content.labels = label_changes(samples.labels, said | classes, samples.source, samples.names)
    for path in compared:
        other, _ = evaluated(path.name, read_bundle(path), samples, batch_size)
        content.evaluations.append(other)


def _add_pictures(content: Content, samples: Labelled, prepared: Preparation | None) -> None:
    from cat_plugin.report.images import thumbnails

    assert content.labels is not None
    numbers = [row[0] for row in content.labels["rows"][:_PICTURES]]
    pictures = thumbnails(samples.inputs[numbers], prepared) if numbers else None
    content.pictures = dict(zip(numbers, pictures or (), strict=False))


def _time(
    content: Content,
    bundle: Path,
    library: Path,
    full: tuple[str | None, Path | None, int | None],
    batches: list[int],
    seconds: float,
    threads: int | None,
) -> None:
    """Fill in what the library's description says and, where it can be run here, its latency."""
    from cat_plugin.cli.latencies import conditions, measured_latencies
    from tvm_backend.description import read_manifest

    manifest = read_manifest(library)
    content.library = {"name": library.name, "bytes": library.stat().st_size, "manifest": manifest}
    model = None if full[0] is None else (full[0], full[1], full[2])
    if not batches:
        return
    try:
        content.conditions = conditions()
        content.latency = measured_latencies(library, bundle, model, batches, seconds, threads)
    except CATError as error:
        content.notes.append(f"Latencies: {error}")
