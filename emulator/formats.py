"""float32 bit patterns ↔ E2M1 and E4M3 codes, without tables: shifts, masks and one addition that rounds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import E2M1, E4M3, Codes, Float32, FloatFormat

from .jit import helper, kernel, over_rows

f32 = np.float32
f64 = np.float64
u8 = np.uint8
u32 = np.uint32  # wrapped round every step: Numba widens the result of integer operations to 64 bits
Bits = NDArray[Any]  # uint32: of float32 · uint16: of bfloat16 · int16: of float16

MANTISSA, BIAS = 23, 127  # of float32
MAGNITUDE, SIGN = u32(0x7FFFFFFF), u32(0x80000000)
INF = u32(0x7F800000)
NAN = u32(0x7FFFFFFF)  # the NaN that NVIDIA hardware returns
E2M1_NAN, E4M3_NAN = u8(0x7), u8(0x7F)  # and what it converts a NaN to
PIECE = 4096  # so many values are widened to float32 at a time


@helper
def bits_of(x: f32) -> u32:
    return f32(x).view(u32)


@helper
def float_of(bits: u32) -> f32:
    return u32(bits).view(f32)


def largest_code(fmt: FloatFormat) -> int:
    return 2**fmt.magnitude_bits - 1 - fmt.nan_codes


def largest(fmt: FloatFormat) -> float:
    """6 for E2M1, 448 for E4M3."""
    exponent, mantissa = divmod(largest_code(fmt), 2**fmt.mantissa_bits)
    return (1 + mantissa / 2**fmt.mantissa_bits) * 2.0 ** (exponent - fmt.bias)


def _nearest(fmt: FloatFormat) -> Callable:
    """bits of a float32, not NaN → nearest code: ties to even, saturating, the sign of zero kept.

    2^(23 − mantissa_bits) times the power of two below x has a float32 ulp as wide as the codes lie apart
    there, so adding it rounds x to a code. Subnormal codes lie as far apart as those of the first binade.
    """
    shift = u32(MANTISSA - fmt.mantissa_bits)
    largest_bits = u32((largest_code(fmt) + ((BIAS - fmt.bias) << fmt.mantissa_bits)) << int(shift))
    least_normal = u32((BIAS + 1 - fmt.bias) << MANTISSA)
    to_magic = u32(int(shift) << MANTISSA)
    sign_shift, sign_bit = u32(31 - fmt.magnitude_bits), u32(2**fmt.magnitude_bits)

    @helper
    def nearest(bits: u32) -> u8:
        magnitude = min(u32(bits & MAGNITUDE), largest_bits)
        binade = max(u32(magnitude & INF), least_normal)
        magic = u32(binade + to_magic)
        steps = u32(bits_of(float_of(magnitude) + float_of(magic)) - magic)
        code = u32(steps + u32(u32(binade - least_normal) >> shift))
        return u8(code | u32(u32(bits >> sign_shift) & sign_bit))

    return nearest


def _value(fmt: FloatFormat) -> Callable:
    """code → value, float32: the fields moved to where float32 has them, the exponent rebiased. A subnormal
    is given the hidden one it lacks, which is then subtracted."""
    shift, sign_shift = u32(MANTISSA - fmt.mantissa_bits), u32(31 - fmt.magnitude_bits)
    magnitude_bits, hidden_one = u32(2**fmt.magnitude_bits - 1), u32(2**fmt.mantissa_bits)
    rebias, top = u32((BIAS - fmt.bias) << MANTISSA), u32(largest_code(fmt))
    least_normal = f32(2.0 ** (1 - fmt.bias))

    @helper
    def value(code: u8) -> f32:
        magnitude = u32(u32(code) & magnitude_bits)
        normal = magnitude >= hidden_one
        filled = u32(magnitude if normal else magnitude + hidden_one)
        x = float_of(u32(u32(filled << shift) + rebias)) - (f32(0) if normal else least_normal)
        bits = NAN if magnitude > top else bits_of(x)
        return float_of(u32(bits | u32(u32(u32(code) << sign_shift) & SIGN)))

    return value


nearest_e2m1, nearest_e4m3 = _nearest(E2M1), _nearest(E4M3)
value_e2m1, value_e4m3 = _value(E2M1), _value(E4M3)


def widen(row: Bits, bits: Bits) -> None:
    """Write the float32 bits of a row of float32, bfloat16 or float16 bits into `bits`."""
    raise NotImplementedError("only for compiled code: unset NUMBA_DISABLE_JIT")


def load(row: Bits, scratch: Bits) -> Bits:
    """The float32 bits of a row: the row itself if it is float32, else `scratch`, after `widen`."""
    raise NotImplementedError("only for compiled code: unset NUMBA_DISABLE_JIT")


@overload(widen)
def _widen(row: Bits, bits: Bits) -> Callable:  # gets the types of the arguments, returns what to compile
    to_float32: Any = {types.uint32: u32, types.uint16: _bits_of_bf16, types.int16: _bits_of_fp16}[row.dtype]

    def widened(row: Bits, bits: Bits) -> None:
        for i in range(len(row)):
            bits[i] = to_float32(row[i])

    return widened


@overload(load)
def _load(row: Bits, scratch: Bits) -> Callable:
    def itself(row: Bits, scratch: Bits) -> Bits:
        return row

    def widened(row: Bits, scratch: Bits) -> Bits:
        widen(row, scratch)
        return scratch

    return itself if row.dtype == types.uint32 else widened


@helper
def _bits_of_bf16(half: np.uint16) -> u32:
    return u32(u32(half) << u32(16))


@helper
def _bits_of_fp16(half: np.int16) -> u32:
    magnitude = u32(u32(u32(half) & u32(0x7FFF)) << u32(13))
    rebiased = bits_of(float_of(magnitude) * f32(2.0**112))  # exact; makes subnormals normal
    bits = u32(magnitude | INF) if magnitude >= u32(0x7C00 << 13) else rebiased
    return u32(bits | u32(u32(u32(half) << u32(16)) & SIGN))


def bits_in(name: str, x: ArrayLike) -> Bits:
    """`x` as bits, any shape: float32, float16 and bfloat16 (of ml_dtypes, or its bits as uint16) unchanged,
    float64 rounded once to float32. NaN and infinity pass. Raises TypeError or ValueError as `quantize`."""
    x = checks.float_array(name, x, (*checks.FLOAT_DTYPES, "uint16"))
    if x.dtype.name == "float64":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = x.astype(f32)
    as_bits: Any = {"float32": u32, "float16": np.int16}.get(x.dtype.name, np.uint16)
    return np.require(x, x.dtype.newbyteorder("="), "C").view(as_bits)


@kernel
def encode_e2m1_flat(x: Bits, codes: Codes) -> None:
    scratch = np.empty(PIECE, u32)
    for start in range(0, len(x), PIECE):
        piece, out = load(x[start : start + PIECE], scratch), codes[start : start + PIECE]
        for i in range(len(out)):
            out[i] = E2M1_NAN if u32(piece[i] & MAGNITUDE) > INF else nearest_e2m1(piece[i])


@kernel
def encode_e4m3_flat(x: Bits, codes: Codes) -> None:
    scratch = np.empty(PIECE, u32)
    for start in range(0, len(x), PIECE):
        piece, out = load(x[start : start + PIECE], scratch), codes[start : start + PIECE]
        for i in range(len(out)):
            out[i] = E4M3_NAN if u32(piece[i] & MAGNITUDE) > INF else nearest_e4m3(piece[i])


@kernel
def decode_e2m1_flat(codes: Codes, values: Float32) -> None:
    for i in range(len(codes)):
        values[i] = value_e2m1(codes[i])


@kernel
def decode_e4m3_flat(codes: Codes, values: Float32) -> None:
    for i in range(len(codes)):
        values[i] = value_e4m3(codes[i])


def _convert(function: Callable, x: NDArray[Any], dtype: type) -> NDArray[Any]:
    """An array like x, of this dtype, that `function` fills from flat parts of x, on all threads."""
    out: NDArray[Any] = np.empty(x.shape, dtype)
    source, target = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    over_rows(lambda start, stop: function(source[start:stop], target[start:stop]), x.size)
    return out


def encode_e2m1(x: ArrayLike) -> Codes:
    """Nearest E2M1 codes 0 … 15 of `x`, any shape; ties to even, ±inf and beyond saturate at ±6, −0 kept.

    NaN gives 0x7 (+6) whatever its sign, as PTX `cvt.rn.satfinite.e2m1x2.f32` does. `x` is float32, float16,
    bfloat16 (of ml_dtypes, or its bits as uint16) or float64 (rounded once to float32). Raises TypeError for
    another dtype, ValueError for an empty array.

    >>> encode_e2m1(np.float32([0.25, 0.75, -5, np.inf, np.nan]))
    array([ 0,  2, 14,  7,  7], dtype=uint8)
    """
    return _convert(encode_e2m1_flat, bits_in("x", x), u8)


def encode_e4m3(x: ArrayLike) -> Codes:
    """Nearest E4M3 codes of `x`, any shape; ties to even, ±inf and beyond saturate at ±448, −0 kept.

    NaN gives 0x7F whatever its sign, as PTX `cvt.rn.satfinite.e4m3x2.f32` does. Dtypes and errors as in
    `encode_e2m1`.

    >>> encode_e4m3(np.float32([1, 2**-9, -np.inf, np.nan]))
    array([ 56,   1, 254, 127], dtype=uint8)
    """
    return _convert(encode_e4m3_flat, bits_in("x", x), u8)


def decode_e2m1(codes: ArrayLike) -> Float32:
    """Values of E2M1 codes, any shape, float32. Raises TypeError unless uint8, ValueError above 15."""
    return _convert(decode_e2m1_flat, checks.codes("codes", codes, E2M1.bits), f32)


def decode_e4m3(codes: ArrayLike) -> Float32:
    """Values of E4M3 codes, any shape, float32; 0x7F and 0xFF are NaN. Raises TypeError unless uint8."""
    return _convert(decode_e4m3_flat, checks.codes("codes", codes, E4M3.bits), f32)
