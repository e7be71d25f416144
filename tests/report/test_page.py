"""The page: well-formed, complete, whole in itself, and deaf to what is slipped into it."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cat_plugin.graph.preparation import Preparation
from cat_plugin.report.content import Content
from cat_plugin.report.page import render

from .conftest import NASTY

_VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts = self.ids = 0
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)

    def with_id(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


def test_every_section_with_its_numbers(content: Content) -> None:
    page = Page(render(content))
    for number in ("87.65", "86.42", "90.12", "94.33"):  # accuracies
        assert f"{number} %" in page.words
    assert "1.1 KiB" in page.words
    for number in ("0.00123", "0.0456", "0.0625", "40.0", "10.0"):  # effects, losses, -10 log10 of them
        assert number in page.words
    for word in (
        "125 \N{MICRO SIGN}s",
        "1.50 ms",
        "softmax",
        "W4A4 fast",
        "12.5 s",
        "something to know",
        "0" * 64,
        "122",
        "2 threads, on 4 processors (A Fast One); before, the load of the machine was 1.25. It was not idle",
    ):
        assert word in page.words
    sections = [
        "accuracy",
        "labels",
        "layers",
        "outliers",
        "losses",
        "clusters",
        "correction",
        "trials",
        "speed",
        "origin",
    ]
    assert [name for name in page.with_id() if name in sections] == sections
    assert "left-out" not in page.with_id()


def test_the_numbers_of_changed_samples_add_up(content: Content) -> None:
    """Those that changed and came right back are in the total and in no count of changes from full precision."""
    words = " ".join(Page(render(content)).words.split())
    assert (
        "disagree on 3 of 6 samples of test.npz: 2 have another class than in full precision, 1 had one before"
        in words
    )
    assert content.labels is not None
    content.labels |= {
        "changes": {**content.labels["changes"], "full corrected": [30, 40, 5]},
        "differing": 75,
    }
    words = " ".join(Page(render(content)).words.split())
    assert "disagree on 75 of 6 samples of test.npz: 75 have another class than in full precision." in words
    assert (
        "30 Wrong to right 40 Right to wrong 5 Wrong to wrong" in words
    )  # counted over all, not over those listed


def test_nothing_is_said_of_a_figure_that_is_not_there(content: Content) -> None:
    line = "The line joins the models"
    assert line in Page(render(content)).words
    alone = dataclasses.replace(
        content, record={}, evaluations=content.evaluations[:1], full_score=None, labels={}
    )
    assert line not in Page(render(alone)).words


def test_how_inputs_were_prepared_is_shown_where_they_were(content: Content) -> None:
    how = Preparation(mean=(0.5,), image_size=32)
    for recorded, shown in ((how.to_dict(), str(how)), (None, "not recorded")):
        content.manifest["preparation"] = recorded
        words = Page(render(content)).words
        assert f"Inputs {shown}" in " ".join(words.split())


def test_changed_labels_have_the_names_of_the_classes(content: Content) -> None:
    content.manifest["class_names"] = ["ant", "bee", "cat", "dog"]
    cards = [attributes["title"] for tag, attributes in Page(render(content)).tags if tag == "figure"]
    assert any("ant \N{RIGHTWARDS ARROW} dog, the right class is ant" in str(card) for card in cards)


def test_ids_are_unique_and_links_lead_somewhere(content: Content) -> None:
    page = Page(render(content))
    ids = page.with_id()
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_nothing_is_fetched(content: Content) -> None:
    text = render(content)
    page = Page(text)
    assert not re.search(
        r"https?://|//[a-z]|url\((?!#)|@import", re.sub(r"https?://www\.w3\.org/\S+", "", text)
    )
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,"))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    assert "unsafe" not in str(policy)


def test_changed_labels(content: Content) -> None:
    page = Page(render(content))
    assert "3 of 6 samples of test.npz" in page.words
    cards = [attributes["title"] for tag, attributes in page.tags if tag == "figure"]
    right_to_wrong = "sample 4: 0 \N{RIGHTWARDS ARROW} 3, the right class is 0"
    assert cards.count(right_to_wrong) == 2  # by the correction, and so from full precision too
    assert "sample 5: 2 \N{RIGHTWARDS ARROW} 1, the right class is 1" in cards
    assert "sample 3: 0 \N{RIGHTWARDS ARROW} 3, the right class is 3" in cards
    assert sum(tag == "img" for tag, _ in page.tags) == 4


def _poisoned(value: Any) -> Any:
    if isinstance(value, str):
        return value if value in ("full", "quantized", "corrected", "unit", "cluster_affine") else NASTY
    if isinstance(value, dict):
        return {key: _poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: _poisoned(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


def test_text_stays_text(content: Content) -> None:
    """Every string of a bundle may come from somebody else."""
    pictures, before = content.pictures, Page(render(content))
    poisoned = _poisoned(content)
    poisoned.pictures = pictures
    after = Page(render(poisoned))
    assert NASTY in after.words
    harmless = [tag for tag, _ in before.tags if tag in ("script", "img", "iframe")]
    assert [tag for tag, _ in after.tags if tag in ("script", "img", "iframe")] == harmless
    assert not any(name.startswith("on") for _, attributes in after.tags for name in attributes)


def test_bundle_that_remembers_nothing(content: Content) -> None:
    """What an old bundle does not have is left out, with the reason."""
    bare = Content(name="old", manifest=content.manifest)
    page = Page(render(bare))
    left = page.words[page.words.index("Not in this report") :]
    for title in (
        "Accuracy and size",
        "Changed labels",
        "Reconstruction",
        "Clusters",
        "Trials",
        "Compiled library",
    ):
        assert title in left
    assert "--data" in left
    assert "--library" in left


@pytest.mark.parametrize(
    "part", ["engine", "tuning", "sensitivity", "clusters", "recipe", "model"], ids=lambda part: part
)
def test_any_part_may_be_missing(content: Content, part: str) -> None:
    del content.record[part]
    Page(render(content))


def test_models_without_layers_or_correction(content: Content) -> None:
    content.manifest = {**content.manifest, "layers": [], "cluster_affine": None}
    content.arrays = None
    content.evaluations = []
    assert "no convolution or linear layer" in Page(render(content)).words


def test_odd_numbers(content: Content) -> None:
    """Losses of nothing, all the same size, one trial, one sample: no division by zero, no logarithm of it."""
    for entry in content.record["engine"]["layers"] + content.record["engine"]["units"]:
        entry |= {"loss_before": 0.0, "loss_after": 0.0}
    for entry in content.record["sensitivity"]["layers"]:
        entry |= {"divergence": 0.0}
    content.record["clusters"] |= {"points": [[0.0, 0.0, 0.0]], "means": [{"cluster": 0, "rows": 1, "quantized": [0.0, 0.0], "corrected": [0.0, 0.0]}]}  # fmt: skip
    content.evaluations = content.evaluations[:1]
    content.full_score = None
    content.latency = [{**row, "median_ms": 1.0, "p10_ms": 1.0, "p90_ms": 1.0} for row in content.latency]
    content.arrays = {"gamma": content.arrays["gamma"] * 0 + 1, "beta": content.arrays["beta"] * 0}  # type: ignore[index]
    page = render(content)
    Page(page)
    assert "nan" not in page.lower().replace("number.isnan", "")
    assert not re.search(r'="-?inf', page)


def test_what_no_page_may_contain_is_replaced(content: Content) -> None:
    content.name = content.manifest["layers"][0]["name"] = "a\x00b\ud800c"
    page = render(content).encode()  # half a surrogate pair is no UTF-8
    assert b"\x00" not in page
    assert page.decode().count("a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c") > 2


def test_a_correction_that_changes_nothing_is_said_and_not_drawn(content: Content) -> None:
    """No chart of one cluster with slope 1, but the reason."""
    content.manifest["cluster_affine"] = {
        "op": "cluster_affine",
        "alpha": 0.0,
        "shapes": {"beta": [1, 4]},
    }
    page = Page(render(content))
    assert not {"clusters", "correction"} & set(page.with_id())
    assert (
        " ".join(page.words.split()).count("the correction changes nothing: no map gained on rows held") == 2
    )


def test_options_stay_whole_where_a_line_ends(content: Content) -> None:
    assert content.labels is not None
    content.labels["models"] = content.labels["models"][1:]
    content.labels["rows"] = [[*row[:2], *row[3:]] for row in content.labels["rows"]]
    page = render(content)
    assert "<code>--model</code>" in page
    assert "The quantized and the corrected model disagree on" in page


def test_without_further_data_the_tuning_run_says_what_the_correction_gained(content: Content) -> None:
    content.evaluations = []
    words = " ".join(Page(render(content)).words.split())
    assert "86.50 % without CAT, 93.75 % in full precision, on tuning data" in words
