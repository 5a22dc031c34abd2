"""Threads that run a kernel in step: registers as arrays over them, a program counter each, barriers.

The threads at the lowest program counter run, up to the next one at which others wait: those that parted at a
branch meet again behind it. Every instruction sees the same order on every run.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ptx_memory as watch
from .formats import u8, u32
from .ptx_arithmetic import bits_in_type
from .ptx_memory import Found, Memory
from .ptx_text import Kernel, PtxError, Unsupported

Array = NDArray[Any]
Dim = tuple[int, int, int]
WARP = 32
EXITED, SPLIT = 1 << 40, -1  # instead of a program counter: the thread is done; threads go on at several
WINDOWS = {"global": 0, "const": 0, "shared": 1 << 44, "local": 1 << 45}  # where generic addresses begin
MOST_STEPS = 10_000_000  # takes a minute; a kernel that needs more does not end
UNSET = 0xA5  # bytes of a register that nothing was written to


class BadAccess(PtxError):
    """Out of bounds or misaligned."""


class Uninitialized(PtxError):
    """A read of bytes that nobody wrote, or any access to bytes that a cp.async still copies."""


class Race(PtxError):
    """Two threads, one byte, no barrier in between."""


class Divergence(PtxError):
    """A barrier, or an instruction of whole warps, that some of its threads do not reach."""


FINDINGS = {
    watch.OUT_OF_BOUNDS: (BadAccess, "byte {byte} of it is out of bounds"),
    watch.MISALIGNED: (BadAccess, "the address is not a multiple of {alignment}"),
    watch.NEVER_WRITTEN: (Uninitialized, "byte {byte} of it was never written"),
    watch.NOT_WAITED_FOR: (Uninitialized, "a cp.async still copies byte {byte} of it: no wait came before"),
    watch.WAS_WRITTEN: (Race, "{other} wrote byte {byte} of it, and no barrier lies in between"),
    watch.WAS_READ: (Race, "{other} read byte {byte} of it, and no barrier lies in between"),
}


class Launch(NamedTuple):
    kernel: Kernel
    grid: Dim
    block: Dim
    parameters: NDArray[np.uint8]
    addresses: dict[str, int]  # of variables
    memory: Memory
    shared_bytes: int


class Copies(NamedTuple):
    """cp.async of some threads, in flight."""

    lanes: Array
    addresses: Array  # in shared memory
    groups: Array  # numbers of the groups, each thread counting its own
    width: int


class Batch:
    """Some blocks of a launch, side by side, each filled up to whole warps with threads that have exited."""

    def __init__(self, launch: Launch, blocks: NDArray[np.int64]) -> None:
        self.launch, kernel, count = launch, launch.kernel, prod(launch.block)
        block_size = -(-count // WARP) * WARP
        n = self.size = block_size * len(blocks)
        self.thread = np.arange(n) % block_size
        self.block = np.repeat(blocks, block_size)
        self.exists = self.thread < count
        self.pc = np.where(self.exists, 0, EXITED)
        self.waiting = np.zeros(n, bool)  # at a barrier of the block
        self.finishes: dict[
            int, Callable[[Array], None]
        ] = {}  # what is left to do when it opens, by its number
        self.barriers, self.warp_syncs = np.zeros(n, np.int64), np.zeros(n, np.int64)  # so many were passed
        self.stamps = watch.stamps(self.thread, self.warp_syncs, self.barriers)
        self.block_stamps = launch.memory.launches << watch.LAUNCH_AT | self.block
        self.copies: list[Copies] = []
        self.groups = np.zeros(n, np.int64)  # of cp.async, committed by each thread
        kinds = {kind: stored(kind) for kind in set(kernel.types)}
        unset = {kind: np.full(n * dtype.itemsize, UNSET, u8).view(dtype) for kind, dtype in kinds.items()}
        self.registers = [unset[kind] for kind in kernel.types]
        self.special = special_registers(self.thread, self.block, launch)
        self.spaces = {
            "global": launch.memory.space,
            "shared": watch.shared_space(
                kernel.dynamic_from + launch.shared_bytes, len(blocks), block_size, launch.memory.shared
            ),
            "local": watch.local_space(kernel.sizes["local"], n),
        }
        launch.memory.shared = self.spaces["shared"]
        dynamic = ("shared", kernel.dynamic_from, launch.shared_bytes)
        for name, address, size in [*kernel.symbols.values(), dynamic]:
            if name in ("shared", "local"):
                regions = self.spaces[name].state.reshape(-1, self.spaces[name].size)
                regions[:, address : address + size] = watch.UNWRITTEN
        self.at, self.steps = 0, 0  # number of the instruction that runs; how many have run
        self.activate(self.exists)

    def activate(self, mask: NDArray[np.bool_]) -> None:
        """These threads run what comes next."""
        self.mask, self.everyone, self.lanes = mask, bool(mask.all()), np.flatnonzero(mask)

    def run(self) -> None:
        """Until every thread has exited."""
        code = self.launch.kernel.code
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
                self.at, instruction = at, code[at]
                self.steps += 1
                if self.steps > MOST_STEPS:
                    self.fail(PtxError, int(self.lanes[0]), f"still runs after {MOST_STEPS} instructions")
                to = self.guarded(instruction) if instruction.guard else instruction.run(self)
                at = at + 1 if to is None else to
            if at != SPLIT:
                self.pc[self.lanes] = at

    def guarded(self, instruction: Any) -> int | None:
        """Run it in those active threads whose guard predicate holds."""
        before, lanes = self.mask, self.lanes
        mask = before & instruction.guard(self)
        if not mask.any():
            return None
        self.pc[lanes] = self.at + 1
        self.activate(mask)
        to = instruction.run(self)
        if to is None:
            self.activate(before)
        elif to != SPLIT and len(self.lanes) < len(lanes):
            self.pc[self.lanes] = to
            return SPLIT
        return to

    # Registers. Their arrays are never changed, only replaced: several registers may share one.

    def set(self, number: int, value: Array) -> None:
        """A register's new value in the active threads; `value` is over all threads, or one for all."""
        old = self.registers[number]
        if value.dtype != old.dtype:
            value = converted(value, old.dtype)
        if not self.everyone:
            value = np.where(self.mask, value, old)
        elif len(value) != self.size:
            value = np.broadcast_to(value, self.size)
        self.registers[number] = value

    def set_active(self, number: int | None, value: Array) -> None:
        """The same, `value` over the active threads; None is `_`, which takes what nobody wants."""
        if number is None:
            return
        old = self.registers[number]
        value = np.ascontiguousarray(converted(value, old.dtype) if value.dtype != old.dtype else value)
        if not self.everyone:
            whole = old.copy()
            whole[self.lanes] = value
            value = whole
        self.registers[number] = value

    def active(self, value: Array) -> Array:
        """Of a value over all threads, or one for all, that of the active ones."""
        if len(value) != self.size:
            return np.broadcast_to(value, len(self.lanes))
        return value if self.everyone else value[self.lanes]

    def by_warp(self, value: Array) -> Array:
        """(warps, 32): a value over all threads, or one for all."""
        return np.broadcast_to(value, self.size).reshape(-1, WARP)

    # Warps and barriers

    def alive(self) -> Array:
        return self.pc != EXITED

    def whole_warps(self, needed: Array | None = None) -> int:
        """How many warps are at this instruction; with all their threads, or all `needed` ones."""
        mask = self.by_warp(self.mask)
        some = mask.any(axis=1)
        missing = ~mask if needed is None else self.by_warp(needed) & ~mask
        missing[~some] = False
        if missing.any():
            self.fail(Divergence, int(missing.argmax()), "is not there, and its whole warp must be")
        return int(np.count_nonzero(some))

    def members(self, named: Array) -> Array:
        """(threads, 32): the lanes with which each takes part in an instruction; `named`: its member masks.
        An active thread is in its own mask, and whoever the mask names is there or has exited."""
        names = np.broadcast_to(named, self.size)
        absent = self.mask & (names >> (self.thread % WARP).astype(u32) & u32(1) == 0)
        if absent.any():
            self.fail(
                Divergence, int(absent.argmax()), f"is not in its own member mask {names[absent][0]:#x}"
            )
        here, elsewhere = (
            one_bits(self.by_warp(x)).repeat(WARP) for x in (self.mask, self.alive() & ~self.mask)
        )
        waits = self.mask & (names & elsewhere != 0)
        if waits.any():
            lane = int(names[waits][0] & elsewhere[waits][0]).bit_length() - 1
            self.fail(Divergence, int(waits.argmax()), f"needs lane {lane} of its warp, which is not there")
        return np.unpackbits((names & here).view(u8).reshape(-1, 4), axis=1, bitorder="little").view(bool)

    def of_members(self, value: Array) -> Array:
        """(threads, 32): the value of each lane of a thread's warp."""
        return self.by_warp(value).repeat(WARP, axis=0)

    def pass_warp_barrier(self, named: Array) -> None:
        self.whole_warps(needed=self.alive())
        names = one_bits(self.by_warp(self.mask)).repeat(WARP) & ~np.broadcast_to(named, self.size)
        if (self.mask & (names != 0)).any():
            raise Unsupported(f"{self.where()}\nA barrier for a part of a warp is not modelled.")
        self.warp_syncs[self.lanes] += 1
        self.stamps = watch.stamps(self.thread, self.warp_syncs, self.barriers)

    def wait(self, finish: Callable[[Array], None]) -> int | None:
        """At a barrier of the block. `finish` is called for the threads that it lets go, whole blocks."""
        if not (self.alive() & ~self.mask).any():
            self.open(self.mask, finish)
            return None
        self.finishes[self.at] = finish
        self.waiting[self.lanes], self.pc[self.lanes] = True, self.at + 1
        return SPLIT

    def release(self) -> None:
        """Nobody can run: open the barriers at which whole blocks wait. All must wait at the same one, in the
        text: CUDA has it undefined if only some threads of a block come to a __syncthreads()."""
        for block in np.unique(self.block[self.waiting]):
            threads: Array = self.waiting & (self.block == block)
            self.at = int(self.pc[threads].min()) - 1
            apart: Array = threads & (self.pc != self.at + 1)
            if apart.any():
                other = self.launch.kernel.statements[int(self.pc[apart.argmax()]) - 1]
                what = (
                    f"waits at another barrier than others of its block, PTX line {other.line} {other.source}"
                )
                self.fail(Divergence, int(apart.argmax()), what)
            self.waiting[threads] = False
            self.open(threads, self.finishes[self.at])

    def open(self, threads: Array, finish: Callable[[Array], None]) -> None:
        """A warp that has exited is not waited for; a warp of which some threads have is in disorder."""
        waits = self.by_warp(threads).any(axis=1).repeat(WARP)
        gone = self.exists & ~self.alive() & waits
        if gone.any():
            self.fail(Divergence, int(gone.argmax()), "has exited, and others of its warp wait at a barrier")
        finish(threads)
        self.barriers[threads] += 1
        self.stamps = watch.stamps(self.thread, self.warp_syncs, self.barriers)

    # Memory

    def access(
        self,
        how: Callable[..., Found],
        verb: str,
        space: str | None,
        addresses: Array,
        values: Array,
        alignment: int,
        lanes: Array | None = None,
    ) -> None:
        """Load into, store from or copy values (active threads or `lanes`, bytes); space None: generic."""
        lanes = self.lanes if lanes is None else lanes
        for name, chosen in pieces(space, addresses):
            where, part, who = (
                addresses[chosen] - (0 if space else WINDOWS[name]),
                values[chosen],
                lanes[chosen],
            )
            found = how(self.spaces[name], where, who, self.now(name), part, alignment)
            self.check(found, verb, name, where, who, values[:1].nbytes, alignment)
            if part is not values:
                values[chosen] = part

    def now(self, space: str) -> Array:
        return self.block_stamps if space == "global" else self.stamps

    def check(
        self, found: Found, verb: str, space: str, addresses: Array, lanes: Array, width: int, alignment: int
    ) -> None:
        """Raise what a function of ptx_memory has found."""
        finding, i, byte, stamp = found
        if finding == watch.FINE:
            return
        kind, reason = FINDINGS[finding]
        thread = stamp & watch.THREAD
        other = f"thread {coordinates(thread, self.launch.block)} of its block"
        if space == "global":
            other = f"block {coordinates(stamp & watch.BLOCK, self.launch.grid)}"
        elif thread == self.thread[lanes[i]]:
            other = "another thread of its block"
        reason = reason.format(byte=byte, alignment=alignment, other=other)
        what = f"{verb} {width} bytes of {space} memory at {int(addresses[i]):#x}, but {reason}"
        self.fail(kind, int(lanes[i]), what)

    def where(self) -> str:
        kernel = self.launch.kernel
        s = kernel.statements[self.at]
        return (
            f"{kernel.name}, PTX line {s.line}{', ' * bool(s.source)}{s.source}: {' '.join(s.text.split())}"
        )

    def fail(self, kind: type[PtxError], thread: int, what: str) -> None:
        t = coordinates(int(self.thread[thread]), self.launch.block)
        b = coordinates(int(self.block[thread]), self.launch.grid)
        raise kind(f"{self.where()}\nThread {t} of block {b}, lane {thread % WARP} of its warp, {what}.")


def pieces(space: str | None, addresses: Array) -> Sequence[tuple[str, Any]]:
    """(space, which of the addresses lie there)."""
    if space:
        return [("global" if space == "const" else space, slice(None))]
    window = np.searchsorted([WINDOWS["shared"], WINDOWS["local"], watch.FIRST], addresses, side="right")
    names = ("global", "shared", "local", "global")  # the lowest addresses are nobody's
    return [(names[w], np.flatnonzero(window == w)) for w in np.unique(window)]


def coordinates(number: int, size: Dim) -> Dim:
    x, y, _ = size
    return int(number % x), int(number // x % y), int(number // (x * y))


def stored(kind: str) -> np.dtype:
    """How a register of this type is held: its bits, or truth values."""
    return np.dtype(bool if kind == "pred" else f"u{bits_in_type(kind) // 8}")


def converted(value: Array, dtype: np.dtype) -> Array:
    """The bits of a value for a register; what is shorter is extended, by its sign if it has one."""
    if value.ndim == 2:  # pairs of halves
        return np.ascontiguousarray(value).view(dtype)[:, 0]
    return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)


def one_bits(members: Array) -> Array:
    """(n, 32) truth values → (n,) uint32, lane 0 the lowest bit."""
    return np.packbits(members, axis=1, bitorder="little").view(u32)[:, 0]


def special_registers(thread: Array, block: Array, launch: Launch) -> dict[str, Array]:
    special = {"%laneid": thread % WARP, "%warpid": thread // WARP}
    for name, sizes, flat in (("tid", launch.block, thread), ("ctaid", launch.grid, block)):
        x, y, _ = sizes
        special |= {f"%{name}.x": flat % x, f"%{name}.y": flat // x % y, f"%{name}.z": flat // (x * y)}
        special |= {f"%n{name}.{axis}": np.full(len(flat), size) for axis, size in zip("xyz", sizes)}
    return {name: value.astype(u32) for name, value in special.items()}
