"""What the emulated device refuses, as compute-sanitizer would on a real one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.tvm_backend import cuda_tools

pytestmark = pytest.mark.skipif(cuda_tools.available() is not None, reason=str(cuda_tools.available()))

KERNELS = """
extern "C" __global__ void fine(const int* given, int* made) { made[blockIdx.x * 32 + threadIdx.x] = given[threadIdx.x]; }
extern "C" __global__ void writes_half(const int* given, int* made) { if (!blockIdx.x) made[threadIdx.x] = given[threadIdx.x]; }
extern "C" __global__ void reads_behind(const int* given, int* made) { made[threadIdx.x] = given[threadIdx.x + 1]; }
extern "C" __global__ void writes_behind(const int* given, int* made) { made[threadIdx.x + 33] = given[threadIdx.x]; }
extern "C" __global__ void reads_unwritten(const int* given, int* made) { made[threadIdx.x] += given[threadIdx.x]; }
extern "C" __global__ void blocks_meet(const int* given, int* made) { made[threadIdx.x] = given[threadIdx.x]; }
extern "C" __global__ void reads_of_others(const int* given, int* made) {
  if (threadIdx.x == 0) made[blockIdx.x] = blockIdx.x ? made[blockIdx.x - 1] : given[0];
}
extern "C" __global__ void misaligned(const int* given, int* made) {
  *reinterpret_cast<int2*>(made) = *reinterpret_cast<const int2*>(given + 1);
}
"""

# 32 numbers are given, made are 64: by two blocks of 32 threads; all of `made` is copied back.
RUNNER = """
import ctypes, sys
library, image, kernel = sys.argv[1:]
cuda = ctypes.CDLL(library)
given, made, module, function = (ctypes.c_void_p() for _ in range(4))
cuda.cudaMalloc(ctypes.byref(given), ctypes.c_size_t(128))
cuda.cudaMalloc(ctypes.byref(made), ctypes.c_size_t(256))
host = (ctypes.c_int * 64)(*range(64))
cuda.cudaMemcpyAsync(given, host, ctypes.c_size_t(128), 1, None)
assert cuda.cuModuleLoadData(ctypes.byref(module), image.encode()) == 0
assert cuda.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()) == 0
class Config(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("rest", ctypes.c_void_p), ("count", ctypes.c_uint)]
config = Config((ctypes.c_uint * 7)(2, 1, 1, 32, 1, 1, 0))
parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(pointer) for pointer in (given, made)))
assert cuda.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None) == 0
cuda.cudaMemcpyAsync(host, made, ctypes.c_size_t(256), 2, None)
print(*host)
"""


def _called(kernel: str) -> subprocess.CompletedProcess[str]:
    _, image = cuda_tools.emulate(KERNELS, "sm_90")
    library = cuda_tools.driver_folder() / "libcuda.so.1"
    command = [sys.executable, "-c", RUNNER, str(library), image.rstrip(b"\0").decode(), kernel]
    environment = dict(os.environ, PYTHONFAULTHANDLER="")
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_what_is_right_runs() -> None:
    done = _called("fine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(i % 32) for i in range(64)]


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("reads_behind", "reads outside of what is allocated (block 0 0 0, thread 31 0 0)"),
        ("writes_behind", "writes outside of what is allocated (block 0 0 0, thread 31 0 0)"),
        ("reads_unwritten", "reads what nothing has written (block 0 0 0, thread 0 0 0)"),
        ("blocks_meet", "writes what another block of the launch writes (block 1 0 0, thread 0 0 0)"),
        ("reads_of_others", "reads what another block of the launch writes (block 1 0 0, thread 0 0 0)"),
        ("misaligned", "touches what is not aligned (block 0 0 0, thread 0 0 0)"),
    ],
)
def test_faults_of_kernels_stop_the_process(kernel: str, fault: str) -> None:
    done = _called(kernel)
    assert done.returncode != 0
    assert f"CUDA emulator: {kernel} {fault}" in done.stderr


def test_results_that_were_not_written_are_not_copied() -> None:
    done = _called("writes_half")
    assert done.returncode != 0
    assert "CUDA emulator: a copy reads what nothing has written" in done.stderr
