"""Save and load what a host made."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

__all__ = ["load", "save"]


def save(module: nn.Module, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    raise NotImplementedError
