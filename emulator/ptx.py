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
and constant memory, generic addresses; barriers and warp instructions for a part of a block or warp; wgmma on
other operands than halves in shared memory with 128-byte swizzling. Not noticed: races in global memory,
except different bytes written by two blocks; reads of registers that nothing was written to; a kernel that
ends before its wgmma. Atomic operations run in the order of the threads. The sums of mma and wgmma with
halves are those of Hopper.
"""

import re
from bisect import bisect
from collections import ChainMap, Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np

from .ptx_instructions import meaning
from .ptx_machine import (
    WARP,
    Array,
    BadAccess,
    Batch,
    Dim,
    Divergence,
    Kernel,
    Launch,
    PtxError,
    Race,
    Statement,
    Uninitialized,
    Unsupported,
    bits_in_type,
    stored,
)
from .ptx_memory import Buffer, Memory

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
        self._kernels = Text(ptx_text).kernels
        self.executed: dict[str, Counter[str]] = {}  # kernel → opcode → by how many threads it ran

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
        if kernel not in self._kernels:
            raise ValueError(f"kernel={kernel!r} is not here; the module has {sorted(self._kernels)}.")
        entry = self._kernels[kernel]
        too_many = [size > most for size, most in zip((*grid, *block), MOST_BLOCKS + MOST_THREADS)]
        if min(*grid, *block) < 1 or any(too_many) or prod(block) > entry.most_threads:
            raise ValueError(
                f"grid={grid}, block={block}: a grid is {MOST_BLOCKS} at most, a block of {kernel} "
                f"{MOST_THREADS} and {entry.most_threads} threads in all; none may be below 1."
            )
        shared = [(address, size or shared_bytes) for address, size in entry.arrays.values()]
        ran = np.zeros(len(entry.statements), np.int64)
        values, code = arguments(entry, args), code_of(entry)
        launch = Launch(entry, code, grid, block, values, memory, shared, ran, accumulators(entry))
        memory.launches += 1
        blocks, at_once = np.arange(prod(grid)), max(1, THREADS_AT_ONCE // (-(-prod(block) // WARP) * WARP))
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), at_once):
                Batch(launch, blocks[first : first + at_once]).run()
        executed = self.executed.setdefault(kernel, Counter())
        for statement, threads in zip(entry.statements, ran.tolist()):
            executed[statement.opcode] += threads


Code = Callable[[Batch, list[str]], int | None]


def code_of(kernel: Kernel) -> list[Code]:
    """The functions that run its statements. Those that use accumulators and are no wgmma say so first."""
    code, added_to = [], accumulators(kernel)
    for s in kernel.statements:
        function = meaning(s.opcode)
        if function is None:
            why = f"{s.opcode} is an opcode, or has a modifier, that is not known here"
            raise unsupported(kernel, s, why)
        touched = added_to.intersection(s.registers.values())
        if touched and not s.opcode.startswith("wgmma"):
            function = partial(touching, touched, function)
        code.append(function)
    return code


def touching(numbers: set[int], function: Code, batch: Batch, operands: list[str]) -> int | None:
    batch.touch(numbers)
    return function(batch, operands)


def accumulators(kernel: Kernel) -> set[int]:
    """The registers that wgmma adds to, by number."""
    places: dict[int, tuple[str, int]] = {}
    for s in kernel.statements:
        if s.opcode.startswith("wgmma.mma_async"):
            for place, name in enumerate(re.findall(r"[%\w$]+", s.operands[0])):
                number, here = s.registers.get(name), (s.opcode, place)
                if number is None or places.setdefault(number, here) != here:
                    why = f"{name} is not a register, or is one of another shape or place in D elsewhere"
                    raise unsupported(kernel, s, why)
    return set(places)


def unsupported(kernel: Kernel, s: Statement, why: str) -> Unsupported:
    return Unsupported(f"{kernel.name}, PTX line {s.line} {s.source}: {s.text}\n{why}.")


def arguments(kernel: Kernel, args: Sequence[Buffer | np.generic]) -> dict[str, Array]:
    """By the names of the parameters."""
    if len(args) != len(kernel.parameters):
        raise ValueError(f"args has {len(args)} entries; {kernel.name} takes {len(kernel.parameters)}.")
    values = {}
    for i, (argument, (name, kind)) in enumerate(zip(args, kernel.parameters.items())):
        value = np.uint64(argument.address) if isinstance(argument, Buffer) else argument
        if not isinstance(value, np.generic) or value.itemsize * 8 != bits_in_type(kind):
            raise ValueError(
                f"args[{i}]={argument!r} does not fit .{kind} of {kernel.name}: pass a Buffer for a pointer "
                f"and a NumPy scalar of {bits_in_type(kind)} bits for a number."
            )
        values[name] = np.array([value]).view(stored(kind))
    return values


TOKEN = re.compile(
    r"""\s*(?:
    \.(?P<directive>version|target|address_size|maxntid|minnctapersm|reqntid|file|loc)\b(?P<rest>[^\n]*)
    |(?:\.visible\s+)?\.entry\s+(?P<entry>[\w$]+)\s*\((?P<parameters>[^)]*)\)
    |(?P<label>[$\w]+):(?!:)
    |(?P<brace>[{}])
    |(?P<statement>[^;]+);)""",
    re.VERBOSE,
)
PARAMETER = re.compile(r"\.param\s+\.([suf]\d+)(?:\s+\.ptr\b.*?)?\s+([\w$]+)")
INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?(\w[\w.:]*)\s*(.*)", re.DOTALL)
SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")


class Text:
    """What a PTX text holds."""

    def __init__(self, text: str) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.kernel: Kernel | None = None  # whose body is read
        self.shared: list[tuple[str, int, int]] = []  # arrays that no kernel declares: name, bytes, alignment
        self.names: ChainMap[str, int] = ChainMap()  # of registers, one map for each brace around
        self.source = ""
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text, re.MULTILINE))
        text = re.sub(r"//[^\n]*", "", text)
        text = re.split(r"^\s*\.section", text, maxsplit=1, flags=re.MULTILINE)[0]  # debug information
        line_ends, at = [match.start() for match in re.finditer("\n", text)], 0
        while match := TOKEN.match(text, at):
            self.token(match, bisect(line_ends, match.start(match.lastgroup or 0)) + 1)
            at = match.end()
        if rest := text[at:].strip():
            line = bisect(line_ends, text.index(rest, at)) + 1
            raise Unsupported(f"PTX line {line}: {rest.splitlines()[0]!r} is not understood.")

    def token(self, match: re.Match[str], line: int) -> None:
        if match["entry"]:
            self.entry(match["entry"], match["parameters"])
        elif match["brace"] == "{":
            self.names = self.names.new_child()
        elif match["brace"]:
            self.names = self.names.parents
            if self.kernel and len(self.names.maps) == 1:
                self.kernel.statements.append(Statement("", "exit", [], {}, "}", line, self.source))
                for array in sorted(self.shared, key=lambda array: array[1] == 0):
                    self.kernel.place(*array)
                self.kernel = None
        elif match["label"] and self.kernel:
            if match["label"] in self.kernel.labels:
                raise Unsupported(f"PTX line {line}: a second label {match['label']}.")
            self.kernel.labels[match["label"]] = len(self.kernel.statements)
        elif match["directive"] in ("maxntid", "reqntid") and self.kernel:
            self.kernel.most_threads = prod(map(int, match["rest"].split(",")))
        elif match["directive"] == "loc":
            places = re.findall(r"(?:^|inlined_at)\s+(\d+)\s+(\d+)", match["rest"])
            self.source = ", inlined at ".join(f"{self.files.get(file, file)}:{row}" for file, row in places)
        elif match["statement"]:
            self.statement(match["statement"].strip(), line)

    def entry(self, name: str, parameters: str) -> None:
        types = {}
        for text in filter(None, map(str.strip, parameters.split(","))):
            match = PARAMETER.fullmatch(text)
            if match is None:
                raise Unsupported(f"{name}: {text!r} is neither a number nor a pointer.")
            types[match[2]] = match[1]
        self.kernel = self.kernels[name] = Kernel(name, types)

    def statement(self, text: str, line: int) -> None:
        if match := SHARED.fullmatch(text):
            alignment, name, size = int(match[1]), match[2], int(match[3] or 0)
            if self.kernel:
                self.kernel.place(name, size, alignment)
            else:
                self.shared.append((name, size, alignment))
        elif self.kernel is None:
            if not text.startswith(".global"):  # constants: NVRTC has put their values into the code
                raise Unsupported(f"PTX line {line}: {text!r} is not understood.")
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            self.declare(self.kernel.types, match[1], match[2])
        elif match := INSTRUCTION.fullmatch(text):
            guard, opcode, operands = match.groups()
            parts = [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]
            names = re.findall(r"[%\w$]+", text)
            numbers = {name: self.names[name] for name in names if name in self.names}
            self.kernel.statements.append(
                Statement(guard or "", opcode, parts, numbers, " ".join(text.split()), line, self.source)
            )
        elif not text.startswith(".pragma"):
            raise Unsupported(f"{self.kernel.name}, PTX line {line}: {text!r} is no instruction.")

    def declare(self, types: list[str], kind: str, names: str) -> None:
        """.reg .b32 %r<9>, x;"""
        for name in map(str.strip, names.split(",")):
            prefix, _, count = name.partition("<")
            for each in [f"{prefix}{i}" for i in range(int(count[:-1]))] if count else [name]:
                self.names[each] = len(types)
                types.append(kind)
