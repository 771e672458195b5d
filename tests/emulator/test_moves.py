"""units/moves.py: moving, comparing, selecting."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import evaluate, kernel, launch

from hotloop.emulator import ReportsError, UnsupportedPTX

X = np.array([1, 2, 2, -1, np.nan, np.nan, 0.0, np.inf], np.float32)
Y = np.array([2, 1, 2, -1, 1, np.nan, -0.0, np.inf], np.float32)
NAN = np.isnan(X) | np.isnan(Y)
FLOAT_COMPARISONS = {
    "eq": X == Y,
    "ne": (X != Y) & ~NAN,
    "lt": X < Y,
    "le": X <= Y,
    "gt": X > Y,
    "ge": X >= Y,
    "equ": (X == Y) | NAN,
    "neu": X != Y,
    "ltu": (X < Y) | NAN,
    "leu": (X <= Y) | NAN,
    "gtu": (X > Y) | NAN,
    "geu": (X >= Y) | NAN,
    "num": ~NAN,
    "nan": NAN,
}


@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_setp_of_floats(name):
    got = evaluate(f".reg .pred %c; setp.{name}.f32 %c, %a0, %a1; selp.b32 %d, 1, 0, %c;", [X, Y])
    np.testing.assert_array_equal(got, FLOAT_COMPARISONS[name])


A = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 5], np.uint32)
B = np.array([1, 0, 1, 0x7FFFFFFF, 5], np.uint32)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"])
@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_setp_of_integers(name, kind):
    if name in ("lo", "ls", "hi", "hs"):
        kind = "u32"
    a, b = (A.view(np.int32), B.view(np.int32)) if kind == "s32" else (A, B)
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    want = getattr(
        np,
        {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}[
            plain
        ],
    )(a, b)
    got = evaluate(f".reg .pred %c; setp.{name}.{kind} %c, %a0, %a1; selp.b32 %d, 1, 0, %c;", [A, B])
    np.testing.assert_array_equal(got, want)


def test_setp_with_two_results_and_a_combination():
    code = """.reg .pred %c, %n, %q0; setp.eq.u32 %q0, %a0, 5;
    setp.lt.or.u32 %c|%n, %a0, %a1, %q0;
    selp.b32 %d, 1, 0, %c; @%n add.u32 %d, %d, 2;"""
    less, five = A < B, A == 5
    np.testing.assert_array_equal(evaluate(code, [A, B]), (less | five) + 2 * (~less | five))


def test_set_select_and_predicates():
    np.testing.assert_array_equal(evaluate("set.lt.u32.u32 %d, %a0, %a1;", [A, B]), np.where(A < B, 0xFFFFFFFF, 0))
    got = evaluate("set.gt.f32.u32 %d, %a0, %a1;", [A, B], "f32", into=np.float32)
    np.testing.assert_array_equal(got, (A > B).astype(np.float32))
    np.testing.assert_array_equal(
        evaluate("slct.u32.s32 %d, %a0, %a1, %a0;", [A, B]), np.where(A.view(np.int32) >= 0, A, B)
    )
    code = """.reg .pred %u, %v, %w; setp.lt.u32 %u, %a0, %a1; setp.ne.u32 %v, %a0, 0;
    and.pred %w, %u, !%v; xor.pred %w, %w, %v; not.pred %w, %w; mov.pred %u, %w; selp.b32 %d, 1, 0, %u;"""
    less, some = A < B, A != 0
    np.testing.assert_array_equal(evaluate(code, [A, B]), ~((less & ~some) ^ some))


def test_mov_packs_and_unpacks():
    code = """.reg .b16 %l, %u; .reg .b64 %w; mov.b32 {%l, %u}, %a0; mov.b32 %d, {%u, %l};
    mov.b64 %w, {%a0, %d}; mov.b64 {_, %d}, %w;"""
    np.testing.assert_array_equal(evaluate(code, [A]), (A >> 16) | (A << 16))


def test_mov_of_constants():
    for text, value in (("0f3FC00000", 1.5), ("0d3FF8000000000000", 1.5)):
        got = evaluate(f"mov.f32 %d, {text};", [A], "f32", into=np.float32)
        np.testing.assert_array_equal(got, np.full(5, value, np.float32))
    np.testing.assert_array_equal(evaluate("mov.b32 %d, -1;", [A]), np.full(5, 0xFFFFFFFF))
    np.testing.assert_array_equal(evaluate("mov.u32 %d, WARP_SZ;", [A]), np.full(5, 32))


def test_a_guard_keeps_the_old_value():
    code = ".reg .pred %c; setp.eq.u32 %c, %a0, 5; mov.u32 %d, 7; @%c mov.u32 %d, 8; @!%c add.u32 %d, %d, 1;"
    np.testing.assert_array_equal(evaluate(code, [A]), np.full(5, 8))


def test_generic_addresses_know_their_space():
    code = """.shared .b32 %s[4]; .local .b32 %l[4]; .reg .b64 %g; .reg .pred %c; .reg .b32 %one;
    cvta.shared.u64 %g, %s; isspacep.shared %c, %g; selp.b32 %d, 1, 0, %c;
    isspacep.local %c, %g; @%c add.u32 %d, %d, 100;
    cvta.local.u64 %g, %l; isspacep.local %c, %g; @%c add.u32 %d, %d, 2;
    ld.param.b64 %g, [p0]; isspacep.global %c, %g; @%c add.u32 %d, %d, 4;"""
    np.testing.assert_array_equal(evaluate(code, [A]), np.full(5, 7))


def test_an_undefined_half_leaves_the_other_one_defined():
    """As compilers write it: what was packed beside undefined data is taken out again and stored."""
    code = """ld.param.b64 %rd1, [p0]; mov.b16 %h1, 7; mov.b32 %r1, {%h1, %h2}; mov.b32 {%h3, %h4}, %r1;
        cvt.u32.u16 %r2, %h{half}; st.global.b32 [%rd1], %r2;"""
    out = np.zeros(1, np.int32)
    launch(kernel(code.replace("{half}", "3"), ["u64"]), [out], 1)
    assert out.tolist() == [7]
    with pytest.raises(ReportsError, match="uninitialised"):
        launch(kernel(code.replace("{half}", "4"), ["u64"]), [out], 1)
    # Written again as a whole, both halves are defined; packed again under a guard, only where it holds.
    again = code.replace("mov.b32 {%h3", "mov.b32 %r1, 9; mov.b32 {%h3").replace("{half}", "4")
    launch(kernel(again, ["u64"]), [out], 1)
    assert out.tolist() == [0]


HINTS = [
    "prefetch.global.L2 [%rd1];",
    "prefetchu.L1 [%rd1];",
    "nanosleep.u32 20;",
    "griddepcontrol.wait;",
    "griddepcontrol.launch_dependents;",
    "applypriority.global.L2::evict_normal [%rd1], 128;",
    "pmevent 3;",
]


@pytest.mark.parametrize("hint", HINTS)
def test_hints_change_nothing(hint):
    out = np.array([7], np.int32)
    before = "ld.param.b64 %rd1, [p0]; ld.global.b32 %r1, [%rd1];"
    after = "add.u32 %r1, %r1, 1; st.global.b32 [%rd1], %r1;"
    launch(kernel(f"{before} {hint} {after}", ["u64"], target="sm_90"), [out], 1)
    assert out.tolist() == [8]


def test_discarding_memory_is_refused():
    with pytest.raises(UnsupportedPTX, match="does not know this instruction"):
        launch(kernel("ld.param.b64 %rd1, [p0]; discard.global.L2 [%rd1], 128;", ["u64"]), [np.zeros(32, np.int32)], 1)
