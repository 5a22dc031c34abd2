"""An interpreter of the PTX that NVRTC emits: runs a CUDA kernel on any CPU and stops it where it is wrong.

A register is an array over all threads of the blocks that run side by side. Each thread has its own program
counter; those at the lowest one step together, so that threads that parted meet again. What a step computes is
in ptx_arithmetic.py, what memory checks in ptx_memory.py, tensor cores in tensor_core.py.
"""

import re
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from . import ptx_memory as watch
from .formats import f32, u8, u32
from .ptx_arithmetic import DTYPES, bits_in_type, operation, u16, u64
from .ptx_memory import Buffer, Memory
from .tensor_core import BF16, FP16, half_warps, nvfp4_warps

Array = NDArray[Any]
WARP = 32
THREADS_AT_ONCE = 4096  # so many threads, or one block, share the cost of a step
EXITED, SPLIT = 1 << 40, -1  # program counter of a thread that is done; threads went different ways
SHARED_WINDOW, LOCAL_WINDOW = 1 << 44, 1 << 45  # where generic addresses of these spaces begin


class PtxError(Exception):
    """A kernel that cannot go on: which instruction, which thread, why."""


class Unsupported(PtxError):
    """An opcode, modifier or operand that this interpreter does not know."""


class BadAccess(PtxError):
    """Out of bounds or misaligned."""


class Uninitialized(PtxError):
    """A read of bytes that nobody wrote, or that a cp.async still copies."""


class Race(PtxError):
    """Two threads, one place, no barrier between them."""


class Divergence(PtxError):
    """A barrier or a warp-wide instruction that some of its threads do not reach."""


FINDINGS = {
    watch.OUT_OF_BOUNDS: (BadAccess, "out of bounds"),
    watch.MISALIGNED: (BadAccess, "not a multiple of its size"),
    watch.NEVER_WRITTEN: (Uninitialized, "never written"),
    watch.NOT_WAITED_FOR: (Uninitialized, "still in flight: its cp.async has not been waited for"),
    watch.RACE: (Race, "touched by another thread with no barrier in between"),
}


# Parsing


class Statement(NamedTuple):
    text: str
    line: int  # in the PTX
    source: str  # file:line in the CUDA source, if compiled with -lineinfo
    scope: tuple[int, ...]  # braces around it


class Kernel:
    """One .entry: statements, decoded at its first launch."""

    def __init__(self, name: str, parameters: str) -> None:
        self.name, self.statements, self.labels = name, list[Statement](), dict[str, int]()
        self.registers: dict[tuple[tuple[int, ...], str], tuple[int, str]] = {}  # (scope, name) → number, type
        self.types: list[str] = []
        self.symbols: dict[str, tuple[str, int, int]] = {}  # variable → space, address, bytes
        self.sizes = {"shared": 0, "local": 0, "param": 0}
        self.parameters: list[tuple[int, str]] = []  # offset, type
        self.code: list[Instruction] | None = None
        for text in filter(None, (p.strip() for p in parameters.split(","))):
            match = re.fullmatch(r"\.param\s+\.(\w+)(?:\s+\.ptr.*?)?\s+([\w$]+)", text)
            if match is None:
                raise Unsupported(f"{name}: parameter {text!r} is not a number or a pointer.")
            self.parameters.append((self.place(match[2], "param", bits_in_type(match[1]) // 8), match[1]))

    def place(self, name: str, space: str, size: int, alignment: int = 0) -> int:
        gap = 16 if space == "shared" and self.sizes[space] else 0  # so that a step too far is noticed
        alignment = alignment or size
        address = -(-(self.sizes[space] + gap) // alignment) * alignment
        self.symbols[name], self.sizes[space] = (space, address, size), address + size
        return address

    def declare(self, scope: tuple[int, ...], kind: str, names: str) -> None:
        for name in (n.strip() for n in names.split(",")):
            prefix, _, count = name.partition("<")
            for n in [f"{prefix}{i}" for i in range(int(count[:-1]))] if count else [name]:
                self.registers[scope, n] = len(self.types), kind
                self.types.append(kind)


TOKEN = re.compile(
    r"""\s*(?:
    \.(?:version|target|address_size|maxntid|minnctapersm|reqntid|maxnreg|file|loc)\b[^\n]*
    |(?P<entry>(?:\.visible\s+|\.weak\s+)*\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\))
    |(?P<label>[$\w]+):(?!:)
    |(?P<brace>[{}])
    |(?P<statement>[^;]+);)""",
    re.VERBOSE,
)
VARIABLE = re.compile(
    r"(?P<linkage>\.extern\s+|\.visible\s+|\.weak\s+)?\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*(?P<values>.*))?",
    re.DOTALL,
)


class Variable(NamedTuple):
    name: str
    space: str
    alignment: int
    size: int
    values: str | None
    kind: str
    dynamic: bool  # .extern .shared: as long as the launch says


class Module:
    """The kernels of one PTX text."""

    def __init__(self, ptx_text: str) -> None:
        """Raises Unsupported where the text as a whole is not understood; an opcode is looked at by `launch`."""
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx_text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.split(r"^\s*\.section", text, maxsplit=1, flags=re.MULTILINE)[0]
        self.kernels: dict[str, Kernel] = {}
        self.variables: list[Variable] = []
        self.buffers: WeakKeyDictionary[Memory, dict[str, Buffer]] = WeakKeyDictionary()
        self.files = {int(n): name.split("/")[-1] for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx_text)}
        starts = [m.start() for m in re.finditer("\n", text)]
        kernel, source, scope, opened, at = None, "", (), 0, 0
        while match := TOKEN.match(text, at):
            at, line = match.end(), bisect(starts, match.end() - 1) + 1
            if match["entry"]:
                kernel = self.kernels[match["name"]] = Kernel(match["name"], match["parameters"])
                for variable in self.variables:
                    if variable.space == "shared" and not variable.dynamic:
                        kernel.place(variable.name, "shared", variable.size, variable.alignment)
                    kernel.symbols.setdefault(variable.name, (variable.space, 0, 0))
            elif match["brace"] == "{":
                opened += 1
                scope = (*scope, opened)
            elif match["brace"]:
                scope = scope[:-1]
            elif match["label"] and kernel:
                kernel.labels[match["label"]] = len(kernel.statements)
            elif match["statement"]:
                self.statement(kernel if scope else None, Statement(match["statement"].strip(), line, source, scope))
            elif loc := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", match[0]):
                source = self.source(match[0])
        if text[at:].strip():
            raise Unsupported(f"PTX line {bisect(starts, at) + 1}: {text[at:].strip().splitlines()[0]!r}")

    def source(self, loc: str) -> str:
        places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", loc)
        return ", inlined at ".join(f"{self.files.get(int(file), file)}:{line}" for file, line in places)

    def statement(self, kernel: Kernel | None, statement: Statement) -> None:
        if match := VARIABLE.fullmatch(statement.text):
            size = bits_in_type(match["type"]) // 8
            alignment = int(match["align"] or size)
            count = int(match["count"] or 0) if match["array"] else 1
            dynamic = bool(match["array"] and not match["count"])
            variable = Variable(
                match["name"], match["space"], alignment, size * count, match["values"], match["type"], dynamic
            )
            if kernel is None or match["space"] in ("global", "const"):
                self.variables.append(variable)
            else:
                kernel.place(variable.name, variable.space, variable.size, alignment)
        elif kernel is None:
            if not re.match(r"\.(extern\s+)?\.?func", statement.text):
                raise Unsupported(f"PTX line {statement.line}: {statement.text!r}")
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement.text, re.DOTALL):
            kernel.declare(statement.scope, match[1], match[2])
        elif not statement.text.startswith(".pragma"):
            kernel.statements.append(statement)

    def addresses(self, kernel: Kernel, memory: Memory) -> dict[str, int]:
        """Of every variable that the kernel can name. Those of the module are put in memory once."""
        buffers = self.buffers.setdefault(memory, {})
        addresses = {name: address for name, (_, address, _) in kernel.symbols.items()}
        for variable in self.variables:
            if variable.space == "shared":
                addresses[variable.name] = dynamic_from(kernel) if variable.dynamic else addresses[variable.name]
                continue
            if variable.name not in buffers:
                values = re.findall(r"[-\w]+", variable.values or "")
                array = np.zeros(variable.size // (bits_in_type(variable.kind) // 8), register_dtype(variable.kind))
                for i, value in enumerate(values):
                    array[i] = number_in(value) & (1 << bits_in_type(variable.kind)) - 1
                buffers[variable.name] = memory.upload(array)
            addresses[variable.name] = buffers[variable.name].address
        return addresses

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Buffer | np.generic],
        memory: Memory,
        shared_bytes: int = 0,
    ) -> None:
        """Run one kernel to its end, on `memory`.

        A Buffer is passed as its address, a NumPy scalar by value; they must fit the kernel's parameters. Raises
        PtxError, one of its kinds above, where the kernel is wrong or beyond this interpreter; ValueError for
        another number or size of arguments or a kernel that is not there.
        """
        if kernel not in self.kernels:
            raise ValueError(f"kernel={kernel!r} is not in this module; it has {', '.join(self.kernels) or 'none'}.")
        entry = self.kernels[kernel]
        if entry.code is None:
            entry.code = [Decoder(entry, statement).instruction() for statement in entry.statements]
        parameters = packed(entry, args)
        addresses = self.addresses(entry, memory)
        at_once = max(1, THREADS_AT_ONCE // (-(-int(np.prod(block)) // WARP) * WARP))
        blocks = np.arange(int(np.prod(grid)))
        memory.begin_launch()
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), at_once):
                Batch(entry, grid, block, blocks[first : first + at_once], parameters, addresses, memory, shared_bytes).run()


def dynamic_from(kernel: Kernel) -> int:
    """Address of the shared memory whose size the launch gives, behind that of fixed size."""
    return -(-kernel.sizes["shared"] // 128) * 128


def packed(kernel: Kernel, args: Sequence[Buffer | np.generic]) -> NDArray[np.uint8]:
    """The bytes of the parameters."""
    if len(args) != len(kernel.parameters):
        raise ValueError(f"args has {len(args)} entries; {kernel.name} takes {len(kernel.parameters)}.")
    block = np.zeros(kernel.sizes["param"], u8)
    for i, (argument, (offset, kind)) in enumerate(zip(args, kernel.parameters)):
        value = u64(argument.address) if isinstance(argument, Buffer) else argument
        if not isinstance(value, np.generic) or value.itemsize * 8 != bits_in_type(kind):
            raise ValueError(f"args[{i}]={argument!r} does not fit {kernel.name}'s parameter of type .{kind}.")
        block[offset : offset + value.itemsize] = np.frombuffer(value.tobytes(), u8)
    return block


def number_in(text: str) -> int:
    """An integer, or the bits of a float."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return int(text.removesuffix("U"), 0)


# Running


class Instruction(NamedTuple):
    statement: Statement
    guard: Callable[["Batch"], Array] | None
    run: Callable[["Batch"], int | None]  # → where to go on, if not at the next one


class Batch:
    """Blocks of one launch that run side by side. Blocks are filled up to whole warps with exited threads."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: NDArray[np.int64],
        parameters: NDArray[np.uint8],
        addresses: dict[str, int],
        memory: Memory,
        shared_bytes: int,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.parameters, self.addresses = parameters, addresses
        count = int(np.prod(block))
        self.block_size = -(-count // WARP) * WARP
        n = self.size = self.block_size * len(blocks)
        self.thread = np.arange(n) % self.block_size
        self.block_number = np.repeat(blocks, self.block_size)
        self.pc = np.where(self.thread < count, 0, EXITED)
        self.waiting = np.zeros(n, bool)
        self.barriers, self.warp_syncs = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.stamps = watch.stamps(self.thread, self.warp_syncs, self.barriers)
        unset = {dtype: np.full(n * dtype.itemsize, 0xA5, u8).view(dtype) for dtype in map(np.dtype, (u8, u16, u32, u64))}
        unset[np.dtype(bool)] = np.zeros(n, bool)
        self.registers = [unset[register_dtype(kind)] for kind in kernel.types]
        self.special = special_registers(self.thread, block, self.block_number, grid)
        self.spaces = {
            "global": memory.space,
            "shared": watch.space(dynamic_from(kernel) + shared_bytes, len(blocks), self.block_size, watched=True),
            "local": watch.space(kernel.sizes["local"], n, sharers=1),
        }
        for space, address, size in [*kernel.symbols.values(), ("shared", dynamic_from(kernel), shared_bytes)]:
            if space in ("shared", "local"):
                regions = self.spaces[space].state.reshape(-1, self.spaces[space].size)
                regions[:, address : address + size] = watch.UNWRITTEN
        self.copies: list[Copies] = []
        self.groups = np.zeros(n, np.int64)  # that each thread has committed
        self.finishes: dict[int, Callable[[Array], None]] = {}
        self.at = 0
        self.activate(self.pc == 0)

    def activate(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask
        self.everyone = bool(mask.all())
        self.lanes = np.flatnonzero(mask)

    def run(self) -> None:
        code = self.kernel.code
        assert code is not None
        while True:
            ready = np.where(self.waiting, EXITED, self.pc)
            at = int(ready.min())
            if at == EXITED:
                if not self.waiting.any():
                    return
                self.release()
                continue
            self.activate(ready == at)
            others = ready[~self.mask]
            stop = int(others.min()) if len(others) else EXITED
            while at < stop:
                self.at = at
                instruction = code[at]
                to = instruction.run(self) if instruction.guard is None else self.guarded(instruction)
                at = at + 1 if to is None else to
                if at == SPLIT:
                    break
            else:
                self.pc[self.lanes] = at

    def guarded(self, instruction: Instruction) -> int | None:
        before = self.mask
        assert instruction.guard is not None
        mask = before & instruction.guard(self)
        if not mask.any():
            return None
        self.pc[self.lanes] = self.at + 1
        self.activate(mask)
        to = instruction.run(self)
        if to is None:
            self.activate(before)
            return None
        if to != SPLIT:
            self.pc[self.lanes] = to
        return to if to != SPLIT and len(self.lanes) == np.count_nonzero(before) else SPLIT

    def set(self, number: int, value: Array) -> None:
        """Give a register its new value in the active threads; `value` is over all threads."""
        old = self.registers[number]
        if value.dtype != old.dtype:
            value = as_stored(value, old.dtype)
        if not self.everyone:
            value = np.where(self.mask, value, old)
        elif len(value) != self.size:
            value = np.broadcast_to(value, self.size)
        self.registers[number] = value

    def set_active(self, number: int, value: Array) -> None:
        """The same, `value` over the active threads only."""
        old = self.registers[number]
        value = as_stored(value, old.dtype) if value.dtype != old.dtype else value
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

    def now(self, space: str) -> Array:
        return self.block_number + 1 if space == "global" else self.stamps

    def alive(self) -> Array:
        return self.pc != EXITED

    def warps(self, needs: Array | None = None) -> Array:
        """Numbers of the warps at this instruction; each must be there whole, or with all threads in `needs`."""
        mask = self.mask.reshape(-1, WARP)
        warps = np.flatnonzero(mask.any(axis=1))
        needed = np.ones_like(mask) if needs is None else needs.reshape(-1, WARP)
        missing = np.argwhere(needed[warps] & ~mask[warps])
        if len(missing):
            warp, lane = warps[missing[0, 0]], missing[0, 1]
            self.fail(Divergence, warp * WARP + lane, "is not there; this instruction needs the whole warp")
        return warps

    def named(self, mask: Callable[["Batch"], Array]) -> Array:
        """Whether a thread is in its own member mask."""
        return (np.broadcast_to(mask(self), self.size) >> (self.thread % WARP).astype(u32) & u32(1)).astype(bool)

    def members(self, mask: Callable[["Batch"], Array]) -> Array:
        """(warps, 32): the threads that take part; all that a member mask names and that live must be there."""
        absent = np.flatnonzero(self.mask & ~self.named(mask))
        if len(absent):
            self.fail(Divergence, absent[0], "is not in the member mask of this instruction")
        names = np.broadcast_to(mask(self), self.size)[self.lanes]
        here, living = (one_bits(x.reshape(-1, WARP))[self.lanes // WARP] for x in (self.mask, self.alive()))
        absent = np.flatnonzero(names & living & ~here)
        if len(absent):
            self.fail(Divergence, self.lanes[absent[0]], "names threads in its member mask that are not at this instruction")
        return self.mask.reshape(-1, WARP)

    def wait(self, finish: Callable[[Array], None]) -> int | None:
        """At a barrier of the block; `finish` is for the threads it lets go on."""
        if self.everyone:
            finish(self.mask)
            self.pass_barrier(self.mask)
            return None
        self.finishes[self.at] = finish
        self.waiting[self.lanes] = True
        self.pc[self.lanes] = self.at + 1
        return SPLIT

    def release(self) -> None:
        """Let the threads of each block go on that wait at a barrier."""
        assert self.kernel.code is not None
        for block in np.unique(self.block_number[self.waiting]):
            mine = self.block_number == block
            alive = mine & (self.pc != EXITED)
            self.at = int(self.pc[alive][0]) - 1
            apart = np.flatnonzero(alive & (self.pc != self.at + 1))
            if len(apart):
                other = self.kernel.code[int(self.pc[apart[0]]) - 1].statement
                self.fail(Divergence, apart[0], f"waits at another barrier, PTX line {other.line} {other.source}")
            warps = (np.flatnonzero(alive) // WARP)[:, None] * WARP + np.arange(WARP)
            gone = warps[(self.pc[warps] == EXITED) & (self.thread[warps] < np.prod(self.block))]
            if len(gone):
                self.fail(Divergence, gone[0], "has exited while others of its warp wait at this barrier")
            self.waiting[mine] = False
            self.finishes[self.at](alive)
            self.pass_barrier(mine)

    def pass_barrier(self, who: Array) -> None:
        self.barriers[who] += 1
        self.warp_syncs[who] = 0
        self.stamps = watch.stamps(self.thread, self.warp_syncs, self.barriers)

    def fail(self, kind: type[PtxError], thread: int, what: str) -> None:
        assert self.kernel.code is not None
        s = self.kernel.code[self.at].statement
        x, y, _ = self.block
        t, b = int(self.thread[thread]), int(self.block_number[thread])
        who = f"thread ({t % x}, {t // x % y}, {t // x // y}) of block"
        gx, gy, _ = self.grid
        where = f"({b % gx}, {b // gx % gy}, {b // gx // gy})"
        raise kind(f"{self.kernel.name}, PTX line {s.line} {s.source}: {s.text}\n{who} {where} {what}.")

    def check(self, found: tuple[int, int, int], space: str, lanes: Array, addresses: Array, width: int) -> None:
        finding, i, byte = found
        if finding != watch.FINE:
            kind, what = FINDINGS[finding]
            address = int(addresses[i])
            where = f"{width} bytes of {space} memory at {address:#x}"
            self.fail(kind, lanes[i], f"accesses {where}, byte {byte} of which is {what}" if finding != watch.MISALIGNED else f"accesses {where}, which is {what}")


def register_dtype(kind: str) -> np.dtype:
    return np.dtype(bool if kind == "pred" else f"u{bits_in_type(kind) // 8}")


def as_stored(value: Array, dtype: np.dtype) -> Array:
    """The bits of a value in a register of this type; what is shorter is extended by its sign or zeros."""
    if value.ndim == 2:  # halves
        return np.ascontiguousarray(value).view(dtype)[:, 0]
    if value.dtype.itemsize == dtype.itemsize:
        return value.view(dtype)
    return value.astype(dtype)


def special_registers(thread: Array, block: tuple[int, int, int], number: Array, grid: tuple[int, int, int]) -> dict[str, Array]:
    special: dict[str, Array] = {}
    for name, flat, (x, y, _) in (("tid", thread, block), ("ctaid", number, grid)):
        for axis, value in zip("xyz", (flat % x, flat // x % y, flat // x // y)):
            special[f"%{name}.{axis}"] = value.astype(u32)
    for name, sizes in (("ntid", block), ("nctaid", grid)):
        for axis, size in zip("xyz", sizes):
            special[f"%{name}.{axis}"] = np.full(len(thread), size, u32)
    special["%laneid"] = (thread % WARP).astype(u32)
    special["%warpid"] = (thread // WARP).astype(u32)
    return special


# Decoding: one statement → one closure

SPECIAL_REGISTERS = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL_REGISTERS |= {"%laneid", "%warpid"}
SPECIAL_RULES: list[tuple[re.Pattern[str], Callable[..., Callable[[Batch], int | None]]]] = []


def instruction(pattern: str) -> Callable:
    def register(build: Callable) -> Callable:
        SPECIAL_RULES.append((re.compile(pattern), build))
        return build

    return register


class Decoder:
    """Operands of one statement."""

    def __init__(self, kernel: Kernel, statement: Statement) -> None:
        self.kernel, self.statement = kernel, statement
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement.text, re.DOTALL)
        if match is None:
            raise self.unsupported("is not an instruction")
        self.negated, self.guard, self.opcode, operands = match.groups()
        self.operands = [o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if o.strip()]

    def unsupported(self, why: str) -> Unsupported:
        s = self.statement
        return Unsupported(f"{self.kernel.name}, PTX line {s.line} {s.source}: {s.text}\n{why}.")

    def instruction(self) -> Instruction:
        run = None
        for pattern, build in SPECIAL_RULES:
            if match := pattern.fullmatch(self.opcode):
                run = build(self, *match.groups())
                break
        else:
            found = operation(self.opcode)
            if found is None:
                raise self.unsupported(f"{self.opcode} is an opcode, or has a modifier, that is not known here")
            run = self.elementwise(found)
        guard = None
        if self.guard:
            value = self.read(self.guard, "pred")
            guard = (lambda batch: ~value(batch)) if self.negated else value
        return Instruction(self.statement, guard, run)

    def elementwise(self, op: Any) -> Callable[[Batch], None]:
        function = op.function
        if len(self.operands) != 1 + len(op.sources):
            raise self.unsupported(f"{self.opcode} takes {1 + len(op.sources)} operands")
        target = self.register(self.operands[0])
        sources = [self.read(o, kind) for o, kind in zip(self.operands[1:], op.sources)]
        if len(sources) == 1:
            (one,) = sources
            return lambda batch: batch.set(target, function(one(batch)))
        if len(sources) == 2:
            one, two = sources
            return lambda batch: batch.set(target, function(one(batch), two(batch)))
        return lambda batch: batch.set(target, function(*[source(batch) for source in sources]))

    def find(self, name: str) -> tuple[int, str] | None:
        scope = self.statement.scope
        for depth in range(len(scope), 0, -1):
            if (scope[:depth], name) in self.kernel.registers:
                return self.kernel.registers[scope[:depth], name]
        return None

    def register(self, name: str) -> int:
        found = self.find(name)
        if found is None:
            raise self.unsupported(f"{name} is not a register")
        return found[0]

    def read(self, operand: str, kind: str) -> Callable[[Batch], Array]:
        """→ function that gives the operand over all threads, or one value for all of them."""
        bits, dtype = bits_in_type(kind), np.dtype(DTYPES[kind])
        if kind == "pred" and operand.startswith("!"):
            inner = self.read(operand[1:], kind)
            return lambda batch: ~inner(batch)
        found = self.find(operand)
        if found is None:
            return self.constant(operand, kind)
        number, declared = found
        stored = register_dtype(declared)
        if stored.itemsize * 8 < bits or (kind == "pred") != (declared == "pred"):
            raise self.unsupported(f"{operand} is .{declared}, too short for .{kind}")
        if kind.endswith("x2"):
            return lambda batch: np.ascontiguousarray(batch.registers[number]).view(dtype).reshape(-1, 2)
        if stored == dtype:
            return lambda batch: batch.registers[number]
        if stored.itemsize == dtype.itemsize:
            return lambda batch: batch.registers[number].view(dtype)
        short = np.dtype(f"u{dtype.itemsize}")
        return lambda batch: batch.registers[number].astype(short).view(dtype)

    def constant(self, operand: str, kind: str) -> Callable[[Batch], Array]:
        bits, dtype = bits_in_type(kind), np.dtype(DTYPES[kind])
        if operand.startswith("%"):
            return self.special(operand, dtype)
        if operand in self.kernel.symbols:
            return lambda batch: np.array([batch.addresses[operand]], np.int64).astype(dtype)
        try:
            value = number_in(operand)
        except ValueError:
            raise self.unsupported(f"{operand} is not a register, a number or a variable") from None
        if kind == "pred":
            array = np.array([value != 0])
        else:
            array = np.array([value & (1 << bits) - 1], f"u{bits // 8}").view(dtype)
        array = array.reshape(-1, 2) if kind.endswith("x2") else array
        return lambda batch: array

    def special(self, name: str, dtype: np.dtype) -> Callable[[Batch], Array]:
        if name not in SPECIAL_REGISTERS:
            raise self.unsupported(f"{name} is a special register that is not known here")
        return lambda batch: batch.special[name].astype(dtype, copy=False)

    def address(self, operand: str) -> Callable[[Batch], Array]:
        """[register + offset] or [variable + offset] → the addresses of the active threads, int64."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        if match is None:
            raise self.unsupported(f"{operand} is not an address")
        base, offset = match[1], int(match[2] or 0)
        found = self.find(base)
        value = self.read(base, found[1] if found else "u64")

        bits = bits_in_type(found[1]) if found else 64
        wrap = (1 << min(bits, 63)) - 1  # 32-bit addresses of shared memory go round

        def addresses(batch: Batch) -> Array:
            return (batch.active(value(batch)).astype(np.int64) + offset) & wrap

        return addresses

    def registers(self, operand: str) -> list[int | None]:
        """{a, b, …} or one → their numbers; None for _, which takes what nobody wants."""
        names = [n.strip() for n in operand.strip("{}").split(",")]
        return [None if name == "_" else self.register(name) for name in names]

    def reads(self, operand: str, kind: str) -> list[Callable[[Batch], Array]]:
        return [self.read(name.strip(), kind) for name in operand.strip("{}").split(",")]


# Instructions that do more than compute a register from others

ORDER = r"(?:\.volatile|\.weak|(?:\.(?:relaxed|acquire|release|acq_rel)(?:\.(?:cta|gpu|sys))))?"
SPACE = r"(?:\.(global|shared|const|local)(?:::cta)?)?"
HINTS = r"(?:\.nc)?(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?(?:\.L1::\w+)?(?:\.L2::evict_\w+)?(?:\.L2::(?:64|128|256)B)?"
VECTOR = r"(?:\.v([248]))?\.([bsuf](?:8|16|32|64))"


@instruction(r"mov\.([bsuf](?:16|32|64)|pred)")
def _mov(d: Decoder, kind: str) -> Callable[[Batch], None]:
    target, source = d.operands
    if source.startswith("{"):
        parts = d.reads(source, f"b{bits_in_type(kind) // len(source.split(','))}")
        number, dtype = d.register(target), register_dtype(kind)

        def pack(batch: Batch) -> None:
            values = [np.broadcast_to(part(batch), batch.size) for part in parts]
            batch.set(number, np.stack(values, axis=-1).view(dtype)[:, 0])

        return pack
    if target.startswith("{"):
        numbers, value = d.registers(target), d.read(source, kind)
        part_dtype = np.dtype(f"u{bits_in_type(kind) // 8 // len(numbers)}")

        def unpack(batch: Batch) -> None:
            whole = np.ascontiguousarray(value(batch))
            for number, part in zip(numbers, whole.view(part_dtype).reshape(len(whole), -1).T):
                if number is not None:
                    batch.set(number, np.ascontiguousarray(part))

        return unpack
    number, value = d.register(target), d.read(source, kind)
    return lambda batch: batch.set(number, value(batch))


WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


@instruction(r"cvta(\.to)?\.(global|shared|const|local)\.u64")
def _cvta(d: Decoder, to: str | None, space: str) -> Callable[[Batch], None]:
    number, value = d.register(d.operands[0]), d.read(d.operands[1], "u64")
    window = u64(WINDOWS[space])
    return lambda batch: batch.set(number, value(batch) - window if to else value(batch) + window)


@instruction(rf"ld\.param{VECTOR}")
def _ld_param(d: Decoder, vector: str | None, kind: str) -> Callable[[Batch], None]:
    match = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", d.operands[1])
    if match is None or d.kernel.symbols.get(match[1], ("", 0, 0))[0] != "param":
        raise d.unsupported(f"{d.operands[1]} is not a parameter")
    first, dtype = d.kernel.symbols[match[1]][1] + int(match[2] or 0), np.dtype(DTYPES[kind])
    numbers = d.registers(d.operands[0])

    def run(batch: Batch) -> None:
        for number, value in zip(numbers, batch.parameters[first : first + len(numbers) * dtype.itemsize].view(dtype)):
            if number is not None:
                batch.set(number, np.array([value]))

    return run


def accesses(batch: Batch, space: str | None, addresses: Array) -> list[tuple[str, Array]]:
    """(space, which of the active threads) of a generic address, or the space that the instruction names."""
    if space:
        return [("global" if space == "const" else space, np.arange(len(addresses)))]
    shared, local = addresses >= SHARED_WINDOW, addresses >= LOCAL_WINDOW
    shared &= addresses < LOCAL_WINDOW
    inside = {"shared": shared & (addresses < watch.FIRST), "local": local & (addresses < watch.FIRST)}
    inside["global"] = ~inside["shared"] & ~inside["local"]
    return [(name, np.flatnonzero(chosen)) for name, chosen in inside.items() if chosen.any()]


def touch(batch: Batch, access: Callable, space: str | None, addresses: Array, values: Array, alignment: int) -> None:
    """Load into, or store from, values (active threads, bytes)."""
    for name, chosen in accesses(batch, space, addresses):
        where = addresses[chosen] - (0 if space else WINDOWS[name])
        part, lanes = values[chosen], batch.lanes[chosen]
        batch.check(access(batch.spaces[name], where, lanes, batch.now(name), part, alignment), name, lanes, where, alignment)
        values[chosen] = part


@instruction(rf"ld{ORDER}{SPACE}{HINTS}{VECTOR}")
def _ld(d: Decoder, space: str | None, vector: str | None, kind: str) -> Callable[[Batch], None]:
    numbers, addresses, dtype = d.registers(d.operands[0]), d.address(d.operands[1]), np.dtype(DTYPES[kind])
    width = dtype.itemsize * int(vector or 1)

    def run(batch: Batch) -> None:
        values = np.empty((len(batch.lanes), width), u8)
        touch(batch, watch.load, space, addresses(batch), values, width)
        for number, column in zip(numbers, values.view(dtype).T):
            if number is not None:
                batch.set_active(number, np.ascontiguousarray(column))

    return run


@instruction(rf"st{ORDER}{SPACE}{HINTS}{VECTOR}")
def _st(d: Decoder, space: str | None, vector: str | None, kind: str) -> Callable[[Batch], None]:
    addresses, sources = d.address(d.operands[0]), d.reads(d.operands[1], kind)

    def run(batch: Batch) -> None:
        columns = [batch.active(source(batch)) for source in sources]
        values = np.stack(columns, axis=1).view(u8)
        touch(batch, watch.store, space, addresses(batch), values, values.shape[1])

    return run


@instruction(r"bra(?:\.uni)?")
def _bra(d: Decoder) -> Callable[[Batch], int]:
    if d.operands[0] not in d.kernel.labels:
        raise d.unsupported(f"there is no label {d.operands[0]}")
    target = d.kernel.labels[d.operands[0]]
    return lambda batch: target


@instruction(r"(?:ret|exit)(?:\.uni)?")
def _exit(d: Decoder) -> Callable[[Batch], int]:
    return lambda batch: EXITED


@instruction(r"trap")
def _trap(d: Decoder) -> Callable[[Batch], None]:
    return lambda batch: batch.fail(PtxError, batch.lanes[0], "reaches a trap")


@instruction(r"membar\.(?:cta|gl|sys)|fence(?:\.(?:sc|acq_rel))?\.(?:cta|gpu|sys)")
def _fence(d: Decoder) -> Callable[[Batch], None]:
    return lambda batch: None  # everything is visible at once here, and a fence alone orders no two threads


@instruction(r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?")
def _bar(d: Decoder) -> Callable[[Batch], int | None]:
    if len(d.operands) > 1:
        raise d.unsupported("a barrier for a part of the block is not modelled")
    return lambda batch: batch.wait(lambda who: None)


@instruction(r"(?:bar|barrier)(?:\.cta)?\.red(?:\.aligned)?\.(popc|and|or)\.(u32|pred)")
def _bar_red(d: Decoder, name: str, kind: str) -> Callable[[Batch], int | None]:
    if len(d.operands) > 3:
        raise d.unsupported("a barrier for a part of the block is not modelled")
    number, vote = d.register(d.operands[0]), d.read(d.operands[-1], "pred")
    reduce = {"popc": np.add, "and": np.logical_and, "or": np.logical_or}[name].reduceat

    def finish(batch: Batch, who: Array) -> None:
        """`who` is all of some blocks, their threads in order."""
        threads = np.flatnonzero(who)
        firsts = np.flatnonzero(np.diff(batch.block_number[threads], prepend=-1))
        votes = np.broadcast_to(vote(batch), batch.size)[threads].astype(u32)
        counts = np.diff(firsts, append=len(threads))
        batch.activate(who)
        batch.set_active(number, np.repeat(reduce(votes, firsts), counts).astype(DTYPES[kind]))

    return lambda batch: batch.wait(lambda who: finish(batch, who))


# Warps: arrays are (warps, 32) here


@instruction(r"bar\.warp\.sync|barrier\.warp\.sync")
def _warp_sync(d: Decoder) -> Callable[[Batch], None]:
    named = d.read(d.operands[0], "b32")

    def run(batch: Batch) -> None:
        batch.warps(needs=batch.alive())
        missing = np.flatnonzero(~batch.named(named) & batch.alive() & batch.mask)
        if len(missing):
            batch.fail(Unsupported, missing[0], "waits for a part of its warp, which is not modelled")
        batch.warp_syncs[batch.lanes] += 1
        batch.stamps = watch.stamps(batch.thread, batch.warp_syncs, batch.barriers)

    return run


@instruction(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shfl(d: Decoder, mode: str) -> Callable[[Batch], None]:
    targets = [d.register(name) for name in d.operands[0].split("|")]
    value, b, c, named = (d.read(operand, "b32") for operand in d.operands[1:])
    lane = np.arange(WARP)

    def run(batch: Batch) -> None:
        members = batch.members(named)
        distance, limit = (np.broadcast_to(x(batch), batch.size).reshape(-1, WARP).astype(np.int64) for x in (b, c))
        segment, clamp = limit >> 8 & 31, limit & 31
        distance = distance & 31
        last = lane & segment | clamp & ~segment
        first = lane & segment
        source = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance, "idx": first | distance & ~segment}
        chosen = source[mode]
        inside = chosen >= last if mode == "up" else chosen <= last
        chosen = np.where(inside, chosen, lane)
        reachable = np.take_along_axis(members, chosen, axis=1)
        lost = np.flatnonzero((batch.mask.reshape(-1, WARP) & ~reachable).ravel())
        if len(lost):
            batch.fail(Divergence, lost[0], f"reads from lane {chosen.ravel()[lost[0]]}, which takes no part in this shfl")
        values = np.broadcast_to(value(batch), batch.size).reshape(-1, WARP)
        batch.set(targets[0], np.take_along_axis(values, chosen, axis=1).ravel())
        for target in targets[1:]:
            batch.set(target, inside.ravel())

    return run


def one_bits(members: Array) -> Array:
    """(warps, 32) booleans → (warps,) uint32, lane 0 the lowest bit."""
    return np.packbits(members, axis=1, bitorder="little").view(u32)[:, 0]


@instruction(r"vote\.sync\.(?:(all|any|uni)\.pred|(ballot)\.b32)")
def _vote(d: Decoder, mode: str | None, ballot: str | None) -> Callable[[Batch], None]:
    number, vote, named = d.register(d.operands[0]), d.read(d.operands[1], "pred"), d.read(d.operands[2], "b32")

    def run(batch: Batch) -> None:
        members = batch.members(named)
        yes = np.broadcast_to(vote(batch), batch.size).reshape(-1, WARP)
        everyone, anyone = (yes | ~members).all(axis=1), (yes & members).any(axis=1)
        result = {"all": everyone, "any": anyone, "uni": everyone | ~anyone, None: one_bits(yes & members)}[mode]
        batch.set(number, np.repeat(result, WARP))

    return run


@instruction(r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu]32)")
def _redux(d: Decoder, name: str, kind: str) -> Callable[[Batch], None]:
    number, value, named = d.register(d.operands[0]), d.read(d.operands[1], kind), d.read(d.operands[2], "b32")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}[name].reduce  # fmt: skip
    info = np.iinfo(DTYPES[kind])
    neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(name, 0)

    def run(batch: Batch) -> None:
        members = batch.members(named)
        values = np.broadcast_to(value(batch), batch.size).reshape(-1, WARP)
        result = reduce(np.where(members, values, DTYPES[kind](neutral)), axis=1, dtype=DTYPES[kind])
        batch.set(number, np.repeat(result, WARP))

    return run


@instruction(r"activemask\.b32")
def _activemask(d: Decoder) -> Callable[[Batch], None]:
    number = d.register(d.operands[0])
    return lambda batch: batch.set(number, np.repeat(one_bits(batch.mask.reshape(-1, WARP)), WARP))


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(d: Decoder, count: str, transposed: str | None) -> Callable[[Batch], None]:
    numbers, addresses, matrices = d.registers(d.operands[0]), d.address(d.operands[1]), int(count)
    if len(numbers) != matrices:
        raise d.unsupported(f"{matrices} matrices need as many registers")

    def run(batch: Batch) -> None:
        warps = batch.warps()
        giving = np.arange(len(batch.lanes)).reshape(-1, WARP)[:, : 8 * matrices].ravel()  # lane 8j + i: row i of matrix j
        rows = np.empty((len(giving), 16), u8)
        where, lanes = addresses(batch)[giving], batch.lanes[giving]
        batch.check(watch.load(batch.spaces["shared"], where, lanes, batch.stamps, rows, 16), "shared", lanes, where, 16)
        tiles = rows.view(u16).reshape(len(warps), matrices, 8, 8)
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles)
        for j, number in enumerate(numbers):  # lane 4g + t gets elements 2t and 2t + 1 of row g
            if number is not None:
                batch.set_active(number, np.ascontiguousarray(tiles[:, j]).view(u32).ravel())

    return run


CHUNK = r"(?:\.L2::(?:64|128|256)B)?"


@instruction(rf"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global{CHUNK}")
def _cp_async(d: Decoder, cache: str) -> Callable[[Batch], None]:
    to, source, width = d.address(d.operands[0]), d.address(d.operands[1]), int(d.operands[2])
    if width not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise d.unsupported(f"{width} bytes")
    limit = d.operands[3] if len(d.operands) > 3 else str(width)
    found = d.find(limit.removeprefix("!"))
    ignores = found is not None and found[1] == "pred"
    value = d.read(limit, "pred" if ignores else "u32")

    def run(batch: Batch) -> None:
        sizes = batch.active(value(batch))
        sizes = np.where(sizes, 0, width) if ignores else sizes
        data, origin = np.zeros((len(batch.lanes), width), u8), source(batch)
        if (sizes > width).any():
            batch.fail(BadAccess, batch.lanes[sizes.argmax()], f"copies {sizes.max()} bytes into {width}")
        for size in np.unique(sizes[sizes > 0]):  # what is not copied becomes zero
            chosen = np.flatnonzero(sizes == size)
            part, lanes, where = np.empty((len(chosen), int(size)), u8), batch.lanes[chosen], origin[chosen]
            found = watch.load(batch.spaces["global"], where, lanes, batch.now("global"), part, width)
            batch.check(found, "global", lanes, where, int(size))
            data[chosen, : int(size)] = part
        where = to(batch)
        found = watch.start_copies(batch.spaces["shared"], where, batch.lanes, batch.stamps, data, width)
        batch.check(found, "shared", batch.lanes, where, width)
        batch.copies.append(Copies(batch.lanes, where, batch.groups[batch.lanes], width))

    return run


class Copies(NamedTuple):
    """cp.async of some threads that are in flight."""

    lanes: Array
    addresses: Array  # in shared memory
    groups: Array  # number of its thread's group
    width: int


@instruction(r"cp\.async\.commit_group")
def _commit(d: Decoder) -> Callable[[Batch], None]:
    def run(batch: Batch) -> None:
        batch.groups[batch.lanes] += 1

    return run


@instruction(r"cp\.async\.wait_(?:group|(all))")
def _wait(d: Decoder, everything: str | None) -> Callable[[Batch], None]:
    pending = -1 if everything else int(d.operands[0])  # so many of the last groups may still be in flight

    def run(batch: Batch) -> None:
        done = np.where(batch.mask, batch.groups - pending, 0)
        still = []
        for copies in batch.copies:
            landed = copies.groups < done[copies.lanes]
            lanes, where = copies.lanes[landed], copies.addresses[landed]
            watch.land(batch.spaces["shared"], where, lanes, batch.stamps, copies.width)
            rest = ~landed
            if rest.any():
                still.append(Copies(copies.lanes[rest], copies.addresses[rest], copies.groups[rest], copies.width))
        batch.copies = still

    return run


@instruction(rf"(atom|red){ORDER}{SPACE}\.(add|min|max|and|or|xor|exch|cas)\.([bsu](?:32|64))")
def _atom(d: Decoder, result: str, space: str | None, name: str, kind: str) -> Callable[[Batch], None]:
    """One thread after the other, in order of their numbers; the hardware may choose any order."""
    operands = list(d.operands)
    number = d.registers(operands.pop(0))[0] if result == "atom" else None
    addresses, sources = d.address(operands[0]), [d.read(operand, kind) for operand in operands[1:]]
    dtype = np.dtype(DTYPES[kind])
    update: dict[str, Callable] = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "exch": lambda old, new: new, "cas": lambda old, compare, new: new if old == compare else old
    }  # fmt: skip

    def run(batch: Batch) -> None:
        where, values = addresses(batch), [batch.active(source(batch)) for source in sources]
        before = np.empty(len(where), dtype)
        for name_of, chosen in accesses(batch, space, where):
            own, lanes, memory = where[chosen] - (0 if space else WINDOWS[name_of]), batch.lanes[chosen], batch.spaces[name_of]
            places = np.empty(len(own), np.int64)
            found = watch.reserve(memory, own, lanes, batch.now(name_of), places, dtype.itemsize)
            batch.check(found, name_of, lanes, own, dtype.itemsize)
            cells = memory.data.view(dtype)
            for i, place in zip(chosen, places // dtype.itemsize):
                before[i] = cells[place]
                cells[place] = update[name](before[i], *(value[i] for value in values))
        if number is not None:
            batch.set_active(number, before)

    return run


# Tensor cores. Fragments (PTX ISA, Matrix Fragments for mma): lane 4g + t holds row or column g, and along K the
# t-th piece of every eighth or half


def rows_of_a(registers: list[Array]) -> Array:
    """Four registers over (warps, 8, 4) lanes, cut into pieces (…, 8, 4, pieces) → (warps, 16, K)."""
    parts = np.stack(registers, axis=1)  # (warps, r, g, t, pieces); r & 1: lower rows, r >> 1: upper half of K
    w, _, g, t, pieces = parts.shape
    return np.ascontiguousarray(parts.reshape(w, 2, 2, g, t, pieces).transpose(0, 2, 3, 1, 4, 5)).reshape(w, 16, -1)


def rows_of_b(registers: list[Array]) -> Array:
    parts = np.stack(registers, axis=1)
    return np.ascontiguousarray(parts.transpose(0, 2, 1, 3, 4)).reshape(len(parts), 8, -1)


def matrix_of_c(registers: list[Array]) -> Array:
    parts = np.stack(registers, axis=-1)  # (warps, g, t, e); e & 1: next column, e >> 1: lower rows
    w = len(parts)
    return np.ascontiguousarray(parts.reshape(w, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)).reshape(w, 16, 8)


def registers_of_c(matrix: Array) -> list[Array]:
    parts = matrix.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return [np.ascontiguousarray(parts[e >> 1, e & 1]).ravel() for e in range(4)]


def halves_in(registers: Array) -> Array:
    return registers.view(np.int16).reshape(*registers.shape, 2)


def nibbles_in(registers: Array) -> Array:
    return (registers[..., None] >> np.arange(0, 32, 4, dtype=u32) & u32(15)).astype(u8)


class Mma:
    """The operands that both kinds of mma have."""

    def __init__(self, d: Decoder) -> None:
        self.targets = [d.register(name.strip()) for name in d.operands[0].strip("{}").split(",")]
        self.a, self.b, self.c = (d.reads(operand, "b32") for operand in d.operands[1:4])
        if [len(x) for x in (self.targets, self.a, self.b, self.c)] != [4, 4, 2, 4]:
            raise d.unsupported("D, A, B and C take 4, 4, 2 and 4 registers")

    def lanes(self, batch: Batch, sources: list[Callable[[Batch], Array]]) -> list[Array]:
        """Each operand over (warps, 8, 4) lanes."""
        return [np.ascontiguousarray(batch.active(source(batch))).reshape(-1, 8, 4) for source in sources]

    def finish(self, batch: Batch, d: Array) -> None:
        for target, value in zip(self.targets, registers_of_c(d)):
            batch.set_active(target, value)


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def _mma_half(d: Decoder, kind: str) -> Callable[[Batch], None]:
    mma, widths = Mma(d), FP16 if kind == "f16.f16" else BF16

    def run(batch: Batch) -> None:
        batch.warps()
        a = rows_of_a([halves_in(x) for x in mma.lanes(batch, mma.a)])
        b = rows_of_b([halves_in(x) for x in mma.lanes(batch, mma.b)])
        c = matrix_of_c(mma.lanes(batch, mma.c)).view(f32)
        bits = np.int16 if widths == FP16 else u16
        mma.finish(batch, half_warps(a.view(bits), b.view(bits), c, widths))

    return run


SHAPE = r"(?:\.m16n8k64\.row\.col)?"
KIND = r"\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"


@instruction(rf"mma\.sync\.aligned{SHAPE}{KIND}{SHAPE}\.f32\.e2m1\.e2m1\.f32\.ue4m3")
def _mma_nvfp4(d: Decoder) -> Callable[[Batch], None]:
    mma = Mma(d)
    scales = [d.read(d.operands[i].strip("{} "), "b32") for i in (4, 6)]
    selectors = [d.reads(d.operands[i], "u16") for i in (5, 7)]

    def chosen(batch: Batch, i: int) -> int:
        """The thread of each quad, or pair of threads for A, that gives scales."""
        byte, thread = (np.unique(batch.active(x(batch))) for x in selectors[i])
        threads = range(2) if i == 0 else range(4)
        if list(byte) != [0] or len(thread) != 1 or thread[0] not in threads:
            why = f"selects byte {byte} and thread {thread} of scales; with 4X that is byte 0 and one of {threads}"
            batch.fail(PtxError, batch.lanes[0], why)
        return int(thread[0])

    def run(batch: Batch) -> None:
        batch.warps()
        a = rows_of_a([nibbles_in(x) for x in mma.lanes(batch, mma.a)])
        b = rows_of_b([nibbles_in(x) for x in mma.lanes(batch, mma.b)])
        c = matrix_of_c(mma.lanes(batch, mma.c)).view(f32)
        of_a, of_b = mma.lanes(batch, scales)
        pair, thread = 2 * chosen(batch, 0), chosen(batch, 1)
        sfa = np.concatenate([of_a[:, :, pair], of_a[:, :, pair + 1]], axis=1)  # rows 0–7 and 8–15
        sfb = np.ascontiguousarray(of_b[:, :, thread])
        mma.finish(batch, nvfp4_warps(a, b, *(x.view(u8).reshape(len(x), -1, 4) for x in (sfa, sfb)), c))

    return run
