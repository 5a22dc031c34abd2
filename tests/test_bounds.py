from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import stress
from hypothesis import example, given, target
from hypothesis import strategies as st
from strategies import matrices, tensor_scales, two_sided_layers
from support import every_backend, every_two_sided_backend, finite_bf16, in_bfloat16, neighbours

from arcquant_ref import (
    NVFP4Tensor,
    Selection,
    augment_activations,
    augment_weights,
    baselines,
    bounds,
    calibrate,
    dequantize,
    linear,
    matmul,
    prove,
    quantize,
    quantize_weighted,
    select,
    select_top,
)
from arcquant_ref.formats import BLOCK, E2M1, E4M3
from arcquant_ref.quantize import exact_values
from arcquant_ref.sample import load_sample


def test_the_constants_are_the_published_fractions():
    assert (Fraction(3, 17), Fraction(3, 100)) == (bounds.NVFP4, bounds.ARC)
    assert (Fraction(1, 17), Fraction(1, 8)) == (bounds.MXFP8_CEILING, bounds.MXFP8_FLOOR)
    assert (Fraction(1, 5), Fraction(1, 4)) == (bounds.MXFP4_CEILING, bounds.MXFP4_FLOOR)
    assert Fraction(791, 10000) < bounds.PAPER_ARC < Fraction(792, 10000)


@every_backend
@given(x=matrices(), tensor_scale=tensor_scales)
@example(x=np.full((1, BLOCK), 0.015625, np.float32), tensor_scale=1.0)
def test_every_element_stays_within_its_bound(backend, x, tensor_scale):
    check = bounds.check(x, backend.quantize(x, tensor_scale))
    target(check.worst_ratio)
    assert check.holds, check


@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-126, 2.0**-100 * 1.1, 1 / 3])
def test_bounds_hold_around_every_scale_threshold(tensor_scale):
    """Block amax ± 1 ulp at every E4M3 midpoint, every value and the floor; elements at every E2M1 threshold,
    ± 1 ulp. Plain and with a residual."""
    thresholds = np.concatenate(
        [E4M3.midpoints, E4M3.magnitudes[1:], E4M3.midpoints[:3] / 2, [460, 600, 5000]]
    )
    amax = neighbours((6 * thresholds * tensor_scale).astype(np.float32))
    step = exact_steps(amax, tensor_scale)
    x = np.concatenate([np.float32(m) * step for m in (*E2M1.midpoints, 0.1, 5.2, 5.7)])
    x = neighbours(x).reshape(-1, len(amax)).T
    x = np.minimum(np.abs(x), amax[:, None])
    x = np.concatenate([amax[:, None], x, np.zeros((len(amax), -(x.shape[1] + 1) % 15), np.float32)], axis=1)
    rows = np.concatenate(
        [np.repeat(amax[:, None], x.shape[1] // 15, 1)[..., None], x.reshape(len(x), -1, 15)], axis=2
    )
    rows = rows.reshape(-1, BLOCK)
    selection = select_top(np.ones(BLOCK), BLOCK)
    plain = bounds.check(rows, quantize(rows, tensor_scale))
    assert plain.holds, plain
    arc = bounds.check(rows, augment_activations(rows, selection, tensor_scale), selection)
    assert arc.holds, arc


def exact_steps(amax, tensor_scale):
    q = quantize(np.repeat(amax[:, None], BLOCK, axis=1), tensor_scale)
    return E4M3.values[q.block_scales[:, 0]] * np.float32(tensor_scale)


def test_3_17_is_nearly_attained_by_bf16():
    """Every bf16 amax of one binade of scales, every bf16 element below it, exhaustively."""
    x = finite_bf16()
    worst = 0.0
    for amax in x[(x >= 6) & (x < 12)]:
        elements = x[(x >= 0) & (x <= amax)]
        blocks = np.full((-(-len(elements) // 15), BLOCK), amax, np.float32)
        blocks[:, 1:] = np.resize(elements, (len(blocks), 15))
        worst = max(worst, np.abs(exact_values(quantize(blocks, 1)) - blocks).max() / amax)
    assert 0.1756 < worst < bounds.NVFP4


LEAST = 2.0**-9  # the least E4M3
WITNESSES = {  # regime: amax and one element, at tensor scale 1
    "normal": prove.worst_block("NVFP4"),
    "largest scale": (2600, 5 * 448),
    "largest scale, amax saturates a little": (3100, 5 * 448),
    "saturated": (5000, 0),
    "subnormal, scale rounds down": (6 * 2.5 * LEAST, 0),
    "subnormal, scale rounds up": (6 * 5.5 * LEAST, 5 * 6 * LEAST),
    "subnormal, scale rounds up to the least normal": (6 * 7.5 * LEAST, 5 * 8 * LEAST),
    "floored": (5.9 * LEAST, 5 * LEAST),
    "floored, all codes zero": (0.24 * LEAST, 0),
}


def padded(numbers) -> np.ndarray:
    """As one block."""
    return np.float32([[*numbers] + [0] * (BLOCK - len(numbers))])


@pytest.mark.parametrize("witness", WITNESSES.values(), ids=WITNESSES)
@pytest.mark.parametrize("power", [-117, 0, 40])
def test_the_bound_is_sharp_in_every_regime(witness, power):
    x = np.ldexp(padded(witness), power)
    check = bounds.check(x, quantize(x, 2.0**power))
    assert 0.9999 < check.worst_ratio <= 1


def test_the_arc_bound_is_sharp_and_a_code_off_by_one_breaks_it():
    x = padded(prove.worst_block("ARC"))
    q = augment_activations(x, prove.ALL, 1)
    check = bounds.check(x, q, prove.ALL)
    assert 0.9999 < check.worst_ratio <= 1
    assert abs(check.true - check.got) / x.max() > 0.02999
    assert q.codes[0, BLOCK + 2] == 6  # 5 is halfway between 4 and 6, codes 6 and 7
    for code in (5, 4, 0, 14):
        wrong = q.map(np.copy)
        wrong.codes[0, BLOCK + 2] = code
        assert not bounds.check(x, wrong, prove.ALL).holds


def test_at_most_one_step_is_false_for_subnormal_scales():
    x = np.full((1, BLOCK), 0.015625, np.float32)
    q = quantize(x, 1)
    step = E4M3.values[q.block_scales.item()]
    assert np.abs(dequantize(q) - x).max() == 2 * step
    assert bounds.check(x, q).holds


@given(st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32), st.sampled_from([1.0, 1e-3, 2.0**-126]))
def test_bounds_do_not_decrease_with_amax(a, b, tensor_scale):
    small, large = sorted([a, b])
    assert bounds.nvfp4_bound(small, tensor_scale) <= bounds.nvfp4_bound(large, tensor_scale)
    assert bounds.arc_bound(large, tensor_scale) <= bounds.nvfp4_bound(large, tensor_scale)


RULES = {
    (baselines.mxfp8, baselines.ceiling_exponent): bounds.MXFP8_CEILING,
    (baselines.mxfp8, baselines.floor_exponent): bounds.MXFP8_FLOOR,
    (baselines.mxfp4, baselines.ceiling_exponent): bounds.MXFP4_CEILING,
    (baselines.mxfp4, baselines.floor_exponent): bounds.MXFP4_FLOOR,
}


@pytest.mark.parametrize(("mx", "rule"), RULES)
def test_mx_bounds_hold_and_are_attained_over_all_bf16_amax_and_elements(mx, rule):
    """One binade of amax is enough: powers of two commute."""
    x = finite_bf16()
    amaxes = x[(x >= 256) & (x < 512)].astype(np.float64)
    elements = x[(x >= 0) & (x < 512)]
    worst = 0.0
    for amax in amaxes:
        below = elements[elements <= amax]
        rows = np.full((-(-len(below) // 31), 32), amax, np.float32)
        padded = np.resize(below, len(rows) * 31).reshape(-1, 31)
        rows[:, 1:] = padded
        worst = max(worst, np.abs(mx(rows, rule).astype(np.float64) - rows).max() / amax)
    assert worst == pytest.approx(in_bfloat16(RULES[mx, rule], rule), rel=2.0**-51)
    assert worst <= float(RULES[mx, rule])


@given(matrices(blocks_along_k=2), matrices(blocks_along_k=2))
def test_a_certificate_of_values(x, w):
    """Of those that the operands have, worked out apart from them, it is the certificate of the layer."""
    x, w = np.clip(x, -1e4, 1e4), np.clip(w, -1e4, 1e4)
    selection = select_top(np.abs(x).max(axis=0), BLOCK)
    a, b = augment_activations(x, selection), augment_weights(w, selection)
    w_hat = exact_values(quantize(w[:, selection.order]))[:, np.argsort(selection.order)]
    x_bounds = bounds.element_bounds(x, a.tensor_scale, selection)
    accumulation = bounds.accumulation_bound(a, b)
    values = bounds.certify_values(x, w, x_bounds, w_hat, matmul(a, b), accumulation)
    layer = bounds.certify(x, w, selection)
    for part in ("activation", "weight", "accumulation"):  # sums of 32 terms, in another order
        np.testing.assert_allclose(getattr(values, part), getattr(layer, part), rtol=32 * 2.0**-52)
    np.testing.assert_array_equal(values.y_hat, layer.y_hat)
    assert values.check(values.y_hat).holds
    far = values.y_hat + 2.001 * values.bound  # y_hat is within one bound of y, so this is not
    assert not values.check(far).holds


def test_float32_rounding_reaches_beyond_3_17_but_not_beyond_its_allowance():
    """Found by random search: amax and element 5 · step, each an ulp or two from its threshold."""
    x = np.float32([[11.352904319763184, 10.017269134521484] + [0] * 14])
    q = quantize(x, np.float32(1.7808476686477661))
    error = abs(Fraction(exact_values(q)[0, 1]) - Fraction(float(x[0, 1])))
    beyond = error / (bounds.NVFP4 * Fraction(float(x[0, 0]))) - 1
    assert Fraction(7, 2**24) < beyond < Fraction(8, 2**24)
    assert bounds.check(x, q).holds


def test_an_exact_product_may_err_by_its_last_rounding_and_no_more():
    x, w = np.array([[1.0]]), np.array([[1 + 2.0**-25], [-1 - 2.0**-30], [2.0**-151 * 1.5]])
    right = (x @ w.T).astype(np.float32)
    last_rounding = np.abs(x @ w.T) * 2.0**-24 + 2.0**-150

    def certificate(n=slice(None)):
        return bounds.certify_values(x, w[n], np.zeros((1, 1)), w[n], right[:, n], last_rounding[:, n])

    assert certificate().check(right).holds
    for away in (-np.inf, np.inf):
        wrong = np.nextafter(right, np.float32(away))
        assert min(certificate([n]).check(wrong[:, [n]]).worst_ratio for n in range(3)) > 1
    assert not certificate().check(np.full_like(right, np.inf)).holds


@st.composite
def layers(draw):
    """x, w and a selection, of every kind of block; and a tensor scale, which may saturate x."""
    blocks = draw(st.integers(1, 5))
    x, w = (np.clip(draw(matrices(blocks_along_k=blocks)), -1e6, 1e6) for _ in "xw")
    s = BLOCK * draw(st.integers(0, blocks))
    return x, w, draw(st.sampled_from([None, select_top(np.abs(x).max(axis=0), s)])), draw(tensor_scales)


def operands(backend, x, w, selection, tensor_scale=None):
    if selection is None:
        return backend.quantize(x, tensor_scale), backend.quantize(w)
    return backend.augment_activations(x, selection, tensor_scale), backend.augment_weights(w, selection)


@every_backend
@given(layers())
def test_a_certificate_holds_for_every_product(backend, layer):
    x, w, selection, tensor_scale = layer
    certificate = bounds.certify(x, w, selection, tensor_scale)
    check = certificate.check(backend.matmul(*operands(backend, *layer)))
    target(check.worst_ratio)
    assert check.holds, check
    assert (certificate.tightness <= 1).all()


@every_backend
def test_a_certificate_holds_on_real_layers(backend):
    for layer in load_sample():
        x, w = layer.evaluation, layer.weight
        for selection in (None, select(calibrate([layer.calibration]))):
            check = bounds.certify(x, w, selection).check(backend.matmul(*operands(backend, x, w, selection)))
            assert check.holds, check


def test_a_certificate_is_no_empty_promise_on_real_layers():
    """With weights that pick one channel each it is as near the error as the bound of the worst element is,
    but for the accumulation part: at most 25 steps and an epilogue, less than 32 · 2⁻²³ of y. In a normal
    block y is at most (17/16 · 6)² < 41 times the bound, so this is less than 2⁻¹² of the bound."""
    for layer in load_sample():
        x = layer.evaluation
        for selection in (None, select(calibrate([layer.calibration]))):
            q = quantize(x) if selection is None else augment_activations(x, selection)
            element = bounds.check(x, q, selection).worst_ratio
            certificate = bounds.certify(x, np.eye(x.shape[1]), selection)
            assert element * (1 - 2.0**-12) < certificate.tightness.max() <= 1


@every_backend
def test_a_code_off_by_one_breaks_a_certificate(backend):
    """Weights that pick one channel each show the error of its element: nothing hides in a sum."""
    x = padded(prove.worst_block("ARC"))
    w = np.eye(BLOCK)
    certificate = bounds.certify(x, w, prove.ALL, 1)
    assert 0.9999 < certificate.tightness.max() <= 1
    a, b = operands(backend, x, w, prove.ALL, 1)
    assert certificate.check(backend.matmul(a, b)).holds
    for k, code in ((1, 7), (2, 7), (BLOCK + 2, 5)):  # primary and residual codes 6, one off
        assert a.codes[0, k] == 6
        wrong = a.map(np.copy)
        wrong.codes[0, k] = code
        check = certificate.check(backend.matmul(wrong, b))
        assert not check.holds
        assert check.index == (0, k % BLOCK)


def test_the_parts_of_a_certificate():
    x, w = np.full((2, 32), 3.0), np.full((3, 32), 0.1)
    certificate = bounds.certify(x, w)
    hat = exact_values(quantize(w))
    np.testing.assert_allclose(certificate.weight, np.abs(x) @ np.abs(w.astype(np.float32) - hat).T)
    bound = bounds.element_bounds(x, quantize(x).tensor_scale)
    np.testing.assert_allclose(certificate.activation, bound @ np.abs(hat).T)
    assert (certificate.accumulation < 1e-5 * certificate.activation).all()
    np.testing.assert_array_equal(certificate.y_hat, linear(x, w, select_top(np.ones(32), 0)))
    with pytest.raises(ValueError, match=r"y_hat has shape \(3, 2\) but y has \(2, 3\)"):
        certificate.check(certificate.y_hat.T)
    with pytest.raises(ValueError, match="x has K=32 and w has K=16"):
        bounds.certify(x, w[:, :16])


def test_an_output_that_may_overflow_has_no_bound():
    x, w = np.full((1, BLOCK), 1e20), np.full((2, BLOCK), [[1e18], [1e-3]])
    certificate = bounds.certify(x, w)
    assert np.isinf(certificate.bound).tolist() == [[True, False]]
    assert np.isinf(certificate.y_hat[0, 0])
    assert certificate.tightness[0, 0] == 0
    check = certificate.check(certificate.y_hat)
    assert check.holds
    assert check.index == (0, 1)  # the one with a bound, whatever its error
    assert certificate.check(certificate.y[:, [1, 1]]).index == (0, 1)
    assert str(check).endswith("; outputs without a bound, as float32 may overflow: 1")
    assert certificate.check(np.float64([[np.nan, certificate.y[0, 1]]])).holds
    assert not certificate.check(np.full((1, 2), np.inf)).holds
    nothing = bounds.certify(x, w[:1])
    assert str(nothing.check(nothing.y_hat)) == "none of 1 outputs has a bound: float32 may overflow"


def test_worst_reports_the_witness_and_nan_is_a_violation():
    true, got = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.5], [3.0, 4.25]])
    check = bounds.worst(true, got, np.array([[1.0, 1.0], [1.0, 0.25]]))
    assert check == bounds.Check(worst_ratio=1.0, index=(1, 1), true=4.0, got=4.25, bound=0.25)
    for violation in (np.nan, np.inf):
        got[0, 0] = violation
        assert bounds.worst(true, got, np.ones((2, 2))).worst_ratio == np.inf
    assert bounds.worst(true, true, np.zeros((2, 2))).worst_ratio == 0


@every_two_sided_backend
@given(two_sided_layers(), tensor_scales)
def test_a_certificate_holds_with_residuals_of_weights(backend, layer, tensor_scale):
    x, w, energy, selection = layer
    x, w = np.clip(x, -1e6, 1e6), np.clip(w, -1e6, 1e6)
    certificate = bounds.certify(x, w, selection, tensor_scale, energy)
    a, b = (
        backend.augment_activations(x, selection, tensor_scale),
        backend.augment_weights(w, selection, energy),
    )
    check = certificate.check(backend.matmul(a, b))
    target(check.worst_ratio)
    assert check.holds, check
    assert (certificate.tightness <= 1).all()
    y = x.astype(np.float64) @ w.T.astype(np.float64)  # the same but for the order of at most 128 terms
    np.testing.assert_allclose(certificate.y, y, atol=2 * certificate.accumulation.max(), rtol=0)


@every_two_sided_backend
@pytest.mark.parametrize("name", stress.inputs())
def test_a_certificate_with_residuals_of_weights_holds_on_stress_data(backend, name):
    x = stress.inputs()[name]
    x = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)
    x = np.clip(x, -1e15, 1e15)
    w, k = x[::-1, ::-1], x.shape[1]
    channels = np.random.default_rng(0).permutation(k)
    for s, s_w in ((0, 16), (16, 32), (32, 64), (64, 64)):
        selection = Selection(
            order=np.argsort(channels),
            num_residual=s,
            channel_amax=calibrate([x]),
            weight_channels=channels[:s_w],
        )
        for energy in (None, np.square(x, dtype=np.float64).mean(axis=0)):
            a, b = backend.augment_activations(x, selection), backend.augment_weights(w, selection, energy)
            check = bounds.certify(x, w, selection, energy=energy).check(backend.matmul(a, b))
            assert check.holds, check


def test_residuals_of_weights_shrink_the_weight_part():
    """Of all channels, to less than a fifth, as 3/17 becomes 3/100; of a block more, to less."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 64)), rng.standard_normal((5, 64))
    parts = [
        bounds.certify(x, w, replace(select_top(calibrate([x]), 16), weight_channels=np.arange(s_w))).weight
        for s_w in (0, 16, 32, 48, 64)
    ]
    for fewer, more in pairwise(parts):
        assert (more < fewer).all()
    assert (parts[-1] < parts[0] / 5).all()


def test_energy_without_a_selection_is_heard():
    rng = np.random.default_rng(1)
    x, w, energy = rng.standard_normal((4, 64)), rng.standard_normal((5, 64)), rng.random(64)
    certificate = bounds.certify(x, w, energy=energy)
    np.testing.assert_array_equal(certificate.y_hat, matmul(quantize(x), quantize_weighted(w, energy)))
    assert (certificate.tightness <= 1).all()


def test_a_second_place_has_no_residual_of_activations():
    """It errs by as much as a first one without: x is a worst block, and the error of w in its first place
    has the sign of ŵ, so that nearly all of the bound is used up."""
    x, w, channels = np.zeros((1, 32)), np.zeros((2, 32)), np.arange(32)
    x[0, :2] = prove.worst_block("NVFP4")
    w[0, 1], w[1] = np.nextafter(np.float32(6 * 1.0625), np.float32(0)), 2688  # 6 + 6/16; tensor scale 1
    selection = Selection(
        order=channels, num_residual=16, channel_amax=np.ones(32), weight_channels=channels[:16]
    )
    certificate = bounds.certify(x, w, selection, 1)
    assert 0.9999 < certificate.tightness[0, 0] <= 1
    assert 0 < certificate.weight[0, 0] < 1e-5 * certificate.activation[0, 0]


def without_weight_residuals(b: NVFP4Tensor, again: slice) -> NVFP4Tensor:
    codes = b.codes.copy()
    codes[:, again] = 0
    return replace(b, codes=codes)


def of_other_channels(b: NVFP4Tensor, again: slice) -> NVFP4Tensor:
    """The residual of each block where the next one's belongs."""
    return moved(
        b,
        np.concatenate(
            [
                np.arange(0, again.start),
                np.roll(np.arange(again.start, again.stop), BLOCK),
                np.arange(again.stop, b.shape[1]),
            ]
        ),
    )


def after_the_last_s(b: NVFP4Tensor, again: slice) -> NVFP4Tensor:
    return moved(
        b, np.concatenate([np.delete(np.arange(b.shape[1]), again), np.arange(again.start, again.stop)])
    )


def of_another_tensor_scale(b: NVFP4Tensor, again: slice) -> NVFP4Tensor:
    """Quantized with a scale of its own, that of its amax, which the product does not know."""
    r = exact_values(b)[:, again]
    own = quantize(r)
    codes, block_scales = b.codes.copy(), b.block_scales.copy()
    codes[:, again], block_scales[:, again.start // BLOCK : again.stop // BLOCK] = own.codes, own.block_scales
    return replace(b, codes=codes, block_scales=block_scales)


def with_the_other_sign(b: NVFP4Tensor, again: slice) -> NVFP4Tensor:
    codes = b.codes.copy()
    codes[:, again] ^= 8
    return replace(b, codes=codes)


def moved(b: NVFP4Tensor, columns: np.ndarray) -> NVFP4Tensor:
    return replace(b, codes=b.codes[:, columns], block_scales=b.block_scales[:, columns[::BLOCK] // BLOCK])


@every_two_sided_backend
@pytest.mark.parametrize(
    "plant",
    [
        without_weight_residuals,
        of_other_channels,
        after_the_last_s,
        of_another_tensor_scale,
        with_the_other_sign,
    ],
)
@pytest.mark.parametrize("searched", [False, True])
def test_a_planted_bug_in_the_residuals_of_weights_breaks_a_certificate(backend, plant, searched):
    """Activations that pick one channel each, all of them repaired, and weights of two channels each, the
    second one at 5 of its steps: its residual is 3/17 of the first, the activations' bound 3/100 of both.
    A search without energy loses even more. A last row makes the tensor scale 1."""
    k = 64
    amax, worst = prove.worst_block("NVFP4")
    w = np.zeros((k + 1, k))
    w[np.arange(k), np.arange(k)], w[np.arange(k), np.arange(k) ^ 1], w[k] = worst, amax, 2688
    x = np.eye(k)
    order = (np.random.default_rng(4).permutation(k // 2)[:, None] * 2 + [0, 1]).ravel()
    selection = Selection(
        order=order,
        num_residual=k,
        channel_amax=np.ones(k),
        weight_channels=np.random.default_rng(5).permutation(k),
    )
    energy = np.zeros(k) if searched else None
    a, b = backend.augment_activations(x, selection), backend.augment_weights(w, selection, energy)
    certificate = bounds.certify(x, w, selection, energy=energy)
    assert certificate.check(backend.matmul(a, b)).holds
    wrong = plant(b, slice(0, k))  # S = K: the weight residuals come first
    assert not certificate.check(backend.matmul(a, wrong)).holds
