"""What several processes that quantize one model must have in common, and what they do not."""

from __future__ import annotations

import dataclasses
import json

from torch import nn

from cat_plugin.errors import QuantizationError
from cat_plugin.models import fingerprint
from cat_plugin.ptq.presets import plan
from cat_plugin.ptq.ranks import Ranks
from cat_plugin.ptq.report import LayerReport, QuantReport
from cat_plugin.ptq.rows import Inputs
from cat_plugin.ptq.spec import QuantSpec

__all__ = ["check_agreement", "refuse_training", "report_of_first"]


def refuse_training(spec: QuantSpec, ranks: Ranks) -> None:
    """Refuse what only one process can do.

    Raises
    ------
    QuantizationError
        If the specification trains and there are several processes.
    """
    if ranks.size > 1 and plan(spec).trains:
        raise QuantizationError(
            f"the specification trains (preset {spec.preset!r}), and there are {ranks.size} processes; expected preset 'fast', "
            "whose sums over calibration inputs can be divided. Set preset to 'fast', or quantize in one process "
            "(distributed=False)."
        )


def check_agreement(ranks: Ranks, model: nn.Module, spec: QuantSpec, inputs: Inputs) -> tuple[str, list[str]]:
    """Compare what the processes were given.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    model : nn.Module
        To be quantized.
    spec : QuantSpec
        How.
    inputs : Inputs
        This process's share.

    Returns
    -------
    key : str
        Fingerprint of the calibration inputs of all processes.
    notes : list of str
        What the caller should know.

    Raises
    ------
    QuantizationError
        If models, specifications or the kind of inputs differ.
    """
    rows = fingerprint(*inputs.tensors)
    if ranks.size == 1:
        return rows, []
    kinds = [
        (name, tuple(x.shape[1:]), str(x.dtype)) for name, x in zip(inputs.names, inputs.tensors, strict=True)
    ]
    mine = {
        "model": fingerprint(model),
        "specification": spec.to_dict(),
        "kind of inputs": repr(kinds),
        "rows": rows,
    }
    given = [json.loads(text) for text in ranks.heard(json.dumps(mine).encode())]
    for what in ("model", "specification", "kind of inputs"):
        for rank, other in enumerate(given):
            if other[what] != given[0][what]:
                raise QuantizationError(
                    f"process {rank} of {ranks.size} was given another {what} than process 0; expected the same in every "
                    "process, and of the calibration inputs to each its share."
                )
    seen = [other["rows"] for other in given]
    notes = []
    if len(set(seen)) < len(seen):
        notes.append(
            "several processes were given the same calibration inputs, which count as often: give each its own share, and the "
            "others' are counted with it"
        )
    return fingerprint(*seen), notes


def report_of_first(ranks: Ranks, report: QuantReport) -> QuantReport:
    """The first process's report, with what this one alone knows: its seconds and its memory."""
    if ranks.size == 1:
        return report
    said = json.dumps({"layers": [dataclasses.asdict(x) for x in report.layers], "notes": report.notes})
    first = json.loads(ranks.told(said.encode()))
    layers = [LayerReport(**{**x, "weight_shape": tuple(x["weight_shape"])}) for x in first["layers"]]
    return dataclasses.replace(report, layers=layers, notes=first["notes"])
