"""``cat-ptq export``: a bundle as an ONNX file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.places import ONNX, may_write

__all__ = ["export"]


def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Option("--out", help="The ONNX file to write.")] = Path("model.onnx"),
    opset: Annotated[
        int, typer.Option("--opset", min=21, max=25, help="From 25 on 2-bit values have a type of their own.")
    ] = 21,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="onnxruntime or openvino: refuse what it cannot take."),
    ] = None,
) -> None:
    """Write a bundle as ONNX: standard QDQ, with the correction in standard operators."""
    from cat_plugin.graph.manifest import read_manifest
    from cat_plugin.report.figures import size

    read_manifest(bundle)  # a wrong name is found out before torch is imported
    may_write(out, ONNX)
    from cat_plugin import export_onnx

    path = export_onnx(bundle, out, opset=opset, runtime=runtime)
    values = {"file": str(out), "bytes": path.stat().st_size, "opset": opset}
    facts = {"file": f"{out}, {size(path.stat().st_size)}", "opset": str(opset)}
    state.report(values, lambda: key_value_table(facts))
