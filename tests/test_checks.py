"""The sentences a user sees: argument, value, rule, way out; through every public door that meets it."""

import dataclasses
import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import arcquant_ref as aq
from arcquant_ref import NVFP4Tensor, Selection, baselines, bounds, demo, layout

GOOD = np.ones((2, 32), np.float32)
SELECTION = aq.select_top(np.ones(32), 16)
MATRIX_DOORS = {
    "quantize": aq.quantize,
    "augment_activations": lambda x: aq.augment_activations(x, SELECTION),
    "augment_weights": lambda x: aq.augment_weights(x, SELECTION),
    "calibrate": lambda x: aq.calibrate([x]),
    "augment_weights, searched": lambda x: aq.augment_weights(x, SELECTION, np.ones(32)),
    "quantize_weighted": lambda x: aq.quantize_weighted(x, np.ones(32)),
    "linear": lambda x: aq.linear(x, GOOD, SELECTION),
    "linear, weights": lambda w: aq.linear(GOOD, w, SELECTION),
    "bounds.check": lambda x: bounds.check(x, aq.quantize(GOOD)),
    "bounds.element_bounds": lambda x: bounds.element_bounds(x, 1.0),
    "mxfp8": baselines.mxfp8,
    "int4": baselines.int4,
}
ELEMENT_DOORS = {"encode_e2m1": aq.encode_e2m1, "encode_e4m3": aq.encode_e4m3}


def with_value(value, dtype=np.float64):
    x = GOOD.astype(dtype)
    x[1, 5] = value
    x[1, 9] = value
    return x


@pytest.mark.parametrize(
    "door", [*MATRIX_DOORS.values(), *ELEMENT_DOORS.values()], ids=[*MATRIX_DOORS, *ELEMENT_DOORS]
)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            with_value(np.nan),
            ValueError,
            r"2 of 64 elements are NaN.*first is nan at index \(1, 5\).*np\.where",
        ),
        (
            with_value(-np.inf, np.float32),
            ValueError,
            r"2 of 64 elements are NaN, infinite.*-inf at index \(1, 5\)",
        ),
        (with_value(1e39), ValueError, r"beyond float32, the first is 1e\+39 at index \(1, 5\)"),
        (GOOD.astype(int), TypeError, r"has dtype int64; it must be one of float16, bfloat16.*astype"),
        (GOOD.astype(complex), TypeError, r"has dtype complex128"),
        (np.full((2, 32), "x"), TypeError, r"has dtype <U1"),
        (np.zeros((0, 32)), ValueError, r"has shape \(0, 32\) and no elements"),
    ],
    ids=["nan", "inf", "beyond float32", "integers", "complex", "text", "empty"],
)
def test_values_that_have_no_code(door, x, error, message):
    with pytest.raises(error, match=message):
        door(x)


@pytest.mark.parametrize("door", MATRIX_DOORS.values(), ids=MATRIX_DOORS)
@pytest.mark.parametrize("shape", [(32,), (2, 2, 32), ()])
def test_wrong_rank(door, shape):
    with pytest.raises(
        ValueError,
        match=rf"has shape {re.escape(str(shape))}; it must be a matrix\. Reshape it to \(rows, K\)",
    ):
        door(np.ones(shape))


@pytest.mark.parametrize("name", set(MATRIX_DOORS) - {"int4", "mxfp8"})
def test_k_that_is_no_multiple_of_the_block(name):
    with pytest.raises(
        ValueError, match=r"has K=30, which is not a multiple of the block size 16.*2 zeros \(np\.pad"
    ):
        MATRIX_DOORS[name](np.ones((2, 30)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e300])
def test_the_remedy_for_values_without_a_code_works_as_printed(bad):
    x = with_value(bad)
    with pytest.raises(ValueError, match=r"np\.where") as error:
        aq.quantize(x)
    remedy = re.search(r"(np\.where.*)\.$", str(error.value)).group(1)
    np.testing.assert_array_equal(eval(remedy), with_value(0))


def test_the_remedy_for_a_ragged_k_works_as_printed():
    x = np.ones((2, 30))
    with pytest.raises(ValueError, match=r"\(np\.pad") as error:
        aq.quantize(x)
    remedy = re.search(r"\((np\.pad.*)\)\.$", str(error.value)).group(1)
    assert aq.quantize(eval(remedy)).shape == (2, 32)


@pytest.mark.parametrize("door", [aq.quantize, lambda x, t: aq.augment_activations(x, SELECTION, t)])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, 1e39, 1e-39, -0.0, 2.0**-127])
def test_tensor_scale_values(door, value):
    with pytest.raises(
        ValueError, match=r"tensor_scale=.* is not a positive, finite, normal float32.*Leave it out"
    ):
        door(GOOD, value)


@pytest.mark.parametrize("value", ["1", [1.0], np.ones(1), True, 1j])
def test_tensor_scale_types(value):
    with pytest.raises(TypeError, match=r"tensor_scale=.* is not one real number"):
        aq.quantize(GOOD, value)


@pytest.mark.parametrize(
    "value", [2, 10**30, np.float64(2), np.array(2.0), ml_dtypes.bfloat16(2), Fraction(1, 3)]
)
def test_tensor_scales_of_any_real_type(value):
    assert aq.quantize(GOOD, value).tensor_scale == np.float32(value)


def test_selection_for_another_layer():
    for door in (aq.augment_activations, aq.augment_weights):
        with pytest.raises(ValueError, match=r"selection was made for K=32 but [xw] has K=48"):
            door(np.ones((1, 48)), SELECTION)


@pytest.mark.parametrize("s", [-16, 8, 48, 33, 10**400], ids=["-16", "8", "48", "33", "huge"])
def test_num_residual(s):
    with pytest.raises(
        ValueError,
        match=rf"num_residual={s} must be a multiple of 16 from 0 to 32\. The nearest is (0|16|32)\.",
    ):
        aq.select_top(np.ones(32), s)


@pytest.mark.parametrize("s", [16.0, "16", True, None])
def test_num_residual_type(s):
    with pytest.raises(TypeError, match=r"num_residual=.* is not an integer"):
        aq.select_top(np.ones(32), s)


@pytest.mark.parametrize("order", [np.zeros(32, int), np.arange(1, 33), np.arange(32) - 1])
def test_order_is_a_permutation(order):
    with pytest.raises(ValueError, match=r"order is not a permutation of 0 … 31"):
        Selection(order=order, num_residual=0, channel_amax=np.ones(32))


def test_selection_parts_that_do_not_fit():
    with pytest.raises(TypeError, match=r"order has shape \(2, 16\)"):
        Selection(order=np.arange(32).reshape(2, 16), num_residual=0, channel_amax=np.ones(32))
    with pytest.raises(TypeError, match=r"dtype float64; it must be K integers"):
        Selection(order=np.arange(32.0), num_residual=0, channel_amax=np.ones(32))
    with pytest.raises(ValueError, match=r"selection was made for K=32 but channel_amax has K=48"):
        Selection(order=np.arange(32), num_residual=0, channel_amax=np.ones(48))


WEIGHT_CHANNELS = {
    "one too few": (np.arange(15), ValueError, "15 channels, 0 of them repeated and 0 outside 0 … 31"),
    "one twice": (
        np.r_[np.arange(15), 3],
        ValueError,
        "16 channels, 1 of them repeated and 0 outside 0 … 31",
    ),
    "one beyond": (np.arange(17, 33), ValueError, "16 channels, 0 of them repeated and 1 outside 0 … 31"),
    "one before": (np.arange(16) - 1, ValueError, "16 channels, 0 of them repeated and 1 outside 0 … 31"),
    "more than there are": (np.arange(48) % 32, ValueError, "48 channels, 16 of them repeated"),
    "a matrix": (np.arange(32).reshape(2, 16), TypeError, r"has shape \(2, 16\) and dtype int64"),
    "floats": (np.arange(16.0), TypeError, r"has shape \(16,\) and dtype float64"),
    "a mask": (np.arange(32) < 16, TypeError, r"has shape \(32,\) and dtype bool"),
    "none": (None, TypeError, r"has shape \(\) and dtype object"),
}


@pytest.mark.parametrize("name", WEIGHT_CHANNELS)
def test_weight_channels(name):
    channels, error, message = WEIGHT_CHANNELS[name]
    with pytest.raises(
        error, match=f"weight_channels has {message}" if error is ValueError else message
    ) as caught:
        Selection(order=np.arange(32), num_residual=0, channel_amax=np.ones(32), weight_channels=channels)
    assert re.search(r"multiple of 16|list of channel numbers, integers", str(caught.value))


ENERGY_DOORS = {
    "quantize_weighted": lambda energy: aq.quantize_weighted(GOOD, energy),
    "augment_weights": lambda energy: aq.augment_weights(GOOD, SELECTION, energy),
    "bounds.certify": lambda energy: bounds.certify(GOOD, GOOD, SELECTION, energy=energy),
    "bounds.certify, plain": lambda energy: bounds.certify(GOOD, GOOD, energy=energy),
}


@pytest.mark.parametrize("door", ENERGY_DOORS.values(), ids=ENERGY_DOORS)
def test_energy(door):
    for energy, message in [
        (np.ones(16), r"energy has shape \(16,\); it must be \(32,\), one for each channel\. .*np\.mean"),
        (np.ones((2, 32)), r"energy has shape \(2, 32\)"),
        (1.0, r"energy has shape \(\)"),
        (np.r_[np.ones(30), np.nan, -1], "energy is nan at index 30; it must be finite and not negative"),
        (np.r_[np.ones(30), -1, np.inf], "energy is -1.0 at index 30"),
        (np.r_[np.ones(30), np.inf, 1], "energy is inf at index 30"),
    ]:
        with pytest.raises(ValueError, match=message):
            door(energy)
    for energy in ([1j] * 32, ["1"] * 32, np.ones(32, bool)):
        with pytest.raises(TypeError, match=r"energy has dtype .*; it must be 32 real numbers"):
            door(energy)


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_energy_of_any_real_dtype(dtype):
    x = np.random.default_rng(0).standard_normal((2, 32))
    energy = np.arange(32) % 3
    expected = aq.quantize_weighted(x, energy)
    assert aq.quantize_weighted(x, energy.astype(dtype)).codes.tobytes() == expected.codes.tobytes()


def test_the_demo_knows_residuals_of_activations_only():
    selection = dataclasses.replace(SELECTION, weight_channels=np.arange(16))
    with pytest.raises(ValueError, match="selection has 16 weight_channels, but the demo knows residuals of"):
        demo.arc(GOOD, GOOD, selection)
    assert demo.arc(GOOD, GOOD, dataclasses.replace(selection, weight_channels=[])).num_residual == 16


def test_a_tensor_of_another_selection_is_not_merged():
    two_sided = dataclasses.replace(SELECTION, weight_channels=np.arange(16))
    q = aq.augment_activations(GOOD, SELECTION)
    with pytest.raises(
        ValueError, match=r"q has K=48, but a selection of 32 channels with 32 residuals makes 64"
    ):
        bounds.check(GOOD, q, two_sided)


@pytest.mark.parametrize("door", [aq.select, lambda amax: aq.select_top(amax, 0)])
def test_channel_amax(door):
    with pytest.raises(
        ValueError, match=r"channel_amax has shape \(30,\); it must be \(K,\), K a multiple of 16"
    ):
        door(np.ones(30))
    with pytest.raises(ValueError, match=r"channel_amax has shape \(2, 16\)"):
        door(np.ones((2, 16)))
    with pytest.raises(ValueError, match=r"channel_amax is -1.0 at index \(3,\)"):
        door(np.array([1, 1, 1, -1.0] * 8))
    with pytest.raises(ValueError, match=r"channel_amax: 1 of 16 elements are NaN"):
        door(np.array([np.nan] + [1] * 15))


def test_rule_parameters():
    for tau in (-0.1, 1.5, np.nan, "1/8", True, 0.1j):
        with pytest.raises(ValueError, match=r"tau=.* must be a number from 0 to 1"):
            aq.select(np.ones(32), tau=tau)
    for multiple in (0, 8, 24, -16, 16.0):
        with pytest.raises(ValueError, match=r"multiple=.* must be a positive multiple of the block size 16"):
            aq.select(np.ones(32), multiple=multiple)


def test_calibration_batches():
    with pytest.raises(ValueError, match=r"batches is empty.*\[x\]"):
        aq.calibrate([])
    with pytest.raises(ValueError, match=r"batches\[1\] has K=16 but the batches before it have K=32"):
        aq.calibrate([GOOD, GOOD[:, :16]])
    with pytest.raises(ValueError, match=r"batches\[1\]: 2 of 64 elements are NaN"):
        aq.calibrate([GOOD, with_value(np.nan)])
    with pytest.raises(ValueError, match=r"batches is one matrix; pass a list of them, \[x\]"):
        aq.calibrate(GOOD)


def test_codes():
    with pytest.raises(TypeError, match=r"codes has dtype int64; codes are uint8"):
        aq.decode_e2m1([1, 2])
    with pytest.raises(
        ValueError, match=r"codes holds 0x10 at index \(1,\); a code has 4 bits.*layout\.unpack"
    ):
        aq.decode_e2m1(np.uint8([15, 16]))
    with pytest.raises(TypeError, match=r"codes has dtype float64"):
        aq.decode_e4m3([1.0])


def test_tensor_parts_that_do_not_fit():
    codes, scales = np.zeros((2, 32), np.uint8), np.zeros((2, 2), np.uint8)
    for bad in (codes[0], codes[:, :30], codes[:0]):
        with pytest.raises(
            ValueError, match=r"codes has shape .*; it must be \(M, K\), not empty, K a multiple of 16"
        ):
            NVFP4Tensor(codes=bad, block_scales=scales, tensor_scale=1)
    for bad in (scales[:1], scales[:, :1], scales.ravel()):
        with pytest.raises(ValueError, match=r"block_scales has shape .*need \(2, 2\), one.*unswizzle_128x4"):
            NVFP4Tensor(codes=codes, block_scales=bad, tensor_scale=1)
    with pytest.raises(ValueError, match=r"tensor_scale=0 is not a positive"):
        NVFP4Tensor(codes=codes, block_scales=scales, tensor_scale=0)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_a_scale_without_a_value_is_refused_where_values_are_needed(byte):
    bad = aq.quantize(GOOD).map(np.copy)
    bad.block_scales[1, 0] = byte
    for door in (aq.dequantize, lambda q: aq.matmul(q, aq.quantize(GOOD)), lambda q: bounds.check(GOOD, q)):
        with pytest.raises(
            ValueError, match=rf"1 block scales are NaN or carry a sign bit.*{byte:#04x} at index \(1, 0\)"
        ):
            door(bad)


def test_product_depths():
    with pytest.raises(ValueError, match=r"a has K=32 and b has K=16; a product needs one K.*same selection"):
        aq.matmul(aq.quantize(GOOD), aq.quantize(GOOD[:, :16]))


def test_check_compares_like_with_like():
    for x in (GOOD[:1], GOOD[:, :16]):
        with pytest.raises(
            ValueError, match=r"x has shape .* but q has \(2, 32\); they belong to one matrix"
        ):
            bounds.check(x, aq.quantize(GOOD))
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\) but q has \(2, 48\)"):
        bounds.check(GOOD, aq.augment_activations(GOOD, SELECTION))
    for q in (aq.quantize(GOOD), aq.augment_activations(GOOD, aq.select_top(np.ones(32), 32))):
        with pytest.raises(
            ValueError, match=r"q has K=(32|64), but a selection of 32 channels with 16 .* 48"
        ):
            bounds.check(GOOD, q, SELECTION)


def test_bounds_take_only_what_fits():
    with pytest.raises(ValueError, match=r"selection was made for K=32 but x has K=48"):
        bounds.element_bounds(np.ones((1, 48)), 1.0, SELECTION)
    for bound in (bounds.nvfp4_bound, bounds.arc_bound):
        with pytest.raises(ValueError, match=r"amax is -1.0 at index \(1,\)"):
            bound([1.0, -1.0], 1.0)
        with pytest.raises(ValueError, match=r"tensor_scale=-1.0 is not a positive"):
            bound(1.0, -1.0)
    x_bounds = bounds.element_bounds(GOOD, 1.0)
    with pytest.raises(ValueError, match=r"w has shape \(2, 32\) but w_hat has \(1, 32\)"):
        bounds.certify_values(GOOD, GOOD, x_bounds, GOOD[:1], GOOD @ GOOD.T)
    with pytest.raises(ValueError, match=r"x has shape \(1, 32\) but x_bounds has \(2, 32\)"):
        bounds.certify_values(GOOD[:1], GOOD, x_bounds, GOOD, GOOD @ GOOD.T)
    with pytest.raises(ValueError, match=r"y_hat has shape \(1, 2\) but x wᵀ has \(2, 2\)"):
        bounds.certify_values(GOOD, GOOD, x_bounds, GOOD, np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"x has K=32 and w has K=16"):
        bounds.certify_values(GOOD, GOOD[:, :16], x_bounds, GOOD[:, :16], GOOD @ GOOD.T)


def test_other_types_where_a_tensor_or_a_selection_belongs():
    for call in (aq.dequantize, lambda x: aq.matmul(x, x), lambda x: bounds.check(x, x)):
        with pytest.raises(TypeError, match=r"is a ndarray, not NVFP4Tensor\. quantize\(x\) makes one"):
            call(GOOD)
    for augment in (aq.augment_activations, aq.augment_weights):
        with pytest.raises(TypeError, match=r"selection is a NoneType, not Selection\. select\(calibrate"):
            augment(GOOD, None)


def test_masked_arrays_are_refused():
    with pytest.raises(TypeError, match=r"x is a masked array; fill it first, for example x\.filled\(0\)"):
        aq.quantize(np.ma.masked_array(GOOD, GOOD > 0))


def test_layout_shapes():
    with pytest.raises(ValueError, match=r"codes has shape \(1, 3\); it must be \(M, K\) with K even"):
        layout.pack(np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match=r"packed has shape \(3,\)"):
        layout.unpack(np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"block_scales has shape \(3,\)"):
        layout.swizzle_128x4(np.zeros(3, np.uint8))
    with pytest.raises(
        ValueError, match=r"swizzled has shape \(500,\); scales of shape \(2, 4\) fill 512 bytes"
    ):
        layout.unswizzle_128x4(np.zeros(500, np.uint8), (2, 4))


def test_nothing_is_changed_in_place():
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    before = x.tobytes()
    q = aq.augment_activations(x, SELECTION)
    energy = np.square(x).mean(axis=0)
    two_sided = dataclasses.replace(SELECTION, weight_channels=np.arange(16))
    before_energy = energy.tobytes()
    aq.quantize_weighted(x, energy), aq.augment_weights(x, two_sided, energy), bounds.certify(x, x, two_sided)
    assert energy.tobytes() == before_energy
    aq.augment_weights(x, SELECTION), aq.dequantize(q), aq.matmul(q, q), bounds.check(x, q, SELECTION)
    baselines.mxfp8(x), baselines.int4(x)
    assert x.tobytes() == before
    with pytest.raises(AttributeError, match="cannot assign"):
        q.codes = q.codes
