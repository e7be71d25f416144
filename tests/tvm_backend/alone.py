"""Scripts in a process of their own, which holds nothing else: its memory is what they take."""

from __future__ import annotations

import subprocess
import sys

RESIDENT = """
import resource
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
"""


def alone(script: str, *arguments: object) -> list[str]:
    """Run a script, which finds ``resident()``, the bytes of memory that it occupies.

    Parameters
    ----------
    script : str
        Python.
    *arguments : object
        Its arguments, as text.

    Returns
    -------
    list of str
        The words that it prints.
    """
    command = [sys.executable, "-c", RESIDENT + script, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
