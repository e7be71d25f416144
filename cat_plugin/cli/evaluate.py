"""``cat-ptq evaluate``: the accuracy of a bundle, in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cat_plugin.cli.console import state
from cat_plugin.cli.options import (
    BatchSize,
    Data,
    ImageSize,
    Mean,
    Std,
    labelled,
    preparation,
    sources_exist,
)
from cat_plugin.report.scoring import batches_of, top1

__all__ = ["evaluate"]


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Data,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure the top-1 accuracy of a bundle with PyTorch, with and without its correction.

    Images are prepared as they were for the calibration, unless options say otherwise.
    """
    sources_exist(data=(data,))
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.outputs import both_logits

    opened = read_bundle(bundle)
    recorded = opened.manifest["calibration"].get("preparation")
    samples = labelled(data, preparation(mean, std, image_size, recorded))
    corrected, plain = both_logits(opened.program(), batches_of(samples.inputs, batch_size))
    values: dict[str, Any] = {"top1_percent": top1(corrected, samples.labels), "samples": len(samples)}
    if plain is not None:
        values["top1_percent_without_correction"] = top1(plain, samples.labels)
    state.report(values)
