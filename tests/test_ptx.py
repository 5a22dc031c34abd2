"""The PTX interpreter: CUDA as NVRTC compiles it, warps, tensor cores, memory, and what it refuses."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import ARCHS, THREADS, compiled, module_of, one, output, outputs, ptx_of
from test_tensor_core import HALVES, KINDS, half_tile, nvfp4_tile

import emulator
from emulator import ptx
from emulator.ptx import Memory, Module, PtxError, Unsupported

every_arch = pytest.mark.parametrize("arch", ARCHS)
seeds = st.integers(0, 2**32 - 1)


# CUDA, as NVRTC compiles it


@every_arch
def test_branches_loops_and_calls(arch):
    """Every thread loops another number of times, and parts from the others inside."""
    source = """
    __device__ int collatz(unsigned n) {
        int steps = 0;
        for (; n != 1; steps++) n = n % 2 ? 3 * n + 1 : n / 2;
        return steps;
    }
    extern "C" __global__ void k(const unsigned *x, int n, int *y) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i >= n) return;
        int s = collatz(x[i]);
        if (s > 20) { y[i] = s; return; }
        switch (s % 4) { case 0: y[i] = -s; break; case 1: y[i] = s * s; break; default: y[i] = 1000 + s; }
    }"""
    x = np.arange(1, 301, dtype=np.uint32)

    def expected(n):
        s = 0
        while n != 1:
            n, s = (3 * n + 1 if n % 2 else n // 2), s + 1
        return s if s > 20 else {0: -s, 1: s * s}.get(s % 4, 1000 + s)

    y = output(compiled(source, arch), "k", [x, np.int32(300)], np.int32, 300, grid=5)
    assert y.tolist() == [expected(int(n)) for n in x]


@every_arch
def test_float_arithmetic_of_cuda(arch):
    source = """
    extern "C" __global__ void k(const float *a, const float *b, float *y) {
        int i = threadIdx.x;
        float s = a[i] + b[i], p = a[i] * b[i];
        y[i] = s / (p + 3.0f) + sqrtf(fabsf(a[i]));
        y[i + 64] = fmaxf(a[i], fminf(b[i], 0.25f)) + __fmaf_rn(a[i], b[i], s);
        y[i + 128] = (float)(int)(a[i] * 100.0f) + 1.0f;
        y[i + 192] = i & 1 ? __uint_as_float(__float_as_uint(a[i]) ^ 0x80000000) : b[i];
    }"""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    y = output(compiled(source, arch), "k", [a, b], np.float32, (4, 64))
    f = np.float32
    np.testing.assert_array_equal(y[0], (a + b) / (a * b + f(3)) + np.sqrt(np.abs(a)))
    fma = (a.astype(np.float64) * b + (a + b)).astype(f)  # 24 + 24 bits, and the sums here are near
    np.testing.assert_array_equal(y[1], np.maximum(a, np.minimum(b, f(0.25))) + fma)
    np.testing.assert_array_equal(y[2], (a * f(100)).astype(np.int32).astype(f) + f(1))
    np.testing.assert_array_equal(y[3], np.where(np.arange(64) % 2, -a, b))


@every_arch
def test_vectors_and_bytes(arch):
    source = """
    extern "C" __global__ void k(const uchar4 *x, float f, unsigned long long big, int which, float4 *y,
                                 unsigned char *bytes) {
        int i = threadIdx.x;
        unsigned word = *(const unsigned *)(x + i);
        int shifted = (int)(big >> (i & 31));
        y[i] = make_float4(f, __int2float_rn((int)(word << 8) >> 8), __int2float_rn(which),
                           __int2float_rn(shifted));
        bytes[i] = ((const unsigned char *)x)[4 * i + 3] + 1;
    }"""
    x = np.random.default_rng(0).integers(0, 256, (64, 4), np.uint8)
    arguments = [x, np.float32(1.5), np.uint64(2**40 + 12345), np.int32(-5)]
    y, after = outputs(compiled(source, arch), "k", arguments, [(np.float32, (64, 4)), (np.uint8, 64)])
    word, i = x.view(np.int32)[:, 0] << 8 >> 8, np.arange(64)
    shifted = ((2**40 + 12345) >> (i & 31)).astype(np.int32)
    expected = np.stack([np.full(64, 1.5), word, np.full(64, -5), shifted], axis=1)
    np.testing.assert_array_equal(y, expected.astype(np.float32))
    np.testing.assert_array_equal(after, x[:, 3] + np.uint8(1))


TRANSPOSE = """
extern "C" __global__ void k(const float *x, float *y) {
    extern __shared__ float tile[];
    __shared__ float twice[64];
    int i = threadIdx.x, b = blockIdx.x * 64;
    tile[i] = x[b + i];
    twice[i] = 2.0f * x[b + i];
    __syncthreads();
    y[b + i] = tile[i % 8 * 8 + i / 8] + twice[63 - i];
}"""


@every_arch
@pytest.mark.parametrize("at_once", [1, 128, 4096])
def test_shared_memory_and_any_number_of_blocks_at_once(arch, at_once, monkeypatch):
    monkeypatch.setattr(ptx, "THREADS_AT_ONCE", at_once)
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    y = output(compiled(TRANSPOSE, arch), "k", [x], np.float32, (9, 64), grid=9, shared_bytes=256)
    np.testing.assert_array_equal(y, x.reshape(9, 8, 8).swapaxes(1, 2).reshape(9, 64) + 2 * x[:, ::-1])


@every_arch
def test_a_block_that_is_no_multiple_of_a_warp(arch):
    source = """
    extern "C" __global__ void k(int *y) {
        __shared__ int s[45];
        int i = threadIdx.x + threadIdx.y * 5 + threadIdx.z * 15;
        s[i] = i + 100 * blockIdx.y;
        __syncthreads();
        int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        y[i + 45 * block] = s[44 - i] + 1000 * blockIdx.z;
    }"""
    memory, module = Memory(), compiled(source, arch)
    y = memory.empty(12 * 45 * 4)
    module.launch("k", (2, 3, 2), (5, 3, 3), [y], memory)
    z, row, _, i = np.ogrid[:2, :3, :2, :45]
    np.testing.assert_array_equal(
        y.download(np.int32, (2, 3, 2, 45)), np.broadcast_to(44 - i + 100 * row + 1000 * z, (2, 3, 2, 45))
    )


@every_arch
def test_the_atomic_maximum(arch):
    source = """
    extern "C" __global__ void k(const unsigned *x, unsigned *y, unsigned *z) {
        z[threadIdx.x] = atomicMax(y, x[threadIdx.x]);
    }"""
    x = np.random.default_rng(0).integers(1, 99, 64).astype(np.uint32)
    memory, module = Memory(), compiled(source, arch)
    y, z = memory.upload(np.uint32([5])), memory.empty(256)
    module.launch("k", (1, 1, 1), (64, 1, 1), [memory.upload(x), y, z], memory)
    assert y.download(np.uint32, 1) == x.max()
    np.testing.assert_array_equal(z.download(np.uint32, 64), np.maximum.accumulate([5, *x[:-1]]))


def test_what_was_executed_is_counted():
    """Threads, guards included; over all launches."""
    module = compiled("""extern "C" __global__ void k(int *x) { if (threadIdx.x < 5) x[threadIdx.x] = 1; }""")
    for grid in (1, 3):
        outputs(module, "k", [], [(np.int32, 5)], grid=grid)
    executed = module.executed["k"]
    stores = sum(count for opcode, count in executed.items() if opcode.startswith("st."))
    assert (stores, executed["ret"]) == (4 * 5, 4 * THREADS)


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("emulator.ptx_machine.MOST_STEPS", 1000)
    source = 'extern "C" __global__ void k(volatile int *x, int *y) { while (x[0] == 0) {} y[0] = 1; }'
    with pytest.raises(PtxError, match="still runs after 1000 instructions"):
        output(compiled(source), "k", [np.zeros(64, np.int32)], np.int32, 1)


# Warps


@every_arch
def test_warp_functions_of_cuda(arch):
    source = """
    extern "C" __global__ void k(const unsigned *x, unsigned *y) {
        unsigned i = threadIdx.x, v = x[i];
        y[i] = __reduce_max_sync(~0u, v);
        y[i + 64] = __reduce_or_sync(~0u, v);
        y[i + 128] = __any_sync(~0u, v == 3);
    }"""
    x = np.random.default_rng(0).integers(0, 1000, (2, 32)).astype(np.uint32)
    y = output(compiled(source, arch), "k", [x], np.uint32, (3, 2, 32))
    for w in range(2):
        assert set(y[0, w]) == {x[w].max()}
        assert set(y[1, w]) == {np.bitwise_or.reduce(x[w])}
        assert set(y[2, w]) == {(x[w] == 3).any()}


# ldmatrix and the tensor cores, by the formulas of the PTX ISA


def ldmatrix_kernel(count):
    registers = ", ".join("abce"[i] + "0" for i in range(count))
    return module_of(
        f"""
        .version 9.0 .target sm_80 .address_size 64
        .visible .entry k(.param .u64 x, .param .u64 rows, .param .u64 d)
        {{
        .shared .align 16 .b8 tile[1024];
        .reg .b32 t, s, a0, b0, c0, e0, v0, v1, v2, v3; .reg .b64 p, q;
        mov.u32 t, %tid.x; mov.u32 s, tile;
        ld.param.u64 p, [x]; mad.wide.u32 p, t, 32, p; mad.lo.u32 v0, t, 32, s;
        .reg .b32 w; mov.u32 w, v0;
        ld.global.v4.b32 {{v0, v1, v2, v3}}, [p]; st.shared.v4.b32 [w], {{v0, v1, v2, v3}};
        ld.global.v4.b32 {{v0, v1, v2, v3}}, [p+16]; st.shared.v4.b32 [w+16], {{v0, v1, v2, v3}};
        bar.sync 0;
        ld.param.u64 q, [rows]; mad.wide.u32 q, t, 4, q; ld.global.b32 v0, [q]; mad.lo.u32 v0, v0, 16, s;
        mov.u32 a0, 0; mov.u32 b0, 0; mov.u32 c0, 0; mov.u32 e0, 0;
        ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [v0];
        ld.param.u64 p, [d]; mad.wide.u32 p, t, 16, p; st.global.v4.b32 [p], {{a0, b0, c0, e0}};
        ret;
        }}""".replace(
            ".version 9.0 .target sm_80 .address_size 64", ".version 9.0\n.target sm_80\n.address_size 64\n"
        )
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count):
    rng = np.random.default_rng(count)
    x, rows = rng.integers(0, 2**16, (64, 8)).astype(np.uint16), rng.permutation(64)[:32].astype(np.uint32)
    if count < 4:
        rows[8 * count :] = 2**20  # addresses that are not used
    d = output(ldmatrix_kernel(count), "k", [x, rows], np.uint32, (32, 4), block=32)
    for lane in range(32):
        for j in range(count):
            matrix = x[rows[8 * j : 8 * j + 8]]
            low, high = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert d[lane, j] == (int(high) << 16 | int(low)), (lane, j)


NVFP4 = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"


def mma_kernel(opcode, scales=""):
    """One warp: a (32, 4), b (32, 2), c (32, 4), s (32, 2) registers of its lanes; `scales` are operands."""
    return module_of(
        f"""
.version 9.0
.target sm_120a
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 s, .param .u64 d)
{{
.reg .b32 t, a<4>, b<2>, c<4>, d<4>, s<2>; .reg .b64 p;
mov.u32 t, %tid.x;
ld.param.u64 p, [a]; mad.wide.u32 p, t, 16, p; ld.global.v4.b32 {{a0, a1, a2, a3}}, [p];
ld.param.u64 p, [b]; mad.wide.u32 p, t, 8, p; ld.global.v2.b32 {{b0, b1}}, [p];
ld.param.u64 p, [c]; mad.wide.u32 p, t, 16, p; ld.global.v4.b32 {{c0, c1, c2, c3}}, [p];
ld.param.u64 p, [s]; mad.wide.u32 p, t, 8, p; ld.global.v2.b32 {{s0, s1}}, [p];
{opcode} {{d0, d1, d2, d3}}, {{a0, a1, a2, a3}}, {{b0, b1}}, {{c0, c1, c2, c3}}{scales};
ld.param.u64 p, [d]; mad.wide.u32 p, t, 16, p; st.global.v4.b32 [p], {{d0, d1, d2, d3}};
ret;
}}
"""
    )


def packed(values, bits):
    return sum(int(v) << bits * i for i, v in enumerate(values))


def fragments(a, b, c):
    """Registers by lane: eight codes along K, from 8t or 8t + 32; or two halves, from 2t or 2t + 8."""
    per, depth = (8, 64) if a.dtype == np.uint8 else (2, 16)
    of_a, of_b, of_c = (
        np.zeros((32, 4), np.uint32),
        np.zeros((32, 2), np.uint32),
        np.zeros((32, 4), np.float32),
    )
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r in range(4):
            k = per * t + depth // 2 * (r >> 1)
            of_a[lane, r] = packed(a[g + 8 * (r & 1), k : k + per], 32 // per)
            of_c[lane, r] = c[g + 8 * (r >> 1), 2 * t + (r & 1)]
        for r in range(2):
            k = per * t + depth // 2 * r
            of_b[lane, r] = packed(b[g, k : k + per], 32 // per)
    return of_a, of_b, of_c


def matrix(d):
    """(32, 4) registers of D → (16, 8)."""
    result = np.empty((16, 8), np.float32)
    for lane in range(32):
        for e in range(4):
            result[lane // 4 + 8 * (e >> 1), 2 * (lane % 4) + (e & 1)] = d[lane, e]
    return result


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_half_mma(name, kind, seed):
    a, b, c = half_tile(name, kind, np.random.default_rng(seed))
    of = "f16.f16" if name == "fp16" else "bf16.bf16"
    module = mma_kernel(f"mma.sync.aligned.m16n8k16.row.col.f32.{of}.f32")
    d = output(
        module, "k", [*fragments(a, b, c), np.zeros((32, 2), np.uint32)], np.float32, (32, 4), block=32
    )
    dtype = HALVES[name][0]
    expected = emulator.mma_m16n8k16(a.view(dtype), b.view(dtype), c)
    np.testing.assert_array_equal(matrix(d).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_nvfp4_mma_takes_scales_of_the_first_lanes(kind, seed):
    """All other lanes hold other scales."""
    rng = np.random.default_rng(seed)
    a, b, sfa, sfb, c = nvfp4_tile(kind, rng)
    scales = rng.integers(0, 2**32, (32, 2), np.uint32)
    for g in range(8):
        scales[4 * g, 0], scales[4 * g + 1, 0] = packed(sfa[g], 8), packed(sfa[g + 8], 8)
        scales[4 * g, 1] = packed(sfb[g], 8)
    module = mma_kernel(NVFP4, ", {s0}, {0, 0}, {s1}, {0, 0}")
    d = output(module, "k", [*fragments(a, b, c), scales], np.float32, (32, 4), block=32)
    expected = emulator.mma_m16n8k64(a, b, sfa, sfb, c)
    np.testing.assert_array_equal(matrix(d).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    "scales", ["", ", s0, {1, 0}, s1, {0, 0}", ", s0, {0, 1}, s1, {0, 0}", ", s0, {0, 0}, s1, {0, 1}"]
)
def test_selectors_of_scales_that_no_kernel_has(scales):
    arguments = [np.zeros((32, n), np.uint32) for n in (4, 2, 4, 2)]
    with pytest.raises(Unsupported, match="is an opcode, or has a modifier or operand, not known here"):
        output(mma_kernel(NVFP4, scales), "k", arguments, np.float32, (32, 4), block=32)


# What it does not know, it names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add.ftz.f32 d, a, b;", "add.ftz.f32 is an opcode, or has a modifier or operand, not known here"),
        ("mul.rn.ftz.f32 d, a, b;", "mul.rn.ftz.f32 is an opcode"),
        ("add.sat.f32 d, a, b;", "add.sat.f32 is an opcode"),
        ("ex2.approx.f32 d, a;", "ex2.approx.f32 is an opcode"),
        ("div.full.f32 d, a, b;", "div.full.f32 is an opcode"),
        ("frobnicate.b32 d, a;", "frobnicate.b32 is an opcode"),
        ("cvt.rn.relu.f16.f32 d, a;", "cvt.rn.relu.f16.f32 is an opcode"),
        (
            "mov.u32 d, %clock;",
            "'%clock' is not a register, a label or a number",
        ),
        ("mov.u32 nothing, a;", "'nothing' is not a register, a label or a number"),
        ("add.u32 d, a;", "add.u32 is an opcode, or has a modifier or operand, not known here"),
        ("bra nowhere;", "'nowhere' is not a register, a label or a number"),
        ("cvt.u64.u32 y, a; add.u32 d, y, y; add.u64 y, a, a;", "a is .b32; .u64 does not fit"),
        ("bar.warp.sync 255;", "bar.warp.sync is an opcode, or has a modifier or operand, not known here"),
        ("redux.sync.max.u32 d, a, b;", "asks for a part of its warp, and that is not modelled"),
        ("shfl.sync.idx.b32 d, a, 0, 31, -1;", "shfl.sync.idx.b32 is an opcode"),
        ("ld.b32 d, [y];", "ld.b32 is an opcode"),
        ("bar.sync 1, 64;", "bar.sync is an opcode, or has a modifier or operand"),
        (
            "cp.async.ca.shared.global [x], [y], 2;",
            "is an opcode, or has a modifier or operand",
        ),
        ("cp.async.cg.shared.global [x], [y], 8;", "is an opcode, or has a modifier or operand"),
        ("ld.param.u32 d, [p_d];", "[p_d] is not a parameter of type .u32"),
        ("mov.u64 y, p_d;", "'p_d' is not a register, a label or a number"),
        ("atom.global.add.f32 d, [y], a;", "atom.global.add.f32 is an opcode"),
    ],
)
def test_unknown_instructions(text, message):
    x = np.zeros(32, np.uint32)
    with pytest.raises(Unsupported, match=r"k, PTX line \d+") as error:
        one(text, x, x, dtype=np.uint32)
    assert message in str(error.value)


def test_text_that_is_not_understood():
    for text in (".func f() { ret; }", ".visible .entry k(.param .align 8 .b8 p[16]) { ret; }", "nonsense"):
        with pytest.raises(Unsupported):
            Module(f".version 9.0\n{text}\n")


def test_launches_that_cuda_refuses():
    module, memory = module_of(ptx_of("mov.b32 d, a;", [32], 32)), Memory()
    x = memory.upload(np.zeros(64, np.float32))
    for kernel, grid, block, arguments, message in [
        ("other", 1, 32, [x, x], "kernel='other' is not here; the module has ['k']"),
        ("k", 0, 32, [x, x], "none may be below 1"),
        ("k", 1, 2048, [x, x], "a block of k (1024, 1024, 64) and 1024 threads in all"),
        ("k", 1, 32, [x], "args has 1 entries; k takes 2"),
        ("k", 1, 32, [x, np.int32(1)], "args[1]=np.int32(1) does not fit .u64 of k"),
        ("k", 1, 32, [x, 1], "args[1]=1 does not fit .u64 of k"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            module.launch(kernel, (grid, 1, 1), (block, 1, 1), arguments, memory)
    source = 'extern "C" __global__ void __launch_bounds__(64) k(int *y) { y[0] = 1; }'
    with pytest.raises(ValueError, match="and 64 threads in all"):
        output(compiled(source), "k", [], np.int32, 1, block=96)


# Memory


def test_memory():
    memory = Memory()
    x = np.arange(100, dtype=np.int16).reshape(4, 25)
    held, empty = memory.upload(x), memory.empty(10)
    assert held.address % 256 == empty.address % 256 == 0
    assert abs(held.address - empty.address) >= 512
    np.testing.assert_array_equal(held.download(np.int16, (4, 25)), x)
    for act, message in [
        (lambda: empty.download(np.uint8, 10), "10 of 10 bytes were never written, the first is byte 0"),
        (lambda: held.download(np.int16, 101), "takes 202 bytes and the buffer has 200"),
        (lambda: memory.upload(x.T), "upload np.ascontiguousarray"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
    sizes = set()
    for _ in range(1000):
        memory.empty(1000)  # nobody keeps it
        sizes.add(memory.space.size)
    assert len(sizes) == 1
    big = memory.upload(np.ones(10**6, np.uint8))
    assert big.download(np.uint8, 10**6).all()
    np.testing.assert_array_equal(held.download(np.int16, (4, 25)), x)
