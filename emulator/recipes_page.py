"""docs/recipes.md, made from the recipes."""
# ruff: noqa: E501 — lines of the page

import numpy as np

from arcquant_ref.formats import BLOCK

from . import recipes
from .formats import decode_e2m1, decode_e4m3, f32, u32
from .recipes import E2M1_MAX, RECIPES, TOP, Produced, Recipe, quantize

HEADER = """# Recipes

Whose bits are these? NVFP4 libraries round in different places, so the same matrix gives different bytes. Here is what each computes, as `emulator/recipes.py` has it
(this page is printed by `python -m emulator.recipes`). [`arcquant compare`](compare.md) says which of these a file can come from.

Every operation in a formula is one float32 rounding, in the order in which Python evaluates it. A is the amax of the tensor, a of a block of 16; x an element; dec the tensor scale that
multiplies to decode, enc the one that divides; s the block scale as E4M3 stores it; r6 = fl(1 / 6); t(·) and bf16(·) round to the dtype of the input and to bfloat16. Block scales are at
least the floor and at most 448, elements at most 6, ties go to the even code. *Ran* means: every byte equal to the package's own on matrices that tell all recipes apart (`tests/stress.py`); *read*
means known from the source only.

"""
AFTER_TABLE = """
`rcp` is PTX `rcp.approx.ftz.f32`: subnormal arguments and results are zero, and the result may be one unit in the last place off. Which arguments it is off for is not documented, so these bytes
cannot be reproduced without the hardware; `reciprocal_ulp` is a parameter, and 0, +1 and −1 are recipes of their own. `1 / A * 2688` is what PyTorch makes of `2688 / A` with a Python number: a reciprocal
and a product. `safe(v)` is 1 / v, and 1e-8 for v = 0; `one_if_infinite` is what its name says. NaN bytes are those of x86-64, where 0 / 0 has its sign bit set.

"""


def markdown() -> str:
    """docs/recipes.md."""
    columns = ("recipe", "tensor scale", "block scale", "floor", "element", "stored", "evidence")
    rows = [
        [
            f"**{r.name}**",
            f"{r.direction} = `{r.tensor_scale}`",
            f"`{r.block_scale}`",
            f"2{_superscript(int(np.log2(r.floor)))}" if r.floor else "–",
            f"`{r.element}`" + (", the better of a / 6 and a / 4" if r.four_over_six else ""),
            f"{r.stores}; {'high' if r.high_nibble_first else 'low'} nibble first; "
            f"scales {'in 128x4 tiles' if r.swizzled else 'linear'}",
            r.evidence,
        ]
        for r in RECIPES.values()
        if not r.reciprocal_ulp
    ]
    zeros = [[f"**{r.name}**", *_corners(r)] for r in RECIPES.values() if not r.reciprocal_ulp]
    arc = [
        [f"**{r.name}**", f"`{r.prescale}`", "yes" if r.reorders else "no", f"`{r.residual}`"]
        for r in RECIPES.values()
        if r.residual
    ]
    return (
        HEADER
        + _table(columns, rows)
        + AFTER_TABLE
        + "## Zeros, and blocks too small for the tensor's scale\n\nScale byte, and the codes of +, 0, −0 and − in that block. "
        + "Each cell is computed by the recipe.\n\n"
        + _table(("recipe", "zero block", "underflowed block", "all-zero tensor"), zeros)
        + "\n## Residual channels\n\nWhat becomes of x first, and what ARC quantizes the second time: same formulas and floor, no second tensor scale.\n\n"
        + _table(("recipe", "x", "channels reordered", "residual (q the value of a code)"), arc)
        + "\n## Notes\n\n"
        + "".join(f"- **{r.name}**: {r.note}\n" for r in RECIPES.values() if r.note and not r.reciprocal_ulp)
        + _example()
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _superscript(n: int) -> str:
    return str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _corners(recipe: Recipe) -> list[str]:
    """A zero block, one that underflows, and a tensor of zeros: scale byte and codes of +, 0, −0, −."""
    small = np.tile(np.array([1, 0, -0.0, -1], f32), BLOCK // 4)
    x = np.stack([small * 0, small * f32(2.0**-12), np.full(BLOCK, TOP)])
    some, none = quantize(recipe, x), quantize(recipe, x[:1])

    def cell(q: Produced, row: int, codes: slice) -> str:
        return f"{q.block_scales[row, 0]:#04x}, {' '.join(f'{code:x}' for code in q.codes[row, codes])}"

    return [cell(some, 0, slice(1, 3)), cell(some, 1, slice(4)), cell(none, 0, slice(1, 3))]


def _example() -> str:
    """Two libraries, one block: a step of significand 1.875 and an element on the midpoint 1.25 of it."""
    step = f32(1.875)
    block = np.full(BLOCK, E2M1_MAX * step)
    block[1] = f32(1.25) * step
    x = np.stack([block, np.full(BLOCK, TOP)])
    steps = {
        "arcquant_ref": ("a / 6 / dec", "s * dec", "x / (s * dec)"),
        "Transformer Engine reference": (
            "a * (enc * r6)",
            "1 / (s * (1 / enc))",
            "x * (1 / (s * (1 / enc)))",
        ),
    }
    text = (
        f"\n## Two libraries, one block, in bits\n\nA tensor with amax {float(TOP):g}, so dec = enc = 1, and in it a block with amax {block[0]:g} and an element "
        f"x = {block[1]:g} = 1.25 · 1.875. All are bfloat16 numbers. 1.25 is the midpoint of the E2M1 values 1 and 1.5.\n\n"
    )
    rows = []
    for name, formulas in steps.items():
        recipe = RECIPES[name]
        q, (_, names) = quantize(recipe, x), recipes.of_tensor(recipe, x, None)
        names |= {"a": block[0], "x": block[1], "s": decode_e4m3(q.block_scales[:1, 0])[0]}
        values = [(formula, recipes.evaluate(formula, names)[()]) for formula in formulas]
        cells = [f"`{formula}` = {value:.8g} = {value.view(u32):#010x}" for formula, value in values]
        code = q.codes[0, 1]
        rows.append(
            [
                f"**{name}**",
                cells[0],
                f"{q.block_scales[0, 0]:#04x}",
                *cells[1:],
                f"{code} = {decode_e2m1(code)[()]:g}",
            ]
        )
    columns = ("recipe", "block scale", "as E4M3", "step, or its reciprocal", "element", "code")
    return (
        text
        + _table(columns, rows)
        + "\nThe scales are equal. The reciprocal of 1.875 is rounded up, and the product with it lands one unit in the last place above the midpoint: 1.5 instead of 1. "
        "With dec = 1 this happens for the significand 1.875 alone, and only on data that has its numbers on midpoints, as bfloat16 data does: random float32 numbers do not show it.\n"
    )
