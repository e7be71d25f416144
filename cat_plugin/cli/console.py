"""The application: global options, errors turned into exit codes, output for people and for programs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from cat_plugin.errors import CATError

__all__ = ["State", "app", "key_value_table", "main", "state"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_GLOBAL = ("--json", "--quiet", "-q", "--debug")
_log = logging.getLogger("cat_plugin")


@dataclass
class State:
    """What the global options chose; one per process."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def report(self, values: dict[str, Any], table: Callable[[], RenderableType] | None = None) -> None:
        """Show a result: JSON on standard output when asked for, else a table unless quiet."""
        if self.json:
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
        elif not self.quiet:
            Console().print(table() if table else key_value_table(values))


state = State()
app = typer.Typer(
    name="cat-ptq",
    help="Quantize networks to 2 to 8 bits, repair them with cluster-based affine maps, compile them with TVM.",
    epilog="Exit codes: 0 it worked, 1 it failed, 2 the input cannot be used, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def key_value_table(values: dict[str, Any]) -> Table:
    """Lay a flat mapping out as two columns."""
    from rich.markup import escape

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path that is cut cannot be copied
    for key, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), escape(shown))
    return table


def _show_version(value: bool) -> None:
    if value:
        from cat_plugin.version import __version__

        typer.echo(f"cat-ptq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from rich.logging import RichHandler

    state.json, state.quiet, state.debug = as_json, quiet, debug
    state.console = Console(stderr=True, quiet=quiet)
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO
    for name in ("cat_plugin", "tvm_backend"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [RichHandler(console=state.console, show_path=False, show_time=False)]
    if not debug:
        # Neural Compressor's own lines, some hundred a trial, would tear the progress bars.
        os.environ.setdefault("LOGLEVEL", "ERROR")


def _fail(message: str, code: int) -> int:
    Console(stderr=True).print(
        f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Defaults to the process's own.

    Returns
    -------
    int
        0 when it worked, 1 when something failed that is not the user's doing, 2 when the input cannot be used,
        130 when it was interrupted.
    """
    from cat_plugin.cli import commands  # noqa: F401 - registers the commands

    state.json = state.quiet = state.debug = False
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The global options are understood on either side of the command's name, up to a "--".
    end = given.index("--") if "--" in given else len(given)
    front = [word for word in given[:end] if word in _GLOBAL]
    given = front + [word for word in given[:end] if word not in _GLOBAL] + given[end:]
    debug = "--debug" in front
    try:
        # Click prints its own usage errors and exits with 2, which is this program's meaning of 2 as well.
        app(given, prog_name="cat-ptq")
    except SystemExit as exit_:
        code = int(exit_.code or 0)
        if code == EXIT_INTERRUPTED:
            return _fail("interrupted; nothing was left half-written", EXIT_INTERRUPTED)
        return code
    except CATError as error:
        if debug:
            raise
        return _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", EXIT_FAILED)
    return 0
