"""The text of a new recipe: what is chosen, each line explained by the words with which its option is declared."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from cat_plugin.options import Option, plain_text
from cat_plugin.recipe.schema import cat_options, recipe_schema

__all__ = ["new_recipe"]

_WIDTH = 110
# What a first recipe shows; every other option keeps its default and can be added under its name.
_SHOWN = ("w_bits", "a_bits", "preset", "mode", "num_clusters", "alpha", "first_bits", "last_bits", "seed")


def new_recipe(
    name: str, chosen: Mapping[str, Any], *, relative: float, max_trials: int, try_all: bool
) -> str:
    """A recipe with every line explained.

    Parameters
    ----------
    name : str
        The file's name, for the command that checks it.
    chosen : mapping
        Options of ``cat:`` that are not to have their defaults; a list is a choice.
    relative : float
        The share of the full-precision score that may be lost.
    max_trials : int
        Trials at most.
    try_all : bool
        Whether to run every trial.

    Returns
    -------
    str
    """
    lines = [
        f"# What Neural Compressor is asked to do. Check it with: cat-ptq recipe check {name}",
        "quantization:",
        "  algorithm: cat",
        "  # Any option may be a list, as in [4, 2]: each value is tried, which takes --tune.",
        "  cat:",
    ]
    options = cat_options()
    for key in [*_SHOWN, *(key for key in chosen if key not in _SHOWN)]:
        lines += [
            *_comment(_explained(options[key]), 4),
            f"    {key}: {_value(chosen.get(key, options[key].plain_default))}",
            "",
        ]
    said = recipe_schema()["$defs"]
    criterion, leave, tuning = (
        {key: each.get("description", "") for key, each in said[section]["properties"].items()}
        for section in ("AccuracyCriterion", "ExitPolicy", "Tuning")
    )
    lines += [
        "tuning:",
        *_comment(f"relative: {criterion['relative']}", 2),
        *_comment(f"absolute, in its place: {criterion['absolute']}", 2),
        f"  accuracy_criterion: {{relative: {_value(relative)}}}",
        *_comment(f"max_trials: {leave['max_trials']} timeout: {leave['timeout']}", 2),
        f"  exit_policy: {{max_trials: {_value(max_trials)}, timeout: 0}}",
        *_comment(tuning["try_all"], 2),
        f"  try_all: {_value(try_all)}",
    ]
    return "\n".join(lines) + "\n"


def _explained(option: Option) -> str:
    text = plain_text(option.doc).replace("`", "")
    return f"{text} ({option.values})"


def _comment(text: str, indent: int) -> list[str]:
    lead = " " * indent + "# "
    return textwrap.wrap(text, _WIDTH, initial_indent=lead, subsequent_indent=lead)


def _value(value: Any) -> str:
    """A value as YAML writes it in a line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
