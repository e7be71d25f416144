"""The section on samples whose class changed, with pictures where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cat_plugin.report.blocks import Block, Card, Changes, Count, Group, Heading
from cat_plugin.report.content import Content, Section

__all__ = ["labels"]

_SHOWN = 60
_STEPS = (
    ("full", "corrected", "From full precision to this model"),
    ("quantized", "corrected", "By the correction alone"),
)


def labels(content: Content) -> Section:
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
    body: list[Block] = []
    for before, after, heading in _STEPS:
        if before in models and after in models:
            first, second = 2 + models.index(before), 2 + models.index(after)
            body.append(Heading(heading))
            body.append(_step(rows, first, second, found, pictures, content.manifest.get("class_names")))
    if not body:
        return Section(key, title, missing="only one model was run on the labelled data")
    total = found["samples"]
    lead = f"The models disagree on {found.get('differing', len(rows))} of {total} samples of {found.get('source') or 'the data'}."
    if "full" not in models:
        lead += " Give the full-precision model with --model and --weights to see what quantization itself changed."
    return Section(key, title, lead, tuple(body))


def _step(
    rows: Sequence[Sequence[int]],
    first: int,
    second: int,
    found: dict[str, Any],
    pictures: dict[int, str],
    classes: list[str] | None,
) -> Changes:
    kinds: list[tuple[str, str, list[Sequence[int]]]] = [
        ("Wrong to right", "good", [r for r in rows if r[first] != r[1] == r[second]]),
        ("Right to wrong", "bad", [r for r in rows if r[first] == r[1] != r[second]]),
        ("Wrong to wrong", "", [r for r in rows if r[1] not in (r[first], r[second]) and r[first] != r[second]]),
    ]  # fmt: skip
    groups = []
    for name, _, members in kinds[:2]:
        if not members:
            continue
        cards = [_card(row, first, second, found, pictures, classes) for row in members[:_SHOWN]]
        more = f" (the first {_SHOWN} of {len(members)})" if len(members) > _SHOWN else ""
        groups.append(Group(f"{name}{more}", cards, open=len(members) <= 24))
    return Changes([Count(len(members), name, tone) for name, tone, members in kinds], groups)


def _card(
    row: Sequence[int],
    first: int,
    second: int,
    found: dict[str, Any],
    pictures: dict[int, str],
    classes: list[str] | None,
) -> Card:
    number, right = row[0], row[1]
    name = found.get("names", {}).get(str(number), f"sample {number}")

    def named(index: int) -> int | str:
        return classes[index] if classes is not None and 0 <= index < len(classes) else index

    return Card(name, named(row[first]), named(row[second]), named(right), pictures.get(number))
