"""An option is one declaration: what follows from it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Annotated

import pytest

from cat_plugin.errors import CATError, CATTypeError, CATValueError
from cat_plugin.options import Bits, Count, OneOf, Option, Share, Switch, configuration, option, options_of
from cat_plugin.ptq.spec import LayerOverride, QuantSpec


@configuration
class Example:
    """An example.

    Raises
    ------
    CATValueError
        On nonsense.
    """

    bits: Bits = option(default=4, doc="Bits of it.  More is said here.", since="0.1")
    rows: Count | None = option(default=None, doc="Rows of it; None for all.", since="0.2")
    share: Share = option(default=0.5, doc="Share of it.", since="0.2")
    kind: Annotated[str, OneOf(("plain", "fancy"))] = option(default="plain", doc="Its kind.", since="0.2")
    exact: Switch = option(default=True, doc="See :mod:`cat_plugin.options`, ``exact``.", since="0.2")
    names: tuple[str, ...] = option(default=(), doc="Its names.", since="0.2")


def test_what_follows_from_a_declaration():
    declared = options_of(Example)
    assert list(declared) == ["bits", "rows", "share", "kind", "exact", "names"]
    assert declared["rows"].since == "0.2"
    assert declared["bits"].summary == "Bits of it"
    assert declared["exact"].summary == "See `options`, `exact`"
    assert [each.values for each in declared.values()] == [
        "2 to 8", "1 or more, or null", "0 to 1", "plain, fancy", "true, false", "a list of words",
    ]  # fmt: skip
    assert declared["names"].is_sequence
    head, parameters, raises = (Example.__doc__ or "").partition("Parameters\n----------\n")
    assert head == "An example.\n\n"
    assert parameters
    assert "rows : 1 or more, or None, default=None\n    Rows of it; None for all.\n" in raises
    assert raises.endswith("\n\nRaises\n------\nCATValueError\n    On nonsense.")


def test_it_is_an_ordinary_frozen_dataclass():
    made = Example(2, share=1)
    assert made == dataclasses.replace(Example(), bits=2, share=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.bits = 3  # type: ignore[misc]
    assert Example(names=["a"]).names == ("a",)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"bits": 9}, CATValueError, "bits is 9; expected 2 to 8 (Bits of it)"),
        ({"bits": 4.5}, CATTypeError, "bits is 4.5; expected a whole number"),
        ({"bits": True}, CATTypeError, "bits is True; expected a whole number"),
        ({"rows": "all"}, CATTypeError, "rows is 'all'; expected a whole number or None"),
        ({"share": float("nan")}, CATValueError, "share is nan; expected 0 to 1 (Share of it)"),
        ({"kind": "simple"}, CATValueError, "kind is 'simple'; expected one of plain, fancy"),
        ({"exact": 1}, CATTypeError, "exact is 1; expected true or false"),
        ({"names": "abc"}, CATTypeError, "names is 'abc'; expected a list"),
        ({"names": [3]}, CATTypeError, "names.0 is 3; expected a word"),
        ({"bit": 4, "share": 7}, CATTypeError, "unknown key 'bit' in Example; did you mean 'bits'?"),
    ],
)
def test_one_clear_message(values, kind, message):
    with pytest.raises(kind) as caught:
        Example(**values)
    assert str(caught.value) == message
    assert isinstance(caught.value, CATError)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_options_by_place_and_by_name():
    with pytest.raises(CATTypeError, match="an option twice, or too many"):
        Example(4, bits=4)
    with pytest.raises(CATTypeError, match="an option twice, or too many"):
        Example(4, None, 0.5, "plain", True, (), 1)


def test_the_specification_is_what_it_was():
    spec = QuantSpec(
        w_bits=2, overrides={"fc": {"a_bits": 4}, "head": LayerOverride(skip=True)}, skip=["x.*"]
    )
    assert spec.layer_bits("fc", first=False, last=False, depthwise=False) == (2, 4)
    assert spec.layer_bits("head", first=False, last=False, depthwise=False) is None
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert spec.to_dict()["overrides"]["fc"] == {"w_bits": None, "a_bits": 4, "skip": False}
    with pytest.raises(TypeError, match="did you mean 'w_bits'"):
        QuantSpec(w_bit=4)  # type: ignore[call-arg]


def test_patterns_that_match_nothing_are_refused():
    layers = ["layer1.conv", "layer2.conv", "head"]
    QuantSpec(skip=("layer?.conv",), overrides={"head": {"w_bits": 8}}).check_patterns(layers)
    with pytest.raises(
        CATValueError, match="skip has the pattern 'heads', which matches no layer; did you mean 'head'"
    ):
        QuantSpec(skip=("heads",)).check_patterns(layers)
    with pytest.raises(
        CATValueError, match=r"overrides has the pattern 'layer3\.conv', which matches no layer"
    ):
        QuantSpec(overrides={"layer3.conv": {"w_bits": 8}}).check_patterns(layers)


def test_the_specification_needs_no_torch():
    code = "import sys, cat_plugin.ptq.spec; print([m for m in ('torch', 'sklearn', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_an_option_without_range_still_has_words():
    assert Option("free", dict[str, int], {}, "Anything.", "0.2").values == "a mapping"
