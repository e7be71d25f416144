"""Calling a library: kinds of tensor, memory, threads, wrong input, damage."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import tvm_backend
from cat_plugin import files
from cat_plugin.errors import LibraryError
from tests.tvm_backend.alone import alone
from tvm_backend.installing import install
from tvm_backend.processor import cpu_features


@pytest.fixture(scope="module")
def library(compiled):
    return tvm_backend.load(compiled[0].path)


def aligned(array, offset=0):
    """A copy of `array` whose memory starts `offset` bytes behind a 64-byte boundary."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    assert out.ctypes.data % 64 == offset
    return out


def test_returns_the_kind_it_was_given(library, images):
    from_numpy = library(images)
    from_torch = library(torch.from_numpy(images))
    assert type(from_numpy) is np.ndarray
    assert type(from_torch) is torch.Tensor
    np.testing.assert_array_equal(from_torch.numpy(), from_numpy)
    import tvm

    from_tvm = library(tvm.runtime.tensor(images))
    np.testing.assert_array_equal(from_tvm.numpy(), from_numpy)


@pytest.mark.parametrize("offset", [4, 16, 32])
def test_misaligned_input_is_copied(library, images, offset):
    wanted = library(images)
    np.testing.assert_array_equal(library(aligned(images, offset)), wanted)
    np.testing.assert_array_equal(library(torch.from_numpy(aligned(images, offset))).numpy(), wanted)


def test_strided_readonly_and_gradient_input(library, images):
    wanted = library(images)
    strided = np.asfortranarray(images)
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(library(strided), wanted)
    np.testing.assert_array_equal(library(torch.from_numpy(strided)).numpy(), wanted)
    frozen = images.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(library(frozen), wanted)
    np.testing.assert_array_equal(library(torch.from_numpy(images).requires_grad_()).numpy(), wanted)


def test_aligned_input_is_used_in_place(library, images, monkeypatch):
    def refuse(*_args):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(library._tvm.runtime, "tensor", refuse)
    library(aligned(images))
    library(torch.from_numpy(aligned(images)))


def test_every_batch_size(library, images):
    whole = library(images)
    for size in range(6):
        rows = library(images[:size])
        assert rows.shape == (size, 10)
        np.testing.assert_array_equal(rows, whole[:size])


def test_results_are_not_overwritten_by_later_calls(library, images):
    first = library(images)
    kept = first.copy()
    for _ in range(3):
        library(images[::-1].copy())
    np.testing.assert_array_equal(first, kept)


def test_threads_share_a_library(library, images):
    wanted = [library(images[i : i + 1]) for i in range(5)]
    failures = []

    def work(i):
        for _ in range(50):
            if not np.array_equal(library(images[i : i + 1]), wanted[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


CALLS = """
import sys, threading
import numpy as np
import tvm_backend

library = tvm_backend.load(sys.argv[1])
images = np.load(sys.argv[2])
wanted = [library(images[i : i + 1]).tobytes() for i in range(5)]
barrier, failures, sizes = threading.Barrier(9), [], []

def work(seed):
    for calls in (100, 1250):
        for number in range(calls):
            i = (number * 7 + seed) % 5
            if library(images[i : i + 1]).tobytes() != wanted[i]:
                failures.append(i)
        barrier.wait()
        barrier.wait()

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for _ in range(2):
    barrier.wait()
    sizes.append(resident())
    barrier.wait()
print(len(failures), sizes[1] - sizes[0])
"""


def test_eight_threads_give_the_same_bits_ten_thousand_times_in_flat_memory(compiled, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    failures, grown = map(int, alone(CALLS, compiled[0].path, tmp_path / "images.npy"))
    assert failures == 0
    # A leak of 400 bytes a call, less than one result and its wrapper, would show.
    assert grown < 4e6


def install_again_and_again(path, mark, count):
    for number in range(count):
        with files.staged_files(path) as staging:
            data = f"{mark}{number}".encode() * 1000
            (staging / "0.so").write_bytes(data)
            variant = {"file": "0.so", "sha256": hashlib.sha256(data).hexdigest(), "variant": ""}
            install({"variants": [variant]}, staging, path)


def test_two_processes_that_write_one_library_do_not_mix(tmp_path):
    path = tmp_path / "model.so"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=install_again_and_again, args=(path, mark, 100)) for mark in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    (variant,) = json.loads(path.with_suffix(".json").read_text())["variants"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == variant["sha256"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.so"]


def test_other_python_threads_run_during_a_call(library, images):
    """While one long call runs, another thread gets the interpreter: it sees the call's start but not yet its end."""
    many = np.repeat(images, 400, axis=0)
    inside, seen = threading.Event(), []

    def watch():
        inside.wait()
        while not done.is_set():
            seen.append(time.perf_counter())
            time.sleep(0)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        inside.set()
        function, tensor = library._function(None), library._tvm.runtime.tensor(many)
        start = time.perf_counter()
        function(tensor)
        end = time.perf_counter()
    finally:
        done.set()
        watcher.join()
        sys.setswitchinterval(old)
    margin = 0.2 * (end - start)
    assert any(start + margin < moment < end - margin for moment in seen)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3, 16, 16)), "dtype float64, the model takes float32"),
        (
            np.zeros((2, 3, 16, 17), "float32"),
            r"shape \(2, 3, 16, 17\), the model takes \(batch, 3, 16, 16\)",
        ),
        (np.zeros((3, 16, 16), "float32"), r"shape \(3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float16), "dtype float16"),
        ([[1.0]], "is a list; give a numpy array or a DLPack tensor"),
    ],
)
def test_wrong_input(library, value, message):
    with pytest.raises(LibraryError, match=message):
        library(value)


def test_wrong_number_of_inputs(library, images):
    with pytest.raises(LibraryError, match="takes 1 input"):
        library(images, images)
    with pytest.raises(LibraryError, match="takes 1 input"):
        library()


def test_inputs_by_name(library, images):
    (name,) = [entry["name"] for entry in library.manifest["inputs"]]
    np.testing.assert_array_equal(library(**{name: images}), library(images))
    with pytest.raises(LibraryError, match=f"the model's inputs are {name}: give each of them once"):
        library(other=images)
    with pytest.raises(LibraryError, match="give each of them once"):
        library(images, **{name: images})


@pytest.fixture
def copy(compiled, tmp_path):
    path = compiled[0].path
    for suffix in (".so", ".json"):
        shutil.copy(path.with_suffix(suffix), tmp_path / f"model{suffix}")
    return tmp_path / "model.so"


def change(path, **entries):
    file = path.with_suffix(".json")
    manifest = json.loads(file.read_text())
    manifest["variants"][0] |= entries.pop("variant", {})
    manifest.update(entries)
    file.write_text(json.dumps(manifest))


def test_changed_byte(copy):
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(LibraryError, match="does not match the sha256"):
        tvm_backend.load(copy)


@pytest.mark.parametrize("kept", [20, 63, 100, 0.3, 0.6, 0.9, 0.999])
def test_a_library_cut_short_is_not_mapped(copy, kept):
    """Also where the hash was computed again: mapping it would end the process with SIGBUS."""
    data = copy.read_bytes()
    data = data[: kept if kept > 1 else int(kept * len(data))]
    copy.write_bytes(data)
    change(copy, variant={"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    with pytest.raises(LibraryError, match=r"is cut short: .* lies beyond its end"):
        tvm_backend.load(copy)


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_missing_file(copy, suffix):
    copy.with_suffix(suffix).unlink()
    with pytest.raises(LibraryError, match="cannot be read"):
        tvm_backend.load(copy)


def test_not_a_library(copy):
    copy.write_text("not a library")
    data = copy.read_bytes()
    change(copy, variant={"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    with pytest.raises(LibraryError, match="cannot be loaded by TVM"):
        tvm_backend.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "cat-library", "version": 99}'])
def test_damaged_description(copy, text):
    copy.with_suffix(".json").write_text(text)
    with pytest.raises(LibraryError, match="compile the model again"):
        tvm_backend.load(copy)


def test_missing_processor_feature(copy):
    change(copy, variant={"features": ["avx2", "warp_drive"]})
    with pytest.raises(LibraryError, match=r"needs warp_drive.*target='portable'"):
        tvm_backend.load(copy)


def test_other_machine(copy):
    change(copy, variant={"machine": "vax"})
    with pytest.raises(LibraryError, match="built for vax"):
        tvm_backend.load(copy)


@pytest.mark.parametrize("name", ["../model.so", "/tmp/model.so", "..", ".", "", "folder/model.so"])
def test_description_cannot_point_elsewhere(copy, name):
    change(copy, variant={"file": name})
    with pytest.raises(LibraryError, match="names a file elsewhere"):
        tvm_backend.load(copy)


def test_a_link_in_the_place_of_the_library(copy):
    copy.rename(copy.with_name("other.so"))
    copy.symlink_to("other.so")
    with pytest.raises(LibraryError, match="is a symbolic link"):
        tvm_backend.load(copy)


@pytest.mark.parametrize(
    "entries",
    [
        {"inputs": [1]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [-1]}]},
        {"outputs": [{"name": "x", "dtype": "float32"}]},
        {"batch_sizes": 3},
        {"batch_sizes": ["1"]},
        {"variants": [None]},
        {"variant": {"features": "avx2"}},
        {"variant": {"features": [1]}},
        {"variant": {"sha256": None}},
        {"variant": {"size": "1"}},
        {"variant": {"device": "tpu"}},
    ],
)
def test_description_of_another_shape(copy, entries):
    change(copy, **entries)
    with pytest.raises(LibraryError, match="compile the model again"):
        tvm_backend.load(copy)


def test_description_that_is_too_large(copy):
    copy.with_suffix(".json").write_text(" " * (2**21 + 1))
    with pytest.raises(LibraryError, match="is larger than"):
        tvm_backend.load(copy)


def test_without_tvm_the_message_says_what_to_install(compiled):
    script = (
        "import sys; sys.modules['tvm'] = None\n"
        "import tvm_backend, cat_plugin.errors\n"
        "try: tvm_backend.load(sys.argv[1])\n"
        "except cat_plugin.errors.LibraryError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(compiled[0].path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout


def test_features_of_this_processor():
    found = cpu_features()
    assert found is None or found


def test_batch_sizes_that_the_library_does_not_hold(copy):
    change(copy, batch_sizes=[1, 7])
    with pytest.raises(LibraryError, match="names 7 in 'batch_sizes'"):
        tvm_backend.load(copy)
