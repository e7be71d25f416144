"""Time the same convolutions as :mod:`benchmarks.kernels`, in 8 bits, in ONNX Runtime; needs onnx and onnxruntime.

    python -m benchmarks.kernels_onnxruntime --threads 1 --batch 1 16 --out onnxruntime.json

Each is one channels-last ``QLinearConv`` of the ``com.microsoft`` domain, the form into which ONNX Runtime brings
quantized networks, so that no layout is changed around it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.layer_shapes import NETWORKS, Layer
from benchmarks.machine import machine

__all__ = ["main"]


def model(layer: Layer, batch: int) -> bytes:
    """One quantized convolution with uint8 activations and symmetric int8 weights for each channel."""
    rng = np.random.default_rng(0)
    shape = (layer.outputs, layer.inputs // layer.groups, layer.kernel, layer.kernel)
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(0),
        "w": rng.integers(-127, 128, shape).astype(np.int8),
        "w_scale": np.full(layer.outputs, 1e-4, np.float32),
        "w_zero": np.zeros(layer.outputs, np.int8),
        "y_scale": np.float32(0.02),
        "y_zero": np.uint8(0),
        "bias": np.zeros(layer.outputs, np.int32),
    }
    top, left, bottom, right = layer.padding
    node = helper.make_node(
        "QLinearConv",
        ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", "bias"],
        ["y"],
        domain="com.microsoft",
        channels_last=1,
        group=layer.groups,
        kernel_shape=[layer.kernel, layer.kernel],
        pads=[top, left, bottom, right],
        strides=[layer.stride, layer.stride],
    )
    sides = (
        (batch, layer.size, layer.size, layer.inputs),
        (batch, layer.out_size, layer.out_size, layer.outputs),
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, sides[0])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, sides[1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=domains, ir_version=9)
    return bytes(proto.SerializeToString())


def measure(layer: Layer, batch: int, threads: int, seconds: float) -> float:
    """The shortest time of a call, in seconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(model(layer, batch), options, providers=["CPUExecutionProvider"])
    data = (
        np.random.default_rng(1)
        .integers(0, 256, (batch, layer.size, layer.size, layer.inputs))
        .astype(np.uint8)
    )
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(data)
    result = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        (batch, layer.out_size, layer.out_size, layer.outputs), np.uint8
    )
    binding.bind_ortvalue_input("x", value)
    binding.bind_ortvalue_output("y", result)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each layer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for network, layers in NETWORKS.items():
        for batch in options.batch:
            for layer in layers:
                best = measure(layer, batch, options.threads, options.seconds)
                rows.append({"network": network, "layer": layer.name, "batch": batch, "seconds": best})
                print(f"{network:12}{batch:4} {layer.name:34}{best * 1e6:10.1f} us", flush=True)
    result = {"machine": machine(), "threads": options.threads, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
