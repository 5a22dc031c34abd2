"""The main job on real layers: calibrate, select, quantize, multiply, check every bound, compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import bounds, checks
from .augment import augment_activations, augment_weights, merge
from .baselines import MX_BLOCK, MXFP8_BITS, mxfp8
from .formats import Float32, Float64
from .gemm import matmul
from .quantize import exact_values, quantize
from .sample import Layer
from .select import Selection, calibrate, select

BF16_BITS = 16
REORDERED = "W4A16 in ARC's order"


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """What one scheme makes of x (M, K) and w (N, K): the values of both, in the original channel order."""

    scheme: str
    num_residual: int
    bits_per_value: float  # of the activations
    x_hat: NDArray  # (M, K)
    x_bounds: Float64  # (M, K)
    w_hat: NDArray  # (N, K)
    y_hat: NDArray  # (M, N)
    accumulation: Float64 | float  # how far y_hat may be from the product of the values, (M, N)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Ratios are the worst error / bound; 0 where the activations are exact."""

    layer: str
    scheme: str
    num_residual: int
    bits_per_value: float
    output_error: float  # mean over tokens of ‖y − ŷ‖ / ‖y‖
    element_ratio: float
    output_ratio: float
    bounds_checked: int


def nvfp4(x: Float32, w: Float32) -> Result:
    """Both operands plain NVFP4."""
    a, b = quantize(x), quantize(w)
    return Result(
        scheme="NVFP4",
        num_residual=0,
        bits_per_value=a.bits_per_value,
        x_hat=exact_values(a),
        x_bounds=bounds.element_bounds(x, a.tensor_scale),
        w_hat=exact_values(b),
        y_hat=matmul(a, b),
        accumulation=bounds.accumulation_bound(a, b),
    )


def arc(x: Float32, w: Float32, selection: Selection) -> Result:
    """The paper's method: residual channels for the activations, duplicated columns for the weights.

    Raises ValueError for a selection with weight channels.
    """
    checks.no_weight_channels("the demo", len(selection.weight_channels))
    a, b = augment_activations(x, selection), augment_weights(w, selection)
    return Result(
        scheme="ARC",
        num_residual=selection.num_residual,
        bits_per_value=selection.bits_per_value,
        x_hat=merge(a, selection),
        x_bounds=bounds.element_bounds(x, a.tensor_scale, selection),
        w_hat=_quantized_in_order(w, selection),
        y_hat=matmul(a, b),
        accumulation=bounds.accumulation_bound(a, b),
    )


def w4a8(x: Float32, w: Float32) -> Result:
    """MXFP8 activations, NVFP4 weights; the product in float64."""
    x_hat, w_hat = mxfp8(x), exact_values(quantize(w))
    amax = np.repeat(bounds.block_amax(x, MX_BLOCK), MX_BLOCK, axis=1)
    x_bounds = amax * float(bounds.MXFP8_CEILING)
    return _float64_product("W4A8", MXFP8_BITS, x_hat, x_bounds, w_hat)


def w4a16(x: Float32, w: Float32) -> Result:
    """Exact activations, NVFP4 weights: what is left when only the weights err."""
    return _float64_product("W4A16", BF16_BITS, x, np.zeros(x.shape), exact_values(quantize(w)))


def w4a16_reordered(x: Float32, w: Float32, selection: Selection) -> Result:
    """The same with the weights quantized in selection order, as ARC quantizes them: ARC's own limit."""
    return _float64_product(REORDERED, BF16_BITS, x, np.zeros(x.shape), _quantized_in_order(w, selection))


def _quantized_in_order(w: Float32, selection: Selection) -> Float64:
    return exact_values(quantize(w[:, selection.order]))[:, np.argsort(selection.order)]


def _float64_product(scheme: str, bits: float, x_hat: Float32, x_bounds: Float64, w_hat: Float64) -> Result:
    return Result(
        scheme=scheme,
        num_residual=0,
        bits_per_value=bits,
        x_hat=x_hat,
        x_bounds=x_bounds,
        w_hat=w_hat,
        y_hat=x_hat.astype(np.float64) @ w_hat.T,
        accumulation=0,
    )


def output_error(x: Float32, w: Float32, y_hat: NDArray) -> float:
    """Mean over tokens of ‖y − ŷ‖ / ‖y‖, y = x wᵀ in float64.

    Token by token, because a language model's first token can be far larger than the others: one norm over
    all of them would measure that token alone.
    """
    y = x.astype(np.float64) @ w.T
    return float(np.mean(np.linalg.norm(y - y_hat, axis=1) / np.linalg.norm(y, axis=1)))


def run(layer: Layer) -> list[Row]:
    """Every scheme on one layer: channels selected on the calibration tokens, errors on the others."""
    x, w = layer.evaluation, layer.weight
    selection = select(calibrate([layer.calibration]))
    results = [nvfp4(x, w), arc(x, w, selection), w4a8(x, w), w4a16(x, w), w4a16_reordered(x, w, selection)]
    return [_row(layer, result) for result in results]


def _row(layer: Layer, result: Result) -> Row:
    x, w = layer.evaluation, layer.weight
    elements = bounds.worst(x.astype(np.float64), result.x_hat, result.x_bounds)
    certificate = bounds.certify_values(
        x, w, result.x_bounds, result.w_hat, result.y_hat, result.accumulation
    )
    return Row(
        layer=layer.name,
        scheme=result.scheme,
        num_residual=result.num_residual,
        bits_per_value=result.bits_per_value,
        output_error=output_error(x, w, result.y_hat),
        element_ratio=elements.worst_ratio,
        output_ratio=float(certificate.tightness.max()),
        bounds_checked=x.size + result.y_hat.size,
    )


def table(layer: Layer, rows: Sequence[Row]) -> str:
    """The rows of one layer as text."""
    (tokens, k), n = layer.evaluation.shape, len(layer.weight)
    lines = [
        f"{layer.name}: {tokens} tokens, K = {k}, {n} outputs",
        "  scheme                  S   bits/value   output error   worst error / bound: elements   outputs",
    ]
    for row in rows:
        residual = f"{row.num_residual:4d}" if row.scheme == "ARC" else "   -"
        elements = f"{row.element_ratio:.3f}" if row.element_ratio else "exact"
        lines.append(
            f"  {row.scheme:<20} {residual}   {row.bits_per_value:10.2f}   {row.output_error:12.2%}"
            f"   {elements:>29}   {row.output_ratio:7.3f}"
        )
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """What the tables show, in words. Says so if a bound does not hold."""
    rows = list(rows)
    by_scheme = {s: [r for r in rows if r.scheme == s] for s in ("NVFP4", "ARC", "W4A8", "W4A16")}
    error = {s: np.array([r.output_error for r in group]) for s, group in by_scheme.items()}
    bits = {s: float(np.mean([r.bits_per_value for r in group])) for s, group in by_scheme.items()}
    gap = (error["NVFP4"] - error["W4A16"]).sum()
    closed = {s: float((error["NVFP4"] - error[s]).sum() / gap) for s in ("ARC", "W4A8")}
    better = int((error["ARC"] < error["NVFP4"]).sum())
    broken = [f"{r.scheme} in {r.layer}" for r in rows if max(r.element_ratio, r.output_ratio) > 1]
    held = f"BOUND VIOLATED: {', '.join(broken)}" if broken else "none violated"
    layers, checked = len(error["ARC"]), sum(r.bounds_checked for r in rows)
    return (
        f"In one plain NVFP4 product, with {bits['ARC']:.2f} bits per activation instead of "
        f"{bits['NVFP4']:.2f}, ARC lowers the output error in {better} of {layers} layers and closes "
        f"{closed['ARC']:.0%} of the gap to exact activations (W4A16); W4A8 closes {closed['W4A8']:.0%} with "
        f"{bits['W4A8']:.2f} bits. {checked:,} error bounds checked, {held}."
    )
