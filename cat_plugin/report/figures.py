"""Numbers as people read them; what is no finite number becomes a dash."""

from __future__ import annotations

import math
import re

__all__ = [
    "DASH",
    "NO_GAIN",
    "as_number",
    "correction",
    "decibel",
    "milliseconds",
    "percent",
    "round_number",
    "short",
    "signed",
    "size",
    "without_zeros",
]

DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


NO_GAIN = "changes nothing: no map gained on rows held out"


def as_number(value: object) -> float | None:
    """The value as a float when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _with_minus(text: str) -> str:
    return text.replace("-", _MINUS)


def short(value: object, digits: int = 3) -> str:
    """So many significant digits, in powers of ten only where zeros would pile up."""
    number = as_number(value)
    if number is None:
        return DASH
    if number == 0:
        return "0"
    exponent = int(f"{number:.{digits - 1}e}".partition("e")[2])  # of what is shown: 99.99 becomes 100
    if -4 <= exponent < 6:
        return _with_minus(f"{number:.{max(digits - 1 - exponent, 0)}f}")
    return _with_minus(f"{number:.{digits - 1}e}")


_RAISED = str.maketrans(
    "-0123456789",
    "\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ZERO}\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}\N{SUPERSCRIPT THREE}\N{SUPERSCRIPT FOUR}\N{SUPERSCRIPT FIVE}\N{SUPERSCRIPT SIX}\N{SUPERSCRIPT SEVEN}\N{SUPERSCRIPT EIGHT}\N{SUPERSCRIPT NINE}",
)


def round_number(value: float) -> str:
    """A round number without idle zeros, for the ticks of an axis."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:.2e}".partition("e")
        power = f"10{str(int(exponent)).translate(_RAISED)}"
        factor = float(digits)
        return _with_minus(power if factor == 1 else f"{factor:g}\N{MULTIPLICATION SIGN}{power}")
    return _with_minus(f"{value:.6g}")


def without_zeros(text: str) -> str:
    """A number with its unit, without zeros behind the point that say nothing on an axis."""
    return re.sub(r"\.0+(?= )", "", text)


def correction(clusters: object, alpha: float) -> str:
    """What a correction is, in a line; one that is blended in with weight 0 was chosen because none gained."""
    if alpha == 0 and clusters == 1:
        return NO_GAIN
    return f"{clusters} cluster{'' if clusters == 1 else 's'}, alpha {alpha:g}"


def percent(share: object, digits: int = 2) -> str:
    """A share from 0 to 1 in percent."""
    number = as_number(share)
    return DASH if number is None else _with_minus(f"{100 * number:.{digits}f}") + " %"


def signed(value: object, digits: int = 2) -> str:
    """With its sign, always."""
    number = as_number(value)
    return DASH if number is None else _with_minus(f"{round(number, digits) + 0.0:+.{digits}f}")


def size(count: object) -> str:
    """Bytes in the unit that leaves one to four digits."""
    number = as_number(count)
    if number is None:
        return DASH
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.{1 if number < 100 else 0}f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def milliseconds(value: object) -> str:
    """A time given in milliseconds, in the unit that suits it."""
    number = as_number(value)
    if number is None:
        return DASH
    if number < 1:
        return f"{short(1000 * number)} \N{MICRO SIGN}s"
    return f"{short(number)} ms" if number < 10_000 else f"{short(number / 1000)} s"


def decibel(relative_error: object) -> float | None:
    """Signal to quantization noise in dB of a relative mean squared error."""
    number = as_number(relative_error)
    return None if number is None or number <= 0 else -10 * math.log10(number)
