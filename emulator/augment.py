"""ARC, one pass over each row: gather the channels, quantize, quantize the last S residuals, interleave."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, Codes, Float32
from arcquant_ref.select import Selection
from arcquant_ref.tensor import NVFP4Tensor

from .formats import (
    INF,
    MAGNITUDE,
    Bits,
    bits_of,
    f32,
    f64,
    float_of,
    load,
    u8,
    u32,
    value_e2m1,
    value_e4m3,
    widen,
)
from .jit import helper, kernel, over_rows
from .quantize import matrix_bits, quantize_blocks, refuse_non_finite, tensor_scale_for


def augment_activations(
    x: ArrayLike, selection: Selection, tensor_scale: float | np.float32 | None = None
) -> NVFP4Tensor:
    """(M, K) activations → (M, K + S): the bytes of `arcquant_ref.augment_activations`, and its errors.

    Dtypes as in `quantize`. Source: arXiv 2601.07475; layout and roundings: docs/spec.md, section 4.
    """
    return _augment("x", x, selection, tensor_scale, _activation_rows)


def augment_weights(w: ArrayLike, selection: Selection) -> NVFP4Tensor:
    """(N, K) weights → (N, K + S): the bytes of `arcquant_ref.augment_weights`, and its errors."""
    return _augment("w", w, selection, None, _weight_rows)


def rmsnorm_augment_activations(
    x: ArrayLike,
    weight: ArrayLike,
    epsilon: float,
    selection: Selection,
    tensor_scale: float | np.float32,
) -> NVFP4Tensor:
    """(M, K) → (M, K + S): the bytes of `arcquant_ref.rmsnorm_augment_activations`, and its errors."""
    bits = matrix_bits("x", x)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits("x", bits.shape[1], selection.K)
    factors, scale = checks.norm_weight(weight, selection.K), checks.tensor_scale(tensor_scale)
    shape = len(bits), selection.K + selection.num_residual
    codes, block_scales = np.empty(shape, np.uint8), np.empty((shape[0], shape[1] // BLOCK), np.uint8)
    order, finite, added = selection.order.astype(u32), np.empty(len(bits), np.bool_), checks.epsilon(epsilon)

    def task(start: int, stop: int) -> u32:
        part = slice(start, stop)
        y = np.empty((stop - start, selection.K), f32)
        most = _rmsnorm_rows(bits[part], factors, added, y, finite[part])
        _activation_rows(y.view(u32), order, scale, codes[part], block_scales[part])
        return most

    refuse_non_finite("x", x, max(over_rows(task, len(bits))))
    checks.normalized_rows(finite)
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


def _augment(
    name: str,
    x: ArrayLike,
    selection: Selection,
    tensor_scale: float | np.float32 | None,
    fill_rows: Callable,
) -> NVFP4Tensor:
    bits = matrix_bits(name, x)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits(name, bits.shape[1], selection.K)
    scale = tensor_scale_for(name, x, bits, tensor_scale)
    shape = len(bits), selection.K + selection.num_residual
    codes, block_scales = np.empty(shape, np.uint8), np.empty((shape[0], shape[1] // BLOCK), np.uint8)
    order = selection.order.astype(u32)  # unsigned: a negative index would cost a test

    def task(start: int, stop: int) -> u32:
        return fill_rows(bits[start:stop], order, scale, codes[start:stop], block_scales[start:stop])

    refuse_non_finite(name, x, max(over_rows(task, len(bits))))
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


@kernel
def _activation_rows(x: Bits, order: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    k, s = len(order), codes.shape[1] - len(order)
    first = (k - s) // BLOCK  # block with a residual: P₀ R₀ P₁ R₁ … from here on
    scratch, bits, block = np.empty(k, u32), np.empty(k, u32), np.empty(k // BLOCK, f32)
    primary, primary_scales = np.empty(s, u8), np.empty(s // BLOCK, u8)
    appended, appended_scales = np.empty(s, u8), np.empty(s // BLOCK, u8)
    values, residual, most = np.empty(s, f32), np.empty(s, u32), u32(0)
    for row in range(len(x)):
        gather(x[row], order, scratch, bits)
        plain, outliers, c, scales = bits[: k - s], bits[k - s :], codes[row], block_scales[row]
        most = max(most, quantize_blocks(plain, tensor_scale, c[: k - s], scales[:first], block))
        most = max(most, quantize_blocks(outliers, tensor_scale, primary, primary_scales, block))
        residual_of(outliers, primary, primary_scales, tensor_scale, values, residual)
        quantize_blocks(residual, tensor_scale, appended, appended_scales, block)
        every_other(primary, primary_scales, c, scales, first)
        every_other(appended, appended_scales, c, scales, first + 1)
    return most


@kernel
def _weight_rows(w: Bits, order: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    k, s = len(order), codes.shape[1] - len(order)
    first = (k - s) // BLOCK
    scratch, bits, block = np.empty(k, u32), np.empty(k, u32), np.empty(k // BLOCK, f32)
    primary, primary_scales = np.empty(s, u8), np.empty(s // BLOCK, u8)
    for row in range(len(w)):
        gather(w[row], order, scratch, bits)
        plain, outliers, c, scales = bits[: k - s], bits[k - s :], codes[row], block_scales[row]
        quantize_blocks(plain, tensor_scale, c[: k - s], scales[:first], block)
        quantize_blocks(outliers, tensor_scale, primary, primary_scales, block)
        every_other(primary, primary_scales, c, scales, first)
        every_other(primary, primary_scales, c, scales, first + 1)
    return u32(0)  # all of w was looked at for its tensor scale


LANES = 256


@kernel
def _rmsnorm_rows(x: Bits, weight: Float32, epsilon: f32, y: Float32, finite: NDArray[np.bool_]) -> u32:
    """Normalizes rows of x into y, returns the bits of the largest |x|. The order is normative."""
    scratch, lanes, most = np.empty(x.shape[1], u32), np.empty(LANES, f32), u32(0)
    for row in range(len(x)):
        bits = load(x[row], scratch)
        lanes[:] = f32(0)
        for k in range(len(bits)):
            value, most = float_of(bits[k]), max(most, u32(bits[k] & MAGNITUDE))
            lanes[k % LANES] += f32(value * value)
        stride = LANES // 2
        while stride > 0:
            for t in range(stride):
                lanes[t] += lanes[t + stride]
            stride //= 2
        mean = f32(lanes[0] / f32(len(bits)))
        r = f32(f32(1) / f32(np.sqrt(f32(mean + epsilon))))
        finite[row] = mean < float_of(INF)
        for k in range(len(bits)):
            y[row, k] = f32(f32(float_of(bits[k]) * r) * weight[k])
            finite[row] &= u32(bits_of(y[row, k]) & MAGNITUDE) < INF
    return most


@helper
def gather(row: Bits, order: Bits, scratch: Bits, bits: Bits) -> None:
    widen(row, scratch)  # from memory in sequence: jumping about there would wait for every cache line
    for i in range(len(order)):
        bits[i] = scratch[order[i]]


@helper
def residual_of(
    bits: Bits, codes: Codes, block_scales: Codes, tensor_scale: f32, values: Float32, residual: Bits
) -> None:
    """Numbers minus the exact values of their codes, each rounded once to float32, as one FMA does."""
    for i in range(len(codes)):  # a loop of its own: it vectorizes, as part of the next it does not
        values[i] = value_e2m1(codes[i])
    for b in range(len(block_scales)):
        scale = value_e4m3(block_scales[b])
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            values[i] *= scale  # 6 significant bits; 30 with the tensor scale
    for i in range(len(bits)):
        value = f64(values[i]) * f64(tensor_scale)
        residual[i] = bits_of(difference(f64(float_of(bits[i])), value))


@helper
def difference(a: f64, b: f64) -> f32:
    """a − b rounded once to float32: first to float64 with an odd last bit where that rounds (the error comes
    from Knuth's TwoSum), so that the second rounding sees on which side it is (Boldo and Melquiond 2008). The
    reference proves that for these a and b plain float64 would do; this needs no such argument."""
    s = a - b
    t = s - a
    error = (a - (s - t)) - (b + t)
    bits, error_bits = f64(s).view(np.int64), f64(error).view(np.int64)
    towards_zero = bits - ((bits ^ error_bits) < 0)
    return f32(np.int64(bits if error == 0 else towards_zero | 1).view(f64))


@helper
def every_other(
    codes: Codes, block_scales: Codes, all_codes: Codes, all_block_scales: Codes, first: int
) -> None:
    """Write blocks to the places first, first + 2, …"""
    for b in range(len(block_scales)):
        at = first + 2 * b
        all_block_scales[at] = block_scales[b]
        for i in range(BLOCK):
            all_codes[at * BLOCK + i] = codes[b * BLOCK + i]
