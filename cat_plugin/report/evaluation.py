"""The accuracy of a bundle, with and without its correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cat_plugin.report.content import Evaluation, bits_of, weight_bytes
from cat_plugin.report.outputs import both_logits
from cat_plugin.report.scoring import batches_of, top1

if TYPE_CHECKING:
    from cat_plugin.graph.bundle import Bundle
    from cat_plugin.report.scoring import IntArray, Labelled

__all__ = ["evaluated"]


def evaluated(
    name: str, bundle: Bundle, samples: Labelled, batch_size: int
) -> tuple[Evaluation, dict[str, IntArray]]:
    """Run a bundle in PyTorch.

    Parameters
    ----------
    name : str
        Of the bundle, for people.
    bundle : Bundle
        What is run.
    samples : Labelled
        The data.
    batch_size : int
        Samples run at a time.

    Returns
    -------
    evaluation : Evaluation
    classes : dict of str to ndarray of shape (N,)
        The classes that it gives: ``corrected`` and, where it has a correction, ``quantized``.
    """
    corrected, plain = both_logits(bundle.program(), batches_of(samples.inputs, batch_size))
    layers = bundle.manifest["layers"]
    evaluation = Evaluation(
        name=name,
        bits=bits_of(layers),
        weight_bytes=weight_bytes(layers),
        score=top1(corrected, samples.labels) / 100,
        plain=None if plain is None else top1(plain, samples.labels) / 100,
    )
    classes = {} if plain is None else {"quantized": plain.argmax(1)}
    return evaluation, classes | {"corrected": corrected.argmax(1)}
