"""What ``report.json`` of a bundle is made of: what a run knows of itself, and what takes further passes over its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cat_plugin.report.content import weight_bytes
from cat_plugin.report.record import VERSION, label_changes

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from cat_plugin.recipe.recipe import Recipe
    from cat_plugin.report.scoring import FloatArray, Scorer

__all__ = ["measured", "recorded"]

_CLUSTER_ROWS = 2048


def _best(recipe: Recipe) -> int:
    """The trial whose model the host returns; it may have made that model anew."""
    best = 0
    for number, trial in enumerate(recipe.trials):
        if recipe.criterion.better(trial.score, recipe.trials[best].score):
            best = number
    return best


def recorded(
    recipe: Recipe,
    name: str,
    network: nn.Module,
    corrected: nn.Module,
    scorer: Scorer | None,
) -> dict[str, Any]:
    """What a run itself knows.

    Parameters
    ----------
    recipe : Recipe
        After its run.
    name : str
        Of the model, as the user gave it.
    network, corrected : torch.nn.Module
        In full precision, and the result.
    scorer : Scorer or None
        What the trials were scored with.

    Returns
    -------
    dict
        The parts ``model``, ``recipe``, ``config``, ``engine`` and, after a tuning run, ``tuning`` and ``labels``.
    """
    from cat_plugin.recipe.description import describe

    record: dict[str, Any] = {
        "version": VERSION,
        "model": {"name": name, "parameters": sum(p.numel() for p in network.parameters())},
        "recipe": {"name": recipe.path.name, "text": recipe.path.read_text("utf-8")},
    }
    for key in ("config", "report"):
        if isinstance(value := getattr(corrected, key, None), dict):
            record["engine" if key == "report" else key] = value
    if scorer is None or not recipe.trials:
        return record
    best = _best(recipe)
    trials = []
    for number, trial in enumerate(recipe.trials):
        report = getattr(trial.model, "report", None)
        trials.append(
            {
                "name": describe(trial.config),
                "config": trial.config,
                "score": trial.score,
                "uncorrected": scorer.uncorrected(trial.model),
                "seconds": round(trial.seconds, 3),
                "met": trial.met,
                "best": number == best,
                "weight_bytes": weight_bytes(report["layers"]) if report else None,
            }
        )
    baseline = recipe.baseline
    record["tuning"] = {
        "source": scorer.samples.source,
        "samples": len(scorer.samples),
        "baseline": baseline,
        "target": None if baseline is None else recipe.criterion.target(baseline),
        "trials": trials,
    }
    classes = scorer.classes(recipe.trials[best].model)
    if classes is not None and scorer.samples.labels.ndim == 1:
        said = {} if scorer.full is None else {"full": scorer.full}
        said |= {"quantized": classes[0], "corrected": classes[1]}
        record["labels"] = label_changes(
            scorer.samples.labels, said, scorer.samples.source, scorer.samples.names
        )
    return record


def measured(
    network: nn.Module,
    corrected: nn.Module,
    layers: list[dict[str, Any]],
    inputs: FloatArray,
    batch_size: int,
    progress: Callable[[str], None],
    program: ExportedProgram,
) -> dict[str, Any]:
    """What takes further passes over the calibration data.

    Parameters
    ----------
    network, corrected : torch.nn.Module
        In full precision, and quantized with its correction.
    layers : list of dict
        As in a manifest, under their names in `network`.
    inputs : ndarray of shape (N, ...), float32
        Samples on which both are run.
    batch_size : int
        Samples run at a time.
    progress : callable
        Called with what is being measured.
    program : torch.export.ExportedProgram
        `corrected` as it is handed over.

    Returns
    -------
    dict
        The parts ``sensitivity``, ``outliers`` and ``clusters``, where there is something to say.
    """
    import torch

    from cat_plugin.ptq.sensitivity_analysis import rows_for
    from cat_plugin.report.clusters import cluster_summary
    from cat_plugin.report.outliers import has_layer_norms, outliers
    from cat_plugin.report.scoring import logits_of
    from cat_plugin.report.sensitivity import layer_sensitivity

    found: dict[str, Any] = {}
    rows = rows_for(torch.from_numpy(inputs))
    effects = layer_sensitivity(
        network,
        layers,
        torch.from_numpy(inputs[:rows]),
        batch_size=batch_size,
        progress=lambda name: progress(f"measuring the layers: {name}"),
    )
    if effects:
        found["sensitivity"] = {"rows": rows, "layers": effects}
    if has_layer_norms(network):
        progress("measuring the outliers")
        found_out = outliers(network, program, torch.from_numpy(inputs[:rows]), batch_size)
        if found_out:
            found["outliers"] = {"rows": min(rows, len(inputs)), "layers": found_out}
    inputs = inputs[:_CLUSTER_ROWS]
    step: Any = getattr(corrected, "correction", None)
    inner: Any = getattr(corrected, "model", None)
    if step is not None and inner is not None and not step.n_features:
        progress("measuring the clusters")
        plain = logits_of(inner, inputs, batch_size)
        if plain.ndim != 2:  # of pixels; the page shows samples
            return found
        with torch.no_grad():
            after = step(torch.from_numpy(plain)).numpy()
        labels = step.to_parameters().assign(plain)
        found["clusters"] = cluster_summary(plain, after, labels, logits_of(network, inputs, batch_size))
    return found
