"""Memory under watch: races by their definition, and what a launch must not take over from the one before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import compiled

from emulator import ptx_memory as watch
from emulator.ptx import BadAccess, Memory, Race, Uninitialized

THREADS = [0, 1, 2, 32, 33, 64]
accesses = st.tuples(st.sampled_from(["read", "write"]), st.sampled_from(THREADS), st.integers(0, 2))
orders = st.sampled_from([("barrier", 0, 0), ("warp barrier", 0, 0), ("warp barrier", 32, 0)])


def race_with(history, kind, thread, value, data):
    """Whether an access to a byte that holds `data` races with one in its history: one of two is a write, no
    barrier of the block lies in between, and none of the warp if it is one warp. Two writes of one value do
    not race."""
    since = max((i for i, (what, _, _) in enumerate(history) if what == "barrier"), default=-1) + 1
    for i, (other, who, _) in enumerate(history[since:], since):
        if other == "warp barrier" or who == thread or "read" == kind == other:
            continue
        later = [t for what, t, _ in history[i:] if what == "warp barrier"]
        if who // 32 == thread // 32 and any(t // 32 == thread // 32 for t in later):
            continue
        if (kind, other) == ("write", "write") and value == data:
            continue
        return True
    return False


@given(st.lists(st.one_of(accesses, accesses, orders), min_size=20, max_size=40))
def test_races_by_their_definition(history):
    """One byte; what races is taken back."""
    space = watch.shared_space(256, 1, 96)
    space.state[:], data, passed, seen = watch.WRITTEN, 0, [0, 0, 0, 0], []
    for kind, thread, value in history:
        if kind == "barrier":
            passed[3], seen = passed[3] + 1, []
        elif kind == "warp barrier":
            passed[thread // 32] += 1
        else:
            now = np.zeros(96, np.int64)
            now[thread] = watch.stamps(np.int64(thread), np.int64(passed[thread // 32]), np.int64(passed[3]))
            before = [array[0] for array in space[:4]]
            at, who, values = np.zeros(1, np.int64), np.array([thread]), np.full((1, 1), value, np.uint8)
            how = watch.READ if kind == "read" else watch.WRITE
            found = watch.access(space, at, who, now, values, 1, how)[0]
            raced = race_with(seen, kind, thread, value, data)
            assert (found in (watch.WAS_READ, watch.WAS_WRITTEN)) == raced, (seen, kind, thread, value)
            if raced or found != watch.FINE:  # as if it had not been
                for array, byte in zip(space[:4], before):
                    array[0] = byte
                continue
            data = value if kind == "write" else data
        seen.append((kind, thread, value))


def test_a_launch_takes_nothing_over():
    """Neither bytes of shared memory nor who touched them, nor which block wrote global memory."""
    source = """
    #define KERNEL extern "C" __global__ void
    KERNEL forward(int *y) { __shared__ volatile int s[64]; int i = threadIdx.x; s[i] = i; y[i] = s[i]; }
    KERNEL backward(int *y) { __shared__ volatile int s[64]; int i = 63 - threadIdx.x; s[i] = y[i] = 7; }
    KERNEL reader(int *y) { __shared__ volatile int s[64]; y[threadIdx.x] = s[threadIdx.x]; }
    KERNEL of_block(int *y, int block) { if (blockIdx.x == block) y[threadIdx.x] = block; }
    """
    module, memory = compiled(source), Memory()
    y = memory.empty(256)
    module.launch("forward", (1, 1, 1), (64, 1, 1), [y], memory)
    module.launch("backward", (1, 1, 1), (64, 1, 1), [y], memory)
    with pytest.raises(Uninitialized, match="shared memory at 0x0, but byte 0 of it was never written"):
        module.launch("reader", (1, 1, 1), (64, 1, 1), [y], memory)
    for block in range(2):
        module.launch("of_block", (2, 1, 1), (64, 1, 1), [y, np.int32(block)], memory)
    assert set(y.download(np.int32, 64)) == {1}


def test_a_buffer_that_was_given_back_is_out_of_bounds():
    module, memory = compiled('extern "C" __global__ void k(int *y) { *y = 1; }'), Memory()
    buffer = memory.empty(4)
    address = np.uint64(buffer.address)
    module.launch("k", (1, 1, 1), (1, 1, 1), [address], memory)
    del buffer
    with pytest.raises(BadAccess, match="out of bounds"):
        module.launch("k", (1, 1, 1), (1, 1, 1), [address], memory)


def test_atomic_operations_of_blocks_and_what_they_need():
    source = """
    extern "C" __global__ void k(unsigned *y) { if (blockIdx.x < 2) atomicMax(y, 3u); else *y = 5; }
    """
    module, memory = compiled(source), Memory()
    y = memory.upload(np.zeros(1, np.uint32))
    module.launch("k", (3, 1, 1), (32, 1, 1), [y], memory)  # the last block may reset what others count
    with pytest.raises(Uninitialized, match=r"reads 4 bytes .* never written"):
        module.launch("k", (1, 1, 1), (32, 1, 1), [memory.empty(4)], memory)


def test_blocks_that_part_at_a_barrier():
    """Each block goes round another number of times; a race in one of them is still found."""
    source = """
    extern "C" __global__ void k(int *y, int race) {
        __shared__ int s[64];
        int i = threadIdx.x, sum = 0;
        for (int j = 0; j <= blockIdx.x; j++) {
            s[i] = i;
            __syncthreads();
            sum += s[63 - i];
            if (!race) __syncthreads();
        }
        y[blockIdx.x * 64 + i] = sum;
    }"""
    memory, module = Memory(), compiled(source)
    y = memory.empty(4 * 256)
    module.launch("k", (4, 1, 1), (64, 1, 1), [y, np.int32(0)], memory)
    expected = [[(b + 1) * (63 - i) for i in range(64)] for b in range(4)]
    np.testing.assert_array_equal(y.download(np.int32, (4, 64)), expected)
    with pytest.raises(Race, match=r"of block \([123], 0, 0\)"):
        module.launch("k", (4, 1, 1), (64, 1, 1), [y, np.int32(1)], memory)
