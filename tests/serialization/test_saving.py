"""Saving and loading: equal logits to the bit, and nothing that is pickled; what hosts made is in :mod:`tests.hosts.test_saving`."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import cat_plugin
from cat_plugin.errors import BundleError, CATError, CATTypeError, ExportError
from cat_plugin.serialization.structure import decode_graph
from tests.serialization.conftest import check_round_trip


def engine(task):
    from cat_plugin.ptq import QuantSpec, quantize

    quantized, _ = quantize(task.net, QuantSpec(w_bits=3, a_bits=4, preset="fast"), task.batches)
    return cat_plugin.correct(quantized, task.net, task.batches)


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
