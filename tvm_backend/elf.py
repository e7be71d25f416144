"""How far a shared library reaches, read from its ELF header before the loader maps it.

Beyond the end of the file the kernel answers with SIGBUS, which ends the process: a library that was cut short has to be
found out first.
"""

from __future__ import annotations

import struct
from typing import IO

__all__ = ["missing_part"]

_MAGIC = b"\x7fELF"
_LOAD, _NOBITS = 1, 8
_TABLE_LIMIT = 65536


def missing_part(stream: IO[bytes], size: int) -> str:
    """Say which part of an ELF file lies beyond its end.

    Parameters
    ----------
    stream : file
        Seekable, in binary mode.
    size : int
        Of the file, in bytes.

    Returns
    -------
    str
        For a message; empty when all of it is there, or when this is no ELF file.
    """
    stream.seek(0)
    head = stream.read(64)
    if head[:4] != _MAGIC:
        return ""
    try:
        return _missing(stream, head, size)
    except struct.error:
        return "the header"


def _missing(stream: IO[bytes], head: bytes, size: int) -> str:
    order = ">" if head[5] == 2 else "<"
    wide = head[4] == 2
    # From e_phoff on: two offsets, flags, then six sizes and counts.
    header = f"{order}{'QQ' if wide else 'II'}I6H"
    fields = struct.unpack_from(header, head, 32 if wide else 28)
    segments_at, sections_at, _, _, segment_size, segments, section_size, sections, _ = fields
    for name, start, each, number in (
        ("the segment table", segments_at, segment_size, segments),
        ("the section table", sections_at, section_size, sections),
    ):
        if number and start + each * number > size:
            return name
    for i in range(min(segments, _TABLE_LIMIT)):
        stream.seek(segments_at + i * segment_size)
        entry = stream.read(segment_size)
        if wide:
            kind, _, start, _, _, length = struct.unpack_from(f"{order}IIQQQQ", entry)
        else:
            kind, start, _, _, length = struct.unpack_from(f"{order}5I", entry)
        if kind == _LOAD and start + length > size:
            return f"segment {i}"
    for i in range(min(sections, _TABLE_LIMIT)):
        stream.seek(sections_at + i * section_size)
        entry = stream.read(section_size)
        _, kind, _, _, start, length = struct.unpack_from(f"{order}II{'QQQQ' if wide else 'IIII'}", entry)
        if kind != _NOBITS and start + length > size:
            return f"section {i}"
    return ""
