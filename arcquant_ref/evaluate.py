"""`arcquant model`: a language model under many quantization schemes. Needs the extra `model`.

Perplexity is exp of the mean loss over windows that are read on their own; every scheme reads the same ones,
so differences are paired. Results are written after each scheme, and what a file holds is not run again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import texts
from .formats import Float32, Float64
from .model import WEIGHTS, Llama, find_weights
from .model_results import FULL_PRECISION, Comparison, fingerprint
from .moe import MixtureOfExperts
from .plan import Plan
from .schemes import BITS, Layer, Quantized, Scheme, loads, plans_of, quantized, selections, transformed


def sites(model: Llama) -> dict[str, list[str]]:
    """Site → the linear layers there, in the order of their rows: what the model says."""
    return model.sites()


def stacked(model: Llama, names: Sequence[str]) -> Float32:
    return np.concatenate([model.weights[f"{name}.weight"].numpy() for name in names])


def calibrate(model: Llama, windows: NDArray[np.int64]) -> list[Layer]:
    """What the layers of all sites see over (count, length) windows, and how the loss depends on them.

    An expert sees the tokens routed to it. One that sees none has no rows, amax 0, and energy 1 everywhere:
    searched scales weigh its channels alike.
    """
    where, count = sites(model), windows.size
    weights = {site: stacked(model, names) for site, names in where.items()}
    # Whole from the start: small pieces that stay, among large ones that go, would hold on to memory
    x = {site: np.empty((count, w.shape[1]), np.float16) for site, w in weights.items()}
    tokens = {site: np.empty(count, np.float32) for site in where}
    squares = {site: np.zeros(len(w), np.float32) for site, w in weights.items()}
    seen = dict.fromkeys(where, 0)
    for window in tqdm(windows, "calibration", disable=None):
        inputs, gradients = _backward(model, torch.from_numpy(window))
        for site, names in where.items():
            if names[0] not in inputs:
                continue
            squared = torch.cat([gradients[name] ** 2 for name in names], dim=1)
            rows = slice(seen[site], seen[site] + len(squared))
            seen[site] = rows.stop
            x[site][rows] = inputs[names[0]].half().numpy()
            squares[site] += squared.sum(dim=0).numpy()
            tokens[site][rows] = squared.sum(dim=1).numpy()
    for site in where:
        _refuse_beyond_float16(site, x[site][: seen[site]])
    return [
        Layer(
            name=site,
            weights=weights[site],
            outputs=squares[site] / np.float32(count),
            **_inputs(x[site][: seen[site]], tokens[site][: seen[site]]),
        )
        for site in where
    ]


def _refuse_beyond_float16(site: str, x: NDArray[np.float16]) -> None:
    if not np.isfinite(x).all():
        raise ValueError(
            f"{(~np.isfinite(x)).sum()} calibration inputs of {site} are NaN or beyond float16, in which "
            f"they are kept (65504). Calibrate on another text, or check the model's weights."
        )


def _inputs(x: NDArray[np.float16], tokens: Float32) -> dict[str, Any]:
    """What a layer's inputs say of its channels, and the weights of its tokens with mean 1."""
    if len(x) == 0:
        k = x.shape[1]
        return {"x": x, "tokens": tokens, "channel_amax": np.zeros(k, np.float32), "energy": np.ones(k)}
    return {
        "x": x,
        "tokens": tokens / tokens.mean(),
        "channel_amax": np.abs(x).max(axis=0).astype(np.float32),
        "energy": np.mean(x.astype(np.float64) ** 2, axis=0),
    }


def _backward(model: Llama, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The input of every linear layer, and the gradient of the summed loss by its output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
        y = x @ w.T
        (y.retain_grad if y.requires_grad else y.requires_grad_)()
        inputs[name], outputs[name] = x.detach(), y
        return y

    with observed(model, observe):
        F.cross_entropy(model.forward(ids)[:-1], ids[1:], reduction="sum").backward()
    return inputs, {name: torch.as_tensor(y.grad) for name, y in outputs.items()}


@contextmanager
def observed(model: Llama, linear: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """The model with this in the place of x @ w.T."""
    plain, model.linear = model.linear, linear
    try:
        yield
    finally:
        model.linear = plain


def losses(model: Llama, windows: NDArray[np.int64], layers: dict[str, Quantized] | None = None) -> Float64:
    """Mean loss of each (length,) window, with these layers quantized; (count,) float64."""
    found = []
    with quantizing(model, layers):
        for window in tqdm(windows, "windows", leave=False, disable=None):
            ids = torch.from_numpy(window)
            found.append(float(F.cross_entropy(model.logits(ids)[:-1], ids[1:])))
    return np.array(found)


@contextmanager
def quantizing(model: Llama, layers: dict[str, Quantized] | None) -> Iterator[None]:
    """The model with the layers of all sites quantized; as it is with none."""
    if not layers:
        yield
        return
    where = {n: (site, i) for site, names in sites(model).items() for i, n in enumerate(names)}
    parts: dict[str, list[Tensor]] = {}
    for site, names in sites(model).items():
        rows = [len(model.weights[f"{name}.weight"]) for name in names]
        parts[site] = list(torch.from_numpy(layers[site].weights).split(rows))
    made: dict[str, Any] = {"x": None}

    def linear(name: str, x: Tensor, w: Tensor) -> Tensor:
        site, i = where[name]
        if made["x"] is not x:
            quantized_x = torch.from_numpy(layers[site].activations(x.flatten(0, -2).numpy()))
            made.update(x=x, activations=quantized_x.unflatten(0, x.shape[:-1]))
        return made["activations"] @ parts[site][i].T

    with observed(model, linear):
        yield


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read: the model's file (SmolLM2's if none), texts and how many windows of them."""

    model: Path | None = None
    calibration: str = "wikipedia"
    calibration_windows: int = 16
    texts: Sequence[str] = ("wikipedia",)
    windows: int = 32
    length: int = 512
    part: str = "evaluation"


def opened(path: Path | None) -> Llama:
    """The model of a GGUF file, of a folder, or of `arcquant moe -o`, a single *.safetensors; SmolLM2 for
    None."""
    if path is not None and path.is_file() and path.suffix == ".safetensors":
        return MixtureOfExperts.load(path)
    return Llama(path or find_weights())


def run(reading: Reading, schemes: Sequence[Scheme], path: Path) -> dict[str, Any]:
    """Evaluate what the file at `path` does not hold yet; returns all it holds then."""
    model = opened(reading.model)
    count = reading.calibration_windows
    calibration = texts.windows(reading.calibration, model.encode, count, reading.length, "calibration")
    evaluation = {
        name: texts.windows(name, model.encode, reading.windows, reading.length, reading.part)
        for name in reading.texts
    }
    settings = {
        "model": reading.model.name if reading.model else f"SmolLM2-135M-Instruct, {WEIGHTS}",
        "calibration": f"{reading.calibration}, {count} x {reading.length} tokens",
        "calibration tokens": fingerprint(calibration),
    }
    if isinstance(model, MixtureOfExperts):  # trained by the user: the name says little
        settings["weights"] = model.fingerprint()
    described = {
        name: {
            "windows": len(w),
            "length": reading.length,
            "part": reading.part,
            "tokens": fingerprint(w),
            "provenance": texts.provenance(name),
        }
        for name, w in evaluation.items()
    }
    comparison = Comparison(path, settings, described)
    compare(model, calibration, evaluation, schemes, comparison)
    return comparison.results


def compare(
    model: Llama,
    calibration: NDArray[np.int64],
    evaluation: dict[str, NDArray[np.int64]],
    schemes: Sequence[Scheme],
    comparison: Comparison,
) -> None:
    """Run what the file does not hold yet."""
    if not any(comparison.missing(scheme, evaluation) for scheme in schemes):
        return
    layers = calibrate(model, calibration)
    changed: dict[tuple, tuple[list[Callable], list[Layer]]] = {}
    planned: dict[tuple, list[list[Plan]]] = {}
    for scheme in tqdm(schemes, "schemes", disable=None):
        missing = comparison.missing(scheme, evaluation)
        if not missing:
            continue
        if scheme.label == FULL_PRECISION:
            comparison.add(
                scheme, {t: losses(model, evaluation[t]) for t in missing}, {"width": 1, "bits": [16, 16]}
            )
            continue
        way = scheme.rotation, scheme.smoothing
        if way not in changed:
            changed = {way: _transposed([transformed(scheme, layer) for layer in layers])}
        before, of = changed[way]
        key = *way, scheme.weights, scheme.residuals

        def plans(scheme: Scheme = scheme, of: Any = of, before: Any = before, key: Any = key) -> Any:
            if key not in planned:
                each = tqdm(list(zip(of, before)), "plans", leave=False, disable=None)
                planned[key] = [plans_of(scheme, layer, b) for layer, b in each]
            return planned[key]

        ready = prepared(scheme, before, of, plans)
        summary = _summary(scheme, layers, ready)
        comparison.add(scheme, {t: losses(model, evaluation[t], ready) for t in missing}, summary)
        ready.clear()  # before the next weights are made


def prepared(
    scheme: Scheme, before: list[Callable], of: list[Layer], plans: Callable[[], list[list[Plan]]]
) -> dict[str, Quantized]:
    """All layers, already transformed, under this scheme."""
    chosen = selections(scheme, of, plans)
    return {
        layer.name: quantized(scheme, layer, b, selection) for layer, b, selection in zip(of, before, chosen)
    }


def _transposed(pairs: list[tuple[Callable, Layer]]) -> tuple[list[Callable], list[Layer]]:
    return [before for before, _ in pairs], [layer for _, layer in pairs]


def _summary(scheme: Scheme, layers: list[Layer], ready: dict[str, Quantized]) -> dict[str, Any]:
    """K'/K weighted by the products of the calibration tokens, bits of a stored activation and weight; of
    each layer S, S_w and the output error on 256 calibration tokens; how many layers saw none, if any."""
    rows, wide, plain, stored, channels, repeated, kept = [], 0.0, 0.0, 0.0, 0.0, 0, 0
    for layer, load in zip(layers, loads(layers)):
        q, (n, k) = ready[layer.name], layer.weights.shape
        wide, plain = wide + load * n * q.selection.augmented_K, plain + load * n * k
        stored, channels = stored + load * q.selection.augmented_K, channels + load * k
        repeated, kept = repeated + n * q.selection.augmented_K, kept + n * k
        rows.append(
            {
                "layer": layer.name,
                "K": k,
                "N": n,
                "activation_residuals": q.selection.num_residual,
                "weight_residuals": len(q.selection.weight_channels),
                "output_error": _output_error(layer, q),
            }
        )
    bits = [BITS[scheme.activations] * stored / channels, BITS[scheme.weights] * repeated / kept]
    unseen = sum(len(layer.x) == 0 for layer in layers)
    return {"width": wide / plain, "bits": bits, "layers": rows} | ({"unseen": unseen} if unseen else {})


def _output_error(layer: Layer, q: Quantized) -> float | None:
    if len(layer.x) == 0:
        return None
    x = layer.x[:: max(1, len(layer.x) // 256)].astype(np.float32)
    y = x @ layer.weights.T
    error = np.linalg.norm(y - q.activations(x) @ q.weights.T, axis=1) / np.linalg.norm(y, axis=1)
    return round(float(error.mean()), 5)
