"""What every command shares: the global options, output for people and for programs, errors turned into exit codes."""

from __future__ import annotations

import csv
import enum
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from cat_plugin.recipe.display import Display

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_MISSED",
    "EXIT_USAGE",
    "Format",
    "State",
    "fail",
    "key_value_table",
    "state",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSED = 3
EXIT_INTERRUPTED = 130


class Format(enum.Enum):
    """How results are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


@dataclass
class State:
    """What the global options chose; one per process."""

    format: Format = Format.TABLE
    quiet: bool = False
    debug: bool = False
    verbose: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def report(
        self,
        values: dict[str, Any],
        table: Callable[[], RenderableType] | None = None,
        rows: str | None = None,
    ) -> None:
        """Show a result on standard output, in the format that was asked for; a table only unless quiet.

        Parameters
        ----------
        values : dict
            All of it; JSON.
        table : callable, optional
            Makes what people see; by default two columns.
        rows : str, optional
            Which of the values, a list of mappings, the lines of CSV are; by default a line is a key and its value.
        """
        if self.format is Format.JSON:
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
        elif self.format is Format.CSV:
            sys.stdout.write(_csv(values, rows))
        elif not self.quiet:
            Console().print(table() if table else key_value_table(values))

    def working(self, title: str, total: float = 0.0) -> Display:
        """Show that something is being done, and how far it is; a context manager."""
        from cat_plugin.recipe.display import Display

        return Display(title, self.console, total)


state = State()


def _csv(values: Mapping[str, Any], rows: str | None) -> str:
    """A result as CSV, with a heading; values that are lists or mappings are JSON in their cell."""
    listed = values.get(rows) if rows else None
    lines = listed or [{"key": key, "value": value} for key, value in values.items()]
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    for line in lines:
        cells = [line.get(heading) for heading in headings]
        writer.writerow(
            [json.dumps(cell) if isinstance(cell, list | dict | bool) else cell for cell in cells]
        )
    return text.getvalue()


def key_value_table(values: dict[str, Any]) -> Table:
    """Lay a flat mapping out as two columns."""
    from rich.markup import escape

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a truncated path cannot be copied
    for key, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), escape(shown))
    return table


def fail(message: str, code: int) -> int:
    """Print an error and hand back the exit code that goes with it."""
    Console(stderr=True).print(
        f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )
    return code
