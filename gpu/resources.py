"""The kernels on paper: what each takes of a GPU, moves and executes, and its least possible time.

    python -m gpu.resources [--measured FILE]        FILE: a record of gpu.bench --json on an H100

Needs the compiler (NVRTC) and no GPU.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcquant_ref.formats import BLOCK

from . import launch, load
from .bench import GPUS, Case, Gpu, Result, packed_bytes, recorded
from .device import SHARED_KIB, Array, Device, Dim, Interpreted


class Shape(NamedTuple):
    """x (m, k), weights (n, k), s residual channels."""

    m: int
    n: int
    k: int
    s: int


SHAPE = M, N, K, S = Shape(4096, 28672, 4096, 512)  # the widest projection of an 8B model
FEW, FEWER = 16, 1  # rows of x
SOME = Shape(128, 128, K, S)  # a part of it, on which operations are counted
# Products: shape, part, exact
PRODUCTS = [(SHAPE, Shape(128, 256, K // 8, S // 8), exact) for exact in (True, False)]
PRODUCTS += [(Shape(rows, N, K, S), Shape(rows, 128, K, S), False) for rows in (FEW, FEWER)]
RESIDUALS = (0, 64, 128, 256, 512)
FIRST, OTHERS = "H100 SXM", ("RTX 5090", "RTX PRO 6000")
ON = {"90a": (FIRST,), "120a": OTHERS}  # architecture → GPUs


class Limits(NamedTuple):
    """Of one multiprocessor: CUDA programming guide, technical specifications per compute capability."""

    warps: int
    blocks: int
    shared_kib: int


LIMITS = {"90a": Limits(64, 32, 228), "120a": Limits(48, 24, 100)}
PARTITIONS, PARTITION_REGISTERS = 4, 2**14  # a warp lives in one of four, which has its own registers
REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 256, 128, 1024  # a warp's, a block's; reserved for each block
LANES = (
    PARTITIONS * 32
)  # instructions of threads that a multiprocessor starts in a clock, float32 ones as well
# Opcodes that are one instruction of the machine at least; the others can be merged, or cost nothing
FLOAT = re.compile(r"(add|sub|mul|fma|div|rcp|sqrt|min|max|setp|cvt)\..*f(32|16x2|16)(\..*)?")


@dataclass(frozen=True)
class Launch:
    source: str
    kernel: str
    blocks: int
    threads: int
    dynamic_bytes: int


class Recorder:
    """A device that runs nothing and remembers what was launched."""

    def __init__(self, arch: str) -> None:
        self.arch, self.shared_bytes = arch, SHARED_KIB[arch] * 1024
        self.launches: list[Launch] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return Array(0, shape, dtype, None)

    def word(self) -> Array:
        return self.empty((1,), "uint32")

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        return self.empty(array.shape, dtype)

    def download(self, array: Array) -> NDArray[Any]:
        raise NotImplementedError("nothing runs here")

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        self.launches.append(Launch(source, kernel, prod(grid), block, shared_bytes))


def quantizing(d: Device, of: Shape) -> None:
    """Every kernel but the products, for bfloat16. Rows of a matrix are alike."""
    rng = np.random.default_rng(0)
    row = (rng.standard_normal(of.k, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    x, w = (d.upload(np.broadcast_to(row, (rows, of.k)), "bfloat16") for rows in (of.m, of.n))
    order = d.upload(rng.permutation(of.k).astype(np.uint16), "uint16")
    weight = d.upload(np.ones(of.k, np.float32), "float32")
    for name in ("e2m1", "e4m3"):
        launch.encode(d, name, x)
    scale, _ = launch.tensor_scale(d, x)
    q = launch.quantize(d, x, scale)
    launch.dequantize(d, q)
    codes, scales = launch.unpack(d, q)
    launch.pack(d, codes, scales, scale)
    for name in ("e2m1", "e4m3"):
        launch.decode(d, name, codes)
    launch.augment_activations(d, x, order, of.s, scale)
    launch.rmsnorm_augment_activations(d, x, weight, np.float32(0), order, of.s, scale)
    launch.augment_weights(d, w, order, of.s)


def product(d: Device, plan: launch.Product, of: Shape) -> None:
    """One product, and the kernels that make its operands."""
    row = (np.random.default_rng(1).standard_normal(of.k, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    order = d.upload(np.arange(of.k, dtype=np.uint16), "uint16")
    x, w = (d.upload(np.broadcast_to(row, (rows, of.k)), "bfloat16") for rows in (of.m, of.n))
    a = launch.augment_activations(d, x, order, of.s)
    launch.multiply(d, plan, a, launch.augment_weights(d, w, order, of.s))


def plans(arch: str, of: Shape, exact: bool) -> list[launch.Product]:
    return launch.products(arch, of.m, of.k + of.s, exact)


def launches(arch: str) -> list[Launch]:
    """Every kernel once, as gpu.launch starts it on the shape above."""
    d = Recorder(arch)
    quantizing(d, SHAPE)
    for shape, _, exact in PRODUCTS:
        for plan in plans(arch, shape, exact):
            product(d, plan, shape)
    first: dict[str, Launch] = {}
    for of in d.launches:
        first.setdefault(of.kernel, of)
    return list(first.values())


class Counting(Interpreted):
    """A device that counts what the first launch of each kernel executes."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.executed: dict[str, Counter[str]] = {}  # kernel → PTX opcode → threads

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        super().launch(source, kernel, grid, block, args, shared_bytes)
        self.executed.setdefault(kernel, self._modules[source].executed.pop(kernel))


class Operations(NamedTuple):
    """PTX instructions that threads execute."""

    float_: float  # operations and conversions of float32; an FMA is one
    every: float


def operations(arch: str) -> dict[str, Operations]:
    """Of each kernel on the shape above: what the interpreter counts on a part of it, scaled."""
    d = Counting(arch)
    quantizing(d, SOME)
    times = {kernel: N / SOME.n if "weights" in kernel else M / SOME.m for kernel in d.executed}
    times["tensor_scale"] = 1
    for shape, part, exact in PRODUCTS:
        for plan in plans(arch, shape, exact):
            product(d, plan, part)
            times[plan.kernel] = prod(shape[:2]) * (shape.k + shape.s) / prod(part[:2]) / (part.k + part.s)
    found = {}
    for kernel, executed in d.executed.items():
        float_ = sum(count for opcode, count in executed.items() if FLOAT.fullmatch(opcode))
        found[kernel] = Operations(times[kernel] * float_, times[kernel] * executed.total())
    return found


_Q = packed_bytes(M, K)
WORK: dict[str, Case | int] = {  # a case of gpu.bench, or the bytes that have to move
    "encode_e2m1_bf16": 3 * M * K,
    "encode_e4m3_bf16": 3 * M * K,
    "decode_e2m1": 5 * M * K,
    "decode_e4m3": 5 * M * K,
    "amax_bf16": 2 * M * K,
    "tensor_scale": 8,
    "quantize_bf16": Case("quantize", M, 0, K),
    "dequantize": 4 * M * K + _Q,
    "pack": M * K + M * K // BLOCK + _Q,
    "unpack": M * K + M * K // BLOCK + _Q,
    "augment_activations_bf16": Case("augment", M, 0, K, S),
    "rmsnorm_augment_activations_bf16": Case("RMSNorm + augment", M, 0, K, S),
    "augment_weights_bf16": 2 * N * K + 4 * K + packed_bytes(N, K + S),
    "gemm_exact": Case("exact", M, N, K, S),
    "gemm_native": Case("exact", M, N, K, S),
    "gemm_fast": Case("fast", M, N, K, S),
    **{plan.kernel: Case("fast", M, N, K, S) for plan in launch.HOPPER},
    **{plan.kernel: Case("fast", {8: FEWER, 16: FEW}[plan.tile_m], N, K, S) for plan in launch.SMALL},
}


def blocks_at_once(arch: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Thread blocks that one multiprocessor holds; registers are a thread's, bytes and threads a block's."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    held = PARTITIONS * (PARTITION_REGISTERS // _filled(32 * registers, REGISTER_UNIT))
    shared = _filled(shared_bytes, SHARED_UNIT) + SHARED_RESERVED
    return min(held // warps, limits.shared_kib * 1024 // shared, limits.warps // warps, limits.blocks)


def at_full_rate(instructions: float, gpu: Gpu) -> float:
    """Seconds for so many instructions of threads, if every multiprocessor starts four warps a clock."""
    return instructions / (LANES * gpu.multiprocessors * gpu.clock)


def least(
    work: Case | int, float_operations: float, gpu: Gpu, places: int, blocks: int
) -> tuple[float, float]:
    """(floor, best of the design) in seconds. The design adds its float32 operations. Its blocks run in
    rounds of `places`, the last as long as a full one; where memory is the limit, rounds do not count."""
    memory = (work if isinstance(work, int) else work.bytes) / gpu.bytes_per_second
    floor = memory if isinstance(work, int) else work.floor(gpu)
    assert floor is not None
    computing, rounds = max(floor, at_full_rate(float_operations, gpu)), blocks / places
    return floor, max(memory, computing * ceil(rounds) / rounds) if computing > memory else floor


def table(arch: str, results: Mapping[Case, Result]) -> Iterator[str]:
    """Fixed-width text: one line a kernel."""
    names, most_warps = ON[arch], LIMITS[arch].warps
    yield f"sm_{arch}: " + "; ".join(
        f"{name}, {GPUS[name].multiprocessors} multiprocessors" for name in names
    )
    upper = ["", "", "", "regis-", "bytes", "shared", "blocks", "warps", "", "tensor", "float", "PTX"]
    lower = ["kernel", "blocks", "threads", "ters", "static", "dynamic", "at once", f"of {most_warps}"]
    lower += ["MB", "GFLOP", "G", "G"]
    for name in names:
        upper, lower = [*upper, f"{name:>24}"], [*lower, "floor", "best", "PTX us"]
    if results:
        upper, lower = [*upper, "found"], [*lower, "us"]
    yield _line(*upper)
    yield _line(*lower)
    executed = operations(arch)
    timed = {
        launch.product(arch, *shape[:2], shape.k + shape.s, exact).kernel for shape, _, exact in PRODUCTS
    }
    for of in launches(arch):
        taken, work = load.compiled(of.source, arch).kernels[of.kernel], WORK[of.kernel]
        shared = taken.shared_bytes + of.dynamic_bytes
        held = blocks_at_once(arch, taken.registers, of.threads, shared)
        moved, flops = (work, 0) if isinstance(work, int) else (work.bytes, work.flops)
        warps = held * -(-of.threads // 32)
        cells: list[object] = [
            of.blocks,
            of.threads,
            taken.registers,
            taken.shared_bytes,
            of.dynamic_bytes,
            held,
            warps,
        ]
        cells += [f"{moved / 1e6:.1f}", f"{flops / 1e9:.1f}" if flops else ""]
        counted = executed[of.kernel]
        cells += [f"{count / 1e9:.2f}" for count in counted]
        for name in names:
            gpu = GPUS[name]
            times = least(work, counted.float_, gpu, held * gpu.multiprocessors, of.blocks)
            cells += [_us(seconds) for seconds in (*times, at_full_rate(counted.every, gpu))]
        if isinstance(work, Case) and work in results and (of.kernel in timed or not work.n):
            cells.append(_us(results[work].median))
        yield _line(of.kernel, *cells)


def _line(first: str, *cells: object) -> str:
    return f"{first:<32}" + "".join(f"{cell!s:>8}" for cell in cells)


def spills() -> str:
    """Over all kernels, probes and every dtype of x included."""
    found = [
        taken
        for arch in ON
        for path in sorted(load.SOURCES.glob("*.cu"))
        for taken in load.compiled(path.stem, arch).kernels.values()
    ]
    most, bytes_ = max(r.registers for r in found), sum(r.spilled_bytes + r.stack_bytes for r in found)
    archs = " and ".join(f"sm_{arch}" for arch in ON)
    return f"{len(found)} kernels for {archs}: at most {most} registers, {bytes_} bytes spilled or on a stack"


def weights() -> Iterator[str]:
    """What reading the weights once takes, in fp16 and with S residual channels."""
    yield (
        f"weights ({N}, {K}), read once"
        + f"{'MB':>13}{'fp16 = 1':>10}{'(K+S)/K':>9}"
        + "".join(f"{f'{name} us':>17}" for name in GPUS)
    )
    sizes = {"fp16": (2 * N * K, 0)} | {f"NVFP4, S = {s}": (packed_bytes(N, K + s), s) for s in RESIDUALS}
    for name, (size, s) in sizes.items():
        times = "".join(f"{_us(size / gpu.bytes_per_second):>17}" for gpu in GPUS.values())
        yield f"{name:<30}{size / 1e6:>13.1f}{size / (2 * N * K):>10.3f}{(K + s) / K:>9.3f}{times}"


def paces() -> str:
    """A kernel that does the same work for each byte on two GPUs is nearer to memory where this is less."""
    of = (
        f"{name} {gpu.bytes_per_second / gpu.multiprocessors / gpu.clock:.1f}" for name, gpu in GPUS.items()
    )
    return f"bytes of memory a clock and multiprocessor: {', '.join(of)}"


def _us(seconds: float | None) -> str:
    """Three digits or more."""
    if seconds is None:
        return ""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.3g}" if seconds >= 1e-8 else "0"


def _filled(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def page(results: Mapping[Case, Result]) -> Iterator[str]:
    version = ".".join(map(str, load.nvrtc()[1]))
    few = f"rows of x in gemm_small_16_*: {FEW}, _8_*: {FEWER}"
    yield f"x ({M}, {K}) bf16, weights ({N}, {K}), S = {S}; {few}"
    yield f"compiled by NVRTC {version}. {spills()}"
    for arch in ON:
        yield ""
        yield from table(arch, results if FIRST in ON[arch] else {})
    yield ""
    yield from weights()
    yield ""
    yield paces()


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 without the compiler, or for a file that is not a record."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu.resources", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="gpu.bench --json of an H100")
    args = parser.parse_args(argv)
    try:
        print(*page(recorded(args.measured)[0] if args.measured else {}), sep="\n")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"gpu.resources: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
