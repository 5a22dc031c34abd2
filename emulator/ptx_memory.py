"""Memory under watch: what every byte holds, whether it was written, and who touched it since the last barrier."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .formats import u8
from .jit import helper, kernel

Bytes = NDArray[np.uint8]
Stamps = NDArray[np.int64]
Indices = NDArray[np.int64]

# State of a byte. What is not allocated cannot be touched; what a cp.async copies is in flight until its thread waits
OUTSIDE, UNWRITTEN, WRITTEN, IN_FLIGHT = u8(0), u8(1), u8(2), u8(3)
FINE, OUT_OF_BOUNDS, MISALIGNED, NEVER_WRITTEN, NOT_WAITED_FOR, RACE = range(6)  # what a check finds
FIRST, ALIGNMENT = 0x7F00_0000_0000, 256  # addresses of global memory
READ, WRITE, ATOMIC, COPY = range(4)


class Space(NamedTuple):
    """Memory of one kind: a region for each block (.shared) or thread (.local), or one for all (.global)."""

    data: Bytes
    state: Bytes
    writer: Stamps  # of each byte: the stamp of its last write. Length 0: nobody looks for races
    reader: Stamps  # the stamp of its reads since the last barrier. Length 0: only writes are compared
    first: int  # address of byte 0 of a region
    size: int  # bytes in a region
    sharers: int  # threads that share a region


def space(size: int, regions: int = 1, sharers: int = 1 << 40, first: int = 0, watched: bool = False) -> Space:
    size = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    stamps = (np.zeros(size * regions * watched, np.int64) for _ in range(2))
    data, state = (np.zeros(size * regions, u8) for _ in range(2))
    return Space(data, state, *stamps, first, size, sharers)


# A stamp says who and when: thread in the block (10 bits), flags (4), barriers its warp and its block have passed.
THREAD, WARP_BITS = 1023, 5
SEVERAL_THREADS, SEVERAL_WARPS, BY_ATOMIC = 1 << 10, 1 << 11, 1 << 12
WARP_SYNCS_AT, BARRIERS_AT = 14, 38
WARP_SYNCS = (1 << BARRIERS_AT - WARP_SYNCS_AT) - 1


def stamps(thread: Indices, warp_syncs: Indices, barriers: Indices) -> Stamps:
    return (barriers + 1) << BARRIERS_AT | warp_syncs << WARP_SYNCS_AT | thread


@helper
def unordered(old: int, now: int) -> bool:
    """Whether an access, or one of several, was by another thread and no barrier lies between it and now."""
    if old >> BARRIERS_AT != now >> BARRIERS_AT:
        return False
    if old & SEVERAL_WARPS or (old & THREAD) >> WARP_BITS != (now & THREAD) >> WARP_BITS:
        return True
    if (old >> WARP_SYNCS_AT) & WARP_SYNCS != (now >> WARP_SYNCS_AT) & WARP_SYNCS:
        return False
    return bool(old & SEVERAL_THREADS) or old & THREAD != now & THREAD


@helper
def joined(old: int, now: int) -> int:
    """One stamp for the accesses under `old` that still matter and one more."""
    if not unordered(old, now):
        return now
    if old & SEVERAL_WARPS or (old & THREAD) >> WARP_BITS != (now & THREAD) >> WARP_BITS:
        return now | SEVERAL_WARPS
    return now | SEVERAL_THREADS


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
def checked(space: Space, at: int, now: int, how: int, value: int) -> int:
    """What is wrong with one access to byte `at`; `value` is what it writes. A race leaves its stamp."""
    state = space.state[at]
    if state == OUTSIDE:
        return OUT_OF_BOUNDS
    if state == IN_FLIGHT:
        return NOT_WAITED_FOR
    if state == UNWRITTEN and (how == READ or how == ATOMIC):
        return NEVER_WRITTEN
    if len(space.reader) == 0:  # between blocks nothing but the end of the launch orders
        if len(space.writer) != 0 and how != READ:
            other, space.writer[at] = space.writer[at], (0 if how == ATOMIC else now)
            return RACE if how == WRITE and other != 0 and other != now and space.data[at] != value else FINE
        return FINE
    written, read = space.writer[at], space.reader[at]
    if how == READ:
        space.reader[at] = joined(read, now)
        return RACE if unordered(written, now) else FINE
    if unordered(read, now):
        return RACE
    if how == ATOMIC:
        plain_before = written >> WARP_SYNCS_AT == now >> WARP_SYNCS_AT and not written & BY_ATOMIC
        space.writer[at] = joined(written, now) | (0 if plain_before else BY_ATOMIC)
        return RACE if unordered(written, now) and not written & BY_ATOMIC else FINE
    space.writer[at] = now
    same = how == WRITE and state == WRITTEN and space.data[at] == value
    return RACE if unordered(written, now) and not same else FINE


@kernel
def load(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, out: Bytes, alignment: int
) -> tuple[int, int, int]:
    """Fill out (threads, width) from addresses; (finding, its thread, its byte)."""
    for i in range(len(threads)):
        finding, at = located(space, addresses[i], threads[i], out.shape[1], alignment)
        for b in range(out.shape[1]):
            if finding == FINE:
                finding = checked(space, at + b, now[threads[i]], READ, 0)
            if finding != FINE:
                return finding, i, b
            out[i, b] = space.data[at + b]
    return FINE, 0, 0


@kernel
def store(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int
) -> tuple[int, int, int]:
    for i in range(len(threads)):
        finding, at = located(space, addresses[i], threads[i], values.shape[1], alignment)
        for b in range(values.shape[1]):
            if finding == FINE:
                finding = checked(space, at + b, now[threads[i]], WRITE, values[i, b])
            if finding != FINE:
                return finding, i, b
            space.data[at + b], space.state[at + b] = values[i, b], WRITTEN
    return FINE, 0, 0


@kernel
def reserve(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, places: Indices, width: int
) -> tuple[int, int, int]:
    """Check what atomic operations will touch, and find the indices of their first bytes."""
    for i in range(len(threads)):
        finding, places[i] = located(space, addresses[i], threads[i], width, width)
        for b in range(width):
            if finding == FINE:
                finding = checked(space, places[i] + b, now[threads[i]], ATOMIC, 0)
            if finding != FINE:
                return finding, i, b
    return FINE, 0, 0


@kernel
def start_copies(
    space: Space, addresses: Indices, threads: Indices, now: Stamps, values: Bytes, alignment: int
) -> tuple[int, int, int]:
    """Bytes that cp.async will deliver: from here to `land` nobody may touch their places."""
    for i in range(len(threads)):
        finding, at = located(space, addresses[i], threads[i], values.shape[1], alignment)
        for b in range(values.shape[1]):
            if finding == FINE:
                finding = checked(space, at + b, now[threads[i]], COPY, 0)
            if finding != FINE:
                return finding, i, b
            space.data[at + b], space.state[at + b] = values[i, b], IN_FLIGHT
    return FINE, 0, 0


@kernel
def land(space: Space, addresses: Indices, threads: Indices, now: Stamps, width: int) -> None:
    """The copies are there, for their own threads; for others, after a barrier: as if written just now."""
    for i in range(len(threads)):
        at = located(space, addresses[i], threads[i], width, width)[1]
        for b in range(at, at + width):
            space.state[b], space.writer[b] = WRITTEN, now[threads[i]]


class Memory:
    """The global memory of one pretended device. Buffers lie at multiples of 256 with a gap behind each."""

    def __init__(self) -> None:
        self.space = space(1 << 16, first=FIRST)
        self.used = 0

    def begin_launch(self) -> None:
        """Forget who wrote what: between launches everything is ordered."""
        self.space = self.space._replace(writer=np.zeros(self.space.size, np.int64))

    def upload(self, array: ArrayLike) -> "Buffer":
        """A copy of a contiguous array, every byte of it written. Raises ValueError if it is not contiguous."""
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            raise ValueError(f"array has strides {array.strides}; upload np.ascontiguousarray(array).")
        buffer = self.empty(array.nbytes)
        part = slice(buffer.address - FIRST, buffer.address - FIRST + array.nbytes)
        self.space.data[part], self.space.state[part] = array.reshape(-1).view(u8), WRITTEN
        return buffer

    def empty(self, nbytes: int) -> "Buffer":
        """`nbytes` that are yet to be written: to read one before stops a kernel, and `download`."""
        start, self.used = self.used, self.used + (nbytes // ALIGNMENT + 2) * ALIGNMENT
        if self.used > self.space.size:
            grown = space(2 * self.used, first=FIRST)
            grown.data[: self.space.size], grown.state[: self.space.size] = self.space.data, self.space.state
            self.space = grown
        self.space.state[start : start + nbytes] = UNWRITTEN
        return Buffer(self, FIRST + start, nbytes)


class Buffer(NamedTuple):
    """Some bytes of a Memory."""

    memory: Memory
    address: int
    nbytes: int

    def download(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """The first bytes as an array. Raises ValueError if they do not suffice or one was never written."""
        needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if needed > self.nbytes:
            raise ValueError(f"shape {shape} of {np.dtype(dtype)} is {needed} bytes; the buffer has {self.nbytes}.")
        part = slice(self.address - FIRST, self.address - FIRST + needed)
        unwritten = np.flatnonzero(self.memory.space.state[part] != WRITTEN)
        if len(unwritten):
            raise ValueError(
                f"{len(unwritten)} of the {needed} bytes were never written, the first is byte {unwritten[0]} "
                f"of the buffer. A kernel that fills all of them must run first."
            )
        return self.memory.space.data[part].view(dtype).reshape(shape).copy()
