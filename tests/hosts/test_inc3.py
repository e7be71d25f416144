"""Neural Compressor 3.x: every spelling means the same, and the result is what was asked for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cat_plugin.errors import CATError, HostError, RecipeError

from .conftest import INC, needs_inc3, needs_pt2e

pytestmark = needs_inc3

if INC >= (3, 0):
    from neural_compressor.torch.quantization import (
        AWQConfig,
        GPTQConfig,
        RTNConfig,
        TEQConfig,
        convert,
        prepare,
        quantize,
    )

    from cat_plugin import CATConfig

FAST = {"w_bits": 3, "a_bits": 4, "preset": "fast", "mode": "diagonal", "num_clusters": 4}


def by_hand(task, quantized, **options):
    """The corrected logits of the test images, from two models and the estimator alone."""
    from cat_plugin.cluster_affine import ClusterAffine

    x = torch.cat(task.batches)
    with torch.no_grad():
        z_q = torch.cat([quantized(batch) for batch in task.batches]).numpy()
        z_fp = task.net(x).numpy()
    estimator = ClusterAffine(n_clusters=4, random_state=0, **options).fit(z_q, z_fp)
    return estimator.predict(task.logits(quantized).numpy())


def test_engine_runs_when_no_base_is_given(task):
    from cat_plugin.ptq import QuantSpec
    from cat_plugin.ptq import quantize as engine

    corrected = quantize(copy.deepcopy(task.net), CATConfig(**{**FAST, "mode": "auto"}), run_fn=task.run_fn)
    alone, _ = engine(task.net, QuantSpec(w_bits=3, a_bits=4, preset="fast"), task.batches)
    assert torch.equal(task.logits(corrected.model), task.logits(alone))
    np.testing.assert_allclose(task.logits(corrected).numpy(), by_hand(task, alone), rtol=1e-4, atol=1e-4)
    assert corrected.config["w_bits"] == 3


def spellings():
    base = {"bits": 3, "group_size": 16}
    if INC < (3, 0):
        return {}
    extra = {"use_layer_wise": False}
    return {
        "base object": lambda: CATConfig(base=RTNConfig(**base, **extra), num_clusters=4),
        "base mapping": lambda: CATConfig(base={"rtn": {**base, **extra}}, num_clusters=4),
        "cat + rtn": lambda: CATConfig(num_clusters=4) + RTNConfig(**base, **extra),
        "rtn + cat": lambda: RTNConfig(**base, **extra) + CATConfig(num_clusters=4),
        "dict of base": lambda: {"cat": {"base": {"rtn": {**base, **extra}}, "num_clusters": 4}},
        "dict rtn, cat": lambda: {"rtn": {**base, **extra}, "cat": {"num_clusters": 4}},
        "dict cat, rtn": lambda: {"cat": {"num_clusters": 4}, "rtn": {**base, **extra}},
        "layer-wise left at its default": lambda: {"rtn": base, "cat": {"num_clusters": 4}},
    }


@pytest.mark.parametrize("spelling", list(spellings()))
@pytest.mark.parametrize("way", ["quantize", "prepare, convert", "prepare, convert, copies"])
def test_every_spelling_and_way_means_the_same(task, spelling, way):
    config = spellings()[spelling]()
    model = copy.deepcopy(task.net)
    if way == "quantize":
        corrected = quantize(model, config, run_fn=task.run_fn)
    else:
        inplace = not way.endswith("copies")
        prepared = prepare(model, config, inplace=inplace)
        assert (prepared is model) == inplace
        task.run_fn(prepared)
        corrected = convert(prepared, inplace=inplace)
    host = quantize(
        copy.deepcopy(task.net), RTNConfig(bits=3, group_size=16, use_layer_wise=False), run_fn=task.run_fn
    )
    assert torch.equal(task.logits(corrected.model), task.logits(host))
    np.testing.assert_allclose(task.logits(corrected).numpy(), by_hand(task, host), rtol=1e-4, atol=1e-4)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.fc1 = torch.nn.Linear(32, 64)
        self.fc2 = torch.nn.Linear(64, 32)

    def forward(self, x):
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))


class Stack(torch.nn.Module):
    """As transformers are laid out: what the hosts' algorithms for language models look for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(32, 32)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "TEQ"])
@pytest.mark.parametrize("way", ["quantize", "prepare, convert"])
def test_other_algorithms_of_the_host(name, way):
    """On a stack of blocks of linear layers, which is what these algorithms are made for."""
    torch.manual_seed(0)
    net = Stack().eval()
    batches = list(torch.randn(200, 4, 32).split(50))
    x = torch.randn(100, 4, 32)

    def run_fn(model):
        for batch in batches:
            model(batch)

    # Of a model that is no Hugging Face checkpoint, GPTQ wants to know a directory.
    options = {"model_path": "."} if name == "GPTQ" else {}
    config = {"GPTQ": GPTQConfig, "AWQ": AWQConfig, "TEQ": TEQConfig}[name](bits=3, group_size=16, **options)
    # AWQ moves its example to a device, the others unpack theirs.
    example = batches[0] if name == "AWQ" else (batches[0],)
    try:
        host = _run(way, copy.deepcopy(net), copy.deepcopy(config), run_fn, example)
    except Exception as error:
        pytest.skip(
            f"{name} of this release fails on this model without CAT too: {type(error).__name__}: {error}"
        )
    corrected = _run(way, copy.deepcopy(net), CATConfig(base=config, num_clusters=4), run_fn, example)
    with torch.no_grad():
        assert torch.equal(corrected.model(x), host(x))
        target = net(torch.cat(batches))
        before = ((host(torch.cat(batches)) - target) ** 2).mean()
        after = ((corrected(torch.cat(batches)) - target) ** 2).mean()
    assert after < before


def _run(way, model, config, run_fn, example):
    if way == "quantize":
        return quantize(model, config, run_fn=run_fn, example_inputs=example)
    prepared = prepare(model, config, example_inputs=example)
    run_fn(prepared)
    return convert(prepared)


@needs_pt2e
@pytest.mark.parametrize("way", ["quantize", "prepare, convert"])
def test_static_int8(task, way):
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig

    shapes = ({0: torch.export.Dim("batch", min=1)},)

    def exported():
        return export(copy.deepcopy(task.net), example_inputs=(task.batches[0],), dynamic_shapes=shapes)

    example = (task.batches[0],)
    host = _run(way, exported(), INT8StaticQuantConfig(), task.run_fn, example)
    corrected = _run(
        way, exported(), INT8StaticQuantConfig() + CATConfig(num_clusters=4), task.run_fn, example
    )
    assert torch.equal(task.logits(corrected.model), task.logits(host))
    np.testing.assert_allclose(task.logits(corrected).numpy(), by_hand(task, host), rtol=1e-4, atol=1e-4)


@needs_pt2e
def test_static_int8_of_a_model_that_was_not_exported(task):
    from neural_compressor.torch.quantization import INT8StaticQuantConfig

    with pytest.raises(HostError, match="export it first"):
        quantize(copy.deepcopy(task.net), CATConfig(base=INT8StaticQuantConfig()), run_fn=task.run_fn)


def test_prepare_and_convert_with_the_engine_equal_quantize(task):
    prepared = prepare(copy.deepcopy(task.net), CATConfig(**FAST))
    task.run_fn(prepared)
    one = convert(prepared)
    other = quantize(copy.deepcopy(task.net), {"cat": FAST}, run_fn=task.run_fn)
    assert torch.equal(task.logits(one), task.logits(other))


def test_calibration_buffer_that_is_filled_again(task):
    """A loader that reuses its buffer must not spoil what was recorded."""
    buffer = torch.empty_like(task.batches[0])

    def run_fn(model):
        for batch in task.batches:
            buffer.copy_(batch)
            model(buffer)
        buffer.zero_()

    one = quantize(copy.deepcopy(task.net), CATConfig(**FAST), run_fn=run_fn)
    other = quantize(copy.deepcopy(task.net), CATConfig(**FAST), run_fn=task.run_fn)
    assert torch.equal(task.logits(one), task.logits(other))


def test_run_args_reach_run_fn(task):
    def run_fn(model, batches):
        for batch in batches:
            model(batch)

    one = quantize(copy.deepcopy(task.net), CATConfig(**FAST), run_fn=run_fn, run_args=(task.batches,))
    other = quantize(copy.deepcopy(task.net), CATConfig(**FAST), run_fn=task.run_fn)
    assert torch.equal(task.logits(one), task.logits(other))


def test_layers_of_their_own_bits(task):
    config = CATConfig(**FAST).set_local("fc1", CATConfig(w_bits=8, a_bits=8))
    corrected = quantize(copy.deepcopy(task.net), config, run_fn=task.run_fn)
    bits = {layer["name"]: (layer["w_bits"], layer["a_bits"]) for layer in corrected.report["layers"]}
    assert bits["fc1"] == (8, 8)
    assert bits["conv2"] == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CATConfig(num_cluster=4), "did you mean 'num_clusters'"),
        (lambda: CATConfig(w_bits=1), "2 to 8"),
        (lambda: CATConfig(a_bits=[4, 9]), "2 to 8"),
        (lambda: CATConfig(w_bits=[]), "empty list"),
        (lambda: CATConfig(alpha=1.5), "from 0"),
        (lambda: CATConfig(mode="diagonl"), "diagonal"),
        (lambda: CATConfig(base={"rtn": {"bit": 4}}), "did you mean 'bits'"),
        (lambda: CATConfig(base={"rnt": {}}), "did you mean 'rtn'"),
        (lambda: CATConfig(base={"rtn": {}, "gptq": {}}), "name of one algorithm"),
        (lambda: CATConfig(base=3), "int"),
        (lambda: CATConfig(base={"rtn": {}}, w_bits=2), "both base and w_bits"),
        (lambda: CATConfig() + CATConfig(), "two CATConfigs"),
        (lambda: CATConfig(base={"rtn": {}}) + GPTQConfig(), "has a base already"),
        (lambda: RTNConfig() + GPTQConfig() + CATConfig(), "ComposableConfig"),
    ],
)
def test_configurations_that_cannot_be(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_setting_an_attribute_is_checked():
    config = CATConfig()
    config.w_bits = 2
    assert config.to_dict()["w_bits"] == 2
    with pytest.raises(RecipeError, match="2 to 8"):
        config.w_bits = 9


def test_to_dict_and_back():
    for config in (CATConfig(w_bits=[2, 4]), CATConfig(base=RTNConfig(bits=3), alpha=0.3)):
        assert CATConfig.from_dict(config.to_dict()) == config
    assert CATConfig(w_bits=2) != CATConfig(w_bits=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: quantize(copy.deepcopy(task.net), CATConfig()), "pass run_fn"),
        (
            lambda task: quantize(copy.deepcopy(task.net), CATConfig(w_bits=[2, 4]), run_fn=task.run_fn),
            "autotune",
        ),
        (
            lambda task: quantize(copy.deepcopy(task.net), CATConfig(), run_fn=lambda model: None),
            "did not run",
        ),
        (lambda task: quantize(copy.deepcopy(task.net), CATConfig(), run_fn="data"), "run_fn is a str"),
        (lambda task: convert(prepare(copy.deepcopy(task.net), CATConfig())), "not run between"),
        (lambda task: convert(copy.deepcopy(task.net), CATConfig()), "not prepared with CAT"),
    ],
)
def test_calls_that_cannot_work(task, call, message):
    with pytest.raises(CATError, match=message):
        call(task)


def test_nan_in_calibration_names_the_batch(task):
    def run_fn(model):
        for number, batch in enumerate(task.batches):
            model(batch * float("nan") if number == 2 else batch)

    with pytest.raises(CATError, match="batch 2"):
        quantize(copy.deepcopy(task.net), CATConfig(**FAST), run_fn=run_fn)


def test_expansion_is_the_cross_product_cheap_first():
    config = CATConfig(
        w_bits=[4, 2], a_bits=4, preset=["balanced", "fast"], num_clusters=[64, 8], alpha=[0.4, 0.3]
    )
    configs = config.expand()
    seen = [(c.preset, c.w_bits, c.num_clusters, c.alpha) for c in configs]
    assert len(seen) == len(set(seen)) == 16
    assert [preset for preset, *_ in seen] == ["fast"] * 8 + ["balanced"] * 8
    assert [(w, k) for _, w, k, _ in seen[:8]] == [
        (4, 8),
        (4, 8),
        (4, 64),
        (4, 64),
        (2, 8),
        (2, 8),
        (2, 64),
        (2, 64),
    ]


def test_expansion_of_the_lists_of_a_base():
    config = CATConfig(base=RTNConfig(bits=[3, 4], group_size=[16, 32]), alpha=[0.4, 0.3])
    seen = [(c.base.bits, c.base.group_size, c.alpha) for c in config.expand()]
    assert sorted(seen) == [(b, g, a) for b in (3, 4) for g in (16, 32) for a in (0.3, 0.4)]


def test_a_package_that_an_algorithm_of_the_host_lacks_is_named(task, monkeypatch):
    """GPTQ imports tqdm, which the host does not declare."""
    from cat_plugin.hosts.inc3 import algorithm

    def lacking(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr(algorithm, "_host_function", lambda name: lacking)
    with pytest.raises(HostError, match=r"rtn needs the package tqdm, .*pip install tqdm"):
        quantize(copy.deepcopy(task.net), CATConfig(base=RTNConfig(bits=4)), run_fn=task.run_fn)


def test_rows_that_the_engine_is_not_given(task):
    rows = torch.cat([*task.batches, task.images])[:600]
    made = quantize(
        copy.deepcopy(task.net),
        CATConfig(**FAST, holdout=0.5),
        run_fn=lambda model: [model(batch) for batch in rows.split(100)],
    )
    assert made.report["num_samples"] == 300
    assert made.config["holdout"] == 0.5
