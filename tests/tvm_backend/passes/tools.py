"""What the tests of the passes share: the comparison, and the values that the graphs are made of."""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels.spec import (
    ConvSpec,
    Epilogue,
    QParams,
)

quantize, dequantize = dialect.quantize, dialect.dequantize
per_channel = dialect.dequantize_per_channel

Q8 = QParams(0.05, 3, 0, 255, "uint8")
Q2 = QParams(0.5, 0, 0, 3, "uint8")
S8 = QParams(0.02, -4, -128, 127, "int8")


def kernel(spec, *args):
    return dialect.kernel(spec, list(args), dialect.shape_of(args[0])[0])


RNG = np.random.default_rng(0)


def const(array, dtype="float32"):
    return compat.constant(np.asarray(array, dtype))


def check(rewrite, before, after):
    """`before` becomes `after`, but for a name bound to a name at the end; `after` stays as it is."""
    canonical = relax.transform.CanonicalizeBindings()
    compat.assert_structural_equal(canonical(rewrite(before)), canonical(after))
    untouched(rewrite, after)


def untouched(rewrite, mod):
    compat.assert_structural_equal(rewrite(mod), mod)


W = RNG.integers(-8, 8, (6, 4, 3, 3)).astype("int8")
SCALES = RNG.uniform(0.01, 0.1, 6).astype("float32")
BIAS = RNG.normal(size=6).astype("float32")
WEIGHT, W_SCALES, W_ZEROS = const(W, "int8"), const(SCALES), const(np.zeros(6), "int64")
SCALE = const((SCALES.astype("float64") * Q8.scale).astype("float32"))
ZEROS, BIAS_CONST, BIAS_NCHW = const(np.zeros(6)), const(BIAS), const(BIAS.reshape(1, 6, 1, 1))
CHANNEL = {"axis": 0, "qmin": -8, "qmax": 7}
CONV = ConvSpec(None, 8, 8, 4, 6, (3, 3), Q8, Epilogue(), padding=(1, 1, 1, 1), weight_bits=4)
RELU = dialect.with_epilogue(CONV, clip=(0.0, None))
END = 9223372036854775807
