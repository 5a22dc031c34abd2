"""The bounds of bounds.py, proved by trying everything: every bfloat16 (or float16) amax of a block, every
element up to it, every second scale that a block of these can get. The arithmetic is its own: real numbers at
tensor_scale 1, all of them exact in float64, rounded by their exponents and `rint`.

docs/bounds.md says why tensor_scale 1 is enough, and what is left for float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import emulator
from emulator.jit import helper, kernel, over_rows

from . import baselines, bounds
from .augment import augment_activations, merge, split
from .formats import BLOCK, E2M1, E4M3, Float32, Float64, FloatFormat, decode
from .quantize import dequantize, quantize
from .sample import load_sample
from .select import Selection, calibrate, select_top
from .tensor import NVFP4Tensor

Index = NDArray[np.int64]
Bound = Callable[[Float64], Float64]


class Grid(NamedTuple):
    """A format by its integers."""

    mantissa_bits: int
    least_exponent: int  # of its normal numbers and of its subnormal ones
    top: int  # the largest code


def _grid(fmt: FloatFormat) -> Grid:
    return Grid(fmt.mantissa_bits, 1 - fmt.bias, 2**fmt.magnitude_bits - 1 - fmt.nan_codes)


ELEMENT, SCALE = _grid(E2M1), _grid(E4M3)
OTHER_TENSOR_SCALES = 100  # between 1 and 2, for the search in float32
PIECE = 32  # amaxes between two looks at the progress bar
LEAST, MOST = 2.0**-12, 2.0**13  # of the amaxes: see that_matter


@helper
def nearest_code(x: float, grid: Grid) -> int:
    """x >= 0 → the nearest code, ties to even, saturating."""
    if x == 0:  # has no exponent
        return 0
    exponent = max(math.frexp(x)[1] - 1, grid.least_exponent)
    units = int(np.rint(math.ldexp(x, grid.mantissa_bits - exponent)))  # half to even
    return min(((exponent - grid.least_exponent) << grid.mantissa_bits) + units, grid.top)


@helper
def value_of(code: int, grid: Grid) -> float:
    field = code >> grid.mantissa_bits
    mantissa = code & ((1 << grid.mantissa_bits) - 1)
    hidden_one = (1 << grid.mantissa_bits) if field > 0 else 0
    return math.ldexp(
        float(mantissa + hidden_one), grid.least_exponent + max(field - 1, 0) - grid.mantissa_bits
    )


@helper
def scale_code_of(amax: float, most: float) -> int:
    return max(nearest_code(amax / most, SCALE), 1)


@helper
def error_of(x: float, scale: float, grid: Grid) -> float:
    """|x − x̂| for x >= 0 and this scale."""
    return abs(x - scale * value_of(nearest_code(x / scale, grid), grid))


@kernel
def _sweep(amaxes: Float64, x: Float64, worst: Float64, at: Index) -> int:
    """For each amax the largest error without (worst[0]) and with residual (worst[1]); which elements make it
    (at[0], at[1]) and which one sets the second scale (at[2]). `x` ascends. Returns the number of cases."""
    residual = np.empty(len(x))
    largest, setter = np.empty(SCALE.top + 1), np.empty(SCALE.top + 1, np.int64)
    most, cases = value_of(ELEMENT.top, ELEMENT), 0
    for i in range(len(amaxes)):
        scale = value_of(scale_code_of(amaxes[i], most), SCALE)
        count = np.searchsorted(x, amaxes[i], side="right")
        largest[:] = -1
        for j in range(count):
            residual[j] = error_of(x[j], scale, ELEMENT)
            if residual[j] > worst[0, i]:
                worst[0, i], at[0, i] = residual[j], j
        for j in range(count):  # the amax itself has a residual: the second block's amax is at least that
            if residual[j] >= residual[count - 1]:
                code = scale_code_of(residual[j], most)
                if residual[j] > largest[code]:
                    largest[code], setter[code] = residual[j], j
        for code in range(SCALE.top + 1):
            if largest[code] < 0:
                continue
            scale = value_of(code, SCALE)
            for j in range(count):
                if residual[j] <= largest[code]:
                    cases += 1
                    error = error_of(residual[j], scale, ELEMENT)
                    if error > worst[1, i]:
                        worst[1, i], at[1, i], at[2, i] = error, j, setter[code]
    return cases


@kernel
def _sweep_mx(amaxes: Float64, scales: Float64, x: Float64, grid: Grid) -> float:
    """The largest error / amax for elements of any format under given scales, without residual."""
    worst = 0.0
    for i in range(len(amaxes)):
        for j in range(np.searchsorted(x, amaxes[i], side="right")):
            worst = max(worst, error_of(x[j], scales[i], grid) / amaxes[i])
    return worst


@dataclass(frozen=True, eq=False)
class Sweep:
    """The largest error for each amax, and the elements that make it; see `_sweep`."""

    amaxes: Float64
    elements: Float64
    worst: Float64  # (2, amaxes)
    at: Index  # (3, amaxes)
    cases: int


def sweep(elements: Float64, amaxes: Float64) -> Sweep:
    """For each amax the largest error, without and with residual, of a block that has it: every element up to
    it is tried, with every scale that the residual's block can get. Tensor scale 1, exact, on all threads.
    Both arguments ascend, and the amaxes are among the elements."""
    assert np.isin(amaxes, elements).all()  # else a block would lack its own amax
    worst, at, cases = np.zeros((2, len(amaxes))), np.zeros((3, len(amaxes)), np.int64), 0
    for start in tqdm(range(0, len(amaxes), PIECE), "amaxes", disable=None, leave=False):

        def task(first: int, last: int, start: int = start) -> int:
            part = slice(start + first, start + last)
            return _sweep(amaxes[part], elements, worst[:, part], at[:, part])

        cases += sum(over_rows(task, min(PIECE, len(amaxes) - start)))
    return Sweep(amaxes, elements, worst, at, cases)


def bfloat16() -> Float64:
    """Every non-negative finite bfloat16, ascending; exact."""
    return (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def float16() -> Float64:
    """Every non-negative finite float16, ascending; exact."""
    return np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)


def that_matter(numbers: Float64) -> Float64:
    """Those from 2⁻¹² up to 2¹³, the amaxes worth trying at tensor scale 1: below, all codes are zero; above,
    both scales saturate."""
    return numbers[(numbers >= LEAST) & (numbers < MOST)]


def nvfp4(amax: Float64) -> Float64:
    """The bound to be proved, in units of the tensor scale."""
    return bounds.nvfp4_in_units(amax)


def arc(amax: Float64) -> Float64:
    """The same with residual."""
    return bounds.nvfp4_in_units(bounds.nvfp4_in_units(amax))


def kinks() -> Float64:
    """Between these amaxes `nvfp4` and `arc` are constant or rise as fast as amax does."""
    least, step, most = E4M3.least_positive, E4M3.max, E2M1.max * E4M3.max
    thresholds = E2M1.max * E4M3.midpoints.astype(np.float64)
    floored = np.arange(1, 4 * int(thresholds[1] / least)) * least / 4  # E2M1's midpoints at the least scale
    saturated = [most + thresholds, most * np.arange(1, 5), [most + step, 2 * most + step]]
    return np.unique(np.concatenate([floored, thresholds, *saturated]))


def supremum(bound: Bound, low: float, high: float) -> float:
    """sup bound / amax over low <= amax <= high: at a kink, where a bound has jumped, or at an end."""
    points = np.concatenate([kinks(), [low, high]])
    inside = points[(points >= low) & (points <= high)]
    return float((bound(inside) / inside).max())


def range_below(bound: Bound, fraction: float) -> tuple[float, float]:
    """The least and the largest amax of the range around 1 in which bound(amax) <= fraction · amax."""
    at, value = kinks(), bound(kinks())
    crossings = [value / fraction, (at - value) / (1 - fraction)]  # of a constant piece, of a rising one
    ends = np.unique(np.concatenate([at, *crossings]))
    between = (ends[1:] + ends[:-1]) / 2
    above = bound(between) > fraction * between * (1 + 2.0**-40)
    return float(ends[1:][above & (between < 1)].max()), float(ends[:-1][above & (between > 1)].min())


SCHEMES = ("NVFP4", "ARC")
BOUNDS: dict[str, Bound] = {"NVFP4": nvfp4, "ARC": arc}
CONSTANTS = {"NVFP4": bounds.NVFP4, "ARC": bounds.ARC}


def regimes(scheme: str) -> dict[str, tuple[float, float]]:
    """Ranges of amax, in units of the tensor scale, by name: in each, one rule sets the largest error. The
    constants 3/17 and 3/100 hold in the one called normal."""
    subnormal, normal = E2M1.max * E4M3.least_positive, E2M1.max * E4M3.least_normal
    begin = {"scale floored": LEAST, "scale subnormal": subnormal, "normal": normal}
    if scheme == "ARC":
        begin["normal, residual's scale low"] = begin.pop("normal")
        begin["normal"] = range_below(arc, float(bounds.ARC))[0]
    begin["saturated"] = float(np.nextafter(E2M1.max * E4M3.max, np.inf))
    return dict(zip(begin, pairwise([*begin.values(), MOST])))


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What the sweep says of one scheme in one regime, everything in units of the tensor scale."""

    scheme: str
    name: str
    low: float
    high: float
    supremum: float  # of bound / amax over all real amaxes
    attained: float  # the largest error / amax
    worst_ratio: float  # the largest error / bound: 1 is attained, more would refute the bound
    block: list[float]  # the numbers with the largest error / amax


def by_regime(swept: Sweep) -> list[Regime]:
    """What was found, summed up for each scheme and regime that the sweep has amaxes of."""
    a, found = swept.amaxes, []
    for s, scheme in enumerate(SCHEMES):
        for name, (low, high) in regimes(scheme).items():
            inside = np.flatnonzero((a >= low) & (a < high))
            if not len(inside):
                continue
            i = inside[np.argmax(swept.worst[s, inside] / a[inside])]
            chosen = swept.elements[swept.at[[[0], [2, 1]][s], i]]
            found.append(
                Regime(
                    scheme=scheme,
                    name=name,
                    low=low,
                    high=high,
                    supremum=supremum(BOUNDS[scheme], low, high),
                    attained=float(swept.worst[s, i] / a[i]),
                    worst_ratio=float((swept.worst[s, inside] / BOUNDS[scheme](a[inside])).max()),
                    block=[a[i], *chosen] + [0.0] * (BLOCK - 1 - len(chosen)),
                )
            )
    return found


ALL = select_top(np.ones(BLOCK), BLOCK)  # one block, all of it with a residual


def worst_block(scheme: str) -> list[float]:
    """A block within an ulp of the constant, without its zeros: the amax, just above where the scale rounds
    up most; for ARC a number that leaves a whole step and so sets the second scale; the number that errs."""
    if scheme == "NVFP4":  # scale 1.125
        threshold, others = 6 * 1.0625, [5 * 1.125]
    elif scheme == "ARC":  # scales 1.625 and 0.28125
        threshold, others = 6 * 1.5625, [5 * 1.625, 4 * 1.625 + 5 * 0.28125]
    else:  # MXFP8: halfway between 256 and 288
        threshold, others = 272.0, [272.0]
    return [float(np.nextafter(np.float32(threshold), np.float32(np.inf))), *others]


def witness(block: list[float], scheme: str) -> str:
    """The 16 numbers, the scales and codes that the reference gives them, and which of them errs most."""
    x = np.array([block], np.float32)
    q = quantize(x, 1) if scheme == "NVFP4" else augment_activations(x, ALL, 1)
    primary, residual = split(q, 0 if scheme == "NVFP4" else BLOCK)
    error = np.abs(x - (dequantize(q) if residual is None else merge(q, ALL)))[0]
    worst = int(np.argmax(error))
    lines = [f"numbers   {_listed(x[0])}"]
    for name, part in (("codes", primary), ("residual", residual)):
        if part is not None:
            scale = float(decode(E4M3, part.block_scales)[0, 0])
            lines.append(f"{name:<9} {_listed(part.codes[0])}  block scale {scale:g}")
    lines.append(f"number {worst} errs by {error[worst]:g}, {error[worst] / x.max():.6f} of amax")
    return "\n".join("    " + line for line in lines)


def _listed(numbers: NDArray) -> str:
    return " ".join(f"{n:g}" for n in numbers)


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """How near float32 comes to a constant: the largest error / amax around all thresholds, divided by it."""

    scheme: str
    tensor_scale: float
    ratio: float
    blocks: int
    block: list[float]


def search_float32(tensor_scale: float) -> list[Nearest]:
    """Blocks of float32 around every pair of thresholds, ± 1 ulp: an amax where the block scale changes, an
    element that leaves a residual where the residual's scale changes, and one that then errs most."""
    values = np.array([value_of(code, SCALE) for code in range(SCALE.top + 1)])
    thresholds = value_of(ELEMENT.top, ELEMENT) * (values[:-1] + values[1:]) / 2
    codes = np.arange(2, len(values))
    first, second = (pair.ravel() for pair in np.meshgrid(codes, codes))
    low = thresholds[first - 1] < range_below(arc, float(bounds.ARC))[0]
    possible = ~low & (thresholds[second - 1] < values[first])
    first, second = first[possible], second[possible]

    def leave(residual: Float64) -> Float64:  # near 0 if that leaves it, else beyond 4 steps
        return np.where(residual <= values[first] / 4, residual, 4 * values[first] + residual)

    exact = [
        thresholds[first - 1],
        leave(thresholds[second - 1]),
        leave(5 * values[second]),
        5 * values[first],
    ]
    numbers = np.zeros((len(first), 27, BLOCK), np.float32)
    for i, column in enumerate(exact):
        x = (column * np.float32(tensor_scale)).astype(np.float32)
        near = np.stack([np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(np.inf))], axis=1)
        numbers[:, :, i] = near[:, np.arange(27) // 3 ** min(i, 2) % 3]
    nothing = [4] * (BLOCK - 3)
    plain = numbers[:, :, [0, 3, 4, *nothing]].reshape(-1, BLOCK)
    both = numbers[:, :, [0, 1, 2, *nothing]].reshape(-1, BLOCK)
    augmented = values_of(emulator.augment_activations(both, ALL, tensor_scale))
    return [
        _nearest("NVFP4", tensor_scale, plain, values_of(emulator.quantize(plain, tensor_scale))),
        _nearest("ARC", tensor_scale, both, augmented[:, :BLOCK] + augmented[:, BLOCK:]),
    ]


def _nearest(scheme: str, tensor_scale: float, x: Float32, x_hat: Float64) -> Nearest:
    ratio = np.abs(x - x_hat).max(axis=1) / x[:, 0].astype(np.float64) / float(CONSTANTS[scheme])
    i = int(np.argmax(ratio))
    scale = float(np.float32(tensor_scale))
    return Nearest(
        scheme=scheme, tensor_scale=scale, ratio=float(ratio[i]), blocks=len(x), block=x[i].tolist()
    )


def values_of(q: NVFP4Tensor) -> Float64:
    """The (M, K) values of q, exact, decoded by this page's own arithmetic."""
    elements, scales = (np.array([value_of(c, g) for c in range(g.top + 1)]) for g in (ELEMENT, SCALE))
    sign = np.where(q.codes > ELEMENT.top, -1.0, 1.0)
    magnitude = elements[q.codes & ELEMENT.top] * np.repeat(scales[q.block_scales], BLOCK, axis=1)
    return sign * magnitude * np.float64(q.tensor_scale)


class Mx(NamedTuple):
    """A scheme to compare with: elements, quantization, the rule for its scale, our constant."""

    fmt: FloatFormat
    quantize: Callable[..., Float32]
    rule: baselines.ExponentRule
    constant: Fraction


CEILING, FLOOR = baselines.ceiling_exponent, baselines.floor_exponent
MX = {
    "MXFP8, ceiling scale": Mx(E4M3, baselines.mxfp8, CEILING, bounds.MXFP8_CEILING),
    "MXFP8, OCP floor scale": Mx(E4M3, baselines.mxfp8, FLOOR, bounds.MXFP8_FLOOR),
    "MXFP4, ceiling scale": Mx(E2M1, baselines.mxfp4, CEILING, bounds.MXFP4_CEILING),
    "MXFP4, OCP floor scale": Mx(E2M1, baselines.mxfp4, FLOOR, bounds.MXFP4_FLOOR),
}
PAPER = {"ARC": bounds.PAPER_ARC} | {scheme: bounds.PAPER_MXFP8 for scheme in MX if "MXFP8" in scheme}


def mx_attained(mx: Mx, elements: Float64) -> float:
    """The largest error / amax over every amax from 1 to 2 and every element up to it. Scales are powers of
    two: all binades are alike."""
    amaxes = elements[(elements >= 1) & (elements < 2)]
    scales = 2.0 ** -math.floor(math.log2(mx.fmt.max)) * np.ones(len(amaxes))
    if mx.rule is CEILING:
        scales[amaxes > mx.fmt.max * scales] *= 2
    return float(_sweep_mx(amaxes, scales, elements, _grid(mx.fmt)))


def relative_errors(x: Float32) -> dict[str, Float64]:
    """|x − x̂| / amax of every element of x (M, K), scheme by scheme, where the constants hold: in blocks that
    are not zero and, for NVFP4 and ARC, normal. ARC: natural channel order, every channel with a residual."""
    k = x.shape[1]
    everywhere = Selection(order=np.arange(k), num_residual=k, channel_amax=calibrate([x]))
    plain, augmented = emulator.quantize(x), emulator.augment_activations(x, everywhere)
    x_hat: dict[str, NDArray] = {"NVFP4": values_of(plain), "ARC": merge(augmented, everywhere)}
    x_hat |= {scheme: mx.quantize(x, mx.rule) for scheme, mx in MX.items()}
    errors = {}
    for scheme, values in x_hat.items():
        block, least = baselines.MX_BLOCK, 0.0
        if scheme in SCHEMES:
            block, least = BLOCK, regimes(scheme)["normal"][0]
        amax = np.repeat(bounds.block_amax(x, block), block, axis=1).astype(np.float64)
        inside = (amax > 0) & (amax >= least * np.float64(plain.tensor_scale))
        errors[scheme] = np.abs(x - values.astype(np.float64))[inside] / amax[inside]
    return errors


@dataclass(frozen=True, kw_only=True)
class Line:
    """One scheme of the table: largest error / amax."""

    scheme: str
    paper: float | None
    constant: float
    attained: float  # over every bfloat16
    normal_data: float  # 99.9 % of the elements of half a million normally distributed numbers err less
    real_layers: float  # the largest in the inputs of the sample's layers


def table(found: list[Regime]) -> list[Line]:
    """Every scheme: what the paper states, what is proved, what occurs."""
    attained = {r.scheme: r.attained for r in found if r.name == "normal"}
    attained |= {scheme: mx_attained(mx, bfloat16()) for scheme, mx in MX.items()}
    normal = relative_errors(np.random.default_rng(0).standard_normal((512, 1024), np.float32))
    layers = [relative_errors(layer.evaluation) for layer in load_sample()]
    constants = CONSTANTS | {scheme: mx.constant for scheme, mx in MX.items()}
    return [
        Line(
            scheme=scheme,
            paper=float(PAPER[scheme]) if scheme in PAPER else None,
            constant=float(constants[scheme]),
            attained=attained[scheme],
            normal_data=float(np.quantile(normal[scheme], 0.999)),
            real_layers=max(float(layer[scheme].max()) for layer in layers),
        )
        for scheme in constants
    ]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """All that `arcquant bounds --prove` finds."""

    cases: dict[str, int]
    regimes: dict[str, list[Regime]]
    float32: list[Nearest]
    below_mxfp8: dict[str, tuple[float, float]]
    table: list[Line]

    @property
    def holds(self) -> bool:
        """No error exceeds its bound or constant, but for what is allowed for the rounding of float32."""
        exhaustive = all(r.worst_ratio <= 1 for found in self.regimes.values() for r in found)
        float32 = [n.ratio for n in self.float32]
        float32 += [max(line.attained, line.real_layers) / line.constant for line in self.table]
        return exhaustive and max(float32) <= 1 + bounds.ROUNDING_RELATIVE


def prove() -> Proof:
    """Everything."""
    numbers = {"bfloat16": bfloat16(), "float16": float16()}
    tensor_scales = [1.0, *(1 + np.random.default_rng(0).random(OTHER_TENSOR_SCALES))]
    swept = {dtype: sweep(x, that_matter(x)) for dtype, x in numbers.items()}
    found = {dtype: by_regime(one) for dtype, one in swept.items()}
    return Proof(
        cases={dtype: one.cases for dtype, one in swept.items()},
        regimes=found,
        float32=[n for scale in tqdm(tensor_scales, "float32", disable=None) for n in search_float32(scale)],
        below_mxfp8={name: range_below(arc, float(MX[name].constant)) for name in MX if "MXFP8" in name},
        table=table(found["bfloat16"]),
    )


def report(proof: Proof) -> str:
    """A proof as text."""
    lines = []
    for dtype, found in proof.regimes.items():
        lines += [
            f"Every {dtype} amax from 2^-12 to 2^13, every element up to it, every second scale they get:",
            f"{proof.cases[dtype]:,} residuals, tensor_scale 1, exact but for the codes' own rounding.",
            "",
            f"{'scheme':<7} {'block scale':<27} {'amax from':>10} {'to':>10} {'error / amax: sup':>18} "
            f"{'attained':>9} {'error / bound':>14}",
        ]
        lines += [
            f"{r.scheme:<7} {r.name:<27} {r.low:>10.4g} {r.high:>10.4g} {r.supremum:>18.6f} "
            f"{r.attained:>9.6f} {r.worst_ratio:>14.6f}"
            for r in found
        ]
        for r in found:
            if r.name == "normal":
                gap = float(CONSTANTS[r.scheme]) - r.attained
                lines += ["", f"{r.scheme} comes within {gap:.6f} of {CONSTANTS[r.scheme]} with"]
                lines.append(witness(r.block, r.scheme))
        lines.append("")
    blocks = proof.float32[0].blocks
    lines.append(f"float32, {blocks:,} blocks within 1 ulp of every threshold: the largest error / amax is")
    for scheme in SCHEMES:
        one, *others = (n for n in proof.float32 if n.scheme == scheme)
        worst = max(others, key=lambda n: n.ratio)
        lines.append(
            f"{scheme:<6} {CONSTANTS[scheme]!s:>5} * (1 {_in_ulps(one)} * 2^-24) at tensor_scale 1, "
            f"(1 {_in_ulps(worst)} * 2^-24) at {worst.tensor_scale:.9g}, the worst of {len(others)} others"
        )
    allowed = bounds.ROUNDING_RELATIVE * 2**24
    lines += [f"float32 may round beyond the constants; the bounds allow {allowed:.0f} * 2^-24.", ""]
    lines += [
        f"ARC's largest error is at most {MX[name].constant} of amax, as in {name},\n"
        f"for amax / tensor_scale from {low:.6g} to {high:g}; outside it is larger."
        for name, (low, high) in proof.below_mxfp8.items()
    ]
    lines += ["", *_table_lines(proof.table), ""]
    lines.append("Every error is within its bound." if proof.holds else "BOUND VIOLATED")
    return "\n".join(lines)


def _in_ulps(one: Nearest) -> str:
    return f"{'+' if one.ratio > 1 else '-'} {abs(one.ratio - 1) * 2**24:.2f}"


def _table_lines(table: list[Line]) -> list[str]:
    lines = [
        f"{'Largest error / amax':<22} {'paper':>9}   {'proved':>7}   paper / proved   attained, bfloat16   "
        f"normal data, 99.9 %   real layers"
    ]
    for line in table:
        stated = ratio = ""
        if line.paper is not None:
            stated, ratio = f"{line.paper:.5f}", f"{line.paper / line.constant:.2f}"
        lines.append(
            f"{line.scheme:<22} {stated:>9}   {line.constant:.5f}   {ratio:>14}   {line.attained:>18.6f}   "
            f"{line.normal_data:>19.6f}   {line.real_layers:>11.6f}"
        )
    return lines
