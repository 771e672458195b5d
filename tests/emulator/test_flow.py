"""flow.py and scheduler.py: order of blocks, reconvergence, loops, tables, shapes of blocks, fairness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fragments import evaluate, kernel, launch

from hotloop.emulator import EmulatorError
from hotloop.emulator.flow import graph_of, reconvergence_order

SCHEDULES = [{"schedule": "lockstep"}, *({"schedule": "random", "seed": s} for s in range(3))]


def reaches_around(edges: list[list[int]], start: int, join: int) -> set[int]:
    found, work = set(), [t for t in edges[start] if t != join]
    while work:
        x = work.pop()
        if x not in found:
            found.add(x)
            work += [t for t in edges[x] if t != join]
    return found


def test_post_dominators_against_their_definition():
    """b post-dominates a: without b, no path leads from a to the exit."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(3, 9))
        edges = [sorted({int(t) for t in rng.integers(0, n + 1, rng.integers(1, 3))}) for _ in range(n)] + [[]]
        graph = graph_of(edges)
        for a in graph.order:
            if a == n or n not in reaches_around(edges, a, -1):
                continue
            strict = [b for b in range(n + 1) if b != a and b != n and n not in reaches_around(edges, a, b)]
            ipdom = graph.immediate_post_dominator[a]
            assert ipdom == n or ipdom in strict
            # The immediate one is post-dominated by all other strict ones.
            assert all(b == ipdom or n not in reaches_around(edges, ipdom, b) for b in strict)


def test_blocks_between_a_branch_and_its_join_come_before_the_join():
    rng = np.random.default_rng(1)
    for _ in range(60):
        # Structured control flow, blocks numbered at random: compilers lay blocks out as they like.
        edges, entry = structured(rng, 3)
        names = [entry, *[i for i in rng.permutation(len(edges) - 1).tolist() if i != entry]]
        number = {old: new for new, old in enumerate(names)} | {len(edges) - 1: len(edges) - 1}
        shuffled: list[list[int]] = [[] for _ in edges]
        for old, targets in enumerate(edges):
            shuffled[number[old]] = [number[t] for t in targets]
        graph = graph_of(shuffled)
        place = {node: i for i, node in enumerate(reconvergence_order(graph))}
        for b in graph.order:
            if len(shuffled[b]) > 1:
                join = graph.immediate_post_dominator[b]
                assert all(place[x] < place[join] for x in reaches_around(shuffled, b, join) | {b} if x != join)


def structured(rng: np.random.Generator, depth: int) -> tuple[list[list[int]], int]:
    """Nested ifs and loops; node -1 of the list is the exit."""
    edges: list[list[int]] = []

    def node() -> int:
        edges.append([])
        return len(edges) - 1

    def part(level: int) -> tuple[int, int]:
        first = last = node()
        for _ in range(int(rng.integers(1, 3))):
            kind = rng.integers(3) if level else 0
            if kind == 0:
                after = node()
                edges[last].append(after)
            elif kind == 1:
                (a, a_end), (b, b_end), after = part(level - 1), part(level - 1), node()
                edges[last] += [a, b]
                edges[a_end].append(after)
                edges[b_end].append(after)
            else:
                header, (body, body_end), after = node(), part(level - 1), node()
                edges[last].append(header)
                edges[header] += [body, after]
                edges[body_end].append(header)
            last = after
        return first, last

    first, last = part(depth)
    edges.append([])
    edges[last].append(len(edges) - 1)
    return edges, first


COLLATZ = """mov.u32 %d, 0; mov.u32 %n, %a0;
top: setp.le.u32 %c, %n, 1; @%c bra done; and.b32 %m, %n, 1; setp.eq.u32 %c, %m, 0; @%c bra even;
mad.lo.u32 %n, %n, 3, 1; bra next;
even: shr.u32 %n, %n, 1;
next: add.u32 %d, %d, 1; bra top; done:"""


def collatz(n: int) -> int:
    steps = 0
    while n > 1:
        n, steps = (3 * n + 1 if n & 1 else n // 2), steps + 1
    return steps


def test_divergent_loops():
    n = np.arange(1, 100, dtype=np.uint32)
    got = evaluate(f".reg .b32 %n, %m; .reg .pred %c; {COLLATZ}", [n])
    np.testing.assert_array_equal(got, [collatz(int(v)) for v in n])


def test_lanes_meet_again_after_a_branch_however_blocks_are_laid_out():
    """The exit of the loop lies before its body: a shuffle after it finds all lanes only after reconvergence."""
    code = """.reg .b32 %n; .reg .pred %c; mov.u32 %n, %a0; mov.u32 %d, 0; bra test;
    out: shfl.sync.bfly.b32 %d, %d, 1, 31, -1; bra end;
    body: add.u32 %d, %d, 5; sub.u32 %n, %n, 1;
    test: setp.ne.u32 %c, %n, 0; @%c bra body; bra out; end:"""
    n = np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(evaluate(code, [n]), 5 * (n ^ 1))


def test_branch_table():
    code = """.reg .b32 %i; and.b32 %i, %a0, 3;
    table: .branchtargets one, two, three, two;
    brx.idx %i, table;
    one: mov.u32 %d, 1; bra end; two: mov.u32 %d, 2; bra end; three: mov.u32 %d, 3; end:"""
    np.testing.assert_array_equal(evaluate(code, [np.arange(8, dtype=np.uint32)]), [1, 2, 3, 2] * 2)


@pytest.mark.parametrize("block", [(5, 3, 2), (33, 1, 1), (1, 1, 1), (32, 4, 1), (7,), 100])
@pytest.mark.parametrize("options", SCHEDULES[:2])
def test_shapes_of_blocks_and_grids(block, options):
    """Every thread of a 3-D grid of 3-D blocks stores its coordinates; a barrier holds whole and partial warps."""
    code = """bar.sync 0; mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;
    mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mov.u32 %r6, %ntid.z;
    mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mov.u32 %r12, %ctaid.z;
    mov.u32 %r13, %nctaid.x; mov.u32 %r14, %nctaid.y;
    mad.lo.u32 %r20, %r3, %r5, %r2; mad.lo.u32 %r20, %r20, %r4, %r1;
    mad.lo.u32 %r21, %r12, %r14, %r11; mad.lo.u32 %r21, %r21, %r13, %r10;
    mul.lo.u32 %r22, %r4, %r5; mul.lo.u32 %r22, %r22, %r6; mad.lo.u32 %r22, %r21, %r22, %r20;
    shl.b32 %r30, %r1, 16; shl.b32 %r31, %r2, 8; or.b32 %r30, %r30, %r31; or.b32 %r30, %r30, %r3;
    mad.lo.u32 %r30, %r21, 0x1000000, %r30;
    ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r22, 4, %rd1; st.global.b32 [%rd2], %r30;"""
    shape = (*((block,) if isinstance(block, int) else block), 1, 1)[:3]
    threads = int(np.prod(shape))
    out = np.zeros(12 * threads, np.uint32)
    done = launch(kernel(code, ["u64"]), [out], block, (2, 3, 2), **options)
    want = [
        (c << 24) | (x << 16) | (y << 8) | z
        for c in range(12)
        for z, y, x in itertools.product(range(shape[2]), range(shape[1]), range(shape[0]))
    ]
    np.testing.assert_array_equal(out, want)
    assert done.counters["thread_instructions"] == 12 * threads * (
        done.counters["warp_instructions"] / (12 * -(-threads // 32))
    )


LOCK = """ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; mov.u32 %r9, %tid.x; setp.ne.u32 %p1, %r9, 0; @%p1 bra end;
spin: atom.acquire.gpu.global.cas.b32 %r1, [%rd1], 0, 1; setp.ne.u32 %p2, %r1, 0; @%p2 bra spin;
ld.global.b32 %r2, [%rd2]; add.u32 %r2, %r2, 1; st.global.b32 [%rd2], %r2;
atom.release.gpu.global.exch.b32 %r3, [%rd1], 0; end:"""


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_spin_lock_between_ctas_is_fair(options):
    lock, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    done = launch(kernel(LOCK, ["u64", "u64"]), [lock, total], 32, 40, **options)
    assert (total[0], lock[0], done.reports) == (40, 0, [])


def test_a_lock_within_a_warp():
    """Every lane takes the lock: needs forward progress of each thread of a warp."""
    total = np.zeros(1, np.uint32)
    code = LOCK.replace("@%p1 bra end;", "")
    launch(kernel(code, ["u64", "u64"]), [np.zeros(1, np.uint32), total], 8, 2)
    assert total[0] == 16


@pytest.mark.parametrize("options", SCHEDULES[:2])
def test_waiting_for_ever_is_a_livelock(options):
    code = "ld.param.b64 %rd1, [p0]; spin: ld.volatile.global.b32 %r1, [%rd1]; setp.eq.u32 %p1, %r1, 0; @%p1 bra spin;"
    done = launch(kernel(code, ["u64"]), [np.zeros(1, np.uint32)], on_report="collect", **options)
    assert [r.kind for r in done.reports] == ["livelock"]


def test_a_grid_barrier_needs_all_ctas_resident():
    code = """ld.param.b64 %rd1, [p0]; mov.u32 %r9, %tid.x; setp.ne.u32 %p1, %r9, 0; @%p1 bra wait;
    atom.add.release.gpu.global.u32 %r1, [%rd1], 1;
    mov.u32 %r8, %nctaid.x; spin: ld.acquire.gpu.global.b32 %r2, [%rd1]; setp.lt.u32 %p2, %r2, %r8; @%p2 bra spin;
    wait: bar.sync 0;"""
    module = kernel(code, ["u64"])
    launch(module, [np.zeros(1, np.uint32)], 128, 10)
    done = launch(module, [np.zeros(1, np.uint32)], 1024, 33, on_report="collect")
    assert {r.kind for r in done.reports} == {"livelock"}
    assert "29 CTAs of the grid are not resident" in done.reports[0].message


def test_traps_and_assertions():
    code = "mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 3; @%p1 trap;"
    done = launch(kernel(code), [], on_report="collect")
    assert [(r.kind, r.thread, r.count) for r in done.reports] == [("trap", 3, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 0}, "grid=0"),
        ({"threads": 2048}, "at most 1024"),
        ({"args": []}, "takes 1 arguments"),
        ({"args": [np.zeros(1), 2]}, "takes 1 arguments"),
        ({"args": ["x"]}, "str was given"),
        ({"args": [2.5]}, "a float was given"),
        ({"args": [1 << 64]}, "does not fit"),
        ({"args": [b"abc"]}, "3 bytes were given"),
        ({"shared": -1}, "shared=-1"),
        ({"schedule": "fast"}, "schedule='fast'"),
        ({"async_copies": "never"}, "async_copies='never'"),
        ({"on_report": "print"}, "on_report='print'"),
    ],
)
def test_bad_launches_say_what_is_wrong(change, message):
    arguments = {"args": [np.zeros(4, np.uint32)], **change}
    with pytest.raises(EmulatorError, match=message):
        launch(kernel("", ["u64"]), **arguments)


def test_a_required_block_shape():
    with pytest.raises(EmulatorError, match="requires"):
        launch(kernel("", attributes=".reqntid 64"), [], 32)
