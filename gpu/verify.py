"""`python -m gpu.verify`: everything on this GPU against reference and emulator, bit for bit.

Prints one table, and writes a JSON record with --json. `--interpreted 80` (or 90a, 120a) runs a small part on
interpreted PTX where there is no GPU. Exits with 1 if anything differs that should not.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import arcquant_ref
import emulator
from arcquant_ref import NVFP4Tensor, Selection, calibrate, layout, select, select_top
from arcquant_ref.formats import BLOCK, E2M1, E4M3
from arcquant_ref.tensor import written_whole

from . import launch, load
from .device import Cuda, Device, Interpreted
from .face import Face

Floats = NDArray[np.float32]
SHOWN = 3  # mismatches of a check that are printed
HOPPER = "90a"  # the architecture whose fp16 products emulator.matmul_fp16 models


@dataclass
class Check:
    """One line of the table: how much was compared, how much differs, and the first that do."""

    name: str
    must_agree: bool = (
        True  # False: the model is of another architecture, a difference is news and no failure
    )
    compared: int = 0
    different: int = 0
    examples: list[str] = field(default_factory=list)
    seconds: float = 0

    def compare(self, what: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
        """Count the elements whose bits differ; shapes must agree."""
        if got.shape != expected.shape:
            raise ValueError(f"{self.name}, {what}: shape {got.shape}, expected {expected.shape}")
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[expected.itemsize]
        a, b = (np.ascontiguousarray(x).view(bits) for x in (got, expected))
        where = np.argwhere(a != b)
        self.compared, self.different = self.compared + a.size, self.different + len(where)
        for index in where[: SHOWN - len(self.examples)]:
            i = tuple(index.tolist())
            self.examples.append(f"{what} at {i}: got {a[i]:#x}, expected {b[i]:#x}")

    def compare_tensors(self, what: str, got: NVFP4Tensor, expected: NVFP4Tensor) -> None:
        self.compare(f"{what}, codes", got.codes, expected.codes)
        self.compare(f"{what}, block_scales", got.block_scales, expected.block_scales)
        scales = (np.array([q.tensor_scale]) for q in (got, expected))
        self.compare(f"{what}, tensor_scale", *scales)

    @property
    def failed(self) -> bool:
        return self.must_agree and self.different > 0


def stress(rng: np.random.Generator, rows: int, k: int) -> Floats:
    """Ties of E2M1 at scales of all sizes, numbers beside them, tiny and zero blocks, outliers, others."""
    blocks = rows, k // BLOCK
    scale = rng.choice([1, 1.25, 1.625, 1.875], blocks) * np.exp2(rng.integers(-14, 8, blocks))
    points = np.concatenate([E2M1.midpoints, E2M1.magnitudes])
    ties = rng.choice(points, (rows, k)) * np.repeat(scale, BLOCK, axis=1)
    ties[:, ::BLOCK] = E2M1.max * scale
    kind = np.repeat(rng.integers(0, 8, blocks), BLOCK, axis=1)
    towards = rng.choice(np.array([-np.inf, np.inf], np.float32), ties.shape)
    x = np.where(kind < 3, ties, rng.standard_normal((rows, k)) * np.exp2(rng.integers(-8, 4, k)))
    x = np.where(kind == 2, np.nextafter(x.astype(np.float32), towards), x)
    x = np.where(kind == 3, rng.integers(0, 200, x.shape) * E4M3.least_positive / 4, x)
    x = np.where(kind == 4, 0, x)
    x[rng.random(x.shape) < 0.001] *= 300
    return (x * rng.choice([-1, 1], x.shape)).astype(np.float32)


SCALES: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]] = {
    "ordinary": lambda rng, shape: rng.integers(0x60, 0x7F, shape),
    "all": lambda rng, shape: rng.integers(0, 0x7F, shape),
    "far apart": lambda rng, shape: rng.choice([0x01, 0x07, 0x0F, 0x7E], shape),
    "any byte": lambda rng, shape: rng.integers(0, 256, shape),
    "mostly zero": lambda rng, shape: rng.integers(0, 0x7F, shape) * (rng.random(shape) < 0.2),
    "one exponent a step": lambda rng, shape: (
        np.repeat(rng.integers(2, 15, -(-shape[1] // 4)), 4)[: shape[1]] << 3 | rng.integers(0, 7, shape)
    ),
}


def random_tensor(rng: np.random.Generator, kind: str, rows: int, k: int) -> NVFP4Tensor:
    blank = np.repeat(rng.random((rows, k // BLOCK)) < 0.1, BLOCK, axis=1)
    return NVFP4Tensor(
        codes=np.where(blank, rng.choice([0, 8], (rows, k)), rng.integers(0, 16, (rows, k))).astype(np.uint8),
        block_scales=SCALES[kind](rng, (rows, k // BLOCK)).astype(np.uint8),
        tensor_scale=rng.choice([1, 2.0**-10, 0.3]),
    )


def check_formats(face: Face, rng: np.random.Generator, full: bool) -> Iterator[Check]:
    for name in ("e2m1", "e4m3"):
        check = Check(f"encode_{name}")
        every = np.arange(2**16, dtype=np.uint16)
        inputs: list[NDArray[Any]] = [every.view(ml_dtypes.bfloat16), every.view(np.float16)]
        inputs.append(rng.integers(0, 2**32, 2**22 if full else 2**10, np.uint32).view(np.float32))
        for x in inputs:
            expected = getattr(emulator, f"encode_{name}")(x)
            check.compare(x.dtype.name, getattr(face, f"encode_{name}")(x), expected)
        yield check
    check = Check("decode")
    codes = np.arange(256, dtype=np.uint8)
    check.compare("e4m3", face.decode_e4m3(codes), emulator.decode_e4m3(codes))
    check.compare("e2m1", face.decode_e2m1(codes[:16]), emulator.decode_e2m1(codes[:16]))
    yield check


def check_quantization(face: Face, rng: np.random.Generator, full: bool) -> Iterator[Check]:
    names = "quantize", "dequantize", "augment_activations", "augment_weights", "rmsnorm_augment_activations"
    checks = {name: Check(name) for name in (*names, "packed and swizzled")}
    shapes = [(1, 16), (3, 80), (130, 144), *([(128, 4096), (257, 5120)] if full else [])]
    for rows, k in shapes:
        original = stress(rng, rows, k)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            x = np.clip(original, -60000, 60000).astype(dtype)
            weight = rng.standard_normal(k).astype(np.float32)
            for s in sorted({0, BLOCK, k // 2 // BLOCK * BLOCK, k}):
                selection = select_top(rng.random(k).astype(np.float32), s)
                for scale in (None, 1.0, 0.0007):
                    _check_layer(face, checks, x, weight, selection, scale)
    yield from checks.values()


def _check_layer(
    face: Face,
    checks: dict[str, Check],
    x: NDArray[Any],
    weight: Floats,
    selection: Selection,
    scale: float | None,
) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = [("augment_activations", (x, selection, scale))]
    if selection.num_residual == 0:
        calls.append(("quantize", (x, scale)))
    if scale is None:
        calls.append(("augment_weights", (x, selection)))
    else:
        calls.append(("rmsnorm_augment_activations", (x, weight, 1e-5, selection, scale)))
    for name, arguments in calls:
        what = f"{x.shape} {x.dtype.name}, S={selection.num_residual}, tensor_scale={scale}"
        expected = getattr(arcquant_ref, name)(*arguments)
        got = getattr(face, name)(*arguments)
        checks[name].compare_tensors(what, got, expected)
        if name == "quantize":
            checks["dequantize"].compare(what, face.dequantize(got), emulator.dequantize(expected))
        q, check = face.pack(expected), checks["packed and swizzled"]
        check.compare(what, face.device.download(q.codes), layout.pack(expected.codes))
        check.compare(what, face.device.download(q.scales), layout.swizzle_128x4(expected.block_scales))


def check_products(face: Face, rng: np.random.Generator, full: bool) -> Iterator[Check]:
    exact, few = Check("matmul, exact"), Check("matmul, exact=False, M <= 16")
    fast, arc = Check("matmul, exact=False"), Check("matmul of augmented layers")
    few.must_agree = fast.must_agree = face.device.arch == HOPPER or isinstance(face.device, Interpreted)
    shapes = [(1, 1, 16), (5, 130, 48), (33, 65, 336), (130, 259, 1040)]
    if full:
        shapes += [(1, 4096, 4096), (16, 1000, 4624), (128, 512, 4096), (300, 700, 14336)]
    for m, n, k in shapes:
        for kind in SCALES:
            a, b = (random_tensor(rng, kind, rows, k) for rows in (m, n))
            what = f"({m}, {n}, {k}), scales {kind}"
            exact.compare(what, face.matmul(a, b), emulator.matmul(a, b))
            halves, chains = (few, 8) if m <= launch.FEW_ROWS else (fast, 1)
            halves.compare(what, face.matmul(a, b, False), emulator.matmul_fp16(a, b, chains))
        x, w = stress(rng, m, k), stress(rng, n, k)
        x[:, rng.integers(0, k, 3)] *= 50
        selection = select(calibrate([x]))
        operands = [
            (f.augment_activations(x, selection), f.augment_weights(w, selection)) for f in (face, emulator)
        ]
        arc.compare(f"({m}, {n}, {k})", face.matmul(*operands[0]), emulator.matmul(*operands[1]))
    yield from (exact, few, fast, arc)


def check_steps(face: Face, rng: np.random.Generator, full: bool) -> Iterator[Check]:
    """Each output of an MMA is one step of the model: 128 a warp."""
    count = 2**15 if full else 8
    check = Check(
        "step of mma.m16n8k16 fp16", face.device.arch == HOPPER or isinstance(face.device, Interpreted)
    )
    for kind in ("ordinary", "wide", "any bits", "cancelling"):
        a, b, c = half_steps(rng, kind, count)
        d = run_steps(face.device, "step_f16", {"float16": [a, b], "float32": [c]})
        expected = np.stack([emulator.mma_m16n8k16(*step) for step in zip(a, b, c)])
        check.compare(kind, d, expected)
    yield check
    if load.is_native(face.device.arch):
        check = Check("step of mma.m16n8k64 mxf4nvf4")
        for kind in SCALES:
            codes = [rng.integers(0, 16, (count, rows, 64)).astype(np.uint8) for rows in (16, 8)]
            sf = [
                SCALES[kind](rng, (count * rows, 4)).astype(np.uint8).reshape(count, rows, 4)
                for rows in (16, 8)
            ]
            c = (rng.standard_normal((count, 16, 8)) * np.exp2(rng.integers(-24, 24, (count, 16, 8)))).astype(
                np.float32
            )
            packed = [layout.pack(x.reshape(-1, 64)).reshape(count, -1, 32) for x in codes]
            d = run_steps(face.device, "step_nvfp4", {"uint8": [*packed, *sf], "float32": [c]})
            expected = np.stack([emulator.mma_m16n8k64(*step) for step in zip(*codes, *sf, c)])
            check.compare(kind, d, expected)
        yield check


def half_steps(rng: np.random.Generator, kind: str, count: int) -> tuple[NDArray[Any], NDArray[Any], Floats]:
    """a (count, 16, 16) and b (count, 8, 16) float16, c (count, 16, 8) float32."""
    shapes = (count, 16, 16), (count, 8, 16)
    if kind == "any bits":
        a, b = (rng.integers(0, 2**16, shape, np.uint16).view(np.float16) for shape in shapes)
        return a, b, rng.integers(0, 2**32, (count, 16, 8), np.uint32).view(np.float32)
    spread = 1 if kind == "ordinary" else 12
    a, b = (
        (rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread, shape) / 2)).astype(np.float16)
        for shape in shapes
    )
    products = np.matmul(a.astype(np.float64), b.astype(np.float64).transpose(0, 2, 1))
    c = rng.standard_normal(products.shape) * np.exp2(rng.integers(-2 * spread, 2 * spread, products.shape))
    if kind == "cancelling":  # to within a few last bits
        c = -products * (1 + rng.integers(-4, 5, products.shape) * 2.0**-23)
    return a, b, c.astype(np.float32)


def run_steps(device: Device, kernel: str, operands: dict[str, list[NDArray[Any]]]) -> NDArray[Any]:
    held = [device.upload(x, dtype) for dtype, arrays in operands.items() for x in arrays]
    d = device.empty(held[-1].shape, "float32")
    device.launch("steps", kernel, (held[-1].shape[0], 1, 1), 32, [*held, d])
    return device.download(d)


CHECKS = [check_formats, check_quantization, check_products, check_steps]


def run(face: Face, seed: int, full: bool) -> list[Check]:
    """All checks; `full` is for a GPU, the interpreter would take hours."""
    done = []
    for group in CHECKS:
        started = time.perf_counter()
        for check in group(face, np.random.default_rng(seed), full):
            check.seconds, started = time.perf_counter() - started, time.perf_counter()
            done.append(check)
            print(line(check), flush=True)
    return done


def line(check: Check) -> str:
    verdict = (
        "equal" if not check.different else ("DIFFERS" if check.must_agree else "differs; not its model")
    )
    counts = f"{check.name:32} {check.compared:>14,} {check.different:>10,}  {verdict}"
    return "\n".join([counts, *(f"    {example}" for example in check.examples)])


def machine(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {"arch": f"sm_{device.arch}", "nvrtc": ".".join(map(str, load.nvrtc()[1]))}
    if isinstance(device, Cuda):
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        driver = cupy.cuda.runtime.driverGetVersion()
        found |= {
            "gpu": properties["name"].decode(),
            "cuda_of_driver": f"{driver // 1000}.{driver % 1000 // 10}",
        }
    else:
        found["gpu"] = "none: PTX interpreted"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found | {"arcquant_ref": arcquant_ref.__version__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.verify", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpreted", metavar="ARCH", help="no GPU: interpret the PTX for 80, 90a or 120a")
    args = parser.parse_args(arguments)
    reason = None if args.interpreted else load.why_not()
    if reason:
        print(f"gpu.verify needs a GPU: {reason}.", file=sys.stderr)
        return 1
    device: Device = Interpreted(args.interpreted) if args.interpreted else Cuda()
    about = machine(device) | {"seed": args.seed}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':32} {'compared':>14} {'different':>10}")
    with np.errstate(all="ignore"):
        done = run(Face(device), args.seed, full=not args.interpreted)
    if args.json:
        with written_whole(args.json) as file:
            file.write(json.dumps(about | {"checks": [asdict(check) for check in done]}, indent=1).encode())
    return int(any(check.failed for check in done))


if __name__ == "__main__":
    sys.exit(main())
