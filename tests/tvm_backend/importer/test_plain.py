"""Programs that are decomposed without tracing them anew are what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_backend import compat
from tvm_backend.importer import import_program, plain

IMAGES = (3, 4, 8, 6)
ROWS = (3, 5)

KNOWN: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3), IMAGES),
    "conv without bias, strided, dilated, padded, in groups": (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), 2, 2, False),
        IMAGES,
    ),
    "linear": (nn.Linear(5, 7), ROWS),
    "linear without bias": (nn.Linear(5, 7, False), ROWS),
    "flatten": (nn.Sequential(nn.ReLU(), nn.Flatten()), IMAGES),
    "flatten some": (lambda x: F.relu(x).flatten(2), IMAGES),
    "pool and flatten": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGES),
    "max pool, dilated": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), 1, 2), IMAGES),
    "mean": (lambda x: x.mean((2, 3)), IMAGES),
    "relu6": (nn.ReLU6(), IMAGES),
    "slice": (lambda x: x[:, :, ::2, 1:99], IMAGES),
    "slice of everything": (lambda x: torch.ops.aten.slice(x, 2, 0, 99), IMAGES),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 2)), IMAGES),
    "add": (lambda x: F.relu(x) + x, IMAGES),
    "network": (
        nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2), nn.ReLU()
        ),
        IMAGES,
    ),
}
OTHER: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "another operator": (torch.sin, IMAGES),
    "max pool to the end": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), IMAGES),
    "max pool without strides": (lambda x: torch.ops.aten.max_pool2d(x, [2]), IMAGES),
    "pool to several": (lambda x: F.adaptive_avg_pool2d(x, 2), IMAGES),
    "linear on images": (nn.Linear(6, 7), IMAGES),
    "one image": (nn.Conv2d(4, 6, 3), (4, 8, 6)),
    "add a multiple": (lambda x: torch.add(x, F.relu(x), alpha=2), IMAGES),
    "add a number": (lambda x: x + 1, IMAGES),
    "add integers": (lambda x: x.to(torch.int32) + x, IMAGES),
    "cut off": (lambda x: F.pad(x, (0, -1)), IMAGES),
    "reflect": (lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect"), IMAGES),
    "ones around": (lambda x: F.pad(x, (1, 1), value=1.0), IMAGES),
    "nothing around": (lambda x: F.pad(x, (0, 0)), IMAGES),
    "slice from the end": (lambda x: x[:, :, -2:], IMAGES),
    "flatten what lies in another order": (lambda x: x.permute(0, 2, 3, 1).flatten(1), IMAGES),
    "slice beyond the end": (lambda x: torch.ops.aten.slice(x, 2, 20, 30), IMAGES),
    "the input": (lambda x: (x, F.relu(x)), IMAGES),
}


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _program(function: Callable[..., Any], shape: tuple[int, ...], dynamic: bool) -> Any:
    sizes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(_Module(function).eval(), (torch.randn(shape),), dynamic_shapes=sizes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_it_is_what_torch_makes_of_it(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(*KNOWN[name], dynamic)
    before = str(program)
    assert plain.decomposed(program) is not None
    found = import_program(program)
    assert str(program) == before
    monkeypatch.setattr(plain, "decomposed", lambda _: None)
    wanted = import_program(program)
    compat.assert_structural_equal(found, wanted)
    assert found.script() == wanted.script()


@pytest.mark.parametrize("name", OTHER)
def test_other_forms_are_left_to_torch(name: str) -> None:
    assert plain.decomposed(_program(*OTHER[name], False)) is None


def test_sizes_that_are_no_inputs_are_left_to_torch() -> None:
    assert plain.decomposed(_program(lambda x: F.relu(x).flatten(), IMAGES, True)) is None


def test_a_batch_that_several_inputs_share() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (F.relu(y) + x).flatten(1)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Two(), (torch.randn(IMAGES), torch.randn(IMAGES)), dynamic_shapes=({0: batch}, {0: batch})
    )
    sizes = [node.args for node in plain.decomposed(program).graph.nodes if "sym_size" in str(node.target)]
    assert [str(args) for args in sizes] == ["(x, 0)"]
