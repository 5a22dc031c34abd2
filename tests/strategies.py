"""Matrices that tell NVFP4 recipes apart. Random numbers cannot: ties, floors and corners are drawn."""

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from arcquant_ref import Selection
from arcquant_ref.formats import BLOCK, E2M1, E4M3

SIGNIFICANT = [
    1.0,
    1.25,
    1.625,
    1.875,
]  # E4M3 significands at which x·(1/s) and x/s differ, or bounds are sharp


@st.composite
def blocks(draw: st.DrawFn) -> NDArray[np.float32]:
    """Sixteen float32 of one of the kinds below, with random signs."""
    kinds = [ties(), near_ties(), gaussian(), tiny(), one_huge(), constant(), st.just(np.zeros(BLOCK))]
    x = draw(st.one_of(kinds))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=BLOCK, max_size=BLOCK))
    return (np.asarray(x, np.float64) * signs).astype(np.float32)


@st.composite
def ties(draw: st.DrawFn) -> NDArray[np.float64]:
    """Elements exactly on midpoints of E2M1 for the scale that the block gets at tensor_scale = 1."""
    scale = draw(st.sampled_from(SIGNIFICANT)) * 2.0 ** draw(st.integers(-9, 7))
    points = np.concatenate([E2M1.midpoints, E2M1.magnitudes])
    x = np.array(draw(st.lists(st.sampled_from(points), min_size=BLOCK, max_size=BLOCK)), np.float64)
    x[draw(st.integers(0, BLOCK - 1))] = E2M1.max
    return x * scale


@st.composite
def near_ties(draw: st.DrawFn) -> NDArray[np.float64]:
    """The same, one float32 ulp off in either direction."""
    x = draw(ties()).astype(np.float32)
    towards = draw(st.lists(st.sampled_from([-np.inf, 0, np.inf]), min_size=BLOCK, max_size=BLOCK))
    return np.where(np.array(towards) == 0, x, np.nextafter(x, np.float32(towards))).astype(np.float64)


@st.composite
def gaussian(draw: st.DrawFn) -> NDArray[np.float64]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.standard_normal(BLOCK) * 2.0 ** draw(st.integers(-12, 8))


@st.composite
def tiny(draw: st.DrawFn) -> NDArray[np.float64]:
    """Around the floor and the subnormal block scales at tensor_scale = 1."""
    units = draw(st.lists(st.integers(0, 200), min_size=BLOCK, max_size=BLOCK))
    return np.array(units) * E4M3.least_positive / 4


@st.composite
def one_huge(draw: st.DrawFn) -> NDArray[np.float64]:
    x = draw(gaussian())
    x[draw(st.integers(0, BLOCK - 1))] = draw(st.sampled_from([448.0, 2688.0, 2816.0, 1e5, 1e30]))
    return x


@st.composite
def constant(draw: st.DrawFn) -> NDArray[np.float64]:
    return np.full(BLOCK, draw(st.integers(1, 255)) * 2.0 ** draw(st.integers(-20, 4)))


@st.composite
def matrices(draw: st.DrawFn, max_rows: int = 3, blocks_along_k: int | None = None) -> NDArray[np.float32]:
    """(M, K) float32, K a multiple of 16."""
    rows = draw(st.integers(1, max_rows))
    across = blocks_along_k or draw(st.integers(1, 4))
    return np.stack([np.concatenate([draw(blocks()) for _ in range(across)]) for _ in range(rows)])


@st.composite
def two_sided_layers(draw: st.DrawFn, max_rows: int = 3) -> tuple:
    """Activations (M, K), weights (N, K), energy (K,) or None, a selection with any order, S and S_w."""
    across = draw(st.integers(1, 4))
    x, w = (draw(matrices(max_rows, across)) for _ in "xw")
    order, weight_channels = (np.array(draw(st.permutations(range(across * BLOCK)))) for _ in "ab")
    s, s_w = (BLOCK * draw(st.integers(0, across)) for _ in "ab")
    selection = Selection(
        order=order,
        num_residual=s,
        channel_amax=np.abs(x).max(axis=0),
        weight_channels=weight_channels[:s_w],
    )
    return x, w, draw(st.one_of(st.none(), energies(across * BLOCK))), selection


def energies(k: int) -> st.SearchStrategy[NDArray[np.float64]]:
    """Means of squares of K channels: equal, apart by binades, zero in some."""
    some = st.sampled_from([0.0, 1.0, 1.0, 0.25, 3.0, 1 / 3, 1e-6, 1e6])
    return st.lists(some, min_size=k, max_size=k).map(np.array)


tensor_scales = st.sampled_from([None, 1.0, 2.0**-126, 2.0**-10, 1 / 3, 0.0007, 12.5])
