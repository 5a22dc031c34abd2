"""What a quantized layer of a model computes under each scheme that `arcquant model` compares.

All quantization is the emulator's. A layer becomes a product of stored values: activations(x) (T, K') times
weights (N, K'), in float32; tests hold it to the emulator's augmented product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import emulator

from .augment import block_order
from .baselines import INT4_BITS, MXFP4_BITS, MXFP8_BITS, hadamard, smoothing
from .formats import BLOCK, NVFP4_BITS, Float32, Float64
from .plan import Plan, error_energy, plan, share
from .select import Selection, select, select_top
from .tensor import NVFP4Tensor

Format = Literal["exact", "nvfp4", "searched", "four over six", "mxfp8", "mxfp4", "int4"]
BITS = {"exact": 16.0} | dict.fromkeys(("nvfp4", "searched", "four over six"), NVFP4_BITS)
BITS |= {"mxfp8": MXFP8_BITS, "mxfp4": MXFP4_BITS, "int4": INT4_BITS}
PLAIN: dict[str, Callable[[Float32], Float32]] = {
    "exact": lambda x: x,
    "nvfp4": lambda x: emulator.dequantize(emulator.quantize(x)),
    "four over six": lambda x: emulator.dequantize(emulator.four_over_six(x)),
    "mxfp8": emulator.mxfp8,
    "mxfp4": emulator.mxfp4,
    "int4": emulator.int4,
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One row of the comparison.

    residuals  none; "tau": the paper's rule; "top": the `size` channels of largest amax of a layer, or all;
               "two-sided": a plan, whose extra columns cost `size` times the plain products of all layers;
               "activations": the same, but only activations are repaired
    rotation   size of the Hadamard blocks that x and w are multiplied with; "full": the largest that fits
    smoothing  SmoothQuant's α
    """

    label: str
    activations: Format = "nvfp4"
    weights: Format = "nvfp4"
    residuals: Literal["none", "tau", "top", "activations", "two-sided"] = "none"
    size: float = 0
    rotation: int | Literal["none", "full"] = "none"
    smoothing: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """What calibration knows of the linear layers that read one input, stacked along N.

    x        (T, K) calibration inputs, as they are before any transform
    weights  (N, K)
    tokens   (T,) how much the loss depends on this layer's output at a token; mean 1
    outputs  (N,) mean of the squared gradient of the loss by an output
    """

    name: str
    x: NDArray[np.float16]
    weights: Float32
    channel_amax: Float32
    energy: Float64
    tokens: Float32
    outputs: Float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """A layer ready to run: y = activations(x) @ weights.T"""

    activations: Callable[[Float32], Float32]
    weights: Float32
    selection: Selection


def transformed(scheme: Scheme, layer: Layer) -> tuple[Callable[[Float32], Float32], Layer]:
    """What happens to x before it is quantized, and what else is known of the layer as it is after that."""
    rotation = scheme.rotation
    if rotation != "none":
        return lambda x: hadamard(x, rotation), replace(layer, weights=hadamard(layer.weights, rotation))
    if scheme.smoothing is not None:
        factors = smoothing(layer.channel_amax, np.abs(layer.weights).max(axis=0), scheme.smoothing)
        smooth = replace(
            layer,
            weights=layer.weights * factors,
            channel_amax=layer.channel_amax / factors,
            energy=layer.energy / factors.astype(np.float64) ** 2,
        )
        return lambda x: x / factors, smooth
    return lambda x: x, layer


def selections(scheme: Scheme, layers: list[Layer], plans: Callable[[], list[list[Plan]]]) -> list[Selection]:
    """The selection of every layer, already transformed; `plans` are asked for only where they are needed.

    A layer that saw no token keeps its channels as they are, without residuals.
    """
    if scheme.residuals == "tau":
        return [select(layer.channel_amax) for layer in layers]  # of no amax none is above 0
    if scheme.residuals == "top":
        return [
            select_top(layer.channel_amax, min(int(scheme.size), len(layer.energy)) if len(layer.x) else 0)
            for layer in layers
        ]
    if scheme.residuals in ("two-sided", "activations"):
        made = plans()
        made_for = zip(layers, loads(layers))  # a load of 0 has no steps to pay
        costs = [BLOCK * len(layer.weights) * (load or 1) for layer, load in made_for]
        products = sum(layer.weights.size * load for layer, load in zip(layers, loads(layers)))
        shared = share(made, costs, scheme.size * products)
        return [of[i].selection(n, layer.channel_amax) for of, (i, n), layer in zip(made, shared, layers)]
    return [natural(layer) for layer in layers]


def loads(layers: list[Layer]) -> list[float]:
    """Which part of the calibration tokens each layer sees: 1, except for experts."""
    most = max(len(layer.x) for layer in layers)
    return [len(layer.x) / most for layer in layers]


def natural(layer: Layer) -> Selection:
    """Channels as they are, no residuals."""
    return Selection(order=np.arange(len(layer.energy)), num_residual=0, channel_amax=layer.channel_amax)


def plans_of(scheme: Scheme, layer: Layer, before: Callable[[Float32], Float32]) -> list[Plan]:
    """A plan for each of three channel orders: as they are, the 16 of largest amax last, by mean square."""
    amax, k = layer.channel_amax, len(layer.energy)
    if len(layer.x) == 0:
        return [Plan(order=np.arange(k), energy=0.0, steps=[])]
    largest = np.argsort(amax, kind="stable")[k - BLOCK :]
    natural_order = np.arange(k)
    largest_last = np.concatenate([np.setdiff1d(natural_order, largest), largest])
    orders = [natural_order, largest_last, np.argsort(layer.energy, kind="stable")]
    made = []
    for order in orders:
        of = replace(natural(layer), order=order)
        w_hat = emulator.dequantize(augmented_weights(scheme, layer, of))
        x = before(layer.x.astype(np.float32))[:, order]
        activation = error_energy(x - PLAIN["nvfp4"](x), w_hat, layer.tokens, layer.outputs)
        weight = error_energy(x, layer.weights[:, order] - w_hat, layer.tokens, layer.outputs)
        if scheme.residuals == "activations":
            weight = np.zeros_like(weight)
        made.append(plan(order, activation, weight))
    return made


def augmented_weights(scheme: Scheme, layer: Layer, selection: Selection) -> NVFP4Tensor:
    return emulator.augment_weights(
        layer.weights, selection, layer.energy if scheme.weights == "searched" else None
    )


def quantized(scheme: Scheme, layer: Layer, before: Callable, selection: Selection) -> Quantized:
    """The layer, already transformed, under this scheme and selection."""
    if scheme.weights in ("nvfp4", "searched"):
        weights = emulator.dequantize(augmented_weights(scheme, layer, selection))
    else:
        weights = PLAIN[scheme.weights](layer.weights)
    if scheme.activations == "nvfp4":

        def activations(x: Float32) -> Float32:
            return emulator.dequantize(emulator.augment_activations(before(x), selection))

    elif scheme.activations == "four over six":

        def activations(x: Float32) -> Float32:
            return four_over_six(before(x)[:, selection.columns], selection.num_residual)

    else:

        def activations(x: Float32) -> Float32:
            return PLAIN[scheme.activations](before(x)[:, selection.columns])

    return Quantized(activations=activations, weights=weights, selection=selection)


def four_over_six(x: Float32, s: int) -> Float32:
    """(T, K) → (T, K + s): the values of `augment_activations`, the primary blocks scaled by the 4/6 rule."""
    primary = emulator.four_over_six(x)
    values = emulator.dequantize(primary)
    if s == 0:
        return values
    r = emulator.quantize(x[:, -s:] - values[:, -s:], primary.tensor_scale)
    both = np.concatenate([values, emulator.dequantize(r)], axis=1).reshape(len(x), -1, BLOCK)
    return both[:, block_order(x.shape[1], s)].reshape(len(x), -1)


def _residuals(searched: bool) -> list[Scheme]:
    """The paper's selection and the plan at the same widths, and the ablation of one side."""
    weights: Format = "searched" if searched else "nvfp4"
    also = ", searched scales" if searched else ""
    paper = [Scheme(label=f"ARC, S = {s}{also}", weights=weights, residuals="top", size=s) for s in TOP]
    rule = Scheme(label=f"ARC, τ = 1/8{also}", weights=weights, residuals="tau")
    two = [
        Scheme(label=f"two-sided, {1 + size:.2f}{also}", weights=weights, residuals="two-sided", size=size)
        for size in WIDTHS
    ]
    one = Scheme(
        label=f"plan, activations only, 1.10{also}", weights=weights, residuals="activations", size=0.1
    )
    return [*paper, rule, *two, one]


TOP = 16, 32, 64, 128, 256, 384
WIDTHS = 0.05, 0.1, 0.19, 0.35, 0.55, 0.75
SCHEMES = [
    Scheme(label="float32", activations="exact", weights="exact"),
    Scheme(label="NVFP4"),
    Scheme(label="NVFP4, searched scales", weights="searched"),
    Scheme(label="W4A16", activations="exact"),
    Scheme(label="W4A16, searched scales", activations="exact", weights="searched"),
    Scheme(label="W16A4", weights="exact"),
    Scheme(label="W4A8: MXFP8 x NVFP4", activations="mxfp8"),
    Scheme(label="W4A8, searched scales", activations="mxfp8", weights="searched"),
    *_residuals(searched=True),
    *_residuals(searched=False),
    Scheme(label="MXFP8 x MXFP4", activations="mxfp8", weights="mxfp4"),
    Scheme(label="MXFP4", activations="mxfp4", weights="mxfp4"),
    Scheme(label="INT4, groups of 128", activations="int4", weights="int4"),
    Scheme(label="Hadamard 16 + NVFP4", rotation=16),
    Scheme(label="Hadamard full + NVFP4", rotation="full"),
    Scheme(label="SmoothQuant 0.5 + NVFP4", smoothing=0.5),
    Scheme(label="SmoothQuant 0.75 + NVFP4", smoothing=0.75),
    Scheme(label="SmoothQuant 0.5, searched scales", smoothing=0.5, weights="searched"),
    Scheme(
        label="SmoothQuant 0.5, two-sided, 1.10, searched",
        smoothing=0.5,
        weights="searched",
        residuals="two-sided",
        size=0.1,
    ),
    Scheme(label="4/6", activations="four over six", weights="four over six"),
    Scheme(label="4/6 activations, searched scales", activations="four over six", weights="searched"),
    *(
        Scheme(
            label=f"4/6, two-sided, {1 + size:.2f}, searched",
            activations="four over six",
            weights="searched",
            residuals="two-sided",
            size=size,
        )
        for size in (0.05, 0.1, 0.19)
    ),
    Scheme(
        label="4/6, ARC τ, searched scales", activations="four over six", weights="searched", residuals="tau"
    ),
]
