"""Inputs, outputs and operations in the forms that models have, as ONNX: what ONNX Runtime gives is what the module gives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cat_plugin
from cat_plugin.errors import CATValueError, ExportError
from cat_plugin.graph.export import export_program
from cat_plugin.structures import leaves_of

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.sessions import session_of


class _Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc(x))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) - self.b(y)


def _rows(count: int, size: int = 6, seed: int = 1) -> Tensor:
    return 2 * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def _written(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 1:3] = y[:, 4:] * 2
    z[:, -1] = 0.5
    z[:, :1].mul_(3)
    return z


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda y: F.normalize(y, dim=-1) + y.norm(p=1, dim=1, keepdim=True) + y.norm(p=torch.inf),
    "any-all": lambda y: y * (y > 0).any(1, keepdim=True) + (y > -1).all() + ((y * 2).int() != 0).any((0, 1)),
    "floor-division": lambda y: (y * 8).long() // -3 + torch.div((y * 8).long(), 3, rounding_mode="trunc"),
    "bits": lambda y: ((y * 16).int() & 7 | 1) ^ ~(y * 16).int(),
    "truths": lambda y: (
        ((y > 0) * (y < 1)) ^ torch.logical_xor(y > 1, (y * 2).int()) | torch.logical_not((y * 2).int())
    ),
    "exp2": lambda y: torch.exp2(y) + 2**y,
    "constants": lambda y: y[:, torch.triu_indices(3, 3, 1)[0]] + torch.tril_indices(2, 2)[1],
    "turned": lambda y: y.flip(1) + y.unflatten(1, (2, 3)).flip(-1, 1).flatten(1).roll(2, 1),
    "summed-up": lambda y: y.cumsum(1) + (y > 0).cumsum(-1),
    "largest": lambda y: y - y.max(1, keepdim=True)[0] * y.min(1).indices[:, None],
    "sorted": lambda y: y.sort(1)[0] + y.sort(-1, descending=True).indices,
    "chosen": lambda y: (
        y.topk(4, 1)[0] * y.gather(1, y.argsort(1)[:, :4]) + y.topk(4, -1, largest=False).indices
    ),
    "scattered": lambda y: y.scatter(1, y.argmax(1, keepdim=True), 0.5) + y.scatter(1, y.argsort(1), y.abs()),
    "rounded": lambda y: (
        torch.round(y, decimals=1)
        + y.ldexp(torch.tensor([1, -2, 0, 3, 1, 1]))
        + torch.erfc(y)
        + torch.hypot(y, y.flip(1))
    ),
    "filled": lambda y: (
        torch.full_like(y, 3) + torch.zeros_like(y[:, :1], dtype=torch.int) - torch.ones_like(y)
    ),
    "written-into": lambda y: _written(y),
    "curves": lambda y: (
        torch.expm1(y.clamp(max=1)) + torch.asinh(y) + torch.atan(y) + torch.sinh(y.clamp(-1, 1))
    ),
    "own-statistics": lambda y: F.instance_norm(
        y.unflatten(1, (2, 3)), weight=torch.tensor([1.0, 2.0])
    ).flatten(1),
    "close": lambda y: torch.isclose(y, y.round(), atol=0.05) * 1.0,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Of(OPERATIONS[name]).eval()
    path = cat_plugin.export_onnx(model, tmp_path / "model.onnx", _rows(4))
    session = session_of(str(path))
    for rows in (1, 5):
        with torch.no_grad():
            expected = model(_rows(rows)).numpy()
        found = session.run(None, {session.get_inputs()[0].name: _rows(rows).numpy()})[0]
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda y: (y, None), ["output"]),
        (lambda y: {"a": y, "b": None, "c": y * 2}, ["a", "c"]),
        (
            lambda y: OrderedDict(out=[y, {"p": y.amax(1)}], rest=(None, 3, y + 1)),
            ["output_0", "output_1", "output_2"],
        ),
    ],
)
def test_results_that_are_no_tensors_are_left_out(function: Any, names: list[str], tmp_path: Path) -> None:
    model = _Of(function).eval()
    path = cat_plugin.export_onnx(model, tmp_path / "model.onnx", _rows(4))
    session = session_of(str(path))
    found = session.run(None, {session.get_inputs()[0].name: _rows(3).numpy()})
    with torch.no_grad():
        expected = [leaf for leaf in leaves_of(model(_rows(3))) if isinstance(leaf, Tensor)]
    assert len(session.get_outputs()) == len(expected) == len(names)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "example", [lambda x, y: (x, y), lambda x, y: {"y": y, "x": x}, lambda x, y: [(x, y)]]
)
def test_examples_of_a_program_of_two_inputs(example: Any, tmp_path: Path) -> None:
    x, y = _rows(3), _rows(3, 3)
    program = export_program(_Two().eval(), (x, y))
    cat_plugin.export_onnx(program, tmp_path / "model.onnx", example(x, y))
    with pytest.raises(CATValueError, match="example_inputs holds 1 tensors; expected 2: x, y"):
        cat_plugin.export_onnx(program, tmp_path / "model.onnx", x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda y: F.adaptive_max_pool2d(y.reshape(-1, 1, 2, 3), (1, 3), return_indices=True)[1],
            "the places of what is chosen are read",
        ),
        (
            lambda y: F.conv1d(y[None], y.mean(1)[:, None, None], groups=y.shape[0])[0],
            "group is computed in the graph; ONNX takes a number there",
        ),
    ],
)
def test_what_onnx_has_no_place_for_is_named(function: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        cat_plugin.export_onnx(_Of(function).eval(), tmp_path / "model.onnx", _rows(4))


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.mul_(0.5))


def test_what_a_model_writes_into_inputs_and_buffers_is_no_result(tmp_path: Path) -> None:
    model = _Writes().eval()
    program = torch.export.export(model, (_rows(4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    session = session_of(str(cat_plugin.export_onnx(program, tmp_path / "model.onnx")))
    (found,) = session.run(None, {session.get_inputs()[0].name: _rows(3).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(_rows(3)).numpy(), rtol=1e-5, atol=1e-5)


def _joined(y: Tensor) -> Tensor:
    for _ in range(40):
        y = y + y.tanh()
    return torch.linalg.det(y[:, :4].reshape(-1, 2, 2)).unsqueeze(1)


def test_an_operation_behind_many_joins_is_refused_at_once(tmp_path: Path) -> None:
    """What looks for values that depend on no input goes over each node once, not over each way to it."""
    with pytest.raises(ExportError, match=r"linalg_det.* cannot be written as ONNX"):
        cat_plugin.export_onnx(export_program(_Of(_joined).eval(), _rows(4)), tmp_path / "model.onnx")
