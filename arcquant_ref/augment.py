"""ARC: quantize the residual of the outlier channels too and append it along K (docs/spec.md, section 4)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .formats import BLOCK, Float64
from .quantize import exact_values, quantize, quantize_blocks, residual
from .select import Selection
from .tensor import NVFP4Tensor


def augment_activations(x: ArrayLike, selection: Selection, tensor_scale: float | None = None) -> NVFP4Tensor:
    """(M, K) activations → (M, K + S): channels in selection order, each 16 outliers beside their residual.

    The residual is quantized with the tensor scale of the primary codes: the GEMM has only one. With S = 0
    this is quantize(x[:, order]). Arguments and errors as in `quantize`; ValueError for a selection made for
    another K. Source: arXiv 2601.07475.
    """
    x = checks.matrix("x", x, BLOCK)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits("x", x.shape[1], selection.K)
    reordered = x[:, selection.order]
    primary = quantize(reordered, tensor_scale)
    if selection.num_residual == 0:
        return primary
    outliers = slice(selection.K - selection.num_residual, None)
    r = residual(reordered, primary)[:, outliers]
    codes, block_scales = quantize_blocks(r.reshape(len(r), -1, BLOCK), primary.tensor_scale)
    extra = NVFP4Tensor(
        codes=codes.reshape(r.shape), block_scales=block_scales, tensor_scale=primary.tensor_scale
    )
    return interleave(primary, extra)


def augment_weights(w: ArrayLike, selection: Selection) -> NVFP4Tensor:
    """(N, K) weights → (N, K + S): channels in selection order, the outliers' codes and scale bytes twice.

    Arguments and errors as in `augment_activations`.
    """
    w = checks.matrix("w", w, BLOCK)
    checks.is_a("selection", selection, Selection, "select(calibrate([x])) makes one.")
    checks.selection_fits("w", w.shape[1], selection.K)
    primary = quantize(w[:, selection.order])
    if selection.num_residual == 0:
        return primary
    return interleave(primary, _last_channels(primary, selection.num_residual))


def interleave(primary: NVFP4Tensor, extra: NVFP4Tensor) -> NVFP4Tensor:
    """(M, K) and (M, S) → (M, K + S) in blocks of 16: P … P, then P₀ E₀ P₁ E₁ … for its last S channels."""
    plain_first = _block_order(primary.shape[1], extra.shape[1])
    codes = np.concatenate([primary.codes, extra.codes], axis=1)
    block_scales = np.concatenate([primary.block_scales, extra.block_scales], axis=1)
    return NVFP4Tensor(
        codes=codes.reshape(len(codes), -1, BLOCK)[:, plain_first].reshape(codes.shape),
        block_scales=block_scales[:, plain_first],
        tensor_scale=primary.tensor_scale,
    )


def split(q: NVFP4Tensor, num_residual: int) -> tuple[NVFP4Tensor, NVFP4Tensor | None]:
    """The inverse of `interleave`: the primary tensor (M, K) and the appended one (M, S), None for S = 0.

    Raises ValueError for an S that no K + S of this depth can have.
    """
    num_residual = checks.num_residual(num_residual, q.shape[1] // 2 // BLOCK * BLOCK, BLOCK)
    if num_residual == 0:
        return q, None
    k = q.shape[1] - num_residual
    back = np.argsort(_block_order(k, num_residual))
    codes = q.codes.reshape(len(q.codes), -1, BLOCK)[:, back].reshape(q.codes.shape)
    whole = NVFP4Tensor(codes=codes, block_scales=q.block_scales[:, back], tensor_scale=q.tensor_scale)
    primary = NVFP4Tensor(
        codes=codes[:, :k], block_scales=whole.block_scales[:, : k // BLOCK], tensor_scale=q.tensor_scale
    )
    return primary, _last_channels(whole, num_residual)


def merge(q: NVFP4Tensor, selection: Selection) -> Float64:
    """The activations the GEMM sees, (M, K) float64 in the original channel order: primary plus residual.

    Raises ValueError for a q that was not augmented with this selection's K and S.
    """
    checks.augmented(q.shape[1], selection.K, selection.num_residual)
    primary, extra = split(q, selection.num_residual)
    values = exact_values(primary)
    if extra is not None:
        values[:, selection.K - selection.num_residual :] += exact_values(extra)
    return values[:, np.argsort(selection.order)]


def _last_channels(q: NVFP4Tensor, count: int) -> NVFP4Tensor:
    return NVFP4Tensor(
        codes=q.codes[:, -count:],
        block_scales=q.block_scales[:, -count // BLOCK :],
        tensor_scale=q.tensor_scale,
    )


def _block_order(k: int, s: int) -> NDArray[np.int64]:
    """Where each block of the interleaved tensor comes from, primary blocks counted first."""
    n, appended = k // BLOCK, np.arange(s // BLOCK)
    pairs = np.stack([n - s // BLOCK + appended, n + appended], axis=1)
    return np.concatenate([np.arange(n - s // BLOCK), pairs.ravel()])
