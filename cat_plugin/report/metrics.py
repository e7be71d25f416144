"""What a model is scored by: a function of logits and labels to a share of one, larger is better."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CATTypeError, CATValueError

__all__ = ["METRICS", "Metric", "load_metric", "macro_f1", "miou", "top1", "top5"]

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
Metric = Callable[[FloatArray, IntArray], float]

_IGNORED = 255


def _classes(logits: FloatArray, labels: IntArray) -> IntArray:
    """The class with the largest logit, in the shape of the labels."""
    found: IntArray = logits.argmax(1)
    if found.shape != labels.shape:
        raise CATValueError(
            f"the labels have shape {labels.shape} and the model's logits {logits.shape}; expected labels of shape "
            f"{found.shape}"
        )
    return found


def top1(logits: FloatArray, labels: IntArray) -> float:
    """Share of the samples whose largest logit is that of the right class.

    Parameters
    ----------
    logits : ndarray of shape (N, C)
        Of the model.
    labels : ndarray of shape (N,), int
        The right classes.
    """
    return float((_classes(logits, labels) == labels).mean())


def top5(logits: FloatArray, labels: IntArray) -> float:
    """Share of the samples whose right class is among the five largest logits; shapes as for :func:`top1`."""
    _classes(logits, labels)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return float((best == labels[:, None]).any(1).mean())


def macro_f1(logits: FloatArray, labels: IntArray) -> float:
    """Mean over classes of F1, ``2 TP / (2 TP + FP + FN)``; classes that are neither right nor given are left out.

    Shapes as for :func:`top1`.
    """
    given = _classes(logits, labels)
    scores = []
    for each in np.union1d(given, labels):
        hit = int(((given == each) & (labels == each)).sum())
        scores.append(2 * hit / (int((given == each).sum()) + int((labels == each).sum())))
    return float(np.mean(scores))


def miou(logits: FloatArray, labels: IntArray) -> float:
    """Mean over classes of intersection over union; classes that are neither right nor given are left out.

    Parameters
    ----------
    logits : ndarray of shape (N, C, H, W)
        Of every pixel.
    labels : ndarray of shape (N, H, W), int
        255 is a pixel that does not count.
    """
    given = _classes(logits, labels)
    counts = labels != _IGNORED
    given, labels = given[counts], labels[counts]
    scores = []
    for each in np.union1d(given, labels):
        both = int(((given == each) & (labels == each)).sum())
        scores.append(both / int(((given == each) | (labels == each)).sum()))
    return float(np.mean(scores)) if scores else float("nan")


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5, "macro_f1": macro_f1, "miou": miou}


def load_metric(name: str) -> Metric:
    """A metric by its name, or a function of the user's as ``module:function``.

    Parameters
    ----------
    name : str
        A key of :data:`METRICS`; or ``module:function``, the module looked for in the working directory first.  The
        function takes logits and labels as arrays and returns one number, larger is better.

    Raises
    ------
    CATValueError
        There is none of that name, or the module cannot be imported.
    CATTypeError
        It is not callable, or returns something that is no number.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise CATValueError(
            f"--metric {name!r} is none of {', '.join(METRICS)}, and not of the form module:function"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CATValueError(
            f"--metric {name!r} cannot be used: {error}; the module must be importable from {Path.cwd()}"
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise CATTypeError(f"--metric {name!r} is a {type(function).__name__}; expected a function")

    def scored(logits: FloatArray, labels: IntArray) -> float:
        value = function(logits, labels)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise CATTypeError(
                f"--metric {name!r} returned a {type(value).__name__}; expected one number, larger is better"
            ) from None

    return scored
