"""The section on the trials of a tuning run."""

from __future__ import annotations

import json

from cat_plugin.report.blocks import Cell, Table
from cat_plugin.report.content import Content, Section, as_text
from cat_plugin.report.figures import percent, size

__all__ = ["trials"]


def trials(content: Content) -> Section:
    """The tuner's trials."""
    key, title = "trials", "Trials"
    run = content.record.get("tuning")
    if not run:
        return Section(
            key, title, missing="the recipe was run without tuning data (--tune), so there were no trials"
        )
    names = sorted({name for trial in run["trials"] for name in trial["config"]})
    differing = [n for n in names if len({json.dumps(t["config"].get(n)) for t in run["trials"]}) > 1]
    cells = [
        [
            Cell(number, number),
            Cell(trial["name"], trial["name"], trial["best"]),
            *(Cell(value := as_text(trial["config"].get(name)), value) for name in differing),
            Cell(percent(trial.get("uncorrected")), trial.get("uncorrected")),
            Cell(percent(trial["score"]), trial["score"], trial["best"]),
            "met" if trial["met"] else "missed",
            Cell(size(trial.get("weight_bytes")), trial.get("weight_bytes")),
            Cell(f"{trial['seconds']:.1f}", trial["seconds"]),
        ]
        for number, trial in enumerate(run["trials"], 1)
    ]
    lead = (
        f"Scored on {run.get('samples', '')} samples of {run.get('source', '')}. Full precision has "
        f"{percent(run.get('baseline'))}, a trial meets the criterion from {percent(run.get('target'))} on. "
        "The one in bold is in this bundle."
    )
    headings = ["#trial", "configuration", *differing, "#without CAT", "#score", "criterion", "#weights", "#seconds"]  # fmt: skip
    return Section(key, title, lead, (Table(key + "-table", headings, cells),))
