"""The small trained network and its data, for models that are saved and loaded."""

from __future__ import annotations

from tests.trained import _task, task

__all__ = ["_task", "task"]
