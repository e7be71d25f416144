"""What the correction adds to classifiers that other libraries quantized: top-1 before and after, from stored logits.

The peers' accuracy scripts store logits, and this script fits the paper's settings and ``auto`` to those of all unlabelled images
(for ``auto`` the quantizer's own images are marked as such) and counts right answers on the evaluation images::

    python -m benchmarks.peers accuracy --out accuracy.json -- --models mobilenet_v2 --logits logits
    python -m benchmarks.plug_in --logits logits

ONNX Runtime's networks have a script of their own (:mod:`benchmarks.correct_onnx`). Labels are used for the numbers that are
printed, and for nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows
from benchmarks.correct_onnx import paired_error, percent

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "plug_in.json"


def measure(path: Path) -> dict[str, Any]:
    """Correct one network's logits both ways."""
    from cat_plugin.cluster_affine import ClusterAffine

    with np.load(path) as stored:
        z_q, z_fp, e_q, labels = (stored[name] for name in ("z_q", "z_fp", "e_q", "labels"))
        used, key = int(stored["used"]), json.loads(str(stored["key"]))
    before = e_q.argmax(1) == labels
    row: dict[str, Any] = {"row": path.stem, **key, "bits": f"W{key['w_bits']}A{key['a_bits']}"}
    row |= {"calibration": used, "fitted_to": len(z_q), "quantized": percent(before)}
    tuned = np.arange(len(z_q)) < used
    for setting, estimator, mask in (
        ("paper", ClusterAffine.paper(), None),
        ("auto", ClusterAffine(random_state=0), tuned if not tuned.all() else None),
    ):
        started = time.perf_counter()
        estimator.fit(z_q, z_fp, tuned_mask=mask)
        row[f"{setting}_fit_s"] = round(time.perf_counter() - started, 1)
        after = estimator.predict(e_q).argmax(1) == labels
        row[setting], row[f"{setting}_error"] = percent(after), paired_error(after, before)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--logits", type=Path, required=True, help="folder that the peers' scripts wrote to")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    options = parser.parse_args()
    files = sorted(options.logits.glob("*.npz"))
    if not files:
        parser.error(f"there are no logits in {options.logits}; run benchmarks.peers with --logits first")
    for path in files:
        row = measure(path)
        rows.merge(options.out, [row], [each.stem for each in files])
        print("  ".join(f"{k} {v}" for k, v in row.items() if k != "row"), flush=True)


if __name__ == "__main__":
    main()
