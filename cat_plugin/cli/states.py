"""The state of an interrupted ``cat-ptq quantize``: what is in it, for people and for ``--resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cat_plugin.errors import BundleError
from cat_plugin.files import read_json

__all__ = ["in_words", "is_state", "read_states", "states_table"]

_LIMIT = 2**25


def is_state(path: Path) -> bool:
    """Whether a directory is one in which runs keep their state."""
    return path.is_dir() and any(path.glob("*/state.json"))


def read_states(kept: Path) -> list[dict[str, Any]]:
    """What each quantization has left in a run's state.

    Parameters
    ----------
    kept : pathlib.Path
        ``OUT.state``.

    Returns
    -------
    list of dict
        ``directory``, ``configuration``, ``steps`` done, the ``last`` of them, the ``share`` of the work and whether it is
        ``complete``; in the order in which they were begun.

    Raises
    ------
    BundleError
        One of them cannot be read.
    """
    found = []
    for path in sorted(kept.glob("*/state.json"), key=lambda path: path.parent.stat().st_ctime_ns):
        state = read_json(path, _LIMIT, BundleError, "delete the directory to start anew")
        try:
            spec, done = state["about"]["spec"], list(state["finished"])
            complete = done[-1] == "complete"
            found.append(
                {
                    "directory": path.parent.name,
                    "configuration": f"W{spec['w_bits']}A{spec['a_bits']} {spec['preset']}",
                    "steps": len(done) - complete,
                    "last": str(done[-1 - complete]),
                    "share": 1.0 if complete else float(state["records"]["share"]),
                    "complete": complete,
                }
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} is not the state of a run of this release ({error!r}); delete the directory to start anew"
            ) from error
    return found


def in_words(states: list[dict[str, Any]]) -> str:
    """What there is to go on from, in one line."""
    complete = sum(state["complete"] for state in states)
    words = [f"{complete} complete"] if complete else []
    words += [
        f"{state['configuration']} at {state['share']:.0%} ({state['steps']} steps, the last is {state['last']!r})"
        for state in states
        if not state["complete"]
    ]
    return f"{len(states)} quantization{'s' if len(states) != 1 else ''}: {', '.join(words)}"


def states_table(states: list[dict[str, Any]]) -> Table:
    """The same as a table."""
    table = Table(box=None)
    for heading in ("quantization", "configuration", "steps", "done", "last step"):
        table.add_column(heading, justify="right" if heading in ("steps", "done") else "left")
    for state in states:
        table.add_row(
            state["directory"],
            state["configuration"],
            str(state["steps"]),
            "complete" if state["complete"] else f"{state['share']:.0%}",
            escape(state["last"]),
        )
    return table
