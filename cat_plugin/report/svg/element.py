"""SVG elements as escaped text: a plain string put into one can never become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from markupsafe import Markup

from cat_plugin.report.text import escaped

__all__ = ["element", "join"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9:-]*")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escaped(str(value))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One element.

    Parameters
    ----------
    tag : str
        Its name.
    *children : object
        Markup is put in as it is, everything else is escaped; None is left out.
    **attributes : object
        An underscore at the end of a name is dropped, others become hyphens.  None and False leave an attribute out,
        True gives it no value, numbers are rounded to two decimals.

    Returns
    -------
    markupsafe.Markup

    Raises
    ------
    ValueError
        When a keyword is no name of an attribute.
    """
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.removesuffix("_").replace("_", "-")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{key!r} is no name of an attribute")
        parts.append(name if value is True else f'{name}="{_value(value)}"')
    return Markup(f"<{' '.join(parts)}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
    """Several pieces, one after the other."""
    return Markup("").join(escaped(part) for part in parts if part is not None)
