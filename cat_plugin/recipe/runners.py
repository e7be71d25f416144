"""Who runs a recipe: the hosts say here what they need and where they are, and a recipe takes the first that is there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from cat_plugin.errors import HostError

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.batches import ModelCall
    from cat_plugin.recipe.tuning import TuningRun

__all__ = ["Runner", "find_runner", "register_runner"]


class Runner(Protocol):
    """Runs the configurations of a recipe through a host."""

    def __call__(
        self,
        configurations: list[dict[str, Any]],
        model: nn.Module,
        calls: list[ModelCall],
        eval_fn: Callable[[nn.Module], float] | None,
        run: TuningRun,
        /,
    ) -> nn.Module:
        """Return the best corrected model; the trials go to `run`.

        Parameters
        ----------
        configurations : list of dict
            CAT's options; values may be lists.
        model : torch.nn.Module
            The full-precision model.
        calls : list of ModelCall
            The calibration data.
        eval_fn : callable or None
            Scores a model; None quantizes once.
        run : TuningRun
            The record of trials.
        """


_known: dict[str, str] = {}


def register_runner(needs: str, place: str) -> None:
    """Say that the function ``run`` of a module runs recipes where another module can be imported.

    Parameters
    ----------
    needs : str
        Full name of a module of the host; it is only looked for, not imported.
    place : str
        Full name of the module with the :class:`Runner`, imported when it is first used.
    """
    _known[needs] = place


def find_runner() -> Runner:
    """The first runner, in the order of registration, whose host is installed.

    Raises
    ------
    HostError
        When there is none.
    """
    for needs, place in _known.items():
        package = needs.partition(".")[0]
        if importlib.util.find_spec(package) is not None and importlib.util.find_spec(needs) is not None:
            runner: Runner = importlib.import_module(place).run
            return runner
    raise HostError(
        "no Neural Compressor is installed; a recipe is run by it. Install one, for example with "
        "pip install 'neural-compressor[pt]', or use cat_plugin.ptq.quantize and cat_plugin.correct without it"
    )
