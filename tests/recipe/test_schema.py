"""The schema that editors read, and that an option is declared once."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import RecipeError
from cat_plugin.options import options_of
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe import options
from cat_plugin.recipe.correction import CorrectionOptions
from cat_plugin.recipe.schema import SCHEMA_FILE, cat_options, schema_text


def test_the_file_beside_the_code_is_up_to_date():
    assert SCHEMA_FILE.read_text("utf-8") == schema_text(), "run: python -m cat_plugin.recipe.schema"


def test_every_option_is_in_it_with_its_default():
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA_FILE.read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    described = schema["$defs"]["Cat"]["properties"]
    declared = {**options_of(QuantSpec), **options_of(CorrectionOptions)}
    assert set(described) == {*declared, "base"}
    for name, each in described.items():
        assert each["description"]
        assert each["since"]
        assert cat_options()[name].plain_default == each["default"]


@pytest.mark.parametrize(
    ("params", "valid"),
    [
        ({}, True),
        ({"w_bits": 2}, True),
        ({"w_bits": [2, 4]}, True),
        ({"w_bits": []}, False),
        ({"w_bits": [2, 9]}, False),
        ({"w_bits": True}, False),
        ({"first_bits": None}, True),
        ({"pca_dim": [None, 50]}, True),
        ({"skip": ["head"]}, True),
        ({"skip": [["head"], []]}, True),
        ({"skip": []}, True),
        ({"skip": [3]}, False),
        ({"skip": "head"}, False),
        ({"overrides": {"fc": {"w_bits": 8}}}, True),
        ({"overrides": {"fc": {"bits": 8}}}, False),
        ({"overrides": 3}, False),
        ({"weight_candidates": [2, 4]}, True),
        ({"weight_candidates": [[2, 4], [4, 8]]}, True),
        ({"holdout": 0.0}, True),
        ({"holdout": 1.0}, False),
        ({"mode": "paper"}, True),
        ({"mode": "bold"}, False),
        ({"compensation": 1}, False),
        ({"base": "rtn"}, True),
        ({"base": {"rtn": {}}}, True),
        ({"base": [{"rtn": {}}, "gptq"]}, True),
        ({"base": {}}, False),
        ({"base": 3}, False),
    ],
)  # fmt: skip
def test_editors_and_the_reader_agree(params, valid):
    """What the file's schema takes is what is taken."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA_FILE.read_text("utf-8"))
    assert Draft202012Validator(schema).is_valid({"algorithm": "cat", "cat": params}) == valid
    if valid:
        options.check(params)
    else:
        with pytest.raises(RecipeError, match=r"\bcat\."):
            options.check(params)


def test_defaults_are_those_of_the_estimator():
    signature = inspect.signature(ClusterAffine)
    made = CorrectionOptions().estimator().get_params()
    for name, parameter in signature.parameters.items():
        if name != "random_state":
            assert made[name] == parameter.default, name


def test_checking_a_recipe_needs_no_scikit_learn():
    code = "import sys, cat_plugin.recipe.options as o; o.check({'mode': 'paper'}); print('sklearn' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
