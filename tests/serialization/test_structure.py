"""Graphs and modules as plain data: read back to the bit, and refused where they are not what was written."""

from __future__ import annotations

import copy
import json
import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import BundleError, ExportError
from cat_plugin.serialization.structure import (
    decode,
    decode_graph,
    decode_module,
    encode,
    encode_graph,
    encode_module,
    tensors_of,
)


class Everything(nn.Module):
    """Functions of several places, a method, a module, a tensor, and arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.block = nn.Module()
        self.block.register_buffer("offset", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.layer(x), -math.inf, 5.0) + self.block.offset
        y = operator.getitem(y, (slice(None), slice(0, 2, 1)))
        y = torch.nn.functional.pad(y, (1, 1), value=0.5).to(torch.float64)
        z = torch.ones_like(y, dtype=torch.float64, device=torch.device("cpu"), layout=torch.strided)
        y = torch.cat([y, z], 1).contiguous(memory_format=torch.contiguous_format)
        return torch.ops.aten.add.Tensor(y, y, alpha=2)


def _saved(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    graph = fx.symbolic_trace(module)
    return json.loads(json.dumps(encode_graph(graph))), tensors_of(graph)


def test_a_graph_is_read_back_to_the_bit() -> None:
    module = Everything().eval()
    again = decode_graph(*_saved(module))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    assert not again.training


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, "text", 0.1, -math.inf, [1, [2.5]], (1, (2, "x")), {"a": (1,)}, {1: 2, None: [3]},
        slice(None, -1), torch.int8, torch.strided, torch.channels_last, torch.device("cpu"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_is_read_back(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value))), {}) == value


def test_what_is_no_plain_value_is_refused() -> None:
    assert math.isnan(decode(encode(math.nan), {}))
    assert decode(encode(torch.Size([2, 3])), {}) == (2, 3)
    with pytest.raises(ExportError, match=r"a object .* cannot be written as plain data"):
        encode(object())
    with pytest.raises(BundleError, match=r"torch\.load is not a dtype"):
        decode({"dtype": "load"}, {})
    with pytest.raises(BundleError, match="unknown kind of value 'code'"):
        decode({"code": "1"}, {})


def _quantized(per_channel: bool) -> nn.Module:
    layer = torch.ao.nn.quantized.Linear(6, 4)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    if per_channel:
        packed = torch.quantize_per_channel(
            weight,
            torch.full((4,), 0.03, dtype=torch.float64),
            torch.zeros(4, dtype=torch.long),
            0,
            torch.qint8,
        )
    else:
        packed = torch.quantize_per_tensor(weight, 0.04, 0, torch.qint8)
    layer.set_weight_bias(packed, torch.arange(4.0))
    layer.scale, layer.zero_point = 0.1, 20
    return layer


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_packed_weight_is_read_back_to_the_bit(per_channel: bool) -> None:
    layer = _quantized(per_channel)
    data = json.loads(json.dumps(encode_module(layer)))
    again = decode_module(data, tensors_of(layer), "")
    x = torch.quantize_per_tensor(torch.linspace(-1, 1, 12).reshape(2, 6), 0.02, 64, torch.quint8)
    assert torch.equal(again(x).int_repr(), layer(x).int_repr())


def test_a_module_with_absent_parameters_and_children_is_read_back() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, affine=False)).eval()
    again = decode_module(json.loads(json.dumps(encode_module(module))), tensors_of(module), "")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(x), module(x))
    assert again[0].bias is None  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.serialization.test_structure.Everything", "none of torch or the host"),
        ("torch.nn.modules.linear.Missing", "does not exist here"),
        ("torch.nn.nowhere.Linear", "does not exist here"),
        ("torch.nn.functional.linear", "is not a module class"),
    ],
)
def test_a_class_of_elsewhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode_module({"class": name}, {}, "")
    if name.startswith("tests."):
        with pytest.raises(ExportError, match="only those of torch and of the host"):
            encode_module(Everything())


def test_tensors_of_another_model_are_refused() -> None:
    module = Everything().eval()
    data, tensors = _saved(module)
    for missing in ("layer.weight", "block.offset"):
        with pytest.raises(BundleError, match=rf"{missing}.* is missing; the files do not belong together"):
            decode_graph(data, {key: value for key, value in tensors.items() if key != missing})


@pytest.mark.parametrize(
    ("op", "target", "keywords", "message"),
    [
        ("call_function", "torch:load", {}, "not a function of a known place"),
        ("call_function", "operator:__import__", {}, "not a function of a known place"),
        ("call_function", "os:system", {}, "not a function of a known place"),
        (
            "call_function",
            "op:profiler:_record_function_enter:default",
            {},
            "not a function of a known place",
        ),
        ("call_method", "__reduce__", {}, "is no name that a call_method"),
        ("call_method", "no_such_method", {}, "is no name that a call_method"),
        ("call_method", "add", {"x=1); evil(": 1}, "is no name that a call_method"),
        ("get_attr", "a.__class__", {}, "is no name that a get_attr"),
        ("placeholder", "x = evil()", {}, "is no name that a placeholder"),
        ("import", "os", {}, "unknown operation 'import'"),
    ],
)
def test_a_node_that_is_none_is_refused(op: str, target: str, keywords: dict[str, Any], message: str) -> None:
    data, tensors = _saved(Everything().eval())
    changed = copy.deepcopy(data)
    changed["nodes"][1:1] = [[op, "extra", target, {"tuple": []}, {"dict": keywords}]]
    with pytest.raises(BundleError, match=message):
        decode_graph(changed, tensors)


def test_a_graph_that_cannot_be_named_is_refused() -> None:
    def own(x: Tensor) -> Tensor:
        return x + 1

    graph = fx.Graph()
    graph.output(graph.call_function(own, (graph.placeholder("x"),)))
    with pytest.raises(ExportError, match="is not known by name"):
        encode_graph(fx.GraphModule(nn.Module(), graph))


@pytest.mark.parametrize("outputs", [lambda x: (x, x), lambda x: {"y": x, "rest": [x]}])
def test_several_outputs_come_back_in_their_structure(outputs: Any) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return outputs(x + 1)

    exported = torch.export.export(Several(), (torch.ones(2),)).module()
    again = decode_graph(json.loads(json.dumps(encode_graph(exported))), tensors_of(exported))
    wanted, found = Several()(torch.zeros(2)), again(torch.zeros(2))
    assert type(found) is type(wanted)
    assert str(found) == str(wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": ["a b"]},
        {"inputs": {"tuple": [0, 1, 2, 3]}},
        {"result": {"list": [0, 0]}},
        {"result": 7},
    ],
)
def test_a_damaged_structure_is_refused(change: dict[str, Any]) -> None:
    class Nested(nn.Module):
        def forward(self, given: dict[str, Tensor]) -> list[Tensor]:
            return [given["a"] + 1, given["b"]]

    example = {"a": torch.ones(2), "b": torch.zeros(2)}
    exported = torch.export.export(Nested(), (example,)).module()
    data = encode_graph(exported)
    assert str(decode_graph(data, tensors_of(exported))(example)) == str(Nested()(example))
    with pytest.raises(BundleError, match="structure of the model's inputs or outputs"):
        decode_graph({**data, "call": {**data["call"], **change}}, tensors_of(exported))
