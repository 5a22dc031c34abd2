"""The fast baselines: every bit of the reference's values, of every dtype."""

import ml_dtypes
import numpy as np
import pytest
import stress
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from strategies import matrices
from support import finite_bf16, neighbours

import emulator
from arcquant_ref import baselines as reference
from arcquant_ref.formats import E2M1, E4M3
from emulator import baselines

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


def any_float32(multiple: int, across: int) -> st.SearchStrategy[NDArray[np.float32]]:
    """Any finite bits, subnormals and both zeros among them."""
    shapes = st.tuples(st.integers(1, 3), st.integers(1, across).map(lambda n: multiple * n))
    return shapes.flatmap(lambda shape: arrays(np.uint32, shape, elements=finite)).map(
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
