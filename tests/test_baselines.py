import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import matrices

from arcquant_ref import baselines
from arcquant_ref.baselines import ceiling_exponent, floor_exponent, hadamard, int4, mxfp4, mxfp8, smoothing

FORMATS = {mxfp8: (ml_dtypes.float8_e4m3fn, 448), mxfp4: (ml_dtypes.float4_e2m1fn, 6)}
even = st.integers(1, 2).map(lambda n: 2 * n)


@pytest.mark.parametrize("mx", FORMATS)
@pytest.mark.parametrize("rule", [ceiling_exponent, floor_exponent])
@given(x=even.flatmap(lambda n: matrices(blocks_along_k=n)))
def test_mx_is_the_block_scaled_cast_of_ml_dtypes(mx, rule, x):
    dtype, largest = FORMATS[mx]
    for row, got in zip(x.reshape(-1, 32).astype(np.float64), mx(x, rule).reshape(-1, 32)):
        amax = np.abs(row).max()
        if rule is ceiling_exponent:
            scale = 2.0**-127
            while amax / scale > largest:
                scale *= 2
        else:
            scale = 2.0 ** max(np.floor(np.log2(amax)) - np.floor(np.log2(largest)), -127) if amax else 1.0
        expected = np.clip(row / scale, -largest, largest).astype(np.float32).astype(dtype)
        np.testing.assert_array_equal(got, expected.astype(np.float64) * scale)


@given(x=st.integers(1, 10).flatmap(lambda n: matrices(max_rows=2, blocks_along_k=n)))
def test_int4_picks_the_nearest_of_fifteen_levels(x):
    got = int4(x)
    for start in range(0, x.shape[1], 128):
        piece, values = x[:, start : start + 128].astype(np.float64), got[:, start : start + 128]
        step = np.abs(piece).max(axis=1, keepdims=True) / 7
        levels = step[..., None] * np.arange(-7, 8)
        nearest = np.abs(levels - piece[..., None]).min(axis=-1)
        assert (np.abs(values - piece) <= nearest + 1e-6 * step + 1e-44).all()


def test_zero_blocks_stay_zero():
    x = np.zeros((2, 64), np.float32)
    for quantizer in (mxfp8, mxfp4, int4):
        np.testing.assert_array_equal(quantizer(x), x)


def test_bits():
    assert baselines.MXFP8_BITS == 8.25


def sylvester(size: int) -> np.ndarray:
    """By its definition: H[i, j] = (−1)^(bits that i and j share) / √size."""
    i = np.arange(size)
    return (-1.0) ** np.bitwise_count(i[:, None] & i) / np.sqrt(size)


K_AND_BLOCK = [(16, 16), (48, 16), (128, 1), (64, 2), (576, "full"), (1536, "full"), (576, 16), (33, "full")]


@pytest.mark.parametrize(("k", "block"), K_AND_BLOCK)
def test_hadamard_is_the_product_with_the_matrix(k, block):
    x = np.random.default_rng(0).standard_normal((5, k)).astype(np.float32)
    size = {576: 64, 1536: 512, 33: 1}[k] if block == "full" else block
    matrix = np.kron(np.eye(k // size), sylvester(size))
    np.testing.assert_array_equal(matrix, matrix.T)
    got = hadamard(x, block)
    assert (got.dtype, got.shape) == (np.float32, x.shape)
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    assert (np.abs(got - x.astype(np.float64) @ matrix) <= 2.0**-24 * np.abs(got) + 1e-14 * norm).all()


# each of the two rotated rows errs by 2⁻²⁴ of its norm, and Cauchy-Schwarz does the rest; + float64
@pytest.mark.parametrize(("k", "block"), K_AND_BLOCK)
def test_hadamard_is_its_own_inverse_and_keeps_products(k, block):
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((7, k)).astype(np.float32), rng.standard_t(2, (9, k)).astype(np.float32)
    norm_x, norm_w = (np.linalg.norm(m.astype(np.float64), axis=1) for m in (x, w))
    back = hadamard(hadamard(x, block), block).astype(np.float64)
    assert (np.linalg.norm(back - x, axis=1) <= 2.001 * 2.0**-24 * norm_x).all()
    y = hadamard(x, block).astype(np.float64) @ hadamard(w, block).astype(np.float64).T
    error = np.abs(y - x.astype(np.float64) @ w.astype(np.float64).T)
    assert (error <= 2.001 * 2.0**-24 * np.outer(norm_x, norm_w)).all()


def test_hadamard_spreads_an_outlier_exactly():
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = 4
    got = hadamard(x, 16)
    np.testing.assert_array_equal(np.abs(got), np.float32([[1] * 16 + [0] * 16]))
    np.testing.assert_array_equal(hadamard(got, 16), x)


def test_hadamard_errors():
    x = np.ones((2, 48), np.float32)
    for block in (0, 3, -4, 2.0, True, "half", None):
        with pytest.raises(ValueError, match=r"block=.* must be a power of two, such as 16, or 'full'"):
            hadamard(x, block)
    with pytest.raises(ValueError, match="x has K=48, which is not a multiple of the block size 32"):
        hadamard(x, 32)
    with pytest.raises(ValueError, match="x: 1 of 48 elements are NaN"):
        hadamard(np.where(np.arange(48) == 3, np.nan, 1)[None], 16)
    with pytest.raises(ValueError, match=r"x rotated: 3 of 48 elements are NaN, infinite or beyond float32"):
        hadamard(np.full((1, 48), 3e38), 16)


amaxes = st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=8, max_size=8)


@given(amaxes, amaxes, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_smoothing_keeps_the_product_and_balances_the_maxima(a, w, alpha, seed):
    rng = np.random.default_rng(seed)
    a, w = np.float32(a), np.float32(w)
    s = smoothing(a, w, alpha)
    assert (s.dtype, s.shape) == (np.float32, (8,))
    # equation 4, in logarithms; of the maxima, a / s = a^(1 − α) w^(1 − α) and w s = a^α w^α
    np.testing.assert_allclose(np.log(s), alpha * np.log(a) - (1 - alpha) * np.log(w), atol=3e-6)
    a, w, s = (v.astype(np.float64) for v in (a, w, s))
    np.testing.assert_allclose(a / s, (a * w) ** (1 - alpha), rtol=1e-6)
    np.testing.assert_allclose(w * s, (a * w) ** alpha, rtol=1e-6)
    x, y = rng.uniform(-1, 1, (3, 8)) * a, rng.uniform(-1, 1, (4, 8)) * w
    np.testing.assert_allclose((x / s) @ (y * s).T, x @ y.T, rtol=0, atol=1e-14 * (a @ w))


def test_smoothing_of_channels_without_a_maximum():
    np.testing.assert_array_equal(
        smoothing([0.0, 2, 0, 4], [3.0, 0, 0, 9], 0.5), np.float32([1, 1, 1, 2 / 3])
    )
    np.testing.assert_array_equal(smoothing([3.0, 5], [2.0, 4], 1), np.float32([3, 5]))
    np.testing.assert_array_equal(smoothing([3.0, 5], [2.0, 4], 0), np.float32([0.5, 0.25]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([1.0, 2.0], [1.0], 0.5),
            r"activation_amax has shape \(2,\) and weight_amax has \(1,\)",
        ),
        (([[1.0]], [[1.0]], 0.5), r"both must be \(K,\), one number for each channel"),
        (([-1.0], [1.0], 0.5), r"activation_amax is -1.0 at index \(0,\)"),
        (([1.0], [np.inf], 0.5), r"weight_amax: 1 of 1 elements are NaN, infinite"),
        (([1.0], [1.0], 1.5), r"alpha=1.5 must be a number from 0 \(none\) to 1 \(all\), such as 0.5"),
        (([1.0], [1.0], True), r"alpha=True must be a number"),
        (([1.0], [2.0**-149], 0), r"smoothing factors: 1 of 1 elements are NaN, infinite or beyond float32"),
    ],
)
def test_smoothing_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        smoothing(*arguments)
