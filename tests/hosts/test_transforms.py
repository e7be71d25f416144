"""Channels scaled and rotated by the engine, weights rounded by the host's own algorithms."""

from __future__ import annotations

import copy

import pytest
import torch

from cat_plugin.errors import HostError, RecipeError

from .conftest import INC, needs_inc3

pytestmark = needs_inc3

if INC >= (3, 0):
    from neural_compressor.torch.quantization import (
        AWQConfig,
        GPTQConfig,
        RTNConfig,
        TuningConfig,
        autotune,
        prepare,
        quantize,
    )

    from cat_plugin import CATConfig


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.fc1, self.fc2 = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Stack(torch.nn.Module):
    """Norms of a few large channels, as trained transformers have them, read by weights that are small there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 10)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        with torch.no_grad():
            for block in self.layers:
                factors = torch.logspace(-1.5, 1.5, 32)[torch.randperm(32)]
                block.norm.weight.mul_(factors)
                block.norm.bias.mul_(factors)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    net = Stack().eval()
    return net, list(torch.randn(256, 4, 32).split(64))


def _config(name):
    if name == "rtn":
        return RTNConfig(bits=3, group_size=-1, use_layer_wise=False)
    if name == "gptq":
        return GPTQConfig(bits=3, group_size=-1, model_path=".")
    return AWQConfig(bits=3, group_size=-1)


def _run(net, batches, name, **options):
    def run_fn(model):
        for batch in batches:
            model(batch)

    example = batches[0] if name == "awq" else (batches[0],)
    config = CATConfig(base=_config(name), num_clusters=1, mode="diagonal", **options)
    return quantize(copy.deepcopy(net), config, run_fn=run_fn, example_inputs=example)


def _error(net, made, batches):
    with torch.no_grad():
        return float(((made.model(torch.cat(batches)) - net(torch.cat(batches))) ** 2).mean())


@pytest.mark.parametrize(("name", "method"), [("rtn", "searched"), ("gptq", "searched"), ("awq", "lrquant")])
def test_the_hosts_rounding_loses_less_behind_the_transform(stack, name, method, tmp_path):
    if name == "gptq":
        pytest.importorskip("tqdm", reason="the host's GPTQ imports it")
    net, batches = stack
    plain = _run(net, batches, name)
    made = _run(net, batches, name, smoothing=method)
    assert _error(net, made, batches) < 0.9 * _error(net, plain, batches)
    assert made.config["smoothing"] == method
    from cat_plugin import load, save

    save(made, tmp_path / "saved")
    again = load(tmp_path / "saved", model=net)
    with torch.no_grad():
        assert torch.equal(again(batches[0]), made(batches[0]))


def test_what_is_transformed_is_the_model_alone(stack):
    net, batches = stack
    from cat_plugin.ptq import QuantSpec, transform

    made = _run(net, batches, "rtn", smoothing="smoothquant", smoothing_strength=0.3)
    spec = QuantSpec(w_bits=3, weight_only=True, smoothing="smoothquant", smoothing_strength=0.3)
    host = quantize(transform(net, spec, batches), _config("rtn"), run_fn=lambda model: None)
    with torch.no_grad():
        assert torch.equal(made.model(batches[0]), host(batches[0]))


def test_the_transform_is_tuned_like_any_option(stack):
    net, batches = stack

    def run_fn(model):
        for batch in batches:
            model(batch)

    def score(model):
        with torch.no_grad():
            return -float(((model(torch.cat(batches)) - net(torch.cat(batches))) ** 2).mean())

    space = CATConfig(base=_config("rtn"), num_clusters=1, mode="diagonal", smoothing=[None, "searched"])
    best = autotune(
        copy.deepcopy(net), TuningConfig(config_set=[space], tolerable_loss=0.0), score, run_fn=run_fn
    )
    assert best.config["smoothing"] == "searched"


def test_what_cannot_go_over_a_base_is_refused(stack):
    net, batches = stack
    with pytest.raises(RecipeError, match="both base and rounding"):
        CATConfig(base="rtn", rounding="none")
    with pytest.raises(HostError, match="need the calibration data before"):
        prepare(copy.deepcopy(net), CATConfig(base=_config("rtn"), smoothing="searched"))
    with pytest.raises(HostError, match="and the base is static_quant"):
        quantize(
            copy.deepcopy(net),
            CATConfig(base="static_quant", smoothing="searched"),
            run_fn=lambda model: model(batches[0]),
        )
