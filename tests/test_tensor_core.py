"""One step of a tensor core: the emulator's two versions, a rational restatement, MMA-Sim and recordings."""

import os
from pathlib import Path

import exact
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from support import optional

from emulator import mma_m16n8k16, mma_m16n8k64
from emulator.tensor_core import BF16, FP16, HOPPER, RTX_BLACKWELL, half_in_integers, nvfp4_in_integers

NAN = 0x7FFFFFFF
KINDS = ["any bits", "spread", "far spread", "zero groups", "cancelling", "tiny", "special C"]
seeds = st.integers(0, 2**32 - 1)
HALVES = {"fp16": (np.float16, FP16, -14), "bf16": (ml_dtypes.bfloat16, BF16, -126)}


def nvfp4_tile(kind: str, rng: np.random.Generator):
    """Operands of one mma_m16n8k64 that can tell a wrong step from the right one.

    On what `quantize` makes of random numbers nothing is ever cut off: it would tell nothing.
    """
    a, b = rng.integers(0, 16, (16, 64), np.uint8), rng.integers(0, 16, (8, 64), np.uint8)
    sfa, sfb = rng.integers(0x28, 0x48, (16, 4), np.uint8), rng.integers(0x28, 0x48, (8, 4), np.uint8)
    if kind == "any bits":
        sfa, sfb = rng.integers(0, 256, (16, 4), np.uint8), rng.integers(0, 256, (8, 4), np.uint8)
    if kind in ("spread", "special C"):
        sfa, sfb = rng.integers(0, 0x7F, (16, 4), np.uint8), rng.integers(0, 0x7F, (8, 4), np.uint8)
    if kind == "far spread":  # exponents 28 apart: the only way for a group to lose bits to another
        sfa, sfb = rng.choice([0x07, 0x0F, 0x7E], (16, 4)), rng.choice([0x01, 0x0F, 0x7E], (8, 4))
    if kind == "zero groups":  # with the largest scales there are
        for row, g in enumerate(rng.integers(0, 4, 16)):
            block = slice(16 * g, 16 * g + 16)
            a[row, block] = rng.choice([0, 8], 16)
            a[row, block][::2] = rng.integers(0, 16) * rng.integers(0, 2)  # b has zeros there
            sfa[row, g] = 0x7E
        b[:, ::2] = rng.choice([0, 8], (8, 32))
        sfa[rng.random(sfa.shape) < 0.5] -= 0x20
        sfb[rng.random(sfb.shape) < 0.2] = 0
    if kind == "cancelling":
        a[:, 1::2] = a[:, 0::2]
        b[:, 1::2] = b[:, 0::2] ^ 8
        groups = rng.random((8, 4)) < 0.5
        b[np.repeat(groups, 16, axis=1)] &= 7  # these do not cancel
        sfa[rng.random(sfa.shape) < 0.5] = 0x7E
        sfb[rng.random(sfb.shape) < 0.5] = 0x7E
    if kind == "tiny":  # subnormal scales
        sfa, sfb = rng.integers(0, 10, (16, 4), np.uint8), rng.integers(0, 10, (8, 4), np.uint8)
    return a, b, sfa.astype(np.uint8), sfb.astype(np.uint8), accumulators(kind, sfa, sfb, rng)


def accumulators(kind: str, sfa, sfb, rng):
    """C with all 24 bits, its exponent near where it, or a group beside it, begins to lose some of them."""
    exponent = np.maximum((sfa & 0x7F) >> 3, 1)[:, None].astype(int) + np.maximum((sfb & 0x7F) >> 3, 1) - 14
    top = exponent.max(axis=-1)
    distance = rng.choice(
        [-37, -36, -35, -26, -14, -13, -12, -11, -1, 0, 1, 10, 11, 24, 26, 27, 28, 29], top.shape
    )
    c = np.ldexp(rng.integers(2**23, 2**24, top.shape).astype(np.float64), top + distance - 23)
    c = (c * rng.choice([-1, 1], top.shape)).astype(np.float32)
    c[rng.random(top.shape) < 0.1] = 0
    if kind == "special C":
        c = rng.choice(SPECIAL, top.shape)
    return c


MAX, LEAST = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
SPECIAL = np.float32(
    [0, -0.0, np.inf, -np.inf, np.nan, MAX, -MAX, LEAST, -LEAST, 2.0**-126, -1e-40, 2.0**-20, 1]
)


def half_tile(name: str, kind: str, rng: np.random.Generator):
    """Operands of one mma_m16n8k16 as bits: (16, 16), (8, 16) uint16, C (16, 8) float32."""
    dtype, (exponent_bits, mantissa_bits), _ = HALVES[name]
    bias = 2 ** (exponent_bits - 1) - 1

    def operand(rows, spread):
        fields = bias + rng.integers(-spread, spread + 1, (rows, 16))
        fields[rng.random((rows, 16)) < 0.1] = 0  # subnormals and zeros
        mantissa = rng.integers(0, 2**mantissa_bits, (rows, 16))
        mantissa[rng.random((rows, 16)) < 0.2] = 0
        return (rng.integers(0, 2, (rows, 16)) << 15 | fields << mantissa_bits | mantissa).astype(np.uint16)

    spread = bias - 1 if "spread" in kind else 4
    a, b = operand(16, spread), operand(8, spread)
    if kind == "tiny" and name == "bf16":  # products about 2^-146, the unit of D being 2^-149
        a, b = (x - (((x & 0x7F80) > 0) * np.uint16(73 << 7)) for x in (a, b))
    if kind == "any bits":
        a, b = rng.integers(0, 2**16, (16, 16), np.uint16), rng.integers(0, 2**16, (8, 16), np.uint16)
    if kind in ("zero groups", "tiny"):
        a[rng.random(a.shape) < 0.6] = 0
    if kind == "cancelling":
        a[:, 1::2], b[:, 1::2] = a[:, 0::2], b[:, 0::2] ^ 0x8000
    with np.errstate(all="ignore"):
        product = values(a, dtype)[:, None] * values(b, dtype)
        top = np.nan_to_num(np.log2(np.abs(product).max(axis=-1) + 1e-300), posinf=0).astype(int)
    distance = rng.choice([-30, -27, -26, -25, -24, -3, -2, -1, 0, 1, 20, 24, 25, 26, 27], top.shape)
    c = np.ldexp(
        rng.integers(2**23, 2**24, top.shape).astype(np.float64), np.clip(top + distance, -140, 120) - 23
    )
    c = (c * rng.choice([-1, 1], c.shape)).astype(np.float32)
    c[rng.random(c.shape) < (0.9 if kind == "tiny" else 0.1)] = 0
    return a, b, rng.choice(SPECIAL, c.shape) if kind == "special C" else c


def values(half: np.ndarray, dtype: type) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN
        return half.view(dtype).astype(np.float64)


@njit
def tile_in_integers(a, b, sfa, sfb, c, core, d):
    for m in range(16):
        for n in range(8):
            d[m, n] = nvfp4_in_integers(a[m], b[n], sfa[m], sfb[n], c[m, n], core)


@njit
def half_tile_in_integers(a, b, c, widths, d):
    for m in range(16):
        for n in range(8):
            d[m, n] = half_in_integers(a[m], b[n], c[m, n], widths, HOPPER)


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def assert_same_bits(got, expected, what):
    """`expected` may hold any NaN; the hardware has one."""
    expected = np.where(np.isnan(expected), np.uint32(NAN), bits(expected))
    different = np.argwhere(bits(got) != expected)
    if len(different):
        i = tuple(different[0])
        pytest.fail(
            f"{what}: {len(different)} of {expected.size} differ, first {i}: "
            f"got {bits(got)[i]:#010x}, expected {expected[i]:#010x}"
        )


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_nvfp4_mma_equals_the_rational_restatement(kind, seed):
    a, b, sfa, sfb, c = nvfp4_tile(kind, np.random.default_rng(seed))
    got = mma_m16n8k64(a, b, sfa, sfb, c)
    rows = np.random.default_rng(seed).choice(16, 3, replace=False)
    expected = [
        [
            exact.nvfp4_step(a[m].tolist(), b[n].tolist(), sfa[m].tolist(), sfb[n].tolist(), float(c[m, n]))
            for n in range(8)
        ]
        for m in rows
    ]
    assert_same_bits(got[rows], np.array(expected), kind)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_half_mma_equals_the_rational_restatement(name, kind, seed):
    dtype, _, least_exponent = HALVES[name]
    a, b, c = half_tile(name, kind, np.random.default_rng(seed))
    got = mma_m16n8k16(a.view(dtype), b.view(dtype), c)
    x, y = values(a, dtype), values(b, dtype)
    rows = np.random.default_rng(seed).choice(16, 3, replace=False)
    expected = [
        [exact.half_step(x[m].tolist(), y[n].tolist(), float(c[m, n]), least_exponent) for n in range(8)]
        for m in rows
    ]
    assert_same_bits(got[rows], np.array(expected), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_integers(kind):
    """The fast version against the specification: 200 tiles, 25,600 outputs, of each kind and MMA."""
    rng, d = np.random.default_rng(0), np.empty((16, 8), np.float32)
    for _ in range(200):
        tile = nvfp4_tile(kind, rng)
        tile_in_integers(*tile, RTX_BLACKWELL, d)
        assert_same_bits(mma_m16n8k64(*tile), d, kind)
        for name, (dtype, widths, _) in HALVES.items():
            a, b, c = half_tile(name, kind, rng)
            half_tile_in_integers(a, b, c, widths, d)
            assert_same_bits(mma_m16n8k16(a.view(dtype), b.view(dtype), c), d, f"{name}, {kind}")


@pytest.mark.parametrize("exponent", [-126, -127, -133, -300])
def test_any_exponent_of_zeros_below_that_of_every_float32_gives_the_same_bits(exponent):
    """-139 cannot be told from these: what can be seen is that zeros do not raise the largest exponent."""
    rng, got, expected = (
        np.random.default_rng(0),
        np.empty((16, 8), np.float32),
        np.empty((16, 8), np.float32),
    )
    for kind in KINDS:
        tile = nvfp4_tile(kind, rng)
        tile_in_integers(*tile, RTX_BLACKWELL._replace(zero_exponent=exponent), got)
        tile_in_integers(*tile, RTX_BLACKWELL, expected)
        assert_same_bits(got, expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_mma_equals_mma_sim(kind):
    """The public model, another program: 20 tiles, 2,560 outputs of each kind and MMA."""
    torch, nv = optional("torch"), optional("mmasim.nv_ptx.sim")
    nvfp4 = nv.MMABlockScale("RTX Blackwell", "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3")
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b, sfa, sfb, c = nvfp4_tile(kind, rng)
        packed = [
            torch.from_numpy(x[:, 1::2] | x[:, 0::2] << 4) for x in (a, b)
        ]  # it has even k in the high nibble
        scales = [torch.from_numpy(x).view(torch.float8_e4m3fn) for x in (sfa, sfb)]
        expected = nvfp4(packed[0], packed[1].T, torch.from_numpy(c), scales[0], scales[1].T)
        assert_same_bits(mma_m16n8k64(a, b, sfa, sfb, c), expected.numpy(), kind)
        for name, (dtype, _, _) in HALVES.items():
            mma = nv.MMA("Hopper", f"m16n8k16.f32.{name.replace('fp', 'f')}.{name.replace('fp', 'f')}.f32")
            a, b, c = half_tile(name, kind, rng)
            torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
            x, y = (torch.from_numpy(half.view(np.int16)).view(torch_dtype) for half in (a, b))
            expected = mma(x, y.T, torch.from_numpy(c)).numpy()
            assert_same_bits(mma_m16n8k16(a.view(dtype), b.view(dtype), c), expected, f"{name}, {kind}")


@pytest.mark.parametrize("gpu", ["H100", "H200", "B200"])
@pytest.mark.parametrize("name", HALVES)
def test_half_mma_equals_recordings_of_hardware(gpu, name):
    """ARCQUANT_RECORDINGS, a folder of hw_GPU_TYPE.npz: A_f32bits, B_f32bits (n, 16), C, D (n,) uint32."""
    if "ARCQUANT_RECORDINGS" not in os.environ:
        pytest.skip("ARCQUANT_RECORDINGS is not set: a folder of recorded tensor-core results")
    recorded = np.load(Path(os.environ["ARCQUANT_RECORDINGS"]) / f"hw_{gpu}_{name}.npz")
    dtype, widths, _ = HALVES[name]
    a, b = (recorded[f"{side}_f32bits"].view(np.float32).astype(dtype).view(np.uint16) for side in "AB")
    c, d = recorded["C"].view(np.float32), recorded["D"]
    assert len(d) >= 5000
    by_integers = [half_in_integers(x, y, z, widths, HOPPER) for x, y, z in zip(a, b, c)]
    np.testing.assert_array_equal(bits(by_integers), d)
    for i in range(0, len(d), 8):  # eight at a time, on the diagonal of one MMA
        rows, tile = slice(i, i + 8), np.zeros((3, 16, 16), np.uint16)
        n = len(d[rows])
        tile[0, :n], tile[1, :n], accumulator = a[rows], b[rows], np.zeros((16, 8), np.float32)
        accumulator[range(n), range(n)] = c[rows]
        got = mma_m16n8k16(tile[0].view(dtype), tile[1, :8].view(dtype), accumulator)
        np.testing.assert_array_equal(bits(np.diag(got))[:n], d[rows])
