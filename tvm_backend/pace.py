"""All threads or one: whichever a call is quicker with now.

Layers that several threads compute are finished when the last of them is.  Where other programs want the processors a thread waits
for milliseconds until it has one, at every layer anew: ResNet-20, batch 16, with six busy programs for each of two processors, took
36 ms with two threads and 1.9 ms with one; with the processors to itself 0.8 and 1.6.
"""

from __future__ import annotations

import math

__all__ = ["Pace"]

_WORSE = 1.5  # times what one thread takes, from which on others are left out
_ALONE = (1, 3)  # calls that tell what that is; the first of all is slow in any case
_WEIGHT = 0.2  # of the newest such call
_SHORT, _LONG = (
    0.1,
    3.0,
)  # seconds until all threads are tried again: the first time, and when it was in vain again and again


class Pace:
    """How many threads the next call of a function is given.

    Parameters
    ----------
    most : int
        All threads, two or more.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls = 0
        self._alone = math.inf
        self._until, self._pause = 0.0, _SHORT

    def threads(self, now: float) -> int:
        """One, or all of them, at a time in seconds."""
        return 1 if now < self._until or self._calls in _ALONE else self.most

    def took(self, threads: int, begun: float, ended: float) -> None:
        """A call with so many threads is over."""
        seconds, first = ended - begun, self._calls == 0
        self._calls += 1
        if first:
            return
        if threads == 1:
            known = self._alone < math.inf
            self._alone = self._alone + _WEIGHT * (seconds - self._alone) if known else seconds
        elif seconds > _WORSE * self._alone:
            self._until, self._pause = ended + self._pause, min(2 * self._pause, _LONG)
        else:
            self._pause = _SHORT
