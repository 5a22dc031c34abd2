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
# # 4. Quantize the error too
#
# Afterwards you can give the largest channels of a layer a second set of 4-bit codes, for the error of the
# first, and have one ordinary matrix product use both. This is ARC, augmented residual channels, the method
# of the paper [arXiv 2601.07475](https://arxiv.org/abs/2601.07475). 30 minutes. Before: [3, Watch one
# outlier spoil fifteen neighbours](03_watch.ipynb).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import numpy as np
from matplotlib.figure import Figure

import arcquant_ref as aq
from arcquant_ref import demo
from arcquant_ref.augment import split
from arcquant_ref.gemm import integer_matmul
from arcquant_ref.plots import BLUE, GREY, ORANGE, show
from arcquant_ref.quantize import exact_values
from arcquant_ref.sample import load_sample

np.set_printoptions(precision=2, suppress=True, linewidth=110, floatmode="fixed")

# %% [markdown]
# ## What is left over
#
# The package holds the activations and weights of four layers of a language model, SmolLM2-135M. We take
# one. Its activations `x` have a row for each token and a column for each of K = 576 channels, its weights
# `w` a row for each output; the layer computes x wᵀ. As in notebook 3, `select` sorts the channels by their
# largest |x| on calibration text, `channel_amax`. Those above τ = 1/8 of the maximum are outliers, and S is
# their number, rounded up to a multiple of 16.

# %%
layer = next(layer for layer in load_sample() if layer.name == "blk.29.ffn_up")
x, w = layer.evaluation, layer.weight
selection = aq.select(aq.calibrate([layer.calibration]))
K, S = selection.K, selection.num_residual
in_order = x[:, selection.order]  # ascending channel_amax: the outliers are last

amax = selection.channel_amax
print(f"x {x.shape}, w {w.shape}; {(amax > amax.max() / 8).sum()} channels above τ · max, so S = {S}")
assert (K, S) == (576, 16)

# %% [markdown]
# Here are the last 16 channels of the first token, one block. Its amax is 31.25. The step is the block
# scale times the tensor scale, and a number's value is what its code stands for (0, ½, 1, 1½, 2, 3, 4 or 6,
# with a sign) times the step. Every number up to a quarter of the step becomes 0.

# %%
q = aq.quantize(in_order)
block = in_order[0, -16:]
value = exact_values(q)[0, -16:]  # float64, so that nothing more is rounded
step = float(aq.decode_e4m3(q.block_scales[0, -1]) * q.tensor_scale)

print(f"step     {step:.4f}")
print(f"x      {block}")
print(f"value  {value}")
print(f"x - value\n       {block - value}")
assert (value == 0).sum() == 13
assert 24 < block.max() / abs(block - value).max() < 24.1

# %% [markdown]
# The last line is the **residual**. Thirteen of its numbers are x itself: the block says nothing about
# them. But the residual has no outlier any more. Its own amax is 1.30, a twenty-fourth of the first.
#
# ## Quantize it once more
#
# The residual is a block of 16 numbers like any other, so it can have codes and a scale of its own.

# %%
residual = (block - value).astype(np.float32)
r = aq.quantize(residual[None], q.tensor_scale)
second_step = float(aq.decode_e4m3(r.block_scales[0, 0]) * r.tensor_scale)
left = block - value - exact_values(r)[0]

print(f"second step  {second_step:.4f}")
print(f"x                  {block}")
print(f"value + residual's {value + exact_values(r)[0]}")
print(f"largest error: {abs(residual).max():.3f} without residual, {abs(left).max():.3f} with it")
assert 24 < step / second_step < 25
assert abs(left).max() < abs(residual).max() / 24

# %% [markdown]
# The second step is about 25 times smaller, and so is the largest error. A number now has two codes of 4
# bits, its **primary** code P and its residual code R, each with its share of a scale: 9 bits instead of
# 4.5. That is affordable because only the last S channels need it.
#
# Note the second argument of `quantize`: the residual uses the tensor scale of the primary codes. It must,
# because of where we put R next.
#
# ## Two products in one
#
# The layer needs x wᵀ, and x is nearly P + R, taken by their values. So (P + R) wᵀ = P wᵀ + R wᵀ is two
# products. They are one product of longer rows: append R to P, and append w to w once more.

# %%
P, R, small_w = np.array([[10, 20]]), np.array([[1, 2]]), np.array([[3, 4], [5, 6]])
apart = P @ small_w.T + R @ small_w.T
together = np.hstack([P, R]) @ np.hstack([small_w, small_w]).T
print(apart, together)
assert (apart == together).all()

# %% [markdown]
# Only S channels have residuals, so R has S columns, and of w we append the same S. Notebook 3 stored these
# channels apart, for 16 bits more each and a second product. Here it is 4.5 bits more each, and the GPU
# sees one NVFP4 product of **depth** K' = K + S, the number of columns of the two matrices that it
# multiplies, its **operands**. An operand has one tensor scale, which is why R shares that of P. On the
# weight side the codes and scales of the S columns stand there twice, copied. To **augment** is to append
# all this.

# %%
a = aq.augment_activations(x, selection)
b = aq.augment_weights(w, selection)
print(f"activations {x.shape} -> {a.shape}, weights {w.shape} -> {b.shape}")
print(f"bits per activation: 4.5 · (K + S) / K = {selection.bits_per_value}")
assert (a.shape, b.shape) == ((128, K + S), (256, K + S))
assert selection.bits_per_value == 4.625

# %% [markdown]
# ## The layout
#
# R is not appended at the very end. The order is: first the K − S channels without residual, then for each
# block of 16 residual channels its primary codes and at once its residual codes, P₀ R₀ P₁ R₁ … A GPU that
# has just quantized a block still holds its residual, and writes both next to each other. For the weights
# it is W₀ W₀ W₁ W₁ …
#
# To see it, we take a matrix whose blocks are easy to tell apart: K = 64, S = 32, block number i (of 0 … 3)
# holds the constant i + 1. Their amaxes ascend, so the order of the channels stays.

# %%
easy = np.repeat(np.float32([[1, 2, 3, 4]]), 16, axis=1)
chosen = aq.select_top(aq.calibrate([easy]), 32)
blocks_of_a = exact_values(aq.augment_activations(easy, chosen))[0, ::16]
blocks_of_b = exact_values(aq.augment_weights(easy, chosen))[0, ::16]
print("activations, first value of each block:", blocks_of_a)
print("weights,     first value of each block:", blocks_of_b)
assert blocks_of_b[2] == blocks_of_b[3]
assert blocks_of_b[4] == blocks_of_b[5]
assert abs(blocks_of_a[2] + blocks_of_a[3] - 3) < 0.01
assert blocks_of_a[5] == 0

# %% [markdown]
# Six blocks: two without residual, then P₀ R₀ P₁ R₁. P₀ is 2.86 instead of 3, and R₀ the 0.14 that it
# lacks. R₁ is 0, because 4 is the tensor's largest number and has no error.
#
# ## One product, exactly
#
# Is the long product the sum of the two? Yes, and exactly. An E2M1 value is a multiple of 1/2 and a block
# scale one of 2⁻⁹, so each product of two values is a whole multiple of 2⁻²⁰ times the two tensor scales.
# The package adds these whole numbers in `int64`, without any rounding. `split` takes an augmented tensor
# apart.

# %%
primary, residual_part = split(a, S)
weights, outlier_weights = split(b, S)
long = integer_matmul(a, b)
short = integer_matmul(primary, weights)
extra = integer_matmul(residual_part, outlier_weights)
print(f"K + S = {K + S}: {long[0, :3]}\nK     = {K}: {short[0, :3]}\nS     =  {S}: {extra[0, :3]}")
assert (long == short + extra).all()
assert (primary.codes == aq.quantize(in_order).codes).all()  # P is plain NVFP4 of the channels in order

# %% [markdown]
# All 128 · 256 outputs agree to the last bit: Y' = P Ŵᵀ + R Ŵₒᵀ, with Ŵ the quantized weights and Ŵₒ their
# last S columns.
#
# ## What it buys
#
# The **output error** is ‖y − ŷ‖ / ‖y‖ of a token, averaged over the 128 tokens. Part of it comes from the
# weights, which have 4 bits too. Residuals of the activations cannot remove that part. So we also print the
# error with exact activations, once with the weights' channels as they come and once in ARC's order.

# %%
print("layer               S   NVFP4     ARC   exact x   exact x, w quantized in ARC's order")
won = {}
for each in load_sample():
    chosen = aq.select(aq.calibrate([each.calibration]))
    results = [
        demo.nvfp4(each.evaluation, each.weight),
        demo.arc(each.evaluation, each.weight, chosen),
        demo.w4a16(each.evaluation, each.weight),
        demo.w4a16_reordered(each.evaluation, each.weight, chosen),
    ]
    errors = [100 * demo.output_error(each.evaluation, each.weight, one.y_hat) for one in results]
    won[each.name] = errors[1] < errors[0]
    print(
        f"{each.name:<18} {chosen.num_residual:2}  {errors[0]:5.2f}%  {errors[1]:5.2f}%  {errors[2]:7.2f}%"
        f"   {errors[3]:5.2f}%"
    )
assert sum(won.values()) == 3
assert not won["blk.0.attn_output"]

# %% [markdown]
# ARC wins in three layers of four. In `blk.0.attn_output` it loses, and the last column says why: sorting
# the channels also changes which *weights* share a block and a scale, and there this alone costs more than
# the residuals win back.

# %% [markdown]
# ## The picture
#
# Above: the operands for S = 64, which shows the layout better than 16 (the authors' code rounds S up to
# multiples of 64). Every block is drawn, its width to scale. Below: what each S costs and what it buys. (S
# = 0 is NVFP4 with the channels in order. In this layer the order alone lowers the error.)

# %%
drawn = 64
plain, pairs = (K - drawn) // 16, drawn // 16
figure = Figure(figsize=(9, 7.4), layout="constrained")
diagram, curve = figure.subplots(2, 1, height_ratios=[1, 1.2])

rows = {"x, sorted\nK = 576": "P", "activations\nK' = 640": "PR", "weights\nK' = 640": "WW"}
for y, letters in zip((2, 1, 0), rows.values()):
    diagram.broken_barh(
        [(16 * i, 16) for i in range(plain)], (y - 0.3, 0.6), facecolor="white", edgecolor=GREY
    )
    what = "that stand there once" if letters == "WW" else "without residual"
    diagram.text(8 * plain, y, f"{plain} blocks of 16 {what}", ha="center", va="center",
                 bbox={"color": "white", "pad": 2})  # fmt: skip
    for i in range(pairs * len(letters)):
        letter, number = letters[i % len(letters)], i // len(letters)
        second = len(letters) == 2 and i % 2 == 1
        diagram.broken_barh(
            [(16 * (plain + i), 16)], (y - 0.3, 0.6), facecolor=ORANGE if second else BLUE, alpha=0.35,
            hatch="////" if second else "", edgecolor="black",
        )  # fmt: skip
        name = ("x" if y == 2 else letter) + "₀₁₂₃"[number]
        above_or_below = y + 0.41 if y == 2 else y - 0.41
        diagram.text(16 * (plain + i) + 8, above_or_below, name, ha="center", va="center", fontsize=8)
for i in range(pairs):  # where the primary block of x goes
    diagram.plot([16 * (plain + i) + 8, 16 * (plain + 2 * i) + 8], [1.7, 1.3], color=BLUE, linewidth=1)
diagram.set_yticks([2, 1, 0], rows)
diagram.set(xlabel="position along K' (columns)", ylabel="operand", xlim=(0, 640), ylim=(-0.6, 2.6))

sizes = [0, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 576]


def output_error(result):
    return 100 * demo.output_error(x, w, result.y_hat)


errors = [output_error(demo.arc(x, w, aq.select_top(amax, size))) for size in sizes]
limit = output_error(demo.w4a16_reordered(x, w, selection))
as_they_come = output_error(demo.nvfp4(x, w))
curve.axhline(as_they_come, color=GREY, label="NVFP4, channels as they come")
curve.plot(sizes, errors, color=BLUE, marker="o", label="ARC")
curve.plot(S, errors[sizes.index(S)], color=ORANGE, marker="*", markersize=16, linestyle="", label="S by τ")
curve.plot(drawn, errors[sizes.index(drawn)], color=ORANGE, marker="s", linestyle="", label="S drawn above")
curve.axhline(limit, color=BLUE, linestyle=":", label="exact x, w in ARC's order")
curve.set(xlabel="residual channels S", ylabel="output error, mean over tokens (%)", ylim=(0, 14))
bits_axis = curve.secondary_xaxis(
    "top", functions=(lambda s: 4.5 * (K + s) / K, lambda bits: bits * K / 4.5 - K)
)
bits_axis.set(xlabel="bits per activation", xticks=np.arange(4.5, 9.5, 0.5))
curve.legend(frameon=False, loc="lower left", ncols=2)
show(
    figure,
    "Above: each of the last four blocks of x gets a hatched residual block R right behind its primary block "
    "P; the same four blocks of the weights stand there twice. Below: the first 16 residual channels remove "
    "almost half of what 576 can remove, at 4.6 instead of 9 bits per activation. What remains with all 576, "
    "the dotted line, is the weights' error.",
)
assert errors[0] < as_they_come
assert 0.45 < (errors[0] - errors[1]) / (errors[0] - errors[-1]) < 0.5
assert errors[-1] - limit < 0.1

# %% [markdown]
# ## Your turn
#
# Write both functions. `x` and `w` are float32; the order and S are `selection.order` and
# `selection.num_residual`. Use `aq.quantize` and `exact_values`, which gives a tensor's values in float64.
# Take the residual in float64 and round it to float32 once. S may be 0, and then `x[:, -S:]` is all of x.
#
# Codes have a column for each channel, block scales one for 16 channels. The stub has the outlines and
# forgets the residuals: it appends zeros.


# %%
def my_augment_activations(x, selection):
    q = aq.quantize(x[:, selection.order])
    s = selection.num_residual
    return aq.NVFP4Tensor(
        codes=np.hstack([q.codes, np.zeros((len(x), s), np.uint8)]),
        block_scales=np.hstack([q.block_scales, np.zeros((len(x), s // 16), np.uint8)]),
        tensor_scale=q.tensor_scale,
    )


def my_augment_weights(w, selection):
    return my_augment_activations(w, selection)


# %% [markdown]
# The judge compares your codes and scales with the package's, on small matrices with outliers and on the
# layer. Then it checks the identity.


# %%
def inputs():
    rng = np.random.default_rng(4)
    for k, s in [(16, 16), (32, 16), (64, 0), (64, 32), (96, 96)]:
        x, w = (rng.standard_normal((4, k)).astype(np.float32) for _ in range(2))
        x[:, rng.choice(k, 3, replace=False)] *= 40
        yield x, w, aq.select_top(aq.calibrate([x]), s)
    yield layer.evaluation, layer.weight, selection


def difference(got, expected):
    """Where two tensors part, in words; None if nowhere."""
    if got.codes.shape != expected.codes.shape:
        return f"got K' = {got.codes.shape[1]}, expected {expected.codes.shape[1]}"
    for part, digits in (("codes", 4), ("block_scales", 8)):
        one, other = getattr(got, part), getattr(expected, part)
        if (one != other).any():
            i, j = np.argwhere(one != other)[0]
            return f"{part}[{i}, {j}]: got {one[i, j]:0{digits}b}, expected {other[i, j]:0{digits}b}"
    if got.tensor_scale != expected.tensor_scale:
        return f"tensor scale: got {got.tensor_scale}, expected {expected.tensor_scale}"
    return None


def judge(augment_activations, augment_weights):
    for x, w, chosen in inputs():
        a, b = augment_activations(x, chosen), augment_weights(w, chosen)
        for name, got, expected in (
            ("activations", a, aq.augment_activations(x, chosen)),
            ("weights", b, aq.augment_weights(w, chosen)),
        ):
            if wrong := difference(got, expected):
                s = chosen.num_residual
                return f"not yet: first wrong input: {name}, K = {chosen.K}, S = {s}: {wrong}"
        (p, r), (w_hat, w_o) = split(a, chosen.num_residual), split(b, chosen.num_residual)
        two = integer_matmul(p, w_hat) + (integer_matmul(r, w_o) if chosen.num_residual else 0)
        if (integer_matmul(a, b) != two).any():
            return "not yet: the long product is not the sum of the two"
    return f"right: all {len(list(inputs()))} inputs, and each long product is exactly the sum of the two"


print(judge(my_augment_activations, my_augment_weights))

# %% [markdown]
# ### An answer


# %% tags=["answer"] jupyter={"source_hidden": true}
def woven(primary, extra, width):
    """Columns in blocks of `width`: P … P, then P₀ E₀ P₁ E₁ …"""
    blocks = np.hsplit(primary, primary.shape[1] // width)
    extras = np.hsplit(extra, extra.shape[1] // width)
    first = len(blocks) - len(extras)
    pairs = [block for pair in zip(blocks[first:], extras) for block in pair]
    return np.hstack(blocks[:first] + pairs)


def with_appended(p, extra_codes, extra_scales):
    return aq.NVFP4Tensor(
        codes=woven(p.codes, extra_codes, 16),
        block_scales=woven(p.block_scales, extra_scales, 1),
        tensor_scale=p.tensor_scale,
    )


def answer_activations(x, selection):
    x, s = x[:, selection.order], selection.num_residual
    p = aq.quantize(x)
    if s == 0:
        return p
    residual = (x - exact_values(p)).astype(np.float32)
    r = aq.quantize(residual[:, -s:], p.tensor_scale)
    return with_appended(p, r.codes, r.block_scales)


def answer_weights(w, selection):
    p, s = aq.quantize(w[:, selection.order]), selection.num_residual
    return with_appended(p, p.codes[:, -s:], p.block_scales[:, -(s // 16) :]) if s else p


verdict = judge(answer_activations, answer_weights)
print(verdict)
assert verdict.startswith("right")

# %% [markdown]
# ## What to take away
#
# - A residual has no outlier, so a second set of 4-bit codes is fine where the first was coarse.
# - P₀ R₀ P₁ R₁ … against W₀ W₀ W₁ W₁ … is one NVFP4 product of depth K + S, equal to two products exactly.
# - How large can the error still be? Next: [Prove a bound by trying everything](05_prove.ipynb).
