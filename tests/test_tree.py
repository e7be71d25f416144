"""What holds for every file of the tree."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cat_plugin", "tvm_backend", "tests", "benchmarks", "examples")
MOST_LINES = 400


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_short_enough_to_be_read(room):
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / room).rglob("*.py")}
    assert lengths
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES}
