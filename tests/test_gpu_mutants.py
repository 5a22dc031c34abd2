"""Planted bugs in the CUDA sources: each changes one place, still compiles, and is caught by the interpreter
or by a byte that differs. Two architectures: what only one of them has is changed for that one."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support import assert_same_tensor, cuda_compiler, neighbours
from test_emulator_gemm import cancelling_pair, lone_pair, tensor_with_scales

import arcquant_ref
import emulator
from arcquant_ref import NVFP4Tensor, layout, select_top
from arcquant_ref.formats import BLOCK, E2M1, E4M3
from gpu import launch, load
from gpu.device import Changed
from gpu.face import Face

cuda_compiler()
from emulator import ptx  # noqa: E402

SOURCES = dict(load._sources())


class Mutant(NamedTuple):
    """A change of one place; `error` matches what the interpreter says where a wrong byte is not enough."""

    name: str
    old: str
    new: str
    error: str = ""


UNORDERED, IN_FLIGHT = "no barrier lies in between|never written", "a cp.async still copies"
MUTANTS = {  # architecture, probe, file → changes
    ("120a", "exact", "ptx.cuh"): [
        Mutant("scale registers swapped", '"r"(sfa), "r"(sfb)', '"r"(sfb), "r"(sfa)'),
        Mutant(
            "A registers 1 and 2 swapped",
            '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa)',
            '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa)',
        ),
        Mutant(
            "B registers swapped",
            '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa)',
            '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b1), "r"(b0), "r"(sfa)',
        ),
    ],
    ("120a", "exact", "gemm_native.cu"): [
        Mutant("scales of rows g and g + 8 swapped", "g + 8 * (t & 1)", "g + 8 * (~t & 1)"),
        Mutant(
            "byte-id 1: a scale of another group",
            "return *reinterpret_cast<const u32 *>(at);",
            "return __byte_perm(*reinterpret_cast<const u32 *>(at), 0, 0x0321);",
        ),
        Mutant("scales of the rows 32 further", "row / 32 * 4;", "(row / 32 ^ 1) * 4;"),
        Mutant("scales of B's next 8 columns", "sfa[i], sfb[1]", "sfa[i], sfb[0]"),
        Mutant(
            "no barrier",
            "        __syncthreads();             // of all; and no one reads step s − 1 any more\n",
            "",
            UNORDERED,
        ),
        Mutant(
            "no wait for cp.async",
            "        cp_async_wait<STAGES - 2>(); // step s has arrived, of this thread's copies\n",
            "",
            IN_FLIGHT,
        ),
        Mutant(
            "waits for one step too few", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", IN_FLIGHT
        ),
        Mutant("a stage is refilled one step early", "int next = s + STAGES - 1;", "int next = s + STAGES;"),
        Mutant(
            "epilogue in two steps",
            "float scale = __fmul_rn(*a_tensor_scale, *b_tensor_scale);",
            "float scale = *a_tensor_scale;",
        ),
    ],
    ("120a", "exact", "tiles.cuh"): [
        Mutant(
            "one row too many is read",
            "bool inside = row < x.rows;",
            "bool inside = row <= x.rows;",
            "out of bounds|never written",
        ),
        Mutant(
            "half a chunk beyond K is read",
            "second = inside && k + BLOCK < x.k",
            "second = inside && k < x.k",
        ),
        Mutant("one row too many is written", "if (m >= rows ||", "if (m > rows ||", "out of bounds"),
        Mutant(
            "the last odd column is not written",
            "to[0] = y0;",
            "if (n + 1 < columns) to[0] = y0;",
            "never written",
        ),
    ],
    ("80", "exact", "ptx.cuh"): [
        Mutant(
            "fp16: A registers 1 and 2 swapped",
            'f16.f16.f32 "\n        "{%0, %1, %2, %3}, {%4, %5, %6, %7}',
            'f16.f16.f32 "\n        "{%0, %1, %2, %3}, {%4, %6, %5, %7}',
        ),
    ],
    ("80", "exact", "gemm_portable.cu"): [
        Mutant("added to nearest", "__fmaf_rz(sum[e]", "__fmaf_rn(sum[e]"),
        Mutant("a sum of more than 24 bits is thought exact", "TOO_LARGE = 0x40000000", "TOO_LARGE = 0"),
        Mutant(
            "a group that loses a bit is thought plain",
            "highest - lowest_ever <= FRACTION_BITS - GROUP_UNIT",
            "highest - lowest_ever <= FRACTION_BITS - GROUP_UNIT + 1",
        ),
        Mutant(
            "lowest exponent of this step only",
            "lowest_ever = min(lowest_ever, lowest);",
            "lowest_ever = lowest;",
        ),
        Mutant("a zero group keeps its exponent", "? ea + eb : ZERO_EXPONENT", "? ea + eb : ea + eb"),
        Mutant("a cancelled group loses its exponent", "(occupied >> g & 1) &&", "dots[g] != 0 &&"),
        Mutant(
            "cut off downwards", "return x < 0 ? -(long long)magnitude", "return x < 0 ? x >> min(-left, 63)"
        ),
        Mutant("one fraction bit less", "FRACTION_BITS = 35", "FRACTION_BITS = 34"),
        Mutant("rounded to nearest at the end", "__ll2float_rz(total)", "__ll2float_rn(total)"),
        Mutant("accumulators turn the wrong way", "tile % MT * 16", "tile / NT * 16"),
        Mutant(
            "the scale's sign counts",
            "u32 code = p.scales[i][h] & E4M3::magnitude;",
            "u32 code = p.scales[i][h] & 0xFF;",
        ),
        Mutant(
            "exact: no barrier after a step",
            "        __syncthreads();\n    }\n\n    float scale",
            "        \n    }\n\n    float scale",
            UNORDERED,
        ),
    ],
    ("80", "fast", "gemm_portable.cu"): [
        Mutant(
            "fast: no barrier after a step",
            "        __syncthreads();\n    }\n    store<",
            "        \n    }\n    store<",
            UNORDERED,
        ),
        Mutant(
            "fast: codes rescaled by a power of two",
            "f16x2_of_e4m3x2(p.scales[i][c / 2] & E4M3::magnitude)",
            "mul_f16x2(f16x2_of_e4m3x2(p.scales[i][c / 2] & E4M3::magnitude), 0x38003800)",
        ),
        Mutant("fast: the scale's sign counts", "p.scales[i][c / 2] & E4M3::magnitude", "p.scales[i][c / 2]"),
        Mutant("fast: scale of the other block", "p.scales[i][c / 2] &", "p.scales[i][1 - c / 2] &"),
        Mutant(
            "fast: groups out of order",
            "for (int group = 0; group < EXACT_GROUPS; group++) {\n            u32 fa[MT][4]",
            "for (int group = EXACT_GROUPS - 1; group >= 0; group--) {\n            u32 fa[MT][4]",
        ),
    ],
    ("80", "few", "gemm_small.cu"): [
        Mutant("small: sums added backwards", "from[w * M * LINE]", "from[(WARPS - w) * M * LINE]"),
        Mutant("small: no wait for cp.async", "cp_async_wait<AHEAD - 1>", "cp_async_wait<AHEAD>", IN_FLIGHT),
        Mutant(
            "small: lanes do not wait for each other",
            "            __syncwarp();               // of all\n",
            "",
            UNORDERED,
        ),
        Mutant(
            "small: a piece is copied over what lanes still read",
            "            __syncwarp(); // all have read it: another one may come here\n",
            "",
            UNORDERED,
        ),
        Mutant(
            "small: sums written over those of the tile before",
            "        __syncthreads(); // the sums of the tile before are read\n",
            "",
            UNORDERED,
        ),
        Mutant(
            "small: sums read before they are there",
            "        __syncthreads();\n        int lane = threadIdx.x % 32, row = row_of(tile, lane);\n",
            "        int lane = threadIdx.x % 32, row = row_of(tile, lane);\n",
            UNORDERED,
        ),
        Mutant("small: always the same stage", "read = read ? 0 : Piece<M>::bytes", "read = 0"),
        Mutant(
            "small: the first tile of B again",
            "piece = threadIdx.x / 32, aim();",
            "piece = threadIdx.x / 32;",
        ),
        Mutant(
            "small: the next tile is left out", "tile += gridDim.y, piece", "tile += 2 * gridDim.y, piece"
        ),
        Mutant("small: scales of the other block", "4 < 2 ? 0x4420 : 0x4431", "4 < 2 ? 0x4431 : 0x4420"),
        Mutant("small: scale of the other chunk", "mul_f16x2_by<1>(second", "mul_f16x2_by<0>(second"),
        Mutant("small: the scale's sign counts", "four & MAGNITUDES", "four"),
        Mutant("small: scales of another quarter", "[1] = word(scales + 4)", "[1] = word(scales + 8)"),
        Mutant("small: odd k with even k of A", "odd, of_a[i][c][2]", "odd, of_a[i][c][0]"),
        Mutant(
            "small: rows 8 further first",
            "{upper[c][0], lower[c][0], upper[c][1]",
            "{lower[c][0], upper[c][0], upper[c][1]",
        ),
        Mutant("small: rows of another quarter", "? k / 16 * (4 * i) : 0", "? k / 16 * (4 * (i ^ 1)) : 0"),
        Mutant("small: a block of rows twice", "tile % 4 * 8 + i % 8", "tile % 4 / 2 * 8 + i % 8"),
        Mutant("small: the first row is not read", "i >= OF_B && !inside ? 0", "i >= OF_B && inside ? 0"),
        Mutant("small: another bit is the sign", "codes << 1, codes << 4)", "codes << 1, codes << 5)"),
        Mutant(
            "small: signs of odd numbers as fields",
            "select_bits(fields, codes >> 3",
            "select_bits(~fields, codes >> 3",
        ),
    ],
    ("80", "few", "ptx.cuh"): [
        Mutant("small: bits of the other one", "%3, 0xE4;", "%3, 0xD8;"),
    ],
    ("80", "fast", "tiles.cuh"): [
        Mutant("fast: another bit is the sign", "(codes << 4 & signs)", "(codes << 5 & signs)"),
    ],
    ("90a", "hopper", "tiles.cuh"): [
        Mutant("hopper: half of A and half of B", "0x74007400", "0x70007000"),
    ],
    ("90a", "hopper", "gemm_hopper.cu"): [
        Mutant("hopper: groups of B backwards", "of_b + 2 * group", "of_b + 6 - 2 * group"),
        Mutant("hopper: chunks where no swizzle expects them", "(4 * q + c ^ row) & 7", "(4 * q + c) & 7"),
        Mutant(
            "hopper: scales of the other step", "(2 * r + half) * 4 + 2 * q", "(2 * r + 1 - half) * 4 + 2 * q"
        ),
        Mutant("hopper: the scale's sign counts", "(at) & 0x7F7F)", "(at))"),
        Mutant("hopper: rows 4 further instead of 8", "? k * 4 : 0", "? k * 2 : 0"),
        Mutant(
            "hopper: codes beyond K are read",
            "lane % 4 * 16 < k / 2",
            "lane % 4 * 16 <= k / 2",
            "out of bounds",
        ),
        Mutant("hopper: a piece is copied again", "piece - 1 + STAGES)", "piece - 2 + STAGES)"),
        Mutant("hopper: the stages never end", "read == STAGES - 1 ? 0 : read + 1", "read + 1"),
        Mutant("hopper: no fence before the products", "        wgmma_fence();\n", "", "wgmma.fence"),
        Mutant(
            "hopper: decoded numbers are not shown to wgmma",
            "        fence_for_wgmma();\n        wgmma_wait",
            "        wgmma_wait",
            "fence.proxy.async",
        ),
        Mutant("hopper: no wait for the products", "        wgmma_wait<0>();\n", "", "wgmma"),
        Mutant(
            "hopper: no barrier after a step",
            "        __syncthreads();\n    }\n    int g",
            "    }\n    int g",
            UNORDERED,
        ),
        Mutant(
            "hopper: no wait for a piece",
            "            cp_async_wait<STAGES - 1>();\n",
            "",
            IN_FLIGHT,
        ),
        Mutant(
            "hopper: lanes do not wait for each other",
            "            cp_async_wait<STAGES - 1>();\n            __syncwarp();\n",
            "            cp_async_wait<STAGES - 1>();\n",
            UNORDERED,
        ),
    ],
    ("80", "rounds", "augment.cu"): [
        Mutant("warps leave blocks out", "(2 * (warps - warp) - 1) * 32", "2 * (warps - warp) * 32"),
        Mutant("warps leave out the third round", "64 * warps - step", "64 * warps + 32 - step"),
        Mutant(
            "each thread block has the first blocks of a row",
            "(blockIdx.y * blockDim.x + threadIdx.x) / 32, warps",
            "threadIdx.x / 32, warps",
        ),
        Mutant(
            "the next channels, not those of the next block",
            "Gather(order, max(0, b - step))",
            "Gather(order, max(0, b - 32))",
        ),
    ],
    ("80", "few", "formats.cuh"): [
        Mutant("small: a NaN scale is a number", "| nan * 0x7FFF", "| nan * 0"),
        Mutant(
            "small: scales twice as large",
            "mul_f16x2(fields >> 1, 0x5C005C00)",
            "mul_f16x2(fields >> 1, 0x60006000)",
        ),
    ],
    ("80", "bytes", "formats.cuh"): [
        Mutant(
            "-0 loses its sign",
            "__funnelshift_l(__float_as_uint(signs[i]), sign, 4)",
            "__funnelshift_l((u32)(signs[i] < 0) << 31, sign, 4)",
        ),
        Mutant(
            "what is above 4.5 rounds to 6",
            "twos_bits - 4 - below_bits",
            "twos_bits - 5 - below_bits",
        ),
        Mutant("residual of the magnitude", "| signs & 0x80008000", "| signs & 0"),
        Mutant("ties away from zero", "(1u << (shift - 1)) - 1 + (a >> shift & 1)", "(1u << (shift - 1))"),
    ],
    ("120a", "bytes", "ptx.cuh"): [
        Mutant(
            "cvt operands swapped",
            "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;",
            "cvt.rn.satfinite.e2m1x2.f32 b1, %3, %4;",
        ),
    ],
    ("80", "bytes", "blocks.cuh"): [
        Mutant("no floor under the scale", "fmaxf(v, E4M3::least_positive)", "v"),
        Mutant(
            "a scale by the reciprocal alone",
            "quotient_of(sixth, tensor_scale.reciprocal)",
            "__fmul_rn(sixth, tensor_scale.reciprocal.high)",
        ),
        Mutant(
            "one division instead of two",
            "quotient_of(sixth, tensor_scale.reciprocal)",
            "__fdiv_rn(a, __fmul_rn(E2M1::largest, tensor_scale.value))",
        ),
        Mutant("a sixth is a product", "quotient_of(a, SIXTH)", "__fmul_rn(a, SIXTH.high)"),
        Mutant(
            "slowly: one division instead of two",
            "__fdiv_rn(__fdiv_rn(__uint_as_float(amax), E2M1::largest), tensor_scale)",
            "__fdiv_rn(__uint_as_float(amax), __fmul_rn(E2M1::largest, tensor_scale))",
        ),
        Mutant("a guessed reciprocal", "__fmaf_rn(guess, __fmaf_rn(-y, guess, 1), guess)", "guess"),
        Mutant("a reciprocal without its last bits", "__fmul_rn(e, 1.125f)", "0"),
        Mutant("a step too large for the short division", " && x < power_of_two(90)", ""),
        Mutant(
            "times the reciprocal",
            "return __fmaf_rn(x, y.high, __fmul_rn(x, y.low));",
            "return __fmul_rn(x, y.high);",
        ),
        Mutant(
            "NaN keeps its sign",
            "if (beyond && !(a <",
            "if (false && !(a <",
        ),
        Mutant(
            "the short division overflows nibbles", "fminf(fabsf(quotient[i]), E2M1::largest)", "quotient[i]"
        ),
        Mutant("a step too small for the short division", "x > power_of_two(-90)", "x > 0"),
        Mutant("slowly: the first code is the last", "for (int j = 1; j < BLOCK; j++) x[j - 1] = x[j];", ""),
        Mutant("swizzled rows 32 off", "row / 32 % 4 * 4", "(row / 32 + 1) % 4 * 4"),
    ],
    ("80", "bytes", "quantize.cu"): [
        Mutant(
            "nibbles swapped",
            "codes[first + 2 * i] | codes[first + 2 * i + 1] << 4",
            "codes[first + 2 * i + 1] | codes[first + 2 * i] << 4",
        ),
    ],
    ("80", "bytes", "augment.cu"): [
        Mutant(
            "scale padding is not written",
            "    fill_scales(row, rows, (u32)(k + s) / BLOCK, scales);\n",
            "",
            "never written",
        ),
        Mutant(
            "residual from the unrounded scale",
            "u32 scale = f16x2_of_e4m3x2(block.scale * 0x0101);",
            "float sixth = __fdiv_rn(__uint_as_float(amax_bits(x)), E2M1::largest);"
            "float scale = __fdiv_rn(sixth, tensor_scale.value);"
            "for (int i = 0; i < BLOCK; i++)"
            "    x[i] = __fmaf_rn(-__fmul_rn(E2M1::value(block.codes[i / 8] >> 4 * (i % 8) & 0xF), scale),"
            "                     tensor_scale.value, x[i]);"
            "continue;",
        ),
        Mutant(
            "residual rounded twice",
            "__fmaf_rn(-value, tensor_scale.value, x[i])",
            "__fadd_rn(x[i], __fmul_rn(-value, tensor_scale.value))",
        ),
        Mutant("residual rounded toward zero", "__fmaf_rn(-value, tensor", "__fmaf_rz(-value, tensor"),
        Mutant("residuals of the upper channels", "? pair : pair >> 16", "? pair >> 16 : pair"),
        Mutant("every channel twice", "add_half<true>(pairs[", "add_half<false>(pairs["),
        Mutant("not interleaved", "u32 to = max(b, 2 * b - (int)first)", "u32 to = b"),
        Mutant("weights get residuals", "augment<false>(x", "augment<true>(x"),
        Mutant(
            "no wait for the copies of a row",
            "    cp_async_wait<0>();\n",
            "",
            IN_FLIGHT,
        ),
        Mutant(
            "a row is read before it is there",
            "    cp_async_wait<0>();\n    __syncthreads();\n",
            "    cp_async_wait<0>();\n",
            UNORDERED,
        ),
        Mutant(
            "RMSNorm: neighbouring lanes first",
            "lanes[t] = __fadd_rn(lanes[t], lanes[t + stride]);",
            "lanes[t] = __fadd_rn(lanes[t], lanes[2 * stride - 1 - t]);",
        ),
        Mutant(
            "RMSNorm: no barrier between halves",
            "        __syncthreads();\n        if (t < stride)",
            "        if (t < stride)",
            UNORDERED,
        ),
        Mutant(
            "RMSNorm: weight first",
            "__fmul_rn(__fmul_rn(row[i], r), weight[i])",
            "__fmul_rn(row[i], __fmul_rn(r, weight[i]))",
        ),
    ],
}
ALL = [(*where, mutant) for where, mutants in MUTANTS.items() for mutant in mutants]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def exact(face: Face) -> None:
    """Ragged edges, K no multiple of 32 or 64, scales of all exponents, NaN, products where a bit decides."""
    rng = np.random.default_rng(0)
    for m, n, blocks, kind in (
        (75, 131, 23, "ordinary"), (33, 70, 8, "spread"), (9, 5, 21, "far spread"),
        (70, 2, 4, "any bits"), (128, 17, 33, "mostly zero"),
    ):  # fmt: skip
        a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
        assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))
    for pair in (cancelling_pair, lone_pair, lambda *_: plain_pair(rng)):
        a, b = pair(rng, 40, 24, 5)
        assert_same_bits(face.matmul(a, b), emulator.matmul(a, b))


def plain_pair(rng: np.random.Generator) -> list[NVFP4Tensor]:
    """Exponents that depend on the step alone: nothing is cut off but by the last rounding of a step."""
    exponents = np.repeat(rng.integers(2, 15, 12), 4)
    return [
        NVFP4Tensor(
            codes=rng.integers(0, 16, (rows, 64 * 12), np.uint8),
            block_scales=(exponents << 3 | rng.integers(0, 7, (rows, 48))).astype(np.uint8),
            tensor_scale=1,
        )
        for rows in (33, 65)
    ]


def fast(face: Face) -> None:
    rng = np.random.default_rng(1)
    for m, n, blocks, kind in ((75, 131, 23, "ordinary"), (33, 70, 8, "spread"), (20, 9, 9, "any bits")):
        a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
        assert_same_bits(face.matmul(a, b, exact=False), emulator.matmul_fp16(a, b))


def hopper(face: Face) -> None:
    rng = np.random.default_rng(1)
    for m, n, blocks, kind in ((75, 131, 30, "ordinary"), (33, 70, 10, "spread"), (20, 9, 2, "any bits")):
        a, b = (tensor_with_scales(kind, rng, (rows, blocks * BLOCK)) for rows in (m, n))
        packed = face.pack(a), face.pack(b)
        for plan in launch.products("90a", m, a.shape[1], exact=False):
            y = face.device.download(launch.multiply(face.device, plan, *packed))
            assert_same_bits(y, emulator.matmul_fp16(a, b))


def few(face: Face) -> None:
    rng = np.random.default_rng(2)
    cases = (
        (3, 131, 300, "spread"),
        (16, 20, 133, "spread"),
        (9, 40, 70, "rarely NaN"),
        (2, 33, 9, "any bits"),
    )
    for m, n, blocks, kind in cases:
        a, b = (
            replace(tensor_with_scales(kind, rng, (rows, blocks * BLOCK)), tensor_scale=1) for rows in (m, n)
        )
        packed, expected = (face.pack(a), face.pack(b)), emulator.matmul_fp16_split_k(a, b)
        for plan in launch.products("80", m, a.shape[1], exact=False):
            for at_once in (launch.AT_ONCE, 3):  # three thread blocks go on to the next tiles
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(launch, "AT_ONCE", at_once)
                    y = face.device.download(launch.multiply(face.device, plan, *packed))
                assert_same_bits(y, expected)


def stress(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """Ties of the scales that the blocks get at tensor_scale = 1, tiny blocks, zeros and ordinary numbers."""
    points = np.concatenate([E2M1.midpoints, E2M1.magnitudes])
    scale = rng.choice([1, 1.25, 1.625, 1.875], (rows, k // BLOCK)) * np.exp2(
        rng.integers(-13, 7, (rows, k // BLOCK))
    )
    x = rng.choice(points, (rows, k)) * np.repeat(scale, BLOCK, axis=1)
    x[:, ::BLOCK] = E2M1.max * scale
    ordinary = np.repeat(rng.random((rows, k // BLOCK)) < 0.5, BLOCK, axis=1)
    x = np.where(ordinary, rng.standard_normal((rows, k)) * np.exp2(rng.integers(-12, 8, k)), x)
    return (x * rng.choice([-1, 1], x.shape)).astype(np.float32)


def on_boundaries_of_scales(tensor_scale: np.float32) -> np.ndarray:
    """Blocks whose amax is next to where the block scale changes, as far as they are finite."""
    with np.errstate(over="ignore"):
        amax = (E4M3.midpoints[8:].astype(np.float64) * E2M1.max * tensor_scale).astype(np.float32)
    return np.repeat(neighbours(amax[np.isfinite(amax)]), BLOCK).reshape(-1, 2 * BLOCK)


def almost_values(tensor_scale: np.float32) -> np.ndarray:
    """Numbers that are values of codes but for a rounding: their residuals are tiny, of either sign, and zero
    if the product that is subtracted is rounded as well."""
    x = np.random.default_rng(0).standard_normal((2, 4 * BLOCK))
    return arcquant_ref.dequantize(arcquant_ref.quantize(x, tensor_scale))


def residuals_on_boundaries() -> tuple[np.ndarray, np.float32]:
    """Blocks whose largest residual is next to where its block scale changes, so that its rounding decides;
    and their tensor scale. The first element fixes the first scale, the second is a 4 and that residual."""
    tensor_scale = np.float32(np.random.default_rng(0).uniform(0.5, 1) * 2.0**-10)
    steps = E4M3.magnitudes[E4M3.magnitudes > 2**-5].astype(np.float64) * float(tensor_scale)
    amax = (E4M3.midpoints[E4M3.midpoints > 2**-5] * E2M1.max * float(tensor_scale)).astype(np.float32)
    near = (amax.view(np.int32)[:, None] + np.arange(-12, 13)).astype(np.int32).view(np.float32).ravel()
    step, residual = (pairs.ravel() for pairs in np.meshgrid(steps, near))
    fits = (residual > 0.3 * step) & (residual < 0.95 * step)  # of the 2 steps between 4 and 6
    x = np.zeros((np.count_nonzero(fits), BLOCK), np.float32)
    x[:, 0], x[:, 1] = E2M1.max * step[fits], 4 * step[fits] + residual[fits]
    return x, tensor_scale


def norm_on_ties() -> tuple[np.ndarray, np.ndarray]:
    """One row and its weight: normalized elements are exactly E2M1 midpoints, and another order of the
    additions would give another r."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1, 1024)).astype(np.float32)
        r, mirrored = (
            np.float32(1) / np.sqrt(sums(x, mirror) / np.float32(1024)) for mirror in (False, True)
        )
        if r != mirrored:
            break
    targets = rng.choice(E2M1.midpoints, x.shape)
    targets[:, ::BLOCK] = E2M1.max
    return x, (targets / (x * r))[0].astype(np.float32)


def sums(x: np.ndarray, mirror: bool) -> np.float32:
    lanes = np.zeros(256, np.float32)
    for part in (x * x).reshape(-1, 256):
        lanes += part
    while len(lanes) > 1:
        low, high = np.split(lanes, 2)
        lanes = low + (high[::-1] if mirror else high)
    return lanes[0]


def bytes_(face: Face) -> None:
    rng = np.random.default_rng(3)
    not_finite = np.float32([[1, -2, np.inf, -np.inf, np.nan, -np.nan] + [0] * 10])
    held, scale = (
        face.device.upload(not_finite, "float32"),
        face.device.upload(np.ones(1, np.float32), "float32"),
    )
    codes, _ = launch.unpack(face.device, launch.quantize(face.device, held, scale))
    assert face.device.download(codes)[0, 4:6].tolist() == [7, 7]  # as hardware, whatever the sign
    x, selection = stress(rng, 40, 336), select_top(rng.random(336).astype(np.float32), 160)
    weight, device, small = rng.standard_normal(336).astype(np.float32), face.device, np.float32(0.0007)
    row, on_ties = norm_on_ties()
    edges = residuals_on_boundaries()
    both = (
        package.augment_activations(edges[0], select_top(np.ones(BLOCK), BLOCK), edges[1])
        for package in (emulator, arcquant_ref)
    )
    assert_same_tensor(*both)
    hard = [np.float32(significand * 2.0**-23) for significand in (16777214, 16777215)]  # to divide by
    ties = [np.repeat(neighbours(E2M1.midpoints * step)[:, None], BLOCK, axis=1) for step in hard]
    for blocks, step in zip(ties, hard):
        blocks[:, 0] = 6 * step
    ends = [(on_boundaries_of_scales(np.float32(s)), s) for s in (0.0007 * 2.0**-85, 1.3 * 2.0**127)]
    for name, *arguments in [
        *(("quantize", *end) for end in ends),
        ("quantize", x, 1.0),
        *(("quantize", *one) for one in zip(ties, hard)),
        ("quantize", on_boundaries_of_scales(small), small),
        ("quantize", np.where(x == 0, np.float32(-0.0), x) * np.float32(2.0**-115), None),
        ("quantize", x * np.float32(2.0**-130), 2.0**-126),
        ("quantize", np.where(x == 0, np.float32(-0.0), x) * np.float32(1e30), 1.0),
        ("quantize", np.where(x < 0, np.float32(-3e38), x), 2.0**-99),
        ("augment_activations", x, selection, 1.0),
        ("augment_activations", x, selection, small),
        ("augment_activations", almost_values(small), select_top(np.ones(4 * BLOCK), 4 * BLOCK), small),
        ("augment_activations", edges[0], select_top(np.ones(BLOCK), BLOCK), edges[1]),
        ("augment_weights", x, selection),
        ("rmsnorm_augment_activations", x, weight, 1e-5, selection, small),
        ("rmsnorm_augment_activations", row, on_ties, 0.0, select_top(np.ones(1024), 0), 1.0),
    ]:
        expected: NVFP4Tensor = getattr(arcquant_ref, name)(*arguments)
        assert_same_tensor(getattr(face, name)(*arguments), expected)
    order = device.upload(selection.order.astype(np.uint16), "uint16")
    packed = launch.augment_weights(device, device.upload(x, "float32"), order, selection.num_residual)
    expected = arcquant_ref.augment_weights(x, selection)
    for q in (packed, face.pack(expected)):
        np.testing.assert_array_equal(device.download(q.codes), layout.pack(expected.codes))
        np.testing.assert_array_equal(device.download(q.scales), layout.swizzle_128x4(expected.block_scales))
    np.testing.assert_array_equal(face.encode_e4m3(E4M3.midpoints), emulator.encode_e4m3(E4M3.midpoints))


def rounds(face: Face) -> None:
    """Rows whose blocks warps take in several rounds, and rows that several thread blocks share."""
    rng = np.random.default_rng(5)
    for rows, k in ((128, 8208), (3, 4112)):
        x, selection = stress(rng, rows, k), select_top(rng.random(k).astype(np.float32), 48)
        expected = arcquant_ref.augment_activations(x, selection, 1.0)
        assert_same_tensor(face.augment_activations(x, selection, 1.0), expected)


PROBES: dict[str, Callable[[Face], None]] = {
    "exact": exact,
    "fast": fast,
    "hopper": hopper,
    "few": few,
    "bytes": bytes_,
    "rounds": rounds,
}


def test_names_are_distinct():
    assert len({mutant.name for *_, mutant in ALL}) == len(ALL) >= 18


@pytest.mark.parametrize(
    ("probe", "arch"),
    [
        (probe, arch)
        for probe in PROBES
        for arch in ("80", "90a", "120a")
        if probe != "hopper" or arch == "90a"
    ],
)
def test_unchanged_sources_pass(probe, arch, folder):
    PROBES[probe](Face(Changed(arch, SOURCES, folder)))


@pytest.mark.skipif(not os.environ.get("CI"), reason="in CI only: each mutant is compiled and run")
@pytest.mark.parametrize(("arch", "probe", "file", "mutant"), ALL, ids=[mutant.name for *_, mutant in ALL])
def test_the_mutant_is_caught(arch, probe, file, mutant, folder):
    assert SOURCES[file].count(mutant.old) == 1, "the line to change has moved: update the list"
    changed = SOURCES | {file: SOURCES[file].replace(mutant.old, mutant.new)}
    face = Face(Changed(arch, changed, folder))
    with pytest.raises((ptx.PtxError, ValueError, AssertionError, pytest.fail.Exception)) as caught:
        PROBES[probe](face)
    if mutant.error:
        assert isinstance(caught.value, ptx.PtxError | ValueError)  # a kernel, or a download of nothing
        assert caught.match(mutant.error)
