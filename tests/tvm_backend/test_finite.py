"""NaN and infinite inputs: the same in PyTorch and in the library, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tvm_backend
from cat_plugin.errors import LibraryError
from tests.tvm_backend import qdq_models as models


class Head(torch.nn.Module):
    """A linear layer on input that is quantized to the grid asked for."""

    def __init__(self, signed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.fc = models.Quantize(8, signed), models.QLinear(torch.nn.Linear(40, 3), 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.q(x))


@pytest.mark.parametrize("signed", [False, True])
def test_the_library_makes_of_them_what_pytorch_makes(signed, tmp_path) -> None:
    x = torch.randn(16, 40)
    module = Head(signed)
    report = tvm_backend.compile(models.exported(module, x + 0.3), out=tmp_path / "model.so", cache=False)
    x[1, ::3], x[2, 5:], x[3, :], x[4, ::2] = torch.nan, torch.inf, torch.nan, -torch.inf
    with torch.no_grad():
        wanted = module(x).numpy()
    assert module.q.zero_point != 0  # so that integer 0 is not the number 0
    found = tvm_backend.load(report.path)(x.numpy())
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_check_finite_names_input_and_row(compiled, images) -> None:
    library = tvm_backend.load(compiled[0].path, check_finite=True)
    np.testing.assert_array_equal(library(images), tvm_backend.load(compiled[0].path)(images))
    for value in (np.nan, np.inf):
        spoilt = images.copy()
        spoilt[2, ..., 0] = value
        for given in (spoilt, torch.from_numpy(spoilt)):
            with pytest.raises(LibraryError, match=r"input '\w+' holds a NaN or an infinity.* in row 2;"):
                library(given)
