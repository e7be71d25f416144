"""Images in, logits or classes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tvm_backend
from cat_plugin.errors import LibraryError
from cat_plugin.graph.preparation import Preparation
from tvm_backend.images import prepared, top_of

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
HOW = Preparation(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), image_size=16)


@pytest.fixture
def library(compiled, tmp_path):
    path = tmp_path / "model.so"
    shutil.copy(compiled[0].path, path)
    manifest = json.loads(Path(compiled[0].path).with_suffix(".json").read_text())
    manifest["variants"][0]["file"] = path.name
    classes = manifest["outputs"][0]["shape"][1]
    more = {"preparation": HOW.to_dict(), "class_names": [f"class {i}" for i in range(classes)]}
    path.with_suffix(".json").write_text(json.dumps(manifest | more))
    return tvm_backend.load(path)


def test_logits_are_those_of_prepared_inputs(library):
    wanted = library(HOW.apply(PICTURES))
    np.testing.assert_array_equal(library.predict(PICTURES), wanted)
    np.testing.assert_array_equal(library.predict(list(PICTURES)), wanted)


def test_the_likeliest_classes_and_their_names(library):
    logits = library.predict(PICTURES)
    top = library.predict(PICTURES, top=3)
    np.testing.assert_array_equal(top.classes[:, 0], logits.argmax(1))
    assert top.names[0][0] == f"class {top.classes[0, 0]}"
    assert (np.diff(top.probabilities, axis=1) <= 0).all()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(top.probabilities, np.take_along_axis(shares, top.classes, 1), rtol=1e-5)


def test_images_of_other_sizes_are_scaled(library):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    large = np.repeat(np.repeat(PICTURES[0], 2, 0), 3, 1)
    assert library.predict([large, PICTURES[1]]).shape[0] == 2


def test_what_is_no_image_is_told(library, compiled):
    with pytest.raises(LibraryError, match="give bytes, uint8"):
        library.predict(HOW.apply(PICTURES))
    with pytest.raises(LibraryError, match="no images were given"):
        library.predict([])
    with pytest.raises(LibraryError, match=r"give images \(N, H, W, C\) to predict"):
        library(PICTURES)
    with pytest.raises(LibraryError, match="does not say how images are prepared"):
        tvm_backend.load(compiled[0].path).predict(PICTURES)
    with pytest.raises(LibraryError, match="are in one batch"):
        prepared([PICTURES[0], PICTURES[0][:8]], Preparation())
    with pytest.raises(LibraryError, match="top=9 of an output of shape"):
        top_of(np.zeros((1, 4)), 9, None)
