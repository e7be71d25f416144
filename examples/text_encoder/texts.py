"""Sentences with topics that every Python installation carries: the docstrings of its standard library."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["TOPICS", "Split", "Texts", "load_split"]

TOPICS = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "threading", "queue", "sched", "selectors", "subprocess"),
    "mail": ("email", "mailbox", "smtplib", "imaplib", "poplib", "mimetypes", "mailcap", "quopri"),
    "network": ("http", "urllib", "socketserver", "wsgiref", "ssl", "socket", "xmlrpc", "ftplib", "telnetlib", "ipaddress"),
    "imports": ("importlib", "pkgutil", "zipimport", "modulefinder", "runpy"),
    "markup": ("xml", "html", "json", "csv", "configparser", "plistlib"),
    "logging": ("logging", "warnings", "traceback"),
    "numbers": ("_pydecimal", "fractions", "statistics", "random", "numbers", "colorsys"),
    "testing": ("unittest", "doctest", "timeit", "cProfile", "profile", "pstats", "trace", "bdb", "pdb"),
    "archives": ("tarfile", "zipfile", "gzip", "lzma", "bz2", "_compression", "shutil"),
    "language": ("inspect", "ast", "dis", "tokenize", "typing", "pydoc", "enum", "dataclasses", "types", "abc"),
    "files": ("pathlib", "os", "glob", "tempfile", "_pyio", "fileinput", "posixpath", "ntpath", "genericpath", "fnmatch"),
    "dates": ("datetime", "_pydatetime", "calendar", "zoneinfo", "_strptime"),
}  # fmt: skip
"""Topic -> modules and packages of the standard library whose docstrings are about it."""


@dataclass(frozen=True)
class Texts:
    """Sentences, and the index of each one's topic in :data:`TOPICS`."""

    sentences: list[str]
    topics: np.ndarray


@dataclass(frozen=True)
class Split:
    """Three disjoint parts: to fit the classifier, to quantize and correct it (without topics), to test it."""

    train: Texts
    calibration: Texts
    test: Texts


def _sentences(path: Path) -> Iterator[str]:
    """The first paragraph of every docstring in a file."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0]
            text = " ".join(paragraph.split())
            if 25 <= len(text) <= 300:
                yield text


def _files(root: Path, name: str) -> list[Path]:
    if (root / name).is_dir():
        return sorted(path for path in (root / name).rglob("*.py") if not {"test", "tests"} & set(path.parts))
    return [path] if (path := root / f"{name}.py").is_file() else []


def load_split(seed: int = 0) -> Split:
    """Collect the docstrings and split them: 40 % to train, 30 % to calibrate, 30 % to test.

    A sentence that occurs under two topics is left out.  The number of sentences, about 4300, depends on the release
    of Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    topic_of: dict[str, int | None] = {}
    for topic, names in enumerate(TOPICS.values()):
        for path in (path for name in names for path in _files(root, name)):
            for text in _sentences(path):
                topic_of[text] = topic if topic_of.get(text, topic) == topic else None
    kept = sorted((text, topic) for text, topic in topic_of.items() if topic is not None)
    order = np.random.default_rng(seed).permutation(len(kept))
    parts = np.split(order, [int(0.4 * len(kept)), int(0.7 * len(kept))])
    return Split(*(Texts([kept[i][0] for i in part], np.array([kept[i][1] for i in part])) for part in parts))
