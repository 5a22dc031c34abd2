"""PTX text → kernels: statements with lines, registers with types, variables with places."""

import re
from bisect import bisect
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .ptx_arithmetic import bits_in_type


class PtxError(Exception):
    """A kernel that cannot go on. The message has the kernel, the line, the thread and the reason."""


class Unsupported(PtxError):
    """An opcode, modifier or operand that this interpreter does not know."""


class Statement(NamedTuple):
    text: str
    line: int  # in the PTX
    source: str  # file:line of the CUDA source, if it was compiled with -lineinfo
    scope: tuple[int, ...]  # braces around it


class Variable(NamedTuple):
    name: str
    space: str
    kind: str
    size: int
    alignment: int
    values: str
    dynamic: bool  # .extern .shared x[]: as long as the launch says


class Kernel:
    """One .entry."""

    def __init__(self, name: str, parameters: str) -> None:
        self.name = name
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}  # number of the statement that follows
        self.registers: dict[tuple[tuple[int, ...], str], int] = {}  # scope and name → number
        self.types: list[str] = []  # of the registers, by number
        self.symbols: dict[str, tuple[str, int, int]] = {}  # variable → space, address, bytes
        self.sizes = {"shared": 0, "local": 0, "param": 0}
        self.parameters: list[tuple[str, int]] = []  # type, place
        self.most_threads = 1024
        self.code: list[Any] = []  # ptx_instructions.Instruction: filled at the first launch
        for text in filter(None, map(str.strip, parameters.split(","))):
            match = re.fullmatch(r"\.param\s+\.(\w+)(?:\s+\.ptr\b.*?)?\s+([\w$]+)", text)
            if match is None:
                raise Unsupported(f"{name}: {text!r} is neither a number nor a pointer.")
            size = bits_in_type(match[1]) // 8
            self.parameters.append((match[1], self.place("param", match[2], size, size)))

    def place(self, space: str, name: str, size: int, alignment: int) -> int:
        gap = 16 if space == "shared" and self.sizes[space] else 0  # so that a step too far is noticed
        address = -(-(self.sizes[space] + gap) // alignment) * alignment
        self.symbols[name], self.sizes[space] = (space, address, size), address + size
        return address

    def declare(self, scope: tuple[int, ...], kind: str, names: str) -> None:
        """.reg .b32 %r<9>, x;"""
        for name in map(str.strip, names.split(",")):
            prefix, _, count = name.partition("<")
            for each in [f"{prefix}{i}" for i in range(int(count[:-1]))] if count else [name]:
                self.registers[scope, each] = len(self.types)
                self.types.append(kind)

    @property
    def dynamic_from(self) -> int:
        """Address of the shared memory whose size the launch gives: behind the rest."""
        return (self.sizes["shared"] + 16 + 127) // 128 * 128 if self.sizes["shared"] else 0


TOKEN = re.compile(
    r"""\s*(?:
    \.(?P<directive>version|target|address_size|maxntid|minnctapersm|reqntid|maxnreg|file|loc)\b(?P<rest>[^\n]*)
    |(?:\.visible\s+|\.weak\s+)*\.entry\s+(?P<entry>[\w$]+)\s*\((?P<parameters>[^)]*)\)
    |(?P<label>[$\w]+):(?!:)
    |(?P<brace>[{}])
    |(?P<statement>[^;]+);)""",
    re.VERBOSE,
)
VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)*\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<kind>\w+)\s+(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*(?P<values>.*))?",
    re.DOTALL,
)


class Text:
    """What a PTX text holds."""

    def __init__(self, text: str) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.variables: list[Variable] = []  # outside the kernels
        names = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)
        self.files = {number: name.split("/")[-1] for number, name in names}
        text = re.sub(r"/\*.*?\*/", lambda comment: re.sub(r"[^\n]", "", comment[0]), text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.split(r"^\s*\.section", text, maxsplit=1, flags=re.MULTILINE)[0]  # debug information
        line_ends = [match.start() for match in re.finditer("\n", text)]
        self.kernel: Kernel | None = None
        self.scope: tuple[int, ...] = ()
        self.source, self.braces, at = "", 0, 0
        while match := TOKEN.match(text, at):
            self.token(match, bisect(line_ends, match.start(match.lastgroup or 0)) + 1)
            at = match.end()
        if rest := text[at:].strip():
            line = bisect(line_ends, len(text) - len(text[at:].lstrip())) + 1
            raise Unsupported(f"PTX line {line}: {rest.splitlines()[0]!r} is not understood.")

    def token(self, match: re.Match[str], line: int) -> None:
        if match["entry"]:
            self.kernel = self.kernels[match["entry"]] = Kernel(match["entry"], match["parameters"])
            for variable in self.variables:
                if variable.space == "shared" and not variable.dynamic:
                    self.kernel.place("shared", variable.name, variable.size, variable.alignment)
                self.kernel.symbols.setdefault(variable.name, (variable.space, 0, 0))
        elif match["brace"] == "{":
            self.braces += 1
            self.scope = (*self.scope, self.braces)
        elif match["brace"]:
            self.scope = self.scope[:-1]
            if self.kernel and not self.scope:
                self.kernel.statements.append(Statement("exit", line, self.source, ()))
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
            self.statement(Statement(match["statement"].strip(), line, self.source, self.scope))

    def statement(self, statement: Statement) -> None:
        if match := VARIABLE.fullmatch(statement.text):
            self.variable(match)
        elif self.kernel is None:
            raise Unsupported(f"PTX line {statement.line}: {statement.text!r} is not understood.")
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement.text, re.DOTALL):
            self.kernel.declare(statement.scope, match[1], match[2])
        elif not statement.text.startswith(".pragma"):
            self.kernel.statements.append(statement)

    def variable(self, match: re.Match[str]) -> None:
        element = bits_in_type(match["kind"]) // 8
        count = int(match["count"] or 0) if match["array"] else 1
        dynamic, alignment = bool(match["array"]) and not match["count"], int(match["align"] or element)
        name, space = match["name"], match["space"]
        if self.kernel and space in ("shared", "local"):
            self.kernel.place(space, name, element * count, alignment)
        else:
            values = match["values"] or ""
            self.variables.append(
                Variable(name, space, match["kind"], element * count, alignment, values, dynamic)
            )
            if self.kernel:
                self.kernel.symbols[name] = (space, 0, 0)


def number_in(text: str) -> int:
    """An integer, or the bits of a floating-point number. Raises ValueError for anything else."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return int(text.removesuffix("U"), 0)


def initial_values(variable: Variable) -> np.ndarray:
    """Of a variable of a module; zero where the text gives none."""
    bits = bits_in_type(variable.kind)
    values = np.zeros(variable.size * 8 // bits, f"u{bits // 8}")
    for i, text in enumerate(re.findall(r"[-\w]+", variable.values)):
        values[i] = number_in(text) & (1 << bits) - 1
    return values
