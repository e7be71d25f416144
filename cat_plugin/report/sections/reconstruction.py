"""The section on what was trained."""

from __future__ import annotations

from typing import Any

from cat_plugin.report.blocks import Block, Cell, Drawing, Heading, Legend, Table
from cat_plugin.report.content import Content, Section
from cat_plugin.report.figures import DASH, short
from cat_plugin.report.svg.charts import losses

__all__ = ["reconstruction"]


def reconstruction(content: Content) -> Section:
    """Losses before and after, of trained units or of the layers."""
    key, title = "losses", "Reconstruction"
    engine = content.record.get("engine")
    if not engine:
        return Section(key, title, missing="the engine's own report is not in the bundle")
    units = _pairs([u for u in engine.get("units", ()) if u.get("kind", "unit") == "unit"])
    whole = [u for u in engine.get("units", ()) if u.get("kind", "unit") != "unit"]
    singles = _pairs(engine.get("layers", ()))
    body: list[Block] = []
    marks = Legend([("before", "before"), ("after", "after")])
    if units:
        body += [
            Heading("Trained units"),
            Drawing(losses(units, "relative squared error of the unit's output")),
            marks,
        ]
    if singles:
        body += [
            Heading("Layers: rounded to nearest, and as delivered"),
            Drawing(losses(singles, "relative squared error of the layer's output")),
        ]
        if not units:
            body.append(marks)
    cells = [
        [
            u["name"],
            u.get("kind", ""),
            Cell(u.get("steps", DASH), u.get("steps")),
            Cell(short(u.get("loss_before")), u.get("loss_before")),
            Cell(short(u.get("loss_after")), u.get("loss_after")),
            u.get("note", ""),
        ]
        for u in engine.get("units", ())
    ]
    if cells:
        body.append(Table(key + "-table", ["unit", "kind", "#steps", "#before", "#after", "note"], cells))
    if not body:
        return Section(key, title, missing="nothing was trained and no loss was recorded")
    lead = "How far each output is from the full-precision one, relative to its mean square."
    if whole:
        lead += " Stages on the logits (model, refinement) are in the table; their loss is a divergence."
    return Section(key, title, lead, tuple(body))


def _pairs(entries: Any) -> list[tuple[str, float, float]]:
    return [
        (e["name"], e["loss_before"], e["loss_after"])
        for e in entries
        if e.get("loss_before") is not None and e.get("loss_after") is not None
    ]
