"""What the sections of a page are made of, as plain data; each kind has a template of its own.

A template in ``templates/blocks`` gets its block under the name ``block``.  Whatever text a block holds is escaped there;
only a :class:`Drawing` holds markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from cat_plugin.report.figures import as_number

__all__ = [
    "Block",
    "Bullets",
    "Card",
    "Cell",
    "Changes",
    "Count",
    "Details",
    "Drawing",
    "Facts",
    "Group",
    "Heading",
    "Legend",
    "Source",
    "Table",
]


class Block:
    """One part of a section's body."""

    template: ClassVar[str]


@dataclass(frozen=True)
class Heading(Block):
    """A heading within a section."""

    template: ClassVar[str] = "heading.html"
    text: str


@dataclass(frozen=True)
class Drawing(Block):
    """A figure, made by :mod:`cat_plugin.report.svg`."""

    template: ClassVar[str] = "drawing.html"
    markup: Markup


@dataclass(frozen=True)
class Cell:
    """What is shown, and what the column is sorted by.

    Parameters
    ----------
    shown : object
        Its text.
    value : float or str or None
        Numbers are sorted as numbers; None is always last.
    strong : bool
        Whether it stands out.
    """

    shown: object
    value: float | str | None = None
    strong: bool = False

    @property
    def key(self) -> str:
        """What the page's script sorts by, as text."""
        number = as_number(self.value)
        if number is not None:
            return repr(number)
        return "" if self.value is None else str(self.value)


@dataclass(frozen=True)
class Table(Block):
    """A table that a reader can sort by any column.

    Parameters
    ----------
    name : str
        Its id.
    headings : sequence of str
        A heading that starts with ``#`` is that of a column of numbers.
    rows : sequence of sequence of Cell or str
        Cells below the headings.
    """

    template: ClassVar[str] = "table.html"
    name: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Heading of each column, and whether it holds numbers."""
        return [(heading.removeprefix("#"), heading.startswith("#")) for heading in self.headings]

    @property
    def cells(self) -> list[list[tuple[Cell, bool]]]:
        """Rows of cells, each with whether its column holds numbers."""
        numeric = [heading.startswith("#") for heading in self.headings]
        return [
            [
                (cell if isinstance(cell, Cell) else Cell(cell, cell), is_number)
                for cell, is_number in zip(row, numeric, strict=True)
            ]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Facts(Block):
    """Names and values, one below the other; the values in `codes` are hashes and the like."""

    template: ClassVar[str] = "facts.html"
    pairs: Sequence[tuple[str, object]]
    codes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Legend(Block):
    """What the marks of a figure stand for: the style of each, and its meaning."""

    template: ClassVar[str] = "legend.html"
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bullets(Block):
    """A list."""

    template: ClassVar[str] = "bullets.html"
    items: Sequence[str]


@dataclass(frozen=True)
class Source(Block):
    """Text with its lines as they are."""

    template: ClassVar[str] = "source.html"
    text: str


@dataclass(frozen=True)
class Details(Block):
    """A block that a reader opens."""

    template: ClassVar[str] = "details.html"
    summary: str
    body: Block


@dataclass(frozen=True)
class Count:
    """A number with its name; `tone` is ``good``, ``bad`` or empty."""

    number: int
    name: str
    tone: str = ""


@dataclass(frozen=True)
class Card:
    """One sample: its classes before and after, the right one, and a ``data:`` address of its picture."""

    name: str
    before: object
    after: object
    right: object
    picture: str | None = None


@dataclass(frozen=True)
class Group:
    """Samples under one heading, which a reader opens."""

    summary: str
    cards: Sequence[Card]
    open: bool


@dataclass(frozen=True)
class Changes(Block):
    """How many samples changed which way, and which ones."""

    template: ClassVar[str] = "changes.html"
    counts: Sequence[Count]
    groups: Sequence[Group]
