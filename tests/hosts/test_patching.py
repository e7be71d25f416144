"""Changes to a host are checked before they are made, and undone; progress bars know their place."""

from __future__ import annotations

import time
import types

import pytest

from cat_plugin.hosts._patching import Patches
from cat_plugin.ptq.progress import Progress
from cat_plugin.recipe import display
from cat_plugin.recipe.progress import TrialProgress


@pytest.fixture
def host():
    module = types.ModuleType("a_host")

    def function(first, second=2):
        """Add."""
        return first + second

    class Kind:
        def method(self, value):
            return value

        @classmethod
        def make(cls, value):
            return cls, value

        @staticmethod
        def plain(value):
            return value

    module.function, module.Kind = function, Kind
    return module


def doubled(original):
    def replacement(*args, **kwargs):
        result = original(*args, **kwargs)
        return (result[0], 2 * result[1]) if isinstance(result, tuple) else 2 * result

    return replacement


def test_functions_and_methods_of_every_kind(host):
    before = {**vars(host.Kind), "function": host.function}
    patches = Patches()
    assert patches.replace(host, "function", doubled, ("first", "second"))
    assert patches.replace(host.Kind, "method", doubled, ("self", "value"))
    assert patches.replace(host.Kind, "make", doubled, ("cls", "value"))
    assert patches.replace(host.Kind, "plain", doubled, ("value",))
    assert host.function(1) == 6
    assert host.function.__doc__ == "Add."
    assert host.Kind().method(3) == 6
    assert host.Kind.make(3) == (host.Kind, 6)
    assert host.Kind.plain(3) == 6
    patches.undo()
    after = {**vars(host.Kind), "function": host.function}
    assert after == before
    assert host.function(1) == 3


def test_patching_twice_is_patching_once(host):
    patches = Patches()
    patches.replace(host, "function", doubled, ("first",))
    patches.replace(host, "function", doubled, ("first",))
    assert host.function(1) == 6
    patches.undo()
    assert host.function(1) == 3


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [("function", ("first", "third"), "its parameters are"), ("missing", (), "does not exist")],
)
def test_what_was_not_tested_is_left_alone(host, name, parameters, reason):
    patches = Patches()
    original = host.function
    assert not patches.replace(host, name, doubled, parameters)
    assert host.function is original
    assert reason in patches.refused[f"a_host.{name}"]


def test_progress_is_drawn_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("CAT_PROGRESS", "1")
    with TrialProgress("trial 1/2 W4A4", total=3) as progress:
        progress.stage("quantize")
        progress.reach(1.5)
        progress.update(1)
    captured = capsys.readouterr()
    assert "trial 1/2 W4A4" in captured.err
    assert "100%" in captured.err
    assert captured.out == ""


def test_progress_that_is_not_wanted_is_silent(capsys, monkeypatch):
    monkeypatch.setenv("CAT_PROGRESS", "0")
    monkeypatch.setattr(display, "EVERY", 0.01)
    with TrialProgress("trial", total=3) as progress:
        progress.stage("quantize")
        time.sleep(0.1)
        progress.update(2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_without_a_terminal_is_lines(capsys, monkeypatch):
    monkeypatch.delenv("CAT_PROGRESS", raising=False)
    monkeypatch.setattr(display, "EVERY", 0.01)
    with TrialProgress("trial 1/2 W4A4", total=4) as progress:
        progress.stage("quantize")
        progress.reach(3)
        progress.show(Progress("layer1.0", 0.75, seconds_left=90.0), 4)
        told = ""
        deadline = time.monotonic() + 60
        while "layer1.0" not in told and time.monotonic() < deadline:
            time.sleep(0.01)
            told += capsys.readouterr().err
    line = told.splitlines()[-1]
    assert line.startswith("trial 1/2 W4A4: layer1.0, 75%, 0:00:0")
    assert line.endswith("so far, 0:01:30 left")
    assert capsys.readouterr().out == ""


def test_progress_within_progress(monkeypatch):
    monkeypatch.setenv("CAT_PROGRESS", "1")
    with TrialProgress("outer", total=1) as outer, TrialProgress("inner", total=1) as inner:
        inner.update(1)
        outer.update(1)
