"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from cat_plugin.report.figures import correction, decibel, milliseconds, percent, round_number, short, size

MINUS, DASH, MICRO = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MICRO SIGN}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (short(0.012345), "0.0123"), (short(-1234.5), f"{MINUS}1234"), (short(1e-7), f"1.00e{MINUS}07"), (short(0), "0"),
        (short(math.nan), DASH), (short(None), DASH), (short(True), DASH), (short(99.99), "100"),
        (percent(0.98765), "98.77 %"), (percent(None), DASH),
        (size(512), "512 B"), (size(19866), "19.4 KiB"), (size(1048576), "1.0 MiB"), (size(None), DASH),
        (milliseconds(0.0161), f"16.1 {MICRO}s"), (milliseconds(12.5), "12.5 ms"), (milliseconds(15000), "15.0 s"),
        (correction(8, 0.4), "8 clusters, alpha 0.4"), (correction(1, 1.0), "1 cluster, alpha 1"),
        (correction(1, 0.0), "changes nothing: no map gained on rows held out"),
        (round_number(0.05), "0.05"), (round_number(1e-5), "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (round_number(2e6), "2\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT SIX}"), (round_number(0.0), "0"),
    ],
)  # fmt: skip
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_decibels() -> None:
    assert decibel(0.01) == pytest.approx(20)
    assert decibel(0.0) is None
    assert decibel(None) is None
