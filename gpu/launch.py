"""What is launched for each operation, on any device. Shapes, dtypes and alignment are checked here; no value
is touched: all arithmetic is in cuda/."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from arcquant_ref.formats import BLOCK

from . import load
from .device import ITEMSIZE, Array, Device

THREADS = 256
TILE_ROWS, TILE_SCALES = 128, 4  # of swizzled scales
LARGEST_DIMENSION = 2**31 - 2 * THREADS  # indices along one dimension are int
MOST_BLOCKS_Y = 2**16 - 1  # CUDA programming guide, technical specifications per compute capability
LARGEST_K = 2**28  # products index the scales of a row by int
INPUTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # dtype → suffix of the kernels
AMAX_BLOCKS = 1024
MANY_ROWS = 128  # that keep a GPU busy; of fewer, several thread blocks augment one


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedTensor:
    """An NVFP4 (rows, K) matrix in device memory, as GEMM kernels read it.

    codes         (rows, K/2) uint8, even k in the low nibble
    scales        swizzled 128x4: ⌈rows/128⌉ · ⌈K/64⌉ · 512 uint8, zero where rows and columns are filled up
    tensor_scale  (1,) float32
    largest       (1,) uint32: the bits of the largest |x| quantized, if it is not finite; else less than ∞
    """

    codes: Array
    scales: Array
    tensor_scale: Array
    largest: Array
    shape: tuple[int, int]


def scales_bytes(rows: int, k: int) -> int:
    return _filled(rows, TILE_ROWS) * _filled(k // BLOCK, TILE_SCALES)


def encode(device: Device, name: str, x: Array) -> Array:
    """Codes of any number of numbers, one a byte; `name` is e2m1 or e4m3."""
    codes = device.empty(x.shape, "uint8")
    return _elementwise(device, f"encode_{name}_{_input(x)}", x, codes)


def decode(device: Device, name: str, codes: Array) -> Array:
    _check("codes", codes, codes.shape, "uint8")
    return _elementwise(device, f"decode_{name}", codes, device.empty(codes.shape, "float32"))


def tensor_scale(device: Device, x: Array) -> tuple[Array, Array]:
    """(tensor_scale, amax): (1,) float32, and (1,) uint32, the bits of max |x|."""
    _matrix("x", x)
    amax, scale = device.word(), device.empty((1,), "float32")
    blocks = prod(x.shape) // BLOCK
    grid = min(-(-blocks // THREADS), AMAX_BLOCKS)
    device.launch("convert", f"amax_{_input(x)}", (grid, 1, 1), THREADS, [x, np.int64(blocks), amax])
    device.launch("convert", "tensor_scale", (1, 1, 1), 1, [amax, scale])
    return scale, amax


def quantize(device: Device, x: Array, scale: Array | None = None) -> PackedTensor:
    """(rows, K) numbers → codes and scales; `scale` is a static tensor scale, (1,) float32."""
    rows, k = _matrix("x", x)
    q = _output(device, rows, k, *_scale_for(device, x, scale))
    threads, grid = _by_blocks(_filled(rows, TILE_ROWS), _filled(k // BLOCK, TILE_SCALES))
    args = [x, np.int32(rows), np.int32(k), q.tensor_scale, q.largest, q.codes, q.scales]
    device.launch("quantize", f"quantize_{_input(x)}", grid, threads, args)
    return q


def dequantize(device: Device, q: PackedTensor) -> Array:
    rows, k = q.shape
    values = device.empty((rows, k), "float32")
    threads, grid = _by_blocks(rows, k // BLOCK)
    args = [q.codes, q.scales, q.tensor_scale, np.int32(k), values]
    device.launch("quantize", "dequantize", grid, threads, args)
    return values


def pack(device: Device, codes: Array, block_scales: Array, scale: Array) -> PackedTensor:
    """(rows, K) codes, one a byte, and (rows, K/16) scales → packed and swizzled."""
    rows, k = codes.shape
    _check("codes", codes, (rows, k), "uint8")
    _check("block_scales", block_scales, (rows, k // BLOCK), "uint8")
    q = _output(device, rows, k, scale, device.word())
    threads, grid = _by_blocks(_filled(rows, TILE_ROWS), _filled(k // BLOCK, TILE_SCALES))
    args = [codes, block_scales, np.int32(rows), np.int32(k), q.codes, q.scales]
    device.launch("quantize", "pack", grid, threads, args)
    return q


def unpack(device: Device, q: PackedTensor) -> tuple[Array, Array]:
    """The inverse of `pack`: (codes, block_scales)."""
    rows, k = q.shape
    codes, block_scales = device.empty((rows, k), "uint8"), device.empty((rows, k // BLOCK), "uint8")
    threads, grid = _by_blocks(rows, k // BLOCK)
    device.launch("quantize", "unpack", grid, threads, [q.codes, q.scales, np.int32(k), codes, block_scales])
    return codes, block_scales


def augment_activations(
    device: Device, x: Array, order: Array, num_residual: int, scale: Array | None = None
) -> PackedTensor:
    """(rows, K) → (rows, K + S): channels by `order`, (K,) uint16, the last S with their residual."""
    return _augment(device, "augment_activations", x, order, num_residual, scale)


def augment_weights(device: Device, w: Array, order: Array, num_residual: int) -> PackedTensor:
    """The same, codes and scales of the last S channels twice."""
    return _augment(device, "augment_weights", w, order, num_residual, None)


def rmsnorm_augment_activations(
    device: Device,
    x: Array,
    weight: Array,
    epsilon: np.float32,
    order: Array,
    num_residual: int,
    scale: Array,
) -> tuple[PackedTensor, Array]:
    """RMSNorm, then `augment_activations` with a static tensor scale, in one pass; and (1,) uint32: how many
    rows there are from the first one with a number that is not finite on."""
    rows, k = _matrix("x", x)
    _check("weight", weight, (k,), "float32")
    s, q = _augmented(device, x, order, num_residual, scale)
    rest = device.word()
    args = [x, np.int32(rows), np.int32(k), np.int32(s), order, weight, np.float32(epsilon)]
    args += [q.tensor_scale, q.largest, rest, q.codes, q.scales]
    _launch_rows(device, "rmsnorm_augment_activations", x, ITEMSIZE["float32"], THREADS, args)
    return q, rest


def _augment(
    device: Device, operation: str, x: Array, order: Array, num_residual: int, scale: Array | None
) -> PackedTensor:
    (rows, k), (s, q) = _matrix("x", x), _augmented(device, x, order, num_residual, scale)
    args = [x, np.int32(rows), np.int32(k), np.int32(s), order, q.tensor_scale, q.largest, q.codes, q.scales]
    rounds = 2 if rows >= MANY_ROWS else 1  # a thread has a block in each, or more where K is large
    threads = min(rounds * THREADS // 2, _filled(-(-k // (BLOCK * rounds)), 32))
    _launch_rows(device, operation, x, ITEMSIZE[x.dtype], threads, args)
    return q


def _augmented(
    device: Device, x: Array, order: Array, num_residual: int, scale: Array | None
) -> tuple[int, PackedTensor]:
    rows, k = _matrix("x", x)
    _check("order", order, (k,), "uint16")
    _aligned("order", order)
    if k > 2**16:
        raise ValueError(f"x has K={k}; an order has 16 bits for a channel, up to K=65536. Split K.")
    if not (0 <= num_residual <= k and num_residual % BLOCK == 0):
        raise ValueError(f"num_residual={num_residual} must be a multiple of {BLOCK} from 0 to {k}.")
    return num_residual, _output(device, rows, k + num_residual, *_scale_for(device, x, scale))


def _launch_rows(
    device: Device, operation: str, x: Array, itemsize: int, threads: int, args: list[Any]
) -> None:
    """`itemsize`: bytes of a number in shared memory, which holds a row."""
    rows, k = x.shape
    limit = device.shared_bytes - THREADS * ITEMSIZE["float32"]
    if k * itemsize > limit:
        raise ValueError(
            f"x has K={k}: a row takes {k * itemsize} bytes of shared memory, a block of this GPU "
            f"has {limit}. Quantize the columns in parts, or pass a narrower dtype than {x.dtype}."
        )
    share = 1 if rows >= MANY_ROWS else -(-k // (BLOCK * threads))
    grid = _filled(rows, TILE_ROWS), share, 1
    device.launch("augment", f"{operation}_{_input(x)}", grid, threads, args, k * itemsize)


def matmul(device: Device, a: PackedTensor, b: PackedTensor, exact: bool = True) -> Array:
    """a bᵀ, (M, K) and (N, K) → (M, N) float32. `exact`: the bits of an RTX Blackwell GPU, there from its own
    instruction and elsewhere from fp16 ones; otherwise the products of fp16 numbers (see `Face.matmul`)."""
    (m, k), (n, other) = a.shape, b.shape
    if k != other:
        raise ValueError(f"a has K={k} and b has K={other}; a product needs one K.")
    if k > LARGEST_K:
        raise ValueError(f"a and b have K={k}; a product takes up to {LARGEST_K}. Split K and add.")
    return multiply(device, product(device.arch, m, n, k, exact), a, b)


def multiply(device: Device, plan: "Product", a: PackedTensor, b: PackedTensor) -> Array:
    """The same with a certain kernel, one of `products`."""
    (m, k), (n, _) = a.shape, b.shape
    if plan in SMALL:
        grid = (1, min(_small_tiles(n), AT_ONCE), 1)  # and each takes every so manieth tile
    else:
        grid = (-(-m // plan.tile_m), -(-n // plan.tile_n), 1)
    if grid[1] > MOST_BLOCKS_Y:
        most = MOST_BLOCKS_Y * plan.tile_n
        raise ValueError(f"b has {n} rows; {plan.kernel} takes up to {most}. Split b.")
    y = device.empty((m, n), "float32")
    args: list[Any] = [a.codes, a.scales, a.tensor_scale, b.codes, b.scales, b.tensor_scale]
    args += [np.int32(m), np.int32(n), np.int32(k), y]
    device.launch(plan.source, plan.kernel, grid, plan.threads, args, plan.shared_bytes)
    return y


@dataclass(frozen=True)
class Product:
    """Which kernel multiplies, and what one of its blocks computes, or computes at a time."""

    source: str
    kernel: str
    tile_m: int
    tile_n: int
    threads: int
    shared_bytes: int


FEW_ROWS = 16  # up to so many, reading the weights is most of what a product takes
NATIVE = Product("gemm_native", "gemm_native", 128, 128, 128, 4 * (2 * 128 * 32 + 2 * 512))
EXACT = Product("gemm_portable", "gemm_exact", 128, 128, 256, 2 * (256 * 128 + 256 * 16 + 64))
FAST = Product("gemm_portable", "gemm_fast", 128, 256, 256, 2 * 384 * 128)
SMALL = [
    Product(
        "gemm_small", f"gemm_small_{m}_{ahead}", m, 32, 256, 8 * (ahead * (32 * 72 + m * 96) + m * 36 * 4)
    )
    for m in (8, FEW_ROWS)
    for ahead in (1, 2)  # pieces that each warp has on its way
]
HOPPER = [
    Product(
        "gemm_hopper", f"gemm_hopper_{m}x{n}", m, n, 2 * m, (m + n) * (2 * 128 + 3 * (16 * 64 + 128) // 16)
    )
    for m, n in ((128, 256), (64, 128), (64, 64))
]
# Thread blocks of `SMALL` at most: 124 of an H100's 132 multiprocessors have two of them, and 8 have one.
AT_ONCE = 256
BUSY = 90  # thread blocks that keep a GPU busy: a Hopper GPU has 132 multiprocessors at most


def products(arch: str, m: int, k: int, exact: bool) -> list[Product]:
    """Kernels that multiply M rows, the largest tiles or the least ahead first; their bits are the same."""
    if exact:
        return [NATIVE if load.is_native(arch) else EXACT]
    if m <= FEW_ROWS:
        return [plan for plan in SMALL if plan.tile_m == (8 if m <= 8 else FEW_ROWS)]
    aligned = k % 32 == 0  # gemm_hopper copies 16 bytes of a row at a time
    return HOPPER if arch == "90a" and aligned else [FAST]


def product(arch: str, m: int, n: int, k: int, exact: bool) -> Product:
    """The one for (M, K) by (N, K). Many rows: the largest tile whose last 64 rows M reaches, if there are
    many. Few rows: two pieces ahead where no multiprocessor of an H100 has two thread blocks, else one."""
    plans = products(arch, m, k, exact)
    if m <= FEW_ROWS and not exact:
        one_ahead, two_ahead = plans
        return two_ahead if _small_tiles(n) <= AT_ONCE // 2 else one_ahead
    fit = (plan for plan in plans if m > plan.tile_m - 64 and _blocks(plan, m, n) >= BUSY)
    return next(fit, plans[-1])


def _small_tiles(n: int) -> int:
    """A tile has some columns in each quarter of 128, whose scales lie together."""
    return _filled(n, TILE_ROWS) // SMALL[0].tile_n


def _blocks(plan: Product, m: int, n: int) -> int:
    return -(-m // plan.tile_m) * -(-n // plan.tile_n)


def _elementwise(device: Device, kernel: str, x: Array, out: Array) -> Array:
    n = prod(x.shape)
    if n:
        device.launch("convert", kernel, (-(-n // THREADS), 1, 1), THREADS, [x, out, np.int64(n)])
    return out


def _scale_for(device: Device, x: Array, scale: Array | None) -> tuple[Array, Array]:
    if scale is None:
        return tensor_scale(device, x)
    _check("tensor_scale", scale, (1,), "float32")
    return scale, device.word()


def _output(device: Device, rows: int, k: int, scale: Array, largest: Array) -> PackedTensor:
    return PackedTensor(
        codes=device.empty((rows, k // 2), "uint8"),
        scales=device.empty((scales_bytes(rows, k),), "uint8"),
        tensor_scale=scale,
        largest=largest,
        shape=(rows, k),
    )


def _by_blocks(rows: int, columns: int) -> tuple[int, tuple[int, int, int]]:
    """Threads, and the grid in which each has one block of 16 numbers."""
    threads = min(THREADS, _filled(columns, 32))
    return threads, (rows, -(-columns // threads), 1)


def _filled(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _input(x: Array) -> str:
    if x.dtype not in INPUTS:
        raise TypeError(f"x has dtype {x.dtype}; the kernels read {', '.join(INPUTS)}. Convert it first.")
    return INPUTS[x.dtype]


def _matrix(name: str, x: Array) -> tuple[int, int]:
    _input(x)
    if len(x.shape) != 2 or 0 in x.shape or x.shape[1] % BLOCK or max(x.shape) > LARGEST_DIMENSION:
        raise ValueError(
            f"{name} has shape {x.shape}; it must be (rows, K), not empty, K a multiple of {BLOCK}."
        )
    _aligned(name, x)
    rows, k = x.shape
    return rows, k


def _aligned(name: str, x: Array) -> None:
    if x.address % 16:
        raise ValueError(f"{name} lies at address {x.address:#x}; kernels read 16 bytes at a time. Copy it.")


def _check(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; it must be {shape} and {dtype}."
        )
