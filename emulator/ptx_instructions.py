"""What each PTX instruction does to a batch of threads. Source: PTX ISA 9, chapter Instruction Set.

A rule is a pattern that an opcode must match as a whole, so that a modifier nobody thought of is unknown here
and not ignored. What computes a register from others, thread by thread, is one line of ELEMENTWISE; below it
are memory, branches, barriers, warps and tensor cores.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from . import ptx_memory as watch
from .formats import (
    MAGNITUDE,
    NAN,
    SIGN,
    decode_e4m3_flat,
    encode_e2m1_flat,
    encode_e4m3_flat,
    f32,
    f64,
    u8,
    u32,
)
from .ptx_machine import DTYPES, EXITED, FENCED, WARP, WARPGROUP, Array, BadAccess, Batch, bits_in_type
from .tensor_core import BF16, FP16, half_warps, nvfp4_warps

f16, u16, u64, i64 = np.float16, np.uint16, np.uint64, np.int64
RULES: dict[str, Callable[..., int | None]] = {}


def instruction(pattern: str) -> Callable:
    """Use the function below for opcodes that match. It gets the batch, the operands and the groups; it
    returns the number of the statement to go on with, if it is not the next one."""

    def register(function: Callable) -> Callable:
        RULES[pattern] = function
        return function

    return register


@cache
def meaning(opcode: str) -> Callable[..., int | None] | None:
    """A function of batch and operands; None for an opcode or a modifier that is not known."""
    for pattern, function in RULES.items():
        if match := re.fullmatch(pattern, opcode):
            groups = match.groups()
            return lambda batch, operands: function(batch, operands, *groups)
    return None


# Floating point: every result is the exact one, rounded once


def one_nan(x: Array) -> Array:
    """x, a new array, its NaNs those that the hardware returns."""
    return np.where(np.isnan(x), (NAN if x.dtype == f32 else u16(0x7FFF)).view(x.dtype), x)


def exact_sum(a: Array, b: Array) -> Array:
    """float64 a + b; the last bit is odd if some were cut off (the error comes from Knuth's TwoSum), so that
    rounding it to float32, in any direction, rounds the exact sum (Boldo and Melquiond 2008)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    bits = s.view(i64)
    toward_zero = bits - ((error < 0) != (s < 0))
    return np.where((error != 0) & np.isfinite(s), toward_zero | 1, bits).view(f64)


def rounded(x: Array, rounding: str) -> Array:
    """float64 → float32: rn to nearest even, rz toward zero, rp up."""
    nearest = x.astype(f32)
    if rounding == "rz":
        nearest = np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, f32(0)), nearest)
    if rounding == "rp":
        nearest = np.where(nearest < x, np.nextafter(nearest, f32(np.inf)), nearest)
    return one_nan(nearest)


def fma(rounding: str, a: Array, b: Array, c: Array) -> Array:
    """The product of two float32 is exact in float64."""
    return rounded(exact_sum(a.astype(f64) * b.astype(f64), c.astype(f64)), rounding)


def approximate_reciprocal(a: Array) -> Array:
    """Within an ulp of 1 / a, which is all that PTX defines: the last bit of a flips the last bit of 1 / a.
    Subnormal numbers are zero, with their sign."""
    least = f32(2.0**-126)
    exact = f32(1) / np.where(np.abs(a) < least, a * f32(0), a)
    exact = np.where(np.isfinite(exact), (exact.view(u32) ^ (a.view(u32) & u32(1))).view(f32), exact)
    return one_nan(np.where(np.abs(exact) < least, exact * f32(0), exact))


def float_of_s64(a: Array) -> Array:
    """Toward zero: the sum of two halves that float64 has."""
    return rounded(exact_sum((a >> 32) * 2.0**32, (a & 0xFFFFFFFF).astype(f64)), "rz")


def s32_of_float(a: Array) -> Array:
    """Beyond the integers it saturates, NaN gives 0."""
    whole = np.clip(np.trunc(a.astype(f64)), -(2.0**31), 2.0**31 - 1)
    return np.where(np.isnan(a), 0, whole).astype(np.int32)


def extreme(choose: Callable, sign_of_zeros: Callable, a: Array, b: Array) -> Array:
    """min or max: the one that is a number; −0 is below +0."""
    zeros = sign_of_zeros(a.view(u32), b.view(u32)).view(f32)
    return one_nan(np.where((a == 0) & (b == 0), zeros, choose(a, b)))


def product_of_pairs(a: Array, b: Array) -> Array:
    x, y = (np.ascontiguousarray(pair).view(f16).reshape(-1, 2) for pair in (a, b))
    return np.ascontiguousarray(one_nan(x * y)).view(u32)[:, 0]


def encoded(encode: Callable, bits: int, dtype: Any, high: Array, low: Array) -> Array:
    """cvt.satfinite of two numbers, given as bits."""
    codes = []
    for x in (high, low):
        codes.append(np.empty(len(x), u8))
        encode(np.ascontiguousarray(x), codes[-1])
    return codes[0].astype(dtype) << dtype(bits) | codes[1]


def halves_of_e4m3(codes: Array) -> Array:
    """Two codes → two fp16 numbers, exact."""
    values = np.empty((len(codes), 2), f32)
    decode_e4m3_flat(np.ascontiguousarray(codes).view(u8), values.reshape(-1))
    return np.ascontiguousarray(one_nan(values.astype(f16))).view(u32)[:, 0]


# Integers and bits


def select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def wide_product(a: Array, b: Array) -> Array:
    dtype = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(dtype) * b.astype(dtype)


def sum_of_two_products(a: Array, b: Array, c: Array) -> Array:
    """Both 16-bit halves of a, each times one of the lower two bytes of b, and c."""
    return (a & u32(0xFFFF)) * (b & u32(0xFF)) + (a >> u32(16)) * (b >> u32(8) & u32(0xFF)) + c


def quotient(a: Array, b: Array) -> Array:
    """Truncated toward zero. By zero: all bits set, as the hardware has it (PTX leaves it open)."""
    floor = a // b
    whole = floor + ((floor * b != a) & ((a < 0) != (b < 0)))
    return np.where(b == 0, ~a.dtype.type(0), whole.astype(a.dtype))


def shift(function: Callable, a: Array, n: Array) -> Array:
    """By as many bits as there are, or more: 0, or the sign; NumPy has it like PTX."""
    return function(a, np.minimum(n, u32(a.dtype.itemsize * 8)).astype(a.dtype))


def funnel_left(low: Array, high: Array, n: Array) -> Array:
    """The upper half of 64 bits, shifted by n modulo 32."""
    whole = high.astype(u64) << u64(32) | low.astype(u64)
    return (whole << (n & u32(31)).astype(u64) >> u64(32)).astype(u32)


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    position, length = (np.minimum(x & u32(0xFF), u32(32)).astype(u64) for x in (position, length))
    mask = ((u64(1) << length) - u64(1)) << position
    return (b & ~mask | a.astype(u64) << position & mask).astype(u32)


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """Four bytes of the eight in a and b; the highest bit of a selector asks for the byte's sign only."""
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    bytes_ = np.stack([a, b], axis=-1).view(u8)
    chosen = selectors[:, None] >> np.arange(0, 16, 4, dtype=u32) & u32(15)
    picked = np.take_along_axis(bytes_, (chosen & u32(7)).astype(i64), axis=1)
    return np.where(chosen & u32(8), np.where(picked > 127, u8(0xFF), u8(0)), picked).view(u32)[:, 0]


def reverse(a: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(a).view(u8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]


def leading_zeros(a: Array) -> Array:
    return (32 - np.frexp(a.astype(f64))[1]).astype(u32)


# Opcode → types of the operands, and the function of arrays of the NumPy types that belong to them. t is the
# type in the opcode. The result is stored as bits, extended if the register is longer.
INTEGER, BITS = r"([su](?:16|32|64))", r"(b16|b32|b64|pred)"
ELEMENTWISE: dict[str, tuple[str, Callable[..., Array]]] = {
    rf"add\.{INTEGER}": ("t t", np.add),
    rf"sub\.{INTEGER}": ("t t", np.subtract),
    rf"min\.{INTEGER}": ("t t", np.minimum),
    rf"max\.{INTEGER}": ("t t", np.maximum),
    r"min\.relu\.s32": ("s32 s32", lambda a, b: np.maximum(np.minimum(a, b), 0)),
    rf"abs\.{INTEGER}": ("t", np.abs),
    rf"neg\.{INTEGER}": ("t", np.negative),
    rf"mul\.lo\.{INTEGER}": ("t t", np.multiply),
    r"mul\.hi\.(u32)": ("t t", lambda a, b: (wide_product(a, b) >> u64(32)).astype(u32)),
    r"mul\.wide\.([su](?:16|32))": ("t t", wide_product),
    rf"mad\.lo\.{INTEGER}": ("t t t", lambda a, b, c: a * b + c),
    r"mad\.wide\.([su]32)": ("t t u64", lambda a, b, c: wide_product(a, b).view(u64) + c),
    r"dp2a\.lo\.u32\.u32": ("b32 b32 b32", sum_of_two_products),
    rf"div\.{INTEGER}": ("t t", quotient),
    rf"rem\.{INTEGER}": ("t t", lambda a, b: a - quotient(a, b) * b),
    rf"and\.{BITS}": ("t t", np.bitwise_and),
    rf"or\.{BITS}": ("t t", np.bitwise_or),
    rf"xor\.{BITS}": ("t t", np.bitwise_xor),
    rf"not\.{BITS}": ("t", np.invert),
    r"shl\.(b16|b32|b64)": ("t u32", partial(shift, np.left_shift)),
    rf"shr\.{INTEGER}": ("t u32", partial(shift, np.right_shift)),
    r"shf\.l\.wrap\.b32": ("b32 b32 u32", funnel_left),
    r"bfi\.b32": ("b32 b32 u32 u32", insert),
    r"prmt\.b32": ("b32 b32 b32", permute),
    r"brev\.b32": ("b32", reverse),
    r"clz\.b32": ("b32", leading_zeros),
    r"bfind\.shiftamt\.u32": ("u32", lambda a: np.where(a == 0, ~u32(0), leading_zeros(a))),
    r"selp\.([bsuf](?:16|32|64))": ("t t pred", select),
    r"cvta(?:\.to)?\.(?:global|shared)\.u64": ("u64", np.positive),  # nothing here takes a generic address
    r"add\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a + b)),
    r"add\.rp\.f32": ("f32 f32", lambda a, b: rounded(exact_sum(a.astype(f64), b.astype(f64)), "rp")),
    r"mul\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a * b)),
    r"div\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a / b)),
    r"rcp\.rn\.f32": ("f32", lambda a: one_nan(f32(1) / a)),
    r"rcp\.approx\.ftz\.f32": ("f32", approximate_reciprocal),
    r"sqrt\.rn\.f32": ("f32", lambda a: one_nan(np.sqrt(a))),
    r"fma\.rn\.f32": ("f32 f32 f32", partial(fma, "rn")),
    r"fma\.rz\.f32": ("f32 f32 f32", partial(fma, "rz")),
    r"mul\.rn\.f16x2": ("b32 b32", product_of_pairs),
    r"min\.f32": ("f32 f32", partial(extreme, np.fmin, np.bitwise_or)),
    r"max\.f32": ("f32 f32", partial(extreme, np.fmax, np.bitwise_and)),
    r"max\.NaN\.f32": ("f32 f32", partial(extreme, np.maximum, np.bitwise_and)),
    r"abs\.f32": ("b32", lambda a: a & MAGNITUDE),
    r"neg\.f32": ("b32", lambda a: a ^ SIGN),
    r"copysign\.f32": ("b32 b32", lambda a, b: a & SIGN | b & MAGNITUDE),
    r"cvt\.f32\.f16": ("f16", lambda a: one_nan(a.astype(f32))),
    r"cvt\.rn\.f32\.s32": ("s32", lambda a: a.astype(f32)),
    r"cvt\.rz\.f32\.s64": ("s64", float_of_s64),
    r"cvt\.rzi\.s32\.f32": ("f32", s32_of_float),
    r"cvt\.rn\.satfinite\.e2m1x2\.f32": ("b32 b32", partial(encoded, encode_e2m1_flat, 4, u8)),
    r"cvt\.rn\.satfinite\.e4m3x2\.f32": ("b32 b32", partial(encoded, encode_e4m3_flat, 8, u16)),
    r"cvt\.rn\.f16x2\.e4m3x2": ("b16", halves_of_e4m3),
    r"setp\.nan\.f32": ("f32 f32", lambda a, b: np.isnan(a) | np.isnan(b)),
    r"setp\.equ\.f32": ("f32 f32", lambda a, b: ~((a < b) | (a > b))),
    r"setp\.neu\.f32": ("f32 f32", np.not_equal),
}
for _to in (16, 32, 64):
    for _sign in "su":
        _function = partial(np.ndarray.astype, dtype=DTYPES[f"{_sign}{_to}"])
        ELEMENTWISE[rf"cvt\.{_sign}{_to}\.([su](?:8|16|32|64))"] = ("t", _function)
for _name, _compare, _opposite in (
    ("eq", np.equal, None),
    ("ne", np.not_equal, None),
    ("lt", np.less, np.greater_equal),
    ("le", np.less_equal, np.greater),
    ("gt", np.greater, np.less_equal),
    ("ge", np.greater_equal, np.less),
):
    ELEMENTWISE[rf"setp\.{_name}\.([bsu](?:16|32|64))"] = ("t t", _compare)
    if _opposite:  # with NaN a comparison is false, and true with u, "or unordered"
        ELEMENTWISE[rf"setp\.{_name}\.f32"] = ("f32 f32", _compare)
        ELEMENTWISE[rf"setp\.{_name}u\.f32"] = ("f32 f32", lambda a, b, no=_opposite: ~no(a, b))


def elementwise(sources: str, function: Callable[..., Array], batch: Batch, o: list[str], *kind: str) -> None:
    kinds = [kind[0] if source == "t" else source for source in sources.split()]
    if len(o) != 1 + len(kinds):
        raise batch.unsupported(f"it takes {1 + len(kinds)} operands")
    batch.set(o[0], function(*[batch.read(text, kind) for text, kind in zip(o[1:], kinds)]))


RULES |= {pattern: partial(elementwise, *entry) for pattern, entry in ELEMENTWISE.items()}


# Registers and memory


@instruction(r"mov\.([bsuf](?:16|32|64)|pred)")
def _mov(batch: Batch, o: list[str], kind: str) -> None:
    """A copy; from or to {a, b, …}, the lowest bits first."""
    to, source = (text.count(",") + 1 for text in o)
    if to == source == 1:
        return batch.set(o[0], batch.read(o[1], kind))
    values = batch.reads(o[1], f"b{bits_in_type(kind) // source}", source)
    whole = np.stack(np.broadcast_arrays(*values), axis=-1)
    for name, column in zip(batch.names(o[0], to), whole.view(f"u{bits_in_type(kind) // 8 // to}").T):
        batch.set(name, np.ascontiguousarray(column))


@instruction(r"ld\.param\.([bsuf](?:32|64))")
def _ld_param(batch: Batch, o: list[str], kind: str) -> None:
    name = o[1].strip("[]")
    if bits_in_type(batch.launch.kernel.parameters.get(name, "pred")) != bits_in_type(kind):
        raise batch.unsupported(f"{o[1]} is not a parameter of type .{kind}")
    batch.set(o[0], batch.launch.arguments[name])


WHERE = r"(global|shared)(?:\.v([24]))?\.([bsuf](?:8|16|32|64))"


@instruction(rf"ld(?:\.volatile)?\.{WHERE}")
def _ld(batch: Batch, o: list[str], space: str, vector: str | None, kind: str) -> None:
    names, dtype = batch.names(o[0], int(vector or 1)), DTYPES[kind]
    values = np.empty((len(batch.lanes), dtype.itemsize * len(names)), u8)
    batch.access(watch.READ, space, batch.lanes, batch.addresses(o[1]), values)
    for name, column in zip(names, values.view(dtype).T):
        batch.set(name, np.ascontiguousarray(column))


@instruction(rf"st(?:\.volatile)?\.{WHERE}")
def _st(batch: Batch, o: list[str], space: str, vector: str | None, kind: str) -> None:
    values = np.stack([batch.active(x) for x in batch.reads(o[1], kind, int(vector or 1))], axis=1).view(u8)
    batch.access(watch.WRITE, space, batch.lanes, batch.addresses(o[0]), values)


@instruction(r"atom(?:\.relaxed\.gpu)?\.global\.max\.u32")
def _atom(batch: Batch, o: list[str]) -> None:
    """One thread after the other; the hardware may choose any order."""
    where, values = batch.addresses(o[1]), batch.active(batch.read(o[2], "u32"))
    before = np.empty_like(values)
    for i in range(len(where)):
        one, old = slice(i, i + 1), before[i : i + 1].view(u8).reshape(1, 4)
        batch.access(watch.READ, "global", batch.lanes[one], where[one], old)
        new = np.maximum(before[one], values[one]).view(u8).reshape(1, 4)
        batch.access(watch.ATOMIC, "global", batch.lanes[one], where[one], new)
    batch.set(o[0], before)


# Copies from global to shared memory that arrive later


@instruction(r"cp\.async\.(ca|cg)\.shared\.global(?:\.L2::128B)?")
def _cp_async(batch: Batch, o: list[str], cache: str) -> None:
    """[to], [from], width {, bytes to read: the rest becomes zero}"""
    to, source, width = batch.addresses(o[0]), batch.addresses(o[1]), batch.number(o[2])
    if width not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise batch.unsupported(f".{cache} does not copy {width} bytes")
    sizes = batch.active(batch.read((o[3:] or o[2:])[0], "u32"))
    if (sizes > width).any():
        batch.fail(BadAccess, batch.lanes[sizes.argmax()], f"copies {sizes.max()} bytes into {width}")
    values = np.zeros((len(sizes), width), u8)
    for size in np.unique(sizes[sizes > 0]):
        chosen = sizes == size
        part, lanes = np.empty((np.count_nonzero(chosen), size), u8), batch.lanes[chosen]
        batch.access(watch.READ, "global", lanes, source[chosen], part, width)
        values[chosen, :size] = part
    batch.access(watch.COPY, "shared", batch.lanes, to, values)
    batch.copies.issue(batch.lanes, to, width)


@instruction(r"cp\.async\.commit_group")
def _commit(batch: Batch, o: list[str]) -> None:
    batch.copies.committed[batch.lanes] += 1


@instruction(r"cp\.async\.wait_group")
def _wait(batch: Batch, o: list[str]) -> None:
    """All but the last groups, as many as the operand says, have arrived."""
    for lanes, where, _, width in batch.copies.wait(batch.lanes, batch.number(o[0])):
        watch.land(batch.spaces["shared"], where, lanes, batch.stamps["shared"], width)


# Where to go on


@instruction(r"bra(?:\.uni)?")
def _bra(batch: Batch, o: list[str]) -> int:
    if o[0] not in batch.launch.kernel.labels:
        raise batch.unsupported(f"there is no label {o[0]}")
    return batch.launch.kernel.labels[o[0]]


@instruction(r"ret|exit")
def _exit(batch: Batch, o: list[str]) -> int:
    return EXITED


@instruction(r"bar\.sync")
def _bar(batch: Batch, o: list[str]) -> int:
    if len(o) > 1:
        raise batch.unsupported("a barrier for a part of the block is not modelled")
    return batch.wait()


# Warps


@instruction(r"bar\.warp\.sync")
def _warp_sync(batch: Batch, o: list[str]) -> None:
    batch.whole_warps(o[0])
    batch.pass_warp_barrier()


@instruction(r"shfl\.sync\.idx\.b32")
def _shfl(batch: Batch, o: list[str]) -> None:
    """d | p, value, lane, 31, member mask; p: whether the lane exists."""
    batch.whole_warps(o[4])
    if (batch.active(batch.read(o[3], "b32")) != WARP - 1).any():
        raise batch.unsupported("a segment of a warp is not modelled")
    value, lanes = (batch.by_warp(batch.read(text, "b32")) for text in o[1:3])
    result, exists = np.take_along_axis(value, (lanes % WARP).astype(i64), axis=1), np.ones(1, bool)
    for name, register in zip(o[0].split("|"), (result.ravel(), exists)):
        batch.set(name.strip(), register)


def over_warps(combine: Any, kind: str, batch: Batch, o: list[str]) -> None:
    """d, a, member mask: d is the same for all of a warp."""
    batch.whole_warps(o[2])
    batch.set(o[0], combine.reduce(batch.by_warp(batch.read(o[1], kind)), axis=1).repeat(WARP))


RULES[r"vote\.sync\.any\.pred"] = partial(over_warps, np.logical_or, "pred")
RULES[r"redux\.sync\.add\.[su]32"] = partial(over_warps, np.add, "u32")
RULES[r"redux\.sync\.max\.u32"] = partial(over_warps, np.maximum, "u32")
RULES[r"redux\.sync\.or\.b32"] = partial(over_warps, np.bitwise_or, "b32")


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
def _ldmatrix(batch: Batch, o: list[str], count: str) -> None:
    """Lane 8j + i gives the address of row i of matrix j; lane 4g + t gets elements 2t, 2t + 1 of row g."""
    batch.whole_warps()
    matrices = int(count)
    giving = np.arange(len(batch.lanes)).reshape(-1, WARP)[:, : 8 * matrices].ravel()
    rows = np.empty((len(giving), 16), u8)
    batch.access(watch.READ, "shared", batch.lanes[giving], batch.addresses(o[1])[giving], rows)
    tiles = rows.view(u32).reshape(-1, matrices, WARP)
    for j, name in enumerate(batch.names(o[0], matrices)):
        batch.set(name, tiles[:, j].ravel())


# Tensor cores. A register holds eight codes or two halves along K. Lane 4g + t has rows (of B: columns) g and
# g + 8, and the t-th register of the first and of the second half of K. PTX ISA, Matrix Fragments.


def rows_of_a(registers: list[Array]) -> Array:
    """Four over (warps, 8, 4) lanes, cut in pieces (warps, 8, 4, pieces) → (warps, 16, K)."""
    parts = np.stack(registers, axis=1)  # register & 1: lower rows, >> 1: second half
    w, _, g, t, cut = parts.shape
    halves = parts.reshape(w, 2, 2, g, t, cut).transpose(0, 2, 3, 1, 4, 5)
    return np.ascontiguousarray(halves).reshape(w, 16, -1)


def rows_of_b(registers: list[Array]) -> Array:
    parts = np.stack(registers, axis=1)
    return np.ascontiguousarray(parts.transpose(0, 2, 1, 3, 4)).reshape(len(parts), 8, -1)


def matrix_of_c(registers: list[Array]) -> Array:
    """register & 1: next column, >> 1: lower rows"""
    parts = np.stack(registers, axis=-1).reshape(-1, 8, 4, 2, 2)
    return np.ascontiguousarray(parts.transpose(0, 3, 1, 2, 4)).reshape(-1, 16, 8)


def registers_of_d(matrix: Array) -> list[Array]:
    parts = matrix.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return [parts[register >> 1, register & 1].ravel() for register in range(4)]


def scales_of_a(register: Array, thread: int) -> Array:
    """(warps, 16): of row g in lane 2·thread of the quad g, of row g + 8 in the next one."""
    return np.concatenate([register[:, :, 2 * thread], register[:, :, 2 * thread + 1]], axis=1)


def scales_of_b(register: Array, thread: int) -> Array:
    """(warps, 8): of column g in lane `thread` of the quad g."""
    return np.ascontiguousarray(register[:, :, thread])


def halves_in(registers: Array) -> Array:
    return registers.view(u16).reshape(*registers.shape, 2)


def codes_in(registers: Array) -> Array:
    return (registers[..., None] >> np.arange(0, 32, 4, dtype=u32) & u32(15)).astype(u8)


def over_lanes(batch: Batch, text: str, count: int) -> list[Array]:
    """Operands over the (warps, 8, 4) lanes of whole warps."""
    values = batch.reads(text, "b32", count)
    return [np.ascontiguousarray(batch.active(value)).reshape(-1, 8, 4) for value in values]


def mma(batch: Batch, o: list[str], cut: Callable[[Array], Array], multiply: Callable[..., Array]) -> None:
    """D, A, B, C: `multiply` gets A and B, their registers cut in pieces, and C."""
    batch.whole_warps()
    a = rows_of_a([cut(x) for x in over_lanes(batch, o[1], 4)])
    b = rows_of_b([cut(x) for x in over_lanes(batch, o[2], 2)])
    d = multiply(a, b, matrix_of_c(over_lanes(batch, o[3], 4)).view(f32))
    for name, register in zip(batch.names(o[0], 4), registers_of_d(d)):
        batch.set(name, register)


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def _mma_half(batch: Batch, o: list[str], kind: str) -> None:
    widths, bits = (FP16, np.int16) if kind == "f16.f16" else (BF16, u16)
    mma(batch, o, halves_in, lambda a, b, c: half_warps(a.view(bits), b.view(bits), c, widths))


@instruction(
    r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3"
)
def _mma_nvfp4(batch: Batch, o: list[str]) -> None:
    """D, A, B, C, scales of A, {byte, thread}, scales of B, {byte, thread}."""
    if len(o) != 8:
        raise batch.unsupported("it takes 8 operands")
    scales_a, selector_a, scales_b, selector_b = o[4:]
    byte_a, thread_a = (batch.number(text) for text in batch.names(selector_a, 2))
    byte_b, thread_b = (batch.number(text) for text in batch.names(selector_b, 2))
    if byte_a or byte_b or thread_a not in range(2) or thread_b not in range(4):
        raise batch.unsupported("with 4X the byte is 0, the thread of A's scales 0 or 1, of B's 0 to 3")

    def multiply(a: Array, b: Array, c: Array) -> Array:
        (of_a,), (of_b,) = over_lanes(batch, scales_a, 1), over_lanes(batch, scales_b, 1)
        scales = scales_of_a(of_a, thread_a), scales_of_b(of_b, thread_b)
        return nvfp4_warps(a, b, *(x.view(u8).reshape(len(x), -1, 4) for x in scales), c)

    mma(batch, o, codes_in, multiply)


# Tensor cores that read shared memory, and go on beside the threads. PTX ISA, Asynchronous Warpgroup Level
# Matrix Multiply-Accumulate Instructions.


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxy(batch: Batch, o: list[str]) -> None:
    watch.fence(batch.spaces["shared"], batch.mask, batch.stamps["shared"])


@instruction(r"wgmma\.fence\.sync\.aligned")
def _wgmma_fence(batch: Batch, o: list[str]) -> None:
    batch.whole_warpgroups()
    for last in batch.accumulators.values():
        last[batch.lanes] = np.maximum(last[batch.lanes], FENCED)


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _wgmma_commit(batch: Batch, o: list[str]) -> None:
    batch.whole_warpgroups()
    batch.products.committed[batch.lanes] += 1


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wgmma_wait(batch: Batch, o: list[str]) -> None:
    batch.whole_warpgroups()
    space, now = batch.spaces["shared"], batch.stamps["shared"] | watch.SEVERAL_WARPS
    for lanes, where, _, width in batch.products.wait(batch.lanes, batch.number(o[0])):
        watch.multiplied(space, where, lanes, now, width)
    for lanes, where, _, width in batch.products.in_flight:  # they may read the same bytes
        watch.multiply(space, where, lanes, now, width)


def rows_in_shared(batch: Batch, descriptor: str, rows: int) -> Array:
    """(warpgroups, rows, 16) halves. Matrix Descriptor Format: address / 16 in bits 0-13; in 32-45 how far
    eight rows lie apart, / 16; mode of swizzling in 62-63. With 128-byte swizzling a row begins every 128
    bytes, and bits 4-6 of an address are XORed with bits 7-9. Bits 16-29 are not used then."""
    bits = batch.same(descriptor, "u64").astype(i64)
    first = (bits & 0x3FFF) << 4
    if (bits >> 32 != 1 << 30 | 1024 >> 4).any() or (first % 1024 > 128 - 32).any():
        raise batch.unsupported(
            f"{descriptor} must have 128-byte swizzling (1 in bits 62-63), stride 1024 (64 in bits 32-45), 0 "
            "in the other upper bits, and a start that is a multiple of 1024 plus 0 to 96"
        )
    plain = first[:, None, None] + 128 * np.arange(rows)[:, None] + np.array([0, 16])
    where, lanes = (plain ^ (plain >> 7 & 7) << 4).ravel(), batch.lanes[::WARPGROUP].repeat(2 * rows)
    halves = np.empty((len(where), 16), u8)
    batch.access(watch.MULTIPLY, "shared", lanes, where, halves)
    batch.products.issue(lanes, where, 16)
    return halves.view(np.int16).reshape(-1, rows, 16)


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16")
def _wgmma(batch: Batch, o: list[str], columns: str) -> None:
    """D, descriptors of A and B, whether D is added, 1, 1, 0, 0. Four warps have 16 rows of A and D each, and
    multiply them with 8 rows of B at a time, as mma.m16n8k16 does. D is computed now; who uses it before the
    wait is stopped."""
    batch.whole_warpgroups()
    n = int(columns)
    if n not in range(8, 257, 8) or o[4:] != ["1", "1", "0", "0"]:
        raise batch.unsupported("N is a multiple of 8 up to 256, operands are neither negated nor transposed")
    names, added = batch.names(o[0], n // 2), batch.same(o[3], "pred").repeat(4)
    batch.accumulate(names)
    a = rows_in_shared(batch, o[1], 64).reshape(-1, 16, 16)
    b = rows_in_shared(batch, o[2], n).reshape(-1, n // 8, 8, 16)
    for tile in range(n // 8):
        registers = names[4 * tile : 4 * tile + 4]
        c = matrix_of_c(over_lanes(batch, ",".join(registers), 4)).view(f32)
        d = half_warps(a, b[:, tile].repeat(4, axis=0), np.where(added[:, None, None], c, f32(0)), FP16)
        for name, register in zip(registers, registers_of_d(d)):
            batch.set(name, register)
