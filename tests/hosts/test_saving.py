"""What a host quantized and CAT corrected, saved and loaded: equal logits to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

import cat_plugin
from cat_plugin.errors import BundleError, CATTypeError
from tests.hosts.conftest import needs_inc2, needs_inc3, needs_pt2e
from tests.serialization.conftest import check_round_trip
from tests.trained import Loader


@needs_inc3
@pytest.mark.parametrize("dtype", ["int", "nf4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_only_of_3x(task, tmp_path, dtype, symmetric):
    from neural_compressor.torch.quantization import RTNConfig, quantize

    base = RTNConfig(dtype=dtype, bits=4, group_size=16, use_sym=symmetric, use_layer_wise=False)
    corrected = quantize(copy.deepcopy(task.net), cat_plugin.CATConfig(base=base), run_fn=task.run_fn)
    check_round_trip(task, corrected, tmp_path / "saved", model=task.net)
    with pytest.raises(CATTypeError, match="pass the full-precision model"):
        cat_plugin.load(tmp_path / "saved")
    with pytest.raises(BundleError, match="pass the model that was quantized"):
        cat_plugin.load(tmp_path / "saved", model=torch.nn.Linear(3, 3))


@needs_pt2e
def test_static_int8_of_3x(task, tmp_path):
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig, quantize

    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = export(copy.deepcopy(task.net), example_inputs=(task.batches[0],), dynamic_shapes=shapes)
    config = cat_plugin.CATConfig(base=INT8StaticQuantConfig())
    corrected = quantize(exported, config, run_fn=task.run_fn, example_inputs=(task.batches[0],))
    check_round_trip(task, corrected, tmp_path / "saved")


@needs_inc3
def test_the_hosts_own_save_and_load(task, tmp_path):
    from neural_compressor.torch import quantization as host

    base = host.RTNConfig(bits=4, use_layer_wise=False)
    for number, config in enumerate((cat_plugin.CATConfig(preset="fast"), cat_plugin.CATConfig(base=base))):
        corrected = host.quantize(copy.deepcopy(task.net), config, run_fn=task.run_fn)
        host.save(corrected, str(tmp_path / f"{number}"))
        loaded = host.load(str(tmp_path / f"{number}"), copy.deepcopy(task.net))
        assert torch.equal(task.logits(loaded), task.logits(corrected))
    # A model of the host alone is the host's affair as before.
    plain = host.quantize(copy.deepcopy(task.net), base, run_fn=task.run_fn)
    host.save(plain, str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "qconfig.json").exists()
    loaded = host.load(str(tmp_path / "plain"), copy.deepcopy(task.net))
    assert torch.equal(task.logits(loaded), task.logits(plain))


@needs_inc2
@pytest.mark.parametrize("kind", ["engine", "int8", "weight only"])
def test_2x(task, tmp_path, monkeypatch, kind):
    from neural_compressor import PostTrainingQuantConfig, quantization

    monkeypatch.chdir(tmp_path)
    options = {}
    if kind == "weight only":
        weight = {"bits": 4, "group_size": 16, "scheme": "sym", "algorithm": "RTN"}
        options = {"approach": "weight_only", "op_type_dict": {".*": {"weight": weight}}}
    args = {"w_bits": 3, "preset": "fast"} if kind == "engine" else {}
    config = PostTrainingQuantConfig(recipes={"cat": True, "cat_args": args}, **options)
    made = quantization.fit(copy.deepcopy(task.net), config, calib_dataloader=Loader(task.batches))
    model = task.net if kind == "weight only" else None
    check_round_trip(task, made, tmp_path / "saved", model=model)
    made.save(str(tmp_path / "by host"))
    assert torch.equal(
        task.logits(cat_plugin.load(tmp_path / "by host", model=model)), task.logits(made.model)
    )
