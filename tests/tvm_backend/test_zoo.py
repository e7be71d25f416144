"""Every network and every idiom of the zoo, compiled: the library gives what its program gives.

Where outputs differ by more than rounding, each of the library's levels has to follow from those before it.
Idioms are compiled by the dozen, side by side in one model; the code is generated without optimization, which computes the
same and takes half the time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tvm_backend
from cat_plugin.graph.checks import Checks, Run
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from tests.zoo import ZOO
from tests.zoo.idioms import IDIOMS, idiom
from tvm_backend import build
from tvm_backend.report import CompileReport
from tvm_backend.target import native, resolve

_TOLERANCE = 1e-5
# Exporting a tensor whose unbound parts are written into takes the batch for a number, which others beside it then keep.
_ALONE = "unbind-mul_"
_NAMES = [name for name in IDIOMS if name != _ALONE]
_GROUPS = [*(_NAMES[start : start + 12] for start in range(0, len(_NAMES), 12)), [_ALONE]]


class _SideBySide(nn.Module):
    """Several models on the same inputs: (N, ...) to (N, models, classes)."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: idiom(name) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts.values()], 1)


def _compiled(model: nn.Module, inputs: Tensor, bits: int, path: Path) -> CompileReport:
    """The report of a library that was compared with its program at two batch sizes."""
    spec = QuantSpec(w_bits=bits, a_bits=bits, preset="fast", num_samples=len(inputs))
    quantized, _ = quantize(model, spec, inputs.split(16))
    program = export_program(quantized, inputs[:2])
    target = {**native(), "opt-level": 0}
    report = tvm_backend.compile(program, target=target, out=path, cache=False)
    library, run = tvm_backend.load(path), program.module(check_guards=False)
    for rows in (1, 5):
        given = inputs[:rows]
        with torch.no_grad():
            expected = run(given)
        found = torch.from_numpy(library(given.numpy()).copy())
        assert found.shape == expected.shape
        if ((found - expected).abs() / expected.abs().amax()).max() >= _TOLERANCE:
            wanted = Checks((Run((given.numpy(),), (expected.numpy(),)),), 0.0, 0.0)
            prepared, _ = build._prepared(program)
            verdict = build._explain(
                program, prepared, list(resolve(target).values()), (), False, 0, wanted, library.flat
            )
            assert verdict is not None
            assert verdict.right, verdict.place
    return report


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ZOO)
def test_networks_are_compiled(name: str, bits: int, tmp_path: Path) -> None:
    network = ZOO[name]
    report = _compiled(network.build(), network.inputs(32), bits, tmp_path / "model.so")
    assert report.kernels
    if name == "mixer":  # its linear layers across tokens read transposed inputs
        assert "matmul" not in report.float_ops


@pytest.mark.parametrize("names", _GROUPS, ids=lambda names: f"{names[0]}..{names[-1]}")
def test_idioms_are_compiled(names: list[str], tmp_path: Path) -> None:
    inputs = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    _compiled(_SideBySide(names).eval(), inputs, 8, tmp_path / "model.so")
