"""What several processes save: processor time of the phases of a quantization, in one process and in the first of several.

    python -m benchmarks.ranks --processes 1 2 --inputs 1024

Needs the data that :mod:`benchmarks.models` reads.  Phases are told apart by their functions, each without those that it calls;
their processor time, with one thread, says what they cost also where processes share cores.  What exchanges move is counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from benchmarks.machine import machine
from benchmarks.models import cifar10, resnet20
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import layer_fit
from cat_plugin.ptq.graph.executor import Executor
from cat_plugin.ptq.quantizers import observers
from cat_plugin.ptq.ranks import Ranks, share_of
from cat_plugin.ptq.stages import preparation

# phase: (whether its work is over this process's inputs alone, the functions)
PHASES: dict[str, tuple[bool, tuple[tuple[Any, str], ...]]] = {
    "passes of the model": (True, ((Executor, "run"), (Executor, "value"), (preparation, "_check"))),
    "moments": (True, ((layer_fit, "measure"),)),
    "bias behind clips": (True, ((layer_fit, "_shift_bias"),)),
    "activation ranges": (False, ((observers, "search_activation_range"),)),
    "weight grids": (False, ((layer_fit, "search_weight_range"),)),
    "least squares": (False, ((layer_fit, "ridge_by_halves"), (layer_fit, "least_squares_weight"))),
    "rounding": (False, ((layer_fit, "fit_integers"),)),
    "exchange": (False, ((Ranks, "_exchange"), (Ranks, "sum_"), (Ranks, "same"), (Ranks, "extent"))),
}
REST = "tracing, checks, the rest"


class Clock:
    """Processor time of each phase, without that of others inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack, self._last = [REST], time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def watch(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        @functools.wraps(function)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            self._turn()
            self._stack.append(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self._turn()
                self._stack.pop()

        return watched

    def stop(self) -> None:
        """Count what was done since."""
        self._turn()

    def restart(self) -> None:
        """Forget what was before."""
        self.seconds.clear()
        self._last = time.process_time()


def run(rank: int, size: int, count: int, bits: int, directory: str) -> None:
    """Quantize in one of `size` processes and write what it took."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    model, x = resnet20(), cifar10().calibration[:count]
    moved, clock = Counter[str](), Clock()
    for phase, (_, functions) in PHASES.items():
        for owner, name in functions:
            setattr(owner, name, clock.watch(phase, getattr(owner, name)))
    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, _counted(getattr(dist, name), moved))
    spec = QuantSpec(w_bits=bits, a_bits=bits, preset="fast", num_samples=count)
    share = x[share_of(count, spec.batch_size, rank, size)]
    clock.restart()
    started = time.perf_counter()
    quantize(model, spec, share.split(spec.batch_size))
    clock.stop()
    found = {"seconds": dict(clock.seconds), "wall": time.perf_counter() - started, **moved}
    Path(f"{directory}/{rank}.json").write_text(json.dumps(found))


def _counted(function: Callable[..., Any], moved: Counter[str]) -> Callable[..., Any]:
    def counted(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        moved["bytes"] += tensor.nbytes
        moved["exchanges"] += 1
        return function(tensor, *arguments, **keywords)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    chosen = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for size in chosen.processes:
        with tempfile.TemporaryDirectory() as directory:
            given = (size, chosen.inputs, chosen.bits, directory)
            multiprocessing.spawn(run, args=given, nprocs=size)
            found[size] = json.loads(Path(f"{directory}/0.json").read_text())
    print("| phase | divided |" + "".join(f" {size} process{'es' * (size > 1)}, s |" for size in found))
    print("|---|---|" + "---|" * len(found))
    for phase in (*PHASES, REST):
        seconds = "".join(f" {found[size]['seconds'].get(phase, 0.0):.2f} |" for size in found)
        print(f"| {phase} | {'yes' if PHASES.get(phase, (False,))[0] else 'no'} |{seconds}")
    for size, one in found.items():
        print(f"{size}: {one.get('exchanges', 0)} exchanges of {one.get('bytes', 0) / 1e6:.1f} MB")
    one = found[min(found)]["seconds"]
    divided = sum(one.get(phase, 0.0) for phase, (split, _) in PHASES.items() if split)
    same = sum(one.values()) - divided
    for size in (2, 4, 8, 16):
        print(f"foreseen of {size}: {same + divided / size:.1f} s of {same + divided:.1f}")
    if chosen.out is not None:
        facts = {"machine": machine(), "inputs": chosen.inputs, "bits": chosen.bits, "found": found}
        chosen.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
