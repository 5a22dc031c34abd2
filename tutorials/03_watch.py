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
# # 3. Watch one outlier spoil fifteen neighbours
#
# Afterwards you can find the outlier channels of a layer's inputs, say what they cost, and choose the ones
# that deserve more bits. 25 minutes. Before: [2, Share one scale among sixteen](02_share.ipynb).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("arcquant_ref") is None:  # in Colab: clone the repository, or open its folder
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[tutorials]"], check=True)

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import arcquant_ref as aq
from arcquant_ref.plots import BLUE, GREY, ORANGE, show
from arcquant_ref.sample import load_sample

# %% [markdown]
# ## One block
#
# These are 16 neighbouring inputs of a real layer, for one token, and their values in NVFP4. The block's
# largest magnitude sets the scale for all of them:

# %%
layers = load_sample()
layer = layers[0]
x = layer.evaluation  # 128 tokens, 576 inputs each
q = aq.quantize(x)
values = aq.dequantize(q)
token, block = 20, slice(240, 256)
step = aq.decode_e4m3(q.block_scales[token, 15]) * q.tensor_scale


def row(name, numbers):
    print(f"{name:14}", *(f"{v:5.2f}" for v in numbers))


print(f"{layer.name}, token {token}, inputs 240 to 255; step {step:.3f}, so up to {step / 4:.3f} becomes 0")
row("x", x[token, block])
row("value", values[token, block])
zeros = values[token, block] == 0
print("zeros:", zeros.sum(), "of 16")
assert zeros.sum() == 14

# %% [markdown]
# One number, −5.78 at 247, needs a scale so large that 14 of its 15 neighbours become 0. What if it were
# not there? The same block with a 0 in its place, under the same tensor scale:

# %%
without = x.copy()
without[:, 247] = 0
q_without = aq.quantize(without, q.tensor_scale)
row("x", without[token, block])
row("value", aq.dequantize(q_without)[token, block])

others = [k for k in range(240, 256) if k != 247]
error_with = np.abs(x - values)[token, others].mean()
error_without = np.abs(without - aq.dequantize(q_without))[token, others].mean()
print(f"mean |error| of the fifteen: {error_with:.4f} beside the large one, {error_without:.4f} without it")
assert error_with > 8 * error_without

# %% [markdown]
# ## It is always the same column
#
# A column of x, one input of the layer over all tokens, is a **channel**. Is 247 large for this token only?

# %%
largest_of_block = np.abs(x[:, block]).argmax(axis=1) == 247 - 240
print(f"channel 247 is the largest of its block for {largest_of_block.sum()} of {len(x)} tokens")
print(f"median |x|: channel 247 {np.median(np.abs(x[:, 247])):.2f}, all channels {np.median(np.abs(x)):.2f}")
assert largest_of_block.sum() == 128
assert np.median(np.abs(x[:, 247])) > 100 * np.median(np.abs(x))

# %% [markdown]
# For all of them. So one can look for such channels in advance. To **calibrate** is to run the layer on
# some other text and to keep the largest |x| of each channel, its `channel_amax`. Here the other text is
# the Declaration of Independence; x comes from the Gettysburg Address. The six largest channels of both:

# %%
channel_amax = aq.calibrate([layer.calibration])
seen = aq.calibrate([layer.evaluation])
six, six_seen = (set(np.argsort(amax)[-6:].tolist()) for amax in (channel_amax, seen))
print("in calibration:", sorted(six))
print("in x:          ", sorted(six_seen))
assert len(six & six_seen) == 5

# %% [markdown]
# ## Which ones count
#
# The rule of the ARCQuant paper (arXiv 2601.07475): a channel is an **outlier** if its `channel_amax` is
# above τ · the largest `channel_amax`, τ = 2⁻³ = 1/8. The paper finds τ from two formats: E5M2, an 8-bit
# format, has 3 bits of exponent more than E2M1.
#
# **S** is the number of outliers, rounded up to a multiple of 16, so that whole blocks come out.
# `aq.select` sorts the channels, the smallest first; the last S of this `order` are the **residual
# channels**; the next notebook says why they are called so.

# %%
for other in layers:
    amax = aq.calibrate([other.calibration])
    selection = aq.select(amax)
    outliers = (amax > amax.max() / 8).sum()
    print(
        f"{other.name:18} K = {len(amax):4d} channels, {outliers:2d} outliers, S = {selection.num_residual}"
    )
    assert selection.num_residual == -(-outliers // 16) * 16
    assert (amax[selection.order] == np.sort(amax)).all()

# %% [markdown]
# ## The picture
#
# Left, the channels of `blk.12.attn_q` by their `channel_amax`. Right, the error |x − value| of some of
# them: 8 blocks, all tokens.

# %%
error = np.abs(x - values)
tau = channel_amax.max() / 8
ascending = np.sort(channel_amax)
is_outlier = ascending > tau

figure = Figure(figsize=(9.5, 4.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
left.semilogy(ascending, color=BLUE)
left.plot(np.flatnonzero(is_outlier), ascending[is_outlier], "^", color=ORANGE, label="outliers")
left.axhline(tau, color=GREY, linestyle="--", label="τ · max = max / 8")
left.axvline(len(ascending) - 16.5, color=GREY, linestyle=":", label="the last S = 16 channels")
left.set(xlabel="channel, smallest channel_amax first", ylabel="channel_amax = largest |x| (no unit)")
left.legend(loc="upper left")
first, last = 208, 336
image = right.imshow(
    error[:, first:last],
    colormaps["viridis"].resampled(6),
    interpolation="nearest",
    aspect="auto",
    vmin=0,
    vmax=0.3,
    extent=(first - 0.5, last - 0.5, 127.5, -0.5),
)
for border in range(first, last, 16):
    right.axvline(border - 0.5, color="white", linewidth=0.6)
for channel in np.flatnonzero(channel_amax > tau):
    if first <= channel < last:
        right.plot(channel, -3, "v", color=ORANGE, clip_on=False)
right.set(xlabel="channel; lines at the borders of blocks, ▼ outliers", ylabel="token")
right.set_xticks(range(first, last + 1, 16))
figure.colorbar(image, ax=right, label="|x − value| (no unit; 0.3 and above yellow)", extend="max")
show(
    figure,
    "Left: 576 channels sorted by their largest input, on a logarithmic axis; six, marked with triangles, "
    "lie above a dashed line at an eighth of the maximum. Right: errors as a map of tokens and channels. Two "
    "stripes are exactly one block wide and have a triangle above: channels 240 to 255, with large errors "
    "for all tokens, and 304 to 319, with smaller ones; the block of the third triangle can hardly be seen.",
)

# %% [markdown]
# The errors of the block with channel 247 beside those of the blocks that contain no outlier:

# %%
blocks_of_outliers = set((np.flatnonzero(channel_amax > tau) // 16).tolist())
by_block = error.reshape(128, 36, 16).mean(axis=(0, 2))
calm = [b for b in range(36) if b not in blocks_of_outliers]
print("blocks with outliers:", {b: round(float(by_block[b]), 3) for b in sorted(blocks_of_outliers)})
print("mean of the others:  ", round(float(by_block[calm].mean()), 3))
assert by_block[15] > 10 * by_block[calm].mean()

# %% [markdown]
# ## What it would save to treat them apart
#
# Suppose that some channels are stored apart, in bfloat16, which holds these inputs exactly, and that there
# are zeros in their places. That costs 16 bits more for each of them, 4.5 + 16 · S / K bits a value with K
# channels in all, and the layer, which multiplies x by its weights, needs a second matrix product for them.
# How large is the error of all others? Take it token by token, ‖x − x̂‖ / ‖x‖ with x̂ the values, and then
# the mean over tokens:


# %%
def apart_error(x, channels):
    rest = x.copy()
    rest[:, channels] = 0
    difference = np.linalg.norm(rest - aq.dequantize(aq.quantize(rest)), axis=1)
    return float((difference / np.linalg.norm(x, axis=1)).mean())


for other in layers:
    selection = aq.select(aq.calibrate([other.calibration]))
    chosen = selection.order[-selection.num_residual :]
    none, some = apart_error(other.evaluation, []), apart_error(other.evaluation, chosen)
    bits = 4.5 + 16 * len(chosen) / selection.K
    print(f"{other.name:18} error {none:.2%}; S = {len(chosen)} apart {some:.2%}, {bits:.2f} bits a value")
    assert some < none
    assert not (other.evaluation.view(np.uint32) & 0xFFFF).any()  # a bfloat16 is the upper half of a float32

# %% [markdown]
# In the last layer it saves almost nothing. Its outliers are large in the first token only, and the rule
# looks at the largest |x| of a channel, not at how often it is large:

# %%
for other in layers:
    amax = aq.calibrate([other.calibration])
    outliers = np.flatnonzero(amax > amax.max() / 8)
    large = (np.abs(other.evaluation[:, outliers]) > amax.max() / 8).any(axis=1)
    print(
        f"{other.name:18} tokens with an input above τ · max in an outlier channel: {large.sum():3d} of 128"
    )
assert np.flatnonzero(large).tolist() == [0]  # of the last layer

# %% [markdown]
# ## Your turn
#
# Choose the channels to store apart, and how many. `choose` gets the `channel_amax` of the calibration text
# and returns channel numbers, at most 64. The judge quantizes the other text, in three layers: your error
# must be less than that of the best of 100 random choices of as many channels.


# %%
def judge(choose):
    rng = np.random.default_rng(0)
    for layer in layers[:3]:
        chosen = np.asarray(choose(aq.calibrate([layer.calibration])))
        x, size = layer.evaluation, len(chosen)
        if size > 64:
            return f"not yet: first wrong input {layer.name}, got {size} channels, expected at most 64"
        got = apart_error(x, chosen)
        best = min(apart_error(x, rng.permutation(x.shape[1])[:size]) for _ in range(100))
        bits = 4.5 + 16 * size / x.shape[1]
        if got >= best:
            return (
                f"not yet: first wrong input {layer.name}, got an error of {got:.2%} with {size} channels at "
                f"{bits:.2f} bits, expected less than {best:.2%}, the best of 100 random choices"
            )
        print(f"{layer.name:18} S = {size}, {bits:.2f} bits: error {got:.2%}, best of 100 random {best:.2%}")
    return "right: all 3 layers"


def choose(channel_amax):
    return range(16)  # yours


print(judge(choose))

# %% [markdown]
# ### An answer


# %% tags=["answer"] jupyter={"source_hidden": true}
def answer(channel_amax):
    outliers = (channel_amax > channel_amax.max() / 8).sum()
    size = -(-outliers // 16) * 16
    return np.argsort(channel_amax)[-size:]


verdict = judge(answer)
print(verdict)
assert verdict == "right: all 3 layers"
for other in layers:
    selection = aq.select(aq.calibrate([other.calibration]))
    expected = selection.order[-selection.num_residual :]
    assert sorted(answer(selection.channel_amax)) == sorted(expected)

# %% [markdown]
# ## What to take away
#
# - A block's largest number sets its step; what is at most a quarter of the
#   step becomes 0.
# - Large inputs come in the same channels; calibration finds them, and τ · max says how many count: S.
# - Apart they cost 16 bits more each and a second product. Next, with 4.5 bits more and one product:
#   [Quantize the error too](04_augment.ipynb).
