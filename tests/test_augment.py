"""The ARC identity, and every way to get a residual wrong."""

from dataclasses import replace
from itertools import pairwise

import exact
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrices, tensor_scales, two_sided_layers
from support import assert_same_tensor, every_backend, every_two_sided_backend

from arcquant_ref import (
    NVFP4Tensor,
    Selection,
    augment_activations,
    bounds,
    calibrate,
    gemm,
    quantize,
    select_top,
)
from arcquant_ref.augment import interleave, merge, split
from arcquant_ref.formats import BLOCK

K = 64


@st.composite
def layers(draw):
    """Activations (M, 64), weights (N, 64), a selection with any S and any order."""
    x, w = draw(matrices(blocks_along_k=4)), draw(matrices(blocks_along_k=4))
    order = draw(st.one_of(st.just(np.argsort(calibrate([x]), kind="stable")), st.permutations(range(K))))
    s = draw(st.sampled_from([0, 16, 32, 48, 64]))
    return x, w, Selection(order=np.array(order), num_residual=s, channel_amax=calibrate([x]))


def naive_augment(x, selection, tensor_scale):
    """Column by column in rational arithmetic: what the method says, not how the package does it."""
    order, again, codes, scales = selection.order.tolist(), selection.weight_channels.tolist(), [], []
    plain = len(order) - selection.num_residual
    channels = order[:plain] + again + order[plain:]
    ts = exact.Fraction(float(tensor_scale))
    for row in x[:, channels]:
        row_codes, row_scales = [], []
        for start in range(0, len(channels), BLOCK):
            block = row[start : start + BLOCK].tolist()
            primary, scale = exact.quantize_block(block, ts)
            row_codes += primary
            row_scales.append(scale)
            if start >= plain + len(again):
                values = [exact.decode(c, scale) * ts for c in primary]
                r = [exact.as_float(exact.Fraction(v) - value) for v, value in zip(block, values)]
                residual, scale = exact.quantize_block(r, ts)
                row_codes += residual
                row_scales.append(scale)
        codes.append(row_codes)
        scales.append(row_scales)
    return NVFP4Tensor(codes=np.uint8(codes), block_scales=np.uint8(scales), tensor_scale=tensor_scale)


@every_backend
@given(layers(), tensor_scales)
def test_activations_equal_the_rational_restatement(backend, layer, tensor_scale):
    x, _, selection = layer
    q = backend.augment_activations(x, selection, tensor_scale)
    assert_same_tensor(q, naive_augment(x, selection, q.tensor_scale))


@every_backend
@given(layers(), tensor_scales)
def test_the_identity_holds_in_integers(backend, layer, tensor_scale):
    """Y' = X̂ Ŵᵀ + R̂ₒ Ŵₒᵀ, no rounding anywhere."""
    x, w, selection = layer
    s, order = selection.num_residual, selection.order
    a, b = backend.augment_activations(x, selection, tensor_scale), backend.augment_weights(w, selection)
    assert a.shape[1] == b.shape[1] == K + s
    primary, residual = split(a, s)
    w_hat = backend.quantize(w[:, order])
    expected = gemm.integer_matmul(primary, w_hat)
    if s:
        last = w_hat.map(lambda part: part[:, -(s * part.shape[1] // K) :])
        expected += gemm.integer_matmul(residual, last)
    np.testing.assert_array_equal(gemm.integer_matmul(a, b), expected)


@every_backend
@given(layers(), tensor_scales)
def test_the_primary_part_is_plain_quantization_in_selection_order(backend, layer, tensor_scale):
    x, w, selection = layer
    order, s = selection.order, selection.num_residual
    a = backend.augment_activations(x, selection, tensor_scale)
    assert_same_tensor(split(a, s)[0], backend.quantize(x[:, order], tensor_scale))
    primary, duplicate = split(backend.augment_weights(w, selection), s)
    assert_same_tensor(primary, backend.quantize(w[:, order]))
    if s:
        assert_same_tensor(interleave(primary, duplicate), backend.augment_weights(w, selection))
        np.testing.assert_array_equal(duplicate.codes, primary.codes[:, -s:])
        np.testing.assert_array_equal(duplicate.block_scales, primary.block_scales[:, -s // BLOCK :])


@every_backend
def test_the_layout_is_written_out(backend):
    """K = 64, S = 32: blocks P0 P1 P2 R2 P3 R3. Amax 1, 2, 3, 4 tells the primaries apart by their scales."""
    x = np.repeat(np.float32([[1.1, 2.1, 3.1, 4.1]]), BLOCK, axis=1)
    q = backend.augment_activations(x, select_top(x[0], 32), 0.01)
    codes, scales = q.codes.reshape(6, BLOCK)[:, 0], q.block_scales[0]
    plain = backend.quantize(x, 0.01)
    assert scales[[0, 1, 2, 4]].tolist() == plain.block_scales[0].tolist()
    assert codes[[0, 1, 2, 4]].tolist() == plain.codes.reshape(4, BLOCK)[:, 0].tolist()
    assert (scales[[3, 5]] < scales[[2, 4]]).all()


@given(layers(), tensor_scales)
def test_merge_is_the_sum_of_both_parts(layer, tensor_scale):
    x, _, selection = layer
    q = augment_activations(x, selection, tensor_scale)
    primary, residual = split(q, selection.num_residual)
    values = exact_values_of(primary)
    if residual is not None:
        values[:, K - selection.num_residual :] += exact_values_of(residual)
    np.testing.assert_array_equal(merge(q, selection)[:, selection.order], values)


def exact_values_of(q):
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    scales = [[float(exact.decode(2, int(c))) for c in row] for row in q.block_scales]
    return grid[q.codes] * np.repeat(scales, BLOCK, axis=1) * np.float64(q.tensor_scale)


@every_backend
@given(layers(), tensor_scales)
def test_every_element_stays_within_its_bound(backend, layer, tensor_scale):
    x, _, selection = layer
    check = bounds.check(x, backend.augment_activations(x, selection, tensor_scale), selection)
    assert check.holds, check


@given(layers())
def test_more_residual_channels_never_increase_a_bound(layer):
    x, _, selection = layer
    tensor_scale = quantize(x).tensor_scale
    sizes = [
        bounds.element_bounds(
            x, tensor_scale, Selection(order=selection.order, num_residual=s, channel_amax=x[0] * 0)
        )
        for s in (0, 16, 32, 48, 64)
    ]
    for fewer, more in pairwise(sizes):
        assert (more <= fewer).all()


def parts(q, s):
    primary, residual = split(q, s)
    return primary, residual.map(np.copy)


def without_residual(q, s):
    primary, residual = parts(q, s)
    return interleave(primary, residual.map(lambda a: a * 0))


def sign_flipped(q, s):
    primary, residual = parts(q, s)
    residual.codes[:] ^= 8
    return interleave(primary, residual)


def beside_the_wrong_block(q, s):
    primary, residual = parts(q, s)
    half = s // 2
    return interleave(primary, residual.map(lambda a: np.roll(a, half * a.shape[1] // s, axis=1)))


def not_interleaved(q, s):
    primary, residual = parts(q, s)
    return NVFP4Tensor(
        codes=np.concatenate([primary.codes, residual.codes], axis=1),
        block_scales=np.concatenate([primary.block_scales, residual.block_scales], axis=1),
        tensor_scale=q.tensor_scale,
    )


def with_the_scale_of_the_primary(q, s):
    """The residual scale byte of the primary block: the two scales swapped."""
    primary, residual = parts(q, s)
    residual.block_scales[:] = primary.block_scales[:, -s // BLOCK :]
    return interleave(primary, residual)


PLANTS = [
    without_residual,
    sign_flipped,
    beside_the_wrong_block,
    not_interleaved,
    with_the_scale_of_the_primary,
]


@every_backend
@pytest.mark.parametrize("plant", PLANTS)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_planted_residual_bug_breaks_the_bound(backend, plant, seed):
    x = np.random.default_rng(seed).standard_normal((8, K)).astype(np.float32)
    x[:, :40] *= 8
    selection = select_top(calibrate([x]), 32)
    right = backend.augment_activations(x, selection)
    wrong = plant(right, 32)
    assume(
        wrong.codes.tobytes() + wrong.block_scales.tobytes()
        != right.codes.tobytes() + right.block_scales.tobytes()
    )
    assert bounds.check(x, right, selection).holds
    assert not bounds.check(x, wrong, selection).holds


@every_backend
@given(seed=st.integers(0, 2**32 - 1))
def test_duplicating_the_wrong_weight_columns_changes_the_product(backend, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((4, K)), rng.standard_normal((4, K))
    selection = select_top(calibrate([x]), 32)
    a, b = backend.augment_activations(x, selection), backend.augment_weights(w, selection)
    wrong = beside_the_wrong_block(b, 32)
    assert (gemm.integer_matmul(a, b) != gemm.integer_matmul(a, wrong)).any()


def naive_weights(w, selection, tensor_scale):
    """Channel by channel in rational arithmetic; scales by amax / 6."""
    order, repaired = selection.order.tolist(), selection.weight_channels.tolist()
    plain, ts, rows = len(order) - selection.num_residual, exact.Fraction(float(tensor_scale)), []
    for row in w.tolist():
        residual, blocks = {}, []
        for start in range(0, len(order), BLOCK):
            channels = order[start : start + BLOCK]
            codes, scale = exact.quantize_block([row[k] for k in channels], ts)
            blocks.append((codes, scale))
            for k, code in zip(channels, codes):
                residual[k] = exact.as_float(exact.Fraction(row[k]) - exact.decode(code, scale) * ts)
        repairs = [
            exact.quantize_block([residual[k] for k in repaired[start : start + BLOCK]], ts)
            for start in range(0, len(repaired), BLOCK)
        ]
        last = [block for block in blocks[plain // BLOCK :] for _ in range(2)]
        rows.append(blocks[: plain // BLOCK] + repairs + last)
    return NVFP4Tensor(
        codes=np.uint8([[c for codes, _ in row for c in codes] for row in rows]),
        block_scales=np.uint8([[scale for _, scale in row] for row in rows]),
        tensor_scale=tensor_scale,
    )


@every_two_sided_backend
@given(two_sided_layers(max_rows=2), tensor_scales)
def test_both_operands_equal_the_rational_restatement(backend, layer, tensor_scale):
    x, w, _, selection = layer
    a, b = backend.augment_activations(x, selection, tensor_scale), backend.augment_weights(w, selection)
    assert_same_tensor(a, naive_augment(x, selection, a.tensor_scale))
    assert_same_tensor(b, naive_weights(w, selection, b.tensor_scale))
    assert a.tensor_scale == backend.quantize(x, tensor_scale).tensor_scale  # a second copy changes no amax
    assert b.tensor_scale == backend.quantize(w).tensor_scale


def rounded_residual(x, q):
    """x − value(q) with one rounding: as floats it fits float64 here, and then only once more."""
    return np.float32(
        [
            [exact.as_float(exact.Fraction(float(v)) - exact.Fraction(u)) for v, u in zip(*rows)]
            for rows in zip(x, exact_values_of(q))
        ]
    )


@every_two_sided_backend
@given(two_sided_layers(), tensor_scales)
def test_the_identity_with_weight_residuals_holds_in_integers(backend, layer, tensor_scale):
    """Y' = X̂ Ŵᵀ + R̂ˣₒ Ŵₒᵀ + X̂ᵥ R̂ʷᵥᵀ, no rounding anywhere; x̂ of a weight channel in its second place is
    that of its neighbours there."""
    x, w, energy, selection = layer
    order, s, repaired = selection.order, selection.num_residual, selection.weight_channels
    a, b = (
        backend.augment_activations(x, selection, tensor_scale),
        backend.augment_weights(w, selection, energy),
    )
    assert a.shape[1] == b.shape[1] == selection.augmented_K

    def of_weights(part, channels, scale):
        return (
            backend.quantize(part, scale)
            if energy is None
            else backend.quantize_weighted(part, energy[channels], scale)
        )

    w_hat = of_weights(w[:, order], order, b.tensor_scale)
    x_hat = backend.quantize(x[:, order], a.tensor_scale)
    expected = gemm.integer_matmul(x_hat, w_hat)
    if s:
        last = order[-s:]
        r_x = rounded_residual(x[:, last], backend.quantize(x[:, last], a.tensor_scale))
        w_last = w_hat.map(lambda part: part[:, -(s * part.shape[1] // len(order)) :])
        expected += gemm.integer_matmul(backend.quantize(r_x, a.tensor_scale), w_last)
    if len(repaired):
        r_w = rounded_residual(w[:, order], w_hat)[:, np.argsort(order)][:, repaired]
        x_again = backend.quantize(x[:, repaired], a.tensor_scale)
        expected += gemm.integer_matmul(x_again, of_weights(r_w, repaired, b.tensor_scale))
    np.testing.assert_array_equal(gemm.integer_matmul(a, b), expected)


@every_two_sided_backend
def test_the_layout_of_two_sides_is_written_out(backend):
    """K = 64, S = 32, weight channels those of block 3 and block 0: P0 P1, again P3 P0, then P2 R2 P3 R3; for
    the weights W0 W1 R3 R0 W2 W2 W3 W3."""
    x = np.repeat(np.float32([[1.1, 2.1, 3.1, 4.1]]), BLOCK, axis=1)
    channels = np.arange(K)
    selection = Selection(
        order=channels,
        num_residual=32,
        channel_amax=x[0],
        weight_channels=np.concatenate([channels[48:], channels[:16]]),
    )
    plain = backend.quantize(x, 0.01)
    q = backend.augment_activations(x, selection, 0.01)
    assert (
        q.block_scales[0, [0, 1, 2, 3, 4, 6]].tolist() == plain.block_scales[0, [0, 1, 3, 0, 2, 3]].tolist()
    )
    b, plain = backend.augment_weights(x, selection), backend.quantize(x)
    places = [0, 1, 4, 5, 6, 7]
    assert b.block_scales[0, places].tolist() == plain.block_scales[0, [0, 1, 2, 2, 3, 3]].tolist()
    r = rounded_residual(x, plain)
    for place, block in ((2, 3), (3, 0)):
        part = backend.quantize(r[:, 16 * block : 16 * block + 16], plain.tensor_scale)
        assert b.codes[0, 16 * place : 16 * place + 16].tolist() == part.codes[0].tolist()
        assert b.block_scales[0, place] == part.block_scales.item()


@given(two_sided_layers(), tensor_scales)
def test_merge_leaves_the_second_place_out(layer, tensor_scale):
    """The same values as without weight channels, and they stay within their bounds."""
    x, _, _, selection = layer
    one_side = replace(selection, weight_channels=[])
    q = augment_activations(x, selection, tensor_scale)
    np.testing.assert_array_equal(
        merge(q, selection), merge(augment_activations(x, one_side, tensor_scale), one_side)
    )
    assert bounds.check(x, q, selection).holds
    np.testing.assert_array_equal(
        bounds.element_bounds(x, q.tensor_scale, selection),
        bounds.element_bounds(x, q.tensor_scale, one_side),
    )


@every_two_sided_backend
@given(layer=two_sided_layers())
def test_residuals_of_all_weights_leave_little(backend, layer):
    """S_w = K: ŵ + r̂ʷ errs by at most what ARC leaves of an activation."""
    _, w, _, selection = layer
    selection = replace(selection, num_residual=0, weight_channels=selection.order)
    b = backend.augment_weights(w, selection)
    both = exact_values_of(b).reshape(len(w), 2, -1).sum(axis=1)
    everything = replace(selection, num_residual=selection.K, weight_channels=[])
    limit = bounds.element_bounds(w, b.tensor_scale, everything)[:, selection.order]
    assert (np.abs(w[:, selection.order] - both) <= limit).all()
