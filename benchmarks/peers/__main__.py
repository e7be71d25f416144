"""Run peers one after the other, each in its own environment, and write one JSON of all their rows.

Accuracy or speed, all peers of that kind or those named; what follows ``--`` goes to every script::

    python -m benchmarks.peers speed --out speed.json
    python -m benchmarks.peers accuracy --peers brevitas nncf --out accuracy.json -- --models resnet20 --bits w2a2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.peers.environments import CACHE, PEERS, run_peer
from benchmarks.tables import table

COLUMNS = {
    "accuracy": ["peer", "version", "model", "w_bits", "a_bits", "method", "seconds", "top1"],
    "speed": ["peer", "version", "model", "batch", "precision", "error", "ms"],
}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=sorted(COLUMNS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the environments (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=7200.0, help="seconds a script may take (%(default)s)"
    )
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:split])
    names = options.peers or [name for name, peer in PEERS.items() if peer.kind == options.kind]
    wrong = [name for name in names if PEERS[name].kind != options.kind]
    if wrong:
        parser.error(f"{', '.join(wrong)}: not measured for {options.kind}")
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(
            run_peer(
                name,
                given[split + 1 :],
                cache=options.cache,
                threads=options.threads,
                timeout=options.timeout,
            )
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"kind": options.kind, "results": results}, indent=1) + "\n")
    print(table([row for result in results for row in result["rows"]], COLUMNS[options.kind]))


if __name__ == "__main__":
    main()
