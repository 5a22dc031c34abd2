"""Speed of the kernels beside cuBLAS and a device copy, on layers of real models; losing rows stay.

    python -m gpu.bench [--only quantize|gemm] [--rows M ...] [--layers NxK ...] [--json FILE]
    python -m gpu.bench --dry-run        the plan and its floor times, without a GPU

An operation is timed as `gpu.arrays` runs it, small launches that fill zeros included. Before that, its bytes
on the timed shape are compared with the emulator's on some rows; what differs is not timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import emulator
from arcquant_ref.formats import BLOCK, Float32
from arcquant_ref.quantize import exact_values, tensor_scale_of
from arcquant_ref.select import Selection, select_top
from arcquant_ref.tensor import NVFP4Tensor

from . import arrays, launch, load, record
from .device import CudaTorch
from .verify import adds_as_hopper, fast_product

LAYERS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))  # N, K: projections of 8B models
ROWS = tuple(2**i for i in range(14))
RESIDUALS = (0, 64, 128, 512)
WIDEST = RESIDUALS[-1]

QUANTIZING = ("copy", "quantize", "quantize, dynamic scale", "augment", "RMSNorm + augment")
LIBRARY = ("torch fp16", "torch bf16", "torch nvfp4")
PRODUCTS = ("exact", "fast", "quantize + exact", "quantize + fast")
READ = "read weights"  # as many bytes as S = 0 has, and nothing else


class Gpu(NamedTuple):
    """Stated peaks."""

    bytes_per_second: float
    fp16: float  # with float32 accumulation, dense
    fp4: float | None
    source: str
    multiprocessors: int
    clock: float


def _gpu(
    bytes_per_second: float, multiprocessors: int, clock: float, fp16: int, fp4: int | None, source: str
) -> Gpu:
    """From the operations of tensor cores for each multiprocessor and boost clock."""
    clocks = multiprocessors * clock
    return Gpu(bytes_per_second, clocks * fp16, fp4 and clocks * fp4, source, multiprocessors, clock)


GPUS = {
    "H100 SXM": _gpu(3.35e12, 132, 1.83e9, 4096, None, "NVIDIA H100 data sheet"),
    # it adds fp16 products to float32 at half rate
    "RTX 5090": _gpu(1.792e12, 170, 2.407e9, 512, 4096, "NVIDIA RTX Blackwell white paper"),
    "RTX PRO 6000": _gpu(1.792e12, 188, 2.617e9, 1024, 4096, "NVIDIA RTX PRO Blackwell white paper"),
}


@dataclass(frozen=True)
class Case:
    """One operation on one shape; n = 0 where nothing is multiplied."""

    operation: str
    m: int
    n: int
    k: int
    s: int = 0

    @property
    def layer(self) -> str:
        return f"N={self.n} K={self.k}" if self.n else f"K={self.k}"

    @property
    def flops(self) -> int:
        """Of the product, residual channels included."""
        return 0 if self.operation == READ else 2 * self.m * self.n * (self.k + self.s)

    @property
    def weight_bytes(self) -> int:
        return 2 * self.n * self.k if self._in_16_bits else packed_bytes(self.n, self.k + self.s)

    @property
    def bytes(self) -> int:
        """That have to move: every input once (x twice for its own tensor scale), every output once."""
        m, n, k, wide = self.m, self.n, self.k, self.k + self.s
        x, q = 2 * m * k, packed_bytes(m, wide)
        if self.operation == READ:
            return self.weight_bytes
        if self.n and self._in_16_bits:
            return x + self.weight_bytes + 2 * m * n
        if self.n:
            reads = x + 2 * q if self.operation.startswith("quantize") else q
            return reads + self.weight_bytes + (2 if self.operation == "torch nvfp4" else 4) * m * n
        more = {"copy": x - q, "quantize, dynamic scale": x, "augment": 4 * k, "RMSNorm + augment": 8 * k}
        return x + q + more.get(self.operation, 0)

    @property
    def _in_16_bits(self) -> bool:
        return self.operation in ("torch fp16", "torch bf16")

    def floor(self, gpu: Gpu) -> float | None:
        """Seconds that no kernel of this operation can beat on this GPU; None where it has none."""
        if self.operation == "torch nvfp4" and gpu.fp4 is None:
            return None
        fp4 = gpu.fp4 if self.operation in ("exact", "quantize + exact", "torch nvfp4") else None
        return max(self.bytes / gpu.bytes_per_second, self.flops / (fp4 or gpu.fp16))


def packed_bytes(rows: int, k: int) -> int:
    """Of an NVFP4 matrix: codes, and scales in whole tiles."""
    return rows * k // 2 + launch.scales_bytes(rows, k)


def plan(layers: Sequence[tuple[int, int]], rows: Sequence[int], only: str | None = None) -> list[Case]:
    """Every case, in the order in which it runs."""
    cases = []
    if only != "gemm":
        for k in sorted({k for _, k in layers}):
            for m in rows:
                cases += [Case(o, m, 0, k, WIDEST if "augment" in o else 0) for o in QUANTIZING]
    if only != "quantize":
        for n, k in layers:
            for m in rows:
                cases += [Case(o, m, n, k) for o in LIBRARY[:2]]
                cases += [Case(o, m, n, k, s) for o in ("exact", "fast") for s in RESIDUALS]
                cases += [Case(o, m, n, k, s) for o in PRODUCTS[2:] for s in (0, WIDEST)]
                cases += [Case(LIBRARY[2], m, n, k, s) for s in (0, WIDEST)] + [Case(READ, m, n, k)]
    return cases


@dataclass(frozen=True)
class Result:
    """Times in seconds, None where there are none; then `reason` says why."""

    case: Case
    median: float | None = None
    best: float | None = None
    worst: float | None = None
    compared: int = 0  # bytes and outputs that were compared before it was timed
    error: float | None = None  # ‖y − x wᵀ‖ / ‖x wᵀ‖ in float64 on the compared outputs
    reason: str | None = None
    failed: bool = False  # False with a reason: not for this GPU or torch


@dataclass(frozen=True)
class Peak:
    """What this GPU reached in this run."""

    flops_per_second: float  # torch fp16 on a large square product
    bytes_per_second: float  # of a device copy, bytes read and written


def figures(result: Result, results: dict[Case, Result], peak: Peak) -> dict[str, float | None]:
    """What a time means: rates, parts of the peaks, and ratios to other rows of the same shape."""
    case, t = result.case, result.median
    if t is None:
        return {}
    first = _time(results, Case("torch fp16" if case.n else "copy", case.m, case.n, case.k))
    plain = _time(results, Case(case.operation, case.m, case.n, case.k)) if case.n and case.s else None
    return {
        "TFLOP/s": case.flops / t / 1e12,
        "GB/s": case.bytes / t / 1e9,
        "of peak FLOP/s": case.flops / t / peak.flops_per_second,
        "of copy bandwidth": case.bytes / t / peak.bytes_per_second,
        "times the first": first and first / t,  # how often it is as fast as torch fp16, or a copy
        "over S = 0": plain and t / plain,
        "expected over S = 0": (case.k + case.s) / case.k if plain else None,
        "weight bytes": case.weight_bytes,
        "weight bytes of fp16": case.weight_bytes / (2 * case.n * case.k) if case.n else None,
    }


def _time(results: dict[Case, Result], case: Case) -> float | None:
    return results[case].median if case in results else None


# Tables

Value = Callable[[Case], str]


def grids(results: dict[Case, Result], peak: Peak) -> Iterator[str]:
    """For each layer and each thing to know a table, M down and operations across."""
    of = {case: figures(result, results, peak) for case, result in results.items()}

    def number(name: str, form: str) -> Value:
        def text(case: Case) -> str:
            value = of[case].get(name)
            return "" if value is None else format(value, form)

        return text

    def time(case: Case) -> str:
        result = results[case]
        return _microseconds(result.median) or ("FAILED" if result.failed else "")

    def residual(case: Case) -> str:
        got, expected = of[case].get("over S = 0"), of[case].get("expected over S = 0")
        return "" if not got or not expected else f"{got:.2f}/{expected:.2f}"

    def error(case: Case) -> str:
        return "" if results[case].error is None else f"{results[case].error:.2e}"

    for layer in dict.fromkeys(case.layer for case in results):
        cases = [case for case in results if case.layer == layer]
        product = cases[0].n > 0
        yield grid(f"{layer}: median, microseconds", cases, time)
        first = "torch fp16" if product else "a copy of x"
        yield grid(f"{layer}: speed, {first} = 1", cases, number("times the first", ".2f"))
        yield grid(f"{layer}: part of a copy's bandwidth", cases, number("of copy bandwidth", ".0%"))
        if product:
            yield grid(f"{layer}: TFLOP/s, residual channels included", cases, number("TFLOP/s", ".1f"))
            yield grid(f"{layer}: part of the peak FLOP/s", cases, number("of peak FLOP/s", ".0%"))
            yield grid(f"{layer}: time over that of S = 0 / expected (K+S)/K", cases, residual)
            of_one = [case for case in cases if case.m == cases[0].m]
            yield grid(f"{layer}: weight bytes, fp16 = 1", of_one, number("weight bytes of fp16", ".3f"))
            yield grid(f"{layer}: relative error against float64", cases, error)


def grid(title: str, cases: Sequence[Case], value: Value) -> str:
    """Fixed-width text; columns in which nothing stands are left out."""
    columns = list(dict.fromkeys((case.operation, case.s) for case in cases))
    texts = {(case.m, case.operation, case.s): value(case) for case in cases}
    rows = list(dict.fromkeys(case.m for case in cases))
    columns = [c for c in columns if any(texts.get((m, *c)) for m in rows)]
    names = [f"{operation} S={s}" if s or operation in PRODUCTS else operation for operation, s in columns]
    widths = [max(len(name), 8) + 2 for name in names]
    lines = [title, f"{'M':>6}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths))]
    for m in rows:
        cells = (f"{texts.get((m, *c), ''):>{width}}" for c, width in zip(columns, widths))
        lines.append(f"{m:>6}" + "".join(cells))
    return "\n".join(lines)


def _microseconds(seconds: float | None) -> str:
    """Three digits or more."""
    if seconds is None:
        return ""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.3g}"


def floors(cases: Sequence[Case]) -> Iterator[str]:
    """The same tables of floor times, for each GPU with stated peaks."""
    for name, gpu in GPUS.items():
        fp4 = f"fp4 {gpu.fp4 / 1e12:.0f} TFLOP/s" if gpu.fp4 else "no fp4: products are fp16"
        peaks = f"{gpu.bytes_per_second / 1e9:.0f} GB/s, fp16 {gpu.fp16 / 1e12:.0f} TFLOP/s, {fp4}"
        yield f"{name}: floor times, from bytes and operations over {peaks} ({gpu.source})"
        for layer in dict.fromkeys(case.layer for case in cases):
            of_layer = [case for case in cases if case.layer == layer]
            yield grid(f"{layer}: microseconds", of_layer, lambda c: _microseconds(c.floor(gpu)))  # noqa: B023


# On the GPU

CUDA = "cuda"  # as torch calls it
WARM, LEAST, MOST, SECONDS = 3, 5, 30, 0.1  # calls before timing, then timed: as many as fit SECONDS
HOST_CYCLES = 1_500_000  # GPU clocks in which the host surely issues one call
COPIES = 8  # of operands, at most: together they exceed L2
SHOWN_ROWS, SHOWN_COLUMNS = 12, 48  # of an output are compared


class Timer:
    """Times between CUDA events around one call; the host is ahead of the GPU. Before each, L2 is filled by
    reading other memory: after writing, the call would pay for moving what was written to memory."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other = torch.zeros(max(self.l2_bytes, 2**25), dtype=torch.float32, device=CUDA)
        self._sum = torch.zeros((), dtype=torch.float32, device=CUDA)

    def __call__(self, call: Callable[[int], Any]) -> list[float]:
        """Seconds of call(0), call(1), …"""
        for i in range(WARM):
            call(i)
        once = sorted(self._batch(call, 3))[1]
        return self._batch(call, int(min(MOST, max(LEAST, SECONDS / once))))

    def _batch(self, call: Callable[[int], Any], count: int) -> list[float]:
        cuda = self._torch.cuda
        events = [[cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        cuda.synchronize()
        cuda._sleep(HOST_CYCLES * count)
        for i, (start, end) in enumerate(events):
            self._torch.sum(self._other, dim=0, out=self._sum)
            start.record()
            call(i)
            end.record()
        cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def copies(self, nbytes: int) -> int:
        return min(COPIES, -(-2 * self.l2_bytes // nbytes))


class Wrong(Exception):
    """What was computed is not what the emulator computes."""


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix on the GPU, on the host as well: the largest number's row is among them, so that
    they have the tensor scale of the whole."""

    rows: Any  # indices, a tensor on the GPU
    bits: NDArray[np.uint16]  # of bfloat16
    selection: Selection


def sample(torch: Any, x: Any, count: int, selection: Selection) -> Sample:
    largest = int(x.abs().amax(dim=1).argmax())
    rng = np.random.default_rng(0)
    rows = sorted({0, len(x) - 1, largest, *rng.integers(0, len(x), count).tolist()})
    held = torch.tensor(rows, device=CUDA)
    return Sample(held, x[held].view(torch.int16).cpu().numpy().view(np.uint16), selection)


def values(part: Sample) -> NDArray[np.float64]:
    return (part.bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Bench:
    """Operands of the layers, made once and kept while their cases run."""

    def __init__(self, torch: Any, most_rows: int) -> None:
        self.torch, self.device, self.timer = torch, CudaTorch(), Timer(torch)
        self._most_rows = most_rows
        self._held: dict[str, Any] = {}

    def peak(self) -> Peak:
        torch, rates = self.torch, []
        for n in (4096, 8192, 12288):
            a, b = (torch.randn(n, n, device=CUDA).half() for _ in range(2))
            rates.append(2 * n**3 / float(np.median(self.timer(lambda i: a @ b.T))))  # noqa: B023
        source = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
        target = torch.empty_like(source)
        copy = float(np.median(self.timer(lambda i: target.copy_(source))))
        return Peak(max(rates), 2 * source.nbytes / copy)

    def run(self, case: Case) -> Result:
        reason = why_not(self.torch, case)
        if reason:
            return Result(case, reason=reason)
        try:
            prepare = self._read if case.operation == READ else self._multiply if case.n else self._quantize
            call, compared, error = prepare(case)
            times = self.timer(call)
            return Result(case, float(np.median(times)), min(times), max(times), compared, error)
        except Exception as error:  # reported, and the other cases run
            return Result(case, reason=f"{type(error).__name__}: {error}", failed=True)

    def _keep(self, key: str, make: Callable[[], Any]) -> Any:
        """Made at the first call; a key begins with its group and a slash, and only one group is kept."""
        group = key.split("/")[0]
        for other in [held for held in self._held if held.split("/")[0] != group]:
            del self._held[other]
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def _numbers(self, rows: int, k: int, outliers: bool) -> Any:
        """(rows, k) bfloat16, normal; with outliers every 50th channel is 30 times as large."""
        generator = self.torch.Generator(CUDA).manual_seed(rows + k)
        x = self.torch.randn(rows, k, device=CUDA, generator=generator)
        if outliers:
            x[:, ::50] *= 30
        return x.bfloat16()

    def _activations(self, group: str, case: Case) -> tuple[Any, Selection, Any]:
        """x (M, K); the selection, made from the most rows; its order on the GPU."""
        x = self._keep(f"{group}/x", lambda: self._numbers(self._most_rows, case.k, outliers=True))
        amax = self._keep(f"{group}/amax", lambda: x.abs().amax(dim=0).float().cpu().numpy())
        selection = self._keep(f"{group}/selection {case.s}", lambda: select_top(amax, case.s))
        order = self._keep(f"{group}/order", lambda: arrays.order_of(selection, x))
        return x[: case.m], selection, order

    def _on_gpu(self, value: np.float32) -> Any:
        return self.torch.tensor([float(value)], dtype=self.torch.float32, device=CUDA)

    def _quantize(self, case: Case) -> tuple[Callable[[int], Any], int, None]:
        x, selection, order = self._activations(case.layer, case)
        part = sample(self.torch, x, SHOWN_ROWS, selection)
        scale = tensor_scale_of(values(part).astype(np.float32)) / 2  # static: the largest saturate
        held = self._on_gpu(scale)
        weight = self.torch.ones(case.k, device=CUDA)
        target, one, epsilon = self.torch.empty_like(x), np.ones(case.k, np.float32), 1e-5
        calls: dict[str, tuple[Callable[[], Any], Callable[[], NVFP4Tensor]]] = {
            "quantize": (lambda: arrays.quantize(x, held), lambda: emulator.quantize(part.bits, scale)),
            "quantize, dynamic scale": (lambda: arrays.quantize(x), lambda: emulator.quantize(part.bits)),
            "augment": (
                lambda: arrays.augment_activations(x, order, case.s, held),
                lambda: emulator.augment_activations(part.bits, selection, scale),
            ),
            "RMSNorm + augment": (
                lambda: arrays.rmsnorm_augment_activations(x, weight, epsilon, order, case.s, held),
                lambda: emulator.rmsnorm_augment_activations(part.bits, one, epsilon, selection, scale),
            ),
        }
        if case.operation == "copy":
            return lambda i: target.copy_(x), 0, None
        call, expected = calls[case.operation]
        return lambda i: call(), self._same_bytes(call(), part, expected()), None

    def _same_bytes(self, q: launch.PackedTensor, part: Sample, expected: NVFP4Tensor) -> int:
        """How many bytes were compared; raises Wrong."""
        got = self._unpacked(q, part)
        for name in ("codes", "block_scales"):
            _same(name, getattr(got, name), getattr(expected, name))
        _same("tensor_scale", np.array([got.tensor_scale]), np.array([expected.tensor_scale]))
        return expected.codes.size + expected.block_scales.size

    def _unpacked(self, q: launch.PackedTensor, part: Sample) -> NVFP4Tensor:
        codes, block_scales = (held.owner[part.rows].cpu().numpy() for held in launch.unpack(self.device, q))
        scale = self.device.download(q.tensor_scale)[0]
        return NVFP4Tensor(codes=codes, block_scales=block_scales, tensor_scale=scale)

    def _weights(self, case: Case) -> tuple[Any, Any]:
        """w (N, K); and a function of S → copies of it quantized, compared already; with the sample."""
        w = self._keep(f"{case.layer}/w", lambda: self._numbers(case.n, case.k, outliers=False))

        def quantized() -> tuple[list[launch.PackedTensor], NVFP4Tensor, Sample]:
            _, selection, order = self._activations(case.layer, case)
            part = sample(self.torch, w, SHOWN_COLUMNS, selection)
            q = arrays.augment_weights(w, order, case.s)
            expected = emulator.augment_weights(part.bits, selection)
            self._same_bytes(q, part, expected)
            count = self.timer.copies(packed_bytes(case.n, case.k + case.s))
            return [q, *(self._clone(q) for _ in range(count - 1))], expected, part

        return w, self._keep(f"{case.layer}/q {case.s}", quantized)

    def _clone(self, q: launch.PackedTensor) -> launch.PackedTensor:
        codes, scales = (arrays.as_array("q", held.owner.clone()) for held in (q.codes, q.scales))
        return launch.PackedTensor(
            codes=codes, scales=scales, tensor_scale=q.tensor_scale, largest=q.largest, shape=q.shape
        )

    def _read(self, case: Case) -> tuple[Callable[[int], Any], int, None]:
        size, threads, count = packed_bytes(case.n, case.k), 1024, self.timer.copies(case.weight_bytes)
        blocks = (
            2 * self.torch.cuda.get_device_properties(self.torch.cuda.current_device()).multi_processor_count
        )
        held = self._keep(f"{case.layer}/bytes", lambda: [self._random_bytes(size) for _ in range(count)])
        args = [[arrays.as_array("bytes", one), np.int64(size // 16)] for one in held]
        sums = self.device.empty((blocks * threads // 32,), "uint32")

        def call(i: int) -> None:
            self.device.launch("probe", "add_words", (blocks, 1, 1), threads, [*args[i % count], sums])

        call(0)
        words = held[0].cpu().numpy()[: size // 16 * 16].view(np.uint32)
        got, true = (
            np.array([np.add.reduce(x, dtype=np.uint32)]) for x in (self.device.download(sums), words)
        )
        _same("sums of all words", got, true)
        return call, size, None

    def _random_bytes(self, size: int) -> Any:
        return self.torch.randint(256, (size,), dtype=self.torch.uint8, device=CUDA)

    def _multiply(self, case: Case) -> tuple[Callable[[int], Any], int, float]:
        x, selection, order = self._activations(case.layer, case)
        w, (of_w, right, columns) = self._weights(case)
        part = sample(self.torch, x, SHOWN_ROWS, selection)
        true = values(part) @ values(columns).T
        if case.operation in LIBRARY[:2]:
            dtype = self.torch.float16 if "fp16" in case.operation else self.torch.bfloat16
            count = self.timer.copies(w.nbytes)
            ws = self._keep(f"{case.layer}/{dtype}", lambda: [w.to(dtype, copy=True) for _ in range(count)])
            a = x.to(dtype)
            y = self._outputs(a @ ws[0].T, part, columns)
            return lambda i: a @ ws[i % len(ws)].T, 0, _relative(y, true)
        scale = self._on_gpu(tensor_scale_of(values(part).astype(np.float32)))
        q = arrays.augment_activations(x, order, case.s, scale)
        left = emulator.augment_activations(part.bits, selection, np.float32(scale.item()))
        compared = self._same_bytes(q, part, left)
        if case.operation == "torch nvfp4":
            return self._library(case, q, of_w, left, right, part, columns, true)
        exact = case.operation.endswith("exact")
        y = self._outputs(arrays.matmul(q, of_w[0], exact), part, columns)
        if exact or adds_as_hopper(self.device):
            _same("y", y, emulator.matmul(left, right) if exact else fast_product(left, right, case.m))
            compared += y.size
        if case.operation.startswith("quantize"):
            return (
                lambda i: arrays.matmul(
                    arrays.augment_activations(x, order, case.s, scale), of_w[i % len(of_w)], exact
                ),
                compared,
                _relative(y, true),
            )
        return lambda i: arrays.matmul(q, of_w[i % len(of_w)], exact), compared, _relative(y, true)

    def _library(
        self,
        case: Case,
        q: launch.PackedTensor,
        of_w: list[launch.PackedTensor],
        left: NVFP4Tensor,
        right: NVFP4Tensor,
        part: Sample,
        columns: Sample,
        true: NDArray[np.float64],
    ) -> tuple[Callable[[int], Any], int, float]:
        """torch's scaled product on our operands, to bfloat16; the tensor scales are left to the caller."""
        torch = self.torch
        a, *bs = [
            (p.codes.owner.view(torch.float4_e2m1fn_x2), p.scales.owner.view(torch.float8_e4m3fn))
            for p in (q, *of_w)
        ]

        def call(i: int) -> Any:
            b = bs[i % len(bs)]
            return torch._scaled_mm(a[0], b[0].T, a[1], b[1], out_dtype=torch.bfloat16)

        scale = float(left.tensor_scale) * float(right.tensor_scale)
        y = self._outputs(call(0), part, columns) * scale
        off = _relative(y, exact_values(left) @ exact_values(right).T)
        if not off < 2.0**-7:  # bfloat16 has 8 significant bits
            raise Wrong(f"y is off by {off:.3g} of itself; rounding to bfloat16 explains at most {2**-8:.3g}")
        return call, y.size, _relative(y, true)

    def _outputs(self, y: Any, rows: Sample, columns: Sample) -> Float32:
        found: Float32 = y[rows.rows][:, columns.rows].float().cpu().numpy()
        return found


def _same(name: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
    got, expected = (np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (got, expected))
    different = np.argwhere(got != expected)
    if len(different):
        i = tuple(different[0].tolist())
        raise Wrong(
            f"{len(different)} of {got.size} {name} differ, first at {i}: "
            f"got {got[i]:#x}, expected {expected[i]:#x}"
        )


def _relative(y: NDArray[Any], true: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(y - true) / np.linalg.norm(true))


def why_not(torch: Any, case: Case) -> str | None:
    """Why a library's case does not run here."""
    if case.operation != "torch nvfp4":
        return None
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no float4_e2m1fn_x2"
    capability = torch.cuda.get_device_capability()
    return (
        None if capability >= (10, 0) else f"compute capability {capability}: cuBLAS has NVFP4 from 10.0 on"
    )


def report(results: dict[Case, Result], peak: Peak, machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON record."""
    rows = []
    for result in results.values():
        row = asdict(result)
        rows.append(row.pop("case") | row | figures(result, results, peak))
    return {"program": "gpu.bench", "machine": machine, "peak": asdict(peak), "rows": rows}


def recorded(path: Path) -> tuple[dict[Case, Result], Peak]:
    """What `report` made of a run. ValueError for another file."""
    try:
        found = json.loads(path.read_text())
        results = {}
        for row in found["rows"]:
            case = Case(**{field.name: row[field.name] for field in fields(Case)})
            times = {f.name: row[f.name] for f in fields(Result) if f.name != "case"}
            results[case] = Result(case=case, **times)
        return results, Peak(**found["peak"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of gpu.bench --json ({error!r}).") from error


def show(results: dict[Case, Result], peak: Peak) -> None:
    print(f"peaks: {peak.flops_per_second / 1e12:.0f} TFLOP/s, {peak.bytes_per_second / 1e9:.0f} GB/s\n")
    print(*grids(results, peak), sep="\n\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m gpu.bench", description=str(__doc__).split("\n\n")[0])
    made.add_argument("--dry-run", action="store_true", help="the plan and its floor times; needs no GPU")
    made.add_argument(
        "--show", type=Path, metavar="FILE", help="the tables of an earlier --json; needs no GPU"
    )
    made.add_argument("--only", choices=("quantize", "gemm"))
    made.add_argument(
        "--rows", nargs="+", type=int, default=ROWS, metavar="M", help="default: 1, 2, 4 … 8192"
    )
    made.add_argument("--layers", nargs="+", type=layer, default=LAYERS, metavar="NxK")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures, and on what they were found"
    )
    return made


def layer(text: str) -> tuple[int, int]:
    """ "4096x14336" → N, K."""
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxK, such as 4096x14336") from None
    if n < 1 or k < WIDEST or k % BLOCK:
        raise argparse.ArgumentTypeError(f"{text!r}: K must be a multiple of {BLOCK}, at least {WIDEST}")
    return n, k


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 if a case failed, 2 for wrong arguments, no GPU or no torch."""
    args = parser().parse_args(argv)
    if min(args.rows) < 1:
        parser().error(f"--rows {min(args.rows)}: a product has at least one row")
    cases = plan(args.layers, args.rows, args.only)
    if args.dry_run:
        print(f"{len(cases)} cases", *floors(cases), sep="\n\n")
        return 0
    if args.show:
        try:
            results, peak = recorded(args.show)
        except (OSError, ValueError) as error:
            print(f"gpu.bench: {error}", file=sys.stderr)
            return 2
        show({case: result for case, result in results.items() if case in cases}, peak)
        return 0
    reason = load.why_not()
    try:
        import torch
    except ImportError as error:
        reason = reason or f"{error}; cuBLAS is called through it"
    if reason is None and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} finds no GPU"
    if reason:
        print(f"gpu.bench: {reason}. --dry-run needs no GPU.", file=sys.stderr)
        return 2
    bench = Bench(torch, max(args.rows))
    before = record.machine(bench.device)
    peak = bench.peak()
    results = {case: bench.run(case) for case in tqdm(cases, "cases", disable=None)}
    show(results, peak)
    failed = [result for result in results.values() if result.failed]
    print(
        f"\n{len(results)} cases, {len(failed)} failed", *(f"{r.case}: {r.reason}" for r in failed), sep="\n"
    )
    if args.json:
        after = record.machine(bench.device)["gpu"]
        record.save(args.json, report(results, peak, before | {"gpu_after": after}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
