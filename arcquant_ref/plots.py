"""Pictures. Each function returns a figure; matplotlib is imported only here."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from . import bounds, demo, prove
from .augment import augment_activations, merge
from .baselines import MX_BLOCK, mxfp8
from .bench import Row
from .formats import BLOCK, Float64
from .model_results import FULL_PRECISION, paired
from .quantize import exact_values, quantize
from .sample import Layer
from .select import TAU, calibrate, select, select_top

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's colour-blind-safe set
GREEN, BLACK = "#009E73", "#000000"


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook; `alt` says in words what to see, below it and as the image's text.

    Raises ValueError for an empty alt, or for axes with ticks whose meaning no label says.
    """
    if not alt.strip():
        raise ValueError("alt is empty; say in one to three sentences what the figure shows.")
    for n, axes in enumerate(figure.axes):
        for which in _unlabelled(axes):
            raise ValueError(
                f"axes {n} of the figure ({axes.get_title()!r}) have ticks along {which} but no label. "
                f"Say what they measure with set_{which}label, or hide them with set_{which}ticks([]) or "
                f"set_axis_off()."
            )
    from IPython.display import Image, Markdown, display

    png = BytesIO()
    figure.savefig(png, format="png", dpi=100)
    display(Image(png.getvalue(), alt=alt), Markdown(f"*{alt}*"))


def _unlabelled(axes: Axes) -> list[str]:
    """Which of x and y show ticks and no label; of axes that share an x or y, one label is enough."""
    shared = {"x": axes.get_shared_x_axes(), "y": axes.get_shared_y_axes()}
    return [
        which
        for which, group in shared.items()
        if axes.axison
        and getattr(axes, f"get_{which}ticks")().size
        and not any(getattr(other, f"get_{which}label")() for other in group.get_siblings(axes))
    ]


def demo_figure(layers: Sequence[Layer]) -> Figure:
    """Per layer: channel_amax in order with the τ line, and below it the output error against S."""
    figure = Figure(figsize=(3.4 * len(layers), 6.4), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    for layer, top, bottom in tqdm(list(zip(layers, *axes)), "layers", disable=None):
        _channels(top, layer)
        _error_against_s(bottom, layer)
    axes[0][0].set_ylabel("largest |x| of the channel")
    axes[1][0].set_ylabel("output error, mean over tokens (%)")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Few channels stand out (above); with residuals for the largest S of them, the error falls (below)"
    )
    return figure


def _channels(axes: Axes, layer: Layer) -> None:
    amax = np.sort(calibrate([layer.calibration]))
    tau = TAU * amax[-1]
    channel = np.arange(len(amax))
    axes.semilogy(channel, amax, color=BLUE)
    axes.axhline(tau, color=ORANGE, linestyle="--")
    axes.annotate("τ · max, τ = 1/8", (0, tau), textcoords="offset points", xytext=(2, 4), color=ORANGE)
    outliers = amax > tau
    axes.plot(channel[outliers], amax[outliers], color=ORANGE, marker="^", markersize=5, linestyle="")
    axes.set_title(f"{layer.name}\n{outliers.sum()} of {len(amax)} channels above τ · max", fontsize="medium")
    axes.set_xlabel("channel, smallest first")


def _error_against_s(axes: Axes, layer: Layer) -> None:
    x, w = layer.evaluation, layer.weight
    chosen = select(calibrate([layer.calibration]))
    k = chosen.K
    sizes = sorted(
        {0, BLOCK, 2 * BLOCK, *(k * i // 8 // BLOCK * BLOCK for i in range(1, 9)), chosen.num_residual}
    )

    def error(result: demo.Result) -> float:
        return 100 * demo.output_error(x, w, result.y_hat)

    errors = [error(demo.arc(x, w, select_top(chosen.channel_amax, s))) for s in sizes]
    by_rule = errors[sizes.index(chosen.num_residual)]
    plain = error(demo.nvfp4(x, w))
    axes.axhline(plain, color=GREY, linestyle="-", label="NVFP4, channels as they are")
    axes.plot(sizes, errors, color=BLUE, marker="o", markersize=4, label="ARC")
    axes.plot(
        [chosen.num_residual],
        [by_rule],
        color=ORANGE,
        marker="*",
        markersize=15,
        linestyle="",
        label="ARC, S by τ",
    )
    axes.axhline(error(demo.w4a8(x, w)), color=GREY, linestyle="--", label="W4A8 (MXFP8)")
    axes.axhline(error(demo.w4a16(x, w)), color=GREY, linestyle=":", label="W4A16")
    limit = error(demo.w4a16_reordered(x, w, chosen))
    axes.axhline(limit, color=BLUE, linestyle=":", label=demo.REORDERED)
    axes.set_ylim(0, 1.1 * max(plain, *errors))
    axes.set_xlabel("residual channels S")


def model_figure(results: dict[str, Any]) -> Figure:
    """Loss above float32 against the product's width, one panel a text, with paired standard errors."""
    names = list(results["texts"])
    figure = Figure(figsize=(max(8, 1 + 4.5 * len(names)), 5.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, text in zip(panels, names):
        _width_curves(axes, results["schemes"], text)
        axes.set(
            title=f"{text}, {results['texts'][text]['windows']} windows",
            xlabel="width K' / K of the products",
        )
    panels[0].set_ylabel("loss above float32 (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("What extra columns buy: largest amax first, or planned on both sides")
    return figure


def _width_curves(axes: Axes, schemes: dict[str, Any], text: str) -> None:
    base = schemes[FULL_PRECISION]["losses"][text]
    held = {label: s for label, s in schemes.items() if text in s["losses"]}

    def points(wanted: Callable[[dict], bool]) -> NDArray:
        found = [(s["width"], *paired(s["losses"][text], base)) for s in held.values() if wanted(s["scheme"])]
        return np.array(sorted(found)).reshape(-1, 3).T

    for residuals, name, color in (("top", "ARC, largest amax", ORANGE), ("two-sided", "two-sided", BLUE)):
        for weights, style, filled in (("nvfp4", "--", "none"), ("searched", "-", color)):

            def wanted(s: dict, residuals: str = residuals, weights: str = weights) -> bool:
                same = s["residuals"] in (residuals, "tau" if residuals == "top" else residuals, "none")
                return same and s["weights"] == weights and s["activations"] == "nvfp4" and is_plain(s)

            axes.errorbar(
                *points(wanted), color=color, linestyle=style, marker="o" if residuals == "top" else "s",
                markerfacecolor=filled, capsize=3, label=name + ", searched scales" * (weights != "nvfp4"),
            )  # fmt: skip
    for label, style in (("W4A16", ":"), ("W4A16, searched scales", "-.")):
        if label in held:
            axes.axhline(
                paired(held[label]["losses"][text], base)[0], color=GREY, linestyle=style, label=label
            )
    axes.set_ylim(bottom=0)


def is_plain(scheme: dict[str, Any]) -> bool:
    """Neither rotated nor smoothed."""
    return scheme["rotation"] == "none" and scheme["smoothing"] is None


KINDS = {
    "attn_in": (BLUE, "o"),
    "attn_out": (ORANGE, "^"),
    "ffn_in": (GREEN, "s"),
    "ffn_down": (BLACK, "D"),
}  # kinds of site in a model


def activations_figure(rows: list[dict[str, Any]]) -> Figure:
    """Rows of `arcquant study activations`: sorted channel amax of every layer by kind of site; by depth, the
    first token, the usual largest channel, kurtosis and what two texts select in common."""
    from . import studies

    figure = Figure(figsize=(14, 7.4), layout="constrained")
    above, below = figure.subplots(2, len(KINDS))
    text = studies.TEXTS[0]
    own = [row for row in rows if row["of"] == text]
    depth = Normalize(0, max(int(row["site"].split(".")[1]) for row in own))
    for axes, kind in zip(above, KINDS):
        for row in (row for row in own if row["site"].endswith(f".{kind}")):
            shade = colormaps["cividis"](depth(int(row["site"].split(".")[1])))
            axes.loglog(*np.transpose(row["profile"]), color=shade, linewidth=1)
        axes.set(title=kind, xlabel="rank of the channel")
        axes.sharey(above[0])
    above[0].set_ylabel("channel amax / median channel's")
    figure.colorbar(ScalarMappable(depth, "cividis"), ax=above, label="block of the model", pad=0.01)
    pair = f"{text} - {studies.TEXTS[2]}"
    panels = (
        (studies.FIRST, text, "first token's amax / the others'", "log"),
        (studies.BLOCK_KURTOSIS, text, "mean kurtosis of 16 neighbours", "linear"),
        (studies.SAME, text, "tokens with the usual largest in a block", "linear"),
        (studies.OVERLAP, pair, f"Jaccard of S channels, {pair}", "linear"),
    )
    for axes, (what, of, label, scale) in zip(below, panels):
        for kind, (color, marker) in KINDS.items():
            values, blocks = studies.by_depth([row for row in rows if row["of"] == of], kind, what)
            axes.plot(blocks, values, color=color, marker=marker, markersize=4, linewidth=1, label=kind)
        axes.set(xlabel="block of the model", ylabel=label, yscale=scale)
    for axes in below[2:]:
        axes.set_ylim(0, 1.02)
    below[1].axhline(GAUSSIAN_16, color=GREY, linestyle="--", label="16 Gaussian values")
    handles, labels = below[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"Which channels are large: by rank (above) and by depth (below), {text}")
    return figure


GAUSSIAN_16 = 3 * (BLOCK - 1) / (BLOCK + 1)  # mean kurtosis of 16 independent Gaussian values


def growth_figure(rows: Sequence[Row]) -> Figure:
    """Time of quantize and of matmul against their work, with the line of equal cost per item."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    titles = {"quantize": "quantize (n, n)", "matmul": "matmul (n, n) by (n, n)"}
    for axes, (name, title), color in zip(figure.subplots(1, 2), titles.items(), (BLUE, ORANGE)):
        points = [row for row in rows if row.name == name]
        work, time = np.array([[1e9 * row.work, 1e3 * row.median] for row in points]).T
        spread = np.abs(np.array([[1e3 * row.best, 1e3 * row.worst] for row in points]).T - time)
        axes.plot(work, time[-1] * work / work[-1], color=GREY, linestyle="--", label="same cost per item")
        axes.errorbar(
            work, time, spread, color=color, marker="o", linestyle="", label="median, best to worst"
        )
        for row, x, y in zip(points, work, time):
            axes.annotate(f"n = {row.group}", (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
        axes.set(xscale="log", yscale="log", title=title, ylabel="time (ms)")
        axes.set_xlabel("values, n²" if name == "quantize" else "products, n³")
        axes.legend(frameon=False)
    figure.suptitle("The cost grows with the work: one line, until a call costs more than what it does")
    return figure


def bounds_figure() -> Figure:
    """Above: error / amax of every element of a worst block, for three schemes. Below: the bound / amax for
    every amax, with what bfloat16 attains."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.1])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    panels: Sequence[Axes] = above.subplots(1, 3, sharey=True)
    constants = {
        "NVFP4": (bounds.NVFP4, None),
        "ARC": (bounds.ARC, bounds.PAPER_ARC),
        "MXFP8, ceiling scale": (bounds.MXFP8_CEILING, bounds.PAPER_MXFP8),
    }
    for axes, (scheme, (constant, paper)) in zip(panels, constants.items()):
        x, error = _worst_block(scheme)
        worst = np.argmax(error)
        axes.plot(x, error, color=BLUE, linewidth=1)
        axes.axhline(float(constant), color=ORANGE, linestyle="--", label=f"proved: {constant}")
        if paper:
            axes.axhline(float(paper), color=GREY, linestyle=":", label=f"paper: {float(paper):.4f}")
        axes.plot(x[worst], error[worst], color=ORANGE, marker="*", markersize=13, linestyle="")
        axes.annotate(
            f"{error[worst]:.5f}", (x[worst], error[worst]), (-8, 5), textcoords="offset points", ha="right"
        )
        axes.set(title=scheme, xlabel="element / amax")
        axes.legend(loc="upper left", frameon=False)
    panels[0].set(ylabel="|element − its value| / amax", ylim=(0, 0.22))
    above.suptitle("A worst block of each scheme: the error of an element of any size. ★ is the largest")
    axes = below.subplots()
    _every_amax(axes)
    below.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _worst_block(scheme: str) -> tuple[Float64, Float64]:
    """Element / amax and error / amax in a block whose amax has rounded its scale up as far as that goes."""
    amax, *others, worst = prove.worst_block(scheme)
    x = np.sort(np.append(np.linspace(0, amax, 4000), worst))
    blocks = np.zeros((len(x), MX_BLOCK if "MX" in scheme else BLOCK), np.float32)
    blocks[:, 0] = x
    blocks[:, 1 : 2 + len(others)] = [amax, *others]
    if "MX" in scheme:
        values = mxfp8(blocks).astype(np.float64)
    elif scheme == "NVFP4":
        values = exact_values(quantize(blocks, 1))
    else:
        values = merge(augment_activations(blocks, prove.ALL, 1), prove.ALL)
    return x / amax, np.abs(blocks - values)[:, 0] / amax


def _every_amax(axes: Axes) -> None:
    amax = np.geomspace(prove.LEAST, prove.MOST, 20000)
    swept = prove.sweep(prove.bfloat16(), prove.that_matter(prove.bfloat16())[::25])
    marks = {"NVFP4": (BLUE, "o"), "ARC": (ORANGE, "^")}
    for s, (scheme, bound) in enumerate(prove.BOUNDS.items()):
        color, marker = marks[scheme]
        axes.plot(amax, bound(amax) / amax, color=color, linewidth=1, label=f"{scheme}: bound")
        axes.plot(
            swept.amaxes, swept.worst[s] / swept.amaxes, color=color, marker=marker, markersize=4,
            linestyle="", markerfacecolor="none", label=f"{scheme}: bfloat16 attains",
        )  # fmt: skip
    axes.axhline(float(bounds.MXFP8_CEILING), color=GREY, linestyle="--", label="MXFP8: 1/17")
    for end in prove.range_below(prove.arc, float(bounds.MXFP8_CEILING)):
        axes.axvline(end, color=GREY, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="block amax / tensor scale", ylabel="largest error / amax")
    axes.set_title("Every block amax: ARC's largest error is below MXFP8's between the dotted lines")
