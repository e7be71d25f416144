"""Channels tied to each other, with exponents."""

from __future__ import annotations

from cat_plugin.ptq.transforms.smoothing.components import Components


def test_exponents_multiply_along_ties():
    components = Components()
    start = components.make(6)
    for first, second, exponent in ((0, 1, -1), (2, 3, -1), (3, 1, 1), (4, 5, 1)):
        components.tie(start + first, start + second, exponent)
    roots, signs = zip(*(components.find(start + i) for i in range(6)), strict=True)
    assert len(set(roots[:4])) == 1
    assert roots[4] == roots[5] != roots[0]
    assert [s * signs[0] for s in signs[:4]] == [1, -1, 1, -1]


def test_a_contradiction_and_what_is_blocked_block_the_whole_set():
    components = Components()
    start = components.make(6)
    components.tie(start, start + 1, -1)
    components.tie(start, start + 1, 1)
    assert not components.is_free(components.find(start + 1)[0])
    components.block(start + 2)
    components.keep_zero(start + 4)
    components.tie(start + 3, start + 2, 1)
    components.tie(start + 5, start + 4, 1)
    assert not components.is_free(components.find(start + 3)[0])
    root = components.find(start + 5)[0]
    assert components.is_free(root)
    assert not components.is_shifted(root)
