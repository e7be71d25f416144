"""Slopes and offsets, and what is enlarged."""

from __future__ import annotations

import numpy as np

from cat_plugin.report.svg.maps import slopes_and_offsets


def test_slopes_of_a_full_map_are_its_diagonal() -> None:
    weight = np.arange(2 * 3 * 5, dtype=float).reshape(2, 3, 5)
    gamma, beta = slopes_and_offsets({"weight": weight, "beta": np.zeros((2, 3))}) or (None, None)
    np.testing.assert_array_equal(gamma, [[0, 6, 12], [15, 21, 27]])  # type: ignore[arg-type]
    assert beta is not None
    assert slopes_and_offsets({"beta": np.zeros((2, 3))}) is None
    assert slopes_and_offsets({"gamma": np.full((2, 3), np.nan), "beta": np.zeros((2, 3))}) is None
