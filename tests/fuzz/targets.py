"""What is fuzzed: the readers of files that come from elsewhere.

Each target takes bytes, puts them where the reader looks, and lets nothing out but a :class:`CATError`.  It may take no
more than 100 MB beyond what the process has, and no more than five seconds of the processor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import resource
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cat_plugin.errors import CATError

__all__ = ["TARGETS", "bounded", "seeds"]

_MEMORY, _SECONDS = 100 * 2**20, 5.0


class Hang(BaseException):
    """A reader did not come back."""


def _stop(*_: object) -> None:
    raise Hang(f"more than {_SECONDS} s of the processor")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limits on memory and time: what exceeds them ends in MemoryError or :class:`Hang`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


@functools.cache
def _place(name: str) -> Path:
    """A directory of this process, in memory where there is such a place."""
    memory = Path("/dev/shm")
    kept = tempfile.TemporaryDirectory(prefix=f"cat_fuzz_{name}_", dir=memory if memory.is_dir() else None)
    _kept.append(kept)
    return Path(kept.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def recipe(data: bytes) -> None:
    """A recipe file."""
    from cat_plugin.recipe.recipe import load_recipe

    path = _place("recipe") / "recipe.yaml"
    path.write_bytes(data)
    with contextlib.suppress(CATError):
        load_recipe(path)


_MODEL = b"PK"
_SHAPES = {"mean": (3,), "components": (0, 3), "centroids": (2, 3), "gamma": (2, 3), "beta": (2, 3)}
_ARRAYS = save({name: np.ones(shape, np.float32) for name, shape in _SHAPES.items()})


def _manifest() -> dict[str, Any]:
    tensor = {"name": "x", "dtype": "float32", "shape": ["N", 3]}
    return {
        "format": "cat-bundle",
        "version": 1,
        "files": {"model.pt2": _entry(_MODEL), "cluster_affine.safetensors": _entry(_ARRAYS)},
        "inputs": [tensor],
        "outputs": [tensor],
        "layers": [{"name": "fc", "kind": "linear", "weight_shape": [3, 3], "w_bits": 2, "a_bits": None}],
        "cluster_affine": {
            "op": "cluster_affine",
            "alpha": 0.4,
            "shapes": {name: list(shape) for name, shape in _SHAPES.items()},
        },
        "calibration": {},
        "libraries": {},
    }


def manifest(data: bytes) -> None:
    """The manifest of a bundle whose files are sound."""
    from cat_plugin.graph.bundle import read_bundle

    root = _place("manifest")
    (root / "manifest.json").write_bytes(data)
    if not (root / "model.pt2").exists():
        (root / "model.pt2").write_bytes(_MODEL)
        (root / "cluster_affine.safetensors").write_bytes(_ARRAYS)
    with contextlib.suppress(CATError):
        read_bundle(root).cluster_affine()


def description(data: bytes) -> None:
    """The description of a compiled library."""
    from tvm_backend.runtime import load

    path = _place("description") / "model.json"
    path.write_bytes(data)
    with contextlib.suppress(CATError):
        load(path.with_suffix(".so"))


def bundle(data: bytes) -> None:
    """A file of a bundle, sealed so that its hash is right; the first byte says which."""
    from cat_plugin.graph.archive import check_archive
    from cat_plugin.graph.bundle import read_bundle

    root, content = _place("bundle"), data[1:]
    names = ["model.pt2", "cluster_affine.safetensors", "report.json"]
    name = names[data[0] % 3] if data else names[0]
    sealed = _manifest()
    for each, default in zip(names, (_MODEL, _ARRAYS, b"{}"), strict=True):
        (root / each).write_bytes(content if each == name else default)
        sealed["files"][each] = _entry(content if each == name else default)
    (root / "manifest.json").write_text(json.dumps(sealed))
    with contextlib.suppress(CATError):
        read = read_bundle(root)
        if name == "model.pt2":
            with (root / name).open("rb") as stream:
                check_archive(stream, root / name)
        read.cluster_affine()
        read.report()


def onnx(data: bytes) -> None:
    """An ONNX file; not run, so that what it computes does not count."""
    from cat_plugin.graph.onnx.reading import load_onnx

    path = _place("onnx") / "net.onnx"
    path.write_bytes(data)
    with contextlib.suppress(CATError):
        load_onnx(path, verify=False)


def samples(data: bytes) -> None:
    """Data for the command line: an image, or where the first byte is odd, arrays."""
    from cat_plugin.cli.data import load_samples

    root = _place("samples")
    arrays = bool(data) and data[0] % 2 == 1
    path = root / ("data.npz" if arrays else "images/image.png")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data[1:])
    with contextlib.suppress(CATError):
        load_samples(str(path if arrays else path.parent), None)


_TENSORS = save({"op_a.q_weight": np.ones((2, 2), np.int8)})


def _state() -> dict[str, Any]:
    return {
        "fingerprint": "key",
        "about": {"spec": {"w_bits": 4, "a_bits": 4, "preset": "fast"}, "inputs": 8},
        "finished": ["unit a", "unit b"],
        "files": {"state_1.safetensors": _entry(_TENSORS)},
        "records": {"layers": [], "units": [], "notes": [], "packs": [], "share": 0.5},
    }


def state(data: bytes) -> None:
    """What an interrupted run has left: read by the run that goes on, and by ``cat-ptq inspect``."""
    from cat_plugin.cli.states import in_words, read_states, states_table
    from cat_plugin.ptq.checkpoint import Checkpoint

    kept = _place("state")
    directory = kept / ("0" * 16)
    directory.mkdir(exist_ok=True)
    (directory / "state_1.safetensors").write_bytes(_TENSORS)
    (directory / "state.json").write_bytes(data)
    with contextlib.suppress(CATError):
        found = read_states(kept)
        in_words(found)
        states_table(found)
    with contextlib.suppress(CATError):
        Checkpoint(directory, "key").close()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "recipe": recipe,
    "manifest": manifest,
    "description": description,
    "bundle": bundle,
    "onnx": onnx,
    "samples": samples,
    "state": state,
}

_RECIPE = b"""quantization:
  algorithm: cat
  cat: &c {w_bits: [4, 2], a_bits: 4, alpha: 0.4, mode: auto, preset: fast, num_clusters: 8, seed: 1}
tuning:
  accuracy_criterion: {relative: 0.01, higher_is_better: true}
  exit_policy: {max_trials: 3, timeout: 0}
"""


def archive() -> bytes:
    """The entries of an archive of ``torch.export``, with a graph of one call."""
    graph = {
        "graph_module": {
            "graph": {
                "inputs": [{"as_tensor": {"name": "x"}}],
                "nodes": [{"target": "torch.ops.aten.relu.default", "inputs": [{"name": "self", "arg": {"name": "x"}}]}],
                "sizes": [{"as_expr": {"expr_str": "Mul(Integer(2), Symbol('s0', integer=True))"}}],
            }
        },
        "guards_code": ["L['x'].size()[0] >= 2"],
    }  # fmt: skip
    config = {"config": {"w": {"path_name": "weight_0", "use_pickle": False}}}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("a/models/model.json", json.dumps(graph))
        file.writestr("a/data/weights/model_weights_config.json", json.dumps(config))
        file.writestr("a/data/constants/model_constants_config.json", '{"config": {}}')
        file.writestr("a/data/weights/weight_0", bytes(12))
    return written.getvalue()


def seeds(name: str) -> list[bytes]:
    """Sound files to start from."""
    tensor = {"name": "x", "dtype": "float32", "shape": ["batch", 3]}
    variant = {"file": "model.so", "target": "x86-64", "sha256": "0" * 64, "size": 1, "features": ["avx2"]}
    library = {
        "format": "cat-library",
        "version": 1,
        "inputs": [tensor],
        "outputs": [tensor],
        "variants": [variant],
    }
    return {
        "recipe": [
            _RECIPE,
            b"algorithm: cat\nrtn: {bits: 4}\n",
            b"a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {x: 1}}\n",
        ],
        "manifest": [json.dumps(_manifest()).encode()],
        "description": [json.dumps(library).encode()],
        "bundle": [b"\0" + archive(), b"\1" + _ARRAYS, b'\2{"engine": {}}'],
        "onnx": [network()] if name == "onnx" else [],
        "samples": [b"\0" + picture(), b"\1" + _npz()] if name == "samples" else [],
        "state": [json.dumps(_state()).encode()],
    }[name]


def network() -> bytes:
    """A convolution, an activation and a linear layer as an ONNX file."""
    from onnx import TensorProto, helper

    values = np.linspace(-1, 1, 2 * 9 + 2 * 3, dtype=np.float32)
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [2, 1, 3, 3], values[:18]),
        helper.make_tensor("v", TensorProto.FLOAT, [3, 2], values[18:]),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        weights,
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return made


def picture() -> bytes:
    """A small PNG."""
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(written, "PNG")
    return written.getvalue()


def _npz() -> bytes:
    written = io.BytesIO()
    np.savez(written, inputs=np.zeros((2, 3), np.float32), labels=np.array([0, 1]))
    return written.getvalue()
