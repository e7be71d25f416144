"""What a forged ``model.pt2`` could make torch do is refused before torch sees it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_plugin.errors import BundleError
from cat_plugin.files import sha256_of
from cat_plugin.graph.archive import check_archive
from cat_plugin.graph.bundle import export_bundle, read_bundle

GRAPH = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CODE = "__import__('pathlib').Path('ran').touch()"


class Net(torch.nn.Module):
    """Its output's size is an expression of the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = torch.cat([x, x])
        return self.fc(doubled)[: x.shape[0]] + doubled.reshape(x.shape[0], -1)[:, :2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export_bundle(Net().eval(), torch.randn(2, 3), tmp_path_factory.mktemp("archive") / "net")


@pytest.fixture
def bundle(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may forge; whatever code runs leaves its mark in the working directory."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def forge(
    bundle: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Change the entries of the archive and make the manifest agree."""
    model = bundle / "model.pt2"
    with zipfile.ZipFile(model) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(model, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    seal(bundle)


def seal(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    model = bundle / "model.pt2"
    manifest["files"]["model.pt2"] = {"sha256": sha256_of(model), "size": model.stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def edit(entries: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    parsed = json.loads(entries[name])
    change(parsed)
    entries[name] = json.dumps(parsed).encode()


def refused(bundle: Path, message: str) -> None:
    read = read_bundle(bundle)
    with pytest.raises(BundleError, match=message):
        read.program()
    assert not Path("ran").exists()


def test_what_torch_writes_is_read_again(bundle: Path) -> None:
    """Sizes that depend on the batch are expressions, which the check must let through."""
    forge(bundle, lambda entries: None)
    text = zipfile.ZipFile(bundle / "model.pt2").read(GRAPH).decode()
    assert "expr_str" in text
    assert "Mul(" in text
    module = read_bundle(bundle).program().module()
    assert module(torch.zeros(5, 3)).shape == (5, 2)


class Touch:
    """Unpickling one leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_pickled_weight(bundle: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        entries["archive/data/weights/weight_0"] = pickle.dumps(Touch())
        edit(entries, WEIGHTS, lambda c: c["config"]["fc.weight"].update(use_pickle=True))

    forge(bundle, change)
    refused(bundle, r"the pickled tensor 'fc\.weight'")


@pytest.mark.parametrize("place", ["opaque_obj_0", "custom_obj_0", "../weight_0", None])
def test_an_object_in_the_place_of_a_tensor(bundle: Path, place: str | None) -> None:
    forge(bundle, lambda e: edit(e, WEIGHTS, lambda c: c["config"]["fc.weight"].update(path_name=place)))
    refused(bundle, "an object in the place of the tensor")


def test_pickled_sample_inputs(bundle: Path) -> None:
    forge(bundle, lambda e: e.update({"archive/data/sample_inputs/model.pt": pickle.dumps(Touch())}))
    refused(bundle, "pickled sample inputs")


@pytest.mark.parametrize(
    "name",
    ["archive/data/aotinductor/model/model.so", "archive/extra/notes", "archive/data/weights/model.pt", "../x", "other/byteorder"],
)  # fmt: skip
def test_an_entry_that_no_graph_has(bundle: Path, name: str) -> None:
    forge(bundle, lambda e: e.update({name: b"\x7fELF"}))
    refused(bundle, "holds the entry")


def test_a_compressed_entry(bundle: Path) -> None:
    forge(bundle, lambda e: e.update({"archive/data/weights/weight_7": bytes(2**20)}), zipfile.ZIP_DEFLATED)
    refused(bundle, "the compressed entry")


def first_call(graph: Any) -> dict[str, Any]:
    node: dict[str, Any] = graph["graph_module"]["graph"]["nodes"][0]
    return node


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.ops.load_library", "torch.ops.aten.from_file.default", "torch.ops.image.write_file.default",
     "_operator.__call__", "_operator.attrgetter", "_operator.call", "#extension", "os.system", 3],
)  # fmt: skip
def test_a_call_of_something_else(bundle: Path, target: Any) -> None:
    forge(bundle, lambda e: edit(e, GRAPH, lambda g: first_call(g).update(target=target)))
    refused(bundle, "a call of")


def test_a_name_that_is_code(bundle: Path) -> None:
    def change(graph: Any) -> None:
        text = json.dumps(graph).replace('"x"', json.dumps(f"x=({CODE})"))
        graph.clear()
        graph.update(json.loads(text))

    forge(bundle, lambda e: edit(e, GRAPH, change))
    refused(bundle, "the name")


EXPRESSIONS = [
    CODE,
    f"Add({CODE}, Integer(1))",
    "Symbol('s0').__class__",
    "S('x')",
    "Symbol('s0; x')",
    "Function('f')",
    "lambda: 1",
    "[1 for x in ()]",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "9**9**9",
    "1 << 99999999999",
    "(" * 500,
    "1+" * 2000 + "1",
    "f'{x}'",
    3,
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_that_is_more_than_a_size(bundle: Path, text: Any) -> None:
    def change(graph: Any) -> None:
        for item in dictionaries(graph):
            if "expr_str" in item:
                item["expr_str"] = text

    forge(bundle, lambda e: edit(e, GRAPH, change))
    refused(bundle, "the expression")


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_guard_that_is_more_than_a_comparison(bundle: Path, text: Any) -> None:
    forge(bundle, lambda e: edit(e, GRAPH, lambda g: g.update(guards_code=[text])))
    refused(bundle, "the expression")


def test_guards_that_torch_writes_are_let_through(written: Path) -> None:
    data = io.BytesIO((written / "model.pt2").read_bytes())
    with zipfile.ZipFile(data) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    guards = ["L['x'].size()[0] >= 2", "2*L['x'].size()[0] != 3", "math.isnan(L['x'])", "L['y'] == -math.inf"]
    edit(entries, GRAPH, lambda graph: graph.update(guards_code=guards))
    again = io.BytesIO()
    with zipfile.ZipFile(again, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    check_archive(again, Path("model.pt2"))


def dictionaries(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value] + [found for part in value.values() for found in dictionaries(part)]
    if isinstance(value, list):
        return [found for part in value for found in dictionaries(part)]
    return []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an archive"),
        (b"PK\x05\x06" + bytes(18), "has no entry"),
        (b"not a zip", "is not an archive"),
    ],
)
def test_what_is_no_archive(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "model.pt2").write_bytes(content)
    seal(bundle)
    refused(bundle, message)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"[" * 100_000, b'{"config": {"a": 1}}', b"\xff"])
@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_an_entry_that_is_something_else(bundle: Path, name: str, text: bytes) -> None:
    forge(bundle, lambda e: e.update({name: text}))
    refused(bundle, r"model\.pt2")


def test_a_missing_entry(bundle: Path) -> None:
    forge(bundle, lambda e: e.__delitem__(GRAPH))
    refused(bundle, r"has no entry models/model\.json")


def test_two_entries_of_one_name(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / "model.pt2", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(GRAPH, b"{}")
    seal(bundle)
    refused(bundle, "two entries of one name")
