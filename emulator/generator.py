"""Code generation: the source text of one Python function per basic block.

A function `b3(X, R, M, F)` runs block 3 for the lanes in mask M of machine X. R[i] holds register i as one array over
all lanes; arrays are never changed in place, so that registers may share them. F says that M is every lane, in which
case results replace registers; otherwise they are merged under the mask. What an instruction does is written by the
emitter of its execution unit, from the expressions that `value` gives for operands and the lines that `assign` gives
for results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.flow import Block
from hotloop.emulator.syntax import (
    Address,
    Body,
    Discard,
    Immediate,
    Instruction,
    Not,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
    registers_of,
)
from hotloop.emulator.types import FLOAT, SINT, UINT, Array, Type

Emitter = Callable[["Generator", Instruction], list[str]]
Result = tuple[Operand, str, Type]


def merge(mask: Array, new: Array, old: Array | None) -> Array:
    return new if old is None else np.where(mask, new, old)


class Generator:
    def __init__(self, body: Body, blocks: list[Block], emitters: dict[str, Emitter]) -> None:
        self.body = body
        self.blocks = blocks
        self.namespace: dict[str, Any] = {"np": np, "merge": merge}
        self.namespace |= {f"U{b}": t for b, t in UINT.items()}
        self.namespace |= {f"I{b}": t for b, t in SINT.items()}
        self.namespace |= {f"F{b}": t for b, t in FLOAT.items()}
        self.constants: dict[tuple[Any, Any], str] = {}
        self.float_votes: Counter[int] = Counter()
        self.float_home = [t.kind == "f" and t.bits > 16 for t in body.registers]
        self.wgmma_registers = frozenset(
            r
            for i in body.instructions
            if i.opcode == "wgmma" and i.has("mma_async")
            for o in i.operands[:2]
            if isinstance(o, Vector)
            for r in registers_of(o)
        )
        self._blocks_source(emitters)
        # The first pass has counted how each register is used: as a float, or as bits.
        self.float_home = [
            home or (t.bits in (32, 64) and t.kind != "pred" and self.float_votes[r] > 0)
            for r, (home, t) in enumerate(zip(self.float_home, body.registers, strict=True))
        ]
        self.source = self._blocks_source(emitters)

    def compile(self) -> list[Callable[..., None]]:
        exec(compile(self.source, f"<kernel {self.body.name}>", "exec"), self.namespace)
        return [self.namespace[f"b{k}"] for k in range(len(self.blocks))]

    def _blocks_source(self, emitters: dict[str, Emitter]) -> str:
        lines = []
        for k, block in enumerate(self.blocks):
            lines.append(f"def b{k}(X, R, M, F):")
            for i in block.instructions:
                emitter = emitters.get(i.opcode)
                if emitter is None:
                    raise i.unsupported()
                lines += [f" {line}" for line in self._hazards(i)]
                lines += [f" {line}" for line in emitter(self, i)]
            lines.append(" return")
        return "\n".join(lines)

    def _hazards(self, i: Instruction) -> list[str]:
        """Registers of a wgmma in flight must be left alone, and writing them asks for a new wgmma.fence."""
        if not self.wgmma_registers or i.opcode == "wgmma":
            return []
        touched = self.wgmma_registers & {*i.sources, *i.destinations}
        written = self.wgmma_registers & set(i.destinations)
        lines = [f"if X.wgmma.flying: X.wgmma.touch({i.index}, {tuple(touched)}, M)"] if touched else []
        return [*lines, f"X.wgmma.wrote({tuple(written)}, M)"] if written else lines

    # ------------------------------------------------------------------ names
    def use(self, thing: Any) -> str:
        """A function of an execution unit, by its own name."""
        name: str = thing.__name__
        if self.namespace.setdefault(name, thing) is not thing:
            raise AssertionError(f"two functions are called {name}")
        return name

    def constant(self, value: Any) -> str:
        key = (type(value), value.tobytes() if hasattr(value, "tobytes") else value)
        if key not in self.constants:
            self.constants[key] = f"K{len(self.constants)}"
            self.namespace[self.constants[key]] = value
        return self.constants[key]

    # ------------------------------------------------------------------ operands
    def value(self, operand: Operand, t: Type) -> str:
        """An expression for the operand as an array (or numpy scalar) of the Python type that stands for t."""
        if isinstance(operand, Register):
            return self._register_value(operand.index, t)
        if isinstance(operand, Not):
            return f"(~R[{operand.register.index}])"
        if isinstance(operand, Immediate):
            return self.constant(immediate(operand, t))
        if isinstance(operand, Special):
            wide = operand.name in ("clock64", "globaltimer")
            expression = f"X.special[{operand.name!r}]"
            expression = expression if (t.bits == 64) == wide else f"{expression}.astype(U{t.bits})"
            return f"{expression}.view(I{t.bits})" if t.kind == "s" else expression
        if isinstance(operand, Symbol):
            return f"X.symbol({operand.name!r}, {operand.space!r}, U{t.bits})"
        raise AssertionError(f"{operand} is no value")

    def _register_value(self, r: int, t: Type) -> str:
        home, bits, name = self.float_home[r], self.body.registers[r].bits, f"R[{r}]"
        if self.body.registers[r].kind == "pred" or t.kind == "pred":
            return name
        if bits in (32, 64) and bits == t.bits:
            if t.kind == "f":
                self.float_votes[r] += 1
            elif t.kind != "b":
                self.float_votes[r] -= 1
            if t.kind == "f":
                return name if home else f"{name}.view(F{bits})"
        if home:
            name = f"{name}.view(U{bits})"
        if bits != t.bits:
            name = f"{name}.astype(U{t.bits})"
        if t.kind == "s":
            return f"{name}.view(I{t.bits})"
        if t.kind == "f":
            return f"{name}.view(F{t.bits})"
        if t.kind == "bf":
            return f"{self.use(numeric.from_bf16)}({name})"
        return name

    def wide(self, operand: Operand, t: Type) -> str:
        """The same, always with an element per lane."""
        expression = self.value(operand, t)
        return expression if isinstance(operand, (Register, Special)) else f"X.full({expression})"

    def address(self, operand: Operand) -> str:
        """A 64-bit address per lane."""
        assert isinstance(operand, Address)
        base, offset = operand.base, operand.offset
        narrow = isinstance(base, Register) and self.body.registers[base.index].bits == 32
        wide = Type("u", 64)
        if narrow:
            assert isinstance(base, Register)
            # 32-bit shared and local addresses wrap at 32 bits.
            expression = self.value(base, Type("u", 32))
            if offset:
                expression = f"({expression} + {self.constant(np.uint32(offset & 0xFFFFFFFF))})"
            return f"{expression}.astype(U64)"
        expression = self.value(base, wide)
        if offset:
            expression = f"({expression} + {self.constant(np.uint64(offset & (2**64 - 1)))})"
        return expression if isinstance(base, Register) else f"X.full({expression})"

    def mask(self, i: Instruction) -> tuple[str, str]:
        """(mask expression, expression that says whether it is every lane)."""
        if i.guard is None:
            return "M", "F"
        return f"(M & {'~' if i.guard_negated else ''}R[{i.guard}])", "False"

    # ------------------------------------------------------------------ results
    def stored(self, expression: str, t: Type, r: int) -> str:
        """The expression of type t as register r keeps it."""
        register, home = self.body.registers[r], self.float_home[r]
        if register.kind == "pred" or t.kind == "pred":
            return expression
        bits = register.bits
        if t.kind == "f" and t.bits in (32, 64) and bits == t.bits:
            self.float_votes[r] += 1
            return expression if home else f"({expression}).view(U{bits})"
        if t.kind in "us" and bits == t.bits:
            self.float_votes[r] -= 1
        if t.kind == "f":
            expression = f"({expression}).view(U{t.bits})"
        elif t.kind == "bf":
            expression = f"{self.use(numeric.to_bf16)}({expression})"
        elif t.kind == "s":
            if bits > t.bits:
                expression = f"({expression}).astype(I{bits})"
            expression = f"({expression}).view(U{max(bits, t.bits)})"
            t = Type("u", max(bits, t.bits))
        if bits != t.bits:
            expression = f"({expression}).astype(U{bits})"
        return f"({expression}).view(F{bits})" if home else expression

    def assign(
        self, i: Instruction, results: Sequence[Result], *, uniform: bool | None = None, warp: bool = False
    ) -> list[str]:
        """Lines that write results under the mask and carry taint from sources to destinations.

        uniform: the expressions are scalars. warp: a lane's results depend on all lanes of the warp.
        """
        if uniform is None:
            uniform = not any(isinstance(o, Special) or any(True for _ in registers_of(o)) for o in i.operands[1:])
        lines, pairs = [], []
        for j, (operand, expression, t) in enumerate(results):
            if isinstance(operand, Discard):
                continue
            assert isinstance(operand, Register)
            expression = self.stored(expression, t, operand.index)
            if uniform:
                expression = f"X.full({expression})"
            pairs.append((operand.index, f"t{j}"))
            lines.append(f"t{j} = {expression}")
        if i.guard is not None:
            lines.append(f"P = {self.mask(i)[0]}")
            lines += [f"R[{r}] = merge(P, {name}, R[{r}])" for r, name in pairs]
        else:
            lines += [f"R[{r}] = {name} if F else merge(M, {name}, R[{r}])" for r, name in pairs]
        if i.destinations:
            lines.append(self.taint(i.destinations, i.sources, "M" if i.guard is None else "P", warp))
        return lines

    @staticmethod
    def taint(destinations: Sequence[int], sources: Sequence[int], mask: str, warp: bool = False) -> str:
        spread = "spread_warp" if warp else "spread"
        return f"if X.taint.any: X.taint.{spread}({tuple(destinations)}, {tuple(sources)}, {mask})"


def immediate(operand: Immediate, t: Type) -> Any:
    """A constant as a numpy scalar of the type that stands for t."""
    value = operand.value
    if t.kind == "pred":
        return np.bool_(value)
    if operand.float_bits and t.kind in ("f", "bf"):
        exact = UINT[operand.float_bits](value).view(FLOAT[operand.float_bits])
        return exact.astype(np.float32 if t.kind == "bf" else FLOAT[t.bits])
    if t.kind == "f" and t.bits > 16:
        return FLOAT[t.bits](value)
    bits = UINT[t.bits](value & ((1 << t.bits) - 1))
    if t.kind == "f":
        return bits.view(np.float16)
    if t.kind == "bf":
        return (np.array([bits], np.uint32) << np.uint32(16)).view(np.float32)[0]
    return bits.view(SINT[t.bits]) if t.kind == "s" else bits


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector operand, or the one operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)
