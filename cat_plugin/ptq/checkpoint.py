"""Interrupted runs: what each step has made, on disk as soon as it is done, and read back.

Every step adds one file of tensors, with what it made and nothing else; a file all of whose tensors stand in a later one is
removed.  Tensors are in safetensors, the rest in JSON; a fingerprint of model, specification, calibration inputs and the engine's
own code guards against going on with another run's numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from cat_plugin.errors import QuantizationError
from cat_plugin.files import (
    PART,
    checked,
    locked,
    read_json,
    sha256_of,
    sha256_of_code,
    sync,
    write_errors,
    write_text,
)
from cat_plugin.version import __version__

__all__ = ["Checkpoint", "code_of_engine"]

_LIMIT = 2**25
_REMEDY = "delete the directory to start anew."


def code_of_engine() -> str:
    """The engine's release and the SHA-256 of its sources: what a step has left means something to the code that wrote it, and to no other."""
    return f"{__version__} {sha256_of_code(Path(__file__).parent)}"


class Checkpoint:
    """State of one run in a directory, which is held against other runs until :meth:`close`.

    Parameters
    ----------
    directory : Path
        Made if missing.
    key : str
        The run's fingerprint.
    about : mapping or None
        What the run is, for people who look at the directory; JSON.

    Attributes
    ----------
    finished : list of str
        Steps that are done, in order.
    records : dict
        What the report will say of them.
    tensors : dict of str to Tensor
        What an earlier run has left, of all its steps; a later step's value of a name counts.
    """

    def __init__(self, directory: Path, key: str, about: Mapping[str, Any] | None = None) -> None:
        self.directory, self.key = directory, key
        self.about = dict(about or {})
        self.finished: list[str] = []
        self.records: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, dict[str, Any]] = {}  # name -> size and sha256
        self._names: dict[str, set[str]] = {}  # name of a file -> names of its tensors
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
            if self._json.exists():
                self._read()
            self._sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs have the directory."""
        self._held.close()

    @property
    def _json(self) -> Path:
        return self.directory / "state.json"

    @property
    def _staging(self) -> Path:
        """Where tensors are written: safetensors begins under a name of its own choice beside the one that it is given."""
        return self.directory / f".tensors{PART}"

    def _read(self) -> None:
        """Take over what is there."""
        state = read_json(self._json, _LIMIT, QuantizationError, _REMEDY)
        try:
            key = state["fingerprint"]
            files = {
                Path(name).name: {"size": entry["size"], "sha256": entry["sha256"]}
                for name, entry in state["files"].items()
            }
            finished, records = list(state["finished"]), dict(state["records"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QuantizationError(
                f"the checkpoint in {self.directory} cannot be read ({error!r}); {_REMEDY}"
            ) from error
        if key != self.key:
            raise QuantizationError(
                f"the checkpoint in {self.directory} belongs to another model, specification, calibration set or version; "
                "delete it, or give another directory."
            )
        for name, entry in files.items():
            with checked(self.directory / name, entry, QuantizationError, _REMEDY) as stream:
                found = load(stream.read())
            self._names[name] = set(found)
            self.tensors |= found
        self._files, self.finished, self.records = files, finished, records

    def _refers_to(self, name: str) -> bool:
        """Whether the state on disk has the tensors in `name`."""
        return self._json.exists() and name in json.loads(self._json.read_text("utf-8"))["files"]

    def _sweep(self) -> None:
        """Remove what a run that was killed left half-written, or had just replaced."""
        shutil.rmtree(self._staging, ignore_errors=True)
        for pattern in ("state_*.safetensors", f".*{PART}"):
            for path in self.directory.glob(pattern):
                if path.name not in self._files:
                    path.unlink(missing_ok=True)

    def save(self, step: str, tensors: Mapping[str, Tensor], records: Mapping[str, Any]) -> None:
        """Write what a step has made; a crash meanwhile leaves the state before it.

        Parameters
        ----------
        step : str
            Its key.
        tensors : mapping of str to Tensor
            What it made, contiguous on the CPU.
        records : mapping
            Of all steps so far; JSON.
        """
        self.finished.append(step)
        self.records = dict(records)
        name = f"state_{len(self.finished)}.safetensors"
        with write_errors(QuantizationError, f"a checkpoint to {self.directory}", SafetensorError):
            try:
                if tensors:
                    self._staging.mkdir(exist_ok=True)
                    save_file(dict(tensors), self._staging / name)
                    sync(self._staging / name)
                    os.replace(self._staging / name, self.directory / name)
                self._write(name, set(tensors))
            except BaseException:
                # Interrupted right after the state was put in place, its tensors are needed.
                if not self._refers_to(name):
                    (self.directory / name).unlink(missing_ok=True)
                raise
            self._sweep()

    def _write(self, name: str, names: set[str]) -> None:
        """Refer to a new file of tensors, if there are any, in the place of those that it makes superfluous."""
        files = {n: entry for n, entry in self._files.items() if not self._names[n] <= names}
        if names:
            path = self.directory / name
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        state = {
            "fingerprint": self.key,
            "about": self.about,
            "finished": self.finished,
            "files": files,
            "records": self.records,
        }
        write_text(self._json, json.dumps(state))
        self._files = files
        self._names[name] = names
