"""Schemes: what a layer computes is the augmented product, scheme by scheme, on made and on real layers."""

from dataclasses import replace

import numpy as np
import pytest
from support import model_weights

import emulator
from arcquant_ref import bounds
from arcquant_ref.augment import split
from arcquant_ref.quantize import exact_values
from arcquant_ref.schemes import (
    SCHEMES,
    Layer,
    Scheme,
    augmented_weights,
    natural,
    plans_of,
    quantized,
    selections,
    transformed,
)
from arcquant_ref.select import select_top

BY_LABEL = {scheme.label: scheme for scheme in SCHEMES}
NVFP4_PRODUCTS = [s for s in SCHEMES if s.activations == "nvfp4" and s.weights in ("nvfp4", "searched")]


def made_layer(seed: int = 0, tokens: int = 96, n: int = 48, k: int = 128) -> Layer:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) * np.exp(rng.standard_normal(k))
    x[:, [5, 77]] *= 30
    x = x.astype(np.float16)
    return Layer(
        name="made",
        x=x,
        weights=rng.standard_normal((n, k)).astype(np.float32),
        channel_amax=np.abs(x).max(axis=0).astype(np.float32),
        energy=(x.astype(np.float64) ** 2).mean(axis=0),
        tokens=np.ones(tokens, np.float32),
        outputs=np.ones(n, np.float32),
    )


def ready(scheme: Scheme, layer: Layer):
    before, of = transformed(scheme, layer)
    selection = selections(scheme, [of], lambda: [plans_of(scheme, of, before)])[0]
    return before, of, selection, quantized(scheme, of, before, selection)


def assert_is_the_augmented_product(scheme: Scheme, layer: Layer, tokens: int) -> None:
    """The values that the float32 product multiplies are those of the operands, and their product is within
    the accumulation bound of what a tensor core makes of them: the exact product of the values is computed in
    float64, which adds K' · 2⁻⁵² of Σ |terms|."""
    before, of, selection, q = ready(scheme, layer)
    x = before(layer.x[:tokens].astype(np.float32))
    a, b = emulator.augment_activations(x, selection), augmented_weights(scheme, of, selection)
    values = (
        q.activations(layer.x[:tokens].astype(np.float32)).astype(np.float64),
        q.weights.astype(np.float64),
    )
    exact, magnitude = values[0] @ values[1].T, np.abs(values[0]) @ np.abs(values[1]).T
    rounded = magnitude * (2 * 2.0**-24 + a.shape[1] * 2.0**-52)  # float32 values of codes; the sum here
    difference = np.abs(emulator.matmul(a, b) - exact)
    assert (difference <= bounds.accumulation_bound(a, b) + rounded).all()
    assert a.shape[1] == selection.augmented_K == q.weights.shape[1]


@pytest.mark.parametrize("scheme", NVFP4_PRODUCTS, ids=lambda s: s.label)
def test_a_layer_computes_the_augmented_product(scheme):
    assert_is_the_augmented_product(scheme, made_layer(), 40)


def test_whole_layers_of_the_model_compute_the_augmented_product():
    model_weights()
    from arcquant_ref import texts
    from arcquant_ref.evaluate import calibrate
    from arcquant_ref.model import Llama, find_weights

    model = Llama(find_weights())
    layers = calibrate(model, texts.windows("topics", model.encode, 1, 128))
    for label in ("NVFP4, searched scales", "ARC, τ = 1/8", "two-sided, 1.10, searched scales"):
        for layer in layers[4:8]:  # the four products of a block
            assert_is_the_augmented_product(BY_LABEL[label], layer, 64)


@pytest.mark.parametrize("of_weights", [0, 32])
def test_four_over_six_with_residuals_has_the_layout_of_the_weights(of_weights):
    """Primary and residual parts multiplied one by one: the same sum. With 48 residual channels there are
    pairs to interleave; one block of 16 would lie as it is."""
    scheme, of = BY_LABEL["4/6, two-sided, 1.19, searched"], made_layer()
    weight_channels = np.arange(of_weights)
    selection = replace(select_top(of.channel_amax, 48), weight_channels=weight_channels)
    q, s, x = quantized(scheme, of, lambda x: x, selection), 48, of.x[:8].astype(np.float32)
    primary = emulator.four_over_six(x[:, selection.columns])
    values = exact_values(primary)
    r = emulator.quantize(
        x[:, selection.columns][:, -s:] - values[:, -s:].astype(np.float32), primary.tensor_scale
    )
    first, last = split(augmented_weights(scheme, of, selection), s)
    want = values @ exact_values(first).T + exact_values(r) @ exact_values(last).T
    got = q.activations(x).astype(np.float64) @ q.weights.T
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-20 * np.abs(want).max())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.rotation != "none" or s.smoothing], ids=str)
def test_transforms_keep_the_product(scheme):
    layer = made_layer()
    before, of = transformed(scheme, layer)
    x = layer.x.astype(np.float32)
    want = x.astype(np.float64) @ layer.weights.astype(np.float64).T
    got = before(x).astype(np.float64) @ of.weights.astype(np.float64).T
    magnitude = np.abs(before(x)).astype(np.float64) @ np.abs(of.weights).astype(np.float64).T
    assert (np.abs(got - want) <= 4 * 2.0**-24 * magnitude + 2.0**-20 * np.abs(x).max()).all()


def test_a_plan_removes_more_error_than_the_paper_at_the_same_width():
    """Measured on tokens it has not seen."""
    layer, fresh = made_layer(), made_layer(seed=1)
    fresh = replace(fresh, weights=layer.weights)
    x = fresh.x.astype(np.float32)

    def error(label: str) -> float:
        *_, q = ready(BY_LABEL[label], layer)
        return float(np.linalg.norm(q.activations(x) @ q.weights.T - x @ layer.weights.T))

    assert error("two-sided, 1.19") < error("ARC, S = 16")  # widths 1.125 and 1.125: one block of 16 in 128


def test_the_budget_is_kept_over_layers_of_different_size():
    layers = [made_layer(seed, n=n, k=k) for seed, (n, k) in enumerate([(48, 128), (32, 256), (96, 128)])]
    scheme = BY_LABEL["two-sided, 1.19"]
    chosen = selections(scheme, layers, lambda: [plans_of(scheme, layer, lambda x: x) for layer in layers])
    wide = sum(len(layer.weights) * s.augmented_K for layer, s in zip(layers, chosen))
    plain = sum(layer.weights.size for layer in layers)
    assert plain < wide <= (1 + scheme.size) * plain


def test_labels_are_unique_and_natural_selects_nothing():
    assert len(BY_LABEL) == len(SCHEMES)
    selection = natural(made_layer())
    assert (selection.order == np.arange(128)).all()
    assert selection.augmented_K == 128
