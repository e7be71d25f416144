"""``cat-ptq``: the commands in the order of ``--help``, the global options, and what becomes of errors."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.console import Console

from cat_plugin.cli.benchmark import benchmark
from cat_plugin.cli.compare import compare
from cat_plugin.cli.compile import compile_
from cat_plugin.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Format, fail, state
from cat_plugin.cli.correct import correct
from cat_plugin.cli.doctor import doctor
from cat_plugin.cli.evaluate import evaluate
from cat_plugin.cli.export import export
from cat_plugin.cli.inspect import inspect
from cat_plugin.cli.quantize import quantize
from cat_plugin.cli.recipe import check, new
from cat_plugin.cli.report import report
from cat_plugin.cli.run import run
from cat_plugin.cli.sensitivity import sensitivity
from cat_plugin.errors import CATError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("recipe new", new),
    ("recipe check", check),
    ("quantize", quantize),
    ("evaluate", evaluate),
    ("run", run),
    ("report", report),
    ("sensitivity", sensitivity),
    ("compile", compile_),
    ("export", export),
    ("correct", correct),
    ("benchmark", benchmark),
    ("compare", compare),
    ("inspect", inspect),
    ("doctor", doctor),
)
"""Every command: its words, and the function whose signature is its options; in the order of ``--help``."""

_GROUPS = {"recipe": "Write and check recipes."}
_GLOBAL = ("--json", "--quiet", "-q", "--verbose", "-v", "--debug", "--format")

app = typer.Typer(
    name="cat-ptq",
    help="Quantize networks to 2 to 8 bits, repair them with cluster-based affine maps, compile them with TVM.",
    epilog="Exit codes: 0 it worked, 1 it failed, 2 the input cannot be used, 3 no trial met the criterion, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        from cat_plugin.version import __version__

        typer.echo(f"cat-ptq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    form: Annotated[
        Format, typer.Option("--format", help="How the result is printed on standard output.")
    ] = Format.TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show each message of a kind, not one line for all.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from rich.logging import RichHandler

    # Of the processes that torchrun starts the first alone says what is done.
    quiet = quiet or ("TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0")
    state.format = Format.JSON if as_json else form
    state.quiet, state.verbose, state.debug = quiet, verbose, debug
    state.console = Console(stderr=True, quiet=quiet)
    level = logging.DEBUG if debug or verbose else logging.ERROR if quiet else logging.INFO
    for name in ("cat_plugin", "tvm_backend"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [RichHandler(console=state.console, show_path=False, show_time=False)]
    # Before PyTorch is imported: OpenMP's threads that spin while they wait take six times the processor on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not debug:
        # Neural Compressor's own lines, some hundred a trial, would tear the progress bars.
        os.environ.setdefault("LOGLEVEL", "ERROR")


def _register() -> None:
    groups = {name: typer.Typer(help=about, no_args_is_help=True) for name, about in _GROUPS.items()}
    for words, command in COMMANDS:
        group, _, name = words.rpartition(" ")
        if group and not any(added.name == group for added in app.registered_groups):
            app.add_typer(groups[group], name=group)
        (groups[group] if group else app).command(name)(command)


_register()


def _divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The global options among the words, with their values, and the other words."""
    front: list[str] = []
    rest: list[str] = []
    takes_value = False
    for word in words:
        own = takes_value or word in _GLOBAL or word.startswith("--format=")
        (front if own else rest).append(word)
        takes_value = word == "--format" and not takes_value
    return front, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Defaults to the process's own.

    Returns
    -------
    int
        0 when it worked, 1 when something failed that is not the user's doing, 2 when the input cannot be used, 3 when no
        trial of a tuning run met the criterion,
        130 when it was interrupted.
    """
    state.format, state.quiet, state.verbose, state.debug = Format.TABLE, False, False, False
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        # The process ends with the command: Python need not look for garbage among all that was imported, a second.
        atexit.register(gc.freeze)
    # The global options are understood on either side of the command's name, up to a "--".
    end = given.index("--") if "--" in given else len(given)
    front, rest = _divided(given[:end])
    given = front + rest + given[end:]
    if given[len(front) :] in ([], *([group] for group in _GROUPS)):
        given = [*given, "--help"]  # a question, not a mistake
    debug = "--debug" in front
    try:
        # Click prints its own usage errors and exits with 2, which is this program's meaning of 2 as well.
        app(given, prog_name="cat-ptq")
    except SystemExit as exit_:
        code = int(exit_.code or 0)
        if code == EXIT_INTERRUPTED:
            return fail("interrupted; nothing was left half-written", EXIT_INTERRUPTED)
        return code
    except CATError as error:
        if debug:
            raise
        return fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was left half-written", EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return fail(f"{type(error).__name__}: {error} (--debug shows where)", EXIT_FAILED)
    return 0
