"""The section on slopes and offsets of the correction."""

from __future__ import annotations

from cat_plugin.report.blocks import Block, Cell, Details, Drawing, Table
from cat_plugin.report.content import Content, Section, changes_nothing
from cat_plugin.report.figures import NO_GAIN, short
from cat_plugin.report.svg.maps import slopes_and_offsets, spread

__all__ = ["correction"]


def correction(content: Content) -> Section:
    """The ranges of slopes and offsets."""
    key, title = "correction", "Slopes and offsets"
    step = content.manifest["cluster_affine"]
    if step is None or content.arrays is None:
        return Section(key, title, missing="the bundle has no correction")
    if changes_nothing(content):
        return Section(key, title, missing=f"the correction {NO_GAIN}")
    found = slopes_and_offsets(content.arrays)
    if found is None:
        return Section(key, title, missing="the correction's arrays are not of the form that is drawn")
    gamma, beta = found
    full = step["op"].endswith("_full")
    lead = (
        f"{'In its only cluster' if len(beta) == 1 else f'In each of {len(beta)} clusters'} the logit of class c becomes gamma times itself plus beta, blended with alpha "
        f"{short(step['alpha'])}. Lines reach from the least to the greatest class, bars hold the middle half; the dashed "
        "line changes nothing."
    )
    if full:
        lead += " This map is a full matrix; gamma is its diagonal."
    cells = [
        [Cell(k, k), *(Cell(short(value, 4), value) for row in (gamma[k], beta[k]) for value in (float(row.min()), float(row.mean()), float(row.max())))]
        for k in range(len(beta))
    ]  # fmt: skip
    headings = ["#cluster", "#gamma least", "#mean", "#greatest", "#beta least", "#mean", "#greatest"]
    numbers: Block = Table(key + "-table", headings, cells)
    if len(cells) > 16:
        numbers = Details(f"{len(cells)} clusters in numbers", numbers)
    return Section(
        key, title, lead, (Drawing(spread(gamma, "gamma", 1.0)), Drawing(spread(beta, "beta", 0.0)), numbers)
    )
