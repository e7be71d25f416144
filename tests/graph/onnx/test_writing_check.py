"""A written file is compared with its module, operation by operation: faults are errors that name them, rounding is none."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.errors import ExportError
from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import GroupedNet, randomise, small_inputs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx import writing_check
from cat_plugin.graph.onnx.sessions import session_of
from cat_plugin.graph.onnx.writing import CONVERTERS


@pytest.fixture(scope="module")
def quantized():
    x, network = small_inputs(16, 4, 8, 8), randomise(GroupedNet())
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", batch_size=8)
    return quantize(network, spec, x)[0], x


class Curved(nn.Module):
    """Two functions behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.tanh(self.fc(x)))


def test_a_wrong_operation_is_named_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(
        CONVERTERS,
        "aten.tanh.default",
        lambda writer, node, given: writer.emit("Erf", [writer.value(given["self"])]),
    )
    with pytest.raises(
        ExportError, match=r"net\.onnx would not .* of aten\.tanh\.default in .*node 'erf' of the file"
    ):
        cat_plugin.export_onnx(Curved(), tmp_path / "net.onnx", torch.randn(4, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bundled", [False, True])
def test_one_step_too_much_is_found(tmp_path, monkeypatch, quantized, bundled):
    module, x = quantized
    name = "quantized_decomposed.quantize_per_tensor.default"
    convert = CONVERTERS[name]

    def shifted(writer, node, given):
        moved = writer.emit(
            "Add", [writer.value(given["input"]), writer.constant(np.float32(given["scale"]))]
        )
        writer.names[given["input"]], kept = moved, writer.names[given["input"]]
        result = convert(writer, node, given)
        writer.names[given["input"]] = kept
        return result

    given = (cat_plugin.export_bundle(module, x, tmp_path / "bundle"),) if bundled else (module,)
    examples = None if bundled else x
    cat_plugin.export_onnx(*given, tmp_path / "right.onnx", examples)
    monkeypatch.setitem(CONVERTERS, name, shifted)
    with pytest.raises(ExportError, match=r"wrong\.onnx.*quantized_decomposed\.dequantize_per_tensor"):
        cat_plugin.export_onnx(*given, tmp_path / "wrong.onnx", examples)


class _Off:
    """A session whose outputs are moved by a share of their norm."""

    def __init__(self, session, share):
        self.session, self.share = session, share

    def run(self, names, feed):
        return [value * (1 + self.share) for value in self.session.run(names, feed)]


@pytest.mark.parametrize(
    ("share", "told", "refused"), [(0.05, False, False), (0.2, True, False), (0.6, True, True)]
)
def test_kernels_may_round_and_no_more(tmp_path, monkeypatch, caplog, quantized, share, told, refused):
    def session(model, *, optimized=True):
        made = session_of(model, optimized=optimized)
        return _Off(made, share) if optimized else made

    monkeypatch.setattr(writing_check, "session_of", session)
    module, x = quantized
    if refused:
        with pytest.raises(ExportError, match=r"with its default optimizations.*net\.onnx"):
            cat_plugin.export_onnx(module, tmp_path / "net.onnx", x)
        return
    cat_plugin.export_onnx(module, tmp_path / "net.onnx", x)
    assert ("ORT_DISABLE_ALL" in caplog.text) == told


def test_without_onnx_runtime_the_file_is_written(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    monkeypatch.setattr(writing_check, "session_of", lambda *_, **__: pytest.fail("nothing is run"))
    assert cat_plugin.export_onnx(Curved(), tmp_path / "net.onnx", torch.randn(4, 6)).is_file()


def test_indices_are_found_that_the_table_holds(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.randint(7, (5, 3))
    bundle = cat_plugin.export_bundle(network, x, tmp_path / "bundle")
    path = cat_plugin.export_onnx(bundle, tmp_path / "net.onnx")
    result = session_of(str(path)).run(None, {session_of(str(path)).get_inputs()[0].name: x.numpy()})[0]
    assert np.allclose(result, network(x).detach().numpy(), atol=1e-5)
