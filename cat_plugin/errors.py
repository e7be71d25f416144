"""The project's one family of exceptions.

Every error that a user can cause is a :class:`CATError` whose message says what was given,
what was expected and what to do about it.  Where Python users expect to catch ``ValueError`` or
``TypeError``, the class derives from that too.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CATError",
    "CATTypeError",
    "CATValueError",
    "CalibrationError",
    "CompileError",
    "ExportError",
    "HostError",
    "LibraryError",
    "OptionTypeError",
    "QuantizationError",
    "RecipeError",
    "no_calibration_batch",
]


class CATError(Exception):
    """Base class of every error raised on purpose by ``cat_plugin`` and ``tvm_backend``."""


class CATValueError(CATError, ValueError):
    """An argument has the right type and an unusable value."""


class CATTypeError(CATError, TypeError):
    """An argument is of a type that cannot be used."""


class OptionTypeError(CATTypeError, CATValueError):
    """An option was given a value of the wrong type, or is not known; caught as ``TypeError`` and as ``ValueError``."""


class RecipeError(CATValueError):
    """A recipe file or a configuration mapping is malformed."""


class CalibrationError(CATValueError):
    """Calibration data, or what a model makes of it, cannot be used."""


class QuantizationError(CATError):
    """A model cannot be quantized as asked."""


class ExportError(CATError):
    """A model cannot be exported as a QDQ graph."""


class BundleError(CATError):
    """A bundle on disk is missing, damaged or of an unknown format."""


class CompileError(CATError):
    """A graph cannot be compiled for the target."""


class LibraryError(CATError):
    """A compiled library cannot be loaded, or was called with the wrong input."""


class HostError(CATError):
    """The installed Neural Compressor, or the lack of one, does not allow what was asked."""


def no_calibration_batch() -> CalibrationError:
    """What is raised, by whoever is given the data, where there are none."""
    return CalibrationError(
        "the calibration data yielded no batch; give an iterable of input batches with at least one sample (a generator that "
        "was read before is empty the second time)"
    )
