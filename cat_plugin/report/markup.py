"""HTML and SVG elements as escaped text: a plain string put into one can never become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["Markup", "element", "join"]

_VOID = frozenset({"br", "img", "input", "meta"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9:-]*")
# What XML and HTML allow in no form at all.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def _text(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _text(str(value))


def element(tag: str, *children: object, **attributes: Any) -> Markup:
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
    Markup
    """
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.removesuffix("_").replace("_", "-")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{key!r} is no name of an attribute")
        parts.append(name if value is True else f'{name}="{_value(value)}"')
    opening = f"<{' '.join(parts)}>"
    if tag in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{''.join(_text(child) for child in children if child is not None)}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
    """Several pieces, one after the other."""
    return Markup("".join(_text(part) for part in parts if part is not None))
