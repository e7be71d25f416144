"""``cat-ptq evaluate``: the score of a bundle and of the full-precision model, in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cat_plugin.cli.console import state
from cat_plugin.cli.options import (
    BatchSize,
    ChannelOrder,
    Data,
    Force,
    ImageSize,
    Mean,
    MetricName,
    Model,
    NumClasses,
    Std,
    Weights,
    labelled,
    preparation,
    sources_exist,
)
from cat_plugin.errors import CATValueError

__all__ = ["evaluate"]


def evaluate(
    data: Data,
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle; with --model it may be left out.", show_default=False)
    ] = None,
    metric: MetricName = "top1",
    model: Model = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    force: Force = False,
    batch_size: BatchSize = 64,
) -> None:
    """Measure the accuracy of a bundle with PyTorch, with and without its correction.

    Images are prepared as they were for the calibration; options that say otherwise need --force. --model measures the
    full-precision model on the same samples.
    """
    if bundle is None and model is None:
        raise CATValueError("nothing to evaluate; give a bundle, or the full-precision model with --model")
    if weights is not None and model is None:
        raise CATValueError("--weights without --model; name the full-precision model with --model")
    sources_exist(data=(data,), weights=weights)
    from cat_plugin.cli.models import load_model
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.graph.preparation import preparation_of
    from cat_plugin.report.metrics import METRICS, load_metric
    from cat_plugin.report.outputs import both_logits
    from cat_plugin.report.scoring import batches_of, logits_of

    score = load_metric(metric)
    scale, key = (100, f"{metric}_percent") if metric in METRICS else (1, "score")
    opened = None if bundle is None else read_bundle(bundle)
    recorded = None if opened is None else preparation_of(opened.manifest)
    how = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
    samples = labelled(data, how, same=recorded is not None and not force)
    values: dict[str, Any] = {}
    if opened is not None:
        with state.working("evaluating the bundle", len(samples)) as at:
            batches = at.over(batches_of(samples.inputs, batch_size), len)
            corrected, plain = both_logits(opened.program(), batches)
        values[key] = scale * score(corrected, samples.labels)
        if plain is not None:
            values[f"{key}_without_correction"] = scale * score(plain, samples.labels)
    if model is not None:
        network = load_model(model, weights, num_classes)
        with state.working("evaluating the full-precision model"):
            logits = logits_of(network, samples.inputs, batch_size)
        values[f"{key}_full_precision"] = scale * score(logits, samples.labels)
    values["samples"] = len(samples)
    state.report(values)
