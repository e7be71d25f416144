"""Recipe files: what is read from them, and what is said about mistakes."""

from __future__ import annotations

import pytest

from cat_plugin import load_recipe
from cat_plugin.errors import CATError, CATTypeError, RecipeError


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return make


@pytest.mark.parametrize(
    "text",
    [
        "algorithm: cat\ncat: {w_bits: 2, a_bits: 4}\n",
        "cat: {w_bits: 2, a_bits: 4}\n",
        "quantization:\n  algorithm: cat\n  cat: {w_bits: 2, a_bits: 4}\n",
        "quantization:\n  algorithm: {cat: {w_bits: 2, a_bits: 4}}\n",
        "quantization:\n  algorithm: {name: cat, w_bits: 2, a_bits: 4}\n",
        "quantization:\n  recipes: {cat: true, cat_args: {w_bits: 2, a_bits: 4}}\n",
        "quantization:\n  approach: post_training_static_quant\n  algorithm: cat\n"
        "  recipes: {cat_args: {w_bits: 2, a_bits: 4}}\n",
        '{"algorithm": "cat", "cat": {"w_bits": 2, "a_bits": 4}}',
    ],
)
def test_spellings_of_one_configuration(write, text):
    assert load_recipe(write(text)).configurations == [{"w_bits": 2, "a_bits": 4}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("algorithm: cat\n", {}),
        ("algorithm: cat\nrtn: {bits: 3}\n", {"base": {"rtn": {"bits": 3}}}),
        ("rtn:\ncat: {alpha: 0.3}\n", {"alpha": 0.3, "base": {"rtn": {}}}),
        ("cat: {base: {gptq: {bits: 4}}}\n", {"base": {"gptq": {"bits": 4}}}),
        (
            "quantization: {approach: post_training_static_quant, algorithm: cat}\n",
            {"base": {"static_quant": {}}},
        ),
        ("quantization: {approach: weight_only, algorithm: cat}\n", {"base": {"rtn": {}}}),
        ("cat: {alpha: 0.3}\ntuning: {random_seed: 5}\n", {"alpha": 0.3, "seed": 5}),
    ],
)
def test_bases(write, text, expected):
    assert load_recipe(write(text)).configurations == [expected]


def test_list_of_configurations(write):
    recipe = load_recipe(write("algorithm: cat\ncat:\n  - {w_bits: 4}\n  - {w_bits: [2, 3]}\n"))
    assert recipe.configurations == [{"w_bits": 4}, {"w_bits": [2, 3]}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"tolerance": 0.01, "relative": True, "higher_is_better": True, "timeout": 0.0, "max_trials": 100}),
        ("tuning: {accuracy_criterion: {absolute: 0.5}}", {"tolerance": 0.5, "relative": False}),
        (
            "tuning: {accuracy_criterion: {relative: 0.02, higher_is_better: false}}",
            {"tolerance": 0.02, "higher_is_better": False},
        ),
        ("tuning: {exit_policy: {timeout: 60, max_trials: 3}}", {"timeout": 60.0, "max_trials": 3}),
        ("tuning: {tolerable_loss: 0.05, max_trials: 4, timeout: 5}",
         {"tolerance": 0.05, "timeout": 5.0, "max_trials": 4}),
        ("tuning: {try_all: true}", {"try_all": True}),
    ],
)  # fmt: skip
def test_criteria(write, text, expected):
    criterion = load_recipe(write("algorithm: cat\n" + text)).criterion
    assert {name: getattr(criterion, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("algorithm: cat\ncat:\n  w_bit: 2\n", "3:3", "unknown key 'w_bit' in cat; did you mean 'w_bits'"),
        ("quantization:\n  algorithm: cat\n  cat: {num_cluster: 3}\n", "3:9", "did you mean 'num_clusters'"),
        ("quantisation: {algorithm: cat}\n", "1:1", "did you mean 'quantization'"),
        ("algorithm: catt\n", "1:1", "unknown algorithm 'catt'; expected cat"),
        ("quantization:\n  algorithm: rtn\n", "2:3", "unknown algorithm 'rtn'"),
        ("algorithm: {dog: {}}\n", "1:13", "unknown algorithm 'dog'"),
        ("algorithm: cat\ncat: {w_bits: 9}\n", "2:7", "cat.w_bits is 9; expected 2 to 8"),
        ("algorithm: cat\ncat: {a_bits: [4, 1]}\n", "2:19", "cat.a_bits.1 is 1; expected 2 to 8"),
        ("algorithm: cat\ncat: {w_bits: four}\n", "2:7", "expected a whole number or a list"),
        ("algorithm: cat\ncat: {w_bits: 4.5}\n", "2:7", "expected a whole number"),
        ("algorithm: cat\ncat: {w_bits: true}\n", "2:7", "expected a whole number"),
        ("algorithm: cat\ncat: {w_bits: []}\n", "2:7", "is empty"),
        ("algorithm: cat\ncat: {alpha: 2}\n", "2:7", "expected 0 to 1"),
        ("algorithm: cat\ncat: {mode: bold}\n", "2:7", "cat.mode is 'bold'; expected one of"),
        ("algorithm: cat\ncat: {preset: quick}\n", "2:7", "preset is 'quick'"),
        ("algorithm: cat\ncat:\n  - {w_bits: 4}\n  - {alpha: x}\n", "4:6", "expected a number or a list"),
        ("algorithm: cat\ncat: {w_bits: 2, base: {rtn: {}}}\n", "2:1", "both base and w_bits"),
        ("algorithm: cat\ncat: {w_bits: 4, base: {rtn: {}}}\n", "2:1", "both base and w_bits"),
        ("algorithm: cat\ncat: {skip: [3]}\n", "2:14", "cat.skip.0 is 3; expected a word"),
        ("algorithm: cat\ncat: {overrides: 3}\n", "2:7", "cat.overrides is 3; expected a mapping"),
        ("algorithm: cat\ncat: {overrides: {fc: {w_bit: 3}}}\n", "2:24", "did you mean 'w_bits'"),
        ("algorithm: {cat: {w_bits: 9}}\n", "1:19", "cat.w_bits is 9; expected 2 to 8"),
        ("algorithm: cat\ntuning: {accuracy_criterion: {relative: 1}}\n", "2:31", "100 % of the score"),
        (
            "algorithm: cat\ntuning: {accuracy_criterion: {relative: -0.01}}\n",
            "2:31",
            "expected 0 to below 1",
        ),
        ("algorithm: cat\ntuning: {accuracy_criterion: {absolute: -1}}\n", "2:31", "expected 0 or more"),
        ("algorithm: cat\ntuning: {tolerable_loss: 1.5}\n", "2:10", "150 % of the score"),
        ("algorithm: cat\ncat: {base: {rtn: {}, gptq: {}}}\n", "2:7", "2 algorithms; expected one"),
        ("algorithm: cat\nrtn: {}\ngptq: {}\n", "3:1", "one at a time"),
        ("algorithm: cat\nalgorithm: cat\n", "2:1", "stands here twice"),
        ("algorithm: cat\ntuning: {max_trials: 0}\n", "2:10", "expected 1 or more"),
        ("algorithm: cat\ntuning: {accuracy_criterion: {relative: 1, absolute: 1}}\n", "2:44", "both given"),
        ("algorithm: cat\ntuning: {timeout: 1, exit_policy: {timeout: 2}}\n", "2:36", "given twice"),
        ("algorithm: cat\n  cat: [\n", "2:6", "not valid YAML"),
        ("algorithm: cat\ncat: {alpha: !!python/object:os.system 1}\n", "2:14", "not valid YAML"),
        ("tuning: {}\n", "1:1", "no algorithm is named"),
        ("quantization: {recipes: {cat: false}}\n", "1:26", "switched off"),
        ("quantization: {algorithm: cat}\ncat: {}\n", "2:1", "move it into that section"),
        ("quantization: {algorithm: {cat: {w_bits: 2}}, cat: {w_bits: 4}}\n", "1:47", "in two places"),
        ("", "1:1", "the file is empty"),
        ("- a\n", "1:1", "expected a mapping"),
        ("a: &a [*a]\n", "1:4", "refers to itself"),
    ],
)
def test_mistakes_are_located(write, text, place, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    assert str(caught.value).startswith(f"recipe.yaml:{place}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "too many values"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("x, ", "").replace("[x]", "[]"), "too many values"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("- " * 50_000, "nested deeper than 32 levels"),
        ("a: {" * 1000, "nested deeper than 32 levels"),
        ("cat: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("cat: {seed: " + "1:" * 50_000 + "1}", "expected at most 10000"),
        ("cat: 2001-99-99", "not valid YAML"),
        ("cat: !!int abc", "not valid YAML"),
        ("cat: !!float abc", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("#" * 2**18 + "\n", "larger than 262144 bytes"),
    ],
)  # fmt: skip
def test_small_files_that_would_grow(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CATError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_example_recipe_is_valid():
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / "digits" / "recipe.yaml"
    bits = [(c["w_bits"], c["a_bits"]) for c in load_recipe(path).configurations]
    assert bits == [(4, 4), (2, 2)]


@pytest.mark.parametrize("wrong", [None, 3, {"algorithm": "cat"}])
def test_what_is_no_path_is_told(wrong: object) -> None:
    with pytest.raises(CATTypeError, match="expected the path of a YAML file"):
        load_recipe(wrong)  # type: ignore[arg-type]


MANY = "algorithm: cat\ncat: {w_bits: [2, 3, 4, 8], a_bits: [2, 3, 4, 8], num_clusters: [1, 2, 3, 4, 5], alpha: [0.1, 0.2, 0.3, 0.4]}\n"


def test_many_combinations_need_a_limit(write):
    with pytest.raises(RecipeError, match="make 320 combinations; say how many to try, with max_trials"):
        load_recipe(write(MANY))
    assert load_recipe(write(MANY + "tuning: {exit_policy: {max_trials: 20}}\n")).criterion.max_trials == 20
    assert load_recipe(write(MANY + "tuning: {max_trials: 20}\n")).criterion.max_trials == 20
    load_recipe(write(MANY.replace("[2, 3, 4, 8], a_bits", "[2, 3, 4], a_bits")))
