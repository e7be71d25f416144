"""What the map in front of the vocabulary makes of SmolLM2-135M as others rounded its weights.

The peers' scripts store what they rounded, and the rows with the map are merged into the table of theirs::

    python -m benchmarks.peers transformers --out docs/benchmarks/peers_transformers.json -- --states states --rows 'smollm2/*'
    python -m benchmarks.correct_tokens states
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.encoders import smollm2
from benchmarks.peers.merging import merge_into
from benchmarks.peers.transformer_rows import ABOUT
from cat_plugin import correct_tokens, perplexity

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "peers_transformers.json"


def rounded(path: Path, model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, str]]:
    """The model with the weights of a file, and what that says of itself."""
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return changed, about


def measure(path: Path, model: torch.nn.Module, windows: Any, test: Any) -> dict[str, Any]:
    """One row."""
    changed, about = rounded(path, model)
    before = round(perplexity(changed, test), 3)
    started, used = time.perf_counter(), time.process_time()
    corrected, _ = correct_tokens(changed, model, windows)
    return {
        **{key: about[key] for key in ABOUT},
        "bits": about["bits"].upper(),
        "method": f"{about['method']} + map",
        "calibration": len(windows),
        "evaluation": len(test),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "threads": torch.get_num_threads(),
        "uncorrected": before,
        "score": round(perplexity(corrected, test), 3),
        "fp": round(perplexity(model, test), 3),
        "unit": "perplexity",
    }


def main() -> None:
    """Measure every file of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("states", type=Path, help="folder of rounded weights")
    parser.add_argument("--files", default="*smollm2*", help="pattern of their names (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help="of 1024 tokens, to fit the map to")
    parser.add_argument("--evaluation", type=int, default=4, help="windows of test text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, windows, test = smollm2(options.data, None, options.windows, options.evaluation)
    for path in sorted(options.states.glob(f"{options.files}.safetensors")):
        row = measure(path, model, windows, test)
        print(
            "  ".join(f"{k} {row[k]}" for k in ("peer", "bits", "method", "uncorrected", "score")), flush=True
        )
        merge_into(options.out, [row])


if __name__ == "__main__":
    main()
