"""What ARC is compared with, fast: the values of `arcquant_ref.baselines`."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from arcquant_ref import checks
from arcquant_ref.baselines import INT4_GROUP, INT4_MAX, MX_BLOCK
from arcquant_ref.formats import E2M1, E4M3, E8M0, Float32, FloatFormat

from .formats import (
    BIAS,
    INF,
    MAGNITUDE,
    MANTISSA,
    SIGN,
    Bits,
    bits_in,
    bits_of,
    f32,
    float_of,
    largest,
    load,
    u32,
)
from .jit import helper, kernel, over_rows
from .quantize import refuse_non_finite

ExponentRule = Callable[[FloatFormat], u32]
SHIFT = u32(MANTISSA)
LEAST_EXPONENT = u32(E8M0.bias)  # 2⁻¹²⁷
TOP_LEVEL = f32(INT4_MAX)


def ceiling_exponent(fmt: FloatFormat) -> u32:
    """What, added to the bits of amax, carries into the exponent if the significand is beyond that of max."""
    fraction = u32(2**MANTISSA - 1)
    return u32(fraction - (_bits_of_largest(fmt) & fraction))


def floor_exponent(fmt: FloatFormat) -> u32:
    """Nothing: the exponent of amax itself (OCP Microscaling Formats 1.0, section 6.3)."""
    return u32(0)


def mxfp8(x: ArrayLike, exponent_rule: ExponentRule = ceiling_exponent) -> Float32:
    """(M, K) → the nearest MXFP8 (E4M3) values, 32 along K to an E8M0 scale: `arcquant_ref.baselines.mxfp8`.

    `exponent_rule` is `ceiling_exponent` or `floor_exponent` of this module. Dtypes and errors as in
    `quantize`, K a multiple of 32.

    >>> mxfp8(np.float32([[448, 17] + [0] * 30]))[0, :2]
    array([448.,  16.], dtype=float32)
    """
    return _mx(x, E4M3, exponent_rule)


def mxfp4(x: ArrayLike, exponent_rule: ExponentRule = ceiling_exponent) -> Float32:
    """(M, K) → the nearest MXFP4 (E2M1) values, 32 along K to an E8M0 scale.

    >>> x = np.float32([[7, 1] + [0] * 30])
    >>> mxfp4(x)[0, :2], mxfp4(x, floor_exponent)[0, :2]
    (array([8., 1.], dtype=float32), array([6., 1.], dtype=float32))
    """
    return _mx(x, E2M1, exponent_rule)


def int4(x: ArrayLike) -> Float32:
    """(M, K) → the nearest of −7 … 7 times amax / 7, 128 along K to a scale; the last group may be shorter.

    >>> int4(np.float32([[7, 2.4] + [0] * 14]))[0, :2]
    array([7., 2.], dtype=float32)
    """
    bits = bits_in("x", checks.matrix_shape("x", x, 1))
    values = np.empty(bits.shape, f32)
    most = over_rows(lambda start, stop: _int4_rows(bits[start:stop], values[start:stop]), len(bits))
    refuse_non_finite("x", x, max(most))
    return values


def _mx(x: ArrayLike, fmt: FloatFormat, exponent_rule: ExponentRule) -> Float32:
    bits = bits_in("x", checks.matrix_shape("x", x, MX_BLOCK))
    values = np.empty(bits.shape, f32)
    carry, top = exponent_rule(fmt), _bits_of_largest(fmt)
    least_normal = u32((BIAS + 1 - fmt.bias) << MANTISSA)
    to_magic = u32((MANTISSA - fmt.mantissa_bits) << MANTISSA)

    def task(start: int, stop: int) -> u32:
        return _mx_rows(bits[start:stop], carry, top, least_normal, to_magic, values[start:stop])

    refuse_non_finite("x", x, max(over_rows(task, len(bits))))
    return values


def _bits_of_largest(fmt: FloatFormat) -> u32:
    return u32(f32(largest(fmt)).view(u32))


@kernel
def _mx_rows(x: Bits, carry: u32, top: u32, least_normal: u32, to_magic: u32, values: Float32) -> u32:
    scratch, most = np.empty(x.shape[1], u32), u32(0)
    up, down = np.empty(x.shape[1] // MX_BLOCK, f32), np.empty(x.shape[1] // MX_BLOCK, f32)
    top_exponent = u32(top >> SHIFT)
    for row in range(len(x)):
        bits = load(x[row], scratch)
        for b in range(len(up)):
            amax = amax_of(bits[b * MX_BLOCK : (b + 1) * MX_BLOCK])
            exponent = max(u32(u32(amax + carry) >> SHIFT), u32(top_exponent - LEAST_EXPONENT))
            up[b] = float_of(u32(u32(u32(BIAS) + top_exponent - exponent) << SHIFT))  # 1 / the E8M0 scale
            down[b], most = f32(1) / up[b], max(most, amax)
        for b in range(len(up)):
            for i in range(b * MX_BLOCK, (b + 1) * MX_BLOCK):
                scaled = bits_of(float_of(bits[i]) * up[b])  # exact, or far below the least code
                values[row, i] = nearest_value(scaled, top, least_normal, to_magic) * down[b]
    return most


@helper
def nearest_value(bits: u32, top: u32, least_normal: u32, to_magic: u32) -> f32:
    """The value of the nearest code of a format: as `formats.nearest_e2m1` and its like find the code."""
    magnitude = min(u32(bits & MAGNITUDE), top)
    magic = float_of(u32(max(u32(magnitude & INF), least_normal) + to_magic))
    value = bits_of((float_of(magnitude) + magic) - magic)
    return float_of(u32(value | u32(bits & SIGN)))


@kernel
def _int4_rows(x: Bits, values: Float32) -> u32:
    scratch, most = np.empty(x.shape[1], u32), u32(0)
    for row in range(len(x)):
        bits = load(x[row], scratch)
        for start in range(0, len(bits), INT4_GROUP):
            stop = min(start + INT4_GROUP, len(bits))
            amax = amax_of(bits[start:stop])
            step, most = float_of(amax) / TOP_LEVEL, max(most, amax)
            step = f32(1) if step == 0 else step
            for i in range(start, stop):
                level = np.rint(float_of(bits[i]) / step)  # beyond 7 where the step is a rounded subnormal
                values[row, i] = max(-TOP_LEVEL, min(TOP_LEVEL, level)) * step
    return most


@helper
def amax_of(bits: Bits) -> u32:
    amax = u32(0)
    for i in range(len(bits)):
        amax = max(amax, u32(bits[i] & MAGNITUDE))
    return amax
