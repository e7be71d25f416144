"""Quantize and correct one model, the same way under every host, and remember what trials share."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from cat_plugin.calls import LogitRows, ModelCall, collect_logits, evaluating
from cat_plugin.correction import CorrectedModule, fit_correction
from cat_plugin.hosts.recording import CalibrationRecord, calibrated
from cat_plugin.logits import LogitsOf
from cat_plugin.models import fingerprint
from cat_plugin.recipe.description import describe
from cat_plugin.recipe.options import make_estimator, make_spec, quantization_key
from cat_plugin.recipe.progress import TrialProgress, current_watch

if TYPE_CHECKING:
    from cat_plugin.ptq.progress import Progress

__all__ = [
    "CalibrationRecord",
    "TuningSession",
    "quantize_and_correct",
    "rows_for_engine",
]

_log = logging.getLogger("cat_plugin")
# Steps of a progress bar that quantizing takes; each calibration batch of the quantized model is one more.
_ENGINE_STEPS = 100
# With fewer rows in all, or fewer held out from the engine, dividing them costs more than it gains.
_DIVIDED_FROM = 512
_JUDGES = 128


@dataclass
class _Quantized:
    module: nn.Module
    logits: LogitRows | None
    report: dict[str, Any] | None
    tuned: int  # the first so many samples are what it was tuned on


@dataclass
class TuningSession:
    """Results that the trials of one tuning run share.

    Parameters
    ----------
    capacity : int
        Quantized models kept at most; the one used longest ago goes first.
    label : str
        What progress bars call the trial that is running.
    last, winner : CorrectedModule or None
        What the last trial made, and what the host asks for again once the trials are over.
    """

    capacity: int = 4
    label: str = ""
    last: CorrectedModule | None = None
    winner: CorrectedModule | None = None
    _model: str | None = None
    _source: tuple[Any, ...] | None = None
    _wanted: tuple[LogitsOf, bool] | None = None
    _record: CalibrationRecord | None = None
    _quantized: OrderedDict[str, _Quantized] = field(default_factory=OrderedDict)

    def record(
        self,
        model: nn.Module,
        source: tuple[Any, ...],
        params: Mapping[str, Any],
        read: Callable[[], list[ModelCall]],
    ) -> CalibrationRecord:
        """The calibration record of `model`, made once for the same model, calibration source and choice of logits."""
        mark = fingerprint(model)
        wanted = (LogitsOf.of(params), params.get("base") is None)
        same = self._source is not None and len(self._source) == len(source) and wanted == self._wanted
        same = same and all(a is b for a, b in zip(self._source or (), source, strict=True))
        if self._record is None or mark != self._model or not same:
            self._quantized.clear()
            self.winner = None
            self._model, self._source, self._wanted = mark, source, wanted
            self._record = calibrated(model, read(), params)
        else:
            _log.info("calibration inputs and full-precision logits are kept from an earlier trial")
        return self._record

    def quantized(self, key: str, make: Callable[[], _Quantized]) -> _Quantized:
        """The quantized model for `key`, made once."""
        if key in self._quantized:
            _log.info("the quantized model is kept from an earlier trial; only the correction is fitted anew")
            self._quantized.move_to_end(key)
            return self._quantized[key]
        made = make()
        self._quantized[key] = made
        while len(self._quantized) > self.capacity:
            self._quantized.popitem(last=False)
        return made


def _state_of(key: str) -> Path | None:
    """Where the engine keeps the state of one quantization, when it is to keep any."""
    root = current_watch().resume
    return None if root is None else root / fingerprint(key)[:16]


def rows_for_engine(rows: int, num_samples: int, holdout: float) -> int:
    """How many of the calibration rows, from the first on, the engine is given.

    Parameters
    ----------
    rows : int
        Calibration rows in all.
    num_samples : int
        Rows that the engine uses at most.
    holdout : float
        Share of the rows that is to be left over for judging the correction, when there are enough of them.

    Returns
    -------
    int
        From 1 to `rows`.
    """
    kept = round(holdout * rows) if rows >= _DIVIDED_FROM else 0
    return max(1, min(num_samples, rows - kept))


def quantize_and_correct(
    params: Mapping[str, Any],
    reference: nn.Module,
    record: CalibrationRecord,
    quantize_base: Callable[[], nn.Module] | None,
    session: TuningSession | None = None,
    detail: str = "",
) -> CorrectedModule:
    """One trial: quantize (by the engine or the host), run, fit, append.

    Parameters
    ----------
    params : mapping
        A configuration without lists.
    reference : torch.nn.Module
        The full-precision model.
    record : CalibrationRecord
        The calibration calls, and its logits over them.
    quantize_base : callable, optional
        Quantizes with the host's algorithm; None runs the plugin's own engine on `reference`.
    session : TuningSession, optional
        Where quantized models are kept for other trials.
    detail : str
        What else decides the quantized model, when `params` does not say everything.

    Returns
    -------
    CorrectedModule
        With ``config`` (the configuration in full) and ``report`` (the engine's, or None).
    """
    session = session if session is not None else TuningSession()
    winner, session.winner = session.winner, None  # handed out once: whoever gets it may change it
    if winner is not None and winner.config == dict(params):
        _log.info("the best trial's model is kept as it was scored")
        return winner
    title = f"{session.label} {describe(params)}".strip()
    key = quantization_key(params) + detail
    with TrialProgress(title, total=_ENGINE_STEPS + len(record.calls)) as progress:

        def show(news: Progress) -> None:
            progress.show(news, _ENGINE_STEPS)

        def make() -> _Quantized:
            progress.stage("quantize")
            if quantize_base is None:
                from cat_plugin.ptq import quantize

                module: nn.Module
                spec = make_spec(params)
                share = rows_for_engine(record.rows, spec.num_samples, params.get("holdout", 0.0))
                spec = dataclasses.replace(spec, num_samples=share)
                with evaluating(reference):
                    module, engine_report = (current_watch().engine or quantize)(
                        reference, spec, record.calls, progress=show, resume=_state_of(key)
                    )
                report: dict[str, Any] | None = engine_report.to_dict()
                # It takes the first rows of what it is given.
                tuned = engine_report.num_samples
            else:
                # What the host did with which rows is not known; most of its algorithms use them for ranges only.
                module, report, tuned = quantize_base(), None, 0
            progress.reach(_ENGINE_STEPS)
            progress.stage("calibrate")
            z_q = None
            if record.logits is not None:
                wanted, seed = LogitsOf.of(params), params.get("seed", 0)
                z_q = collect_logits(module, record.calls, "quantized", progress, logits=wanted, seed=seed)
            return _Quantized(module, z_q, report, tuned)

        quantized = session.quantized(key, make)
        progress.stage("fit")
        corrected = _corrected(quantized, record, params)
    corrected.config = dict(params)
    corrected.report = quantized.report
    session.last = corrected
    return corrected


def _corrected(
    quantized: _Quantized, record: CalibrationRecord, params: Mapping[str, Any]
) -> CorrectedModule:
    if record.logits is None or quantized.logits is None:
        note = (
            "the correction was left out: the model does not return one tensor of logits (N, C); logits names the output to "
            "correct, and class_axis its axis of classes"
        )
        _log.warning("%s", note)
        if quantized.report is not None and note not in quantized.report["notes"]:
            quantized.report["notes"].append(note)
        return CorrectedModule(quantized.module, None)
    mask, rows = None, record.rows
    if quantized.tuned and rows - quantized.tuned >= _JUDGES:
        mask = np.arange(rows) < quantized.tuned
        _log.info(
            "the correction is judged on the %d of %d calibration rows that the engine was not given",
            rows - quantized.tuned,
            rows,
        )
    return fit_correction(quantized.module, quantized.logits, record.logits, make_estimator(params), mask)
