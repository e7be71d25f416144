"""``cat-ptq correct``: the correction for an ONNX classifier that somebody else quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    reference_output: Annotated[
        str | None,
        typer.Option("--reference-output", help="The reference's, where it bears another name."),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    batch_size: BatchSize = 64,
) -> None:
    """Append a fitted correction to a quantized ONNX classifier and keep the rest of it as it is.

    Both files are run by ONNX Runtime on the data; labels are not used. Of files with several inputs the data are an .npz file with an array
    for each, under its name.
    """
    sources_exist(data=(data,))
    may_write(out, ONNX)
    from cat_plugin import correct_onnx
    from cat_plugin.cli.calibration import load_several
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.onnx.files import read_model
    from cat_plugin.graph.onnx.sessions import described_inputs

    inputs = described_inputs(read_model(quantized, weights=False))
    batches: list[Any]
    if len(inputs) > 1:
        unsuited = {
            "--mean": mean,
            "--std": std,
            "--image-size": image_size,
            "--channel-order": channel_order,
        }
        arrays = load_several(data, inputs, unsuited)
        names = [each["name"] for each in inputs]
        batches = [dict(zip(names, each, strict=True)) for each in arrays.batches(batch_size)]
        count = len(arrays)
    else:
        samples = samples_of(data, preparation(mean, std, image_size, channel_order))
        batches, count = samples.batches(batch_size), len(samples)
    estimator = ClusterAffine.paper() if paper else ClusterAffine(random_state=0)
    with state.working("running both models and fitting"):
        fitted = correct_onnx(
            quantized, reference, batches, out, estimator, output=output, reference_output=reference_output
        )
    found = fitted.parameters_
    values = {
        "file": str(out), "mode": found.mode, "n_clusters": found.n_clusters, "alpha": found.alpha,
        "samples": count,
    }  # fmt: skip
    facts = {
        "file": str(out),
        "correction": f"{found.mode}, {found.n_clusters} clusters, alpha {found.alpha:g}",
        "samples": str(count),
    }
    state.report(values, lambda: key_value_table(facts))
