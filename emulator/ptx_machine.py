"""Threads that run a kernel in step: registers as arrays over them, a program counter each, barriers.

The threads at the lowest program counter run, up to the next one at which others wait: those that parted at a
branch meet again behind it. Every instruction sees the same order on every run.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ptx_memory as watch
from .formats import f32
from .ptx_memory import Memory

Array = NDArray[Any]
Dim = tuple[int, int, int]
WARP, WARPGROUP = 32, 128
EXITED, SPLIT = 1 << 40, -1  # instead of a program counter: the thread is done; threads go on at several
MOST_STEPS = 10_000_000  # takes a minute; a kernel that needs more does not end
GAP = 16  # bytes behind an array in shared memory, so that a step too far is noticed
UNSET = 0xA5  # in a register that nothing was written to
TOUCHED, FENCED = -2, -1  # accumulators: used since the last wgmma.fence, or not; else the group that adds
DTYPES = {"pred": np.dtype(bool), "f16": np.dtype(np.float16), "f32": np.dtype(f32)}
for _bits in (8, 16, 32, 64):
    DTYPES[f"s{_bits}"] = np.dtype(f"i{_bits // 8}")
    DTYPES[f"u{_bits}"] = DTYPES[f"b{_bits}"] = np.dtype(f"u{_bits // 8}")
STORED = {kind: np.dtype(f"u{dtype.itemsize}") for kind, dtype in DTYPES.items()}  # as registers hold it
STORED["pred"] = DTYPES["pred"]


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


VERBS = ("reads", "writes", "updates", "copies to", "multiplies")  # in the order of ptx_memory
UNFENCED = "and no fence.proxy.async of its own and barrier lie in between"
STILL_READS = "a wgmma.mma_async still reads byte {byte} of it: no wgmma.wait_group came before"
FINDINGS = {
    watch.OUT_OF_BOUNDS: (BadAccess, "byte {byte} of it is out of bounds"),
    watch.MISALIGNED: (BadAccess, "the address is not a multiple of {alignment}"),
    watch.NEVER_WRITTEN: (Uninitialized, "byte {byte} of it was never written"),
    watch.NOT_WAITED_FOR: (Uninitialized, "a cp.async still copies byte {byte} of it: no wait came before"),
    watch.WAS_WRITTEN: (Race, "{other} wrote byte {byte} of it, and no barrier lies in between"),
    watch.WAS_READ: (Race, "{other} read byte {byte} of it, and no barrier lies in between"),
    watch.NOT_FENCED: (Race, "{other} wrote byte {byte} of it, " + UNFENCED),
    watch.STILL_MULTIPLIED: (Race, STILL_READS),
}


class Statement(NamedTuple):
    guard: str  # a predicate, or nothing
    opcode: str
    function: "Callable[[Batch, list[str]], int | None] | None"  # what it does, if the opcode is known
    operands: list[str]
    registers: dict[str, int]  # their numbers, by the names that the operands have
    text: str
    place: str  # line in the PTX, and in the CUDA source if it was compiled with -lineinfo


@dataclass
class Kernel:
    """One .entry."""

    name: str
    parameters: dict[str, str]  # name → type
    arrays: dict[str, tuple[int, int]]  # in shared memory: alignment, bytes or 0 if the launch says how many
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # number of the statement that follows
    types: list[str] = field(default_factory=list)  # of the registers, by number
    accumulators: dict[int, tuple[str, int]] = field(default_factory=dict)  # register → wgmma, place in its D
    most_threads: int = 1024


class Launch(NamedTuple):
    kernel: Kernel
    grid: Dim
    block: Dim
    symbols: dict[str, int]  # bits of arguments, addresses of arrays in shared memory
    shared: list[slice]  # the bytes of those arrays
    memory: Memory
    executed: Counter[str]  # opcode → by how many threads it was run


class Groups:
    """What runs beside the threads: each commits what it issued as a group, and waits for its groups."""

    def __init__(self, threads: int) -> None:
        self.committed, self.done = np.zeros((2, threads), np.int64)  # groups of each thread
        self.in_flight = [np.zeros((0, 4), np.int64)]  # accesses: thread, address, bytes, number of its group

    def issue(self, lanes: Array, addresses: Array, width: int) -> None:
        columns = np.broadcast_arrays(lanes, addresses, width, self.committed[lanes])
        self.in_flight.append(np.stack(columns, axis=1))

    def wait(self, lanes: Array, but: int) -> Array:
        """For all groups of these threads but the last few: the accesses that are in flight no more."""
        self.done[lanes] = np.maximum(self.done[lanes], self.committed[lanes] - but)
        accesses = np.concatenate(self.in_flight)
        over = accesses[:, 3] < self.done[accesses[:, 0]]
        self.in_flight = [accesses[~over]]
        return accesses[over]


class Batch:
    """Some blocks of a launch, side by side, each filled up to whole warps with threads that have exited."""

    def __init__(self, launch: Launch, blocks: Array) -> None:
        self.launch, kernel, count = launch, launch.kernel, prod(launch.block)
        self.block_size = -(-count // WARP) * WARP
        n = self.size = self.block_size * len(blocks)
        self.thread, self.block = np.arange(n) % self.block_size, np.repeat(blocks, self.block_size)
        self.exists = self.thread < count
        self.pc = np.where(self.exists, 0, EXITED)
        self.behind = np.zeros(n, np.int64)  # where a thread goes on that waits at a barrier of the block
        self.barriers, self.warp_syncs = np.zeros((2, n), np.int64)  # so many were passed
        self.groups = {"cp.async": Groups(n), "wgmma": Groups(n)}
        self.accumulators = {number: np.full(n, TOUCHED, np.int64) for number in kernel.accumulators}
        unset = {kind: np.full(n, UNSET, STORED[kind]) for kind in set(kernel.types)}
        self.registers = [unset[kind] for kind in kernel.types]
        self.special = {name: np.full(n, bits, np.uint64) for name, bits in launch.symbols.items()}
        for name, sizes, number in (("tid", launch.block, self.thread), ("ctaid", launch.grid, self.block)):
            for axis, size, at in zip("xyz", sizes, coordinates(number, sizes)):
                self.special |= {f"%{name}.{axis}": at, f"%n{name}.{axis}": np.full(n, size)}
        end = max((array.stop + GAP for array in launch.shared), default=0)
        self.shared = watch.shared_space(end, len(blocks), self.block_size)
        for array in launch.shared:
            self.shared.state.reshape(len(blocks), end)[:, array] = watch.UNWRITTEN
        self.in_global = watch.GLOBAL | launch.memory.launches << watch.LAUNCH_AT | self.block  # stamps
        self.stamp()
        self.steps = 0  # how many instructions have run

    def stamp(self) -> None:
        self.in_shared = watch.stamps(self.thread, self.warp_syncs, self.barriers)

    def run(self) -> None:
        """Until every thread has exited."""
        while self.pc.min() < EXITED or self.release():
            self.go_on()

    def go_on(self) -> None:
        """The threads at the first statement, until they part or come to one at which others are."""
        at = int(self.pc.min())
        here = self.pc == at
        self.lanes = np.flatnonzero(here)  # the active threads
        stop = int(self.pc[~here].min(initial=EXITED))
        while SPLIT < at < stop:
            self.at, self.statement = at, self.launch.kernel.statements[at]
            self.steps += 1
            if self.steps > MOST_STEPS:
                self.stop(PtxError, self.lanes, f"still runs after {MOST_STEPS} instructions")
            to = self.guarded() if self.statement.guard else self.execute()
            at = at + 1 if to is None else to
        if at != SPLIT:
            self.pc[self.lanes] = at

    def execute(self) -> int | None:
        s = self.statement
        if s.function is None:
            raise self.unsupported(f"{s.opcode} is an opcode, or has a modifier or operand, not known here")
        self.launch.executed[s.opcode] += len(self.lanes)
        if s.opcode.startswith("wgmma"):
            self.whole("warpgroup", WARPGROUP)
        else:
            self.touch(self.accumulators.keys() & s.registers.values())
            if ".sync" in s.opcode and s.opcode != "bar.sync":
                self.whole("warp", WARP)
        try:
            return s.function(self, s.operands)
        except KeyError as error:
            raise self.unsupported(f"{error} is not a register, a label or a number") from error

    def guarded(self) -> int | None:
        """Run it in those active threads whose guard predicate holds."""
        lanes = self.lanes
        self.lanes = lanes[self.read(self.statement.guard, "pred")]
        to = self.execute() if len(self.lanes) else None
        if to is not None and len(self.lanes) < len(lanes):
            self.pc[lanes], self.pc[self.lanes] = self.at + 1, to
            return SPLIT
        self.lanes = lanes
        return to

    # Operands: arrays over the active threads. Those of registers, over all threads, are never changed, only
    # replaced: several registers may share one.

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
        """An operand as this type."""
        if text.startswith("!"):
            return ~self.read(text[1:], kind)
        if text in self.statement.registers:
            number = self.statement.registers[text]
            bits, of = self.registers[number], self.launch.kernel.types[number]
            if bits.itemsize < DTYPES[kind].itemsize or (of == "pred") != (kind == "pred"):
                raise self.unsupported(f"{text} is .{of}; .{kind} does not fit")
        elif text in self.special:
            bits = self.special[text]
        else:
            bits = np.full(self.size, self.number(text) & 2**64 - 1, np.uint64)
        if len(self.lanes) < self.size:
            bits = bits[self.lanes]
        return bits.astype(STORED[kind], copy=False).view(DTYPES[kind])

    def number(self, text: str) -> int:
        """An integer, or the bits of a float32."""
        if not re.fullmatch(r"0[fF][\dA-Fa-f]{8}|-?\d+U?|0x[\dA-Fa-f]+U?", text):
            raise KeyError(text)
        return int(text[2:], 16) if text[:2] in ("0f", "0F") else int(text.removesuffix("U"), 0)

    def addresses(self, text: str, space: str) -> Array:
        """[register + offset] or [array + offset]"""
        base, _, offset = text.strip("[]").partition("+")
        kind = "u32" if space == "shared" else "u64"
        return (self.read(base.strip(), kind) + self.read(offset.strip() or "0", kind)).astype(np.int64)

    def set(self, name: str, value: Array) -> None:
        """A register's new value in the active threads; what is shorter is extended, by its sign if it has
        one. `_` takes what nobody wants."""
        if name == "_":
            return
        assert value.shape == self.lanes.shape
        number = self.statement.registers[name]
        old = self.registers[number]
        bits = value.view(old.dtype) if value.itemsize == old.itemsize else value.astype(old.dtype)
        if len(self.lanes) < self.size:
            bits, part = old.copy(), bits
            bits[self.lanes] = part
        self.registers[number] = bits

    # Warps and barriers

    def active(self) -> Array:
        """Of all threads, whether they run this instruction."""
        active = np.zeros(self.size, bool)
        active[self.lanes] = True
        return active

    def whole(self, name: str, size: int) -> None:
        """The active threads must be whole warps, or warpgroups."""
        if self.block_size % size:
            raise self.unsupported(f"a block that is no multiple of {size} threads is not modelled")
        active = self.active()
        missing = active.reshape(-1, size).any(axis=1).repeat(size) & ~active
        self.stop(Divergence, np.flatnonzero(missing), f"is not there, and its whole {name} must be")

    def same(self, text: str, kind: str) -> Array:
        """An operand that must be the same in all of a warpgroup: (warpgroups,)."""
        values = self.read(text, kind).reshape(-1, WARPGROUP)
        others = self.lanes[(values != values[:, :1]).ravel()]
        self.stop(Divergence, others, f"has another {text} than its warpgroup, and it must be the same")
        return values[:, 0]

    def touch(self, numbers: Iterable[int]) -> None:
        """Other instructions than wgmma use these accumulators."""
        for number in numbers:
            last, done = self.accumulators[number], self.groups["wgmma"].done
            what = "uses what a wgmma.mma_async still computes: no wgmma.wait_group came before"
            self.stop(Uninitialized, self.lanes[last[self.lanes] >= done[self.lanes]], what)
            last[self.lanes] = TOUCHED

    def accumulate(self, names: list[str]) -> None:
        """A wgmma adds to these registers."""
        for place, name in enumerate(names):
            number = self.statement.registers[name]
            if self.launch.kernel.accumulators[number] != (self.statement.opcode, place):
                raise self.unsupported(f"{name} is one of another shape or place in D elsewhere")
            last = self.accumulators[number]
            what = f"adds to {name}, which others used before, and no wgmma.fence lies in between"
            self.stop(Race, self.lanes[last[self.lanes] == TOUCHED], what)
            last[self.lanes] = self.groups["wgmma"].committed[self.lanes]

    def release(self) -> bool:
        """Nobody can run: open the barriers at which whole blocks wait, if one waits. All must wait at the
        same one, in the text: CUDA has it undefined if only some threads of a block come to a
        __syncthreads(). A warp that has exited is not waited for; a warp of which some threads have is in
        disorder."""
        waiting = self.behind > 0
        first = np.where(waiting, self.behind, EXITED).reshape(-1, self.block_size).min(axis=1)
        apart = waiting & (self.behind != first.repeat(self.block_size))
        gone = waiting.reshape(-1, WARP).any(axis=1).repeat(WARP) & self.exists & ~waiting
        for thread in np.flatnonzero(apart | gone)[:1]:
            self.at = int(first[thread // self.block_size]) - 1
            other = self.launch.kernel.statements[self.behind[thread] - 1]
            what = f"waits at another barrier than others of its block, PTX line {other.place}"
            if gone[thread]:
                what = "has exited, and others of its warp wait at a barrier"
            self.stop(Divergence, np.array([thread]), what)
        self.pc[waiting], self.behind[:] = self.behind[waiting], 0
        self.barriers[waiting] += 1
        self.stamp()
        return bool(waiting.any())

    # Memory

    def access(
        self, how: int, space: str, lanes: Array, addresses: Array, values: Array, alignment: int = 0
    ) -> None:
        """Read into or write values, (lanes, bytes); stop at what the watch finds."""
        shared, width = space == "shared", values.shape[1]
        memory, now = (self.shared, self.in_shared) if shared else (self.launch.memory.space, self.in_global)
        alignment = alignment or width
        finding, i, byte, stamp = watch.access(memory, addresses, lanes, now, values, alignment, how)
        if finding == watch.FINE:
            return
        other = f"thread {coordinates(stamp & watch.THREAD, self.launch.block)} of its block"
        if not shared:
            other = f"block {coordinates(stamp & watch.BLOCK, self.launch.grid)}"
        elif stamp & watch.THREAD == self.thread[lanes[i]] and how != watch.MULTIPLY:
            other = "another thread of its block"
        kind, reason = FINDINGS[finding]
        reason = reason.format(byte=byte, alignment=alignment, other=other)
        what = f"{VERBS[how]} {width} bytes of {space} memory at {int(addresses[i]):#x}, but {reason}"
        self.stop(kind, lanes[i:], what)

    def where(self) -> str:
        s = self.launch.kernel.statements[self.at]
        return f"{self.launch.kernel.name}, PTX line {s.place}: {s.text}"

    def stop(self, kind: type[PtxError], threads: Array, what: str) -> None:
        """If there are such threads, for the first of them."""
        for thread in threads[:1].tolist():
            t = coordinates(int(self.thread[thread]), self.launch.block)
            b = coordinates(int(self.block[thread]), self.launch.grid)
            raise kind(f"{self.where()}\nThread {t} of block {b}, lane {thread % WARP} of its warp, {what}.")


def coordinates(number: Any, size: Dim) -> tuple[Any, Any, Any]:
    x, y, _ = size
    return number % x, number // x % y, number // (x * y)
