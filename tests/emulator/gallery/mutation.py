"""PTX with one instruction damaged: what a slip in a kernel, or in a compiler, would look like."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Edit = Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Rule:
    kind: str
    pattern: re.Pattern[str]
    edit: Edit


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int  # of the PTX, from 1
    text: str  # the instruction before
    ptx: str

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.line}: {self.text}"


def rule(kind: str, pattern: str, edit: str | Edit) -> Rule:
    return Rule(kind, re.compile(pattern), edit if callable(edit) else lambda found: found.expand(edit))


def number(value: Callable[[int], int]) -> Edit:
    """Replaces the one number of a pattern `(before)(number)(after)`."""
    return lambda found: f"{found[1]}{value(int(found[2], 0))}{found[3]}"


def flip_transpose(found: re.Match[str]) -> str:
    return found[0].replace(".trans", "") if ".trans" in found[0] else found[0].replace(".x4", ".x4.trans")


RULES = [
    rule("barrier dropped", r"^bar\.sync\b.*", ""),
    rule("wait dropped", r"^(cp\.async\.wait_group|wgmma\.wait_group\S*)\b.*", ""),
    rule("wait weakened", r"^(cp\.async\.wait_group\s+)(\d+)(;)", number(lambda n: n + 1)),
    rule("commit dropped", r"^cp\.async\.commit_group;", ""),
    rule("copy dropped", r"^cp\.async\.c[ag]\..*", ""),
    rule("transpose flipped", r"^ldmatrix\..*", flip_transpose),
    rule("shuffle distance changed", r"^(shfl\.sync\.bfly\.b32.*, )(\d+)(, 31, -1;)", number(lambda n: n ^ 3)),
    rule("constant changed", r"^((?:xor|and|or)\.b32\s.*, )(\d+)(;)", number(lambda n: n ^ 16)),
    rule("constant changed", r"^(add\.s32\s.*, )(-?\d+)(;)", number(lambda n: n + 8)),
    rule("constant changed", r"^(shl\.b32\s.*, )(\d+)(;)", number(lambda n: n + 1)),
    rule("constant changed", r"^(mov\.[bu]32\s+%r\d+, )([1-9]\d*)(;)", number(lambda n: n + 1)),
    rule("predicate weakened", r"^(setp)\.lt(\.[su]\d+\s.*)", r"\1.le\2"),
    rule("predicate weakened", r"^(setp)\.le(\.[su]\d+\s.*)", r"\1.lt\2"),
    rule("predicate dropped", r"^@!?%p\d+\s+((?:ld|st)\.global.*)", r"\1"),
    rule("predicate dropped", r"^(selp\.b32\s+%r\d+, 16, )0(, %p\d+;)", r"\g<1>16\2"),
]


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every damage of every rule. A statement is looked for where it begins a line, as compilers write them."""
    lines = ptx.split("\n")
    for i, line in enumerate(lines):
        statement = line.strip()
        for rule in RULES:
            changed = rule.pattern.sub(rule.edit, statement, count=1)
            if changed != statement:
                damaged = "\n".join([*lines[:i], changed, *lines[i + 1 :]])
                yield Mutant(rule.kind, i + 1, " ".join(statement.split()), damaged)
