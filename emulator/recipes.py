"""Whose bits are these? The order of operations of each NVFP4 library, as data, and the few steps they share.

A formula is a Python expression over float32: every operation is one float32 rounding, in the order in which
Python evaluates it. Its names: A amax of the tensor · dec the tensor scale that multiplies to decode, enc the
one that divides · a amax of a block · x an element · s the decoded block scale · r6 = fl(1 / 6). Functions:
t(·) and bf16(·) round to the dtype of the input and to bfloat16, rcp(·) is rcp.approx.ftz, its error chosen.
`python -m emulator.recipes` prints docs/recipes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arcquant_ref import checks
from arcquant_ref.formats import BLOCK, E2M1, E4M3, Codes, Float32
from arcquant_ref.select import Selection

from .formats import (
    bits_in,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    f32,
    f64,
    largest,
    u32,
)

FLT_MAX, LEAST_NORMAL = np.finfo(f32).max, np.finfo(f32).tiny
LEAST_SCALE = 2.0 ** (1 - E4M3.bias - E4M3.mantissa_bits)
LEAST_NORMAL_SCALE = 2.0 ** (1 - E4M3.bias)
MINUS_ZERO = np.uint8(2**E2M1.magnitude_bits)
E2M1_MAX, TOP = f32(largest(E2M1)), f32(largest(E2M1) * largest(E4M3))
ROUNDS_TO_EIGHT = E2M1_MAX + f32(1)  # a tie: half of it, 3½, goes to the even 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one library turns an (M, K) matrix into NVFP4 bytes. Formulas as the module's docstring says.

    tensor_scale     formula of A; `direction` says whether it is dec or enc, `stores` what the library keeps
    prescale         what becomes of x before blocks are formed
    block_scale      formula of a; at least `floor`, at most 448, then E4M3, ties to even
    zero_block       what replaces a block scale of zero before the floor
    rounded_to_zero  what replaces a block scale that E4M3 rounds to zero
    element          formula of x and s; then E2M1, ties to even
    clamps           False: an element that rounds to 8 becomes code 8, and infinity NaN
    keeps_minus_zero False: the sign is that of x < 0, not the sign bit
    four_over_six    try the block scale · 1.5 too and keep it if its squared error is smaller
    nan              the bytes of a NaN scale and of a NaN element, as found on x86-64
    reciprocal_ulp   by how many units in the last place rcp(·) is off
    residual         formula of what ARC quantizes next, of x, q and s; None where the library has none
    reorders         ARC: channels in selection order first
    """

    name: str
    tensor_scale: str
    direction: str = "dec"
    stores: str = "dec"
    prescale: str = "x"
    block_scale: str
    floor: float = 0.0
    zero_block: float = 0.0
    rounded_to_zero: float = 0.0
    element: str
    clamps: bool = True
    keeps_minus_zero: bool = True
    four_over_six: bool = False
    nan: tuple[int, int] = (0x7F, 0x7)
    reciprocal_ulp: int = 0
    residual: str | None = None
    reorders: bool = True
    high_nibble_first: bool = False
    swizzled: bool = False
    evidence: str
    note: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Produced:
    """What a recipe makes of a matrix: codes (M, K), block_scales (M, K/16), and the float32 that the library
    stores as its tensor scale: dec, enc or A. Unlike in an NVFP4Tensor, NaN, 0 and inf can occur."""

    codes: Codes
    block_scales: Codes
    tensor_scale: np.float32


_ours = Recipe(
    name="arcquant_ref",
    tensor_scale="1 if A == 0 else maximum(A / 2688, LEAST_NORMAL)",
    block_scale="a / 6 / dec",
    floor=LEAST_SCALE,
    element="x / (s * dec)",
    residual="f32(f64(x) - f64(q * s) * f64(dec))",
    evidence="here: docs/spec.md, sections 3 and 4",
)
_fast = Recipe(
    name="FlashInfer/TensorRT-LLM fast",
    tensor_scale="1 / A * 2688",
    direction="enc",
    stores="enc",
    block_scale="enc * (a * rcp(6))",
    element="x * where(a == 0, 0, rcp(s * rcp(enc)))",
    swizzled=True,
    evidence="read: FlashInfer, quantization_utils.cuh (also in TensorRT-LLM)",
    note="rcp.approx.ftz.f32 cannot be reproduced without the hardware: its error is a parameter. A zero "
    "in an underflowed block is 0 · inf, NaN, and cvt makes code 7 of it.",
)
_exact = replace(
    _fast,
    name="FlashInfer/TensorRT-LLM exact",
    block_scale="where(a == 0, 0, a * (enc * r6))",
    element="x * where(a == 0, 0, 1 / (s * (1 / enc)))",
    note="Transformer Engine's order without its min(·, FLT_MAX): a zero in an underflowed block becomes "
    "code 7, and −0 keeps its sign.",
)
_authors = Recipe(
    name="ARCQuant authors",
    tensor_scale="A / 2688",
    prescale="bf16(x / dec)",
    block_scale="a / 6",
    floor=LEAST_SCALE,
    element="x * (1 / s)",
    residual="bf16(x - q * s)",
    swizzled=True,
    evidence="read: the authors' 16-wide kernel",
    note="What the kernels with residual channels do with an all-zero tensor was not read.",
)
_trtllm_arc = replace(
    _authors,
    name="TensorRT-LLM ARC (reorder)",
    tensor_scale="1 / A * 2688",
    direction="enc",
    stores="enc",
    prescale="bf16(x * enc)",
    element="x * rcp(s)",
    evidence="read: TensorRT-LLM pull request 11333",
    note="",
)
_fouroversix = Recipe(
    name="fouroversix (static 6)",
    tensor_scale="2688 / A",
    direction="enc",
    stores="A",
    block_scale="where(A == 0, 0, a / 6 * enc)",
    element="where(s == 0, 0, x * (1 / (1 / enc * s)))",
    clamps=False,
    keeps_minus_zero=False,
    nan=(0xFF, 0xB),
    swizzled=True,
    evidence="ran: fouroversix 1.0.5",
    note="No clamp: in a block whose scale rounds down among subnormals an element of 7 or more becomes 8, "
    "whose code does not exist; its bits are those of −0.",
)
_list = [
    _ours,
    _authors,
    _trtllm_arc,
    replace(
        _trtllm_arc,
        name="TensorRT-LLM ARC (no reorder)",
        prescale="x * enc",
        residual="x - q * s",
        reorders=False,
        evidence="read: TensorRT-LLM pull request 13117",
    ),
    Recipe(
        name="Transformer Engine reference",
        tensor_scale="minimum(2688 / A, FLT_MAX)",
        direction="enc",
        stores="A",
        block_scale="a * (enc * r6)",
        element="x * minimum(1 / (s * (1 / enc)), FLT_MAX)",
        keeps_minus_zero=False,
        evidence="ran: transformer-engine 2.20.2, reference_nvfp4.py",
    ),
    _exact,
    _fast,
    replace(_fast, name="FlashInfer/TensorRT-LLM fast (rcp + 1 ulp)", reciprocal_ulp=1),
    replace(_fast, name="FlashInfer/TensorRT-LLM fast (rcp - 1 ulp)", reciprocal_ulp=-1),
    Recipe(
        name="vLLM reference",
        tensor_scale="1 / A * 2688",
        direction="enc",
        stores="enc",
        block_scale="enc * (a * r6)",
        element="x * safe(s * safe(enc))",
        keeps_minus_zero=False,
        nan=(0xFF, 0x7),
        evidence="ran: vllm 0.33.0, nvfp4_emulation_utils.py",
        note="safe(v) is 1 / v, and 1e-8 where v = 0. An all-zero tensor gives NaN scales.",
    ),
    Recipe(
        name="torchao",
        tensor_scale="A / 2688",
        block_scale="a / 6 / dec",
        floor=LEAST_NORMAL_SCALE,
        element="x * (1 / dec / s)",
        evidence="ran: torchao 0.18.0",
        nan=(0xFF, 0xC),
        note="An all-zero tensor gives NaN scales. Scales are linear, or in 128x4 tiles on request.",
    ),
    Recipe(
        name="ModelOpt",
        tensor_scale="A / 2688",
        block_scale="a / (6 * dec)",
        floor=LEAST_SCALE,
        zero_block=1.0,
        nan=(0xFF, 0x7),
        element="x / (s * dec)",
        keeps_minus_zero=False,
        evidence="ran: nvidia-modelopt 0.47.0",
        note="An all-zero tensor gives NaN scales.",
    ),
    Recipe(
        name="compressed-tensors",
        tensor_scale="one_if_infinite(t(t(1 / A) * 2688))",
        direction="enc",
        stores="enc",
        block_scale="enc * t(a / 6)",
        rounded_to_zero=0.125,
        element="x / (s / enc)",
        keeps_minus_zero=False,
        evidence="ran: compressed-tensors 0.20.0",
        note="The tensor scale and a / 6 are computed in the dtype of the input, so bfloat16 and float32 "
        "copies of the same numbers give different bytes; in float16 an amax below 0.041 overflows, and enc "
        "becomes 1.",
    ),
    _fouroversix,
    replace(
        _fouroversix,
        name="fouroversix (4/6)",
        tensor_scale="1536 / A",
        four_over_six=True,
        note="1536 = 6 · 256: a block scale may grow by half, so that its largest element becomes 4. "
        "Squared errors are summed in float32; which candidate wins a near tie depends on that order.",
    ),
    Recipe(
        name="comfy-kitchen",
        tensor_scale="t(A / 2688)",
        block_scale="a / 6 / dec",
        element="where(s * dec == 0, 0, x / (s * dec))",
        nan=(0xFF, 0xC),
        high_nibble_first=True,
        swizzled=True,
        evidence="ran: comfy-kitchen 0.2.40, eager backend",
        note="The layout computes A / 2688 in the dtype of the input. An all-zero tensor gives NaN scales.",
    ),
]
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _list}


def quantize(recipe: Recipe, x: ArrayLike, tensor_scale: float | np.float32 | None = None) -> Produced:
    """What `recipe` makes of the (M, K) matrix, blocks of 16 along K.

    `x` is float32, float16, bfloat16 (of ml_dtypes, or its bits as uint16) or float64 (rounded once to
    float32). `tensor_scale` is a static one, as the library stores it. Raises TypeError for another dtype,
    ValueError for NaN, infinity, an empty or non-matrix x, or K not a multiple of 16.

    >>> q = quantize(RECIPES["torchao"], np.float32([[0.0] * 16 + [6.0] * 16]), tensor_scale=1)
    >>> q.block_scales, q.codes[0, -1]
    (array([[ 8, 56]], dtype=uint8), np.uint8(7))
    """
    x, names = of_tensor(recipe, x, tensor_scale)
    return _produced(recipe, *_quantize_blocks(recipe, x, names), names)


def augment(
    recipe: Recipe, x: ArrayLike, selection: Selection, tensor_scale: float | np.float32 | None = None
) -> Produced:
    """Activations with residual channels as `recipe` makes them: (M, K + S), P … P, then P₀ R₀ P₁ R₁ ….

    Arguments and errors as in `quantize`; ValueError for a recipe without residuals, or a selection for
    another K or with weight channels.
    """
    if recipe.residual is None:
        arc = ", ".join(name for name, other in RECIPES.items() if other.residual)
        raise ValueError(f"recipe {recipe.name!r} has no residual channels; those that have: {arc}.")
    x, names = of_tensor(recipe, x, tensor_scale)
    checks.selection_fits("x", x.shape[1], selection.K)
    checks.no_weight_channels("a recipe", len(selection.weight_channels))
    x = x[:, selection.order] if recipe.reorders else x
    codes, scales = _quantize_blocks(recipe, x, names)
    if selection.num_residual == 0:
        return _produced(recipe, codes, scales, names)
    q, s = decode_e2m1(codes), np.repeat(decode_e4m3(scales), BLOCK, axis=1)
    r = evaluate(recipe.residual, names | {"x": x, "q": q, "s": s})[:, -selection.num_residual :]
    more_codes, more_scales = _quantize_blocks(recipe, r, names)
    codes, scales = _interleave(codes, more_codes, BLOCK), _interleave(scales, more_scales, 1)
    return _produced(recipe, codes, scales, names)


def pack(recipe: Recipe, produced: Produced) -> tuple[Codes, Codes]:
    """Packed codes, (M, K/2), and block scales, (M, K/16) or flat 128x4 tiles, as the library keeps them."""
    even, odd = produced.codes[:, ::2], produced.codes[:, 1::2]
    low, high = (odd, even) if recipe.high_nibble_first else (even, odd)
    scales = produced.block_scales
    return low | high << np.uint8(4), _tiles(scales) if recipe.swizzled else scales


def of_tensor(
    recipe: Recipe, x: ArrayLike, tensor_scale: float | np.float32 | None
) -> tuple[Float32, dict[str, Any]]:
    """The prescaled matrix, and what the formulas call the numbers that belong to the whole tensor."""
    values, to_dtype = _values(x)
    names = {"A": np.abs(values).max(), "t": to_dtype, "rcp": lambda v: _rcp(v, recipe.reciprocal_ulp)}
    if tensor_scale is not None:
        names[recipe.stores] = f32(tensor_scale)
    if recipe.direction not in names:
        names[recipe.direction] = evaluate(recipe.tensor_scale, names)[()]
    return evaluate(recipe.prescale, names | {"x": values}), names


def _values(x: ArrayLike) -> tuple[Float32, Callable]:
    """The matrix as float32, and the rounding to the dtype that it had."""
    bits = bits_in("x", checks.matrix_shape("x", x, BLOCK))
    if bits.dtype == np.uint16:
        return checks.floats("x", (bits.astype(u32) << u32(16)).view(f32)), _bf16
    if bits.dtype == np.int16:
        return checks.floats("x", bits.view(np.float16)), _fp16
    return checks.floats("x", bits.view(f32)), f32


def _quantize_blocks(recipe: Recipe, x: Float32, names: dict[str, Any]) -> tuple[Codes, Codes]:
    """Steps that all recipes share: amax, block scale, step, elements."""
    blocks = x.reshape(len(x), -1, BLOCK)
    names = names | {"a": np.abs(blocks).max(axis=-1, keepdims=True)}
    v = evaluate(recipe.block_scale, names)
    codes, scales, q = _encode(recipe, blocks, v, names)
    if recipe.four_over_six:
        codes4, scales4, q4 = _encode(recipe, blocks, evaluate("v * 1.5", {"v": v}), names)
        smaller = _squared_error(q4, scales4, blocks, names) < _squared_error(q, scales, blocks, names)
        np.copyto(codes, codes4, where=smaller)
        np.copyto(scales, scales4, where=smaller)
    return codes.reshape(x.shape), scales[..., 0]


def _encode(
    recipe: Recipe, blocks: Float32, v: Float32, names: dict[str, Any]
) -> tuple[Codes, Codes, Float32]:
    """Codes (M, K/16, 16), scales (M, K/16, 1) for block scales v that are not yet rounded, and the codes'
    values before an 8 loses its place among them."""
    v = np.maximum(np.where(v == 0, f32(recipe.zero_block), v), f32(recipe.floor))  # NaN stays NaN
    scales = encode_e4m3(v)
    scales[scales == 0] = encode_e4m3(f32(recipe.rounded_to_zero))
    scaled = evaluate(recipe.element, names | {"x": blocks, "s": decode_e4m3(scales)})
    scales[np.isnan(v)] = recipe.nan[0]
    codes = encode_e2m1(scaled)
    if not recipe.keeps_minus_zero:
        codes[(codes == MINUS_ZERO) & ~(scaled < 0)] = 0
    q = decode_e2m1(codes)
    if not recipe.clamps:
        eight = np.abs(scaled) >= ROUNDS_TO_EIGHT
        codes[eight], q[eight] = MINUS_ZERO, np.copysign(f32(8), scaled[eight])
        scaled = np.where(np.isinf(scaled), f32(np.nan), scaled)
    codes[np.isnan(scaled)] = recipe.nan[1]
    return codes, scales, q


def _squared_error(q: Float32, scales: Codes, blocks: Float32, names: dict[str, Any]) -> Float32:
    """(M, K/16, 1): Σ (q · s · A / 1536 − x)² over a block, in the order of PyTorch on x86-64: the halves are
    added, then their eight sums one by one."""
    names = names | {"q": q, "s": decode_e4m3(scales), "x": blocks}
    error = evaluate("q * s * A / 1536 - x", names)
    with np.errstate(all="ignore"):
        squares = error * error
        halves = squares[..., : BLOCK // 2] + squares[..., BLOCK // 2 :]
        return np.add.accumulate(halves, axis=-1, dtype=f32)[..., -1:]


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<recipe>", "eval")


def evaluate(formula: str, names: dict[str, Any]) -> NDArray[Any]:
    """The formula's value. The formulas are the constants of this module: no input reaches `eval`."""
    with np.errstate(all="ignore"):
        return np.asarray(eval(_compiled(formula), FUNCTIONS | names), f32)


def _bf16(v: Float32) -> Float32:
    """Rounded to bfloat16, ties to even."""
    bits = np.asarray(v, f32).view(u32)
    rounded = (bits + u32(0x7FFF) + (bits >> u32(16) & u32(1))) & u32(0xFFFF0000)
    return np.where(np.isnan(v), v, rounded.view(f32))


def _fp16(v: Float32) -> Float32:
    return np.asarray(v, f32).astype(np.float16).astype(f32)


def _rcp(v: Float32, ulp: int) -> Float32:
    """1 / v rounded to nearest, then moved by `ulp` units away from zero; subnormals are zero."""
    v = _flushed(np.asarray(v, f32))
    r = f32(1) / v
    moved = (r.view(np.int32) + np.int32(ulp)).view(f32)
    return _flushed(np.where(np.isfinite(r) & (r != 0), moved, r))


def _flushed(v: Float32) -> Float32:
    return np.where(np.abs(v) < LEAST_NORMAL, np.copysign(f32(0), v), v)


def _safe(v: Float32) -> Float32:
    return f32(1) / np.where(v == 0, f32(1e8), v).astype(f32)


def _interleave(primary: NDArray[Any], extra: NDArray[Any], width: int) -> NDArray[Any]:
    """P … P, then P₀ E₀ P₁ E₁ …, in pieces of `width` columns."""
    rows, s = extra.shape
    plain, last = primary[:, :-s], primary[:, -s:]
    pairs = np.stack([part.reshape(rows, -1, width) for part in (last, extra)], axis=2)
    return np.concatenate([plain, pairs.reshape(rows, 2 * s)], axis=1)


def _tiles(scales: Codes) -> Codes:
    """(M, K/16) → flat 128x4 tiles, zeros where they pad: in a tile, rows r, r + 32, … lie side by side."""
    padded = np.pad(scales, [(0, -n % tile) for n, tile in zip(scales.shape, (128, 4))])
    tiles = padded.reshape(len(padded) // 128, 4, 32, -1, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(-1)


def _one_if_infinite(v: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(v), v, f32(1))


FUNCTIONS: dict[str, Any] = {
    "f32": f32,
    "f64": f64,
    "bf16": _bf16,
    "where": np.where,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "safe": _safe,
    "one_if_infinite": _one_if_infinite,
    "r6": f32(1) / E2M1_MAX,
    "FLT_MAX": FLT_MAX,
    "LEAST_NORMAL": LEAST_NORMAL,
}


def _produced(recipe: Recipe, codes: Codes, scales: Codes, names: dict[str, Any]) -> Produced:
    return Produced(codes=codes, block_scales=scales, tensor_scale=f32(names[recipe.stores]))


if __name__ == "__main__":
    from .recipes_page import markdown

    print(markdown(), end="")
