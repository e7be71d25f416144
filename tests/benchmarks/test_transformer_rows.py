"""Rows of transformers: names of bit-widths, and the weights that a quantized model multiplies by."""

import pytest
import torch
from torch import nn

from benchmarks.bits import Bits, parse_bits
from benchmarks.correct_tokens import rounded
from benchmarks.peers.transformer_rows import ABOUT, effective_weights, store_weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w4", Bits(4, None, None)),
        ("W3G64", Bits(3, 64, None)),
        ("w4a8", Bits(4, None, 8)),
        ("w2g128a4", Bits(2, 128, 4)),
    ],
)
def test_names_of_bits(name, expected):
    assert parse_bits(name) == expected


@pytest.mark.parametrize("name", ["", "4", "a8", "w4a", "w16"])
def test_what_is_no_name_of_bits_is_refused(name):
    with pytest.raises(ValueError, match="is not a name of bits"):
        parse_bits(name)


class _Halved(nn.Module):
    """A layer as a tool leaves it: without a parameter that is its weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x / 2) + 1


def test_effective_weights_are_read_off_the_results():
    like = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    quantized = nn.Sequential(_Halved(like[0]), nn.ReLU(), like[2])
    found = effective_weights(quantized, like)
    assert list(found) == ["0.weight", "2.weight"]
    torch.testing.assert_close(found["0.weight"], like[0].weight / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["2.weight"], like[2].weight, rtol=1e-5, atol=1e-6)


def test_stored_weights_are_read_back_with_what_they_are(tmp_path):
    like = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    quantized = nn.Sequential(_Halved(like[0]), nn.ReLU(), like[2])
    about = dict(zip(ABOUT, ("Peer", "1.0", "tiny", "w4", "GPTQ, ordered"), strict=True))
    path = store_weights(tmp_path / "states", about, quantized, like)
    assert path.name == "peer-tiny-w4-gptq-ordered.safetensors"
    model, found = rounded(path, like)
    assert found == about
    torch.testing.assert_close(model[0].weight, like[0].weight / 2, rtol=1e-5, atol=1e-6)
    assert model[0].bias.equal(like[0].bias)
