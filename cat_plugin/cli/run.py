"""``cat-ptq run``: a compiled library on data, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.options import (
    BatchSize,
    ImageSize,
    Mean,
    Std,
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


def run(
    library: Annotated[Path, typer.Argument(help="A compiled library.")],
    inputs: Annotated[str, typer.Option("--input", help="An .npz file, a .csv list or a folder of images.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the logits here, as .npz.")] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
) -> None:
    """Run a compiled library on data (PyTorch is not imported)."""
    library_exists(library)
    sources_exist(data=(inputs,))
    if out is not None:
        out = out if out.suffix == ".npz" else out.with_name(f"{out.name}.npz")
        may_write(out, LOGITS)
    backend = tvm_backend()
    samples = samples_of(inputs, preparation(mean, std, image_size))
    call = backend.load(library)
    logits = np.concatenate([call(batch) for batch in samples.batches(batch_size)])
    if logits.ndim != 2:
        raise CATValueError(
            f"{library} returns an array of shape {logits.shape}; 'run' is for classifiers, (N, C)"
        )
    values: dict[str, Any] = {"samples": len(samples), "predictions": logits.argmax(1).tolist()}
    if samples.labels is not None:
        values["top1_percent"] = top1(logits, samples.labels)
    if out is not None:
        _write_logits(out, logits)
        values["logits"] = str(out)
    shown = dict(values)
    if len(samples) > 12:
        shown["predictions"] = f"{', '.join(map(str, values['predictions'][:12]))}, ... (all with --json)"
    state.report(values, lambda: key_value_table(shown))


def _write_logits(path: Path, logits: np.ndarray) -> None:
    with write_errors(CATValueError, f"the logits to {path}"), staged_files(path.absolute()) as staging:
        staged = staging / path.name
        np.savez(staged, logits=logits)
        mark_logits(staged)
        sync(staged)
        staged.replace(path)
