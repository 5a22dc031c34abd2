"""What a user reads when input is wrong: argument, value, rule, way out. Only public doors call these."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_NORMAL = np.finfo(np.float32).tiny
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def float_array(name: str, x: ArrayLike, dtypes: Sequence[str] = FLOAT_DTYPES) -> NDArray[Any]:
    """`x` as an array, any shape, not empty, of one of these dtypes."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fill it first, for example {name}.filled(0).")
    x = np.asarray(x)
    if x.dtype.name not in dtypes:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it must be one of {', '.join(dtypes)}. "
            f"Convert it first, for example {name}.astype(np.float32)."
        )
    if x.size == 0:
        raise ValueError(f"{name} has shape {x.shape} and no elements; give at least one.")
    return x


def floats(name: str, x: ArrayLike) -> NDArray[np.float32]:
    """`x` as float32, any shape. float64 is rounded once; NaN, inf, overflow and other dtypes are refused."""
    x = float_array(name, x)
    with np.errstate(over="ignore", under="ignore"):
        rounded = x.astype(np.float32)
    if np.isfinite(rounded).all():
        return rounded
    bad = np.argwhere(~np.isfinite(rounded))
    first = tuple(bad[0].tolist())
    raise ValueError(
        f"{name}: {len(bad)} of {x.size} elements are NaN, infinite or beyond float32, the first is "
        f"{x[first]} at index {first}. If zeros are meant, write them: "
        f"np.where(np.abs({name}) <= np.finfo(np.float32).max, {name}, 0)."
    )


def matrix(name: str, x: ArrayLike, block: int) -> NDArray[np.float32]:
    """`x` as a float32 (M, K) matrix whose K is a multiple of `block`."""
    return floats(name, matrix_shape(name, x, block))


def matrix_shape(name: str, x: ArrayLike, block: int) -> NDArray[Any]:
    """`x` as an (M, K) array of any dtype whose K is a multiple of `block`."""
    x = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"{name} has shape {x.shape}; it must be a matrix. Reshape it to (rows, K).")
    k = x.shape[1]
    if k % block:
        short = block - k % block
        raise ValueError(
            f"{name} has K={k}, which is not a multiple of the block size {block}. "
            f"Pad the last axis with {short} zeros (np.pad({name}, ((0, 0), (0, {short}))))."
        )
    return x


def tensor_scale(value: Any) -> np.float32:
    """A tensor scale as float32: one positive, finite, normal number."""
    scalar = np.asarray(value)
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real and (scalar.ndim != 0 or scalar.dtype.name not in FLOAT_DTYPES):
        raise TypeError(f"tensor_scale={value!r} is not one real number; pass a float.")
    with np.errstate(over="ignore", under="ignore"):
        scale = np.float32(value)
    if not (LEAST_NORMAL <= scale < np.inf):
        raise ValueError(
            f"tensor_scale={value} is not a positive, finite, normal float32 "
            f"(2**-126 <= tensor_scale < 2**128). Leave it out to have it computed from x."
        )
    return scale


def in_float32(name: str, value: np.float32, factor: float) -> np.float32:
    """value · factor as float32, not beyond it."""
    with np.errstate(over="ignore"):
        product = value * np.float32(factor)
    if not np.isfinite(product):
        raise ValueError(f"{name}={value} times {factor:g} is beyond float32. Scale x down, or leave it out.")
    return product


def codes(name: str, array: Any, bits: int) -> NDArray[np.uint8]:
    """`array` as uint8 codes below 2**bits."""
    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise TypeError(f"{name} has dtype {array.dtype}; codes are uint8, one code or packed pair a byte.")
    if array.size and array.max() >= 2**bits:
        first = tuple(np.argwhere(array >= 2**bits)[0].tolist())
        raise ValueError(
            f"{name} holds {array[first]:#04x} at index {first}; a code has {bits} bits "
            f"(at most {2**bits - 1:#x}). Two codes in one byte come apart with layout.unpack."
        )
    return array


def pairs_of_codes(name: str, array: Any, bits: int) -> NDArray[np.uint8]:
    """An (M, K) array of codes below 2**bits, K even."""
    array = codes(name, array, bits)
    if array.ndim != 2 or array.shape[1] % 2:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be (M, K) with K even, two codes to a byte."
        )
    return array


def block_scales_fit(codes: NDArray[np.uint8], block_scales: NDArray[np.uint8], block: int) -> None:
    """Codes are (M, K) with K a multiple of `block`, block scales (M, K / block)."""
    if codes.ndim != 2 or codes.size == 0 or codes.shape[1] % block:
        raise ValueError(
            f"codes has shape {codes.shape}; it must be (M, K), not empty, K a multiple of {block}. "
            f"quantize(x) makes a tensor that fits."
        )
    expected = (codes.shape[0], codes.shape[1] // block)
    if block_scales.shape != expected:
        raise ValueError(
            f"block_scales has shape {block_scales.shape}; codes of shape {codes.shape} need {expected}, one "
            f"scale per {block} values along K. Swizzled scales come back with layout.unswizzle_128x4."
        )


def scales_are_numbers(name: str, block_scales: NDArray[np.uint8], nan_code: int) -> None:
    """No block scale is NaN or carries a sign bit: such a tensor has no value."""
    bad = np.argwhere(block_scales >= nan_code)
    if len(bad):
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: {len(bad)} block scales are NaN or carry a sign bit, the first is "
            f"{block_scales[first]:#04x} at index {first}; a block scale is 0x00 to {nan_code - 1:#04x}. "
            f"Quantize the tensor again."
        )


def is_a(name: str, value: Any, kind: type, way_out: str) -> None:
    """`value` is of the dataclass `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, not {kind.__name__}. {way_out}")


def same_shape(a: str, a_shape: tuple[int, ...], b: str, b_shape: tuple[int, ...]) -> None:
    """Two arrays that are compared element by element have one shape."""
    if a_shape != b_shape:
        raise ValueError(f"{a} has shape {a_shape} but {b} has {b_shape}; they belong to one matrix.")


def has_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """An array has the one shape that an MMA instruction takes."""
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}; one MMA takes {expected}. Cut or pad it to that.")


def augmented(k_prime: int, k: int, residuals: int) -> None:
    """A tensor of depth K' was augmented with a selection of K channels and this many residual channels."""
    if k_prime != k + residuals:
        raise ValueError(
            f"q has K={k_prime}, but a selection of {k} channels with {residuals} residuals makes "
            f"{k + residuals}. Augment with the same selection, or leave it out for a plain tensor."
        )


def same_depth(a: str, a_k: int, b: str, b_k: int) -> None:
    """Both operands of a product have one K."""
    if a_k != b_k:
        raise ValueError(
            f"{a} has K={a_k} and {b} has K={b_k}; a product needs one K. Both are (rows, K); "
            f"if one is augmented, augment the other with the same selection."
        )


def depth(a_k: int, limit: int) -> None:
    """K is at most `limit`."""
    if a_k > limit:
        raise ValueError(
            f"K={a_k} could overflow the exact int64 sum; the limit is {limit}. Split K and add."
        )


def selection_fits(name: str, k: int, selection_k: int) -> None:
    """A selection was made for as many channels as the matrix has."""
    if k != selection_k:
        raise ValueError(
            f"selection was made for K={selection_k} but {name} has K={k}. "
            f"Calibrate and select on this layer's own inputs."
        )


def num_residual(s: Any, limit: int, block: int) -> int:
    """S: a multiple of `block` from 0 to `limit`, itself a multiple."""
    if isinstance(s, (bool, np.bool_)) or not isinstance(s, (int, np.integer)):
        raise TypeError(f"num_residual={s!r} is not an integer; give the number of residual channels.")
    if s < 0 or s > limit or s % block:
        nearest = min(max((int(s) + block // 2) // block * block, 0), limit)
        raise ValueError(
            f"num_residual={s} must be a multiple of {block} from 0 to {limit}. The nearest is {nearest}."
        )
    return int(s)


def channel_order(order: Any) -> NDArray[np.int64]:
    """A permutation of 0 … K−1."""
    order = np.asarray(order)
    if order.ndim != 1 or order.dtype.kind not in "iu":
        raise TypeError(
            f"order has shape {order.shape} and dtype {order.dtype}; it must be K integers. "
            f"Use np.argsort(channel_amax)."
        )
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"order is not a permutation of 0 … {len(order) - 1}. Use np.argsort(channel_amax).")
    return order.astype(np.int64)


def weight_channels(channels: Any, k: int, block: int) -> NDArray[np.int64]:
    """Different channels of 0 … K−1, a multiple of `block` of them."""
    channels = np.asarray(channels)
    if channels.ndim != 1 or (channels.dtype.kind not in "iu" and len(channels)):
        raise TypeError(
            f"weight_channels has shape {channels.shape} and dtype {channels.dtype}; it must be a list of "
            f"channel numbers, integers."
        )
    outside = int(((channels < 0) | (channels >= k)).sum())
    repeated = len(channels) - len(np.unique(channels))
    if len(channels) % block or outside or repeated:
        raise ValueError(
            f"weight_channels has {len(channels)} channels, {repeated} of them repeated and {outside} "
            f"outside 0 … {k - 1}; it must be different channels, a multiple of {block} of them. "
            f"Add the next best channels, or leave the last out."
        )
    return channels.astype(np.int64)


def no_weight_channels(what: str, count: int) -> None:
    """A selection whose residuals are all of activations, for what does not know others."""
    if count:
        raise ValueError(
            f"selection has {count} weight_channels, but {what} knows residuals of activations only. "
            f"Use arcquant_ref or emulator, or leave them out: "
            f"dataclasses.replace(selection, weight_channels=[])."
        )


def non_negative(name: str, amax: ArrayLike) -> NDArray[np.float32]:
    """Finite floats, none below zero, any shape."""
    array = floats(name, amax)
    if (array < 0).any():
        first = tuple(np.argwhere(array < 0)[0].tolist())
        raise ValueError(
            f"{name} is {array[first]} at index {first}; a maximum of |x| is never negative. Use np.abs."
        )
    return array


def channel_energy(energy: ArrayLike, k: int) -> NDArray[np.float64]:
    """K non-negative finite numbers, float64."""
    array = np.asarray(energy)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"energy has dtype {array.dtype}; it must be {k} real numbers, such as float64.")
    array = array.astype(np.float64)
    way_out = "It is the mean of x² of each channel, np.mean(x**2, axis=0)."
    if array.shape != (k,):
        raise ValueError(
            f"energy has shape {array.shape}; it must be ({k},), one for each channel. {way_out}"
        )
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(bad):
        raise ValueError(
            f"energy is {array[bad[0]]} at index {bad[0]}; it must be finite and not negative. {way_out}"
        )
    return array


def channel_amax(amax: ArrayLike, block: int) -> NDArray[np.float32]:
    """K non-negative finite floats, K a multiple of `block`."""
    array = non_negative("channel_amax", amax)
    if array.ndim != 1 or len(array) % block:
        raise ValueError(
            f"channel_amax has shape {array.shape}; it must be (K,), K a multiple of {block}. "
            f"calibrate(batches) makes one from (rows, K) batches."
        )
    return array


def norm_weight(weight: ArrayLike, k: int) -> NDArray[np.float32]:
    """K finite floats: the factors of an RMSNorm."""
    array = floats("weight", weight)
    if array.shape != (k,):
        raise ValueError(
            f"weight has shape {array.shape}; it must be ({k},), one factor for each channel of x."
        )
    return array


def epsilon(value: Any) -> np.float32:
    """A finite number, not negative, as float32."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= np.float32(value) < np.inf:
        raise ValueError(f"epsilon={value!r} must be a finite number, not negative, such as 1e-5.")
    return np.float32(value)


def normalized_rows(finite: NDArray[np.bool_]) -> None:
    """RMSNorm left every row finite, its sum of squares included."""
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise ValueError(
            f"x: RMSNorm leaves the range of float32 in row {bad[0]}: its sum of squares, or a normalized "
            f"element times weight, is not finite. Scale x or weight down; a row of zeros needs epsilon > 0."
        )


def steps(value: Any, limit: int) -> int:
    """How many steps of a plan: an integer from 0 to `limit`."""
    if not isinstance(value, (int, np.integer)) or not 0 <= value <= limit:
        raise ValueError(f"steps={value!r} must be an integer from 0 to {limit}, the steps of this plan.")
    return int(value)


def costs(values: Sequence[Any], layers: int, budget: Any) -> None:
    """A positive number for each layer, and a budget that is not negative."""
    if not budget >= 0:
        raise ValueError(f"budget={budget} must not be negative; 0 means no extra columns.")
    if len(values) != layers or not all(value > 0 for value in values):
        raise ValueError(
            f"costs={list(values)} must be {layers} positive numbers: what 16 columns of each layer cost."
        )


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    if not isinstance(value, (int, float, np.floating)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 to 1; the paper uses 1/8.")
    return float(value)


def exponent_from_0_to_1(name: str, value: Any) -> float:
    """How much of an outlier is moved: a number from 0 to 1."""
    if not isinstance(value, (int, float, np.floating)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 (none) to 1 (all), such as 0.5.")
    return float(value)


def same_channels(a: str, a_shape: tuple[int, ...], b: str, b_shape: tuple[int, ...]) -> None:
    """Two arrays hold one number for each of the same K channels."""
    if a_shape != b_shape or len(a_shape) != 1:
        raise ValueError(
            f"{a} has shape {a_shape} and {b} has {b_shape}; both must be (K,), one number for each channel "
            f"of one layer. np.abs(x).max(axis=0) of a (rows, K) matrix makes one."
        )


def power_of_two(name: str, value: Any) -> int:
    """1, 2, 4, 8 …"""
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or value < 1
        or value & (value - 1)
    ):
        raise ValueError(f"{name}={value!r} must be a power of two, such as 16, or 'full'.")
    return int(value)


def multiple_of(name: str, value: Any, block: int) -> int:
    """A positive multiple of `block`."""
    if not isinstance(value, (int, np.integer)) or value <= 0 or value % block:
        raise ValueError(
            f"{name}={value!r} must be a positive multiple of the block size {block}, such as {4 * block}."
        )
    return int(value)
