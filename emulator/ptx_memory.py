"""Memory under watch: what every byte holds, whether it was written, who touched it since a barrier."""

from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .formats import u8
from .jit import helper, kernel

Bytes = NDArray[np.uint8]
Stamps = NDArray[np.int64]
Indices = NDArray[np.int64]

# State of a byte. What a cp.async copies is in flight until the thread that issued it waits. What was written
# is visible to wgmma after a fence.proxy.async, and multiplied until the warpgroup waits.
OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT = u8(0), u8(1), u8(2), u8(3)
VISIBLE, MULTIPLIED = u8(4), u8(5)
# Accesses; the write of an atomic operation; what cp.async delivers; what a wgmma begins to read
READ, WRITE, ATOMIC, COPY, MULTIPLY = range(5)
# Findings
FINE, OUT_OF_BOUNDS, MISALIGNED, NEVER_WRITTEN, NOT_WAITED_FOR, WAS_WRITTEN, WAS_READ = range(7)
NOT_FENCED, STILL_MULTIPLIED = 7, 8
FIRST, ALIGNMENT = 0x7F00_0000_0000, 256  # of addresses in global memory


class Space(NamedTuple):
    """Memory of one kind: a region for each block (.shared), or one for all (.global)."""

    data: Bytes
    state: Bytes
    writer: Stamps  # of each byte, the stamp of its last write
    reader: Stamps  # the stamp of its reads since the last barrier. Length 0: only writes are compared
    fenced: Stamps  # if it is VISIBLE, the stamp of the fence
    first: int  # address of byte 0 of a region
    size: int  # bytes in a region
    sharers: int  # threads that share a region


def shared_space(size: int, blocks: int, threads: int) -> Space:
    """Of blocks of so many threads."""
    data, state = np.zeros((2, size * blocks), u8)
    writer, reader, fenced = np.zeros((3, size * blocks), np.int64)
    return Space(data, state, writer, reader, fenced, 0, size, threads)


# A stamp says who and when: thread in the block, flags, barriers that its warp and its block have passed. In
# global memory, where blocks are compared, number of the block and of the launch.
THREAD, OF_WARP = 0x3FF, 0x3E0
SEVERAL_THREADS, SEVERAL_WARPS = 1 << 10, 1 << 11
WARP_SYNCS_AT, BARRIERS_AT = 12, 38
BLOCK, LAUNCH_AT, GLOBAL = (1 << 40) - 1, 40, 1 << 62


def stamps(thread: Indices, warp_syncs: Indices, barriers: Indices) -> Stamps:
    return (barriers + 1) << BARRIERS_AT | warp_syncs << WARP_SYNCS_AT | thread


@helper
def unordered(old: int, now: int) -> bool:
    """Whether `old`, or an access joined to it, is another thread's with no barrier before `now`; in global
    memory another block's of the same launch."""
    if now & GLOBAL:
        return old != now and old >> LAUNCH_AT == now >> LAUNCH_AT
    if old >> BARRIERS_AT != now >> BARRIERS_AT:
        return False
    if (old | now) & SEVERAL_WARPS or (old ^ now) & OF_WARP:
        return True
    if old >> WARP_SYNCS_AT != now >> WARP_SYNCS_AT:
        return False
    return bool(old & SEVERAL_THREADS) or old & THREAD != now & THREAD


@helper
def joined(old: int, now: int) -> int:
    """One stamp for the accesses under `old` that still matter, and one more."""
    if now & GLOBAL or not unordered(old, now):
        return now
    return old | (SEVERAL_WARPS if (old ^ now) & OF_WARP else SEVERAL_THREADS)


@helper
def wrong(how: int, state: int, same: bool, written: int, read: int, fenced: int, now: int) -> int:
    """What is wrong with an access to a byte, which may write the `same` as is there, after those before."""
    reads = how in (READ, MULTIPLY)
    if state == OUTSIDE:
        return OUT_OF_BOUNDS
    if state == IN_FLIGHT:
        return NOT_WAITED_FOR
    if state == UNWRITTEN and reads:
        return NEVER_WRITTEN
    if state == MULTIPLIED and not reads:
        return STILL_MULTIPLIED
    if not reads and unordered(read, now):
        return WAS_READ
    if not same and unordered(written, now):
        return WAS_WRITTEN
    unseen = how == MULTIPLY and (state == WRITTEN or unordered(fenced, now))
    return NOT_FENCED if unseen else FINE


@kernel
def access(
    space: Space, addresses: Indices, threads: Indices, when: Stamps, values: Bytes, alignment: int, how: int
) -> tuple[int, int, int, int]:
    """Fill values, (threads, bytes), from addresses if `how` reads; else put them there. Returns a finding,
    its index among the threads, its byte, the stamp of another thread. In global memory only writes that are
    not atomic are compared."""
    reads, shared = how in (READ, MULTIPLY), len(space.reader) > 0
    for i in range(len(threads)):
        offset = addresses[i] - space.first
        if offset < 0 or offset > space.size - values.shape[1]:
            return OUT_OF_BOUNDS, i, 0, 0
        if addresses[i] % alignment != 0:
            return MISALIGNED, i, 0, 0
        first = threads[i] // space.sharers * space.size + offset
        now = when[threads[i]] | (SEVERAL_WARPS if how == MULTIPLY else 0)
        for b in range(values.shape[1]):
            at = first + b
            written = space.writer[at] if shared or how == WRITE else 0
            read, fenced = (space.reader[at], space.fenced[at]) if shared else (0, 0)
            same = how == WRITE and space.state[at] != UNWRITTEN and space.data[at] == values[i, b]
            finding = wrong(how, space.state[at], same, written, read, fenced, now)
            if finding != FINE:
                return finding, i, b, read if finding == WAS_READ else written
            if reads:
                values[i, b] = space.data[at]
            else:
                space.data[at], space.state[at] = values[i, b], IN_FLIGHT if how == COPY else WRITTEN
                space.writer[at] = 0 if how == ATOMIC else joined(written, now)
            if reads and shared:
                space.reader[at] = joined(read, now)
            if how == MULTIPLY:
                space.state[at] = MULTIPLIED
    return FINE, 0, 0, 0


@kernel
def mark(space: Space, last: Stamps, accesses: Indices, now: Stamps, state: int) -> None:
    """Accesses (thread, address, bytes, …) to shared memory, as if done just now, leave bytes in a state;
    `last` is space.writer or space.reader."""
    for i in range(len(accesses)):
        thread, address, width = accesses[i, 0], accesses[i, 1], accesses[i, 2]
        at = thread // space.sharers * space.size + address
        space.state[at : at + width], last[at : at + width] = state, now[thread]


@kernel
def fence(space: Space, fencing: NDArray[np.bool_], now: Stamps) -> None:
    """What these threads wrote is visible to wgmma: after a barrier, as if written just now."""
    for at in range(len(space.state)):
        thread = at // space.size * space.sharers + (space.writer[at] & THREAD)
        if space.state[at] == WRITTEN and fencing[thread]:
            space.state[at], space.fenced[at] = VISIBLE, now[thread]


class Memory:
    """The global memory of one pretended device. Buffers lie at multiples of 256 with a gap behind each."""

    def __init__(self) -> None:
        data, stamps = np.zeros(0, u8), np.zeros(0, np.int64)
        self.space = Space(data, data, stamps, stamps, stamps, FIRST, 0, 1 << 40)
        self.launches = 0
        self._free: dict[int, list[int]] = {}  # size → places of buffers that nobody holds any more

    def upload(self, array: ArrayLike) -> "Buffer":
        """A copy of a contiguous array, every byte written. Raises ValueError if it is not contiguous."""
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            raise ValueError(f"array has strides {array.strides}; upload np.ascontiguousarray(array).")
        buffer = self.empty(array.nbytes)
        part = slice(buffer.start, buffer.start + array.nbytes)
        self.space.data[part], self.space.state[part] = array.reshape(-1).view(u8), WRITTEN
        return buffer

    def empty(self, nbytes: int) -> "Buffer":
        """`nbytes` yet to be written: to read one of them before stops a kernel, and `download`."""
        size = 1 << (nbytes + ALIGNMENT).bit_length()
        places = self._free.setdefault(size, [])
        if not places:
            places.append(self.space.size)
            grown: list[Any] = [np.pad(array, (0, size)) for array in self.space[:3]]
            data, state, writer = grown
            self.space = self.space._replace(data=data, state=state, writer=writer, size=len(data))
        start = places.pop()
        self.space.state[start : start + nbytes] = UNWRITTEN
        buffer = Buffer(self, start, nbytes)
        finalize(buffer, self._release, start, size).atexit = False
        return buffer

    def _release(self, start: int, size: int) -> None:
        self.space.state[start : start + size] = OUTSIDE
        self._free[size].append(start)


class Buffer:
    """Some bytes of a Memory, its own as long as this object lives."""

    def __init__(self, memory: Memory, start: int, nbytes: int) -> None:
        self.memory, self.start, self.nbytes, self.address = memory, start, nbytes, FIRST + start

    def download(self, dtype: Any, shape: int | tuple[int, ...]) -> NDArray[Any]:
        """The first bytes as an array. Raises ValueError if they are too few, or one was never written."""
        kind = np.dtype(dtype)
        needed = int(np.prod(shape)) * kind.itemsize
        if needed > self.nbytes:
            raise ValueError(f"{shape} of {kind} takes {needed} bytes and the buffer has {self.nbytes}.")
        part = slice(self.start, self.start + needed)
        unwritten = np.flatnonzero(self.memory.space.state[part] != WRITTEN)
        if len(unwritten):
            raise ValueError(
                f"{len(unwritten)} of {needed} bytes were never written, the first is byte {unwritten[0]} of "
                f"the buffer. A kernel that writes all of them must run first."
            )
        return self.memory.space.data[part].view(kind).reshape(shape).copy()
