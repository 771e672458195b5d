"""Tensor cores of a warp: ldmatrix, stmatrix, mma.sync.

Products are exact in float32 and summed by numpy's matmul in float32: the order of a tensor core's additions, and the
bits it drops while aligning them, are not published and not modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.generator import Emitter, Generator, items
from hotloop.emulator.syntax import Address, Instruction, Register, registers_of
from hotloop.emulator.types import F32, U32, Array, Type
from hotloop.emulator.units.load_store import address_check

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

# shape, type of A and B -> registers of A, of B. A register holds 4 bytes of one row (A) or column (B).
SHAPES = {
    ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
    ("m16n8k4", "tf32"): (2, 1),
    ("m16n8k32", "s8"): (4, 2),
    ("m16n8k32", "u8"): (4, 2),
    ("m16n8k16", "s8"): (2, 1),
    ("m16n8k16", "u8"): (2, 1),
}


# ---------------------------------------------------------------------- what the emitted code calls
def elements(register: Array, kind: str) -> Array:
    """The numbers that a 32-bit register of A or B holds, (lanes, numbers), as float32 or int32."""
    register = np.ascontiguousarray(register)
    if kind == "bf16":
        out = np.empty((len(register), 2), np.uint32)
        out[:, 0] = register << np.uint32(16)
        out[:, 1] = register & np.uint32(0xFFFF0000)
        return out.view(np.float32)
    if kind == "f16":
        return register.view(np.float16).reshape(-1, 2).astype(np.float32)
    if kind == "tf32":
        # The low 13 bits are ignored.
        return (register & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 1)
    return register.view(np.int8 if kind == "s8" else np.uint8).reshape(-1, 4).astype(np.int32)


def fragment(registers: list[Array], kind: str, halves: int) -> Array:
    """Rows of A (halves=2: rows g and g + 8) or columns of B (halves=1), (warps, 8 * halves, k)."""
    parts = []
    for j in range(0, len(registers), halves):
        rows = [elements(registers[j + h], kind) for h in range(halves)]
        # Lane 4 g + t holds numbers t * n .. t * n + n - 1 of row g.
        parts.append(np.concatenate([r.reshape(-1, 8, 4 * r.shape[1]) for r in rows], axis=1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def multiply_fragments(
    X: Machine,
    k: int,
    kinds: tuple[str, str],
    A: list[Array],
    B: list[Array],
    C: list[Array],
    half: bool,
    operations: int,
    M: Array,
    F: bool,
) -> list[Array]:
    """D = A B + C. Lane 4 g + t holds columns 2 t and 2 t + 1 of rows g and g + 8."""
    if not F:
        X.require_warp(k, M, "mma")
    X.counters.tensor_operations(k, X.warps if F else int(np.count_nonzero(M.reshape(-1, 32).any(1))), operations)
    a, b = fragment(A, kinds[0], 2), fragment(B, kinds[1], 1)
    d = np.matmul(a, b.transpose(0, 2, 1)).reshape(X.warps, 2, 8, 4, 2)
    if not half:
        return [d[:, j >> 1, :, :, j & 1].reshape(-1) + C[j] for j in range(4)]
    out = []
    for j in range(2):
        c = np.ascontiguousarray(C[j]).view(np.float16).reshape(-1, 2)
        sums = (d[:, j].reshape(-1, 2) + c).astype(np.float16)
        out.append(np.ascontiguousarray(sums).view(np.uint32).ravel())
    return out


def _rows(X: Machine, count: int, M: Array, F: bool) -> tuple[Array, Array]:
    """(warps that take part, the lanes whose addresses are used)"""
    warps = np.arange(X.warps) if F else np.flatnonzero(M.reshape(-1, 32).any(1))
    return warps, (warps[:, None] * 32 + np.arange(8 * count)).ravel()


def load_matrices(
    X: Machine, k: int, address: Array, M: Array, F: bool, count: int, transposed: bool, into: tuple[int, ...]
) -> list[Array]:
    if not F:
        X.require_warp(k, M, "ldmatrix")
    warps, rows = _rows(X, count, M, F)
    plan = X.shared.plan(k, address[rows], rows, 16, 8)
    raw, undefined = X.shared.load(k, plan, 16)
    words = raw.view(np.uint32).reshape(len(warps), count, 8, 4)
    if transposed:
        halves = words.view(np.uint16).reshape(len(warps), count, 8, 8).transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32)
    values = words.reshape(len(warps), count, 32)
    if undefined is not None or X.taint.any:
        bad = None if undefined is None else np.logical_or.reduce(undefined.reshape(len(warps), count, 8), axis=2)
        for j, d in enumerate(into):
            found = None
            if bad is not None:
                per_warp = np.zeros((X.warps, 32), bool)
                per_warp[warps] = bad[:, j : j + 1]
                found = per_warp.ravel()
            X.taint.put((d,), found, M)
    if len(warps) == X.warps:
        return list(np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(count, -1))
    out = np.zeros((count, X.warps, 32), np.uint32)
    out[:, warps] = values.transpose(1, 0, 2)
    return list(out.reshape(count, -1))


def store_matrices(
    X: Machine,
    k: int,
    address: Array,
    M: Array,
    F: bool,
    values: list[Array],
    transposed: bool,
    sources: tuple[int, ...],
) -> None:
    if not F:
        X.require_warp(k, M, "stmatrix")
    count = len(values)
    warps, rows = _rows(X, count, M, F)
    plan = X.shared.plan(k, address[rows], rows, 16, 8)
    words = np.stack([v.reshape(X.warps, 8, 4)[warps] for v in values], 1)
    if transposed:
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8).transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32)
    X.changes += 1
    X.shared.store(k, plan, np.ascontiguousarray(words).view(np.uint8).reshape(len(rows), 16))
    if X.taint.any:
        tainted = X.taint.of(sources)
        if tainted is not None:
            X.shared.undefine(plan, np.repeat(tainted.reshape(-1, 32).any(1), 32)[plan.owners])


# ---------------------------------------------------------------------- emitters
def matrix_multiply(g: Generator, i: Instruction) -> list[str]:
    shape = next((m for m in i.modifiers if m.startswith("m") and "n" in m and "k" in m), "")
    kinds = [m for m in i.modifiers if m in ("f16", "bf16", "tf32", "f32", "s8", "u8", "s32")]
    if len(kinds) != 4 or not i.has("row") or not i.has("col") or i.has("sp", "satfinite"):
        raise i.unsupported("this form of mma is not emulated")
    to, ka, kb, kc = kinds
    sizes = SHAPES.get((shape, ka))
    whole = ka in ("s8", "u8")
    if sizes is None or SHAPES.get((shape, kb)) != sizes or to != kc or i.guard is not None:
        raise i.unsupported("this form of mma is not emulated")
    if (whole and to != "s32") or (not whole and to not in (("f32", "f16") if ka == "f16" else ("f32",))):
        raise i.unsupported("this form of mma is not emulated")
    d, a, b, c = (items(o) for o in i.operands)
    half = to == "f16"
    tc = U32 if half else Type("s", 32) if whole else F32
    depth = int(shape.split("k")[1])
    names = [f"[{', '.join(g.wide(o, U32) for o in group)}]" for group in (a, b)]
    accumulators = f"[{', '.join(g.wide(o, tc) for o in c)}]"
    arguments = f"{(ka, kb)}, {names[0]}, {names[1]}, {accumulators}, {half}, {16 * 8 * depth}, M, F"
    results = [(o, f"v[{j}]", tc) for j, o in enumerate(d)]
    call = f"v = {g.use(multiply_fragments)}(X, {i.index}, {arguments})"
    return [call, *g.assign(i, results, uniform=False, warp=True)]


def load_matrix(g: Generator, i: Instruction) -> list[str]:
    target, source = i.operands
    d = items(target)
    if not i.has("m8n8") or not i.has("b16") or i.guard is not None:
        raise i.unsupported("this form of ldmatrix is not emulated")
    assert isinstance(source, Address)
    into = tuple(o.index for o in d if isinstance(o, Register))
    lines = [address_check(i, source, "M")]
    call = f"{g.use(load_matrices)}(X, {i.index}, {g.address(source)}, M, F, {len(d)}, {i.has('trans')}, {into})"
    lines.append(f"v = {call}")
    for j, o in enumerate(d):
        assert isinstance(o, Register)
        e = g.stored(f"v[{j}]", Type("b", 32), o.index)
        lines.append(f"R[{o.index}] = {e} if F else merge(M, {e}, R[{o.index}])")
    return lines


def store_matrix(g: Generator, i: Instruction) -> list[str]:
    target, source = i.operands
    values = items(source)
    if not i.has("m8n8") or not i.has("b16") or i.guard is not None:
        raise i.unsupported("this form of stmatrix is not emulated")
    assert isinstance(target, Address)
    given = ", ".join(g.wide(o, Type("b", 32)) for o in values)
    sources = tuple(registers_of(source))
    call = f"{g.use(store_matrices)}(X, {i.index}, {g.address(target)}, M, F, [{given}], {i.has('trans')}, {sources})"
    return [address_check(i, target, "M"), call]


EMITTERS: dict[str, Emitter] = {"mma": matrix_multiply, "ldmatrix": load_matrix, "stmatrix": store_matrix}
