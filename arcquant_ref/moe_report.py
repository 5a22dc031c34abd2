"""What `arcquant moe` says of a mixture of experts: who is used, which channels are chosen, who is rerouted.

Texts and windows are those of `arcquant model`: 16 of 512 tokens.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import texts
from .evaluate import calibrate, losses, observed, prepared
from .formats import Float32, Float64
from .model_results import paired
from .moe import MixtureOfExperts, routed
from .plan import Plan
from .schemes import SCHEMES, Layer, Quantized, Scheme, plans_of
from .select import Selection, select, select_top

WINDOWS, LENGTH = 16, 512
REROUTED = "NVFP4", "ARC, τ = 1/8", "ARC, S = 64", "two-sided, 1.10, searched scales"


def report(model: MixtureOfExperts) -> str:
    """All of it, for printing."""

    def read(text: str, part: str) -> NDArray[np.int64]:
        return texts.windows(text, model.encode, WINDOWS, LENGTH, part)

    calibration = read("wikipedia", "calibration")
    evaluation = {text: read(text, "evaluation") for text in ("wikipedia", "code")}
    used = {"wikipedia, calibration": use(model, calibration)}
    used |= {f"{text}, evaluation": use(model, windows) for text, windows in evaluation.items()}
    weights = {name: w.numel() for name, w in model.weights.items()}
    idle = 1 - model.field("expert_used_count") / model.field("expert_count")
    experts = sum(n for name, n in weights.items() if name.split(".")[-2].isdigit())
    lines = [
        f"{sum(weights.values()):,} weights, a token meets {sum(weights.values()) - round(idle * experts):,}",
        "",
        *_use_table(used),
        "",
        *_selection_table(model, calibration),
        "",
        *_route_table(model, calibration, evaluation),
    ]
    return "\n".join(lines)


def use(model: MixtureOfExperts, windows: NDArray[np.int64]) -> Float64:
    """(layers, experts) part of a layer's calls that go to each expert."""
    calls: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.T
        counted = torch.bincount(model.chosen(logits).flatten(), minlength=model.experts)
        calls[name] = calls.get(name, 0) + counted
        return logits

    with routed(model, observe):
        losses(model, windows)
    found = np.array([counted.numpy() for counted in calls.values()], np.float64)
    return found / found.sum(axis=1, keepdims=True)


def _use_table(used: dict[str, Float64]) -> list[str]:
    """A line a layer: what the least and the most used expert get, and as how many equal ones all count."""
    layers, experts = next(iter(used.values())).shape
    lines = [
        f"% of a layer's calls, least to most used expert ({100 / experts:.1f} if even); exp of the entropy"
    ]
    lines.append(f"{'layer':<8}" + "".join(f"{text:>26}" for text in used))
    for i in range(layers):
        cells = []
        for found in used.values():
            p = found[i][found[i] > 0]
            even = np.exp(-(p * np.log(p)).sum())
            cells.append(f"{100 * found[i].min():.1f} to {100 * found[i].max():.1f}; {even:.2f}")
        lines.append(f"{i:<8}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


RULES: dict[str, Callable[[Float32], Selection]] = {
    "τ = 1/8": select,
    "S = 64": lambda amax: select_top(amax, 64),
    "S = 16": lambda amax: select_top(amax, 16),
}


def _selection_table(model: MixtureOfExperts, windows: NDArray[np.int64]) -> list[str]:
    """A line a kind of site: how alike are selections from two halves of the text, and of two experts."""
    dense = int(model.field("expert_count") // model.field("expert_used_count"))
    half = len(windows) // 2
    first, second, whole = (amaxes(model, w, dense) for w in (windows[:half], windows[half:], windows))
    lines = [
        "Jaccard index of the residual channels of two selections, mean (least); attention is given every "
        f"{dense}th token,",
        "as many as an expert has on average",
        f"{'':<42}{'mean S of τ':>12}" + "".join(f"{rule:>16}" for rule in RULES),
    ]

    def line(what: str, pairs: list[tuple[Float32, Float32]]) -> str:
        size = np.mean([select(amax).num_residual for pair in pairs for amax in pair])
        cells = []
        for rule in RULES.values():
            found = [jaccard(rule(a), rule(b)) for a, b in pairs]
            cells.append(f"{np.mean(found):.2f} ({min(found):.2f})")
        return f"{what:<42}{size:>12.0f}" + "".join(f"{cell:>16}" for cell in cells)

    for kind in ("attn_in", "attn_out", "expert_in", "expert_down"):
        names = [site for site in whole if site.split(".")[2] == kind and site in first and site in second]
        lines.append(line(f"{kind}, two halves of the text", [(first[n], second[n]) for n in names]))
    for kind in ("expert_in", "expert_down"):
        same_layer = [
            pair
            for pair in combinations([n for n in whole if f".{kind}." in n], 2)
            if len({n.split(".")[1] for n in pair}) == 1
        ]
        lines.append(line(f"{kind}, two experts of a layer", [(whole[a], whole[b]) for a, b in same_layer]))
    k = int(model.field("embedding_length"))
    lines.append(
        f"{'at random':<54}{'':>16}{64 / (2 * k - 64):>9.2f}       {16 / (2 * k - 16):>9.2f}".rstrip()
    )
    return lines


def amaxes(model: MixtureOfExperts, windows: NDArray[np.int64], dense: int) -> dict[str, Float32]:
    """Site → channel_amax (K,) of the tokens it sees; of attention, every `dense`th token."""
    site_of = {names[0]: site for site, names in model.sites().items()}
    found: dict[str, Float32] = {}

    def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
        if name in site_of:
            seen = x[::dense] if ".attn_" in name else x
            amax, site = seen.abs().amax(dim=0).numpy(), site_of[name]
            found[site] = np.maximum(found[site], amax) if site in found else amax
        return x @ w.T

    with observed(model, observe):
        losses(model, windows)
    return found


def jaccard(a: Selection, b: Selection) -> float:
    """Residual channels in both, over those in either; 1 where both have none."""
    one, other = (set(s.order[s.K - s.num_residual :].tolist()) for s in (a, b))
    return len(one & other) / len(one | other) if one | other else 1.0


def _route_table(
    model: MixtureOfExperts, calibration: NDArray[np.int64], evaluation: dict[str, NDArray[np.int64]]
) -> list[str]:
    """A line a scheme: how many tokens go to other experts than in float32, and what that costs."""
    layers = calibrate(model, calibration)
    plain = {text: recorded(model, windows) for text, windows in evaluation.items()}
    lines = [
        "Routes: % of tokens and layers with other experts than in float32; loss above it; with its routes",
        f"{'':<36}" + "".join(f"{text:>42}" for text in evaluation),
    ]
    for scheme in tqdm([s for s in SCHEMES if s.label in REROUTED], "routes", disable=None):
        ready = _plain(scheme, layers)
        cells = []
        for text, windows in evaluation.items():
            base, routes = plain[text]
            found, changed = recorded(model, windows, ready)
            kept = replayed(model, windows, routes, ready)
            other = np.mean([_moved(model, a, b) for a, b in zip(routes, changed)])
            free, held = paired(list(found), list(base)), paired(list(kept), list(base))
            cells.append(
                f"{100 * other:.1f} %  {free[0]:+.4f} ± {free[1]:.4f}  {held[0]:+.4f} ± {held[1]:.4f}"
            )
        lines.append(f"{scheme.label:<36}" + "".join(f"{cell:>42}" for cell in cells))
    return lines


def _plain(scheme: Scheme, layers: list[Layer]) -> dict[str, Quantized]:
    """All layers under a scheme that neither rotates nor smooths."""

    def before(x: Float32) -> Float32:
        return x

    def plans() -> list[list[Plan]]:
        return [plans_of(scheme, layer, before) for layer in layers]

    return prepared(scheme, [before] * len(layers), layers, plans)


def recorded(
    model: MixtureOfExperts, windows: NDArray[np.int64], layers: dict[str, Quantized] | None = None
) -> tuple[Float64, list[Tensor]]:
    """Losses of the windows, and the router's logits, layer by layer of each window."""
    routes: list[Tensor] = []

    def record(name: str, x: Tensor, w: Tensor) -> Tensor:
        routes.append(x @ w.T)
        return routes[-1]

    with routed(model, record):
        return losses(model, windows, layers), routes


def replayed(
    model: MixtureOfExperts, windows: NDArray[np.int64], routes: list[Tensor], layers: dict[str, Quantized]
) -> Float64:
    """Losses of the windows with recorded logits in the place of the router's."""
    held: Iterator[Tensor] = iter(routes)
    with routed(model, lambda name, x, w: next(held)):
        return losses(model, windows, layers)


def _moved(model: MixtureOfExperts, a: Tensor, b: Tensor) -> float:
    one, other = (model.chosen(logits).sort(dim=1).values for logits in (a, b))
    return float((one != other).any(dim=1).float().mean())
