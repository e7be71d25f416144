"""Build what :mod:`benchmarks.cuda` runs: every CUDA kernel with its inputs and expected results, and whole models."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["build", "random_inputs"]

_BATCHES = {"vit_s": (1, 16), "minilm": (1, 16)}
"""Of models that are not to be measured at 128 as well."""


def _cluster_affine_cases() -> dict[str, Any]:
    from tvm_backend.kernels.cluster_affine.kernel import OPS, ClusterAffineSpec

    diagonal, lowrank, full = OPS
    sizes = {"n_classes": 1000, "n_clusters": 64, "n_components": 50}
    cases: dict[str, Any] = {}
    for rows in (1, 64, 256, 4096):
        cases[f"diagonal, float32, N {rows}"] = (ClusterAffineSpec(diagonal, **sizes), rows)
    for dtype in ("float16",):
        cases[f"diagonal, {dtype}, N 4096"] = (ClusterAffineSpec(diagonal, dtype=dtype, **sizes), 4096)
    for finish in ("softmax", "topk"):
        cases[f"diagonal, {finish}, N 4096"] = (ClusterAffineSpec(diagonal, finish=finish, **sizes), 4096)
    cases["diagonal, d 0, N 4096"] = (ClusterAffineSpec(diagonal, 1000, 64, 0), 4096)
    cases["lowrank 16, N 4096"] = (ClusterAffineSpec(lowrank, rank=16, **sizes), 4096)
    cases["full, C 10, 64 features, N 4096"] = (ClusterAffineSpec(full, 10, 8, 0, n_features=64), 4096)
    return cases


def _integer_cases() -> dict[str, Any]:
    """The convolutions of ResNet-18 at batch 1 and 16, a linear layer, a depthwise convolution."""
    from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec, ProductSpec, QParams

    kind = QParams(0.05, 7, 0, 255, "uint8")
    signed = QParams(0.04, -3, -128, 127, "int8")
    relu = Epilogue((0.0, None), None, (kind,))
    cases: dict[str, Any] = {}
    for batch in (1, 16):
        for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
            for bits in (8, 4, 2):
                spec = ConvSpec(
                    batch,
                    size,
                    size,
                    channels,
                    channels,
                    (3, 3),
                    kind,
                    relu,
                    padding=(1, 1, 1, 1),
                    weight_bits=bits,
                )
                cases[f"conv 3x3, {size}x{size}x{channels}, {bits} bits, N {batch}"] = (spec, batch)
        cases[f"linear 512 -> 1000, N {batch}"] = (LinearSpec(batch, 512, 1000, kind, Epilogue()), batch)
        stem = ConvSpec(batch, 224, 224, 3, 64, (7, 7), kind, relu, (2, 2), (3, 3, 3, 3))
        cases[f"stem 7x7, N {batch}"] = (stem, batch)
        depthwise = ConvSpec(batch, 56, 56, 144, 144, (3, 3), kind, relu, padding=(1, 1, 1, 1), groups=144)
        cases[f"depthwise 3x3, 56x56x144, N {batch}"] = (depthwise, batch)
        tokens = 257 * batch
        for inputs, outputs in ((384, 1152), (384, 1536), (1536, 384)):
            linear = LinearSpec(tokens, inputs, outputs, kind, relu)
            cases[f"linear {inputs} -> {outputs}, 257 tokens, N {batch}"] = (linear, tokens)
        scores = ProductSpec(6 * batch, 257, 64, 257, (signed, signed), Epilogue(), transposed=True)
        cases[f"queries with keys, 6 heads, 257 tokens, N {batch}"] = (scores, 6 * batch)
        coarse = Epilogue(outputs=(QParams(4.0, 0, -128, 127, "int8"),))
        values = ProductSpec(6 * batch, 257, 257, 64, (kind, signed), coarse)
        cases[f"attention with values, 6 heads, 257 tokens, N {batch}"] = (values, 6 * batch)
    return cases


def _row_cases() -> dict[str, Any]:
    """What transformers have between their products."""
    from tvm_backend.kernels.spec import Epilogue, RowsSpec

    cases: dict[str, Any] = {}
    for batch in (1, 16):
        rows = 257 * batch
        cases[f"LayerNorm of 384, 257 tokens, N {batch}"] = (
            RowsSpec(rows, 384, "layer_norm", Epilogue(), 1e-6),
            rows,
        )
        cases[f"softmax of 257, 6 heads, N {batch}"] = (
            RowsSpec(6 * rows, 257, "softmax", Epilogue()),
            6 * rows,
        )
    return cases


def _weight(spec: Any, rng: np.random.Generator) -> np.ndarray:
    """A weight whose channels are one row of random numbers, turned: a file of it is small."""
    high = 2 ** (spec.weight_bits - 1)
    channels, *rest = spec.weight_shape
    base = rng.integers(-high, high, int(np.prod(rest))).astype(np.int8)
    matrix = np.stack([np.roll(base, 16 * channel) for channel in range(channels)])
    if len(rest) == 3:  # inputs last, as they are packed
        return np.ascontiguousarray(matrix.reshape(channels, *rest[1:], rest[0]).transpose(0, 3, 1, 2))
    return matrix.reshape(spec.weight_shape)


def _integer_arrays(
    spec: Any, kernel: Any, rows: int
) -> tuple[list[dict[str, Any]], list[np.ndarray], np.ndarray]:
    """What is made anew where the kernel runs, what is stored for it, and its result."""
    from tvm_backend.kernels.registry import reference
    from tvm_backend.kernels.spec import WeightedSpec, storage_dtype

    reads = [(rows, *operand.shape) for operand in spec.reads]
    given = [
        {"shape": list(shape), "dtype": storage_dtype(operand.kind)}
        for shape, operand in zip(reads, spec.reads, strict=True)
    ]
    data = random_inputs(given)
    if not isinstance(spec, WeightedSpec):
        (expected,) = reference(spec)(spec, *data)
        return given, [], expected
    rng = np.random.default_rng(1)
    weight = _weight(spec, rng)
    channels, high = weight.shape[0], 2 ** (spec.weight_bits - 1)
    scale = (rng.uniform(0.1, 2, channels) / (np.sqrt(weight[0].size) * high * 64)).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    (expected,) = reference(spec)(spec, *data, weight, scale, bias)
    return given, [kernel.pack_weight(weight), kernel.compensation(weight), scale, bias], expected


def random_inputs(given: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Random arrays of these shapes and dtypes, always the same."""
    rng = np.random.default_rng(0)
    made = []
    for each in given:
        if each["dtype"] == "float32":
            made.append(rng.standard_normal(each["shape"]).astype(np.float32))
        else:
            least = np.iinfo(each["dtype"]).min
            made.append(rng.integers(least, least + 256, each["shape"]).astype(each["dtype"]))
    return made


def build(options: argparse.Namespace) -> None:
    """Compile all kernels and write them; integer ones with inputs and expected results."""
    import tvm

    import tvm_backend
    from tvm_backend import cuda_build
    from tvm_backend.kernels import registry
    from tvm_backend.kernels.cluster_affine.kernel import lower

    target = tvm.target.Target({"kind": "cuda", "arch": options.arch}, host={"kind": "llvm"})
    options.out.mkdir(parents=True, exist_ok=True)
    entries = []

    def write(name: str, function: Any, facts: dict[str, Any]) -> str:
        stem = f"kernel{len(entries):03d}"
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        executable = tvm.compile(module, target=target)
        pack = cuda_build.pack_imports(options.arch)
        executable.export_library(str(options.out / f"{stem}.so"), fpack_imports=pack)
        (source,) = cuda_build.sources(executable)
        resources = cuda_build.resources(source, options.arch)
        entries.append({"name": name, "file": stem, "resources": resources, **facts})
        print(f"built {name}", flush=True)
        return stem

    if not options.models_only:
        for name, (spec, rows) in _cluster_affine_cases().items():
            operations = 2 * rows * spec.width * (spec.n_components or spec.n_clusters)
            facts = {"kind": "cluster_affine", "bytes": spec.floor_bytes(rows), "operations": operations}
            write(name, lower(spec, target), facts | {"rows": rows, "spec": dataclasses.asdict(spec)})
        for name, (spec, rows) in _integer_cases().items():
            kernel = registry.lower(spec, target)
            given, stored, expected = _integer_arrays(spec, kernel, rows)
            facts = {
                "kind": "integer",
                "bytes": spec.moved_bytes() * rows + sum(array.nbytes for array in stored),
                "operations": 2 * spec.macs * rows,
                "rows": rows,
                "given": given,
                "result": {"shape": list(expected.shape), "dtype": str(expected.dtype)},
                "sha256": hashlib.sha256(np.ascontiguousarray(expected).tobytes()).hexdigest(),
            }
            stem = write(name, kernel.prim_func, facts)
            np.savez(options.out / f"{stem}.npz", *stored)
        for name, (spec, rows) in _row_cases().items():
            kernel = registry.lower(spec, target)
            shapes = [[rows, spec.features], *[[spec.features]] * len(spec.constants)]
            facts = {
                "kind": "rows",
                "function": spec.function,
                "epsilon": spec.epsilon,
                "bytes": spec.moved_bytes() * rows,
                "operations": 8 * rows * spec.features,
                "rows": rows,
                "given": [{"shape": shape, "dtype": "float32"} for shape in shapes],
            }
            write(name, kernel.prim_func, facts)
    for bundle in [*options.bundle, *_bundles(options)]:
        path = options.out / f"{Path(bundle).name}.so"
        network = Path(bundle).name.rsplit("_", 1)[0]
        batches = _BATCHES.get(network, (1, 16, 128))
        report = tvm_backend.compile(bundle, target=target, out=path, batch_sizes=batches)
        entries.append({"name": Path(bundle).name, "file": path.stem, "kind": "model"})
        print(report)
    (options.out / "cuda.json").write_text(
        json.dumps({"arch": options.arch, "entries": entries}, indent=1) + "\n"
    )


def _bundles(options: argparse.Namespace) -> list[Path]:
    """Bundles of the benchmark models that were asked for, such as ``resnet18_w8a8``; kept for the next time."""
    from benchmarks.inference_ours import quantized_bundle

    made = []
    for name in options.model:
        model, precision = name.rsplit("_", 1)
        made.append(options.bundles / name)
        if not made[-1].exists():
            quantized_bundle(model, precision, options.data, made[-1])
    return made
