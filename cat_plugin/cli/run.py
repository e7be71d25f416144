"""``cat-ptq run``: a compiled library on data, without PyTorch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.options import (
    BatchSize,
    ChannelOrder,
    Force,
    ImageSize,
    Mean,
    Std,
    Threads,
    library_exists,
    preparation,
    samples_of,
    sources_exist,
    tvm_backend,
)
from cat_plugin.cli.places import LOGITS, mark_logits, may_write
from cat_plugin.errors import CATValueError
from cat_plugin.files import staged_files, sync, write_errors
from cat_plugin.report.scoring import top1

__all__ = ["run"]

_SHOWN = 12
_log = logging.getLogger("cat_plugin")


def run(
    library: Annotated[Path, typer.Argument(help="A compiled library.")],
    inputs: Annotated[str, typer.Option("--input", help="An .npz file, a .csv list or a folder of images.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the logits here, as .npz.")] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    force: Force = False,
    batch_size: BatchSize = 64,
    threads: Threads = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First run it on the rows beside it, and compare what comes out.")
    ] = False,
) -> None:
    """Run a compiled library on data (PyTorch is not imported).

    Images are prepared as they were for the calibration; options that say otherwise need --force.
    """
    library_exists(library)
    sources_exist(data=(inputs,))
    if out is not None:
        out = out if out.suffix == ".npz" else out.with_name(f"{out.name}.npz")
        may_write(out, LOGITS)
    backend = tvm_backend()
    call = backend.load(library, threads, verify=verify)
    recorded = call.preparation
    how = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
    samples = samples_of(inputs, how, same=recorded is not None and not force)
    if how is None and samples.source == "images":
        _log.warning(
            f"{library} does not say how images are prepared for it: they are scaled to [0, 1] and no more; give --mean and "
            "--std if the model was trained with them"
        )
    with state.working(f"running {library.name}", len(samples)) as shown_as:
        logits = np.concatenate([call(batch) for batch in shown_as.over(samples.batches(batch_size), len)])
    if logits.ndim != 2:
        raise CATValueError(
            f"{library} returns an array of shape {logits.shape}; 'run' is for classifiers, (N, C)"
        )
    classes = logits.argmax(1).tolist()
    values: dict[str, Any] = {"samples": len(samples), "predictions": classes}
    names = call.class_names
    if names is not None:
        values["class_names"] = [names[index] for index in classes]
    if samples.labels is not None:
        values["top1_percent"] = top1(logits, samples.labels)
    if out is not None:
        _write_logits(out, logits)
        values["logits"] = str(out)
    shown = dict(values)
    named = shown.pop("class_names", classes)
    shown["predictions"] = ", ".join(map(str, named[:_SHOWN]))
    if len(samples) > _SHOWN:
        shown["predictions"] += ", ... (all with --json)"
    state.report(values, lambda: key_value_table(shown))


def _write_logits(path: Path, logits: np.ndarray) -> None:
    with write_errors(CATValueError, f"the logits to {path}"), staged_files(path.absolute()) as staging:
        staged = staging / path.name
        np.savez(staged, logits=logits)
        mark_logits(staged)
        sync(staged)
        staged.replace(path)
