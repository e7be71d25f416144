"""The section on the clusters that the correction works with."""

from __future__ import annotations

from cat_plugin.report.blocks import Block, Drawing, Facts, Legend
from cat_plugin.report.content import NOT_RECORDED, Content, Section, changes_nothing
from cat_plugin.report.figures import NO_GAIN, percent, short
from cat_plugin.report.svg.maps import cluster_map, enlargement

__all__ = ["clusters"]


def clusters(content: Content) -> Section:
    """The logits in two dimensions."""
    key, title = "clusters", "Clusters"
    summary = content.record.get("clusters")
    if content.manifest["cluster_affine"] is None:
        return Section(key, title, missing="the bundle has no correction")
    if changes_nothing(content):
        return Section(key, title, missing=f"the correction {NO_GAIN}")
    if summary is None:
        return Section(key, title, missing=NOT_RECORDED)
    lead = (
        f"The quantized logits of {summary['rows']} calibration samples. An arrow leads from the mean of a cluster to the mean "
        "of its corrected logits; the ring is where the full-precision model has it."
    )
    factor = enlargement(summary)
    if factor > 1:
        lead += f" Both are drawn {factor} times further from the mean than they are."
    body: list[Block] = [
        Drawing(cluster_map(summary)),
        Legend([("dot", "a sample"), ("before", "mean, quantized"), ("arrow", "moved by the correction"), ("goal", "full precision")]),
    ]  # fmt: skip
    if "error" in summary and "agreement" in summary:
        before, after = zip(summary["error"], summary["agreement"], strict=True)
        body.append(
            Facts(
                [
                    ("Squared error to the full-precision logits", f"{short(before[0])} before, {short(after[0])} after"),
                    ("Samples given the full-precision class", f"{percent(before[1])} before, {percent(after[1])} after"),
                ]
            )
        )  # fmt: skip
    return Section(key, title, lead, tuple(body))
