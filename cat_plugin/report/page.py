"""The whole page: one file, no address outside of it, and no script but its own."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cat_plugin.report.content import Content
from cat_plugin.report.sections import SECTIONS
from cat_plugin.report.text import printable
from cat_plugin.report.tiles import key_figures

__all__ = ["render"]


@functools.cache
def _templates() -> Environment:
    """Every value is escaped, and what no page may contain is replaced, in every template."""
    return Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _resource(name: str) -> Markup:
    """The page's own script or style, which no bundle has a part in."""
    return Markup(files(__package__).joinpath(name).read_text("utf-8"))


def _policy(script: str, style: str) -> str:
    """Only the page's own script and style count, and nothing is fetched from anywhere."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    return f"default-src 'none'; img-src data:; style-src {source(style)}; script-src {source(script)}"


def render(content: Content) -> str:
    """Lay content out as a page.

    Parameters
    ----------
    content : Content
        What is shown.

    Returns
    -------
    str
        HTML.  It holds everything that it needs, follows the reader's preference for light or dark, and runs under a
        content security policy that admits no script but its own.
    """
    made = [build(content) for build in SECTIONS]
    script, style = _resource("page.js"), _resource("page.css")
    return (
        _templates()
        .get_template("page.html")
        .render(
            content=content,
            tiles=key_figures(content),
            shown=[section for section in made if section.body],
            left_out=[section for section in made if not section.body],
            policy=_policy(script, style),
            script=script,
            style=style,
        )
    )
