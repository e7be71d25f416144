"""No correction: what every other candidate has to be better than."""

from __future__ import annotations

import numpy as np

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families.diagonal import DIAGONAL
from cat_plugin.cluster_affine.families.family import Budget, Candidate, Family, Problem
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.statistics import ClusterStatistics

__all__ = ["Identity"]


class Identity(Family):
    """Leave the logits as they are."""

    name = "identity"
    map = DIAGONAL
    is_mode = False
    precedence = 0

    def candidates(self, budget: Budget) -> list[Candidate]:
        """Return the one candidate."""
        return [Candidate(self.name, alpha=0.0)]

    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return one cluster with slopes of one."""
        classes = statistics.mean_fp.shape[1]
        single = Geometry(np.zeros(classes), np.zeros((0, classes)), np.zeros((1, classes)))
        return single, {"gamma": np.ones((1, classes)), "beta": np.zeros((1, classes))}
