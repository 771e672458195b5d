"""PTX text -> the declarations of a module and the statements of its functions, with the line of each."""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from hotloop.emulator.errors import EmulatorError, UnsupportedPTX
from hotloop.emulator.syntax import Parameter, SourceLine, Variable
from hotloop.emulator.types import TYPES

_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|/\*.*?\*/|//[^\n]*', re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*?inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_LABEL = re.compile(r"([$%\w.]+)\s*:(?!:)")
_INLINE_ASSEMBLY = re.compile(r"// begin inline asm\n.*?// end inline asm", re.S)
_SPACE = re.compile(r"\s*")
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|common)\s+)*(?P<extern>\.extern\s+)?(?:\.visible\s+)?\.(?P<space>shared|global|const|local|param)"
    r"(?:\s+\.(?:align\s+(?P<align>\d+)|ptr|attribute\([^)]*\)))*\s+(?:\.v(?P<vector>[24])\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$%.]+)\s*(?P<sizes>(?:\[\s*\d*\s*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)


@dataclass(frozen=True)
class Statement:
    kind: Literal["open", "close", "label", "instruction", "directive"]
    text: str
    line: int
    source: SourceLine | None


@dataclass
class Function:
    name: str
    is_kernel: bool
    results: list[str]  # declarations of the return parameters of a device function
    formals: list[str]  # declarations of the parameters
    attributes: str
    line: int
    statements: list[Statement] = field(default_factory=list)
    defined: bool = False


@dataclass
class Source:
    """A parsed module: what its functions share."""

    target: str
    version: str
    functions: dict[str, Function]
    variables: list[Variable]


def blank_comments(text: str) -> str:
    """Comments become spaces; lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        return found if found.startswith('"') else "\n" * found.count("\n") or " "

    return _STRING_OR_COMMENT.sub(blank, text)


def one_line_per_assembly(ptx: str) -> str:
    """LLVM counts a source line further for each line of an inline assembly: of its .loc only the first is true."""

    def keep_first(match: re.Match[str]) -> str:
        before, loc, after = match.group(0).partition(".loc")
        first, newline, rest = after.partition("\n")
        return before + loc + first + newline + re.sub(r"\.loc\b[^\n]*", "", rest)

    return _INLINE_ASSEMBLY.sub(keep_first, ptx)


def split_top(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def variable(declaration: str, line: int) -> Variable:
    m = _VARIABLE.match(declaration.strip())
    if not m or m["type"] not in TYPES:
        raise UnsupportedPTX("a declaration the emulator does not know", declaration, line)
    element = TYPES[m["type"]].bytes * int(m["vector"] or 1)
    sizes = re.findall(r"\[\s*(\d*)\s*\]", m["sizes"])
    size: int | None = element
    for n in sizes:
        size = None if not n or size is None else size * int(n)
    if size is not None and m["extern"] and m["space"] != "shared":
        raise UnsupportedPTX("an external variable: modules are not linked", declaration, line)
    data = _initial_bytes(m["init"], m["type"], line) if m["init"] else b""
    if size is None and data:
        size = len(data)
    return Variable(m["name"], m["space"], int(m["align"] or element), size, data)


def _initial_bytes(init: str, type_name: str, line: int) -> bytes:
    kind = TYPES[type_name]
    out = b""
    for word in re.findall(r'"[^"]*"|[^\s{},]+', init):
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", word):
            out += int(word[2:], 16).to_bytes(kind.bytes, "little")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", word):
            out += (int(word.rstrip("U"), 0) & ((1 << kind.bits) - 1)).to_bytes(kind.bytes, "little")
        elif re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", word) and kind.kind == "f":
            out += struct.pack("<f" if kind.bits == 32 else "<d", float(word))
        else:
            raise UnsupportedPTX("an initialiser the emulator does not know", word, line)
    return out


class _Locations:
    """Source lines: the innermost frame of an inlined chain that lies in the kernel's own file."""

    def __init__(self, text: str, source_root: str | None) -> None:
        self.files = {int(n): (b and f"{a}/{b}") or a for n, a, b in _FILE.findall(text)}
        self.root = source_root
        self.parents: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.own: int | None = None

    def begin(self) -> None:
        self.parents.clear()
        self.own = None

    def read(self, directive: str) -> SourceLine | None:
        m = _LOCATION.match(directive)
        if not m:
            return None
        at = (int(m[1]), int(m[2]), int(m[3]))
        if self.own is None:
            self.own = at[0]
        if m[4]:
            self.parents[at] = (int(m[4]), int(m[5]), int(m[6]))
        frame, seen = at, set()
        while frame[0] != self.own and frame in self.parents and frame not in seen:
            seen.add(frame)
            frame = self.parents[frame]
        name = self.files.get(frame[0], "?")
        if self.root and name.startswith(self.root.rstrip("/") + "/"):
            name = name[len(self.root.rstrip("/")) + 1 :]
        else:
            name = PurePath(name).name
        return SourceLine(name, frame[1])


class Parser:
    def __init__(self, ptx: str, source_root: str | None = None) -> None:
        self.text = blank_comments(one_line_per_assembly(ptx))
        self.newlines = [i for i, c in enumerate(self.text) if c == "\n"]
        self.locations = _Locations(self.text, source_root)

    def line_of(self, position: int) -> int:
        return bisect_right(self.newlines, position - 1) + 1

    def parse(self) -> Source:
        text, position = self.text, 0
        target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
        version = re.search(r"^\s*\.version\s+([\d.]+)", text, re.M)
        if not target or not version:
            raise EmulatorError("this is no PTX: .version and .target are missing")
        source = Source(target[1], version[1], {}, [])
        while True:
            position = self._skip(position)
            if position >= len(text):
                return source
            if re.compile(r"\.(version|target|address_size|file|loc)\b").match(text, position):
                position = self._end_of_line(position)
            elif text.startswith(".section", position):
                position = text.index("}", position) + 1
            elif _FUNCTION.match(text, position):
                position = self._function(position, source)
            elif text[position] == ";":
                position += 1
            else:
                end = self._find(";", position)
                statement = text[position:end]
                if not re.match(r"\.(pragma|alias)\b", statement):
                    source.variables.append(variable(statement, self.line_of(position)))
                position = end + 1

    def _skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        assert match
        return match.end()

    def _end_of_line(self, position: int) -> int:
        end = self.text.find("\n", position)
        return len(self.text) if end < 0 else end

    def _find(self, mark: str, position: int) -> int:
        end = self.text.find(mark, position)
        if end < 0:
            raise UnsupportedPTX(
                f"the text ends before a {mark!r}", self.text[position : position + 60], self.line_of(position)
            )
        return end

    def _function(self, position: int, source: Source) -> int:
        line = self.line_of(position)
        opening = re.compile(r"[{;]").search(self.text, position)
        if not opening:
            raise UnsupportedPTX("a function without a body", self.text[position : position + 60], line)
        header = self.text[position : opening.start()]
        m = re.match(
            r"(?:\.\w+\s+)*?\.(?P<kind>entry|func)\b\s*(?P<attribute>\.attribute\([^)]*\)\s*)?"
            r"(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<formals>[^)]*)\))?(?P<attributes>.*)$",
            header,
            re.S,
        )
        if not m:
            raise UnsupportedPTX("a function header the emulator does not know", " ".join(header.split()), line)
        function = Function(
            m["name"],
            m["kind"] == "entry",
            split_top(m["results"] or ""),
            split_top(m["formals"] or ""),
            m["attributes"],
            line,
        )
        if opening.group() == ";":
            source.functions.setdefault(function.name, function)
            return opening.end()
        function.defined = True
        source.functions[function.name] = function
        return self._body(opening.end(), function)

    def _body(self, position: int, function: Function) -> int:
        text, depth, location = self.text, 1, None
        self.locations.begin()
        add = function.statements.append
        while True:
            position = self._skip(position)
            if position >= len(text):
                raise UnsupportedPTX("the text ends inside a function", function.name, function.line)
            c, line = text[position], self.line_of(position)
            if c == "{":
                depth += 1
                add(Statement("open", "{", line, location))
                position += 1
            elif c == "}":
                depth -= 1
                position += 1
                if depth == 0:
                    return position
                add(Statement("close", "}", line, location))
            elif c == ";":
                position += 1
            elif text.startswith((".loc", ".file"), position) and text[position + 4 : position + 6].strip()[:1] != "a":
                end = self._end_of_line(position)
                location = self.locations.read(text[position:end]) or location
                position = end
            elif label := _LABEL.match(text, position):
                add(Statement("label", label[1], line, location))
                position = label.end()
            else:
                end = self._find(";", position)
                kind: Literal["directive", "instruction"] = "directive" if c == "." else "instruction"
                add(Statement(kind, " ".join(text[position:end].split()), line, location))
                position = end + 1


def parameters(function: Function) -> list[Parameter]:
    """The kernel's parameters and where each lies in the parameter block."""
    found, offset = [], 0
    for declaration in function.formals:
        # `.ptr .global .align n` describes what a pointer points to, not the parameter.
        plain = re.sub(r"\.ptr\b(\s*\.(global|shared|const|local))?(\s*\.align\s+\d+)?", "", declaration)
        v = variable(plain, function.line)
        size = v.size or 0
        offset = -(-offset // v.align) * v.align
        kind = re.search(r"\.(\w+)\s+[\w$%.]+\s*(?:\[[^\]]*\])?$", plain)
        assert kind
        found.append(Parameter(v.name, kind[1], size, v.align, offset))
        offset += size
    return found
