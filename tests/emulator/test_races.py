"""Races, barriers and ordering: each planted fault beside its clean twin, under every schedule."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import kernel, launch

from hotloop.emulator import Report

SCHEDULES = [{}, {"schedule": "random", "seed": 0}, {"schedule": "random", "seed": 1}]


def reports(code: str, args: list, threads: int = 64, grid: int = 1, **options) -> list[Report]:
    return launch(kernel(code, ["u64"] * len(args)), args, threads, grid, on_report="collect", **options).reports


def kinds(code: str, args: list, threads: int = 64, grid: int = 1) -> set[str]:
    """Under all schedules together."""
    return {r.kind for options in SCHEDULES for r in reports(code, args, threads, grid, **options)}


SHARED = """.shared .align 16 .b8 s[4096]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;
xor.b32 %r4, %r1, {partner}; mad.lo.u32 %r5, %r4, 4, %r2; {code}"""


@pytest.mark.parametrize(
    ("partner", "sync", "clean"),
    [
        (32, "", False),  # another warp
        (32, "bar.sync 0;", True),
        (32, "bar.warp.sync -1;", False),  # orders one warp only
        (32, "barrier.sync 1, 64;", True),
        (1, "", False),  # another lane of the warp
        (1, "bar.warp.sync 0xffffffff;", True),
        (1, "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", False),  # exchanges registers, orders no memory
        (0, "", True),  # the thread itself
    ],
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r6, [%r5];"),
        ("st.shared.b32 [%r3], %r1;", "st.shared.b32 [%r5], %r1;"),
        ("st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r6, [%r3];", "st.shared.b32 [%r5], %r1;"),
    ],
)
def test_shared_races(partner, sync, clean, first, second):
    code = SHARED.format(partner=partner, code=f"{first} {sync} {second}")
    assert kinds(code, []) == (set() if clean else {"shared-race"})


def test_a_shared_race_names_its_place():
    code = SHARED.format(partner=32, code="st.shared.b32 [%r3], %r1; ld.shared.b32 %r6, [%r5];")
    (report,) = reports(code, [])
    assert (report.buffer, report.offset, report.thread, report.count) == ("shared", 128, 0, 64)
    assert "warp 1 wrote" in report.message
    assert report.ptx_line.endswith("ld.shared.b32 %r6, [%r5]")


def test_writing_what_is_there_is_no_race():
    assert kinds(SHARED.format(partner=0, code="st.shared.b32 [%r2], 7;"), []) == set()
    assert (
        kinds(SHARED.format(partner=0, code="st.shared.b32 [%r2], 7; bar.sync 0; st.shared.b32 [%r2], 7;"), []) == set()
    )


def test_lanes_that_store_different_values_to_one_address():
    shared = SHARED.format(partner=0, code="shr.u32 %r6, %r1, 1; mad.lo.u32 %r6, %r6, 4, %r2; st.shared.b32 [%r6], {};")
    assert kinds(shared.format("%r1"), [], 32) == {"conflicting-stores"}
    assert kinds(shared.format("5"), [], 32) == set()
    code = """ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 1; mad.wide.u32 %rd1, %r2, 4, %rd1;
        st.global.b32 [%rd1], {};"""
    (report,) = reports(code.format("%r1"), [np.zeros(16, np.uint32)], 32)
    assert (report.kind, report.buffer, report.count) == ("conflicting-stores", "p0", 16)
    assert kinds(code.format("5"), [np.zeros(16, np.uint32)], 32) == set()


def test_named_barriers_order_their_own_warps_only():
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; reading across the pairs is a race."""
    pairs = """shr.u32 %r7, %r1, 6; add.u32 %r7, %r7, 1; setp.eq.u32 %p1, %r7, 1; @%p1 bra one; barrier.sync 2, 64;
        bra go; one: barrier.sync 1, 64; go:"""
    for partner, expected in ((32, set()), (64, {"shared-race"})):
        code = SHARED.format(partner=partner, code=f"st.shared.b32 [%r3], %r1; {pairs} ld.shared.b32 %r6, [%r5];")
        assert kinds(code, [], 128) == expected


def test_producer_and_consumer_with_arrive():
    """Warp 0 stores and arrives without waiting; warp 1 waits and reads."""
    code = SHARED.format(
        partner=32,
        code="""setp.ge.u32 %p1, %r1, 32; @%p1 bra consumer; st.shared.b32 [%r3], %r1; {} bra end;
        consumer: {} ld.shared.b32 %r6, [%r5]; end:""",
    )
    assert kinds(code.format("barrier.arrive 3, 64;", "barrier.sync 3, 64;"), []) == set()
    assert kinds(code.format("", ""), []) == {"shared-race"}
    assert kinds(code.format("", "barrier.sync 3, 64;"), []) == {"barrier-deadlock"}


def test_barrier_reductions():
    code = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 10; bar.red.popc.u32 %r2, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, !%p1; selp.b32 %r3, 100, 0, %p2; selp.b32 %r4, 1000, 0, %p3; add.u32 %r2, %r2, %r3;
    add.u32 %r2, %r2, %r4;
    ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.b32 [%rd1], %r2;"""
    out = np.zeros(64, np.uint32)
    launch(kernel(code, ["u64"]), [out], 64)
    np.testing.assert_array_equal(out, np.full(64, 1010))


def test_divergent_barriers():
    part_of_a_warp = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {}; @!%p1 bra end; bar.sync 0; end:"
    assert "divergent-barrier" in kinds(part_of_a_warp.format(16), [])
    two_places = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra a; bar.sync 0; bra end; a: bar.sync 0; end:"
    assert kinds(two_places, []) == {"divergent-barrier"}
    assert kinds("bar.sync 0; bar.sync 0;", []) == set()
    leaving = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @!%p1 exit; bar.sync 0;"  # threads that have left do not count
    )
    assert kinds(leaving, []) == set()


def test_barrier_deadlock():
    code = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @!%p1 bra end; barrier.sync 1, {}; end:"
    (report,) = reports(code.format(64), [])
    assert (report.kind, report.count) == ("barrier-deadlock", 32)
    assert kinds(code.format(32), []) == set()


def test_warp_instructions_need_their_lanes():
    code = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @!%p1 bra end; {} end:"
    for instruction in (
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, {};",
        "vote.sync.any.pred %p2, %p1, {};",
        "redux.sync.add.u32 %r2, %r1, {};",
        "match.any.sync.b32 %r2, %r1, {};",
        "bar.warp.sync {};",
        "elect.sync %r2|%p2, {};",
    ):
        assert kinds(code.format(instruction.format("0xffffffff")), [], 32) == {"divergent-warp"}, instruction
        assert kinds(code.format(instruction.format("0x0000ffff")), [], 32) == set(), instruction
    assert kinds(code.format("shfl.sync.idx.b32 %r2, %r1, 20, 31, 0xffff;"), [], 32) == {"divergent-warp"}
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1}, {%r1}, {%f1,%f2,%f3,%f4};"
    zero = "mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;"
    assert kinds(zero + code.format(mma), [], 32) == {"divergent-warp"}
    assert kinds("mov.u32 %r1, %tid.x;" + zero + mma, [], 32) == set()


# ---------------------------------------------------------------------- global memory
GLOBAL = """ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
mad.lo.u32 %r4, %r2, %r3, %r1;
mad.wide.u32 %rd2, %r4, 4, %rd1; {}"""


@pytest.mark.parametrize(
    ("code", "clean"),
    [
        ("st.global.b32 [%rd2], %r4; ld.global.b32 %r5, [%rd2];", True),  # its own
        ("st.global.b32 [%rd1], %r2;", False),  # all CTAs, one address
        ("st.global.b32 [%rd1], 1;", True),  # equal values
        (
            "setp.eq.u32 %p1, %r2, 0; @%p1 st.global.b32 [%rd2], 5; ld.global.b32 %r5, [%rd1];",
            False,
        ),  # CTA 0 writes, all read
        (
            "ld.global.b32 %r5, [%rd1]; setp.eq.u32 %p1, %r2, 3; @%p1 st.global.b32 [%rd1], 5;",
            False,
        ),  # all read, CTA 3 writes
        ("ld.global.b32 %r5, [%rd1];", True),
        ("red.global.add.u32 [%rd1], 1;", True),
        ("atom.global.add.u32 %r5, [%rd1], 1; ld.global.b32 %r6, [%rd1];", False),  # a plain read of what others update
        ("atom.global.add.u32 %r5, [%rd1], 1; ld.relaxed.gpu.global.b32 %r6, [%rd1];", True),
        ("st.relaxed.gpu.global.b32 [%rd1], %r2; ld.volatile.global.b32 %r6, [%rd1];", True),
    ],
)
def test_global_races_between_ctas(code, clean):
    found = kinds(GLOBAL.format(code), [np.zeros(256, np.uint32)], 32, 4)
    assert found == (set() if clean else {"global-race"})


def test_a_global_race_names_both_sides():
    (report,) = reports(GLOBAL.format("st.global.b32 [%rd1], %r2;"), [np.zeros(4, np.uint32)], 32, 2)
    assert (report.buffer, report.offset) == ("p0", 0)


def test_a_read_that_races_within_a_cta_matters_only_where_it_is_used():
    """Warp 1 reads what warp 0 writes. Compilers replicate loads, and drop most of the results."""
    code = GLOBAL.format(
        """xor.b32 %r5, %r1, 32; mad.wide.u32 %rd3, %r5, 4, %rd1; st.global.b32 [%rd2], %r1;
        {} ld.global.b32 %r6, [%rd3];
        ld.param.b64 %rd4, [p1]; mad.wide.u32 %rd4, %r1, 4, %rd4; {}"""
    )
    args = [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]
    assert kinds(code.format("", "st.global.b32 [%rd4], %r6;"), args) == {"global-race"}
    assert kinds(code.format("", "setp.gt.u32 %p1, %r1, 99; @%p1 st.global.b32 [%rd4], %r6;"), args) == set()
    assert kinds(code.format("bar.sync 0;", "st.global.b32 [%rd4], %r6;"), args) == set()


HAND_OVER = """ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
setp.ne.u32 %p1, %r2, 0;
mad.wide.u32 %rd3, %r1, 4, %rd1; @%p1 bra reader;
st.global.b32 [%rd3], %r1; {barrier} setp.ne.u32 %p2, %r1, 0; @%p2 exit; {release} exit;
reader: setp.ne.u32 %p2, %r1, 0; @%p2 bra meet; spin: {acquire} setp.eq.u32 %p3, %r5, 0; @%p3 bra spin; {after}
meet: bar.sync 0; xor.b32 %r6, %r1, 32; mad.wide.u32 %rd4, %r6, 4, %rd1; ld.global.b32 %r7, [%rd4];
ld.param.b64 %rd5, [p2];
mad.wide.u32 %rd5, %r1, 4, %rd5; st.global.b32 [%rd5], %r7;"""
RELEASE, ACQUIRE = "st.release.gpu.global.b32 [%rd2], 1;", "ld.acquire.gpu.global.b32 %r5, [%rd2];"
RELAXED_STORE, RELAXED_LOAD = "st.relaxed.gpu.global.b32 [%rd2], 1;", "ld.relaxed.gpu.global.b32 %r5, [%rd2];"
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("barrier", "release", "acquire", "after", "clean"),
    [
        ("bar.sync 0;", RELEASE, ACQUIRE, "", True),
        ("bar.sync 0;", f"{FENCE} {RELAXED_STORE}", RELAXED_LOAD, FENCE, True),
        ("bar.sync 0;", f"membar.gl; {RELAXED_STORE}", "ld.volatile.global.b32 %r5, [%rd2];", "membar.gl;", True),
        (
            "bar.sync 0;",
            "atom.exch.release.gpu.global.b32 %r8, [%rd2], 1;",
            "atom.or.acquire.gpu.global.b32 %r5, [%rd2], 0;",
            "",
            True,
        ),
        ("bar.sync 0;", "red.release.gpu.global.add.u32 [%rd2], 1;", ACQUIRE, "", True),
        ("bar.sync 0;", RELAXED_STORE, ACQUIRE, "", False),  # nothing is released
        ("bar.sync 0;", RELEASE, RELAXED_LOAD, "", False),  # nothing is acquired
        ("bar.sync 0;", f"{RELAXED_STORE} {FENCE}", RELAXED_LOAD, FENCE, False),  # the fence comes too late
        ("", RELEASE, ACQUIRE, "", False),  # the other warp's data is not behind the release
    ],
)
def test_handing_data_to_another_cta(barrier, release, acquire, after, clean):
    code = HAND_OVER.format(barrier=barrier, release=release, acquire=acquire, after=after)
    for options in SCHEDULES:
        out = np.zeros(64, np.uint32)
        args = [np.zeros(64, np.uint32), np.zeros(1, np.uint32), out]
        found = {r.kind for r in reports(code, args, 64, 2, **options)}
        assert found == (set() if clean else {"global-race"})
        if clean:
            np.testing.assert_array_equal(out, np.arange(64) ^ 32)


LAST = """ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; ld.param.b64 %rd3, [p2]; mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x;
mad.wide.u32 %rd4, %r2, 4, %rd1; setp.ne.u32 %p1, %r1, 0; @%p1 exit; add.u32 %r4, %r2, 1; st.global.b32 [%rd4], %r4; {}
atom{}.global.add.u32 %r5, [%rd2], 1; sub.u32 %r6, %r3, 1; setp.ne.u32 %p2, %r5, %r6; @%p2 exit; {}
mov.u32 %r7, 0; mov.u32 %r8, 0; next: mad.wide.u32 %rd5, %r7, 4, %rd1; ld.global.b32 %r9, [%rd5]; add.u32 %r8, %r8, %r9;
add.u32 %r7, %r7, 1; setp.lt.u32 %p3, %r7, %r3; @%p3 bra next; st.global.b32 [%rd3], %r8;"""


@pytest.mark.parametrize(
    ("before", "order", "after", "clean"),
    [
        ("membar.gl;", "", "membar.gl;", True),
        ("", ".acq_rel.gpu", "", True),
        ("", ".release.gpu", FENCE, True),
        ("", "", "", False),
        ("membar.gl;", "", "", False),
    ],
)
def test_the_last_cta_sums_up(before, order, after, clean):
    """The counter's updates form a release sequence: the last CTA learns of all before it."""
    code = LAST.format(before, order, after)
    for options in SCHEDULES:
        total = np.zeros(1, np.uint32)
        found = {
            r.kind for r in reports(code, [np.zeros(5, np.uint32), np.zeros(1, np.uint32), total], 32, 5, **options)
        }
        assert found == (set() if clean else {"global-race"})
        assert total[0] == 15
