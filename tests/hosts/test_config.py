"""CATConfig: spellings of a base, local bit-widths, and what is refused."""

from __future__ import annotations

import pytest

from cat_plugin.errors import RecipeError

from .conftest import needs_inc3

pytestmark = needs_inc3


def test_every_spelling_of_a_base_is_one_configuration():
    from neural_compressor.torch.quantization import RTNConfig

    import cat_plugin

    given = cat_plugin.CATConfig(base=RTNConfig(bits=3))
    assert given == cat_plugin.CATConfig(base={"rtn": {"bits": 3}})
    assert given == cat_plugin.CATConfig(base={"rtn": {"global": {"bits": 3}}})
    assert given.uses("rtn")
    assert not given.uses("gptq")
    assert cat_plugin.CATConfig(base="rtn").base.bits == RTNConfig().bits
    several = cat_plugin.CATConfig(base=["rtn", {"gptq": {"bits": 4}}])
    assert several.uses("rtn")
    assert several.uses("gptq")
    assert [next(iter(base)) for base in several.to_dict()["base"]] == ["rtn", "gptq"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (3, "cat.base is a int; expected one configuration of the host"),
        ({"rtn": {}, "gptq": {}}, "has the keys rtn, gptq; expected the name of one"),
        ({}, "expected the name of one algorithm"),
        ("rtm", "unknown algorithm 'rtm' in cat.base; did you mean 'rtn'"),
        ({"rtn": {"bit": 4}}, "unknown key 'bit' in cat.base.rtn; did you mean 'bits'"),
    ],
)
def test_a_base_that_is_none_is_refused(base, message):
    import cat_plugin

    with pytest.raises(RecipeError, match=message):
        cat_plugin.CATConfig(base=base)
    config = cat_plugin.CATConfig()
    with pytest.raises(RecipeError, match=message):
        config.base = base
    assert config.base is None


def test_options_that_are_set_later_are_checked_as_well():
    import cat_plugin

    config = cat_plugin.CATConfig(w_bits=4)
    with pytest.raises(RecipeError):
        config.w_bits = "four"
    assert config.w_bits == 4
    config.base = "rtn"
    assert config.uses("rtn")


def test_local_bits_survive_a_mapping_and_nothing_else_is_local():
    import cat_plugin

    config = cat_plugin.CATConfig.from_dict(
        {"global": {"w_bits": 2, "a_bits": 4}, "local": {"layer1.*": {"w_bits": 8, "a_bits": 8}}}
    )
    assert config.overrides == {"layer1.*": {"w_bits": 8, "a_bits": 8}}
    assert cat_plugin.CATConfig.from_dict(config.to_dict()) == config
    with pytest.raises(RecipeError, match="only w_bits and a_bits can differ"):
        config.set_local("head", cat_plugin.CATConfig(preset="best"))
    with pytest.raises(RecipeError, match="takes layer names and a CATConfig"):
        config.set_local(["head", 3], cat_plugin.CATConfig())


@pytest.mark.parametrize(
    "make",
    [
        lambda cat, rtn: cat(base=rtn(), w_bits=4),
        lambda cat, rtn: cat(w_bits=4) + rtn(),
        lambda cat, rtn: cat.from_dict({"base": "rtn", "w_bits": 4}),
        lambda cat, rtn: setattr(cat(base="rtn"), "w_bits", 4),
    ],
)
def test_an_option_of_the_engine_beside_a_base_is_refused_at_its_default_too(make):
    from neural_compressor.torch.quantization import RTNConfig

    import cat_plugin

    with pytest.raises(RecipeError, match="both base and w_bits"):
        make(cat_plugin.CATConfig, RTNConfig)


def test_the_signature_and_the_defaults_are_those_declared():
    import inspect
    import json

    import cat_plugin
    from cat_plugin.recipe.schema import cat_options

    parameters = inspect.signature(cat_plugin.CATConfig).parameters
    assert {name: each.default for name, each in parameters.items()} == {
        name: each.plain_default for name, each in cat_options().items()
    }
    config = cat_plugin.CATConfig(2, skip=["head"], alpha=[0.3, 0.4])
    assert config.w_bits == 2
    assert config.num_samples == 1024
    assert cat_plugin.CATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for name in parameters:
        assert f"\n{name} : " in (cat_plugin.CATConfig.__doc__ or "")
    with pytest.raises(RecipeError, match="given an option twice"):
        cat_plugin.CATConfig(2, w_bits=2)
    with pytest.raises(RecipeError, match=r"skip\.0 is 3; expected a word"):
        cat_plugin.CATConfig(skip=[3])
    with pytest.raises(RecipeError, match="overrides is 3; expected a mapping"):
        cat_plugin.CATConfig(overrides=3)
