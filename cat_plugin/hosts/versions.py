"""Which releases of Neural Compressor are supported, what each can do, and what must be installed beside it.

These are the releases that the tests run on; those between them share their interfaces.  The table in docs/hosts.md
and the environments of ``tox.ini`` are checked against this list.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELEASES", "Release", "markdown_table", "tox_environment"]

# The releases before 3.8 import pkg_resources and six, and declare neither.
_OLD = ("setuptools<81", "six")


@dataclass(frozen=True)
class Release:
    """One supported release of Neural Compressor.

    Parameters
    ----------
    version : str
        ``major.minor``.
    yaml : bool
        Has the 2.x YAML API.
    python2 : bool
        Has the 2.x Python API (``PostTrainingQuantConfig``, ``quantization.fit``).
    torch3 : bool
        Has the 3.x torch API (``quantize``, ``prepare``, ``convert``, ``autotune``).
    static3 : bool
        Its 3.x static int8 (pt2e) works with the torch that is tested.
    extra : str
        The extra of the package to install.
    pins : tuple of str
        Requirements beside it.
    """

    version: str
    yaml: bool
    python2: bool
    torch3: bool
    static3: bool
    extra: str = ""
    pins: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        extra = f"[{self.extra}]" if self.extra else ""
        return f"neural-compressor{extra}=={self.version}"

    @property
    def environment(self) -> str:
        """Name of the tox environment: ``inc310``."""
        return f"inc{self.version.replace('.', '')}"


RELEASES = (
    *(Release(v, yaml=True, python2=True, torch3=False, static3=False, pins=_OLD) for v in ("2.4", "2.6")),
    *(
        Release(v, yaml=False, python2=True, torch3=True, static3=False, extra="pt", pins=_OLD)
        for v in ("3.2", "3.4", "3.7")
    ),
    Release("3.8", yaml=False, python2=False, torch3=True, static3=False, extra="pt"),
    Release("3.9", yaml=False, python2=False, torch3=True, static3=True, extra="pt"),
    Release("3.10", yaml=False, python2=False, torch3=True, static3=True, extra="pt"),
)


def markdown_table() -> str:
    """The table of supported releases, for docs/hosts.md."""
    rows: list[tuple[str, ...]] = [
        ("Neural Compressor", "YAML recipe", "2.x Python API", "3.x torch API", "3.x static int8", "tox"),
        ("---",) * 6,
    ]
    for release in RELEASES:
        marks = (release.yaml, release.python2, release.torch3, release.static3)
        rows.append((release.version, *("yes" if mark else "-" for mark in marks), release.environment))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tox_environment(release: Release) -> str:
    """The lines of ``tox.ini`` that install a release."""
    return "\n".join(f"{release.environment}: {need}" for need in (release.requirement, *release.pins))
