"""Fit a correction to rows in memory, to a stream of batches, or to streams on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from sklearn.utils import check_random_state

from cat_plugin.cluster_affine import validation
from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families import FAMILIES, Candidate, Problem
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.metrics import natural_temperature
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.selection import best_candidate, candidates, cross_validate
from cat_plugin.cluster_affine.sketch import RowSketch
from cat_plugin.cluster_affine.workbench import Workbench, collect, collector
from cat_plugin.errors import CATError

__all__ = ["LocalParty", "Party", "Plan", "Settings", "canonical", "fit_stream", "make_plan"]

_SORTED_COLUMNS: Final = 16
#: With as many rows of the sample in a cluster its centroid is known to a 32nd of the cluster's variance.
_ROWS_A_CENTROID: Final = 32


@dataclass(frozen=True)
class Settings:
    """The constructor's parameters, checked, with the seed drawn."""

    mode: str
    n_clusters: int
    alpha: float
    n_components: int | None
    seed: int

    @classmethod
    def of(cls, estimator: Any) -> Settings:
        """Check the parameters of an estimator and draw its seed."""
        validation.check_options(
            estimator.mode, estimator.n_clusters, estimator.alpha, estimator.n_components
        )
        drawn = estimator.random_state
        if not isinstance(drawn, (int, np.integer)):
            drawn = check_random_state(drawn).randint(np.iinfo(np.int32).max)
        d = None if estimator.n_components is None else int(estimator.n_components)
        return cls(estimator.mode, int(estimator.n_clusters), float(estimator.alpha), d, int(drawn))


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is decided before statistics are collected.

    Parameters
    ----------
    candidate : Candidate
        What is to be fitted.
    bench : Workbench
        Rows on which it was decided, with their clusters.
    results : dict or None
        Table of the cross-validation, in ``auto`` mode.
    best_index : int or None
        Row of that table.
    """

    candidate: Candidate
    bench: Workbench
    results: dict[str, Any] | None = None
    best_index: int | None = None

    def fit(self) -> AffineParameters:
        """Fit to the rows on which the plan was made."""
        return self.bench.fit(self.candidate)

    def problem(self, geometry: Geometry | None = None) -> Problem:
        """Return what a fit to more rows starts from, with the clusters of the plan or with others."""
        return self.bench.problem(self.candidate, geometry)

    def fitted_rows(self, batch: Rows) -> Rows:
        """Return the rows of a batch that the fit uses."""
        if batch.tuned is None or self.candidate.tuned_rows:
            return batch
        return batch.take(~batch.tuned)


class Party(Protocol):
    """One of the processes that fit together."""

    def total(self, array: FloatArray) -> FloatArray:
        """Return the sum of an array over all processes."""

    def gather(self, sketch: RowSketch) -> RowSketch:
        """Return the union of the sketches of all processes, in the order of their ranks."""

    def agree(self, array: FloatArray) -> FloatArray:
        """Return the first process's value of an array."""

    def widest(self, width: int) -> int:
        """Return the largest of the processes' numbers."""

    def settle(self, failure: CATError | None) -> None:
        """Raise on every process if reading failed on one of them."""


class LocalParty:
    """The only process there is."""

    def total(self, array: FloatArray) -> FloatArray:
        """Return the array."""
        return array

    def gather(self, sketch: RowSketch) -> RowSketch:
        """Return the sketch."""
        return sketch

    def agree(self, array: FloatArray) -> FloatArray:
        """Return the array."""
        return array

    def widest(self, width: int) -> int:
        """Return the number."""
        return width

    def settle(self, failure: CATError | None) -> None:
        """Raise the failure, if there is one."""
        if failure is not None:
            raise failure


def canonical(rows: Rows) -> Rows:
    """Sort rows by content, so that the order in which they came changes nothing.

    Sorting by value, and not by a hash, also survives a common positive factor.
    """
    blocks = [rows.z_q, rows.z_fp] + ([] if rows.features is None else [rows.features])
    # Rows that agree in these columns and differ elsewhere do not occur; sorting by all would cost memory.
    keys = [column for block in reversed(blocks) for column in block.T[:_SORTED_COLUMNS][::-1]]
    return rows.take(np.lexsort(keys))


def make_plan(rows: Rows, settings: Settings, party: Party | None = None) -> Plan:
    """Decide what to fit, in ``auto`` mode by cross-validation.

    Parameters
    ----------
    rows : Rows
        The sample.
    settings : Settings
        What the user asked for.
    party : Party, optional
        Other processes that plan with the same rows; the first one's choice stands.

    Returns
    -------
    Plan
    """
    n, classes = rows.z_q.shape
    clusters = min(settings.n_clusters, n)
    family = FAMILIES.get(settings.mode)
    if family is None or family.sorts_rows:
        rows = canonical(rows)
    rows = rows.widened()
    unit = natural_temperature(rows.z_fp)
    if family is not None:
        candidate = family.candidate(clusters, settings.n_components, settings.alpha, classes)
        return Plan(candidate, Workbench(rows, settings.seed, unit, family.n_init))
    listed = candidates(rows, clusters, settings.alpha, settings.n_components)
    results = cross_validate(rows, listed, settings.seed)
    best = best_candidate(results)
    if party is not None:
        best = int(party.agree(np.array([float(best)]))[0])
    chosen = listed[best]
    if not chosen.tuned_rows and rows.tuned is not None:
        rows = rows.take(~rows.tuned)
    return Plan(chosen, Workbench(rows, settings.seed, unit), results, best)


def fit_stream(
    batches: Callable[[], Iterable[Rows]], settings: Settings, limit: int, party: Party | None = None
) -> tuple[AffineParameters, Plan, int]:
    """Fit to batches that can be read several times, in memory that does not grow with their number.

    One pass draws the sample on which clusters are found and candidates compared.  Where it holds every row,
    that is all.  Otherwise a second pass collects the statistics of the map; where the sample holds few rows for each
    cluster, the centroids are moved to the means of all their rows before, in a pass of their own.

    Parameters
    ----------
    batches : callable
        Returns an iterable over this process's batches, the same at every call.
    settings : Settings
        What the user asked for.
    limit : int
        Most rows of the sample.
    party : Party, optional
        The other processes.

    Returns
    -------
    parameters : AffineParameters
    plan : Plan
        What was decided on the way.
    n_rows : int
        Rows of all processes.
    """
    party = party or LocalParty()
    sketch = RowSketch(limit)
    failure: CATError | None = None
    try:
        for batch in batches():
            sketch.add(batch)
    except CATError as error:
        # Not raised here: other processes would wait for this one for ever.
        failure = error
    party.settle(failure)
    sketch = party.gather(sketch)
    whole, seen, rows = sketch.complete, sketch.seen, sketch.rows()
    del sketch
    plan = make_plan(rows, settings, party)
    del rows
    if whole:
        return plan.fit(), plan, seen

    geometry = plan.problem().geometry
    geometry = Geometry(*(party.agree(a) for a in (geometry.mean, geometry.components, geometry.centroids)))
    if len(plan.bench.rows) < _ROWS_A_CENTROID * geometry.n_clusters:
        geometry = _moved(geometry, batches, party)
    problem = plan.problem(geometry)
    accumulator = collector(problem)
    for batch in batches():
        collect(accumulator, problem, plan.fitted_rows(batch))
    statistics = accumulator.result().reduced(party.total)
    return plan.bench.build(problem, statistics), plan, seen


def _moved(geometry: Geometry, batches: Callable[[], Iterable[Rows]], party: Party) -> Geometry:
    """Move each centroid to the mean of all rows that are nearest to it: one batch step of k-means."""
    count: FloatArray = np.zeros(geometry.centroids.shape[0])
    drift: FloatArray = np.zeros_like(geometry.centroids)
    for batch in batches():
        position, label = geometry.assign(batch.z_q)
        offset = position.astype(np.float64, copy=False) - geometry.centroids[label]
        member = np.zeros((len(batch), count.size), dtype=offset.dtype)
        member[np.arange(len(batch)), label] = 1.0
        drift += member.T @ offset
        count += np.bincount(label, minlength=count.size)
    count, drift = party.total(count), party.total(drift)
    centroids = geometry.centroids + drift / np.maximum(count, 1.0)[:, None]
    return Geometry(geometry.mean, geometry.components, centroids)
