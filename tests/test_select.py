import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import matrices, two_sided_layers

from arcquant_ref import Selection, augment_weights, calibrate, select, select_top
from arcquant_ref.formats import BLOCK
from arcquant_ref.tensor import save_arrays

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


@given(two_sided_layers())
def test_columns_count_and_bits_with_weight_channels(layer):
    """Every channel once, the weight channels once more, between the plain channels and the last S."""
    _, w, _, selection = layer
    k, s, s_w = selection.K, selection.num_residual, len(selection.weight_channels)
    columns = selection.columns.tolist()
    assert columns[: k - s] == selection.order[: k - s].tolist()
    assert columns[k - s : k - s + s_w] == selection.weight_channels.tolist()
    assert columns[k - s + s_w :] == selection.order[k - s :].tolist()
    assert selection.augmented_K == k + s + s_w == augment_weights(w, selection).shape[1]
    assert selection.bits_per_value == 4.5 * (k + s + s_w) / k


def test_weight_channels_are_none_unless_given():
    for selection in (
        select(np.ones(32)),
        Selection(order=np.arange(32), num_residual=0, channel_amax=np.ones(32), weight_channels=[]),
    ):
        assert selection.weight_channels.dtype == np.int64
        assert len(selection.weight_channels) == 0
        np.testing.assert_array_equal(selection.columns, selection.order)


@given(layer=two_sided_layers())
def test_a_file_gives_the_selection_back(tmp_path_factory, layer):
    selection = layer[3]
    path = tmp_path_factory.mktemp("files") / "s.safetensors"
    selection.save(path)
    loaded = Selection.load(path)
    for part in ("order", "channel_amax", "weight_channels"):
        got, expected = getattr(loaded, part), getattr(selection, part)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert loaded.num_residual == selection.num_residual


def test_a_file_of_the_first_version_is_refused(tmp_path):
    """It has no weight channels: written again, it says so itself."""
    path, selection = tmp_path / "s.safetensors", select(np.ones(32))
    arrays = {
        "order": ("int64", selection.order),
        "num_residual": ("int64", np.asarray(selection.num_residual)),
        "channel_amax": ("float32", selection.channel_amax),
    }
    save_arrays(path, arrays, {"format": "nvfp4-selection", "version": "1"})
    message = "is not an nvfp4-selection file of version 2: its version is '1'"
    with pytest.raises(ValueError, match=message):
        Selection.load(path)
    save_arrays(path, arrays, {"format": "nvfp4-selection", "version": "2"})
    with pytest.raises(ValueError, match=r"holds .*; expected .*weight_channels"):
        Selection.load(path)
    selection.weight_channels.resize(BLOCK, refcheck=False)  # sixteen times channel 0
    selection.save(path)
    with pytest.raises(
        ValueError, match="does not hold a valid selection: weight_channels has 16 channels, 15"
    ):
        Selection.load(path)
