"""The small trained network and its data, for recipes that are run."""

from __future__ import annotations

from tests.trained import _task, task

__all__ = ["_task", "task"]
