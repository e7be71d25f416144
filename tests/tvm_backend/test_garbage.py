"""Python's search for garbage while compiling."""

from __future__ import annotations

import gc

from tvm_backend.garbage import seldom_collected


def test_the_last_to_leave_puts_the_threshold_back() -> None:
    before = gc.get_threshold()
    one, other = seldom_collected(), seldom_collected()
    one.__enter__()
    other.__enter__()
    assert gc.get_threshold()[0] == 200_000
    one.__exit__(None, None, None)
    assert gc.get_threshold()[0] == 200_000
    other.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_search_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with seldom_collected():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
