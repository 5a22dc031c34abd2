from fractions import Fraction

import exact
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import matrices, tensor_scales
from support import assert_same_tensor, every_backend, finite_bf16, optional

from arcquant_ref import dequantize, layout, quantize
from arcquant_ref.formats import BLOCK, E2M1, E4M3, decode, encode
from arcquant_ref.quantize import exact_values, residual, tensor_scale_of

LEAST_NORMAL = np.finfo(np.float32).tiny


@every_backend
@given(x=matrices(max_rows=2), tensor_scale=tensor_scales)
@example(x=np.float32([[0.5] * 15 + [6 * 1.875]]), tensor_scale=1.0)
@example(x=np.full((1, 16), 0.015625, np.float32), tensor_scale=1.0)
def test_equals_the_rational_restatement(backend, x, tensor_scale):
    """The normative order, every float32 rounding included, one number at a time in exact arithmetic."""
    q = backend.quantize(x, tensor_scale)
    amax = max(Fraction(float(v)) for v in np.abs(x).flat)
    expected_scale = (
        Fraction(float(np.float32(tensor_scale)))
        if tensor_scale
        else max(exact.fl(amax / 2688), Fraction(1, 2**126))
    )
    if amax == 0 and tensor_scale is None:
        expected_scale = Fraction(1)
    assert Fraction(float(q.tensor_scale)) == expected_scale
    for row, codes, scales in zip(x, q.codes, q.block_scales):
        for b, scale in enumerate(scales):
            block = slice(b * BLOCK, (b + 1) * BLOCK)
            expected = exact.quantize_block(row[block].tolist(), Fraction(float(q.tensor_scale)))
            assert (codes[block].tolist(), int(scale)) == expected


ODD_SCALES = [1.0, 1 / 3, 0.0007, 12.5, 2.0**-126 * 1.7, 1.1e20]


def around(x: np.ndarray, ulps: int) -> np.ndarray:
    """Every float32 within so many ulps of each x > 0."""
    return (
        (x.astype(np.float32).view(np.int32) + np.arange(-ulps, ulps + 1)[:, None])
        .astype(np.int32)
        .view(np.float32)
    )


@every_backend
@pytest.mark.parametrize("tensor_scale", ODD_SCALES)
def test_block_scales_around_every_threshold(backend, tensor_scale):
    """Any other order of amax / 6 / tensor_scale moves some amax, a few ulps off, to another block scale."""
    ts = np.float32(tensor_scale)
    amax = around(6 * E4M3.midpoints * ts, 3).ravel()
    got = backend.quantize(np.repeat(amax[:, None], BLOCK, axis=1), ts).block_scales[:, 0]
    for a, scale in zip(amax, got):
        v = exact.fl(exact.fl(Fraction(float(a)) / 6) / Fraction(float(ts)))
        assert exact.decode(2, int(scale)) == exact.e4m3(max(v, Fraction(1, 512))), f"amax {a!r}"


@every_backend
@pytest.mark.parametrize("tensor_scale", ODD_SCALES)
def test_codes_around_every_threshold(backend, tensor_scale):
    """Any other way to x / step moves some element, an ulp off, to another code."""
    ts = np.float32(tensor_scale)
    for scale in (1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 3 * 2.0**-9):
        step = Fraction(float(np.float32(scale) * ts))
        x = around(E2M1.midpoints * np.float32(step), 1).ravel()
        rows = np.full((len(x), BLOCK), 6 * np.float32(step), np.float32)
        rows[:, 0] = x
        for element, codes in zip(x, backend.quantize(rows, ts).codes):
            expected = exact.e2m1(exact.fl(Fraction(float(element)) / step))
            assert exact.decode(int(codes[0]), 0x38) == expected, f"element {element!r}, step {float(step)!r}"


@every_backend
def test_the_tensor_scale_is_one_division(backend):
    """fl(A / 2688), not fl(A / 6) / 448 or A · fl(1 / 2688)."""
    for amax in np.random.default_rng(0).lognormal(0, 20, 500).astype(np.float32):
        x = np.full((1, BLOCK), amax)
        assert Fraction(float(backend.quantize(x).tensor_scale)) == exact.fl(Fraction(float(amax)) / 2688)


@every_backend
@given(x=matrices(), tensor_scale=tensor_scales)
def test_equals_comfy_kitchen_where_no_scale_is_floored(backend, x, tensor_scale):
    torch, comfy = optional("torch"), optional("comfy_kitchen.backends.eager.quantization")
    q = backend.quantize(x, tensor_scale)
    packed, blocked = comfy.quantize_nvfp4(torch.from_numpy(x), torch.tensor(q.tensor_scale), hi_first=False)
    scales = layout.unswizzle_128x4(blocked.view(torch.uint8).flatten().numpy(), q.block_scales.shape)
    floored = (q.block_scales == 1) & (scales == 0)
    np.testing.assert_array_equal(np.where(floored, 1, scales), q.block_scales)
    same = ~np.repeat(floored, BLOCK, axis=1)
    got, expected = q.codes[same], layout.unpack(packed.numpy())[same]
    np.testing.assert_array_equal(np.where(got == 8, 0, got), np.where(expected == 8, 0, expected))  # −0 is 0


def test_float32_steps_change_nothing_for_bf16_at_tensor_scale_one():
    """Exhaustive: against the order without its float32 roundings, every bf16 amax, every scale × bf16."""
    x = finite_bf16()
    amax = x[x > 0].astype(np.float64)
    scales = quantize(np.repeat(x[x > 0], BLOCK).reshape(-1, BLOCK), 1).block_scales[:, 0]
    differing_scales = 0
    for a, got in zip(amax, decode(E4M3, scales)):
        differing_scales += float(exact.e4m3(max(Fraction(a) / 6, Fraction(1, 512)))) != got
    assert differing_scales == 0
    differing_codes, x = 0, x[np.abs(x) < 2.0**100]  # beyond, everything saturates
    for scale in E4M3.magnitudes[1:]:
        thresholds = E2M1.midpoints.astype(np.float64) * scale  # exact, so comparing is exact
        down = np.searchsorted(thresholds, np.abs(x), side="left")
        up = np.searchsorted(thresholds, np.abs(x), side="right")
        expected = np.where(down % 2 == 0, down, up)
        differing_codes += (encode(E2M1, np.abs(x) / np.float32(scale)) != expected).sum()
    assert differing_codes == 0


@every_backend
@given(x=matrices(), tensor_scale=tensor_scales)
@example(x=np.float32([[1.735301849881618e-29] + [0] * 15]), tensor_scale=5.923163358706431e-28)
def test_quantize_is_idempotent(backend, x, tensor_scale):
    """With its own tensor scale; but a subnormal scale can round up so far that amax becomes 4 steps."""
    q = backend.quantize(x, tensor_scale)
    again = backend.quantize(backend.dequantize(q), q.tensor_scale)
    largest = (q.codes % 8).reshape(len(x), -1, BLOCK).max(axis=-1)
    stable = (largest == 7) | (q.block_scales == 1)
    assert (stable | (q.block_scales == 2) | (q.block_scales == 3)).all()
    np.testing.assert_array_equal(again.block_scales[stable], q.block_scales[stable])
    where = np.repeat(stable, BLOCK, axis=1)
    np.testing.assert_array_equal(again.codes[where], q.codes[where])


def test_a_block_that_is_not_idempotent():
    """amax / 6 = 1.6 · 2⁻⁹ rounds to scale 2 · 2⁻⁹, amax to 4 of it, and 4 · 2 / 6 = 1.33 to scale 1."""
    x = np.full((1, BLOCK), 1.6 * 6 * E4M3.least_positive)
    q = quantize(x, 1)
    again = quantize(dequantize(q), 1)
    assert (q.block_scales.item(), again.block_scales.item()) == (2, 1)
    assert dequantize(again)[0, 0] < dequantize(q)[0, 0]


@every_backend
@given(x=matrices(), power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_commutes(backend, x, power):
    x = np.where(np.abs(x) < 2.0**-80, 0, x).astype(np.float32)
    q = backend.quantize(x)
    scaled = backend.quantize(np.ldexp(x, power))
    np.testing.assert_array_equal(scaled.codes, q.codes)
    np.testing.assert_array_equal(scaled.block_scales, q.block_scales)
    assert scaled.tensor_scale == (np.ldexp(q.tensor_scale, power) if x.any() else 1)


@every_backend
@given(x=matrices(blocks_along_k=4), order=st.permutations(range(4)), tensor_scale=tensor_scales)
def test_permuting_whole_blocks_commutes(backend, x, order, tensor_scale):
    channels = np.arange(x.shape[1]).reshape(4, BLOCK)[list(order)].ravel()
    q = backend.quantize(x, tensor_scale)
    permuted = backend.quantize(x[:, channels], tensor_scale)
    np.testing.assert_array_equal(permuted.codes, q.codes[:, channels])
    np.testing.assert_array_equal(permuted.block_scales, q.block_scales[:, list(order)])


@every_backend
@given(x=matrices(), tensor_scale=tensor_scales)
def test_negating_flips_only_sign_bits(backend, x, tensor_scale):
    q, negated = backend.quantize(x, tensor_scale), backend.quantize(-x, tensor_scale)
    np.testing.assert_array_equal(negated.codes, q.codes ^ 8)
    np.testing.assert_array_equal(negated.block_scales, q.block_scales)


@every_backend
@given(x=matrices())
def test_dtypes_give_the_bytes_of_their_float32_values(backend, x):
    x = np.clip(x, -60000, 60000)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        assert_same_tensor(
            backend.quantize(x.astype(dtype)), backend.quantize(x.astype(dtype).astype(np.float32))
        )
    x64 = x * (1 + 2.0**-30)
    assert_same_tensor(backend.quantize(x64), backend.quantize(x64.astype(np.float32)))


@every_backend
def test_zero_tensor_and_zero_block(backend):
    q = backend.quantize(np.zeros((2, 32)))
    assert (q.tensor_scale, set(q.codes.flat), set(q.block_scales.flat)) == (1, {0}, {1})
    half = backend.quantize(np.float32([[0.0] * 8 + [-0.0] * 8 + [5] * 16]))
    assert half.block_scales.tolist() == [[1, 0x7E]]
    assert half.codes[0, :16].tolist() == [0] * 8 + [8] * 8


@every_backend
def test_saturation_with_a_static_tensor_scale(backend):
    q = backend.quantize(np.float32([[2688, 2689, 1e38, -1e38] + [0] * 12]), 1)
    np.testing.assert_array_equal(backend.dequantize(q)[0, :4], [2688, 2688, 2688, -2688])
    assert q.block_scales.item() == 0x7E


@pytest.mark.parametrize(
    "amax", [1e-45, 1e-40, 2688 * 2.0**-127, 2688 * 2.0**-126, 1, np.finfo(np.float32).max]
)
def test_tensor_scale_is_never_subnormal_and_nothing_overflows(amax):
    x = np.full((1, BLOCK), amax, np.float32)
    assert tensor_scale_of(x) == max(np.float32(amax) / np.float32(2688), LEAST_NORMAL)
    assert np.isfinite(dequantize(quantize(x))).all()


def test_the_largest_floats_survive_the_round_trip():
    """2688 · fl(amax / 2688) can exceed amax by an ulp; at the top of float32 that must not become inf."""
    top = np.finfo(np.float32).max.view(np.uint32)
    x = np.arange(top - 5000, top + 1, dtype=np.uint32).view(np.float32)
    for amax in x:
        assert np.isfinite(dequantize(quantize(np.full((1, BLOCK), amax)))).all()


@given(x=matrices(), tensor_scale=tensor_scales)
def test_exact_values_are_exact(x, tensor_scale):
    q = quantize(x, tensor_scale)
    values = exact_values(q)
    scales = np.repeat(q.block_scales, BLOCK, axis=1)
    for index in np.ndindex(values.shape):
        factors = (E2M1.values[q.codes[index]], E4M3.values[scales[index]], q.tensor_scale)
        assert Fraction(values[index]) == np.prod([Fraction(float(f)) for f in factors])


@given(x=matrices(), tensor_scale=tensor_scales)
@example(x=np.float32([[2.0**-100 * (1 + 2**-23)] + [0] * 15]), tensor_scale=2.0**-126)
def test_residual_is_rounded_once(x, tensor_scale):
    q = quantize(x, tensor_scale)
    values, r = exact_values(q), residual(x, q)
    for index in np.ndindex(x.shape):
        exactly = Fraction(float(x[index])) - Fraction(values[index])
        assert Fraction(float(r[index])) == exact.fl(exactly)


def test_residual_is_rounded_once_when_float64_cannot_hold_it():
    """A static scale that saturates x by 2²⁴: 6 · 448 · tensor_scale is about half a float32 ulp of x."""
    nearest_to_a_power = round(2**28 / 21)  # 21 · m next to 2²⁸, the worst case of the argument in `residual`
    for m in range(nearest_to_a_power - 20, nearest_to_a_power + 21):
        tensor_scale = np.float32(m)
        half_ulp = np.float32(2.0**28 * 2**7)
        for significand in (2**23, 2**23 + 1, 2**23 + 2, 2**24 - 2, 2**24 - 1):
            for sign in (-1, 1):
                x = np.zeros((1, BLOCK), np.float32)
                x[0, 3] = sign * significand * 2 * half_ulp
                q = quantize(x, tensor_scale)
                exactly = Fraction(float(x[0, 3])) - Fraction(exact_values(q)[0, 3])
                assert Fraction(float(residual(x, q)[0, 3])) == exact.fl(exactly)
