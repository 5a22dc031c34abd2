from fractions import Fraction

import exact
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import energies, matrices, tensor_scales
from support import assert_same_tensor, every_backend, every_two_sided_backend, finite_bf16, optional

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


def tried(x: list[float], energy: list[float], tensor_scale: Fraction) -> list[tuple[int, Fraction, float]]:
    """Of all 127 E4M3 codes those in range: the code, Σ energy · (x − x̂)² exactly, and in float64."""
    a, results = max(abs(Fraction(v)) for v in x), []
    low, high = (
        exact.e4m3(max(exact.fl(exact.fl(a / steps) / tensor_scale), Fraction(1, 512)))
        for steps in (8, Fraction(7, 2))
    )
    for code in range(127):
        scale = exact.decode(2, code)
        if low <= scale <= high:
            step = exact.fl(scale * tensor_scale)
            values = [exact.e2m1(exact.fl(Fraction(v) / step)) * scale * tensor_scale for v in x]
            exactly = sum(Fraction(e) * (Fraction(v) - u) ** 2 for v, u, e in zip(x, values, energy))
            computed = 0.0
            for v, u, e in zip(x, values, energy):
                difference = v - float(u)  # float(u) is exact: 30 significant bits
                computed += difference * difference * e
            results.append((code, exactly, computed))
    return results


# Each of 16 terms: the difference rounded once and squared, a product, another; then 15 sums. 19 roundings
SUM_ROUNDING = Fraction(19, 2**53)


def assert_the_best_scale(w, energy, q):
    scale = Fraction(float(q.tensor_scale))
    for row, codes, scales in zip(w, q.codes, q.block_scales):
        for b, chosen in enumerate(scales):
            block = slice(b * BLOCK, (b + 1) * BLOCK)
            candidates = tried(row[block].tolist(), energy[block].tolist(), scale)
            least = min(computed for _, _, computed in candidates)
            assert chosen == next(code for code, _, computed in candidates if computed == least)
            best = min(exactly for _, exactly, _ in candidates)
            error = next(exactly for code, exactly, _ in candidates if code == chosen)
            assert error <= best * (1 + SUM_ROUNDING) / (1 - SUM_ROUNDING)
            if all(Fraction(computed) == exactly for _, exactly, computed in candidates):
                assert chosen == next(code for code, exactly, _ in candidates if exactly == best)
            step = exact.fl(exact.decode(2, int(chosen)) * scale)
            expected = [exact.e2m1(exact.fl(Fraction(float(v)) / step)) for v in row[block]]
            assert [exact.decode(int(c), 0x38) for c in codes[block]] == expected


@st.composite
def weights_and_energy(draw):
    w = draw(matrices(max_rows=2))
    return w, draw(energies(w.shape[1]))


EQUAL = np.ones(BLOCK)
ADVERSARIAL = {
    "exact at 4 and at 6 steps": (np.full(BLOCK, 12.0), EQUAL, 1),
    "all zero": (np.zeros(BLOCK), EQUAL, 1),
    "all zero, negative": (np.full(BLOCK, -0.0), EQUAL, None),
    "no energy": (np.linspace(-3, 5, BLOCK), 0 * EQUAL, None),
    "energy in one channel": (np.linspace(-3, 5, BLOCK), 1.0 * (np.arange(BLOCK) == 3), 1),
    "energy of the largest only": (np.r_[5.9, np.full(15, 0.3)], 1.0 * (np.arange(BLOCK) == 0), 1),
    "no energy of the largest": (np.r_[5.9, np.full(15, 0.3)], 1.0 * (np.arange(BLOCK) > 0), 1),
    "floored": (np.linspace(-0.011, 0.003, BLOCK), EQUAL, 1),
    "floored, least tensor scale": (np.linspace(-1e-42, 3e-41, BLOCK), EQUAL, 2.0**-126),
    "subnormal scales": (np.linspace(0.02, 0.09, BLOCK), EQUAL, 1),
    "saturated": (np.linspace(-2700, 5000, BLOCK), EQUAL, 1),
    "first scale saturated": (np.full(BLOCK, 448 * 8.0), EQUAL, 1),
    "all scales saturated": (np.linspace(0, 3e38, BLOCK), EQUAL, 1),
    "largest float32": (np.full(BLOCK, np.finfo(np.float32).max), EQUAL, None),
    "energy near the end of float64": (np.linspace(-3, 5, BLOCK), 1e300 * EQUAL, 1),
}


@every_two_sided_backend
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_search_finds_the_best_scale_of_adversarial_blocks(backend, name):
    w, energy, tensor_scale = ADVERSARIAL[name]
    w = w.astype(np.float32)[None]
    assert_the_best_scale(w, energy, backend.quantize_weighted(w, energy, tensor_scale))


@every_two_sided_backend
def test_of_equal_scales_a_search_takes_the_smallest(backend):
    """12 is 6 steps of 2 and 4 steps of 3; nothing else from 12 / 8 to 12 / 3.5 holds it."""
    w = np.full((1, BLOCK), 12.0, np.float32)
    q = backend.quantize_weighted(w, EQUAL, 1)
    assert (dequantize(q) == 12).all()
    assert E4M3.values[q.block_scales].tolist() == [[2.0]]
    unseen = backend.quantize_weighted(w, 0 * EQUAL, 1)
    assert E4M3.values[unseen.block_scales].tolist() == [[1.5]]  # 12 / 8: without energy all are equal


@every_two_sided_backend
def test_sums_beyond_float64_are_equal(backend):
    w = np.linspace(-3e38, 1e38, BLOCK, dtype=np.float32)[None]
    q = backend.quantize_weighted(w, 1e300 * EQUAL, 1e35)
    first, _, _ = tried(w[0].tolist(), EQUAL.tolist(), Fraction(float(q.tensor_scale)))[0]
    assert q.block_scales.item() == first


@every_two_sided_backend
@given(layer=weights_and_energy(), tensor_scale=tensor_scales)
def test_a_search_finds_the_best_scale(backend, layer, tensor_scale):
    w, energy = layer
    assert_the_best_scale(w, energy, backend.quantize_weighted(w, energy, tensor_scale))


@every_two_sided_backend
@pytest.mark.parametrize("tensor_scale", [1.0, 1 / 3, 0.0007])
@pytest.mark.parametrize("steps", [8, 3.5])
def test_a_search_begins_and_ends_at_these_scales(backend, tensor_scale, steps):
    """amax an ulp around thresholds of the first or the last scale, where another order of divisions, or a
    range that ends elsewhere, leaves out the best one."""
    ts = np.float32(tensor_scale)
    amax = around(np.unique(steps * E4M3.midpoints[8::3]) * ts, 1).ravel()
    for fraction in (1 / 16, 2 / 7, 3 / 7, 0.99):
        w = np.repeat(amax[:, None], BLOCK, axis=1)
        w[:, 1:] *= np.float32(fraction)
        assert_the_best_scale(
            w, 1.0 * (np.arange(BLOCK) > 0), backend.quantize_weighted(w, np.r_[0.0, EQUAL[1:]], ts)
        )


@every_two_sided_backend
@given(layer=weights_and_energy(), tensor_scale=tensor_scales)
def test_a_search_is_never_worse_than_quantize(backend, layer, tensor_scale):
    """Its scale, of amax / 6, is always among those tried: every rounding on the way is monotone."""
    w, energy = layer
    plain, best = backend.quantize(w, tensor_scale), backend.quantize_weighted(w, energy, tensor_scale)
    errors = [
        [
            sum(Fraction(e) * (Fraction(float(v)) - Fraction(u)) ** 2 for v, u, e in zip(*block))
            for block in blocks(w, q, energy)
        ]
        for q in (plain, best)
    ]
    for before, after in zip(*errors):
        assert after <= before * (1 + SUM_ROUNDING) / (1 - SUM_ROUNDING)
    for row, scales in zip(w, plain.block_scales):
        for b, scale in enumerate(scales):
            block = row[b * BLOCK : (b + 1) * BLOCK].tolist()
            assert scale in [
                code for code, _, _ in tried(block, EQUAL.tolist(), Fraction(float(plain.tensor_scale)))
            ]


def blocks(w, q, energy):
    """(numbers, values, energies) of each block."""
    for row, values in zip(w, exact_values(q)):
        for b in range(0, len(row), BLOCK):
            yield row[b : b + BLOCK], values[b : b + BLOCK], energy[b : b + BLOCK]


@every_two_sided_backend
@given(layer=weights_and_energy(), power=st.integers(-20, 20))
def test_a_power_of_two_times_the_energy_changes_nothing(backend, layer, power):
    w, energy = layer
    assert_same_tensor(
        backend.quantize_weighted(w, np.ldexp(energy, power)), backend.quantize_weighted(w, energy)
    )
