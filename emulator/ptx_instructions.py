"""One statement of PTX → one function that runs it. Source: PTX ISA 9, chapter Instruction Set.

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
from .formats import MAGNITUDE, NAN, SIGN, encode_e2m1_flat, encode_e4m3_flat, f32, f64, u8, u32
from .ptx_machine import (
    DTYPES,
    EXITED,
    WARP,
    Array,
    BadAccess,
    Batch,
    Copies,
    Instruction,
    Kernel,
    Statement,
    Unsupported,
    bits_in_type,
    stored,
)
from .tensor_core import BF16, FP16, half_warps, nvfp4_warps

f16, u16, u64, i64 = np.float16, np.uint16, np.uint64, np.int64
Run = Callable[[Batch], int | None]  # → number of the instruction to go on with, if it is not the next one
Read = Callable[[Batch], Array]  # an operand over all threads, or one value for all
RULES: dict[str, Callable[..., Run]] = {}


def instruction(pattern: str) -> Callable:
    """Use the function below for opcodes that match; it gets the Operands and the groups."""

    def register(build: Callable[..., Run]) -> Callable[..., Run]:
        RULES[pattern] = build
        return build

    return register


@cache
def rule_for(opcode: str) -> tuple[Callable[..., Run], tuple[str, ...]] | None:
    matches = ((build, re.fullmatch(pattern, opcode)) for pattern, build in RULES.items())
    return next(((build, match.groups()) for build, match in matches if match), None)


def decode(kernel: Kernel, statement: Statement) -> Instruction:
    """Raises Unsupported for an opcode, a modifier or an operand that is not known."""
    match = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement.text, re.DOTALL)
    if match is None:
        raise Unsupported(f"{kernel.name}, PTX line {statement.line}: {statement.text!r} is no instruction.")
    guard, opcode, operands = match.groups()
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)
    o = Operands(kernel, statement, [part.strip() for part in parts])
    rule = rule_for(opcode)
    if rule is None:
        raise o.unsupported(f"{opcode} is an opcode, or has a modifier, that is not known here")
    return Instruction(rule[0](o, *rule[1]), o.read(guard, "pred") if guard else None)


class Operands:
    """Of one statement."""

    def __init__(self, kernel: Kernel, statement: Statement, texts: list[str]) -> None:
        self.kernel, self.statement, self.texts = kernel, statement, texts

    def __getitem__(self, i: int) -> str:
        if i >= len(self.texts):
            raise self.unsupported("an operand is missing")
        return self.texts[i]

    def unsupported(self, why: str) -> Unsupported:
        s = self.statement
        return Unsupported(f"{self.kernel.name}, PTX line {s.line} {s.source}: {s.text}\n{why}.")

    def register(self, name: str) -> int:
        if name not in self.statement.registers:
            raise self.unsupported(f"{name} is not a register")
        return self.statement.registers[name]

    def names(self, text: str, count: int) -> list[str]:
        """{a, b, …} or a"""
        names = [name.strip() for name in text.strip("{}").split(",")]
        if len(names) != count:
            raise self.unsupported(f"{text} must be {count} operands")
        return names

    def registers(self, text: str, count: int) -> list[int]:
        return [self.register(name) for name in self.names(text, count)]

    def reads(self, text: str, kind: str, count: int) -> list[Read]:
        return [self.read(name, kind) for name in self.names(text, count)]

    def read(self, text: str, kind: str) -> Read:
        """→ function that gives the operand as this type."""
        if kind == "pred" and text.startswith("!"):
            inner = self.read(text[1:], kind)
            return lambda batch: ~inner(batch)
        if text not in self.statement.registers:
            return self.constant(text, kind)
        number, dtype, low = self.register(text), DTYPES[kind], stored(kind)
        declared = self.kernel.types[number]
        if bits_in_type(declared) < bits_in_type(kind) or (kind == "pred") != (declared == "pred"):
            raise self.unsupported(f"{text} is .{declared}; .{kind} does not fit")
        if stored(declared) == dtype:
            return lambda batch: batch.registers[number]
        if stored(declared) == low:
            return lambda batch: batch.registers[number].view(dtype)
        return lambda batch: batch.registers[number].astype(low).view(dtype)

    def constant(self, text: str, kind: str) -> Read:
        """A special register, the address of an array in shared memory, a number."""
        if re.fullmatch(r"%n?(tid|ctaid)\.[xyz]", text):
            return lambda batch: batch.special[text].astype(DTYPES[kind], copy=False)
        value = self.kernel.arrays[text][0] if text in self.kernel.arrays else self.number(text)
        array = np.array([value & (1 << bits_in_type(kind)) - 1], stored(kind)).view(DTYPES[kind])
        return lambda batch: array

    def number(self, text: str) -> int:
        """An integer, or the bits of a float32."""
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return int(text[2:], 16)
        try:
            return int(text.removesuffix("U"), 0)
        except ValueError:
            raise self.unsupported(f"{text} is not a register, a shared array or a number") from None

    def address(self, text: str) -> Read:
        """[register + offset] or [array + offset] → the addresses of the active threads."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if match is None:
            raise self.unsupported(f"{text} is not an address")
        name, offset = match[1], int(match[2] or 0)
        kind = self.kernel.types[self.register(name)] if name in self.statement.registers else "u32"
        base, wrap = self.read(name, kind), (1 << min(bits_in_type(kind), 63)) - 1
        # those of 32 bits go round
        return lambda batch: (batch.active(base(batch)).astype(i64) + offset) & wrap


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


# Integers and bits


def select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def wide_product(a: Array, b: Array) -> Array:
    dtype = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(dtype) * b.astype(dtype)


def quotient(a: Array, b: Array) -> Array:
    """Truncated toward zero. By zero: all bits set, as the hardware has it (PTX leaves it open)."""
    floor = a // b
    whole = floor + ((floor * b != a) & ((a < 0) != (b < 0)))
    return np.where(b == 0, ~a.dtype.type(0), whole.astype(a.dtype))


def shift(function: Callable, a: Array, n: Array) -> Array:
    """By as many bits as there are, or more: 0, or the sign; NumPy has it like PTX."""
    return function(a, np.minimum(n, u32(a.dtype.itemsize * 8)).astype(a.dtype))


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    position, length = (np.minimum(x & u32(0xFF), u32(32)).astype(u64) for x in (position, length))
    mask = ((u64(1) << length) - u64(1)) << position
    return (b & ~mask | a.astype(u64) << position & mask).astype(u32)


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """Four bytes of the eight in a and b; the highest bit of a selector asks for the byte's sign only."""
    bytes_ = np.stack(np.broadcast_arrays(a, b), axis=-1).view(u8)
    chosen = selectors[:, None] >> np.arange(0, 16, 4, dtype=u32) & u32(15)
    bytes_, chosen = (
        np.broadcast_to(x, (max(len(bytes_), len(chosen)), x.shape[1])) for x in (bytes_, chosen)
    )
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
    rf"abs\.{INTEGER}": ("t", np.abs),
    rf"neg\.{INTEGER}": ("t", np.negative),
    rf"mul\.lo\.{INTEGER}": ("t t", np.multiply),
    r"mul\.hi\.(u32)": ("t t", lambda a, b: (wide_product(a, b) >> u64(32)).astype(u32)),
    r"mul\.wide\.([su](?:16|32))": ("t t", wide_product),
    rf"mad\.lo\.{INTEGER}": ("t t t", lambda a, b, c: a * b + c),
    r"mad\.wide\.([su]32)": ("t t u64", lambda a, b, c: wide_product(a, b).view(u64) + c),
    rf"div\.{INTEGER}": ("t t", quotient),
    rf"rem\.{INTEGER}": ("t t", lambda a, b: a - quotient(a, b) * b),
    rf"and\.{BITS}": ("t t", np.bitwise_and),
    rf"or\.{BITS}": ("t t", np.bitwise_or),
    rf"xor\.{BITS}": ("t t", np.bitwise_xor),
    rf"not\.{BITS}": ("t", np.invert),
    r"shl\.(b16|b32|b64)": ("t u32", partial(shift, np.left_shift)),
    rf"shr\.{INTEGER}": ("t u32", partial(shift, np.right_shift)),
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
    r"sqrt\.rn\.f32": ("f32", lambda a: one_nan(np.sqrt(a))),
    r"fma\.rn\.f32": ("f32 f32 f32", partial(fma, "rn")),
    r"fma\.rz\.f32": ("f32 f32 f32", partial(fma, "rz")),
    r"mul\.rn\.f16x2": ("b32 b32", product_of_pairs),
    r"min\.f32": ("f32 f32", partial(extreme, np.fmin, np.bitwise_or)),
    r"max\.f32": ("f32 f32", partial(extreme, np.fmax, np.bitwise_and)),
    r"abs\.f32": ("b32", lambda a: a & MAGNITUDE),
    r"neg\.f32": ("b32", lambda a: a ^ SIGN),
    r"copysign\.f32": ("b32 b32", lambda a, b: a & SIGN | b & MAGNITUDE),
    r"cvt\.f32\.f16": ("f16", lambda a: one_nan(a.astype(f32))),
    r"cvt\.rn\.f32\.s32": ("s32", lambda a: a.astype(f32)),
    r"cvt\.rz\.f32\.s64": ("s64", float_of_s64),
    r"cvt\.rzi\.s32\.f32": ("f32", s32_of_float),
    r"cvt\.rn\.satfinite\.e2m1x2\.f32": ("b32 b32", partial(encoded, encode_e2m1_flat, 4, u8)),
    r"cvt\.rn\.satfinite\.e4m3x2\.f32": ("b32 b32", partial(encoded, encode_e4m3_flat, 8, u16)),
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


def elementwise(sources: str, function: Callable[..., Array], o: Operands, *kind: str) -> Run:
    kinds = [kind[0] if source == "t" else source for source in sources.split()]
    if len(o.texts) != 1 + len(kinds):
        raise o.unsupported(f"it takes {1 + len(kinds)} operands")
    target, reads = o.register(o[0]), [o.read(text, kind) for text, kind in zip(o.texts[1:], kinds)]
    return lambda batch: batch.set(target, function(*[read(batch) for read in reads]))


RULES |= {pattern: partial(elementwise, *entry) for pattern, entry in ELEMENTWISE.items()}


# Registers and memory


@instruction(r"mov\.([bsuf](?:16|32|64)|pred)")
def _mov(o: Operands, kind: str) -> Run:
    """A copy; from or to {a, b, …}, the lowest bits first; _ takes what nobody wants."""
    if "{" in o[1]:
        parts = o[1].count(",") + 1
        reads, target = o.reads(o[1], f"b{bits_in_type(kind) // parts}", parts), o.register(o[0])

        def pack(batch: Batch) -> None:
            values = [np.broadcast_to(read(batch), batch.size) for read in reads]
            batch.set(target, np.stack(values, axis=-1).view(stored(kind))[:, 0])

        return pack
    value = o.read(o[1], kind)
    if "{" in o[0]:
        names = o.names(o[0], o[0].count(",") + 1)
        part = stored(f"b{bits_in_type(kind) // len(names)}")
        targets = {i: o.register(name) for i, name in enumerate(names) if name != "_"}

        def unpack(batch: Batch) -> None:
            columns = np.ascontiguousarray(value(batch)).view(part).reshape(-1, len(names)).T
            for i, target in targets.items():
                batch.set(target, np.ascontiguousarray(columns[i]))

        return unpack
    target = o.register(o[0])
    return lambda batch: batch.set(target, value(batch))


@instruction(r"ld\.param\.[bsuf](32|64)")
def _ld_param(o: Operands, bits: str) -> Run:
    name, target = o[1].strip("[]"), o.register(o[0])
    if bits_in_type(o.kernel.parameters.get(name, "pred")) != int(bits):
        raise o.unsupported(f"{o[1]} is not a parameter of {bits} bits")
    return lambda batch: batch.set(target, batch.launch.arguments[name])


WHERE = r"(global|shared)(?:\.v([24]))?\.([bsuf](?:8|16|32|64))"


@instruction(rf"ld(?:\.volatile)?\.{WHERE}")
def _ld(o: Operands, space: str, vector: str | None, kind: str) -> Run:
    numbers, addresses, dtype = o.registers(o[0], int(vector or 1)), o.address(o[1]), DTYPES[kind]

    def run(batch: Batch) -> None:
        values = np.empty((len(batch.lanes), dtype.itemsize * len(numbers)), u8)
        batch.access(watch.READ, "reads", space, addresses(batch), values)
        for number, column in zip(numbers, values.view(dtype).T):
            batch.set_active(number, np.ascontiguousarray(column))

    return run


@instruction(rf"st(?:\.volatile)?\.{WHERE}")
def _st(o: Operands, space: str, vector: str | None, kind: str) -> Run:
    addresses, parts = o.address(o[0]), o.reads(o[1], kind, int(vector or 1))

    def run(batch: Batch) -> None:
        values = np.stack([batch.active(part(batch)) for part in parts], axis=1).view(u8)
        batch.access(watch.WRITE, "writes", space, addresses(batch), values)

    return run


@instruction(r"atom(?:\.relaxed\.gpu)?\.global\.max\.u32")
def _atom(o: Operands) -> Run:
    """One thread after the other; the hardware may choose any order."""
    target, addresses, value = o.register(o[0]), o.address(o[1]), o.read(o[2], "u32")

    def run(batch: Batch) -> None:
        where, values = addresses(batch), batch.active(value(batch))
        before = np.empty_like(values)
        for i in range(len(where)):
            one, old = slice(i, i + 1), before[i : i + 1].view(u8).reshape(1, 4)
            batch.access(watch.READ, "updates", "global", where[one], old, batch.lanes[one])
            new = np.maximum(before[one], values[one]).view(u8).reshape(1, 4)
            batch.access(watch.ATOMIC, "updates", "global", where[one], new, batch.lanes[one])
        batch.set_active(target, before)

    return run


# Copies from global to shared memory that arrive later


@instruction(r"cp\.async\.(ca|cg)\.shared\.global")
def _cp_async(o: Operands, cache: str) -> Run:
    """[to], [from], width {, bytes to read: the rest becomes zero}"""
    to, source, width = o.address(o[0]), o.address(o[1]), o.number(o[2])
    if width not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise o.unsupported(f".{cache} does not copy {width} bytes")
    limit = o.read(o.texts[3] if len(o.texts) > 3 else str(width), "u32")

    def run(batch: Batch) -> None:
        sizes, origin, where = batch.active(limit(batch)), source(batch), to(batch)
        if (sizes > width).any():
            batch.fail(BadAccess, batch.lanes[sizes.argmax()], f"copies {sizes.max()} bytes into {width}")
        values = np.zeros((len(sizes), width), u8)
        for size in np.unique(sizes[sizes > 0]):
            chosen = sizes == size
            part, lanes = np.empty((np.count_nonzero(chosen), size), u8), batch.lanes[chosen]
            batch.access(watch.READ, "copies", "global", origin[chosen], part, lanes, width)
            values[chosen, :size] = part
        batch.access(watch.COPY, "copies to", "shared", where, values)
        batch.copies.append(Copies(batch.lanes, where, batch.groups[batch.lanes], width))

    return run


@instruction(r"cp\.async\.commit_group")
def _commit(o: Operands) -> Run:
    def run(batch: Batch) -> None:
        batch.groups[batch.lanes] += 1

    return run


@instruction(r"cp\.async\.wait_group")
def _wait(o: Operands) -> Run:
    pending = o.number(o[0])  # so many of the last groups may stay in flight

    def run(batch: Batch) -> None:
        done, in_flight = np.where(batch.mask, batch.groups - pending, 0), []
        for lanes, where, groups, width in batch.copies:
            landed = groups < done[lanes]
            watch.land(batch.spaces["shared"], where[landed], lanes[landed], batch.stamps["shared"], width)
            if not landed.all():
                in_flight.append(Copies(lanes[~landed], where[~landed], groups[~landed], width))
        batch.copies = in_flight

    return run


# Where to go on


@instruction(r"bra(?:\.uni)?")
def _bra(o: Operands) -> Run:
    if o[0] not in o.kernel.labels:
        raise o.unsupported(f"there is no label {o[0]}")
    target = o.kernel.labels[o[0]]
    return lambda batch: target


@instruction(r"ret|exit")
def _exit(o: Operands) -> Run:
    return lambda batch: EXITED


@instruction(r"bar\.sync")
def _bar(o: Operands) -> Run:
    if len(o.texts) > 1:
        raise o.unsupported("a barrier for a part of the block is not modelled")
    return lambda batch: batch.wait()


# Warps


@instruction(r"bar\.warp\.sync")
def _warp_sync(o: Operands) -> Run:
    members = o.read(o[0], "b32")

    def run(batch: Batch) -> None:
        batch.whole_warps(members(batch))
        batch.pass_warp_barrier()

    return run


@instruction(r"shfl\.sync\.idx\.b32")
def _shfl(o: Operands) -> Run:
    """d | p: whether the lane that is read lies in its segment of the warp; if not, a thread reads itself."""
    targets = [o.register(name.strip()) for name in o[0].split("|")]
    value, index, limits, members = (o.read(text, "b32") for text in o.texts[1:])
    lane = np.arange(WARP)

    def run(batch: Batch) -> None:
        batch.whole_warps(members(batch))
        wanted, limit = (batch.by_warp(x(batch)).astype(i64) for x in (index, limits))
        segment = limit >> 8 & 31
        source, last = lane & segment | wanted & 31 & ~segment, lane & segment | limit & 31 & ~segment
        inside = source <= last
        chosen = np.where(inside, source, lane)
        results = np.take_along_axis(batch.by_warp(value(batch)), chosen, axis=1), inside
        for target, result in zip(targets, results):
            batch.set(target, result.ravel())

    return run


def over_warps(combine: Any, kind: str, o: Operands) -> Run:
    """d, a, member mask: d is the same for all of a warp."""
    target, value, members = o.register(o[0]), o.read(o[1], kind), o.read(o[2], "b32")

    def run(batch: Batch) -> None:
        batch.whole_warps(members(batch))
        batch.set(target, combine.reduce(batch.by_warp(value(batch)), axis=1).repeat(WARP))

    return run


RULES[r"vote\.sync\.any\.pred"] = partial(over_warps, np.logical_or, "pred")
RULES[r"redux\.sync\.max\.u32"] = partial(over_warps, np.maximum, "u32")
RULES[r"redux\.sync\.or\.b32"] = partial(over_warps, np.bitwise_or, "b32")


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
def _ldmatrix(o: Operands, count: str) -> Run:
    """Lane 8j + i gives the address of row i of matrix j; lane 4g + t gets elements 2t, 2t + 1 of row g."""
    matrices, addresses = int(count), o.address(o[1])
    numbers = o.registers(o[0], matrices)

    def run(batch: Batch) -> None:
        batch.whole_warps()
        giving = np.arange(len(batch.lanes)).reshape(-1, WARP)[:, : 8 * matrices].ravel()
        rows = np.empty((len(giving), 16), u8)
        batch.access(watch.READ, "reads", "shared", addresses(batch)[giving], rows, batch.lanes[giving])
        tiles = rows.view(u32).reshape(-1, matrices, 32)
        for j, number in enumerate(numbers):
            batch.set_active(number, tiles[:, j].ravel())

    return run


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


def mma(o: Operands, cut: Callable[[Array], Array], multiply: Callable[..., Array]) -> Run:
    """D, A, B, C: `multiply` gets rows of A and B, cut in pieces, C and the batch."""
    numbers = o.registers(o[0], 4)
    operands = o.reads(o[1], "b32", 4), o.reads(o[2], "b32", 2), o.reads(o[3], "b32", 4)

    def run(batch: Batch) -> None:
        batch.whole_warps()
        a, b, c = ([over_lanes(batch, read) for read in reads] for reads in operands)
        rows, columns = rows_of_a([cut(x) for x in a]), rows_of_b([cut(x) for x in b])
        d = multiply(rows, columns, matrix_of_c(c).view(f32), batch)
        for number, result in zip(numbers, registers_of_d(d)):
            batch.set_active(number, result)

    return run


def over_lanes(batch: Batch, read: Read) -> Array:
    """An operand over the (warps, 8, 4) lanes of whole warps."""
    return np.ascontiguousarray(batch.active(read(batch))).reshape(-1, 8, 4)


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def _mma_half(o: Operands, kind: str) -> Run:
    widths, bits = (FP16, np.int16) if kind == "f16.f16" else (BF16, u16)
    return mma(o, halves_in, lambda a, b, c, batch: half_warps(a.view(bits), b.view(bits), c, widths))


@instruction(
    r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3"
)
def _mma_nvfp4(o: Operands) -> Run:
    """D, A, B, C, scales of A, {byte, thread}, scales of B, {byte, thread}."""
    if len(o.texts) != 8:
        raise o.unsupported("it takes 8 operands")
    scales_a, selector_a, scales_b, selector_b = o.texts[4:]
    scales = *o.reads(scales_a, "b32", 1), *o.reads(scales_b, "b32", 1)
    selectors = (o.names(selector, 2) for selector in (selector_a, selector_b))
    (byte_a, thread_a), (byte_b, thread_b) = ([o.number(text) for text in texts] for texts in selectors)
    if byte_a or byte_b or thread_a not in range(2) or thread_b not in range(4):
        raise o.unsupported("with 4X the byte is 0, the thread of A's scales 0 or 1, of B's 0 to 3")

    def multiply(a: Array, b: Array, c: Array, batch: Batch) -> Array:
        of_a, of_b = (over_lanes(batch, read) for read in scales)
        sfa, sfb = scales_of_a(of_a, thread_a), scales_of_b(of_b, thread_b)
        sfa, sfb = (x.view(u8).reshape(len(x), -1, 4) for x in (sfa, sfb))
        return nvfp4_warps(a, b, sfa, sfb, c)

    return mma(o, codes_in, multiply)
