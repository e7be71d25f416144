"""The section on samples whose class changed, with pictures where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cat_plugin.report.content import Content, Section
from cat_plugin.report.markup import Markup, element

__all__ = ["label_section"]

_SHOWN = 60
_STEPS = (
    ("full", "corrected", "From full precision to this model"),
    ("quantized", "corrected", "By the correction alone"),
)


def label_section(content: Content) -> Section:
    """Which samples went from right to wrong, and which the other way."""
    key, title = "labels", "Changed labels"
    found = content.labels or content.record.get("labels")
    if not found:
        why = (
            "no labelled data; give some with --data, and the full-precision model with --model and --weights"
        )
        return Section(key, title, missing=why)
    models = found["models"]
    rows = [row for row in found["rows"] if len(row) == 2 + len(models)]
    pictures = content.pictures if content.labels else {}
    body: list[object] = []
    for before, after, heading in _STEPS:
        if before in models and after in models:
            first, second = 2 + models.index(before), 2 + models.index(after)
            body.append(element("h3", heading))
            body.append(_step(rows, first, second, found, pictures))
    if not body:
        return Section(key, title, missing="only one model was run on the labelled data")
    total = found["samples"]
    lead = f"The models disagree on {found.get('differing', len(rows))} of {total} samples of {found.get('source') or 'the data'}."
    if "full" not in models:
        lead += " Give the full-precision model with --model and --weights to see what quantization itself changed."
    return Section(key, title, lead, tuple(body))


def _step(
    rows: Sequence[Sequence[int]], first: int, second: int, found: dict[str, Any], pictures: dict[int, str]
) -> Markup:
    kinds: list[tuple[str, str, list[Sequence[int]]]] = [
        ("Wrong to right", "good", [r for r in rows if r[first] != r[1] == r[second]]),
        ("Right to wrong", "bad", [r for r in rows if r[first] == r[1] != r[second]]),
        ("Wrong to wrong", "", [r for r in rows if r[1] not in (r[first], r[second]) and r[first] != r[second]]),
    ]  # fmt: skip
    tiles = [
        element("div", element("b", len(members)), element("span", name), class_=f"count {tone}".strip())
        for name, tone, members in kinds
    ]
    parts: list[object] = [element("div", *tiles, class_="counts")]
    groups = []
    for name, _, members in kinds[:2]:
        if not members:
            continue
        cards = [_card(row, first, second, found, pictures) for row in members[:_SHOWN]]
        more = f" (the first {_SHOWN} of {len(members)})" if len(members) > _SHOWN else ""
        summary = element("summary", f"{name}{more}")
        open_ = len(members) <= 24
        groups.append(element("details", summary, element("div", *cards, class_="cards"), open=open_))
    if groups:
        parts.append(element("div", *groups, class_="pair"))
    return element("div", *parts)


def _card(
    row: Sequence[int], first: int, second: int, found: dict[str, Any], pictures: dict[int, str]
) -> Markup:
    number, right = row[0], row[1]
    name = found.get("names", {}).get(str(number), f"sample {number}")
    arrow = f"{row[first]} \N{RIGHTWARDS ARROW} {row[second]}"
    picture = pictures.get(number)
    image = None if picture is None else element("img", src=picture, alt=name, loading="lazy")
    return element(
        "figure",
        image,
        element(
            "figcaption", element("b", arrow), element("span", f"right: {right}"), element("small", name)
        ),
        title=f"{name}: {arrow}, the right class is {right}",
    )
