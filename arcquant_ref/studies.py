"""`arcquant study NAME`: what residuals stand on, in a language model. Needs the extra `model`.

activations  which channels are large, and is it the same ones in other tokens and texts?
lengths      does what 512 tokens calibrated hold for shorter and longer sequences, and for batches?
shift        does a calibration on one text hold on another?

Results are rows; what a table prints is computed from them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

import emulator

from . import evaluate, texts
from .formats import BLOCK, Float32, Float64
from .model import SITES, WEIGHTS, Llama, find_weights
from .model_results import fingerprint, paired
from .plan import Plan
from .schemes import SCHEMES, Layer, Quantized, Scheme, plans_of, quantized, selections
from .select import TAU, select
from .tensor import written_whole

LENGTH = 512  # tokens of a window, unless lengths are the question
SCHEMES_STUDIED = "ARC, τ = 1/8, searched scales", "two-sided, 1.10, searched scales"
TEXTS = tuple(texts.PROVENANCE)
KINDS = tuple(SITES)


def run(name: str, windows: int, path: Path | None = None) -> dict[str, Any]:
    """{"study", "settings", "rows"} of a study of the model at `path`, or of SmolLM2.

    `windows` of 512 tokens, or as many tokens, are read of each text and for each setting. Raises ValueError
    for an unknown name; else what `texts.windows` and `Llama` raise.
    """
    if name not in STUDIES:
        raise ValueError(f"study {name!r} is none of {', '.join(STUDIES)}.")
    model = Llama(path or find_weights())
    settings = {"model": path.name if path else f"SmolLM2-135M-Instruct, {WEIGHTS}"}
    more, rows = STUDIES[name].rows(model, windows)
    return {"study": name, "settings": settings | more, "rows": rows}


def save(results: dict[str, Any], path: Path) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(results, ensure_ascii=False) + "\n").encode())


def read(path: Path, name: str) -> dict[str, Any]:
    """What `save` wrote of this study. ValueError for another file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert (results["study"], set(results)) == (name, {"study", "settings", "rows"})
        return results
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise ValueError(f"{path} is not a file of `arcquant study {name} -o`.") from error


def table(results: dict[str, Any]) -> str:
    """The settings and the study's table."""
    lines = [f"{key}: {value}" for key, value in results["settings"].items()]
    return "\n".join([*lines, "", *STUDIES[results["study"]].lines(results["rows"])])


# What is counted


def kurtosis(x: ArrayLike, axis: int) -> Float64:
    """Fourth central moment / squared variance along `axis`: 3 for many Gaussian values, at most
    n − 2 + 1 / (n − 1) of n; of values that are all equal, NaN.

    >>> kurtosis([[1, -1, 1, -1], [0, 0, 0, 5]], axis=1)
    array([1.        , 2.33333333])
    """
    x = np.asarray(x, np.float64)
    squares = (x - x.mean(axis=axis, keepdims=True)) ** 2
    variance = squares.mean(axis=axis)
    fourth = (squares**2).mean(axis=axis)
    return np.divide(fourth, variance**2, out=np.full_like(variance, np.nan), where=variance > 0)


def jaccard(a: ArrayLike, b: ArrayLike) -> float:
    """How many members two sets of channels share, over how many they have together; 1 if both are empty.

    >>> jaccard([1, 2, 3], [3, 4])
    0.25
    """
    together = np.union1d(a, b)
    return len(np.intersect1d(a, b)) / len(together) if len(together) else 1.0


def largest_in_block(x: NDArray[Any]) -> Float64:
    """(T, K) → (K,): in which share of the tokens a channel is the largest of its block of 16, by |x|."""
    blocks = np.abs(x).reshape(len(x), -1, BLOCK)
    found = blocks.argmax(axis=-1)[..., None] == np.arange(BLOCK)
    return found.mean(axis=0).ravel()


def above_tau(channel_amax: Float32) -> NDArray[np.int64]:
    """The channels that the paper's rule counts, before it rounds their number up to 16."""
    return np.flatnonzero(channel_amax > TAU * np.float64(channel_amax.max()))


def selected(channel_amax: Float32) -> NDArray[np.int64]:
    chosen = select(channel_amax)
    return chosen.order[chosen.K - chosen.num_residual :]


# activations


@dataclass(frozen=True)
class Statistic:
    """A line of the table; the worst layer is the one with the most, or the least, of it."""

    what: str
    worst: Callable[[Float64], np.intp]


MAX_OVER_MEDIAN = "channel amax: max / median"
FIRST = "first token's amax / the others'"
BLOCK_KURTOSIS = "kurtosis of 16 neighbours, mean"
SAME = "tokens whose block's largest is the usual one"
OVERLAP = "overlap of the S channels (Jaccard)"
CAUGHT = "channels above τ · max of the second that S of the first has"
STATISTICS = [
    Statistic(MAX_OVER_MEDIAN, np.argmax),
    Statistic("the same without first tokens", np.argmax),
    Statistic(FIRST, np.argmax),
    Statistic("channels above τ · max", np.argmax),
    Statistic("S, their number rounded up to 16, / K", np.argmax),
    Statistic(BLOCK_KURTOSIS, np.argmax),
    Statistic("kurtosis of a channel, median", np.argmax),
    Statistic("kurtosis of a channel, largest", np.argmax),
    Statistic(SAME, np.argmin),
    Statistic("tokens where one of the S channels is its block's largest", np.argmin),
    Statistic(OVERLAP, np.argmin),
    Statistic("as many random channels would overlap", np.argmax),
    Statistic("overlap of the channels above τ · max", np.argmin),
    Statistic(CAUGHT, np.argmin),
]
PROFILE = 48  # points of a sorted channel amax that a file keeps


def activations(model: Llama, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows {"site", "of", statistics …}, `of` a text or two of them; with "profile" for wikipedia."""
    parts = {text: (text, "calibration") for text in TEXTS} | {
        "wikipedia, other articles": (TEXTS[0], "choice")
    }
    rows: list[dict[str, Any]] = []
    amaxes, tokens = {}, {}
    for of, (text, part) in parts.items():
        windows = texts.windows(text, model.encode, count, LENGTH, part)
        tokens[of] = f"{count} x {LENGTH} tokens of its part {part!r}, {fingerprint(windows)}"
        seen = inputs(model, windows)
        amaxes[of] = {site: np.abs(x).max(axis=(0, 1)).astype(np.float32) for site, x in seen.items()}
        if part == "calibration":
            rows += [{"site": site, "of": of} | within(x) for site, x in seen.items()]
    for row in rows:
        if row["of"] == TEXTS[0]:
            row["profile"] = profile(amaxes[TEXTS[0]][row["site"]])
    for pair in combinations(parts, 2):
        if pair[1] in TEXTS or pair[0] == TEXTS[0]:
            first, second = (amaxes[of] for of in pair)
            rows += [
                {"site": site, "of": f"{pair[0]} - {pair[1]}"} | between(first[site], second[site])
                for site in first
            ]
    return tokens, rows


def inputs(model: Llama, windows: NDArray[np.int64]) -> dict[str, NDArray[np.float16]]:
    """What the layers of each site read, (windows, length, K)."""
    sites = {names[0]: site for site, names in evaluate.sites(model).items()}
    seen: dict[str, list[NDArray[np.float16]]] = {site: [] for site in sites.values()}

    def observe(name: str, x: Tensor, w: Tensor) -> Tensor:
        if name in sites:
            seen[sites[name]].append(x.half().numpy())
        return x @ w.T

    with evaluate.observed(model, observe):
        for window in tqdm(windows, "windows", leave=False, disable=None):
            model.logits(torch.from_numpy(window))
    return {site: np.stack(found) for site, found in seen.items()}


def within(x: NDArray[np.float16]) -> dict[str, float]:
    """The statistics of a site over one text, (windows, length, K). All but the first three and the choice of
    channels leave out the first token of every window."""
    first, rest = np.abs(x[:, 0]).astype(np.float32), x[:, 1:].reshape(-1, x.shape[-1]).astype(np.float32)
    rest_amax = np.abs(rest).max(axis=0)
    amax = np.maximum(rest_amax, first.max(axis=0))
    blocks, of_channel = kurtosis(rest.reshape(len(rest), -1, BLOCK), 2), kurtosis(rest, 0)
    share = largest_in_block(rest)
    chosen = selected(amax)
    values = (
        amax.max() / np.median(amax),
        rest_amax.max() / np.median(rest_amax),
        first.max() / rest_amax.max(),
        len(above_tau(amax)),
        len(chosen) / len(amax),
        np.nanmean(blocks),
        np.nanmedian(of_channel),
        np.nanmax(of_channel),
        share.reshape(-1, BLOCK).max(axis=1).mean(),
        share[chosen].mean(),
    )
    return {s.what: round(float(v), 4) for s, v in zip(STATISTICS, values)}


def between(first: Float32, second: Float32) -> dict[str, float]:
    """What two channel amaxes of a site have in common."""
    outliers, chosen, others = above_tau(second), selected(first), selected(second)
    shares = len(chosen) / len(first), len(others) / len(second)
    together = sum(shares) - np.prod(shares)
    values = (
        jaccard(chosen, others),
        float(np.prod(shares) / together),
        jaccard(above_tau(first), outliers),
        float(np.isin(outliers, chosen).mean()),
    )
    return {s.what: round(float(v), 4) for s, v in zip(STATISTICS[-len(values) :], values)}


def profile(channel_amax: Float32) -> list[list[float]]:
    """[rank, amax / median], largest first, at PROFILE ranks from 1 to K, equally far apart in their
    logarithm."""
    ranked = np.sort(channel_amax / np.median(channel_amax))[::-1]
    at = np.unique(np.geomspace(1, len(ranked), PROFILE).round().astype(int))
    return [[int(rank), round(float(ranked[rank - 1]), 4)] for rank in at]


def activations_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "mean over the layers, and the worst with its number"
    yield f"{'':<42}" + "".join(f"{kind:^25}" for kind in KINDS).rstrip()
    for statistic in STATISTICS:
        found = [row for row in rows if statistic.what in row]
        yield statistic.what
        for of in dict.fromkeys(row["of"] for row in found):
            of_it = [row for row in found if row["of"] == of]
            yield f"  {of:<40}" + "".join(_mean_and_worst(statistic, kind, of_it) for kind in KINDS).rstrip()


def _mean_and_worst(statistic: Statistic, kind: str, rows: list[dict[str, Any]]) -> str:
    values, blocks = by_depth(rows, kind, statistic.what)
    worst = statistic.worst(values)
    return f"{values.mean():>9.3g}{values[worst]:>9.3g} ({blocks[worst]:>2}) "


def by_depth(rows: list[dict[str, Any]], kind: str, what: str) -> tuple[Float64, NDArray[np.int64]]:
    """A statistic of the sites of one kind, and their blocks of the model."""
    found = [row for row in rows if row["site"].endswith(f".{kind}") and what in row]
    return np.array([row[what] for row in found]), np.array([int(row["site"].split(".")[1]) for row in found])


# lengths and shift: schemes


def studied() -> list[Scheme]:
    by_label = {scheme.label: scheme for scheme in SCHEMES}
    return [by_label[label] for label in SCHEMES_STUDIED]


def prepared(scheme: Scheme, layers: list[Layer]) -> dict[str, Quantized]:
    """Site → its layers under a scheme that neither rotates nor smooths."""

    def plans() -> list[list[Plan]]:
        return [plans_of(scheme, layer, _unchanged) for layer in tqdm(layers, "plans", disable=None)]

    chosen = selections(scheme, layers, plans)
    return {
        layer.name: quantized(scheme, layer, _unchanged, selection)
        for layer, selection in zip(tqdm(layers, "weights", leave=False, disable=None), chosen)
    }


def _unchanged(x: Float32) -> Float32:
    return x


def batch_losses(
    model: Llama, windows: NDArray[np.int64], batch: int, layers: dict[str, Quantized] | None = None
) -> Float64:
    """Mean loss of each (length,) window, `batch` of them quantized together: they share tensor scales."""
    found = []
    with evaluate.quantizing(model, layers):
        for ids in tqdm(torch.from_numpy(windows).split(batch), "batches", leave=False, disable=None):
            pairs = zip(model.logits(ids), ids)
            found += [float(F.cross_entropy(logits[:-1], window[1:])) for logits, window in pairs]
    return np.array(found)


class Static:
    """A layer whose tensor scale is that of its calibration; counts what lies beyond its amax."""

    def __init__(self, layer: Layer, ready: Quantized) -> None:
        self.ready, self.amax = ready, layer.channel_amax.max()
        self.scale = emulator.quantize(layer.channel_amax[None]).tensor_scale
        self.tokens = self.tokens_beyond = self.blocks = self.blocks_beyond = 0

    def layer(self) -> Quantized:
        return replace(self.ready, activations=self.activations)

    def activations(self, x: Float32) -> Float32:
        selection = self.ready.selection
        beyond = np.abs(x[:, selection.columns]).reshape(len(x), -1, BLOCK).max(axis=-1) > self.amax
        self.tokens, self.tokens_beyond = self.tokens + len(x), self.tokens_beyond + int(beyond.any(1).sum())
        self.blocks, self.blocks_beyond = self.blocks + beyond.size, self.blocks_beyond + int(beyond.sum())
        return emulator.dequantize(emulator.augment_activations(x, selection, self.scale))


# lengths

LENGTHS = 16, 64, 256, 512, 1024, 2048
BATCHES = 1, 4, 32
LEAST = 4  # windows of a length


def lengths(model: Llama, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows {"scheme", "length", "windows", "float32", "static", "dynamic": {batch: losses}, "tokens beyond",
    "blocks beyond", "worst site", "there"}; losses are lists, a number a window."""
    calibration = texts.windows(TEXTS[0], model.encode, count, LENGTH, "calibration")
    read = {
        n: texts.windows(TEXTS[0], model.encode, max(count * LENGTH // n, LEAST), n, "evaluation")
        for n in LENGTHS
    }
    layers = evaluate.calibrate(model, calibration)
    base = {n: batch_losses(model, windows, _several(n)) for n, windows in read.items()}
    rows = []
    for scheme in studied():
        ready = prepared(scheme, layers)
        for n, windows in read.items():
            row = {"scheme": scheme.label, "length": n, "windows": len(windows), "float32": _listed(base[n])}
            rows.append(row | length_row(model, windows, layers, ready))
    settings = {
        "calibration": f"{TEXTS[0]}, {count} x {LENGTH} tokens, {fingerprint(calibration)}",
        "evaluation": f"{TEXTS[0]}, {count * LENGTH} tokens of each length, or {LEAST} windows",
        "evaluation tokens": ", ".join(fingerprint(windows) for windows in read.values()),
    }
    return settings, rows


def length_row(
    model: Llama, windows: NDArray[np.int64], layers: list[Layer], ready: dict[str, Quantized]
) -> dict[str, Any]:
    """Losses of windows of one length under static and dynamic tensor scales, and what was beyond."""
    static = {layer.name: Static(layer, ready[layer.name]) for layer in layers}
    quantizers = {name: s.layer() for name, s in static.items()}
    found = batch_losses(model, windows, _several(windows.shape[1]), quantizers)
    beyond = {name: s.tokens_beyond / s.tokens for name, s in static.items()}
    worst = max(beyond, key=lambda name: beyond[name])
    blocks = sum(s.blocks_beyond for s in static.values()) / sum(s.blocks for s in static.values())
    return {
        "static": _listed(found),
        "dynamic": {
            str(batch): _listed(batch_losses(model, windows, batch, ready))
            for batch in BATCHES
            if batch <= len(windows)
        },
        "tokens beyond": float(np.mean(list(beyond.values()))),
        "blocks beyond": blocks,
        "worst site": worst,
        "there": beyond[worst],
    }


def _several(length: int) -> int:
    """A batch of about 2048 tokens, where windows do not depend on each other."""
    return max(1, LENGTHS[-1] // length)


def _listed(losses: Float64) -> list[float]:
    return losses.round(6).tolist()


def lengths_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "static: loss with static tensor scales above float32's. batch n: that loss above the one with"
    yield "scales of its own for every n sequences. Beyond the calibrated amax: tokens (mean over sites, and"
    yield "the worst site), blocks."
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        yield ""
        yield f"{scheme:<34}{'static':>18}" + "".join(f"{f'batch {b}':>20}" for b in BATCHES) + _BEYOND
        for row in rows:
            if row["scheme"] == scheme:
                yield _length_line(row)


_BEYOND = f"{'tokens':>10}{'blocks':>10}{'worst site':>26}"


def _length_line(row: dict[str, Any]) -> str:
    cells = [_difference(row["static"], row["float32"])]
    for batch in map(str, BATCHES):
        dynamic = row["dynamic"].get(batch)
        cells.append(_difference(row["static"], dynamic) if dynamic else "")
    there = f"{row['worst site']} {row['there']:.2%}"
    shares = f"{row['tokens beyond']:>10.3%}{row['blocks beyond']:>10.4%}{there:>26}"
    head = f"{row['windows']:>6} x {row['length']:>4} tokens"
    return f"{head:<32}" + "".join(f"{cell:>20}" for cell in cells) + shares


def _difference(losses: list[float], base: list[float]) -> str:
    mean, error = paired(losses, base)
    return f"{mean:+.4f} ± {error:.4f}"


# shift

PART = 4  # a calibration on one window of so many


def shift(model: Llama, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows {"scheme", "calibration", "windows", "evaluation", "losses", "float32", "width"}."""
    calibration = {t: texts.windows(t, model.encode, count, LENGTH, "calibration") for t in TEXTS}
    evaluation = {t: texts.windows(t, model.encode, count, LENGTH, "evaluation") for t in TEXTS}
    base = {t: batch_losses(model, windows, 1) for t, windows in evaluation.items()}
    rows = []
    for text, of in product(TEXTS, (1, PART)):
        windows = calibration[text][: max(1, count // of)]
        layers = evaluate.calibrate(model, windows)
        for scheme in studied():
            ready = prepared(scheme, layers)
            for t in TEXTS if of == 1 else (text,):
                row = {"scheme": scheme.label, "calibration": text, "windows": len(windows), "evaluation": t}
                found = _listed(batch_losses(model, evaluation[t], 1, ready))
                rows.append(
                    row | {"losses": found, "float32": _listed(base[t]), "width": width(layers, ready)}
                )
    settings = {
        f"{what}, {t}": f"{count} x {LENGTH} tokens, {fingerprint(windows[t])}"
        for what, windows in (("calibration", calibration), ("evaluation", evaluation))
        for t in TEXTS
    }
    return settings, rows


def width(layers: list[Layer], ready: dict[str, Quantized]) -> float:
    """K' / K of all products together."""
    wide = sum(len(layer.weights) * ready[layer.name].selection.augmented_K for layer in layers)
    return round(wide / sum(layer.weights.size for layer in layers), 4)


def shift_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    full = max(row["windows"] for row in rows)
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        found = {(r["calibration"], r["windows"], r["evaluation"]): r for r in rows if r["scheme"] == scheme}
        part = min(windows for _, windows, _ in found)
        heads = [f"calibrated on {t}" for t in TEXTS] + [f"{part} of its own windows"]
        yield from ("", f"{scheme}: loss above float32, and below it above calibrating on the text itself")
        yield f"{'evaluated on':<14}" + "".join(f"{head:>26}" for head in heads)
        for t in TEXTS:
            own = found[t, full, t]["losses"]
            cells = [found[c, full, t] for c in TEXTS] + [found[t, part, t]]
            yield f"{t:<14}" + "".join(f"{_difference(c['losses'], c['float32']):>26}" for c in cells)
            others = ["" if c["losses"] == own else _difference(c["losses"], own) for c in cells]
            yield (f"{'':<14}" + "".join(f"{other:>26}" for other in others)).rstrip()
        widths = [found[c, full, c]["width"] for c in TEXTS]
        yield "width         " + "".join(f"{w:>26.3f}" for w in widths)


@dataclass(frozen=True)
class Study:
    rows: Callable[[Llama, int], tuple[dict[str, Any], list[dict[str, Any]]]]
    lines: Callable[[list[dict[str, Any]]], Iterator[str]]


STUDIES = {
    "activations": Study(activations, activations_lines),
    "lengths": Study(lengths, lengths_lines),
    "shift": Study(shift, shift_lines),
}
