"""The kernels on paper: what each takes of a GPU, what it moves and computes, and its least possible time.

    python -m gpu.resources [--measured FILE]        FILE: a record of gpu.bench --json on an H100

Needs the compiler (NVRTC) and no GPU.
"""

import argparse
import sys
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
from .device import SHARED_KIB, Array, Dim

M, N, K, S = 4096, 28672, 4096, 512  # the shape: the widest projection of an 8B model
FEW, FEWER = 16, 1  # rows of x
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

    zeros = empty

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        return self.empty(array.shape, dtype)

    def download(self, array: Array) -> NDArray[Any]:
        raise NotImplementedError("nothing runs here")

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        self.launches.append(Launch(source, kernel, prod(grid), block, shared_bytes))


def launches(arch: str) -> list[Launch]:
    """Every kernel once, for bfloat16, as gpu.launch starts it on the shape above."""
    d = Recorder(arch)
    x, w = d.empty((M, K), "bfloat16"), d.empty((N, K), "bfloat16")
    order, one = d.empty((K,), "int32"), d.empty((1,), "float32")
    codes, scales = d.empty((M, K), "uint8"), d.empty((M, K // BLOCK), "uint8")
    for name in ("e2m1", "e4m3"):
        launch.encode(d, name, x)
        launch.decode(d, name, codes)
    launch.tensor_scale(d, x)
    q = launch.quantize(d, x, one)
    launch.dequantize(d, q)
    launch.pack(d, codes, scales, one)
    launch.unpack(d, q)
    launch.augment_activations(d, x, order, S, one)
    launch.rmsnorm_augment_activations(d, x, d.empty((K,), "float32"), np.float32(0), order, S, one)
    before = len(d.launches)
    b = launch.augment_weights(d, w, order, S)
    del d.launches[before:-1]  # the kernels of its tensor scale again
    for rows, exact in ((M, True), (M, False), (FEW, False), (FEWER, False)):
        a = launch.augment_activations(d, d.empty((rows, K), "bfloat16"), order, S, one)
        d.launches.pop()
        launch.matmul(d, a, b, exact)
    return d.launches


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
    "gemm_small_16": Case("fast", FEW, N, K, S),
    "gemm_small_8": Case("fast", FEWER, N, K, S),
}


def blocks_at_once(arch: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Thread blocks that one multiprocessor holds; registers are a thread's, bytes and threads a block's."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    held = PARTITIONS * (PARTITION_REGISTERS // _filled(32 * registers, REGISTER_UNIT))
    shared = _filled(shared_bytes, SHARED_UNIT) + SHARED_RESERVED
    return min(held // warps, limits.shared_kib * 1024 // shared, limits.warps // warps, limits.blocks)


def least(work: Case | int, gpu: Gpu, places: int, blocks: int) -> tuple[float, float]:
    """(floor, best of the design) in seconds. Blocks that compute run in rounds of `places`, and the last
    round takes as long as a full one; where memory is the limit, rounds do not count."""
    if isinstance(work, int):
        return work / gpu.bytes_per_second, work / gpu.bytes_per_second
    floor, memory = work.floor(gpu), work.bytes / gpu.bytes_per_second
    assert floor is not None
    rounds = blocks / places
    return floor, max(memory, floor * ceil(rounds) / rounds) if floor > memory else floor


def table(arch: str, results: Mapping[Case, Result]) -> Iterator[str]:
    """Fixed-width text: one line a kernel."""
    names, most_warps = ON[arch], LIMITS[arch].warps
    yield f"sm_{arch}: " + "; ".join(
        f"{name}, {GPUS[name].multiprocessors} multiprocessors" for name in names
    )
    upper = ["", "", "", "regis-", "bytes", "shared", "blocks", "warps", "", ""]
    lower = ["kernel", "blocks", "threads", "ters", "static", "dynamic", "at once", f"of {most_warps}"]
    lower += ["MB", "GFLOP"]
    for name in names:
        upper, lower = [*upper, f"{name:>16}"], [*lower, "floor", "best us"]
    if results:
        upper, lower = [*upper, "found"], [*lower, "us"]
    yield _line(*upper)
    yield _line(*lower)
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
        for name in names:
            times = least(work, GPUS[name], held * GPUS[name].multiprocessors, of.blocks)
            cells += [_us(seconds) for seconds in times]
        if isinstance(work, Case) and work in results:
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
    yield f"x ({M}, {K}) bf16, weights ({N}, {K}), S = {S}; rows of x in gemm_small_16: {FEW}, _8: {FEWER}"
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
    except (ImportError, OSError, ValueError) as error:
        print(f"gpu.resources: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
