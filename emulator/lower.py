"""Statements -> one flat list of typed instructions per kernel: names resolved, device functions inlined.

Calls are expanded in place, each with registers, labels and local memory of its own, so that everything after this file
sees one control-flow graph. A `.param` variable of a call is local memory; a formal parameter is the caller's variable.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from hotloop.emulator.errors import UnsupportedPTX
from hotloop.emulator.parser import Function, Source, Statement, parameters, split_top, variable
from hotloop.emulator.syntax import (
    Address,
    Body,
    Discard,
    Immediate,
    Instruction,
    Not,
    Operand,
    Pair,
    Register,
    Special,
    Symbol,
    Vector,
    registers_of,
)
from hotloop.emulator.types import TYPES

_SPECIAL = re.compile(
    r"%((?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]|laneid|warpid|nwarpid|smid|nsmid|"
    r"gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(?:eq|le|lt|ge|gt)|"
    r"dynamic_smem_size|total_smem_size|cluster_ctarank|cluster_nctarank|is_explicit_cluster)$"
)
_CALL = re.compile(
    r"call(?:\.uni)?\s+(?:\((?P<results>[^)]*)\)\s*,\s*)?(?P<name>[\w$%]+)\s*(?:,\s*\((?P<actuals>[^)]*)\))?\s*"
    r"(?P<prototype>,.*)?$"
)
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")
_OPCODE = re.compile(r"([\w.:]+)\s*(.*)$", re.S)
_ADDRESS = re.compile(r"([^\s+]+)\s*(?:\+\s*(-?\w+))?$")
_BRANCHES = ("bra", "brx")

# Their first operand is read, not written.
WITHOUT_DESTINATION = frozenset(
    [
        "st",
        "stmatrix",
        "bra",
        "brx",
        "bar",
        "barrier",
        "ret",
        "exit",
        "red",
        "membar",
        "fence",
        "cp",
        "trap",
        "brkpt",
        "nanosleep",
        "prefetch",
        "prefetchu",
        "griddepcontrol",
        "discard",
        "applypriority",
        "pmevent",
        "setmaxnreg",
        "mbarrier",
    ]
)


def refuse(reason: str, statement: Statement) -> UnsupportedPTX:
    return UnsupportedPTX(reason, statement.text, statement.line, str(statement.source) if statement.source else "")


@dataclass
class Scope:
    identity: int
    parent: Scope | None
    names: dict[str, Operand] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)  # "%r" -> "b32"
    labels: set[str] = field(default_factory=set)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets

    def chain(self) -> list[Scope]:
        found, scope = [], self
        while True:
            found.append(scope)
            if scope.parent is None:
                return found
            scope = scope.parent


class Lowering:
    def __init__(self, source: Source, kernel: Function) -> None:
        if re.search(r"\.(reqnctapercluster|explicitcluster|maxclusterrank)\b", kernel.attributes):
            raise UnsupportedPTX("clusters are not emulated", " ".join(kernel.attributes.split()), kernel.line)
        self.source = source
        self.body = Body(
            kernel.name,
            source.target,
            parameters(kernel),
            self._shape("reqntid", kernel.attributes),
            self._shape("maxntid", kernel.attributes),
            [v for v in source.variables if v.space == "shared"],
            [v for v in source.variables if v.space in ("global", "const")],
        )
        self.scopes = 0
        self.pending: list[tuple[Instruction, Scope]] = []  # branches, whose labels may come later
        outer = self._scope(None)
        for v in source.variables:
            outer.names[v.name] = Symbol(v.name, v.space)
        for p in self.body.parameters:
            outer.names[p.name] = Symbol(p.name, "param")
        self._expand(kernel, self._scope(outer), [])
        for instruction, scope in self.pending:
            instruction.targets = tuple(self._label(t, scope, instruction) for t in instruction.targets)

    @staticmethod
    def _shape(name: str, attributes: str) -> tuple[int, int, int] | None:
        m = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", attributes)
        return (int(m[1]), int(m[2] or 1), int(m[3] or 1)) if m else None

    def _scope(self, parent: Scope | None) -> Scope:
        self.scopes += 1
        return Scope(self.scopes, parent)

    def _expand(self, function: Function, scope: Scope, stack: list[str]) -> None:
        if function.name in stack:
            raise UnsupportedPTX("recursive device functions are not emulated", function.name, function.line)
        stack = [*stack, function.name]
        leave = None if function.is_kernel else f"return#{scope.identity}"
        for statement in function.statements:
            if statement.kind == "open":
                scope = self._scope(scope)
            elif statement.kind == "close":
                assert scope.parent is not None
                scope = scope.parent
            elif statement.kind == "label":
                scope.labels.add(statement.text)
                self.body.labels[f"{statement.text}#{scope.identity}"] = len(self.body.instructions)
            elif statement.kind == "directive":
                self._directive(statement, scope)
            else:
                self._statement(statement, scope, leave, stack)
        if leave:
            self.body.labels[leave] = len(self.body.instructions)

    # ------------------------------------------------------------------ declarations
    def _directive(self, statement: Statement, scope: Scope) -> None:
        text = statement.text
        if m := re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", text):
            if m[1] not in TYPES:
                raise refuse("a register type the emulator does not know", statement)
            for name in (n.strip() for n in m[2].split(",")):
                if many := re.match(r"([%$\w]+)<(\d+)>$", name):
                    scope.prefixes[many[1]] = m[1]
                else:
                    scope.names[name] = self._register(m[1])
        elif re.match(r"(\.extern\s+)?\.shared\b", text):
            v = variable(text, statement.line)
            unique = f"{v.name}#{scope.identity}" if any(v.name == s.name for s in self.body.shared) else v.name
            self.body.shared.append(type(v)(unique, v.space, v.align, v.size, v.data))
            scope.names[v.name] = Symbol(unique, "shared")
        elif re.match(r"\.(local|param)\b", text):
            v = variable(text, statement.line)
            scope.names[v.name] = self._local(v.name, v.size or 0, v.align, scope)
        elif m := re.match(r"\.branchtargets\s+(.*)", text):
            # `L: .branchtargets a, b;` The label has just been recorded.
            label = next(n for n in reversed(self.body.labels) if n.endswith(f"#{scope.identity}"))
            scope.tables[label.rsplit("#", 1)[0]] = tuple(t.strip() for t in m[1].split(","))
        elif not re.match(r"\.(pragma|callprototype|calltargets)\b", text):
            raise refuse("a directive the emulator does not know", statement)

    def _register(self, type_name: str) -> Register:
        self.body.registers.append(TYPES[type_name])
        return Register(len(self.body.registers) - 1)

    def _local(self, name: str, size: int, align: int, scope: Scope) -> Symbol:
        body, unique = self.body, f"{name}#{scope.identity}"
        body.local_bytes = -(-body.local_bytes // align) * align
        body.local_offsets[unique] = body.local_bytes
        body.local_bytes += size
        return Symbol(unique, "local")

    # ------------------------------------------------------------------ instructions
    def _statement(self, statement: Statement, scope: Scope, leave: str | None, stack: list[str]) -> None:
        text, guard, negated = statement.text, None, False
        if m := _GUARD.match(text):
            register = self._name(m[2], scope, statement)
            if not isinstance(register, Register):
                raise refuse("a guard that is no predicate", statement)
            guard, negated, text = register.index, bool(m[1]), text[m.end() :]
        if text.startswith("call"):
            self._call(text, statement, scope, guard, negated, stack)
            return
        m = _OPCODE.match(text)
        if not m:
            raise refuse("no instruction", statement)
        opcode, *modifiers = m[1].split(".")
        words = split_top(m[2])
        if opcode == "ret" and leave:
            self._emit(statement, scope, "bra", ("uni",), (), guard, negated, (leave,))
        elif opcode == "bra":
            self._emit(statement, scope, opcode, tuple(modifiers), (), guard, negated, (words[0],))
        elif opcode == "brx":
            table = next((s.tables[words[1]] for s in scope.chain() if words[1] in s.tables), None)
            if table is None:
                raise refuse("a branch without its table", statement)
            selector = self._operand(words[0], scope, statement)
            self._emit(statement, scope, opcode, tuple(modifiers), (selector,), guard, negated, table)
        else:
            operands = tuple(self._operand(w, scope, statement) for w in words)
            self._emit(statement, scope, opcode, tuple(modifiers), operands, guard, negated, ())

    def _emit(
        self,
        statement: Statement,
        scope: Scope,
        opcode: str,
        modifiers: tuple[str, ...],
        operands: tuple[Operand, ...],
        guard: int | None,
        negated: bool,
        targets: tuple[str, ...],
    ) -> None:
        written: set[int] = set()
        read = list(operands)
        asynchronous = opcode == "wgmma" and modifiers[0] == "mma_async"
        writes_first = opcode not in WITHOUT_DESTINATION or (opcode in ("bar", "barrier") and "red" in modifiers)
        if operands and writes_first and (opcode != "wgmma" or asynchronous):
            written = set(registers_of(operands[0]))
            # The accumulators of wgmma are read as well.
            read = read if asynchronous else read[1:]
        used = [r for o in read for r in registers_of(o)] + ([guard] if guard is not None else [])
        instruction = Instruction(
            len(self.body.instructions),
            opcode,
            modifiers,
            operands,
            guard,
            negated,
            statement.source,
            statement.line,
            statement.text,
            targets,
            tuple(sorted(written)),
            tuple(dict.fromkeys(used)),
        )
        self.body.instructions.append(instruction)
        if targets:
            self.pending.append((instruction, scope))

    def _call(
        self, text: str, statement: Statement, scope: Scope, guard: int | None, negated: bool, stack: list[str]
    ) -> None:
        m = _CALL.match(text)
        if not m or m["name"].startswith("%"):
            raise refuse("indirect calls are not emulated", statement)
        callee = self.source.functions.get(m["name"])
        if m["name"] == "__assertfail":
            self._emit(statement, scope, "trap", ("assert",), (), guard, negated, ())
            return
        if callee is None or not callee.defined:
            raise refuse(f"{m['name']} has no body in this module", statement)
        inner = self._scope(self._outermost(scope))
        after = f"call#{inner.identity}"
        if guard is not None:
            self._emit(statement, scope, "bra", (), (), guard, not negated, (after,))
        names = [*split_top(m["results"] or ""), *split_top(m["actuals"] or "")]
        declared = [*callee.results, *callee.formals]
        if len(names) != len(declared):
            raise refuse("a call whose arguments do not fit the function", statement)
        for actual, formal in zip(names, declared, strict=True):
            bound = self._name(actual, scope, statement)
            if not (isinstance(bound, Symbol) and bound.space == "local") or ".param" not in formal:
                raise refuse("only .param arguments are passed to functions", statement)
            inner.names[variable(formal, callee.line).name] = bound
        self._expand(callee, inner, stack)
        if guard is not None:
            self.body.labels[after] = len(self.body.instructions)

    @staticmethod
    def _outermost(scope: Scope) -> Scope:
        return scope.chain()[-1]

    # ------------------------------------------------------------------ names
    def _label(self, name: str, scope: Scope, instruction: Instruction) -> str:
        if name in self.body.labels:  # made here: return#n, call#n
            return name
        for s in scope.chain():
            if name in s.labels:
                return f"{name}#{s.identity}"
        raise instruction.unsupported(f"a branch to {name}, which is not in sight")

    def _name(self, name: str, scope: Scope, statement: Statement) -> Operand:
        counted = re.match(r"(.*?)(\d+)$", name)
        for s in scope.chain():
            if name in s.names:
                return s.names[name]
            if counted and counted[1] in s.prefixes:
                register = self._register(s.prefixes[counted[1]])
                s.names[name] = register
                return register
        raise refuse(f"{name} is not declared", statement)

    def _operand(self, word: str, scope: Scope, statement: Statement) -> Operand:
        first = word[0]
        if first == "{":
            return Vector(tuple(self._operand(w, scope, statement) for w in split_top(word[1:-1])))
        if first == "[":
            m = _ADDRESS.match(word[1:-1].strip())
            if not m:
                raise refuse("an address the emulator does not know", statement)
            return Address(self._operand(m[1], scope, statement), int(m[2] or "0", 0))
        if "|" in word:
            a, b = (self._operand(w.strip(), scope, statement) for w in word.split("|"))
            return Pair(a, b)
        if first == "!":
            register = self._name(word[1:].strip(), scope, statement)
            assert isinstance(register, Register)
            return Not(register)
        if word == "_":
            return Discard()
        if m := _SPECIAL.match(word):
            return Special(m[1])
        if m := re.match(r"0[fF]([0-9a-fA-F]{8})$", word):
            return Immediate(int(m[1], 16), 32)
        if m := re.match(r"0[dD]([0-9a-fA-F]{16})$", word):
            return Immediate(int(m[1], 16), 64)
        if m := re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", word):
            return Immediate(int(word.rstrip("U"), 0))
        if re.match(r"-?\d+\.\d*(e[-+]?\d+)?$", word):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(word)))[0], 64)
        if word == "WARP_SZ":
            return Immediate(32)
        return self._name(word, scope, statement)


def lower(source: Source, kernel: Function) -> Body:
    return Lowering(source, kernel).body
