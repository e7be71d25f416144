"""From an eager model to a graph without side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.graph.trace import trace
from tests.ptq.models import (
    randomise,
    small_inputs,
)


def test_in_place_operations_are_seen_by_later_readers():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            F.relu(y, inplace=True)  # y itself changes
            return y + 1.0

    model, x = randomise(InPlace()), small_inputs(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


def _read_before(y):
    other = y * 2
    return torch.relu_(y) + other


def _read_behind(y):
    return F.relu(y, inplace=True) + y


def _seen_through_a_view(y):
    part = y[:, 1:]
    torch.relu_(y)
    return part + 1


def _handed_on(y):
    other = F.dropout(y, training=False)
    return torch.relu_(other) + y


def _read_as_handed_on(y):
    other = F.dropout(y, training=False)
    torch.relu_(y)
    return other + 1


def _written_twice(y):
    return F.hardswish(y.add_(y), inplace=True)


@pytest.mark.parametrize(
    ("body", "alone"),
    [
        (lambda y: F.silu(F.leaky_relu(y, 0.2, inplace=True), inplace=True), True),
        (lambda y: F.relu(y, inplace=True) + torch.relu_(y * 2), True),
        (lambda y: F.elu((y + 1).mul_(y), inplace=True), True),
        (_written_twice, True),
        (lambda y: (y + 1).add_((y > 0).double()), False),  # rounded to float32
        (_read_before, False),
        (_read_behind, True),  # what is written is what is read, to torch.export as well
        (_seen_through_a_view, False),
        (_handed_on, False),
        (_read_as_handed_on, False),
    ],
)
def test_what_is_written_in_place_is_what_the_model_computes(body, alone, monkeypatch):
    """Where nothing else reads what is written over, without making the program functional, which takes its time."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            return body(self.fc(x))

    asked = []
    real = torch.export.ExportedProgram.run_decompositions

    def noted(program, *arguments):
        asked.append(program)
        return real(program, *arguments)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", noted)
    model, x = randomise(InPlace()), small_inputs(6, 4)
    given = x.clone()
    with torch.no_grad():
        graph = trace(model, x)
        torch.testing.assert_close(graph(x), model(x))
    assert torch.equal(x, given)
    assert bool(asked) is not alone


def test_control_flow_on_the_data_is_refused():
    class Picky(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(QuantizationError, match="traced neither"):
        quantize(nn.Sequential(nn.Linear(3, 3), Picky()), QuantSpec(preset="fast"), small_inputs(4, 3))


@pytest.mark.parametrize(
    "assign",
    [
        lambda y: y[:, ::2].copy_(y[:, 1::2] * 2),
        lambda y: y[:, 1:].copy_(y[:, :1]),
        lambda y: y[:, :3].copy_(y[:, 3:].double()),
    ],
    ids=["slice", "broadcast", "another type"],
)
def test_what_is_assigned_has_a_gradient(assign):
    class Assigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.fc(x)
            assign(y)
            return self.head(y)

    model, x = randomise(Assigned()), small_inputs(6, 4)
    traced = trace(model, x)
    x.requires_grad_()
    expected = model(x)
    torch.testing.assert_close(traced(x), expected)
    gradients = [torch.autograd.grad(result.sum(), x)[0] for result in (traced(x), expected)]
    torch.testing.assert_close(*gradients)


def test_what_a_mask_selects_is_no_batch():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.fc(x)
            y[y > 0.5] *= 0.5
            return self.head(y)

    model, x = randomise(Halved()), small_inputs(20, 4)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), rtol=0.05, atol=0.05)


def test_how_many_a_mask_selects_of_each_row_need_not_be_known():
    class LastToken(nn.Module):
        """As sequences are classified by the state at their end mark, two of which each of these has."""

        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, tokens):
            y = self.fc(self.embed(tokens))
            return self.head(y[tokens == 2].view(y.shape[0], -1, 6)[:, -1])

    model, tokens = randomise(LastToken()), torch.randint(3, 9, (20, 7))
    tokens[torch.arange(20), torch.arange(20) % 5] = tokens[:, 6] = 2
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), tokens)
    with torch.no_grad():
        torch.testing.assert_close(quantized(tokens), model(tokens), rtol=0.05, atol=0.05)


def test_mapped_functions_are_written_out():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            return torch.vmap(lambda row: row * 2 - row.sum())(self.fc(x))

    model, x = randomise(Mapped()), small_inputs(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_frames_of_an_input_are_rows_of_a_convolution(preset):
    class Frames(nn.Module):
        """A convolution on (N * T, ...) images, as networks for video and averages over flipped images have it."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x):
            y = torch.relu(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
            return self.head(y.view(x.shape[0], x.shape[1], 8)).mean(1)

    model, x = randomise(Frames()), small_inputs(20, 3, 3, 6, 6)
    steps = {} if preset == "fast" else {"unit_steps": 2, "model_steps": 2}
    quantized, report = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset=preset, **steps), x)
    assert len(report.layers) == 2
    with torch.no_grad():
        for rows in (1, 20):
            torch.testing.assert_close(quantized(x[:rows]), model(x[:rows]), rtol=0.05, atol=0.05)


def test_a_result_without_rows_may_come_last():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            z = self.head(torch.relu(self.fc(x)))
            return z, z.mean()

    model, x = randomise(Averaged()), small_inputs(20, 4)
    spec = QuantSpec(w_bits=8, a_bits=8, preset="balanced", unit_steps=2, model_steps=2)
    quantized, report = quantize(model, spec, x)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), rtol=0.05, atol=0.05)
    assert any("depends on the others in its batch" in note for note in report.notes)


def test_attention_with_a_mask_is_written_out_whatever_the_layout_of_its_result():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
            return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))

    model, x = randomise(Masked()), small_inputs(20, 5, 8)
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), x)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), rtol=0.05, atol=0.05)


def test_an_encoder_that_leaves_out_padded_tokens_is_refused_with_what_to_do():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, x):
            padded = torch.arange(5).expand(x.shape[0], 5) >= 3 + (x[:, 0, :1] > 0).long()
            return self.head(self.encoder(x, src_key_padding_mask=padded).mean(1))

    with pytest.raises(QuantizationError, match="enable_nested_tensor=False"):
        quantize(Padded().eval(), QuantSpec(preset="fast"), small_inputs(20, 5, 8))


class _Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).argmax(1)


class _Branching(_Chosen):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_a_model_of_choices_alone_is_told_to_return_what_it_chooses_by() -> None:
    with pytest.raises(QuantizationError, match=r"returns int64 alone.*in front of an argmax"):
        quantize(_Chosen().eval(), QuantSpec(preset="fast"), [torch.randn(8, 6)])


def test_what_torch_prints_of_a_graph_that_it_gives_up_is_not_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(QuantizationError, match=r"if x.sum\(\) > 0"):
        quantize(_Branching().eval(), QuantSpec(preset="fast"), [torch.randn(8, 6)])
    assert "def forward" not in capfd.readouterr().err
