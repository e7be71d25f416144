"""The cluster-affine step in standard operators gives what the arrays' own reference gives."""

from __future__ import annotations

import numpy as np
import pytest

from cat_plugin.cluster_affine import AffineParameters

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.sessions import session_of  # noqa: E402
from cat_plugin.graph.onnx.step import Fragment, write_step  # noqa: E402

C = 7


def parameters(mode: str, clusters: int, axes: int, width: int, features: int = 0) -> AffineParameters:
    draw = np.random.default_rng(0).standard_normal
    inputs = C + features
    arrays = {
        "mean": draw(inputs),
        "components": draw((axes, inputs)),
        "centroids": draw((clusters, width if axes else inputs)),
        "beta": draw((clusters, C)),
    }
    if mode == "full":
        arrays["weight"] = draw((clusters, C, inputs))
    else:
        arrays["gamma"] = draw((clusters, C))
    if mode == "lowrank":
        arrays |= {"core": draw((clusters, axes or inputs, 2)), "right": draw((2, C))}
    return AffineParameters(mode=mode, alpha=0.4, **arrays)


@pytest.mark.parametrize("opset", [7, 21])
@pytest.mark.parametrize(
    ("mode", "clusters", "axes", "width", "features"),
    [
        ("diagonal", 5, 0, 0, 0),
        ("diagonal", 5, 3, 3, 0),
        ("diagonal", 1, 3, 3, 0),
        ("lowrank", 4, 5, 2, 0),
        ("lowrank", 1, 0, 0, 0),
        ("full", 3, 4, 2, 0),
        ("full", 1, 0, 0, 0),
        ("full", 4, 3, 3, 6),
    ],
)
def test_it_is_the_reference(mode, clusters, axes, width, features, opset):
    p = parameters(mode, clusters, axes, width, features)
    fragment = Fragment("cat_")
    result = write_step(fragment, p, "z", "f" if features else None)
    kind = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info("z", kind, ["n", C])]
    if features:
        inputs.append(onnx.helper.make_tensor_value_info("f", kind, ["n", features]))
    graph = onnx.helper.make_graph(
        fragment.nodes, "step", inputs, [onnx.helper.make_tensor_value_info(result, kind, ["n", C])],
        fragment.initializers,
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model)
    for rows in (1, 33):
        x = np.random.default_rng(rows).standard_normal((rows, C + features)).astype(np.float32)
        feed = {"z": x[:, :C]} | ({"f": x[:, C:]} if features else {})
        expected = p.apply(x.astype(np.float64))
        assert np.abs(session.run(None, feed)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    operators = {node.op_type for node in fragment.nodes}
    assert operators <= {"MatMul", "ArgMin", "Gather", "Mul", "Add", "Sub", "Reshape", "Concat"}
