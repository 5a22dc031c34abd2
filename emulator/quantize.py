"""quantize: the normative order of operations (docs/spec.md, section 3), and back."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, E2M1, E4M3, Codes, Float32
from arcquant_ref.tensor import NVFP4Tensor

from .formats import (
    INF,
    MAGNITUDE,
    Bits,
    bits_in,
    bits_of,
    f32,
    float_of,
    largest,
    largest_code,
    load,
    nearest_e2m1,
    nearest_e4m3,
    u8,
    u32,
    value_e2m1,
    value_e4m3,
)
from .jit import helper, kernel, over_rows

E2M1_MAX = f32(largest(E2M1))
TENSOR_MAX = f32(largest(E2M1) * largest(E4M3))
LEAST_SCALE = f32(2.0 ** (1 - E4M3.bias - E4M3.mantissa_bits))
LEAST_NORMAL = f32(2.0**-126)
FOURS = BLOCK // 4  # in a block
MOST_STEPS, FEWEST_STEPS = f32(8), f32(7 / 2)  # amax / step in a search: saturating at 6; on 3 or 4


def quantize(x: ArrayLike, tensor_scale: float | np.float32 | None = None) -> NVFP4Tensor:
    """The (M, K) matrix as an NVFP4 tensor, blocks of 16 along K: the bytes of `arcquant_ref.quantize`.

    `x` is float32, float16, bfloat16 (of ml_dtypes, or its bits as uint16) or float64 (rounded once to
    float32: the only dtype that is copied whole). Raises as there.

    >>> quantize(np.float32([[0, 1, 2, 3, 4, 5, 6, -6] * 2]), tensor_scale=1).codes[0, :8]
    array([ 0,  2,  4,  5,  6,  6,  7, 15], dtype=uint8)
    """
    bits = matrix_bits("x", x)
    scale = tensor_scale_for("x", x, bits, tensor_scale)
    rows, k = bits.shape
    codes, block_scales = np.empty((rows, k), u8), np.empty((rows, k // BLOCK), u8)

    def task(start: int, stop: int) -> u32:
        return _quantize_rows(bits[start:stop], scale, codes[start:stop], block_scales[start:stop])

    refuse_non_finite("x", x, max(over_rows(task, rows)))
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


def quantize_weighted(
    w: ArrayLike, energy: ArrayLike, tensor_scale: float | np.float32 | None = None
) -> NVFP4Tensor:
    """(N, K) weights with searched block scales: the bytes of `arcquant_ref.quantize_weighted`, its errors.

    Dtypes as in `quantize`.
    """
    bits = matrix_bits("w", w)
    energy = checks.channel_energy(energy, bits.shape[1])
    scale = tensor_scale_for("w", w, bits, tensor_scale)
    rows, k = bits.shape
    codes, block_scales = np.empty((rows, k), u8), np.empty((rows, k // BLOCK), u8)

    def task(start: int, stop: int) -> u32:
        part = slice(start, stop)
        return _weighted_rows(bits[part], energy, scale, codes[part], block_scales[part])

    refuse_non_finite("w", w, max(over_rows(task, rows)))
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


def dequantize(q: NVFP4Tensor) -> Float32:
    """The (M, K) values of `q`, each rounded once to float32. Raises as `arcquant_ref.dequantize`."""
    checks.is_a("q", q, NVFP4Tensor, "quantize(x) makes one.")
    checks.scales_are_numbers("q.block_scales", q.block_scales, largest_code(E4M3) + 1)
    values = np.empty(q.shape, f32)

    def task(start: int, stop: int) -> None:
        part = slice(start, stop)
        _dequantize_rows(q.codes[part], q.block_scales[part], q.tensor_scale, values[part])

    over_rows(task, len(values))
    return values


def matrix_bits(name: str, x: ArrayLike) -> Bits:
    """(M, K) bits with K a multiple of 16. NaN and infinity pass here: the kernels meet them as they read."""
    return bits_in(name, checks.matrix_shape(name, x, BLOCK))


def refuse_non_finite(name: str, x: ArrayLike, amax: u32) -> None:
    """Raise what `arcquant_ref` raises if the bits of the largest |x| are those of infinity or NaN."""
    if amax >= INF:
        x = np.asarray(x)
        if x.dtype.name == "uint16":
            name, x = f"{name}.view(ml_dtypes.bfloat16)", (x.astype(u32) << 16).view(f32)
        checks.floats(name, x)


def tensor_scale_for(
    name: str, x: ArrayLike, bits: Bits, tensor_scale: float | np.float32 | None
) -> np.float32:
    """The caller's tensor scale, or the one that follows from all of x."""
    if tensor_scale is not None:
        return checks.tensor_scale(tensor_scale)
    return f32(_tensor_scale(tensor_amax(name, x, bits)))


def tensor_amax(name: str, x: ArrayLike, bits: Bits) -> u32:
    """The bits of the largest |x|."""
    amax = max(over_rows(lambda start, stop: _amax(bits[start:stop]), len(bits)))
    refuse_non_finite(name, x, amax)
    return u32(amax)


def pack(codes: ArrayLike) -> Codes:
    """(M, K) codes → (M, K/2) bytes, even k in the low nibble; raises as `arcquant_ref.layout.pack`.

    >>> pack(np.uint8([[1, 2, 3, 4]]))
    array([[33, 67]], dtype=uint8)
    """
    pairs = np.ascontiguousarray(checks.pairs_of_codes("codes", codes, E2M1.bits)).view("<u2")
    packed = np.empty(pairs.shape, u8)
    over_rows(lambda start, stop: _pack_rows(pairs[start:stop], packed[start:stop]), len(pairs))
    return packed


@kernel
def _pack_rows(pairs: NDArray[np.uint16], packed: Codes) -> None:
    for row in range(len(pairs)):
        for i in range(pairs.shape[1]):
            packed[row, i] = u8(pairs[row, i] | (pairs[row, i] >> 4))


@kernel
def _amax(x: Bits) -> u32:
    """The bits of the largest |x|, or of a NaN: as integers, magnitudes sort as the numbers do."""
    scratch, amax = np.empty(x.shape[1], u32), u32(0)
    for row in range(len(x)):
        bits = load(x[row], scratch)
        for i in range(len(bits)):
            amax = max(amax, u32(bits[i] & MAGNITUDE))
    return amax


@kernel
def _tensor_scale(amax: u32) -> f32:
    if amax == u32(0):
        return f32(1)
    return max(float_of(amax) / TENSOR_MAX, LEAST_NORMAL)


@kernel
def _quantize_rows(x: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    scratch, step = np.empty(x.shape[1], u32), np.empty(block_scales.shape[1], f32)
    fours = np.empty(x.shape[1] // 4, u32)
    most = u32(0)
    for row in range(len(x)):
        bits = load(x[row], scratch)
        most = max(most, quantize_blocks(bits, tensor_scale, codes[row], block_scales[row], step, fours))
    return most


@kernel
def _weighted_rows(
    w: Bits, energy: NDArray[np.float64], tensor_scale: f32, codes: Codes, block_scales: Codes
) -> u32:
    """Tries every E4M3 scale in a block's range. The order of the sums is normative."""
    scratch, tried, most = np.empty(w.shape[1], u32), np.empty(BLOCK, u8), u32(0)
    squares = np.empty(BLOCK, np.float64)
    for row in range(len(w)):
        bits = load(w[row], scratch)
        for b in range(block_scales.shape[1]):
            numbers, weights = bits[b * BLOCK : (b + 1) * BLOCK], energy[b * BLOCK : (b + 1) * BLOCK]
            amax = u32(0)
            for i in range(BLOCK):
                amax = max(amax, u32(numbers[i] & MAGNITUDE))
            most = max(most, amax)
            first = scale_code(amax, MOST_STEPS, tensor_scale)
            last = scale_code(amax, FEWEST_STEPS, tensor_scale)
            least = np.inf
            for code in range(first, last + 1):
                scale = value_e4m3(u8(code))
                step, exact = scale * tensor_scale, np.float64(scale) * np.float64(tensor_scale)
                for i in range(BLOCK):
                    x = float_of(numbers[i])
                    tried[i] = nearest_e2m1(bits_of(x / step))
                    difference = np.float64(x) - np.float64(value_e2m1(tried[i])) * exact
                    squares[i] = difference * difference * weights[i]
                error = np.float64(0)
                for i in range(BLOCK):
                    error += squares[i]
                if error < least or code == first:
                    least, block_scales[row, b] = error, u8(code)
                    for i in range(BLOCK):
                        codes[row, b * BLOCK + i] = tried[i]
    return most


@helper
def scale_code(amax: u32, steps: f32, tensor_scale: f32) -> u8:
    """The E4M3 code of the scale under which amax is this many steps."""
    return nearest_e4m3(bits_of(max(float_of(amax) / steps / tensor_scale, LEAST_SCALE)))


@kernel
def _dequantize_rows(codes: Codes, block_scales: Codes, tensor_scale: f32, values: Float32) -> None:
    for row in range(len(codes)):
        for b in range(block_scales.shape[1]):
            scale = value_e4m3(block_scales[row, b])
            for i in range(b * BLOCK, (b + 1) * BLOCK):
                exact = value_e2m1(codes[row, i]) * scale  # 6 significant bits
                values[row, i] = exact * tensor_scale


@helper
def quantize_blocks(
    bits: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes, step: Float32, fours: Bits
) -> u32:
    """Blocks of one row → their codes and block scales; returns the bits of the largest magnitude.

    `step` and `fours` are scratch, one number a block and one for four values. Loops of few lines vectorize.
    """
    most = scale_blocks(bits, tensor_scale, block_scales, step, fours)
    for b in range(len(step)):
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            codes[i] = nearest_e2m1(bits_of(float_of(bits[i]) / step[b]))
    return most


@helper
def scale_blocks(bits: Bits, tensor_scale: f32, block_scales: Codes, step: Float32, fours: Bits) -> u32:
    """The first half of `quantize_blocks`: block scales and the steps that follow from them."""
    most = u32(0)
    for four in range(len(fours)):  # in two loops: one over 16 becomes a gather, twice as slow
        amax = u32(0)
        for i in range(four * 4, (four + 1) * 4):
            amax = max(amax, u32(bits[i] & MAGNITUDE))
        fours[four] = amax
    for b in range(len(step)):
        amax = u32(0)
        for four in range(b * FOURS, (b + 1) * FOURS):
            amax = max(amax, fours[four])
        step[b], most = float_of(amax), max(most, amax)
    for b in range(len(step)):
        v = step[b] / E2M1_MAX / tensor_scale  # the order is normative
        block_scales[b] = nearest_e4m3(bits_of(max(v, LEAST_SCALE)))
        step[b] = value_e4m3(block_scales[b]) * tensor_scale
    return most
