"""One step of a tensor core, D = A·Bᵀ + C, to the last bit; docs/emulator.md says from which sources.

Products are exact, and so are the sums of each group of them. These and C are aligned to the largest exponent
among them, what lies below 2^−F of it is cut off, and the sum is cut off to float32. This page says it twice:
in integers, to be read (`nvfp4_in_integers`, `half_in_integers`), and in float64, to be fast (`aligned_sum`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, E2M1, E4M3, Codes, Float32, Float64

from .formats import (
    BIAS,
    E4M3_NAN,
    MAGNITUDE,
    MANTISSA,
    NAN,
    SIGN,
    Bits,
    bits_in,
    bits_of,
    f32,
    f64,
    float_of,
    u8,
    u32,
    value_e2m1,
    value_e4m3,
    widen,
)
from .jit import helper, kernel, over_rows

Ints = NDArray[np.signedinteger]


class TensorCore(NamedTuple):
    """How one kind of MMA adds. A term's exponent is the sum of its scales' or operands' exponents."""

    depth: int  # products in one step
    group: int  # of them, summed exactly before they are aligned
    fraction_bits: int  # F: bits kept below the largest exponent
    zero_exponent: int  # of C = 0, and of a group without a non-zero product


# Both from MMA-Sim (arXiv 2511.10909, release 2.1). HOPPER agrees with recordings of H100, H200 and B200.
# RTX_BLACKWELL has no public recording to agree with. That zeros do not raise the largest exponent is its
# least certain rule; their own cannot be seen: any below that of every float32 gives the same bits.
HOPPER = TensorCore(depth=16, group=1, fraction_bits=25, zero_exponent=-133)  # fp16 and bf16
RTX_BLACKWELL = TensorCore(depth=64, group=BLOCK, fraction_bits=35, zero_exponent=-139)  # mxf4nvf4

# Exponent and mantissa bits: of an element, of a block scale, of the formats of IEEE 754 and bfloat16
FP4, SCALE = (E2M1.exponent_bits, E2M1.mantissa_bits), (E4M3.exponent_bits, E4M3.mantissa_bits)
FP16, BF16, FP32 = (5, 10), (8, 7), (8, MANTISSA)
GROUP_UNIT = 2 * E2M1.mantissa_bits + 2 * E4M3.mantissa_bits  # a group is a multiple of 2^(exponent − 8)
UNSIGNED = u8(0x7F)  # UE4M3, the type of a scale, has no sign; all seven bits set are its NaN


def mma_m16n8k64(
    a_codes: ArrayLike, b_codes: ArrayLike, sfa: ArrayLike, sfb: ArrayLike, c: ArrayLike
) -> Float32:
    """D = A·Bᵀ + C, (16, 8) float32: one NVFP4 MMA of an RTX Blackwell GPU.

    a_codes (16, 64), b_codes (8, 64) uint8 E2M1 codes; sfa (16, 4), sfb (8, 4) uint8 E4M3 codes, one for each
    16 along K, their sign bit ignored as in UE4M3; c (16, 8) float32, any value. A NaN among the scales or in
    C gives 0x7FFFFFFF, C = ±inf stays. Raises TypeError for another dtype, ValueError for another shape or a
    code above 15. PTX: mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.
    e2m1.f32.ue4m3.

    >>> ones, scales = np.full((16, 64), 2, np.uint8), np.full((16, 4), 0x38, np.uint8)
    >>> mma_m16n8k64(ones, ones[:8], scales, scales[:8], np.full((16, 8), 2**-20, np.float32))[0, 0]
    np.float32(64.0)
    """
    shapes = {"a_codes": (16, 64), "b_codes": (8, 64), "sfa": (16, 4), "sfb": (8, 4)}
    operands = []
    for (name, shape), array in zip(shapes.items(), (a_codes, b_codes, sfa, sfb)):
        operands.append(checks.codes(name, array, E2M1.bits if "codes" in name else E4M3.bits))
        checks.has_shape(name, operands[-1].shape, shape)
    return nvfp4_warps(*(np.ascontiguousarray(x)[None] for x in (*operands, _accumulator(c))))[0]


def mma_m16n8k16(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> Float32:
    """D = A·Bᵀ + C, (16, 8) float32: one fp16 or bf16 MMA of a Hopper GPU.

    a (16, 16) and b (8, 16) are both float16 or both bfloat16 (of ml_dtypes, or its bits as uint16); c is
    (16, 8) float32. Any value is allowed; a NaN comes out as 0x7FFFFFFF. Raises TypeError for another dtype,
    ValueError for another shape. PTX: mma.sync.aligned.m16n8k16.row.col.f32.{f16.f16,bf16.bf16}.f32.
    """
    a_bits, b_bits = bits_in("a", a), bits_in("b", b)
    if a_bits.dtype != b_bits.dtype or a_bits.dtype == u32:
        raise TypeError(
            f"a has dtype {np.asarray(a).dtype} and b {np.asarray(b).dtype}; both must be float16 or both "
            f"bfloat16 (or its bits, uint16). Convert them, for example a.astype(np.float16)."
        )
    checks.has_shape("a", a_bits.shape, (16, 16))
    checks.has_shape("b", b_bits.shape, (8, 16))
    widths = FP16 if a_bits.dtype == np.int16 else BF16
    return half_warps(*(np.ascontiguousarray(x)[None] for x in (a_bits, b_bits, _accumulator(c))), widths)[0]


def _accumulator(c: ArrayLike) -> Float32:
    c = checks.float_array("c", c, ("float32",))
    checks.has_shape("c", c.shape, (16, 8))
    return c


@kernel
def nvfp4_in_integers(
    a_codes: Codes, b_codes: Codes, sfa: Codes, sfb: Codes, c: f32, core: TensorCore
) -> f32:
    """One output of `mma_m16n8k64`, the specification: 64 and 64 codes, 4 and 4 scale bytes, one C → D."""
    significand, fraction = np.zeros(5, np.int64), np.full(5, GROUP_UNIT)
    exponent = np.full(5, core.zero_exponent)
    special = 0.0
    for g in range(4):
        scale_a, scale_b = sfa[g] & UNSIGNED, sfb[g] & UNSIGNED
        if scale_a == E4M3_NAN or scale_b == E4M3_NAN:
            special = np.nan
        any_product = False
        for i in range(g * BLOCK, (g + 1) * BLOCK):
            (a, e_a), (b, e_b) = fields(a_codes[i], FP4), fields(b_codes[i], FP4)
            significand[g] += (a << e_a) * (b << e_b)  # in units of ½ · ½
            any_product = any_product or a * b != 0
        (m_a, e_a), (m_b, e_b) = fields(scale_a, SCALE), fields(scale_b, SCALE)
        significand[g] *= m_a * m_b  # ⅛ · ⅛
        if any_product and m_a * m_b != 0:  # even if the sum cancels
            exponent[g] = e_a + e_b
    return add_aligned(significand, fraction, exponent, special, c, core)


@kernel
def half_in_integers(a: Bits, b: Bits, c: f32, widths: tuple[int, int], core: TensorCore) -> f32:
    """One output of `mma_m16n8k16`, the specification: the bits of 16 and 16 operands, one C → D."""
    significand, fraction = np.zeros(core.depth + 1, np.int64), np.full(core.depth + 1, 2 * widths[1])
    exponent = np.full(core.depth + 1, core.zero_exponent)
    special = 0.0
    for i in range(core.depth):
        special += special_product(a[i], b[i], widths)
        (s_a, e_a), (s_b, e_b) = fields(a[i], widths), fields(b[i], widths)
        significand[i] = s_a * s_b
        if significand[i] != 0:
            exponent[i] = e_a + e_b
    return add_aligned(significand, fraction, exponent, special, c, core)


@helper
def add_aligned(
    significand: Ints, fraction: Ints, exponent: Ints, special: float, c: f32, core: TensorCore
) -> f32:
    """Terms significand · 2^(exponent − fraction), the last one to be C, → D. `special`: ±inf, NaN or 0."""
    if not np.isfinite(special + c):
        return float_of(NAN) if np.isnan(special + c) else f32(special + c)
    significand[-1], exponent_of_c = fields(bits_of(c), FP32)
    fraction[-1] = MANTISSA
    if c != 0:
        exponent[-1] = exponent_of_c
    top = exponent.max()
    total = 0
    for i in range(len(significand)):
        total += shifted(significand[i], core.fraction_bits - fraction[i] - (top - exponent[i]))
    return float32_toward_zero(total, top - core.fraction_bits)


@helper
def fields(code: np.integer, widths: tuple[int, int]) -> tuple[int, int]:
    """(significand, exponent) of a code: its value is significand · 2^(exponent − mantissa bits). `widths`
    are the exponent and mantissa bits of its format, such as SCALE or FP32. The significand is the mantissa
    as an integer, with its sign and, in front, the 1 that is not stored; a subnormal has no such 1, and the
    least exponent."""
    exponent_bits, mantissa_bits = widths
    bits = int(code)
    field = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    significand = (bits & ((1 << mantissa_bits) - 1)) + ((field > 0) << mantissa_bits)
    negative = (bits >> (exponent_bits + mantissa_bits)) & 1
    bias = (1 << (exponent_bits - 1)) - 1
    return (-significand if negative else significand), max(field, 1) - bias


@helper
def special_product(a: np.integer, b: np.integer, widths: tuple[int, int]) -> float:
    """IEEE's a · b where one of the two is infinite or NaN, else 0."""
    exponent_bits, mantissa_bits = widths
    product, finite = 1.0, True
    for code in (a, b):
        significand, exponent = fields(code, widths)
        value = float(significand)
        if exponent == 1 << (exponent_bits - 1):  # the exponent field is all ones
            finite = False
            value = np.inf * significand if abs(significand) == 1 << mantissa_bits else np.nan
        product *= value
    return 0.0 if finite else product


@helper
def shifted(integer: int, left: int) -> int:
    """integer · 2^left, truncated toward zero."""
    if left >= 0:
        return integer << left
    magnitude = abs(integer) >> min(-left, 63)
    return magnitude if integer >= 0 else -magnitude


@helper
def float32_toward_zero(integer: int, exponent: int) -> f32:
    """integer · 2^exponent truncated to float32. Subnormals are kept, zero is +0, overflow is ±inf."""
    if integer == 0:
        return f32(0)
    length = 0
    while abs(integer) >> length:
        length += 1
    binade = max(exponent + length - 1, 1 - BIAS)
    if binade > BIAS:
        return f32(np.inf if integer > 0 else -np.inf)
    kept = shifted(integer, exponent + MANTISSA - binade)  # in units of the last bit
    bits = ((binade - 1 + BIAS) << MANTISSA) + abs(kept)  # a hidden one in `kept` adds the missing 1
    return float_of(u32(bits | SIGN) if kept < 0 else u32(bits))


@helper
def aligned_sum(terms: Float64, exponents: Ints, c: f32, core: TensorCore) -> f32:
    """Exact terms, their exponents and C → D: `add_aligned` in float64, which holds every aligned sum, below
    2^50, exactly. Infinity and NaN among the terms or in C go the way of IEEE."""
    everything, top = f64(c), core.zero_exponent
    if c != 0:
        top = max(top, fields(bits_of(c), FP32)[1])
    for i in range(len(terms)):
        everything += terms[i]
        top = max(top, exponents[i])
    if not np.isfinite(everything):
        return float_of(NAN) if np.isnan(everything) else f32(everything)
    up, down = power_of_two(core.fraction_bits - top), power_of_two(top - core.fraction_bits)
    total = np.trunc(f64(c) * up)
    for i in range(len(terms)):
        total += np.trunc(terms[i] * up)
    return toward_zero(total * down)


@helper
def power_of_two(n: int) -> f64:
    return np.int64((n + 1023) << 52).view(f64)


@helper
def toward_zero(x: f64) -> f32:
    """Truncated to float32, −0 made +0. Normal numbers lose the 29 bits that float32 does not have."""
    if abs(x) < 2.0**-126:
        return f32(np.trunc(x * 2.0**149) * 2.0**-149 + 0.0)
    return f32(np.int64(f64(x).view(np.int64) & ~((1 << 29) - 1)).view(f64))


class Operand(NamedTuple):
    """Codes and block scales, decoded for steps of 64 along K, the last one filled up with zeros."""

    values: Float64  # (steps, rows, 64): e2m1 · e4m3, but 0 where the scale is NaN
    exponents: Ints  # (steps, rows, 4): of the block scales, or one of the two below


ALL_ZERO, HAS_NAN = -10_000, 10_000


def operand(codes: Codes, block_scales: Codes) -> Operand:
    """(rows, K) codes and (rows, K/16) scale bytes, decoded on all threads."""
    rows, steps = len(codes), -(-codes.shape[1] // RTX_BLACKWELL.depth)
    values = np.empty((steps, rows, RTX_BLACKWELL.depth))
    exponents = np.full((steps, rows, RTX_BLACKWELL.depth // RTX_BLACKWELL.group), ALL_ZERO, np.int32)
    values[-1] = 0  # what the last step has beyond K

    def task(start: int, stop: int) -> None:
        part = slice(start, stop)
        _decode(codes[part], block_scales[part], values[:, part], exponents[:, part])

    over_rows(task, rows)
    return Operand(values, exponents)


@kernel
def _decode(codes: Codes, block_scales: Codes, values: Float64, exponents: Ints) -> None:
    for row in range(len(codes)):
        for b in range(block_scales.shape[1]):
            scale = block_scales[row, b] & UNSIGNED
            factor = f32(0) if scale == E4M3_NAN else value_e4m3(scale)
            step, first, nonzero = b // 4, b % 4 * BLOCK, u32(0)
            for i in range(BLOCK):
                value = value_e2m1(codes[row, b * BLOCK + i]) * factor  # 6 significant bits
                values[step, row, first + i] = value
                nonzero |= u32(bits_of(value) & MAGNITUDE)
            if scale == E4M3_NAN:
                exponents[step, row, b % 4] = HAS_NAN
            elif nonzero != 0:
                exponents[step, row, b % 4] = fields(scale, SCALE)[1]


def group_dots(a: Float64, b: Float64) -> Float64:
    """(M, 64) and (N, 64) values → (4, M, N) sums of 16 products each: multiples of 2^-20 that float64 holds
    exactly, so that the order in which BLAS adds cannot matter."""
    of_a, of_b = (x.reshape(len(x), -1, BLOCK).transpose(1, 0, 2) for x in (a, b))
    return np.matmul(of_a, of_b.transpose(0, 2, 1))


def add_groups(
    a: Float64, b: Float64, exponents_a: Ints, exponents_b: Ints, rows: Ints, acc: Float64
) -> None:
    """One NVFP4 step, in place, for some rows of the (M, N) acc; a, b (M or N, 64), exponents (M or N, 4)."""
    products = group_dots(np.abs(a[rows]), np.abs(b))  # 0 where a group has no product, not where it cancels
    _add_groups(group_dots(a[rows], b), products, exponents_a, exponents_b, rows, acc)


@kernel
def _add_groups(
    dots: Float64, products: Float64, exponents_a: Ints, exponents_b: Ints, rows: Ints, acc: Float64
) -> None:
    terms, exponents = np.empty(4), np.empty(4, np.int64)
    for r in range(len(rows)):
        m = rows[r]
        for n in range(acc.shape[1]):
            for g in range(4):
                terms[g], exponents[g] = dots[g, r, n], RTX_BLACKWELL.zero_exponent
                if exponents_a[m, g] == HAS_NAN or exponents_b[n, g] == HAS_NAN:
                    terms[g] = np.nan
                elif products[g, r, n] != 0:
                    exponents[g] = exponents_a[m, g] + exponents_b[n, g]
            acc[m, n] = aligned_sum(terms, exponents, f32(acc[m, n]), RTX_BLACKWELL)


@kernel
def nvfp4_warps(a_codes: Codes, b_codes: Codes, sfa: Codes, sfb: Codes, c: Float32) -> Float32:
    """`mma_m16n8k64` for many warps: arrays as there with one more axis in front, unchecked."""
    d, rows = np.empty_like(c), np.arange(16)
    a, b = np.empty((1, 16, 64)), np.empty((1, 8, 64))
    of_a, of_b = np.empty((1, 16, 4), np.int64), np.empty((1, 8, 4), np.int64)
    dots, products, acc = np.empty((4, 16, 8)), np.empty((4, 16, 8)), np.empty((16, 8))
    for w in range(len(c)):
        of_a[:], of_b[:], dots[:], products[:] = ALL_ZERO, ALL_ZERO, 0, 0
        _decode(a_codes[w], sfa[w], a, of_a)
        _decode(b_codes[w], sfb[w], b, of_b)
        for m in range(16):
            for k in range(64):
                for n in range(8):
                    product = a[0, m, k] * b[0, n, k]
                    dots[k // BLOCK, m, n] += product
                    products[k // BLOCK, m, n] += abs(product)
        acc[:] = c[w]
        _add_groups(dots, products, of_a[0], of_b[0], rows, acc)
        d[w] = acc
    return d


@kernel
def half_warps(a: Bits, b: Bits, c: Float32, widths: tuple[int, int]) -> Float32:
    """`mma_m16n8k16` for many warps: bits as there with one more axis in front, unchecked."""
    d = np.empty_like(c)
    x, y = np.empty((16, 16)), np.empty((8, 16))
    of_x, of_y = np.empty((16, 16), np.int64), np.empty((8, 16), np.int64)
    terms, exponents = np.empty(16), np.empty(16, np.int64)
    for w in range(len(c)):
        _decode_half(a[w], widths, x, of_x)
        _decode_half(b[w], widths, y, of_y)
        for m in range(16):
            for n in range(8):
                for i in range(16):
                    terms[i], exponents[i] = x[m, i] * y[n, i], HOPPER.zero_exponent
                    if terms[i] != 0:
                        exponents[i] = of_x[m, i] + of_y[n, i]
                d[w, m, n] = aligned_sum(terms, exponents, c[w, m, n], HOPPER)
    return d


@helper
def _decode_half(bits: Bits, widths: tuple[int, int], values: Float64, exponents: Ints) -> None:
    wide = np.empty(bits.shape[1], u32)
    for row in range(len(bits)):
        widen(bits[row], wide)
        for i in range(bits.shape[1]):
            values[row, i], exponents[row, i] = float_of(wide[i]), fields(bits[row, i], widths)[1]
