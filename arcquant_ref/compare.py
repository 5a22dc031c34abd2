"""Whose bytes are these? Packed NVFP4 tensors of any library against every recipe, or against each other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from emulator import recipes
from emulator.recipes import RECIPES, Produced, Recipe

from . import layout
from .formats import BLOCK, E2M1, E4M3, Codes, Float32, decode

F32 = np.float32
MINUS_ZERO, LEAST_NORMAL_CODE = 2**E2M1.magnitude_bits, 2**E4M3.mantissa_bits
ULPS = 8  # this near to a midpoint, the order of roundings decides
NAMES = [  # of codes, block scales and tensor scale in files, and what the last one usually is
    ("codes", "block_scales", "tensor_scale", "dec"),
    ("weight_packed", "weight_scale", "weight_global_scale", "enc"),
    ("weight", "weight_scale", "weight_scale_2", "dec"),
    ("qdata", "scale", "per_tensor_scale", "dec"),
    ("values", "scale_factors", "amax", "A"),
]
DIRECTIONS = {
    "dec": "multiplies to decode",
    "enc": "divides to decode",
    "A": "is the amax",
}


@dataclass(frozen=True, eq=False)
class Packed:
    """What a file holds: (M, K/2) bytes of two codes, scale bytes in any layout, a number for the tensor."""

    file: str
    names: tuple[str, str, str]
    packed: Codes
    scales: Codes
    tensor_scale: np.float32
    usual_direction: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclass(frozen=True, eq=False)
class Reading:
    """One way to read a Packed: (M, K) codes, (M, K/16) block scales; direction is dec, enc, A or unknown."""

    codes: Codes
    block_scales: Codes
    high_nibble_first: bool
    swizzled: bool
    direction: str = "unknown"

    def cropped(self, shape: tuple[int, int]) -> "Reading":
        """Without the rows and columns that a library added to fill its tiles."""
        rows, k = shape
        return replace(self, codes=self.codes[:rows, :k], block_scales=self.block_scales[:rows, : k // BLOCK])

    def packing(self) -> str:
        nibbles = "high" if self.high_nibble_first else "low"
        return (
            f"even k in the {nibbles} nibble, block scales {'in 128x4 tiles' if self.swizzled else 'linear'}"
        )


@dataclass(frozen=True, eq=False)
class Match:
    """How a recipe's numbers differ from those of a file."""

    recipe: Recipe
    label: str
    x: NDArray[Any]
    given: np.float32 | None  # a static tensor scale, as the recipe stores it
    produced: Produced
    scales: int
    codes: int
    same_tensor_scale: bool

    @property
    def exact(self) -> bool:
        return self.scales == self.codes == 0


def read(name: str) -> Packed:
    """The packed tensor of FILE, or FILE:PREFIX where it holds several.

    Names are those of NAMES with a common prefix. ValueError for a damaged file, one that holds none, several
    or an ill-shaped one.
    """
    path, _, wanted = name.partition(":") if not Path(name).exists() else (name, "", "")
    try:
        entries = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Write it again.") from error
    found = {prefix: names for prefix, names in _named_tensors(entries)}
    if not found or (wanted and wanted not in found):
        known = "; ".join(" + ".join(names[:3]) for names in NAMES)
        raise ValueError(
            f"{path} holds no packed tensor{' ' + wanted + '…' if wanted else ''}: it holds "
            f"{', '.join(sorted(entries)) or 'nothing'}. Known names, after any prefix: {known}."
        )
    if len(found) > 1 and not wanted:
        raise ValueError(
            f"{path} holds {len(found)} packed tensors; name one by its prefix: "
            + ", ".join(f"{path}:{prefix}" for prefix in sorted(found)[:8])
            + " …" * (len(found) > 8)
        )
    prefix = wanted or next(iter(found))
    *names, direction = found[prefix]
    codes, scales, tensor_scale = (_array(path, n, entries[n]) for n in names)
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] % (BLOCK // 2) or not codes.size:
        raise ValueError(
            f"{path}: {names[0]} has dtype {entries[names[0]]['dtype']} and shape {codes.shape}; packed "
            f"codes are (M, K/2) bytes, K a multiple of {BLOCK}. Pass a file with two codes a byte."
        )
    if tensor_scale.size != 1 or tensor_scale.dtype == np.uint8:
        raise ValueError(
            f"{path}: {names[2]} has dtype {entries[names[2]]['dtype']} and {tensor_scale.size} elements; a "
            f"tensor scale is one float32. Split fused layers into one tensor each."
        )
    return Packed(
        file=path,
        names=(names[0], names[1], names[2]),
        packed=codes,
        scales=scales,
        tensor_scale=F32(tensor_scale.reshape(-1)[0]),
        usual_direction=direction,
    )


def _named_tensors(entries: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    for codes, scales, tensor_scale, direction in NAMES:
        for name in entries:
            prefix = name.removesuffix(codes)
            names = (name, prefix + scales, prefix + tensor_scale)
            if name.endswith(codes) and (not prefix or prefix[-1] in "._") and set(names) <= set(entries):
                yield prefix, (*names, direction)


def _array(path: str, name: str, entry: dict[str, Any]) -> NDArray[Any]:
    """Floats as float32, everything of one byte or less as bytes."""
    dtype, data = entry["dtype"], entry["data"]
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(F32)
    if dtype in ("F32", "F16", "F64"):
        return np.frombuffer(data, f"f{int(dtype[1:]) // 8}").astype(F32)
    if dtype in ("U8", "I8", "F8_E4M3", "F4"):
        shape = entry["shape"]
        return np.frombuffer(data, np.uint8).reshape([*shape[:-1], -1])
    raise ValueError(
        f"{path}: {name} has dtype {dtype}; codes and scales are U8, F4 or F8_E4M3, tensor scales F32."
    )


def readings(packed: Packed) -> list[Reading]:
    """Every way to read these bytes: two orders of nibbles, and the layouts that have so many scales."""
    rows, k = packed.shape
    shape, flat = (rows, k // BLOCK), packed.scales.reshape(-1)
    padded = layout.swizzle_128x4(np.zeros(shape, np.uint8)).size
    layouts = {}
    if flat.size == rows * k // BLOCK:
        layouts[False] = flat.reshape(shape)
    if flat.size == padded:
        layouts[True] = layout.unswizzle_128x4(flat, shape)
    if not layouts:
        raise ValueError(
            f"{packed.file}: {packed.names[1]} has {flat.size} bytes; {rows} x {k} codes need "
            f"{rows * k // BLOCK} linear or {padded} in 128x4 tiles. Pass one scale for each {BLOCK} codes."
        )
    pairs = layout.unpack(packed.packed)
    swapped = pairs.reshape(rows, -1, 2)[:, :, ::-1].reshape(rows, k)
    return [
        Reading(codes, scales, high, swizzled)
        for (high, codes), (swizzled, scales) in product([(False, pairs), (True, swapped)], layouts.items())
    ]


def detect(packed: Packed, x: Float32) -> tuple[Reading, bool]:
    """The reading whose values fit x best, its tensor scale's direction too; False if another fits as well.

    Values are fitted with one free factor: that factor is the tensor scale which multiplies, and tells what
    the number in the file is.
    """
    fits = [(_fit(reading.cropped(x.shape), x), reading.cropped(x.shape)) for reading in readings(packed)]
    (error, factor), best = min(fits, key=lambda fit: fit[0][0])  # of equals the first: low nibble, linear
    certain = sum(other <= error for (other, _), _ in fits) == 1
    t = np.float64(packed.tensor_scale)
    with np.errstate(all="ignore"):
        meant = {"dec": t, "enc": 1 / t, "A": t / (E2M1.max * E4M3.max)}
        distance = {name: abs(np.log(factor / value)) for name, value in meant.items()}
    usable = {name: d for name, d in distance.items() if d < np.log(2)}
    return replace(
        best, direction=min(usable, key=lambda name: usable[name]) if usable else "unknown"
    ), certain


def _fit(reading: Reading, x: Float32) -> tuple[float, float]:
    """Squared error and factor of the best x ≈ factor · e2m1 · e4m3."""
    v = np.nan_to_num(
        decode(E2M1, reading.codes).astype(np.float64)
        * np.repeat(decode(E4M3, reading.block_scales), BLOCK, axis=1)
    )
    amax, norm = np.float64(np.abs(x).max() or 1), float((v * v).sum())
    y = x / amax
    factor = float((y * v).sum()) / norm if norm else 0.0
    return float(((y - factor * v) ** 2).sum()), factor * amax


def matches(packed: Packed, reading: Reading, x: Float32) -> list[Match]:
    """Every recipe, the nearest first; those that round to the dtype of x in each dtype that holds x."""
    found = []
    for recipe in RECIPES.values():
        inputs = _dtypes_of(x) if "t(" in recipe.tensor_scale + recipe.block_scale else {"": x}
        for dtype, typed in inputs.items():
            label = recipe.name + (f" from {dtype}" if dtype else "")
            tried = [_match(packed, recipe, label, typed, None, reading)]
            given = _as_stored_by(recipe, packed.tensor_scale, reading.direction)
            if given is not None and given != tried[0].produced.tensor_scale:
                tried.append(_match(packed, recipe, label, typed, given, reading))
            found.append(min(tried, key=lambda match: match.scales + match.codes))
    return sorted(found, key=lambda match: (match.scales + match.codes, len(remarks(match, reading))))


def _match(
    packed: Packed,
    recipe: Recipe,
    label: str,
    x: NDArray[Any],
    given: np.float32 | None,
    reading: Reading,
) -> Match:
    produced = recipes.quantize(recipe, x, given)
    scales, codes = differing(produced.block_scales, produced.codes, reading.block_scales, reading.codes)
    same = produced.tensor_scale.tobytes() == packed.tensor_scale.tobytes()
    return Match(recipe, label, x, given, produced, int(scales.sum()), int(codes.sum()), same)


def differing(
    scales_a: Codes, codes_a: Codes, scales_b: Codes, codes_b: Codes
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where block scales and codes differ. All NaN scales are alike, and so are the codes under them."""
    nan_a, nan_b = (scales & 0x7F == E4M3.nan_code for scales in (scales_a, scales_b))
    both = nan_a & nan_b
    return (scales_a != scales_b) & ~both, (codes_a != codes_b) & ~np.repeat(both, BLOCK, axis=1)


def _dtypes_of(x: Float32) -> dict[str, NDArray[Any]]:
    """x in every dtype that holds all of it: float32, bfloat16 (as bits), float16."""
    typed: dict[str, NDArray[Any]] = {"float32": x}
    bits = x.view(np.uint32)
    if not (bits & 0xFFFF).any():
        typed["bfloat16"] = (bits >> 16).astype(np.uint16)
    with np.errstate(over="ignore", under="ignore"):
        half = x.astype(np.float16)
    if np.array_equal(half.astype(F32), x):
        typed["float16"] = half
    return typed


def _as_stored_by(recipe: Recipe, t: np.float32, direction: str) -> np.float32 | None:
    """The file's tensor scale as this recipe would keep it; None if what it is is unknown."""
    if direction == recipe.stores:
        return t
    if "unknown" in (direction, recipe.stores) or not t > 0:
        return None
    top = F32(E2M1.max * E4M3.max)
    with np.errstate(all="ignore"):
        dec = {"dec": t, "enc": F32(1) / t, "A": t / top}[direction]
        return {"dec": dec, "enc": F32(1) / dec, "A": dec * top}[recipe.stores]


def remarks(match: Match, reading: Reading) -> list[str]:
    """In words, what is not as this recipe's library does it by itself, apart from the numbers."""
    recipe, said = match.recipe, []
    if reading.high_nibble_first != recipe.high_nibble_first:
        said.append("nibbles swapped")
    if reading.swizzled != recipe.swizzled:
        said.append("scales swizzled" if reading.swizzled else "scales linear")
    if reading.direction not in (recipe.stores, "unknown"):
        said.append(f"the library's tensor scale {DIRECTIONS[recipe.stores]}")
    if match.given is not None:
        said.append("with this tensor scale given")
    elif not match.same_tensor_scale and reading.direction in (recipe.stores, "unknown"):
        said.append(f"the library's tensor scale is {match.produced.tensor_scale:.9g}")
    return said


@dataclass(frozen=True)
class Difference:
    """The first byte in which a recipe and a file differ."""

    what: str  # block scale or code
    row: int
    k: int
    expected: int
    found: int
    reason: str

    def __str__(self) -> str:
        form = "#04x" if self.what == "block scale" else "#x"
        return (
            f"first at row {self.row}, k = {self.k}: {self.what} {self.found:{form}} in the file, "
            f"{self.expected:{form}} by the recipe. {self.reason}"
        )


def first_difference(match: Match, reading: Reading) -> Difference | None:
    """Of the block scales, or if they all agree, of the codes."""
    made = match.produced
    scales, codes = differing(made.block_scales, made.codes, reading.block_scales, reading.codes)
    if scales.any():
        row, b = np.argwhere(scales)[0].tolist()
        expected, found = made.block_scales[row, b], reading.block_scales[row, b]
        reason = _why_scale(match, row, b, expected, found)
        return Difference("block scale", row, b * BLOCK, int(expected), int(found), reason)
    if codes.any():
        row, k = np.argwhere(codes)[0].tolist()
        expected, found = made.codes[row, k], reading.codes[row, k]
        return Difference(
            "code", row, k, int(expected), int(found), _why_code(match, row, k, expected, found)
        )
    return None


def _formula(match: Match, row: int, k: int, formula: str) -> np.float32:
    """What a formula of the recipe gives for the block or the element at (row, k)."""
    x, names = recipes.of_tensor(match.recipe, match.x, match.given)
    b = k // BLOCK
    a = np.abs(x[row, b * BLOCK : (b + 1) * BLOCK]).max()
    s = decode(E4M3, match.produced.block_scales[row, b])
    return F32(recipes.evaluate(formula, names | {"a": a, "x": x[row, k], "s": s}))


def _why_scale(match: Match, row: int, b: int, expected: Any, found: Any) -> str:
    recipe = match.recipe
    v = _formula(match, row, b * BLOCK, recipe.block_scale)
    a = np.abs(_as_float32(match.x)[row, b * BLOCK : (b + 1) * BLOCK]).max()
    here = f"{recipe.block_scale} = {_bits(v)}"
    if E4M3.nan_code in (int(expected) & 0x7F, int(found) & 0x7F):
        return "A NaN scale: 0 / 0, as some libraries have it for an all-zero tensor."
    if a == 0:
        return "A zero block: libraries store different scales for it."
    if v < max(recipe.floor, E4M3.least_positive):
        return f"An underflowed scale: {here} is below the least one; libraries floor it differently or not."
    if v < E4M3.least_normal and min(expected, found) < LEAST_NORMAL_CODE <= max(expected, found):
        return f"A subnormal scale, {here}: one of the two has a floor at 2⁻⁶."
    low, high = sorted(decode(E4M3, np.array([expected, found], np.uint8)).tolist())
    if abs(int(expected) - int(found)) == 1 and _near(v, (low + high) / 2):
        return (
            f"A tie of block scales: {here} is at the midpoint {(low + high) / 2:g} of {low:g} and {high:g}; "
            f"the order of roundings decides."
        )
    if abs(int(expected) - int(found)) == 1 and abs(v - (low + high) / 2) < 2.0**-8 * v:
        return (
            f"{here} is near the midpoint {(low + high) / 2:g}, as if one of the two had rounded to 16 bits "
            f"first."
        )
    if low and 4 / 3 < high / low < 2:
        return (
            f"{here}: one scale is {high / low:.3g} times the other, as under the 4/6 rule (1.5 or 448/256)."
        )
    return f"{here} is not near a midpoint: the tensor scales differ, or the numbers that were quantized."


def _why_code(match: Match, row: int, k: int, expected: Any, found: Any) -> str:
    scaled = _formula(match, row, k, match.recipe.element)
    here = f"{match.recipe.element} = {_bits(scaled)}"
    magnitudes = sorted(int(code) % MINUS_ZERO for code in (expected, found))
    if match.produced.block_scales[row, k // BLOCK] == 0:
        return f"The scale underflowed to 0, {here}: libraries divide by it, guard it, or write zeros."
    if magnitudes == [0, 0]:
        return f"The sign of zero, {here}: some keep the sign bit, some the sign of x < 0."
    if MINUS_ZERO in (int(found), int(expected)) and abs(scaled) >= 7:
        return f"{here} rounds to 8, which has no code: one of the two does not clamp."
    if magnitudes[1] - magnitudes[0] == 1 and (int(expected) ^ int(found)) < MINUS_ZERO:
        low, high = E2M1.magnitudes[magnitudes]
        middle = (low + high) / 2
        if _near(abs(scaled), middle):
            return (
                f"A tie: {here} is at the midpoint {middle:g} of {low:g} and {high:g}; the order of "
                f"roundings decides."
            )
        if abs(abs(scaled) - middle) < 2.0**-8 * middle:
            return (
                f"{here} is near the midpoint {middle:g}, as if one of the two had rounded to 16 bits first."
            )
    return f"{here} is not near a midpoint: the steps differ, or the numbers that were quantized."


def _near(value: np.floating, middle: float) -> bool:
    return bool(abs(np.float64(value) - middle) <= ULPS * np.spacing(F32(middle)))


def _bits(value: np.float32) -> str:
    return f"{value:.9g} ({F32(value).view(np.uint32):#010x})"


def _as_float32(x: NDArray[Any]) -> Float32:
    return (x.astype(np.uint32) << 16).view(F32) if x.dtype == np.uint16 else x.astype(F32)


EXPLAINED = 3  # of the different outcomes that do not fit, the nearest


@dataclass(frozen=True)
class Row:
    """One line of a report: in how many bytes a recipe differs, and what else its library does otherwise."""

    recipe: str
    scales: int
    codes: int
    remarks: list[str]
    evidence: str

    @property
    def exact(self) -> bool:
        return self.scales == self.codes == 0


@dataclass(frozen=True)
class Report:
    """Which recipes could have made a file from an input, and why the nearest others could not."""

    file: str
    names: tuple[str, str, str]
    shape: tuple[int, int]
    packing: str
    tensor_scale: str
    rows: list[Row]
    explanations: dict[str, str]

    @property
    def writers(self) -> list[str]:
        """What writes every byte of the file by itself."""
        return [row.recipe for row in self.rows if row.exact and not row.remarks]

    @property
    def fits(self) -> bool:
        return any(row.exact for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.recipe) for row in self.rows)
        lines = [f"{self.file}: {' + '.join(self.names)}, {self.shape[0]} x {self.shape[1]}"]
        lines += [f"packing: {self.packing}", f"tensor scale: {self.tensor_scale}", ""]
        lines.append(f"  {'recipe':<{width}}   scale bytes      codes")
        for row in self.rows:
            said = ", ".join(row.remarks) or "every byte" * row.exact
            lines.append(f"  {row.recipe:<{width}}   {row.scales:>11,}  {row.codes:>9,}   {said}".rstrip())
        if self.writers:
            verdict = f"Every byte of this file is what {' or '.join(self.writers)} makes."
        elif self.fits:
            verdict = "No library makes this file by itself; those with 0 differences make its numbers."
        else:
            verdict = "No recipe makes these numbers."
        return "\n".join(
            [*lines, "", verdict, *(f"{name}: {text}" for name, text in self.explanations.items())]
        )


def against(packed: Packed, x: Float32) -> Report:
    """The packed tensor against every recipe on the matrix x that it was made from.

    Raises ValueError if x has another shape than the tensor, padding aside.
    """
    if not _only_padding_beyond(packed, x.shape):
        raise ValueError(
            f"the input has shape {x.shape}, but {packed.file} holds {packed.shape[0]} x {packed.shape[1]} "
            f"codes. Pass the matrix that was quantized, (rows, K) in the same order."
        )
    reading, certain = detect(packed, x)
    found = matches(packed, reading, x)
    table = [
        Row(
            match.label,
            match.scales,
            match.codes,
            remarks(match, reading),
            match.recipe.evidence,
        )
        for match in found
    ]
    return Report(
        file=packed.file,
        names=packed.names,
        shape=packed.shape,
        packing=reading.packing() + ("" if certain else " (other readings fit as well)"),
        tensor_scale=_describe(packed, reading),
        rows=table,
        explanations=_explanations(found, reading),
    )


def _only_padding_beyond(packed: Packed, shape: tuple[int, ...]) -> bool:
    """Libraries fill whole tiles up with zeros: outside `shape` is nothing else, and less than a tile."""
    (rows, k), (less_rows, less_k) = packed.shape, shape
    if not (0 <= rows - less_rows < layout.TILE_ROWS and 0 <= k - less_k < layout.TILE_COLS * BLOCK):
        return False
    magnitudes = layout.unpack(packed.packed) % MINUS_ZERO
    return not (magnitudes[less_rows:].any() or magnitudes[:, less_k:].any())


def _explanations(found: list[Match], reading: Reading) -> dict[str, str]:
    """For the nearest outcomes that do not fit, by the first recipe that has it: the first difference."""
    outcomes: dict[tuple[bytes, bytes], Match] = {}
    for match in found:
        if not match.exact:
            made = match.produced
            outcomes.setdefault((made.block_scales.tobytes(), made.codes.tobytes()), match)
    return {m.label: str(first_difference(m, reading)) for m in list(outcomes.values())[:EXPLAINED]}


def _describe(packed: Packed, reading: Reading) -> str:
    here = f"{packed.names[2]} = {packed.tensor_scale:.9g}"
    if reading.direction == "unknown":
        return f"{here} neither multiplies nor divides the codes back to the input"
    text = f"{here} {DIRECTIONS[reading.direction]}"
    if reading.direction != packed.usual_direction:
        text += f"; under this name it usually {DIRECTIONS[packed.usual_direction]}: do not take it for that"
    return text


@dataclass(frozen=True)
class PairReport:
    """How the numbers of two files differ, each read in the way in which they differ least."""

    files: tuple[str, str]
    packing: tuple[str, str]
    tensor_scales: str
    same_tensor_scale: bool
    scales: int
    codes: int
    first: str

    @property
    def same(self) -> bool:
        return self.scales == self.codes == 0 and self.same_tensor_scale

    def __str__(self) -> str:
        lines = [f"{file}: {packing}" for file, packing in zip(self.files, self.packing)]
        lines += [f"tensor scales: {self.tensor_scales}"]
        lines += [
            f"{self.scales:,} block scales and {self.codes:,} codes differ"
            + (f"; {self.first}" * bool(self.first))
        ]
        return "\n".join(lines)


def pair(a: Packed, b: Packed) -> PairReport:
    """Two packed tensors of the same matrix, without that matrix. Raises ValueError for different shapes."""
    shape = (min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1]))
    if not (_only_padding_beyond(a, shape) and _only_padding_beyond(b, shape)):
        raise ValueError(
            f"{a.file} holds {a.shape[0]} x {a.shape[1]} codes and {b.file} {b.shape[0]} x {b.shape[1]}; "
            f"they do not come from one matrix. Compare tensors of one shape."
        )
    read_as = [(ra.cropped(shape), rb.cropped(shape)) for ra, rb in product(readings(a), readings(b))]
    counted = [
        (differing(ra.block_scales, ra.codes, rb.block_scales, rb.codes), ra, rb) for ra, rb in read_as
    ]
    (scales, codes), ra, rb = min(counted, key=lambda c: int(c[0][0].sum() + c[0][1].sum()))
    relation, same = _relation(a, b)
    return PairReport(
        files=(a.file, b.file),
        packing=(ra.packing(), rb.packing()),
        tensor_scales=relation,
        same_tensor_scale=same,
        scales=int(scales.sum()),
        codes=int(codes.sum()),
        first=_first_of_pair(scales, codes, ra, rb),
    )


def _relation(a: Packed, b: Packed) -> tuple[str, bool]:
    """What the tensor scales of two files are to each other, and whether they mean the same."""
    ta, tb, top = np.float64(a.tensor_scale), np.float64(b.tensor_scale), E2M1.max * E4M3.max
    said = f"{a.names[2]} = {ta:.9g}, {b.names[2]} = {tb:.9g}"
    with np.errstate(all="ignore"):
        meanings = {
            "equal": ta / tb,
            "one is the reciprocal of the other: one multiplies, the other divides": ta * tb,
            f"the first is {top:g} times the second: an amax and a multiplier": ta / tb / top,
            f"the second is {top:g} times the first: a multiplier and an amax": tb / ta / top,
            f"their product is {top:g}: an amax and a divisor": ta * tb / top,
        }
    for meaning, ratio in meanings.items():
        if abs(ratio - 1) < 2.0**-20:
            return f"{said}; {meaning}" + (", up to rounding" if ratio != 1 else ""), True
    return f"{said}; they do not mean the same", False


def _first_of_pair(scales: NDArray[np.bool_], codes: NDArray[np.bool_], a: Reading, b: Reading) -> str:
    if scales.any():
        row, block = np.argwhere(scales)[0].tolist()
        pair_of = int(a.block_scales[row, block]), int(b.block_scales[row, block])
        near = "neighbours: a tie, or nearly one" if abs(pair_of[0] - pair_of[1]) == 1 else "not neighbours"
        if not (a.codes[row, block * BLOCK :][:BLOCK] & 7).any():
            near = "a block of zeros, or of numbers too small for the tensor's scale"
        both = " and ".join(f"{scale:#04x}" for scale in pair_of)
        return f"first at row {row}, k = {block * BLOCK}: block scales {both}, {near}"
    if codes.any():
        row, k = np.argwhere(codes)[0].tolist()
        left, right = int(a.codes[row, k]), int(b.codes[row, k])
        near = "neighbours: a tie, or nearly one" if abs(left - right) == 1 else "not neighbours"
        near = "zeros of different sign" if left & 7 == right & 7 == 0 else near
        return f"first at row {row}, k = {k}: codes {left:#x} and {right:#x}, {near}"
    return ""
