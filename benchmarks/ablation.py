"""What the parts of LRQuant+ and its relatives bring: one taken away, or put in another's place, at a time.

The vision transformer of ``examples/vision_transformer`` is trained from its seed, then quantized once a row and seed (which
orders the calibration rows)::

    python -m benchmarks.ablation
    python -m benchmarks.ablation --rows 'without *' --bits 4 4 --seeds 1

The squared error of the logits over the test images, in percent of their mean square, tells more than top-1, of which one
image in 600 is 0.17 points.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import rows

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ablation.json"
#: ``smoothing_epochs`` of those that train is an option of the command.
TRAINED = {"smoothing_epochs": -1}
LRQUANT = {"smoothing": "lrquant", **TRAINED}
SEARCHED = {"smoothing": "searched"}
BLOCKS = {**SEARCHED, "unit_steps": 100}
#: Row -> options of the specification, and the part that is taken away (see :func:`_without`).
ROWS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lrquant": (LRQUANT, None),
    "without training": ({"smoothing": "lrquant"}, None),
    "without the cosine (NLC)": (LRQUANT, "cosine"),
    "without the second branch": (LRQUANT, "branch"),
    "without running means": (LRQUANT, "means"),
    "without shifts": (LRQUANT, "shifts"),
    "without learned clipping": (LRQUANT, "clipping"),
    "start of SmoothQuant": (LRQUANT, "start"),
    "rotation vectors, k = 2": ({**LRQUANT, "rotation_vectors": 2}, None),
    "rotation vectors, k = 4": ({**LRQUANT, "rotation_vectors": 4}, None),
    "omniquant": ({"smoothing": "omniquant", **TRAINED}, None),
    "affinequant": ({"smoothing": "affinequant", **TRAINED}, None),
    "flatquant": ({"smoothing": "flatquant", **TRAINED}, None),
    "smoothquant": ({"smoothing": "smoothquant"}, None),
    "repq": ({"smoothing": "repq"}, None),
    "searched": (SEARCHED, None),
    "nothing": ({}, None),
    "searched, uniform softmax": ({**SEARCHED, "softmax_grid": "uniform"}, None),
    "searched, logarithmic softmax": ({**SEARCHED, "softmax_grid": "logarithmic"}, None),
    "searched, queries and keys as they are": (SEARCHED, "rotated heads"),
    "searched, positions alike": ({**SEARCHED, "position_weights": False}, None),
    "searched, attention at 8 bits": ({**SEARCHED, "attention_bits": 8}, None),
    "searched, rotated (folded)": ({**SEARCHED, "rotation": "folded"}, None),
    "searched, rotated (online)": ({**SEARCHED, "rotation": "online"}, None),
    "lrquant, rotated (online)": ({**LRQUANT, "rotation": "online"}, None),
    "searched, the whole model trained": (
        {**SEARCHED, "preset": "best", "unit_steps": 0, "model_steps": 400, "refinement_steps": 0},
        None,
    ),
    "searched, blocks trained": (BLOCKS, None),
    "searched, rotated (online), blocks trained": ({**BLOCKS, "rotation": "online"}, None),
    "searched, blocks trained by curvature": ({**BLOCKS, "loss": "curvature"}, None),
    "searched, blocks trained by curvature and directions (FIMA-Q)": ({**BLOCKS, "loss": "fima"}, None),
}


@contextlib.contextmanager
def _without(part: str | None) -> Any:
    """LRQuant+ with a part taken away."""
    from cat_plugin.ptq.transforms import attention
    from cat_plugin.ptq.transforms.smoothing import training
    from cat_plugin.ptq.transforms.smoothing.losses import BLOCK_LOSSES, TwoBranches
    from cat_plugin.ptq.transforms.smoothing.starts import STARTS, LogarithmicEquivalent, OmniQuant

    class Unshifted(LogarithmicEquivalent):
        moves = False

    changes: dict[str | None, Any] = {
        None: contextlib.nullcontext(),
        "cosine": patch.dict(BLOCK_LOSSES, lrquant=partial(TwoBranches, cosine=False)),
        "branch": patch.dict(BLOCK_LOSSES, lrquant=partial(TwoBranches, own=False)),
        "means": patch.dict(BLOCK_LOSSES, lrquant=partial(TwoBranches, normalised=False)),
        "shifts": patch.dict(STARTS, lrquant=Unshifted()),
        "clipping": patch.object(training, "_CLIP_RATE", 0.0),
        "start": patch.dict(STARTS, lrquant=OmniQuant()),
        "rotated heads": patch.object(attention, "find_scores", lambda *_: []),
    }
    with changes[part]:
        yield


def _measure(network: Any, split: Any, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the mean over the seeds, and how far these are apart."""
    import torch

    from cat_plugin.ptq import QuantSpec, quantize

    images, labels = split.test
    changed, part = ROWS[name]
    if changed.keys() >= TRAINED.keys():
        changed = {**changed, "smoothing_epochs": options.passes}
    w_bits, a_bits = options.bits
    errors, scores, started = [], [], time.perf_counter()
    with torch.no_grad():
        full = network(images)
    for seed in range(options.seeds):
        order = torch.randperm(len(split.calibration[0]), generator=torch.Generator().manual_seed(seed))
        spec = QuantSpec(
            w_bits=w_bits,
            a_bits=a_bits,
            num_samples=options.samples,
            seed=seed,
            **{"attention_bits": a_bits, "preset": "fast", **changed},
        )
        with _without(part):
            module, _ = quantize(network, spec, split.calibration[0][order].split(64))
        with torch.no_grad():
            logits = module(images)
        errors.append(100 * float((logits - full).square().sum() / full.square().sum()))
        scores.append(100 * float((logits.argmax(1) == labels).float().mean()))
    bits = f"W{w_bits}A{a_bits}"
    return {
        "row": f"{bits}, {name}",
        "bits": bits,
        "method": name,
        "error": round(statistics.mean(errors), 3),
        "spread": round(max(errors) - min(errors), 3),
        "top1": round(statistics.mean(scores), 2),
        "fp": round(100 * float((full.argmax(1) == labels).float().mean()), 2),
        "seeds": options.seeds,
        "samples": options.samples,
        "passes": options.passes,
        "seconds": round((time.perf_counter() - started) / options.seeds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--bits", nargs=2, type=int, default=[3, 4], help="of weights and activations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="that the network is trained for")
    parser.add_argument("--samples", type=int, default=128, help="to calibrate on")
    parser.add_argument(
        "--passes", type=int, default=20, help="over these in which scales and shifts are trained"
    )
    parser.add_argument(
        "--network", type=Path, help="safetensors that keep the trained network for other runs"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="JSON to merge into")
    options = parser.parse_args(arguments)
    from safetensors.torch import load_file, save_file

    from examples.vision_transformer.model import VisionTransformer, load_images, train

    split = load_images()
    if options.network is not None and options.network.exists():
        network = VisionTransformer().eval()
        network.load_state_dict(load_file(options.network))
    else:
        network = train(split, epochs=options.epochs)
        if options.network is not None:
            save_file(network.state_dict(), options.network)
    bits = "W{}A{}".format(*options.bits)
    for name in ROWS:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.rows):
            row = _measure(network, split, name, options)
            rows.merge(options.out, [row], [f"{bits}, {each}" for each in ROWS])
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
