"""What ARC is compared with: MXFP8, MXFP4 and INT4, value → nearest value; rotations and smoothing, which
change both operands of a product and not the product. Not part of the method."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .formats import E2M1, E4M3, E8M0, Float32, Float64, FloatFormat, decode, encode

MX_BLOCK = 32  # neighbours along K that share one E8M0 scale
ExponentRule = Callable[[Float64, FloatFormat], NDArray[np.int64]]
INT4_GROUP = 128  # neighbours along K that share one float32 scale
INT4_MAX = 7  # symmetric: −8 is not used
MXFP8_BITS = E4M3.bits + E8M0.bits / MX_BLOCK
MXFP4_BITS = E2M1.bits + E8M0.bits / MX_BLOCK
INT4_BITS = 4 + 32 / INT4_GROUP


def ceiling_exponent(amax: Float64, fmt: FloatFormat) -> NDArray[np.int64]:
    """⌈log2(amax / max)⌉: the least power of two that saturates nothing."""
    (fraction, exponent), (max_fraction, max_exponent) = np.frexp(amax), np.frexp(fmt.max)
    return exponent - int(max_exponent) + (fraction > max_fraction)


def floor_exponent(amax: Float64, fmt: FloatFormat) -> NDArray[np.int64]:
    """⌊log2 amax⌋ − ⌊log2 max⌋: OCP Microscaling Formats 1.0, section 6.3. Large elements may saturate."""
    return np.frexp(amax)[1] - int(np.frexp(fmt.max)[1])


def mxfp8(x: ArrayLike, exponent_rule: ExponentRule = ceiling_exponent) -> Float32:
    """(M, K) → the nearest MXFP8 (E4M3) values, 32 along K to an E8M0 scale; errors as in `quantize`.

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


def _mx(x: ArrayLike, fmt: FloatFormat, exponent_rule: ExponentRule) -> Float32:
    x = checks.matrix("x", x, MX_BLOCK)
    blocks = x.reshape(len(x), -1, MX_BLOCK).astype(np.float64)  # scaling by a power of two is then exact
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    exponent = np.clip(exponent_rule(amax, fmt), -E8M0.bias, E8M0.bias)
    nearest = decode(fmt, encode(fmt, np.ldexp(blocks, -exponent)))
    with np.errstate(over="ignore"):  # at the very top of float32 the nearest value is 2¹²⁸, that is inf
        values: Float32 = np.ldexp(nearest.astype(np.float64), exponent).astype(np.float32)
    return values.reshape(x.shape)


def int4(x: ArrayLike) -> Float32:
    """(M, K) → the nearest of −7 … 7 times amax / 7, 128 along K to a scale; the last group may be shorter.

    >>> int4(np.float32([[7, 2.4] + [0] * 14]))[0, :2]
    array([7., 2.], dtype=float32)
    """
    x = checks.matrix("x", x, 1)
    pieces = []
    for start in range(0, x.shape[1], INT4_GROUP):
        piece = x[:, start : start + INT4_GROUP]
        step = np.abs(piece).max(axis=1, keepdims=True) / np.float32(INT4_MAX)
        step[step == 0] = 1
        pieces.append(np.clip(np.rint(piece / step), -INT4_MAX, INT4_MAX) * step)
    return np.concatenate(pieces, axis=1)


def hadamard(x: ArrayLike, block: int | Literal["full"]) -> Float32:
    """(M, K) times I ⊗ H: every `block` neighbours along K by one orthonormal Walsh-Hadamard matrix.

    "full" is the largest power of two that divides K: 64 for K = 576 = 64 · 9. H is symmetric and its own
    inverse, so (x H)(w H)ᵀ = x wᵀ. Sums are float64, in Sylvester's order; one rounding to float32. Raises
    ValueError if `block` is not a power of two that divides K, or if a sum leaves float32.

    >>> hadamard(np.float32([[1, 0, 0, 0, 0, 0, 0, 1]]), 4)
    array([[ 0.5,  0.5,  0.5,  0.5,  0.5, -0.5, -0.5,  0.5]], dtype=float32)
    """
    x = checks.matrix("x", x, 1)
    size = x.shape[1] & -x.shape[1] if block == "full" else checks.power_of_two("block", block)
    y = checks.matrix("x", x, size).reshape(-1, size).T.astype(np.float64)
    for half in 2 ** np.arange(size.bit_length() - 1):
        a, b = y.reshape(-1, 2, half, y.shape[1]).swapaxes(0, 1)
        y = np.stack([a + b, a - b], axis=1).reshape(y.shape)
    return checks.floats("x rotated", (y.T / np.sqrt(size)).reshape(x.shape))


def smoothing(activation_amax: ArrayLike, weight_amax: ArrayLike, alpha: float = 0.5) -> Float32:
    """(K,) factors s, for x / s and w · s: the product stays, outliers of x move to w.

    s = activation_amax^alpha / weight_amax^(1 − alpha), by channel, in float64, rounded once to float32; 1
    where either amax is zero. Raises TypeError or ValueError if these are not two rows of K finite numbers,
    none negative, alpha is not from 0 to 1, or a factor is beyond float32. Source: SmoothQuant,
    arXiv 2211.10438, equation 4.

    >>> smoothing([16.0, 1.0, 0.0], [1.0, 4.0, 1.0], 0.5)
    array([4. , 0.5, 1. ], dtype=float32)
    """
    a = checks.non_negative("activation_amax", activation_amax).astype(np.float64)
    w = checks.non_negative("weight_amax", weight_amax).astype(np.float64)
    checks.same_channels("activation_amax", a.shape, "weight_amax", w.shape)
    alpha = checks.exponent_from_0_to_1("alpha", alpha)
    used = (a > 0) & (w > 0)
    a, w = np.where(used, a, 1), np.where(used, w, 1)
    return checks.floats("smoothing factors", a**alpha / w ** (1 - alpha))
