"""units/atomics.py: every operation and type, in global and shared memory, with and without a result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fragments import kernel, launch

LANES = 64
INTEGER = {
    "add.u32": (np.uint32, lambda o, x: o + x),
    "add.u64": (np.uint64, lambda o, x: o + x),
    "min.s32": (np.int32, min),
    "max.s32": (np.int32, max),
    "min.u64": (np.uint64, min),
    "max.s64": (np.int64, max),
    "and.b32": (np.uint32, lambda o, x: o & x),
    "or.b64": (np.uint64, lambda o, x: o | x),
    "xor.b32": (np.uint32, lambda o, x: o ^ x),
    "exch.b32": (np.uint32, lambda o, x: x),
    "exch.b64": (np.uint64, lambda o, x: x),
    "inc.u32": (np.uint32, lambda o, x: 0 if o >= x else o + 1),
    "dec.u32": (np.uint32, lambda o, x: x if o == 0 or o > x else o - 1),
    "add.f32": (np.float32, lambda o, x: np.float32(o + x)),
    "add.f64": (np.float64, lambda o, x: o + x),
}


def run(form: str, memory: np.ndarray, x: np.ndarray, at: np.ndarray, space: str, opcode: str = "atom") -> np.ndarray:
    """Lane i applies x[i] at memory[at[i]]; the old values. In shared memory the memory is copied in and out."""
    size, bits = memory.itemsize, memory.itemsize * 8
    out = np.zeros_like(x)
    where = "[%rd4]" if space != "shared" else "[%r3]"
    copy_in = copy_out = ""
    if space == "shared":
        copy_in = f"""mov.u32 %r3, s; ld.param.b64 %rd6, [p0]; setp.lt.u32 %p1, %r1, {len(memory)};
        mad.lo.u32 %r4, %r1, {size}, %r3;
        mad.wide.u32 %rd6, %r1, {size}, %rd6; @%p1 ld.global.b{bits} %v1, [%rd6]; @%p1 st.shared.b{bits} [%r4], %v1;
        bar.sync 0;
        mad.lo.u32 %r3, %r2, {size}, %r3;"""
        copy_out = f"bar.sync 0; @%p1 ld.shared.b{bits} %v1, [%r4]; @%p1 st.global.b{bits} [%rd6], %v1;"
    generic = form.startswith("generic.")
    form = form.removeprefix("generic.")
    prefix = "" if generic else f".{space}"
    result, tail = ("%old, ", f"st.global.b{bits} [%rd5], %old;") if opcode == "atom" else ("", "")
    operation, kind = form.rsplit(".", 1)
    code = f""".reg .b{bits} %v1, %x, %old; .shared .align 8 .b8 s[256]; mov.u32 %r1, %tid.x;
    ld.param.b64 %rd1, [p1]; mad.wide.u32 %rd1, %r1, {size}, %rd1; ld.global.b{bits} %x, [%rd1];
    ld.param.b64 %rd2, [p2]; mad.wide.u32 %rd2, %r1, 4, %rd2; ld.global.b32 %r2, [%rd2];
    ld.param.b64 %rd3, [p0]; mad.wide.u32 %rd4, %r2, {size}, %rd3; ld.param.b64 %rd5, [p3];
    mad.wide.u32 %rd5, %r1, {size}, %rd5;
    {copy_in} {opcode}{prefix}.{operation}.{kind} {result}{where}, %x; {tail} {copy_out}"""
    launch(kernel(code, ["u64"] * 4, target="sm_90"), [memory, x, at.astype(np.uint32), out], LANES)
    return out


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("form", INTEGER)
def test_lanes_act_in_turn(form, space):
    dtype, function = INTEGER[form]
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        memory, x = rng.standard_normal(8).astype(dtype), rng.standard_normal(LANES).astype(dtype)
    else:
        memory, x = rng.integers(0, 40, 8).astype(dtype), rng.integers(0, 50, LANES).astype(dtype)
    at = rng.integers(0, 8, LANES)
    want, olds = memory.copy(), []
    with np.errstate(over="ignore"):
        for i, q in enumerate(at):
            olds.append(want[q])
            want[q] = function(want[q], x[i])
    once = memory.copy()
    np.testing.assert_array_equal(run(form, memory, x, at, space), np.array(olds, dtype))
    np.testing.assert_array_equal(memory, want)
    if "exch" not in form:  # red has no exchange
        run(form, once, x, at, space, "red")
        np.testing.assert_array_equal(once, want)


def test_generic_address():
    memory = np.zeros(8, np.uint32)
    run("generic.add.u32", memory, np.ones(LANES, np.uint32), np.arange(LANES) % 8, "global")
    np.testing.assert_array_equal(memory, np.full(8, 8))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_packed_halves(kind, space):
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    x = torch.randn(2 * LANES, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.zeros(2, dtype=dtype)
    for pair in x.reshape(-1, 2):
        want = want + pair
    memory = np.zeros(1, np.uint32)
    bits = x.view(torch.int16).numpy().view(np.uint32)
    run(f"add.noftz.{kind}", memory, bits, np.zeros(LANES), space)
    assert torch.equal(torch.from_numpy(memory.view(np.int16).copy()).view(dtype), want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    x = torch.randn(LANES, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.zeros((), dtype=dtype)
    for v in x:
        want = want + v
    memory = np.zeros(1, np.uint16)
    run(f"add.noftz.{kind}", memory, x.view(torch.int16).numpy().view(np.uint16), np.zeros(LANES), "global")
    assert torch.equal(torch.from_numpy(memory.view(np.int16).copy()).view(dtype)[0], want)


@pytest.mark.parametrize(
    ("form", "width", "registers"),
    [("v2.f32", 2, "f"), ("v4.f32", 4, "f"), ("noftz.v2.bf16x2", 2, "r"), ("noftz.v4.f16x2", 4, "r")],
)
def test_vectors(form, width, registers):
    values = ", ".join(f"%{registers}{j + 1}" for j in range(width))
    one = "0f3F800000" if registers == "f" else "0x3F803F80" if "bf16" in form else "0x3C003C00"
    moves = " ".join(f"mov.b32 %{registers}{j + 1}, {one};" for j in range(width))
    # .noftz follows .add, the vector and the type follow it.
    flags = "noftz." if "noftz" in form else ""
    shape = form.removeprefix("noftz.")
    code = f"ld.param.b64 %rd1, [p0]; {moves} red.global.add.{flags}{shape} [%rd1], {{{values}}};"
    memory = np.zeros(width, np.uint32)
    launch(kernel(code, ["u64"], target="sm_90"), [memory], 32)
    if registers == "f":
        total = memory.view(np.float32)
    elif "bf16" in form:
        total = (memory << np.uint32(16)).view(np.float32)  # the lower halves
    else:
        total = memory.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(total, np.full(len(total), 32))


@pytest.mark.parametrize("bits", [32, 64, 16])
def test_compare_and_swap(bits):
    """Lane i swaps i for i + 1: all succeed in turn, but the last lanes find another value."""
    register = {16: "h", 32: "r", 64: "rd"}[bits]
    code = f"""ld.param.b64 %rd9, [p0]; mov.u32 %r9, %tid.x; cvt.u{bits}.u32 %{register}1, %r9; setp.gt.u32 %p1, %r9, 9;
    @%p1 mov.b{bits} %{register}1, 99; add.u{bits} %{register}2, %{register}1, 1;
    atom.global.cas.b{bits} %{register}3, [%rd9], %{register}1, %{register}2;
    ld.param.b64 %rd8, [p1]; mad.wide.u32 %rd8, %r9, {bits // 8}, %rd8; st.global.b{bits} [%rd8], %{register}3;"""
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    memory, old = np.zeros(1, dtype), np.zeros(32, dtype)
    launch(kernel(code, ["u64", "u64"]), [memory, old])
    assert memory[0] == 10
    np.testing.assert_array_equal(old, np.minimum(np.arange(32), 10))
