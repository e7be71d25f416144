"""The section on accuracy and size."""

from __future__ import annotations

from cat_plugin.report.blocks import Block, Cell, Drawing, Heading, Legend, Table
from cat_plugin.report.content import Content, Section, weight_bytes
from cat_plugin.report.figures import DASH, percent, signed, size
from cat_plugin.report.svg.charts import Candidate, accuracy_and_size

__all__ = ["accuracy"]


def _evaluated(content: Content) -> list[Candidate]:
    return [
        Candidate(f"{e.bits} {e.name}".strip(), e.weight_bytes, e.score, e.plain, number == 0)
        for number, e in enumerate(content.evaluations)
    ]


def _tried(content: Content) -> list[Candidate]:
    trials = [t for t in content.record.get("tuning", {}).get("trials", ()) if t.get("weight_bytes")]
    names = [t["name"].partition(",")[0] for t in trials]
    if len({name.partition(" ")[2] for name in names}) == 1:
        names = [name.partition(" ")[0] for name in names]  # one preset for all of them says nothing
    return [
        Candidate(name, t["weight_bytes"], t["score"], t.get("uncorrected"), t["best"])
        for name, t in zip(names, trials, strict=True)
    ]


def _compared(
    name: str, rows: list[Candidate], full: tuple[int, float] | None, full_bytes: int
) -> list[Block]:
    """A figure where there is something to compare, and a table."""
    dash = Cell(DASH)
    cells: list[list[Cell | str]] = []
    if full is not None:
        cells.append(
            ["full precision", Cell(size(full[0]), full[0]), Cell("1.0", 1.0), dash, Cell(percent(full[1]), full[1]), dash]
        )  # fmt: skip
    for row in rows:
        gain = None if row.plain is None else 100 * (row.score - row.plain)
        ratio = full_bytes / max(row.weight_bytes, 1)
        cells.append(
            [
                Cell(row.name, row.name, row.chosen),
                Cell(size(row.weight_bytes), row.weight_bytes),
                Cell(f"{ratio:.1f}", ratio),
                Cell(percent(row.plain), row.plain),
                Cell(percent(row.score), row.score, row.chosen),
                Cell(signed(gain), gain),
            ]
        )
    headings = ["model", "#weights", "#times smaller", "#without CAT", "#with CAT", "#points gained"]
    numbers = Table(name, headings, cells)
    if len(rows) + (full is not None) < 2:
        return [numbers]
    marks = Legend([("before", "without the correction"), ("after", "with it"), ("frontier", "best of both")])
    return [Drawing(accuracy_and_size(rows, full)), marks, numbers]


def accuracy(content: Content) -> Section:
    """Accuracy and size: of this bundle and those that it is compared with, and of the trials."""
    key, title = "accuracy", "Accuracy and size"
    full_bytes = weight_bytes(content.manifest["layers"], 32)
    tuning, tried = content.record.get("tuning", {}), _tried(content)
    body: list[Block] = []
    drawn = False
    if content.evaluations:
        full = None if content.full_score is None else (full_bytes, content.full_score)
        body.append(Heading(f"On {content.samples} samples of {content.source}"))
        parts = _compared(f"{key}-table", _evaluated(content), full, full_bytes)
        body, drawn = [*body, *parts], len(parts) > 1
    if len(tried) > 1 or (tried and not body):
        baseline = tuning.get("baseline")
        full = None if baseline is None else (full_bytes, baseline)
        samples = f"{tuning.get('samples', '')} samples of {tuning.get('source', '')}"
        body.append(Heading(f"The trials, on the {samples} that they were tuned on"))
        parts = _compared("tried-table", tried, full, full_bytes)
        body, drawn = [*body, *parts], drawn or len(parts) > 1
    if not body:
        return Section(key, title, missing="no accuracy is known; give labelled data with --data")
    lead = "The line joins the models that no other one beats in both accuracy and size." if drawn else ""
    return Section(key, title, lead, tuple(body))
