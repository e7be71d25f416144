"""The engine's entry point: what comes out, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from cat_plugin.errors import CalibrationError, CATTypeError, CATValueError, QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.report import QuantReport, UnitReport
from tests.ptq.models import Gelu1d, GroupedNet, SmallResNet, randomise, small_inputs

_QD = torch.ops.quantized_decomposed

CASES = [
    (SmallResNet, (32, 3, 12, 12)),
    (GroupedNet, (32, 4, 8, 8)),
    (Gelu1d, (32, 2, 40)),
]


def _spec(**options):
    return QuantSpec(**{"preset": "fast", "batch_size": 8, **options})


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_eight_bits_stay_close_to_full_precision(make, shape):
    model, x = randomise(make()), small_inputs(*shape)
    module, report = quantize(model, _spec(w_bits=8, a_bits=8), x.split(8))
    with torch.no_grad():
        reference, result = model(x), module(x)
    assert float(((result - reference) ** 2).mean() / (reference**2).mean()) < 2e-3
    assert len(report.layers) == sum(
        isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear) for m in model.modules()
    )
    assert report.unquantized == []


@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_and_layer_input_is_on_its_grid(make, shape, bits):
    model, x = randomise(make()), small_inputs(*shape)
    module, report = quantize(model, _spec(w_bits=bits, a_bits=bits, depthwise_bits=None), x.split(8))
    widths = {8: 0, bits: 0}
    for node in module.graph.nodes:
        if node.target is _QD.dequantize_per_channel.default:
            q, scale, _, axis, qmin, qmax, dtype = node.args
            q = module.get_buffer(q.target)
            assert q.dtype == dtype == torch.int8
            assert qmin <= int(q.min())
            assert int(q.max()) <= qmax
            assert axis == 0
            assert len(module.get_buffer(scale.target)) == q.shape[0]
            widths[(qmax - qmin + 1).bit_length() - 1] += 1
            user = next(iter(node.users))
            assert user.args[0].target is _QD.dequantize_per_tensor.default
            low, high = user.args[0].args[3:5]
            assert high - low == qmax - qmin
    assert widths[bits] == sum(layer.w_bits == bits for layer in report.layers)
    assert widths[8] == 2


def test_what_joins_is_quantized_at_residual_bits_beside_the_layers_bits():
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    module, _ = quantize(model, _spec(w_bits=2, a_bits=2, residual_bits=6, branch_bits=6), x)
    adds = [n for n in module.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(adds) == 2
    for add in adds:
        for operand in add.args:
            while operand.target in (torch.ops.aten.pad.default, torch.ops.aten.slice.Tensor):
                operand = operand.args[0]
            assert operand.target is _QD.dequantize_per_tensor.default
            assert operand.args[4] - operand.args[3] == 63
    sources = {}
    for node in module.graph.nodes:
        if node.target is _QD.quantize_per_tensor.default:
            sources.setdefault(node.args[0], []).append(node.args[4] - node.args[3])
    assert sorted(
        sources[next(n for n in module.graph.nodes if n.target is torch.ops.aten.relu.default)]
    ) == [3, 63]
    assert not any(s.target is _QD.dequantize_per_tensor.default for s in sources)


def test_branch_bits_hold_where_a_layers_own_output_is_added():
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    module, _ = quantize(model, _spec(w_bits=2, a_bits=2, residual_bits=2, branch_bits=7), x)
    for add in (n for n in module.graph.nodes if n.target is torch.ops.aten.add.Tensor):
        widths = {}
        for operand in add.args:
            while operand.target in (torch.ops.aten.pad.default, torch.ops.aten.slice.Tensor):
                operand = operand.args[0]
            source = operand.args[0].args[0]
            widths[source.target is torch.ops.aten.conv2d.default] = operand.args[4] - operand.args[3]
        assert widths == {True: 127, False: 3}


def test_depthwise_layers_read_8_bits_unless_they_are_told_otherwise():
    model, x = randomise(GroupedNet()), small_inputs(16, 4, 8, 8)
    for options, bits in (
        ({}, 8),
        ({"depthwise_bits": None}, 4),
        ({"depthwise_bits": 6}, 6),
        ({"overrides": {"depthwise": {"a_bits": 3}}}, 3),
    ):
        _, report = quantize(model, _spec(w_bits=4, a_bits=4, **options), x)
        widths = {layer.name: (layer.w_bits, layer.a_bits) for layer in report.layers}
        assert widths["depthwise"] == (4, bits)
        assert {width for name, width in widths.items() if name != "depthwise"} == {(4, 4), (8, 8)}


def test_overrides_skips_and_first_last_bits():
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    spec = _spec(
        w_bits=3,
        a_bits=5,
        first_bits=None,
        last_bits=6,
        overrides={"block1.*": {"w_bits": 2}},
        skip=("*.conv2",),
    )
    _, report = quantize(model, spec, x)
    bits = {layer.name: (layer.w_bits, layer.a_bits) for layer in report.layers}
    assert bits == {"stem.0": (3, 5), "block1.conv1": (2, 5), "block2.conv1": (3, 5), "fc": (6, 6)}
    assert [entry.split()[0] for entry in report.unquantized] == ["block1.conv2", "block2.conv2"]
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["w_bits"] == 2


def test_the_model_is_left_unchanged_and_its_mode_restored():
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    model.train()
    model.block1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="training mode"):
        quantize(model, _spec(), x)
    assert model.training
    assert not model.block1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_calibration_inputs_are_left_unchanged():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomise(SmallResNet())

        def forward(self, x):
            return self.inner(x.mul_(0.5))

    x = small_inputs(64, 3, 12, 12)
    before = x.clone()
    quantize(InPlace().eval(), _spec(preset="balanced", unit_steps=4, model_steps=4), x)
    assert torch.equal(x, before)


def test_calibration_may_be_a_generator_of_tuples():
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    from_tensor, _ = quantize(model, _spec(), x)
    from_generator, report = quantize(model, _spec(), ((b, torch.zeros(len(b))) for b in x.split(8)))
    assert torch.equal(from_tensor(x), from_generator(x))
    assert report.num_samples == 24
    assert any("24" in note for note in report.notes)


def test_a_module_called_twice_is_quantized_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv(x)))
            return self.fc(torch.relu(self.bn2(self.conv(x))).mean((2, 3)))

    model, x = randomise(Twice()), small_inputs(16, 3, 6, 6)
    module, report = quantize(model, _spec(w_bits=8, a_bits=8), x)
    assert [layer.name for layer in report.layers] == ["conv", "conv@2", "fc"]
    assert float((module(x) - model(x)).abs().max()) < 0.1


def test_a_dead_layer_and_a_constant_activation_do_no_harm():
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    model.block1.conv1.weight.data[3] = 0
    model.block1.bn1.bias.data[:] = -100.0  # everything behind the ReLU is 0
    module, _ = quantize(model, _spec(w_bits=8, a_bits=8), x)
    assert torch.isfinite(module(x)).all()
    assert float((module(x) - model(x)).abs().max()) < 0.2
    steps = {"unit_steps": 3, "model_steps": 2, "refinement_steps": 2}
    trained, _ = quantize(model, _spec(w_bits=2, a_bits=2, **{"preset": "best", **steps}), x)
    assert torch.isfinite(trained(x)).all()


@pytest.mark.parametrize("name", ["w_bits", "a_bits", "residual_bits", "first_bits"])
@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_two_to_eight_are_refused(name, bits):
    with pytest.raises(CATValueError, match="2 to 8"):
        QuantSpec(**{name: bits})


def test_unknown_options_name_the_nearest():
    with pytest.raises(CATValueError, match="'w_bits'"):
        QuantSpec.from_dict({"w_bit": 4})
    with pytest.raises(CATValueError, match="'a_bits'"):
        QuantSpec(overrides={"fc": {"abits": 4}})
    with pytest.raises(CATValueError, match="balanced"):
        QuantSpec(preset="turbo")
    assert (
        QuantSpec.from_dict(QuantSpec(overrides={"fc": {"a_bits": 4}}).to_dict()).overrides["fc"].a_bits == 4
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yielded no batch"),
        ([small_inputs(4, 3, 12, 12) * float("nan")], "batch 0"),
        ([small_inputs(4, 3, 12, 12), small_inputs(4, 3, 10, 10)], "batch 1"),
    ],
)
def test_calibration_sets_that_cannot_be_used_are_refused(batches, message):
    with pytest.raises(CalibrationError, match=message):
        quantize(randomise(SmallResNet()), _spec(), batches)


@pytest.mark.parametrize(
    ("batches", "message"), [([["text"]], "batch 0 is a list"), (5, "int, which cannot")]
)
def test_calibration_of_a_wrong_type_is_refused(batches, message):
    with pytest.raises(CATTypeError, match=message):
        quantize(randomise(SmallResNet()), _spec(), batches)


def test_no_calibration_inputs_and_no_shape_to_make_some_of_is_refused():
    with pytest.raises(CalibrationError, match=r"calibration is None.*or input_shape"):
        quantize(randomise(SmallResNet()), _spec(), None)


def test_what_the_model_itself_raises_is_told_with_what_it_was_given():
    with pytest.raises(CalibrationError, match=r"float32 \(8, 4, 12, 12\).*channels"):
        quantize(randomise(SmallResNet()), _spec(), small_inputs(8, 4, 12, 12))


def test_models_that_cannot_be_used_are_refused():
    x = small_inputs(8, 3, 12, 12)

    class Text(nn.Module):
        def forward(self, x):
            return "a cat", "a dog"

    with pytest.raises(QuantizationError, match="returns a tuple, in which no tensor"):
        quantize(Text(), _spec(), x)
    with pytest.raises(QuantizationError, match="no convolution or linear"):
        quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), _spec(), x)
    with pytest.raises(CATTypeError):
        quantize(lambda x: x, _spec(), x)
    broken = randomise(SmallResNet())
    broken.fc.bias.data[0] = float("inf")
    with pytest.raises(CalibrationError, match="batch 0"):
        quantize(broken, _spec(), x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip": ("block1.con1",)}, "skip has the pattern 'block1.con1', which matches no layer; did you mean 'block1.conv1'"),
        ({"overrides": {"layer9.*": {"w_bits": 8}}}, "overrides has the pattern"),
    ],
)  # fmt: skip
def test_patterns_that_match_no_layer_are_refused(values, message):
    model, x = randomise(SmallResNet()), small_inputs(16, 3, 12, 12)
    with pytest.raises(CATValueError, match=re.escape(message)):
        quantize(model, _spec(**values), x)


def test_what_is_said_of_many_units_is_one_line(caplog):
    """Each note is in the report; the log has one line with their number."""
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    with caplog.at_level("INFO", "cat_plugin"):
        _, report = quantize(model, QuantSpec(a_bits=8, preset="fast", weight_budget=3.0, num_samples=24), x)
    assert len([note for note in report.notes if note.startswith("mixed precision")]) > 1
    (line,) = [r.getMessage() for r in caplog.records if "mixed precision" in r.getMessage()]
    assert f"and {len(report.notes) - 1} more of the kind" in line


def test_units_that_kept_their_values_are_counted():
    note = "training did not improve it: initial values kept"
    units = [UnitReport(f"u{i}", "unit", 1.0, 1.0, 5, note if i < 4 else "") for i in range(6)]
    report = QuantReport(units=units, notes=[*(f"unit u{i}: {note}" for i in range(4)), "something else"])
    assert report.summary() == ["something else", f"{note}, in 4 of 6 trained units (u0, u1, u2, ...)"]
