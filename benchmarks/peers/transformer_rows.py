"""Rows of transformers that a peer's script measures: which, on what, and the weights that come out."""

from __future__ import annotations

import argparse
import copy
import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bits import Bits, parse_bits
from benchmarks.peers.common import Rows, timed
from benchmarks.transformer_models import CASES, Case

__all__ = ["ABOUT", "Variant", "effective_weights", "measure_variants", "store_weights"]

ABOUT = ("peer", "version", "model", "bits", "method")
"""What is written beside the weights of a row."""

_NAMED = tuple(key for key in ABOUT if key != "version")

CALIBRATION = {"vit_s": 256, "minilm": 256, "smollm2": 8}
EVALUATION = {"vit_s": 1000, "minilm": 1000, "smollm2": 4}


@dataclass(frozen=True)
class Variant:
    """A row to measure.

    Attributes
    ----------
    model
        A key of `benchmarks.transformer_models.CASES`.
    bits
        As `benchmarks.bits.parse_bits` reads them.
    method
        In the table's words.
    quantize
        Gives what is scored: called with the model, bits and calibration batches.
    """

    model: str
    bits: str
    method: str
    quantize: Callable[[nn.Module, Bits, list[Tensor]], Any]

    @property
    def name(self) -> str:
        """``model/bits/method``."""
        return f"{self.model}/{self.bits}/{self.method}"


@torch.no_grad()
def effective_weights(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """What the linear layers of a quantized model multiply by, in float32: their results for the unit vectors.

    Parameters
    ----------
    model
        With weights quantized, activations not.
    like
        The full-precision model, whose linear layers have the same names.

    Returns
    -------
    dict of Tensor
        ``<name>.weight`` (out, in) by name.
    """
    found = {}
    for name, layer in like.named_modules():
        if isinstance(layer, nn.Linear):
            quantized = model.get_submodule(name)
            unit = torch.eye(layer.in_features)
            bias = quantized(torch.zeros(1, layer.in_features))
            found[f"{name}.weight"] = (quantized(unit) - bias).T.float().contiguous()
    return found


def store_weights(folder: Path, about: dict[str, str], model: nn.Module, like: nn.Module) -> Path:
    """Write :func:`effective_weights`, with what they are (`ABOUT`) beside them, to a file that is named after that.

    Returns
    -------
    Path
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(about[key] for key in _NAMED).lower()).strip("-")
    path = folder / f"{name}.safetensors"
    save_file(effective_weights(model, like), path, {key: about[key] for key in ABOUT})
    return path


def measure_variants(
    peer: str, variants: Sequence[Variant], description: str | None, prepare: Callable[[], None] | None = None
) -> None:
    """Measure what the command line asks for.

    Parameters
    ----------
    peer
        Name of the distribution.
    variants
        All that the script knows.
    description
        Of the script.
    prepare
        Called once before the first row.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", help="folder of the data (default: ../shared/data beside the checkout)")
    parser.add_argument("--threads", type=int, default=2, help="threads for one call (default: %(default)s)")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="patterns of model/bits/method (default: all)"
    )
    parser.add_argument(
        "--calibration", type=int, help=f"images, sentences or windows (default: {CALIBRATION})"
    )
    parser.add_argument("--evaluation", type=int, help=f"the same (default: {EVALUATION})")
    parser.add_argument(
        "--states",
        type=Path,
        help="folder to store rounded weights in, for benchmarks.correct_tokens",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, peer)
    if prepare is not None:
        prepare()
    chosen = [v for v in variants if any(fnmatch.fnmatchcase(v.name, each) for each in options.rows)]
    for model in dict.fromkeys(variant.model for variant in chosen):
        counts = (options.calibration or CALIBRATION[model], options.evaluation or EVALUATION[model])
        case = CASES[model](options.data, *counts, torch.device("cpu"))
        full = case.score(case.model)
        for variant in chosen:
            if variant.model == model:
                _measure(rows, variant, case, full, options)


def _measure(rows: Rows, variant: Variant, case: Case, full: float, options: argparse.Namespace) -> None:
    """One row, on a model of its own, since most peers quantize in place."""
    key = {"model": variant.model, "bits": variant.bits.upper(), "method": variant.method}
    bits = parse_bits(variant.bits)
    with rows.row(**key, **case.counts) as row:
        torch.manual_seed(0)
        with timed(row):
            quantized = variant.quantize(copy.deepcopy(case.model), bits, case.calibration)
        row |= {"score": case.score(quantized), "fp": full, "unit": case.unit}
        if options.states is not None and isinstance(quantized, nn.Module) and bits.activations is None:
            about = {"peer": rows.peer, "version": rows.version, "model": variant.model}
            about |= {"bits": variant.bits, "method": variant.method}
            store_weights(options.states, about, quantized, case.model)
