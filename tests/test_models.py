"""Mode, device and fingerprint of a model, and what is said when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cat_plugin.batches import ModelCall, read_batch
from cat_plugin.errors import CalibrationError, HostError
from cat_plugin.models import device_of, evaluating, fingerprint, run_call

X = torch.ones(2, 3)


def test_every_module_is_put_back_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_modes_are_put_back_after_an_error():
    model = nn.Dropout()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


def test_training_mode_is_warned_of_when_asked_for(recwarn):
    with evaluating(nn.Linear(3, 3)), evaluating(nn.Linear(3, 3).eval(), warn=True):
        pass
    assert not recwarn.list
    with pytest.warns(UserWarning, match="training mode"), evaluating(nn.Linear(3, 3), warn=True):
        pass


def test_device():
    assert device_of(nn.ReLU()) is None
    assert device_of(nn.Linear(1, 1)) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(1, affine=False).to("meta")) == torch.device("meta")


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def test_an_error_of_the_model_says_what_it_was_given():
    with pytest.raises(CalibrationError) as caught:
        run_call(nn.Linear(4, 2), ModelCall((X,)), "calibration batch 7", "full-precision")
    message = str(caught.value)
    assert message.startswith("the full-precision model raised RuntimeError for calibration batch 7")
    assert "float32 (2, 3)" in message
    assert "cannot be multiplied" in message
    assert isinstance(caught.value.__cause__, RuntimeError)


class _OfOneMapping(nn.Module):
    def forward(self, batch):
        return batch["x"]


def test_a_mapping_that_is_one_argument_is_told_how_to_be_given():
    with pytest.raises(CalibrationError, match=r"keyword arguments; where .* a batch is \(\(mapping,\),\)"):
        run_call(_OfOneMapping(), read_batch({"x": X}, "batch"), "batch", "quantized")
    assert torch.equal(
        run_call(_OfOneMapping(), read_batch((({"x": X},),), "batch"), "batch", "quantized"), X
    )


@pytest.mark.parametrize("error", [HostError("ours"), MemoryError(), torch.OutOfMemoryError()])
def test_errors_that_pass(error):
    with pytest.raises(type(error)) as caught:
        run_call(Failing(error), ModelCall((X,)), "batch", "quantized")
    assert caught.value is error


def test_fingerprints_tell_apart():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    first = fingerprint(net)
    others = [fingerprint(net[0]), fingerprint(net, X), fingerprint(net, X + 1), fingerprint(net, {"a": 1})]
    others.append(fingerprint(nn.Sequential(net[0], nn.GELU())))
    with torch.no_grad():
        net[0].bias[0] += 1
    others.append(fingerprint(net))
    assert len({first, *others}) == len(others) + 1


def test_a_fingerprint_does_not_depend_on_addresses():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = lambda x: x

        def extra_repr(self):
            return f"{self.function!r}"

    assert fingerprint(Named()) == fingerprint(Named())


def test_a_fingerprint_does_not_depend_on_the_order_of_settings():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
