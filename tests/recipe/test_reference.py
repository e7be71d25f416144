"""The tables of options in the docs, and the text of a new recipe, are what the options are declared to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cat_plugin.options import options_of
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe.reference import fill
from cat_plugin.recipe.schema import cat_options
from cat_plugin.recipe.template import new_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [page for page in DOCS.rglob("*.md") if "<!-- options: " in page.read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page):
    text = page.read_text("utf-8")
    assert fill(text) == text, f"run: python -m cat_plugin.recipe.reference docs/{page.name}"


def test_every_option_is_in_a_table():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    for name in [*options_of(QuantSpec), *cat_options()]:
        assert f"\n| `{name}` | " in text, name


def test_a_new_recipe_has_the_declared_defaults_and_words():
    text = new_recipe("r.yaml", {"w_bits": [4, 2], "unit": "pack"}, relative=0.02, max_trials=2, try_all=True)
    given = yaml.safe_load(text)
    assert given["tuning"] == {
        "accuracy_criterion": {"relative": 0.02},
        "exit_policy": {"max_trials": 2, "timeout": 0},
        "try_all": True,
    }
    chosen = given["quantization"]["cat"]
    assert chosen.pop("w_bits") == [4, 2]
    assert chosen.pop("unit") == "pack"
    assert chosen == {name: cat_options()[name].default for name in chosen}
    for name in given["quantization"]["cat"]:
        assert cat_options()[name].summary.replace("`", "")[:40] in text.replace("\n    # ", " ")
    assert max(map(len, text.splitlines())) <= 110
