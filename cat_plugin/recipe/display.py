"""How far something is: a bar on a terminal or in a notebook, elsewhere a line every few seconds.

The environment variable ``CAT_PROGRESS=0`` hides both; ``CAT_PROGRESS=1`` draws the bar wherever it goes.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EVERY", "Display"]

_T = TypeVar("_T")

#: Seconds between two lines in a log.
EVERY = 5.0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Display:
    """One piece of work, used as a context manager.

    Parameters
    ----------
    title : str
        What is done.
    console : rich.console.Console
        Where it is shown; nothing is, where that is quiet.
    total : float, default 0
        All the work, in any unit; 0 where it is not known.
    """

    def __init__(self, title: str, console: Console, total: float = 0.0) -> None:
        self._title, self._console, self._total = title, console, total
        self._done, self._detail, self._left = 0.0, "", ""
        self._bar: Any = None
        self._task: Any = None
        self._ended = threading.Event()
        self._lines: threading.Thread | None = None

    def __enter__(self) -> Display:
        wanted = os.environ.get("CAT_PROGRESS", "")
        self._started = time.monotonic()
        if wanted == "0" or self._console.quiet:
            return self
        notebook = self._console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        if wanted == "1" or self._console.is_terminal or notebook:
            self._draw()
        else:
            self._lines = threading.Thread(target=self._write_lines, daemon=True)
            self._lines.start()
        return self

    def _draw(self) -> None:
        from rich.errors import LiveError
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}\n  [dim]{task.fields[detail]}[/dim]"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}[/dim]"),
        )
        bar = Progress(*columns, console=self._console, transient=not self._total)
        try:
            bar.start()
        except LiveError:
            # Somebody draws a display already, and older releases of rich can show only one.
            return
        self._bar = bar
        self._task = bar.add_task(escape(self._title), total=self._total or None, detail="", left="")

    def _write_lines(self) -> None:
        while not self._ended.wait(EVERY):
            self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """The state in one line."""
        share = f"{self._done / self._total:.0%}" if self._total else ""
        spent = f"{_clock(time.monotonic() - self._started)} so far"
        return ", ".join(
            filter(None, (f"{self._title}: {self._detail or 'at work'}", share, spent, self._left))
        )

    def update(self, detail: str | None = None, done: float | None = None, left: float | None = None) -> None:
        """Say how far it is.

        Parameters
        ----------
        detail : str, optional
            What is at work.
        done : float, optional
            How much of the total is done.
        left : float, optional
            Seconds that it will take, where that is known.
        """
        from rich.markup import escape

        if detail is not None:
            self._detail = detail
        if done is not None:
            self._done = done
        self._left = "" if left is None else f"{_clock(left)} left"
        if self._bar is not None:
            shown = escape(self._detail)
            self._bar.update(self._task, completed=self._done, detail=shown, left=self._left)

    def advance(self, steps: float) -> None:
        """So much more is done."""
        self.update(done=self._done + steps)

    def over(self, parts: Iterable[_T], size: Callable[[_T], float] = lambda part: 1.0) -> Iterator[_T]:
        """Go through parts of the work; each is done when the next is asked for."""
        for part in parts:
            yield part
            self.advance(size(part))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._lines is not None:
            self._lines.join()
        if self._bar is not None:
            if error is None:
                self.update("done", self._total)
            self._bar.stop()
            self._bar = None
