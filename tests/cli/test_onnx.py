"""``cat-ptq export`` and ``cat-ptq correct``, and ONNX files as models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.cli import main
from cat_plugin.cli.models import load_model
from cat_plugin.errors import CATValueError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.sessions import session_of


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(1)).eval()
    low = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(1)).eval()
    low.load_state_dict({k: (v * 4).round() / 4 * 1.2 for k, v in network.state_dict().items()})
    x = torch.randn(300, 6)
    for name, module in (("fp", network), ("q", low)):
        cat_plugin.export_onnx(module, tmp_path / f"{name}.onnx", x)
    np.savez(tmp_path / "data.npz", inputs=x.numpy())
    return tmp_path, network, x


def run(path, x):
    return session_of(str(path)).run(None, {"input": x.numpy()})[0]


def test_correct_writes_a_file_that_is_closer(files, capsys):
    folder, network, x = files
    words = [
        "correct",
        "--reference",
        folder / "fp.onnx",
        "--quantized",
        folder / "q.onnx",
        "--data",
        folder / "data.npz",
    ]
    words += ["--out", folder / "c.onnx", "--json"]
    assert main([str(word) for word in words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 300
    exact = network(x).detach().numpy()
    before, after = (np.abs(run(folder / name, x) - exact).mean() for name in ("q.onnx", "c.onnx"))
    assert after < 0.7 * before
    assert main([str(word) for word in [*words, "--paper"]]) == 0  # its own file may be replaced
    assert json.loads(capsys.readouterr().out)["mode"] == "diagonal"
    (folder / "c.onnx").write_bytes(b"somebody's")
    assert main([str(word) for word in words]) == 2
    assert (folder / "c.onnx").read_bytes() == b"somebody's"


class Two(nn.Module):
    """Logits of two inputs, and what they are made of."""

    def __init__(self, coarse):
        super().__init__()
        self.coarse = coarse
        self.first, self.second = nn.Linear(6, 4), nn.Embedding(9, 4)

    def forward(self, x, word):
        hidden = self.first(x) + self.second(word)
        logits = (hidden * 4).round() / 3 if self.coarse else hidden
        return {"quantized_logits": logits, "hidden": hidden} if self.coarse else (hidden.exp(), logits)


def test_correct_takes_several_inputs_and_outputs_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    network, low = Two(False).eval(), Two(True).eval()
    low.load_state_dict(network.state_dict())
    rows = (torch.randn(300, 6), torch.randint(9, (300,)))
    for name, module in (("fp", network), ("q", low)):
        cat_plugin.export_onnx(module, tmp_path / f"{name}.onnx", rows)
    arrays = {"x": rows[0].numpy().astype(np.float64), "word": rows[1].numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    words = [
        "correct",
        *("--reference", tmp_path / "fp.onnx", "--quantized", tmp_path / "q.onnx", "--json"),
        *("--data", tmp_path / "data.npz", "--out", tmp_path / "c.onnx"),
    ]
    words = [str(word) for word in words]
    names = [each.name for each in session_of(str(tmp_path / "fp.onnx")).get_outputs()]
    named = ["--output", "quantized_logits", "--reference-output", names[1]]
    assert main([*words, *named]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 300
    given = {**arrays, "x": rows[0].numpy()}
    before = session_of(str(tmp_path / "q.onnx")).run(["quantized_logits", "hidden"], given)
    after = session_of(str(tmp_path / "c.onnx")).run(["quantized_logits_corrected", "hidden"], given)
    assert np.array_equal(after[1], before[1])
    exact = network(*rows)[1].detach().numpy()
    assert np.abs(after[0] - exact).mean() < 0.7 * np.abs(before[0] - exact).mean()
    assert main([*words, *named, "--std", "2"]) == 2
    assert main([*words, "--output", "quantized_logits"]) == 2
    assert "has no output 'quantized_logits'" in capsys.readouterr().err
    np.savez(tmp_path / "data.npz", x=arrays["x"])
    assert main([*words, *named]) == 2
    assert "has no array 'word'" in capsys.readouterr().err


def test_export_writes_a_bundle_as_onnx(files, capsys):
    folder, network, x = files
    bundle = cat_plugin.export_bundle(network, x, folder / "bundle")
    assert main(["export", str(bundle), "--out", str(folder / "m.onnx"), "--opset", "25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["opset"] == 25
    assert np.allclose(run(folder / "m.onnx", x), network(x).detach().numpy(), atol=1e-5)
    assert main(["export", str(folder / "nothing")]) == 2


def test_an_onnx_file_is_a_model_without_its_softmax(files):
    folder, network, x = files
    model = load_model(str(folder / "fp.onnx"))
    with torch.no_grad():
        assert torch.allclose(model(x), network[:-1](x), atol=1e-5)
    with pytest.raises(CATValueError, match="holds its own weights"):
        load_model(str(folder / "fp.onnx"), num_classes=3)
