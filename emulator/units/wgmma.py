"""wgmma: products of a warpgroup, with operands in shared memory.

The layout of an operand follows from its descriptor: start address, leading and stride byte offsets, swizzle. Addresses
and checks depend on nothing else, so that they are kept per descriptor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotloop.emulator.generator import Emitter, Generator, items
from hotloop.emulator.shared import DEFINED, GENERIC
from hotloop.emulator.syntax import Immediate, Instruction, Register, Vector, registers_of
from hotloop.emulator.types import F32, PRED, U32, U64, Array
from hotloop.emulator.units.matrix import fragment

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

ELEMENT = {"bf16": 2, "f16": 2, "tf32": 4}


# ---------------------------------------------------------------------- what the emitted code calls
def operand_addresses(descriptor: int, rows: int, element: int, transposed: bool) -> Array | None:
    """Byte offsets in shared memory of a (rows, 32 bytes of k) operand; None for a descriptor that is not emulated."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        return None
    span = (16, 128, 64, 32)[swizzle]  # bytes of one row of the swizzle pattern
    r, c = np.meshgrid(np.arange(rows), np.arange(32 // element), indexing="ij")
    if transposed:  # rows are contiguous: 8 x span bricks, k runs over the brick's rows
        byte = r * element
        a = start + byte // span * leading + byte % span + c % 8 * span + c // 8 * stride
    elif swizzle:
        a = start + r // 8 * stride + r % 8 * span + c * element
    else:  # 8 x 16-byte bricks
        byte = c * element
        a = start + r // 8 * stride + r % 8 * 16 + byte // 16 * leading + byte % 16
    return a ^ (((a >> 7) & (0, 7, 3, 1)[swizzle]) << 4)


def read_operand(
    X: Machine, k: int, descriptors: Array, groups: Array, rows: int, kind: str, transposed: bool, per_warp: bool
) -> tuple[Array, Array, Array]:
    """(values (groups, rows, k), granules read, lane per granule). per_warp: each warp reads its own 16 rows (A)."""
    element = ELEMENT[kind]
    values = np.zeros((len(groups), rows, 32 // element), np.float32)
    granules, owners = [], []
    shared = X.shared
    for j, (group, descriptor) in enumerate(zip(groups.tolist(), descriptors.tolist(), strict=True)):
        offsets = operand_addresses(descriptor, rows, element, transposed)
        if offsets is None:
            raise X.unsupported(k, "a matrix descriptor with a base offset")
        outside = (offsets < 0) | (offsets + element > shared.size)
        if outside.any():
            at = int(offsets[outside][0])
            X.report(
                "out-of-bounds",
                k,
                np.array([group * 128]),
                f"a matrix descriptor reaches offset {at} of {shared.size} bytes of shared memory",
                "shared",
                at,
            )
            offsets = np.where(outside, 0, offsets)
        base = int(X.cta_of[group * 128]) * shared.stride
        byte = offsets + base
        raw = shared.data.view(np.uint16 if element == 2 else np.uint32)[byte // element]
        values[j] = _decode(raw, kind)
        for warp in range(4):
            mine = byte[16 * warp : 16 * warp + 16] if per_warp else byte
            touched = np.unique(mine // shared.granule)
            granules.append(touched)
            owners.append(np.full(len(touched), group * 128 + warp * 32))
    flat, who = np.concatenate(granules), np.concatenate(owners)
    state = shared.state.take(flat)
    plan = shared.plain_plan(flat, who)
    undefined = shared.check_read(k, plan)
    if undefined is not None and (~np.bitwise_and.reduce(state) & DEFINED):
        X.report("uninitialised", k, np.unique(who[undefined]), "a wgmma reads undefined shared memory", "shared")
    generic = (state & GENERIC) != 0
    if generic.any():
        X.report(
            "proxy-fence",
            k,
            np.unique(who[generic]),
            "a wgmma reads what was written without a fence.proxy.async since",
            "shared",
            int(flat[generic][0] * shared.granule % shared.stride),
        )
    return values, flat, who


def _decode(raw: Array, kind: str) -> Array:
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (raw & np.uint32(0xFFFFE000)).view(np.float32)


def warpgroup_multiply(
    X: Machine,
    k: int,
    columns: int,
    kind: str,
    A: list[Array] | Array,
    B: Array,
    accumulators: list[Array | None],
    accumulate: Array,
    signs: tuple[int, int],
    transposed: tuple[bool, bool],
    registers: tuple[tuple[int, ...], tuple[int, ...]],
    half: bool,
    M: Array,
    F: bool,
) -> list[Array]:
    X.wgmma.require(k, M, F, "wgmma.mma_async")
    groups = np.flatnonzero(M.reshape(-1, 128).any(1))
    first = groups * 128
    depth = 32 // ELEMENT[kind]
    X.counters.tensor_operations(k, 4 * len(groups), 16 * columns * depth)
    X.wgmma.check_registers(k, *registers, M)
    reads = []
    if isinstance(A, list):
        a = fragment(A, kind, 2).reshape(-1, 64, depth)[groups]
    else:
        a, *read = read_operand(X, k, A[first], groups, 64, kind, transposed[0], True)
        reads.append(read)
    b, *read = read_operand(X, k, B[first], groups, columns, kind, transposed[1], False)
    reads.append(read)
    product = np.matmul(a * np.float32(signs[0]), (b * np.float32(signs[1])).transpose(0, 2, 1))
    # Warp w has rows 16 w ..; lane 4 g + t columns 8 j + 2 t and + 1 of rows g and g + 8.
    d = product.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
    keep = np.broadcast_to(accumulate, X.lanes)[first][:, None]
    out: list[Array] = []
    c: Any
    for j in range(len(accumulators)):
        if half:
            x = d[:, :, j & 1, :, j >> 1].reshape(len(groups), 128, 2)
            old = accumulators[j]
            c = 0 if old is None else np.ascontiguousarray(old).view(np.float16).reshape(-1, 128, 2)[groups]
            y = np.where(keep[:, :, None], x + c, x).astype(np.float16)
            packed = np.zeros((X.lanes // 128, 128), np.uint32)
            packed[groups] = np.ascontiguousarray(y).view(np.uint32)[:, :, 0]
            out.append(packed.ravel())
            continue
        x = d[:, :, (j >> 1) & 1, :, j >> 2, :, j & 1].reshape(len(groups), 128)
        old = accumulators[j]
        c = np.float32(0) if old is None else old.view(np.float32).reshape(-1, 128)[groups]
        y = np.where(keep, x + c, x)
        if len(groups) * 128 == X.lanes:
            out.append(y.ravel())
            continue
        spread = np.zeros((X.lanes // 128, 128), np.float32)
        spread[groups] = y
        out.append(spread.ravel())
    X.wgmma.launch(k, M, *registers, np.concatenate([r[0] for r in reads]), np.concatenate([r[1] for r in reads]))
    return out


def taint_accumulators(X: Machine, D: tuple[int, ...], inputs: tuple[int, ...], accumulate: Array, M: Array) -> None:
    """The old accumulators matter only where they are added to."""
    if np.any(np.broadcast_to(accumulate, X.lanes)[M]):
        inputs = (*inputs, *D)
    X.taint.spread_warp(D, inputs, M)


# ---------------------------------------------------------------------- emitters
def wgmma(g: Generator, i: Instruction) -> list[str]:
    if i.guard is not None:
        raise i.unsupported("wgmma under a guard")
    if i.modifiers[0] == "fence":
        return [f"X.wgmma.fence({i.index}, M, F)"]
    if i.modifiers[0] == "commit_group":
        return ["X.wgmma.commit(M)"]
    if i.modifiers[0] == "wait_group":
        pending = i.operands[0]
        assert isinstance(pending, Immediate)
        return [f"X.wgmma.wait(M, {pending.value})"]
    return multiply_async(g, i)


def multiply_async(g: Generator, i: Instruction) -> list[str]:
    shape = next((m for m in i.modifiers if m.startswith("m64n")), "")
    kinds = [m for m in i.modifiers if m in ("f16", "bf16", "tf32", "f32", "s8", "u8", "e4m3", "e5m2", "s32")]
    if not shape or len(kinds) != 3 or kinds[1] != kinds[2] or kinds[1] not in ELEMENT or i.has("sp"):
        raise i.unsupported("this form of wgmma is not emulated")
    to, kind = kinds[0], kinds[1]
    if to not in ("f32", "f16") or (to == "f16" and kind != "f16"):
        raise i.unsupported("this form of wgmma is not emulated")
    D, A, B, scale, *rest = i.operands
    assert isinstance(D, Vector)
    constants = [o.value for o in rest if isinstance(o, Immediate)]
    signs = (constants[0], constants[1]) if len(constants) >= 2 else (1, 1)
    if isinstance(A, Vector):
        transposed = (False, bool(constants[2]) if len(constants) > 2 else False)
        a = f"[{', '.join(g.value(o, U32) for o in A.items)}]"
    else:
        transposed = (bool(constants[2]), bool(constants[3])) if len(constants) > 3 else (False, False)
        a = g.wide(A, U64)
    half = to == "f16"
    accumulate = f"np.bool_({bool(scale.value)})" if isinstance(scale, Immediate) else g.value(scale, PRED)
    outputs = tuple(o.index for o in D.items if isinstance(o, Register))
    inputs = tuple(registers_of(A)) if isinstance(A, Vector) else ()
    if not half:
        for r in outputs:
            g.float_votes[r] += 1
    current = ", ".join(f"R[{r}]" for r in outputs)
    arguments = (
        f"{int(shape[4:].split('k')[0])}, {kind!r}, {a}, {g.wide(B, U64)}, [{current}], Q, {signs}, {transposed}, "
        f"{(outputs, inputs)}, {half}, M, F"
    )
    lines = [f"Q = {accumulate}", f"v = {g.use(warpgroup_multiply)}(X, {i.index}, {arguments})"]
    for j, o in enumerate(items(D)):
        assert isinstance(o, Register)
        e = g.stored(f"v[{j}]", U32 if half else F32, o.index)
        lines.append(f"R[{o.index}] = {e} if F else merge(M, {e}, R[{o.index}])")
    others = tuple(r for o in (A, B, scale) for r in registers_of(o))
    lines.append(f"if X.taint.any: {g.use(taint_accumulators)}(X, {outputs}, {others}, Q, M)")
    return lines


EMITTERS: dict[str, Emitter] = {"wgmma": wgmma}
