"""Bundles of models with several inputs and results: what they say of them, and what is read back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cat_plugin import correct, export_bundle
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import BundleError, ExportError
from cat_plugin.graph.bundle import read_bundle
from cat_plugin.graph.export import export_program
from cat_plugin.graph.inspect import find_correction, signature
from cat_plugin.graph.results import filled, is_structure
from cat_plugin.structures import leaves_of, names_of
from tests.zoo import Network
from tests.zoo.dense import UNet
from tests.zoo.several import Detector, ImageAndText, ImageAndTextHeads, TokenClassifier

ONE_MAP = {"mode": "diagonal", "n_clusters": 1, "alpha": 1.0, "random_state": 0}


class Scaled(nn.Module):
    """A model whose floating-point results are a tenth too large."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        if isinstance(found, Tensor):
            return found * 1.1
        logits = {"logits": found["logits"] * 1.1} if isinstance(found, dict) else {}
        return (
            {**found, **logits} if isinstance(found, dict) else type(found)(found.logits * 1.1, found.pooled)
        )


def _corrected(make: Any) -> tuple[nn.Module, Any]:
    """A model with a correction of its logits, and a batch."""
    model = Network(make).build()
    if make is UNet:
        images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return correct(Scaled(model), model, images, ClusterAffine(**ONE_MAP), class_axis=1), images[:5]
    batch = make.batch(20)
    corrected = correct(Scaled(model), model, [batch], ClusterAffine(**ONE_MAP), logits="logits")
    return corrected, {name: each[:5] for name, each in batch.items()}


@pytest.mark.parametrize(
    ("make", "inputs", "outputs", "corrected"),
    [
        (UNet, {"args_0": ["N", 3, 16, 16]}, {"output": ["N", 4, 16, 16]}, ("output", 1)),
        (
            ImageAndTextHeads,
            {"image": ["N", 3, 16, 16], "tokens": ["N", "T"], "mask": ["N", "T"]},
            {"auxiliary": ["N", 4], "logits": ["N", 10]},
            ("logits", 1),
        ),
        (
            TokenClassifier,
            {"input_ids": ["N", 9], "attention_mask": ["N", 9]},
            {"logits": ["N", 9, 6], "pooled": ["N", 8]},
            ("logits", 2),
        ),
    ],
)
def test_a_bundle_names_inputs_and_outputs_and_gives_them_back(
    make: Any, inputs: dict[str, Any], outputs: dict[str, Any], corrected: tuple[str, int], tmp_path: Any
) -> None:
    module, batch = _corrected(make)
    given = dict(reversed(batch.items())) if isinstance(batch, dict) else batch
    bundle = read_bundle(export_bundle(module, given, tmp_path / "bundle"))
    found = bundle.manifest
    assert {entry["name"]: entry["shape"] for entry in found["inputs"]} == inputs
    assert {entry["name"]: entry["shape"] for entry in found["outputs"]} == outputs
    assert (found["cluster_affine"]["output"], found["cluster_affine"]["class_axis"]) == corrected
    program = bundle.program()
    for rows in (1, 5):
        with torch.no_grad():
            if isinstance(batch, dict):
                call = {name: each[:rows] for name, each in batch.items()}
                made, wanted = program.module()(**call), module(**call)
            else:
                made, wanted = program.module()(batch[:rows]), module(batch[:rows])
        assert names_of(made) == names_of(wanted)
        assert type(made) is (Tensor if make is UNet else dict)
        for mine, other in zip(leaves_of(made), leaves_of(wanted), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    checks = bundle.checks()
    assert checks is not None
    assert [len(run.inputs) for run in checks.runs] == [len(inputs)] * 2
    assert [len(run.outputs) for run in checks.runs] == [len(outputs)] * 2
    again = signature(program)
    assert {key: found[key] for key in again} == again


@pytest.mark.parametrize("form", ["positions", "batch", "keywords"])
def test_example_inputs_are_given_as_the_model_is_called(form: str) -> None:
    model, batch = Network(ImageAndText).build(), ImageAndText.batch(5)
    places = tuple(batch.values())
    program = export_program(model, {"positions": places, "batch": (places,), "keywords": batch}[form])
    assert [entry["name"] for entry in signature(program)["inputs"]] == ["image", "tokens", "mask"]
    assert signature(program)["result"] == {"tuple": [0, 1]}
    with torch.no_grad():
        found = program.module()(**batch) if form == "keywords" else program.module()(*places)
        torch.testing.assert_close(found, model(**batch))


def test_labels_beside_the_inputs_are_left_out() -> None:
    program = export_program(nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4)))
    assert [entry["name"] for entry in signature(program)["inputs"]] == ["input"]


def test_a_call_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ExportError, match=r"gives the model float32 \(2, 3\).*it takes \(image"):
        export_program(Network(ImageAndText).build(), torch.ones(2, 3))
    with pytest.raises(ExportError, match="expected a batch"):
        export_program(nn.Linear(3, 2), {"input": torch.tensor(1.0)})


class Mixed(nn.Module):
    """Nested results with a constant and what is no tensor, and an argument that is none either."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3))
        self.linear = nn.Linear(3, 4)

    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Any:
        y = self.linear(pair[0]) * scale
        return {"rows": (y, [pair[1].flatten(0, 1), None]), "table": self.table, "count": 2}


def test_structures_around_constants_are_described(tmp_path: Any) -> None:
    from cat_plugin.batches import ModelCall

    model = Mixed().eval()
    call = ModelCall(((torch.randn(4, 3), torch.randn(4, 5, 2)),), {"scale": 0.5})
    manifest = read_bundle(export_bundle(model, call, tmp_path / "bundle")).manifest
    assert [entry["shape"] for entry in manifest["inputs"]] == [["N", 3], ["N", 5, 2]]
    assert [(entry["name"], entry["shape"]) for entry in manifest["outputs"]] == [
        ("rows.0", ["N", 4]),
        ("rows.1.0", ["5*N", 2]),
        ("table", [2, 3]),
    ]
    assert filled(manifest["result"], "abc") == {"rows": ("a", ["b", None]), "table": "c", "count": 2}


def test_a_detector_keeps_its_lists(tmp_path: Any) -> None:
    bundle = read_bundle(export_bundle(Network(Detector).build(), torch.randn(2, 3, 16, 16), tmp_path / "b"))
    assert [entry["name"] for entry in bundle.manifest["outputs"]] == [
        "scores",
        "boxes.0",
        "boxes.1",
        "anchors",
    ]
    found = bundle.program().module()(torch.randn(3, 3, 16, 16))
    assert isinstance(found["boxes"], list)


@pytest.mark.parametrize(
    "result",
    [
        1,
        {"tuple": [0, 0]},
        {"tuple": []},
        {"set": [0]},
        {"dict": [0]},
        [0],
        {"value": [0]},
        "0",
        {"tuple": [0], "list": []},
    ],
)
def test_a_structure_that_is_none_is_refused(result: Any, tmp_path: Any) -> None:
    path = export_bundle(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "bundle") / "manifest.json"
    assert not is_structure(result, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "result": result}))
    with pytest.raises(BundleError, match="'result' is not what belongs there"):
        read_bundle(path.parent)


def test_a_correction_in_the_middle_of_a_graph_is_of_no_output() -> None:
    corrected, batch = _corrected(UNet)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = corrected

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean((2, 3))

    found = find_correction(export_program(Mean(), batch))
    assert found is not None
    assert found.output is None
