"""Kill a quantization at seeded random moments, resume it, and compare with a run that nobody disturbed.

Run as a program of its own, ``python -m tests.ptq.kill_and_resume FOLDER KILLS``: it loads torch once and forks, so that
a run costs no start-up.  Prints one line of JSON: what was counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import SmallResNet, randomise, small_inputs


def digest(module: torch.nn.Module) -> str:
    """SHA-256 over all tensors of a module."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def work(state: Path, result: Path, reported: Path) -> None:
    """The run: notes each unit it has done, and in the end what came out."""
    spec = QuantSpec(
        w_bits=2,
        a_bits=3,
        preset="best",
        unit="layer",
        unit_steps=6,
        model_steps=6,
        refinement_steps=3,
        batch_size=8,
    )

    def note(event: object) -> None:
        if getattr(event, "loss_after", None) is not None:
            with reported.open("ab") as stream:
                stream.write(b".")

    module, _ = quantize(
        randomise(SmallResNet()), spec, small_inputs(16, 3, 8, 8), progress=note, resume=state
    )
    result.write_text(digest(module))


def start(folder: Path) -> int:
    """Fork a run that works in `folder`; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(folder / "state", folder / "result", folder / "reported")
        code = 0
    finally:
        os._exit(code)


def spent(process: int) -> float:
    """Seconds of processor time that a run has had: on a busy machine, how far it is."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def finished(folder: Path) -> int:
    """Stages that the state on disk holds; it must be readable at any time."""
    state = folder / "state" / "state.json"
    return len(json.loads(state.read_text())["finished"]) if state.exists() else 0


def main(root: Path, kills: int) -> dict[str, int]:
    """Kill until `kills` runs were hit, over as many whole quantizations as that takes."""
    torch.set_num_threads(1)
    # Once in this process, for what torch imports and builds on first use: else each run would spend itself on that.
    work(root / "state", root / "result", root / "reported")
    undisturbed = root / "undisturbed"
    undisturbed.mkdir()
    before = sum(os.times()[2:4])
    _, status = os.waitpid(start(undisturbed), 0)
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
        child = start(folder)
        # Once enough were killed, the last one may end.
        moment = chance.uniform(0, duration) if hit < kills else float("inf")
        ended = 0
        while not ended and spent(child) < moment:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hit += 1
            done, told = finished(folder) - before, len((folder / "reported").read_bytes())
            assert done >= told - 1, "more than the unit at work was lost"
            saved += done
            continue
        assert status == 0
        assert (folder / "result").read_text() == wanted, "resumed to another result"
        left = sorted(path.name for path in (folder / "state").iterdir())
        assert len(left) == 2, left
        whole += 1
    return {
        "kills": hit,
        "quantizations": whole,
        "stages_of_one": finished(undisturbed),
        "stages_saved": saved,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
