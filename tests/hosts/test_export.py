"""From a host's model to a bundle: the same logits, or the reason why not."""

from __future__ import annotations

import copy

import pytest
import torch

import cat_plugin
from cat_plugin.errors import ExportError
from cat_plugin.graph.bundle import read_bundle

from .conftest import needs_inc2, needs_inc3, needs_pt2e


def check_bundle(task, corrected, directory, bits):
    bundle = read_bundle(cat_plugin.export_bundle(corrected, task.batches[0][:2], directory))
    program = bundle.program().module()
    for size in (1, 3, len(task.images)):
        x = task.images[:size]
        with torch.no_grad():
            torch.testing.assert_close(program(x), corrected(x), rtol=1e-5, atol=1e-5)
    assert bundle.cluster_affine() is not None
    assert [(layer["w_bits"], layer["a_bits"]) for layer in bundle.manifest["layers"]] == bits


@needs_inc3
def test_engine_through_3x(task, tmp_path):
    from neural_compressor.torch.quantization import quantize

    config = cat_plugin.CATConfig(w_bits=3, a_bits=4, preset="fast")
    corrected = quantize(copy.deepcopy(task.net), config, run_fn=task.run_fn)
    check_bundle(task, corrected, tmp_path / "bundle", [(8, 8), (3, 4), (3, 4), (8, 8)])


@needs_inc3
def test_weight_only_through_3x_is_a_graph_of_floats(task, tmp_path):
    """The packed weights are unpacked in the graph: exact, and no layer is said to have bits."""
    from neural_compressor.torch.quantization import RTNConfig, quantize

    config = cat_plugin.CATConfig(base=RTNConfig(bits=4, use_layer_wise=False))
    corrected = quantize(copy.deepcopy(task.net), config, run_fn=task.run_fn)
    check_bundle(task, corrected, tmp_path / "bundle", [(None, None)] * 4)


@needs_pt2e
def test_static_int8_through_3x(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantization: {approach: static, algorithm: cat}\n")
    corrected = cat_plugin.load_recipe(recipe).run(task.net, task.batches)
    check_bundle(task, corrected, tmp_path / "bundle", [(8, 8)] * 4)
    # The host leaves the weights in floating point in front of a quantize operation; the bundle holds integers.
    program = read_bundle(tmp_path / "bundle").program()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        (weight,) = [value for key, value in program.state_dict.items() if key.endswith(f"{name}.weight")]
        assert weight.dtype == torch.int8
        assert len(weight.unique()) > 20
    assert not [value for value in program.state_dict.values() if value.dtype == torch.float32 and value.ndim > 1
                and value.shape[-1] in (3, 32, 256)]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(program.module()(task.images), corrected(task.images))


@needs_inc2
def test_engine_through_2x(task, tmp_path, monkeypatch):
    from .test_inc2 import LOW, fit

    monkeypatch.chdir(tmp_path)
    corrected = fit(task, {"cat": True, "cat_args": LOW}).model
    check_bundle(task, corrected, tmp_path / "bundle", [(8, 8), (3, 4), (3, 4), (8, 8)])


@needs_inc2
def test_int8_through_2x_says_why_not(task, tmp_path, monkeypatch):
    from .test_inc2 import fit

    monkeypatch.chdir(tmp_path)
    corrected = fit(task, {"cat": True}).model
    with pytest.raises(ExportError, match="packed int8 kernels"):
        cat_plugin.export_bundle(corrected, task.batches[0][:2], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
