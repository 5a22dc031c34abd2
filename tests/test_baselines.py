import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import matrices

from arcquant_ref import baselines
from arcquant_ref.baselines import ceiling_exponent, floor_exponent, int4, mxfp4, mxfp8

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
