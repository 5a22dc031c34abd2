"""What the PTX interpreter stops a kernel for: for each finding one kernel with that bug, and without it."""

import numpy as np
import pytest
from ptx_kernels import ARCHS, compiled, module_of, output

from emulator.ptx import BadAccess, Divergence, PtxError, Race, Uninitialized

every_arch = pytest.mark.parametrize("arch", ARCHS)

# BUG(…) stands in one of the two kernels and FIX(…) in the other. 64 threads, i = threadIdx.x; x[i] = i.
FINDINGS = {
    # global memory
    "read beyond the end": (
        "BUG(y[i] = x[i + 1];) FIX(y[i] = i < 63 ? x[i + 1] : 0;)",
        BadAccess,
        r"Thread \(63, 0, 0\) of block \(0, 0, 0\), lane 31 of its warp, reads 4 bytes of global memory at "
        r"0x7f\w+, but byte 0 of it is out of bounds",
    ),
    "write before the beginning": (
        "y[i BUG(- 1)] = 0;",
        BadAccess,
        r"Thread \(0, 0, 0\) .* writes 4 bytes of global memory .* out of bounds",
    ),
    "vector over the end": (
        "int4 v = *(const int4 *)(x + i / 4 * 4 BUG(+ 4)); y[i] = v.x + v.y + v.z + v.w;",
        BadAccess,
        r"Thread \(60, 0, 0\) .* reads 16 bytes of global memory .* byte 0 of it is out of bounds",
    ),
    "misaligned": (
        "y[i] = *(const long long *)(x + i FIX(/ 2 * 2));",
        BadAccess,
        r"Thread \(1, 0, 0\) .* the address is not a multiple of 8",
    ),
    "global memory never written": (
        "FIX(y[i] = i;) BUG(if (i != 5) y[i] = i;) if (i == 7) y[6] = y[5 FIX(+ 2)];",
        Uninitialized,
        r"Thread \(7, 0, 0\) .* reads 4 bytes of global memory at .* byte 0 of it was never written",
    ),
    "blocks that write different values": (
        "y[i] = BUG(blockIdx.x) FIX(gridDim.x);",
        Race,
        r"of block \(1, 0, 0\).* writes 4 bytes of global memory .* block \(0, 0, 0\) wrote byte 0 of it",
    ),
    # shared memory
    "beyond a shared array": (
        "__shared__ volatile int s[64 FIX(+ 1)], t[64]; s[i + 1] = t[i] = i; y[i] = s[i + 1];",
        BadAccess,
        r"Thread \(63, 0, 0\) .* shared memory at 0x100, but byte 0 of it is out of bounds",
    ),
    "shared memory never written": (
        "__shared__ int s[64]; BUG(if (i)) s[i] = i; __syncthreads(); y[i] = s[63 - i];",
        Uninitialized,
        r"Thread \(63, 0, 0\) .* reads 4 bytes of shared memory at 0x0, but byte 0 of it was never written",
    ),
    "read before the barrier": (
        "__shared__ int s[64]; s[i] = i; FIX(__syncthreads();) y[i] = s[63 - i];",
        Race,
        r"Thread \(0, 0, 0\) .* thread \(63, 0, 0\) of its block wrote byte 0 of it, and no barrier lies ",
    ),
    "write without the second barrier": (
        "__shared__ int s[64];"
        "for (int j = 0; j < 3; j++) { s[i] = i; __syncthreads(); y[i] = s[63 - i]; FIX(__syncthreads();) }",
        Race,
        r"Thread \(0, 0, 0\) .* writes 4 bytes .* thread \(63, 0, 0\) of its block read byte 0 of it",
    ),
    "two buffers, and the barrier gone": (
        "__shared__ int s[2][64];"
        "for (int j = 0; j < 5; j++) { s[j & 1][i] = i; FIX(__syncthreads();) y[i] = s[j & 1][63 - i]; }",
        Race,
        "wrote byte 0 of it",
    ),
    "two values in one place": (
        "__shared__ int s[32]; s[i % 32] = i FIX(% 32); __syncthreads(); y[i] = s[i % 32];",
        Race,
        r"Thread \(32, 0, 0\) .* writes 4 bytes .* thread \(0, 0, 0\) of its block wrote byte 0 of it",
    ),
    "two values by one instruction": (
        "__shared__ int s[2]; s[i / 32] = i FIX(/ 32); __syncthreads(); y[i] = s[i / 32];",
        Race,
        r"Thread \(1, 0, 0\) .* thread \(0, 0, 0\) of its block wrote byte 0 of it",
    ),
    "bytes of one word are apart, and one byte is not": (
        "__shared__ unsigned char s[64]; s[i BUG(/ 2)] = i; __syncthreads(); y[i] = s[i / 2];",
        Race,
        r"Thread \(1, 0, 0\) .* writes 1 bytes of shared memory .* thread \(0, 0, 0\) of its block wrote",
    ),
    "a warp that is taken to be in step": (
        "__shared__ volatile int s[64]; s[i] = i; FIX(__syncwarp();) y[i] = s[i ^ 1];",
        Race,
        r"thread \(1, 0, 0\) of its block wrote byte 0 of it",
    ),
    "a barrier of the warp for two warps": (
        "__shared__ volatile int s[64]; s[i] = i; BUG(__syncwarp();) FIX(__syncthreads();) y[i] = s[i ^ 32];",
        Race,
        r"thread \(32, 0, 0\) of its block wrote byte 0 of it",
    ),
    "several readers, of whom some wait": (
        "__shared__ volatile int s[64]; s[i] = 0; __syncthreads(); y[i] = s[0]; __syncwarp();"
        "if (i == 0) { FIX(y[i] = s[0];) BUG(s[0] = 1;) }",
        Race,
        "writes 4 bytes .* read byte 0 of it",
    ),
    # cp.async
    "no wait for a copy": (
        "__shared__ int s[64]; copy(s + i, x + i); commit(); FIX(wait<0>();) y[i] = s[i];",
        Uninitialized,
        "a cp.async still copies byte 0 of it: no wait came before",
    ),
    "no commit before the wait": (
        "__shared__ int s[64]; copy(s + i, x + i); FIX(commit();) wait<0>(); y[i] = s[i];",
        Uninitialized,
        "a cp.async still copies byte 0 of it",
    ),
    "one group too many in flight": (
        "__shared__ int s[128]; copy(s + i, x + i); commit(); copy(s + 64 + i, x + i); commit();"
        "wait<1>(); y[i] = s[BUG(64 +) i];",
        Uninitialized,
        "a cp.async still copies byte 0 of it",
    ),
    "a copy that only its own thread has waited for": (
        "__shared__ int s[64]; copy(s + i, x + i); commit(); wait<0>(); FIX(__syncthreads();)"
        "y[i] = s[63 - i];",
        Race,
        r"Thread \(0, 0, 0\) .* thread \(63, 0, 0\) of its block wrote byte 0 of it, and no barrier lies ",
    ),
    "a barrier before the wait": (
        "__shared__ int s[64]; copy(s + i, x + i); commit(); BUG(__syncthreads();) wait<0>();"
        "FIX(__syncthreads();) y[i] = s[63 - i];",
        Race,
        "wrote byte 0 of it",
    ),
    "a copy into what others still read": (
        "__shared__ int s[64]; s[i] = i; __syncthreads(); y[i] = s[63 - i]; FIX(__syncthreads();)"
        "copy(s + i, x + i); wait_all();",
        Race,
        r"copies to 4 bytes .* read byte 0 of it, and no barrier lies in between",
    ),
    "a store into what a copy fills": (
        "__shared__ int s[64]; copy(s + i, x + i); FIX(wait_all();) s[i] = 0; wait_all(); y[i] = s[i];",
        Uninitialized,
        "writes 4 bytes .* a cp.async still copies byte 0 of it",
    ),
    "a copy from beyond the end": (
        "__shared__ int s[64]; copy(s + i, x + i BUG(+ 1)); wait_all(); y[i] = s[i];",
        BadAccess,
        "reads 4 bytes of global memory .* out of bounds",
    ),
    # barriers and warps
    "a barrier for a half of a warp": (
        "BUG(if (i < 16)) __syncthreads(); y[i] = 0;",
        Divergence,
        r"Thread \(16, 0, 0\) .* has exited, and others of its warp wait at a barrier",
    ),
    "two barriers for two halves": (
        "BUG(if (i < 32)) { __syncthreads(); y[i] = 1; } BUG(else { y[i] = 2; __syncthreads(); })",
        Divergence,
        "waits at another barrier than others of its block, PTX line",
    ),
    "a vote in a branch": (
        "y[i] = 0; BUG(if (i < 8)) y[i] = __any_sync(~0u, i);",
        Divergence,
        r"Thread \(8, 0, 0\) .* is not there, and its whole warp must be",
    ),
    "a barrier of the warp in a branch": (
        "BUG(if (i < 8)) __syncwarp(); y[i] = 0;",
        Divergence,
        "is not there, and its whole warp must be",
    ),
    "ldmatrix in a branch": (
        "__shared__ int4 s[8]; s[i % 8] = make_int4(0, 0, 0, 0); __syncthreads();"
        "y[i] = 0; BUG(if (i < 16)) y[i] = matrix(s);",
        Divergence,
        r"Thread \(16, 0, 0\) .* is not there, and its whole warp must be",
    ),
    "mma in a branch": (
        "y[i] = 0; BUG(if (i < 16)) y[i] = mma();",
        Divergence,
        r"Thread \(16, 0, 0\) .* is not there, and its whole warp must be",
    ),
}
PRELUDE = """
__device__ unsigned at(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void copy(int *to, const int *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at(to)), "l"(from) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ void wait_all() { commit(); wait<0>(); }
__device__ int matrix(const void *p) {
    int r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r) : "r"(at(p) + threadIdx.x % 8 * 16) : "memory");
    return r;
}
__device__ float mma() {
    float d[4];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%5, %5, %5, %5};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(0), "f"(0.0f));
    return d[0];
}
extern "C" __global__ void k(const int *x, int *y) {
    int i = threadIdx.x;
"""
ONE_OF_TWO = {
    "bug": "#define BUG(...) __VA_ARGS__\n#define FIX(...)\n",
    "fix": "#define BUG(...)\n#define FIX(...) __VA_ARGS__\n",
}


def run(which, body, arch):
    x = np.arange(64, dtype=np.int32)
    return output(
        compiled(f"{ONE_OF_TWO[which]}{PRELUDE}{body}\n}}", arch),
        "k",
        [x],
        np.int32,
        64,
        grid=2 if "blockIdx" in body else 1,
    )


@every_arch
@pytest.mark.parametrize("name", FINDINGS)
def test_a_bug_is_found_and_its_fix_is_not(name, arch):
    body, kind, message = FINDINGS[name]
    run("fix", body, arch)
    with pytest.raises(PtxError, match=message) as error:
        run("bug", body, arch)
    assert type(error.value) is kind
    assert "k, PTX line " in str(error.value)
    assert "k.cu:" in str(error.value)  # the line of the CUDA source


def test_writes_of_blocks_are_compared_even_if_they_do_not_run_side_by_side(monkeypatch):
    monkeypatch.setattr("emulator.ptx.THREADS_AT_ONCE", 1)
    test_a_bug_is_found_and_its_fix_is_not("blocks that write different values", "80")


@every_arch
def test_the_line_is_that_of_the_cuda_source(arch):
    source = 'extern "C" __global__ void k(int *y) {\n int i = threadIdx.x;\n y[i] = i;\n y[\n i + 1] = 1;\n}'
    with pytest.raises(BadAccess, match=r"^k, PTX line \d+, k\.cu:[45]: st\.global") as error:
        output(compiled(source, arch), "k", [], np.int32, 64)
    line = int(str(error.value).split("PTX line ")[1].split(",")[0])
    assert line > 10


PIPELINE = """
__device__ void copy16(void *to, const void *from, int bytes) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
extern "C" __global__ void k(const int4 *x, int steps, int limit, int *y) {
    __shared__ int4 s[STAGES][64];
    int i = threadIdx.x, sum = 0;
    for (int j = 0; j < STAGES - 1; j++) {
        if (j < steps) copy16(&s[j][i], x + min(j * 64 + i, limit - 1), j * 64 + i < limit ? 16 : 0);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int j = 0; j < steps; j++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        BARRIER
        int next = j + STAGES - 1;
        if (next < steps)
            copy16(&s[next % STAGES][i], x + min(next * 64 + i, limit - 1), next * 64 + i < limit ? 16 : 0);
        asm volatile("cp.async.commit_group;" ::: "memory");
        int4 v = s[j % STAGES][63 - i];
        sum += v.x + v.y + v.z + v.w;
    }
    y[i] = sum;
}"""


@every_arch
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_pipeline_of_copies_is_right_and_found_without_its_barrier(stages, arch):
    """One barrier a step, as the product kernels have it; the last rows are filled with zeros."""
    x, limit = np.random.default_rng(0).integers(0, 1000, (8 * 64, 4)).astype(np.int32), 8 * 64 - 30
    x[limit:] = 10**6
    source = f"#define STAGES {stages}\n#define BARRIER __syncthreads();" + PIPELINE
    y = output(compiled(source, arch), "k", [x, np.int32(8), np.int32(limit)], np.int32, 64)
    x[limit:] = 0
    np.testing.assert_array_equal(y, x.reshape(8, 64, 4).sum(axis=(0, 2))[::-1])
    without = compiled(source.replace("__syncthreads();", ""), arch)
    with pytest.raises(PtxError, match=r"wrote byte 0|still copies|read byte 0"):
        output(without, "k", [x, np.int32(8), np.int32(limit)], np.int32, 64)


@pytest.mark.parametrize(("limit", "copied"), [("", 4), (", 16", 4), (", 8", 2), (", 4", 1), (", 0", 0)])
def test_what_a_copy_does_not_read_is_zero(limit, copied):
    """If it reads none, nobody looks at the address."""
    x = np.arange(1, 5, dtype=np.int32)
    text = f"""
.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 x, .param .u64 y)
{{
.shared .align 16 .b8 s[16]; .reg .b32 v<4>; .reg .b64 from, to;
ld.param.u64 from, [x]; ld.param.u64 to, [y];
cp.async.cg.shared.global [s], [from], 16{limit}; cp.async.commit_group; cp.async.wait_group 0;
ld.shared.v4.b32 {{v0, v1, v2, v3}}, [s]; st.global.v4.b32 [to], {{v0, v1, v2, v3}};
ret;
}}
"""
    source = x if copied else np.uint64(0)
    y = output(module_of(text), "k", [source], np.int32, 4, block=1)
    np.testing.assert_array_equal(y, np.where(np.arange(4) < copied, x, 0))


def test_whole_warps_that_exit_are_not_waited_for():
    source = """
    extern "C" __global__ void k(int *y) {
        __shared__ int s[32];
        int i = threadIdx.x;
        y[i] = 0;
        if (i >= 32) return;
        s[i] = i;
        __syncthreads();
        y[i] = s[31 - i];
    }"""
    y = output(compiled(source), "k", [], np.int32, 64)
    assert y.tolist() == [*range(31, -1, -1), *[0] * 32]
