"""Saving and loading: equal logits to the bit for every combination, and nothing that is pickled."""

from __future__ import annotations

import copy
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file

import cat_plugin
from cat_plugin.errors import BundleError, CATError, CATTypeError, ExportError
from cat_plugin.serialization.structure import decode_graph
from tests.hosts.conftest import INC, needs_inc3, needs_pt2e
from tests.trained import Loader

needs_inc2 = pytest.mark.skipif(
    not (2, 0) <= INC < (3, 8), reason=f"needs the 2.x Python API (2.4 to 3.7), found {INC[0]}.{INC[1]}"
)


def engine(task):
    from cat_plugin.ptq import QuantSpec, quantize

    quantized, _ = quantize(task.net, QuantSpec(w_bits=3, a_bits=4, preset="fast"), task.batches)
    return cat_plugin.correct(quantized, task.net, task.batches)


def check_round_trip(task, corrected, directory, model=None):
    path = cat_plugin.save(corrected, directory)
    assert sorted(file.name for file in path.iterdir()) == ["cat.json", "model.safetensors"]
    for file in path.iterdir():
        assert not zipfile.is_zipfile(file)
    assert load_file(path / "model.safetensors")
    loaded = cat_plugin.load(path, model=model)
    saved = getattr(corrected, "_model", corrected)
    assert torch.equal(task.logits(loaded), task.logits(saved))
    assert torch.equal(task.logits(loaded.model), task.logits(saved.model))
    assert loaded.config == json.loads(json.dumps(saved.config))
    again = cat_plugin.load(cat_plugin.save(loaded, directory), model=model)
    assert torch.equal(task.logits(again), task.logits(saved))


def test_engine(task, tmp_path):
    check_round_trip(task, engine(task), tmp_path / "saved")


@pytest.mark.parametrize("mode", ["diagonal", "lowrank", "full"])
def test_modes_of_the_correction(task, tmp_path, mode):
    from cat_plugin.cluster_affine import ClusterAffine

    quantized = engine(task).model
    estimator = ClusterAffine(mode=mode, n_clusters=3, n_components=4, random_state=0)
    try:
        corrected = cat_plugin.correct(quantized, task.net, task.batches, estimator)
    except (NotImplementedError, CATError) as error:
        pytest.skip(f"the estimator cannot fit mode {mode}: {error}")
    check_round_trip(task, corrected, tmp_path / "saved")


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


def test_damage(task, tmp_path):
    path = cat_plugin.save(engine(task), tmp_path / "saved")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        cat_plugin.load(path)
    cat_plugin.save(engine(task), path)
    manifest = json.loads((path / "cat.json").read_text())

    def with_change(change):
        changed = copy.deepcopy(manifest)
        change(changed)
        (path / "cat.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError):
            cat_plugin.load(path)

    with_change(lambda m: m.update(format="other"))
    with_change(lambda m: m.update(version=2))
    with_change(lambda m: m.pop("model"))
    with_change(lambda m: m["model"]["nodes"][1].__setitem__(2, "operator:attrgetter"))
    with_change(lambda m: m["model"]["nodes"][1].__setitem__(2, "torch:load"))
    with_change(lambda m: m["model"]["nodes"][1].__setitem__(2, "os:system"))
    with_change(lambda m: m["model"]["nodes"][1].__setitem__(0, "call_anything"))
    with_change(lambda m: m["model"].update(nodes=[[1]]))
    with_change(lambda m: m.update(correction=[]))
    with_change(lambda m: m.pop("report"))
    with_change(lambda m: m.update(size=1))
    (path / "cat.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        cat_plugin.load(path)
    with pytest.raises(BundleError, match="not a saved model"):
        cat_plugin.load(tmp_path / "nothing")


MARK = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize(
    ("op", "target", "keywords"),
    [
        ("placeholder", f"x=({MARK})", {}),
        ("get_attr", f"a; {MARK}", {}),
        ("get_attr", f'a", 0) or {MARK} or ("', {}),
        ("call_module", f"a; {MARK}", {}),
        ("call_method", f"relu; {MARK}", {}),
        ("call_method", "__reduce__", {}),
        ("call_method", "from_file", {}),
        ("call_function", "torch:relu", {f"{MARK}, x": 1}),
    ],
)
def test_names_do_not_become_code(op, target, keywords, tmp_path, monkeypatch):
    """Torch makes a Python function of a graph's names: nothing but a name gets there."""
    monkeypatch.chdir(tmp_path)
    nodes = [
        ["placeholder", "x", "x", {"tuple": []}, {"dict": {}}],
        [op, "y", target, {"tuple": [{"node": "x"}]}, {"dict": keywords}],
        ["output", "output", "output", {"tuple": [{"node": "y"}]}, {"dict": {}}],
    ]
    with pytest.raises(BundleError, match="is no name that"):
        decode_graph({"nodes": nodes, "modules": {}}, {"a": torch.zeros(1)})(torch.zeros(1))
    assert not (tmp_path / "ran").exists()


def test_other_directories_are_left_alone(task, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BundleError, match="something that is not a saved model"):
        cat_plugin.save(engine(task), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_saved(task, tmp_path):
    with pytest.raises(CATTypeError, match="expected a corrected model"):
        cat_plugin.save(task.net, tmp_path / "saved")
    corrected = engine(task)
    node = next(node for node in corrected.model.graph.nodes if node.op == "call_function")
    node.target = lambda *args: args[0]
    with pytest.raises(ExportError, match="not known by name"):
        cat_plugin.save(corrected, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
