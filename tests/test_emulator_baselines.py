"""The fast baselines: every bit of the reference's values and of the recipe's bytes, of every dtype."""

import ml_dtypes
import numpy as np
import pytest
import stress
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from strategies import matrices, tensor_scales
from support import assert_same_tensor, finite_bf16, neighbours

import emulator
from arcquant_ref import NVFP4Tensor
from arcquant_ref import baselines as reference
from arcquant_ref.formats import BLOCK, E2M1, E4M3
from emulator import baselines, recipes

RULES = ["ceiling_exponent", "floor_exponent"]
MX = {"mxfp8": E4M3, "mxfp4": E2M1}
MX_CASES = [(name, rule) for name in MX for rule in RULES]
finite = st.integers(0, 0xFEFFFFFF).filter(lambda bits: bits & 0x7F800000 != 0x7F800000)
each_mx = pytest.mark.parametrize(("name", "rule"), MX_CASES)


def assert_same_bits(got: NDArray[np.float32], expected: NDArray[np.float32], x: NDArray) -> None:
    """A mismatch prints where, the input, got, expected."""
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    different = np.argwhere(got.view(np.uint32) != expected.view(np.uint32))
    if len(different):
        i = tuple(different[0].tolist())
        pytest.fail(f"{len(different)} differ, first at {i}: {x[i]!r} became {got[i]!r}, not {expected[i]!r}")


def assert_mx_agrees(name: str, rule: str, x: NDArray, values: NDArray[np.float32] | None = None) -> None:
    """`values` are those of x where the reference does not take its dtype."""
    got = getattr(emulator, name)(x, getattr(baselines, rule))
    values = x if values is None else values
    assert_same_bits(got, getattr(reference, name)(values, getattr(reference, rule)), x)


def assert_int4_agrees(x: NDArray, values: NDArray[np.float32] | None = None) -> None:
    with np.errstate(over="ignore"):  # 7 · fl(amax / 7) at the very top of float32
        expected = reference.int4(x if values is None else values)
    assert_same_bits(emulator.int4(x), expected, x)


def any_float32(
    multiple: int, across: int, elements: st.SearchStrategy[int] = finite
) -> st.SearchStrategy[NDArray[np.float32]]:
    """Any finite bits, subnormals and both zeros among them."""
    shapes = st.tuples(st.integers(1, 3), st.integers(1, across).map(lambda n: multiple * n))
    return shapes.flatmap(lambda shape: arrays(np.uint32, shape, elements=elements)).map(
        lambda bits: bits.view(np.float32)
    )


def at_the_boundaries(largest: float, points: NDArray) -> NDArray[np.float32]:
    """Rows of 32: an amax at or beside max · 2ⁿ or 2ⁿ, down to subnormals, and elements at or beside
    `points` times the scale below it and the one above, of both signs."""
    top = np.float32(2.0) ** np.arange(-140, 118, 7, dtype=np.float32)
    amax = neighbours(np.concatenate([top * np.float32(largest), top]))
    amax = amax[amax > 0]
    scale = np.exp2(np.ceil(np.log2(np.maximum(amax.astype(np.float64) / largest, 2.0**-127))))
    rows = []
    for a, s in zip(amax, scale):
        elements = neighbours((np.concatenate([points, points / 2]) * s).astype(np.float32))
        elements = np.concatenate([elements, -elements])
        elements = elements[np.abs(elements) <= a]
        elements = np.append(elements, np.zeros(-len(elements) % 31, np.float32))
        rows.append(np.insert(elements.reshape(-1, 31), 7, a, axis=1))
    return np.concatenate(rows)


@each_mx
@given(
    x=st.one_of(st.sampled_from([2, 4, 6]).flatmap(lambda n: matrices(blocks_along_k=n)), any_float32(32, 3))
)
def test_mx_has_the_bits_of_the_reference(name, rule, x):
    assert_mx_agrees(name, rule, x)


@given(x=st.one_of(matrices(blocks_along_k=9), any_float32(1, 300)))
def test_int4_has_the_bits_of_the_reference(x):
    """K from 1 to 300: the last group is ragged."""
    assert_int4_agrees(x)


@each_mx
def test_mx_at_every_boundary(name, rule):
    """Where the exponent of the scale changes, ties, saturation, scales below the least E8M0."""
    fmt = MX[name]
    points = np.concatenate([fmt.midpoints, [0, fmt.max, fmt.max * (1 + 2.0**-8), 2 * fmt.max]])
    assert_mx_agrees(name, rule, at_the_boundaries(fmt.max, points))


def test_int4_at_every_boundary():
    """Halves of a step, and steps that are subnormal, rounded up or rounded to zero."""
    assert_int4_agrees(at_the_boundaries(7, np.arange(15) / 2))
    assert_int4_agrees((np.arange(-64, 64, dtype=np.float32) * 2.0**-149).astype(np.float32)[None])
    for units in range(1, 40):
        x = np.arange(-units, units + 1) * np.float64(2.0**-149)
        assert_int4_agrees(x.astype(np.float32)[None])


@pytest.mark.parametrize("order", ["as numbers", "as bits", "shuffled"])
def test_every_bf16(order):
    x = finite_bf16()
    if order == "shuffled":
        x = np.random.default_rng(5).permutation(x)
    x = (np.sort(x) if order == "as numbers" else x)[: len(x) // 128 * 128].reshape(-1, 128)
    for name, rule in MX_CASES:
        assert_mx_agrees(name, rule, x)
    assert_int4_agrees(x)


@pytest.mark.parametrize("matrix", stress.inputs())
def test_the_stress_matrices_in_their_own_dtypes(matrix):
    x = stress.inputs()[matrix]
    values = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x
    for name, rule in MX_CASES:
        assert_mx_agrees(name, rule, x, values)
    assert_int4_agrees(x, values)
    assert_int4_agrees(x[:, :33], values[:, :33])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(dtype):
    x = np.random.default_rng(6).standard_normal((5, 160)).astype(dtype)
    for name, rule in MX_CASES:
        assert_mx_agrees(name, rule, x)
    assert_int4_agrees(x)


def test_zero_blocks_stay_zero_with_their_signs():
    x = np.copysign(np.float32(0), np.random.default_rng(8).standard_normal((2, 64))).astype(np.float32)
    for name, rule in MX_CASES:
        assert_mx_agrees(name, rule, x)
    assert_int4_agrees(x)
    assert_same_bits(emulator.int4(x), x, x)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_memory_layout_change_no_bit(threads, monkeypatch):
    x = np.random.default_rng(9).standard_normal((37, 160)).astype(np.float32)
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
    before = x.tobytes()
    for stored in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.astype(">f4")):
        assert_mx_agrees("mxfp8", "ceiling_exponent", stored, x)
        assert_int4_agrees(stored, x)
    assert x.tobytes() == before


BAD = {
    "NaN": np.where(np.arange(64).reshape(2, 32) == 37, np.nan, 1),
    "infinity": np.where(np.arange(64).reshape(2, 32) == 37, -np.inf, np.float32(1)).astype(np.float32),
    "beyond float32": np.full((2, 32), 1e39),
    "a vector": np.ones(32),
    "integers": np.ones((2, 32), np.int64),
    "empty": np.ones((0, 32)),
    "no columns": np.ones((2, 0)),
    "ragged": np.ones((2, 40)),
    "masked": np.ma.masked_array(np.ones((2, 32)), mask=np.zeros((2, 32))),
}


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "int4"])
@pytest.mark.parametrize("x", BAD.values(), ids=BAD)
def test_the_errors_are_those_of_the_reference(name, x):
    try:
        getattr(reference, name)(x)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)) as raised:
            getattr(emulator, name)(x)
        text = str(error).replace("float64. Convert", "float64, uint16. Convert")
        assert str(raised.value) == text
    else:
        assert (name, x.shape) == ("int4", (2, 40))


FOUR_OVER_SIX = recipes.RECIPES["fouroversix (4/6)"]
LEAST_AMAX = 1536 * 2.0**-126


def by_the_recipe(x: NDArray, amax: np.float32) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    q = recipes.quantize(FOUR_OVER_SIX, x, amax)
    return q.codes, q.block_scales


def assert_4_over_6_agrees(x: NDArray, tensor_scale: float | None = None) -> NVFP4Tensor:
    amax = recipes.quantize(FOUR_OVER_SIX, x).tensor_scale
    own = max(amax, np.float32(LEAST_AMAX)) if amax else np.float32(1536)
    amax = own if tensor_scale is None else np.float32(tensor_scale) * np.float32(1536)
    codes, block_scales = by_the_recipe(x, amax)
    expected_scale = own / np.float32(1536) if tensor_scale is None else np.float32(tensor_scale)
    got = emulator.four_over_six(x, tensor_scale)
    expected = NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=expected_scale)
    assert_same_tensor(got, expected)
    return got


@pytest.mark.parametrize("matrix", stress.inputs())
def test_4_over_6_makes_the_bytes_of_the_recipe(matrix):
    x = stress.inputs()[matrix]
    got, recipe = assert_4_over_6_agrees(x), recipes.quantize(FOUR_OVER_SIX, x)
    if matrix != "tiny, bfloat16":  # 1536 / A overflows: there all codes of the recipe are those of NaN
        np.testing.assert_array_equal(got.codes, recipe.codes)
        np.testing.assert_array_equal(got.block_scales, recipe.block_scales)
        assert got.tensor_scale == (recipe.tensor_scale / np.float32(1536) or 1)
    else:
        assert (recipe.codes == 0xB).all()
    for static in (1.0, 2.0**-126, 1 / 3, float(got.tensor_scale) / 2, float(got.tensor_scale) * 1.7):
        if static >= 2.0**-126:
            assert_4_over_6_agrees(x, min(static, 2e35))


# 2⁻¹²⁶ … 2⁻¹¹⁰ is where the inverse of a step overflows
@given(
    st.one_of(matrices(), any_float32(16, 3)), st.one_of(tensor_scales, st.floats(-126, -110).map(np.exp2))
)
def test_4_over_6_of_any_matrix(x, tensor_scale):
    assert_4_over_6_agrees(x, tensor_scale)


@given(any_float32(16, 4, st.integers(0, 0x0E000000)), st.floats(-126, -115).map(np.exp2))
def test_4_over_6_of_the_smallest_numbers(x, tensor_scale):
    """Infinite inverses of steps, and then the codes of NaN."""
    assert_4_over_6_agrees(x * np.float32([1, -1] * (x.shape[1] // 2)), tensor_scale)


@given(st.integers(0, 2**32 - 1))
def test_4_over_6_where_roundings_decide(seed):
    """Elements halfway between the nearest of 0 … 6 and of 1.5 times 0 … 4, a few float32 units off: which
    candidate wins depends on the rounding of every operation and on the order of the sum."""
    rng = np.random.default_rng(seed)
    tensor_scale = np.float32(rng.uniform(1, 2) * 2.0 ** rng.integers(-20, 20))
    scales = rng.choice([1, 1.25, 1.5, 1.75], (64, 4, 1)) * np.exp2(rng.integers(-5, 6, (64, 4, 1)))
    x = rng.choice([0.625, -0.875, 2.125, -4.25, 4.25, 6], (64, 4, BLOCK)) * scales * tensor_scale
    x *= 1 + rng.integers(-1, 2, x.shape) * 2.0**-23
    x = x.reshape(64, 64).astype(np.float32)
    assert_4_over_6_agrees(x, tensor_scale)
    assert_4_over_6_agrees(x)


def test_a_tie_between_4_and_6_stays_with_6():
    """Both without an error: 6 = 6 · 1 = 4 · 1.5 and 3 = 3 · 1 = 2 · 1.5."""
    x = np.float32([[6, 3, -6, 0] * 4])
    got = assert_4_over_6_agrees(x, 1.0)
    assert got.block_scales == 0x38
    assert got.codes[0, :4].tolist() == [7, 5, 15, 0]
    np.testing.assert_array_equal(emulator.dequantize(got), x)


def test_4_over_6_beats_6_where_elements_lie_at_5_steps():
    x = np.float32([[6, 4.5] * 8])  # 6 and 4.5 are 4 and 3 times 1.5
    got = assert_4_over_6_agrees(x, 1.0)
    np.testing.assert_array_equal(emulator.dequantize(got), x)
    assert (emulator.dequantize(emulator.quantize(x, 1.0)) != x).any()


def test_4_over_6_does_not_clamp():
    """Seven steps and more become −0: the recipe's defect, kept."""
    x = np.zeros((1, BLOCK), np.float32)
    x[0, :4] = [7 * 448, -7 * 448, 6.9 * 448, 1e6]
    assert assert_4_over_6_agrees(x, 1.0).codes[0, :4].tolist() == [8, 8, 7, 8]


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_4_over_6_of_other_dtypes(dtype):
    assert_4_over_6_agrees(np.random.default_rng(10).standard_normal((5, 160)).astype(dtype))


@pytest.mark.parametrize("x", BAD.values(), ids=BAD)
@pytest.mark.parametrize("tensor_scale", [None, 1.0])
def test_4_over_6_raises_what_quantize_raises(x, tensor_scale):
    if x.shape == (2, 40):
        x = x[:, :20]
    with pytest.raises((TypeError, ValueError)) as expected:
        emulator.quantize(x, tensor_scale)
    with pytest.raises(expected.type) as raised:
        emulator.four_over_six(x, tensor_scale)
    assert str(raised.value) == str(expected.value)


def test_4_over_6_refuses_tensor_scales():
    x = np.ones((1, 16), np.float32)
    with pytest.raises(ValueError, match="tensor_scale=0 is not a positive, finite, normal float32"):
        emulator.four_over_six(x, 0)
    with pytest.raises(ValueError, match=r"tensor_scale=3.*e\+35 times 1536 is beyond float32\. Scale x"):
        emulator.four_over_six(x, 2.0**118)
