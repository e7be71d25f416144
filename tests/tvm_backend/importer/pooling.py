"""Cases of pooling, and of what depends on how an image lies in memory."""

from __future__ import annotations

import torch.nn.functional as F


def turned(x):
    """Images whose channels come last in memory, as behind a linear layer on pixels."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


POOLING = {
    "average pooling": lambda x: (
        F.avg_pool2d(x, 3),
        F.avg_pool2d(x, 3, 2, 1),
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        F.avg_pool2d(x, (4, 3), (3, 2), (2, 1), ceil_mode=True, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        F.avg_pool2d(x, 3, 2, 1, True, False, 7),
        F.avg_pool1d(x.flatten(2), 5, 3, 2, ceil_mode=True, count_include_pad=False),
        F.avg_pool1d(x.flatten(2), 4),
        F.avg_pool3d(x.unsqueeze(1), 2, ceil_mode=True),
        F.avg_pool3d(x.unsqueeze(1), 2),
        F.lp_pool2d(x.abs(), 2, 2),
        F.local_response_norm(x, 3),
    ),
    "maximum pooling": lambda x: (
        F.max_pool2d(x, 3),
        F.max_pool2d(x, 3, 2, 1),
        F.max_pool2d(x, 2, 2, 0, 2, ceil_mode=True),
        F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        F.max_pool2d(x, 2, 5, 1, ceil_mode=True),
        F.max_pool1d(x.flatten(2), 5, 3, 2),
        F.max_pool3d(x.unsqueeze(1), 2, 2, 1),
    ),
    "channels last": lambda x: (
        F.adaptive_avg_pool2d(turned(x), 1),
        F.adaptive_avg_pool2d(turned(x), (2, 3)),
        F.adaptive_avg_pool3d(turned(x).unsqueeze(2), 1),
        F.adaptive_max_pool2d(turned(x), 1),
        F.avg_pool2d(turned(x), 3, 2, 1),
        F.max_pool2d(turned(x), 2),
        F.interpolate(turned(x), scale_factor=2),
        F.interpolate(turned(x), size=(7, 9), mode="bilinear"),
        F.pixel_shuffle(turned(x), 2),
        F.pixel_unshuffle(turned(x), 2),
        F.channel_shuffle(turned(x), 2),
        F.group_norm(turned(x), 2),
        F.instance_norm(turned(x)),
        F.pad(turned(x), (1, 2, 0, 1), mode="reflect"),
        F.normalize(turned(x)).flatten(1),
        turned(x).reshape(-1, 2, 72).unflatten(1, (1, 2)).contiguous(),
    ),
    "adaptive pooling": lambda x: (
        F.adaptive_max_pool2d(x, 3),
        F.adaptive_max_pool2d(x, (4, 5)),
        F.adaptive_max_pool2d(x, 4, return_indices=True)[1],
        F.adaptive_max_pool1d(x.flatten(2), 7),
        F.adaptive_max_pool3d(x.unsqueeze(1), (3, 4, 2)),
        F.adaptive_avg_pool2d(x, 3),
        F.adaptive_avg_pool2d(x, (4, 5)),
        F.adaptive_avg_pool1d(x.flatten(2), 7),
        F.adaptive_avg_pool3d(x.unsqueeze(1), (2, 3, 3)),
        F.adaptive_avg_pool3d(x.unsqueeze(1), (3, 4, 2)),
    ),
}
