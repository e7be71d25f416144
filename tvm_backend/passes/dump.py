"""The module after each pass, as TVMScript in a folder: what a compiler engineer reads first."""

from __future__ import annotations

import re
from pathlib import Path

import tvm

from cat_plugin.errors import CompileError
from cat_plugin.files import write_errors, write_text

__all__ = ["Dump"]

_NAME = re.compile(r"\d{2}_\w+\.py")


class Dump:
    """A folder that takes the module after each pass, in numbered files such as ``05_FoldConvolution.py``.

    Parameters
    ----------
    folder : pathlib.Path
        Made if need be.  Numbered files of an earlier dump are removed, anything else in it stays.

    Raises
    ------
    CompileError
        The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        with write_errors(CompileError, f"the modules after each pass to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                if _NAME.fullmatch(file.name):
                    file.unlink()

    def write(self, mod: tvm.IRModule, name: str) -> None:
        """Write a module under the next number.

        Parameters
        ----------
        mod : tvm.IRModule
            What a pass made.
        name : str
            The pass.
        """
        path = self.folder / f"{self._count:02d}_{name}.py"
        with write_errors(CompileError, f"the module after {name} to {path}"):
            write_text(path, mod.script(show_meta=False) + "\n")
        self._count += 1

    def after(self, step: tvm.transform.Pass) -> tvm.transform.Pass:
        """A pass that changes nothing and writes what `step`, which runs before it, made."""

        def written(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
            self.write(mod, str(step.info.name))
            return mod

        return tvm.transform.module_pass(written, opt_level=0, name="Dump")

    def variant(self, name: str) -> Dump:
        """A folder of its own within this one for a variant of a library, for the passes that the target decides."""
        return Dump(self.folder / (name or "library"))
