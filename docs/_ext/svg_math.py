"""Formulas as SVG drawn while the site is built, so that reading needs neither JavaScript nor the network."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx

SIZE = 24.0
"""Points at which glyphs are laid out; the drawing is scaled to the size of the text around it."""

EM = SIZE / 1.17
"""Units of the drawing that make one em: STIX looks smaller than a web font of the same size."""


def draw(latex: str, *, inline: bool) -> str:
    """Return one formula as an SVG element whose baseline is that of the text.

    Parameters
    ----------
    latex
        The formula, without dollar signs.
    inline
        Whether it stands in a line of text.

    Returns
    -------
    str
        An ``svg`` element in the text's colour, labelled with its LaTeX for screen readers.
    """
    formula = ziamath.Latex(" ".join(latex.split()), size=SIZE, inline=inline, color="currentColor")
    picture = ET.fromstring(re.sub(r' xmlns="[^"]*"', "", formula.svg(), count=1))
    left, top, width, height = (float(number) for number in picture.attrib["viewBox"].split())
    picture.attrib = {
        "class": "formula",
        "role": "img",
        "aria-label": latex.strip(),
        "viewBox": f"{left:g} {top:g} {width:g} {height:g}",
        "style": f"width: {width / EM:.3f}em; height: {height / EM:.3f}em; "
        f"vertical-align: {-(top + height) / EM:.3f}em",
    }
    return ET.tostring(picture, encoding="unicode")


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(draw(node.astext(), inline=True))
    raise nodes.SkipNode


def visit_display(translator: Any, node: nodes.math_block) -> None:
    # Parts that stand beside each other with \qquad are drawn apart, so that a narrow window can wrap them.
    parts = [part for part in node.astext().split(r"\qquad") if part.strip()]
    pictures = "".join(draw(part, inline=False) for part in parts)
    translator.body.append(
        f'<div class="formulas" title="{html.escape(node.astext().strip())}">{pictures}</div>'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_display, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
