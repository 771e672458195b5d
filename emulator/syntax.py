"""The typed form of a kernel: operands, instructions, declarations. The parser makes it, everything else reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hotloop.emulator.errors import UnsupportedPTX
from hotloop.emulator.types import TYPES, Type


@dataclass(frozen=True)
class Register:
    index: int


@dataclass(frozen=True)
class Not:
    """A predicate used negated: !%p1."""

    register: Register


@dataclass(frozen=True)
class Immediate:
    value: int  # an integer, or the bits of a float
    float_bits: int = 0  # 32 or 64 for 0f... and 0d... constants


@dataclass(frozen=True)
class Special:
    name: str  # "tid.x", without the percent sign


@dataclass(frozen=True)
class Symbol:
    """The address of a variable: space is shared, local, global, const or param."""

    name: str
    space: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations, d|p."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Discard:
    """The sink _."""


Operand = Register | Not | Immediate | Special | Symbol | Vector | Pair | Address | Discard


@dataclass(frozen=True)
class SourceLine:
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Instruction:
    index: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: int | None  # a predicate register
    guard_negated: bool
    source: SourceLine | None
    line: int
    text: str
    targets: tuple[str, ...] = ()  # labels of a branch
    destinations: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()

    @property
    def types(self) -> list[Type]:
        return [TYPES[m] for m in self.modifiers if m in TYPES]

    @property
    def type(self) -> Type:
        """The last type named, which is that of the sources of cvt and of everything else as a rule."""
        found = self.types
        if not found:
            raise self.unsupported("an instruction without a type")
        return found[-1]

    def has(self, *names: str) -> bool:
        return any(n in self.modifiers for n in names)

    def one_of(self, *names: str) -> str | None:
        return next((m for m in self.modifiers if m in names), None)

    def unsupported(self, reason: str = "the emulator does not know this instruction") -> UnsupportedPTX:
        return UnsupportedPTX(reason, self.text, self.line, str(self.source) if self.source else "")


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # "u64", or "b8" for a structure
    size: int
    align: int
    offset: int


@dataclass(frozen=True)
class Variable:
    """A variable of the module or of a function. `size` is None for extern shared memory; `data` its initial bytes."""

    name: str
    space: str
    align: int
    size: int | None
    data: bytes = b""


@dataclass
class Body:
    """One kernel with its device functions inlined."""

    name: str
    target: str
    parameters: list[Parameter]
    reqntid: tuple[int, int, int] | None
    maxntid: tuple[int, int, int] | None
    shared: list[Variable]
    globals: list[Variable]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Type] = field(default_factory=list)
    local_offsets: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0


def registers_of(operand: Operand) -> Iterator[int]:
    if isinstance(operand, Register):
        yield operand.index
    elif isinstance(operand, Not):
        yield operand.register.index
    elif isinstance(operand, Address):
        yield from registers_of(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Pair):
        yield from registers_of(operand.first)
        yield from registers_of(operand.second)
