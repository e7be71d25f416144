"""Text from elsewhere made fit to stand in a page: escaping is left to MarkupSafe, which templates and drawings share."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

__all__ = ["escaped", "printable"]

# What XML and HTML allow in no form at all.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def printable(value: Any) -> Any:
    """The value with what no page may contain replaced; markup and what is no text are left as they are."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)


def escaped(value: object) -> Markup:
    """Markup as it is, and anything else as text that cannot become markup."""
    return escape(value if isinstance(value, Markup) else printable(str(value)))
