"""What every stage of a quantization has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.learned.descent import Outcome
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.state import State

__all__ = ["CLOSED_FORM_WORK", "Stage", "Step"]

#: What a layer in closed form costs, in gradient steps on it.
CLOSED_FORM_WORK = 30.0


@dataclass(frozen=True)
class Step:
    """Something that a stage has finished: what the checkpoint, the report and the caller hear of it.

    Attributes
    ----------
    name : str
        Of the unit, or of the stage that is one step.
    kind : str
        Of the unit report: ``unit``, ``model``, ``refinement``; or the stage's name.
    outcome : Outcome or None
        Losses before and after, if something was trained.
    work : float
        Share of the stage's work.
    notes : tuple of str
        For the report.
    saved : bool
        Whether the state is written to the checkpoint behind it.
    layers : sequence of QuantOp or None
        Layers that it has changed, for the checkpoint, which writes those that are new in any case; None is all of them.
    kept : sequence of Tensor
        What else a resumed run needs in the place of this step: :meth:`~cat_plugin.ptq.state.State.kept_of` gives it back.
    resumed : bool
        An earlier run has done it: nothing is recorded again.
    """

    name: str
    kind: str
    outcome: Outcome | None = None
    work: float = 0.0
    notes: tuple[str, ...] = ()
    saved: bool = True
    layers: Sequence[QuantOp] | None = None
    kept: Sequence[Tensor] = ()
    resumed: bool = False

    @property
    def key(self) -> str:
        """Name in the checkpoint."""
        return self.kind if self.kind == self.name else f"{self.kind} {self.name}"

    def kept_name(self, number: int) -> str:
        """Name in the checkpoint of one of the tensors `kept`."""
        return f"{self.key}/{number}"


class Stage(ABC):
    """One stage: rewrites the state's graph, or fits and trains what is in it.

    Attributes
    ----------
    name : str
        Its name, unique in the pipeline.
    checkpointed : bool
        Whether the checkpoint holds what the stage does, so that a resumed run can leave it out.  Others are done anew, with
        the same result; what takes long in them may be kept by their steps.
    keeps_values : bool
        Whether the values inside the graph are the caller's modules' behind an exact stage, so that a fault can be placed.
    """

    name: ClassVar[str]
    checkpointed: ClassVar[bool] = True
    keeps_values: ClassVar[bool] = True

    @abstractmethod
    def applies(self, spec: QuantSpec) -> bool:
        """Whether the specification asks for the stage."""

    def exact(self, state: State) -> bool:
        """Whether the graph, as the stage leaves it, computes what the caller's model does; this is then checked."""
        return False

    def work(self, state: State) -> float:
        """How much there is to do, in gradient steps on one layer; 0 for what takes no time."""
        return 0.0

    @abstractmethod
    def run(self, state: State) -> Iterable[Step]:
        """Do it, in place; each step is yielded as soon as it is finished."""
