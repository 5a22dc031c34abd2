"""Speed of the emulator beside what a reader knows, in one interleaved run."""

import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Any

import numpy as np
from numba import config
from threadpoolctl import threadpool_info
from tqdm import tqdm

import emulator
from emulator.gemm import matmul_in_integers
from emulator.jit import over_rows

from . import layout
from .augment import augment_activations
from .formats import BLOCK, E2M1, E4M3, Float32, decode, encode
from .gemm import matmul
from .quantize import quantize, tensor_scale_of
from .select import calibrate, select_top
from .tensor import NVFP4Tensor

ROUNDS, SECONDS = 9, 2.0  # each case runs so often, or three times if that takes longer
PAUSE = 0.2  # seconds before each product: BLAS threads of the one before keep spinning for a while
Case = Callable[[], Any]
Encode = Callable[[Float32], tuple[Any, Float32]]  # values → codes, and what they stand for
Work = dict[str, tuple[float, str]]  # of each case: so many 10⁹, of what


@dataclass(frozen=True)
class Row:
    """One case: its times in seconds, and its work in `unit`s of 10⁹."""

    group: str
    name: str
    median: float
    best: float
    worst: float
    work: float
    unit: str
    ratio: float  # its rate / the rate of the first row of its group

    @property
    def rate(self) -> float:
        return self.work / self.median


@dataclass(frozen=True)
class Group:
    """What to time; the work in each case; and for each peer that cannot be called, why not."""

    cases: dict[str, Case]
    work: Work
    missing: dict[str, str]


def run(size: int) -> tuple[list[Row], dict[str, str]]:
    """All rows for (size, size) matrices and products of (size / 4)³, first calls and warm-up left out; and
    the peers that are missing, with the reason."""
    quantizing, products = quantize_cases(size), matmul_cases(size // 4)
    rows = [
        *_measure("quantize", quantizing.cases, quantizing.work),
        *_measure("matmul", products.cases, products.work, PAUSE),
    ]
    return rows, quantizing.missing | products.missing


def growth(size: int) -> list[Row]:
    """quantize of (n, n) and matmul of n³ for n = 256, 512, … up to size: is the cost per item the same?"""
    rows = []
    for n in tqdm([n for n in (256, 512, 1024, 2048, 4096) if n <= size], "sizes", disable=None):
        x, q = _normal(n, n), emulator.quantize(_normal(n, n))
        cases: dict[str, Case] = {
            "quantize": partial(emulator.quantize, x),
            "matmul": partial(emulator.matmul, q, q),
        }
        rows += _measure(
            str(n), cases, {"quantize": (n * n / 1e9, "values"), "matmul": (n**3 / 1e9, "products")}
        )
    return rows


def quantize_cases(n: int) -> Group:
    """All read one (n, n) float32 matrix unless the name says bf16, and the slowest n / 8 rows of it."""
    x = _normal(n, n)
    scale = tensor_scale_of(x)
    bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    selection = select_top(calibrate([x]), n // 8 // BLOCK * BLOCK)
    warm = np.zeros_like(x)
    cases: dict[str, Case] = {
        "copy into warm memory, all threads": lambda: over_rows(
            lambda start, stop: np.copyto(warm[start:stop], x[start:stop]), n
        ),
        "x.copy()": x.copy,
        "emulator.quantize, static scale": lambda: emulator.quantize(x, scale),
        "emulator.quantize": lambda: emulator.quantize(x),
        "emulator.quantize and pack": lambda: emulator.pack(emulator.quantize(x).codes),
        "emulator.quantize, bf16": lambda: emulator.quantize(bf16),
        "emulator.augment_activations, S = K/8": lambda: emulator.augment_activations(x, selection),
        "emulator.augment_weights, S = K/8": lambda: emulator.augment_weights(x, selection),
        "arcquant_ref.quantize": lambda: quantize(x),
        "arcquant_ref.augment_activations": lambda: augment_activations(x, selection),
    }
    peers, missing = _installed(
        {
            "ml_dtypes": lambda: _ml_dtypes(x, scale),
            "torchao": lambda: _torchao(x, scale),
            "nvidia-modelopt": lambda: _modelopt(x, scale),
        }
    )
    slow, slow_missing = _installed({"gfloat": lambda: _gfloat(x[: n // 8], scale)})
    slow |= _argmin(x[: n // 8], scale)
    read = {name: (2 if "bf16" in name else 4) * n * n / 1e9 for name in cases | peers}
    read |= {name: 4 * n * (n // 8) / 1e9 for name in slow}
    work = {name: (w, "GB/s read") for name, w in read.items()}
    return Group(cases | peers | slow, work, missing | slow_missing)


def matmul_cases(n: int) -> Group:
    """The product of two (n, n) tensors, exact in some rows and a tensor core's bits in others."""
    a, b = emulator.quantize(_normal(n, n)), emulator.quantize(_normal(n, n, seed=1))
    far_a, far_b = (q.map(np.copy) for q in (a, b))
    for q in (far_a, far_b):
        q.block_scales[:] = np.random.default_rng(2).integers(1, E4M3.nan_code, q.block_scales.shape)
    small = n // 8  # for what is slow: rates, not times, are compared
    part = [q.map(lambda array: array[:small]) for q in (a, b)]
    x, w = emulator.dequantize(a), emulator.dequantize(b)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    cases: dict[str, Case] = {
        "numpy float32 matmul": lambda: x @ w.T,
        "numpy float64 matmul": lambda: x64 @ w64.T,
        "emulator.matmul": lambda: emulator.matmul(a, b),
        "emulator.matmul, scales of any size": lambda: emulator.matmul(far_a, far_b),
        "arcquant_ref.matmul, exact": lambda: matmul(*part),
        "emulator.gemm.matmul_in_integers": lambda: matmul_in_integers(*part),
    }
    work = {name: 2 * n**3 / 1e9 for name in cases}
    work |= {name: 2 * small**2 * n / 1e9 for name in list(cases)[-2:]}
    sim, missing = _installed({"mmasim": lambda: _mmasim(part[0], part[1])})
    work |= {name: 2 * 16 * 8 * n / 1e9 for name in sim}
    return Group(cases | sim, {name: (w, "GFLOP/s") for name, w in work.items()}, missing)


def _installed(peers: dict[str, Callable[[], dict[str, Case]]]) -> tuple[dict[str, Case], dict[str, str]]:
    """The cases of the peers that are there, and why the others are not: {distribution: reason}."""
    cases: dict[str, Case] = {}
    missing: dict[str, str] = {}
    for distribution, make in peers.items():
        try:
            cases |= make()
        except (ImportError, AttributeError) as error:  # AttributeError: a release without that function
            missing[distribution] = str(error)
    return cases, missing


def _in_numpy(x: Float32, scale: np.float32, to_e4m3: Encode, to_e2m1: Encode) -> tuple[Any, Any]:
    """Section 3 of docs/spec.md as one would write it in NumPy with these encoders: (codes, block scales)."""
    blocks = x.reshape(len(x), -1, BLOCK)
    v = np.abs(blocks).max(axis=-1) / np.float32(E2M1.max) / scale
    scales, decoded = to_e4m3(np.clip(v, np.float32(E4M3.least_positive), np.float32(E4M3.max)))
    t = blocks / (decoded * scale)[..., None]
    return to_e2m1(np.clip(t, -np.float32(E2M1.max), np.float32(E2M1.max)))[0], scales


def _ml_dtypes(x: Float32, scale: np.float32) -> dict[str, Case]:
    ml_dtypes = import_module("ml_dtypes")

    def to(dtype: Any) -> Encode:
        def encode(values: Float32) -> tuple[Any, Float32]:
            codes = values.astype(dtype)
            return codes, codes.astype(np.float32)

        return encode

    encoders = to(ml_dtypes.float8_e4m3fn), to(ml_dtypes.float4_e2m1fn)
    name = f"NumPy, ml_dtypes {ml_dtypes.__version__}, 1 thread, static"
    return {name: lambda: _in_numpy(x, scale, *encoders)}


def _gfloat(x: Float32, scale: np.float32) -> dict[str, Case]:
    gfloat, formats = import_module("gfloat"), import_module("gfloat.formats")

    def to(fmt: Any) -> Encode:
        def encode(values: Float32) -> tuple[Any, Float32]:
            rounded = gfloat.round_ndarray(fmt, values, sat=True)
            return gfloat.encode_ndarray(fmt, rounded), rounded.astype(np.float32)

        return encode

    encoders = to(formats.format_info_ocp_e4m3), to(formats.format_info_ocp_e2m1)
    name = f"NumPy, gfloat {metadata.version('gfloat')}, 1 thread, static"
    return {name: lambda: _in_numpy(x, scale, *encoders)}


def _argmin(x: Float32, scale: np.float32) -> dict[str, Case]:
    """The nearest of all values of E2M1, found by its distance to each of them: ARCQuant's fake quantization.
    Of two at the same distance the first in the table, so ties are not rounded to even."""
    values = decode(E2M1, np.arange(2**E2M1.bits, dtype=np.uint8))

    def to_e4m3(v: Float32) -> tuple[Any, Float32]:
        codes = encode(E4M3, v)
        return codes, decode(E4M3, codes)

    def to_e2m1(t: Float32) -> tuple[Any, Float32]:
        codes = np.abs(t[..., None] - values).argmin(axis=-1)
        return codes, values[codes]

    return {"NumPy, argmin over the values, 1 thread": lambda: _in_numpy(x, scale, to_e4m3, to_e2m1)}


def _torchao(x: Float32, scale: np.float32) -> dict[str, Case]:
    torch, nvfp4 = import_module("torch"), import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    tensor, tensor_scale, function = torch.from_numpy(x), torch.tensor(scale), nvfp4.nvfp4_quantize
    name = f"torchao {metadata.version('torchao')}, packed, static"
    return {name: lambda: function(tensor, BLOCK, tensor_scale)}


def _modelopt(x: Float32, scale: np.float32) -> dict[str, Case]:
    torch, qtensor = import_module("torch"), import_module("modelopt.torch.quantization.qtensor")
    quantize_with = qtensor.NVFP4QTensor.quantize
    tensor, tensor_scale = torch.from_numpy(x), torch.tensor(scale)
    name = f"ModelOpt {metadata.version('nvidia-modelopt')}, packed, static"
    return {name: lambda: quantize_with(tensor, BLOCK, weights_scaling_factor_2=tensor_scale)}


def _mmasim(a: NVFP4Tensor, b: NVFP4Tensor) -> dict[str, Case]:
    """One 16 × 8 tile, chained over K."""
    torch, nv = import_module("torch"), import_module("mmasim.nv_ptx.sim")
    mma = nv.MMABlockScale("RTX Blackwell", "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3")
    (x, sfa), (w, sfb) = (
        (torch.from_numpy(layout.pack(q.codes[:r])), torch.from_numpy(q.block_scales[:r].copy()))
        for q, r in ((a, 16), (b, 8))
    )
    sfa, sfb = sfa.view(torch.float8_e4m3fn), sfb.view(torch.float8_e4m3fn)

    def chain() -> Any:
        d = torch.zeros(16, 8)
        for s in range(x.shape[1] // 32):
            k, g = slice(32 * s, 32 * s + 32), slice(4 * s, 4 * s + 4)
            d = mma(x[:, k], w[:, k].T, d, sfa[:, g], sfb[:, g].T)
        return d

    return {"mmasim": chain}


def _measure(group: str, cases: dict[str, Case], work: Work, pause: float = 0) -> list[Row]:
    """Each case once a round, so that a busy machine is busy for all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in tqdm(cases.values(), f"{group}: first calls", disable=None, leave=False):
        case()
    for _ in tqdm(range(ROUNDS), group, disable=None, leave=False):
        for name, case in cases.items():
            if len(times[name]) < 3 or sum(times[name]) < SECONDS:
                time.sleep(pause)
                start = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - start)
    rates = {name: work[name][0] / float(np.median(seconds)) for name, seconds in times.items()}
    first = next(iter(rates.values()))
    return [
        Row(group, name, float(np.median(s)), min(s), max(s), *work[name], rates[name] / first)
        for name, s in times.items()
    ]


def table(rows: Iterable[Row]) -> str:
    """Fixed-width text, one line a case; the ratio is to the first line of the group."""
    lines, group = [], None
    for row in rows:
        if row.group != group:
            group = row.group
            lines += [
                "",
                f"{group:<42} {'median':>9} {'best':>9} {'worst':>9} {row.unit:>10} {'x ' + 'first':>9}",
            ]
        times = "".join(f"{1e3 * s:>7.1f} ms" for s in (row.median, row.best, row.worst))
        lines.append(f"{row.name:<42}{times}{row.rate:>11.3g} {row.ratio:>9.3g}")
    return "\n".join(lines[1:])


def not_there(missing: dict[str, str]) -> str:
    """One line that names the peers that were not timed, or an empty one."""
    return f"not timed: {', '.join(f'{name} ({why})' for name, why in missing.items())}" if missing else ""


def machine() -> dict[str, str]:
    """What a time depends on."""
    blas: dict[str, Any] = next((pool for pool in threadpool_info() if pool["user_api"] == "blas"), {})
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": f"{config.NUMBA_NUM_THREADS} ours, {blas.get('num_threads', '?')} BLAS",  # type: ignore[attr-defined]
        "BLAS": f"{blas.get('internal_api', 'unknown')} {blas.get('version', '')}",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {import_module(name).__version__}" for name in ("numpy", "numba")),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _normal(rows: int, columns: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
