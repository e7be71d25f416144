"""What a command may write over: only what this program wrote itself, never anything else that stands in the place.

Every command asks :func:`may_write` before it begins, for each place that it writes to, so that hours of work do not end
at a place that cannot be used.  What is ours is recognised by its content and not by its name.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cat_plugin.errors import BundleError, CATError, CATValueError
from cat_plugin.files import PART, locked, read_json, write_errors

__all__ = [
    "BUNDLE",
    "DIRECTORY",
    "LIBRARY",
    "LOGITS",
    "NEW",
    "ONNX",
    "PAGE",
    "Kind",
    "held_state",
    "mark_logits",
    "may_write",
]

_LIMIT = 2**25
_NOTE = b"logits written by cat-ptq"
_GENERATOR = b'<meta name="generator" content="cat-ptq report">'
_STATE_NAME = re.compile(r"[0-9a-f]{16}")
_STATE_FILES = ("state_*.safetensors", f".*{PART}")
_STAGING = f".tensors{PART}"
_LOGITS_NAME = re.compile(rf"\.?logits_[0-9a-f]{{16}}\.npy(\.[0-9a-f]+{re.escape(PART)})?")


@dataclass(frozen=True)
class Kind:
    """Something that commands write.

    Parameters
    ----------
    instead : str
        What a place that must not be written is, for messages: "exists and is ...".
    ours : callable
        Whether what stands at a path, which exists, is one of these and nothing but it.
    """

    instead: str
    ours: Callable[[Path], bool]


def _is_bundle(path: Path) -> bool:
    """A bundle without a file more than its manifest names; or an empty directory, which is nobody's loss."""
    from cat_plugin.graph.manifest import MANIFEST, read_manifest

    if not path.is_dir():
        return False
    inside = {entry.name for entry in path.iterdir()}
    if not inside:
        return True
    try:
        named = {MANIFEST, *read_manifest(path)["files"]}
    except BundleError:
        return False
    return inside <= named


def _is_library(path: Path) -> bool:
    """A file of a compiled library: its description, or a file that the description beside it names."""
    described = path if path.suffix == ".json" else path.with_suffix(".json")
    if path.suffix == ".so" and not described.exists():
        described = path.with_name(f"{path.stem.rpartition('.')[0]}.json")  # of a variant: name.variant.so
    from tvm_backend.description import FORMAT

    try:
        manifest = read_json(described, _LIMIT, CATValueError, "")
    except CATError:
        return False
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return False
    variants = manifest.get("variants")
    files = [v.get("file") for v in variants if isinstance(v, dict)] if isinstance(variants, list) else []
    return path.is_file() and (path.suffix == ".json" or path.name in files)


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return _GENERATOR in stream.read(2048)


def _is_onnx(path: Path) -> bool:
    """A file that export or correct wrote: the producer stands at its beginning, a mark of the correction at its end."""
    if not path.is_file() or path.suffix != ".onnx":
        return False
    content = path.read_bytes()
    return b"cat-ptq" in content[:64] or b"corrected_by\x12\x07cat-ptq" in content[-4096:]


def _is_logits(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = archive.namelist()
            return archive.comment == _NOTE and bool(arrays) and all(name.endswith(".npy") for name in arrays)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


BUNDLE = Kind("not a bundle with nothing else in it", _is_bundle)
LIBRARY = Kind("not of a compiled library", _is_library)
PAGE = Kind("not a report of cat-ptq", _is_page)
LOGITS = Kind("not a file of logits that cat-ptq wrote", _is_logits)
ONNX = Kind("not an ONNX file that cat-ptq wrote", _is_onnx)
DIRECTORY = Kind("not a directory", Path.is_dir)
"""For what is written into under names that are always new."""
NEW = Kind("not ours to replace", lambda path: False)
"""Files that cannot be distinguished from the user's own: they are only ever written anew."""


def mark_logits(path: Path) -> None:
    """Note in an ``.npz`` file that it may be written over by the next run."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _NOTE


def may_write(path: Path, kind: Kind, option: str = "--out") -> None:
    """Refuse a place where something stands that this program has not written.

    Parameters
    ----------
    path : pathlib.Path
        What is going to be written, or replaced.
    kind : Kind
        What it is going to be.
    option : str
        Which option, or argument, names the place.

    Raises
    ------
    CATValueError
        Something else stands there.
    """
    if path.is_symlink() and not path.exists():
        raise CATValueError(
            f"{path} is a symbolic link to nothing; give {option} another place, or remove it"
        )
    try:
        standing = path.exists()
    except OSError as error:
        raise CATValueError(
            f"{path} cannot be used ({error.strerror}); give {option} another place"
        ) from error
    if standing and not kind.ours(path):
        raise CATValueError(
            f"{path} exists and is {kind.instead}; it is left as it is: give {option} another place, or move it away"
        )


def _is_of_a_state(entry: Path, kept: Path) -> bool:
    """Whether an entry below a state's directory is what checkpoints and :mod:`cat_plugin.report.scoring` keep there."""
    inside = entry.relative_to(kept).parts
    if len(inside) == 1 and _LOGITS_NAME.fullmatch(entry.name):
        return entry.is_file() and not entry.is_symlink()
    if not _STATE_NAME.fullmatch(inside[0]) or entry.is_symlink():
        return False
    if len(inside) > 1 and inside[1] == _STAGING:  # of a run that was interrupted while it wrote there
        return entry.is_dir() if len(inside) == 2 else len(inside) == 3 and entry.is_file()
    if len(inside) == 1 or not entry.is_file():
        return len(inside) == 1 and entry.is_dir()
    if len(inside) > 2:
        return False
    if entry.name != "state.json":
        return any(entry.match(pattern) for pattern in _STATE_FILES)
    try:
        state = read_json(entry, _LIMIT, CATValueError, "")
    except CATError:
        return False
    return isinstance(state, dict) and "fingerprint" in state


def _state_files(kept: Path) -> tuple[list[Path], list[Path]]:
    """What a run keeps in its state, and what else is in that directory."""
    own: list[Path] = []
    foreign: list[Path] = []
    for entry in sorted(kept.rglob("*")):
        (own if _is_of_a_state(entry, kept) else foreign).append(entry)
    return own, foreign


def _remove_state(kept: Path) -> None:
    """Remove what a run keeps, file by file: what is not known to be ours stays, and its directories with it."""
    own, _ = _state_files(kept)
    for entry in sorted(own, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            entry.rmdir() if entry.is_dir() else entry.unlink()


@contextlib.contextmanager
def held_state(kept: Path, resume: bool, dropped: Callable[[Path], None]) -> Iterator[None]:
    """Hold the directory of a run's state against other runs; without `resume` what an earlier one left in it goes.

    Parameters
    ----------
    kept : pathlib.Path
        Made if missing. It is removed in the end, unless the block fails with something in it to go on from.
    resume : bool
        Whether to go on from a state that lies there; else it is dropped.
    dropped : callable
        Called with the path of a state that is dropped.

    Raises
    ------
    BundleError
        It holds something else, another run is at work in it, or it cannot be written.
    """
    if kept.is_symlink() or (kept.exists() and not kept.is_dir()):
        raise BundleError(
            f"{kept} is in the way of the state of the run and is left as it is; move it away, or give another --out"
        )
    # Made now, so that a place that cannot be written is found out before the work and not after it.
    with write_errors(BundleError, f"the state of the run to {kept}"):
        kept.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(kept, wait=False))
        except BlockingIOError:
            raise BundleError(
                f"another run is at work in {kept}; wait for it, or give another --out"
            ) from None
        own, foreign = _state_files(kept)
        if foreign:
            raise BundleError(
                f"{kept} holds {foreign[0].relative_to(kept)}, which is not of a run's state; it is left as it is: move it "
                "away, or give another --out"
            )
        if own and not resume:
            dropped(kept)
            _remove_state(kept)
        try:
            yield
        except BaseException:
            if not list(kept.glob("*/state.json")):
                _forget(kept)
            raise
        _forget(kept)


def _forget(kept: Path) -> None:
    _remove_state(kept)
    with contextlib.suppress(OSError):
        kept.rmdir()
