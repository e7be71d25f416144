"""``cat-ptq correct``: the correction for an ONNX classifier that somebody else quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.options import (
    BatchSize,
    ChannelOrder,
    Data,
    ImageSize,
    Mean,
    Std,
    preparation,
    samples_of,
    sources_exist,
)
from cat_plugin.cli.places import ONNX, may_write

__all__ = ["correct"]


def correct(
    reference: Annotated[Path, typer.Option("--reference", help="The full-precision ONNX file.")],
    quantized: Annotated[Path, typer.Option("--quantized", help="The quantized ONNX file.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The corrected ONNX file to write.")],
    paper: Annotated[bool, typer.Option("--paper", help="The paper's settings instead of choosing.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", help="The output with the logits, where there are several.")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    batch_size: BatchSize = 64,
) -> None:
    """Append a fitted correction to a quantized ONNX classifier and keep the rest of it as it is.

    Both files are run by ONNX Runtime on the data; labels are not used.
    """
    sources_exist(data=(data,))
    may_write(out, ONNX)
    from cat_plugin import correct_onnx
    from cat_plugin.cluster_affine import ClusterAffine

    samples = samples_of(data, preparation(mean, std, image_size, channel_order))
    estimator = ClusterAffine.paper() if paper else ClusterAffine(random_state=0)
    with state.working("running both models and fitting"):
        fitted = correct_onnx(
            quantized, reference, samples.batches(batch_size), out, estimator, output=output
        )
    found = fitted.parameters_
    values = {
        "file": str(out), "mode": found.mode, "n_clusters": found.n_clusters, "alpha": found.alpha,
        "samples": len(samples),
    }  # fmt: skip
    facts = {
        "file": str(out),
        "correction": f"{found.mode}, {found.n_clusters} clusters, alpha {found.alpha:g}",
        "samples": str(len(samples)),
    }
    state.report(values, lambda: key_value_table(facts))
