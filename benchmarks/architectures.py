"""Other people's architectures: one of each in timm and transformers, small, quantized to W8A8, compiled, and compared.

    pip install timm torchvision transformers
    python -m benchmarks.architectures
    python -m benchmarks.architectures --source timm --names densenet121 dla34

Weights are random (:mod:`benchmarks.architecture_models`), so that this says whether a network comes through and whether numbers are
right, not what its accuracy will be.  ``error`` is the squared error of the quantized network's result on inputs that calibration has
not seen, in percent of that result's variance over the inputs; ``naive`` the same where weights and inputs of convolutions and linear
layers are rounded to nearest by their greatest values, with everything else in float; ``library`` the error of the compiled
library, which should be that of the quantized network, and ``apart`` how far the two are from each other.  Where operators in float
stand between layers the last bit of a sum decides now and then how a value is rounded, and every layer behind it makes more of
that: in deep networks ``apart`` is as large as the errors, while these are alike.  What does not come through has the reason instead.

Each network has a process of its own, and so many minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from benchmarks.architecture_models import SOURCES, Network
from benchmarks.rows import merge
from benchmarks.tables import table
from cat_plugin.errors import CATError

__all__ = ["main"]

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "architectures.json"
COLUMNS = ["source", "architecture", "parameters", "naive", "error", "library", "apart", "float_ops", "reason"]  # fmt: skip
_LINE = 160


def _call(model: nn.Module, inputs: Any) -> Tensor:
    """The first tensor of what a model gives, in float."""
    with torch.no_grad():
        given = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(given, dict):
        given = given["logits"] if "logits" in given else next(iter(given.values()))
    result: Tensor = given[0] if isinstance(given, (tuple, list)) else given
    return result.float()


def _first(inputs: Any, count: int) -> Any:
    return {k: v[:count] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def _percent(of: Tensor, truth: Tensor) -> float:
    """Squared error in percent of the variance of `truth` over its rows."""
    return 100 * float((of - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def _rounded(network: Network) -> nn.Module:
    """Weights by output channel, and inputs by tensor, at 8 bits by their greatest values."""
    model = copy.deepcopy(network.model)
    ranges: dict[nn.Module, tuple[float, float]] = {}
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]

    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        low, high = ranges.get(layer, (0.0, 0.0))
        ranges[layer] = min(low, float(given[0].min())), max(high, float(given[0].max()))

    def round_input(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = ranges[layer]
        step = max(high - low, 1e-9) / 255
        return (((given[0] - low) / step).round().clamp(0, 255) * step + low, *given[1:])

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    for inputs in network.calibration:
        _call(model, inputs)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        if layer not in ranges:
            continue
        layer.register_forward_pre_hook(round_input)
        if is_parametrized(layer, "weight"):  # of a class that it shares with the model: left alone
            continue
        weight = layer.weight
        step = weight.flatten(1).abs().amax(1).clamp(min=1e-9).reshape(-1, *[1] * (weight.ndim - 1)) / 127
        layer.weight = nn.Parameter((weight / step).round() * step)
    return model


def _rows_of(network: Network) -> Iterator[dict[str, Any]]:
    """What is known of a network after each step, so that what was measured before a failure is kept."""
    import tvm_backend
    from cat_plugin.graph.export import export_program
    from cat_plugin.ptq import QuantSpec, quantize
    from tvm_backend.target import native

    model, unseen = network.model, network.unseen
    truth = _call(model, unseen)
    yield {"parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"}
    yield {"naive": round(_percent(_call(_rounded(network), unseen), truth), 3)}
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32)
    quantized, _ = quantize(model, spec, network.calibration)
    ours = _call(quantized, unseen)
    yield {"error": round(_percent(ours, truth), 3)}
    program = export_program(quantized, _first(unseen, 2))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "network.so"
        target = {**native(), "opt-level": 0}  # what LLVM takes for speed is not what is looked at
        report = tvm_backend.compile(program, target=target, out=out, cache=False)
        arrays = {k: v.numpy() for k, v in unseen.items()} if isinstance(unseen, dict) else unseen.numpy()
        if isinstance(arrays, dict) and len(arrays) == 1:
            (arrays,) = arrays.values()
        given = tvm_backend.load(out)(arrays)
        while isinstance(given, (dict, tuple, list)):
            given = next(iter(given.values())) if isinstance(given, dict) else given[0]
        library = torch.from_numpy(np.asarray(given).copy())
    yield {
        "library": round(_percent(library, truth), 3),
        "apart": round(_percent(library, ours), 4),
        "float_ops": " ".join(sorted(set(report.float_ops))),
    }


def measure(source: str, name: str, out: Path) -> None:
    """One architecture, in this process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"row": f"{source}/{name}", "source": source, "architecture": name}
    try:
        for found in _rows_of(SOURCES[source][1](name)):
            row |= found
            out.write_text(json.dumps(row))
    except Exception as error:
        row["reason"] = str(error) if isinstance(error, CATError) else f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(row))


def _one(source: str, name: str, minutes: float) -> dict[str, Any]:
    """One architecture, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.architectures", "--worker", str(out)]
        reason = ""
        try:
            ended = subprocess.run(
                [*command, "--source", source, "--names", name],
                timeout=60 * minutes,
                capture_output=True,
                text=True,
                check=False,
            )
            if ended.returncode:
                reason = ended.stderr.strip()[-_LINE:] or f"ended with {ended.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {minutes:g} minutes"
        row = json.loads(out.read_text()) if out.exists() else {}
    row |= {"row": f"{source}/{name}", "source": source, "architecture": name}
    if reason:
        row["reason"] = reason
    return row


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the first line of its reason."""
    if "reason" not in row:
        return row
    lines = row["reason"].strip().splitlines() or ["?"]
    return row | {"reason": lines[0][:_LINE]}


def main(argv: list[str] | None = None) -> None:
    """Measure, merge into the JSON and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=sorted(SOURCES), help="where from (default: both)")
    parser.add_argument(
        "--names", nargs="+", help="these architectures (default: all that are not in the JSON yet)"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into (%(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return measure(options.source, options.names[0], options.worker)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    known = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = set() if options.names else {row["row"] for row in known}
    rows = []
    for source in [options.source] if options.source else sorted(SOURCES):
        every = SOURCES[source][0]()
        for name in options.names or every:
            if f"{source}/{name}" in done:
                continue
            rows.append(_shortened(_one(source, name, options.minutes)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            merge(options.out, rows[-1:], [f"{source}/{each}" for each in every])
    print(table(rows, COLUMNS))
    return None


if __name__ == "__main__":
    main()
