"""What each PTX instruction does to a batch of threads. Source: PTX ISA 9, chapter Instruction Set.

A rule is a pattern that an opcode must match as a whole, so that a modifier nobody thought of is unknown here
and not ignored. What computes a register from others, thread by thread, is one line of ELEMENTWISE; below it
are memory, branches, barriers, warps and tensor cores.
"""

import operator
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from . import formats
from . import ptx_memory as watch
from .formats import MAGNITUDE, NAN, SIGN, f32, f64, u8, u32
from .ptx_machine import DTYPES, EXITED, FENCED, WARP, WARPGROUP, Array, BadAccess, Batch, Unsupported
from .tensor_core import BF16, FP16, half_warps, nvfp4_warps

f16, u16, u64, i64 = np.float16, np.uint16, np.uint64, np.int64
Rule = Callable[..., int | None]
RULES: dict[str, tuple[str, Rule]] = {}  # patterns of opcode, and of operands; function


def instruction(opcode: str, operands: str = ".*") -> Callable[[Rule], Rule]:
    """Use the function below for what matches. It gets batch, operands and the named groups of the opcode;
    it returns the number of the statement to go on with, if it is not the next one."""

    def register(function: Rule) -> Rule:
        RULES[opcode] = operands, function
        return function

    return register


@cache
def rule(opcode: str) -> tuple[str, Rule | None]:
    for pattern, (operands, function) in RULES.items():
        if match := re.fullmatch(pattern, opcode):
            return operands, partial(function, **match.groupdict())
    return ".*", None


def meaning(opcode: str, operands: str) -> Rule | None:
    """A function of batch and operands; None for an opcode, a modifier or an operand that is not known."""
    pattern, function = rule(opcode)
    return function if re.fullmatch(pattern, operands) else None


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
    """1 / a rounded, and an ulp less, which PTX allows. Subnormal numbers are zero, with their sign."""
    least = f32(2.0**-126)
    exact = f32(1) / np.where(np.abs(a) < least, a * f32(0), a)
    exact = np.where(np.isfinite(exact) & (exact != 0), (exact.view(u32) - u32(1)).view(f32), exact)
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


def either_nan(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def encoded(encode: Callable, bits: int, high: Array, low: Array) -> Array:
    """cvt.satfinite of two numbers, given as bits."""
    codes = np.empty((2, len(high)), u8)
    encode(high, codes[0])
    encode(low, codes[1])
    return codes[0].astype(u16) << bits | codes[1]


def halves_of_e4m3(codes: Array) -> Array:
    """Two codes → two fp16 numbers, exact."""
    values = np.empty(2 * len(codes), f32)
    formats.decode_e4m3_flat(codes.view(u8), values)
    return one_nan(values.astype(f16)).view(u32)


# Integers and bits


def select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def wide_product(a: Array, b: Array) -> Array:
    dtype = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(dtype) * b.astype(dtype)


def sum_of_two_products(a: Array, b: Array, c: Array) -> Array:
    """Both 16-bit halves of a, each times one of the lower two bytes of b, and c."""
    return (a & u32(0xFFFF)) * (b & u32(0xFF)) + (a >> u32(16)) * (b >> u32(8) & u32(0xFF)) + c


def shift(function: Callable, a: Array, n: Array) -> Array:
    """By as many bits as there are, or more: 0, or the sign; NumPy has it like PTX."""
    return function(a, np.minimum(n, u32(a.dtype.itemsize * 8)).astype(a.dtype))


def funnel_left(low: Array, high: Array, n: Array) -> Array:
    """The upper half of 64 bits, shifted by n modulo 32."""
    whole = high.astype(u64) << u64(32) | low
    return (whole << (n & u32(31)) >> u64(32)).astype(u32)


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    position, length = (np.minimum(x & u32(0xFF), u32(32)).astype(u64) for x in (position, length))
    mask = ((u64(1) << length) - u64(1)) << position
    return (b & ~mask | a.astype(u64) << position & mask).astype(u32)


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """Four bytes of the eight in a and b; the highest bit of a selector asks for the byte's sign only."""
    chosen = selectors[:, None] >> np.arange(0, 16, 4, dtype=u32) & u32(15)
    picked = np.take_along_axis(np.stack([a, b], axis=1).view(u8), (chosen & u32(7)).astype(i64), axis=1)
    return np.where(chosen & u32(8), picked.view(np.int8) >> 7, picked.view(np.int8)).view(u32)[:, 0]


def by_table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Each bit is that of the table whose number the bits of a, b and c make."""
    found = np.zeros_like(a)
    for i in range(8):
        here = [x if i >> n & 1 else ~x for x, n in ((a, 2), (b, 1), (c, 0))]
        found |= here[0] & here[1] & here[2] & -(table >> u32(i) & u32(1))
    return found


def reverse(a: Array) -> Array:
    return np.packbits(np.unpackbits(a.byteswap().view(u8)), bitorder="little").view(u32)


def leading_zeros(a: Array) -> Array:
    return (32 - np.frexp(a.astype(f64))[1]).astype(u32)


# Opcode → types of the operands, and the function of arrays of the NumPy types that belong to them. t is the
# type in the opcode. The result is stored as bits, extended if the register is longer.
INTEGER, BITS = r"(?P<kind>[su](?:16|32|64))", r"(?P<kind>b16|b32|b64|pred)"
ANY = r"(?P<kind>[bsuf](?:8|16|32|64)|pred)"
ELEMENTWISE: dict[str, tuple[str, Callable[..., Array]]] = {
    rf"add\.{INTEGER}": ("t t", np.add),
    rf"sub\.{INTEGER}": ("t t", np.subtract),
    rf"min\.{INTEGER}": ("t t", np.minimum),
    rf"max\.{INTEGER}": ("t t", np.maximum),
    r"min\.relu\.s32": ("s32 s32", lambda a, b: np.maximum(np.minimum(a, b), 0)),
    rf"abs\.{INTEGER}": ("t", np.abs),
    rf"neg\.{INTEGER}": ("t", np.negative),
    rf"mul\.lo\.{INTEGER}": ("t t", np.multiply),
    rf"mad\.lo\.{INTEGER}": ("t t t", lambda a, b, c: a * b + c),
    r"mul\.hi\.u32": ("u32 u32", lambda a, b: (wide_product(a, b) >> u64(32)).astype(u32)),
    r"mul\.wide\.(?P<kind>[su]32)": ("t t", wide_product),
    r"mad\.wide\.(?P<kind>[su]32)": ("t t u64", lambda a, b, c: wide_product(a, b).view(u64) + c),
    r"dp2a\.lo\.u32\.u32": ("b32 b32 b32", sum_of_two_products),
    r"div\.(?P<kind>u32|u64)": ("t t", lambda a, b: np.where(b == 0, ~b, a // b)),  # by 0: as on hardware
    rf"and\.{BITS}": ("t t", np.bitwise_and),
    rf"or\.{BITS}": ("t t", np.bitwise_or),
    rf"xor\.{BITS}": ("t t", np.bitwise_xor),
    rf"not\.{BITS}": ("t", np.invert),
    r"shl\.(?P<kind>b16|b32|b64)": ("t u32", partial(shift, np.left_shift)),
    rf"shr\.{INTEGER}": ("t u32", partial(shift, np.right_shift)),
    r"shf\.l\.wrap\.b32": ("b32 b32 u32", funnel_left),
    r"bfi\.b32": ("b32 b32 u32 u32", insert),
    r"lop3\.b32": ("b32 b32 b32 u32", by_table),
    r"prmt\.b32": ("b32 b32 b32", permute),
    r"brev\.b32": ("b32", reverse),
    r"clz\.b32": ("b32", leading_zeros),
    r"bfind\.shiftamt\.u32": ("u32", lambda a: np.where(a == 0, ~a, leading_zeros(a))),
    rf"selp\.{ANY}": ("t t pred", select),
    r"cvta(?:\.to)?\.(?:global|shared)\.u64": ("u64", np.positive),  # nothing here takes a generic address
    r"add\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a + b)),
    r"add\.rp\.f32": ("f32 f32", lambda a, b: rounded(exact_sum(a.astype(f64), b.astype(f64)), "rp")),
    r"sub\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a - b)),
    r"mul\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a * b)),
    r"div\.rn\.f32": ("f32 f32", lambda a, b: one_nan(a / b)),
    r"rcp\.rn\.f32": ("f32", lambda a: one_nan(f32(1) / a)),
    r"rcp\.approx\.ftz\.f32": ("f32", approximate_reciprocal),
    r"sqrt\.rn\.f32": ("f32", lambda a: one_nan(np.sqrt(a))),
    r"fma\.rn\.f32": ("f32 f32 f32", partial(fma, "rn")),
    r"fma\.rz\.f32": ("f32 f32 f32", partial(fma, "rz")),
    r"mul\.rn\.f16x2": ("b32 b32", lambda a, b: one_nan(a.view(f16) * b.view(f16)).view(u32)),
    r"min\.f32": ("f32 f32", partial(extreme, np.fmin, np.bitwise_or)),
    r"max\.f32": ("f32 f32", partial(extreme, np.fmax, np.bitwise_and)),
    r"max\.NaN\.f32": ("f32 f32", partial(extreme, np.maximum, np.bitwise_and)),
    r"abs\.f32": ("b32", lambda a: a & MAGNITUDE),
    r"neg\.f32": ("b32", lambda a: a ^ SIGN),
    r"copysign\.f32": ("b32 b32", lambda a, b: a & SIGN | b & MAGNITUDE),
    r"cvt\.f32\.f16": ("f16", lambda a: one_nan(a.astype(f32))),
    rf"cvt\.rn\.f32\.{INTEGER}": ("t", lambda a: a.astype(f32)),
    r"cvt\.rz\.f32\.s64": ("s64", float_of_s64),
    r"cvt\.rzi\.s32\.f32": ("f32", s32_of_float),
    r"cvt\.rn\.satfinite\.e2m1x2\.f32": ("b32 b32", partial(encoded, formats.encode_e2m1_flat, 4)),
    r"cvt\.rn\.satfinite\.e4m3x2\.f32": ("b32 b32", partial(encoded, formats.encode_e4m3_flat, 8)),
    r"cvt\.rn\.f16x2\.e4m3x2": ("b16", halves_of_e4m3),
    r"setp\.nan\.f32": ("f32 f32", either_nan),
}
for _to in ("s16", "u16", "s32", "u32", "s64", "u64"):
    _astype = partial(np.ndarray.astype, dtype=DTYPES[_to])
    ELEMENTWISE[rf"cvt\.{_to}\.(?P<kind>[su](?:8|16|32|64))"] = ("t", _astype)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _do = getattr(operator, _name)
    ELEMENTWISE[rf"setp\.{_name}\.(?P<kind>[bsu](?:16|32|64))"] = ("t t", _do)
    # with NaN a comparison is false, and true with u, "or unordered"
    ELEMENTWISE[rf"setp\.{_name}\.f32"] = ("f32 f32", lambda a, b, do=_do: do(a, b) & ~either_nan(a, b))
    ELEMENTWISE[rf"setp\.{_name}u\.f32"] = ("f32 f32", lambda a, b, do=_do: do(a, b) | either_nan(a, b))


def elementwise(sources: str, function: Callable, batch: Batch, o: list[str], kind: str = "") -> None:
    kinds = [kind if source == "t" else source for source in sources.split()]
    batch.set(o[0], function(*[batch.read(text, kind) for text, kind in zip(o[1:], kinds)]))


for _pattern, (_sources, _function) in ELEMENTWISE.items():
    _operands = r"\S+" + r", \S+" * len(_sources.split())
    RULES[_pattern] = _operands, partial(elementwise, _sources, _function)


# Registers and memory


@instruction(rf"ld\.param\.{ANY}")
def _ld_param(batch: Batch, o: list[str], kind: str) -> None:
    of = batch.launch.kernel.parameters.get(o[1].strip("[]"), "pred")
    if DTYPES[of].itemsize != DTYPES[kind].itemsize:
        raise batch.unsupported(f"{o[1]} is not a parameter of type .{kind}")
    batch.set(o[0], batch.read(o[1], kind))


@instruction(rf"mov\.{ANY}")
def _mov(batch: Batch, o: list[str], kind: str) -> None:
    """A copy; from or to {a, b, …}, the lowest bits first."""
    to, source = (text.count(",") + 1 for text in o)
    if to == source == 1:
        return batch.set(o[0], batch.read(o[1], kind))
    size = DTYPES[kind].itemsize
    whole = np.stack(batch.reads(o[1], f"b{8 * size // source}", source), axis=1)
    set_columns(batch, o[0], whole.view(f"u{size // to}"))


def set_columns(batch: Batch, names: str, values: Array) -> None:
    """{a, b, …} become the columns of an array."""
    columns = np.ascontiguousarray(values.T)
    for name, column in zip(batch.names(names, len(columns)), columns):
        batch.set(name, column)


WHERE = rf"(?:\.volatile)?\.(?P<space>global|shared)(?:\.v(?P<vector>[24]))?\.{ANY}"


@instruction(rf"ld{WHERE}")
def _ld(batch: Batch, o: list[str], space: str, vector: str | None, kind: str) -> None:
    values = np.empty((len(batch.lanes), int(vector or 1)), DTYPES[kind])
    batch.access(watch.READ, space, batch.lanes, batch.addresses(o[1], space), values.view(u8))
    set_columns(batch, o[0], values)


@instruction(rf"st{WHERE}")
def _st(batch: Batch, o: list[str], space: str, vector: str | None, kind: str) -> None:
    values = np.stack(batch.reads(o[1], kind, int(vector or 1)), axis=1).view(u8)
    batch.access(watch.WRITE, space, batch.lanes, batch.addresses(o[0], space), values)


@instruction(r"atom(?:\.relaxed\.gpu)?\.global\.max\.u32")
def _atom(batch: Batch, o: list[str]) -> None:
    """One thread after the other; the hardware may choose any order."""
    where, values = batch.addresses(o[1], "global"), batch.read(o[2], "u32")
    before = np.empty((len(values), 1), u32)
    for i in range(len(where)):
        one, lane, new = where[i : i + 1], batch.lanes[i : i + 1], before[i : i + 1]
        batch.access(watch.READ, "global", lane, one, new.view(u8))
        batch.access(watch.ATOMIC, "global", lane, one, np.maximum(new, values[i]).view(u8))
    batch.set(o[0], before[:, 0])


# Copies from global to shared memory that arrive later


@instruction(r"cp\.async\.ca\.shared\.global(?:\.L2::128B)?", r".*\], (?:4|8|16)(?:, \S+)?")
@instruction(r"cp\.async\.cg\.shared\.global(?:\.L2::128B)?", r".*\], 16(?:, \S+)?")
def _cp_async(batch: Batch, o: list[str]) -> None:
    """[to], [from], width {, bytes to read: the rest becomes zero}"""
    to, source = batch.addresses(o[0], "shared"), batch.addresses(o[1], "global")
    width, sizes = batch.number(o[2]), batch.read(o[-1], "u32")
    batch.stop(BadAccess, batch.lanes[sizes > width], f"copies more than {width} bytes into {width}")
    values = np.zeros((len(sizes), width), u8)
    for size in np.unique(sizes[sizes > 0]):
        chosen = sizes == size
        part = values[chosen, :size]
        batch.access(watch.READ, "global", batch.lanes[chosen], source[chosen], part, width)
        values[chosen, :size] = part
    batch.access(watch.COPY, "shared", batch.lanes, to, values)
    batch.groups["cp.async"].issue(batch.lanes, to, width)


@instruction(r"(?P<what>cp\.async|wgmma)\.commit_group(?:\.sync\.aligned)?")
def _commit(batch: Batch, o: list[str], what: str) -> None:
    batch.groups[what].committed[batch.lanes] += 1


@instruction(r"cp\.async\.wait_group")
def _wait(batch: Batch, o: list[str]) -> None:
    """All but the last groups, as many as the operand says, have arrived: for their own threads; for others
    after a barrier."""
    arrived = batch.groups["cp.async"].wait(batch.lanes, batch.number(o[0]))
    watch.mark(batch.shared, batch.shared.writer, arrived, batch.in_shared, watch.WRITTEN)


# Where to go on


instruction(r"bra(?:\.uni)?")(lambda batch, o: batch.launch.kernel.labels[o[0]])
instruction(r"ret|exit")(lambda batch, o: EXITED)


@instruction(r"bar\.sync", r"\d+")  # more operands: for a part of the block
def _bar(batch: Batch, o: list[str]) -> int:
    batch.behind[batch.lanes] = batch.at + 1
    return EXITED


# Warps


@instruction(r"bar\.warp\.sync", "-1")  # all of the warp
def _warp_sync(batch: Batch, o: list[str]) -> None:
    batch.warp_syncs[batch.lanes] += 1
    batch.stamp()


def over_warps(combine: Any, kind: str, batch: Batch, o: list[str]) -> None:
    """d, a, member mask: d is the same for all of a warp."""
    parts = batch.lanes[batch.read(o[2], "s32") != -1]
    batch.stop(Unsupported, parts, "asks for a part of its warp, and that is not modelled")
    batch.set(o[0], combine.reduce(batch.read(o[1], kind).reshape(-1, WARP), axis=1).repeat(WARP))


instruction(r"vote\.sync\.any\.pred")(partial(over_warps, np.logical_or, "pred"))
instruction(r"redux\.sync\.add\.s32")(partial(over_warps, np.add, "u32"))
instruction(r"redux\.sync\.max\.u32")(partial(over_warps, np.maximum, "u32"))
instruction(r"redux\.sync\.or\.b32")(partial(over_warps, np.bitwise_or, "b32"))


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])\.shared\.b16")
def _ldmatrix(batch: Batch, o: list[str], count: str) -> None:
    """Lane 8j + i gives the address of row i of matrix j; lane 4g + t gets elements 2t, 2t + 1 of row g."""
    matrices = int(count)
    giving = np.arange(len(batch.lanes)).reshape(-1, WARP)[:, : 8 * matrices].ravel()
    rows = np.empty((len(giving), 16), u8)
    batch.access(watch.READ, "shared", batch.lanes[giving], batch.addresses(o[1], "shared")[giving], rows)
    tiles = rows.view(u32).reshape(-1, matrices, WARP).swapaxes(1, 2)
    set_columns(batch, o[0], tiles.reshape(-1, matrices))


# Tensor cores. A register holds eight codes or two halves along K. Lane 4g + t has rows (of B: columns) g and
# g + 8, and the t-th register of the first and of the second half of K. PTX ISA, Matrix Fragments.


def rows_of_a(registers: Array) -> Array:
    """Four over (warps, 8, 4) lanes, cut in pieces (4, warps, 8, 4, pieces) → (warps, 16, K)."""
    halves = registers.reshape(2, 2, *registers.shape[1:])  # register & 1: lower rows, >> 1: second half
    return halves.transpose(2, 1, 3, 0, 4, 5).reshape(registers.shape[1], 16, -1)


def rows_of_b(registers: Array) -> Array:
    """(2, warps, 8, 4, pieces) → (warps, 8, K)"""
    return registers.transpose(1, 2, 0, 3, 4).reshape(registers.shape[1], 8, -1)


def matrix_of_c(registers: Array) -> Array:
    """(4, warps, 8, 4) → (warps, 16, 8). Register & 1: next column, >> 1: lower rows."""
    return registers.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def registers_of_d(matrix: Array) -> Array:
    """(threads, 4)"""
    return matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def scales_of_a(register: Array) -> Array:
    """(warps, 16): of row g in lane 0 of the quad g, of row g + 8 in the next one."""
    return np.concatenate([register[:, :, 0], register[:, :, 1]], axis=1)


def scales_of_b(register: Array) -> Array:
    """(warps, 8): of column g in lane 0 of the quad g."""
    return np.ascontiguousarray(register[:, :, 0])


def over_lanes(batch: Batch, text: str, count: int) -> Array:
    """Operands over the lanes of whole warps: (count, warps, 8, 4)."""
    return np.stack(batch.reads(text, "b32", count)).reshape(count, -1, 8, 4)


def cut(registers: Array, bits: int) -> Array:
    """Pieces of so many bits, along a new axis."""
    return registers[..., None] >> np.arange(0, 32, bits, dtype=u32) & u32(2**bits - 1)


def mma(batch: Batch, o: list[str], bits: int, multiply: Callable[..., Array]) -> None:
    """D, A, B, C: `multiply` gets A and B, elements of so many bits, and C."""
    a, b = rows_of_a(cut(over_lanes(batch, o[1], 4), bits)), rows_of_b(cut(over_lanes(batch, o[2], 2), bits))
    d = multiply(a, b, matrix_of_c(over_lanes(batch, o[3], 4)).view(f32))
    set_columns(batch, o[0], registers_of_d(d))


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<kind>f16\.f16|bf16\.bf16)\.f32")
def _mma_half(batch: Batch, o: list[str], kind: str) -> None:
    widths, half = (FP16, np.int16) if kind == "f16.f16" else (BF16, u16)
    mma(batch, o, 16, lambda a, b, c: half_warps(a.astype(half), b.astype(half), c, widths))


@instruction(
    r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3",
    r".*, \{0, 0\}, .*, \{0, 0\}",
)
def _mma_nvfp4(batch: Batch, o: list[str]) -> None:
    """D, A, B, C, scales of A, {byte, thread}, scales of B, {byte, thread}."""
    (of_a,), (of_b,) = (over_lanes(batch, text, 1) for text in o[4::2])
    scales = [x.view(u8).reshape(len(x), -1, 4) for x in (scales_of_a(of_a), scales_of_b(of_b))]
    mma(batch, o, 4, lambda a, b, c: nvfp4_warps(a.astype(u8), b.astype(u8), *scales, c))


# Tensor cores that read shared memory, and go on beside the threads. PTX ISA, Asynchronous Warpgroup Level
# Matrix Multiply-Accumulate Instructions.


instruction(r"fence\.proxy\.async(?:\.shared::cta)?")(
    lambda batch, o: watch.fence(batch.shared, batch.active(), batch.in_shared)
)


@instruction(r"wgmma\.fence\.sync\.aligned")
def _wgmma_fence(batch: Batch, o: list[str]) -> None:
    for last in batch.accumulators.values():
        last[batch.lanes] = np.maximum(last[batch.lanes], FENCED)


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wgmma_wait(batch: Batch, o: list[str]) -> None:
    shared, now = batch.shared, batch.in_shared | watch.SEVERAL_WARPS
    over = batch.groups["wgmma"].wait(batch.lanes, batch.number(o[0]))
    watch.mark(shared, shared.reader, over, now, watch.VISIBLE)
    for others in batch.groups["wgmma"].in_flight:  # they may read the same bytes
        watch.mark(shared, shared.reader, others, now, watch.MULTIPLIED)


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
    batch.groups["wgmma"].issue(lanes, where, 16)
    return halves.view(np.int16).reshape(-1, rows, 16)


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k16\.f32\.f16\.f16", ".*, 1, 1, 0, 0")
def _wgmma(batch: Batch, o: list[str], columns: str) -> None:
    """D, descriptors of A and B, whether D is added; 1, 1, 0, 0: neither negated nor transposed. Four warps
    have 16 rows of A and D each, and multiply them with 8 rows of B at a time, as mma.m16n8k16 does. D is
    computed now; who uses it before the wait is stopped."""
    n = int(columns)
    if n not in range(8, 257, 8):
        raise batch.unsupported("N is a multiple of 8 up to 256")
    names, added = batch.names(o[0], n // 2), batch.same(o[3], "pred").repeat(4)
    batch.accumulate(names)
    a = rows_in_shared(batch, o[1], 64).reshape(-1, 16, 16)
    b = rows_in_shared(batch, o[2], n).reshape(-1, n // 8, 8, 16)
    for tile in range(n // 8):
        registers = ",".join(names[4 * tile : 4 * tile + 4])
        c = matrix_of_c(over_lanes(batch, registers, 4)).view(f32)
        d = half_warps(a, b[:, tile].repeat(4, axis=0), np.where(added[:, None, None], c, f32(0)), FP16)
        set_columns(batch, registers, registers_of_d(d))
