"""Where kernels run: on a GPU through CuPy, or on any CPU as the PTX of the same compilation, interpreted."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import load

ITEMSIZE = {"uint8": 1, "uint16": 2, "float16": 2, "bfloat16": 2, "uint32": 4, "float32": 4}
Dim = tuple[int, int, int]
WORDS = 4096  # that are cleared at once: one launch for so many calls


@dataclass(frozen=True, eq=False)
class Array:
    """A contiguous array in a device's memory. `owner` keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any


class Device(Protocol):
    """What the launchers need. One value of `arch` for each kind of machine code: 80, 90a, 120a, …"""

    arch: str
    shared_bytes: int  # the most dynamic shared memory of a block

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        """A copy of a NumPy array; `dtype` is what its bits mean."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array: ...

    def word(self) -> Array:
        """(1,) uint32, zero until a kernel writes to it."""

    def download(self, array: Array) -> NDArray[Any]:
        """A NumPy copy, bfloat16 as uint16, once everything launched before is done."""

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Start a kernel of `cuda/{source}.cu`. An argument is an Array, passed as its address, or a NumPy
        scalar, passed by value."""


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


class Cuda:
    """CuPy's current GPU, on CuPy's current stream. Raises ImportError with the reason if there is none."""

    def __init__(self) -> None:
        self.arch = load.current_arch()
        import cupy

        self._cupy = cupy
        self.shared_bytes = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        self._words: dict[tuple[int, int], tuple[Array, int]] = {}  # that are zero, and how many are taken

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        return self._array(self._cupy.asarray(array), array.shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._array(self._cupy.empty(shape, numpy_dtype(dtype)), shape, dtype)

    def word(self) -> Array:
        """One of many, cleared at once on this stream: clearing one takes as long as quantizing a row.

        Threads share none: two may come at once, and the default streams of several may have one address.
        """
        stream = self._stream()
        if stream.is_capturing():  # a graph clears its words whenever it runs
            return self.zeros((1,), "uint32")
        users = get_ident(), stream.ptr
        words, taken = self._words.get(users, (None, WORDS))
        if words is None or taken == WORDS:
            words, taken = self.zeros((WORDS,), "uint32"), 0
        self._words[users] = words, taken + 1
        address = words.address + taken * ITEMSIZE["uint32"]
        return Array(address, (1,), "uint32", words.owner[taken : taken + 1])

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._array(self._cupy.zeros(shape, numpy_dtype(dtype)), shape, dtype)

    def download(self, array: Array) -> NDArray[Any]:
        found: NDArray[Any] = self._cupy.asnumpy(array.owner)
        return found

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        function = self._functions.get(kernel) or self._load(source, kernel)
        values = tuple(np.uint64(arg.address) if isinstance(arg, Array) else arg for arg in args)
        function(grid, (block, 1, 1), values, shared_mem=shared_bytes, stream=self._stream())

    def _stream(self) -> Any:
        return self._cupy.cuda.get_current_stream()

    def _load(self, source: str, kernel: str) -> Any:
        """The kernel, allowed to take as much dynamic shared memory as the GPU has."""
        driver, made = self._cupy.cuda.driver, load.compiled(source, self.arch)
        if source not in self._modules:
            self._cupy.cuda.runtime.free(0)  # makes the context that a module is loaded into
            self._modules[source] = self._cupy.cuda.function.Module()
            self._modules[source].load(made.cubin)
        function = self._modules[source].get_function(kernel)
        static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function.ptr)
        most = self.shared_bytes - static
        driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
        self._functions[kernel] = function
        return function

    def _array(self, owner: Any, shape: tuple[int, ...], dtype: str) -> Array:
        return Array(owner.data.ptr, tuple(shape), dtype, owner)


class CudaTorch(Cuda):
    """The same with torch: memory from its allocator, torch's current stream."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        self._torch = torch

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        held = self._torch.from_numpy(np.ascontiguousarray(array)).cuda()
        return Array(held.data_ptr(), array.shape, dtype, held)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        held = self._torch.empty(shape, dtype=getattr(self._torch, dtype), device="cuda")
        return Array(held.data_ptr(), shape, dtype, held)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        held = self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device="cuda")
        return Array(held.data_ptr(), shape, dtype, held)

    def download(self, array: Array) -> NDArray[Any]:
        found: NDArray[Any] = array.owner.cpu().numpy()
        return found

    def _stream(self) -> Any:
        return self._cupy.cuda.Stream.from_external(self._torch.cuda.current_stream())


# Most shared memory of a block: CUDA programming guide, technical specifications per compute capability
SHARED_KIB = {"80": 163, "86": 99, "89": 99, "90a": 227, "100a": 227, "103a": 227, "120a": 99, "121a": 99}


class Interpreted:
    """No GPU at all: emulator.ptx runs the PTX, and stops at what a sanitizer would report."""

    def __init__(self, arch: str) -> None:
        from emulator import ptx

        self.arch, self.shared_bytes = arch, SHARED_KIB[arch] * 1024
        self._ptx, self._memory = ptx, ptx.Memory()
        self._modules: dict[str, Any] = {}

    def upload(self, array: NDArray[Any], dtype: str) -> Array:
        bits = np.ascontiguousarray(array)
        return self._array(self._memory.upload(bits), array.shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._array(self._memory.empty(prod(shape) * ITEMSIZE[dtype]), shape, dtype)

    def word(self) -> Array:
        return self.upload(np.zeros(1, np.uint32), "uint32")

    def download(self, array: Array) -> NDArray[Any]:
        found: NDArray[Any] = array.owner.download(numpy_dtype(array.dtype), array.shape)
        return found

    def launch(
        self, source: str, kernel: str, grid: Dim, block: int, args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        if source not in self._modules:
            self._modules[source] = self._ptx.Module(self.ptx_of(source))
        values = [arg.owner if isinstance(arg, Array) else arg for arg in args]
        self._modules[source].launch(kernel, grid, (block, 1, 1), values, self._memory, shared_bytes)

    def ptx_of(self, source: str) -> str:
        return load.compiled(source, self.arch).ptx

    def _array(self, owner: Any, shape: tuple[int, ...], dtype: str) -> Array:
        return Array(owner.address, tuple(shape), dtype, owner)


class Changed(Interpreted):
    """The same on other sources, {file name: text}; what is compiled of them is kept in `folder`."""

    def __init__(self, arch: str, sources: dict[str, str], folder: Path) -> None:
        super().__init__(arch)
        self._sources, self._folder = sources, folder

    def ptx_of(self, source: str) -> str:
        return load.compile_text(source, self._sources, self.arch, self._folder).ptx
