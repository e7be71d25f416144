"""Large batches in pieces: the same numbers, in the memory of a few hundred rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
import tvm_backend
from cat_plugin.ptq import QuantSpec, quantize
from tests.tvm_backend.alone import alone
from tvm_backend.pieces import rows_at_once, splits


@pytest.fixture
def library(compiled):
    return tvm_backend.load(compiled[0].path)


def rows(number):
    return np.random.default_rng(0).standard_normal((number, 3, 16, 16)).astype("float32")


def test_the_same_numbers_whatever_the_pieces(library):
    many = rows(70)
    whole = library(many)
    library._rows = 16
    np.testing.assert_array_equal(library(many), whole)
    np.testing.assert_array_equal(library(np.asfortranarray(many)), whole)
    from_torch = library(torch.from_numpy(many))
    assert type(from_torch) is torch.Tensor
    np.testing.assert_array_equal(from_torch.numpy(), whole)


WATCHED = """
import sys
import numpy as np
import tvm_backend

library = tvm_backend.load(sys.argv[1])
many = np.random.default_rng(0).standard_normal((4096, 3, 16, 16)).astype("float32")
library(many[:300])
before, seen, run = resident(), [], library._run

def watched(*args):
    result = run(*args)
    seen.append(resident())
    return result

library._run = watched
library(many)
print(len(seen), max(seen) - before, resident() - before)
"""


def test_memory_is_that_of_a_piece_and_given_back(compiled):
    pieces, most, after = map(int, alone(WATCHED, compiled[0].path))
    assert pieces > 1
    # A piece's own: nine layers' results of 256 rows, where 4096 rows take sixteen times that.
    assert most < 100 * 2**20
    assert after < 10 * 2**20


def test_many_batch_sizes_do_not_pile_up(library, monkeypatch):
    released = []
    monkeypatch.setattr(library, "release", lambda: (released.append(1), library._sizes.clear()))
    for number in range(2, 40):
        library(rows(number))
    assert len(released) == 2


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ([["batch", 3, 8, 8]], [["batch", 10]], True),
        ([["batch", 4], ["batch", 5]], [["batch", 10], ["batch", 2]], True),
        ([[1, 3, 8, 8]], [[1, 10]], False),
        ([["batch", "length"]], [["batch", 10]], False),
        ([["batch", 4]], [[10]], False),
        ([["batch", 4], ["other", 4]], [["batch", 10]], False),
    ],
)
def test_only_models_of_rows_are_cut(inputs, outputs, expected):
    manifest = {
        key: [{"shape": shape} for shape in shapes]
        for key, shapes in (("inputs", inputs), ("outputs", outputs))
    }
    assert splits({**manifest, "independent_rows": True}) == expected
    assert not splits(manifest)  # nobody has looked whether rows depend on each other


class CentredOverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x).relu().mean((2, 3))
        return y - y.mean(0, keepdim=True)


def test_batches_of_rows_that_depend_on_each_other_are_run_whole(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(300, 3, 6, 6) + torch.arange(300).reshape(-1, 1, 1, 1) / 100
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32)
    model, _ = quantize(CentredOverTheBatch().eval(), spec, [x[:32]])
    bundle = cat_plugin.export_bundle(model, x[:6], tmp_path / "bundle")
    library = tvm_backend.load(tvm_backend.compile(bundle, out=tmp_path / "model.so").path)
    assert library.manifest["independent_rows"] is False
    with torch.no_grad():
        np.testing.assert_allclose(library(x.numpy()), model(x).numpy(), rtol=0, atol=1e-4)


def test_pieces_are_smaller_where_rows_are_large():
    row = {"shape": ["batch", 3, 224, 224], "dtype": "float32"}
    assert rows_at_once([row]) == 55
    assert rows_at_once([row, row]) == 27
    assert rows_at_once([{"shape": ["batch", 10], "dtype": "int64"}]) == 256
    assert rows_at_once([{"shape": ["batch", 10**9], "dtype": "float32"}]) == 1
