"""Tables that a reader can sort by any column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cat_plugin.report.figures import as_number
from cat_plugin.report.markup import Markup, element

__all__ = ["Cell", "facts", "legend", "table"]


@dataclass(frozen=True)
class Cell:
    """What is shown, and what the column is sorted by.

    Parameters
    ----------
    shown : object
        Text or markup.
    value : float or str or None
        Numbers are sorted as numbers; None is always last.
    strong : bool
        Whether it stands out.
    """

    shown: object
    value: float | str | None = None
    strong: bool = False


def _cell(cell: Cell | str, numeric: bool) -> Markup:
    given = cell if isinstance(cell, Cell) else Cell(cell, cell)
    number = as_number(given.value)
    value = repr(number) if number is not None else given.value
    classes = " ".join(name for name, on in (("number", numeric), ("strong", given.strong)) if on)
    return element("td", given.shown, class_=classes or None, data_value="" if value is None else value)


def table(name: str, headings: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> Markup:
    """A sortable table.

    Parameters
    ----------
    name : str
        Its id.
    headings : sequence of str
        A heading that starts with ``#`` is that of a column of numbers.
    rows : sequence of sequence of Cell or str

    Returns
    -------
    Markup
    """
    numeric = [heading.startswith("#") for heading in headings]
    head = [
        element(
            "th",
            element("button", heading.removeprefix("#"), type="button"),
            class_="number" if is_number else None,
            scope="col",
        )
        for heading, is_number in zip(headings, numeric, strict=True)
    ]
    body = [
        element("tr", *(_cell(cell, is_number) for cell, is_number in zip(row, numeric, strict=True)))
        for row in rows
    ]
    shown = element(
        "table", element("thead", element("tr", *head)), element("tbody", *body), id=name, class_="sortable"
    )
    return element("div", shown, class_="scroll")


def facts(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Names and values, one below the other."""
    items = [part for name, value in pairs for part in (element("dt", name), element("dd", value))]
    return element("dl", *items, class_="facts")


def legend(*entries: tuple[str, str]) -> Markup:
    """What the marks of a figure stand for."""
    return element(
        "p", *(element("span", element("i", class_=kind), text) for kind, text in entries), class_="legend"
    )
