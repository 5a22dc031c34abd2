"""ARC: quantize the largest channels' residual too and append it along K (docs/spec.md, section 4)."""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .formats import BLOCK, Float32, Float64
from .quantize import exact_values, quantize, quantize_weighted, residual
from .select import Selection
from .tensor import NVFP4Tensor


def augment_activations(
    x: ArrayLike, selection: Selection, tensor_scale: float | np.float32 | None = None
) -> NVFP4Tensor:
    """(M, K) activations → (M, K + S): channels in selection order, the last S of them with their residual.

    The residual is quantized with the tensor scale of the primary codes: the GEMM has only one. With S = 0
    this is quantize(x[:, order]). A selection with weight channels stores these once more, before the last S:
    (M, K + S + S_w). Arguments and errors as in `quantize`; TypeError for a selection of another type,
    ValueError for one made for another K. Source: arXiv 2601.07475; the weight channels are ours.
    """
    x = matching("x", x, selection)[:, selection.columns]
    primary = quantize(x, tensor_scale)
    if selection.num_residual == 0:
        return primary
    r = residual(x, primary)[:, -selection.num_residual :]
    return interleave(primary, quantize(r, primary.tensor_scale))


LANES = 256  # partial sums of a row in `rmsnorm`: as many as its kernel has threads


def rmsnorm(x: ArrayLike, weight: ArrayLike, epsilon: float) -> Float32:
    """y = x · r · weight with r = 1 / √(mean of x² + ε) by rows, (M, K) float32.

    Every operation is rounded to float32, in this order: squares are added to 256 lanes, lane t taking
    k = t, t + 256, …; the upper half of the lanes is added to the lower until one is left; mean = sum / K;
    r = 1 / sqrt(mean + ε); y = (x · r) · weight. Dtypes and errors of x as in `quantize`; ValueError for a
    weight that is not (K,) and finite, a negative epsilon, or a row that leaves the range of float32.
    Source: arXiv 1910.07467; the order is ours.

    >>> rmsnorm(np.full((1, 16), 2.0), np.ones(16), 0)[0, :2]
    array([1., 1.], dtype=float32)
    """
    x = checks.matrix("x", x, BLOCK)
    factors, added = checks.norm_weight(weight, x.shape[1]), checks.epsilon(epsilon)
    with np.errstate(all="ignore"):  # the order of these operations is normative
        mean = _sum_of_squares(x) / np.float32(x.shape[1])
        r = np.float32(1) / np.sqrt(mean + added)
        y = x * r[:, None] * factors
    checks.normalized_rows(np.isfinite(mean) & np.isfinite(y).all(axis=1))
    return y


def _sum_of_squares(x: Float32) -> Float32:
    squares = np.zeros((len(x), -(-x.shape[1] // LANES), LANES), np.float32)
    squares.reshape(len(x), -1)[:, : x.shape[1]] = x * x
    lanes = np.zeros((len(x), LANES), np.float32)
    for i in range(squares.shape[1]):
        lanes += squares[:, i]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def rmsnorm_augment_activations(
    x: ArrayLike,
    weight: ArrayLike,
    epsilon: float,
    selection: Selection,
    tensor_scale: float | np.float32,
) -> NVFP4Tensor:
    """`augment_activations` of `rmsnorm(x, weight, epsilon)`, (M, K + S), as one kernel does it by rows.

    The tensor scale is static: a row cannot know the others. Errors as in the two.
    """
    tensor_scale = checks.tensor_scale(tensor_scale)
    return augment_activations(rmsnorm(x, weight, epsilon), selection, tensor_scale)


def augment_weights(w: ArrayLike, selection: Selection, energy: ArrayLike | None = None) -> NVFP4Tensor:
    """(N, K) weights → (N, K + S): channels in selection order, codes and scale bytes of the last S twice.

    Before them, where the activations of the weight channels stand a second time, their weights' residual,
    (N, K + S + S_w). With `energy` (K,), the mean of x² of each channel, block scales are searched
    (`quantize_weighted`). Arguments and errors as in `augment_activations` and there.
    """
    w, order = matching("w", w, selection)[:, selection.order], selection.order
    if energy is not None:
        energy = checks.channel_energy(energy, selection.K)
    primary = quantize(w) if energy is None else quantize_weighted(w, energy[order])
    repaired, scale = selection.weight_channels, primary.tensor_scale
    if len(repaired):
        r = residual(w, primary)[:, np.argsort(order)[repaired]]
        second = quantize(r, scale) if energy is None else quantize_weighted(r, energy[repaired], scale)
        block, plain = np.arange(selection.K // BLOCK), (selection.K - selection.num_residual) // BLOCK
        before_last_s = np.insert(block, plain, len(block) + np.arange(len(repaired) // BLOCK))
        primary = _take(concatenate(primary, second), before_last_s)
    if selection.num_residual == 0:
        return primary
    return interleave(primary, _take(primary, slice(-selection.num_residual // BLOCK, None)))


def matching(name: str, x: ArrayLike, selection: Selection) -> Float32:
    """(M, K) float32 that this selection was made for; errors as in `augment_activations`."""
    x = checks.matrix(name, x, BLOCK)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits(name, x.shape[1], selection.K)
    return x


def concatenate(left: NVFP4Tensor, right: NVFP4Tensor) -> NVFP4Tensor:
    """Two tensors of one tensor scale side by side along K."""
    codes = np.concatenate([left.codes, right.codes], axis=1)
    block_scales = np.concatenate([left.block_scales, right.block_scales], axis=1)
    return replace(left, codes=codes, block_scales=block_scales)


def interleave(primary: NVFP4Tensor, extra: NVFP4Tensor) -> NVFP4Tensor:
    """(M, K) and (M, S) → (M, K + S) in blocks of 16: P … P, then P₀ E₀ P₁ E₁ … for its last S channels."""
    return _take(concatenate(primary, extra), block_order(primary.shape[1], extra.shape[1]))


def split(q: NVFP4Tensor, num_residual: int) -> tuple[NVFP4Tensor, NVFP4Tensor | None]:
    """An augmented tensor (M, K + S) → the primary one (M, K), channels in order, and the appended one
    (M, S), residuals or second copies of weights; None for S = 0. The inverse of `interleave`.

    Raises TypeError for another type, ValueError for an S that no K + S of this depth can have.
    """
    checks.is_a("q", q, NVFP4Tensor, "augment_activations(x, selection) makes one.")
    num_residual = checks.num_residual(num_residual, q.shape[1] // 2 // BLOCK * BLOCK, BLOCK)
    if num_residual == 0:
        return q, None
    k = q.shape[1] - num_residual
    primary, extra = np.split(np.argsort(block_order(k, num_residual)), [k // BLOCK])
    return _take(q, primary), _take(q, extra)


def merge(q: NVFP4Tensor, selection: Selection) -> Float64:
    """The activations the GEMM sees, (M, K) float64 in the original channel order: primary plus residual.

    What is stored a second time for the weight channels is left out. Errors as in `split`; ValueError for a q
    that was not augmented with this selection's K, S and weight channels.
    """
    checks.is_a("selection", selection, Selection, "It is the one q was augmented with.")
    checks.augmented(q.shape[1], selection.K, selection.augmented_K - selection.K)
    primary, extra = split(q, selection.num_residual)
    values, plain = exact_values(primary), selection.K - selection.num_residual
    values = np.delete(values, np.s_[plain : plain + len(selection.weight_channels)], axis=1)
    if extra is not None:
        values[:, plain:] += exact_values(extra)
    return values[:, np.argsort(selection.order)]


def _take(q: NVFP4Tensor, blocks: NDArray[np.int64] | slice) -> NVFP4Tensor:
    """These blocks of q, in this order."""
    codes = q.codes.reshape(len(q.codes), -1, BLOCK)[:, blocks].reshape(len(q.codes), -1)
    return replace(q, codes=codes, block_scales=q.block_scales[:, blocks])


def block_order(k: int, s: int) -> NDArray[np.int64]:
    """Where each block of the interleaved tensor comes from, primary blocks counted first."""
    n, appended = k // BLOCK, np.arange(s // BLOCK)
    pairs = np.stack([n - s // BLOCK + appended, n + appended], axis=1)
    return np.concatenate([np.arange(n - s // BLOCK), pairs.ravel()])
