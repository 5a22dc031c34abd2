"""Two pictures of layouts: which lane holds what of an NVFP4 MMA, and where scales lie in memory.

    python -m gpu.plots -o docs

Nothing is drawn by hand: numbers of lanes go through the functions with which emulator.ptx runs
that instruction, numbers of scales through arcquant_ref.layout.swizzle_128x4.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from arcquant_ref.formats import E2M1
from arcquant_ref.layout import TILE_COLS, TILE_ROWS, swizzle_128x4
from emulator.ptx_instructions import matrix_of_c, rows_of_a, rows_of_b, scales_of_a, scales_of_b
from emulator.ptx_machine import WARP

Map = NDArray[np.int64]
REGISTER_BITS = 32
CODES = REGISTER_BITS // E2M1.bits  # in a register
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
# Okabe and Ito's colour-blind-safe set, half way to white. Labels or hatches tell the same
FILLS, HATCHES = ("#7FB8D8", "#F2CF7F", "#7FCEB9", "#E5BCD3"), ("", "//", "..", "xx")


def registers(count: int, parts: int) -> Map:
    """`count` registers over the lanes of a warp and in parts, (count, 1, 8, 4, parts), filled with numbers
    that tell where they are: (lane · count + register) · parts + part."""
    numbers = np.arange(WARP * count * parts).reshape(1, 8, 4, count, parts)
    return np.moveaxis(numbers, 3, 0)


def fragments() -> dict[str, tuple[Map, int, int]]:
    """For each operand of mma.m16n8k64 three things: a matrix that tells for each element in which part of
    which register of which lane it lies, as (lane · count + register) · parts + part; `count`, how many
    registers of a lane hold the operand; and `parts`, how many elements share a register."""
    scale = registers(1, 4)[0]
    return {
        "A": (rows_of_a(registers(4, CODES))[0], 4, CODES),
        "B": (rows_of_b(registers(2, CODES))[0], 2, CODES),
        "C and D": (matrix_of_c(registers(4, 1)[..., 0])[0], 4, 1),
        "scales of A": (scales_of_a(scale).reshape(16, 4), 1, 4),
        "scales of B": (scales_of_b(scale).reshape(8, 4), 1, 4),
    }


LABELS = {  # of axes: row, column
    "A": ("row of A", "k: a box is 8 codes, the lowest k in the low bits"),
    "B": ("column of B", "k: a box is 8 codes"),
    "C and D": ("row of C and D", "column of C and D: a box is one float32"),
    "scales of A": ("row of A", "block along k = byte"),
    "scales of B": ("column of B", "block along k = byte"),
}


def fragments_figure() -> Figure:
    """All operands of one NVFP4 MMA."""
    figure = Figure(figsize=(14, 12.2), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[64, 20], height_ratios=[16, 8, 16])
    for row, names in enumerate((("A", "scales of A"), ("B", "scales of B"), ("C and D",))):
        for column, name in enumerate(names):
            draw_operand(figure.add_subplot(grid[row, column]), name)
    _legend(figure.add_subplot(grid[2, 1]))
    figure.suptitle("mma.m16n8k64 mxf4nvf4: which lane and which of its registers hold what (lane.register)")
    return figure


def draw_operand(axes: Axes, name: str) -> None:
    """One operand of fragments(); a box is what one register of one lane holds, labelled lane.register."""
    ylabel, xlabel = LABELS[name]
    _boxes(axes, *fragments()[name])
    axes.set(title=name, ylabel=ylabel, xlabel=xlabel)


def _boxes(axes: Axes, ids: Map, count: int, parts: int) -> None:
    """One box for each register of a lane: its parts must be neighbours in a row, in order."""
    rows, columns = ids.shape
    for row in range(rows):
        for column in range(0, columns, parts):
            lane_register, part = np.divmod(ids[row, column : column + parts], parts)
            assert len(set(lane_register)) == 1
            assert (part == np.arange(parts)).all()
            lane, register = divmod(int(lane_register[0]), count)
            _box(axes, column, row, parts, register, f"{lane}.{register}")
    first = np.arange(0, columns, parts if parts == CODES else 1)
    names = [f"{k} … {k + CODES - 1}" if parts == CODES else str(k) for k in first]
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xticks(first + (columns / len(first)) / 2, names)
    axes.set_yticks(np.arange(rows) + 0.5, map(str, range(rows)), fontsize=8)
    axes.tick_params(length=0)


def _box(axes: Axes, x: float, y: float, width: float, fill: int, text: str, height: float = 1) -> None:
    box = Rectangle((x, y), width, height, facecolor=FILLS[fill], edgecolor="black", linewidth=0.6)
    axes.add_patch(box)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def _legend(axes: Axes) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for register in range(len(FILLS)):
        _box(axes, 0.05, 0.86 - 0.1 * register, 0.16, register, f"l.{register}", height=0.07)
        axes.text(0.26, 0.895 - 0.1 * register, f"register {register} of lane l", va="center")
    axes.text(
        0.05,
        0.5,
        "A box of A or B is one 32-bit register:\n8 codes of 4 bits. C and D: one float32.\n\n"
        "Scales: one register, byte b for\nk = 16b … 16b + 15. These lanes are\n"
        "read where the thread-id is 0,\nas it is in ptx.cuh.",
        va="top",
    )


def swizzled(rows: int = TILE_ROWS, columns: int = TILE_COLS) -> Map:
    """(rows · columns,): the number columns · row + s of the scale at each byte of swizzled scales, (rows,
    columns), that fill whole tiles; by default one tile."""
    numbers = np.arange(rows * columns).reshape(rows, columns)
    low, high = (swizzle_128x4((numbers >> shift & 0xFF).astype(np.uint8)) for shift in (0, 8))
    return low.astype(np.int64) + 256 * high.astype(np.int64)


def swizzle_figure() -> Figure:
    """A tile of scales as a matrix, and the same 512 bytes in the order of memory, 16 a line."""
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    matrix, memory = figure.subplots(1, 2, width_ratios=[4, 16])
    numbers, quarter = swizzled(), TILE_ROWS // 4
    for byte in range(0, len(numbers), TILE_COLS):
        row, s = np.divmod(numbers[byte : byte + TILE_COLS], TILE_COLS)
        assert len(set(row)) == 1
        assert (s == np.arange(TILE_COLS)).all()
        part, (y, x) = int(row[0]) // quarter, divmod(byte, 16)
        _box(memory, x, y, TILE_COLS, part, f"{row[0]}")
        in_quarter = int(row[0]) % quarter
        if in_quarter in (0, 1, quarter - 1):  # the first, second and last row of each quarter
            at = row[0] + {0: 2, 1: 4.5, quarter - 1: -2}[in_quarter]
            text = f"row {row[0]}: bytes {byte} … {byte + TILE_COLS - 1}"
            matrix.text(2, at, text, ha="center", va="center", fontsize=8, bbox=WHITE)
    for part, (fill, hatch) in enumerate(zip(FILLS, HATCHES)):
        matrix.add_patch(
            Rectangle((0, part * quarter), TILE_COLS, quarter, facecolor=fill, hatch=hatch, edgecolor="black")
        )
    matrix.set(xlim=(0, TILE_COLS), ylim=(TILE_ROWS, 0), title="A tile: 128 rows × 4 scales")
    matrix.set(xlabel="s, block along K", ylabel="row of the operand")
    matrix.set_xticks(np.arange(TILE_COLS) + 0.5, range(TILE_COLS))
    matrix.set_yticks(range(0, TILE_ROWS + 1, 16))
    lines = len(numbers) // 16
    memory.set(
        xlim=(0, 16), ylim=(lines, 0), xlabel="byte in a line of 16", ylabel="byte where the line begins"
    )
    memory.set(title="The same 512 bytes in memory: a box is the four scales of the row it names")
    memory.set_xticks(np.arange(16) + 0.5, range(16))
    memory.set_yticks(np.arange(lines) + 0.5, range(0, len(numbers), 16), fontsize=8)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"fragments.png": fragments_figure, "swizzle.png": swizzle_figure}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.plots", description="Draw fragments.png, swizzle.png."
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="that exists")
    folder: Path = parser.parse_args(argv).output
    if not folder.is_dir():
        print(f"gpu.plots: {folder} is not a folder.", file=sys.stderr)
        return 2
    for name, figure in FIGURES.items():
        figure().savefig(folder / name, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
