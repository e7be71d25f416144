"""Every operator and argument that the importer lets through gives what torch gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cat_plugin.errors import CompileError
from tests.tvm_backend.importer.cases import CASES, whole
from tests.tvm_backend.importer.tools import differences, exported
from tvm_backend.importer import honoured, program


class Transposed(nn.Module):
    """A linear layer over pixels of channels, as in MLP-Mixer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.flatten(2).transpose(1, 2))


MODULES = {
    "linear": nn.Sequential(nn.Flatten(1), nn.Linear(144, 3)),
    "linear on pixels": nn.Linear(6, 3, bias=False),
    "linear on a transposed input": Transposed(),
    "convolution": nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2),
    "convolution padding": nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
    "convolution reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
    "transposed 1d": nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 2, 3, 2, 1, 1)),
    "convolution 1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 2, 3, 2, 1, 2)),
    "batch norm": nn.BatchNorm2d(4),
    "group norm": nn.GroupNorm(2, 4),
    "group norm plain": nn.GroupNorm(2, 4, affine=False),
    "layer norm": nn.LayerNorm((6, 6)),
    "layer norm plain": nn.LayerNorm(6, elementwise_affine=False),
    "rms norm": nn.RMSNorm(6),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "instance norm plain": nn.InstanceNorm2d(4),
    "instance norm statistics": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "batch norm by the batch": nn.BatchNorm2d(4, track_running_stats=False),
    "prelu": nn.PReLU(4),
    "prelu one": nn.PReLU(),
    "upsample": nn.UpsamplingBilinear2d(scale_factor=2),
    "dropout": nn.Sequential(nn.Dropout(), nn.Dropout2d()),
}


def _filled(module):
    torch.manual_seed(1)
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.3, 1.5)
    return module


class Recurrent(nn.Module):
    """Two layers in both directions, of which the last step is taken."""

    def __init__(self, kind):
        super().__init__()
        self.layers = kind(6, 3, 2, bidirectional=True, batch_first=True)

    def forward(self, x):
        y, state = self.layers(x[:, 0])
        return y[:, -1], (state[0] if isinstance(state, tuple) else state)[-1]


class Attention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(6, 2, batch_first=True), weights

    def forward(self, x):
        x = x.flatten(1, 2)
        y, weights = self.attention(x, x, x, need_weights=self.weights)
        return (y, weights) if self.weights else y


MODULES.update(
    {
        "lstm": Recurrent(nn.LSTM),
        "gru": Recurrent(nn.GRU),
        "rnn": Recurrent(nn.RNN),
        "attention module": Attention(False),
        "attention weights": Attention(True),
    }
)


def _input():
    torch.manual_seed(0)
    return torch.randn(5, 4, 6, 6)


def _function(name):
    return CASES[name] if name in CASES else _filled(MODULES[name])


#: Operators of the cases that have been prepared for TVM so far: each is exported once.
_OPERATORS: dict[str, set[str]] = {}


def _note(monkeypatch, name):
    """Write down the operators of the program that is imported next, as the case of that name."""
    prepare = program.prepare

    def noting(given):
        prepared = prepare(given)
        _OPERATORS[name] = {program._name(node) for node in program._calls(prepared.program)}
        return prepared

    monkeypatch.setattr(program, "prepare", noting)


@pytest.mark.parametrize("name", [*CASES, *MODULES])
def test_gives_what_torch_gives(name, monkeypatch):
    _note(monkeypatch, name)
    errors = differences(_function(name), _input())
    assert max(errors) < 3e-5, {i: error for i, error in enumerate(errors) if error >= 3e-5}


def test_every_operator_of_the_table_is_among_the_cases(monkeypatch):
    for name in [name for name in [*CASES, *MODULES] if name not in _OPERATORS]:
        with monkeypatch.context() as patch:
            _note(patch, name)
            program.prepare(exported(_function(name), _input()))
    seen = set().union(*_OPERATORS.values())
    # These stand for their operand or for a number, and are left over in few programs.
    harmless = {"alias", "detach", "lift_fresh_copy", "_assert_tensor_metadata", "scalar_tensor"}
    unseen = set(honoured.HONOURED) - seen - {f"{name}.default" for name in harmless}
    assert not unseen, sorted(unseen)


def test_what_no_converter_reads_is_refused_by_name():
    def norm(x):
        return torch.ops.aten._softmax(x.double().float(), 1, False) + torch.ops.aten.cumsum(
            x, 1, dtype=torch.float32
        )

    differences(norm, _input())  # both are honoured
    with pytest.raises(CompileError, match=r"sort\.stable.*node"):
        differences(lambda x: torch.ops.aten.sort.stable(x, stable=True)[0], _input())
    with pytest.raises(CompileError, match=r"result 1 is used.*only the first 1"):
        differences(lambda x: F.max_pool2d(x, 2, return_indices=True)[1], _input())
    with pytest.raises(CompileError, match=r"dropout|bernoulli|rand"):
        differences(lambda x: F.dropout(x, 0.5, training=True), _input())


def test_an_argument_that_is_not_honoured_is_named(monkeypatch):
    monkeypatch.setitem(honoured.HONOURED, "gelu.default", "self")
    with pytest.raises(
        CompileError, match=r"aten\.gelu\.default \(node 'gelu'.*has approximate='tanh'.*'none' only"
    ):
        differences(lambda x: F.gelu(x, approximate="tanh"), _input())


def test_a_result_of_another_type_is_refused(monkeypatch):
    from tvm_backend.importer import rewrites

    plain = rewrites.table()
    del plain[torch.ops.aten.mul.Tensor]
    monkeypatch.setattr(rewrites, "table", lambda: plain)
    with pytest.raises(CompileError, match=r"mul\.Tensor.*makes of it .*int64, not float32"):
        differences(lambda x: whole(x) * 0.5, _input())
