"""Every form of input data, and every way to get it wrong."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cat_plugin.cli.data import load_samples
from cat_plugin.errors import CATValueError
from cat_plugin.graph.preparation import Preparation
from cat_plugin.ptq.cache import TensorStore


def test_float_npz_is_taken_as_it_is(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 3, 4, 4))
    np.savez(tmp_path / "x.npz", inputs=inputs, labels=np.arange(5, dtype=np.uint8))
    samples = load_samples(tmp_path / "x.npz")
    np.testing.assert_array_equal(samples.inputs, inputs.astype(np.float32))
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    assert [len(batch) for batch in samples.batches(2)] == [2, 2, 1]


def test_inputs_may_lie_in_files(tmp_path: Path) -> None:
    """Prepared a portion at a time, they are the same as in memory, and take none."""
    rng = np.random.default_rng(0)
    how = Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    np.savez(tmp_path / "bytes.npz", images=rng.integers(0, 256, (150, 4, 5, 3), dtype=np.uint8))
    np.savez(tmp_path / "numbers.npz", inputs=rng.normal(size=(150, 3, 4, 5)).astype(np.float32))
    for name in ("bytes.npz", "numbers.npz"):
        with TensorStore(0) as store:
            samples = load_samples(tmp_path / name, how, store)
            np.testing.assert_array_equal(samples.inputs, load_samples(tmp_path / name, how).inputs)
            assert store.on_disk == samples.inputs.nbytes
            assert store.in_memory == 0
            again = load_samples(tmp_path / name, how, store)  # the first ones are not in its way
            np.testing.assert_array_equal(samples.inputs, again.inputs)


def test_uint8_images_are_scaled_and_normalised(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    samples = load_samples(tmp_path / "x.npz", Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    expected = (images / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(samples.inputs, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert samples.labels is None


def _damaged(path: Path) -> dict[str, bytes]:
    """An archive in the states that a broken copy or a wrong file leave it in."""
    np.savez_compressed(path, inputs=np.random.default_rng(0).normal(size=(50, 30)))
    whole, single, other = path.read_bytes(), io.BytesIO(), io.BytesIO()
    np.save(single, np.ones((2, 2)))
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("inputs.npy", b"no array")
    middle = len(whole) // 2
    return {
        "empty": b"",
        "text": b"not a zip",
        "cut off": whole[:middle],
        "a block of zeros": whole[:middle] + bytes(64) + whole[middle + 64 :],
        "a single array": single.getvalue(),
        "a zip of something else": other.getvalue(),
    }


@pytest.mark.parametrize(
    "what", ["empty", "text", "cut off", "a block of zeros", "a single array", "a zip of something else"]
)
def test_damaged_npz_is_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(_damaged(path)[what])
    with pytest.raises(CATValueError, match=r"x\.npz (cannot be read as \.npz|holds a bytes).*numpy\.savez"):
        load_samples(path)


def test_npz_of_words_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.array([["a"], ["b"]]))
    with pytest.raises(CATValueError, match="holds a <U1; expected numbers"):
        load_samples(tmp_path / "x.npz")


def test_image_that_is_far_too_large_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5)
    with pytest.raises(CATValueError, match="cannot be read as an image: Image size"):
        load_samples(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for index, name in enumerate(["cat", "dog"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((3, 4, 3), 100 * index + number, np.uint8)
            image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_folder_of_classes(folder: Path) -> None:
    samples = load_samples(folder)
    assert samples.inputs.shape == (4, 3, 3, 4)
    np.testing.assert_allclose(samples.inputs[:, 0, 0, 0] * 255, [0, 1, 100, 101], rtol=1e-5, atol=1e-4)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("header", ["file,label\n", ""])
def test_csv_of_files(folder: Path, header: str) -> None:
    (folder / "list.csv").write_text(header + "dog/0.png,7\ncat/1.png,3\n")
    samples = load_samples(folder / "list.csv")
    np.testing.assert_allclose(samples.inputs[:, 0, 0, 0] * 255, [100, 1], rtol=1e-5)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 3]


def test_images_of_two_sizes_are_refused(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "dog" / "z.png")
    with pytest.raises(CATValueError, match="resize all images"):
        load_samples(folder)


def test_image_size_scales_and_cuts(tmp_path: Path) -> None:
    """A picture of two halves, wider than high: what is cut out is its middle, at the size asked for."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[:, 80:] = 255
    (tmp_path / "a").mkdir()
    image.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    image.fromarray(pixels.transpose(1, 0, 2).copy()).save(tmp_path / "a" / "high.png")
    samples = load_samples(tmp_path, Preparation(image_size=56))
    assert samples.inputs.shape == (2, 3, 56, 56)
    high, wide = samples.inputs[:, 0]
    np.testing.assert_allclose(wide[:, :26], 0, atol=0.01)
    np.testing.assert_allclose(wide[:, 30:], 1, atol=0.01)
    np.testing.assert_allclose(high, wide.T, atol=0.01)
    assert samples.names == ["a/high.png", "a/wide.png"]


def test_folder_without_classes(folder: Path) -> None:
    samples = load_samples(folder / "dog")
    assert samples.labels is None
    assert samples.names == ["0.png", "1.png"]
    np.testing.assert_allclose(samples.inputs[:, 0, 0, 0] * 255, [100, 101], rtol=1e-5)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(CATValueError, match="no data at"):
        load_samples(tmp_path / "missing.npz")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(CATValueError, match="of no known kind"):
        load_samples(tmp_path / "x.bin")
    np.savez(tmp_path / "x.npz", pixels=np.zeros((2, 2)))
    with pytest.raises(CATValueError, match="expected an array named"):
        load_samples(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", inputs=np.zeros((0, 2)))
    with pytest.raises(CATValueError, match="at least one"):
        load_samples(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", inputs=np.zeros((2, 2)), labels=np.zeros(3))
    with pytest.raises(CATValueError, match="expected one each"):
        load_samples(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", inputs=np.array([object(), object()]).reshape(2, 1))
    with pytest.raises(CATValueError, match=r"cannot be read as \.npz"):
        load_samples(tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CATValueError, match="holds no images"):
        load_samples(tmp_path / "empty")
    (tmp_path / "list.csv").write_text("a.png,one\nb.png,two\n")
    with pytest.raises(CATValueError, match="FILE,CLASS_INDEX"):
        load_samples(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe,0\n")
    with pytest.raises(CATValueError, match="UTF-8"):
        load_samples(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text(f"a.png,{2**80}\n")
    with pytest.raises(CATValueError, match="FILE,CLASS_INDEX"):
        load_samples(tmp_path / "list.csv")
