"""Interrupted runs: what has been chosen so far, on disk after every unit, and read back.

Tensors are in safetensors, the rest in JSON; a fingerprint of model, specification and calibration inputs guards
against going on with another run's numbers.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, fx

from cat_plugin.errors import QuantizationError
from cat_plugin.files import PART, checked, locked, read_json, sha256_of, sync, write_errors, write_text
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.quantizers.uniform import ActQuantizer

__all__ = ["Checkpoint"]

_LIMIT = 2**25


class Checkpoint:
    """State of one run in a directory, which is held against other runs until :meth:`close`.

    Parameters
    ----------
    directory : Path
        Made if missing.
    key : str
        The run's fingerprint.

    Attributes
    ----------
    finished : list of str
        Stages that are done, in order.
    records : dict
        What the report will say of them.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.directory, self.key = directory, key
        self.finished: list[str] = []
        self.records: dict[str, Any] = {"layers": [], "units": []}
        self._tensors: dict[str, Tensor] = {}
        self._held = contextlib.ExitStack()
        with write_errors(QuantizationError, f"a checkpoint to {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(locked(directory, wait=False))
            except BlockingIOError:
                raise QuantizationError(
                    f"another run is at work in {directory}; wait for it, or give another directory."
                ) from None
        try:
            kept = self._read() if self._json.exists() else None
            self._sweep(kept)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs have the directory."""
        self._held.close()

    @property
    def _json(self) -> Path:
        return self.directory / "state.json"

    def _read(self) -> str:
        """Take over what is there; the name of the file of tensors."""
        remedy = "delete the directory to start anew."
        state = read_json(self._json, _LIMIT, QuantizationError, remedy)
        try:
            key, name = state["fingerprint"], str(state["tensors"])
            entry = {"size": state["file"]["size"], "sha256": state["file"]["sha256"]}
            self.finished, self.records = list(state["finished"]), dict(state["records"])
        except (KeyError, TypeError, ValueError) as error:
            raise QuantizationError(
                f"the checkpoint in {self.directory} cannot be read ({error!r}); {remedy}"
            ) from error
        if key != self.key:
            raise QuantizationError(
                f"the checkpoint in {self.directory} belongs to another model, specification or calibration set; "
                "delete it, or give another directory."
            )
        with checked(self.directory / Path(name).name, entry, QuantizationError, remedy) as stream:
            self._tensors = load(stream.read())
        return name

    def _refers_to(self, name: str) -> bool:
        """Whether the state on disk is the one with the tensors in `name`."""
        return self._json.exists() and bool(json.loads(self._json.read_text("utf-8"))["tensors"] == name)

    def _sweep(self, kept: str | None) -> None:
        """Remove what a run that was killed left half-written, or had just replaced."""
        for pattern in ("state_*.safetensors", f".*{PART}"):
            for path in self.directory.glob(pattern):
                if path.name != kept:
                    path.unlink(missing_ok=True)

    def restore(self, module: fx.GraphModule) -> None:
        """Put what was saved into the graph's layers and quantizers."""
        for name, child in module.named_modules():
            if isinstance(child, QuantOp) and f"{name}.q_weight" in self._tensors:
                for part in ("weight", "q_weight", "scale", "zero_point"):
                    setattr(child, part, self._tensors[f"{name}.{part}"].to(child.weight.device))
                bias = self._tensors.get(f"{name}.bias")
                child.bias = None if bias is None else bias.to(child.weight.device)
                child.w_bits = int(self._tensors[f"{name}.w_bits"])
            elif isinstance(child, ActQuantizer) and f"{name}.grid" in self._tensors:
                zero_point, signed = self._tensors[f"{name}.grid"].tolist()
                child.set_range(float(self._tensors[f"{name}.scale"]), zero_point, bool(signed))

    def save(self, module: fx.GraphModule, stage: str) -> None:
        """Write the state after ``stage``; a crash in between leaves the state before it."""
        tensors: dict[str, Tensor] = {}
        for name, child in module.named_modules():
            if isinstance(child, QuantOp) and child.q_weight is not None:
                for part in ("weight", "q_weight", "scale", "zero_point", "bias"):
                    value = getattr(child, part)
                    if value is not None:
                        tensors[f"{name}.{part}"] = value.detach().cpu().clone().contiguous()
                tensors[f"{name}.w_bits"] = torch.tensor(child.w_bits)
            elif isinstance(child, ActQuantizer) and child.ready:
                tensors[f"{name}.grid"] = torch.tensor([child.zero_point, int(child.signed)])
                tensors[f"{name}.scale"] = child.scale.detach().cpu().clone()
        self.finished.append(stage)
        name = f"state_{len(self.finished)}.safetensors"
        path = self.directory / name
        with write_errors(QuantizationError, f"a checkpoint to {self.directory}", SafetensorError):
            try:
                save_file(tensors, path)
                sync(path)
                state = {
                    "fingerprint": self.key,
                    "finished": self.finished,
                    "tensors": name,
                    "file": {"size": path.stat().st_size, "sha256": sha256_of(path)},
                    "records": self.records,
                }
                write_text(self._json, json.dumps(state))
            except BaseException:
                # Interrupted right after the state was put in place, its tensors are needed.
                if not self._refers_to(name):
                    path.unlink(missing_ok=True)
                raise
            (self.directory / f"state_{len(self.finished) - 1}.safetensors").unlink(missing_ok=True)
