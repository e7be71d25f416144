"""Accuracy and time of the low-bit engine, beside its peers and with one method removed at a time.

Every row is measured in a process of its own and merged into one JSON as soon as it is there, so that any subset can be
run, again or for the first time::

    python -m benchmarks.ptq_accuracy --rows 'resnet20/w2a2/*' --threads 2
    python -m benchmarks.ptq_accuracy --rows 'ablation/*'
    python -m benchmarks.ptq_accuracy --rows 'peer/brevitas/*' --peer brevitas=/path/to/python

Rows are named ``model/bits/convention/preset``. In the convention ``default`` every input of a convolution or linear
layer has the row's bits, but that of depthwise layers and what feeds an addition or a pooling 8 (side by side where both do); in ``inputs``
those of depthwise layers have the row's bits, too; in ``strict`` the
shortcut and what is pooled as well, with one quantizer for a block's output, as in the literature on
block reconstruction; in ``few`` the engine is given 64 images, in ``none`` no image, and makes 64 inputs of its own. First and
last layers have 8 bits in all, and in the peers. ``best`` of networks on 224 x 224 images trains the whole model alone, for 120 steps. Labels are used for the
number that is printed, and for nothing else.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows
from benchmarks.memory import PeakMemory

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ptq_accuracy.json"
# seconds a step on a processor, and more than a few hundred overfit to 704 images (docs/benchmarks/ptq_history.md)
LARGE_BEST: dict[str, Any] = {"unit_steps": 0, "model_steps": 120, "refinement_steps": 0}
_IMAGENET_BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
BITS = {
    "resnet20": ("w4a4", "w3a3", "w2a4", "w2a2"),
    "mobilenet_v2": _IMAGENET_BITS,
    "efficientnet_lite0": _IMAGENET_BITS,
}
# the calibration rows that are left are those that the engine has not seen: quality without labels is judged on them
SAMPLES = {"resnet20": 1024, "mobilenet_v2": 750, "efficientnet_lite0": 750}
PRESETS = ("fast", "balanced", "best")
DEPTHWISE = ("mobilenet_v2", "efficientnet_lite0")
REFUSED = {("mobilenet_v2", "w4a4", "none")}  # it remembers nothing: its BatchNorms were folded before
ABLATED = {"closed": "resnet20/w2a2/default/fast", "trained": "resnet20/w2a2/strict/balanced"}
# closed form: the preset fast with one method taken out or put in
CLOSED: dict[str, dict[str, Any]] = {
    "nothing removed": {},
    "without asymmetric weights": {"symmetric_weights": True},
    "without the refit to quantized inputs": {"refit": False},
    "without error-compensated rounding (and the refit)": {"compensation": False},
    "without bias correction": {"bias_correction": False},
    "with cross-layer equalization": {"equalization": True},
}
# training, shortened so that every row is run in about a minute
SHORT: dict[str, Any] = {"unit_steps": 60, "refinement_steps": 60}
TRAINED: dict[str, dict[str, Any]] = {
    "nothing removed": {},
    "without learned rounding": {"rounding": "none"},
    "without learned steps": {"learned_steps": False},
    "with dropping": {"drop_probability": 0.5},
    "with full-precision inputs mixed in": {"input_mix": 0.5},
    "without unit reconstruction": {"unit_steps": 0},
    "without refinement": {"refinement_steps": 0},
    "the whole model on its logits instead of units": {"unit_steps": 0, "model_steps": 120},
    "straight-through instead of AdaRound": {"rounding": "straight_through"},
    "layers instead of blocks": {"unit": "layer"},
    "packs instead of blocks": {"unit": "pack"},
    "Fisher-weighted instead of plain squared error": {"loss": "fisher"},
    "with prediction difference": {"guidance": 0.05},
}
PEERS = {"brevitas": ("rtn", "gptq", "gpfq", "learned-round"), "aimet": (), "nncf": ()}


def all_rows() -> list[str]:
    """Names of the rows that there are, in the order of the table."""
    rows = [
        f"{model}/{bits}/{convention}/{preset}"
        for model, widths in BITS.items()
        for bits in widths
        for convention in ("default", "inputs", "strict")
        if convention != "inputs" or model in DEPTHWISE
        for preset in PRESETS
    ]
    rows += [
        f"{model}/{bits}/{data}/fast"
        for model in BITS
        for bits in ("w8a8", "w4a8", "w4a4")
        for data in ("few", "none")
        if (model, bits, data) not in REFUSED
    ]
    rows += [f"ablation/closed/{name}" for name in CLOSED]
    rows += [f"ablation/trained/{name}" for name in TRAINED]
    return rows + [f"peer/{name}/{model}" for name in PEERS for model in BITS]


def measure(
    name: str,
    data: str | None,
    threads: int,
    logits: Path | None = None,
    device: str = "cpu",
    memory_mb: int = 1000,
    seed: int = 0,
    samples: int | None = None,
) -> dict[str, Any]:
    """Quantize one model, with as many inputs as its rows have or with others, and count its right answers."""
    import torch

    from benchmarks.models import MODELS, share, split_of, top1_among_ten
    from cat_plugin.heap import freed_memory_kept
    from cat_plugin.ptq import QuantSpec, quantize

    torch.set_num_threads(threads)
    parts = name.split("/")
    options: dict[str, Any] = {}
    if parts[0] == "ablation":
        options = CLOSED[parts[2]] if parts[1] == "closed" else {**SHORT, **TRAINED[parts[2]]}
        parts = ABLATED[parts[1]].split("/")
    model_name, bits, convention, preset = parts
    if preset == "best" and model_name != "resnet20":
        options = LARGE_BEST
    w_bits, a_bits = (int(b) for b in bits[1:].split("a"))
    split = split_of(model_name, data)
    model = MODELS[model_name](data).eval()
    spec = QuantSpec(
        **{
            "w_bits": w_bits,
            "a_bits": a_bits,
            "residual_bits": a_bits if convention == "strict" else 8,
            "depthwise_bits": None if convention in ("inputs", "strict") else 8,
            "preset": preset,
            "num_samples": 64 if convention in ("few", "none") else samples or SAMPLES[model_name],
            "batch_size": 64 if model_name == "resnet20" else 16,
            "memory_mb": None if model_name == "resnet20" else memory_mb,
            "seed": seed,
            **options,
        }
    )
    inputs = split.calibration[: spec.num_samples]
    load = os.getloadavg()[0]
    started, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        if convention == "none":
            shape = tuple(inputs.shape[1:])
            module, report = quantize(model.to(device), spec, None, input_shape=shape)
        else:
            module, report = quantize(model, spec, inputs, device=device)
    seconds, busy = time.perf_counter() - started, time.process_time() - cpu
    batch = 250 if model_name == "resnet20" or device != "cpu" else 25
    with freed_memory_kept(), torch.no_grad():
        z_fp, z_q, e_fp, e_q = (
            torch.cat([network(x.to(device)).cpu() for x in images.split(batch)])
            for images in (split.calibration, split.evaluation)
            for network in (model.to(device), module.to(device))
        )
    if logits is not None:
        logits.mkdir(parents=True, exist_ok=True)
        np.savez(
            logits / (name.replace("/", "_") + ".npz"),
            z_fp=z_fp, z_q=z_q, e_q=e_q, labels=split.evaluation_labels, used=len(inputs),
        )  # fmt: skip
    return {
        "row": name,
        "peer": "cat_plugin",
        "model": model_name,
        "w_bits": w_bits,
        "a_bits": a_bits,
        "convention": convention,
        "preset": preset,
        "options": options,
        "calibration": len(inputs),
        "top1": share(e_q.argmax(1), split.evaluation_labels),
        "fp_top1": share(e_fp.argmax(1), split.evaluation_labels),
        **_known(
            top1_ten=top1_among_ten(model_name, e_q, split.evaluation_labels),
            fp_top1_ten=top1_among_ten(model_name, e_fp, split.evaluation_labels),
        ),
        **_held_out(z_q[len(inputs) :], z_fp[len(inputs) :]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "load_before": round(load, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "memory_mb": spec.memory_mb,
        "anon_before_mb": memory.before >> 20,
        "peak_anon_mb": memory.anonymous >> 20,
        "peak_file_mb": memory.files >> 20,
        "cache_mb": round(report.cache["peak_bytes"] / 2**20),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "notes": report.notes,
    }


def _known(**values: float | None) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}


def _held_out(z_q: Any, z_fp: Any) -> dict[str, float]:
    """How far the logits are from full precision on calibration rows that the engine has not seen; no labels."""
    from benchmarks.models import share
    from cat_plugin.ptq.learned.quality import divergence

    if not len(z_q):
        return {}
    return {
        "held_out_kl": round(float(divergence(z_q, z_fp, 1.0)), 4),
        "held_out_agreement": share(z_q.argmax(1), z_fp.argmax(1)),
    }


def correct(path: Path, logits: Path, names: list[str]) -> None:
    """Add to rows what CAT makes of their logits: fitted to the engine's own rows, and to all calibration rows."""
    from cat_plugin.cluster_affine import ClusterAffine

    for row in [r for r in json.loads(path.read_text())["rows"] if r["row"] in names]:
        file = logits / (row["row"].replace("/", "_") + ".npz")
        if not file.exists():
            continue
        stored = np.load(file)
        used, labels = int(stored["used"]), stored["labels"]
        for key, count in (("cat_top1", used), ("cat_top1_all", len(stored["z_q"]))):
            tuned = np.arange(count) < used if count > used else None
            estimator = ClusterAffine(random_state=0)
            estimator.fit(stored["z_q"][:count], stored["z_fp"][:count], tuned_mask=tuned)
            row[key] = round(100.0 * float((estimator.predict(stored["e_q"]).argmax(1) == labels).mean()), 3)
            row[key.replace("top1", "rows")] = count
        merge(path, [row])
        print(
            f"{row['row']}  top1 {row['top1']}  corrected {row['cat_top1']}  {row['cat_top1_all']}",
            flush=True,
        )


def run_peer(name: str, python: str, data: str | None, threads: int) -> list[dict[str, Any]]:
    """Rows of a peer's own script, run by its own Python."""
    _, peer, model = name.split("/")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [python, "-m", f"benchmarks.peers.{peer}_accuracy", "--out", str(out), "--models", model]
        command += ["--threads", str(threads)] + (["--data", data] if data else [])
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
            return [{"row": name, "peer": peer, "model": model, "reason": reason}]
        rows = json.loads(out.read_text())["rows"]
    return [{"row": name, "threads": threads, **row} for row in rows]


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    """What the tables in the pages select and show a row by."""
    parts = row["row"].split("/")
    labels = {"bits": f"W{row['w_bits']}A{row['a_bits']}"} if "w_bits" in row else {}
    labels["corrected"] = "yes" if "cat_top1" in row else "no"
    if parts[0] == "ablation":
        return labels | {"table": parts[1], "method": parts[2]}
    if parts[2] in ("few", "none"):
        return labels | {"table": "data"}
    return labels | {"table": "peer" if parts[0] == "peer" else parts[0]}


def merge(path: Path, measured: list[dict[str, Any]]) -> None:
    """Put rows into the JSON in the place of those of the same names, with what the tables select them by."""
    rows.merge(path, [{**row, **_labels(row)} for row in measured], all_rows())


def table(path: Path) -> str:
    """The JSON as Markdown."""
    lines = ["| model | bits | method | top-1 | FP | seconds |", "|---|---|---|---|---|---|"]
    for row in json.loads(path.read_text())["rows"]:
        bits = f"W{row['w_bits']}A{row['a_bits']}" if "w_bits" in row else ""
        method = row.get("method") or f"{row.get('preset', '')}, {row.get('convention', '')}"
        if row["row"].startswith("ablation/"):
            method = row["row"].removeprefix("ablation/").replace("/", " ")
        if row["peer"] != "cat_plugin":
            method = f"{row['peer']} {row.get('version', '')}: {method}"
        number = f"{row['top1']:.2f}" if "top1" in row else row.get("reason", "")
        fp, seconds = row.get("fp_top1", ""), row.get("seconds", "")
        lines.append(f"| {row.get('model', '')} | {bits} | {method} | {number} | {fp} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", default=["resnet20/*"], help="patterns of row names (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter"
    )
    parser.add_argument("--device", default="cpu", help="where the engine computes")
    parser.add_argument("--memory-mb", type=int, default=1000, help="of activations of 224 x 224 images")
    parser.add_argument("--logits", type=Path, help="folder to store each row's logits in")
    parser.add_argument(
        "--correct",
        action="store_true",
        help="run nothing: add to the rows what CAT makes of the logits stored",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(
            json.dumps(
                measure(
                    options.one,
                    options.data,
                    options.threads,
                    options.logits,
                    options.device,
                    options.memory_mb,
                )
            )
        )
        return
    names = [row for row in all_rows() if any(fnmatch.fnmatchcase(row, p) for p in options.rows)]
    if options.list or not names:
        print("\n".join(all_rows()))
        return
    if options.correct:
        if options.logits is None:
            parser.error("--correct needs --logits")
        correct(options.out, options.logits, names)
        return
    pythons = dict(item.split("=", 1) for item in options.peer)
    for name in names:
        if name.startswith("peer/"):
            peer = name.split("/")[1]
            if peer not in pythons:
                print(f"{name}: give --peer {peer}=PYTHON", file=sys.stderr)
                continue
            measured = run_peer(name, pythons[peer], options.data, options.threads)
        else:
            command = [
                sys.executable,
                "-m",
                "benchmarks.ptq_accuracy",
                "--one",
                name,
                "--threads",
                str(options.threads),
                "--device",
                options.device,
                "--memory-mb",
                str(options.memory_mb),
            ]
            command += ["--data", options.data] if options.data else []
            command += ["--logits", str(options.logits)] if options.logits else []
            environment = {
                **os.environ,
                "OMP_WAIT_POLICY": "passive",
                "OMP_NUM_THREADS": str(options.threads),
            }
            finished = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=False, env=environment
            )
            if finished.returncode:
                print(f"{name}: failed with exit code {finished.returncode}", file=sys.stderr)
                continue
            measured = [json.loads(finished.stdout.strip().splitlines()[-1])]
        merge(options.out, measured)
        for row in measured:
            print(
                "  ".join(
                    f"{k} {row[k]}" for k in ("row", "method", "top1", "seconds", "reason") if k in row
                ),
                flush=True,
            )
    print(table(options.out))


if __name__ == "__main__":
    main()
