"""Rows of logits gathered from calls."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cat_plugin import calls
from cat_plugin.calls import ModelCall, collect_logits
from cat_plugin.logits import LogitsOf


class _Tagger(nn.Module):
    """(N, T) numbers to (N, T, 3) logits that name the token."""

    def forward(self, input_ids, attention_mask=None):
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return torch.stack([input_ids, place, input_ids * 0], 2).float()


def _batch(*lengths, total=6):
    mask = torch.tensor([[1] * length + [0] * (total - length) for length in lengths])
    return ModelCall(
        (), {"input_ids": torch.arange(len(lengths))[:, None].expand(-1, total), "attention_mask": mask}
    )


def test_padded_tokens_are_no_rows():
    found = collect_logits(_Tagger(), [_batch(6, 2), _batch(0, 3)], "quantized", logits=LogitsOf("0", 2))
    places = [[*range(6)], [0, 1], [0], [0, 1, 2]]  # the sample without a token keeps its first
    assert found.values[:, 1].tolist() == [place for each in places for place in each]
    assert found.samples.tolist() == [0] * 6 + [1] * 2 + [2] + [3] * 3


def test_tokens_are_drawn_from_those_that_are_not_padding(monkeypatch):
    monkeypatch.setattr(calls, "_ROWS", 8)  # 4 of each sample
    found = collect_logits(_Tagger(), [_batch(6, 3)], "quantized", logits=LogitsOf("0", 2))
    assert found.samples.tolist() == [0] * 4 + [1] * 3
    assert found.values[4:, 1].tolist() == [0, 1, 2]
    assert len(np.unique(found.values[:4, 1])) == 4
