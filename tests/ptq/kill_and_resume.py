"""Kill a quantization at seeded random moments, resume it, and compare with a run that nobody disturbed.

Run as a program of its own, ``python -m tests.ptq.kill_and_resume FOLDER KILLS PRESET``: it loads torch once and forks, so
that a run costs no start-up.  Prints one line of JSON: what was counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.pipeline import STAGES
from cat_plugin.ptq.progress import Progress
from tests.ptq.models import SmallResNet, randomise, small_inputs


def digest(module: torch.nn.Module) -> str:
    """SHA-256 over all tensors of a module."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def work(state: Path, result: Path, reported: Path, preset: str) -> None:
    """The run: notes each unit it has done, and in the end what came out."""
    trained = {} if preset == "fast" else {"unit_steps": 6, "model_steps": 6, "refinement_steps": 3}
    spec = QuantSpec(w_bits=2, a_bits=3, preset=preset, unit="layer", batch_size=8, **trained)
    known = {stage.name for stage in STAGES} - {"model", "refinement"}

    def note(event: Progress) -> None:
        if event.stage.partition(",")[0] not in known and (preset == "fast" or event.loss_after is not None):
            with reported.open("ab") as stream:
                stream.write(b".")

    module, _ = quantize(
        randomise(SmallResNet()), spec, small_inputs(16, 3, 8, 8), progress=note, resume=state
    )
    result.write_text(digest(module))


def start(folder: Path, preset: str) -> int:
    """Fork a run that works in `folder`; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(folder / "state", folder / "result", folder / "reported", preset)
        code = 0
    finally:
        os._exit(code)


def spent(process: int) -> float:
    """Seconds of processor time that a run has had: on a busy machine, how far it is."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def progressed(folder: Path) -> int:
    """Units that the run says it has done."""
    return len((folder / "reported").read_bytes())


def finished(folder: Path) -> int:
    """Stages that the state on disk holds; it must be readable at any time."""
    state = folder / "state" / "state.json"
    return len(json.loads(state.read_text())["finished"]) if state.exists() else 0


def _keep_locks_apart() -> None:
    """Bars of torch.fx take a lock that all processes share: a run killed while it holds it would stop all that come after."""
    try:
        from tqdm import tqdm
    except ImportError:
        return
    tqdm.monitor_interval = 0  # a thread would take it too
    tqdm.set_lock(threading.RLock())


def main(root: Path, kills: int, preset: str) -> dict[str, int]:
    """Kill until `kills` runs were hit, over as many whole quantizations as that takes."""
    torch.set_num_threads(1)
    _keep_locks_apart()
    # Once in this process, for what torch imports and builds on first use: else each run would spend itself on that.
    work(root / "state", root / "result", root / "reported", preset)
    undisturbed = root / "undisturbed"
    undisturbed.mkdir()
    before = sum(os.times()[2:4])
    _, status = os.waitpid(start(undisturbed, preset), 0)
    assert status == 0
    duration = sum(os.times()[2:4]) - before
    wanted = (undisturbed / "result").read_text()

    chance = random.Random(7)
    hit = whole = saved = 0
    while hit < kills or (root / f"run{whole}").exists():
        folder = root / f"run{whole}"
        folder.mkdir(exist_ok=True)
        (folder / "reported").write_bytes(b"")
        before = finished(folder)
        child = start(folder, preset)
        # Once enough were killed, the last one may end.
        moment = chance.uniform(0, duration) if hit < kills else float("inf")
        units = chance.randint(1, 3) if hit < kills else 10**6
        ended = 0
        # In closed form nearly all of the time is spent on tracing, before the first unit.
        while not ended and (progressed(folder) < units if preset == "fast" else spent(child) < moment):
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hit += 1
            done, told = finished(folder) - before, progressed(folder)
            assert done >= told - 1, "more than the unit at work was lost"
            saved += done
            continue
        assert status == 0
        assert (folder / "result").read_text() == wanted, "resumed to another result"
        left = {path.name for path in (folder / "state").iterdir()}
        referred = {"state.json", *json.loads((folder / "state" / "state.json").read_text())["files"]}
        assert left == referred, f"files that nothing refers to were left: {left - referred}"
        whole += 1
    return {
        "kills": hit,
        "quantizations": whole,
        "stages_of_one": finished(undisturbed),
        "stages_saved": saved,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
