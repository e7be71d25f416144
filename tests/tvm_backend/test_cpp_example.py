"""The C++ example is built with CMake and gives what Python gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi

import tvm_backend
from cat_plugin.graph.preparation import Preparation

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


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_images_are_prepared_as_from_python(program, compiled, tmp_path, order):
    library = tmp_path / "model.so"
    shutil.copy(compiled[0].path, library)
    manifest = json.loads(compiled[0].path.with_suffix(".json").read_text())
    manifest["variants"][0]["file"] = library.name
    how = Preparation(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), channel_order=order)
    library.with_suffix(".json").write_text(json.dumps(manifest | {"preparation": how.to_dict()}))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    done = run(program, "--images", library, *pictures.shape, data=pictures.tobytes())
    assert done.returncode == 0, done.stderr.decode()
    logits = np.frombuffer(done.stdout, "float32").reshape(2, -1)
    np.testing.assert_allclose(logits, tvm_backend.load(library).predict(pictures), atol=1e-5)
    unknown = run(program, "--images", compiled[0].path, *pictures.shape, data=pictures.tobytes())
    assert unknown.returncode == 1
    assert b"does not say how images are prepared" in unknown.stderr


def test_errors_are_told(program, compiled, tmp_path):
    assert run(program).returncode == 2
    assert b"needs" in run(program, compiled[0].path, 1, 3, 16, 16, data=b"123").stderr
    missing = run(program, tmp_path / "none.so", 1, data=b"1234")
    assert missing.returncode == 1
    assert missing.stderr
