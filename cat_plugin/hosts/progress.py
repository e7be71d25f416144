"""One progress bar for each trial."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

__all__ = ["TrialProgress"]


class TrialProgress:
    """A bar on standard error that advances by calibration batches and stages of one trial.

    It is drawn on a terminal only. The environment variable ``CAT_PROGRESS=0`` hides it, and
    ``CAT_PROGRESS=1`` has its last state printed where there is no terminal.

    Parameters
    ----------
    title : str
        Name of the trial.
    total : int
        Steps in all.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> TrialProgress:
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        wanted = os.environ.get("CAT_PROGRESS", "")
        if wanted == "0" or not (console.is_terminal or wanted == "1"):
            return self
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=console)
        try:
            bar.start()
        except LiveError:
            # Somebody draws a display already, and older releases of rich can show only one.
            return self
        self._bar = bar
        self._task = bar.add_task(self._title, total=self._total)
        return self

    def stage(self, name: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {name}")

    def reach(self, steps: float) -> None:
        """So many steps are done in all."""
        if self._bar is not None:
            self._bar.update(self._task, completed=steps)

    def update(self, steps: int) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(self._task, completed=self._total, description=self._title)
            self._bar.stop()
            self._bar = None
