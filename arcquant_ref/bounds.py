"""Error bounds: sharp constants, element and output bounds, and a check that names its worst witness.

Real arithmetic unless said otherwise; `amax` is the largest |x| of a block. Source: docs/spec.md, section 6.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .augment import merge, reordered
from .formats import BLOCK, E2M1, E4M3, Float64, FloatFormat
from .quantize import exact_values
from .select import Selection
from .tensor import NVFP4Tensor


def _exact(table: NDArray) -> list[Fraction]:
    return [Fraction(float(value)) for value in table]


def _nearest_scale(value: Fraction) -> Fraction:
    """The E4M3 value nearest to `value`; of two, the larger, because a supremum is what we are after."""
    return _exact(E4M3.magnitudes)[bisect_right(_exact(E4M3.midpoints), value)]


def _supremum_nvfp4() -> Fraction:
    """sup error / amax, the scale in its normal range: half the widest gap of E2M1 is one step, and a step is
    at most the worst round-up of amax / 6."""
    scales, midpoints = _exact(E4M3.magnitudes), _exact(E4M3.midpoints)
    worst_round_up = max(
        up / midpoint
        for midpoint, up in zip(midpoints, scales[1:])
        if midpoint >= Fraction(E4M3.least_normal)
    )
    return HALF_GAP * worst_round_up / Fraction(E2M1.max)


def _supremum_arc() -> Fraction:
    """The same with a residual. A first scale s leaves residuals up to s · HALF_GAP and needs an amax of at
    least 6 · (the midpoint below s); the second step is then at most the scale nearest to s · HALF_GAP / 6.
    Jointly: the worst first scale and the worst second exclude each other, (3/17)² is out of reach."""
    least = Fraction(E4M3.least_normal)
    ratios = [Fraction(0)]
    for midpoint, scale in zip(_exact(E4M3.midpoints), _exact(E4M3.magnitudes)[1:]):
        second_scale = _nearest_scale(scale * HALF_GAP / Fraction(E2M1.max))
        if midpoint >= least and second_scale >= least:
            ratios.append(HALF_GAP * second_scale / (midpoint * Fraction(E2M1.max)))
    return max(ratios)


def _supremum_mx(fmt: FloatFormat, low: Fraction, high: Fraction) -> Fraction:
    """sup error / amax when a power-of-two scale brings amax into [low, high]: an element on a midpoint m
    errs by half a gap and needs amax >= m; one above the largest value errs by the distance to it."""
    values = _exact(fmt.magnitudes)
    half_gaps = [((b - a) / 2, (a + b) / 2) for a, b in pairwise(values)]
    on_midpoint = max(half_gap / max(midpoint, low) for half_gap, midpoint in half_gaps)
    return max(on_midpoint, (high - values[-1]) / high)


def _ceiling_range(fmt: FloatFormat) -> tuple[Fraction, Fraction]:
    """scale = 2^⌈log2(amax / max)⌉ brings amax into (max / 2, max]."""
    return Fraction(fmt.max) / 2, Fraction(fmt.max)


def _floor_range(fmt: FloatFormat) -> tuple[Fraction, Fraction]:
    """scale = 2^(⌊log2 amax⌋ − ⌊log2 max⌋), OCP Microscaling Formats 1.0 section 6.3: amax in [p, 2p)."""
    power = Fraction(2) ** int(np.floor(np.log2(fmt.max)))
    return power, 2 * power


HALF_GAP = max(b - a for a, b in pairwise(_exact(E2M1.magnitudes))) / 2  # one step
NVFP4 = _supremum_nvfp4()  # 3/17, not attained
ARC = _supremum_arc()  # 3/100, not attained
MXFP8_CEILING = _supremum_mx(E4M3, *_ceiling_range(E4M3))  # 1/17, attained
MXFP8_FLOOR = _supremum_mx(E4M3, *_floor_range(E4M3))  # 1/8, not attained
MXFP4_CEILING = _supremum_mx(E2M1, *_ceiling_range(E2M1))  # 1/5, attained
MXFP4_FLOOR = _supremum_mx(E2M1, *_floor_range(E2M1))  # 1/4, not attained
PAPER_ARC = Fraction(9, 8) ** 2 / 2**4  # as arXiv 2601.07475 states it: docs/spec.md, section 6
PAPER_MXFP8 = Fraction(2) / 2**4

# Float32 rounding. Relative: the quotient x / step and its step are each within 2⁻²⁴, which moves
# an element at the midpoint 5 by 10 · 2⁻²⁴ steps; amax / 6 / tensor_scale adds 2 · 2⁻²⁴ to the scale.
# Absolute: below 2⁻¹²⁶ the same quantities are within 2⁻¹⁵⁰ and are scaled by at most 6 + 5.
ROUNDING_RELATIVE = 2.0**-20
ROUNDING_ABSOLUTE = 2.0**-146


def nvfp4_bound(amax: ArrayLike, tensor_scale: float | np.float32) -> Float64:
    """Largest |x − x̂| in a block without residual, from its amax and the tensor scale; any shape, float64.

    In units of the tensor scale, with a = amax and v = a / 6:
      v >= 2⁻⁶            3/17 · a, but at most 448 (one step of the largest scale) or a − 2688 (saturated)
      2⁻⁹ <= v < 2⁻⁶      the scale is subnormal, off by up to 2⁻¹⁰: max(min(v + 2⁻¹⁰, 2⁻⁶), 6 · 2⁻¹⁰)
      v < 2⁻⁹             the scale is floored: 2⁻⁹, or a if that is less
    Does not decrease with amax. Raises ValueError for a negative or non-finite amax or a bad tensor scale.
    """
    tensor_scale = checks.tensor_scale(tensor_scale)
    a = checks.non_negative("amax", amax).astype(np.float64) / np.float64(tensor_scale)
    return _in_real_units(_nvfp4_units(a), tensor_scale)


def arc_bound(amax: ArrayLike, tensor_scale: float | np.float32) -> Float64:
    """Largest |x − x̂ − r̂| in a block with residual, from the amax of the primary block; any shape, float64.

    3/100 · amax where both scales are sure to be normal (6 · 2⁻⁶ <= v) and nothing saturates (v <= 448), else
    the NVFP4 bound of the NVFP4 bound. Never above `nvfp4_bound`: zero is a code, so quantizing a residual
    cannot enlarge it. Errors as there.
    """
    tensor_scale = checks.tensor_scale(tensor_scale)
    a = checks.non_negative("amax", amax).astype(np.float64) / np.float64(tensor_scale)
    v, first = a / E2M1.max, _nvfp4_units(a)
    both_normal = (v >= E2M1.max * E4M3.least_normal) & (v <= E4M3.max)
    second = np.where(both_normal, float(ARC) * a, _nvfp4_units(first))
    return _in_real_units(np.minimum(second, first), tensor_scale)


def _nvfp4_units(a: Float64) -> Float64:
    """The bound of an amax in units of the tensor scale, before float32 rounding."""
    v, half_spacing = a / E2M1.max, E4M3.least_positive / 2
    normal = np.minimum(float(NVFP4) * a, E4M3.max)
    subnormal = np.maximum(np.minimum(v + half_spacing, E4M3.least_normal), E2M1.max * half_spacing)
    floored = np.minimum(a, E4M3.least_positive)
    bound = np.where(v >= E4M3.least_normal, normal, np.where(v >= E4M3.least_positive, subnormal, floored))
    return np.maximum(bound, a - E2M1.max * E4M3.max)


def _in_real_units(bound: Float64, tensor_scale: np.float32) -> Float64:
    return bound * np.float64(tensor_scale) * (1 + ROUNDING_RELATIVE) + ROUNDING_ABSOLUTE


def element_bounds(
    x: ArrayLike, tensor_scale: float | np.float32, selection: Selection | None = None
) -> Float64:
    """Bound on the error of every element of x (M, K), in the original channel order, (M, K) float64.

    Without a selection x is quantized as it stands; with one it is augmented. Errors as in `quantize`;
    ValueError for a selection made for another K.
    """
    if selection is None:
        x = checks.matrix("x", x, BLOCK)
        return np.repeat(nvfp4_bound(block_amax(x), tensor_scale), BLOCK, axis=1)
    amax = block_amax(reordered("x", x, selection))
    bounds = nvfp4_bound(amax, tensor_scale)
    with_residual = slice((selection.K - selection.num_residual) // BLOCK, None)
    if selection.num_residual:
        bounds[:, with_residual] = arc_bound(amax[:, with_residual], tensor_scale)
    return np.repeat(bounds, BLOCK, axis=1)[:, np.argsort(selection.order)]


def output_bounds(x: ArrayLike, w: ArrayLike, x_bounds: ArrayLike, w_hat: ArrayLike) -> Float64:
    """Bound on |x wᵀ − x̂ ŵᵀ|, (M, N) float64, for x̂ within `x_bounds` (M, K) of x and known weights ŵ (N, K):

    Σ_k x_bounds[m, k] · |ŵ[n, k]| + Σ_k |x[m, k]| · |w[n, k] − ŵ[n, k]|. The second sum is the weights' own
    error, known offline; ARC does not make it smaller. Raises ValueError for shapes that do not fit.
    """
    x, w, x_bounds, w_hat = (np.asarray(a, np.float64) for a in (x, w, x_bounds, w_hat))
    checks.same_depth(x.shape[-1], w.shape[-1])
    checks.same_shape("x", x.shape, "x_bounds", x_bounds.shape)
    checks.same_shape("w", w.shape, "w_hat", w_hat.shape)
    return x_bounds @ np.abs(w_hat).T + np.abs(x) @ np.abs(w - w_hat).T


@dataclass(frozen=True, kw_only=True)
class Check:
    """The worst error / bound and where it is. `holds` says that no error exceeds its bound."""

    worst_ratio: float
    index: tuple[int, int]
    true: float
    got: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.worst_ratio <= 1

    def __str__(self) -> str:
        verdict = "every error is within its bound" if self.holds else "BOUND VIOLATED"
        return (
            f"{verdict}; worst error / bound {self.worst_ratio:.4f} at {self.index}: {self.true!r} became "
            f"{self.got!r}, error {abs(self.true - self.got):.6g}, bound {self.bound:.6g}"
        )


def check(x: ArrayLike, q: NVFP4Tensor, selection: Selection | None = None) -> Check:
    """Does every element of q stay within its bound of x (M, K)? q is quantize(x), or with a selection
    augment_activations(x, selection), by any backend. Raises ValueError where x, q and the selection do not
    belong together.

    >>> from arcquant_ref import quantize
    >>> x = np.float32([[6.4, 5.4] + [0] * 14])
    >>> print(check(x, quantize(x, tensor_scale=1)))
    every error is within its bound; worst error / bound 0.7969 at (0, 1): 5.400000095367432 became 4.5,
    error 0.9, bound 1.12941
    """
    x = checks.matrix("x", x, BLOCK)
    got = exact_values(q) if selection is None else merge(q, selection)
    checks.same_shape("x", x.shape, "q", got.shape)
    return worst(x.astype(np.float64), got, element_bounds(x, q.tensor_scale, selection))


def check_output(x: ArrayLike, w: ArrayLike, got: ArrayLike, x_bounds: ArrayLike, w_hat: ArrayLike) -> Check:
    """Does every element of `got` (M, N), x̂ ŵᵀ rounded to float32, stay within `output_bounds` of x wᵀ?

    An infinite output counts as a violation. Errors as in `output_bounds`.
    """
    x, w, got = (np.asarray(a, np.float64) for a in (x, w, got))
    bound = output_bounds(x, w, x_bounds, w_hat)
    checks.same_shape("got", got.shape, "x wᵀ", bound.shape)
    last_rounding = np.abs(got) * 2.0**-24 + 2.0**-150
    float64_sum = x.shape[1] * 2.0**-53 * (np.abs(x) @ np.abs(w).T)  # of the true product below
    return worst(x @ w.T, got, bound + np.where(np.isfinite(got), last_rounding, 0) + float64_sum)


def worst(true: Float64, got: Float64, bound: Float64) -> Check:
    """The element of three (M, N) float64 matrices with the largest |true − got| / bound; NaN counts as ∞."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(true - got) / bound
    ratio = np.where(true == got, 0.0, np.nan_to_num(ratio, nan=np.inf))
    i, j = (int(n) for n in np.unravel_index(np.argmax(ratio), ratio.shape))
    return Check(
        worst_ratio=float(ratio[i, j]),
        index=(i, j),
        true=float(true[i, j]),
        got=float(got[i, j]),
        bound=float(bound[i, j]),
    )


def block_amax(x: NDArray, block: int = BLOCK) -> NDArray:
    """(M, K) → (M, K / block), the largest |x| of each block."""
    return np.abs(x).reshape(len(x), -1, block).max(axis=-1)
