"""``cat-ptq evaluate``: the score of a bundle and of the full-precision model, in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from cat_plugin.cli.console import state
from cat_plugin.cli.data import NamedArrays, load_arrays
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

if TYPE_CHECKING:
    from cat_plugin.report.scoring import Labelled

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
    full-precision model on the same samples. A bundle of several inputs takes an .npz file with an array for each, under its
    name, and labels.
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
    from cat_plugin.report.scoring import batches_of, known, logits_of

    score = load_metric(metric)
    scale, key = (100, f"{metric}_percent") if metric in METRICS else (1, "score")
    opened = None if bundle is None else read_bundle(bundle)
    recorded = None if opened is None else preparation_of(opened.manifest)
    how = preparation(mean, std, image_size, channel_order, recorded=recorded, force=force)
    taken = [] if opened is None else opened.manifest["inputs"]
    if len(taken) > 1 and model is not None:
        raise CATValueError(
            "--model is measured on one input, and the bundle takes several; leave it out, and run the full-precision model by a "
            "script of your own"
        )
    batches: list[Any]
    samples: Labelled | NamedArrays
    if len(taken) > 1:
        samples = load_arrays(data, taken)
        batches = samples.batches(batch_size)
    else:
        samples = labelled(data, how, same=recorded is not None and not force)
        batches = [(batch,) for batch in batches_of(samples.inputs, batch_size)]
    labels = known(samples.labels)
    values: dict[str, Any] = {}
    if opened is not None:
        with state.working("evaluating the bundle", len(samples)) as at:
            corrected, plain = both_logits(opened.program(), at.over(batches, lambda batch: len(batch[0])))
        values[key] = scale * score(corrected, labels)
        if plain is not None:
            values[f"{key}_without_correction"] = scale * score(plain, labels)
    if model is not None:
        network = load_model(model, weights, num_classes)
        with state.working("evaluating the full-precision model"):
            logits = np.concatenate([logits_of(network, batch, batch_size) for (batch,) in batches])
        values[f"{key}_full_precision"] = scale * score(logits, labels)
    values["samples"] = len(samples)
    state.report(values)
