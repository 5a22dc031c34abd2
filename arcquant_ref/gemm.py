"""The matrix product of two NVFP4 tensors, summed exactly in int64."""

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .augment import augment_activations, augment_weights
from .formats import BLOCK, E2M1, E4M3, Float32, decode
from .select import Selection
from .tensor import NVFP4Tensor

UNIT = E2M1.least_positive * E4M3.least_positive  # 2⁻¹⁰: every e2m1 · e4m3 is an integer multiple
MAX_DEPTH = int((2**63 - 1) // (E2M1.max * E4M3.max / UNIT) ** 2)  # 1.2 million; beyond, int64 could overflow


def integer_values(q: NVFP4Tensor, name: str = "q") -> NDArray[np.int64]:
    """(2 · e2m1) · (512 · e4m3) of each element, (M, K): the value in units of 2⁻¹⁰ · tensor_scale.

    Raises TypeError for another type, ValueError for a block scale without a value; `name` is
    what the error calls q.
    """
    checks.is_a(name, q, NVFP4Tensor, "quantize(x) makes one.")
    checks.scales_are_numbers(f"{name}.block_scales", q.block_scales, E4M3.nan_code)
    elements = (decode(E2M1, q.codes) / E2M1.least_positive).astype(np.int64)
    scales = (decode(E4M3, q.block_scales) / E4M3.least_positive).astype(np.int64)
    return elements * np.repeat(scales, BLOCK, axis=1)


def integer_matmul(a: NVFP4Tensor, b: NVFP4Tensor) -> NDArray[np.int64]:
    """a bᵀ of (M, K) and (N, K) without any rounding: integers, (M, N) int64, in units of 2⁻²⁰ · both tensor
    scales. Errors as in `matmul`."""
    left, right = integer_values(a, "a"), integer_values(b, "b")
    checks.same_depth("a", left.shape[1], "b", right.shape[1])
    checks.depth(left.shape[1], MAX_DEPTH)
    return left @ right.T


def matmul(a: NVFP4Tensor, b: NVFP4Tensor) -> Float32:
    """a bᵀ, (M, K) and (N, K) → (M, N): the real number rounded once to float32 (beyond its range: ±inf).

    Raises TypeError for another type, ValueError for a block scale that is NaN or has a sign bit, different
    K, or K above 1.2 million.

    >>> from arcquant_ref import quantize
    >>> ones = quantize(np.ones((1, 32)), tensor_scale=1)
    >>> matmul(ones, ones)  # 1/6 lies between two block scales, so 1 became 1.03125
    array([[34.03125]], dtype=float32)
    """
    total = integer_matmul(a, b)
    scale = np.float64(a.tensor_scale) * np.float64(b.tensor_scale) * UNIT**2  # exact: 48 significant bits
    product = total * scale
    with np.errstate(over="ignore", under="ignore"):
        y = product.astype(np.float32)
        # `product` is two float64 roundings off, less than 2⁻⁵¹ of itself. Where that could change y, work y
        # out exactly (Ziv's test).
        low, high = ((product * (1 + slack)).astype(np.float32) for slack in (-(2.0**-51), 2.0**-51))
    for i in zip(*np.nonzero(low != high)):
        y[i] = nearest_float32(int(total[i]) * Fraction(float(scale)))
    return y


def nearest_float32(exact: Fraction) -> np.float32:
    """One rounding. Through float64 it is two, wrong if the first lands on a midpoint of float32; rounding
    first to the neighbour whose last bit is odd avoids that (Boldo and Melquiond 2008)."""
    nearest = np.float64(float(exact))
    if nearest != exact and nearest.view(np.int64) % 2 == 0:
        nearest = np.nextafter(nearest, np.inf if exact > nearest else -np.inf)
    with np.errstate(over="ignore", under="ignore"):
        return nearest.astype(np.float32)


def linear(x: ArrayLike, w: ArrayLike, selection: Selection) -> Float32:
    """A W4A4 linear layer: (M, K) activations, (N, K) weights → (M, N) float32, one product of depth K'.

    Dtypes and errors as in `augment_activations` and `matmul`.

    >>> from arcquant_ref import calibrate, select
    >>> x = np.random.default_rng(0).standard_normal((4, 64)); x[:, 3] *= 50
    >>> linear(x, np.eye(64), select(calibrate([x]))).shape
    (4, 64)
    """
    return matmul(augment_activations(x, selection), augment_weights(w, selection))
