"""The whole page: one file, no address outside of it, and no script but its own."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from cat_plugin.report.content import Content, Section, bits_of, weight_bytes
from cat_plugin.report.figures import milliseconds, percent, size
from cat_plugin.report.markup import Markup, element, join
from cat_plugin.report.sections import SECTIONS

__all__ = ["render"]


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _policy(script: str, style: str) -> str:
    """Only the page's own script and style count, and nothing is fetched from anywhere."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    return f"default-src 'none'; img-src data:; style-src {source(style)}; script-src {source(script)}"


def _tile(value: str, name: str, detail: str = "") -> Markup:
    return element("div", element("span", name), element("b", value), element("small", detail), class_="tile")


def _tiles(content: Content) -> Markup:
    layers = content.manifest["layers"]
    packed, full = weight_bytes(layers), weight_bytes(layers, 32)
    tiles = []
    tuning = content.record.get("tuning") or {}
    best = next((trial for trial in tuning.get("trials", ()) if trial["best"]), None)
    if content.evaluations:
        own, other = content.evaluations[0], content.full_score
        known = [f"{percent(own.plain)} without CAT"] if own.plain is not None else []
        known += [f"{percent(other)} in full precision"] if other is not None else []
        tiles.append(_tile(percent(own.score), "top-1 accuracy", ", ".join(known)))
    elif best is not None:
        detail = f"{percent(tuning.get('baseline'))} in full precision, on tuning data"
        tiles.append(_tile(percent(best["score"]), "top-1 accuracy", detail))
    widths = {layer["w_bits"] for layer in layers}
    others = f"{len(layers)} layers" + (", some wider" if len(widths) > 1 else "")
    tiles.append(_tile(bits_of(layers), "bits", others))
    if packed:
        tiles.append(_tile(size(packed), "weights", f"{full / packed:.1f} times smaller than float32"))
    if content.latency:
        first = content.latency[0]
        rest = [row for row in content.latency if row["batch"] == first["batch"] and row is not first]
        detail = f"batch {first['batch']}" + (
            f", PyTorch {milliseconds(rest[-1]['median_ms'])}" if rest else ""
        )
        tiles.append(_tile(milliseconds(first["median_ms"]), "latency", detail))
    elif content.manifest["cluster_affine"] is not None:
        shape = content.manifest["cluster_affine"]["shapes"].get("beta", [0])
        tiles.append(
            _tile(str(shape[0]), "clusters", f"alpha {content.manifest['cluster_affine']['alpha']:g}")
        )
    return element("div", *tiles, class_="tiles")


def _section(section: Section) -> Markup:
    lead = element("p", section.lead, class_="lead") if section.lead else None
    return element("section", element("h2", section.title), lead, *section.body, id=section.key)


def render(content: Content) -> str:
    """Lay content out as a page.

    Parameters
    ----------
    content : Content

    Returns
    -------
    str
        HTML.  It holds everything that it needs, follows the reader's preference for light or dark, and runs under a
        content security policy that admits no script but its own.
    """
    made = [build(content) for build in SECTIONS]
    shown = [section for section in made if section.body]
    left_out = [element("li", element("b", s.title), f": {s.missing}") for s in made if not s.body]
    left_out += [element("li", note) for note in content.notes]
    script, style = Markup(_resource("page.js")), Markup(_resource("page.css"))
    links = [element("a", section.title, href=f"#{section.key}") for section in shown]
    toggle = element("button", id="theme", type="button", title="light or dark", aria_label="light or dark")
    parts = [
        element(
            "header",
            element("div", element("p", "cat-ptq report", class_="kind"), element("h1", content.name)),
            toggle,
        ),
        _tiles(content),
        element("nav", *links),
        *(_section(section) for section in shown),
    ]
    if left_out:
        parts.append(
            element("section", element("h2", "Not in this report"), element("ul", *left_out), id="left-out")
        )
    parts.append(element("footer", content.written))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(script, style)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{content.name} - cat-ptq"),
        element("style", style),
    )
    body = element("body", element("main", join(parts)), element("script", script))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
