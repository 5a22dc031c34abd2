"""Inputs that tell a wrong kernel from a right one: matrices, NVFP4 tensors, operands of single MMAs.

Random numbers seldom do: ties, floors, corners, far-apart exponents and cancelling products are made here.
Every function takes a generator and a kind, one of those in the table above it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcquant_ref.formats import BLOCK, E2M1, E4M3, Codes, Float32, Float64
from arcquant_ref.select import Selection
from arcquant_ref.tensor import NVFP4Tensor

Rng = np.random.Generator
MAX = np.finfo(np.float32).max
LEAST = np.finfo(np.float32).smallest_subnormal
SIGNIFICANDS = (
    1.0,
    1.25,
    1.625,
    1.875,
)  # of scales at which x · (1/s) and x / s differ, or errors are largest


def _at_one_place(rng: Rng, x: Float64, values: Any) -> Float64:
    x[np.arange(len(x)), rng.integers(0, BLOCK, len(x))] = values
    return x


def _ties(rng: Rng, n: int) -> Float64:
    """Elements on midpoints of E2M1 for the scale that the block gets at tensor_scale = 1."""
    points = np.concatenate([E2M1.midpoints, E2M1.magnitudes])
    x = _at_one_place(rng, rng.choice(points, (n, BLOCK)), E2M1.max)
    return x * rng.choice(SIGNIFICANDS, (n, 1)) * np.exp2(rng.integers(-9, 8, (n, 1)))


def _near_ties(rng: Rng, n: int) -> Float64:
    x = _ties(rng, n).astype(np.float32)
    return np.nextafter(x, rng.choice(np.array([-MAX, MAX], np.float32), x.shape)).astype(np.float64)


def _gaussian(rng: Rng, n: int) -> Float64:
    return rng.standard_normal((n, BLOCK)) * np.exp2(rng.integers(-12, 9, (n, 1)))


def _one_huge(rng: Rng, n: int) -> Float64:
    return _at_one_place(rng, _gaussian(rng, n), rng.choice([448.0, 2688.0, 2816.0, 1e5, 1e30], n))


# Blocks of 16, their signs drawn afterwards
BLOCKS: dict[str, Callable[[Rng, int], NDArray[Any]]] = {
    "ties": _ties,
    "beside ties": _near_ties,
    "gaussian": _gaussian,
    "floored and subnormal scales": lambda rng, n: rng.integers(0, 201, (n, BLOCK)) * E4M3.least_positive / 4,
    "one huge": _one_huge,
    "constant": lambda rng, n: np.repeat(
        rng.integers(1, 256, (n, 1)) * np.exp2(rng.integers(-20, 5, (n, 1))), BLOCK, axis=1
    ),
    "zero": lambda rng, n: np.zeros((n, BLOCK)),
    "float32 subnormals": lambda rng, n: rng.integers(0, 2**23, (n, BLOCK)) * float(LEAST),
    "any float32": lambda rng, n: (
        rng.integers(0, 0x7F800000, (n, BLOCK), np.uint32).view(np.float32).astype(np.float64)
    ),
}
MATRICES = (*BLOCKS, "negative maxima", "outlier channels", "all kinds")


def matrix(rng: Rng, kind: str, shape: tuple[int, int]) -> Float32:
    """(M, K) float32, finite."""
    n = shape[0] * shape[1] // BLOCK
    if kind == "all kinds":
        of_block = rng.integers(
            0, len(BLOCKS) - 1, n
        )  # without any float32: its maximum would hide the others
        x = np.empty((n, BLOCK))
        for i, make in enumerate(list(BLOCKS.values())[:-1]):
            x[of_block == i] = make(rng, int((of_block == i).sum()))
    else:
        x = BLOCKS.get(kind, _gaussian)(rng, n)
    x = (x * rng.choice([-1, 1], x.shape)).reshape(shape)
    if kind == "negative maxima":
        x = np.where(x == np.abs(x).max(axis=1, keepdims=True), -2 * np.abs(x), x)
    if kind == "outlier channels":
        x[:, rng.random(shape[1]) < 0.02] *= 1000
    return x.astype(np.float32)


def as_dtype(x: Float32, dtype: Any) -> NDArray[Any]:
    """The same numbers in another dtype, 1 where beyond its range; float64 gets bits of its own."""
    with np.errstate(over="ignore", under="ignore"):
        y = (x * np.float64(1 + 2**-30) if dtype == np.float64 else x).astype(dtype)
        return np.where(np.isfinite(y.astype(np.float32)), y, dtype(1))


def selection(rng: Rng, k: int, num_residual: int) -> Selection:
    """Any order of the channels."""
    return Selection(order=rng.permutation(k), num_residual=num_residual, channel_amax=np.ones(k, np.float32))


# Scale bytes of a tensor: what the range of its products, and so what a step cuts off, depends on
SCALES: dict[str, Callable[[Rng, tuple[int, int]], NDArray[np.integer]]] = {
    "ordinary": lambda rng, shape: rng.integers(0x60, 0x7F, shape),
    "spread": lambda rng, shape: rng.integers(0, 0x7F, shape),
    "far spread": lambda rng, shape: rng.choice([0x01, 0x07, 0x0F, 0x7E], shape),
    "any bits": lambda rng, shape: rng.integers(0, 256, shape),
    "rarely NaN": lambda rng, shape: np.where(rng.random(shape) < 0.002, 0x7F, 0x38),
    "mostly zero": lambda rng, shape: rng.integers(0, 0x7F, shape) * (rng.random(shape) < 0.2),
}
PRODUCTS = (*SCALES, "cancelling groups", "one small product")


def product(rng: Rng, kind: str, m: int, n: int, k: int) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Operands (m, k) and (n, k)."""
    a, b = (_tensor(rng, kind if kind in SCALES else "ordinary", (rows, k)) for rows in (m, n))
    if kind == "cancelling groups":
        _cancel(rng, a, b)
    if kind == "one small product":
        _one_product_a_step(rng, a, b)
    return a, b


def _tensor(rng: Rng, kind: str, shape: tuple[int, int]) -> NVFP4Tensor:
    blocks = (shape[0], shape[1] // BLOCK)
    codes, zeros = rng.integers(0, 16, shape, np.uint8), rng.choice(np.array([0, 8], np.uint8), shape)
    blank = np.repeat(rng.random(blocks) < 0.1, BLOCK, axis=1)
    return NVFP4Tensor(
        codes=np.where(blank, zeros, codes),
        block_scales=SCALES[kind](rng, blocks).astype(np.uint8),
        tensor_scale=np.float32(rng.choice([1, 2.0**-10, 0.3, 2.0**-126, 1e38])),
    )


def _cancel(rng: Rng, a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    """Every other step adds nothing but an exponent, to which C loses bits."""
    step = np.arange(a.shape[1]) // 64 % 2 == 1
    for q, flipped in ((a, 0), (b, 8)):
        q.codes[:, 1::2] = np.where(step[1::2], q.codes[:, 0::2] ^ flipped, q.codes[:, 1::2])
        first = q.block_scales[:, ~step[::BLOCK]]
        q.block_scales[:, ~step[::BLOCK]] = rng.choice(
            np.array([0x01, 0x03, 0x31, 0x36], np.uint8), first.shape
        )


def _one_product_a_step(rng: Rng, a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    """After the first step one negative product each, far below a unit of C; it costs one if not cut off."""
    for q, code in ((a, 1), (b, 9)):
        q.codes[:, 64:] = 0
        q.codes[:, 64::64] = code
        lone = rng.random(len(q.codes)) < 0.5  # here C is a power of two, the least number of its binade
        q.codes[lone, :64] = 4 * (np.arange(min(64, q.shape[1])) == 0)
        q.block_scales[:, :4] = rng.integers(0x58, 0x68, q.block_scales[:, :4].shape)
        q.block_scales[lone, :4] = rng.choice([0x68, 0x70])
        q.block_scales[:, 4:] = rng.integers(0x01, 0x03, q.block_scales[:, 4:].shape)


# Operands of single MMAs
STEPS = (
    "any bits",
    "ordinary",
    "spread",
    "far spread",
    "zeros",
    "cancelling",
    "tiny",
    "alignment edges",
    "special C",
)
HALVES = {"f16": (5, 10), "bf16": (8, 7)}  # exponent and mantissa bits
SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, MAX, -MAX, LEAST, -LEAST, 2.0**-126, -1e-40, 2.0**-20, 1], np.float32
)
Half = NDArray[np.uint16]


def half_steps(rng: Rng, name: str, kind: str, steps: int) -> tuple[Half, Half, Float32]:
    """Operands of mma.m16n8k16: bits (steps, 16, 16) and (steps, 8, 16), C (steps, 16, 8)."""
    a, b = (_half_operand(rng, name, kind, (steps, rows, 16)) for rows in (16, 8))
    if kind == "cancelling":
        a[..., 1::2], b[..., 1::2] = a[..., 0::2], b[..., 0::2] ^ 0x8000
    of_a, of_b = (_exponents(x, HALVES[name]) for x in (a, b))
    c = _accumulators(rng, np.maximum.reduce([_sums(of_a, of_b, i) for i in range(16)]), HALF_EDGES)
    if kind == "any bits":
        c = np.where(
            rng.random(c.shape) < 0.5, c, rng.integers(0, 2**32, c.shape, np.uint32).view(np.float32)
        )
    if kind == "tiny":
        c[rng.random(c.shape) < 0.8] = 0
    return a, b, rng.choice(SPECIAL, c.shape) if kind == "special C" else c


def _half_operand(rng: Rng, name: str, kind: str, shape: tuple[int, ...]) -> Half:
    exponent_bits, mantissa_bits = HALVES[name]
    bias = 2 ** (exponent_bits - 1) - 1
    if kind == "any bits":
        return rng.integers(0, 2**16, shape, np.uint16)
    reach = bias - 1 if kind == "spread" else 4
    fields = bias + rng.integers(-reach, reach + 1, shape)
    if kind == "far spread":
        fields = rng.choice([1, 2, bias, bias + 10, 2 * bias], shape)
    if kind == "tiny":  # bfloat16: products about 2^-146, the unit of D being 2^-149
        fields -= bias - 4 if name == "f16" else 73
    if kind == "alignment edges":  # products 20 to 28 binades below the first one
        fields = bias + 7 - rng.integers(10, 15, shape)
        fields[..., 0] = bias + 7
    mantissa = rng.integers(0, 2**mantissa_bits, shape)
    mantissa[rng.random(shape) < 0.2] = 0
    if kind != "alignment edges":
        fields[rng.random(shape) < 0.1] = 0  # subnormals and zeros
    if kind in ("zeros", "tiny"):
        fields[zeros := rng.random(shape) < 0.4], mantissa[zeros] = 0, 0
    return (rng.integers(0, 2, shape) << 15 | fields << mantissa_bits | mantissa).astype(np.uint16)


def nvfp4_steps(rng: Rng, kind: str, steps: int) -> tuple[Codes, Codes, Codes, Codes, Float32]:
    """Operands of mma.m16n8k64: codes (steps, 16, 64) and (steps, 8, 64), their scales, C (steps, 16, 8)."""
    a, b = (rng.integers(0, 16, (steps, rows, 64), np.uint8) for rows in (16, 8))
    sfa, sfb = (_step_scales(rng, kind, (steps, rows, 4)) for rows in (16, 8))
    if kind == "zeros":  # groups without a product, with the largest scales there are
        groups = np.repeat(rng.random((steps, 16, 4)) < 0.3, BLOCK, axis=2)
        half = np.arange(64) % 2 == 0
        b[..., half] = rng.choice(np.array([0, 8], np.uint8), b[..., half].shape)
        a[groups & ~half] &= 8
        sfa[groups[..., ::BLOCK]] = 0x7E
        sfb[rng.random(sfb.shape) < 0.2] = 0
    if kind == "cancelling":
        a[..., 1::2], b[..., 1::2] = a[..., 0::2], b[..., 0::2] ^ 8
        b[np.repeat(rng.random(sfb.shape) < 0.5, BLOCK, axis=2)] &= 7  # these do not cancel
        for scales in (sfa, sfb):
            scales[rng.random(scales.shape) < 0.5] = 0x7E
    of_a, of_b = (_exponents(x & 0x7F, SCALE) for x in (sfa, sfb))
    c = _accumulators(rng, np.maximum.reduce([_sums(of_a, of_b, g) for g in range(4)]), NVFP4_EDGES)
    return a, b, sfa, sfb, rng.choice(SPECIAL, c.shape) if kind == "special C" else c


def _step_scales(rng: Rng, kind: str, shape: tuple[int, ...]) -> Codes:
    low, high = {"any bits": (0, 256), "tiny": (0, 10), "spread": (0, 0x7F), "special C": (0, 0x7F)}.get(
        kind, (0x28, 0x48)
    )
    if kind in ("far spread", "alignment edges"):  # exponents 28 apart: the only way to lose bits to a group
        return rng.choice(np.array([0x01, 0x07, 0x0F, 0x7E], np.uint8), shape)
    return rng.integers(low, high, shape, np.uint8)


SCALE = (E4M3.exponent_bits, E4M3.mantissa_bits)
# Where C, or a term beside it, begins to lose bits or is gone: its exponent less the largest other one
HALF_EDGES = (-30, -27, -26, -25, -24, -3, -2, -1, 0, 1, 20, 24, 25, 26, 27)
NVFP4_EDGES = (-37, -36, -35, -26, -14, -13, -12, -11, -1, 0, 1, 10, 11, 24, 26, 27, 28, 29)


def _accumulators(rng: Rng, largest: NDArray[np.int64], edges: tuple[int, ...]) -> Float32:
    """C with all 24 bits, beside the exponents at which alignment changes what is kept."""
    exponent = np.clip(largest + rng.choice(edges, largest.shape), -140, 120)
    c = np.ldexp(rng.integers(2**23, 2**24, largest.shape).astype(np.float64), exponent - 23)
    c *= rng.choice([-1, 1], c.shape)
    c[rng.random(c.shape) < 0.1] = 0
    return c.astype(np.float32)


def _exponents(bits: NDArray[Any], widths: tuple[int, int]) -> NDArray[np.int64]:
    exponent_bits, mantissa_bits = widths
    field = bits.astype(np.int64) >> mantissa_bits & (2**exponent_bits - 1)
    return np.maximum(field, 1) - (2 ** (exponent_bits - 1) - 1)


def _sums(of_a: NDArray[np.int64], of_b: NDArray[np.int64], i: int) -> NDArray[np.int64]:
    return of_a[:, :, None, i] + of_b[:, None, :, i]
