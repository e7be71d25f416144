"""Readers of files from elsewhere: whatever is in them, they return or raise a CATError, soon and in little memory."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**400, -1, 2**63, "", ".nan", "../x", "/etc/passwd", "model.pt2", "nul\0", "N", "cat", "0" * 64]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A sound document with one to three parts replaced, removed or added."""
    document = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place, path = document, []
        while isinstance(place, (dict, list)) and place and (not path or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            path.append((place, key))
            place = place[key]
        if not path:
            return draw(VALUES)
        parent, key = path[-1]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del parent[key]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            parent[key] = draw(VALUES)
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a piece cut out, repeated or replaced."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 64)))
    return data[:start] + draw(st.one_of(st.binary(max_size=16), st.just(data[start:end] * 3))) + data[end:]


def fuzz(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def check(target: Any, data: bytes) -> None:
    with targets.bounded():
        target(data)


WORDS = [
    "algorithm", "quantization", "cat", "tuning", "w_bits", "alpha", "recipes", "cat_args", "accuracy_criterion", "relative",
    "exit_policy", "timeout", ": ", ":", "\n", "\n  ", "- ", ", ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "!!set ",
    "!!binary ", "!!timestamp ", "!!python/name:os.system ", "'", '"', "|\n ", "? ", "# ", "---\n", "...", "%YAML 1.1\n", ".nan",
    ".inf", "1e999", "0x" + "f" * 300, "9" * 400, "1:1:1", "2001-01-01", "true", "~", "\t", "\0", "\x85", "\ufeff", "=", "rtn",
]  # fmt: skip


@fuzz(1000)
@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=30).map("".join), st.text(max_size=60)))
@example("tuning: {timeout: " + "9" * 400 + "}\nalgorithm: cat")
@example("algorithm: cat\ncat: {alpha: .nan}")
@example("1: 2")
@example("cat: {1: 2}")
@example("? [a]\n: b")
def test_words_of_yaml(text: str) -> None:
    check(targets.recipe, text.encode("utf-8", "surrogatepass"))


@fuzz(1000)
@given(st.one_of(*(changed(yaml.safe_load(seed)).map(yaml.dump) for seed in targets.seeds("recipe"))))
def test_changed_recipes(text: str) -> None:
    check(targets.recipe, text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("name", ["manifest", "description"])
def test_changed_manifests(name: str) -> None:
    (seed,) = targets.seeds(name)

    @fuzz(1000)
    @given(changed(json.loads(seed)).map(json.dumps).map(str.encode) | damaged(seed) | st.binary(max_size=40))
    def run(data: bytes) -> None:
        check(targets.TARGETS[name], data)

    run()


def test_damaged_files_of_a_bundle() -> None:
    @fuzz(1000)
    @given(st.one_of(*(damaged(seed) for seed in targets.seeds("bundle"))))
    def run(data: bytes) -> None:
        check(targets.bundle, data)

    run()


@pytest.mark.parametrize(("name", "needs", "examples"), [("onnx", "onnx", 150), ("samples", "PIL", 500)])
def test_damaged_networks_and_data(name: str, needs: str, examples: int) -> None:
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    sound = targets.seeds(name)
    for seed in sound:
        targets.TARGETS[name](seed)  # what is imported on first use has no limits

    @fuzz(examples)
    @given(st.one_of(*(damaged(seed) for seed in sound)) | st.binary(max_size=60))
    def run(data: bytes) -> None:
        check(targets.TARGETS[name], data)

    run()


def test_changed_states() -> None:
    (seed,) = targets.seeds("state")
    targets.state(seed)

    @fuzz(500)
    @given(changed(json.loads(seed)).map(json.dumps).map(str.encode) | damaged(seed) | st.binary(max_size=40))
    def run(data: bytes) -> None:
        check(targets.state, data)

    run()


def packed(entry: str, document: Any) -> bytes:
    """The archive with one entry replaced."""
    with zipfile.ZipFile(BytesIO(targets.archive())) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries[entry] = json.dumps(document).encode()
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return b"\0" + written.getvalue()


@pytest.mark.parametrize("entry", ["a/models/model.json", "a/data/weights/model_weights_config.json"])
def test_changed_archives(entry: str) -> None:
    with zipfile.ZipFile(BytesIO(targets.archive())) as archive:
        document = json.loads(archive.read(entry))

    @fuzz(700)
    @given(changed(document))
    def run(value: Any) -> None:
        check(targets.bundle, packed(entry, value))

    run()


@fuzz(1000)
@given(st.lists(st.sampled_from(["Symbol('s0')", "Pow(", "Integer(9)", "(", ")", ",", "**", "9", "L['x']", ".size()", "[0]",
                                 "+", "<<", "lambda: ", "f'{x}'", " if ", "not ", "==", ".inf", "__", "\n", "\0"]),
                max_size=20).map("".join) | st.text(max_size=30))  # fmt: skip
def test_expressions(text: str) -> None:
    check(targets.bundle, packed("a/models/model.json", {"guards_code": [text], "a": {"expr_str": text}}))
