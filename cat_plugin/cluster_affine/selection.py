"""Choose between corrections by cross-validation on calibration rows alone, without labels."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine.families import FAMILIES, Budget, Candidate
from cat_plugin.cluster_affine.metrics import agreement, divergence, natural_temperature, softmax
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.workbench import Workbench

__all__ = ["best_candidate", "candidates", "cross_validate", "fold_of_rows"]

#: Divergences are compared at this temperature, in units of the spread of the full-precision logits.
SCORE_TEMPERATURE: Final = 0.3
N_FOLDS: Final = 5
#: Place of the candidate that changes nothing.
_IDENTITY: Final = 0
_LEVEL: Final = 1e-9


def candidates(rows: Rows, n_clusters: int, alpha: float, n_components: int | None) -> list[Candidate]:
    """List what is worth trying on these rows, the identity first.

    Parameters
    ----------
    rows : Rows
        Rows at hand; their number and width decide what can be afforded.
    n_clusters : int
        Upper bound of K.
    alpha : float
        Blending factor tried beside a few others.
    n_components : int or None
        Principal components for clustering; None: several are tried.

    Returns
    -------
    list of Candidate
    """
    n, classes = rows.z_q.shape
    fresh = n if rows.tuned is None else max(1, int((~rows.tuned).sum()))
    train = max(1, (min(n, 5 * fresh) * (N_FOLDS - 1)) // N_FOLDS)
    budget = Budget(classes, rows.n_features, train, n_clusters, n_components, alpha)
    families = sorted(FAMILIES.values(), key=lambda family: family.precedence)
    made = [candidate for family in families for candidate in family.candidates(budget)]
    if rows.tuned is not None and rows.tuned.any() and not rows.tuned.all():
        made += [replace(candidate, tuned_rows=False) for candidate in made[1:]]
    return made


def fold_of_rows(rows: Rows, seed: int) -> NDArray[np.intp]:
    """Deal rows, or whole groups of rows, to folds.

    Parameters
    ----------
    rows : Rows
        With their groups, and with what the quantizer was tuned on.
    seed : int
        Seed of the shuffle.

    Returns
    -------
    ndarray of shape (N,), intp
        Fold of each row; -1 for rows that are never held out (those the quantizer was tuned on).
    """
    n = len(rows)
    held_out = np.ones(n, dtype=bool)
    if rows.tuned is not None and not rows.tuned.all():
        held_out = ~rows.tuned
    fold = np.full(n, -1, dtype=np.intp)
    generator = np.random.default_rng(seed)
    if rows.groups is None:
        index = np.flatnonzero(held_out)
        folds = min(N_FOLDS, index.size)
        if folds >= 2:
            fold[index[generator.permutation(index.size)]] = np.arange(index.size) % folds
        return fold
    _, group, size = np.unique(rows.groups[held_out], return_inverse=True, return_counts=True)
    folds = min(N_FOLDS, size.size)
    if folds < 2:
        return fold
    # Largest first, each to the emptiest fold; the shuffle decides between groups of one size.
    order = generator.permutation(size.size)
    order = order[np.argsort(-size[order], kind="stable")]
    load, home = np.zeros(folds), np.empty(size.size, dtype=np.intp)
    for g in order:
        home[g] = int(np.argmin(load))
        load[home[g]] += size[g]
    fold[held_out] = home[group]
    return fold


def _groups_of_maps(listed: list[Candidate]) -> dict[Candidate, list[int]]:
    """Candidates that differ in alpha only share a map."""
    shared: dict[Candidate, list[int]] = {}
    for index, candidate in enumerate(listed):
        shared.setdefault(replace(candidate, alpha=1.0), []).append(index)
    return shared


def cross_validate(rows: Rows, listed: list[Candidate], seed: int) -> dict[str, Any]:
    """Score every candidate on held-out folds.

    Parameters
    ----------
    rows : Rows
        The sample.
    listed : list of Candidate
        What :func:`candidates` returned.
    seed : int
        Seed of the folds and of k-means.

    Returns
    -------
    dict
        In the layout of scikit-learn's ``cv_results_``: ``params`` and ``param_*``, and for each of the metrics
        ``kl``, ``agreement``, ``confidence`` and ``mse`` the arrays ``split{i}_test_*``, ``mean_test_*`` and
        ``std_test_*``.
    """
    fold = fold_of_rows(rows, seed)
    count = int(fold.max()) + 1
    names = ("kl", "agreement", "confidence", "mse")
    unit = natural_temperature(rows.z_fp)
    table = np.full((len(names), max(count, 1), len(listed)), np.nan)
    weights = np.array([float((fold == i).sum()) for i in range(max(count, 1))])
    for split in range(count):
        test = rows.take(fold == split)
        away = fold != split
        if rows.groups is not None and test.groups is not None:
            away &= ~np.isin(rows.groups, np.unique(test.groups))
        for tuned_rows in sorted({c.tuned_rows for c in listed}):
            mine = away if tuned_rows or rows.tuned is None else away & ~rows.tuned
            bench = Workbench(rows.take(mine), seed, unit)
            for head, members in _groups_of_maps(listed).items():
                if head.tuned_rows != tuned_rows:
                    continue
                fitted = bench.fit(head)
                for index in members:
                    table[:, split, index] = _judge(fitted, listed[index].alpha, test, unit)
    weights = weights / max(weights.sum(), 1.0)
    results: dict[str, Any] = {"params": [asdict(c) for c in listed]}
    for key in asdict(listed[0]):
        results[f"param_{key}"] = np.array([asdict(c)[key] for c in listed], dtype=object)
    for name, values in zip(names, table, strict=True):
        for split in range(count):
            results[f"split{split}_test_{name}"] = values[split]
        mean = weights @ values
        results[f"mean_test_{name}"] = mean
        results[f"std_test_{name}"] = np.sqrt(weights @ (values - mean) ** 2)
    return results


def _judge(fitted: AffineParameters, alpha: float, test: Rows, unit: float) -> tuple[float, ...]:
    inputs = test.inputs()[:, : fitted.mean.shape[0]]
    z = fitted.replace(alpha=alpha).apply(inputs)
    temperature = SCORE_TEMPERATURE * unit
    same = agreement(test.z_fp, z)
    distance = divergence(test.z_fp, z, temperature)
    confidence = softmax(test.z_fp / temperature)[np.arange(len(test)), z.argmax(axis=1)]
    return (
        float(distance.mean()),
        float(same.mean()),
        float(confidence.mean()),
        float(np.mean((z - test.z_fp) ** 2)),
    )


def best_candidate(results: dict[str, Any]) -> int:
    """Return the index of the winner and add the ranking to the table.

    A candidate that is worse than the identity on the rows held out, in divergence or in agreement, is out.
    """
    agree, kl, mse = (results[f"mean_test_{name}"] for name in ("agreement", "kl", "mse"))
    if not np.isfinite(mse).all():
        # Too few rows to hold any out: nothing is known, so nothing is changed.
        score = np.where(np.arange(len(mse)) == _IDENTITY, 0.0, -np.inf)
    elif kl.max() == 0.0:
        # One class only: every distribution is the same, what is left to judge by is the logit.
        score = -mse
    else:
        score = np.where((agree >= agree[_IDENTITY]) & (kl <= kl[_IDENTITY]), -kl, -np.inf)
    results["mean_test_score"] = score
    # Maps that are the same but for rounding (a cluster's shrunk onto the global one) are level: the first,
    # which is the simplest, wins.
    best = score.max()
    level = np.where(score >= best - _LEVEL * abs(best), best, score)
    order = np.argsort(-level, kind="stable")
    rank = np.empty(len(score), dtype=np.int32)
    rank[order] = np.arange(1, len(score) + 1)
    results["rank_test_score"] = rank
    return int(order[0])
