"""A kernel made ready to run: its blocks, their code, and what the machine must know about it beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np

from hotloop.emulator.counters import NAMES, Counters, Tally
from hotloop.emulator.flow import blocks_of, maybe_undefined
from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Body, Instruction, registers_of
from hotloop.emulator.types import FLOAT, storage
from hotloop.emulator.units import (
    async_copy,
    atomics,
    convert,
    floating,
    integer,
    load_store,
    matrix,
    moves,
    ordering,
    warp,
    wgmma,
)

UNITS = (integer, floating, convert, moves, load_store, atomics, async_copy, warp, matrix, wgmma, ordering)
EMITTERS: dict[str, Emitter] = {opcode: e for unit in UNITS for opcode, e in unit.EMITTERS.items()}

_CLASSES: dict[str, str] = {
    **dict.fromkeys((*integer.EMITTERS, "sad"), "integer"),
    **dict.fromkeys(
        ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "fma", "copysign", "testp"), "floating"
    ),
    **dict.fromkeys(moves.EMITTERS, "move"),
    **dict.fromkeys(("bra", "brx", "ret", "exit", "trap", "brkpt"), "control"),
    **dict.fromkeys(("bar", "barrier", "membar", "fence", "wgmma"), "synchronisation"),
    **dict.fromkeys(("shfl", "vote", "match", "redux", "activemask", "elect"), "shuffle"),
    **dict.fromkeys(("mma",), "tensor"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), "shared_memory"),
    **dict.fromkeys(("atom", "red"), "atomic"),
    "cvt": "conversion",
    "cp": "global_memory",
}


def class_of(i: Instruction) -> str:
    if i.opcode == "wgmma" and i.has("mma_async"):
        return "tensor"
    if i.opcode == "cp" and i.has("commit_group", "wait_group", "wait_all"):
        return "synchronisation"
    if i.opcode in ("ld", "ldu", "st"):
        if i.has("param"):
            return "move"
        return (
            "shared_memory" if i.has("shared", "shared::cta") else "local_memory" if i.has("local") else "global_memory"
        )
    if i.opcode in integer.INTEGER:
        t = i.type
        return "floating" if t.is_float or t.is_packed else "integer"
    return _CLASSES[i.opcode]


def _strong(i: Instruction) -> bool:
    return i.opcode in ("atom", "red") or (
        i.opcode in ("ld", "st") and i.has("acquire", "release", "relaxed", "volatile", "mmio")
    )


def _orders(i: Instruction) -> bool:
    """Whether it can order CTAs: a fence, or an access with acquire or release, wider than the CTA."""
    if i.opcode == "membar":
        return not i.has("cta")
    if i.opcode == "fence":
        return i.has("sc", "acq_rel", "acquire", "release") and not i.has("cta")
    return i.has("acquire", "release", "acq_rel") and not i.has("cta")


class Program:
    def __init__(self, body: Body) -> None:
        self.body = body
        self.blocks = blocks_of(body)
        self.maybe_undefined = sorted(maybe_undefined(self.blocks))
        self.generator = Generator(body, self.blocks, EMITTERS)
        self.functions = self.generator.compile()
        code = [i for b in self.blocks for i in (*b.instructions, *([b.end.instruction] if b.end.instruction else []))]
        self.has_strong = any(_strong(i) for i in code)
        self.orders_ctas = any(_orders(i) for i in code)
        self.has_wgmma = any(i.opcode == "wgmma" for i in code)
        self.shared_granule = self._granule(code, ("shared", "shared::cta"), ("global", "const", "local", "param"))
        self.global_granule = self._granule(code, ("global", "const"), ("shared", "shared::cta", "local", "param"))

    @staticmethod
    def _granule(code: list[Instruction], spaces: tuple[str, ...], others: tuple[str, ...]) -> int:
        """The narrowest access to the space, at most 4 bytes."""
        narrowest = 4
        for i in code:
            if i.opcode in ("ld", "st", "atom", "red") and (i.has(*spaces) or not i.has(*others)):
                narrowest = min(narrowest, i.type.bytes)
        return narrowest

    def register_dtype(self, r: int) -> Any:
        t = self.body.registers[r]
        return FLOAT[t.bits] if self.generator.float_home[r] else storage(t)

    def stored_float(self, index: int) -> Any:
        """The float type of what this store writes, or None: registers that the kernel uses as floats of one width."""
        values = self.body.instructions[index].operands[-1:]
        kinds = {self.register_dtype(r) for o in values for r in registers_of(o)}
        (kind,) = kinds if len(kinds) == 1 else (None,)
        return kind if kind in (np.float32, np.float64) else None

    def counters(self, tally: Tally) -> Counters:
        """Per source line."""
        lines: dict[str, dict[str, float]] = {}
        for k, block in enumerate(self.blocks):
            warps, threads = int(tally.block_warps[k]), int(tally.block_threads[k])
            if not warps:
                continue
            code = [*block.instructions, *([block.end.instruction] if block.end.instruction else [])]
            for i in code:
                row = lines.setdefault(str(i.source) if i.source else "", dict.fromkeys(NAMES, 0))
                row["warp_instructions"] += warps
                row["thread_instructions"] += threads
                row[class_of(i)] += warps
                for name, table in (("global_load", tally.loads), ("global_store", tally.stores)):
                    for column, n in zip(("requests", "sectors", "bytes"), table[i.index], strict=True):
                        row[f"{name}_{column}"] += int(n)
                phases, wavefronts, size = (int(n) for n in tally.banks[i.index])
                row["shared_phases"] += phases
                row["shared_wavefronts"] += wavefronts
                row["shared_bank_conflicts"] += wavefronts - phases
                row["shared_bytes"] += size
                if i.index in tally.tensor:
                    row["tensor_operations"] += tally.tensor[i.index][0]
                    row["mma_m16n8k16"] += tally.tensor[i.index][1]
        return Counters(lines)
