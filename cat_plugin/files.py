"""Files that are whole or absent when written, and that are what they are said to be when read.

Everything that this project leaves on disk goes through here.  A file or a directory is made beside its final place under
a name that ends in ``.cat-part``, brought to the disk (fsync) and renamed.  What replaces several files at once holds a
lock on the directory meanwhile, so that two processes that write one output leave the output of one of them.  Locks are
the kernel's (flock on the directory itself): they leave no file behind and end with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cat_plugin.errors import CATError

__all__ = [
    "PART",
    "checked",
    "locked",
    "parse_json",
    "read_json",
    "read_limited",
    "replacing",
    "sha256_of",
    "sha256_of_code",
    "staged_directory",
    "staged_files",
    "sync",
    "write_bytes",
    "write_errors",
    "write_text",
]

PART = ".cat-part"
"""How the name of everything unfinished ends."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as a hexadecimal string."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_code(package: Path) -> str:
    """Hexadecimal SHA-256 of all sources of a package: what its code has made may mean nothing to other code."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a directory's lock, against other processes and other threads.

    Parameters
    ----------
    directory : pathlib.Path
        Its lock file is made if missing.
    wait : bool, default True
        Whether to wait for whoever holds it.

    Raises
    ------
    BlockingIOError
        When somebody else holds it and `wait` is false.

    Notes
    -----
    A file system without locks (some network ones) is used without.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises as :func:`write_bytes`."""
    write_bytes(path, str.encode(text))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises
    ------
    OSError
        When it cannot be written; what stood there before is then still there.
    """
    with replacing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its place when the block ends well, and leaves nothing when it does not.

    Raises
    ------
    OSError
        When it cannot be written; what stood there before is then still there.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Make a directory that takes its place when the block ends well, and leaves nothing when it does not.

    Parameters
    ----------
    final : pathlib.Path
        Absolute.  What stands there is replaced, in one step where the system can swap two names (Linux).

    Yields
    ------
    pathlib.Path
        An empty directory of the same name, to be filled with files.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    with staged_files(final) as staging:
        staged = staging / final.name
        staged.mkdir()
        yield staged
        for path in staged.iterdir():
            sync(path)
        sync(staged)
        with locked(final.parent):
            _put(staged, final, staging)
        sync(final.parent)


@contextlib.contextmanager
def staged_files(final: Path) -> Iterator[Path]:
    """Make an empty directory beside `final` for what is unfinished; it goes when the block ends.

    What processes that were killed in such a block have left there goes too.
    """
    parent = final.parent
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(parent):
            _sweep(parent, final.name)
            staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=PART, dir=parent))
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            stack.enter_context(locked(staging))  # as long as it is held, nobody sweeps it away
        yield staging


def _sweep(parent: Path, name: str) -> None:
    """Remove what processes that were killed left half-made: nobody holds its lock."""
    for left in parent.glob(f".{glob.escape(name)}.*{PART}"):
        with contextlib.suppress(OSError), locked(left, wait=False):
            shutil.rmtree(left)


def _put(staged: Path, final: Path, staging: Path) -> None:
    """Give `staged` the name `final`; what had it before ends up in `staging`."""
    if not final.exists():
        staged.rename(final)
    elif not _exchange(staged, final):
        retired = staging / "retired"
        final.rename(retired)
        try:
            staged.rename(final)
        except OSError:
            retired.rename(final)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


@contextlib.contextmanager
def write_errors(kind: type[CATError], what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what a full disk or a read-only directory raises into one clear error.

    Parameters
    ----------
    kind : subclass of CATError
        What to raise.
    what : str
        What was to be written, for the message.
    *also : exception classes
        In which libraries wrap the system's errors.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except kinds as error:
        if isinstance(error, CATError):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        raise kind(f"cannot write {what}: {reason}; free some space or choose a writable place") from error


@contextlib.contextmanager
def checked(path: Path, entry: Mapping[str, Any], kind: type[CATError], remedy: str) -> Iterator[IO[bytes]]:
    """Open a file whose size and sha256 have been compared with what is said of it.

    The file that is read is the one that was checked, whatever happens to its name meanwhile.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    entry : mapping
        ``size`` in bytes and ``sha256``.
    kind : subclass of CATError
        What to raise.
    remedy : str
        What the user can do, the end of each message.

    Yields
    ------
    binary file
        At its start.
    """
    if path.is_symlink():
        raise kind(f"{path} is a symbolic link; expected the file itself: {remedy}")
    try:
        # Not blocking: a pipe of that name would otherwise wait for a writer.
        stream = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path} is missing or cannot be read ({reason}): {remedy}") from error
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size != entry["size"]:
            raise kind(f"{path} has {size} bytes; the manifest says {entry['size']}: {remedy}")
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
            raise kind(
                f"{path} does not match the sha256 in the manifest, it is damaged or was changed: {remedy}"
            )
        stream.seek(0)
        yield stream


def read_json(path: Path, limit: int, kind: type[CATError], remedy: str) -> Any:
    """Parse a JSON file of at most `limit` bytes.

    Raises
    ------
    CATError
        Of the class `kind`: it cannot be read, is larger, or is no JSON.
    """
    return _parsed(read_limited(path, limit, kind, remedy), path, kind, remedy)


def read_limited(path: Path, limit: int, kind: type[CATError], remedy: str) -> bytes:
    """Read a file of at most `limit` bytes; raises as :func:`read_json` does."""
    try:
        # Not blocking: a pipe of that name would otherwise wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            return _limited(stream, path, limit, kind, remedy)
    except (OSError, ValueError) as error:
        if isinstance(error, CATError):
            raise
        raise kind(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}"
        ) from error


def parse_json(stream: IO[bytes], path: Path, limit: int, kind: type[CATError], remedy: str) -> Any:
    """Parse what an open file holds, as :func:`read_json` does; `path` is its name in messages."""
    return _parsed(_limited(stream, path, limit, kind, remedy), path, kind, remedy)


def _limited(stream: IO[bytes], path: Path, limit: int, kind: type[CATError], remedy: str) -> bytes:
    raw = stream.read(limit + 1) or b""
    if len(raw) > limit:
        raise kind(f"{path} is larger than {limit} bytes, which no such file is: {remedy}")
    return raw


def _parsed(raw: bytes, path: Path, kind: type[CATError], remedy: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON ({error}): {remedy}") from error
