"""``cat-ptq quantize``: from a recipe and a model to a bundle that remembers how it came about."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cat_plugin.cli.console import EXIT_MISSED, key_value_table, state
from cat_plugin.cli.data import NamedArrays, Samples
from cat_plugin.cli.options import (
    BatchSize,
    ChannelOrder,
    Classes,
    Data,
    ImageSize,
    Mean,
    MetricName,
    NumClasses,
    Std,
    Weights,
    class_names,
    labelled,
    preparation,
    sources_exist,
)
from cat_plugin.cli.places import BUNDLE, DIRECTORY, held_state, may_write
from cat_plugin.cli.states import in_words, read_states
from cat_plugin.errors import CATValueError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.ptq.cache import TensorStore
    from cat_plugin.ptq.ranks import Ranks
    from cat_plugin.recipe.recipe import Recipe
    from cat_plugin.report.scoring import FloatArray, Scorer

__all__ = ["quantize"]

_log = logging.getLogger("cat_plugin")


def quantize(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="The full-precision model: module:factory, timm:NAME, torchvision:NAME, hf:FOLDER, or a .onnx file.",
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Directory for the bundle.")],
    weights: Weights = None,
    num_classes: NumClasses = None,
    tune: Annotated[
        str | None, typer.Option("--tune", help="Labelled data for the tuning criterion, as --data.")
    ] = None,
    metric: MetricName = "top1",
    allow_miss: Annotated[
        bool,
        typer.Option(
            "--allow-miss", help="Exit with 0, not 3, when no trial met the criterion of the recipe."
        ),
    ] = False,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
    classes: Classes = None,
    batch_size: BatchSize = 64,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same command stopped.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Write losses and scores for TensorBoard here.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Record layer sensitivities and clusters for 'cat-ptq report'; takes a forward pass a layer."
        ),
    ] = True,
) -> None:
    """Quantize a model as a recipe says and write the best result as a bundle.

    A model of several inputs takes an .npz file with an array for each, under the names of its arguments.
    The state of the run is kept in OUT.state until the bundle is written; 'cat-ptq inspect OUT.state' lists it. With --tune the exit code is 3 when no
    trial met the criterion of the recipe; the best bundle is written all the same. Started by 'torchrun -m cat_plugin quantize', the processes
    divide the engine's calibration inputs among themselves (preset fast).
    """
    sources_exist(recipe=recipe, data=(data, tune), weights=weights)
    may_write(out, BUNDLE)
    names = class_names(classes)
    if tensorboard is not None:
        may_write(tensorboard, DIRECTORY, "--tensorboard")
    from cat_plugin import export_bundle, load_recipe
    from cat_plugin.cli.calibration import load_calibration
    from cat_plugin.cli.models import load_model
    from cat_plugin.cli.torchrun import follow, joined
    from cat_plugin.graph.export import export_program
    from cat_plugin.graph.inspect import quantized_layers
    from cat_plugin.recipe.options import has_choices
    from cat_plugin.report.content import weight_bytes
    from cat_plugin.report.metrics import load_metric
    from cat_plugin.report.recording import measured, recorded
    from cat_plugin.report.scoring import Scorer

    loaded = load_recipe(recipe)
    if tune is None and (len(loaded.configurations) > 1 or has_choices(loaded.configurations[0])):
        raise RecipeError(
            f"{recipe} describes several configurations; give labelled data with --tune, so that one can be chosen, or "
            "give each option one value"
        )
    prepared = preparation(mean, std, image_size, channel_order)
    network = load_model(model, weights, num_classes)
    store = _store(loaded)
    options = {"--tune": tune, "--mean": mean, "--std": std, "--image-size": image_size}
    unsuited = {**options, "--channel-order": channel_order}
    calibration = load_calibration(network, data, batch_size, prepared, store, unsuited)
    samples, how = calibration.samples, calibration.preparation
    with joined() as ranks:
        if not ranks.first:
            follow(ranks, network, calibration.batches)
            return
        names = _names(names, samples, calibration.logits(network))
        scorer = (
            None
            if tune is None
            else Scorer(labelled(tune, how, same=True, store=store), batch_size, load_metric(metric))
        )
        with _state_beside(out, resume) as kept, _scalars(tensorboard) as scalars:
            if scorer is not None:
                scorer.kept = kept
            corrected = _run(loaded, network, calibration.batches, scorer, kept, scalars, ranks)
            with state.working("exporting"):
                program = export_program(corrected, calibration.first(2))
            layers = [_layer(layer.to_dict()) for layer in quantized_layers(program)]
            record = recorded(loaded, model, network, corrected, scorer)
            if measure and isinstance(samples, Samples):
                with state.working("measuring the layers") as status:
                    record |= measured(
                        network, corrected, layers, samples.inputs, batch_size, status.update, program
                    )
            bundle = export_bundle(
                program,
                calibration.first(5),
                out,
                calibration={"samples": len(samples), "recipe": recipe.name},
                report=record,
                preparation=how,
                class_names=names,
            )
    values: dict[str, Any] = {
        "bundle": str(bundle),
        "calibration_samples": len(samples),
        "configuration": _described(corrected),
        "weight_bytes": weight_bytes(layers),
        "float_weight_bytes": weight_bytes(layers, 32),
    }
    if "tuning" in record:
        values |= {key: record["tuning"][key] for key in ("baseline", "target", "trials")}
    state.report(values, lambda: _summary(values, out), "trials")
    if not any(trial["met"] for trial in values.get("trials", ({"met": True},))) and not allow_miss:
        _log.warning(f"no trial met the criterion; the best one is in {out} (--allow-miss exits with 0)")
        raise typer.Exit(EXIT_MISSED)


def _store(recipe: Recipe) -> TensorStore | None:
    """Where inputs are kept: in files, from which they are read as they are needed, where the recipe bounds memory."""
    from cat_plugin.ptq.cache import TensorStore

    bounded = any(configuration.get("memory_mb") is not None for configuration in recipe.configurations)
    return TensorStore(0) if bounded else None


def _names(given: list[str] | None, samples: Samples | NamedArrays, logits: FloatArray) -> list[str] | None:
    """The names of the classes: those given, or those of the folders where there is one for each class."""
    classes = logits.shape[1] if logits.ndim == 2 else None
    if given is not None and len(given) != classes:
        raise CATValueError(
            f"--classes names {len(given)} classes and the model has {classes}; give a name for each, in their order"
        )
    folders = samples.classes if isinstance(samples, Samples) else None
    return given or (folders if folders is not None and len(folders) == classes else None)


def _layer(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer under the name that it has in the user's model: the corrected one holds that as ``model``."""
    from cat_plugin.report.content import short_name

    return {**layer, "name": short_name(layer["name"])}


@contextlib.contextmanager
def _state_beside(out: Path, resume: bool) -> Iterator[Path]:
    """Where the engine keeps its state: gone when the block ends well, kept when there is something to go on from."""
    kept = out.with_name(f"{out.name}.state")
    with held_state(kept, resume, _say_dropped):
        if resume:
            found = read_states(kept)
            if found:
                _log.info("going on from %s, %s", kept, in_words(found))
            else:
                _log.info("there is nothing to go on from in %s: a run begins", kept)
        try:
            yield kept
        except KeyboardInterrupt:
            if any(kept.glob("*/state.json")):
                _log.warning(
                    "what was done is kept in %s: the same command with --resume goes on from there", kept
                )
            raise


def _say_dropped(kept: Path) -> None:
    _log.info("%s holds an earlier run's state, which is dropped; --resume goes on from it", kept)


@contextlib.contextmanager
def _scalars(directory: Path | None) -> Iterator[Any]:
    if directory is None:
        yield None
        return
    from cat_plugin.cli.tensorboard import Scalars

    with contextlib.closing(Scalars(directory)) as scalars:
        yield scalars


def _run(
    recipe: Recipe,
    network: nn.Module,
    batches: list[Any],
    scorer: Scorer | None,
    kept: Path,
    scalars: Any,
    ranks: Ranks,
) -> nn.Module:
    from cat_plugin.cli.torchrun import Leader
    from cat_plugin.recipe.progress import Watch, watching

    listener: Callable[..., None] | None = None if scalars is None else scalars.unit
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Leader(ranks)) if ranks.size > 1 else None
        stack.enter_context(watching(Watch(console=state.console, engine=engine)))
        corrected = recipe.run(
            network, calibration=batches, eval_fn=_shown(scorer), progress=listener, resume=kept
        )
    if scalars is not None:
        scalars.trials(recipe.baseline, recipe.trials)
    return corrected


def _shown(scorer: Scorer | None) -> Callable[[nn.Module], float] | None:
    """The scorer, at work visibly."""
    if scorer is None:
        return None

    def score(model: nn.Module) -> float:
        with state.working("scoring"):
            return scorer(model)

    return score


def _described(corrected: nn.Module) -> str:
    from cat_plugin.recipe.description import describe

    config = getattr(corrected, "config", None)
    return describe(config) if isinstance(config, dict) else "as the recipe says"


def _summary(values: dict[str, Any], out: Path) -> Any:
    from rich.console import Group

    from cat_plugin.report.figures import percent, size

    facts = {
        "bundle": values["bundle"],
        "configuration": values["configuration"],
        "weights": f"{size(values['weight_bytes'])}, {size(values['float_weight_bytes'])} in float32",
        "calibration samples": values["calibration_samples"],
        "next": f"cat-ptq report {out}",
    }
    shown = key_value_table(facts)
    if "trials" not in values:
        return shown
    table = Table(title="Trials", caption="the best one is in the bundle", box=None, title_justify="left")
    for heading in ("", "configuration", "score", "without CAT", "criterion", "weights", "seconds"):
        table.add_column(
            heading, justify="left" if heading in ("", "configuration", "criterion") else "right"
        )
    target = percent(values["target"])
    # Clusters and alpha are the same in most runs, and then only make the lines long.
    common = len({trial["name"].partition(", ")[2] for trial in values["trials"]}) == 1
    table.add_row("", "full precision", percent(values["baseline"]), "", f"target {target}", "", "")
    for trial in values["trials"]:
        table.add_row(
            "*" if trial["best"] else "",
            trial["name"].partition(", ")[0] if common else trial["name"],
            percent(trial["score"]),
            percent(trial["uncorrected"]),
            "met" if trial["met"] else "missed",
            size(trial["weight_bytes"]),
            f"{trial['seconds']:.1f}",
        )
    return Group(table, "", shown)
