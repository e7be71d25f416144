"""The parts a page is made of, against what is known without them."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_plugin.report.figures import decibel, milliseconds, percent, round_number, short, size
from cat_plugin.report.images import png, thumbnails
from cat_plugin.report.markup import Markup, element
from cat_plugin.report.record import label_changes
from cat_plugin.report.svg.axes import Scale, linear, logarithmic
from cat_plugin.report.svg.charts import frontier
from cat_plugin.report.svg.clusters import cluster_summary
from cat_plugin.report.svg.maps import enlargement, slopes_and_offsets

MINUS, DASH, MICRO = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MICRO SIGN}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (short(0.012345), "0.0123"), (short(-1234.5), f"{MINUS}1234"), (short(1e-7), f"1.00e{MINUS}07"), (short(0), "0"),
        (short(math.nan), DASH), (short(None), DASH), (short(True), DASH), (short(99.99), "100"),
        (percent(0.98765), "98.77 %"), (percent(None), DASH),
        (size(512), "512 B"), (size(19866), "19.4 KiB"), (size(1048576), "1.0 MiB"), (size(None), DASH),
        (milliseconds(0.0161), f"16.1 {MICRO}s"), (milliseconds(12.5), "12.5 ms"), (milliseconds(15000), "15.0 s"),
        (round_number(0.05), "0.05"), (round_number(1e-5), "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (round_number(2e6), "2\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT SIX}"), (round_number(0.0), "0"),
    ],
)  # fmt: skip
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_decibels() -> None:
    assert decibel(0.01) == pytest.approx(20)
    assert decibel(0.0) is None
    assert decibel(None) is None


def test_elements_escape() -> None:
    made = element("p", "<b>", Markup("<i></i>"), title='"x"', hidden=False, open=True, x1=1.005, class_="a")
    assert made == '<p title="&quot;x&quot;" open x1="1" class="a">&lt;b&gt;<i></i></p>'
    with pytest.raises(ValueError, match="no name of an attribute"):
        element("p", **{"x onload": "1"})


@given(st.text())
def test_text_cannot_leave_its_element(text: str) -> None:
    inside = element("p", text, title=text).removeprefix("<p").removesuffix("</p>")
    assert "<" not in inside
    assert inside.count('"') == 2


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=5),
    st.sampled_from(["linear", "log", "binary"]),
)
def test_scales(values: list[float], kind: str) -> None:
    if kind == "linear":
        scale = linear(values, 0, 100)
    else:
        scale = logarithmic(values, 0, 100, binary=kind == "binary")
    places = [scale(value) for value in sorted(values)]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 20
    assert all(scale.low <= tick * (1 + 1e-9) and tick <= scale.high * (1 + 1e-3) for tick in ticks)


def test_round_ticks() -> None:
    assert Scale(0, 1, 0, 1).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1e-5, 0.2, 0, 1, log=True).ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert Scale(15000, 300000, 0, 1, log=True, binary=True).ticks() == [16384, 32768, 65536, 131072, 262144]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12))
def test_frontier(points: list[tuple[int, float]]) -> None:
    best = frontier(points)
    beaten = {p for p in points if any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in points)}
    assert sorted(set(best)) == sorted(set(points) - beaten)


def test_png_is_read_back() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(pixels)))), pixels)
    grey = pixels[..., 0].copy()
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(grey)))), grey)


def test_thumbnails_undo_the_normalisation() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    inputs = (pixels / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    addresses = thumbnails(inputs, mean, std)
    assert addresses is not None
    import base64

    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(addresses[1].partition(",")[2]))))
    np.testing.assert_array_equal(shown, pixels[1].transpose(1, 2, 0))
    assert thumbnails(np.zeros((2, 10)), None, None) is None
    assert thumbnails(np.zeros((2, 4, 8, 8)), None, None) is None
    assert len(thumbnails(np.zeros((1, 1, 300, 200)), None, None)[0]) < 2000  # type: ignore[index]


def test_cluster_summary_against_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1)
    z = rng.normal(size=(300, 6)) * [5, 3, 1, 1, 1, 1]
    corrected, full = z + 0.5, z + 1.0
    labels = rng.integers(0, 3, 300)
    found = cluster_summary(z, corrected, labels, full)
    reference = PCA(2).fit(z)
    np.testing.assert_allclose(found["explained"], reference.explained_variance_ratio_, rtol=1e-6)
    placed = reference.transform(z)
    points = np.array(found["points"])
    np.testing.assert_allclose(np.abs(points[:, :2]), np.abs(placed), atol=1e-4)
    np.testing.assert_array_equal(points[:, 2], labels)
    for mean in found["means"]:
        expected = reference.transform(corrected[labels == mean["cluster"]]).mean(0)
        np.testing.assert_allclose(np.abs(mean["corrected"]), np.abs(expected), atol=1e-4)
    assert found["error"] == pytest.approx([1.0, 0.25])
    assert found["agreement"] == [1.0, 1.0]


def test_cluster_summary_of_one_class() -> None:
    found = cluster_summary(np.zeros((4, 1)), np.zeros((4, 1)), np.zeros(4, int))
    assert found["explained"] == [0.0, 0.0]
    assert enlargement(found) == 1


def test_label_changes() -> None:
    labels = np.array([0, 1, 2])
    said: dict[str, Any] = {"quantized": np.array([0, 0, 2]), "corrected": np.array([0, 1, 2])}
    found = label_changes(labels, said, "x.npz", names=["a", "b", "c"])
    assert found["correct"] == {"quantized": 2, "corrected": 3}
    assert found["rows"] == [[1, 1, 0, 1]]
    assert found["names"] == {"1": "b"}


def test_slopes_of_a_full_map_are_its_diagonal() -> None:
    weight = np.arange(2 * 3 * 5, dtype=float).reshape(2, 3, 5)
    gamma, beta = slopes_and_offsets({"weight": weight, "beta": np.zeros((2, 3))}) or (None, None)
    np.testing.assert_array_equal(gamma, [[0, 6, 12], [15, 21, 27]])  # type: ignore[arg-type]
    assert beta is not None
    assert slopes_and_offsets({"beta": np.zeros((2, 3))}) is None
    assert slopes_and_offsets({"gamma": np.full((2, 3), np.nan), "beta": np.zeros((2, 3))}) is None
