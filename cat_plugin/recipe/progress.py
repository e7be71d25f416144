"""One progress bar for each trial, and what else the caller of a run wants to know of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cat_plugin.recipe.display import Display

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
    engine : callable, optional
        What quantizes in the place of :func:`cat_plugin.ptq.quantize`, with its arguments.
    """

    listener: Callable[[str, Progress], None] | None = None
    resume: Path | None = None
    console: Console | None = None
    engine: Callable[..., Any] | None = None


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
    """The unit, and its loss once that is known."""
    if news.loss_before is None or news.loss_after is None:
        return news.stage
    return f"{news.stage}  loss {news.loss_before:.3g} \N{RIGHTWARDS ARROW} {news.loss_after:.3g}"


class TrialProgress:
    """How far one trial is, by calibration batches and stages; shown as :class:`~cat_plugin.recipe.display.Display` does.

    Parameters
    ----------
    title : str
        Name of the trial.
    total : int
        Steps in all.
    """

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console

        self._title = title
        self._display = Display(title, current_watch().console or Console(stderr=True), total)

    def __enter__(self) -> TrialProgress:
        self._display.__enter__()
        return self

    def stage(self, name: str) -> None:
        """Say what is being done."""
        self._display.update(name)

    def show(self, news: Progress, share: float) -> None:
        """Show how far the engine is and pass it to who listens; all its work is `share` steps of the bar."""
        watch = current_watch()
        if watch.listener is not None:
            watch.listener(self._title, news)
        self._display.update(_detail(news), news.fraction * share, news.seconds_left)

    def reach(self, steps: float) -> None:
        """So many steps are done in all."""
        self._display.update(done=steps)

    def update(self, steps: int) -> None:
        """Advance."""
        self._display.advance(steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)
