"""``cat-ptq doctor``."""

from __future__ import annotations

import subprocess
import sys
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


def test_doctor_imports_neither_torch_nor_tvm_unless_asked(as_json: AsJson) -> None:
    code = "import sys; from cat_plugin.cli import main; main(['doctor', '--json']); " + (
        "print(sorted({'torch', 'tvm', 'neural_compressor'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    parts = {part["part"]: part for part in as_json("doctor", "--imports")["parts"]}
    assert parts["import torch"]["found"] == "yes"


@pytest.mark.parametrize(
    ("tvm", "ffi", "state", "found"),
    [
        ("0.27.0.post1", "0.1.15", "missing", "does not work with apache-tvm-ffi 0.1.15"),
        ("0.99.0", "0.1.14.post1", "optional", "is not tested"),
        ("0.27.0.post1", "0.1.14.post1", None, None),
    ],
)
def test_doctor_knows_which_packages_of_tvm_fit(
    as_json: AsJson, monkeypatch: pytest.MonkeyPatch, tvm: str, ffi: str, state: str | None, found: str | None
) -> None:
    from cat_plugin.cli import doctor

    version = doctor.importlib.metadata.version
    fake = {"apache-tvm": tvm, "apache-tvm-ffi": ffi}
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: fake.get(name) or version(name))
    parts = {part["part"]: part for part in as_json("doctor")["parts"]}
    if state is None or found is None:
        assert "TVM" not in parts
    else:
        assert parts["TVM"]["state"] == state
        assert found in parts["TVM"]["found"]
        assert "apache-tvm-ffi==" in parts["TVM"]["hint"]


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
