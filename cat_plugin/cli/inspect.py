"""``cat-ptq inspect``: what a bundle or a compiled library holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.states import is_state, read_states, states_table

__all__ = ["inspect"]

_NAMED = 6


def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle, a compiled library (.so), or OUT.state.")],
) -> None:
    """Show what a bundle holds (layers, bits, correction, versions), a library (kernels, targets), or an interrupted run."""
    if is_state(path):
        found = read_states(path)
        state.report(
            {"state": str(path), "quantizations": found}, lambda: states_table(found), "quantizations"
        )
    elif path.suffix == ".so" and not path.is_dir():
        _inspect_library(path)
    else:
        _inspect_bundle(path)


def _of_the_user(manifest: dict[str, Any]) -> dict[str, Any]:
    """How images become inputs, and what the classes are called."""
    from cat_plugin.graph.preparation import preparation_of

    how, names = preparation_of(manifest), manifest.get("class_names") or ()
    more = f", ... ({len(names)})" if len(names) > _NAMED else ""
    return {
        "prepared as": "not recorded" if how is None else how,
        "classes": f"{', '.join(names[:_NAMED])}{more}" if names else "not recorded",
    }


def _tensors(manifest: dict[str, Any]) -> dict[str, str]:
    """What goes in and comes out: name, dtype and shape of each."""
    return {
        key: "; ".join(f"{x['name']} {x['dtype']} {x['shape']}" for x in manifest[key])
        for key in ("inputs", "outputs")
    }


def _inspect_bundle(path: Path) -> None:
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.figures import correction, size

    manifest = read_bundle(path).manifest
    step = manifest["cluster_affine"]

    def shown() -> Group:
        table = Table(box=None)
        for heading in ("layer", "kind", "weight", "W bits", "A bits"):
            table.add_column(heading)
        for layer in manifest["layers"]:
            shape = " x ".join(map(str, layer["weight_shape"]))
            bits = [str(layer[key] or "float") for key in ("w_bits", "a_bits")]
            table.add_row(escape(layer["name"]), layer["kind"], shape, *bits)
        shapes = {} if step is None else step["shapes"]
        facts = {
            "bundle": path,
            **_tensors(manifest),
            "correction": "none"
            if step is None
            else f"{step['op']}, {correction(shapes.get('beta', ['?'])[0], step['alpha'])}"
            + (f", of {step['output']} along axis {step['class_axis']}" if step.get("output") else ""),
            "files": ", ".join(f"{name} {size(f['size'])}" for name, f in manifest["files"].items()),
            "calibration": ", ".join(
                f"{k} {v}" for k, v in manifest["calibration"].items() if k != "preparation"
            )
            or "not recorded",
            **_of_the_user(manifest),
            "written by": ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items()),
        }
        return Group(table, "", key_value_table(facts))

    state.report(manifest, shown, "layers")


def _inspect_library(path: Path) -> None:
    from cat_plugin.report.figures import size
    from tvm_backend.description import read_manifest

    manifest = read_manifest(path)

    def shown() -> Group:
        table = Table(box=None)
        for heading in ("kernel", "kind", "output", "variant", "weights"):
            table.add_column(heading)
        for kernel in manifest.get("kernels", ()):
            weights = (
                f"{kernel['weight_bits']} bit, {size(kernel['weight_bytes'])}"
                if kernel["weight_bits"]
                else ""
            )
            output = " x ".join(map(str, kernel["output"]))
            table.add_row(escape(kernel["name"]), kernel["kind"], output, kernel["variant"], weights)
        facts: dict[str, Any] = {
            "library": path,
            **_tensors(manifest),
            "batch sizes with code of their own": ", ".join(map(str, manifest.get("batch_sizes", ())))
            or "none",
            "left in float": ", ".join(sorted(set(manifest.get("float_ops", ())))) or "nothing",
            **_of_the_user(manifest),
            "written by": ", ".join(f"{k} {v}" for k, v in manifest.get("libraries", {}).items()),
        }
        for variant in manifest["variants"]:
            needs = ", ".join(variant.get("features", ())) or "nothing special"
            facts[f"variant {variant['variant'] or variant['target']}"] = (
                f"{variant['file']}, {size(variant.get('size'))}, for {variant['target']}, needs {needs}"
            )
        return Group(table, "", key_value_table(facts))

    state.report(manifest, shown, "kernels")
