"""The emulator's matmul: the chain of tensor-core steps, whatever the scales, tiles and threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import emulator
from arcquant_ref import NVFP4Tensor, bounds, gemm
from arcquant_ref.formats import BLOCK
from emulator.gemm import matmul_in_integers

SCALES = {  # of a tensor, as bytes: what the range of its products, and so what is cut off, depends on
    "ordinary": lambda rng, shape: rng.integers(0x60, 0x7F, shape, np.uint8),
    "spread": lambda rng, shape: rng.integers(0, 0x7F, shape, np.uint8),
    "far spread": lambda rng, shape: rng.choice(np.uint8([0x01, 0x07, 0x0F, 0x7E]), shape),
    "any bits": lambda rng, shape: rng.integers(0, 256, shape, np.uint8),
    "rarely NaN": lambda rng, shape: np.where(rng.random(shape) < 0.002, 0x7F, 0x38).astype(np.uint8),
    "mostly zero": lambda rng, shape: (rng.integers(0, 0x7F, shape) * (rng.random(shape) < 0.2)).astype(
        np.uint8
    ),
}


def tensor_with_scales(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> NVFP4Tensor:
    codes = rng.integers(0, 16, shape, np.uint8)
    blank = np.repeat(rng.random((shape[0], shape[1] // BLOCK)) < 0.1, BLOCK, axis=1)
    return NVFP4Tensor(
        codes=np.where(blank, rng.choice(np.uint8([0, 8]), shape), codes),
        block_scales=SCALES[kind](rng, (shape[0], shape[1] // BLOCK)),
        tensor_scale=np.float32(rng.choice([1, 2.0**-10, 0.3, 2.0**-126, 1e38])),
    )


def cancelling_pair(rng: np.random.Generator, m: int, n: int, steps: int) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Every other step adds nothing but an exponent: all that happens is what C loses to it."""
    a, b = (
        replace(tensor_with_scales("ordinary", rng, (rows, 64 * steps)), tensor_scale=1) for rows in (m, n)
    )
    x, y = (q.codes.reshape(-1, steps, 64)[:, 1::2] for q in (a, b))
    x[..., 1::2] = x[..., 0::2]
    y[..., 1::2] = y[..., 0::2] ^ 8
    for q in (a, b):
        scales = q.block_scales.reshape(-1, steps, 4)[:, 0::2]
        scales[:] = rng.choice(np.uint8([0x01, 0x03, 0x31, 0x36]), scales.shape)
    return a, b


def lone_pair(rng: np.random.Generator, m: int, n: int, steps: int) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """After the first step one negative product each, far below a unit of C, which it costs if it is not cut
    off."""
    a, b = (
        replace(tensor_with_scales("ordinary", rng, (rows, 64 * steps)), tensor_scale=1) for rows in (m, n)
    )
    for q, code in ((a, 1), (b, 9)):
        q.codes[:, 64:] = 0
        q.codes[:, 64::64] = code
        q.block_scales[:, :4] = rng.integers(0x58, 0x68, (len(q.codes), 4))
        power_of_two = rng.random(len(q.codes)) < 0.5  # C = 2 · 2 · 2^14, say: the least of its binade
        q.codes[power_of_two, :64] = 4 * (np.arange(64) == 0)
        q.block_scales[power_of_two, :4] = rng.choice(np.uint8([0x68, 0x70]))
        q.block_scales[:, 4:] = rng.integers(0x01, 0x03, (len(q.codes), 4 * steps - 4))
    return a, b


@pytest.mark.parametrize("pair", [cancelling_pair, lone_pair])
@given(m=st.integers(1, 40), n=st.integers(1, 3), steps=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_matmul_is_the_chain_of_steps_where_one_bit_decides(pair, m, n, steps, seed):
    a, b = pair(np.random.default_rng(seed), m, n, steps)
    np.testing.assert_array_equal(emulator.matmul(a, b), matmul_in_integers(a, b))


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))


@pytest.mark.parametrize("kind", SCALES)
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_the_chain_of_steps(kind, size, seed):
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
    got, expected = emulator.matmul(a, b).view(np.uint32), matmul_in_integers(a, b).view(np.uint32)
    different = np.argwhere(got != expected)
    assert len(different) == 0, (kind, different[0], got[got != expected][0], expected[got != expected][0])


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_matmul_depends_neither_on_threads_nor_on_tiles(threads, tile, monkeypatch):
    rng = np.random.default_rng(3)
    a, b = (tensor_with_scales("spread", rng, (rows, 272)) for rows in (37, 29))
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
    monkeypatch.setattr("emulator.gemm.TILE_M", tile)
    monkeypatch.setattr("emulator.gemm.TILE_N", 2 * tile)
    np.testing.assert_array_equal(
        emulator.matmul(a, b).view(np.uint32), matmul_in_integers(a, b).view(np.uint32)
    )


def test_products_run_at_the_same_time():
    """From several threads at once, and the BLAS of the process has all its threads back afterwards."""
    rng = np.random.default_rng(4)
    a, b = (tensor_with_scales("ordinary", rng, (300, 128)) for _ in "ab")
    before = [pool["num_threads"] for pool in threadpool_info()]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: emulator.matmul(a, b), range(8)))
    for y in results:
        np.testing.assert_array_equal(y.view(np.uint32), matmul_in_integers(a, b).view(np.uint32))
    assert [pool["num_threads"] for pool in threadpool_info()] == before


def step_bound(a: NVFP4Tensor, b: NVFP4Tensor) -> np.ndarray:
    """What docs/emulator.md proves: each step is off by less than 2⁻²³ |D| + 5 · 2^(E − 35), (M, N) float64.

    In units without tensor scales; E is at most the largest exponent of the scales of the step and of C.
    """
    exponents = [np.maximum(q.block_scales >> 3, 1).astype(int) - 7 for q in (a, b)]
    bound, c = np.zeros((len(a.codes), len(b.codes))), np.zeros((len(a.codes), len(b.codes)))
    for k in range(0, a.shape[1], 64):
        some = slice(k // BLOCK, k // BLOCK + 4)
        top = (exponents[0][:, None, some] + exponents[1][None, :, some]).max(axis=-1)
        top = np.maximum(top, np.frexp(c)[1] - 1)
        upto = [
            NVFP4Tensor(
                codes=q.codes[:, : k + 64],
                block_scales=q.block_scales[:, : (k + 64) // BLOCK],
                tensor_scale=1,
            )
            for q in (a, b)
        ]
        c = emulator.matmul(*upto).astype(np.float64)
        bound += 2.0**-23 * np.abs(c) + 5 * np.ldexp(1.0, top - 35)
    return bound


@pytest.mark.parametrize("kind", ["ordinary", "spread", "far spread", "mostly zero"])
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_within_its_bound_of_the_exact_one(kind, size, seed):
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (replace(tensor_with_scales(kind, rng, (rows, blocks * BLOCK)), tensor_scale=1) for rows in (m, n))
    error = np.abs(emulator.matmul(a, b) - gemm.integer_matmul(a, b) * 2.0**-20)
    assert (error <= step_bound(a, b)).all()
    assert (error <= bounds.accumulation_bound(a, b)).all()


@pytest.mark.parametrize("kind", ["ordinary", "spread", "far spread", "mostly zero"])
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_within_the_accumulation_bound_with_any_tensor_scales(kind, size, seed):
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
    exactly = gemm.integer_matmul(a, b) * (2.0**-20 * np.float64(a.tensor_scale) * np.float64(b.tensor_scale))
    bound = bounds.accumulation_bound(a, b)
    with np.errstate(invalid="ignore"):  # inf − inf where nothing is promised
        error = np.abs(emulator.matmul(a, b) - exactly)
    assert (error[np.isfinite(bound)] <= bound[np.isfinite(bound)]).all()


def test_the_accumulation_bound_is_no_empty_promise():
    """C = 2¹⁶, and each of 61 steps adds 63/64 of its ulp, 2⁻⁷, which the truncation takes away. The bound
    allows an ulp and 5 · 2⁻¹² of one at every step, the first included, and two ulps for the epilogue."""
    steps, codes = 61, np.zeros((1, 62 * 64), np.uint8)
    codes[0, 0] = 0x2  # 1 · 1
    codes[0, 64::64] = codes[0, 65::64] = codes[0, 66::64] = 0x7  # 6 · 6 + 6 · 4 + 6 · ½ = 63
    other = codes.copy()
    other[0, 65::64], other[0, 66::64] = 0x6, 0x1
    scales = np.full((1, 62 * 4), 0x08, np.uint8)  # 2⁻⁶
    scales[0, 0] = 0x78  # 2⁸
    other_scales = scales.copy()
    other_scales[0, 4:] = 0x04  # 2⁻⁷, subnormal
    a = NVFP4Tensor(codes=codes, block_scales=scales, tensor_scale=1)
    b = NVFP4Tensor(codes=other, block_scales=other_scales, tensor_scale=1)
    error = gemm.integer_matmul(a, b) * 2.0**-20 - emulator.matmul(a, b)
    assert error == steps * 63 / 64 * 2.0**-7
    bound = bounds.accumulation_bound(a, b)
    assert error <= bound < (steps + 3) * (1 + 2.0**-9) * 2.0**-7


def test_the_accumulation_bound_is_no_empty_promise_where_alignment_cuts_off():
    """In each of 10 steps a group cancels, 36 − 36 times 2¹⁶, and makes E = 16; three others are half a unit
    of 2^(E − 35) each, and lost. The bound allows 5 units, and 2⁻²³ of next to nothing."""
    steps = 10
    codes = np.tile(np.uint8([7, 7, *[0] * 14, *[1, *[0] * 15] * 3]), steps)[None]  # 6 · 6; ½ · ½
    other = np.tile(np.uint8([7, 15, *[0] * 14, *[1, *[0] * 15] * 3]), steps)[None]
    scales = np.tile(np.uint8([0x78, 1, 1, 1]), steps)[None]  # 2⁸, 2⁻⁹
    a, b = (NVFP4Tensor(codes=c, block_scales=scales, tensor_scale=1) for c in (codes, other))
    assert emulator.matmul(a, b) == 0
    error = gemm.integer_matmul(a, b) * 2.0**-20
    assert error == steps * 3 / 2 * 2.0**-19
    assert error <= bounds.accumulation_bound(a, b) < steps * 5 * (1 + 2.0**-18) * 2.0**-19


@pytest.mark.parametrize("power", [-60, 0, 40])
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_matmul_is_the_exact_one_where_nothing_is_cut_off(power, size, seed):
    """Scales 1, 2 and 4: every sum is a multiple of ¼ below 2²², within float32's 24 bits."""
    (m, n, blocks), rng = size, np.random.default_rng(seed)
    a, b = (
        NVFP4Tensor(
            codes=rng.integers(0, 16, (rows, blocks * BLOCK), np.uint8),
            block_scales=rng.choice(np.uint8([0x38, 0x40, 0x48]), (rows, blocks)),
            tensor_scale=2.0**power,
        )
        for rows in (m, n)
    )
    np.testing.assert_array_equal(emulator.matmul(a, b), gemm.matmul(a, b))
