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
Found = tuple[int, int, int, int]  # finding, its index among the threads, its byte, stamp of another thread

# State of a byte. What a cp.async copies is in flight until the thread that issued it waits. What was written
# is visible to wgmma after a fence.proxy.async, and multiplied until the warpgroup waits.
OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT = u8(0), u8(1), u8(2), u8(3)
VISIBLE, MULTIPLIED = u8(4), u8(5)
# Findings
FINE, OUT_OF_BOUNDS, MISALIGNED, NEVER_WRITTEN, NOT_WAITED_FOR, WAS_WRITTEN, WAS_READ = range(7)
NOT_FENCED, STILL_MULTIPLIED = 7, 8
# Accesses; the write of an atomic operation; what cp.async delivers; what a wgmma reads
READ, WRITE, ATOMIC, COPY, MULTIPLY = range(5)
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


def global_space(size: int) -> Space:
    data, state, writer = np.zeros(size, u8), np.zeros(size, u8), np.zeros(size, np.int64)
    return Space(data, state, writer, writer[:0], writer[:0], FIRST, size, 1 << 40)


def shared_space(size: int, blocks: int, threads: int) -> Space:
    """Of blocks of so many threads."""
    filled = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    data, state = (np.zeros(filled * blocks, u8) for _ in range(2))
    writer, reader, fenced = (np.zeros(filled * blocks, np.int64) for _ in range(3))
    return Space(data, state, writer, reader, fenced, 0, filled, threads)


# A stamp says who and when: thread in the block, flags, barriers that its warp and its block have passed. In
# global memory, where blocks are compared, number of the block and of the launch.
THREAD, WARP_BITS = 1023, 5
SEVERAL_THREADS, SEVERAL_WARPS = 1 << 10, 1 << 11
WARP_SYNCS_AT, BARRIERS_AT = 12, 38
LAUNCH_AT, BLOCK = 40, (1 << 40) - 1


def stamps(thread: Indices, warp_syncs: Indices, barriers: Indices) -> Stamps:
    return (barriers + 1) << BARRIERS_AT | warp_syncs << WARP_SYNCS_AT | thread


@helper
def one_warp(old: int, now: int) -> bool:
    return (old & THREAD) >> WARP_BITS == (now & THREAD) >> WARP_BITS


@helper
def unordered(old: int, now: int) -> bool:
    """Whether `old`, or an access joined to it, is another thread's with no barrier before `now`."""
    if old >> BARRIERS_AT != now >> BARRIERS_AT:
        return False
    if (old | now) & SEVERAL_WARPS or not one_warp(old, now):
        return True
    if old >> WARP_SYNCS_AT != now >> WARP_SYNCS_AT:
        return False
    return bool(old & SEVERAL_THREADS) or old & THREAD != now & THREAD


@helper
def joined(old: int, now: int) -> int:
    """One stamp for the accesses under `old` that still matter, and one more."""
    if not unordered(old, now):
        return now
    return old | (SEVERAL_THREADS if one_warp(old, now) else SEVERAL_WARPS)


@helper
def checked(space: Space, at: int, now: int, how: int, value: int) -> tuple[int, int]:
    """(what is wrong with an access to byte `at`, stamp of the other thread); `value` is what it writes.
    Writes of the same value do not race."""
    state, written = space.state[at], space.writer[at]
    if state == OUTSIDE:
        return OUT_OF_BOUNDS, 0
    if state == IN_FLIGHT:
        return NOT_WAITED_FOR, 0
    if state == UNWRITTEN and how == READ:
        return NEVER_WRITTEN, 0
    if state == MULTIPLIED and how != READ:
        return STILL_MULTIPLIED, 0
    differs = how != WRITE or state == UNWRITTEN or space.data[at] != value
    if len(space.reader) == 0:  # two blocks must not write different bytes, except by atomic operations
        if how == READ:
            return FINE, 0
        space.writer[at] = 0 if how == ATOMIC else now
        raced = written >> LAUNCH_AT == now >> LAUNCH_AT and written != now and how == WRITE and differs
        return (WAS_WRITTEN if raced else FINE), written
    read = space.reader[at]
    if how == READ:
        space.reader[at] = joined(read, now)
        return (WAS_WRITTEN if unordered(written, now) else FINE), written
    if unordered(read, now):
        return WAS_READ, read
    space.writer[at] = joined(written, now)
    return (WAS_WRITTEN if unordered(written, now) and differs else FINE), written


@kernel
def access(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int, how: int
) -> Found:
    """Fill values, (threads, bytes), from addresses if `how` is READ; else put them there."""
    for i in range(len(threads)):
        offset = addresses[i] - space.first
        if offset < 0 or offset > space.size - values.shape[1]:
            return OUT_OF_BOUNDS, i, 0, 0
        if addresses[i] % alignment != 0:
            return MISALIGNED, i, 0, 0
        at = threads[i] // space.sharers * space.size + offset
        for b in range(values.shape[1]):
            finding, other = checked(space, at + b, now[threads[i]], how, values[i, b])
            if finding != FINE:
                return finding, i, b, other
            if how == READ:
                values[i, b] = space.data[at + b]
            else:
                space.data[at + b] = values[i, b]
                space.state[at + b] = IN_FLIGHT if how == COPY else WRITTEN
    return FINE, 0, 0, 0


@kernel
def land(space: Space, addresses: Indices, threads: Indices, now: Stamps, width: int) -> None:
    """The copies have arrived for their own threads; for others after a barrier, as if written just now."""
    for i in range(len(threads)):
        at = threads[i] // space.sharers * space.size + addresses[i]
        space.state[at : at + width], space.writer[at : at + width] = WRITTEN, now[threads[i]]


@kernel
def fence(space: Space, fencing: NDArray[np.bool_], now: Stamps) -> None:
    """What these threads wrote is visible to wgmma: after a barrier, as if written just now."""
    for at in range(len(space.state)):
        if space.state[at] == WRITTEN:
            thread = at // space.size * space.sharers + (space.writer[at] & THREAD)
            if fencing[thread]:
                space.state[at], space.fenced[at] = VISIBLE, now[thread]


@kernel
def multiply(space: Space, addresses: Indices, threads: Indices, now: Stamps, width: int) -> Found:
    """A wgmma begins to read, or still reads, what `access` has read for it."""
    for i in range(len(threads)):
        first = threads[i] // space.sharers * space.size + addresses[i]
        for at in range(first, first + width):
            if space.state[at] == WRITTEN or unordered(space.fenced[at], now[threads[i]]):
                return NOT_FENCED, i, at - first, space.writer[at]
            space.state[at] = MULTIPLIED
    return FINE, 0, 0, 0


@kernel
def multiplied(space: Space, addresses: Indices, threads: Indices, now: Stamps, width: int) -> None:
    """A wgmma has been waited for: as if its warpgroup read just now."""
    for i in range(len(threads)):
        first = threads[i] // space.sharers * space.size + addresses[i]
        for at in range(first, first + width):
            space.state[at] = VISIBLE
            space.reader[at] = joined(space.reader[at], now[threads[i]])


class Memory:
    """The global memory of one pretended device. Buffers lie at multiples of 256 with a gap behind each."""

    def __init__(self) -> None:
        self.space = global_space(1 << 16)
        self.launches = 0
        self._used = 0
        self._free: dict[int, list[int]] = {}  # size → places of buffers that nobody holds any more

    def upload(self, array: ArrayLike) -> "Buffer":
        """A copy of a contiguous array, every byte written. Raises ValueError if it is not contiguous."""
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            raise ValueError(f"array has strides {array.strides}; upload np.ascontiguousarray(array).")
        buffer = self.empty(array.nbytes)
        part = slice(buffer.address - FIRST, buffer.address - FIRST + array.nbytes)
        self.space.data[part], self.space.state[part] = array.reshape(-1).view(u8), WRITTEN
        return buffer

    def empty(self, nbytes: int) -> "Buffer":
        """`nbytes` yet to be written: to read one of them before stops a kernel, and `download`."""
        size = 1 << (nbytes + ALIGNMENT).bit_length()
        places = self._free.setdefault(size, [])
        if not places:
            self._grow(size)
        start = places.pop()
        self.space.state[start : start + nbytes] = UNWRITTEN
        buffer = Buffer(self, FIRST + start, nbytes)
        finalize(buffer, self._release, start, size).atexit = False
        return buffer

    def _grow(self, size: int) -> None:
        self._free[size].append(self._used)
        self._used += size
        if self._used > self.space.size:
            grown, had = global_space(2 * self._used), self.space.size
            grown.data[:had], grown.state[:had] = self.space.data, self.space.state
            grown.writer[:had] = self.space.writer
            self.space = grown

    def _release(self, start: int, size: int) -> None:
        self.space.state[start : start + size] = OUTSIDE
        self._free[size].append(start)


class Buffer:
    """Some bytes of a Memory, its own as long as this object lives."""

    def __init__(self, memory: Memory, address: int, nbytes: int) -> None:
        self.memory, self.address, self.nbytes = memory, address, nbytes

    def download(self, dtype: Any, shape: int | tuple[int, ...]) -> NDArray[Any]:
        """The first bytes as an array. Raises ValueError if they are too few, or one was never written."""
        needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if needed > self.nbytes:
            raise ValueError(
                f"shape {shape} of {np.dtype(dtype)} takes {needed} bytes and the buffer has {self.nbytes}."
            )
        part = slice(self.address - FIRST, self.address - FIRST + needed)
        unwritten = np.flatnonzero(self.memory.space.state[part] != WRITTEN)
        if len(unwritten):
            raise ValueError(
                f"{len(unwritten)} of {needed} bytes were never written, the first is byte {unwritten[0]} of "
                f"the buffer. A kernel that writes all of them must run first."
            )
        return self.memory.space.data[part].view(dtype).reshape(shape).copy()
