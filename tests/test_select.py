import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import matrices

from arcquant_ref import Selection, calibrate, select, select_top

amaxes = st.integers(1, 8).flatmap(
    lambda blocks: arrays(np.float32, 16 * blocks, elements=st.floats(0, 2.0**60, width=32))
)


@given(st.lists(matrices(blocks_along_k=2), min_size=1, max_size=4))
def test_calibrate_is_the_maximum_over_all_rows_in_any_order(batches):
    expected = np.abs(np.concatenate(batches)).max(axis=0)
    np.testing.assert_array_equal(calibrate(iter(batches)), expected)
    np.testing.assert_array_equal(calibrate(reversed(batches)), expected)


@given(amaxes, st.sampled_from([1 / 8, 1 / 2, 0.0, 1.0, 0.1, 1 / 3]), st.sampled_from([16, 64]))
def test_select_follows_the_rule(amax, tau, multiple):
    selection = select(amax, tau, multiple)
    outliers = sum(float(a) > tau * float(amax.max()) for a in amax)
    up_to_multiple = outliers + -outliers % multiple
    assert selection.num_residual == min(up_to_multiple, len(amax))
    ordered = amax[selection.order]
    assert (np.diff(ordered) >= 0).all()
    assert (np.diff(selection.order)[np.diff(ordered) == 0] > 0).all()  # stable
    with_residual = set(selection.order[selection.K - selection.num_residual :].tolist())
    assert with_residual >= {k for k, a in enumerate(amax) if float(a) > tau * float(amax.max())}


@given(amaxes, st.integers(0, 8))
@example(np.zeros(16, np.float32), 1)
def test_select_top_keeps_the_order_of_select(amax, blocks):
    s = min(16 * blocks, len(amax))
    np.testing.assert_array_equal(select_top(amax, s).order, select(amax).order)
    assert select_top(amax, s).num_residual == s


def test_a_channel_exactly_at_tau_is_no_outlier():
    amax = np.float32([8, 1, np.nextafter(np.float32(1), np.float32(2))] + [0.5] * 29)
    assert select(amax).num_residual == 16
    assert select(np.float32([8] + [1] * 31)).num_residual == 16
    assert select(np.float32([8] * 16 + [1] * 16)).num_residual == 16
    assert select(np.float32([8] * 16 + [1.001] + [1] * 15)).num_residual == 32
    tenth = np.float32(0.1)  # a little above 0.1, so above τ · 1
    assert select(np.float32([1] * 16 + [tenth] * 16), tau=0.1).num_residual == 32


def test_a_full_multiple_is_not_rounded_up():
    assert select(np.float32([8] * 64 + [1] * 64), multiple=64).num_residual == 64
    assert select(np.float32([8] * 65 + [1] * 63), multiple=64).num_residual == 128
    assert select(np.float32([8] * 65 + [1] * 31), multiple=64).num_residual == 96  # K


def test_no_outliers_in_a_zero_tensor_and_all_in_a_flat_one():
    assert select(np.zeros(32)).num_residual == 0
    assert select(np.ones(32)).num_residual == 32


def test_selection_counts_its_bits():
    selection = Selection(order=np.arange(64), num_residual=16, channel_amax=np.ones(64))
    assert (selection.K, selection.bits_per_value) == (64, 4.5 * 80 / 64)
