"""An interpreter of PTX: runs what NVRTC makes of a CUDA kernel on any CPU, and stops it where it is wrong.

    memory = Memory()
    x, y = memory.upload(np.ones(64, np.float32)), memory.empty(256)
    Module(ptx_text).launch("double_it", (1, 1, 1), (64, 1, 1), [x, y, np.int32(64)], memory)
    y.download(np.float32, 64)

ptx_text.py reads the text (kernels, statements, registers), each statement becomes one function in
ptx_instructions.py (and ptx_arithmetic.py, where it computes a result from operands only), threads run in
ptx_machine.py, and ptx_memory.py watches every byte. Conversions and tensor cores are those of the emulator.
What stops a kernel is a PtxError: Unsupported, BadAccess, Uninitialized, Race or Divergence.

Not modelled: barriers for a part of a block or warp (refused); races in global memory, except different bytes
written by two blocks; reads of registers that nothing was written to; order among atomic operations, which is
that of the threads; mma with halves on other GPUs than Hopper, whose sums have other bits.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from .formats import u8
from .ptx_arithmetic import bits_in_type, u64
from .ptx_instructions import decode
from .ptx_machine import WARP, BadAccess, Batch, Dim, Divergence, Launch, Race, Uninitialized
from .ptx_memory import Buffer, Memory
from .ptx_text import Kernel, PtxError, Text, Unsupported, initial_values

__all__ = [
    "BadAccess",
    "Buffer",
    "Divergence",
    "Memory",
    "Module",
    "PtxError",
    "Race",
    "Uninitialized",
    "Unsupported",
]

MOST_BLOCKS, MOST_THREADS = (2**31 - 1, 2**16 - 1, 2**16 - 1), (1024, 1024, 64)
THREADS_AT_ONCE = 4096  # so many, or one block, share the cost of a step


class Module:
    """The kernels of one PTX text."""

    def __init__(self, ptx_text: str) -> None:
        """Raises Unsupported where the text is not understood; opcodes are looked at by `launch`."""
        self._text = Text(ptx_text)

    def launch(
        self,
        kernel: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Buffer | np.generic],
        memory: Memory,
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end, on `memory`; `shared_bytes` is the length of extern shared arrays.

        In args a Buffer is passed as its address, a NumPy scalar by value. Raises a PtxError where the kernel
        is wrong or not understood; ValueError for a kernel that is not there, a grid or block that CUDA does
        not launch, and arguments that do not fit the parameters.
        """
        if kernel not in self._text.kernels:
            raise ValueError(f"kernel={kernel!r} is not here; the module has {sorted(self._text.kernels)}.")
        entry = self._text.kernels[kernel]
        too_many = [size > most for size, most in zip((*grid, *block), MOST_BLOCKS + MOST_THREADS)]
        if min(*grid, *block) < 1 or any(too_many) or prod(block) > entry.most_threads:
            raise ValueError(
                f"grid={grid}, block={block}: a grid is {MOST_BLOCKS} at most, a block of {kernel} "
                f"{MOST_THREADS} and {entry.most_threads} threads in all; none may be below 1."
            )
        entry.code = entry.code or [decode(entry, statement) for statement in entry.statements]
        launch = Launch(
            entry, grid, block, packed(entry, args), self._addresses(entry, memory), memory, shared_bytes
        )
        memory.launches += 1
        blocks, at_once = np.arange(prod(grid)), max(1, THREADS_AT_ONCE // (-(-prod(block) // WARP) * WARP))
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), at_once):
                Batch(launch, blocks[first : first + at_once]).run()

    def _addresses(self, kernel: Kernel, memory: Memory) -> dict[str, int]:
        """Of the variables that the kernel can name. Those outside kernels are put in memory once."""
        addresses = {name: address for name, (_, address, _) in kernel.symbols.items()}
        for variable in self._text.variables:
            if variable.space != "shared":
                key = self._text, variable.name
                if key not in memory.variables:
                    memory.variables[key] = memory.upload(initial_values(variable))
                addresses[variable.name] = memory.variables[key].address
            elif variable.dynamic:
                addresses[variable.name] = kernel.dynamic_from
        return addresses


def packed(kernel: Kernel, args: Sequence[Buffer | np.generic]) -> NDArray[np.uint8]:
    """The bytes of the parameters."""
    if len(args) != len(kernel.parameters):
        raise ValueError(f"args has {len(args)} entries; {kernel.name} takes {len(kernel.parameters)}.")
    parameters = np.zeros(kernel.sizes["param"], u8)
    for i, (argument, (kind, place)) in enumerate(zip(args, kernel.parameters)):
        value = u64(argument.address) if isinstance(argument, Buffer) else argument
        if not isinstance(value, np.generic) or value.itemsize * 8 != bits_in_type(kind):
            raise ValueError(
                f"args[{i}]={argument!r} does not fit .{kind} of {kernel.name}: pass a Buffer for a pointer "
                f"and a NumPy scalar of {bits_in_type(kind)} bits for a number."
            )
        parameters[place : place + value.itemsize] = np.frombuffer(value.tobytes(), u8)
    return parameters
