"""Choose between corrections by cross-validation on calibration rows alone, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families import FAMILIES, Budget, Candidate
from cat_plugin.cluster_affine.metrics import agreement, divergence, natural_temperature, softmax
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.workbench import Workbench

__all__ = ["best_candidate", "candidates", "cross_validate", "fold_of_rows", "in_words"]

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
        ``std_test_*``, and ``error_test_*``, the standard error of the mean's difference from the identity's.
    """
    fold = fold_of_rows(rows, seed)
    count = int(fold.max()) + 1
    names = ("kl", "agreement", "confidence", "mse")
    unit = natural_temperature(rows.z_fp)
    table = np.full((len(names), max(count, 1), len(listed)), np.nan)
    groups = np.arange(len(rows)) if rows.groups is None else np.unique(rows.groups, return_inverse=True)[1]
    change = np.zeros((len(names), len(listed), int(groups.max(initial=-1)) + 1))
    weights = np.array([float((fold == i).sum()) for i in range(max(count, 1))])
    for split in range(count):
        test, home = rows.take(fold == split), groups[fold == split]
        unchanged = _judge(test.z_q, test, unit)
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
                inputs = test.inputs()[:, : fitted.mean.shape[0]]
                for index in members:
                    scores = _judge(fitted.replace(alpha=listed[index].alpha).apply(inputs), test, unit)
                    table[:, split, index] = scores.mean(axis=1)
                    for metric, difference in enumerate(scores - unchanged):
                        change[metric, index] += np.bincount(home, difference, minlength=change.shape[2])
    weights = weights / max(weights.sum(), 1.0)
    results: dict[str, Any] = {"params": [asdict(c) for c in listed]}
    for key in asdict(listed[0]):
        results[f"param_{key}"] = np.array([asdict(c)[key] for c in listed], dtype=object)
    for name, values, sums in zip(names, table, change, strict=True):
        for split in range(count):
            results[f"split{split}_test_{name}"] = values[split]
        mean = weights @ values
        results[f"mean_test_{name}"] = mean
        results[f"std_test_{name}"] = np.sqrt(weights @ (values - mean) ** 2)
        results[f"error_test_{name}"] = _standard_error(sums, groups[fold >= 0])
    return results


def _standard_error(sums: NDArray[np.float64], groups: NDArray[np.intp]) -> NDArray[np.float64]:
    """Of the mean over rows of differences whose sums over groups are given, (candidates, groups); groups are independent."""
    sizes = np.bincount(groups, minlength=sums.shape[1])
    held_out = np.flatnonzero(sizes)
    count = len(held_out)
    if count < 2:
        return np.full(len(sums), np.inf)
    mean = sums.sum(axis=1, keepdims=True) / len(groups)
    apart = sums[:, held_out] - mean * sizes[held_out]
    error: NDArray[np.float64] = np.sqrt((apart**2).sum(axis=1) * count / (count - 1)) / len(groups)
    return error


def _judge(z: FloatArray, test: Rows, unit: float) -> FloatArray:
    """(metrics, rows) scores of logits."""
    temperature = SCORE_TEMPERATURE * unit
    confidence = softmax(test.z_fp / temperature)[np.arange(len(test)), z.argmax(axis=1)]
    scores: FloatArray = np.stack(
        [
            divergence(test.z_fp, z, temperature),
            agreement(test.z_fp, z).astype(np.float64),
            confidence,
            np.mean((z - test.z_fp) ** 2, axis=1),
        ]
    )
    return scores


def best_candidate(results: dict[str, Any]) -> int:
    """Return the index of the winner and add the ranking to the table.

    A candidate must bring the rows held out closer to full precision than the identity does, by more than the standard error
    of that gain, and choose no worse classes: neither fewer of full precision's, nor less likely ones.
    """
    agree, kl, sure, mse = (results[f"mean_test_{name}"] for name in ("agreement", "kl", "confidence", "mse"))
    error = results["error_test_kl"]
    if not np.isfinite(mse).all():
        # Too few rows to hold any out: nothing is known, so nothing is changed.
        score = np.where(np.arange(len(mse)) == _IDENTITY, 0.0, -np.inf)
    elif kl.max() == 0.0:
        # One class only: every distribution is the same, what is left to judge by is the logit.
        score = -mse
    else:
        kept = (kl[_IDENTITY] - kl > error) & (agree >= agree[_IDENTITY]) & (sure >= sure[_IDENTITY])
        kept[_IDENTITY] = True
        score = np.where(kept, -kl, -np.inf)
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


def in_words(chosen: Mapping[str, Any]) -> str:
    """What was chosen, for a log."""
    if chosen["family"] == "identity":
        return "none, as no map gained on rows held out"
    return f"{chosen['family']}, {chosen['n_clusters']} clusters, alpha {chosen['alpha']:g}"
