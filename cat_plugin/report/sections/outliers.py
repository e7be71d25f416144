"""The section on channels that stand out, for transformers."""

from __future__ import annotations

from cat_plugin.report.blocks import Cell, Drawing, Legend, Table
from cat_plugin.report.content import NOT_RECORDED, Content, Section
from cat_plugin.report.figures import short
from cat_plugin.report.svg.charts import losses

__all__ = ["outliers"]

_DRAWN = 60


def outliers(content: Content) -> Section:
    """The largest channel of each linear layer's input over the median one, before and after channels were scaled."""
    key, title = "outliers", "Channels that stand out"
    found = content.record.get("outliers")
    if not found:
        return Section(key, title, missing=f"it is for models with layer norms; or {NOT_RECORDED}")
    rows = [(x["name"], x["before"], x["after"]) for x in found["layers"]]
    lead = (
        "What a linear layer is given has one scale for all channels, so that one large channel leaves few steps to the others. "
        f"Largest magnitude of the largest channel over that of the median one, on {found['rows']} calibration samples: in the "
        "full-precision model, and in the quantized one, where smoothing has moved scales into the weights."
    )
    cells = [[name, Cell(short(b), b), Cell(short(a), a), Cell(short(b / a), b / a)] for name, b, a in rows]
    worst = sorted(rows, key=lambda row: -row[1])[:_DRAWN]
    shown = [row for row in rows if row in worst]
    return Section(
        key,
        title,
        lead,
        (
            Drawing(losses(shown, "largest channel over the median channel")),
            Legend([("before", "full precision"), ("after", "quantized")]),
            Table(key + "-table", ["layer", "#full precision", "#quantized", "#times less"], cells),
        ),
    )
