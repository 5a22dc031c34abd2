"""PTX instructions that compute one result from their operands, thread by thread: opcode → NumPy function.

A rule is a pattern that an opcode must match as a whole, so that a modifier nobody thought of is unknown here
and not ignored. Functions get arrays over all threads, of the NumPy type that belongs to the PTX type; f16x2
and bf16x2 have a second axis of two. Source: PTX ISA 9, chapter Instruction Set.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .formats import (
    MAGNITUDE,
    NAN,
    decode_e2m1_flat,
    decode_e4m3_flat,
    encode_e2m1_flat,
    encode_e4m3_flat,
    f32,
    f64,
    u8,
    u32,
)

Array = NDArray[Any]
f16, u16, u64, i64 = np.float16, np.uint16, np.uint64, np.int64
DTYPES: dict[str, Any] = {"pred": np.bool_, "f16": f16, "f32": f32, "f64": f64, "bf16": u16}
DTYPES |= {"f16x2": f16, "bf16x2": u16}
for _bits in (8, 16, 32, 64):
    DTYPES |= {f"s{_bits}": np.dtype(f"i{_bits // 8}").type}
    DTYPES |= {f"{kind}{_bits}": np.dtype(f"u{_bits // 8}").type for kind in "ub"}
NAN16 = u16(0x7FFF)  # the NaN that f16 and bf16 instructions return


def bits_in_type(kind: str) -> int:
    return (
        DTYPES[kind.removesuffix("x2")]().itemsize * 8 * (2 if kind.endswith("x2") else 1)
        if kind != "pred"
        else 1
    )


class Operation(NamedTuple):
    function: Callable[..., Array]
    result: str  # PTX type
    sources: tuple[str, ...]


RULES: list[tuple[re.Pattern[str], Callable[..., Operation]]] = []


def rule(pattern: str) -> Callable:
    """Use the function below for opcodes that match; it gets the groups and returns an Operation."""

    def register(build: Callable[..., Operation]) -> Callable[..., Operation]:
        RULES.append((re.compile(pattern), build))
        return build

    return register


def operation(opcode: str) -> Operation | None:
    for pattern, build in RULES:
        if match := pattern.fullmatch(opcode):
            return build(*match.groups())
    return None


# Integers, bits and predicates

INTEGER = r"([su](?:16|32|64))"


@rule(rf"(add|sub|min|max)\.{INTEGER}")
def _integer(name: str, kind: str) -> Operation:
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[name]
    return Operation(function, kind, (kind, kind))


def multiply(part: str, kind: str) -> tuple[Callable[[Array, Array], Array], str]:
    bits = bits_in_type(kind)
    if part == "lo":
        return np.multiply, kind
    if bits == 64:
        return (lambda a, b: high_product(a, b)), kind
    twice = f"{kind[0]}{2 * bits}"
    dtype = DTYPES[twice]
    if part == "wide":
        return (lambda a, b: a.astype(dtype) * b.astype(dtype)), twice
    return (lambda a, b: (a.astype(dtype) * b.astype(dtype) >> dtype(bits)).astype(a.dtype)), kind


def high_product(a: Array, b: Array) -> Array:
    """The upper 64 bits of 64-bit products, from four products of 32-bit halves."""
    x, y, low, half = a.view(u64), b.view(u64), u64(0xFFFFFFFF), u64(32)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype == i64:  # of the numbers read as unsigned; take back what the sign bits added
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(a.dtype)


@rule(rf"mul\.(lo|hi)\.{INTEGER}")
@rule(r"mul\.(wide)\.([su](?:16|32))")
def _mul(part: str, kind: str) -> Operation:
    function, result = multiply(part, kind)
    return Operation(function, result, (kind, kind))


@rule(rf"mad\.(lo|hi)\.{INTEGER}")
@rule(r"mad\.(wide)\.([su](?:16|32))")
def _mad(part: str, kind: str) -> Operation:
    product, result = multiply(part, kind)
    return Operation(lambda a, b, c: product(a, b) + c, result, (kind, kind, result))


@rule(rf"(div|rem)\.{INTEGER}")
def _div(name: str, kind: str) -> Operation:
    unsigned = DTYPES["u" + kind[1:]]

    def magnitude(x: Array) -> Array:
        return np.where(x < 0, -x, x).view(unsigned) if kind[0] == "s" else x

    def divide(a: Array, b: Array) -> Array:
        """Truncated toward zero. By zero: all bits set, as the hardware has it (PTX leaves it open)."""
        quotient = magnitude(a) // magnitude(b)
        quotient = np.where((a < 0) ^ (b < 0), -quotient, quotient)
        quotient = np.where(b == 0, ~unsigned(0), quotient).view(a.dtype)
        return quotient if name == "div" else a - quotient * b

    return Operation(divide, kind, (kind, kind))


@rule(r"(abs|neg)\.(s(?:16|32|64))")
def _abs(name: str, kind: str) -> Operation:
    return Operation({"abs": np.abs, "neg": np.negative}[name], kind, (kind,))


@rule(r"(and|or|xor)\.(b16|b32|b64|pred)")
def _logic(name: str, kind: str) -> Operation:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return Operation(function, kind, (kind, kind))


@rule(r"not\.(b16|b32|b64|pred)")
def _not(kind: str) -> Operation:
    return Operation(np.invert, kind, (kind,))


@rule(r"(shl)\.(b(?:16|32|64))")
@rule(r"(shr)\.([bsu](?:16|32|64))")
def _shift(name: str, kind: str) -> Operation:
    shift = {"shl": np.left_shift, "shr": np.right_shift}[name]
    bits = u32(bits_in_type(kind))  # by so many or more: 0, or the sign; NumPy has it like PTX
    return Operation(lambda a, n: shift(a, np.minimum(n, bits).astype(a.dtype)), kind, (kind, "u32"))


@rule(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def _funnel(direction: str, mode: str) -> Operation:
    def shift(low: Array, high: Array, n: Array) -> Array:
        both = high.astype(u64) << u64(32) | low
        n = (n & u32(31) if mode == "wrap" else np.minimum(n, u32(32))).astype(u64)
        return (both << n >> u64(32) if direction == "l" else both >> n).astype(u32)

    return Operation(shift, "b32", ("b32", "b32", "u32"))


@rule(r"lop3\.b32")
def _lop3() -> Operation:
    def lookup(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a & b & c)
        for row in range(8):  # of the truth table whose column is `table`
            if int(table[0]) >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return Operation(lookup, "b32", ("b32",) * 4)


@rule(r"prmt\.b32")
def _permute() -> Operation:
    def permute(a: Array, b: Array, selectors: Array) -> Array:
        both: Array = b.astype(u64) << u64(32) | a
        result: Array = np.zeros(1, u64)
        for i in range(4):
            chosen = (selectors >> u32(4 * i)).astype(u64)
            byte = both >> u64(8) * (chosen & u64(7)) & u64(0xFF)
            sign = np.where(byte >> u64(7) == 1, u64(0xFF), u64(0))
            result = result | np.where(chosen & u64(8), sign, byte) << u64(8 * i)
        return result.astype(u32)

    return Operation(permute, "b32", ("b32",) * 3)


@rule(r"bfe\.([su])32")
def _extract(sign: str) -> Operation:
    wide = DTYPES[f"{sign}64"]

    def extract(a: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(x & u32(0xFF), u32(64)).astype(wide) for x in (position, length))
        unused = wide(64) - length
        return (a.astype(wide) >> position << unused >> unused).astype(a.dtype)

    return Operation(extract, f"{sign}32", (f"{sign}32", "u32", "u32"))


@rule(r"bfi\.b32")
def _insert() -> Operation:
    def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(x & u32(0xFF), u32(32)).astype(u64) for x in (position, length))
        mask = ((u64(1) << length) - u64(1)) << position
        return (b & ~mask | a.astype(u64) << position & mask).astype(u32)

    return Operation(insert, "b32", ("b32", "b32", "u32", "u32"))


@rule(r"brev\.(b32|b64)")
def _reverse(kind: str) -> Operation:
    def reverse(a: Array) -> Array:
        bits = np.unpackbits(np.ascontiguousarray(a).view(u8).reshape(len(a), -1), axis=1, bitorder="little")
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]

    return Operation(reverse, kind, (kind,))


@rule(r"popc\.(b32|b64)")
def _count(kind: str) -> Operation:
    return Operation(lambda a: np.bitwise_count(a).astype(u32), "u32", (kind,))


def leading_zeros(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    for step in (1, 2, 4, 8, 16, 32):
        a = a | a >> a.dtype.type(min(step, bits))
    return bits - np.bitwise_count(a).astype(u32)


@rule(r"clz\.(b32|b64)")
def _leading_zeros(kind: str) -> Operation:
    return Operation(leading_zeros, "u32", (kind,))


@rule(r"bfind(\.shiftamt)?\.(u32|u64)")
def _find(shiftamt: str | None, kind: str) -> Operation:
    top = u32(bits_in_type(kind) - 1)

    def find(a: Array) -> Array:
        zeros = leading_zeros(a)
        return np.where(a == 0, ~u32(0), zeros if shiftamt else top - zeros)

    return Operation(find, "u32", (kind,))


# Comparison and selection


def ordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) & ~unordered(a, b)


def unordered(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} | {name: name for name in COMPARE}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@rule(r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(?:\.(and|or|xor))?\.([bsu](?:16|32|64))")
def _setp(name: str, combine: str | None, kind: str) -> Operation:
    return combined(COMPARE[UNSIGNED_COMPARE[name]], combine, kind)


@rule(r"setp\.(eq|ne|lt|le|gt|ge)(u?)(?:\.(and|or|xor))?\.(f16|f32|f64)")
def _setp_float(name: str, or_unordered: str, combine: str | None, kind: str) -> Operation:
    compare = COMPARE[name]
    if or_unordered:
        return combined(lambda a, b: compare(a, b) | unordered(a, b), combine, kind)
    return combined(ordered(compare), combine, kind)


@rule(r"setp\.(num|nan)(?:\.(and|or|xor))?\.(f16|f32|f64)")
def _setp_nan(name: str, combine: str | None, kind: str) -> Operation:
    return combined(unordered if name == "nan" else lambda a, b: ~unordered(a, b), combine, kind)


def combined(compare: Callable[..., Array], combine: str | None, kind: str) -> Operation:
    if combine is None:
        return Operation(compare, "pred", (kind, kind))
    join: Any = COMBINE[combine]
    return Operation(lambda a, b, p: join(compare(a, b), p), "pred", (kind, kind, "pred"))


@rule(r"selp\.([bsuf](?:16|32|64))")
def _select(kind: str) -> Operation:
    def select(a: Array, b: Array, p: Array) -> Array:
        return np.where(p, a, b)

    return Operation(select, kind, (kind, kind, "pred"))


# Floating point: every result is the exact one, rounded once


def sum_rounded_to_odd(a: Array, b: Array) -> Array:
    """float64 a + b; the last bit is odd if some were cut off (the error comes from Knuth's TwoSum), so that
    rounding it to any shorter format, in any direction, rounds the exact sum (Boldo and Melquiond 2008)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    if not error.any():
        return s
    bits = s.view(i64)
    toward_zero = bits - ((error < 0) != (s < 0))
    return np.where((error != 0) & np.isfinite(s), toward_zero | 1, bits).view(f64)


def rounded_sum(a: Array, b: Array, kind: str, rounding: str) -> Array:
    exact = sum_rounded_to_odd(a, b)
    if rounding == "rm":  # a zero that cancels, or of different signs, is −0 in this direction only
        exact = np.where((exact == 0) & (np.signbit(a) | np.signbit(b)), -0.0, exact)
    return narrow(exact, kind, rounding)


def widen(x: Array, kind: str) -> Array:
    """As float64, which has every value of the shorter formats."""
    return (x.astype(u32) << u32(16)).view(f32).astype(f64) if kind.startswith("bf16") else x.astype(f64)


def narrow(x: Array, kind: str, rounding: str) -> Array:
    """float64 → f32, f16 or bf16 (as bits), NaN to the one of this format. `rounding`: rn to nearest even, rz
    toward zero, rm down, rp up."""
    if kind.startswith("bf16"):
        return bf16_bits(x, rounding)
    return with_one_nan(directed(x, DTYPES[kind], rounding))


def directed(x: Array, dtype: Any, rounding: str) -> Array:
    nearest = x.astype(dtype)
    if rounding == "rn":
        return nearest
    back = nearest.astype(f64)
    beyond = {"rz": np.abs(back) > np.abs(x), "rm": back > x, "rp": back < x}[rounding]
    towards = dtype({"rz": 0, "rm": -np.inf, "rp": np.inf}[rounding])
    return np.where(beyond, np.nextafter(nearest, towards), nearest)


def bf16_bits(x: Array, rounding: str) -> Array:
    """Toward zero to float32, its last bit odd if some were cut off, and from there to the upper half."""
    toward_zero = directed(x, f32, "rz")
    bits = toward_zero.view(u32) | (toward_zero != x)
    if rounding == "rn":
        bits = bits + u32(0x7FFF) + (bits >> u32(16) & u32(1))
    return np.where(np.isnan(x), NAN16, (bits >> u32(16)).astype(u16))


def with_one_nan(x: Array) -> Array:
    """x, a new array, its NaNs in place those that the hardware returns."""
    if x.dtype != f64 and np.isnan(x.max()):
        x.view(u32 if x.dtype == f32 else u16)[np.isnan(x)] = NAN if x.dtype == f32 else NAN16
    return x


FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt}


@rule(r"(add|sub|mul)(?:\.(rn))?\.(f32|f64)")
@rule(r"(div)\.(rn)\.(f32|f64)")
def _float(name: str, _: str, kind: str) -> Operation:
    function = FLOAT[name]  # NumPy's own: IEEE, to nearest even
    return Operation(lambda a, b: with_one_nan(function(a, b)), kind, (kind, kind))


@rule(r"(sqrt|rcp)\.(rn)\.(f32|f64)")
def _root(name: str, _: str, kind: str) -> Operation:
    function = np.sqrt if name == "sqrt" else np.reciprocal
    return Operation(lambda a: with_one_nan(function(a)), kind, (kind,))


@rule(r"(add|sub)\.(rz|rm|rp)\.(f32)")
@rule(r"(add|sub)(?:\.(rn))?\.(f16|f16x2|bf16|bf16x2)")
def _sum(name: str, rounding: str | None, kind: str) -> Operation:
    def compute(a: Array, b: Array) -> Array:
        a, b = widen(a, kind), widen(b, kind)
        return rounded_sum(a, b if name == "add" else -b, kind, rounding or "rn")

    return Operation(compute, kind, (kind, kind))


@rule(r"(mul|div)\.(rz|rm|rp)\.(f32)")
@rule(r"(mul)(?:\.(rn))?\.(f16|f16x2|bf16|bf16x2)")
def _product(name: str, rounding: str | None, kind: str) -> Operation:
    """In float64 products are exact, and quotients never round to a shorter number that they are not."""
    function = FLOAT[name]

    def compute(a: Array, b: Array) -> Array:
        return narrow(function(widen(a, kind), widen(b, kind)), kind, rounding or "rn")

    return Operation(compute, kind, (kind, kind))


@rule(r"(sqrt|rcp)\.(rz|rm|rp)\.f32")
def _root_directed(name: str, rounding: str) -> Operation:
    function = np.sqrt if name == "sqrt" else np.reciprocal
    return Operation(lambda a: narrow(function(a.astype(f64)), "f32", rounding), "f32", ("f32",))


@rule(r"fma\.(rn|rz|rm|rp)\.(f32)")
@rule(r"fma\.(rn)\.(f16|f16x2|bf16|bf16x2)")
def _fma(rounding: str, kind: str) -> Operation:
    def compute(a: Array, b: Array, c: Array) -> Array:
        return rounded_sum(widen(a, kind) * widen(b, kind), widen(c, kind), kind, rounding)

    return Operation(compute, kind, (kind,) * 3)


@rule(r"(min|max)(\.NaN)?\.(f16|f16x2|bf16|bf16x2|f32|f64)")
def _float_minimum(name: str, nan_wins: str | None, kind: str) -> Operation:
    """The one that is a number, unless .NaN; +0 is above −0."""
    choose = {"min": np.fmin, "max": np.fmax}[name]
    if nan_wins:
        choose = {"min": np.minimum, "max": np.maximum}[name]

    def compute(a: Array, b: Array) -> Array:
        a, b = widen(a, kind), widen(b, kind)
        zero = np.copysign(0.0, -1.0 if name == "min" else 1.0)
        both = np.where((a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b)), zero, choose(a, b))
        return narrow(both, kind, "rn")

    return Operation(compute, kind, (kind, kind))


@rule(r"(abs|neg)\.(f16|f16x2|bf16|bf16x2|f32|f64)")
def _sign(name: str, kind: str) -> Operation:
    """The sign bit and no other, of a NaN too."""
    bits = "b" + str(bits_in_type(kind))
    sign = 1 << bits_in_type(kind.removesuffix("x2")) - 1
    sign |= sign << 16 if kind.endswith("x2") else 0
    mask = DTYPES[bits](sign)
    return Operation((lambda a: a & ~mask) if name == "abs" else (lambda a: a ^ mask), bits, (bits,))


@rule(r"copysign\.f32")
def _copysign() -> Operation:
    return Operation(lambda a, b: a & ~MAGNITUDE | b & MAGNITUDE, "b32", ("b32", "b32"))


# Conversion


@rule(r"cvt(\.sat)?\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _cvt_integer(saturate: str | None, to: str, kind: str) -> Operation:
    dtype, limits = DTYPES[to], np.iinfo(DTYPES[to])

    def convert(a: Array) -> Array:
        if saturate:
            source = np.iinfo(a.dtype)
            a = np.clip(a, max(limits.min, source.min), min(limits.max, source.max))
        return a.astype(dtype)

    return Operation(convert, to, (kind,))


@rule(r"cvt\.(rn|rz|rm|rp)\.(f16|f32)\.([su](?:8|16|32|64))")
@rule(r"cvt\.(rn)\.(f64)\.([su](?:8|16|32|64))")
def _cvt_to_float(rounding: str, to: str, kind: str) -> Operation:
    def convert(a: Array) -> Array:
        if kind.endswith("64") and to != "f64":  # the sum of two numbers that float64 has
            upper, lower = (a >> a.dtype.type(32)).astype(f64), a & a.dtype.type(0xFFFFFFFF)
            return narrow(sum_rounded_to_odd(upper * 2.0**32, lower.astype(f64)), to, rounding)
        return narrow(a.astype(f64), to, rounding)

    return Operation(convert, to, (kind,))


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@rule(r"cvt\.(rni|rzi|rmi|rpi)(?:\.sat)?\.([su](?:8|16|32|64))\.(f16|f32|f64)")
def _cvt_to_integer(rounding: str, to: str, kind: str) -> Operation:
    """Beyond the integers it saturates; NaN gives 0, or only the top bit set with f64, s64 and u64."""
    dtype, limits = DTYPES[to], np.iinfo(DTYPES[to])
    top = 2.0 ** (bits_in_type(to) - (to[0] == "s"))
    nan = limits.min if to[0] == "s" else 1 << bits_in_type(to) - 1
    nan = nan if "64" in to + kind else 0

    def convert(a: Array) -> Array:
        whole = ROUND[rounding](a.astype(f64))
        inside = (whole >= limits.min) & (whole < top)
        if inside.all():
            return whole.astype(dtype)
        outside = np.where(
            np.isnan(whole), dtype(nan), np.where(whole < 0, dtype(limits.min), dtype(limits.max))
        )
        return np.where(inside, np.where(inside, whole, 0).astype(dtype), outside)

    return Operation(convert, to, (kind,))


@rule(r"cvt\.(rni|rzi|rmi|rpi)\.(f16|f32|f64)\.(f16|f32|f64)")
def _cvt_to_whole(rounding: str, to: str, kind: str) -> Operation:
    if to != kind:
        raise LookupError(f"cvt.{rounding}.{to}.{kind}")
    return Operation(lambda a: with_one_nan(ROUND[rounding](a)), to, (kind,))


@rule(r"cvt\.(f32|f64)\.(f16|bf16|f32)")
def _cvt_longer(to: str, kind: str) -> Operation:
    return Operation(lambda a: narrow(widen(a, kind), to, "rn"), to, (kind,))


@rule(r"cvt\.(rn|rz|rm|rp)\.(f16|f32)\.(f32|f64)")
@rule(r"cvt\.(rn|rz)\.(bf16)\.(f32)")
def _cvt_shorter(rounding: str, to: str, kind: str) -> Operation:
    return Operation(lambda a: narrow(a.astype(f64), to, rounding), to, (kind,))


@rule(r"cvt\.(rn|rz)\.(f16x2|bf16x2)\.f32")
def _cvt_pair(rounding: str, to: str) -> Operation:
    """The second operand becomes the lower half, as in every conversion of a pair."""
    kind = to.removesuffix("x2")

    def convert(a: Array, b: Array) -> Array:
        return np.stack(
            np.broadcast_arrays(*(narrow(x.astype(f64), kind, rounding) for x in (b, a))), axis=-1
        )

    return Operation(convert, to, ("f32", "f32"))


@rule(r"cvt\.rn\.satfinite\.(e2m1x2|e4m3x2)\.f32")
def _cvt_encode(to: str) -> Operation:
    encode, kind, bits = (encode_e2m1_flat, "b8", 4) if to == "e2m1x2" else (encode_e4m3_flat, "b16", 8)
    dtype = DTYPES[kind]

    def encoded(high: Array, low: Array) -> Array:
        high, low = (in_one_piece(encode, x, u8).astype(dtype) for x in (high, low))
        return high << dtype(bits) | low

    return Operation(encoded, kind, ("b32", "b32"))


def in_one_piece(function: Callable[[Array, Array], None], x: Array, dtype: type) -> Array:
    """What `function` fills from x, without the threads that pay off for larger arrays only."""
    out: Array = np.empty(x.shape, dtype)
    function(np.ascontiguousarray(x).reshape(-1), out.reshape(-1))
    return out


@rule(r"cvt\.rn\.f16x2\.(e2m1x2|e4m3x2)")
def _cvt_decode(kind: str) -> Operation:
    decode, source, bits = (decode_e2m1_flat, "b8", 4) if kind == "e2m1x2" else (decode_e4m3_flat, "b16", 8)
    mask = DTYPES[source](2**bits - 1)

    def decoded(a: Array) -> Array:
        codes = np.stack([a & mask, a >> DTYPES[source](bits)], axis=-1).astype(u8)
        return with_one_nan(in_one_piece(decode, codes, f32).astype(f16))

    return Operation(decoded, "f16x2", (source,))
