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
# # 2. Share one scale among sixteen
#
# Afterwards you can say where the 4.5 bits of a value in NVFP4 go, quantize a block by hand, and find where
# its scale ends. 25 minutes. Before: [1, Read sixteen numbers](01_read.ipynb).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import numpy as np
from matplotlib.figure import Figure

import arcquant_ref as aq
from arcquant_ref.formats import E4M3
from arcquant_ref.plots import BLUE, GREY, ORANGE, show
from arcquant_ref.sample import load_sample

# %% [markdown]
# ## Move the numbers to where the codes are
#
# E2M1 holds 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives. Of these 16 inputs of a real layer most became 0,
# because they are small:

# %%
layers = load_sample()
layer = layers[2]
x = layer.evaluation[10, :16]


def row(name, numbers):
    print(f"{name:22}", *(f"{v:5.2f}" for v in numbers))


alone = aq.decode_e2m1(aq.encode_e2m1(x))
row("x", x)
row("encoded as they are", alone)
print("zeros:", (alone == 0).sum(), " mean |error|:", round(float(np.abs(x - alone).mean()), 3))
assert (alone == 0).sum() == 12

# %% [markdown]
# So divide them by a common **scale** first, and multiply by it afterwards. Which one? The largest
# magnitude of the 16, their **amax**, shall become 6, the largest that E2M1 has. Then scale = amax / 6.

# %%
amax = np.abs(x).max()
scale = amax / 6
codes = aq.encode_e2m1(x / scale)
scaled = aq.decode_e2m1(codes) * scale
print("amax:", amax, " scale:", scale)
row("x / scale", x / scale)
row("nearest in E2M1", aq.decode_e2m1(codes))
row("times scale", scaled)
print("zeros:", (scaled == 0).sum(), " mean |error|:", round(float(np.abs(x - scaled).mean()), 3))
assert np.abs(x / scale).max() == 6
assert (scaled == 0).sum() == 1
assert np.abs(x - scaled).mean() < np.abs(x - alone).mean() / 5

# %% [markdown]
# ## What a scale costs
#
# The scale must be stored as well, or nobody can multiply by it. Neighbours that share one are a **block**.
# A value then takes 4 bits and its part of the scale's:

# %%
print("bits of the scale | values in a block:     8      16      32")
for bits in (32, 16, 8):
    print(f"{bits:17d} |                  ", *(f"{4 + bits / block:7.2f}" for block in (8, 16, 32)))
assert 4 + 8 / 16 == aq.quantize(np.ones((1, 16))).bits_per_value == 4.5

# %% [markdown]
# **NVFP4** takes blocks of 16 and scales of 8 bits: 4.5 bits a value. Smaller blocks fit their numbers
# better and cost more, larger ones cost less. (MXFP4, of the OCP Microscaling Formats 1.0, takes 32 and 8:
# 4.25.)
#
# The 8 bits are a number in E4M3: 4 bits of exponent, 3 of mantissa. So the **block scale** is itself
# rounded, and the largest number of a block need not land on 6 exactly:

# %%
code = aq.encode_e4m3(scale)
rounded = aq.decode_e4m3(code)
print(f"scale {scale:.6f}  ->  code {code:08b}, value {rounded}")
print(f"amax / value = {amax / rounded:.4f}, encoded as {aq.decode_e2m1(aq.encode_e2m1(amax / rounded))}")
assert rounded == 0.140625
assert aq.decode_e2m1(aq.encode_e2m1(amax / rounded)) == 6

# %% [markdown]
# ## A scale for the whole tensor
#
# E4M3 ends at 448. That is a limit: the package has the inputs of four layers of this model (named as in
# the model's file), and one of the fourth is 2944, which would need the scale 490.67.

# %%
for other in layers:
    largest = np.abs(other.evaluation).max()
    print(f"{other.name:18} amax of all inputs {largest:8.2f}   amax / 6 = {largest / 6:7.2f}")
assert np.abs(layers[3].evaluation).max() / 6 > E4M3.max == 448

# %% [markdown]
# So there is a second scale, one float32 number for the whole matrix: the **tensor scale** (tensor is the
# word for arrays of numbers; ours are matrices). With A, the amax of the matrix, it is A / 2688, where 2688
# = 6 · 448. In units of it, the block that contains A gets the scale 448, the largest there is, and all
# others less. 32 bits for a whole matrix are not worth counting.
#
# A value is now a product of three:
#
# value = e2m1(code) · e4m3(block scale) · tensor scale
#
# The last two, multiplied, are the **step**: what a code of value 1 stands for. To **quantize** numbers is
# to find all three; to **dequantize** is to multiply them out. Here for our 16 numbers, beside what the
# package makes of the whole matrix:

# %%
A = np.abs(layer.evaluation).max()
tensor_scale = A / np.float32(2688)
block_scale = aq.encode_e4m3(amax / np.float32(6) / tensor_scale)
step = aq.decode_e4m3(block_scale) * tensor_scale
codes = aq.encode_e2m1(x / step)

q = aq.quantize(layer.evaluation)
print(f"A {A}, tensor scale {tensor_scale:.6f}, block scale {aq.decode_e4m3(block_scale)}, step {step:.6f}")
row("x", x)
print(f"{'codes':22}", *(f" {code:04b}" for code in codes))
row("values", aq.dequantize(q)[10, :16])
assert tensor_scale == q.tensor_scale
assert block_scale == q.block_scales[10, 0]
assert (codes == q.codes[10, :16]).all()

# %% [markdown]
# That is all, in this order of operations ([the numbers](../docs/spec.md), section 3): tensor scale, block
# scale, step, codes. The matrix has 128 rows, one for each token (a word or a piece of one) of a text, and
# 576 columns, the inputs of the layer. These inputs are its **activations**, and the numbers that it
# multiplies them by are its **weights**. What is stored of the matrix:

# %%
packed = aq.layout.pack(q.codes)  # two codes in a byte
total = packed.nbytes + q.block_scales.nbytes + q.tensor_scale.nbytes
print(
    f"codes {packed.nbytes} bytes, block scales {q.block_scales.nbytes}, tensor scale {q.tensor_scale.nbytes}"
)
bits = 8 * total / q.codes.size
print(f"{bits:.4f} bits a value; bfloat16 takes {16 / bits:.2f} times that")
assert packed.nbytes + q.block_scales.nbytes == q.codes.size * 4.5 / 8

# %% [markdown]
# ## The picture
#
# A gradient: 128 numbers, rising to 1, twice as large at the end of each block as at the end of the one
# before. Once they all share one scale, as if they were one block; once in NVFP4, 8 blocks of 16, each with
# a scale of its own.

# %%
gradient = (2.0 ** (np.arange(1, 129) / 16 - 8)).astype(np.float32)[None]
one_for_all = aq.decode_e2m1(aq.encode_e2m1(gradient * 6)) / 6
one_for_sixteen = aq.dequantize(aq.quantize(gradient))
rows = {"x": gradient, "one for all": one_for_all, "one for sixteen": one_for_sixteen}
for name, values in rows.items():
    levels = [np.unique(block).size for block in values.reshape(8, 16)]
    print(f"{name:16} zeros: {(values == 0).sum():2d}, different values in each block: {levels}")
assert (one_for_all == 0).sum() == 54
assert all(np.unique(block).size == 3 for block in one_for_sixteen.reshape(8, 16))

figure = Figure(figsize=(9.5, 6), layout="constrained")
strips, curves = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
brightness = np.log2(np.maximum(np.concatenate(list(rows.values())), 2.0**-9))  # of 0: black
strips.imshow(brightness, "gray", aspect="auto", vmin=-9, vmax=0)
strips.text(26.5, 1, "all 0", color="white", ha="center", va="center")
strips.set_yticks(range(3), list(rows))
strips.set_ylabel("scale")
strips.set_title("The gradient and what is stored of it. Brightness: from 2⁻⁸, dark, to 1, in equal ratios")
k = np.arange(128)
curves.plot(k, gradient[0], color=GREY, linestyle=":", linewidth=2, label="x")
curves.step(k, one_for_all[0], color=ORANGE, linestyle="--", where="mid", label="one scale for all")
curves.step(k, one_for_sixteen[0], color=BLUE, where="mid", label="one scale for sixteen (NVFP4)")
for axes in (strips, curves):
    for border in np.arange(16, 128, 16) - 0.5:
        axes.axvline(border, color=GREY, linewidth=0.8)
curves.set_yscale("symlog", base=2, linthresh=2**-9, linscale=0.5)
curves.set_yticks([0, *2.0 ** np.arange(-8, 1)], ["0", *(f"$2^{{{e}}}$" for e in range(-8, 1))])
curves.minorticks_off()
curves.set_ylim(-(2.0**-10), 1.2)
curves.set(xlabel="k, position in the row; lines at the borders of blocks", ylabel="value (no unit)")
curves.legend(loc="upper left")
show(
    figure,
    "Above, three strips from dark to light: the smooth gradient; with one scale for all, black in its left "
    "part and a few broad bands in its right; with one scale for sixteen, 3 bands in each block of 16. Below "
    "the same as curves: with one scale for all the curve lies at 0 up to k = 53 and then rises in 7 steps; "
    "with one for sixteen it follows x along its whole length, with 3 levels in each block.",
)

# %% [markdown]
# The strips are **posterised**: a smooth gradient in few bands. With one scale, everything up to 1/24 (a
# quarter of a sixth: the first tie) is 0. With a scale for sixteen, each block has bands of its own, and
# small numbers err as little, in proportion, as large ones.

# %%
for name in ("one for all", "one for sixteen"):
    relative = np.abs(rows[name] - gradient) / gradient
    print(f"{name:16} largest |error| / x: {relative.max():.3f}")
assert (np.abs(one_for_all - gradient) / gradient).max() == 1
assert (np.abs(one_for_sixteen - gradient) / gradient).max() < 0.25

# %% [markdown]
# ## Where the scale ends
#
# The least number above 0 in E4M3 is 2⁻⁹. A block that would need a smaller scale, in units of the tensor
# scale, gets 2⁻⁹ all the same: its scale is **floored**, raised to the least there is. (Zero would not do:
# nothing can be divided by it.) The largest block's scale is 448, so this happens to a block whose amax is
# less than the 448 · 2⁹ = 229,376th part of A. Is there one in the package's four layers?

# %%
for other in layers:
    blocks = np.abs(other.evaluation).reshape(-1, 16).max(axis=1)
    least = aq.decode_e4m3(aq.quantize(other.evaluation).block_scales).min()
    ratio = blocks.max() / blocks.min()
    print(f"{other.name:18} A / least amax {ratio:6.0f}   least scale {least * 2**9:4.0f} · 2⁻⁹")
    assert ratio < 448 * 2**9 == 229376
    assert least > 2**-9
rows_of_last = np.abs(layers[3].evaluation).max(axis=1)
print("amax of the rows of the last layer: first", rows_of_last[0], " of all others", rows_of_last[1:].max())
assert rows_of_last[0] > 200 * rows_of_last[1:].max()

# %% [markdown]
# No, but the last layer comes near. Its A, 2944, is in the first row of the matrix, which belongs to the
# first token of the text; the amax of all rows below it is more than 200 times smaller.
#
# ## Your turn
#
# Find a block whose scale is floored: return 32 numbers, two blocks. The scale of the first must be
# floored, and yet not all its codes may be 0. The second is there to set the tensor scale.


# %%
def judge(numbers):
    x = np.float32(numbers).reshape(1, 32)
    q = aq.quantize(x)
    needed = np.abs(x[0, :16]).max() / 6 / q.tensor_scale
    found = f"block 0 needs the scale {needed * 2**9:.3f} · 2⁻⁹ and got code {q.block_scales[0, 0]:08b}"
    if needed >= 2**-9:
        return f"not yet: first wrong input: {found}; expected less than 1 · 2⁻⁹ and 00000001"
    codes = q.codes[0, :16]
    if not (codes & 0b0111).any():
        return f"not yet: {found}, but its codes are all 0000 or 1000; expected one that is not"
    return f"right: {found}; codes {' '.join(f'{code:04b}' for code in codes)}"


def find():
    return [1.0] * 16 + [3000.0] * 16  # yours


print(judge(find()))

# %% [markdown]
# ### An answer


# %% tags=["answer"] jupyter={"source_hidden": true}
def answer():
    # Needed is amax / 6 / (A / 2688) = 448 · amax / A. It must be below 2⁻⁹; and for a code that is not 0,
    # amax must be above ¼ of the scale 2⁻⁹. So A / amax lies between 448 · 2⁹ and 24 · 448 · 2⁹. Here it is 4
    # times the lower limit.
    return [1.0, 0.5, -0.25, *[0.0] * 13] + [4 * 448 * 2**9] * 16


verdict = judge(answer())
print(verdict)
assert verdict.startswith(
    "right: block 0 needs the scale 0.250 · 2⁻⁹ and got code 00000001; codes 0011 0010 1001 0000"
)

# %% [markdown]
# ## What to take away
#
# - A value is e2m1(code) · e4m3(block scale) · tensor scale: 4 bits, 8 bits shared by 16, 32 bits for all.
# - The scale takes the largest of 16 to 6, nearly. It ranges from 2⁻⁹, where it is floored, to 448.
# - The largest sets the scale for all 16. Next:
#   [Watch one outlier spoil fifteen neighbours](03_watch.ipynb).
