"""Threads that run a kernel in step: registers as arrays over them, a program counter each, barriers.

The threads at the lowest program counter run, up to the next one at which others wait: those that parted at a
branch meet again behind it. Every instruction sees the same order on every run.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ptx_memory as watch
from .formats import f32, u8, u32
from .ptx_memory import Memory

Array = NDArray[Any]
Dim = tuple[int, int, int]
WARP, WARPGROUP = 32, 128
EXITED, SPLIT = 1 << 40, -1  # instead of a program counter: the thread is done; threads go on at several
MOST_STEPS = 10_000_000  # takes a minute; a kernel that needs more does not end
UNSET = 0xA5  # bytes of a register that nothing was written to
TOUCHED, FENCED = -2, -1  # accumulators: used since the last wgmma.fence, or not; else the group that adds
DTYPES = {"pred": np.dtype(bool), "f16": np.dtype(np.float16), "f32": np.dtype(f32)}
for _bits in (8, 16, 32, 64):
    DTYPES |= {f"s{_bits}": np.dtype(f"i{_bits // 8}")}
    DTYPES |= {f"{kind}{_bits}": np.dtype(f"u{_bits // 8}") for kind in "ub"}


class PtxError(Exception):
    """A kernel that cannot go on. The message has the kernel, the line, the thread and the reason."""


class Unsupported(PtxError):
    """An opcode, modifier or operand that this interpreter does not know."""


class BadAccess(PtxError):
    """Out of bounds or misaligned."""


class Uninitialized(PtxError):
    """A read of bytes that nobody wrote; any use of what a cp.async still copies, or a wgmma computes."""


class Race(PtxError):
    """Two threads, one byte, no barrier in between. Or wgmma, and no fence or wait in between."""


class Divergence(PtxError):
    """A barrier, or an instruction of whole warps or warpgroups, that some of its threads do not reach."""


FINDINGS = {
    watch.OUT_OF_BOUNDS: (BadAccess, "byte {byte} of it is out of bounds"),
    watch.MISALIGNED: (BadAccess, "the address is not a multiple of {alignment}"),
    watch.NEVER_WRITTEN: (Uninitialized, "byte {byte} of it was never written"),
    watch.NOT_WAITED_FOR: (Uninitialized, "a cp.async still copies byte {byte} of it: no wait came before"),
    watch.WAS_WRITTEN: (Race, "{other} wrote byte {byte} of it, and no barrier lies in between"),
    watch.WAS_READ: (Race, "{other} read byte {byte} of it, and no barrier lies in between"),
    watch.NOT_FENCED: (
        Race,
        "{other} wrote byte {byte} of it, and no fence.proxy.async of its own and barrier lie in between",
    ),
    watch.STILL_MULTIPLIED: (
        Race,
        "a wgmma.mma_async still reads byte {byte} of it: no wgmma.wait_group came before",
    ),
}
VERBS = {
    watch.READ: "reads",
    watch.MULTIPLY: "multiplies",
    watch.WRITE: "writes",
    watch.ATOMIC: "updates",
    watch.COPY: "copies to",
}


class Statement(NamedTuple):
    guard: str  # a predicate, or nothing
    opcode: str
    operands: list[str]
    registers: dict[str, int]  # their numbers, by the names that the operands have
    text: str
    line: int  # in the PTX
    source: str  # file:line of the CUDA source, if it was compiled with -lineinfo


@dataclass
class Kernel:
    """One .entry."""

    name: str
    parameters: dict[str, str]  # name → type
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # number of the statement that follows
    types: list[str] = field(default_factory=list)  # of the registers, by number
    arrays: dict[str, tuple[int, int]] = field(default_factory=dict)  # in shared memory: address, bytes
    most_threads: int = 1024

    def place(self, name: str, size: int, alignment: int) -> None:
        """An array in shared memory, behind the others with a gap, so that a step too far is noticed. One
        of size 0 is as long as the launch says, and comes after all others."""
        end = max((address + size + 16 for address, size in self.arrays.values() if size), default=0)
        self.arrays[name] = (-(-end // alignment) * alignment, size)


class Launch(NamedTuple):
    kernel: Kernel
    code: list[Callable[["Batch", list[str]], int | None]]  # of the statements
    grid: Dim
    block: Dim
    arguments: dict[str, Array]  # of one element
    memory: Memory
    shared: list[tuple[int, int]]  # arrays in shared memory: address, bytes
    ran: NDArray[np.int64]  # by how many threads each statement was run
    accumulators: set[int]  # numbers of the registers that wgmma adds to


class InFlight(NamedTuple):
    """Accesses to shared memory that some threads issued."""

    lanes: Array
    addresses: Array
    groups: Array  # numbers of the groups, each thread counting its own
    width: int


class Groups:
    """What runs beside the threads: each commits what it issued as a group, and waits for its groups."""

    def __init__(self, threads: int) -> None:
        self.committed, self.done = np.zeros(threads, np.int64), np.zeros(threads, np.int64)  # by each
        self.in_flight: list[InFlight] = []

    def issue(self, lanes: Array, addresses: Array, width: int) -> None:
        self.in_flight.append(InFlight(lanes, addresses, self.committed[lanes], width))

    def wait(self, lanes: Array, but: int) -> list[InFlight]:
        """For all groups of these threads but the last few: what is in flight no more."""
        self.done[lanes] = np.maximum(self.done[lanes], self.committed[lanes] - but)
        before, self.in_flight = self.in_flight, []
        landed: list[InFlight] = []
        for who, where, groups, width in before:
            over = groups < self.done[who]
            for chosen, part in ((over, landed), (~over, self.in_flight)):
                if chosen.any():
                    part.append(InFlight(who[chosen], where[chosen], groups[chosen], width))
        return landed


class Batch:
    """Some blocks of a launch, side by side, each filled up to whole warps with threads that have exited."""

    def __init__(self, launch: Launch, blocks: NDArray[np.int64]) -> None:
        self.launch, kernel, count = launch, launch.kernel, prod(launch.block)
        self.block_size = -(-count // WARP) * WARP
        n = self.size = self.block_size * len(blocks)
        self.thread = np.arange(n) % self.block_size
        self.block = np.repeat(blocks, self.block_size)
        self.exists = self.thread < count
        self.pc = np.where(self.exists, 0, EXITED)
        self.waiting = np.zeros(n, bool)  # at a barrier of the block
        self.barriers, self.warp_syncs = np.zeros(n, np.int64), np.zeros(n, np.int64)  # so many were passed
        self.copies, self.products = Groups(n), Groups(n)  # cp.async; wgmma
        self.accumulators = {number: np.full(n, TOUCHED, np.int64) for number in launch.accumulators}
        kinds = {kind: stored(kind) for kind in set(kernel.types)}
        unset = {kind: np.full(n * dtype.itemsize, UNSET, u8).view(dtype) for kind, dtype in kinds.items()}
        self.registers = [unset[kind] for kind in kernel.types]
        self.special = special_registers(self.thread, self.block, launch)
        end = max((address + size for address, size in launch.shared), default=0)
        shared = watch.shared_space(end, len(blocks), self.block_size)
        for address, size in launch.shared:
            shared.state.reshape(len(blocks), -1)[:, address : address + size] = watch.UNWRITTEN
        self.spaces = {"global": launch.memory.space, "shared": shared}
        self.stamps = {"global": launch.memory.launches << watch.LAUNCH_AT | self.block}
        self.stamp()
        self.at, self.steps = 0, 0  # number of the instruction that runs; how many have run
        self.activate(self.exists)

    def stamp(self) -> None:
        self.stamps["shared"] = watch.stamps(self.thread, self.warp_syncs, self.barriers)

    def activate(self, mask: NDArray[np.bool_]) -> None:
        """These threads run what comes next."""
        self.mask, self.everyone, self.lanes = mask, bool(mask.all()), np.flatnonzero(mask)

    def run(self) -> None:
        """Until every thread has exited."""
        statements = self.launch.kernel.statements
        while True:
            ready = np.where(self.waiting, EXITED, self.pc)
            at = int(ready.min())
            if at == EXITED:
                if not self.waiting.any():
                    return
                self.release()
                continue
            self.activate(ready == at)
            stop = int(ready[~self.mask].min(initial=EXITED))
            while SPLIT < at < stop:
                self.at, self.statement = at, statements[at]
                self.steps += 1
                if self.steps > MOST_STEPS:
                    self.fail(PtxError, int(self.lanes[0]), f"still runs after {MOST_STEPS} instructions")
                to = self.guarded() if self.statement.guard else self.execute()
                at = at + 1 if to is None else to
            if at != SPLIT:
                self.pc[self.lanes] = at

    def execute(self) -> int | None:
        self.launch.ran[self.at] += len(self.lanes)
        return self.launch.code[self.at](self, self.statement.operands)

    def guarded(self) -> int | None:
        """Run it in those active threads whose guard predicate holds."""
        before, lanes = self.mask, self.lanes
        mask = before & self.read(self.statement.guard, "pred")
        if not mask.any():
            return None
        self.pc[lanes] = self.at + 1
        self.activate(mask)
        to = self.execute()
        if to is None:
            self.activate(before)
        elif to != SPLIT and len(self.lanes) < len(lanes):
            self.pc[self.lanes] = to
            return SPLIT
        return to

    # Operands. Arrays of registers are never changed, only replaced: several registers may share one.

    def unsupported(self, why: str) -> Unsupported:
        return Unsupported(f"{self.where()}\n{why}.")

    def names(self, text: str, count: int) -> list[str]:
        """{a, b, …} or a"""
        names = [name.strip() for name in text.strip("{}").split(",")]
        if len(names) != count:
            raise self.unsupported(f"{text} must be {count} operands")
        return names

    def reads(self, text: str, kind: str, count: int) -> list[Array]:
        return [self.read(name, kind) for name in self.names(text, count)]

    def read(self, text: str, kind: str) -> Array:
        """An operand as this type: over all threads, or one value for all."""
        if text.startswith("!"):
            return ~self.read(text[1:], kind)
        number, dtype = self.statement.registers.get(text), DTYPES[kind]
        if number is None:
            return self.constant(text, kind)
        value = self.registers[number]
        if value.dtype == dtype:
            return value
        if value.itemsize < dtype.itemsize or bool in (value.dtype, dtype):
            raise self.unsupported(f"{text} is .{self.launch.kernel.types[number]}; .{kind} does not fit")
        return (value if value.itemsize == dtype.itemsize else value.astype(stored(kind))).view(dtype)

    def constant(self, text: str, kind: str) -> Array:
        """A special register, the address of an array in shared memory, a number."""
        if text in self.special:
            return self.special[text].astype(DTYPES[kind], copy=False)
        arrays = self.launch.kernel.arrays
        value = arrays[text][0] if text in arrays else self.number(text)
        return np.array([value & (1 << bits_in_type(kind)) - 1], stored(kind)).view(DTYPES[kind])

    def number(self, text: str) -> int:
        """An integer, or the bits of a float32."""
        try:
            return int(text[2:], 16) if text[:2] in ("0f", "0F") else int(text.removesuffix("U"), 0)
        except ValueError:
            raise self.unsupported(f"{text} is not a register, a shared array or a number") from None

    def addresses(self, text: str) -> Array:
        """[register + offset] or [array + offset] → the addresses of the active threads."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if match is None:
            raise self.unsupported(f"{text} is not an address")
        number = self.statement.registers.get(match[1])
        kind = "u32" if number is None else self.launch.kernel.types[number]
        wrap = (1 << min(bits_in_type(kind), 63)) - 1  # those of 32 bits go round
        return (self.active(self.read(match[1], kind)).astype(np.int64) + int(match[2] or 0)) & wrap

    def set(self, name: str, value: Array) -> None:
        """A register's new value in the active threads; `value` is over all threads, over the active ones, or
        one for all. `_` takes what nobody wants."""
        if name == "_":
            return
        if name not in self.statement.registers:
            raise self.unsupported(f"{name} is not a register")
        number = self.statement.registers[name]
        old = self.registers[number]
        value = as_bits(value, old.dtype)
        if len(value) not in (1, self.size):
            whole = old.copy()
            whole[self.lanes] = value
        elif self.everyone:
            whole = np.broadcast_to(value, self.size)
        else:
            whole = np.where(self.mask, value, old)
        self.registers[number] = whole

    def active(self, value: Array) -> Array:
        """Of a value over all threads, or one for all, that of the active ones."""
        if len(value) != self.size:
            return np.broadcast_to(value, len(self.lanes))
        return value if self.everyone else value[self.lanes]

    def by_warp(self, value: Array) -> Array:
        """(warps, 32): a value over all threads, or one for all."""
        return np.broadcast_to(value, self.size).reshape(-1, WARP)

    # Warps and barriers

    def whole_warps(self, members: str = "-1") -> None:
        """The active threads must be whole warps, and so must the member masks that they give."""
        if (self.active(self.read(members, "b32")) != 0xFFFFFFFF).any():
            raise self.unsupported("a member mask for a part of a warp is not modelled")
        self.whole("warp", WARP)

    def whole_warpgroups(self) -> None:
        if self.block_size % WARPGROUP:
            raise self.unsupported(f"a block that is no multiple of {WARPGROUP} threads is not modelled")
        self.whole("warpgroup", WARPGROUP)

    def whole(self, name: str, size: int) -> None:
        missing = self.mask.reshape(-1, size).any(axis=1).repeat(size) & ~self.mask
        if missing.any():
            self.fail(Divergence, int(missing.argmax()), f"is not there, and its whole {name} must be")

    def same(self, text: str, kind: str) -> Array:
        """An operand that must be the same in all of an active warpgroup: (warpgroups,)."""
        values = self.active(self.read(text, kind)).reshape(-1, WARPGROUP)
        others = (values != values[:, :1]).ravel()
        if others.any():
            what = f"has another {text} than its warpgroup, and it must be the same"
            self.fail(Divergence, int(self.lanes[others.argmax()]), what)
        return values[:, 0]

    def touch(self, numbers: Iterable[int]) -> None:
        """Other instructions than wgmma use these accumulators."""
        for number in numbers:
            last = self.accumulators[number]
            computed = last[self.lanes] >= self.products.done[self.lanes]
            if computed.any():
                what = "uses what a wgmma.mma_async still computes: no wgmma.wait_group came before"
                self.fail(Uninitialized, int(self.lanes[computed.argmax()]), what)
            last[self.lanes] = TOUCHED

    def accumulate(self, names: list[str]) -> None:
        """A wgmma adds to these registers."""
        for name in names:
            last = self.accumulators[self.statement.registers[name]]
            touched = last[self.lanes] == TOUCHED
            if touched.any():
                what = f"adds to {name}, which others used before, and no wgmma.fence lies in between"
                self.fail(Race, int(self.lanes[touched.argmax()]), what)
            last[self.lanes] = self.products.committed[self.lanes]

    def pass_warp_barrier(self) -> None:
        self.warp_syncs[self.lanes] += 1
        self.stamp()

    def wait(self) -> int:
        """At a barrier of the block."""
        self.waiting[self.lanes], self.pc[self.lanes] = True, self.at + 1
        return SPLIT

    def release(self) -> None:
        """Nobody can run: open the barriers at which whole blocks wait. All must wait at the same one, in the
        text: CUDA has it undefined if only some threads of a block come to a __syncthreads(). A warp that has
        exited is not waited for; a warp of which some threads have is in disorder."""
        behind = np.where(self.waiting, self.pc, EXITED).reshape(-1, self.block_size).min(axis=1)
        first = behind.repeat(self.block_size)
        apart = self.waiting & (self.pc != first)
        gone = self.by_warp(self.waiting).any(axis=1).repeat(WARP) & self.exists & ~self.waiting
        if (apart | gone).any():
            thread = int((apart | gone).argmax())
            self.at = int(first[thread]) - 1
            if gone[thread]:
                self.fail(Divergence, thread, "has exited, and others of its warp wait at a barrier")
            other = self.launch.kernel.statements[int(self.pc[thread]) - 1]
            what = f"waits at another barrier than others of its block, PTX line {other.line} {other.source}"
            self.fail(Divergence, thread, what)
        self.barriers[self.waiting] += 1
        self.waiting[:] = False
        self.stamp()

    # Memory

    def access(
        self, how: int, space: str, lanes: Array, addresses: Array, values: Array, alignment: int = 0
    ) -> None:
        """Read into or write values, (lanes, bytes); stop at what the watch finds."""
        width, memory, now = values.shape[1], self.spaces[space], self.stamps[space]
        alignment = alignment or width
        if how == watch.MULTIPLY:  # the lane stands for its warpgroup
            now = now | watch.SEVERAL_WARPS
            found = watch.access(memory, addresses, lanes, now, values, alignment, watch.READ)
            if found[0] == watch.FINE:
                found = watch.multiply(memory, addresses, lanes, now, width)
        else:
            found = watch.access(memory, addresses, lanes, now, values, alignment, how)
        finding, i, byte, stamp = found
        if finding == watch.FINE:
            return
        kind, reason = FINDINGS[finding]
        thread = stamp & watch.THREAD
        other = f"thread {coordinates(thread, self.launch.block)} of its block"
        if space == "global":
            other = f"block {coordinates(stamp & watch.BLOCK, self.launch.grid)}"
        elif thread == self.thread[lanes[i]] and how != watch.MULTIPLY:
            other = "another thread of its block"
        reason = reason.format(byte=byte, alignment=alignment, other=other)
        what = f"{VERBS[how]} {width} bytes of {space} memory at {int(addresses[i]):#x}, but {reason}"
        self.fail(kind, int(lanes[i]), what)

    def where(self) -> str:
        s, name = self.launch.kernel.statements[self.at], self.launch.kernel.name
        return f"{name}, PTX line {s.line}{', ' * bool(s.source)}{s.source}: {s.text}"

    def fail(self, kind: type[PtxError], thread: int, what: str) -> None:
        t = coordinates(int(self.thread[thread]), self.launch.block)
        b = coordinates(int(self.block[thread]), self.launch.grid)
        raise kind(f"{self.where()}\nThread {t} of block {b}, lane {thread % WARP} of its warp, {what}.")


def coordinates(number: int, size: Dim) -> Dim:
    x, y, _ = size
    return int(number % x), int(number // x % y), int(number // (x * y))


def bits_in_type(kind: str) -> int:
    return 1 if kind == "pred" else DTYPES[kind].itemsize * 8


def stored(kind: str) -> np.dtype:
    """How a register of this type is held: its bits, or truth values."""
    return DTYPES["pred" if kind == "pred" else f"b{bits_in_type(kind)}"]


def as_bits(value: Array, dtype: np.dtype) -> Array:
    """The bits of a value for a register; what is shorter is extended, by its sign if it has one."""
    return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)


def special_registers(thread: Array, block: Array, launch: Launch) -> dict[str, Array]:
    special: dict[str, Array] = {}
    for name, sizes, flat in (("tid", launch.block, thread), ("ctaid", launch.grid, block)):
        x, y, _ = sizes
        special |= {f"%{name}.x": flat % x, f"%{name}.y": flat // x % y, f"%{name}.z": flat // (x * y)}
        special |= {f"%n{name}.{axis}": np.full(len(flat), size) for axis, size in zip("xyz", sizes)}
    return {name: value.astype(u32) for name, value in special.items()}
