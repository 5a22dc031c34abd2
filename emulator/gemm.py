"""matmul: the chain of tensor-core steps over K, for every output, as the model of RTX Blackwell has it."""

import os
from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, Codes, Float32, Float64
from arcquant_ref.tensor import NVFP4Tensor

from .formats import E4M3_NAN, MANTISSA, NAN, bits_of, f32, f64, float_of, value_e2m1, value_e4m3
from .jit import helper, kernel, over_rows
from .tensor_core import (
    ALL_ZERO,
    FP32,
    GROUP_UNIT,
    HAS_NAN,
    HOPPER,
    RTX_BLACKWELL,
    UNSIGNED,
    Ints,
    Operand,
    add_groups,
    aligned_sum,
    fields,
    nvfp4_in_integers,
    operand,
    power_of_two,
)

TILE_M, TILE_N = 256, 512  # outputs that one thread works on: their sums stay in its cache
# How far below the largest exponent a term's own may lie before any of its bits are cut off
KEEPS_C = RTX_BLACKWELL.fraction_bits - MANTISSA
KEEPS_GROUP = RTX_BLACKWELL.fraction_bits - GROUP_UNIT
NO_SCALE = 100  # instead of an exponent, where a step has only zeros
_blas, _one_user = ThreadpoolController(), Lock()  # how many threads BLAS uses is a setting of the process


def _forget_lock() -> None:
    """A forked child may have got the lock held by a thread that it has not got."""
    global _one_user
    _one_user = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def matmul(a: NVFP4Tensor, b: NVFP4Tensor) -> Float32:
    """a bᵀ, (M, K) and (N, K) → (M, N) float32: `mma_m16n8k64` chained over k = 0, 64, …, bit for bit.

    The chain starts at +0 and K is filled up with zero codes and zero scales to a multiple of 64; the result
    is fl(acc · fl(tensor_scale_a · tensor_scale_b)). A NaN block scale makes its outputs 0x7FFFFFFF; the
    sign of a block scale is ignored: UE4M3. Takes 8 bytes of memory for each value of a and b. Raises
    TypeError for another type, ValueError for different K.

    >>> from emulator import quantize
    >>> ones = quantize(np.ones((1, 32)), tensor_scale=1)
    >>> matmul(ones, ones)
    array([[34.03125]], dtype=float32)
    """
    for name, q in (("a", a), ("b", b)):
        checks.is_a(name, q, NVFP4Tensor, "quantize(x) makes one.")
    checks.same_depth("a", a.shape[1], "b", b.shape[1])
    left, right = operand(a.codes, a.block_scales), operand(b.codes, b.block_scales)
    y = np.empty((len(a.codes), len(b.codes)), f32)
    tiles = [(m, n) for m in range(0, y.shape[0], TILE_M) for n in range(0, y.shape[1], TILE_N)]

    def task(start: int, stop: int) -> None:
        for m, n in tiles[start:stop]:
            rows, columns = slice(m, m + TILE_M), slice(n, n + TILE_N)
            _epilogue(_chain(left, right, rows, columns), a.tensor_scale, b.tensor_scale, y[rows, columns])

    with _one_user, _blas.limit(limits=1, user_api="blas"):  # each of our threads calls it for its own tile
        over_rows(task, len(tiles))
    return y


def _chain(left: Operand, right: Operand, rows: slice, columns: slice) -> Float64:
    """The accumulators of a tile after the last step: float32 values, held in float64."""
    acc = np.zeros((left.values[0, rows].shape[0], right.values[0, columns].shape[0]))
    dots, doubtful = np.empty_like(acc), np.empty(len(acc), np.bool_)
    for s in range(len(left.values)):
        a, b = left.values[s, rows], right.values[s, columns]
        of_a, of_b = left.exponents[s, rows], right.exponents[s, columns]
        np.matmul(a, b.T, out=dots)  # multiples of 2^-20 below 2^29: exact in float64, in any order
        _add_plain(dots, of_a, of_b, acc, doubtful)
        if doubtful.any():
            add_groups(a, b, of_a, of_b, np.flatnonzero(doubtful), acc)
    return acc


@kernel
def _add_plain(
    dots: Float64, exponents_a: Ints, exponents_b: Ints, acc: Float64, doubtful: NDArray[np.bool_]
) -> None:
    """One step, in place, for the rows where nothing is cut off before the last rounding: D is C plus all 64
    products there, truncated once. The other rows are marked doubtful and left as they are."""
    highest_b, lowest_b = exponent_range(exponents_b)
    for m in range(len(acc)):
        highest, lowest = exponent_range(exponents_a[m : m + 1])
        highest, lowest = highest + highest_b, lowest + lowest_b
        c, dot = acc[m], dots[m]
        cut_off = highest - lowest > KEEPS_GROUP  # with a NaN always: what follows is not used then
        least, beyond = power_of_two(highest - KEEPS_C), power_of_two(lowest + KEEPS_GROUP + 1)
        for n in range(len(c)):
            cut_off |= not (((c[n] == 0) | (abs(c[n]) >= least)) & (abs(c[n]) < beyond))
        doubtful[m] = cut_off
        if not cut_off:
            for n in range(len(c)):
                c[n] = toward_zero_normal(c[n] + dot[n])


@helper
def exponent_range(exponents: Ints) -> tuple[int, int]:
    """The largest and smallest exponent among blocks that are not all zero; a NaN exceeds every limit."""
    highest, lowest = -NO_SCALE, NO_SCALE
    for exponent in exponents.flat:
        if exponent == HAS_NAN:
            return HAS_NAN, -HAS_NAN
        if exponent != ALL_ZERO:
            highest, lowest = max(highest, int(exponent)), min(lowest, int(exponent))
    return highest, lowest


@helper
def toward_zero_normal(x: f64) -> f64:
    """float64 truncated to the 24 bits of float32; x is a multiple of 2^-20 here, so never subnormal."""
    return np.int64(f64(x).view(np.int64) & ~((1 << 29) - 1)).view(f64)


@kernel
def _epilogue(acc: Float64, tensor_scale_a: f32, tensor_scale_b: f32, y: Float32) -> None:
    scale = f32(tensor_scale_a * tensor_scale_b)
    for m in range(len(acc)):
        for n in range(acc.shape[1]):
            scaled = f32(acc[m, n]) * scale
            y[m, n] = float_of(NAN) if np.isnan(scaled) else scaled


def matmul_in_integers(a: NVFP4Tensor, b: NVFP4Tensor) -> Float32:
    """What `matmul` computes, as it is defined: one `nvfp4_in_integers` after the other."""
    short = -a.shape[1] % 64
    filled = [
        (np.pad(q.codes, ((0, 0), (0, short))), np.pad(q.block_scales, ((0, 0), (0, short // BLOCK))))
        for q in (a, b)
    ]
    acc, y = np.empty((len(a.codes), len(b.codes))), np.empty((len(a.codes), len(b.codes)), f32)

    def task(start: int, stop: int) -> None:
        (a_codes, sfa), (b_codes, sfb) = filled
        _chain_in_integers(a_codes[start:stop], sfa[start:stop], b_codes, sfb, acc[start:stop])

    over_rows(task, len(y))
    _epilogue(acc, a.tensor_scale, b.tensor_scale, y)
    return y


@kernel
def _chain_in_integers(a_codes: Codes, sfa: Codes, b_codes: Codes, sfb: Codes, acc: Float64) -> None:
    for m in range(len(a_codes)):
        for n in range(len(b_codes)):
            c = f32(0)
            for s in range(a_codes.shape[1] // 64):
                k, g = slice(64 * s, 64 * s + 64), slice(4 * s, 4 * s + 4)
                c = nvfp4_in_integers(a_codes[m, k], b_codes[n, k], sfa[m, g], sfb[n, g], c, RTX_BLACKWELL)
            acc[m, n] = c


PIECE, CHAINS = 128, 8  # of `matmul_fp16_split_k`: what a chain gets of K at a time, and how many there are


def matmul_fp16(a: NVFP4Tensor, b: NVFP4Tensor) -> Float32:
    """a bᵀ, (M, K) and (N, K) → (M, N) float32: e2m1 · e4m3 as fp16 numbers, `mma_m16n8k16` over k = 0, 16, …

    The products of codes and scales are exact in fp16; the chain starts at +0. Epilogue, NaN, sign of scales
    and errors as in `matmul`.

    >>> from emulator import quantize
    >>> ones = quantize(np.ones((1, 32)), tensor_scale=1)
    >>> matmul_fp16(ones, ones)
    array([[34.03125]], dtype=float32)
    """
    return _matmul_by_rows(a, b, _fp16_rows)


def matmul_fp16_split_k(a: NVFP4Tensor, b: NVFP4Tensor) -> Float32:
    """a bᵀ, (M, K) and (N, K) → (M, N) float32: the same instruction, K dealt out to eight chains.

    Piece p of 128 along K belongs to chain p mod 8. A chain starts at +0 and takes, of each 32 along K, the
    even k in one step and the odd k in the next; the eight sums are added in order, rounded to nearest. The
    fp16 numbers are e2m1 · e4m3 · 2^-14, subnormal where e2m1 · e4m3 is below 1; the sum is taken times 2^28.
    What `gpu` does for few rows. Epilogue, NaN, sign of scales and errors as in `matmul`.
    """
    return _matmul_by_rows(a, b, _fp16_split_k_rows)


def _matmul_by_rows(a: NVFP4Tensor, b: NVFP4Tensor, fill_rows: Callable) -> Float32:
    for name, q in (("a", a), ("b", b)):
        checks.is_a(name, q, NVFP4Tensor, "quantize(x) makes one.")
    checks.same_depth("a", a.shape[1], "b", b.shape[1])
    left, right = (_decoded(q.codes, q.block_scales) for q in (a, b))
    acc, y = np.empty((len(a.codes), len(b.codes))), np.empty((len(a.codes), len(b.codes)), f32)

    def task(start: int, stop: int) -> None:
        rows = slice(start, stop)
        fill_rows(left[0][rows], left[1][rows], *right, acc[rows])

    over_rows(task, len(y))
    _epilogue(acc, a.tensor_scale, b.tensor_scale, y)
    return y


def _decoded(codes: Codes, block_scales: Codes) -> tuple[Float64, Ints]:
    """e2m1 · e4m3 and its exponent, (rows, K) each. Least is 2^-10, a normal number of fp16."""
    values, exponents = np.empty(codes.shape), np.empty(codes.shape, np.int64)
    over_rows(
        lambda i, j: _decode_rows(codes[i:j], block_scales[i:j], values[i:j], exponents[i:j]), len(codes)
    )
    return values, exponents


@kernel
def _decode_rows(codes: Codes, block_scales: Codes, values: Float64, exponents: Ints) -> None:
    for row in range(len(codes)):
        for i in range(codes.shape[1]):
            scale = block_scales[row, i // BLOCK] & UNSIGNED
            factor = float_of(NAN) if scale == E4M3_NAN else value_e4m3(scale)
            value = value_e2m1(codes[row, i]) * factor  # 6 significant bits
            values[row, i], exponents[row, i] = value, fields(bits_of(value), FP32)[1]


@kernel
def _fp16_rows(a: Float64, exponents_a: Ints, b: Float64, exponents_b: Ints, acc: Float64) -> None:
    terms, exponents = np.empty(BLOCK), np.empty(BLOCK, np.int64)
    for m in range(len(a)):
        for n in range(len(b)):
            d = f32(0)
            for k in range(0, a.shape[1], BLOCK):
                _multiply(a[m], exponents_a[m], b[n], exponents_b[n], k, 1, terms, exponents)
                d = aligned_sum(terms, exponents, d, HOPPER)
            acc[m, n] = d


@kernel
def _fp16_split_k_rows(a: Float64, exponents_a: Ints, b: Float64, exponents_b: Ints, acc: Float64) -> None:
    of_a, of_b = np.maximum(exponents_a, 0), np.maximum(exponents_b, 0)  # subnormal: the least one
    terms, exponents = np.empty(BLOCK), np.empty(BLOCK, np.int64)
    for m in range(len(a)):
        for n in range(len(b)):
            total = f32(0)
            for chain in range(CHAINS):
                d = f32(0)
                for first in range(chain * PIECE, a.shape[1], CHAINS * PIECE):
                    for k in range(first, min(first + PIECE, a.shape[1]), 2 * BLOCK):
                        for odd in range(2):
                            _multiply(a[m], of_a[m], b[n], of_b[n], k + odd, 2, terms, exponents)
                            d = aligned_sum(terms, exponents, d, HOPPER)
                total = d if chain == 0 else f32(total + d)
            acc[m, n] = total


@helper
def _multiply(
    a: Float64,
    exponents_a: Ints,
    b: Float64,
    exponents_b: Ints,
    first: int,
    stride: int,
    terms: Float64,
    exponents: Ints,
) -> None:
    """The products of one step, every `stride`-th from `first` on, zero beyond K; and their exponents."""
    for i in range(BLOCK):
        k = first + i * stride
        terms[i], exponents[i] = a[k] * b[k] if k < len(a) else 0.0, HOPPER.zero_exponent
        if terms[i] != 0:
            exponents[i] = exponents_a[k] + exponents_b[k]
