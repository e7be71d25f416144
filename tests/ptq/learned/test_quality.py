"""How far results are from those of full precision."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.ptq.learned.quality import Quality
from cat_plugin.ptq.rows import Rows


def test_each_rows_error_is_that_of_the_row_alone_and_the_error_is_their_mean():
    generator = torch.Generator().manual_seed(0)
    logits, maps, boxes = ((5, 7), (5, 3, 4, 4), (5, 6))
    wanted = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (logits, maps, boxes)]
    found = [x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in wanted]
    quality = Quality((0, 1, 2), (1, 1, None))

    def kl(z, y):  # (..., classes last)
        p, q = torch.softmax(y / 2, -1), torch.softmax(z / 2, -1)
        return 4 * (p * (p / q).log()).sum(-1)

    expected = [
        kl(found[0][i], wanted[0][i])
        + kl(found[1][i].movedim(0, -1), wanted[1][i].movedim(0, -1)).mean()
        + (found[2][i] - wanted[2][i]).square().mean() / wanted[2].square().mean()
        for i in range(5)
    ]
    errors = quality.errors(Rows(found), Rows(wanted), 2.0)
    assert errors.tolist() == pytest.approx([float(each) for each in expected], rel=1e-9)
    assert float(quality.error(Rows(found), Rows(wanted), 2.0)) == pytest.approx(
        float(errors.mean()), rel=1e-12
    )
