"""ARC, one pass over each row: gather the channels, quantize, quantize the last S residuals, interleave."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, Codes, Float32
from arcquant_ref.select import Selection
from arcquant_ref.tensor import NVFP4Tensor

from .formats import Bits, bits_of, f32, f64, float_of, u32, value_e2m1, value_e4m3, widen
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
    bits, primary, primary_scales, block = row_scratch(k)
    residual, appended, appended_scales, _ = row_scratch(s)
    scratch, most = np.empty(k, u32), u32(0)
    for row in range(len(x)):
        gather(x[row], order, scratch, bits)
        most = max(most, quantize_blocks(bits, tensor_scale, primary, primary_scales, block))
        scales = primary_scales[(k - s) // BLOCK :]
        residual_of(bits[k - s :], primary[k - s :], scales, tensor_scale, residual)
        quantize_blocks(residual, tensor_scale, appended, appended_scales, block)
        interleave(primary, appended, BLOCK, codes[row])
        interleave(primary_scales, appended_scales, 1, block_scales[row])
    return most


@kernel
def _weight_rows(w: Bits, order: Bits, tensor_scale: f32, codes: Codes, block_scales: Codes) -> u32:
    k, s = len(order), codes.shape[1] - len(order)
    bits, primary, scales, block = row_scratch(k)
    scratch, most = np.empty(k, u32), u32(0)
    for row in range(len(w)):
        gather(w[row], order, scratch, bits)
        most = max(most, quantize_blocks(bits, tensor_scale, primary, scales, block))
        interleave(primary, primary[k - s :], BLOCK, codes[row])
        interleave(scales, scales[(k - s) // BLOCK :], 1, block_scales[row])
    return most


@helper
def row_scratch(k: int) -> tuple[Bits, Codes, Codes, Float32]:
    """Room for one row: bits, codes, block scales, one float32 a block."""
    return np.empty(k, u32), np.empty(k, np.uint8), np.empty(k // BLOCK, np.uint8), np.empty(k // BLOCK, f32)


@helper
def gather(row: Bits, order: Bits, scratch: Bits, bits: Bits) -> None:
    widen(row, scratch)  # from memory in sequence: jumping about there would wait for every cache line
    for i in range(len(order)):
        bits[i] = scratch[order[i]]


@helper
def residual_of(bits: Bits, codes: Codes, block_scales: Codes, tensor_scale: f32, residual: Bits) -> None:
    """Numbers minus the exact values of their codes, each rounded once to float32, as one FMA does."""
    for b in range(len(block_scales)):
        scale = value_e4m3(block_scales[b])
        for i in range(b * BLOCK, (b + 1) * BLOCK):
            value = f64(value_e2m1(codes[i]) * scale) * f64(tensor_scale)  # exact: 6 and 24 significant bits
            residual[i] = bits_of(difference(f64(float_of(bits[i])), value))


@helper
def difference(a: f64, b: f64) -> f32:
    """a − b rounded once to float32: first to float64 with an odd last bit where that rounds (the error comes
    from Knuth's TwoSum), so that the second rounding sees on which side it is (Boldo and Melquiond 2008)."""
    s = a - b
    t = s - a
    error = (a - (s - t)) - (b + t)
    bits, error_bits = f64(s).view(np.int64), f64(error).view(np.int64)
    towards_zero = bits - ((bits ^ error_bits) < 0)
    return f32(np.int64(bits if error == 0 else towards_zero | 1).view(f64))


@helper
def interleave(primary: Codes, appended: Codes, width: int, out: Codes) -> None:
    """P … P, then P₀ A₀ P₁ A₁ … for as many of the last P as there are A, each of them `width` bytes."""
    plain = len(primary) - len(appended)
    for i in range(plain):
        out[i] = primary[i]
    for start in range(0, len(appended), width):
        for i in range(start, start + width):
            out[plain + start + i] = primary[plain + i]
            out[plain + start + i + width] = appended[i]
