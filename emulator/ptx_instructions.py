"""One statement of PTX → one function that runs it. Here: operands, and every instruction that does more than
compute a register from others (that is ptx_arithmetic.py): memory, branches, barriers, warps, tensor cores.

A rule is a pattern that the opcode must match as a whole, so that no modifier is passed over.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import ptx_memory as watch
from .formats import f32, u8, u32
from .ptx_arithmetic import DTYPES, Operation, bits_in_type, operation, u16, u64
from .ptx_machine import (
    EXITED,
    WARP,
    WINDOWS,
    Array,
    BadAccess,
    Batch,
    Copies,
    Divergence,
    one_bits,
    pieces,
    stored,
)
from .ptx_text import Kernel, PtxError, Statement, Unsupported, number_in
from .tensor_core import BF16, FP16, half_warps, nvfp4_warps

Run = Callable[[Batch], int | None]  # → number of the instruction to go on with, if it is not the next one
Read = Callable[[Batch], Array]  # an operand over all threads, or one value for all


class Instruction(NamedTuple):
    run: Run
    guard: Read | None


RULES: list[tuple[re.Pattern[str], Callable[..., Run]]] = []


def instruction(pattern: str) -> Callable:
    """Use the function below for opcodes that match; it gets the Operands and the groups."""

    def register(build: Callable[..., Run]) -> Callable[..., Run]:
        RULES.append((re.compile(pattern), build))
        return build

    return register


def decode(kernel: Kernel, statement: Statement) -> Instruction:
    """Raises Unsupported for an opcode, a modifier or an operand that is not known."""
    match = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement.text, re.DOTALL)
    if match is None:
        raise Unsupported(f"{kernel.name}, PTX line {statement.line}: {statement.text!r} is no instruction.")
    guard, opcode, operands = match.groups()
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)
    o = Operands(kernel, statement, [part.strip() for part in parts])
    return Instruction(o.run(opcode), o.read(guard, "pred") if guard else None)


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

    def run(self, opcode: str) -> Run:
        for pattern, build in RULES:
            if match := pattern.fullmatch(opcode):
                return build(self, *match.groups())
        found = operation(opcode)
        if found is None:
            raise self.unsupported(f"{opcode} is an opcode, or has a modifier, that is not known here")
        return self.elementwise(found)

    def elementwise(self, found: Operation) -> Run:
        function = found.function
        if len(self.texts) != 1 + len(found.sources):
            raise self.unsupported(f"it takes {1 + len(found.sources)} operands")
        target = self.register(self[0])
        reads = [self.read(text, kind) for text, kind in zip(self.texts[1:], found.sources)]
        if len(reads) == 1:
            (a,) = reads
            return lambda batch: batch.set(target, function(a(batch)))
        if len(reads) == 2:
            a, b = reads
            return lambda batch: batch.set(target, function(a(batch), b(batch)))
        return lambda batch: batch.set(target, function(*[read(batch) for read in reads]))

    def find(self, name: str) -> int | None:
        """A register by the name that it has in the innermost braces."""
        scope = self.statement.scope
        found = (self.kernel.registers.get((scope[:depth], name)) for depth in range(len(scope), 0, -1))
        return next((number for number in found if number is not None), None)

    def register(self, name: str) -> int:
        number = self.find(name)
        if number is None:
            raise self.unsupported(f"{name} is not a register")
        return number

    def registers(self, text: str, count: int | None = None) -> list[int | None]:
        """{a, b, …} or a → numbers; None for _."""
        names = [name.strip() for name in text.strip("{}").split(",")]
        if count and len(names) != count:
            raise self.unsupported(f"{text} must be {count} registers")
        return [None if name == "_" else self.register(name) for name in names]

    def read(self, text: str, kind: str) -> Read:
        """→ function that gives the operand as this type."""
        if kind == "pred" and text.startswith("!"):
            inner = self.read(text[1:], kind)
            return lambda batch: ~inner(batch)
        number = self.find(text)
        if number is None:
            return self.constant(text, kind)
        dtype, declared = np.dtype(DTYPES[kind]), self.kernel.types[number]
        if bits_in_type(declared) < bits_in_type(kind) or (kind == "pred") != (declared == "pred"):
            raise self.unsupported(f"{text} is .{declared}; .{kind} does not fit")
        if kind.endswith("x2"):
            return lambda batch: np.ascontiguousarray(batch.registers[number]).view(dtype).reshape(-1, 2)
        if stored(declared) == dtype:
            return lambda batch: batch.registers[number]
        if stored(declared).itemsize == dtype.itemsize:
            return lambda batch: batch.registers[number].view(dtype)
        low = stored(kind)
        return lambda batch: batch.registers[number].astype(low).view(dtype)

    def reads(self, text: str, kind: str, count: int | None = None) -> list[Read]:
        names = [name.strip() for name in text.strip("{}").split(",")]
        if count and len(names) != count:
            raise self.unsupported(f"{text} must be {count} operands")
        return [self.read(name, kind) for name in names]

    def constant(self, text: str, kind: str) -> Read:
        """A special register, the address of a variable, a number."""
        bits, dtype = bits_in_type(kind), np.dtype(DTYPES[kind])
        if re.fullmatch(r"%n?(tid|ctaid)\.[xyz]|%laneid|%warpid", text):
            return lambda batch: batch.special[text].astype(dtype, copy=False)
        if text in self.kernel.symbols:
            return lambda batch: np.array([batch.launch.addresses[text]], np.int64).astype(dtype)
        try:
            value = number_in(text)
        except ValueError:
            raise self.unsupported(f"{text} is not a register, a variable or a number") from None
        array = np.array([value & (1 << bits) - 1], stored(kind)).view(dtype)
        array = array.reshape(-1, 2) if kind.endswith("x2") else array
        return lambda batch: array

    def integer(self, text: str) -> int:
        try:
            return number_in(text)
        except ValueError:
            raise self.unsupported(f"{text} is not an integer") from None

    def address(self, text: str) -> Read:
        """[register + offset] or [variable + offset] → the addresses of the active threads."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if match is None:
            raise self.unsupported(f"{text} is not an address")
        number, offset = self.find(match[1]), int(match[2] or 0)
        kind = "u64" if number is None else self.kernel.types[number]
        base, wrap = self.read(match[1], kind), (1 << min(bits_in_type(kind), 63)) - 1

        def addresses(batch: Batch) -> Array:  # those of 32 bits go round
            return (batch.active(base(batch)).astype(np.int64) + offset) & wrap

        return addresses


# Registers and memory

ORDER = r"(?:\.volatile|\.weak|\.(?:relaxed|acquire|release|acq_rel)(?:\.(?:cta|gpu|sys))?)?"
SPACE = r"(?:\.(global|shared|const|local)(?:::cta)?)?"
PREFETCH = r"(?:\.L2::(?:64|128|256)B)?"
HINTS = rf"(?:\.nc)?(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?(?:\.L1::\w+)?(?:\.L2::evict_\w+)?{PREFETCH}"  # speed only
VECTOR = r"(?:\.v([248]))?\.([bsuf](?:8|16|32|64))"


@instruction(r"mov\.([bsuf](?:16|32|64)|pred)")
def _mov(o: Operands, kind: str) -> Run:
    """A copy; from or to {a, b, …}, the lowest bits first."""
    if "{" in o[1]:
        parts = o.reads(o[1], f"b{bits_in_type(kind) // (o[1].count(',') + 1)}")
        target, dtype = o.register(o[0]), stored(kind)

        def pack(batch: Batch) -> None:
            values = [np.broadcast_to(part(batch), batch.size) for part in parts]
            batch.set(target, np.stack(values, axis=-1).view(dtype)[:, 0])

        return pack
    value = o.read(o[1], kind)
    if "{" in o[0]:
        numbers = o.registers(o[0])
        part = stored(f"b{bits_in_type(kind) // len(numbers)}")

        def unpack(batch: Batch) -> None:
            whole = np.ascontiguousarray(value(batch))
            for number, column in zip(numbers, whole.view(part).reshape(len(whole), -1).T):
                if number is not None:
                    batch.set(number, np.ascontiguousarray(column))

        return unpack
    target = o.register(o[0])
    return lambda batch: batch.set(target, value(batch))


@instruction(r"cvta(\.to)?\.(global|shared|const|local)\.u64")
def _cvta(o: Operands, to: str | None, space: str) -> Run:
    target, value, window = o.register(o[0]), o.read(o[1], "u64"), u64(WINDOWS[space])
    return lambda batch: batch.set(target, value(batch) - window if to else value(batch) + window)


@instruction(rf"ld\.param{VECTOR}")
def _ld_param(o: Operands, vector: str | None, kind: str) -> Run:
    match = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", o[1])
    space, place, _ = o.kernel.symbols.get(match[1], ("", 0, 0)) if match else ("", 0, 0)
    if match is None or space != "param":
        raise o.unsupported(f"{o[1]} is not a parameter")
    numbers, dtype = o.registers(o[0], int(vector or 1)), np.dtype(DTYPES[kind])
    first = place + int(match[2] or 0)
    part = slice(first, first + len(numbers) * dtype.itemsize)

    def run(batch: Batch) -> None:
        for number, value in zip(numbers, batch.launch.parameters[part].view(dtype)):
            if number is not None:
                batch.set(number, np.array([value]))

    return run


@instruction(rf"ld{ORDER}{SPACE}{HINTS}{VECTOR}")
def _ld(o: Operands, space: str | None, vector: str | None, kind: str) -> Run:
    numbers, addresses, dtype = o.registers(o[0], int(vector or 1)), o.address(o[1]), np.dtype(DTYPES[kind])
    width = dtype.itemsize * len(numbers)

    def run(batch: Batch) -> None:
        values = np.empty((len(batch.lanes), width), u8)
        batch.access(watch.load, "reads", space, addresses(batch), values, width)
        for number, column in zip(numbers, values.view(dtype).T):
            batch.set_active(number, column)

    return run


@instruction(rf"st{ORDER}{SPACE}{HINTS}{VECTOR}")
def _st(o: Operands, space: str | None, vector: str | None, kind: str) -> Run:
    addresses, parts = o.address(o[0]), o.reads(o[1], kind, int(vector or 1))

    def run(batch: Batch) -> None:
        values = np.stack([batch.active(part(batch)) for part in parts], axis=1).view(u8)
        batch.access(watch.store, "writes", space, addresses(batch), values, values.shape[1])

    return run


UPDATES: dict[str, Callable] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: new if old == compare else old,
}


@instruction(rf"(atom|red){ORDER}{SPACE}\.({'|'.join(UPDATES)})\.([bsu](?:32|64))")
def _atom(o: Operands, result: str, space: str | None, name: str, kind: str) -> Run:
    """One thread after the other. The hardware may choose any order, so that float sums are not for here."""
    first = 1 if result == "atom" else 0
    target = o.registers(o[0])[0] if first else None
    addresses, parts = o.address(o[first]), [o.read(text, kind) for text in o.texts[first + 1 :]]
    update, dtype = UPDATES[name], np.dtype(DTYPES[kind])

    def run(batch: Batch) -> None:
        where, values = addresses(batch), [batch.active(part(batch)) for part in parts]
        before = np.empty(len(where), dtype)
        for piece, chosen in pieces(space, where):
            own, lanes = where[chosen] - (0 if space else WINDOWS[piece]), batch.lanes[chosen]
            places, memory = np.empty(len(own), np.int64), batch.spaces[piece]
            found = watch.reserve(memory, own, lanes, batch.now(piece), places, dtype.itemsize)
            batch.check(found, "updates", piece, own, lanes, dtype.itemsize, dtype.itemsize)
            cells = memory.data.view(dtype)
            for i, place in zip(np.arange(len(where))[chosen], places // dtype.itemsize):
                before[i] = cells[place]
                cells[place] = update(before[i], *(value[i] for value in values))
        batch.set_active(target, before)

    return run


@instruction(r"membar\.(?:cta|gl|sys)|fence(?:\.(?:sc|acq_rel))?\.(?:cta|gpu|sys)")
def _fence(o: Operands) -> Run:
    return lambda batch: None  # what is written is visible at once here; a fence alone orders no two threads


# Copies from global to shared memory that arrive later


@instruction(rf"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global{PREFETCH}")
def _cp_async(o: Operands, cache: str) -> Run:
    """[to], [from], width {, bytes to read, the rest becomes zero | predicate, if true read none}."""
    to, source, width = o.address(o[0]), o.address(o[1]), o.integer(o[2])
    if width not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise o.unsupported(f".{cache} does not copy {width} bytes")
    limit = o.texts[3] if len(o.texts) > 3 else str(width)
    number = o.find(limit.removeprefix("!"))
    ignore = number is not None and o.kernel.types[number] == "pred"
    value = o.read(limit, "pred" if ignore else "u32")

    def run(batch: Batch) -> None:
        sizes = batch.active(value(batch)).astype(np.int64)
        sizes = width * (1 - sizes) if ignore else sizes
        if (sizes > width).any():
            batch.fail(BadAccess, batch.lanes[sizes.argmax()], f"copies {sizes.max()} bytes into {width}")
        values, origin, where = np.zeros((len(sizes), width), u8), source(batch), to(batch)
        for size in np.unique(sizes[sizes > 0]):
            chosen, part = sizes == size, np.empty((np.count_nonzero(sizes == size), size), u8)
            batch.access(watch.load, "copies", "global", origin[chosen], part, width, batch.lanes[chosen])
            values[chosen, :size] = part
        batch.access(watch.start_copies, "copies to", "shared", where, values, width)
        batch.copies.append(Copies(batch.lanes, where, batch.groups[batch.lanes], width))

    return run


@instruction(r"cp\.async\.commit_group")
def _commit(o: Operands) -> Run:
    def run(batch: Batch) -> None:
        batch.groups[batch.lanes] += 1

    return run


@instruction(r"cp\.async\.wait_(?:group|(all))")
def _wait(o: Operands, everything: str | None) -> Run:
    pending = -1 if everything else o.integer(o[0])  # so many of the last groups may stay in flight

    def run(batch: Batch) -> None:
        done, in_flight = np.where(batch.mask, batch.groups - pending, 0), []
        for copies in batch.copies:
            landed = copies.groups < done[copies.lanes]
            lanes, where = copies.lanes[landed], copies.addresses[landed]
            watch.land(batch.spaces["shared"], where, lanes, batch.stamps, copies.width)
            if not landed.all():
                lanes, where, groups = (part[~landed] for part in copies[:3])
                in_flight.append(Copies(lanes, where, groups, copies.width))
        batch.copies = in_flight

    return run


# Where to go on


@instruction(r"bra(?:\.uni)?")
def _bra(o: Operands) -> Run:
    if o[0] not in o.kernel.labels:
        raise o.unsupported(f"there is no label {o[0]}")
    target = o.kernel.labels[o[0]]
    return lambda batch: target


@instruction(r"(?:ret|exit)(?:\.uni)?")
def _exit(o: Operands) -> Run:
    return lambda batch: EXITED


@instruction(r"trap")
def _trap(o: Operands) -> Run:
    return lambda batch: batch.fail(PtxError, batch.lanes[0], "comes to a trap")


BARRIER = r"(?:bar|barrier)(?:\.cta)?"


@instruction(rf"{BARRIER}\.sync(?:\.aligned)?")
def _bar(o: Operands) -> Run:
    if len(o.texts) > 1:
        raise o.unsupported("a barrier for a part of the block is not modelled")
    return lambda batch: batch.wait(lambda threads: None)


@instruction(rf"{BARRIER}\.red(?:\.aligned)?\.(popc|and|or)\.(u32|pred)")
def _bar_red(o: Operands, name: str, kind: str) -> Run:
    """A barrier that also counts, or combines, one predicate of each thread of the block."""
    if len(o.texts) > 3:
        raise o.unsupported("a barrier for a part of the block is not modelled")
    target, vote = o.register(o[0]), o.read(o[2], "pred")
    reduce = {"popc": np.add, "and": np.minimum, "or": np.maximum}[name].reduceat

    def finish(batch: Batch, threads: Array) -> None:
        batch.activate(threads)
        blocks = batch.block[batch.lanes]
        first = np.flatnonzero(np.diff(blocks, prepend=-1))
        result = reduce(batch.active(vote(batch)).astype(u32), first)
        batch.set_active(target, result.repeat(np.diff(first, append=len(blocks))).astype(DTYPES[kind]))

    return lambda batch: batch.wait(lambda threads: finish(batch, threads))


# Warps


@instruction(r"(?:bar|barrier)\.warp\.sync")
def _warp_sync(o: Operands) -> Run:
    named = o.read(o[0], "b32")
    return lambda batch: batch.pass_warp_barrier(named(batch))


@instruction(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shfl(o: Operands, mode: str) -> Run:
    targets = [o.register(name.strip()) for name in o[0].split("|")]
    value, b, c, named = (o.read(o[i], "b32") for i in range(1, 5))
    lane = np.arange(WARP)

    def run(batch: Batch) -> None:
        members = batch.members(named(batch))
        step, limits = (batch.by_warp(x(batch)).astype(np.int64) for x in (b, c))
        step, segment = step & 31, limits >> 8 & 31
        first, last = lane & segment, lane & segment | limits & 31 & ~segment
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": first | step & ~segment}
        inside = source[mode] >= last if mode == "up" else source[mode] <= last
        chosen = np.where(inside, source[mode], lane)
        lost = batch.mask & ~members[np.arange(batch.size), chosen.ravel()]
        if lost.any():
            thread = int(lost.argmax())
            what = f"reads from lane {chosen.flat[thread]} of its warp, which takes no part"
            batch.fail(Divergence, thread, what)
        batch.set(targets[0], np.take_along_axis(batch.by_warp(value(batch)), chosen, axis=1).ravel())
        for target in targets[1:]:
            batch.set(target, inside.ravel())

    return run


@instruction(r"vote\.sync\.(?:(all|any|uni)\.pred|(ballot)\.b32)")
def _vote(o: Operands, mode: str | None, ballot: str | None) -> Run:
    target, vote, named = o.register(o[0]), o.read(o[1], "pred"), o.read(o[2], "b32")

    def run(batch: Batch) -> None:
        members, votes = batch.members(named(batch)), batch.of_members(vote(batch))
        every: Array = np.logical_and.reduce(votes | ~members, axis=1)
        some: Array = np.logical_or.reduce(votes & members, axis=1)
        result = {"all": every, "any": some, "uni": every | ~some, None: one_bits(votes & members)}[mode]
        batch.set(target, result)

    return run


@instruction(r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu]32)")
def _redux(o: Operands, name: str, kind: str) -> Run:
    target, value, named = o.register(o[0]), o.read(o[1], kind), o.read(o[2], "b32")
    update: Any = UPDATES[name]
    dtype, limits = DTYPES[kind], np.iinfo(DTYPES[kind])
    neutral = dtype(
        {"min": limits.max, "max": limits.min, "and": -1 if limits.min else limits.max}.get(name, 0)
    )

    def run(batch: Batch) -> None:
        members = batch.members(named(batch))
        values = np.where(members, batch.of_members(value(batch)), neutral)
        batch.set(target, update.reduce(values, axis=1, dtype=dtype))

    return run


@instruction(r"activemask\.b32")
def _activemask(o: Operands) -> Run:
    target = o.register(o[0])
    return lambda batch: batch.set(target, one_bits(batch.by_warp(batch.mask)).repeat(WARP))


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(o: Operands, count: str, transposed: str | None) -> Run:
    """Lane 8j + i gives the address of row i of matrix j; lane 4g + t gets elements 2t, 2t + 1 of row g."""
    matrices, addresses = int(count), o.address(o[1])
    numbers = o.registers(o[0], matrices)

    def run(batch: Batch) -> None:
        giving = np.arange(batch.whole_warps() * WARP).reshape(-1, WARP)[:, : 8 * matrices].ravel()
        rows = np.empty((len(giving), 16), u8)
        batch.access(watch.load, "reads", "shared", addresses(batch)[giving], rows, 16, batch.lanes[giving])
        tiles = rows.view(u16).reshape(-1, matrices, 8, 8)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        for j, number in enumerate(numbers):
            batch.set_active(number, np.ascontiguousarray(tiles[:, j]).view(u32).ravel())

    return run


# Tensor cores. A register holds eight codes or two halves along K. Lane 4g + t has rows (of B: columns) g and
# g + 8, and the t-th register of the first and of the second half of K. PTX ISA, Matrix Fragments.


def rows_of_a(registers: list[Array]) -> Array:
    """Four over (warps, 8, 4) lanes, cut in pieces (warps, 8, 4, pieces) → (warps, 16, K)."""
    parts = np.stack(registers, axis=1)  # register & 1: lower rows, >> 1: second half
    w, _, g, t, cut = parts.shape
    return np.ascontiguousarray(parts.reshape(w, 2, 2, g, t, cut).transpose(0, 2, 3, 1, 4, 5)).reshape(
        w, 16, -1
    )


def rows_of_b(registers: list[Array]) -> Array:
    parts = np.stack(registers, axis=1)
    return np.ascontiguousarray(parts.transpose(0, 2, 1, 3, 4)).reshape(len(parts), 8, -1)


def matrix_of_c(registers: list[Array]) -> Array:
    parts = np.stack(registers, axis=-1).reshape(
        -1, 8, 4, 2, 2
    )  # register & 1: next column, >> 1: lower rows
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


def over_lanes(batch: Batch, reads: list[Read]) -> list[Array]:
    """Operands over the (warps, 8, 4) lanes of whole warps."""
    return [np.ascontiguousarray(batch.active(read(batch))).reshape(-1, 8, 4) for read in reads]


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def _mma_half(o: Operands, kind: str) -> Run:
    numbers = o.registers(o[0], 4)
    widths, bits = (FP16, np.dtype(np.int16)) if kind == "f16.f16" else (BF16, np.dtype(u16))
    of_a, of_b, of_c = o.reads(o[1], "b32", 4), o.reads(o[2], "b32", 2), o.reads(o[3], "b32", 4)

    def run(batch: Batch) -> None:
        batch.whole_warps()
        a = rows_of_a([halves_in(x) for x in over_lanes(batch, of_a)])
        b = rows_of_b([halves_in(x) for x in over_lanes(batch, of_b)])
        c = matrix_of_c(over_lanes(batch, of_c)).view(f32)
        for number, d in zip(numbers, registers_of_d(half_warps(a.view(bits), b.view(bits), c, widths))):
            batch.set_active(number, d)

    return run


SHAPE, BLOCK_SCALE = r"(?:\.m16n8k64\.row\.col)?", r"\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"


@instruction(rf"mma\.sync\.aligned{SHAPE}{BLOCK_SCALE}{SHAPE}\.f32\.e2m1\.e2m1\.f32\.ue4m3")
def _mma_nvfp4(o: Operands) -> Run:
    """D, A, B, C, scales of A, {byte, thread}, scales of B, {byte, thread}."""
    if len(o.texts) != 8:
        raise o.unsupported("it takes 8 operands")
    d, a, b, c, scales_a, selector_a, scales_b, selector_b = o.texts
    numbers, of_a, of_b = o.registers(d, 4), o.reads(a, "b32", 4), o.reads(b, "b32", 2)
    of_c, scales = o.reads(c, "b32", 4), [*o.reads(scales_a, "b32", 1), *o.reads(scales_b, "b32", 1)]
    selectors = o.reads(selector_a, "u16", 2), o.reads(selector_b, "u16", 2)

    def selected(batch: Batch, operand: int) -> int:
        byte, thread = (np.unique(batch.active(read(batch))) for read in selectors[operand])
        most = (1, 3)[operand]
        if len(byte) > 1 or len(thread) > 1 or byte[0] != 0 or thread[0] > most:
            what = f"selects byte {byte} and thread {thread} for the scales of {'AB'[operand]}; with 4X that "
            batch.fail(PtxError, batch.lanes[0], f"{what}is byte 0, and one thread up to {most} for all")
        return int(thread[0])

    def run(batch: Batch) -> None:
        batch.whole_warps()
        a = rows_of_a([codes_in(x) for x in over_lanes(batch, of_a)])
        b = rows_of_b([codes_in(x) for x in over_lanes(batch, of_b)])
        c = matrix_of_c(over_lanes(batch, of_c)).view(f32)
        quads_a, quads_b = over_lanes(batch, scales)
        sfa, sfb = scales_of_a(quads_a, selected(batch, 0)), scales_of_b(quads_b, selected(batch, 1))
        sfa, sfb = (x.view(u8).reshape(len(x), -1, 4) for x in (sfa, sfb))
        for number, d in zip(numbers, registers_of_d(nvfp4_warps(a, b, sfa, sfb, c))):
            batch.set_active(number, d)

    return run
