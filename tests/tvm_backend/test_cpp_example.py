"""The C++ example is built with CMake and gives what Python gives."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi

import tvm_backend

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or (shutil.which("c++") or shutil.which("g++")) is None,
    reason="the C++ example needs cmake and a C++ compiler",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("cpp")
    configure = [
        *("cmake", "-S", str(SOURCE), "-B", str(build)),
        f"-DTVM_DIR={Path(tvm.__file__).parent}",
        f"-DTVM_FFI_DIR={Path(tvm_ffi.__file__).parent}",
    ]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_library"


def run(program, *arguments, data=b""):
    return subprocess.run(
        [str(program), *map(str, arguments)], input=data, capture_output=True, check=False, env={**os.environ}
    )


def test_same_logits_as_from_python(program, compiled, images):
    report = compiled[0]
    done = run(program, report.path, *images.shape, data=images.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    logits = np.frombuffer(done.stdout, "float32").reshape(len(images), -1)
    np.testing.assert_array_equal(logits, tvm_backend.load(report.path)(images))


def test_errors_are_told(program, compiled, tmp_path):
    assert run(program).returncode == 2
    assert b"needs" in run(program, compiled[0].path, 1, 3, 16, 16, data=b"123").stderr
    missing = run(program, tmp_path / "none.so", 1, data=b"1234")
    assert missing.returncode == 1
    assert missing.stderr
