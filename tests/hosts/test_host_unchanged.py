"""The host without CAT behaves as it does without the plugin.

The same script runs in two interpreters, with and without ``import cat_plugin``; what it prints
must be equal. It goes through the documented behaviour of every part that the plugin extends.
"""

from __future__ import annotations

import json
import textwrap

import pytest

from .conftest import INC
from .fresh import fresh

COMMON = """
    import copy, json, sys, os, tempfile, logging
    sys.path.insert(0, os.getcwd())
    os.chdir(tempfile.mkdtemp())
    if sys.argv[1] == "with":
        import cat_plugin
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
    batches = list(torch.randn(96, 16).split(32))
    x = torch.randn(40, 16)
    found = {}

    def run_fn(model):
        for batch in batches:
            model(batch)

    def outcome(name, call):
        try:
            found[name] = call()
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}".replace(os.getcwd(), "HERE")

    def logits(model):
        with torch.no_grad():
            return [float(v) for v in model(x).flatten()]
"""

SCRIPT3 = """
    from neural_compressor.torch import quantization as q
    from neural_compressor.common.base_config import (
        BaseConfig, ComposableConfig, config_registry, get_all_config_set_from_config_registry,
        register_supported_configs_for_fwk,
    )
    from neural_compressor.torch.utils.utility import algos_mapping

    rtn = lambda **k: q.RTNConfig(use_layer_wise=False, **k)
    found["algorithms"] = [name for name in algos_mapping if name != "cat"]
    found["registered"] = sorted(set(config_registry.get_cls_configs()["torch"]) - {"cat"})
    outcome("classes", lambda: [c.__name__ for c in config_registry.get_all_config_cls_by_fwk_name("torch")])
    outcome("all configs", lambda: [type(c).__name__ for c in q.get_all_config_set()])
    outcome("supported", lambda: register_supported_configs_for_fwk("torch"))

    # Configurations: expansion, sums, dictionaries.
    outcome("expand", lambda: [c.to_dict() for c in rtn(bits=[4, 8], group_size=[16, 32]).expand()])
    outcome("same class", lambda: type(rtn(bits=4) + rtn(bits=8)).__name__)
    outcome("two classes", lambda: [type(c).__name__ for c in (rtn(bits=4) + q.GPTQConfig()).config_list])
    outcome("three classes", lambda: [type(c).__name__ for c in (rtn() + q.GPTQConfig() + q.HQQConfig()).config_list])
    outcome("from dict", lambda: ComposableConfig.from_dict(
        {"rtn": {"bits": 3}}, config_registry.get_cls_configs()["torch"]).to_dict())
    outcome("from two", lambda: ComposableConfig.from_dict(
        {"rtn": {"bits": 3}, "gptq": {"bits": 4}}, config_registry.get_cls_configs()["torch"]).to_dict())
    outcome("from none", lambda: ComposableConfig.from_dict({}, config_registry.get_cls_configs()["torch"]))
    outcome("unknown", lambda: ComposableConfig.from_dict({"no": {}}, config_registry.get_cls_configs()["torch"]))
    outcome("locals", lambda: rtn(bits=4).set_local("0", rtn(bits=8)).to_dict())

    # The functions.
    outcome("quantize", lambda: logits(q.quantize(copy.deepcopy(net), rtn(bits=3, group_size=8))))
    outcome("quantize by dict", lambda: logits(
        q.quantize(copy.deepcopy(net), {"rtn": {"bits": 3, "group_size": 8, "use_layer_wise": False}})))
    outcome("convert", lambda: logits(q.convert(q.prepare(copy.deepcopy(net), rtn(bits=3, group_size=8)))))

    def tune(scores, **options):
        left = iter(scores)
        seen = []
        def evaluate(model):
            seen.append(logits(model)[:2])
            return next(left)
        config = q.TuningConfig(config_set=[rtn(bits=[8, 4], group_size=[8, 16])], **options)
        best = q.autotune(copy.deepcopy(net), config, evaluate, run_fn=run_fn)
        return [None if best is None else logits(best), seen, config.max_trials]

    outcome("tune, first", lambda: tune([1.0, 1.0]))
    outcome("tune, later", lambda: tune([1.0, 0.5, 0.6, 0.999]))
    outcome("tune, best of two", lambda: tune([1.0, 0.6, 0.5], max_trials=2))
    outcome("tune, never", lambda: tune([1.0, 0.6, 0.5, 0.7, 0.2]))
    model = q.quantize(copy.deepcopy(net), rtn(bits=4, group_size=8))
    outcome("save", lambda: q.save(model, "saved"))
    outcome("saved files", lambda: sorted(os.listdir("saved")))
    outcome("load", lambda: logits(q.load("saved", copy.deepcopy(net))))
    outcome("load nothing", lambda: q.load("nowhere", copy.deepcopy(net)))
"""

SCRIPT2 = """
    from neural_compressor import PostTrainingQuantConfig, quantization
    from neural_compressor.config import AccuracyCriterion, TuningCriterion

    class Loader:
        batch_size = 32
        def __iter__(self):
            for batch in batches:
                yield batch, torch.zeros(len(batch))

    outcome("recipes", lambda: PostTrainingQuantConfig(recipes={"smooth_quant": True, "other": 1}).recipes)
    outcome("no recipes", lambda: PostTrainingQuantConfig().recipes)
    outcome("recipes of a wrong type", lambda: PostTrainingQuantConfig(recipes=3).recipes)

    def fit(scores=None, **options):
        left = iter(scores or ())
        seen = []
        def evaluate(model):
            seen.append(logits(model)[:2])
            return next(left)
        made = quantization.fit(
            copy.deepcopy(net), PostTrainingQuantConfig(**options), calib_dataloader=Loader(),
            eval_func=evaluate if scores else None)
        return [None if made is None else logits(made.model), seen]

    outcome("default", lambda: fit())
    outcome("first", lambda: fit([1.0, 1.0]))
    outcome("never", lambda: fit([1.0, 0.5, 0.5, 0.5], tuning_criterion=TuningCriterion(max_trials=3)))
    outcome("evaluation fails", lambda: fit([1.0]))
    outcome("weight only", lambda: fit(approach="weight_only"))
    if sys.argv[2] == "yaml":
        from neural_compressor.experimental import Quantization, common
        from neural_compressor.conf.config import schema
        def from_yaml(section):
            with open("c.yaml", "w") as f:
                f.write("model: {name: n, framework: pytorch_fx}\\nquantization:\\n  approach: post_training_static_quant\\n"
                        + section)
            quantizer = Quantization("c.yaml")
            quantizer.model = common.Model(copy.deepcopy(net))
            quantizer.calib_dataloader = Loader()
            return logits(quantizer.fit().model)
        outcome("yaml", lambda: from_yaml(""))
        outcome("yaml recipes", lambda: from_yaml("  recipes: {weight_correction: false}\\n"))
        outcome("yaml mistake", lambda: from_yaml("  approach_: x\\n"))
        outcome("schema", lambda: schema.validate(
            {"model": {"name": "n", "framework": "pytorch_fx"}, "quantization": {}})["quantization"])
"""


def outcomes(script: str, plugin: str) -> dict[str, object]:
    code = (
        textwrap.dedent(COMMON) + textwrap.dedent(script) + "\nprint('@@' + json.dumps(found, default=str))\n"
    )
    printed = fresh(code, plugin, "yaml" if INC < (3, 0) else "python")
    return json.loads(next(line for line in reversed(printed) if line.startswith("@@"))[2:])


SCRIPTS = [
    pytest.param(
        SCRIPT3, id="3.x API", marks=pytest.mark.skipif(INC < (3, 0), reason="this release has no 3.x API")
    ),
    pytest.param(
        SCRIPT2,
        id="2.x API",
        marks=pytest.mark.skipif(not (2, 0) <= INC < (3, 8), reason="this release has no 2.x API"),
    ),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_host_behaves_as_without_the_plugin(script):
    without, with_plugin = outcomes(script, "without"), outcomes(script, "with")
    assert with_plugin == without
    numbers = [value for value in without.values() if isinstance(value, list) and value]
    assert len(numbers) > 3, "the script hardly did anything, so that nothing was compared"
