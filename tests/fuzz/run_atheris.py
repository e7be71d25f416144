"""Coverage-guided fuzzing: ``python -m tests.fuzz.run_atheris TARGET SECONDS [libFuzzer options]`` (needs ``atheris``).

What it finds is written to the working directory, as ``crash-...``; ``python -m tests.fuzz.run_atheris TARGET 0 FILE``
runs it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris


def main(name: str, seconds: str, *options: str) -> None:
    """Fuzz one target."""
    with atheris.instrument_imports(
        include=["cat_plugin", "tvm_backend.runtime", "yaml", "pydantic", "zipfile"]
    ):
        from tests.fuzz.targets import TARGETS, bounded, seeds

        target = TARGETS[name]
        for seed in seeds(name):
            target(seed)  # what is imported on first use is instrumented, and has no limits

    def once(data: bytes) -> None:
        with bounded():
            target(data)

    corpus = Path(tempfile.mkdtemp(prefix=f"corpus_{name}_"))
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    # Hangs are told by the processor time of `bounded`: a busy machine's clock would call everything one.
    limits = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=3600", "-rss_limit_mb=4096"]
    places = [] if options and not options[-1].startswith("-") else [str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *options, *places], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
