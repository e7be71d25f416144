"""The hosts: the only part of the package that imports Neural Compressor."""

from __future__ import annotations

__all__ = ["register", "unregister"]


def register() -> None:
    """Register the ``cat`` algorithm with Neural Compressor, now or when it is first imported."""


def unregister() -> None:
    """Undo :func:`register` and every patch of the host made by it."""
