"""Run peers one after the other, each in its own environment, and merge their rows into one JSON.

Accuracy of convolutional networks or of transformers, or speed, all peers of that kind or those named; what follows ``--`` goes to
every script::

    python -m benchmarks.peers speed --out speed.json
    python -m benchmarks.peers accuracy --peers brevitas nncf --out accuracy.json -- --models resnet20 --bits w2a2
    python -m benchmarks.peers transformers --peers inc --out transformers.json -- --rows 'smollm2/w4/*'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import CACHE, PEERS, run_peer
from benchmarks.peers.merging import merge_into
from benchmarks.tables import table

COLUMNS = {
    "accuracy": ["peer", "version", "model", "w_bits", "a_bits", "method", "seconds", "top1"],
    "transformers": ["peer", "version", "model", "bits", "method", "score", "fp", "unit", "seconds"],
    "speed": ["peer", "version", "model", "batch", "precision", "error", "ms"],
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=sorted(COLUMNS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to merge into")
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the environments (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=7200.0, help="seconds a script may take (%(default)s)"
    )
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:split])
    names = options.peers or [name for name, peer in PEERS.items() if options.kind in peer.kinds]
    wrong = [name for name in names if options.kind not in PEERS[name].kinds]
    if wrong:
        parser.error(f"{', '.join(wrong)}: not measured for {options.kind}")
    rows: list[dict[str, Any]] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measured = run_peer(
            name,
            options.kind,
            given[split + 1 :],
            cache=options.cache,
            threads=options.threads,
            timeout=options.timeout,
        )
        rows = merge_into(options.out, measured["rows"], measured["machine"])
    print(table(rows, COLUMNS[options.kind]))


if __name__ == "__main__":
    main()
