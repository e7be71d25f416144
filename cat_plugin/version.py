"""The release that this is: one line, read by the build, the bundles and the command line."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.3.0"
