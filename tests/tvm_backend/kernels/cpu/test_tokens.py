"""Tokens on grids of their own against numpy, and what becomes of numbers that are none."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.target import Target

from tests.tvm_backend.kernels.tools import TARGETS, check, execute
from tvm_backend.kernels.cpu.tokens import reference
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import TokensSpec


def tokens(features: int) -> np.ndarray:
    rng = np.random.default_rng(features)
    data = (rng.normal(size=(7, features)) * np.logspace(-3, 3, 7)[:, None]).astype(np.float32)
    data[1], data[2] = np.abs(data[1]), -np.abs(data[2])  # 0 is among the values of every grid
    data[3] = 0
    return data


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", [1, 23, 200])
@pytest.mark.parametrize(("qmax", "share", "real"), [(255, 1.0, False), (15, 0.9, False), (15, 0.85, True)])
def test_every_token_has_its_grid_to_the_bit(target, features, qmax, share, real):
    spec, data = TokensSpec(None, features, qmax, share, real), tokens(features)
    check(spec, target, [data], reference(spec, data))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(target, bad):
    spec, data = TokensSpec(3, 41, 255), tokens(41)[4:7]
    data[1, 17] = bad
    machine = Target(TARGETS[target])
    blank = [np.zeros((3, 41), np.uint8), np.zeros((3, 2), np.float32)]
    _, grid = execute(lower(spec, machine), machine, [data], blank)
    assert list(np.isnan(grid[:, 0])) == [False, True, False]
