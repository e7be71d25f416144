"""How many threads compute, and that they keep out of the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tvm_backend
from cat_plugin.errors import LibraryError
from tvm_backend import threads as pool
from tvm_backend.threads import be_considerate, bounded

CALL = """
import json, sys, threading
import numpy as np
import tvm_backend
library = tvm_backend.load(sys.argv[1], **json.loads(sys.argv[2]))
import tvm
number = tvm.get_global_func("runtime.NumThreads")
rows = np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype("float32")
found = []
def call():
    library(rows)
    found.append(number())
thread = threading.Thread(target=call)
thread.start()
thread.join()
call()
print(*found)
"""


def threads_of(library, options="{}", **environment):
    known = {key: value for key, value in os.environ.items() if not key.startswith("TVM_")}
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(library), options],
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_the_number_that_is_asked_for(compiled):
    assert threads_of(compiled[0].path, '{"threads": 2}') == [2, 2]
    assert threads_of(compiled[0].path, '{"threads": 1}', TVM_NUM_THREADS="2") == [1, 1]
    assert threads_of(compiled[0].path, TVM_NUM_THREADS="2") == [2, 2]


def test_no_more_than_there_are_processors(compiled):
    processors = len(os.sched_getaffinity(0))
    assert threads_of(compiled[0].path, TVM_NUM_THREADS="64") == [min(64, processors)] * 2


def test_the_number_is_checked(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert bounded(None) is None
    assert [bounded(number) for number in (1, 3, 9)] == [1, 3, 4]
    monkeypatch.setenv("TVM_NUM_THREADS", "64")
    assert bounded(None) == 4
    monkeypatch.setenv("TVM_NUM_THREADS", "none")
    assert bounded(None) is None
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(LibraryError, match="give a whole number from 1 on"):
            bounded(wrong)


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.delenv("TVM_THREAD_POOL_SPIN_COUNT", raising=False)
    monkeypatch.setenv("TVM_BIND_THREADS", "1")
    be_considerate()
    assert os.environ["TVM_BIND_THREADS"] == "1"
    assert 0 < int(os.environ.pop("TVM_THREAD_POOL_SPIN_COUNT")) < 300000


def test_results_do_not_depend_on_it(compiled, images):
    one, two = (tvm_backend.load(Path(compiled[0].path), threads=number) for number in (1, 2))
    np.testing.assert_array_equal(one(images), two(images))


def test_libraries_of_one_thread_have_their_own_numbers(compiled, images, monkeypatch):
    used = []
    monkeypatch.setattr(pool, "use", lambda tvm, threads, most: used.append(threads))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    one, three = (tvm_backend.load(Path(compiled[0].path), threads=number) for number in (1, 3))
    one(images)
    three(images)
    one(images)
    for _ in range(3):
        three(images)
    assert used == [1, 3, 1, 1, 3, 1]  # the second and the fourth call tell what one thread takes
