"""LSTM and GRU of ONNX files: ONNX Runtime's values, torch's layers, any batch; what torch's do not compute is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cat_plugin
from cat_plugin.errors import CATValueError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from cat_plugin.graph.onnx.files import write_model
from cat_plugin.graph.onnx.sessions import session_of

FEATURES, HIDDEN = 5, 4
GATES = {"LSTM": 4, "GRU": 3}


def file(folder, op, direction="forward", *, bias=True, state="none", **attributes):
    """A file of one layer between transpositions, of all its outputs."""
    rng = np.random.default_rng(0)
    directions, gates = 2 if direction == "bidirectional" else 1, GATES[op] * HIDDEN
    held = {
        "w": rng.standard_normal((directions, gates, FEATURES)) / 2,
        "r": rng.standard_normal((directions, gates, HIDDEN)) / 2,
    }
    if bias:
        held["b"] = rng.standard_normal((directions, 2 * gates)) / 2
    inputs = ["t", "w", "r", "b" if bias else "", "", "", ""]
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])]
    if state == "constant":
        held["h"] = rng.standard_normal((directions, 1, HIDDEN))
        inputs[5] = "h"
    if state == "computed":
        held.update(
            zero=np.array([0]), one=np.array([1]), two=np.array([2]), ends=np.array([directions, HIDDEN])
        )
        nodes += [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Slice", ["shape", "zero", "one"], ["n"]),
            helper.make_node("Slice", ["ends", "zero", "one"], ["d"]),
            helper.make_node("Slice", ["ends", "one", "two"], ["e"]),
            helper.make_node("Concat", ["d", "n", "e"], ["sizes"], axis=0),
            helper.make_node("ConstantOfShape", ["sizes"], ["h"]),
        ]
        inputs[5] = inputs[6] = "h"
    if op == "GRU":
        attributes = {"linear_before_reset": 1, **attributes}
        inputs = inputs[:6]
    outputs = ["y", "last", "c"][: 3 if op == "LSTM" else 2]
    nodes.append(
        helper.make_node(
            op, inputs, outputs, name="cell", hidden_size=HIDDEN, direction=direction, **attributes
        )
    )
    # the batch first, as a network has it
    ends = []
    for name in outputs:
        order = {"y": [2, 0, 1, 3], "last": [1, 0, 2], "c": [1, 0, 2]}[name]
        nodes.append(helper.make_node("Transpose", [name], [f"{name}_"], perm=order))
        ends.append(helper.make_tensor_value_info(f"{name}_", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1 if state == "constant" else "n", 7, FEATURES])],
        ends,
        [numpy_helper.from_array(v.astype(np.float32 if v.dtype.kind == "f" else np.int64), k) for k, v in held.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return write_model(model, folder / "net.onnx")


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("forward", {}), ("reverse", {}), ("bidirectional", {}), ("forward", {"bias": False}),
        ("bidirectional", {"state": "constant"}), ("forward", {"state": "computed"}),
    ],
)  # fmt: skip
def test_it_gives_onnx_runtimes_values(tmp_path, op, direction, options):
    path = file(tmp_path, op, direction, **options)
    module = cat_plugin.load_onnx(path)
    rows = 1 if options.get("state") == "constant" else 6
    x = np.random.default_rng(1).standard_normal((rows, 7, FEATURES)).astype(np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x))
        for mine, theirs in zip(found, session_of(str(path)).run(None, {"x": x}), strict=True):
            assert np.allclose(mine.numpy(), theirs, atol=1e-5)
        many = module(torch.from_numpy(np.repeat(x[:1], 3, 0)))
        assert all(
            torch.allclose(each[2], single[0], atol=1e-6) for each, single in zip(many, found, strict=True)
        )


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_it_is_one_of_torchs_layers_for_any_batch(tmp_path, op):
    module = cat_plugin.load_onnx(file(tmp_path, op, "bidirectional", state="computed"))
    names = {name for name, _ in module.named_parameters()}
    expected = getattr(torch.nn, op)(FEATURES, HIDDEN, bidirectional=True)
    assert names == {f"cell.{name}" for name, _ in expected.named_parameters()}
    x = torch.randn(5, 7, FEATURES)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=False)
    assert any(f"aten.{op.lower()}.input" in str(node.target) for node in program.graph.nodes)
    for rows in (1, 4):
        with torch.no_grad():
            assert torch.allclose(program.module()(x[:rows])[0], module(x[:rows])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("GRU", {"linear_before_reset": 0}, "linear_before_reset=0"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "activations Sigmoid, Relu, Tanh"),
        ("LSTM", {"layout": 1}, "layout=1"),
        ("LSTM", {"clip": 3.0}, "clip or input_forget"),
    ],
)
def test_what_torchs_layers_do_not_compute(tmp_path, op, attributes, message):
    with pytest.raises(CATValueError, match=rf"node 'cell' \({op}\) cannot be read: {message}"):
        cat_plugin.load_onnx(file(tmp_path, op, **attributes))
