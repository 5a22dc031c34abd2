"""An interpreter of PTX: runs what NVRTC makes of a CUDA kernel on any CPU, and stops it where it is wrong.

    memory = Memory()
    x, y = memory.upload(np.ones(64, np.float32)), memory.empty(256)
    Module(ptx_text).launch("double_it", (1, 1, 1), (64, 1, 1), [x, y, np.int32(64)], memory)
    y.download(np.float32, 64)

The text is read here: kernels, statements, registers. Each statement becomes a function of a batch of threads
(ptx_instructions.py), threads run in ptx_machine.py, and ptx_memory.py watches every byte. Conversions and
tensor cores are those of the emulator. What stops a kernel is a PtxError: Unsupported, BadAccess,
Uninitialized, Race or Divergence.

Not modelled, so refused: every opcode that NVRTC does not emit for gpu/cuda, such as double precision, local
and constant memory, generic addresses; barriers and warp instructions for a part of a block or warp; scales
of an NVFP4 MMA in other lanes than those of thread 0; wgmma on other operands than halves in shared memory
with 128-byte swizzling. Not noticed: races in global memory, except different bytes written by two blocks;
reads of registers that nothing was written to; a kernel that ends before its wgmma. Atomic operations run in
the order of the threads. The sums of mma and wgmma with halves are those of Hopper.
"""

import re
from collections import ChainMap, Counter
from math import prod

import numpy as np

from . import ptx_machine as machine
from .ptx_instructions import meaning
from .ptx_machine import BadAccess, Dim, Divergence, Kernel, PtxError, Race, Uninitialized, Unsupported
from .ptx_memory import Buffer, Memory

__all__ = ["BadAccess", "Divergence", "Memory", "Module", "PtxError", "Race", "Uninitialized", "Unsupported"]
MOST_BLOCKS, MOST_THREADS = (2**31 - 1, 2**16 - 1, 2**16 - 1), (1024, 1024, 64)
Argument = Buffer | np.generic
THREADS_AT_ONCE = 4096  # so many, or one block, share the cost of a step


class Module:
    """The kernels of one PTX text."""

    def __init__(self, ptx_text: str) -> None:
        """Raises Unsupported where the text is not understood; opcodes are looked at when they are run."""
        self._kernels = Text(ptx_text).kernels
        self.executed: dict[str, Counter[str]] = {}  # kernel → opcode → by how many threads it ran

    def launch(
        self, kernel: str, grid: Dim, block: Dim, args: list[Argument], memory: Memory, shared_bytes: int = 0
    ) -> None:
        """Run a kernel to its end, on `memory`; `shared_bytes` is the length of extern shared arrays.

        In args a Buffer is passed as its address, a NumPy scalar by value. Raises a PtxError where the kernel
        is wrong or not understood; ValueError for a kernel that is not there, a grid or block that CUDA does
        not launch, and arguments that do not fit the parameters.
        """
        if kernel not in self._kernels:
            raise ValueError(f"kernel={kernel!r} is not here; the module has {sorted(self._kernels)}.")
        entry, threads = self._kernels[kernel], prod(block)
        fits = [1 <= size <= most for size, most in zip((*grid, *block), MOST_BLOCKS + MOST_THREADS)]
        if not all(fits) or threads > entry.most_threads:
            raise ValueError(
                f"grid={grid}, block={block}: a grid is {MOST_BLOCKS} at most, a block of {kernel} "
                f"{MOST_THREADS} and {entry.most_threads} threads in all; none may be below 1."
            )
        shared = placed(entry.arrays, shared_bytes)
        symbols = arguments(entry, args) | {name: part.start for name, part in shared.items()}
        executed = self.executed.setdefault(kernel, Counter())
        memory.launches += 1
        launch = machine.Launch(entry, grid, block, symbols, list(shared.values()), memory, executed)
        step = max(1, THREADS_AT_ONCE // (-(-threads // machine.WARP) * machine.WARP))
        with np.errstate(all="ignore"):
            for first in range(0, prod(grid), step):
                machine.Batch(launch, np.arange(first, min(first + step, prod(grid)))).run()


def placed(arrays: dict[str, tuple[int, int]], shared_bytes: int) -> dict[str, slice]:
    """Where arrays lie in shared memory, those as long as the launch says behind all others."""
    places, end = {}, 0
    for name, (alignment, size) in sorted(arrays.items(), key=lambda array: array[1][1] == 0):
        start = -(-end // alignment) * alignment
        places[name] = slice(start, start + (size or shared_bytes))
        end = start + size + machine.GAP if size else end
    return places


def arguments(kernel: Kernel, args: list[Argument]) -> dict[str, int]:
    """Their bits, by the [names] of the parameters, as ld.param has them."""
    if len(args) != len(kernel.parameters):
        raise ValueError(f"args has {len(args)} entries; {kernel.name} takes {len(kernel.parameters)}.")
    bits = {}
    for i, (argument, (name, kind)) in enumerate(zip(args, kernel.parameters.items())):
        value = np.uint64(argument.address) if isinstance(argument, Buffer) else argument
        size = machine.DTYPES[kind].itemsize
        if not isinstance(value, np.generic) or value.itemsize != size:
            raise ValueError(
                f"args[{i}]={argument!r} does not fit .{kind} of {kernel.name}: pass a Buffer for a pointer "
                f"and a NumPy scalar of {8 * size} bits for a number."
            )
        bits[f"[{name}]"] = int(value.view(f"u{size}"))
    return bits


TOKEN = re.compile(
    r"""\s+
    |\.(?:version|target|address_size|minnctapersm|file)\b.*
    |\.(?:maxntid|reqntid)\b(?P<most_threads>.*)
    |\.loc\b(?P<source>.*)
    |(?:\.visible\s+)?\.entry\s+(?P<entry>[\w$]+)\s*\((?P<parameters>[^)]*)\)
    |(?P<label>[$\w]+):(?!:)
    |(?P<brace>[{}])
    |(?P<statement>[^;]+);""",
    re.VERBOSE,
)
SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?(\w[\w.:]*)\s*(.*)", re.DOTALL)
NAME, OPERAND = r"[%\w$]+", r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+"


class Text:
    """What a PTX text holds."""

    def __init__(self, text: str) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.outside = self.kernel = Kernel("", {}, {})  # whose body is read
        self.names: ChainMap[str, int] = ChainMap()  # of registers, one map for each brace around
        self.source = ""
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text, re.MULTILINE))
        text = re.sub(r"//.*", "", text)
        text = re.split(r"^\s*\.section", text, maxsplit=1, flags=re.MULTILINE)[0]  # debug information
        line, at = 1, 0
        while match := TOKEN.match(text, at):
            self.token(match, line)
            line, at = line + match[0].count("\n"), match.end()
        if at < len(text):
            raise Unsupported(f"PTX line {line}: {text[at:].splitlines()[0]!r} is not understood.")

    def token(self, match: re.Match[str], line: int) -> None:
        if match["entry"]:
            self.entry(match["entry"], match["parameters"])
        elif match["brace"] == "{":
            self.names = self.names.new_child()
        elif match["brace"]:
            self.names = self.names.parents
            if len(self.names.maps) == 1:
                self.instruction("exit", line)
                self.kernel = self.outside
        elif match["label"]:
            if match["label"] in self.kernel.labels:
                raise Unsupported(f"PTX line {line}: a second label {match['label']}.")
            self.kernel.labels[match["label"]] = len(self.kernel.statements)
        elif match["most_threads"]:
            self.kernel.most_threads = prod(map(int, match["most_threads"].split(",")))
        elif match["source"]:
            places = re.findall(r"(?:^|inlined_at)\s+(\d+)\s+(\d+)", match["source"])
            self.source = ", inlined at ".join(f"{self.files.get(file, file)}:{row}" for file, row in places)
        elif match["statement"]:
            self.statement(match["statement"].strip(), line)

    def entry(self, name: str, parameters: str) -> None:
        """(.param .u64 .ptr .align 1 to, .param .u32 n)"""
        words = [text.split() for text in parameters.split(",") if text.strip()]
        types = {name: kind.strip(".") for _, kind, *_, name in words}
        if unknown := set(types.values()) - machine.DTYPES.keys():
            raise Unsupported(f"{name}: a parameter of type {unknown} is neither a number nor a pointer.")
        self.kernel = self.kernels[name] = Kernel(name, types, self.outside.arrays.copy())

    def statement(self, text: str, line: int) -> None:
        if match := SHARED.fullmatch(text):
            self.kernel.arrays[match[2]] = int(match[1]), int(match[3] or 0)
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            for name, count in re.findall(rf"({NAME})(?:<(\d+)>)?", match[2]):  # %r<9>, x
                for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    self.names[each] = len(self.kernel.types)
                    self.kernel.types.append(match[1])
        elif not text.startswith((".pragma", ".global")):  # constants: their values are in the code
            self.instruction(text, line)

    def instruction(self, text: str, line: int) -> None:
        match = INSTRUCTION.fullmatch(text)
        if self.kernel is self.outside or match is None:
            raise Unsupported(f"PTX line {line}: {text!r} is no instruction.")
        guard, opcode, rest = match.groups(default="")
        o = [operand.strip() for operand in re.findall(OPERAND, rest)]
        registers = {name: self.names[name] for name in re.findall(NAME, text) if name in self.names}
        if opcode.startswith("wgmma.mma_async"):
            of_d = enumerate(re.findall(NAME, o[0]))
            self.kernel.accumulators |= {registers[n]: (opcode, i) for i, n in of_d if n in registers}
        where, function = ", ".join(filter(None, [str(line), self.source])), meaning(opcode, ", ".join(o))
        text = " ".join(text.split())
        self.kernel.statements.append(machine.Statement(guard, opcode, function, o, registers, text, where))
