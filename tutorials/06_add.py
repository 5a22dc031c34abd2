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
# # 6. Add like a tensor core
#
# Afterwards you can predict, to the last bit, what one instruction of a GPU makes of 64 NVFP4 products and
# a number, and say where float32 arithmetic gives other bits. 30 minutes. Before: [2, Share one scale among
# sixteen](02_share.ipynb).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import numpy as np
from matplotlib.figure import Figure

import arcquant_ref as aq
import emulator
from arcquant_ref.plots import BLUE, GREY, ORANGE, show
from arcquant_ref.sample import load_sample
from emulator.tensor_core import FP32, HOPPER, RTX_BLACKWELL, SCALE, fields

# %% [markdown]
# ## float32 has no sum
#
# A float32 number has 24 significant bits. After each addition the sum is rounded to them, so a sum of
# three numbers depends on which two come first:

# %%
big, one = np.float32(2**24), np.float32(1)
print(f"{(big + one) + one:.0f} {big + (one + one):.0f}")
assert (big + one) + one != big + (one + one)

# %% [markdown]
# 2²⁴ + 1 needs 25 bits and becomes 2²⁴ again. So there are as many float32 sums as orders. A GPU multiplies
# matrices in its **tensor cores**, and these have another rule altogether: they add 64 products *at once*.
# Which bits come out?
#
# ## One instruction
#
# An **MMA** (matrix multiply-accumulate) is one instruction of a tensor core, D = A Bᵀ + C. The one for
# NVFP4 takes 16 rows of A, 8 rows of B, and 64 columns of both. (In PTX, NVIDIA's instruction language, its
# name is `mma.sync.aligned.m16n8k64 … kind::mxf4nvf4`.) Each of the 16 · 8 outputs is the sum of 64
# products and a float32 number C. The 64 products are four **groups** of 16, and each group has two block
# scales, one from A and one from B.
#
# The package has an **emulator**, which computes the bits of tensor cores on a CPU; its `mma_m16n8k64` is
# this MMA. We need only one output at a time, so `core` fills all rows with the same numbers.
# `float32_sums` does the same with float32 additions in four orders. (The products themselves are exact in
# float32: they have at most 12 significant bits.)


# %%
def core(a, b, scales_a, scales_b, c):
    """One output of the MMA: 64 and 64 E2M1 codes, 4 and 4 E4M3 codes, a float32."""
    a, scales_a = (np.tile(x, (16, 1)) for x in (a, scales_a))
    b, scales_b = (np.tile(x, (8, 1)) for x in (b, scales_b))
    return emulator.mma_m16n8k64(a, b, scales_a, scales_b, np.full((16, 8), c, np.float32))[0, 0]


def chain(numbers):
    return np.cumsum(np.array(numbers, np.float32), dtype=np.float32)[-1]


def pairs(numbers):
    return numbers[0] if len(numbers) == 1 else pairs(numbers[::2] + numbers[1::2])


def float32_sums(a, b, scales_a, scales_b, c):
    scales = np.repeat(aq.decode_e4m3(scales_a) * aq.decode_e4m3(scales_b), 16)
    products = aq.decode_e2m1(a) * aq.decode_e2m1(b) * scales
    groups = [chain(group) for group in products.reshape(4, 16)]
    return {
        "C, then left to right": chain([c, *products]),
        "right to left, then C": chain([*products[::-1], c]),
        "in pairs, then C": chain([pairs(products), c]),
        "group by group, then C": chain([*groups, c]),
    }


def bits(x):
    return f"{np.float32(x).view(np.uint32):032b}"


# %% [markdown]
# Here are inputs with large numbers that cancel: group 0 is 65536, group 1 is −65536, group 2 is about 48,
# group 3 is tiny, and C is 0.8.

# %%
a, b = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
a[[0, 16, 32, 33, 34, 48]] = aq.encode_e2m1(np.float32([1, 1, 6, 4, 1.5, 0.5]))
b[[0, 16, 32, 33, 34, 48]] = aq.encode_e2m1(np.float32([1, -1, 6, 1.5, 0.5, 0.5]))
scales_a, scales_b = np.uint8([0x78, 0x78, 0x39, 0x07]), np.uint8([0x78, 0x78, 0x38, 0x05])
example = (a, b, scales_a, scales_b, np.float32(0.8))

for name, codes in (("A", scales_a), ("B", scales_b)):
    print(f"scales of {name}", *(f"{scale:g}" for scale in aq.decode_e4m3(codes)))
for order, total in float32_sums(*example).items():
    print(f"float32, {order:<24} {total:.7f}  {bits(total)}")
print(f"tensor core                       {core(*example):.7f}  {bits(core(*example))}")
assert len(set(float32_sums(*example).values())) == 3
assert core(*example) not in float32_sums(*example).values()

# %% [markdown]
# Three different float32 results, and the tensor core has a fourth. We now do its arithmetic by hand.
#
# ## Everything is an integer
#
# Take group 2. Its products are 6 · 6, 4 · 1.5 and 1.5 · 0.5, together 42.75. E2M1 values are multiples of
# 1/2, so their products are multiples of 1/4, and their sum is an integer of quarters, 171. A scale is an
# integer of eighths, its **significand** (8 + mantissa), times 2 to the power of its **exponent** (notebook
# 1). The emulator's `fields` takes a code apart into these two. So the group is 171/4 · 9/8 · 8/8 = 171 · 9
# · 8 · 2⁻⁸, nothing rounded. A subnormal scale lacks the 8 and has the exponent −6.

# %%
print("scale 1.125:", fields(scales_a[2], SCALE), "  scale 1.0:", fields(scales_b[2], SCALE))
print("subnormal scale 7 · 2⁻⁹:", fields(scales_a[3], SCALE))
print(171 * 9 * 8, 171 * 9 * 8 * 2**-8, 42.75 * 1.125)
assert fields(scales_a[2], SCALE) == (9, 0)
assert fields(scales_a[3], SCALE) == (7, -6)
assert 171 * 9 * 8 * 2**-8 == 42.75 * 1.125

# %% [markdown]
# In the same way C is a 24-bit integer times a power of two. `terms_of` writes all five terms as integer ·
# 2^(exponent − fraction bits): 8 fraction bits for a group, 23 for C. The exponent of a group is the sum of
# the exponents of its two scales, *whatever its products are*. Only if all 16 products are zero, or a scale
# is, has the group no exponent. Then we write −139, less than any other.

# %%
NONE = -139


def terms_of(a, b, scales_a, scales_b, c):
    """Groups 0 … 3 and C as (integer, fraction bits, exponent)."""
    quarters = (4 * aq.decode_e2m1(a) * aq.decode_e2m1(b)).astype(int).reshape(4, 16)
    terms = []
    for group, scale_a, scale_b in zip(quarters, scales_a, scales_b):
        (m_a, e_a), (m_b, e_b) = fields(scale_a, SCALE), fields(scale_b, SCALE)
        nothing = not group.any() or m_a * m_b == 0
        terms.append((int(group.sum()) * m_a * m_b, 8, NONE if nothing else e_a + e_b))
    integer, exponent = fields(np.float32(c).view(np.uint32), FP32)
    return [*terms, (integer, 23, exponent if c != 0 else NONE)]


terms = terms_of(*example)
names = ["group 0", "group 1", "group 2", "group 3", "C"]
for name, (integer, fraction, exponent) in zip(names, terms):
    value = integer * 2.0 ** (exponent - fraction)
    print(f"{name:<8} exponent {exponent:3}   {integer:9} · 2^{exponent - fraction:<4} = {value:.10g}")
assert terms[2] == (171 * 9 * 8, 8, 0)
assert terms[4] == (13421773, 23, -1)

# %% [markdown]
# ## Align, cut, add, cut
#
# The tensor core adds the five terms like this:
#
# 1. E is the largest of the five exponents.
# 2. **Align**: of each term it keeps the multiple of 2^(E − 35) and cuts off what lies below. Cutting is
#    toward zero, for negative numbers too. There is no rounding to nearest.
# 3. It adds the five integers exactly.
# 4. It cuts the sum to 24 significant bits, toward zero again. That is D. Zero is +0.
#
# In the example E is 16, so everything is counted in units of 2⁻¹⁹:

# %%
unit = 2.0**-19
group_0, group_1, group_2 = 65536 * 2**19, -65536 * 2**19, 12312 * 2**11  # no bits below the unit
group_3 = 35 // 2  # 35 · 2⁻²⁰
c = 13421773 // 2**5  # 13421773 · 2⁻²⁴
total = group_0 + group_1 + group_2 + group_3 + c
print(f"group 3: {35 / 2} -> {group_3},  C: {13421773 / 2**5} -> {c}")
print(f"sum {total}, {total.bit_length()} bits; the last one must go: {total // 2 * 2}")
print(f"D = {total // 2 * 2 * unit:.7f}   {bits(total // 2 * 2 * unit)}")
assert total.bit_length() == 25
assert bits(total // 2 * 2 * unit) == bits(core(*example))

# %% [markdown]
# These are the bits of the emulator. Group 0 and group 1 cancel and leave nothing in D, but their exponent
# has cost C five bits and group 3 one.
#
# Where do the rules come from? They are those of MMA-Sim ([arXiv
# 2511.10909](https://arxiv.org/abs/2511.10909), release 2.1), a model that its authors made from tests of
# GPUs. Its rules for the MMA of Hopper GPUs for fp16, a 16-bit format, have been compared with results of
# the hardware and agree. For the NVFP4 MMA of RTX Blackwell GPUs no results are public, and nothing here
# has run on such a GPU: the 35 bits are the model's word. [docs/emulator.md](../docs/emulator.md) says what
# was compared with what. The emulator's numbers for both:

# %%
for name, parameters in (("Hopper, fp16", HOPPER), ("RTX Blackwell, NVFP4", RTX_BLACKWELL)):
    print(f"{name:<21} {parameters.fraction_bits} bits below E, groups of {parameters.group}")
assert (HOPPER.fraction_bits, RTX_BLACKWELL.fraction_bits) == (25, 35)

# %% [markdown]
# ## A group that cancels is not a group of zeros
#
# The exponent counts even where the products of one group cancel. We add C = 0.8 to a group 1 · 1 − 1 · 1
# under the scales 256 and 256, then to a group of zeros under the same scales. (That zeros have no exponent
# is the least certain rule of the model: it changed between its releases.)

# %%
a, b = np.zeros((2, 64), np.uint8)
a[:2], b[:2] = aq.encode_e2m1(np.float32([1, 1])), aq.encode_e2m1(np.float32([1, -1]))
large = np.full(4, 0x78, np.uint8)
cancelling = core(a, b, large, large, 0.8)
zeros = core(0 * a, b, large, large, 0.8)
print(f"products cancel  {bits(cancelling)}  {cancelling:.8f}")
print(f"no products      {bits(zeros)}  {zeros:.8f}")
assert zeros == np.float32(0.8) != cancelling

# %% [markdown]
# ## Does it matter?
#
# The product of matrices with K columns is a chain of MMAs, 64 columns each: D of one is C of the next. For
# each of the four layers of notebook 2 we compute 128 · 32 outputs and compare them with the exact sum,
# rounded once. The tensor scales multiply at the very end, and are 1 here.


# %%
def unscaled(x):
    q = aq.quantize(x)
    return aq.NVFP4Tensor(codes=q.codes, block_scales=q.block_scales, tensor_scale=1)


print("layer                tensor core inexact   float32 left to right inexact   of")
inexact = 0
for layer in load_sample():
    x, w = unscaled(layer.evaluation), unscaled(layer.weight[:32])
    exact = aq.matmul(x, w)
    products = aq.dequantize(x)[:, None] * aq.dequantize(w)
    left_to_right = np.cumsum(products, axis=-1, dtype=np.float32)[..., -1]
    by_core, by_float32 = (emulator.matmul(x, w) != exact).sum(), (left_to_right != exact).sum()
    print(f"{layer.name:<18} {by_core:21} {by_float32:31}   {exact.size}")
    inexact += by_core
assert 0 < inexact < 10

# %% [markdown]
# Hardly ever: nearly all these sums, and the sums on the way, fit into 24 bits. This means that ordinary
# data *cannot tell* a right model of the tensor core from a wrong one. To test a kernel one needs scales
# far apart, and C far from the groups. You will make such inputs below.
#
# ## The picture
#
# The example, bit by bit.

# %%
figure = Figure(figsize=(10.5, 4), layout="constrained")
axes = figure.subplots()
lines = [*((name, i, e - f, -19) for name, (i, f, e) in zip(names, terms)), ("sum → D", total, -19, -18)]
for y, (_, integer, last, kept_from) in enumerate(lines):
    digits = f"{abs(integer):b}"
    for i, digit in enumerate(digits):
        place = last + len(digits) - 1 - i
        cut = place < kept_from
        axes.broken_barh(
            [(place - 0.5, 1)], (y - 0.35, 0.7), facecolor="white" if cut else BLUE,
            alpha=0.7 if cut else 0.3, hatch="/////" if cut else "", edgecolor=ORANGE if cut else "white",
        )  # fmt: skip
        axes.text(place, y, digit, ha="center", va="center", fontsize=9, weight="bold" if cut else "normal")
    axes.text(last + len(digits), y, "−" if integer < 0 else "+", ha="center", va="center", fontsize=9)
axes.plot([-19.5, -19.5], [-0.8, 4.5], color=ORANGE, linestyle="--")
axes.text(-19.7, -0.85, "below 2^(E − 35)", color=ORANGE, fontsize=9, va="center")
axes.axhline(4.5, color=GREY, linewidth=0.8)
axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
axes.set(xlabel="n, place of the bit 2ⁿ", ylabel="term", xlim=(18.5, -25.5), ylim=(5.6, -1.2))
axes.set_xticks(range(16, -25, -4))
show(
    figure,
    "The five terms of the example and their sum, one digit for each bit. E = 16, so bits below 2⁻¹⁹ are cut "
    "off (hatched): five of C and one of group 3. The sum has 25 bits and loses its last one to become D.",
)
assert [e - f < -19 for _, f, e in terms] == [False, False, False, True, True]
assert total % 2 == 1

# %% [markdown]
# ## Your turn
#
# **Find.** Give inputs for which all four float32 orders have the *same* bits and the tensor core has
# others. All scales 1 will do. The stub adds 2⁻³⁰ to 1, and everyone agrees.


# %%
def my_inputs():
    a, b = np.zeros((2, 64), np.uint8)
    a[0] = b[0] = 2  # the code of 1.0
    scales = np.full(4, 0x38, np.uint8)  # 1.0
    return a, b, scales, scales, np.float32(2**-30)


def judge_inputs(inputs):
    by_float32, by_core = {bits(total) for total in float32_sums(*inputs()).values()}, bits(core(*inputs()))
    if len(by_float32) > 1:
        return f"not yet: float32 itself has {len(by_float32)} results: {', '.join(sorted(by_float32))}"
    if by_core in by_float32:
        return f"not yet: first wrong input: float32 and the core got {by_core}, expected different bits"
    return f"right: float32 {by_float32.pop()} in every order, tensor core {by_core}"


print(judge_inputs(my_inputs))

# %% [markdown]
# **Predict.** Write steps 1 to 4 as a function of the five terms, with integers only up to the last line:
# return D as a Python float. The stub adds in float64 and leaves the rounding to float32, to nearest.


# %%
def my_predict(terms):
    return sum(integer * 2.0 ** (exponent - fraction) for integer, fraction, exponent in terms)


# %% [markdown]
# The judge compares 3,840 outputs with the emulator's. Its inputs are of the kinds that can tell: scales
# far apart, subnormal scales, groups that cancel, groups of zeros, and C at every distance from the largest
# exponent. (No NaN or infinity: the emulator has rules for them, too.)


# %%
def hard_inputs():
    rng = np.random.default_rng(6)
    for kind in 6 * ["ordinary", "far apart", "subnormal", "cancelling", "zeros"]:
        a, b = rng.integers(0, 16, (16, 64), np.uint8), rng.integers(0, 16, (8, 64), np.uint8)
        some = {"ordinary": [0x30, 0x3B, 0x45], "subnormal": [1, 2, 5, 7, 8]}
        choices = np.uint8(some.get(kind, [0x01, 0x07, 0x3F, 0x7E]))
        scales_a, scales_b = rng.choice(choices, (16, 4)), rng.choice(choices, (8, 4))
        if kind == "cancelling":
            a[:, 1:32:2] = a[:, 0:32:2]  # groups 0 and 1: each product, and minus it
            b[:, 1:32:2] = b[:, 0:32:2] ^ 8
        if kind == "zeros":
            a[:, :16], scales_a[:, 0] = 0, 0x7E
        exponents = np.maximum(scales_a >> 3, 1)[:, None].astype(int) + np.maximum(scales_b >> 3, 1) - 14
        away = rng.choice([-36, -35, -26, -14, -13, -12, -11, 0, 1, 11, 26, 27, 28, 29], (16, 8))
        c = np.ldexp(rng.integers(2**23, 2**24, (16, 8)), exponents.max(axis=-1) + away - 23)
        yield kind, a, b, scales_a, scales_b, (c * rng.choice([-1, 0, 1, 1], (16, 8))).astype(np.float32)


def judge(predict):
    n = 0
    for kind, a, b, scales_a, scales_b, c in hard_inputs():
        d = emulator.mma_m16n8k64(a, b, scales_a, scales_b, c)
        for i, j in np.ndindex(d.shape):
            terms = terms_of(a[i], b[j], scales_a[i], scales_b[j], c[i, j])
            got = predict(terms)
            if bits(got) != bits(d[i, j]):
                return (
                    f"not yet: first wrong input: {kind}, terms\n{terms}\n"
                    f"got      {bits(got)}\nexpected {bits(d[i, j])}"
                )
            n += 1
    return f"right: all {n:,} inputs"


print(judge(my_predict))

# %% [markdown]
# ### An answer


# %% tags=["answer"] jupyter={"source_hidden": true}
def answer_inputs():
    """1 and three quarters of its last bit: the nearest float32 is above, but the tensor core cuts."""
    a, b, scales_a, scales_b, _ = my_inputs()
    return a, b, scales_a, scales_b, np.float32(1.5 * 2**-24)


def cut(integer, shift):
    """integer · 2^shift, toward zero."""
    magnitude = abs(integer) << shift if shift >= 0 else abs(integer) >> -shift
    return magnitude if integer > 0 else -magnitude


def answer(terms):
    top = max(exponent for _, _, exponent in terms)
    total = sum(cut(integer, 35 - fraction - (top - exponent)) for integer, fraction, exponent in terms)
    spare = max(abs(total).bit_length() - 24, 0)
    return cut(total, -spare) * 2.0 ** (top - 35 + spare)


for verdict in (judge_inputs(answer_inputs), judge(answer)):
    print(verdict)
    assert verdict.startswith("right")
assert verdict == "right: all 3,840 inputs"

# %% [markdown]
# ## What to take away
#
# - A tensor core adds 64 products and C at once: align to the largest exponent, keep 35 bits below it, cut,
#   add, cut.
# - It is neither float32 in some order nor exact, and only unusual inputs show it.
# - Next, how the codes get there: [Run it on a GPU you may not have](07_run.ipynb).
