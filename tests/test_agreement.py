"""Reference and emulator, two arithmetics, byte for byte."""

import ml_dtypes
import numpy as np
import pytest
import stress
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import matrices, tensor_scales, two_sided_layers
from support import assert_same_tensor, neighbours

import arcquant_ref
import emulator
from arcquant_ref import Selection, calibrate, layout, sample, select, select_top
from arcquant_ref.formats import BLOCK, E4M3


@st.composite
def activations(draw):
    """Rows of every kind of block, some of them shared by many rows, and a selection with any order and S."""
    x = draw(matrices(max_rows=5))
    k = x.shape[1]
    order = np.array(draw(st.permutations(range(k))))
    s = BLOCK * draw(st.integers(0, k // BLOCK))
    return x, Selection(order=order, num_residual=s, channel_amax=calibrate([x]))


@given(activations(), tensor_scales)
@example((np.zeros((1, 16), np.float32), select_top(np.zeros(16, np.float32), 16)), None)
@example((np.full((3, 16), -2688 * 3, np.float32), select_top(np.ones(16, np.float32), 16)), 1.0)
def test_same_bytes(layer, tensor_scale):
    x, selection = layer
    for function, *arguments in [
        ("quantize", x, tensor_scale),
        ("augment_activations", x, selection, tensor_scale),
        ("augment_weights", x, selection),
    ]:
        q = getattr(emulator, function)(*arguments)
        assert_same_tensor(q, getattr(arcquant_ref, function)(*arguments))
        got, expected = emulator.dequantize(q), arcquant_ref.dequantize(q)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@given(activations(), tensor_scales)
def test_same_bytes_from_other_dtypes(dtype, layer, tensor_scale):
    x, selection = layer
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    x[~np.isfinite(x.astype(np.float64))] = 1
    expected = arcquant_ref.augment_activations(x, selection, tensor_scale)
    assert_same_tensor(emulator.augment_activations(x, selection, tensor_scale), expected)
    if dtype == ml_dtypes.bfloat16:
        bits = x.view(np.uint16)
        assert_same_tensor(emulator.augment_activations(bits, selection, tensor_scale), expected)


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@given(two_sided_layers(max_rows=5), tensor_scales)
def test_same_bytes_with_weight_channels_and_searched_scales(dtype, layer, tensor_scale):
    x, w, energy, selection = layer
    with np.errstate(all="ignore"):
        x, w = x.astype(dtype), w.astype(dtype)
    for array in (x, w):
        array[~np.isfinite(array.astype(np.float64))] = 1
    calls = [
        ("augment_activations", x, selection, tensor_scale),
        ("augment_weights", w, selection),
        ("augment_weights", w, selection, energy),
    ]
    if energy is not None:
        calls.append(("quantize_weighted", w, energy, tensor_scale))
        calls.append(("quantize_weighted", w, energy.astype(np.float32), tensor_scale))
    for function, array, *arguments in calls:
        expected = getattr(arcquant_ref, function)(array, *arguments)
        assert_same_tensor(getattr(emulator, function)(array, *arguments), expected)
        if dtype == ml_dtypes.bfloat16:
            bits = array.view(np.uint16)
            assert_same_tensor(getattr(emulator, function)(bits, *arguments), expected)


@given(two_sided_layers(), st.sampled_from([1.0, 0.01]))
def test_rmsnorm_gives_the_same_bytes_with_weight_channels(layer, tensor_scale):
    x, w, _, selection = layer
    x, weight = np.clip(x, -1e15, 1e15), np.clip(w[0], -100, 100)
    arguments = x, weight, 1e-5, selection, tensor_scale
    assert_same_tensor(
        emulator.rmsnorm_augment_activations(*arguments), arcquant_ref.rmsnorm_augment_activations(*arguments)
    )


@pytest.mark.parametrize("name", stress.inputs())
def test_same_searched_scales_on_stress_data(name):
    x = w = stress.inputs()[name]
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    rng, k = np.random.default_rng(5), x.shape[1]
    channels = rng.permutation(k)
    selection = Selection(
        order=channels[::-1], num_residual=16, channel_amax=calibrate([x]), weight_channels=channels[:48]
    )
    for energy in (np.ones(k), rng.lognormal(0, 5, k), 1.0 * (rng.random(k) < 0.2)):
        for tensor_scale in (None, 1.0, 2.0**-126):
            assert_same_tensor(
                emulator.quantize_weighted(w, energy, tensor_scale),
                arcquant_ref.quantize_weighted(x, energy, tensor_scale),
            )
        assert_same_tensor(
            emulator.augment_weights(w, selection, energy), arcquant_ref.augment_weights(x, selection, energy)
        )
    assert_same_tensor(emulator.augment_weights(w, selection), arcquant_ref.augment_weights(x, selection))


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 129])
def test_same_bytes_with_weight_channels_for_ragged_shapes(rows):
    rng, k = np.random.default_rng(rows), 1040
    x = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-30, 30, k))).astype(np.float32)
    channels = rng.permutation(k)
    selection = Selection(
        order=channels[::-1], num_residual=48, channel_amax=calibrate([x]), weight_channels=channels[:624]
    )
    for function, *arguments in [
        ("augment_activations",),
        ("augment_weights",),
        ("augment_weights", rng.random(2 * k)[::2]),  # every second number in memory
    ]:
        got, expected = (getattr(p, function)(x, selection, *arguments) for p in (emulator, arcquant_ref))
        assert_same_tensor(got, expected)


def test_both_refuse_in_the_same_words():
    """The channel that an error names is one of w, not of what was gathered from it."""
    x, channels = np.ones((3, 32), np.float32), np.arange(32)
    selection = Selection(
        order=channels[::-1], num_residual=16, channel_amax=x[0], weight_channels=channels[:16]
    )
    calls = [
        ("augment_weights", x[:, :16], selection),
        ("augment_weights", x[0], selection),
        ("augment_weights", x[0], None),
        ("augment_weights", x, None, np.ones(32)),
        ("augment_activations", x[:, :16], selection),
        ("quantize_weighted", x[0], np.ones(32)),
        ("quantize_weighted", x, np.ones(32), 0.0),
    ]
    for energy in (np.ones(16), np.ones((1, 32)), np.full(32, np.nan), x[0] - 2, [1j] * 32, "energy"):
        calls += [("quantize_weighted", x, energy), ("augment_weights", x, selection, energy)]
        calls += [("augment_weights", x, select_top(x[0], 16), energy)]
    for value in (np.nan, -np.inf, 1e39):
        for channel in (7, 23):
            bad = x.astype(np.float64)
            bad[1, channel] = value
            calls += [("quantize_weighted", bad, x[0], scale) for scale in (None, 1.0)]
            calls += [("augment_weights", bad, selection, energy) for energy in (None, x[0])]
            calls += [("augment_activations", bad, selection, scale) for scale in (None, 1.0)]
    for function, *arguments in calls:
        words = []
        for package in (arcquant_ref, emulator):
            with pytest.raises((TypeError, ValueError)) as caught:
                getattr(package, function)(*arguments)
            words.append((caught.type, str(caught.value)))
        assert words[0] == words[1]


@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 9), st.integers(1, 40).map(lambda half: 2 * half)),
        elements=st.integers(0, 15),
    )
)
def test_same_packed_bytes(codes):
    np.testing.assert_array_equal(emulator.pack(codes), layout.pack(codes))
    np.testing.assert_array_equal(emulator.pack(codes[:, ::-1]), layout.pack(codes[:, ::-1]))


def test_pack_refuses_what_layout_refuses():
    for codes, message in [
        (np.zeros((2, 3), np.uint8), r"codes has shape \(2, 3\); it must be \(M, K\) with K even"),
        (np.full((2, 4), 16, np.uint8), "codes holds 0x10 at index"),
        (np.zeros((2, 4)), "codes has dtype float64; codes are uint8"),
    ]:
        for pack in (emulator.pack, layout.pack):
            with pytest.raises((TypeError, ValueError), match=message):
                pack(codes)


@pytest.mark.parametrize("tensor_scale", [0.0007, 1 / 3, 1.7808476686477661, 2.0**-126 * 1.1])
def test_same_bytes_where_the_block_scale_changes(tensor_scale):
    """An amax within two ulps of every threshold: another order of divisions gives other scales there."""
    thresholds = (6 * E4M3.midpoints * np.float32(tensor_scale)).astype(np.float32)
    amax = np.unique(neighbours(neighbours(thresholds)))
    x = np.zeros((len(amax), BLOCK), np.float32)
    x[:, 3] = amax
    assert_same_tensor(emulator.quantize(x, tensor_scale), arcquant_ref.quantize(x, tensor_scale))


@pytest.mark.parametrize("tensor_scale", [0.0007, 1 / 3, 1.7808476686477661, 2.0**-126 * 1.1])
@pytest.mark.parametrize("steps", [8, 3.5])
def test_same_bytes_where_a_search_begins_or_ends(tensor_scale, steps):
    """The same for the first and the last scale; without energy the first one is taken."""
    thresholds = (steps * E4M3.midpoints * np.float32(tensor_scale)).astype(np.float32)
    amax = np.unique(neighbours(neighbours(thresholds)))
    x = np.repeat(amax[:, None], BLOCK, axis=1)
    for fraction in (1 / 16, 2 / 7, 3 / 7, 0.99):
        x[:, 1:] = amax[:, None] * np.float32(fraction)
        for energy in (np.zeros(BLOCK), 1.0 * (np.arange(BLOCK) > 0)):
            assert_same_tensor(
                emulator.quantize_weighted(x, energy, tensor_scale),
                arcquant_ref.quantize_weighted(x, energy, tensor_scale),
            )


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129])
@pytest.mark.parametrize("k", [16, 48, 1040])
def test_same_bytes_for_ragged_shapes(rows, k):
    """A million numbers over 60 binades, with rows that no number of threads divides."""
    rng = np.random.default_rng(rows * k)
    x = (rng.standard_normal((rows, k)) * np.exp2(rng.integers(-30, 30, k))).astype(np.float32)
    selection = select(calibrate([x]))
    assert_same_tensor(
        emulator.augment_activations(x, selection), arcquant_ref.augment_activations(x, selection)
    )


@pytest.mark.parametrize("layer", sample.load_sample(), ids=lambda layer: layer.name)
def test_same_bytes_on_a_real_layer(layer):
    selection = select(calibrate([layer.calibration]))
    for function, x in (("augment_activations", layer.evaluation), ("augment_weights", layer.weight)):
        q = getattr(emulator, function)(x, selection)
        assert_same_tensor(q, getattr(arcquant_ref, function)(x, selection))
