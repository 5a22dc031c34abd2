"""quantize: the one normative order of operations (docs/spec.md, section 3). `fl` is one float32 rounding."""

import numpy as np
from numpy.typing import ArrayLike

from . import checks
from .formats import BLOCK, E2M1, E4M3, Codes, Float32, Float64, decode, encode
from .tensor import NVFP4Tensor

F32 = np.float32


def tensor_scale_of(x: Float32) -> np.float32:
    """fl(amax / 2688), so that the largest block gets the largest scale; 1 for an all-zero tensor.

    2688 = 6 · 448, the largest element times the largest block scale. Never below the least normal float32.

    >>> float(tensor_scale_of(np.float32([[-2688, 5]])))
    1.0
    """
    amax = np.abs(x).max()
    if amax == 0:
        return F32(1)
    with np.errstate(under="ignore"):
        return np.maximum(amax / F32(E2M1.max * E4M3.max), checks.LEAST_NORMAL)


def quantize(x: ArrayLike, tensor_scale: float | np.float32 | None = None) -> NVFP4Tensor:
    """The (M, K) matrix as an NVFP4 tensor, blocks of 16 along K.

    `x` is float16, bfloat16, float32 or float64 (rounded once to float32). `tensor_scale` is computed from x
    unless given (a static scale); elements beyond 2688 · tensor_scale then saturate. Raises TypeError for
    another dtype, ValueError for NaN, infinity, an empty or non-matrix x, K not a multiple of 16 or an
    unusable tensor_scale.

    >>> q = quantize(np.float32([[0, 1, 2, 3, 4, 5, 6, -6] * 2]), tensor_scale=1)
    >>> q.codes[0, :8], q.block_scales
    (array([ 0,  2,  4,  5,  6,  6,  7, 15], dtype=uint8), array([[56]], dtype=uint8))
    """
    x = checks.matrix("x", x, BLOCK)
    scale = tensor_scale_of(x) if tensor_scale is None else checks.tensor_scale(tensor_scale)
    blocks = x.reshape(len(x), -1, BLOCK)
    amax = np.abs(blocks).max(axis=-1)
    with np.errstate(over="ignore", under="ignore"):  # the order of these operations is normative
        block_scales = _scale_codes(amax / F32(E2M1.max) / scale)
        step = decode(E4M3, block_scales) * scale  # never zero: the least block scale is floored
        codes = encode(E2M1, blocks / step[..., None]).reshape(x.shape)
    return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)


def quantize_weighted(
    w: ArrayLike, energy: ArrayLike, tensor_scale: float | np.float32 | None = None
) -> NVFP4Tensor:
    """(N, K) weights → NVFP4 with searched block scales: of all E4M3 codes from that of amax / 8 to that of
    amax / 3.5 the one with the least Σ energy[k] · (w − ŵ)²; of equals the smallest.

    `energy` (K,) is the mean of x² of each channel; any positive multiple gives the same bytes but for
    rounding. The scale of `quantize`, amax / 6, is always among them, so the sum is never larger than that
    of `quantize`. Channels of no energy count for nothing: a block of them has the smallest scale. The search
    happens offline and costs nothing later: it is the same format. Everything after the codes is float64,
    channels added in their order. Errors as in `quantize`; TypeError or ValueError for an energy that is not
    (K,), finite and non-negative. docs/spec.md, section 3.
    """
    w = checks.matrix("w", w, BLOCK)
    energy = checks.channel_energy(energy, w.shape[1])
    scale = tensor_scale_of(w) if tensor_scale is None else checks.tensor_scale(tensor_scale)
    blocks = w.reshape(len(w), -1, BLOCK)
    amax, weights = np.abs(blocks).max(axis=-1), energy.reshape(-1, BLOCK)
    with np.errstate(over="ignore", under="ignore"):
        first, last = (_scale_codes(amax / F32(m) / scale) for m in SEARCHED)
    best, best_error = first, np.full(amax.shape, np.inf)
    for offset in range(int((last - first).max()) + 1):
        tried = np.minimum(first + np.uint8(offset), last)
        codes, error = _weighted_error(blocks, weights, tried, scale)
        better = error < best_error
        best, best_error = np.where(better, tried, best), np.where(better, error, best_error)
    codes, _ = _weighted_error(blocks, weights, best, scale)
    return NVFP4Tensor(codes=codes.reshape(w.shape), block_scales=best, tensor_scale=scale)


SEARCHED = 8.0, float(E2M1.midpoints[-2])  # amax / step: from saturating at 6 to falling on 3 or 4


def _scale_codes(v: Float32) -> Codes:
    return encode(E4M3, np.clip(v, F32(E4M3.least_positive), F32(E4M3.max)))


def _weighted_error(
    blocks: Float32, energy: Float64, block_scales: Codes, tensor_scale: np.float32
) -> tuple[Codes, Float64]:
    """The codes of blocks (N, K/16, 16) under these block scales, and Σ energy · (w − ŵ)² of each block."""
    step = decode(E4M3, block_scales) * tensor_scale
    exact = decode(E4M3, block_scales).astype(np.float64) * np.float64(tensor_scale)
    error = np.zeros(block_scales.shape)
    with np.errstate(over="ignore", under="ignore"):
        codes = encode(E2M1, blocks / step[..., None])
        difference = blocks - decode(E2M1, codes).astype(np.float64) * exact[..., None]
        for i in range(BLOCK):  # the order is normative: the search compares sums
            error = error + difference[..., i] * difference[..., i] * energy[:, i]
    return codes, error


def exact_values(q: NVFP4Tensor) -> Float64:
    """The (M, K) values of `q`, float64, without rounding: products of 2, 4 and 24 significant bits.

    Errors as in `dequantize`.
    """
    checks.is_a("q", q, NVFP4Tensor, "quantize(x) makes one.")
    checks.scales_are_numbers("q.block_scales", q.block_scales, E4M3.nan_code)
    step = decode(E4M3, q.block_scales).astype(np.float64) * np.float64(q.tensor_scale)
    return decode(E2M1, q.codes).astype(np.float64) * np.repeat(step, BLOCK, axis=1)


def dequantize(q: NVFP4Tensor) -> Float32:
    """The (M, K) values of `q`, each rounded once to float32.

    Beyond float32, which takes a static tensor scale and x within 18/17 of its limit, a value becomes ±inf.
    Raises TypeError for another type, ValueError for a block scale that is NaN or has a sign bit.

    >>> dequantize(quantize(np.float32([[5] + [0] * 15]), tensor_scale=1))[0, :2]
    array([4.875, 0.   ], dtype=float32)
    """
    with np.errstate(over="ignore", under="ignore"):
        return exact_values(q).astype(np.float32)


def residual(x: Float32, q: NVFP4Tensor) -> Float32:
    """x − value(q), (M, K), rounded once to float32 as one FMA does.

    Rounding to float64 first changes nothing: the difference fits unless a static tensor scale saturates x by
    more than 2²³. Then value is 21 · m · 2ⁿ, m of 24 bits, below one float32 ulp of x, and a float64 rounding
    could only hurt by moving it onto half that ulp, a power of two: no 21 · m comes that near to one.
    """
    with np.errstate(under="ignore"):
        return (x - exact_values(q)).astype(np.float32)
