"""Everything that `gpu` computes on this GPU, against reference and emulator, bit for bit.

    python -m gpu.verify [--quick] [--json FILE] [--device cuda | --device interpreted sm_80]

One line for each comparison; what differs is printed in bits with its index. And the instructions themselves:
the emulator's model of one tensor-core step against the hardware. Exit code 1 if anything differs or fails.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import arcquant_ref
import emulator
from arcquant_ref import layout
from arcquant_ref.formats import BLOCK, E2M1, E4M3, Float32
from arcquant_ref.tensor import NVFP4Tensor
from emulator.jit import over_rows
from emulator.tensor_core import BF16, FP16, half_warps, nvfp4_warps

from . import launch, load, record, stress
from .device import SHARED_KIB, Cuda, Device, Interpreted
from .face import Face

Parts = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # name → what came out, what had to
SHOWN = 3  # mismatches of a line that are printed
SEED = 20260101
NAMES = {arcquant_ref: "reference", emulator: "emulator"}


@dataclass(frozen=True)
class Comparison:
    """One call: the line of the table that it belongs to, on which input, and its outputs."""

    what: str
    on: str
    parts: Parts
    claimed: bool = True


@dataclass
class Line:
    """All comparisons of one kind."""

    what: str
    claimed: bool = True  # False: the model is of another GPU; a difference is a finding, not a failure
    inputs: int = 0
    compared: int = 0
    mismatches: int = 0
    seconds: float = 0
    shown: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None or (self.claimed and self.mismatches > 0)

    def add(self, comparison: Comparison) -> None:
        self.inputs += 1
        for name, (got, expected) in comparison.parts.items():
            got, expected = bits(got), bits(expected)
            self.compared += expected.size
            if got.shape != expected.shape:
                self.mismatches += expected.size
                self.shown.append(f"{comparison.on}: {name} has shape {got.shape}, not {expected.shape}")
            elif not np.array_equal(got, expected):
                different = np.argwhere(got != expected)
                self.mismatches += len(different)
                for i in map(tuple, different[: max(0, SHOWN - len(self.shown))].tolist()):
                    pair = f"{_hex(got[i])}, expected {_hex(expected[i])}"
                    self.shown.append(f"{comparison.on}: {name}[{', '.join(map(str, i))}] is {pair}")


def bits(x: NDArray[Any]) -> NDArray[Any]:
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def _hex(x: np.unsignedinteger) -> str:
    return f"{int(x):#0{2 + 2 * x.itemsize}x}"


@dataclass(frozen=True)
class Size:
    """How much is compared."""

    chunks: int  # of CHUNK consecutive float32 bit patterns, spread over all of them
    chunk: int
    every: int  # so many of the 16-bit patterns and boundaries
    matrices: int
    shapes: tuple[tuple[int, int], ...]
    products: tuple[tuple[int, int, int], ...]  # M, N, K
    half_products: tuple[tuple[int, int, int], ...]
    seeds: int  # repetitions of each product
    steps: int  # MMAs of each kind


# Few rows and many, around the tiles of 16, 64, 128 and 256; K with half a step, and with one block too many
RAGGED = ((1, 1, 16), (1, 257, 48), (130, 259, 80), (128, 128, 64), (257, 2, 16), (40, 33, 1072))
FEW = (
    (1, 1030, 4112),
    (7, 515, 2064),
    (8, 512, 1024),
    (9, 1030, 240),
    (16, 1024, 4096),
    (17, 300, 4112),
    (64, 300, 14352),
)
# Few rows and more tiles of 32 columns than thread blocks, which stay; K that is a multiple of 32, and is not
STAYING = ((8, 8330, 1312), (5, 8330, 272), (16, 8330, 1312), (12, 8330, 272))
FULL = Size(
    chunks=64,
    chunk=2**26,
    every=1,
    matrices=480,
    shapes=(
        (1, 16),
        (3, 48),
        (33, 80),
        (127, 272),
        (128, 2048),
        (129, 1040),
        (257, 528),
        (5, 14336),
        (2, 28672),
    ),
    products=(*RAGGED, *FEW, (1000, 1036, 2064), (2048, 2048, 4096)),
    half_products=(*RAGGED, *FEW, *STAYING, (300, 520, 1040), (300, 520, 1056), (513, 1036, 2048)),
    seeds=2,
    steps=16384,
)
QUICK = Size(
    chunks=4,
    chunk=512,
    every=41,
    matrices=14,
    shapes=((1, 16), (3, 48), (5, 80), (130, 32)),
    products=((1, 5, 48), (20, 9, 80)),
    half_products=(
        *((1, 5, 48), (12, 70, 2064), (16, 70, 2080), (8, 8210, 160), (9, 8210, 48)),
        *((20, 9, 80), (130, 70, 480)),
    ),
    seeds=1,
    steps=3,
)


FORMATS = {"e2m1": E2M1, "e4m3": E4M3}


def conversions(face: Face, size: Size) -> Iterator[Comparison]:
    """Every float32, float16 and bfloat16, NaN and infinity too; every code."""
    first = np.arange(size.chunk, dtype=np.uint32)
    for start in np.linspace(0, 2**32 - size.chunk, size.chunks).astype(np.uint32):
        x = (start + first).view(np.float32)
        for name in FORMATS:
            yield _encoded(face, emulator, name, "float32", f"bits from {_hex(start)}", x)
    for name, fmt in FORMATS.items():
        for dtype in (np.float16, ml_dtypes.bfloat16):
            x = np.arange(0, 2**16, size.every, dtype=np.uint16).view(dtype)
            yield _encoded(face, emulator, name, "16 bits", np.dtype(dtype).name, x)
            x = x[np.isfinite(x.astype(np.float32))]
            yield _encoded(face, arcquant_ref, name, "16 bits", np.dtype(dtype).name, x)
        x = np.concatenate([fmt.midpoints, fmt.magnitudes, [1.0625 * fmt.max]]).astype(np.float32)
        x = np.concatenate([np.nextafter(x, np.float32(-9)), x, np.nextafter(x, np.float32(1e9))])
        x = np.concatenate([x, -x])
        yield _encoded(face, arcquant_ref, name, "boundaries", "and their neighbours", x)
        codes, decode = np.arange(2**fmt.bits, dtype=np.uint8), f"decode_{name}"
        values = getattr(face, decode)(codes), getattr(emulator, decode)(codes)
        yield Comparison("decode of every code = emulator", name, {"values": values})


def _encoded(face: Face, of: Any, name: str, numbers: str, on: str, x: NDArray[Any]) -> Comparison:
    function = f"encode_{name}"
    codes = getattr(face, function)(x), getattr(of, function)(x)
    return Comparison(f"{function} of {numbers} = {NAMES[of]}", on, {"codes": codes})


DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
TENSOR_SCALES = (None, 1.0, None, 1 / 3, 2.0**-126, 2.0**-10, 0.0007, 12.5)


def matrices(face: Face, size: Size) -> Iterator[Comparison]:
    """The quantizing functions; kinds of matrices, shapes, S, dtypes and tensor scales are drawn."""
    rng = np.random.default_rng(SEED)
    for i in range(size.matrices):
        rounds, of_kind = divmod(i, len(stress.MATRICES))
        kind, dtype = stress.MATRICES[of_kind], DTYPES[(of_kind + rounds) % len(DTYPES)]
        m, k = rng.choice(size.shapes)
        s = int(rng.choice([0, BLOCK, k // 2 // BLOCK * BLOCK, k]))
        scale = TENSOR_SCALES[rng.integers(len(TENSOR_SCALES))]
        x = stress.as_dtype(stress.matrix(rng, kind, (m, k)), dtype)
        selection = stress.selection(rng, k, s)
        on = f"{kind}, {m}x{k} {np.dtype(dtype).name}, S={s}, tensor_scale={scale}"
        for function, arguments in (
            ("quantize", (x, scale)),
            ("augment_activations", (x, selection, scale)),
            ("augment_weights", (x, selection)),
            ("rmsnorm_augment_activations", _normed(rng, x, selection, scale)),
        ):
            got = getattr(face, function)(*arguments)
            for of in (arcquant_ref, emulator):
                tensors = _tensors(got, getattr(of, function)(*arguments))
                yield Comparison(f"{function} = {NAMES[of]}", on, tensors)
            if function == "augment_activations":
                values = {"values": (face.dequantize(got), emulator.dequantize(got))}
                yield Comparison("dequantize = emulator", on, values)


def _normed(rng: np.random.Generator, x: NDArray[Any], selection: Any, scale: Any) -> tuple[Any, ...]:
    """Arguments of the fused kernel: x so far below the limit of float32 that nothing overflows."""
    weight = (rng.standard_normal(x.shape[1]) * np.exp2(rng.integers(-20, 20, x.shape[1]))).astype(np.float32)
    limit = 1e4 if x.dtype == np.float16 else 1e15
    return np.clip(x, -limit, limit).astype(x.dtype), weight, 1e-5, selection, scale or 1.0


def _tensors(got: NVFP4Tensor, expected: NVFP4Tensor) -> Parts:
    parts: Parts = {"tensor_scale": (np.array([got.tensor_scale]), np.array([expected.tensor_scale]))}
    return parts | {part: (getattr(got, part), getattr(expected, part)) for part in ("codes", "block_scales")}


def memory(face: Face, size: Size) -> Iterator[Comparison]:
    """Packed codes and swizzled scales as kernels leave them, with zeros where tiles are filled up."""
    rng, device = np.random.default_rng(SEED + 1), face.device
    for m, k in size.shapes:
        x = np.clip(stress.matrix(rng, "all kinds", (m, k)), -1e15, 1e15)  # squares stay in range
        selection = stress.selection(rng, k, k // 2 // BLOCK * BLOCK)
        held, order = device.upload(x, "float32"), device.upload(selection.order.astype(np.uint16), "uint16")
        scale, s = np.float32(0.01), selection.num_residual
        held_scale = device.upload(np.array([scale]), "float32")
        weight = device.upload(np.ones(k, np.float32), "float32")
        one = np.float32(1)
        norm, _ = launch.rmsnorm_augment_activations(device, held, weight, one, order, s, held_scale)
        quantized = arcquant_ref.quantize(x, scale)
        for function, got, expected in (
            ("quantize", launch.quantize(device, held, held_scale), quantized),
            ("pack", face.pack(quantized), quantized),
            (
                "augment_activations",
                launch.augment_activations(device, held, order, s, held_scale),
                arcquant_ref.augment_activations(x, selection, scale),
            ),
            (
                "augment_weights",
                launch.augment_weights(device, held, order, s),
                arcquant_ref.augment_weights(x, selection),
            ),
            (
                "rmsnorm_augment_activations",
                norm,
                arcquant_ref.rmsnorm_augment_activations(x, np.ones(k), 1.0, selection, scale),
            ),
        ):
            parts: Parts = {
                "codes": (device.download(got.codes), layout.pack(expected.codes)),
                "scales": (device.download(got.scales), layout.swizzle_128x4(expected.block_scales)),
            }
            yield Comparison("bytes in memory = layout", f"{function}, {m}x{k}, S={s}", parts)


def exact_products(face: Face, size: Size) -> Iterator[Comparison]:
    """Tensors with all kinds of scales, and whole layers with S = 0 … K."""
    rng = np.random.default_rng(SEED + 2)
    for kind in stress.PRODUCTS:
        for m, n, k in size.products * size.seeds:
            a, b = stress.product(rng, kind, m, n, k)
            yield _product(face, f"matmul, {kind} = emulator", a, b)
    for m, n, k in size.products:
        x, w = (stress.matrix(rng, "outlier channels", (rows, k)) for rows in (m, n))
        for s in sorted({0, BLOCK, k // 2 // BLOCK * BLOCK, k}):
            selection = stress.selection(rng, k, s)
            a, b = face.augment_activations(x, selection), face.augment_weights(w, selection)
            yield _product(face, "matmul of a layer, S = 0 … K = emulator", a, b)


def _product(face: Face, what: str, a: NVFP4Tensor, b: NVFP4Tensor) -> Comparison:
    on = f"M={a.shape[0]} N={b.shape[0]} K={a.shape[1]}"
    return Comparison(what, on, {"y": (face.matmul(a, b), emulator.matmul(a, b))})


def half_products(face: Face, size: Size) -> Iterator[Comparison]:
    """`exact=False`: fp16 MMAs, as a Hopper GPU adds them."""
    rng = np.random.default_rng(SEED + 3)
    for kind in stress.PRODUCTS:
        for m, n, k in size.half_products:
            a, b = stress.product(rng, kind, m, n, k)
            expected, packed = fast_product(a, b, m), (face.pack(a), face.pack(b))
            for plan in launch.products(face.device.arch, m, k, exact=False):
                y = face.device.download(launch.multiply(face.device, plan, *packed)), expected
                what = f"matmul, exact=False, {plan.kernel} = emulator"
                yield Comparison(what, f"{kind}, M={m} N={n} K={k}", {"y": y}, adds_as_hopper(face.device))


def fast_product(a: NVFP4Tensor, b: NVFP4Tensor, m: int) -> Float32:
    """What `Face.matmul(…, exact=False)` computes, by the emulator: of a product of m rows those in `a`."""
    return emulator.matmul_fp16_split_k(a, b) if m <= launch.FEW_ROWS else emulator.matmul_fp16(a, b)


def half_steps(face: Face, size: Size) -> Iterator[Comparison]:
    """The instruction mma.m16n8k16 alone."""
    rng = np.random.default_rng(SEED + 4)
    for name, (widths, dtype) in {"f16": (FP16, np.int16), "bf16": (BF16, np.uint16)}.items():
        for kind in stress.STEPS:
            a, b, c = stress.half_steps(rng, name, kind, size.steps)
            got = mma(face.device, f"mma_m16n8k16_{name}", a.view(np.uint32), b.view(np.uint32), c)
            expected = np.empty_like(c)

            def task(i: int, j: int) -> None:
                expected[i:j] = half_warps(a[i:j].view(dtype), b[i:j].view(dtype), c[i:j], widths)  # noqa: B023

            over_rows(task, size.steps)
            what = f"instruction mma.m16n8k16 {name} = emulator"
            yield Comparison(what, kind, {"d": (got, expected)}, adds_as_hopper(face.device))


def nvfp4_steps(face: Face, size: Size) -> Iterator[Comparison]:
    """The instruction mma.m16n8k64 alone, where there is one."""
    rng = np.random.default_rng(SEED + 5)
    for kind in stress.STEPS if load.is_native(face.device.arch) else ():
        a, b, sfa, sfb, c = stress.nvfp4_steps(rng, kind, size.steps)
        codes = [layout.pack(x.reshape(-1, 64)).view(np.uint32) for x in (a, b)]
        scales = [x.view(np.uint32) for x in (sfa, sfb)]
        got = mma(face.device, "mma_m16n8k64", *codes, *scales, c)
        expected = np.empty_like(c)

        def task(i: int, j: int) -> None:
            expected[i:j] = nvfp4_warps(a[i:j], b[i:j], sfa[i:j], sfb[i:j], c[i:j])  # noqa: B023

        over_rows(task, size.steps)
        yield Comparison("instruction mma.m16n8k64 nvfp4 = emulator", kind, {"d": (got, expected)})


def mma(device: Device, kernel: str, *operands: NDArray[Any]) -> Float32:
    """One instruction of cuda/probe.cu on operands of many steps; the last of them is C."""
    steps = len(operands[-1])
    held = [device.upload(np.ascontiguousarray(x), x.dtype.name) for x in operands]
    d = device.empty((steps, 16, 8), "float32")
    device.launch("probe", kernel, (-(-steps // 8), 1, 1), 256, [*held, np.int32(steps), d])
    return device.download(d)


def adds_as_hopper(device: Device) -> bool:
    """Recordings agree with the model on H100, H200 and B200, and the interpreter follows it."""
    return isinstance(device, Interpreted) or device.arch in ("90a", "100a")


Check = Callable[[Face, Size], Iterator[Comparison]]
CHECKS: tuple[Check, ...] = (
    conversions,
    matrices,
    memory,
    exact_products,
    half_products,
    half_steps,
    nvfp4_steps,
)


def run(face: Face, size: Size, checks: Sequence[Check]) -> list[Line]:
    """All lines, in order. A check that raises gives a line with its error, and the others go on."""
    lines: dict[str, Line] = {}
    for check in checks:
        start = time.perf_counter()
        try:
            for c in tqdm(check(face, size), check.__name__, disable=None, leave=False):
                line = lines.setdefault(c.what, Line(c.what, c.claimed))
                line.add(c)
                line.seconds += time.perf_counter() - start
                start = time.perf_counter()
        except Exception as error:  # a kernel that fails is a result
            traceback.print_exc()
            lines[check.__name__] = Line(check.__name__, error=f"{type(error).__name__}: {error}")
    return list(lines.values())


def table(lines: Sequence[Line]) -> str:
    """Fixed-width text; under a line what differs in it, in bits."""
    text = [f"{'what':<52}{'inputs':>8}{'outputs compared':>18}{'mismatches':>12}{'seconds':>9}"]
    for line in lines:
        if line.error is not None:
            text.append(f"{line.what:<52} FAILED: {line.error}")
            continue
        note = "" if line.claimed else "  (not claimed for this GPU)"
        numbers = f"{line.inputs:>8,}{line.compared:>18,}{line.mismatches:>12,}{line.seconds:>9.1f}"
        text += [f"{line.what:<52}{numbers}{note}", *(f"    {shown}" for shown in line.shown)]
    compared, mismatches = sum(line.compared for line in lines), sum(line.mismatches for line in lines)
    failed = sum(line.failed for line in lines)
    text.append(
        f"{compared:,} outputs compared, {mismatches:,} differ; {failed} of {len(lines)} lines failed"
    )
    return "\n".join(text)


def device_called(name: str) -> Device:
    """ "cuda", or "interpreted sm_80": ValueError for another name, ImportError where there is no GPU."""
    kind, _, arch = name.partition(" sm_")
    if name == "cuda":
        return Cuda()
    if kind == "interpreted" and arch in SHARED_KIB:
        return Interpreted(arch)
    known = ", ".join(f"interpreted sm_{arch}" for arch in SHARED_KIB)
    raise ValueError(f"--device {name!r} is not known; there are cuda, {known}.")


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all bits are equal, 1 if not or something failed, 2 for wrong arguments or no GPU."""
    parser = argparse.ArgumentParser(prog="python -m gpu.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device",
        nargs="+",
        default=["cuda"],
        metavar="NAME",
        help="cuda, or interpreted sm_80 or sm_120a: the PTX on this CPU, always --quick",
    )
    parser.add_argument("--quick", action="store_true", help="a few small inputs of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found and on what")
    args = parser.parse_args(argv)
    try:
        device = device_called(" ".join(args.device))
    except (ValueError, ImportError) as error:
        print(f"gpu.verify: {error}", file=sys.stderr)
        return 2
    quick = args.quick or isinstance(device, Interpreted)
    start = time.perf_counter()
    lines = run(Face(device), QUICK if quick else FULL, CHECKS)
    found = record.machine(device)
    print(table(lines))
    failed = any(line.failed for line in lines)
    if args.json:
        result = {"program": "gpu.verify", "quick": quick, "failed": failed, "machine": found}
        result |= {"seconds": time.perf_counter() - start, "lines": [asdict(line) for line in lines]}
        record.save(args.json, result)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
