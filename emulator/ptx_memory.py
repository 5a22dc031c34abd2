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

# State of a byte. What a cp.async copies is in flight until the thread that issued it waits.
OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT = u8(0), u8(1), u8(2), u8(3)
FINE, OUT_OF_BOUNDS, MISALIGNED, NEVER_WRITTEN, NOT_WAITED_FOR, WAS_WRITTEN, WAS_READ = range(7)  # findings
READ, WRITE, ATOMIC, COPY = range(4)  # accesses
FIRST, ALIGNMENT = 0x7F00_0000_0000, 256  # of addresses in global memory


class Space(NamedTuple):
    """Memory of one kind: a region for each block (.shared) or thread (.local), or one for all (.global)."""

    data: Bytes
    state: Bytes
    writer: Stamps  # of each byte, the stamp of its last write. Length 0: nobody looks for races
    reader: Stamps  # the stamp of its reads since the last barrier. Length 0: only writes are compared
    first: int  # address of byte 0 of a region
    size: int  # bytes in a region
    sharers: int  # threads that share a region


def filled(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def global_space(size: int) -> Space:
    data, state, writer = np.zeros(size, u8), np.zeros(size, u8), np.zeros(size, np.int64)
    return Space(data, state, writer, writer[:0], FIRST, size, 1 << 40)


def local_space(size: int, threads: int) -> Space:
    data, state = (np.zeros(filled(size) * threads, u8) for _ in range(2))
    nothing = np.zeros(0, np.int64)
    return Space(data, state, nothing, nothing, 0, filled(size), 1)


def shared_space(size: int, blocks: int, threads: int, old: Space | None) -> Space:
    """Of blocks of so many threads. The arrays of one that nobody needs any more are taken if they fit: the
    system is slow to give new memory."""
    if old is None or len(old.data) != filled(size) * blocks:
        data, state = (np.zeros(filled(size) * blocks, u8) for _ in range(2))
        writer, reader = (np.zeros(len(data), np.int64) for _ in range(2))
        return Space(data, state, writer, reader, 0, filled(size), threads)
    for array in (old.state, old.writer, old.reader):
        array[:] = 0
    return old._replace(size=filled(size), sharers=threads)


# A stamp says who and when: thread in the block, flags, barriers that its warp and its block have passed. In
# global memory, where blocks are compared, number of the block and of the launch.
THREAD, WARP_BITS = 1023, 5
SEVERAL_THREADS, SEVERAL_WARPS, BY_ATOMIC, BY_STORE = 1 << 10, 1 << 11, 1 << 12, 1 << 13
WARP_SYNCS_AT, BARRIERS_AT = 14, 38
WARP_SYNCS = (1 << BARRIERS_AT - WARP_SYNCS_AT) - 1


LAUNCH_AT, BLOCK = 40, (1 << 40) - 1


def stamps(thread: Indices, warp_syncs: Indices, barriers: Indices) -> Stamps:
    return (barriers + 1) << BARRIERS_AT | warp_syncs << WARP_SYNCS_AT | thread


@helper
def unordered(old: int, now: int) -> bool:
    """Whether `old`, or an access joined to it, is another thread's with no barrier before `now`."""
    if old >> BARRIERS_AT != now >> BARRIERS_AT:
        return False
    if old & SEVERAL_WARPS or (old & THREAD) >> WARP_BITS != (now & THREAD) >> WARP_BITS:
        return True
    if (old >> WARP_SYNCS_AT) & WARP_SYNCS != (now >> WARP_SYNCS_AT) & WARP_SYNCS:
        return False
    return bool(old & SEVERAL_THREADS) or old & THREAD != now & THREAD


@helper
def joined(old: int, now: int) -> int:
    """One stamp for the accesses under `old` that still matter, and one more."""
    if not unordered(old, now):
        return now
    if (old & THREAD) >> WARP_BITS != (now & THREAD) >> WARP_BITS:
        return old | SEVERAL_WARPS
    return old | SEVERAL_THREADS


@helper
def located(space: Space, address: int, thread: int, width: int, alignment: int) -> tuple[int, int]:
    """(finding, index of the first byte) of `width` bytes."""
    offset = address - space.first
    if offset < 0 or offset > space.size - width:
        return OUT_OF_BOUNDS, 0
    if address % alignment != 0:
        return MISALIGNED, 0
    return FINE, thread // space.sharers * space.size + offset


@helper
def checked(space: Space, at: int, now: int, how: int, value: int) -> tuple[int, int]:
    """(what is wrong with an access to byte `at`, stamp of the other thread); `value` is what it writes."""
    state = space.state[at]
    if state == OUTSIDE:
        return OUT_OF_BOUNDS, 0
    if state == IN_FLIGHT:
        return NOT_WAITED_FOR, 0
    if state == UNWRITTEN and how in (READ, ATOMIC):
        return NEVER_WRITTEN, 0
    same = how == WRITE and state == WRITTEN and space.data[at] == value
    if len(space.reader) == 0:
        return compared_with_blocks(space, at, now, how, same)
    written, read = space.writer[at], space.reader[at]
    if how == READ:
        space.reader[at] = joined(read, now)
        return (WAS_WRITTEN if unordered(written, now) else FINE), written
    if unordered(read, now):
        return WAS_READ, read
    kind = BY_ATOMIC if how == ATOMIC else BY_STORE
    if written >> WARP_SYNCS_AT == now >> WARP_SYNCS_AT:
        kind |= written & (BY_ATOMIC | BY_STORE)
    space.writer[at] = joined(written, now) | kind
    allowed = written & BY_STORE == 0 if how == ATOMIC else same and written & BY_ATOMIC == 0
    return (WAS_WRITTEN if unordered(written, now) and not allowed else FINE), written


@helper
def compared_with_blocks(space: Space, at: int, now: int, how: int, same: bool) -> tuple[int, int]:
    """Two blocks must not write different bytes to one place, except by atomic operations."""
    if len(space.writer) == 0 or how == READ:
        return FINE, 0
    before, space.writer[at] = space.writer[at], (0 if how == ATOMIC else now)
    raced = before >> LAUNCH_AT == now >> LAUNCH_AT and before != now and how == WRITE and not same
    return (WAS_WRITTEN if raced else FINE), before


@kernel
def load(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int
) -> Found:
    """Fill values, (threads, bytes), from addresses."""
    for i in range(len(threads)):
        finding, at = located(space, addresses[i], threads[i], values.shape[1], alignment)
        other = 0
        for b in range(values.shape[1]):
            if finding == FINE:
                finding, other = checked(space, at + b, now[threads[i]], READ, 0)
            if finding != FINE:
                return finding, i, b, other
            values[i, b] = space.data[at + b]
    return FINE, 0, 0, 0


@kernel
def store(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int
) -> Found:
    return _put(space, addresses, threads, now, values, alignment, WRITE, WRITTEN)


@kernel
def start_copies(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int
) -> Found:
    """What cp.async will deliver: from here until `land` nobody may touch these bytes."""
    return _put(space, addresses, threads, now, values, alignment, COPY, IN_FLIGHT)


@helper
def _put(
    space: Space,
    addresses: Indices,
    threads: Indices,
    now: Stamps,
    values: Bytes,
    alignment: int,
    how: int,
    state: u8,
) -> Found:
    for i in range(len(threads)):
        finding, at = located(space, addresses[i], threads[i], values.shape[1], alignment)
        other = 0
        for b in range(values.shape[1]):
            if finding == FINE:
                finding, other = checked(space, at + b, now[threads[i]], how, values[i, b])
            if finding != FINE:
                return finding, i, b, other
            space.data[at + b], space.state[at + b] = values[i, b], state
    return FINE, 0, 0, 0


@kernel
def land(space: Space, addresses: Indices, threads: Indices, now: Stamps, width: int) -> None:
    """The copies have arrived for their own threads; for others after a barrier, as if written just now."""
    for i in range(len(threads)):
        at = located(space, addresses[i], threads[i], width, width)[1]
        for b in range(at, at + width):
            space.state[b], space.writer[b] = WRITTEN, now[threads[i]] | BY_STORE


@kernel
def reserve(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, places: Indices, width: int
) -> Found:
    """Check what atomic operations will touch; places are the indices of the first bytes."""
    for i in range(len(threads)):
        finding, places[i] = located(space, addresses[i], threads[i], width, width)
        other = 0
        for b in range(width):
            if finding == FINE:
                finding, other = checked(space, places[i] + b, now[threads[i]], ATOMIC, 0)
            if finding != FINE:
                return finding, i, b, other
    return FINE, 0, 0, 0


class Memory:
    """The global memory of one pretended device. Buffers lie at multiples of 256 with a gap behind each."""

    def __init__(self) -> None:
        self.space = global_space(1 << 16)
        self.shared: Space | None = None  # of the last launch
        self.launches = 0
        self.variables: dict[tuple[Any, str], Buffer] = {}  # of modules
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
