"""Python's search for garbage while compiling."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tvm_backend.garbage import long_lived, seldom_collected


def test_the_last_to_leave_puts_the_threshold_back() -> None:
    before = gc.get_threshold()
    one, other = seldom_collected(), seldom_collected()
    one.__enter__()
    other.__enter__()
    assert gc.get_threshold()[0] == 1_000_000
    one.__exit__(None, None, None)
    assert gc.get_threshold()[0] == 1_000_000
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


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Without what the suite has frozen."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_there_is_is_not_searched_again_but_by_a_search_of_all(unfrozen: None) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    old = [cycle]
    long_lived()
    assert gc.get_freeze_count() == 0
    assert not any(each is old for generation in (0, 1) for each in gc.get_objects(generation))
    assert any(each is cycle for each in gc.get_objects(2))


def test_what_a_program_froze_stays_frozen(unfrozen: None) -> None:
    gc.freeze()
    long_lived()
    assert gc.get_freeze_count() > 0
