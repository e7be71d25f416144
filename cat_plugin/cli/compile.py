"""``cat-ptq compile``: from a bundle to a library, through TVM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.options import tvm_backend, whole_numbers
from cat_plugin.cli.places import LIBRARY, may_write
from cat_plugin.errors import CATValueError

if TYPE_CHECKING:
    from cat_plugin.graph.bundle import Bundle
    from tvm_backend.report import CompileReport

__all__ = ["compile_"]


def _target_of(text: str) -> Any:
    """A name, or TVM's description of a target as JSON."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise CATValueError(
            f'--target {text!r} is not valid JSON: {error}; for instance {{"kind": "cuda", "arch": "sm_90"}}'
        ) from error


def _targets(incomplete: str) -> list[str]:
    return [name for name in ("native", "portable") if name.startswith(incomplete)]


def _variants(target: Any) -> Mapping[str, Any]:
    from tvm_backend.target import resolve

    found: Mapping[str, Any] = resolve(target)
    return found


def compile_(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="native, portable, the LLVM name of a processor, or TVM's description as JSON.",
            autocompletion=_targets,
        ),
    ] = "native",
    out: Annotated[Path, typer.Option("--out", help="The library to write.")] = Path("model.so"),
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Batch sizes to generate code of their own for, as 1,16.")
    ] = "",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Length of the token sequences that the library takes, where the bundle takes any; else the export's.",
        ),
    ] = None,
    cache: Annotated[bool, typer.Option(help="Take the result from the cache, and keep it there.")] = True,
) -> None:
    """Compile a bundle with TVM to a library that runs without PyTorch."""
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.figures import size

    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    chosen = _target_of(target)
    opened = read_bundle(bundle)  # what is wrong with it is found out before TVM is imported
    may_write(out, LIBRARY)
    may_write(out.with_suffix(".json"), LIBRARY)
    noted = cache and tokens is None and out.suffix == ".so"
    report = _earlier(opened, chosen, sizes, out) if noted else None
    if report is None:
        report = _compiled(opened, chosen, sizes, out, tokens, cache)
    values = {**report.to_dict(), "library": str(out), "bytes": out.stat().st_size}
    del values["path"]
    facts = {
        "library": f"{out}, {size(out.stat().st_size)}, with {out.with_suffix('.json').name} beside it",
        "target": ", ".join(f"{v['variant'] or target} ({v['target']})" for v in report.variants),
        "kernels": len(report.kernels),
        "left in float": ", ".join(sorted(set(report.float_ops))) or "nothing",
        "weights": size(report.weight_bytes),
        "seconds": f"{report.seconds:.1f}{', from the cache' if report.cached else ''}",
    }
    state.report(values, lambda: key_value_table(facts))


def _beside(out: Path, variants: Iterable[str]) -> None:
    for variant in variants:
        may_write(out.with_name(f"{out.stem}.{variant}.so"), LIBRARY)


def _earlier(bundle: Bundle, target: Any, sizes: list[int], out: Path) -> CompileReport | None:
    """What an earlier compilation of the same bundle gave; neither TVM nor PyTorch is imported."""
    from tvm_backend.answers import find

    answer = find(bundle, target, sizes)
    if answer is None:
        return None
    _beside(out, answer.variants[1:])
    return answer.install(out)


def _compiled(
    bundle: Bundle, target: Any, sizes: list[int], out: Path, tokens: int | None, cache: bool
) -> CompileReport:
    backend = tvm_backend()
    _beside(out, list(_variants(target))[1:])
    with state.working("compiling") as status:

        def told(done: int, total: int, what: str) -> None:
            status.update(f"step {min(done + 1, total)} of {total}: {what}")

        made: CompileReport = backend.compile(
            bundle, target=target, out=out, batch_sizes=sizes, tokens=tokens, cache=cache, progress=told
        )
    return made
