"""The tables of options in the documentation, made from what the options are declared to be.

A page holds a place such as::

    <!-- options: engine -->
    <!-- end -->

and what stands between the two comments is replaced by a table: of every option of the ``engine``, of those of a
``recipe`` that most need (bits, preset, base, and all of the correction), or of the ``tuning`` section.

    python -m cat_plugin.recipe.reference docs/hosts.md docs/ptq.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cat_plugin.expectations import values_in_words
from cat_plugin.files import write_text
from cat_plugin.options import Option, options_of, plain_text
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe.schema import cat_options, correction_options, recipe_schema

__all__ = ["fill", "main", "option_table", "tuning_table"]

_PLACE = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def option_table(options: Iterable[Option]) -> str:
    """Options as a Markdown table: what they are called, their values, their default, what they do, since when."""
    rows: list[tuple[str, ...]] = [
        (
            f"`{each.name}`",
            each.values,
            f"`{json.dumps(each.plain_default)}`",
            plain_text(each.doc),
            each.since,
        )
        for each in options
    ]
    return _table(("option", "values", "default", "what it does", "since"), rows)


def tuning_table() -> str:
    """What stands under ``tuning:``, as a Markdown table."""
    sections = recipe_schema()["$defs"]
    rows: list[tuple[str, ...]] = []
    for name, each in sections["Tuning"]["properties"].items():
        inner = each.get("$ref", "").rpartition("/")[2]
        entries: dict[str, Any] = (
            {f"{name}.{key}": value for key, value in sections[inner]["properties"].items()}
            if inner
            else {name: each}
        )
        rows += [(f"`{key}`", values_in_words(value), value["description"]) for key, value in entries.items()]
    return _table(("key", "values", "meaning"), rows)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _made(which: str) -> str:
    if which == "tuning":
        return tuning_table()
    if which == "engine":
        return option_table(options_of(QuantSpec).values())
    shown = ("w_bits", "a_bits", "preset", *correction_options(), "base")
    return option_table(each for name, each in cat_options().items() if name in shown)


def fill(text: str) -> str:
    """A page with its tables of options filled in."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{_made(place[2])}\n\n{place[3]}", text)


def main() -> None:
    """Fill the pages named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", type=Path, nargs="+")
    for page in parser.parse_args().pages:
        before = page.read_text("utf-8")
        after = fill(before)
        if after != before:
            write_text(page, after)


if __name__ == "__main__":
    main()
