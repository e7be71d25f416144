"""Reports for the site: what they show lies in docs/gallery as JSON, the pages are laid out when the site is built.

``python docs/_ext/gallery.py BUNDLE docs/gallery/NAME.json`` keeps what a bundle has to show.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cat_plugin.report.content import Content
from cat_plugin.report.page import render

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["kept", "page_of", "reports", "setup"]

FOLDER = Path(__file__).resolve().parents[1] / "gallery"
_MARK = "<!-- reports -->"
_DIGITS = 5  # significant ones are enough for a figure


def _short(value: Any) -> Any:
    """The same with numbers that are as long as they need be."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list) else value


def kept(bundle: Path) -> dict[str, Any]:
    """What a bundle has to show, as JSON."""
    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.report.record import read_record

    read = read_bundle(bundle)
    arrays = read.cluster_affine()
    return {
        "name": bundle.name,
        "manifest": read.manifest,
        "record": _short(read_record(read) or {}),
        "arrays": None if arrays is None else _short({name: array.tolist() for name, array in arrays.items() if name in ("gamma", "weight", "beta")}),
    }  # fmt: skip


def page_of(stored: dict[str, Any]) -> str:
    """The report as HTML."""
    arrays = stored["arrays"]
    found = None if arrays is None else {name: np.asarray(values) for name, values in arrays.items()}
    return render(Content(stored["name"], stored["manifest"], stored["record"], found))


def reports() -> dict[str, dict[str, Any]]:
    """Everything in the gallery, by name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def _link(app: Sphinx, page: str, source: list[str]) -> None:
    """On the site, the reports that lie beside the page."""
    if page == "gallery":
        links = [f'<a href="gallery/{name}.html">{name}</a>' for name in reports()]
        source[0] = source[0].replace(_MARK, f"<p>Open {', '.join(links)}.</p>")


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        folder = Path(app.outdir) / "gallery"
        folder.mkdir(exist_ok=True)
        for name, stored in reports().items():
            (folder / f"{name}.html").write_text(page_of(stored), "utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _link)
    app.connect("build-finished", _write)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(kept(Path(sys.argv[1]))) + "\n", "utf-8")
