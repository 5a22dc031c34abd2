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
# # 1. Read sixteen numbers
#
# Afterwards you can read each of the sixteen numbers that 4 bits hold, and round any number to one of them
# as the hardware does. 20 minutes. No notebook before this one; you know Python and a little NumPy.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import itertools

import numpy as np
from matplotlib.figure import Figure

import arcquant_ref as aq
import emulator
from arcquant_ref.formats import E2M1, E4M3
from arcquant_ref.plots import BLUE, GREY, ORANGE, show
from arcquant_ref.sample import load_sample

# %% [markdown]
# ## Sixteen codes
#
# 4 bits make 16 patterns. A pattern is a **code**; the number that it stands for is its **value**, and to
# look that up is to **decode** it. The format that says which code has which value is **E2M1**, one kind of
# FP4, a 4-bit floating-point number (OCP Microscaling Formats 1.0, section 5.3.3).

# %%
codes = np.arange(16, dtype=np.uint8)
values = aq.decode_e2m1(codes)
for code, value in zip(codes, values):
    print(f"code {code:2d} = {code:04b}   value {value:4.1f}")

# %% [markdown]
# There are no other numbers in this format: no 2.3, no 5, no 7. Two things to see in the list:
#
# - The second half repeats the first with a minus sign. The top bit is the **sign**, so 0 exists twice, as
#   0 and as −0. A value without its sign is a **magnitude**.
# - Below the sign, a larger code has a larger value, and the distance to the next value grows: ½, then 1,
#   then 2.

# %%
print("values   ", values[:8])
print("distances", np.diff(values[:8]))
assert (np.diff(values[:8]) == [0.5, 0.5, 0.5, 0.5, 1, 1, 2]).all()
assert (values[8:] == -values[:8]).all()
assert np.signbit(values[8])

# %% [markdown]
# ## One code by hand
#
# Take code 0101, which has the value 3. Its bits are `0 | 10 | 1`: a **sign** (0 is plus), two bits of
# **exponent** and one bit of **mantissa**. That is the name: 2 bits of E, 1 bit of M.
#
# - The exponent field 10 is the number 2. The format subtracts 1, its **bias**: the exponent is 2 − 1 = 1,
#   and the factor 2¹ = 2.
# - The mantissa 1 stands for ½ and is added to a 1 that is not stored: 1 + ½.
#
# Together (1 + ½) · 2 = 3. The same for all codes whose exponent field is not 00:

# %%
for code in codes[2:8]:
    exponent, mantissa = code >> 1, code & 1
    value = (1 + mantissa / 2) * 2.0 ** (int(exponent) - 1)
    print(f"0 {exponent:02b} {mantissa}   (1 + {mantissa}/2) · 2^({exponent} - 1) = {value}")
    assert value == values[code]
assert E2M1.bias == 1

# %% [markdown]
# With the 1 that is not stored, no code could have the value 0. So the exponent field 00 means something
# else: no such 1, and the same factor as field 01, which is 2⁰ = 1. The values 0 · 1 and ½ · 1 remain: 0
# and ½. A number without the 1 is called **subnormal**. Thanks to it the values near 0 are evenly spaced.

# %%
for code in codes[:2]:
    print(f"0 00 {code & 1}   (0 + {code & 1}/2) · 2^(1 - 1) = {(code & 1) / 2}")
    assert (code & 1) / 2 == values[code]

# %% [markdown]
# Other widths make other formats by the same rule. E4M3, an 8-bit number with 4 bits of exponent and 3 of
# mantissa, serves as a scale in the next notebook. In it, the pattern with all exponent and mantissa bits
# set is no number: NaN, "not a number".

# %%
for format in (E2M1, E4M3):
    print(f"{format.name}: {format.bits} bits, bias {format.bias}, {len(format.magnitudes)} values from 0 up")
    print(f"      the least above 0 is {format.least_positive}, the largest {format.max}")
assert (E2M1.max, E4M3.max, E4M3.least_positive) == (6, 448, 2**-9)
assert np.isnan(aq.decode_e4m3(np.uint8(0b01111111)))

# %% [markdown]
# ## The nearest one
#
# To **encode** a number is to find the code with the nearest value. 2.3 lies between 2 and 3:

# %%
x = 2.3
print(f"{x} - 2 = {x - 2:.1f},  3 - {x} = {3 - x:.1f}")
code = aq.encode_e2m1(x)
print(f"code {code:04b}, value {aq.decode_e2m1(code)}")
assert aq.decode_e2m1(code) == 2

# %% [markdown]
# What about 2.5? It lies halfway: a **tie**. The rule is **ties to even**: of the two codes take the even
# one, whose last bit is 0. Between 2 (code 0100) and 3 (code 0101) that is 2; between 3 (0101) and 4 (0110)
# it is 4. So one tie goes down, the next one up. `E2M1.midpoints` has all seven above 0:

# %%
for tie in E2M1.midpoints:
    below = np.searchsorted(E2M1.magnitudes, tie) - 1
    code = aq.encode_e2m1(tie)
    lower, upper = values[below], values[below + 1]
    print(f"{tie:4}   {lower} is {below:04b}, {upper} is {below + 1:04b}   takes {code:04b}, {values[code]}")
    assert tie == (lower + upper) / 2
    assert code in (below, below + 1)
    assert code % 2 == 0

# %% [markdown]
# Why not always up, as at school? Because the errors would add up. Take as many of each tie between 0 and
# 2: rounded up they all gain ¼; to even, the gains and losses cancel.

# %%
ties = E2M1.midpoints[:4]
always_up = E2M1.magnitudes[1:5]
to_even = aq.decode_e2m1(aq.encode_e2m1(ties))
print("ties             ", ties)
print("error, always up ", always_up - ties, "mean", (always_up - ties).mean())
print("error, to even   ", to_even - ties, "mean", (to_even - ties).mean())
assert (always_up - ties).mean() == 0.25
assert (to_even - ties).mean() == 0

# %% [markdown]
# Two cases remain. Beyond 6 there is no next value: everything there becomes 6, it **saturates**. And zero
# keeps its sign.

# %%
for x in (5.5, 7.0, 1000.0, -1000.0, 0.0, -0.0):
    code = aq.encode_e2m1(x)
    print(f"{x:7}   code {code:04b}   value {aq.decode_e2m1(code)}")
assert aq.encode_e2m1([7, 1000, -1000, -0.0]).tolist() == [0b0111, 0b0111, 0b1111, 0b1000]

# %% [markdown]
# ## The picture
#
# A **rounding bin** is the set of numbers that get the same code. Its borders are the ties, and the rule
# for ties says to which of two bins a border belongs.

# %%
figure = Figure(figsize=(9.5, 3.2), layout="constrained")
axes = figure.subplots()
borders = [0, *E2M1.midpoints, 7.5]
for code, (left, right) in enumerate(itertools.pairwise(borders)):
    even = {"color": BLUE, "alpha": 0.35}
    odd = {"color": "white", "hatch": "///", "edgecolor": GREY}
    axes.barh(0, right - left, 0.8, left, **(odd if code % 2 else even))
    value = values[code]
    axes.plot(value, 0, marker="o", color="black")
    axes.text(value, -0.52, f"{code:04b}", ha="center", va="top", fontsize=9)
for tie in E2M1.midpoints:
    target = values[aq.encode_e2m1(tie)]
    axes.plot(tie, 0.62, marker="v", color=ORANGE)
    axes.annotate(
        "", (target, 0.62), (tie, 0.62), arrowprops={"arrowstyle": "->", "color": ORANGE, "linewidth": 2}
    )
    axes.text(tie, 0.78, f"{tie:g}", ha="center", fontsize=9, color=ORANGE)
axes.text(6.25, 0, "and all beyond →", va="center", backgroundcolor="white")
axes.set(xlim=(-0.15, 7.6), ylim=(-0.95, 1.1), yticks=[], xticks=values[:8])
axes.set_xlabel("x (no unit); ticks are the eight values ≥ 0, below each bin its code")
axes.set_title("Which x gets which code: even codes plain, odd codes hatched")
show(
    figure,
    "The numbers from 0 to 7.5 cut into eight bins, one for each code from 0000 to 0111, with a dot at the "
    "value. Bins are wider where the values lie farther apart. At each border an arrow points to the value "
    "that a tie takes: always into a bin with an even code, shown plain; the hatched bins of odd codes own "
    "none of their borders.",
)

# %% [markdown]
# ## Sixteen real numbers
#
# A layer of a language model takes a row of numbers and multiplies it by a matrix. Here are 16 neighbours
# in such a row, from a real model (SmolLM2-135M-Instruct, layer `blk.29.ffn_up`; the numbers are part of
# the package), each encoded by itself:

# %%
layer = load_sample()[2]
x = layer.evaluation[10, :16]
got = aq.decode_e2m1(aq.encode_e2m1(x))
assert layer.name == "blk.29.ffn_up"
print("x    ", *(f"{v:5.2f}" for v in x))
print("value", *(f"{v:5.1f}" for v in got))
print("error", *(f"{v:5.2f}" for v in x - got))
print(f"{(got == 0).sum()} of 16 became 0; magnitudes in use: {np.unique(np.abs(got))} of {values[:8]}")
assert (got == 0).sum() == 12

# %% [markdown]
# Most of them lie below ¼, the first tie, and became 0; the codes of 1½ and above are not used at all. The
# format has enough numbers, but not where these inputs are. [The next notebook](02_share.ipynb) moves them
# there.
#
# ## Your turn
#
# Write `encode`: one Python float in, its code 0 … 15 out, **without a table** of values or of ties and
# without the package. The judge tries all 65,536 numbers of **bfloat16**, in which language models often
# compute: the upper 16 of the 32 bits of a float32. Every tie is among them, both zeros, both infinities,
# which saturate, and NaN. For NaN follow the hardware, which returns 0111, whatever its sign.
#
# What helps: `math.copysign(1, x)` sees the sign of −0. `math.frexp(x)` gives m and e with x = m · 2ᵉ and ½
# ≤ |m| < 1, so our exponent is e − 1. Python's `round` takes ties to even. And codes are in the order of
# their values, so one more in the mantissa, carried into the exponent where it overflows, is always the
# next larger value.

# %%
INPUTS = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)  # every upper half, lower half 0
EXPECTED = emulator.encode_e2m1(INPUTS)  # the package's other encoder: unlike aq's, it takes infinity and NaN


def judge(encode):
    for i, (x, expected) in enumerate(zip(INPUTS.tolist(), EXPECTED.tolist())):
        got = encode(x)
        if got != expected:
            shown = f"{got:04b}" if isinstance(got, int) else repr(got)
            return (
                f"not yet: first wrong input {x} = bfloat16 0x{i:04x}, got {shown}, expected {expected:04b}"
            )
    return f"right: all {len(INPUTS):,} inputs"


def encode(x):
    return 0b0000  # yours


print(judge(encode))

# %% [markdown]
# ### An answer

# %% tags=["answer"] jupyter={"source_hidden": true}
import math


def answer(x):
    if math.isnan(x):
        return 0b0111
    sign = 0b1000 if math.copysign(1, x) < 0 else 0
    magnitude = min(abs(x), 6)
    exponent = max(math.frexp(magnitude)[1] - 1, 0)  # 0, 1, 2; subnormals have the distances of exponent 0
    distance = 2.0**exponent / 2  # between neighbouring values here
    # In distances, a value is 2 + mantissa (0 + mantissa if subnormal); each exponent before had 2 codes.
    # A tie goes to the even multiple, which is the even code.
    return sign | round(magnitude / distance) + 2 * exponent


verdict = judge(answer)
print(verdict)
assert verdict == "right: all 65,536 inputs"

# %% [markdown]
# ## What to take away
#
# - A code is sign, exponent, mantissa; E2M1 has eight magnitudes, 0 to 6, close together near 0 and wider
#   apart above.
# - Encoding takes the nearest value; ties go to the even code, what lies beyond 6 saturates.
# - Next: [Share one scale among sixteen](02_share.ipynb).
