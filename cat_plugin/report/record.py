"""``report.json``: what is kept of a quantization so that it can be looked at later, and how it is read back.

Every part may be missing; a page made of it leaves the section out and says why.

``model``
    ``name``, ``parameters``.
``recipe``
    ``name`` and ``text`` of the file.
``config``, ``engine``
    The configuration in full, and the engine's report (:class:`cat_plugin.ptq.report.QuantReport`).
``tuning``
    ``baseline``, ``target``, ``samples``, ``source`` and the ``trials``.
``labels``
    How many of the tuning samples each model got right, and the ones that it is not unanimous about.
``sensitivity``
    Of :func:`cat_plugin.report.sensitivity.layer_sensitivity`, with the number of rows.
``clusters``
    Of :func:`cat_plugin.report.clusters.cluster_summary`.
``outliers``
    Of :func:`cat_plugin.report.outliers.outliers`, for models with layer norms.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import BundleError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from cat_plugin.graph.bundle import Bundle

__all__ = ["VERSION", "label_changes", "read_record"]

VERSION = 1
#: Samples whose classes are written down one by one.
_LISTED = 2000

IntArray = NDArray[np.integer[Any]]


def label_changes(
    labels: IntArray, classes: Mapping[str, IntArray], source: str = "", names: list[str] | None = None
) -> dict[str, Any]:
    """Compare what several models say of the same labelled samples.

    Parameters
    ----------
    labels : ndarray of shape (N,), int
        The right classes.
    classes : mapping of str to ndarray of shape (N,), int
        The class that each model gives: ``full``, ``quantized``, ``corrected``.
    source : str
        Where the samples come from.
    names : list of str, optional
        A name for each sample, such as its file.

    Returns
    -------
    dict
        JSON-able: ``samples``, ``source``, ``correct`` (for each model the number it got right), ``models``, ``changes``
        (for each pair of models how many samples went from wrong to right, from right to wrong, from one wrong class to
        another) and ``rows`` (number of the sample, right class, class by each model), which are the samples that the models
        disagree on, as many as are listed.
    """
    models = list(classes)
    table = np.stack([classes[model] for model in models], axis=1)
    differ = np.flatnonzero((table != table[:, :1]).any(1))
    changes: dict[str, Any] = {
        "samples": len(labels),
        "source": source,
        "correct": {model: int((classes[model] == labels).sum()) for model in models},
        "models": models,
        "differing": len(differ),
        "changes": {
            f"{before} {after}": _changes(labels, classes[before], classes[after])
            for before, after in itertools.combinations(models, 2)
        },
        "rows": [[int(i), int(labels[i]), *map(int, table[i])] for i in differ[:_LISTED]],
    }
    if names is not None:
        changes["names"] = {str(i): names[i] for i in differ[:_LISTED].tolist()}
    return changes


def _changes(labels: IntArray, before: IntArray, after: IntArray) -> list[int]:
    was, now = before == labels, after == labels
    kinds = (~was & now, was & ~now, ~was & ~now & (before != after))
    return [int(kind.sum()) for kind in kinds]


@functools.cache
def _form() -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    from cat_plugin.report.form import Record

    return TypeAdapter(Record)


def read_record(bundle: Bundle) -> dict[str, Any] | None:
    """The account in a bundle, with the form that this release expects.

    Parameters
    ----------
    bundle : Bundle
        Read and verified.

    Returns
    -------
    dict or None
        None when the bundle has none.

    Raises
    ------
    BundleError
        When it is damaged or of another form.
    """
    account = bundle.report()
    if account is None:
        return None
    from pydantic import ValidationError

    try:
        _form().validate_python(account, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the report"
        raise BundleError(
            f"{bundle.directory / 'report.json'}: {place} is not as expected ({first['msg'][:200]}); it was written by "
            "another release: export the model again"
        ) from error
    return account
