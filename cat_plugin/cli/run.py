"""``cat-ptq run``: a compiled library on data, without PyTorch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.data import NamedArrays, Samples, load_arrays
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
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the logits, or every output, here, as .npz.")
    ] = None,
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

    Images are prepared as they were for the calibration; options that say otherwise need --force. A model of several inputs
    takes an .npz file with an array for each, under its name.
    """
    library_exists(library)
    sources_exist(data=(inputs,))
    if out is not None:
        out = out if out.suffix == ".npz" else out.with_name(f"{out.name}.npz")
        may_write(out, LOGITS)
    backend = tvm_backend()
    call = backend.load(library, threads, verify=verify)
    taken, returned = call.manifest["inputs"], call.manifest["outputs"]
    samples: Samples | NamedArrays
    if len(taken) > 1:
        samples = load_arrays(inputs, taken)
        batches = samples.batches(batch_size)
    else:
        recorded = call.preparation
        how = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
        samples = samples_of(inputs, how, same=recorded is not None and not force)
        if how is None and samples.source == "images":
            _log.warning(
                f"{library} does not say how images are prepared for it: they are scaled to [0, 1] and no more; give --mean "
                "and --std if the model was trained with them"
            )
        batches = [(batch,) for batch in samples.batches(batch_size)]
    with state.working(f"running {library.name}", len(samples)) as shown_as:
        parts = [call.flat(*batch) for batch in shown_as.over(batches, lambda batch: len(batch[0]))]
    # What has no row for each sample is the same in every batch.
    outputs = {
        entry["name"]: np.concatenate(found)
        if entry["shape"] and isinstance(entry["shape"][0], str)
        else found[0]
        for entry, found in zip(returned, zip(*parts, strict=True), strict=True)
    }
    chosen = (
        returned[call.classified]["name"] if len(returned) == 1 or call.manifest.get("classified") else None
    )
    logits = None if chosen is None or outputs[chosen].ndim != 2 else outputs[chosen]
    values: dict[str, Any] = {"samples": len(samples)}
    if logits is not None:
        values["predictions"] = logits.argmax(1).tolist()
        names = call.class_names
        if names is not None:
            values["class_names"] = [names[index] for index in values["predictions"]]
        if samples.labels is not None and samples.labels.ndim == 1:
            values["top1_percent"] = top1(logits, samples.labels)
        if len(outputs) == 1:
            outputs = {"logits": logits}
    if logits is None or len(outputs) > 1:
        values["outputs"] = {name: list(array.shape) for name, array in outputs.items()}
    if out is not None:
        _write_logits(out, outputs)
        values["logits"] = str(out)
    state.report(values, lambda: key_value_table(_shown(values)))


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """What people read of it: the first predictions, by name where they have one, and shapes."""
    shown = dict(values)
    if "predictions" in shown:
        named = shown.pop("class_names", shown["predictions"])
        shown["predictions"] = ", ".join(map(str, named[:_SHOWN]))
        if len(named) > _SHOWN:
            shown["predictions"] += ", ... (all with --json)"
    if "outputs" in shown:
        shown["outputs"] = "; ".join(f"{name} {shape}" for name, shape in shown["outputs"].items())
    return shown


def _write_logits(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with write_errors(CATValueError, f"the logits to {path}"), staged_files(path.absolute()) as staging:
        staged = staging / path.name
        np.savez(staged, **arrays)  # type: ignore[arg-type]
        mark_logits(staged)
        sync(staged)
        staged.replace(path)
