"""Peaks of a process's memory while a block runs, by kind: its own, and mapped files that happen to be in memory.

``ru_maxrss`` adds both up, though the kernel takes a mapped file's pages back as soon as anyone else needs the memory.
Needs Linux's ``/proc`` and the standard library.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

__all__ = ["STATUS", "PeakMemory"]

STATUS = Path("/proc/self/status")
"""Where Linux says what a process takes; missing elsewhere."""

_INTERVAL = 0.005  # seconds between looks


class PeakMemory(threading.Thread):
    """Looks at the process's memory every few milliseconds inside the block.

    Attributes
    ----------
    before
        Bytes of anonymous memory at the start.
    anonymous, files
        Most bytes of anonymous memory and of mapped files in memory.

    Examples
    --------
    >>> with PeakMemory() as memory:
    ...     block = bytearray(1 << 26)
    >>> memory.anonymous >= memory.before
    True
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, _ = self._now()
        self.anonymous = self.files = 0
        self._stopped = threading.Event()

    @staticmethod
    def _now() -> tuple[int, int]:
        text = STATUS.read_text()
        anonymous, files = (re.search(rf"{kind}:\s+(\d+) kB", text) for kind in ("RssAnon", "RssFile"))
        return tuple(int(found[1]) << 10 if found else 0 for found in (anonymous, files))  # type: ignore[return-value]

    def run(self) -> None:
        """Look until the block ends."""
        while True:
            anonymous, files = self._now()
            self.anonymous, self.files = max(self.anonymous, anonymous), max(self.files, files)
            if self._stopped.wait(_INTERVAL):
                return

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()
