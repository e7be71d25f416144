"""Fixtures that several rooms share: a trained network on real digits, and its splits."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from examples.digits.model import DigitsResNet, Split

# The same examples in every run: a failure that comes and goes teaches nobody anything.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing compiled by an earlier run answers for this one."""
    os.environ["CAT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits_split() -> Split:
    pytest.importorskip("torch", reason="torch is not installed")
    from examples.digits.model import load_split

    return load_split()


@pytest.fixture(scope="session")
def digits_network(digits_split: Split) -> DigitsResNet:
    """The example's network after a short training: above 95 % top-1, seconds to make."""
    from examples.digits.model import train

    return train(digits_split, epochs=12)


@pytest.fixture(scope="session")
def digits_corrected(digits_network: DigitsResNet, digits_split: Split) -> Any:
    """The network at W2A2 by the engine's quickest preset, with a correction appended."""
    from cat_plugin import correct
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.ptq import QuantSpec, quantize

    calibration = digits_split.calibration[0].split(64)
    quantized, _ = quantize(digits_network, QuantSpec(w_bits=2, a_bits=2, preset="fast"), calibration)
    estimator = ClusterAffine(mode="diagonal", n_clusters=8, n_components=4, random_state=0)
    return correct(quantized, digits_network, calibration, estimator)
