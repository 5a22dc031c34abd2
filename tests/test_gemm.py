from fractions import Fraction

import exact
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import matrices, tensor_scales
from support import every_backend

from arcquant_ref import NVFP4Tensor, gemm, quantize
from arcquant_ref.formats import BLOCK
from arcquant_ref.quantize import exact_values


def operands(blocks_along_k: int):
    pairs = st.tuples(matrices(blocks_along_k=blocks_along_k), tensor_scales).map(lambda p: quantize(*p))
    return st.tuples(pairs, pairs)


@given(operands(2))
def test_integer_product_is_the_real_one(pair):
    a, b = pair
    unit = Fraction(2) ** -20 * Fraction(float(a.tensor_scale)) * Fraction(float(b.tensor_scale))
    left, right = exact_values(a), exact_values(b)
    for (m, n), total in np.ndenumerate(gemm.integer_matmul(a, b)):
        assert int(total) * unit == sum(Fraction(x) * Fraction(y) for x, y in zip(left[m], right[n]))


@given(operands(3))
def test_matmul_rounds_once(pair):
    a, b = pair
    unit = Fraction(2) ** -20 * Fraction(float(a.tensor_scale)) * Fraction(float(b.tensor_scale))
    y = gemm.matmul(a, b)
    assert y.dtype == np.float32
    for index, total in np.ndenumerate(gemm.integer_matmul(a, b)):
        real = int(total) * unit
        if abs(real) < Fraction(2) ** 127:
            assert Fraction(float(y[index])) == exact.fl(real)


def test_matmul_rounds_once_where_float64_would_round_to_a_midpoint():
    """I · m_a · m_b of 54 bits: a float32 midpoint plus one unit, which float64 may drop."""
    wrong_through_float64 = 0
    for m_a in range(2**23 + 1, 2**23 + 3001, 2):
        factor = 93 * m_a
        m_b = (2**29 + 1) * pow(factor, -1, 2**30) % 2**30
        product = factor * m_b
        if not (2**23 <= m_b < 2**24 and product.bit_length() == 54):
            continue
        a = tensor_of([3] * 10 + [1] + [0] * 5, 3, m_a)  # I = 3 · 31 = 93
        b = tensor_of([1] * 16, 1, m_b)
        total = gemm.integer_matmul(a, b).item()
        assert total == 93
        real = total * Fraction(m_a * m_b) * Fraction(2) ** -20
        assert Fraction(float(gemm.matmul(a, b).item())) == exact.fl(real)
        wrong_through_float64 += Fraction(float(np.float32(float(real)))) != exact.fl(real)
    assert wrong_through_float64 > 0


def tensor_of(halves: list[int], scale_code: int, tensor_scale: int) -> NVFP4Tensor:
    """One block of E2M1 codes 0 … 3 (so many halves), one small scale code, an integer tensor scale."""
    return NVFP4Tensor(
        codes=np.uint8([halves]), block_scales=np.uint8([[scale_code]]), tensor_scale=np.float32(tensor_scale)
    )


@given(st.fractions(min_value=-(2**40), max_value=2**40), st.integers(-160, 80))
@example(Fraction(2**24 + 1) + Fraction(1, 2**60), 0)
@example(Fraction(2**24 + 1) - Fraction(1, 2**60), 0)
@example(Fraction(-(2**24) - 1) - Fraction(1, 2**60), 0)
def test_nearest_float32(x, power):
    x *= Fraction(2) ** power
    assert Fraction(float(gemm.nearest_float32(x))) == exact.fl(x)


def test_depth_limit_is_where_int64_could_overflow():
    largest = gemm.integer_values(quantize(np.full((1, BLOCK), 2688.0), 1)).max()
    assert int(largest) ** 2 * gemm.MAX_DEPTH < 2**63 <= int(largest) ** 2 * (gemm.MAX_DEPTH + 1)
    assert gemm.MAX_DEPTH > 1_200_000


def test_the_largest_sums_are_exact():
    q = quantize(np.full((1, 64 * 1024), 2688.0), 1)
    assert gemm.integer_matmul(q, q).item() == (12 * 448 * 512) ** 2 * 64 * 1024


@every_backend
def test_product_beyond_float32_is_infinite(backend):
    q = backend.quantize(np.full((1, BLOCK), 3e38, np.float32))
    assert backend.matmul(q, q).item() == np.inf


@every_backend
def test_linear_of_identity_returns_the_quantized_rows(backend):
    """64 unit vectors quantize exactly, so the product is the dequantized activation."""
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    q, identity = backend.quantize(x, 1), backend.quantize(np.eye(64) * 6, 1)
    np.testing.assert_array_equal(backend.matmul(q, identity) / 6, backend.dequantize(q))


def test_nan_scales_and_different_depths_are_refused():
    q = quantize(np.ones((1, 32)))
    bad = q.map(np.copy)
    bad.block_scales[0, 1] = 0x7F
    with pytest.raises(ValueError, match=r"1 block scales are NaN .* 0x7f at index \(0, 1\)"):
        gemm.matmul(bad, q)
    with pytest.raises(ValueError, match="a has K=32 and b has K=16"):
        gemm.matmul(q, quantize(np.ones((1, 16))))
