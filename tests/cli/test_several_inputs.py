"""``cat-ptq quantize`` on a model of several inputs: an array for each, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cat_plugin.cli import main
from tests.zoo.several import ImageAndText

from .conftest import loggers_as_they_were


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("neural_compressor", reason="Neural Compressor is not installed")
    root = tmp_path_factory.mktemp("several")
    (root / "recipe.yaml").write_text(
        "quantization: {algorithm: cat, cat: {w_bits: 8, a_bits: 8, preset: fast, num_samples: 32}}"
    )
    arrays = {name: each.numpy() for name, each in ImageAndText.batch(40).items()}
    np.savez(root / "data.npz", **{**arrays, "image": arrays["image"].astype(np.float64)})
    np.savez(root / "two.npz", image=arrays["image"], tokens=arrays["tokens"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from safetensors.torch import save_file

        save_file(ImageAndText().state_dict(), root / "weights.safetensors")
    return root


def _words(root: Path, data: str, *more: str) -> list[str]:
    given = {"--model": "tests.zoo.several:ImageAndText", "--weights": str(root / "weights.safetensors")}
    given |= {"--data": str(root / data), "--out": str(root / "bundle"), "--batch-size": "16"}
    return ["quantize", str(root / "recipe.yaml"), *(word for pair in given.items() for word in pair), *more]


def test_the_bundle_takes_the_inputs_and_gives_what_the_model_gives(folder: Path) -> None:
    from safetensors.torch import load_file

    from cat_plugin.graph.bundle import read_bundle
    from cat_plugin.graph.sampling import Runner

    with loggers_as_they_were():
        assert main(_words(folder, "data.npz")) == 0
    bundle = read_bundle(folder / "bundle")
    assert [entry["name"] for entry in bundle.manifest["inputs"]] == ["image", "tokens", "mask"]
    model = ImageAndText()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    rows = {name: each[:6] for name, each in ImageAndText.batch(40).items()}
    with torch.no_grad():
        expected = model.eval()(**rows)
    found = Runner(bundle.program())(*(each.numpy() for each in rows.values()))
    for result, right in zip(found, expected, strict=True):
        assert np.abs(result - right.numpy()).max() < 0.03 * float(right.abs().max())


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("data.npz", ("--mean", "0.5"), "a model of several inputs takes no --mean"),
        ("data.npz", ("--tune", "data.npz"), "a model of several inputs takes no --tune"),
        (
            "two.npz",
            (),
            "has no array 'mask' with a row for each sample; the model takes image, tokens, mask",
        ),
        ("weights.safetensors", (), "is no .npz file; the model takes image, tokens, mask"),
    ],
)
def test_what_does_not_suit_is_said(
    folder: Path, data: str, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / word) if word.endswith(".npz") else word for word in more]
    assert main(_words(folder, data, *given)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
