"""The safetensors file of a bundle."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load

from cat_plugin.graph.arrays import array_bytes, array_shapes

ARRAYS = {
    "mean": np.arange(10, dtype=np.float32),
    "components": np.zeros((0, 10), np.float32),
    "gamma": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
}
METADATA = {name: name.upper() for name in ("op", "alpha", "mode", "temperature", "axis")}
DIGEST = """
import hashlib
from tests.graph.test_arrays import ARRAYS, METADATA
from cat_plugin.graph.arrays import array_bytes
print(hashlib.sha256(array_bytes(ARRAYS, METADATA)).hexdigest())
"""


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    data = array_bytes(ARRAYS, METADATA)
    arrays = load(data)
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == METADATA
    shapes, metadata = array_shapes(BytesIO(data))
    assert shapes == {name: list(array.shape) for name, array in ARRAYS.items()}
    assert metadata == METADATA
    # What follows the header lies where floats of any size may be mapped.
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_equal_numbers_give_equal_bytes_in_every_process() -> None:
    """Five keys are left in the same order by chance once in 120 processes."""
    expected = hashlib.sha256(array_bytes(ARRAYS, METADATA)).hexdigest()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == expected


def test_what_has_no_header_has_no_shapes() -> None:
    assert array_shapes(BytesIO(b"")) is None
    assert array_shapes(BytesIO((2**40).to_bytes(8, "little"))) is None
    assert array_shapes(BytesIO((2).to_bytes(8, "little") + b"[]")) is None
