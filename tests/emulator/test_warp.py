"""units/warp.py: shuffles, votes, matches and reductions, against the ISA's definitions lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import evaluate

LANE = np.arange(64) & 31
X = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(mode, b, width):
    """c = (32 - width) << 8 | clamp, as CUDA's intrinsics make it."""
    segment = 32 - width
    c = segment << 8 | (0 if mode == "up" else 31)
    code = f".reg .pred %c; shfl.sync.{mode}.b32 %d|%c, %a0, {b}, {c}, -1; @!%c xor.b32 %d, %d, -1;"
    got = evaluate(code, [X])
    for i in range(64):
        lane, first = i & 31, (i & 31) & segment
        last = first | (31 & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment & 31)}[mode]
        inside = source >= first if mode == "up" else source <= last
        value = X[(i & ~31) + source] if inside else ~X[i]
        assert got[i] == value, (i, mode, b, width)


def test_shuffle_with_a_distance_per_lane():
    distance = np.random.default_rng(1).integers(0, 32, 64).astype(np.uint32)
    got = evaluate("shfl.sync.idx.b32 %d, %a0, %a1, 31, -1;", [X, distance])
    np.testing.assert_array_equal(got, X[(np.arange(64) & ~31) + distance])


def test_votes():
    p = X & 3 == 0
    q = "setp.eq.u32 %c, %m, 0;"
    head = f".reg .pred %c, %v; .reg .b32 %m; and.b32 %m, %a0, 3; {q}"
    ballots = [sum(int(p[w * 32 + i]) << i for i in range(32)) for w in (0, 1)]
    np.testing.assert_array_equal(evaluate(f"{head} vote.sync.ballot.b32 %d, %c, -1;", [X]), np.repeat(ballots, 32))
    without = evaluate(f"{head} vote.sync.ballot.b32 %d, !%c, -1;", [X])
    np.testing.assert_array_equal(without, ~np.repeat(ballots, 32).astype(np.uint32))
    low = np.array([0] * 32 + [4] * 32, np.uint32)  # second warp: all have it
    mixed = low.copy()
    mixed[3] = 1
    for mode, want in (("any", [1, 1]), ("all", [0, 1]), ("uni", [0, 1])):
        code = f".reg .pred %c, %v; setp.ne.u32 %c, %a0, 0; vote.sync.{mode}.pred %v, %c, -1; selp.b32 %d, 1, 0, %v;"
        np.testing.assert_array_equal(evaluate(code, [mixed]), np.repeat(want, 32))
    code = ".reg .pred %c, %v; setp.ne.u32 %c, %a0, 0; vote.sync.uni.pred %v, %c, -1; selp.b32 %d, 1, 0, %v;"
    np.testing.assert_array_equal(evaluate(code, [low]), np.ones(64))


def test_matches():
    values = X % 5
    got = evaluate("match.any.sync.b32 %d, %a0, -1;", [values])
    want = [sum(int(values[(i & ~31) + j] == values[i]) << j for j in range(32)) for i in range(64)]
    np.testing.assert_array_equal(got, want)
    same = np.array([7] * 32 + [7] * 31 + [8], np.uint32)
    code = ".reg .pred %c; match.all.sync.b32 %d|%c, %a0, -1; @!%c add.u32 %d, %d, 5;"
    np.testing.assert_array_equal(evaluate(code, [same]), [0xFFFFFFFF] * 32 + [5] * 32)


@pytest.mark.parametrize(
    ("form", "function", "dtype"),
    [
        ("add.u32", np.add, np.uint32),
        ("add.s32", np.add, np.int32),
        ("min.u32", np.minimum, np.uint32),
        ("max.s32", np.maximum, np.int32),
        ("and.b32", np.bitwise_and, np.uint32),
        ("or.b32", np.bitwise_or, np.uint32),
        ("xor.b32", np.bitwise_xor, np.uint32),
    ],
)
def test_reductions(form, function, dtype):
    got = evaluate(f"redux.sync.{form} %d, %a0, -1;", [X]).view(dtype)
    np.testing.assert_array_equal(
        got, np.repeat(function.reduce(X.view(dtype).reshape(2, 32), axis=1, dtype=dtype), 32)
    )
    # Halves of a warp reduce apart, in one instruction.
    halves = np.where(LANE < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32)
    got = evaluate(f"redux.sync.{form} %d, %a0, %a1;", [X, halves]).view(dtype)
    np.testing.assert_array_equal(
        got, np.repeat(function.reduce(X.view(dtype).reshape(4, 16), axis=1, dtype=dtype), 16)
    )


def test_active_mask_and_leader():
    code = """.reg .pred %c, %l; setp.lt.u32 %c, %a0, 5; mov.u32 %d, 0; @!%c bra out; activemask.b32 %d;
    elect.sync _|%l, 0x1f; @%l add.u32 %d, %d, 1000; out:"""
    got = evaluate(code, [np.arange(32, dtype=np.uint32)], target="sm_90")
    np.testing.assert_array_equal(got, [1031, 31, 31, 31, 31] + [0] * 27)


def test_lane_registers():
    for name, want in (
        ("laneid", LANE),
        ("warpid", np.arange(64) >> 5),
        ("lanemask_eq", 1 << LANE),
        ("lanemask_lt", (1 << LANE) - 1),
        ("lanemask_le", (2 << LANE) - 1),
        ("lanemask_gt", 0xFFFFFFFF ^ ((2 << LANE) - 1)),
        ("lanemask_ge", 0xFFFFFFFF ^ ((1 << LANE) - 1)),
    ):
        np.testing.assert_array_equal(evaluate(f"mov.u32 %d, %{name};", [X]), want)
