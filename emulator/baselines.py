"""What ARC is compared with, fast: the values of `arcquant_ref.baselines`, and the bytes of the 4/6 rule."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from arcquant_ref import checks
from arcquant_ref.baselines import INT4_GROUP, INT4_MAX, MX_BLOCK
from arcquant_ref.formats import BLOCK, E2M1, E4M3, E8M0, Codes, Float32, FloatFormat
from arcquant_ref.tensor import NVFP4Tensor

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
    nearest_e2m1,
    nearest_e4m3,
    u8,
    u32,
    value_e4m3,
)
from .jit import helper, kernel, over_rows
from .quantize import E2M1_MAX, LEAST_NORMAL, matrix_bits, refuse_non_finite, tensor_amax

ExponentRule = Callable[[FloatFormat], u32]
SHIFT = u32(MANTISSA)
LEAST_EXPONENT = u32(E8M0.bias)  # 2⁻¹²⁷
TOP_LEVEL = f32(INT4_MAX)
FOUR_OVER_SIX_MAX = E2M1_MAX * f32(256)  # not 448: a block scale may grow by half
GROWS = E2M1_MAX / f32(4)  # amax becomes 4 and not 6
MINUS_ZERO, NOT_FINITE = u8(2**E2M1.magnitude_bits), u8(0xB)  # codes for want of a clamp
EIGHT, ROUNDS_TO_EIGHT = u32(f32(8).view(u32)), u32((E2M1_MAX + f32(1)).view(u32))


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


def four_over_six(x: ArrayLike, tensor_scale: float | np.float32 | None = None) -> NVFP4Tensor:
    """(M, K) → NVFP4 by the 4/6 rule: a block's largest element becomes 6 or 4 steps, whichever errs less.

    The bytes of the recipe "fouroversix (4/6)" (docs/recipes.md). Its A is the amax of x, at least
    1536 · 2⁻¹²⁶, and the tensor scale A / 1536; with a static tensor scale A is 1536 times it. Nothing is
    clamped, as there: an element of 7 steps or more, which an amax beyond 1.9 A makes, becomes code 8,
    that is −0. Dtypes and errors as in `quantize`; ValueError also for a static A beyond float32.

    >>> x = np.float32([[3, 4] * 8, [4, 6] + [0] * 14])
    >>> q = four_over_six(x, tensor_scale=1)
    >>> q.codes[:, :2].tolist(), q.block_scales[:, 0]
    ([[5, 6], [6, 7]], array([56, 56], dtype=uint8))
    """
    bits = matrix_bits("x", x)
    tensor_scale, amax = _scale_and_amax(x, bits, tensor_scale)
    rows, k = bits.shape
    codes, block_scales = np.empty((rows, k), u8), np.empty((rows, k // BLOCK), u8)

    def task(start: int, stop: int) -> u32:
        part = slice(start, stop)
        return _four_over_six_rows(bits[part], amax, codes[part], block_scales[part])

    refuse_non_finite("x", x, max(over_rows(task, rows)))
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=tensor_scale)


def _scale_and_amax(x: ArrayLike, bits: Bits, tensor_scale: float | np.float32 | None) -> tuple[f32, f32]:
    """The tensor scale and what the recipe calls A. Neither always follows from the other: each rounds."""
    if tensor_scale is not None:
        scale = checks.tensor_scale(tensor_scale)
        return scale, checks.in_float32("tensor_scale", scale, float(FOUR_OVER_SIX_MAX))
    amax = f32(tensor_amax("x", x, bits).view(f32)) or FOUR_OVER_SIX_MAX  # zeros: the tensor scale is 1
    amax = max(amax, FOUR_OVER_SIX_MAX * LEAST_NORMAL)
    return amax / FOUR_OVER_SIX_MAX, amax


def _mx(x: ArrayLike, fmt: FloatFormat, exponent_rule: ExponentRule) -> Float32:
    bits = bits_in("x", checks.matrix_shape("x", x, MX_BLOCK))
    values = np.empty(bits.shape, f32)
    carry, top = exponent_rule(fmt), _bits_of_largest(fmt)
    least_normal, to_magic = _least_normal(fmt), _to_magic(fmt)

    def task(start: int, stop: int) -> u32:
        return _mx_rows(bits[start:stop], carry, top, least_normal, to_magic, values[start:stop])

    refuse_non_finite("x", x, max(over_rows(task, len(bits))))
    return values


def _bits_of_largest(fmt: FloatFormat) -> u32:
    return u32(f32(largest(fmt)).view(u32))


def _least_normal(fmt: FloatFormat) -> u32:
    return u32((BIAS + 1 - fmt.bias) << MANTISSA)


def _to_magic(fmt: FloatFormat) -> u32:
    return u32((MANTISSA - fmt.mantissa_bits) << MANTISSA)


LEAST_NORMAL_E2M1, MAGIC_E2M1 = _least_normal(E2M1), _to_magic(E2M1)


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


@kernel
def _four_over_six_rows(x: Bits, tensor_amax: f32, codes: Codes, block_scales: Codes) -> u32:
    """The order of operations is the recipe's, that of the sums PyTorch's on x86-64."""
    k, blocks, most = x.shape[1], block_scales.shape[1], u32(0)
    scratch, squares6, squares4 = np.empty(k, u32), np.empty(k, f32), np.empty(k, f32)
    v, inverse = np.empty(blocks, f32), np.empty(blocks, f32)
    encode = FOUR_OVER_SIX_MAX / tensor_amax
    decode = f32(1) / encode
    for row in range(len(x)):
        bits = load(x[row], scratch)
        for b in range(blocks):
            amax = amax_of(bits[b * BLOCK : (b + 1) * BLOCK])
            v[b], most = float_of(amax) / E2M1_MAX * encode, max(most, amax)
        squared_errors(bits, v, f32(1), decode, tensor_amax, squares6)
        squared_errors(bits, v, GROWS, decode, tensor_amax, squares4)
        for b in range(blocks):
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            smaller = sum_of(squares4[part]) < sum_of(squares6[part])  # a tie stays with 6
            block_scales[row, b] = nearest_e4m3(bits_of(v[b] * (GROWS if smaller else f32(1))))
            inverse[b] = inverse_step(value_e4m3(block_scales[row, b]), decode)
        for b in range(blocks):
            for i in range(b * BLOCK, (b + 1) * BLOCK):
                codes[row, i] = unclamped_code(float_of(bits[i]) * inverse[b])
    return most


@helper
def squared_errors(
    bits: Bits, v: Float32, grows: f32, decode: f32, tensor_amax: f32, squares: Float32
) -> None:
    """Of each element of a row, if the block scales are v · grows."""
    for b in range(len(v)):
        scale = value_e4m3(nearest_e4m3(bits_of(v[b] * grows)))
        inverse = inverse_step(scale, decode)
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            x = float_of(bits[i])
            error = unclamped_value(x * inverse) * scale * tensor_amax / FOUR_OVER_SIX_MAX - x
            squares[i] = error * error


@helper
def inverse_step(scale: f32, decode: f32) -> f32:
    return f32(0) if scale == 0 else f32(1) / (decode * scale)


@helper
def unclamped_value(scaled: f32) -> f32:
    """The nearest of 0 … 6 and 8, which is one though it has no code. NaN is 8 too, which decides nothing:
    it comes from an infinite inverse, that is from a step so small that all squares are zero."""
    return nearest_value(bits_of(scaled), EIGHT, LEAST_NORMAL_E2M1, MAGIC_E2M1)


@helper
def unclamped_code(scaled: f32) -> u8:
    bits = bits_of(scaled)
    magnitude, nearest = u32(bits & MAGNITUDE), nearest_e2m1(bits)
    code = nearest if nearest != MINUS_ZERO or scaled < 0 else u8(0)
    code = MINUS_ZERO if magnitude >= ROUNDS_TO_EIGHT else code
    return NOT_FINITE if magnitude >= INF else code


@helper
def sum_of(squares: Float32) -> f32:
    """The halves are added, then their eight sums one by one."""
    total = squares[0] + squares[BLOCK // 2]
    for i in range(1, BLOCK // 2):
        total += squares[i] + squares[i + BLOCK // 2]
    return total


@helper
def amax_of(bits: Bits) -> u32:
    amax = u32(0)
    for i in range(len(bits)):
        amax = max(amax, u32(bits[i] & MAGNITUDE))
    return amax
