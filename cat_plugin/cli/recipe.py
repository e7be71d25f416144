"""``cat-ptq recipe``: write a recipe with every line explained, check one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.errors import CATValueError, RecipeError

__all__ = ["check", "new"]

_TEMPLATE = """\
# What Neural Compressor is asked to do. Check it with: cat-ptq recipe check {name}
quantization:
  algorithm: cat
  cat:
    # Bits of the weights and of the activations, 2 to 8. A list is a choice: each is tried, {tried}
    w_bits: {w_bits}
    a_bits: {a_bits}

    # fast:     closed form only, seconds to minutes
    # balanced: trains the rounding of each block, minutes
    # best:     trains the whole model on its own logits as well
    preset: {preset}

    # The correction of the logits: auto compares several on held-out calibration rows, paper is the published method.
    mode: auto
    num_clusters: 64      # at most, with mode auto
    alpha: 0.4            # share of the correction; with mode auto one candidate among others

    # First and last layer keep 8 bits; they are small, and the accuracy hangs on them.
    first_bits: 8
    last_bits: 8

    seed: 0               # the same seed gives the same model

tuning:
  # How much of the full-precision score may be lost: a share of it with relative, points of it with absolute.
  accuracy_criterion: {{relative: {relative}}}
  # Stop after so many trials, or so many seconds (0 is no limit).
  exit_policy: {{max_trials: {trials}, timeout: 0}}
  # true tries every configuration and keeps the best; false stops at the first that is good enough.
  try_all: {try_all}
"""


def _bits(text: str, option: str) -> list[int]:
    try:
        bits = [int(part) for part in text.replace("[", "").replace("]", "").split(",")]
    except ValueError:
        bits = []
    if not bits or any(not 2 <= width <= 8 for width in bits):
        raise CATValueError(f"{option} {text!r}: give bits from 2 to 8, one or several as in 4,2")
    return list(dict.fromkeys(bits))


def _preset(text: str) -> str:
    if text not in ("fast", "balanced", "best"):
        raise CATValueError(f"--preset {text!r}: give fast, balanced or best")
    return text


def _presets(incomplete: str) -> list[str]:
    return [name for name in ("fast", "balanced", "best") if name.startswith(incomplete)]


def _share(value: float) -> float:
    if not 0 <= value < 1:
        raise CATValueError(f"--relative {value:g}: give a share from 0 to below 1, such as 0.01")
    return value


def _as_yaml(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else str(values)


def new(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    w_bits: Annotated[
        str | None, typer.Option("--w-bits", help="Bits of the weights, one or several: 4,2.")
    ] = None,
    a_bits: Annotated[str | None, typer.Option("--a-bits", help="Bits of the activations.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="fast, balanced or best.", autocompletion=_presets)
    ] = None,
    relative: Annotated[
        float | None, typer.Option("--relative", help="Share of the full-precision score that may be lost.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given takes its default.")
    ] = False,
) -> None:
    """Write a recipe with every line explained, after a few questions."""
    if path.exists():
        raise CATValueError(f"{path} exists and is left as it is; give another name, or remove it first")

    def answered(given: str | None, question: str, default: str) -> str:
        if given is not None or yes:
            return default if given is None else given
        return str(typer.prompt(question, default=default, err=True))

    weights = _bits(answered(w_bits, "Bits of the weights, one or several", "4,2"), "--w-bits")
    activations = _bits(answered(a_bits, "Bits of the activations", "4"), "--a-bits")
    chosen = _preset(answered(preset, "How much work: fast, balanced or best", "balanced"))
    asked = answered(
        None if relative is None else str(relative), "Share of the accuracy that may be lost", "0.01"
    )
    try:
        share = _share(float(asked))
    except CATValueError:
        raise
    except ValueError as error:
        raise CATValueError(f"{asked!r} is not a number; give a share such as 0.01") from error
    several = len(weights) * len(activations)
    text = _TEMPLATE.format(
        name=path.name,
        w_bits=_as_yaml(weights),
        a_bits=_as_yaml(activations),
        tried="which takes --tune." if several > 1 else "as in [4, 2], which takes --tune.",
        preset=chosen,
        relative=f"{share:g}",
        trials=max(several, 1),
        try_all="true" if several > 1 else "false",
    )
    _write(path, text)
    values = {
        "recipe": str(path),
        "w_bits": weights,
        "a_bits": activations,
        "preset": chosen,
        "relative": share,
    }
    tune = " --tune LABELLED" if several > 1 else ""
    command = (
        f"cat-ptq quantize {path} --model MODULE:FACTORY --weights FILE --data CALIBRATION{tune} --out DIR"
    )
    shown = {
        "recipe": path,
        "weights": f"{_as_yaml(weights)} bits",
        "activations": f"{_as_yaml(activations)} bits",
        "preset": chosen,
        "accuracy that may be lost": f"{100 * share:g} %",
        "next": command,
    }
    state.report(values, lambda: key_value_table(shown))


def _write(path: Path, text: str) -> None:
    """Put a checked recipe in its place, never over another file."""
    from cat_plugin import load_recipe

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".yaml", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        try:
            load_recipe(staged)
            os.chmod(staged, 0o644)
            # A link, unlike a rename, fails where a file came to be meanwhile.
            os.link(staged, path)
        finally:
            os.unlink(staged)
    except RecipeError:
        raise
    except OSError as error:
        raise CATValueError(f"cannot write {path}: {error.strerror}; choose a writable place") from error


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")] = Path("recipe.yaml"),
) -> None:
    """Check a recipe without running it, and say what it would try."""
    from cat_plugin import load_recipe
    from cat_plugin.hosts.pipeline import describe
    from cat_plugin.recipe.options import expand

    loaded = load_recipe(recipe)
    listed = [params for entry in loaded.configurations for params in expand(entry)]
    names = [describe(params) for params in listed]
    values = {"recipe": str(recipe), "valid": True, "configurations": names}
    state.report(
        values, lambda: key_value_table({"recipe": recipe, "valid": "yes", "it tries": "\n".join(names)})
    )
