"""What a host's calibration function feeds the model, kept so that other models can be fed the same.

The calls have one owner. What a recipe was given is passed on as it is, by :class:`Replay`; only the calls of somebody
else's function are recorded, and their copies lie in one tensor, of which the engine gets a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cat_plugin.batches import ModelCall, gathered
from cat_plugin.calls import LogitRows, collect_logits, is_classifier
from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.logits import LogitsOf
from cat_plugin.models import evaluating, run_call

__all__ = ["CalibrationRecord", "InputRecorder", "Replay", "calibrated", "record_run"]


@dataclass
class CalibrationRecord:
    """What the calibration data were, and what the full-precision model makes of them.

    Attributes
    ----------
    calls : list of ModelCall
        The calibration data.
    logits : LogitRows or None
        Of the full-precision model; None where the model returns something else than logits (N, C), and nobody said which of its results are logits.
    """

    calls: list[ModelCall]
    logits: LogitRows | None

    @property
    def rows(self) -> int:
        """Samples in all."""
        return sum(call.rows for call in self.calls)


def calibrated(model: nn.Module, calls: list[ModelCall], params: Mapping[str, Any]) -> CalibrationRecord:
    """Run the full-precision model over the calibration calls.

    Parameters
    ----------
    model : torch.nn.Module
        In full precision.
    calls : list of ModelCall
        The calibration data.
    params : mapping
        A configuration: ``logits``, ``class_axis``, ``seed``, and ``base``, with which there must be something to correct.

    Returns
    -------
    CalibrationRecord
    """
    wanted = LogitsOf.of(params)
    if not wanted.given and params.get("base") is None and calls:
        with torch.no_grad(), evaluating(model):
            output = run_call(model, calls[0].first(1), "calibration batch 0", "full-precision")
        if not is_classifier(output):
            return CalibrationRecord(calls, None)
    seed = params.get("seed", 0)
    return CalibrationRecord(calls, collect_logits(model, calls, "full-precision", logits=wanted, seed=seed))


class Replay:
    """The calibration function of whoever holds the calls already: nothing of it needs to be recorded.

    Parameters
    ----------
    calls : list of ModelCall
        Each is run once.
    """

    def __init__(self, calls: list[ModelCall]) -> None:
        self.calls = calls

    def __call__(self, model: nn.Module) -> None:
        for call in self.calls:
            model(*call.args, **call.kwargs)


class InputRecorder:
    """A forward pre-hook that keeps the arguments of every call of a module.

    Copies of the module made by ``copy.deepcopy`` share the recorder, so that nothing is lost when a
    host copies a model between preparation and conversion.
    """

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: loaders may fill one buffer again and again.
        self.calls.append(ModelCall(args, kwargs).copied())

    def __deepcopy__(self, memo: dict[int, Any]) -> InputRecorder:
        return self

    def attach(self, module: nn.Module) -> None:
        """Record the calls of `module` from now on."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self, module: nn.Module) -> None:
        """Record no more; also works on a copy of the module that it was attached to."""
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def record_run(model: nn.Module, run_fn: Callable[..., Any], run_args: Any = None) -> list[ModelCall]:
    """Let a calibration function run a model, and keep the inputs.

    Parameters
    ----------
    model : torch.nn.Module
        The full-precision model.
    run_fn : callable
        The host's calibration function: ``run_fn(model)`` or ``run_fn(model, *run_args)``. A :class:`Replay` is not
        run: its calls are taken over.
    run_args : sequence, optional
        Its further arguments.

    Returns
    -------
    list of ModelCall

    Raises
    ------
    CalibrationError
        When `run_fn` never calls the model.
    """
    if not callable(run_fn):
        raise CATTypeError(
            f"run_fn is a {type(run_fn).__name__}; expected a function that runs the model it is given"
        )
    if isinstance(run_fn, Replay):
        return run_fn.calls
    recorder = InputRecorder()
    recorder.attach(model)
    try:
        with torch.no_grad(), evaluating(model):
            run_fn(model, *run_args) if run_args else run_fn(model)
    finally:
        recorder.detach(model)
    if not sum(call.rows for call in recorder.calls):
        raise CalibrationError(
            "run_fn did not run the model on any sample, so there is nothing to calibrate on; it must call the model "
            "that it is given, once a batch (a generator that was read before is empty the second time)"
        )
    return gathered(recorder.calls)
