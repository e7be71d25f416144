"""One progress bar for each trial, and what else the caller of a run wants to know of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cat_plugin.ptq.progress import Progress

__all__ = ["TrialProgress", "Watch", "current_watch", "watching"]


@dataclass(frozen=True)
class Watch:
    """What accompanies a run through the host, which has no arguments for it.

    Parameters
    ----------
    listener : callable, optional
        Called with the trial's title and every :class:`~cat_plugin.ptq.progress.Progress` of the engine.
    resume : pathlib.Path, optional
        Directory for the engine's state after each unit, one subdirectory for each quantization.
    console : rich.console.Console, optional
        Where bars are drawn; by default standard error.
    """

    listener: Callable[[str, Progress], None] | None = None
    resume: Path | None = None
    console: Console | None = None


_current: ContextVar[Watch | None] = ContextVar("cat_plugin_watch", default=None)


def current_watch() -> Watch:
    """What is in force."""
    return _current.get() or Watch()


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Put a :class:`Watch` in force for a while."""
    token = _current.set(watch)
    try:
        yield
    finally:
        _current.reset(token)


def _detail(news: Progress) -> str:
    """The line below the title: the unit, and its loss once that is known."""
    from rich.markup import escape

    stage = escape(news.stage)
    if news.loss_before is None or news.loss_after is None:
        return stage
    return f"{stage}  loss {news.loss_before:.3g} \N{RIGHTWARDS ARROW} {news.loss_after:.3g}"


class TrialProgress:
    """A bar that advances by calibration batches and stages of one trial.

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
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = current_watch().console or Console(stderr=True)
        wanted = os.environ.get("CAT_PROGRESS", "")
        if wanted == "0" or not (console.is_terminal or wanted == "1"):
            return self
        columns = (
            TextColumn("{task.description}\n  [dim]{task.fields[detail]}[/dim]"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}[/dim]"),
        )
        bar = Progress(*columns, console=console)
        try:
            bar.start()
        except LiveError:
            # Somebody draws a display already, and older releases of rich can show only one.
            return self
        self._bar = bar
        self._task = bar.add_task(escape(self._title), total=self._total, detail="", left="")
        return self

    def stage(self, name: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.update(self._task, detail=name, left="")

    def show(self, news: Progress, share: float) -> None:
        """Show how far the engine is and pass it to who listens; all its work is `share` steps of the bar."""
        watch = current_watch()
        if watch.listener is not None:
            watch.listener(self._title, news)
        if self._bar is not None:
            left = "" if news.seconds_left is None else f"{timedelta(seconds=round(news.seconds_left))} left"
            self._bar.update(self._task, completed=news.fraction * share, detail=_detail(news), left=left)

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
                self._bar.update(self._task, completed=self._total, detail="done", left="")
            self._bar.stop()
            self._bar = None
