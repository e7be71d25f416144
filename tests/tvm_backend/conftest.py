"""One small compiled model that the tests of the library share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A W2 residual network with correction: (report, model, program)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tvm")
    import cat_plugin.graph.op  # noqa: F401
    import tvm_backend
    from tests.tvm_backend import qdq_models as models

    torch.manual_seed(0)
    model = models.QResNet(bits=2, width=16)
    program = models.exported(model, torch.randn(4, 3, 16, 16))
    out = tmp_path_factory.mktemp("library") / "model.so"
    return tvm_backend.compile(program, out=out, batch_sizes=(1,)), model, program


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(1).normal(size=(5, 3, 16, 16)).astype("float32")
