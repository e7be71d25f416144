"""``cat-ptq recipe``: write a recipe with every line explained, check one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cat_plugin.cli.console import key_value_table, state
from cat_plugin.cli.options import sources_exist
from cat_plugin.cli.places import NEW, may_write
from cat_plugin.errors import CATValueError, RecipeError
from cat_plugin.ptq.presets import PRESETS

__all__ = ["check", "new"]

*_FIRST, _LAST = PRESETS
_PRESET_WORDS = f"{', '.join(_FIRST)} or {_LAST}"


def _bits(text: str, option: str) -> list[int]:
    from cat_plugin.options import options_of
    from cat_plugin.ptq.spec import QuantSpec

    allowed = options_of(QuantSpec)[option].schema
    try:
        bits = [int(part) for part in text.replace("[", "").replace("]", "").split(",")]
    except ValueError:
        bits = []
    if not bits or any(not allowed["minimum"] <= width <= allowed["maximum"] for width in bits):
        raise CATValueError(
            f"--{option.replace('_', '-')} {text!r}: give bits from {allowed['minimum']} to {allowed['maximum']}, one or "
            "several as in 4,2"
        )
    return list(dict.fromkeys(bits))


def _preset(text: str) -> str:
    if text not in PRESETS:
        raise CATValueError(f"--preset {text!r}: give {_PRESET_WORDS}")
    return text


def _presets(incomplete: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(incomplete)]


def _share(value: float) -> float:
    if not 0 <= value < 1:
        raise CATValueError(f"--relative {value:g}: give a share from 0 to below 1, such as 0.01")
    return value


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(values) == 1 else values


def new(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    w_bits: Annotated[
        str | None, typer.Option("--w-bits", help="Bits of the weights, one or several: 4,2.")
    ] = None,
    a_bits: Annotated[str | None, typer.Option("--a-bits", help="Bits of the activations.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"{_PRESET_WORDS}.", autocompletion=_presets)
    ] = None,
    relative: Annotated[
        float | None, typer.Option("--relative", help="Share of the full-precision score that may be lost.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given takes its default.")
    ] = False,
) -> None:
    """Write a recipe with every line explained, after a few questions."""
    may_write(path, NEW, "the recipe")
    from cat_plugin.recipe.template import new_recipe

    def answered(given: str | None, question: str, default: str) -> str:
        if given is not None or yes:
            return default if given is None else given
        return str(typer.prompt(question, default=default, err=True))

    weights = _bits(answered(w_bits, "Bits of the weights, one or several", "4,2"), "w_bits")
    activations = _bits(answered(a_bits, "Bits of the activations", "4"), "a_bits")
    chosen = _preset(answered(preset, f"How much work: {_PRESET_WORDS}", "balanced"))
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
    text = new_recipe(
        path.name,
        {"w_bits": _one_or_all(weights), "a_bits": _one_or_all(activations), "preset": chosen},
        relative=share,
        max_trials=several,
        try_all=several > 1,
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
        "weights": f"{_one_or_all(weights)} bits",
        "activations": f"{_one_or_all(activations)} bits",
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
    sources_exist(recipe=recipe)
    from cat_plugin import load_recipe
    from cat_plugin.recipe.description import describe
    from cat_plugin.recipe.options import expand

    loaded = load_recipe(recipe)
    listed = [params for entry in loaded.configurations for params in expand(entry)]
    names = [describe(params) for params in listed]
    values = {"recipe": str(recipe), "valid": True, "configurations": names}
    state.report(
        values, lambda: key_value_table({"recipe": recipe, "valid": "yes", "it tries": "\n".join(names)})
    )
