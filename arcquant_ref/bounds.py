"""Error bounds: sharp constants, element and output bounds, and a check that names its worst witness.

Real arithmetic unless said otherwise; `amax` is the largest |x| of a block. Derivations: docs/bounds.md.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .augment import augment_activations, augment_weights, matching, merge, split
from .formats import BLOCK, E2M1, E4M3, Float64, FloatFormat, decode
from .gemm import UNIT, integer_values, matmul
from .quantize import exact_values, quantize, quantize_weighted
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
PAPER_ARC = Fraction(9, 8) ** 2 / 2**4  # as arXiv 2601.07475 states it
PAPER_MXFP8 = Fraction(2) / 2**4

# Float32 rounding, in units of 2⁻²⁴ of the bound. The quotient x / step and its step move an element at a
# midpoint m by 2m steps where the bound is half a gap there: at most 14 (m = 1.75 and 3.5). Rounding the
# residual adds at most 7 there. amax / 6 / tensor_scale is 2 off, which can move amax across a threshold.
# Absolute: below 2⁻¹²⁶ the same quantities are within 2⁻¹⁵⁰ and are scaled by at most 6 + 5.
ROUNDING_RELATIVE = 2.0**-19
ROUNDING_ABSOLUTE = 2.0**-146


def nvfp4_bound(amax: ArrayLike, tensor_scale: float | np.float32) -> Float64:
    """Largest |x − x̂| in a block without residual, from its amax and the tensor scale; any shape, float64.

    One step, e4m3(block scale) · tensor_scale, wherever the block scale is in its normal range; the rest of
    the range is in docs/bounds.md. Never decreases with amax, and is the least such bound but for float32
    rounding. Raises ValueError for a negative or non-finite amax or a bad tensor scale.

    >>> nvfp4_bound([2688, 6, 0.02], tensor_scale=1).round(3)
    array([4.48001e+02, 1.00000e+00, 6.00000e-03])
    """
    tensor_scale = checks.tensor_scale(tensor_scale)
    return _after_rounding(checks.non_negative("amax", amax).astype(np.float64), tensor_scale)


def arc_bound(amax: ArrayLike, tensor_scale: float | np.float32) -> Float64:
    """Largest |x − x̂ − r̂| in a block with residual, from the amax of the primary block; any shape, float64.

    The residuals are a block whose amax is at most the NVFP4 bound, so this is the NVFP4 bound of the NVFP4
    bound, and the least in the same sense. Errors as there.
    """
    tensor_scale = checks.tensor_scale(tensor_scale)
    first = _after_rounding(checks.non_negative("amax", amax).astype(np.float64), tensor_scale)
    return np.minimum(first, _after_rounding(first, tensor_scale))


def _after_rounding(amax: Float64, tensor_scale: np.float32) -> Float64:
    """`nvfp4_in_units` in real units, room made for float32 rounding before and after it."""
    amax = amax * (1 + ROUNDING_RELATIVE) + ROUNDING_ABSOLUTE
    scale = np.float64(tensor_scale)
    return nvfp4_in_units(amax / scale) * scale * (1 + ROUNDING_RELATIVE) + ROUNDING_ABSOLUTE


def nvfp4_in_units(amax: Float64) -> Float64:
    """sup |x − x̂| over real blocks with an amax up to this, or just above; in units of the tensor scale.

    The block scale s is the one nearest to amax / 6. What is lost below 6 s is said by the gaps of E2M1; a
    scale that was rounded down also loses amax − 6 s, which counts where scales are subnormal. Exact in
    float64 if amax has at most 40 significant bits.
    """
    thresholds = E2M1.max * E4M3.midpoints.astype(np.float64)
    scale = E4M3.magnitudes[np.searchsorted(thresholds, amax, side="right")]
    scale = np.maximum(scale, E4M3.least_positive)[..., None]
    half_gaps = np.append(np.diff(E2M1.magnitudes) / 2, np.inf)  # beyond the largest value nothing is near
    error = np.clip(amax[..., None] - scale * E2M1.magnitudes, 0, scale * half_gaps).max(axis=-1)
    rounded_down = np.where(amax >= thresholds[1], E2M1.max * E4M3.least_positive / 2, 0)
    return np.maximum(error, rounded_down)


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
    bounds, plain = _column_bounds(x, selection, tensor_scale), selection.K - selection.num_residual
    again = np.s_[plain : plain + len(selection.weight_channels)]
    return np.delete(bounds, again, axis=1)[:, np.argsort(selection.order)]


def _column_bounds(x: ArrayLike, selection: Selection, tensor_scale: float | np.float32) -> Float64:
    """The same for `selection.columns` of x, (M, K + S_w)."""
    amax = block_amax(matching("x", x, selection)[:, selection.columns])
    bounds, first = nvfp4_bound(amax, tensor_scale), amax.shape[1] - selection.num_residual // BLOCK
    if selection.num_residual:
        bounds[:, first:] = arc_bound(amax[:, first:], tensor_scale)
    return np.repeat(bounds, BLOCK, axis=1)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The worst error / bound and where it is. `holds` says that no error exceeds its bound.

    `without_bound` counts infinite bounds: outputs that may overflow. The worst is one of the others, if any.
    """

    worst_ratio: float
    index: tuple[int, int]
    true: float
    got: float
    bound: float
    without_bound: int = 0

    @property
    def holds(self) -> bool:
        return self.worst_ratio <= 1

    def __str__(self) -> str:
        if np.isinf(self.bound):
            return f"none of {self.without_bound} outputs has a bound: float32 may overflow"
        unbounded = f"; outputs without a bound, as float32 may overflow: {self.without_bound}"
        verdict = "every error is within its bound" if self.holds else "BOUND VIOLATED"
        return (
            f"{verdict}; worst error / bound {self.worst_ratio:.4f} at {self.index}: {self.true!r} became "
            f"{self.got!r}, error {abs(self.true - self.got):.6g}, bound {self.bound:.6g}"
            + (unbounded if self.without_bound else "")
        )


def check(x: ArrayLike, q: NVFP4Tensor, selection: Selection | None = None) -> Check:
    """Does every element of q stay within its bound of x (M, K)? q is quantize(x), or with a selection
    augment_activations(x, selection), by any backend. Raises ValueError where x, q and the selection do not
    belong together.

    >>> from arcquant_ref import quantize
    >>> x = np.float32([[6.4, 5.4] + [0] * 14])
    >>> print(check(x, quantize(x, tensor_scale=1)))
    every error is within its bound; worst error / bound 0.8000 at (0, 1): 5.400000095367432 became 4.5,
    error 0.9, bound 1.125
    """
    x = checks.matrix("x", x, BLOCK)
    got = exact_values(q) if selection is None else merge(q, selection)
    checks.same_shape("x", x.shape, "q", got.shape)
    return worst(x.astype(np.float64), got, element_bounds(x, q.tensor_scale, selection))


@dataclass(frozen=True, eq=False, kw_only=True)
class Certificate:
    """|y − ŷ| <= activation + weight + accumulation for every output of y = x wᵀ, each (M, N) float64.

    activation    Σ_k bound(x[m, k]) · |ŵ[n, k]|: from the amax of each block of x alone
    weight        Σ_k |x[m, k]| · |w[n, k] − ŵ[n, k]|, known offline but for x; ARC does not make it smaller,
                  residuals of the weights do: of a weight channel, ŵ is both of its columns together
    accumulation  rounding of the product, by any backend; and of the float64 sums here
    y, y_hat      x wᵀ in float64, and the product that was given or is the reference's
    """

    activation: Float64
    weight: Float64
    accumulation: Float64
    y: Float64
    y_hat: Float64

    @property
    def bound(self) -> Float64:
        return self.activation + self.weight + self.accumulation

    @property
    def tightness(self) -> Float64:
        """|y − ŷ| / bound of every output, (M, N), 0 where there is no bound; more than 1 would refute it."""
        return _ratios(self.y, self.y_hat, self.bound)

    def check(self, y_hat: ArrayLike) -> Check:
        """Does this (M, N) product, of any backend, stay within the bound? ValueError for another shape."""
        got = np.asarray(y_hat, np.float64)
        checks.same_shape("y_hat", got.shape, "y", self.y.shape)
        return worst(self.y, got, self.bound)


def certify(
    x: ArrayLike,
    w: ArrayLike,
    selection: Selection | None = None,
    tensor_scale: float | np.float32 | None = None,
    energy: ArrayLike | None = None,
) -> Certificate:
    """The bound on every output of a W4A4 layer, from x (M, K), w (N, K) and the selection.

    With `energy` the weights' block scales are searched, as in augment_weights(w, selection, energy). x and
    w count as float32. It holds for `matmul` of the augmented operands (of the plain ones without a
    selection) by every backend; `y_hat` is the reference's. Dtypes and errors as in `augment_activations` and
    `quantize_weighted`; ValueError for different K. docs/bounds.md derives it.

    >>> x, w = np.eye(2, 32), np.eye(3, 32)
    >>> certificate = certify(x, w)
    >>> bool((certificate.tightness <= 1).all()), certificate.check(certificate.y_hat + 1).holds
    (True, False)
    """
    x, w = checks.matrix("x", x, BLOCK), checks.matrix("w", w, BLOCK)
    checks.same_depth("x", x.shape[1], "w", w.shape[1])
    if selection is None:
        a, b = quantize(x, tensor_scale), quantize(w) if energy is None else quantize_weighted(w, energy)
        x_bounds, w_hat = element_bounds(x, a.tensor_scale), exact_values(b)
    else:
        a, b = augment_activations(x, selection, tensor_scale), augment_weights(w, selection, energy)
        x, x_bounds = x[:, selection.columns], _column_bounds(x, selection, a.tensor_scale)
        w_hat = exact_values(split(b, selection.num_residual)[0])
        w = _split_weights(w, w_hat, selection)
    return certify_values(x, w, x_bounds, w_hat, matmul(a, b), accumulation_bound(a, b))


def _split_weights(w: NDArray, w_hat: Float64, selection: Selection) -> Float64:
    """w as (N, K + S_w) columns that multiply `selection.columns` of x: a weight channel is w − r̂ where it
    stands first and r̂, its quantized residual, where it stands again. Their sum is w."""
    plain, repaired = selection.K - selection.num_residual, selection.weight_channels
    again = slice(plain, plain + len(repaired))
    remaining = w.astype(np.float64)
    remaining[:, repaired] -= w_hat[:, again]
    columns = remaining[:, selection.columns]
    columns[:, again] = w_hat[:, again]
    return columns


def certify_values(
    x: ArrayLike,
    w: ArrayLike,
    x_bounds: ArrayLike,
    w_hat: ArrayLike,
    y_hat: ArrayLike,
    accumulation: Float64 | float = 0,
) -> Certificate:
    """The same for any x̂ within `x_bounds` (M, K) of x (M, K) and known weights ŵ (N, K) for w (N, K), where
    `y_hat` (M, N) is within `accumulation` of x̂ ŵᵀ, or of its sum in float64. Raises ValueError for shapes
    that do not fit.
    """
    x, w, x_bounds, w_hat, y_hat = (np.asarray(a, np.float64) for a in (x, w, x_bounds, w_hat, y_hat))
    checks.same_depth("x", x.shape[-1], "w", w.shape[-1])
    checks.same_shape("x", x.shape, "x_bounds", x_bounds.shape)
    checks.same_shape("w", w.shape, "w_hat", w_hat.shape)
    y = x @ w.T
    checks.same_shape("y_hat", y_hat.shape, "x wᵀ", y.shape)
    activation, weight = x_bounds @ np.abs(w_hat).T, np.abs(x) @ np.abs(w - w_hat).T
    # Rounding of y, of x̂ ŵᵀ and of the parts: each at most K · 2⁻⁵³ of a sum of |terms| below the one here
    float64_sum = x.shape[-1] * 2.0**-50 * (np.abs(x) @ np.abs(w).T + activation + weight)
    return Certificate(
        activation=activation,
        weight=weight,
        accumulation=accumulation + float64_sum,
        y=y,
        y_hat=y_hat,
    )


def accumulation_bound(a: NVFP4Tensor, b: NVFP4Tensor) -> Float64:
    """Bound on |ŷ − a bᵀ|, (M, N) float64, for `matmul(a, b)` of every backend; inf where ŷ may overflow.

    Step by step along the chain of a tensor core (docs/emulator.md): aligning four groups and C to 2^(E − 35)
    loses less than 5 of these units, the truncation to float32 less than 2⁻²³ of the sum. One rounding, as in
    the reference, is less. Raises as `matmul`.
    """
    left, right = (_chain_operand(name, q) for name, q in (("a", a), ("b", b)))
    checks.same_depth("a", a.shape[1], "b", b.shape[1])
    total, error = np.zeros((2, len(a.codes), len(b.codes)))
    for (x, scales_x), (w, scales_w) in zip(left, right):
        groups = (scales_x[:, None] * scales_w).max(axis=-1)  # 2^E, unless C is larger
        error = error + 5 * 2.0**-35 * np.maximum(groups, np.abs(total) + error)
        total = total + x @ w.T
        error = error + 2.0**-23 * (np.abs(total) + error) + 2.0**-149
    scale = np.float64(a.tensor_scale) * np.float64(b.tensor_scale)
    largest = np.abs(total) + error
    bound = error * scale + largest * (scale * 2.0**-22 + 2.0**-149) + 2.0**-149
    bound *= 1 + 2.0**-20  # for float64: n steps are less than 4 n² · 2⁻⁵³ of it off, and n < 2¹⁵
    return np.where((largest + 1) * scale < np.finfo(np.float32).max / 2, bound, np.inf)


def _chain_operand(name: str, q: NVFP4Tensor) -> list[tuple[NDArray, NDArray]]:
    """For each step of 64 along K: e2m1 · e4m3 (rows, 64) and the power of two below each scale (rows, 4)."""
    values = integer_values(q, name) * UNIT
    scale = np.maximum(decode(E4M3, q.block_scales).astype(np.float64), E4M3.least_normal)
    power = np.ldexp(1.0, np.frexp(scale)[1] - 1)
    return [
        (values[:, k : k + 64], power[:, k // BLOCK : (k + 64) // BLOCK]) for k in range(0, q.shape[1], 64)
    ]


def worst(true: Float64, got: Float64, bound: Float64) -> Check:
    """The element of three (M, N) float64 matrices with the largest |true − got| / bound; NaN counts as ∞."""
    ratio, unbounded = _ratios(true, got, bound), np.isinf(bound)
    i, j = (int(n) for n in np.unravel_index(np.argmax(np.where(unbounded, -1, ratio)), ratio.shape))
    return Check(
        worst_ratio=float(ratio[i, j]),
        index=(i, j),
        true=float(true[i, j]),
        got=float(got[i, j]),
        bound=float(bound[i, j]),
        without_bound=int(unbounded.sum()),
    )


def _ratios(true: Float64, got: Float64, bound: Float64) -> Float64:
    """|true − got| / bound; where the bound is infinite anything is right."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.abs(true - got) / bound, nan=np.inf, posinf=np.inf)
    return np.where((true == got) | np.isinf(bound), 0.0, ratio)


def block_amax(x: NDArray, block: int = BLOCK) -> NDArray:
    """(M, K) → (M, K / block), the largest |x| of each block."""
    return np.abs(x).reshape(len(x), -1, block).max(axis=-1)
