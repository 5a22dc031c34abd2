"""wgmma in the PTX interpreter: its numbers are those of mma.m16n8k16 on tiles; whom it stops, and why."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import compiled, module_of, output
from test_tensor_core import KINDS, assert_same_bits, half_tile

import emulator
from emulator.ptx import BadAccess, Divergence, PtxError, Race, Uninitialized, Unsupported

seeds = st.integers(0, 2**32 - 1)
GROUP = 128  # threads of a warpgroup
ROW_BYTES = 128  # 64 halves
DESCRIPTOR = 1 << 62 | 64 << 32 | 1 << 16  # 128-byte swizzle; 1024 bytes from 8 rows to the next; not used

# A kernel in steps: 64 rows of A for each warpgroup, then n of B, are 64 halves long and lie in shared memory
# as x has them. t is the thread, w its place in shared memory, p the predicate `add`, a and b descriptors.
STEPS = {
    "store": "{store}",
    "visible": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "load": "{load}",
    "fence": "wgmma.fence.sync.aligned;",
    "first": "{mma} {{{d}}}, a0, b0, p, 1, 1, 0, 0; {mma} {{{d}}}, a1, b1, q, 1, 1, 0, 0;",
    "commit": "wgmma.commit_group.sync.aligned;",
    "second": "{mma} {{{d}}}, a2, b2, q, 1, 1, 0, 0; {mma} {{{d}}}, a3, b3, q, 1, 1, 0, 0;",
    "commit again": "wgmma.commit_group.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "result": "{result}",
}


@cache
def wgmma_ptx(n, warpgroups=1, **changed):
    """The kernel with some steps replaced."""
    size = (64 * warpgroups + n) * ROW_BYTES
    d, at_once = [f"d{i}" for i in range(n // 2)], 16 * GROUP * warpgroups
    pieces = range(0, size, at_once)
    store = "".join(
        f"ld.global.v4.b32 {{v0, v1, v2, v3}}, [x+{i}]; st.shared.v4.b32 [w+{i}], {{v0, v1, v2, v3}};\n"
        for i in pieces
    )
    names = {
        "store": store,
        "store_some": store.replace("st.shared", "@r st.shared"),
        "load": "".join(f"ld.global.b32 {name}, [c+{4 * i}];\n" for i, name in enumerate(d)),
        "mma": f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16",
        "d": ", ".join(d),
        "result": "".join(f"st.global.b32 [y+{4 * i}], {name};\n" for i, name in enumerate(d)),
    }
    steps = {name.replace(" ", "_"): step for name, step in STEPS.items()} | changed
    body = "\n".join(step.format(**names) for step in steps.values())
    descriptors = "".join(f"add.u64 a{k}, a, {2 * k}; add.u64 b{k}, b, {2 * k};\n" for k in range(4))
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 pc, .param .u32 add, .param .u64 py)
{{
.shared .align 1024 .b8 tile[{len(pieces) * at_once}];
.reg .b32 t, w, g, v<4>, d<{n // 2}>, other; .reg .b64 x, c, y, i, a, b, a<4>, b<4>; .reg .pred p, q, r;
ld.param.u64 x, [px]; ld.param.u64 c, [pc]; ld.param.u64 y, [py]; ld.param.u32 v0, [add];
setp.ne.u32 p, v0, 0; setp.eq.u32 q, v0, v0;
mov.u32 t, %tid.x; mov.u32 w, tile; mad.lo.u32 w, t, 16, w; mad.wide.u32 x, t, 16, x;
mov.u32 v1, %ctaid.x; mad.wide.u32 x, v1, {len(pieces) * at_once}, x;
mov.u32 v2, %ntid.x; mad.lo.u32 v1, v1, v2, t;
mad.wide.u32 c, v1, {2 * n}, c; mad.wide.u32 y, v1, {2 * n}, y;
mov.u32 g, tile; shr.u32 v0, t, 7; mad.lo.u32 v0, v0, {64 * ROW_BYTES}, g; shr.u32 v0, v0, 4;
cvt.u64.u32 a, v0; or.b64 a, a, {DESCRIPTOR};
add.u32 v0, g, {64 * ROW_BYTES * warpgroups}; shr.u32 v0, v0, 4; cvt.u64.u32 b, v0; or.b64 b, b, {DESCRIPTOR};
{descriptors}
{body}
ret;
}}
"""


def swizzled(rows):
    """(rows, 64) halves as bits → bytes: in row r the 16 bytes c lie at place c XOR r modulo 8."""
    pieces = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 8, 16)
    return np.stack([piece[np.arange(8) ^ r % 8] for r, piece in enumerate(pieces)]).reshape(-1)


def operands(kind, rng, n, rows=64):
    """A (rows, 64), B (n, 64) as bits, C (rows, n), of tiles that can tell a wrong step from a right one."""
    tiles = [[half_tile("fp16", kind, rng) for _ in range(max(rows // 16, n // 8))] for _ in range(4)]
    a, b = (
        np.concatenate([np.concatenate([tile[i] for tile in step], axis=0) for step in tiles], axis=1)
        for i in (0, 1)
    )
    tiles = [[half_tile("fp16", kind, rng)[2] for _ in range(n // 8)] for _ in range(rows // 16)]
    return a[:rows], b[:n], np.block(tiles)


def rows_and_columns(n, threads):
    """Of each register of each thread: (threads, n/2) twice."""
    t, i = np.ogrid[:threads, : n // 2]
    g, lane, e = t % 32 // 4, t % 4, i % 4
    return t // 32 * 16 + g + 8 * (e >> 1), 8 * (i // 4) + 2 * lane + (e & 1)


def expected(a, b, c, add=True):
    d = c.copy() if add else np.zeros_like(c)
    a, b = a.view(np.float16), b.view(np.float16)
    for m in range(0, len(a), 16):
        for j in range(0, len(b), 8):
            for k in range(0, a.shape[1], 16):
                tile = np.s_[m : m + 16, j : j + 8]
                d[tile] = emulator.mma_m16n8k16(a[m : m + 16, k : k + 16], b[j : j + 8, k : k + 16], d[tile])
    return d


def product(ptx, *blocks, add=1):
    """D (blocks, rows of A, rows of B) of the kernel, each block with its A, B and C."""
    rows_of_a, n = blocks[0][2].shape
    threads = 2 * rows_of_a
    x = np.stack([np.concatenate([swizzled(a), swizzled(b)]) for a, b, _ in blocks])
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % (16 * threads))))
    rows, columns = rows_and_columns(n, threads)
    arguments = [x, np.stack([c[rows, columns] for _, _, c in blocks]), np.uint32(add)]
    shape = (len(blocks), threads, n // 2)
    registers = output(module_of(ptx), "k", arguments, np.float32, shape, grid=len(blocks), block=threads)
    d = np.empty((len(blocks), rows_of_a, n), np.float32)
    d[:, rows, columns] = registers
    return d


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_the_numbers_are_those_of_mma_on_tiles(kind, seed):
    """Four steps along K, 32 bytes apart, in two groups; C is added or taken for +0."""
    block = operands(kind, np.random.default_rng(seed), 8)
    for add in (0, 1):
        (d,) = product(wgmma_ptx(8), block, add=add)
        assert_same_bits(d, expected(*block, add), kind)


@pytest.mark.parametrize(("n", "warpgroups", "grid"), [(24, 2, 3), (256, 1, 1), (256, 2, 2)])
def test_every_shape_and_several_warpgroups(n, warpgroups, grid):
    rng = np.random.default_rng(n)
    blocks = [operands("far spread", rng, n, 64 * warpgroups) for _ in range(grid)]
    for block, d in zip(blocks, product(wgmma_ptx(n, warpgroups), *blocks)):
        assert_same_bits(d, expected(*block), n)


SOURCE = """
__device__ unsigned long long descriptor(const void *p) {
    unsigned at = (unsigned)__cvta_generic_to_shared(p);
    return (unsigned long long)(at >> 4) | 64ull << 32 | 1ull << 62;
}
__device__ void fill(uint4 *tile, const uint4 *x) {
    for (int i = threadIdx.x; i < 72 * 8; i += 128) tile[i] = x[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ void keep(float *d) {  // the compiler moves no use of d over this
    asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) :: "memory");
}
extern "C" __global__ void k(const uint4 *x, const float4 *c, int steps, float4 *y) {
    __shared__ __align__(1024) uint4 tile[2][128 * 8];
    int t = threadIdx.x;
    float d[4] = {c[t].x, c[t].y, c[t].z, c[t].w};
    keep(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    fill(tile[0], x);
    __syncthreads();
    for (int j = 0; j < steps; j++) {
        const uint4 *a = tile[j & 1], *b = a + 64 * 8;
        for (int k = 0; k < 4; k++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
                         "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                         : "l"(descriptor(a) + 2 * k), "l"(descriptor(b) + 2 * k));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (j + 1 < steps) fill(tile[(j + 1) & 1], x + (j + 1) * 72 * 8);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        __syncthreads();
    }
    keep(d);
    y[t] = make_float4(d[0], d[1], d[2], d[3]);
}"""


def compiled_product(source, blocks):
    """D (64, 8) of several steps of 64 along K, added to C of the first."""
    rows, columns = rows_and_columns(8, 128)
    x = np.concatenate([swizzled(part) for a, b, _ in blocks for part in (a, b)])
    d = np.empty((64, 8), np.float32)
    arguments = [x, blocks[0][2][rows, columns], np.int32(len(blocks))]
    d[rows, columns] = output(compiled(source, "90a"), "k", arguments, np.float32, (128, 4), block=128)
    return d


def test_what_nvrtc_makes_of_a_pipeline():
    """The next operands are stored while a wgmma multiplies."""
    blocks = [operands("spread", np.random.default_rng(i), 8) for i in range(3)]
    d = blocks[0][2]
    for a, b, _ in blocks:
        d = expected(a, b, d)
    assert_same_bits(compiled_product(SOURCE, blocks), d, "pipeline")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("fence.proxy.async.shared::cta;", "fence.proxy.async of its own and barrier lie in between"),
        ("wgmma.fence.sync.aligned;", "no wgmma.fence lies in between"),
        ("wgmma.commit_group.sync.aligned;", "no wgmma.wait_group came before"),
        ("wgmma.wait_group.sync.aligned 0;", "no wgmma.wait_group came before"),
        ("    __syncthreads();\n    for", "wrote byte 0 of it, and no barrier lies in between"),
        ("        __syncthreads();\n    }", "wrote byte 0 of it, and no barrier lies in between"),
    ],
)
def test_a_pipeline_without_one_of_its_lines(removed, message):
    blocks = [operands("spread", np.random.default_rng(i), 8) for i in range(3)]
    assert SOURCE.count(removed) == 1
    with pytest.raises(PtxError) as error:
        compiled_product(SOURCE.replace(removed, removed.split("\n")[-1] if "\n" in removed else ""), blocks)
    assert message in str(error.value)


# What it stops a kernel for: steps that are wrong, steps that are right, class, reason

AGAIN = "st.shared.v4.b32 [w], {{v0, v1, v2, v3}};"
COPY = "cp.async.cg.shared.global [w], [x], 16; cp.async.commit_group;"
COPIED = "{store} " + COPY + " cp.async.wait_group 0;"
HALF, MOST = "setp.lt.u32 r, t, 112;", "setp.lt.u32 r, t, 96;"
NO_WAIT = r"uses what a wgmma\.mma_async still computes: no wgmma\.wait_group came before"
NO_FENCE = r"adds to d0, which others used before, and no wgmma\.fence lies in between"
NOT_VISIBLE = (
    r"multiplies 16 bytes of shared memory at 0x0, but thread \(0, 0, 0\) of its block wrote byte 0 of it, "
    r"and no fence\.proxy\.async of its own and barrier lie in between"
)
STILL_READS = r"a wgmma\.mma_async still reads byte 0 of it: no wgmma\.wait_group came before"
FINDINGS = {
    # shared memory that it reads
    "a byte that nobody wrote": (
        {"store": "setp.ne.u32 r, t, 70; {store_some}"},
        {},
        Uninitialized,
        r"multiplies 16 bytes of shared memory at 0x460, but byte 0 of it was never written",
    ),
    "no barrier": (
        {"barrier": ""},
        {},
        Race,
        r"thread \(\d, 0, 0\) of its block wrote byte 0 of it, and no b",
    ),
    "a barrier of the warp": (
        {"barrier": "bar.warp.sync -1;"},
        {},
        Race,
        "wrote byte 0 of it, and no barrier",
    ),
    "no fence for the async proxy": ({"visible": ""}, {"visible": "fence.proxy.async;"}, Race, NOT_VISIBLE),
    "a fence before the write": (
        {"store": "fence.proxy.async; {store}", "visible": ""},
        {"store": "fence.proxy.async; {store}"},
        Race,
        NOT_VISIBLE,
    ),
    "a fence behind the barrier": (
        {"visible": "", "barrier": "bar.sync 0; fence.proxy.async;"},
        {"visible": "", "barrier": "bar.sync 0; fence.proxy.async; bar.sync 0;"},
        Race,
        NOT_VISIBLE,
    ),
    "a fence of other threads": (
        {"visible": "setp.ne.u32 r, t, 0; @r fence.proxy.async;"},
        {"visible": "setp.ge.u32 r, t, 0; @r fence.proxy.async;"},
        Race,
        NOT_VISIBLE,
    ),
    "a write behind the fence": (
        {"visible": "fence.proxy.async; bar.sync 0;" + AGAIN},
        {"visible": "fence.proxy.async; bar.sync 0;" + AGAIN + "fence.proxy.async;"},
        Race,
        NOT_VISIBLE,
    ),
    "another value behind the fence": (
        {"visible": "st.shared.b32 [g+9216], g; fence.proxy.async; st.shared.b32 [g+9216], t;"},
        {"visible": "st.shared.b32 [g+9216], g; fence.proxy.async; st.shared.b32 [g+9216], g;"},
        Race,
        r"Thread \(\d+, 0, 0\) .* writes 4 bytes .* wrote byte 0 of it, and no barrier lies in between",
    ),
    "a copy without a fence": ({"store": COPIED, "visible": ""}, {"store": COPIED}, Race, NOT_VISIBLE),
    "a fence before the copy is there": (
        {"store": "{store}" + COPY, "barrier": "cp.async.wait_group 0; bar.sync 0;"},
        {"store": COPIED},
        Race,
        NOT_VISIBLE,
    ),
    "a copy that is not waited for": (
        {"store": "{store}" + COPY},
        {"store": COPIED},
        Uninitialized,
        "multiplies .* a cp.async still copies byte 0 of it",
    ),
    "a descriptor that leads outside": (
        {"first": "add.u64 a0, a0, 576; " + STEPS["first"]},
        {},
        BadAccess,
        r"multiplies 16 bytes of shared memory at 0x2800, but byte 0 of it is out of bounds",
    ),
    # shared memory that it still reads
    "a write before the wait": (
        {"commit_again": "wgmma.commit_group.sync.aligned; bar.sync 0;" + AGAIN},
        {"wait": "wgmma.wait_group.sync.aligned 0; bar.sync 0;" + AGAIN},
        Race,
        "writes 16 bytes .* " + STILL_READS,
    ),
    "a copy before the wait": (
        {"commit_again": "wgmma.commit_group.sync.aligned; bar.sync 0;" + COPY},
        {"wait": "wgmma.wait_group.sync.aligned 0; bar.sync 0;" + COPY},
        Race,
        "copies to 16 bytes .* " + STILL_READS,
    ),
    "a write before the wait for the second group": (
        {"wait": "wgmma.wait_group.sync.aligned 1; bar.sync 0; st.shared.b32 [w+64], v0;"},
        {"wait": "wgmma.wait_group.sync.aligned 1; bar.sync 0; wgmma.wait_group.sync.aligned 0; bar.sync 0;"},
        Race,
        STILL_READS,
    ),
    "a write without a barrier behind the wait": (
        {"wait": "bar.sync 0; wgmma.wait_group.sync.aligned 0;" + AGAIN},
        {"wait": "bar.sync 0; wgmma.wait_group.sync.aligned 0; bar.sync 0;" + AGAIN},
        Race,
        r"writes 16 bytes .* read byte 0 of it, and no barrier lies in between",
    ),
    "a write by the first thread, and other warps may not have waited": (
        {"wait": "bar.sync 0; wgmma.wait_group.sync.aligned 0; setp.eq.u32 r, t, 0; @r " + AGAIN},
        {"wait": "wgmma.wait_group.sync.aligned 0; bar.sync 0; setp.eq.u32 r, t, 0; @r " + AGAIN},
        Race,
        r"Thread \(0, 0, 0\) .* writes 16 bytes .* another thread of its block read byte 0 of it",
    ),
    # registers
    "no wgmma.fence": ({"fence": ""}, {}, Race, NO_FENCE),
    "a write behind wgmma.fence": (
        {"fence": "wgmma.fence.sync.aligned; mov.b32 d0, 0;"},
        {"fence": "mov.b32 d0, 0; wgmma.fence.sync.aligned;"},
        Race,
        NO_FENCE,
    ),
    "a read and no wgmma.fence": (
        {"commit": STEPS["commit"] + STEPS["wait"] + "mov.b32 other, d0;"},
        {"commit": STEPS["commit"] + STEPS["wait"] + "mov.b32 other, d0;" + STEPS["fence"]},
        Race,
        NO_FENCE,
    ),
    "a register read before the wait": (
        {"second": STEPS["second"] + "mov.b32 other, d0;"},
        {"second": STEPS["second"] + "mov.b32 other, g;"},
        Uninitialized,
        NO_WAIT,
    ),
    "a register written before the wait": (
        {"second": STEPS["second"] + "@p mov.b32 d3, 0;"},
        {"second": STEPS["second"] + "@!p mov.b32 d3, 0;"},
        Uninitialized,
        NO_WAIT,
    ),
    "no wait": ({"wait": ""}, {}, Uninitialized, NO_WAIT),
    "no commit": ({"commit_again": ""}, {"commit": ""}, Uninitialized, NO_WAIT),
    "one group too many in flight": (
        {"wait": "wgmma.wait_group.sync.aligned 1;"},
        {"wait": "wgmma.wait_group.sync.aligned 1; wgmma.wait_group.sync.aligned 0;"},
        Uninitialized,
        NO_WAIT,
    ),
    # whole warpgroups
    "wgmma for a part of a warp": (
        {"first": HALF + STEPS["first"].replace("{mma}", "@r {mma}")},
        {},
        Divergence,
        r"Thread \(112, 0, 0\) .* is not there, and its whole warpgroup must be",
    ),
    "wgmma.fence for three warps": (
        {"fence": MOST + "@r " + STEPS["fence"]},
        {},
        Divergence,
        r"Thread \(96, 0, 0\) .* is not there, and its whole warpgroup must be",
    ),
    "commit for three warps": ({"commit": MOST + "@r " + STEPS["commit"]}, {}, Divergence, "whole warpgroup"),
    "wait for three warps": ({"wait": MOST + "@r " + STEPS["wait"]}, {}, Divergence, "whole warpgroup"),
    "another descriptor": (
        {"first": HALF + "@r mov.b64 b1, b0;" + STEPS["first"]},
        {"first": HALF + "@r mov.b64 b1, b1;" + STEPS["first"]},
        Divergence,
        r"Thread \(112, 0, 0\) .* has another b1 than its warpgroup, and it must be the same",
    ),
    "another predicate": (
        {"first": "setp.ne.u32 p, t, 1;" + STEPS["first"]},
        {},
        Divergence,
        r"Thread \(1, 0, 0\) .* has another p than its warpgroup, and it must be the same",
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_a_bug_is_found_and_its_fix_is_not(name):
    bug, fix, kind, message = FINDINGS[name]
    block = operands("spread", np.random.default_rng(0), 8)
    product(wgmma_ptx(8, **fix), block)
    with pytest.raises(PtxError, match=message) as error:
        product(wgmma_ptx(8, **bug), block)
    assert type(error.value) is kind


def test_two_warpgroups_read_the_same_rows_and_wait_each_for_itself():
    """What one of them has waited for is not free while the other reads it."""
    late = "setp.ge.u32 r, t, 128; {branch} wgmma.wait_group.sync.aligned 0; L: bar.sync 0;"
    write = "setp.eq.u32 r, t, 0; @r st.shared.b32 [g+16384], v0; wgmma.wait_group.sync.aligned 0;"
    block = operands("spread", np.random.default_rng(0), 8, 128)
    product(wgmma_ptx(8, 2, wait=late.replace("{branch}", "") + write), block)
    with pytest.raises(Race, match=STILL_READS):
        product(wgmma_ptx(8, 2, wait=late.replace("{branch}", "@r bra L;") + write), block)


FIRST = STEPS["first"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first": "add.u64 a0, a0, 8;" + FIRST}, "a start that is a multiple of 1024 plus 0 to 96"),
        ({"first": "add.u64 a0, a0, 7;" + FIRST}, "a start that is a multiple of 1024 plus 0 to 96"),
        ({"first": f"xor.b64 b0, b0, {3 << 62};" + FIRST}, "b0 must have 128-byte swizzling"),
        ({"first": f"xor.b64 b0, b0, {1 << 62};" + FIRST}, "b0 must have 128-byte swizzling"),
        ({"first": f"xor.b64 b0, b0, {1 << 49};" + FIRST}, "0 in the other upper bits"),
        ({"first": f"xor.b64 b0, b0, {1 << 37};" + FIRST}, "stride 1024"),
        ({"first": FIRST.replace("1, 1, 0, 0", "-1, 1, 0, 0")}, "has a modifier or operand, not known here"),
        ({"first": FIRST.replace("1, 1, 0, 0", "1, 1, 0, 1")}, "has a modifier or operand, not known here"),
        ({"first": FIRST.replace(", 0, 0;", ";")}, "has a modifier or operand, not known here"),
        (
            {"first": FIRST.replace("a0", "{{g, g, g, g}}")},
            "'{g, g, g, g}' is not a register, a label or a number",
        ),
        ({"first": FIRST.replace("{{{d}}}", "{{d0, d1}}")}, "must be 4 operands"),
        (
            {"first": FIRST.replace("{{{d}}}", "{{d1, d0, d2, d3}}")},
            "is one of another shape or place in D",
        ),
        (
            {"first": FIRST.replace("{{{d}}}", "{{d0, 0, d2, d3}}")},
            "'0' is not a register, a label or a number",
        ),
        (
            {"first": FIRST.replace("f16.f16", "bf16.bf16").replace("{mma}", "wgmma.x")},
            "wgmma.x is an opcode",
        ),
    ],
)
def test_what_it_does_not_know(changed, message):
    with pytest.raises(Unsupported) as error:
        product(wgmma_ptx(8, **changed), operands("spread", np.random.default_rng(0), 8))
    assert message in str(error.value)


@pytest.mark.parametrize(("n", "threads"), [(12, 128), (264, 128), (8, 96)])
def test_shapes_that_are_not_there(n, threads):
    arguments = [np.zeros(2**16, np.uint8), np.zeros((threads, n // 2), np.float32), np.uint32(1)]
    with pytest.raises(Unsupported, match=r"N is a multiple of 8|no multiple of 128 threads"):
        output(module_of(wgmma_ptx(n)), "k", arguments, np.float32, (threads, n // 2), block=threads)
