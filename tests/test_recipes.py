"""Recipes: equal to the packages' bytes (tests/golden/recipes), all different, right in the corners."""

import csv
import re
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import stress
from hypothesis import given
from hypothesis import strategies as st
from peers import PEERS, Peer
from strategies import matrices, tensor_scales
from support import REQUIRED, assert_same_tensor

import arcquant_ref as aq
import emulator
from arcquant_ref import NVFP4Tensor, Selection, calibrate, layout, select_top
from arcquant_ref.formats import BLOCK
from emulator import recipes
from emulator.recipes import RECIPES, Produced, Recipe

ROOT = stress.GOLDEN.parents[2]
INPUTS = stress.inputs()
OURS = RECIPES["arcquant_ref"]


@pytest.fixture(scope="module")
def produced() -> dict[str, dict[str, Produced]]:
    return {
        name: {matrix: recipes.quantize(recipe, x) for matrix, x in INPUTS.items()}
        for name, recipe in RECIPES.items()
    }


def installed(name: str) -> Peer:
    """The peer, or a skip with the reason; a failure under ARCQUANT_REQUIRE=torch if CI should have it."""
    peer = PEERS[name]
    if find_spec(peer.module) is None:  # not imported: transformer_engine cannot be without a GPU
        if peer.in_the_extra and "torch" in REQUIRED:
            pytest.fail(f"ARCQUANT_REQUIRE=torch, but {peer.distribution} is not installed")
        pytest.skip(f"{peer.distribution} is not installed" + " (nor in the extra)" * (not peer.in_the_extra))
    return peer


def assert_same_bytes(recipe: Recipe, got: Produced, packed, scales, tensor_scale, what: str) -> None:
    """Packed codes, block scales and tensor scale as bytes; a mismatch prints where and both bytes."""
    got_packed, got_scales = recipes.pack(recipe, got)
    if recipe.swizzled:
        assert scales.shape == got_scales.shape, what
        scales, got_scales = (layout.unswizzle_128x4(s, got.block_scales.shape) for s in (scales, got_scales))
    for part, a, b in [("codes", got_packed, packed), ("scales", got_scales, scales)]:
        assert a.shape == b.shape, (what, part)
        if len(different := np.argwhere(a != b)):
            i = tuple(different[0].tolist())
            pytest.fail(
                f"{what}, {part}: {len(different)} differ, first at {i}: {a[i]:#x}, expected {b[i]:#x}"
            )
    assert np.float32(got.tensor_scale).tobytes() == np.float32(tensor_scale).tobytes(), what


@pytest.mark.parametrize("name", PEERS)
def test_the_recipe_gives_the_bytes_of_the_package(name, produced):
    about, outputs = stress.golden(name)
    assert about["recipe"] == name
    assert len(outputs) >= len(INPUTS) - 4
    for matrix, expected in outputs.items():
        assert_same_bytes(RECIPES[name], produced[name][matrix], *expected, f"{name}, {matrix}")


@pytest.mark.parametrize("name", PEERS)
def test_versions_agree(name):
    """Of the package in the golden file, the recipe's evidence and, where CI installs it, pyproject.toml."""
    about, _ = stress.golden(name)
    distribution = PEERS[name].distribution
    assert f"ran: {distribution} {about[distribution]}" in RECIPES[name].evidence
    pinned = f'"{distribution}=={about[distribution]}"' in (ROOT / "pyproject.toml").read_text()
    assert pinned == PEERS[name].in_the_extra


@pytest.mark.parametrize("name", PEERS)
def test_the_package_itself(name):
    """In the extra `peers`: every byte that the installed package makes, against recipe and golden file."""
    peer = installed(name)
    _, outputs = stress.golden(name)
    for matrix, expected in outputs.items():
        x = INPUTS[matrix]
        packed, scales, tensor_scale = peer.run(x)
        assert_same_bytes(
            RECIPES[name], recipes.quantize(RECIPES[name], x), packed, scales, tensor_scale, matrix
        )
        for got, golden in zip((packed, scales, tensor_scale), expected):
            np.testing.assert_array_equal(got, golden)


def test_any_two_recipes_differ():
    """In how many bytes of scales and codes, over all matrices, is in the file."""
    names, *rows = stress.differences()
    for a, (_, *counts) in enumerate(rows):
        assert all(int(count) > 0 for b, count in enumerate(counts) if b != a), names[1 + a]
    with open(stress.DIFFERENCES, newline="") as file:
        assert list(csv.reader(file)) == [names, *rows]


TWO_LEVEL = [
    "arcquant_ref",
    "Transformer Engine reference",
    "FlashInfer/TensorRT-LLM exact",
    "FlashInfer/TensorRT-LLM fast",
    "vLLM reference",
    "torchao",
    "ModelOpt",
    "compressed-tensors",
    "fouroversix (static 6)",
    "comfy-kitchen",
]


def test_random_float32_cannot_tell_them_apart(produced):
    first, *others = (produced[name]["gaussian, float32"] for name in TWO_LEVEL)
    for other in others:
        np.testing.assert_array_equal(other.codes, first.codes)
        np.testing.assert_array_equal(other.block_scales, first.block_scales)


@given(matrices(), tensor_scales)
def test_ours_is_the_normative_order(x, tensor_scale):
    got = recipes.quantize(OURS, x, tensor_scale)
    assert_same_tensor(NVFP4Tensor(**vars(got)), aq.quantize(x, tensor_scale))


@given(matrices(), tensor_scales, st.integers(0, 4))
def test_our_residuals_are_the_normative_ones(x, tensor_scale, s):
    k = x.shape[1]
    selection = select_top(calibrate([x]), min(s * BLOCK, k))
    got = recipes.augment(OURS, x, selection, tensor_scale)
    assert_same_tensor(NVFP4Tensor(**vars(got)), aq.augment_activations(x, selection, tensor_scale))


def test_input_of_every_dtype():
    x = INPUTS["ties, bfloat16"]
    as_float32 = (x.astype(np.uint32) << 16).view(np.float32)
    assert_same_tensor(
        NVFP4Tensor(**vars(recipes.quantize(OURS, x))), emulator.quantize(as_float32.astype(np.float64))
    )
    uneven, half = as_float32 / 3, (as_float32 / 3).astype(np.float16)
    t = RECIPES["compressed-tensors"]
    assert recipes.quantize(t, half).tensor_scale == np.float16(
        np.float16(1) / np.abs(half).max()
    ) * np.float16(2688)
    assert recipes.quantize(t, uneven).tensor_scale == np.float32(1) / np.abs(uneven).max() * np.float32(2688)


NAN_FROM_ZEROS = {"torchao", "ModelOpt", "comfy-kitchen", "vLLM reference"}


@pytest.mark.parametrize("name", PEERS)
def test_a_defect_is_reproduced_an_all_zero_tensor_becomes_nan(name, produced):
    q = produced[name]["all zero, bfloat16"]
    assert np.isnan(emulator.decode_e4m3(q.block_scales)).all() == (name in NAN_FROM_ZEROS)
    _, outputs = stress.golden(name)
    scales = outputs["all zero, bfloat16"][1]
    assert ((scales & 0x7F == 0x7F).any()) == (name in NAN_FROM_ZEROS)


def test_a_defect_is_reproduced_an_element_without_clamp_becomes_minus_zero(produced):
    """fouroversix: v = 1.4 · 2⁻⁹ is stored as 2⁻⁹, and the amax of the block, 8.4 steps, as −0."""
    x = np.zeros((2, BLOCK), np.float32)
    x[0, :2], x[1] = [6 * 1.4 * 2.0**-9, -6 * 1.4 * 2.0**-9], 2688
    for name, codes in {"fouroversix (static 6)": [8, 8], "Transformer Engine reference": [7, 15]}.items():
        q = recipes.quantize(RECIPES[name], x)
        assert q.block_scales[0, 0] == 1
        assert q.codes[0, :2].tolist() == codes


def test_a_defect_is_reproduced_float16_weights_lose_their_tensor_scale():
    x = np.full((1, BLOCK), 0.04, np.float16)
    assert recipes.quantize(RECIPES["compressed-tensors"], x).tensor_scale == 1
    assert recipes.quantize(RECIPES["compressed-tensors"], x.astype(np.float32)).tensor_scale > 60000


def block_beside(amax: float, *elements: float) -> np.ndarray:
    """A matrix of this amax, and in its first row a block that starts with these elements."""
    x = np.zeros((2, BLOCK), np.float32)
    x[0, : len(elements)], x[1, 0] = elements, amax
    return x


@pytest.mark.parametrize(
    ("name", "scale", "codes"),
    [
        ("arcquant_ref", 0x01, [0, 0, 8, 8]),
        ("Transformer Engine reference", 0x00, [7, 0, 0, 15]),
        ("FlashInfer/TensorRT-LLM exact", 0x00, [7, 7, 7, 15]),
        ("FlashInfer/TensorRT-LLM fast", 0x00, [7, 7, 7, 15]),
        ("ARCQuant authors", 0x01, [0, 0, 8, 8]),
        ("TensorRT-LLM ARC (reorder)", 0x01, [0, 0, 8, 8]),
        ("vLLM reference", 0x00, [0, 0, 0, 8]),
        ("torchao", 0x08, [0, 0, 8, 8]),
        ("ModelOpt", 0x01, [0, 0, 0, 8]),
        ("compressed-tensors", 0x20, [0, 0, 0, 8]),
        ("fouroversix (static 6)", 0x00, [0, 0, 0, 0]),
        ("comfy-kitchen", 0x00, [0, 0, 0, 0]),
    ],
)
def test_an_underflowed_block(name, scale, codes):
    """+, 0, −0, − in a block that is too small for the tensor's scale."""
    q = recipes.quantize(RECIPES[name], block_beside(2688, 1e-6, 0.0, -0.0, -1e-6))
    assert q.block_scales[0, 0] == scale
    assert q.codes[0, :4].tolist() == codes


def test_the_reciprocal_is_a_parameter():
    """fl(1 / 1.875) lies above 1 / 1.875: one unit less, and every tie falls to the other side."""
    step = 1.875
    x = block_beside(2688, 6 * step, 1.25 * step, 2.5 * step, 5 * step, 0.75 * step, 1.75 * step)
    assert recipes.quantize(OURS, x).codes[0, 1:6].tolist() == [2, 4, 6, 2, 4]
    for ulp, expected in {0: [3, 5, 7, 2, 4], 1: [3, 5, 7, 2, 4], -1: [2, 4, 6, 1, 3]}.items():
        recipe = replace(RECIPES["TensorRT-LLM ARC (reorder)"], reciprocal_ulp=ulp)
        assert recipes.quantize(recipe, x).codes[0, 1:6].tolist() == expected
    codes = [recipes.quantize(r, x).codes.tobytes() for name, r in RECIPES.items() if "fast" in name]
    assert len(codes) == 3
    assert len(set(codes)) > 1


def test_scaled_input_and_residual_in_bfloat16():
    """Read recipes, by hand: 1.25 · (1 + 2⁻¹²) becomes the midpoint 1.25 in bf16, and the residual 0.25."""
    x = block_beside(2688, 6, 1.25 * (1 + 2.0**-12))
    selection = Selection(order=np.arange(BLOCK), num_residual=BLOCK, channel_amax=np.ones(BLOCK))
    expected = {
        "arcquant_ref": (3, 1.25 * (1 + 2.0**-12) - 1.5),
        "ARCQuant authors": (2, 0.25),
        "TensorRT-LLM ARC (reorder)": (2, 0.25),
        "TensorRT-LLM ARC (no reorder)": (3, 1.25 * (1 + 2.0**-12) - 1.5),
    }
    for name, (code, r) in expected.items():
        q = recipes.augment(RECIPES[name], x, selection)
        assert q.codes.shape == (2, 2 * BLOCK)
        assert q.codes[0, 1] == code
        value = emulator.decode_e2m1(q.codes[0, BLOCK + 1]) * emulator.decode_e4m3(q.block_scales[0, 1])
        assert abs(value - r) < 0.18 * abs(r), name


def test_residuals_follow_the_order_of_channels_or_do_not():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    x[:, 3] *= 100
    selection = select_top(calibrate([x]), 16)
    for name, recipe in RECIPES.items():
        if recipe.residual:
            q = recipes.augment(recipe, x, selection)
            plain = recipes.quantize(recipe, x[:, selection.order] if recipe.reorders else x)
            np.testing.assert_array_equal(q.codes[:, :64], plain.codes, err_msg=name)
            np.testing.assert_array_equal(q.block_scales[:, :4], plain.block_scales, err_msg=name)
            none = recipes.augment(recipe, x, select_top(calibrate([x]), 0))
            np.testing.assert_array_equal(none.codes, plain.codes)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_stored_tensor_scale_given_back_changes_nothing(recipe):
    x = INPUTS["near ties, float32"]
    own = recipes.quantize(recipe, x)
    again = recipes.quantize(recipe, x, own.tensor_scale)
    np.testing.assert_array_equal(again.codes, own.codes)
    np.testing.assert_array_equal(again.block_scales, own.block_scales)


@given(matrices(max_rows=2), st.sampled_from(sorted(RECIPES)))
def test_packed_bytes(x, name):
    q = recipes.quantize(RECIPES[name], x)
    packed, scales = recipes.pack(RECIPES[name], q)
    nibbles = layout.unpack(packed).reshape(len(x), -1, 2)
    order = [1, 0] if RECIPES[name].high_nibble_first else [0, 1]
    np.testing.assert_array_equal(nibbles[..., order].reshape(x.shape), q.codes)
    expected = layout.swizzle_128x4(q.block_scales) if RECIPES[name].swizzled else q.block_scales
    np.testing.assert_array_equal(scales, expected)


def test_errors():
    with pytest.raises(
        ValueError, match=r"recipe 'torchao' has no residual channels; those that have: arcquant_ref"
    ):
        recipes.augment(RECIPES["torchao"], np.ones((1, 16)), select_top(np.ones(16), 16))
    two_sided = Selection(
        order=np.arange(16), num_residual=16, channel_amax=np.ones(16), weight_channels=np.arange(16)
    )
    message = "selection has 16 weight_channels, but a recipe knows residuals of activations only"
    with pytest.raises(ValueError, match=message):
        recipes.augment(OURS, np.ones((1, 16)), two_sided)
    with pytest.raises(ValueError, match="selection was made for K=32 but x has K=16"):
        recipes.augment(OURS, np.ones((1, 16)), select_top(np.ones(32), 16))
    with pytest.raises(ValueError, match="x has K=15, which is not a multiple of the block size 16"):
        recipes.quantize(OURS, np.ones((1, 15)))
    with pytest.raises(ValueError, match="x: 1 of 16 elements are NaN"):
        recipes.quantize(OURS, np.where(np.arange(16) == 3, np.nan, 1)[None])


def test_every_recipe_says_how_it_is_known():
    for recipe in RECIPES.values():
        assert re.match("here: |read: |ran: ", recipe.evidence), recipe.name
        assert (recipe.name in PEERS) == recipe.evidence.startswith("ran: ")
