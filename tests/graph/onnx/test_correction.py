"""CAT behind classifiers that somebody else quantized: the rest of the file stays, logits come closer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import CalibrationError, CATTypeError, CATValueError, ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.files import read_model, write_model  # noqa: E402
from cat_plugin.graph.onnx.sessions import session_of  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A classifier in full precision, a distorted one, and data."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    distorted = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    distorted.load_state_dict({k: (v * 8).round() / 8 * 1.3 for k, v in network.state_dict().items()})
    x = torch.randn(600, 12)
    for name, module in (("fp", network), ("q", distorted)):
        cat_plugin.export_onnx(module, folder / f"{name}.onnx", x)
        cat_plugin.export_onnx(nn.Sequential(module, nn.Softmax(1)), folder / f"{name}_softmax.onnx", x)
    return folder, network, distorted, x.numpy()


def run(path, x):
    session = session_of(str(path))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_the_step_is_appended_and_the_rest_kept(pair, tmp_path):
    folder, network, _, x = pair
    fitted = cat_plugin.correct_onnx(folder / "q.onnx", folder / "fp.onnx", x, tmp_path / "c.onnx")
    before, after = (read_model(path).graph for path in (folder / "q.onnx", tmp_path / "c.onnx"))
    for kind in ("node", "initializer", "input"):
        kept = getattr(after, kind)[: len(getattr(before, kind))]
        assert [each.SerializeToString() for each in kept] == [
            each.SerializeToString() for each in getattr(before, kind)
        ]
    assert [each.name for each in after.output] == ["output_corrected"]
    raw = run(folder / "q.onnx", x)
    assert np.allclose(run(tmp_path / "c.onnx", x), fitted.predict(raw), atol=1e-4)
    exact = network(torch.from_numpy(x)).detach().numpy()
    assert np.abs(run(tmp_path / "c.onnx", x) - exact).mean() < 0.5 * np.abs(raw - exact).mean()
    for rows in (1, 7):
        assert np.allclose(run(tmp_path / "c.onnx", x[:rows]), fitted.predict(raw[:rows]), atol=1e-4)


def test_a_softmax_at_the_end_is_applied_behind_the_step(pair, tmp_path):
    folder, _, _, x = pair
    logits = cat_plugin.correct_onnx(folder / "q.onnx", folder / "fp.onnx", x, tmp_path / "a.onnx")
    cat_plugin.correct_onnx(folder / "q_softmax.onnx", folder / "fp_softmax.onnx", x, tmp_path / "b.onnx")
    expected = torch.softmax(torch.from_numpy(logits.predict(run(folder / "q.onnx", x))), 1).numpy()
    assert np.allclose(run(tmp_path / "b.onnx", x), expected, atol=1e-5)


def test_arrays_callables_and_files_fit_the_same(pair):
    folder, _, distorted, x = pair
    z_q, z_fp = run(folder / "q.onnx", x), run(folder / "fp.onnx", x)
    batches = [x[:200], x[200:]]
    tensors = [torch.from_numpy(batch) for batch in batches]
    expected = cat_plugin.correct_logits(z_q, z_fp).predict(z_q)
    for fitted in (
        cat_plugin.correct_logits(folder / "q.onnx", folder / "fp.onnx", batches),
        cat_plugin.correct_logits(
            lambda b: distorted(torch.from_numpy(b)), lambda b: run(folder / "fp.onnx", b), batches
        ),
        cat_plugin.correct_logits(folder / "q.onnx", z_fp, tensors),
    ):
        assert np.allclose(fitted.predict(z_q), expected, atol=1e-4)
    paper = cat_plugin.correct_logits(z_q, z_fp, estimator=ClusterAffine.paper())
    assert paper.parameters_.mode == "diagonal"
    assert paper.parameters_.n_clusters == 64


def test_a_file_of_one_batch_size_and_of_half_precision(pair, tmp_path):
    folder, _, _, x = pair
    model = read_model(folder / "q.onnx")
    for each in (*model.graph.input, *model.graph.output):
        each.type.tensor_type.shape.dim[0].ClearField("dim_param")
        each.type.tensor_type.shape.dim[0].dim_value = 3
    write_model(model, tmp_path / "three.onnx")
    fitted = cat_plugin.correct_logits(tmp_path / "three.onnx", folder / "fp.onnx", x)
    with pytest.raises(CATValueError, match="batches of 3"):
        cat_plugin.correct_logits(tmp_path / "three.onnx", folder / "fp.onnx", x[:5])
    half = read_model(folder / "q.onnx")
    half.graph.node.append(onnx.helper.make_node("Cast", ["output"], ["half"], to=onnx.TensorProto.FLOAT16))
    half.graph.output[0].name = "half"
    half.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    write_model(half, tmp_path / "half.onnx")
    cat_plugin.append_step(tmp_path / "half.onnx", fitted, tmp_path / "c.onnx")
    result = run(tmp_path / "c.onnx", x)
    assert result.dtype == np.float16
    assert np.allclose(result, fitted.predict(run(folder / "q.onnx", x)), atol=0.05)


def test_what_cannot_be_corrected(pair, tmp_path):
    folder, network, _, x = pair
    q, fp, out = folder / "q.onnx", folder / "fp.onnx", tmp_path / "c.onnx"
    with pytest.raises(CATValueError, match="no ONNX file at"):
        cat_plugin.correct_onnx(folder / "nothing.onnx", fp, x, out)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(CATValueError, match="cannot be read as an ONNX model"):
        cat_plugin.correct_onnx(tmp_path / "text.onnx", fp, x, out)
    with pytest.raises(CATValueError, match="data is missing"):
        cat_plugin.correct_logits(q, fp)
    with pytest.raises(CATTypeError, match="reference is a int"):
        cat_plugin.correct_logits(q, 3, x)
    with pytest.raises(CalibrationError, match="no batch"):
        cat_plugin.correct_logits(q, fp, [])
    with pytest.raises(CalibrationError, match="NaN"):
        cat_plugin.correct_logits(q, lambda batch: np.full((len(batch), 5), np.nan, np.float32), x)
    with pytest.raises(CalibrationError, match="same samples"):
        cat_plugin.correct_logits(q, lambda batch: np.zeros((len(batch), 4), np.float32), x)
    with pytest.raises(CalibrationError, match="probabilities"):
        cat_plugin.correct_logits(q, lambda batch: torch.softmax(network(torch.from_numpy(batch)), 1), x)
    with pytest.raises(CATValueError, match="no output 'other'"):
        cat_plugin.correct_onnx(q, fp, x, out, output="other")
    with pytest.raises(CATValueError, match="does not take the batch"):
        cat_plugin.correct_onnx(q, fp, x[:, :5], out)
    z = np.random.default_rng(0).standard_normal((80, 4)).astype(np.float32)
    with pytest.raises(CATValueError, match="fitted on 4 classes"):
        cat_plugin.append_step(q, ClusterAffine().fit(z, z), out)
    assert not out.exists()
    model = read_model(q)
    onnx.save(model, tmp_path / "q.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    fitted = cat_plugin.correct_logits(tmp_path / "q.onnx", fp, x)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ExportError, match="file beside it"):
        cat_plugin.append_step(tmp_path / "q.onnx", fitted, tmp_path / "elsewhere" / "c.onnx")
    cat_plugin.append_step(tmp_path / "q.onnx", fitted, out)
    assert np.allclose(run(out, x), fitted.predict(run(q, x)), atol=1e-4)
