"""``cat-ptq doctor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cat_plugin.cli import main

AsJson = Callable[..., dict[str, Any]]


def test_doctor_names_what_is_there(as_json: AsJson) -> None:
    found = as_json("doctor")
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["torch"]["found"].startswith("2.")
    assert parts["neural-compressor"]["found"][0].isdigit()
    assert parts["recipe host"]["state"] == "ok"
    assert all(part["hint"] for part in found["parts"] if part["state"] != "ok")
    assert found["ok"] == all(part["state"] != "missing" for part in found["parts"])


def test_doctor_says_what_to_install(
    capsys: pytest.CaptureFixture[str], as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_plugin.cli import doctor

    def absent(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    found = as_json("doctor")
    assert not found["ok"]
    hints = {part["part"]: part["hint"] for part in found["parts"]}
    assert "cat-ptq[inc]" in hints["neural-compressor"]
    assert "cat-ptq[inc]" in hints["recipe host"]
    assert main(["doctor"]) == 0
    assert "cat-ptq[inc]" in capsys.readouterr().out.replace("\n", "")


def test_a_newer_torch_is_said_to_be_untested_and_is_not_missing(
    as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_plugin.cli import doctor

    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "2.15.1" if name == "torch" else version(name)
    )
    part = next(part for part in as_json("doctor")["parts"] if part["part"] == "torch")
    assert part["state"] == "ok"
    assert part["found"] == "2.15.1, not tested with this release (2.13 is)"
