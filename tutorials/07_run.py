# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Run it on a GPU you may not have
#
# Afterwards you can say where each bit of an NVFP4 matrix lies in a GPU's memory and which thread gets it,
# run this project's CUDA kernels on a CPU, and find a bug that a GPU may hide. No GPU is needed, but
# NVIDIA's compiler NVRTC is; `pip` has it for Linux and Windows. 45 minutes. Before: [4, Quantize the error
# too](04_augment.ipynb), and [6, Add like a tensor core](06_add.ipynb).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import re
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import arcquant_ref as aq
import emulator
from arcquant_ref import layout
from arcquant_ref.plots import show
from arcquant_ref.sample import load_sample
from emulator import ptx
from gpu import load, plots
from gpu.device import Changed, Interpreted
from gpu.face import Face

# %% [markdown]
# ## Two codes to a byte
#
# An E2M1 code has 4 bits and memory is counted in bytes of 8, so two codes share a byte. Here are eight
# codes, and the same packed:

# %%
codes = np.uint8([[1, 2, 3, 4, 5, 6, 7, 8]])
packed = layout.pack(codes)
word = int(packed.view("<u4")[0, 0])

print("codes               ", *codes[0])
print("bytes               ", *(f"0x{byte:02x}" for byte in packed[0]))
print("as one 32-bit number", f"0x{word:08x}")
assert [word >> 4 * i & 0xF for i in range(8)] == codes[0].tolist()

# %% [markdown]
# The first of two codes is in the low four bits. A byte is printed with its high bits first, so 1, 2 is
# `0x21`. Read as one 32-bit number, code i = 0 … 7 stands in bits 4i … 4i + 3. A **register** of a GPU has
# 32 bits: it holds eight codes.

# %% [markdown]
# ## Scales lie in tiles
#
# Sixteen codes along K share a block scale, one byte. The plain place for the scale of row r and block s
# would be byte r · K/16 + s, row by row. The GPU's matrix product and the libraries around it want another
# place. To see it, take 128 rows with four scales each and write the row's own number into all four. This
# is how these 512 bytes begin and end:

# %%
row_numbers = np.repeat(np.arange(128, dtype=np.uint8)[:, None], 4, axis=1)
tile = layout.swizzle_128x4(row_numbers)

for first in (0, 16, 32, 496):
    print(f"bytes {first:3} … {first + 15:3}: rows", *tile[first : first + 16])
assert tile[:16].tolist() == [0] * 4 + [32] * 4 + [64] * 4 + [96] * 4

# %% [markdown]
# Four neighbouring bytes are the four scales of one row. A line of 16 bytes holds rows r, r + 32, r + 64
# and r + 96, and the next line those of r + 1. This order is called **swizzled** (cuBLAS documentation, "1D
# Block Scaling Factors Layout").
#
# 128 rows by 4 scales are one **tile** of 512 bytes. A larger matrix has several: first those next to each
# other along K, then those of the next 128 rows. With the number of its tile as every scale:

# %%
tiles = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3)  # for 256 rows and K = 192: 12 blocks
print("tiles, as they lie in the matrix:")
print(tiles)
scales = np.repeat(np.repeat(tiles, 128, axis=0), 4, axis=1)
swizzled = layout.swizzle_128x4(scales)
print("tiles, as they lie in memory:    ", *swizzled[::512])
assert (swizzled == np.repeat(np.arange(6), 512)).all()

# %% [markdown]
# A matrix that ends inside a tile is filled up with zeros. Here is a real one: the activations of a layer
# of SmolLM2-135M, 32 tokens, with residual channels as in notebook [4](04_augment.ipynb).

# %%
layer = load_sample()[0]
x, w = layer.evaluation[:32], layer.weight[:64]
selection = aq.select(aq.calibrate([layer.calibration]))
a, b = aq.augment_activations(x, selection), aq.augment_weights(w, selection)

buffer = layout.swizzle_128x4(a.block_scales)
print(f"{layer.name}: K = {selection.K}, S = {selection.num_residual}, so K' = {a.shape[1]}")
print(f"codes  {a.codes.shape}, packed {layout.pack(a.codes).nbytes:6} bytes")
print(f"scales {a.block_scales.shape}  = {a.block_scales.size} bytes, swizzled {buffer.nbytes} bytes")
assert layout.pack(a.codes).nbytes == 32 * 592 // 2
assert buffer.nbytes == 10 * 512  # 32 rows: one tile down; 37 blocks: ten tiles across
assert (layout.unswizzle_128x4(buffer, a.block_scales.shape) == a.block_scales).all()

# %% [markdown]
# ## Who holds what
#
# A GPU runs **threads**. 32 of them form a **warp** and run every instruction together; a thread's place in
# its warp, 0 … 31, is its **lane**. Each lane has registers of its own.
#
# The MMA of notebook [6](06_add.ipynb) is D = A Bᵀ + C with A (16, 64) and B (8, 64) in codes. In short it
# is called `mma.m16n8k64`, for 16 rows and 8 columns of D, and 64 along K. A whole warp runs it, and the
# operands lie in the registers of its 32 lanes, in equal parts. What one lane holds is a **fragment**:

# %%
for name, elements, width in (("A", 16 * 64, 4), ("B", 8 * 64, 4), ("C and D", 16 * 8, 32)):
    registers = elements * width // 32 // 32
    print(f"{name:8} {elements:4} elements of {width:2} bits = 32 lanes × {registers} registers × 32 bits")
    assert registers == plots.fragments()[name][1]

# %% [markdown]
# Which part? `gpu.plots.fragments` gives each element of A a number that says in which register of which
# lane it lies, and where in it: it asks the interpreter, which we come to below. Lane 5 holds

# %%
numbers, count, parts = plots.fragments()["A"]  # number = (lane · count + register) · parts + part
lane, register, part = numbers // (count * parts), numbers // parts % count, numbers % parts
for r in range(count):
    rows, ks = np.nonzero((lane == 5) & (register == r))
    print(f"register {r}: row {rows[0]}, k = {ks[0]:2} … {ks[-1]:2}, in this order from the low bits up")
    assert (rows == rows[0]).all()
    assert (part[rows, ks] == np.arange(8)).all()
assert lane[1, 8] == lane[9, 8] == 5

# %% [markdown]
# 5 is 4 · 1 + 1. In general lane 4g + t, with t = 0 … 3, holds rows g and g + 8, and of these k = 8t … 8t +
# 7 and the same 32 further (PTX ISA, "Matrix fragments for mma.m16n8k64").
#
# So both layouts have a reason. A register of A is eight neighbours of a row: one 32-bit number of the
# packed codes. And 64 along K are four blocks, so a row has four scales in an MMA: again one register, four
# neighbouring bytes of a swizzled tile. Codes and scales go from memory to the instruction without any
# arithmetic on them.

# %% [markdown]
# ## The picture
#
# Where the scales of a tile lie:

# %%
show(
    plots.swizzle_figure(),
    "Left, a tile of 128 rows and four scales, in four quarters of 32 rows. Right, its 512 bytes in memory, "
    "16 a line: each line takes one row of each quarter, so r, r + 32, r + 64 and r + 96 stand side by side.",
)

# %% [markdown]
# Who holds A and its scales in the MMA; 9.1 is register 1 of lane 9:

# %%
figure = Figure(figsize=(9.5, 4.6), layout="constrained")
of_codes, of_scales = figure.subplots(1, 2, width_ratios=[64, 22])
plots.draw_operand(of_codes, "A")
plots.draw_operand(of_scales, "scales of A")
figure.suptitle("mma.m16n8k64: which lane and which of its registers hold what (lane.register)")
show(
    figure,
    "Left, A: a box is eight codes in one register. Each row lies in four lanes, 4g … 4g + 3, in registers 0 "
    "and 2 for the upper eight rows and 1 and 3 for the lower ones. Right, its scales: a row's four are one "
    "register, of lane 4g for row g and of lane 4g + 1 for row g + 8.",
)

# %% [markdown]
# B, C and D are drawn in [the kernels](../docs/kernels.md#the-native-product).

# %% [markdown]
# ## From CUDA to PTX
#
# A **kernel** is a function that many threads run at once, each with a number of its own, `threadIdx.x`.
# Threads come in **thread blocks** (not to be confused with blocks of sixteen numbers). Those of one thread
# block have a **shared memory** in common, and they can wait for each other: `__syncthreads()` is a
# **barrier**, which no thread passes before all have come. In this kernel each of 64 threads puts its
# number into a box and takes out the one at the other end:

# %% tags=["varies"]
BACKWARDS = """
extern "C" __global__ void backwards(int *to) {
    __shared__ int box[64];
    box[threadIdx.x] = threadIdx.x;
    __syncthreads();
    to[threadIdx.x] = box[63 - threadIdx.x];
}
"""
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
text = load.compile_text("backwards", {"backwards.cu": BACKWARDS}, "80", folder).ptx

body = text[text.index("{") : text.index("}") + 1]
print(re.sub(r"\n\s*\.loc.*|\n(?=\n)", "", body))
assert "bar.sync" in body

# %% [markdown]
# This is **PTX**, the instruction language that NVIDIA documents, as NVRTC makes it from CUDA C++ for one
# kind of GPU (`80`, also written sm_80, is the A100's). `st.shared` stores to shared memory, `ld.shared`
# loads from it, `bar.sync` is the barrier. NVIDIA's driver would translate it to machine code. We go
# another way: `emulator.ptx`, the **interpreter**, reads this text and does what it says, for all threads,
# on the CPU.

# %%
memory = ptx.Memory()
to = memory.empty(64 * 4)
one_block, threads = (1, 1, 1), (64, 1, 1)
ptx.Module(text).launch("backwards", one_block, threads, [to], memory)
got = to.download(np.int32, (64,))
print(got)
assert (got == np.arange(64)[::-1]).all()

# %% [markdown]
# ## The project's kernels
#
# `gpu/cuda` holds the CUDA sources that run on real GPUs. `Interpreted` runs their PTX here, and `Face`
# gives it the functions that you know from `arcquant_ref`. We do so for two kinds of GPU: sm_120a, RTX
# Blackwell, which has the NVFP4 MMA, and sm_80, which has none and makes the same bits with the MMA for
# fp16, a 16-bit format. Both augment x and multiply by the weights. The bytes must be those of
# `arcquant_ref`, and the product's bits those of `emulator`.

# %%
expected = emulator.matmul(a, b)


def bits_that_differ(y):
    return int((y.view(np.uint32) != expected.view(np.uint32)).sum())


for target, source in (("80", "gemm_portable"), ("120a", "gemm_native")):
    face = Face(Interpreted(target))
    q = face.augment_activations(x, selection)
    codes_differ, scales_differ = (q.codes != a.codes).sum(), (q.block_scales != a.block_scales).sum()
    differ = bits_that_differ(face.matmul(a, b))
    print(f"sm_{target}, by", *set(re.findall(r"mma\.sync[\w.:]*", load.compiled(source, target).ptx)))
    print(f"    codes that differ: {codes_differ} of {q.codes.size}")
    print(f"    scales that differ: {scales_differ} of {q.block_scales.size}")
    print(f"    outputs that differ: {differ} of {expected.size}")
    assert codes_differ == scales_differ == differ == 0

# %% [markdown]
# Two MMAs, the same bits. The interpreter takes its tensor core from the emulator: it is the one of
# notebook [6](06_add.ipynb). So it cannot tell what a Blackwell GPU really does ([what ran
# where](../docs/kernels.md#what-ran-where)). It tells whether a kernel does what it should, given that MMA.

# %% [markdown]
# ## Two ways to be wrong
#
# A kernel can be wrong in its bytes. We give the MMA registers 1 and 2 of A in the wrong order, so that
# lane 5 passes its part of row 1 for one of row 9:

# %%
SOURCES = {path.name: path.read_text() for path in load.SOURCES.glob("*.cu*")}
right_order = '"r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(sfa)'
wrong_order = right_order.replace("a[1]", "a[?]").replace("a[2]", "a[1]").replace("a[?]", "a[2]")
assert SOURCES["ptx.cuh"].count(right_order) == 1

swapped = SOURCES | {"ptx.cuh": SOURCES["ptx.cuh"].replace(right_order, wrong_order)}
differ = bits_that_differ(Face(Changed("120a", swapped, folder)).matmul(a, b))
print(f"{differ} of {expected.size} outputs have other bits")
assert differ > 0

# %% [markdown]
# Nothing stops such a kernel: all reads and writes are allowed. Only a comparison with known bits shows it.
#
# A kernel can also be wrong in its order. Without its barrier, a thread of `backwards` may read the other
# end of the box before the thread there has put anything in. That is a **race**: what comes out depends on
# who is first. On a GPU the right numbers may come out all the same, until they do not. The interpreter
# notes for every byte of shared memory who touched it since the last barrier, and stops:

# %% tags=["varies"]
no_barrier = {"backwards.cu": BACKWARDS.replace("    __syncthreads();\n", "")}
try:
    racing = load.compile_text("backwards", no_barrier, "80", folder).ptx
    ptx.Module(racing).launch("backwards", one_block, threads, [to], memory)
    finding = None
except ptx.Race as race:
    finding = str(race)
print(finding)
assert finding is not None
assert "backwards.cu:5" in finding
assert "thread (63, 0, 0) of its block wrote byte 0 of it, and no barrier lies in between" in finding

# %% [markdown]
# It names the kernel, the line of the PTX, the line of the CUDA source, the instruction, and both threads:
# the one that reads and the one that wrote. (Registers and lines of PTX depend on the version of NVRTC.)
# What it stops at is a **finding**. There are four:
#
# | finding | what it is |
# | --- | --- |
# | `Race` | two threads, one byte, at least one writes, no barrier in between |
# | `Uninitialized` | a read of what nobody has written |
# | `BadAccess` | outside of what was allocated, or not aligned |
# | `Divergence` | a barrier that only some of the threads reach |

# %% [markdown]
# ## Your turn
#
# **Write the swizzle.** `offset(row, s, tiles)` is the byte at which the scale of this row and block lies,
# in a matrix that is `tiles` tiles wide. All you need is in the first picture and in what was said about
# larger matrices. The stub lays the scales out row by row. A layout must be a **bijection**, every byte
# used exactly once; the stub is one, and still wrong.


# %%
def offset(row, s, tiles):
    return row * 4 * tiles + s


# %%
def in_bits(byte):
    return f"{byte} = 0b{byte:012b}" if isinstance(byte, int) else repr(byte)


def judge(offset, rows=256, tiles=3):
    numbers = plots.swizzled(rows, 4 * tiles)  # of the scale at each byte, by arcquant_ref.layout
    inputs = [divmod(number, 4 * tiles) for number in range(len(numbers))]
    got = [offset(row, s, tiles) for row, s in inputs]
    print(f"each of {len(numbers):,} bytes hit exactly once:", set(got) == set(range(len(numbers))))
    for (row, s), byte, right in zip(inputs, got, np.argsort(numbers).tolist()):
        if byte != right:
            got, expected = in_bits(byte), in_bits(right)
            return f"not yet: first wrong input row {row}, s {s}: got {got}, expected {expected}"
    return f"right: all {len(numbers):,} inputs"


print(judge(offset))

# %% [markdown]
# ### An answer


# %% tags=["answer"] jupyter={"source_hidden": true}
def answer(row, s, tiles):
    tile = row // 128 * tiles + s // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + s % 4


verdict = judge(answer)
print(verdict)
assert verdict == "right: all 3,072 inputs"
for name, row, s in (("row 1", 1, 0), ("row 32", 32, 0), ("block 1", 0, 1)):
    print(f"{name:7} lies at byte {answer(row, s, 3):2} = 0b{answer(row, s, 3):09b}")
for row in range(128):
    r = f"{row:07b}"
    assert answer(row, 2, 3) == int(r[2:] + r[:2] + "10", 2)

# %% [markdown]
# Within a tile the bits of the row and of the block only change places: row r₆r₅r₄r₃r₂r₁r₀ and block s₁s₀
# lie at byte r₄r₃r₂r₁r₀r₆r₅s₁s₀. That is why it is a bijection.

# %% [markdown]
# **Plant a race.** The kernels of `augment.cu` augment activations. The threads of a thread block copy a
# row of x into shared memory, each a part of it, and wait for their own copies (`cp_async_wait`); then each
# gathers the sixteen channels of a block, which any thread may have copied. One kernel, with `rmsnorm` in
# its name, divides the row by the root of the mean of its squares in between, and for that the threads add
# up the squares together. Here are their barriers, with what stands before and after:

# %%
AUGMENT = SOURCES["augment.cu"]
BARRIER = "__syncthreads();"
lines = ["", *AUGMENT.splitlines()]  # counted from 1
barriers = [number for number, line in enumerate(lines) if BARRIER in line]
for number in barriers:
    print(*(f"{i:4}  {lines[i]}" for i in range(number - 1, number + 2)), sep="\n", end="\n\n")
assert len(barriers) == AUGMENT.count(BARRIER) == 4

# %% [markdown]
# Write `plant(source)`: it returns the source without one of them. The judge compiles what you return, runs
# the kernels in the interpreter, and wants to see a `Race`.


# %%
def plant(source):
    return source  # for example source.replace(..., ..., 1)


# %%
def found(source):
    """What the interpreter or the compiler says about this augment.cu; None if nothing."""
    face = Face(Changed("120a", SOURCES | {"augment.cu": source}, folder))
    try:
        face.rmsnorm_augment_activations(x[:4], np.ones(selection.K), 1e-5, selection, 0.01)
        face.augment_activations(x[:4], selection)
    except (ptx.PtxError, RuntimeError) as error:
        return error
    return None


def judge_race(plant):
    source = plant(AUGMENT)
    error = found(source)
    if isinstance(error, ptx.Race):
        return f"right: a race, and it is caught\n{error}"
    there = f"{source.count(BARRIER)} of {len(barriers)} barriers are there"
    return f"not yet: {there}; got the finding {error}, expected a race"


print(judge_race(plant))

# %% [markdown]
# ### An answer


# %% tags=["answer", "varies"] jupyter={"source_hidden": true}
def without_line(number):
    return "\n".join(lines[1:number] + lines[number + 1 :])


verdict = judge_race(lambda source: without_line(barriers[0]))
print(verdict, end="\n\n")
assert verdict.startswith("right: a race")
for number in barriers:
    race = found(without_line(number))
    assert isinstance(race, ptx.Race)
    reader, writer = re.findall(r"[Tt]hread \((\d+), 0, 0\)", str(race))
    print(f"without the barrier of line {number:3}: thread {reader} reads what thread {writer} wrote")

# %% [markdown]
# Each of the four is needed, and the interpreter shows for each a thread that would come too early.
# `tests/test_gpu_mutants.py` plants many such bugs in all kernels; each must be found, by a finding or by a
# byte.

# %% [markdown]
# ## What to take away
#
# - Packed codes and swizzled scales lie as a warp's registers want them: eight codes or four scales each.
# - A kernel's PTX runs without a GPU: bits are compared, order is watched. Speed, and what silicon adds, it
#   cannot tell.
# - Next: [Quantize a real language model](08_quantize.ipynb).
