"""What other implementations do and this one does not: docs/deviations.md, one test for each line of it."""

import ml_dtypes
import numpy as np
from support import every_backend, optional

from arcquant_ref import bounds, calibrate, layout, select, select_top
from arcquant_ref.augment import interleave, merge, split
from arcquant_ref.formats import BLOCK, E2M1
from arcquant_ref.quantize import exact_values


@every_backend
def test_tensor_scale_uses_the_absolute_maximum(backend):
    """A signed max(w) would clip this −8 to 1."""
    w = np.array([[1.0, -8.0] + [0.5] * 14])
    assert backend.quantize(w).tensor_scale == np.float32(8) / np.float32(2688)
    assert backend.dequantize(backend.quantize(w))[0, 1] == -8


@every_backend
def test_residual_is_taken_with_the_rounded_scale(backend):
    """With the unrounded scale the residual repairs an error that the GEMM does not make."""
    x = np.random.default_rng(0).standard_normal((64, BLOCK)).astype(np.float32)
    selection = select_top(np.ones(BLOCK), BLOCK)
    q = backend.augment_activations(x, selection, 1)
    primary = backend.quantize(x, 1)
    unrounded = np.abs(x).max(axis=1, keepdims=True) / 6
    wrong_r = x - E2M1.values[primary.codes] * unrounded
    wrong = exact_values(primary) + exact_values(backend.quantize(wrong_r, 1))
    right_error, wrong_error = np.abs(merge(q, selection) - x).mean(), np.abs(wrong - x).mean()
    assert wrong_error > 2.5 * right_error


def test_selection_is_of_absolute_values_and_for_all_rows():
    """Eight outlier channels, negative: the rule finds eight, whatever row they are in."""
    x = np.random.default_rng(0).uniform(-1, 1, (512, 512))
    x[np.arange(8), np.arange(8) * 3] = -50
    selection = select(calibrate([x]))
    assert selection.num_residual == 16
    assert set(selection.order[-8:]) == set(range(0, 24, 3))


@every_backend
def test_ties_go_to_even_and_not_to_the_first_table_entry(backend):
    """argmin over a table keeps the first of two equally near values: 0.75 → 0.5 and 1.75 → 1.5."""
    ties = np.array([0.75, 1.75, 3.5])
    table = E2M1.magnitudes
    argmin = table[np.abs(table - ties[:, None]).argmin(axis=1)]
    assert argmin.tolist() == [0.5, 1.5, 3]
    assert backend.decode_e2m1(backend.encode_e2m1(ties)).tolist() == [1, 2, 4]


@every_backend
def test_e4m3_has_subnormals(backend):
    assert backend.encode_e4m3([2.0**-9, 3 * 2.0**-9, 2.0**-7]).tolist() == [1, 3, 4]


def test_scale_padding_is_zero():
    swizzled = layout.swizzle_128x4(np.full((5, 3), 0xAB, np.uint8))
    assert (swizzled == 0xAB).sum() == 15
    assert (swizzled == 0).sum() == 512 - 15


@every_backend
def test_residual_and_scaled_input_are_not_rounded_to_bf16(backend):
    """x = 1.25 · (1 + 2⁻¹²): bf16 would put it on the midpoint 1.25 of step 1."""
    x = np.float32([[6, 1.25 * (1 + 2.0**-12)] + [0] * 14])
    assert backend.quantize(x, 1).codes[0, 1] == 3
    assert backend.quantize(x.astype(ml_dtypes.bfloat16), 1).codes[0, 1] == 2


@every_backend
def test_elements_are_divided_and_not_multiplied_by_a_reciprocal(backend):
    """x · fl(1/s) and x / s part at ties of the significand 1.875: 2.5 · 1.875 is one."""
    step = np.float32(1.875)
    x = np.float32([[6 * step, 1.25 * step, 2.5 * step, 5 * step] + [0] * 12])
    q = backend.quantize(x, 1)
    assert q.codes[0, 1:4].tolist() == [2, 4, 6]
    by_reciprocal = backend.encode_e2m1(x * (np.float32(1) / step))
    assert by_reciprocal[0, 1:4].tolist() != [2, 4, 6]


@every_backend
def test_channels_are_reordered_before_blocks_are_formed(backend):
    x = np.random.default_rng(0).standard_normal((4, 64))
    x[:, [3, 40]] *= 100
    selection = select(calibrate([x]))
    q = backend.augment_activations(x, selection)
    assert q.shape[1] == 64 + 16
    plain = backend.quantize(x[:, selection.order])
    np.testing.assert_array_equal(q.block_scales[:, :3], plain.block_scales[:, :3])


@every_backend
def test_zero_and_underflowed_blocks_store_the_least_scale(backend):
    """0x01, where others store 0x00 (then ±6 codes or NaN), 0x08, 0x20 or 0x38."""
    q = backend.quantize(np.array([[0.0] * 16 + [1e-30] * 16 + [1.0] * 16]))
    assert q.block_scales[0, :2].tolist() == [1, 1]
    assert not q.codes[0, :32].any()


@every_backend
def test_an_all_zero_tensor_has_no_nan(backend):
    q = backend.quantize(np.zeros((1, 16)))
    assert q.tensor_scale == 1
    assert (backend.dequantize(q) == 0).all()


def test_low_nibble_is_even_k_where_comfy_kitchen_defaults_to_the_high_one():
    torch, comfy = optional("torch"), optional("comfy_kitchen.backends.eager.quantization")
    x = torch.tensor([[6.0, 1.0] + [0.0] * 14])
    theirs, _ = comfy.quantize_nvfp4(x, torch.tensor(1.0))
    assert theirs[0, 0].item() == 0x72
    assert layout.pack(np.uint8([[7, 2]])).item() == 0x27


@every_backend
def test_cosine_cannot_see_a_missing_residual_but_the_bound_does(backend):
    """A test at cosine > 0.98 on U(−½, ½) passes without any residual; the error bound does not."""
    rng = np.random.default_rng(0)
    x, w = rng.uniform(-0.5, 0.5, (64, 256)), rng.uniform(-0.5, 0.5, (64, 256))
    selection = select_top(calibrate([x]), 256)
    y, plain = x @ w.T, backend.matmul(backend.quantize(x), backend.quantize(w))
    arc = backend.matmul(backend.augment_activations(x, selection), backend.augment_weights(w, selection))
    for got in (plain, arc):
        assert (y * got).sum() / np.linalg.norm(y) / np.linalg.norm(got) > 0.98
    q = backend.augment_activations(x, selection)
    primary, r = split(q, 256)
    assert bounds.check(x, q, selection).holds
    assert not bounds.check(x, interleave(primary, r.map(np.zeros_like)), selection).holds
