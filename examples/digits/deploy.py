"""Run a compiled library where PyTorch, Neural Compressor and scikit-learn do not exist.

Usage: ``python deploy.py LIBRARY IMAGES.npz RESULT.npz``.  The result holds the logits of all images,
the median latency in microseconds per image at batch sizes 1 and 64, and the modules that were loaded.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import tvm_backend

FORBIDDEN = ("torch", "neural_compressor", "sklearn", "torchao")


def latency(run: tvm_backend.Library, images: np.ndarray, seconds: float = 1.0) -> float:
    """Median time of one call on `images`, in microseconds per image."""
    for _ in range(5):
        run(images)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(images) * 1e6


def main() -> None:
    library, source, result = sys.argv[1:]
    run = tvm_backend.load(library)
    images = np.load(source)["images"]
    logits = np.concatenate([run(images[start : start + 64]) for start in range(0, len(images), 64)])
    latencies = {f"latency_{n}": latency(run, images[:n]) for n in (1, 64)}
    loaded = [name for name in FORBIDDEN if name in sys.modules]
    if loaded:
        sys.exit(f"the deployed process imported {', '.join(loaded)}; a compiled library must run without")
    np.savez(result, logits=logits, **latencies)


if __name__ == "__main__":
    main()
