"""What commands run models on without labels: samples of one input, or an array for each of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cat_plugin.cli.data import NamedArrays, Samples, arrays_in, load_arrays
from cat_plugin.cli.models import inputs_of
from cat_plugin.cli.options import samples_of
from cat_plugin.errors import CATValueError
from cat_plugin.graph.preparation import Preparation

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.ptq.cache import TensorStore
    from cat_plugin.report.scoring import FloatArray

__all__ = ["Calibration", "load_calibration", "load_several"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration inputs.

    Attributes
    ----------
    samples : Samples or NamedArrays
        As they were read.
    batches : list of Tensor, or of dict of str to Tensor
        The inputs, or all of them by name where the model takes several.
    preparation : Preparation or None
        What was done to them; None where the model takes several.
    """

    samples: Samples | NamedArrays
    batches: list[Any]
    preparation: Preparation | None

    def first(self, rows: int) -> Any:
        """That many rows of the first batch."""
        batch = self.batches[0]
        return (
            {name: each[:rows] for name, each in batch.items()} if isinstance(batch, dict) else batch[:rows]
        )

    def logits(self, network: nn.Module) -> FloatArray:
        """What a model makes of one row; an empty array where that is no single tensor."""
        given = self.first(1)
        with torch.no_grad():
            made = network(**given) if isinstance(given, dict) else network(given)
        return made.numpy() if isinstance(made, torch.Tensor) else np.empty(0, np.float32)


def load_calibration(
    network: nn.Module,
    data: str,
    batch_size: int,
    prepared: Preparation | None,
    store: TensorStore | None,
    unsuited: Mapping[str, object],
) -> Calibration:
    """Load calibration inputs as the model takes them.

    Parameters
    ----------
    network : nn.Module
        Its arguments that have no default, and those that the file has arrays for, are its inputs.
    data : str
        What ``--data`` names.
    batch_size : int
        Rows at a time.
    prepared : Preparation or None
        How images are made ready.
    store : TensorStore or None
        Where prepared inputs are kept; None is in memory.
    unsuited : mapping of str to object
        Options, by name, that a model of several inputs takes none of.

    Raises
    ------
    CATValueError
        The data is not what the model takes.
    """
    names = inputs_of(network, arrays_in(data))
    if len(names) < 2:
        samples = samples_of(data, prepared, store=store)
        how = dataclasses.replace(prepared or Preparation(), source=samples.source)
        return Calibration(samples, list(torch.split(torch.from_numpy(samples.inputs), batch_size)), how)
    # floats of any width are read as float32
    arrays = load_several(data, [{"name": name, "dtype": "float32"} for name in names], unsuited)
    batches = [
        dict(zip(names, map(torch.from_numpy, each), strict=True)) for each in arrays.batches(batch_size)
    ]
    return Calibration(arrays, batches, None)


def load_several(
    data: str, described: Sequence[Mapping[str, Any]], unsuited: Mapping[str, object]
) -> NamedArrays:
    """Load the inputs of a model that takes several.

    Parameters
    ----------
    data : str
        What ``--data`` names.
    described : sequence of mapping
        Name and dtype of each input.
    unsuited : mapping of str to object
        Options, by name, that such a model takes none of.

    Raises
    ------
    CATValueError
        One of these is given, or the data is no ``.npz`` file with an array for each input.
    """
    given = [option for option, value in unsuited.items() if value is not None]
    if given:
        raise CATValueError(
            f"a model of several inputs takes no {', '.join(given)}: its arrays go into it as they are, and it has no scores "
            "on labelled data here; leave that out, or do it from Python (docs/ptq.md)"
        )
    return load_arrays(data, described)
