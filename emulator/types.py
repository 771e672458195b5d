"""PTX's fundamental types and how a register of each is stored: one numpy array with an element per lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Kind = Literal["u", "s", "b", "f", "bf", "pred", "f16x2", "bf16x2", "f32x2"]

UINT: dict[int, Any] = {1: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass(frozen=True)
class Type:
    kind: Kind
    bits: int

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")

    @property
    def is_packed(self) -> bool:
        return self.kind in ("f16x2", "bf16x2", "f32x2")

    @property
    def bytes(self) -> int:
        return max(1, self.bits // 8)


TYPES: dict[str, Type] = {f"{k}{b}": Type(k, b) for k in ("u", "s", "b") for b in (8, 16, 32, 64)}
TYPES |= {f"f{b}": Type("f", b) for b in (16, 32, 64)}
TYPES |= {
    "pred": Type("pred", 1),
    "bf16": Type("bf", 16),
    "tf32": Type("b", 32),
    "b128": Type("b", 128),
    "f16x2": Type("f16x2", 32),
    "bf16x2": Type("bf16x2", 32),
    "f32x2": Type("f32x2", 64),
    "u16x2": Type("b", 32),  # the opcodes that take pairs of integers look at the name
    "s16x2": Type("b", 32),
}
U32, U64 = TYPES["u32"], TYPES["u64"]
F32, PRED = TYPES["f32"], TYPES["pred"]


def storage(kind: Type) -> Any:
    """The numpy type of a register: bool for predicates, unsigned bits or the float itself otherwise."""
    return np.bool_ if kind.kind == "pred" else UINT[kind.bits]
