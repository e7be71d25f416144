"""The section on samples whose class changed, with pictures where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cat_plugin.report.blocks import Block, Card, Changes, Count, Group, Heading
from cat_plugin.report.content import Content, Section
from cat_plugin.report.text import escaped

__all__ = ["labels"]

_SHOWN = 60
_NAMES = {"full": "full-precision"}
_FULL = Markup("full-precision model with <code>--model</code> and <code>--weights</code>")
_STEPS = (
    ("full", "corrected", "From full precision to this model"),
    ("quantized", "corrected", "By the correction alone"),
)


def labels(content: Content) -> Section:
    """Which samples went from right to wrong, and which the other way."""
    key, title = "labels", "Changed labels"
    found = content.labels or content.record.get("labels")
    if not found:
        why = Markup("no labelled data; give some with <code>--data</code>, and the ") + _FULL
        return Section(key, title, missing=why)
    models = found["models"]
    rows = [row for row in found["rows"] if len(row) == 2 + len(models)]
    pictures = content.pictures if content.labels else {}
    body: list[Block] = []
    for before, after, heading in _STEPS:
        if before in models and after in models:
            first, second = 2 + models.index(before), 2 + models.index(after)
            body.append(Heading(heading))
            known = found.get("changes", {}).get(f"{before} {after}")
            body.append(
                _step(rows, first, second, found, pictures, content.manifest.get("class_names"), known)
            )
    if not body:
        return Section(key, title, missing="only one model was run on the labelled data")
    return Section(key, title, _lead(found, rows), tuple(body))


def _lead(found: dict[str, Any], rows: Sequence[Sequence[int]]) -> str:
    """How many samples the models disagree on, and how the numbers below add up to it."""
    models, differing = found["models"], found.get("differing", len(rows))
    *others, last = (_NAMES.get(name, name) for name in models)
    said = (
        f"The {', the '.join(others)} and the {last} model disagree on {differing} of {found['samples']} samples of "
        f"{found.get('source') or 'the data'}"
    )
    if "full" not in models:
        return escaped(f"{said}. Give the ") + _FULL + Markup(" to see what quantization itself changed.")
    changed = sum(found.get("changes", {}).get("full corrected", ()))
    back = differing - changed
    if len(models) == 3 and changed:
        said += f": {changed} have another class than in full precision"
        if back:
            said += (
                f", {back} had one before the correction, which puts them right back"
                if back > 1
                else (", 1 had one before the correction, which puts it right back")
            )
    return f"{said}."


def _step(
    rows: Sequence[Sequence[int]],
    first: int,
    second: int,
    found: dict[str, Any],
    pictures: dict[int, str],
    classes: list[str] | None,
    known: list[int] | None,
) -> Changes:
    kinds: list[tuple[str, str, list[Sequence[int]]]] = [
        ("Wrong to right", "good", [r for r in rows if r[first] != r[1] == r[second]]),
        ("Right to wrong", "bad", [r for r in rows if r[first] == r[1] != r[second]]),
        ("Wrong to wrong", "", [r for r in rows if r[1] not in (r[first], r[second]) and r[first] != r[second]]),
    ]  # fmt: skip
    groups = []
    counts = known or [len(members) for _, _, members in kinds]
    for (name, _, members), count in zip(kinds[:2], counts, strict=False):
        if not members:
            continue
        cards = [_card(row, first, second, found, pictures, classes) for row in members[:_SHOWN]]
        more = f" (the first {_SHOWN} of {count})" if count > _SHOWN else ""
        groups.append(Group(f"{name}{more}", cards, open=len(members) <= 24))
    return Changes(
        [Count(count, name, tone) for count, (name, tone, _) in zip(counts, kinds, strict=True)], groups
    )


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
