"""ARC, one pass over each row: gather the channels, quantize, quantize the last S residuals, interleave."""

from collections.abc import Callable
from typing import Any

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
    bits_in,
    bits_of,
    f32,
    float_of,
    load,
    nearest_e2m1,
    u8,
    u32,
    value_e2m1,
    value_e4m3,
)
from .jit import fma, helper, kernel, over_rows, prefetch
from .quantize import (
    matrix_bits,
    quantize,
    quantize_blocks,
    quantize_weighted,
    refuse_non_finite,
    scale_blocks,
    tensor_scale_for,
)


def augment_activations(
    x: ArrayLike, selection: Selection, tensor_scale: float | np.float32 | None = None
) -> NVFP4Tensor:
    """(M, K) activations → (M, K'): the bytes of `arcquant_ref.augment_activations`, and its errors.

    Dtypes as in `quantize`. Source: arXiv 2601.07475; layout and roundings: docs/spec.md, section 4.
    """
    return _augment("x", x, selection, tensor_scale, _activation_rows)


def augment_weights(w: ArrayLike, selection: Selection, energy: ArrayLike | None = None) -> NVFP4Tensor:
    """(N, K) weights → (N, K'): the bytes of `arcquant_ref.augment_weights`, and its errors."""
    w = checks.matrix_shape("w", w, BLOCK)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    if energy is None and len(selection.weight_channels) == 0:
        return _augment("w", w, selection, None, _weight_rows)
    checks.selection_fits("w", w.shape[1], selection.K)
    scale = tensor_scale_for("w", w, bits_in("w", w), None)  # before the channels move: errors name them
    w, order, repaired = w[:, selection.order], selection.order, selection.weight_channels
    if energy is not None:
        energy = checks.channel_energy(energy, selection.K)
    primary = quantize(w, scale) if energy is None else quantize_weighted(w, energy[order], scale)
    s = selection.num_residual
    codes, block_scales = primary.codes, primary.block_scales
    if len(repaired):
        r = _residual(w, primary)[:, np.argsort(order)[repaired]]
        second = quantize(r, scale) if energy is None else quantize_weighted(r, energy[repaired], scale)
        codes = np.insert(codes, [selection.K - s], second.codes, axis=1)
        block_scales = np.insert(block_scales, [(selection.K - s) // BLOCK], second.block_scales, axis=1)
    codes, block_scales = _last_twice(codes, s, BLOCK), _last_twice(block_scales, s // BLOCK, 1)
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


def _last_twice(columns: Codes, s: int, width: int) -> Codes:
    """The last s columns as pairs P₀ P₀ P₁ P₁ … of `width` columns."""
    plain = columns.shape[1] - s
    last = columns[:, plain:].reshape(len(columns), -1, 1, width)
    return np.concatenate([columns[:, :plain], np.repeat(last, 2, axis=2).reshape(len(columns), -1)], axis=1)


def _residual(w: NDArray[Any], q: NVFP4Tensor) -> Float32:
    """w − value(q), rounded once."""
    bits, r = bits_in("w", w), np.empty(w.shape, f32)

    def task(start: int, stop: int) -> None:
        part = slice(start, stop)
        _residual_rows(bits[part], q.codes[part], q.block_scales[part], q.tensor_scale, r[part].view(u32))

    over_rows(task, len(r))
    return r


@kernel
def _residual_rows(w: Bits, codes: Codes, block_scales: Codes, tensor_scale: f32, residual: Bits) -> None:
    scratch, scale = np.empty(w.shape[1], u32), np.empty(block_scales.shape[1], f32)
    for row in range(len(w)):
        bits = load(w[row], scratch)
        residual_of(bits, codes[row], block_scales[row], tensor_scale, scale, residual[row])


def rmsnorm_augment_activations(
    x: ArrayLike,
    weight: ArrayLike,
    epsilon: float,
    selection: Selection,
    tensor_scale: float | np.float32,
) -> NVFP4Tensor:
    """(M, K) → (M, K'): the bytes of `arcquant_ref.rmsnorm_augment_activations`, and its errors."""
    bits = matrix_bits("x", x)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits("x", bits.shape[1], selection.K)
    factors, scale = checks.norm_weight(weight, selection.K), checks.tensor_scale(tensor_scale)
    shape = len(bits), selection.augmented_K
    codes, block_scales = np.empty(shape, np.uint8), np.empty((shape[0], shape[1] // BLOCK), np.uint8)
    order, finite, added = (
        selection.columns.astype(u32),
        np.empty(len(bits), np.bool_),
        checks.epsilon(epsilon),
    )

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
    shape = len(bits), selection.augmented_K
    codes, block_scales = np.empty(shape, np.uint8), np.empty((shape[0], shape[1] // BLOCK), np.uint8)
    order = selection.columns.astype(u32)  # unsigned: a negative index would cost a test

    def task(start: int, stop: int) -> u32:
        return fill_rows(bits[start:stop], order, scale, codes[start:stop], block_scales[start:stop])

    refuse_non_finite(name, x, max(over_rows(task, len(bits))))
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


@kernel
def _activation_rows(x: Bits, order: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    k, s, last = len(order), codes.shape[1] - len(order), len(x) - 1
    first, words, step = (k - s) // BLOCK, codes.view(np.uint64), np.empty(k // BLOCK, f32)
    scratch, bits, fours = np.empty(x.shape[1], u32), np.empty(k, u32), np.empty(k // 4, u32)
    outliers, residual, scale = np.empty(s, u32), np.empty(s, u32), np.empty(s // BLOCK, f32)
    appended, appended_scales, most = np.empty(s, u8), np.empty(s // BLOCK, u8), u32(0)
    tail, appended_words, few = bits[k - s :], appended.view(np.uint64), fours[: s // 4]
    gather(load(x[0], scratch), order, bits)
    for row in range(len(x)):
        c, scales = codes[row], block_scales[row]
        most = max(most, scale_blocks(bits, tensor_scale, scales, step, fours))
        for i in range(s):
            outliers[i] = tail[i]
        following = load(x[min(row + 1, last)], scratch)
        encode_and_gather(bits, step, c, following, order, x[min(row + 2, last)])
        residual_of(outliers, c[k - s :], scales[first:], tensor_scale, scale, residual)
        quantize_blocks(residual, tensor_scale, appended, appended_scales, scale, few)
        interleave(words[row], scales, appended_words, appended_scales)
    return most


@kernel
def _weight_rows(w: Bits, order: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    k, s, last = len(order), codes.shape[1] - len(order), len(w) - 1
    first, words, step = (k - s) // BLOCK, codes.view(np.uint64), np.empty(k // BLOCK, f32)
    scratch, bits, fours = np.empty(k, u32), np.empty(k, u32), np.empty(k // 4, u32)
    gather(load(w[0], scratch), order, bits)
    for row in range(len(w)):
        scales = block_scales[row]
        scale_blocks(bits, tensor_scale, scales, step, fours)
        following = load(w[min(row + 1, last)], scratch)
        encode_and_gather(bits, step, codes[row], following, order, w[min(row + 2, last)])
        interleave(words[row], scales, words[row, 2 * first :], scales[first : k // BLOCK])
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
def gather(row: Bits, order: Bits, bits: Bits) -> None:
    for i in range(len(order)):
        bits[i] = row[order[i]]


@helper
def encode_and_gather(
    bits: Bits, step: Float32, codes: Codes, following: Bits, order: Bits, after_that: Bits
) -> None:
    """The codes of one row, whose bits give way to the next one's: the processor gathers while it divides.
    The row after that is fetched in sequence: a gather from memory would wait for every cache line."""
    for b in range(len(step)):
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            codes[i] = nearest_e2m1(bits_of(float_of(bits[i]) / step[b]))
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            bits[i] = following[order[i]]
        prefetch(after_that, b * BLOCK)


@helper
def residual_of(
    bits: Bits, codes: Codes, block_scales: Codes, tensor_scale: f32, scale: Float32, residual: Bits
) -> None:
    """Numbers minus the values of their codes. The one rounding of the FMA is the normative one: the value
    code · scale has 6 significant bits, is exact in float32, and stays exact times the tensor scale."""
    for b in range(len(scale)):  # scratch, so that the next loop vectorizes
        scale[b] = value_e4m3(block_scales[b])
    for b in range(len(scale)):
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            value = value_e2m1(codes[i]) * scale[b]
            residual[i] = bits_of(fma(-value, tensor_scale, float_of(bits[i])))


@helper
def interleave(words: Bits, block_scales: Codes, appended: Bits, appended_scales: Codes) -> None:
    """P₀ P₁ … at the end of the first K places → P₀ R₀ P₁ R₁ … at the end of all K + S, from the right:
    nothing is overwritten before it has moved. A word holds eight codes."""
    first = len(block_scales) - 2 * len(appended_scales)
    for b in range(len(appended_scales) - 1, -1, -1):
        source, at = first + b, first + 2 * b
        block_scales[at], block_scales[at + 1] = block_scales[source], appended_scales[b]
        for half in range(2):
            moved, new = words[2 * source + half], appended[2 * b + half]
            words[2 * at + half], words[2 * at + 2 + half] = moved, new
