"""Fixtures that several rooms share: a trained network on real digits, and its splits."""

from __future__ import annotations

import fnmatch
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
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


#: What test files need beside the package's own dependencies.  Where it is missing they are skipped, with the reason.
_NEEDS: dict[str, tuple[str, ...]] = {
    "benchmarks/*": ("torch",),
    "cli/test_benchmark.py": ("neural_compressor",),
    "cli/test_compile.py": ("neural_compressor",),
    "cli/test_doctor.py": ("neural_compressor",),
    "cli/test_evaluate.py": ("neural_compressor",),
    "cli/test_inspect.py": ("neural_compressor",),
    "cli/test_main.py": ("neural_compressor",),
    "cli/test_models.py": ("torch",),
    "cli/test_places.py": ("neural_compressor",),
    "cli/test_quantize*.py": ("neural_compressor",),
    "cli/test_report.py": ("neural_compressor",),
    "cli/test_run.py": ("neural_compressor",),
    "cli/test_sensitivity.py": ("neural_compressor",),
    "cli/test_timing.py": ("neural_compressor",),
    "fuzz/test_readers.py": ("torch",),
    "test_demo.py": ("neural_compressor", "tvm"),
    "test_examples.py": ("torch", "neural_compressor.torch", "tvm"),
    "test_no_space.py": ("torch",),
    "test_outputs.py": ("torch",),
    "test_torch_compat.py": ("torch",),
    "tvm_backend/kernels/*": ("tvm",),
    "tvm_backend/passes/*": ("tvm",),
    "tvm_backend/test_*.py": ("tvm",),
    "tvm_backend/passes/test_networks.py": ("torch",),
    "tvm_backend/test_bundles.py": ("torch",),
    "tvm_backend/test_cpp_example.py": ("torch",),
    "tvm_backend/test_cuda_model.py": ("torch",),
    "tvm_backend/test_graphs.py": ("torch",),
    "tvm_backend/test_inverted_residuals.py": ("torch",),
    "tvm_backend/test_library.py": ("torch",),
    "tvm_backend/test_neural_compressor.py": ("torch", "neural_compressor.torch"),
    "tvm_backend/test_outputs.py": ("torch",),
    "tvm_backend/test_runtime.py": ("torch",),
    "tvm_backend/test_zoo.py": ("torch",),
    "zoo/*": ("torch",),
}


def _missing(path: Path) -> str | None:
    """The first package that the test file needs and that is not installed."""
    place = path.relative_to(Path(__file__).parent).as_posix()
    needs = (name for pattern, names in _NEEDS.items() if fnmatch.fnmatch(place, pattern) for name in names)
    return next((name for name in needs if not _installed(name)), None)


def _installed(name: str) -> bool:
    package, _, rest = name.partition(".")
    return importlib.util.find_spec(package) is not None and (
        not rest or importlib.util.find_spec(name) is not None
    )


class _Skipped(pytest.Module):
    """A test file that is not even imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(f"{_missing(self.path)} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if Path(__file__).parent in module_path.parents and _missing(module_path):
        return _Skipped.from_parent(parent, path=module_path)
    return None


def pytest_collection_finish() -> None:
    """Python's search for garbage took a tenth of the suite's time: what was imported stays, and is not searched again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


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


@pytest.fixture(scope="session")
def digits_library(
    digits_corrected: Any, digits_split: Split, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The corrected network as a compiled library."""
    pytest.importorskip("tvm", reason="TVM is not installed")
    import cat_plugin
    import tvm_backend

    folder = tmp_path_factory.mktemp("library")
    bundle = cat_plugin.export_bundle(digits_corrected, digits_split.test[0][:2], folder / "bundle")
    tvm_backend.compile(bundle, out=folder / "model.so")
    return folder / "model.so"
