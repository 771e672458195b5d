"""Counted work, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import kernel, launch

from hotloop.emulator import Counters


def count(code: str, args: list, threads: int = 32, grid: int = 1) -> Counters:
    return launch(kernel(code, ["u64"] * len(args)), args, threads, grid).counters


ADDRESS = "ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, {}, %rd1;"


@pytest.mark.parametrize(
    ("stride", "access", "sectors", "size"),
    [
        (4, "b32", 4, 128),
        (8, "b32", 8, 128),
        (32, "b32", 32, 128),
        (128, "b32", 32, 128),
        (0, "b32", 1, 128),
        (2, "b16", 2, 64),
        (16, "v4.b32", 16, 512),
    ],
)
def test_sectors_per_request(stride, access, sectors, size):
    target = {"b32": "%r2", "b16": "%h1", "v4.b32": "{%r2, %r3, %r4, %r5}"}[access]
    c = count(f"{ADDRESS.format(stride)} ld.global.{access} {target}, [%rd2];", [np.zeros(4096, np.uint8)])
    assert (c["global_load_requests"], c["global_load_sectors"], c["global_load_bytes"]) == (1, sectors, size)
    assert c["global_store_requests"] == 0


def test_sectors_are_counted_per_warp_and_for_active_lanes():
    c = count(f"{ADDRESS.format(4)} st.global.b32 [%rd2], 1;", [np.zeros(256, np.uint32)], 256, 1)
    assert (c["global_store_requests"], c["global_store_sectors"], c["global_store_bytes"]) == (8, 32, 1024)
    some = f"{ADDRESS.format(4)} setp.lt.u32 %p1, %r1, 9; @%p1 st.global.b32 [%rd2], 1;"
    c = count(some, [np.zeros(64, np.uint32)], 64)
    assert (c["global_store_requests"], c["global_store_sectors"], c["global_store_bytes"]) == (1, 2, 36)
    backwards = ADDRESS.format(4).replace("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.x; xor.b32 %r1, %r1, 31;")
    assert count(f"{backwards} ld.global.b32 %r2, [%rd2];", [np.zeros(32, np.uint32)])["global_load_sectors"] == 4


SHARED = """.shared .align 16 .b8 s[8192]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, {}, %r2;
    st.shared.{} [%r3], {};"""


@pytest.mark.parametrize(
    ("stride", "access", "phases", "wavefronts"),
    [
        (4, "b32", 1, 1),
        (8, "b32", 1, 2),
        (128, "b32", 1, 32),
        (132, "b32", 1, 1),
        (0, "b32", 1, 1),  # a broadcast
        (8, "v2.b32", 2, 2),
        (16, "v4.b32", 4, 4),
        (32, "v4.b32", 4, 8),
        (128, "v4.b32", 4, 32),
    ],
)
def test_bank_conflicts(stride, access, phases, wavefronts):
    width = {"b32": 1, "v2.b32": 2, "v4.b32": 4}[access]
    values = "0" if width == 1 else "{" + ", ".join("0" * width) + "}"
    c = count(SHARED.format(stride, access, values), [])
    assert (c["shared_phases"], c["shared_wavefronts"]) == (phases, wavefronts)
    assert c["shared_bank_conflicts"] == wavefronts - phases
    assert c["shared_bytes"] == 32 * 4 * width


def test_instructions_by_class_and_efficiency():
    code = """mov.u32 %r1, %tid.x; add.u32 %r2, %r1, 1; cvt.rn.f32.u32 %f1, %r2; mul.f32 %f2, %f1, %f1;
    ex2.approx.f32 %f2, %f2;
    setp.lt.u32 %p1, %r1, 8; @%p1 bra some; bra end; some: add.f32 %f2, %f2, %f1;
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, 0xff; end: bar.sync 0;"""
    c = count(code, [], 64, 2)
    assert c["move"] == 2 * 2 * 2  # mov, setp
    assert c["integer"] == 4
    assert c["conversion"] == 4
    assert c["floating"] == 4 * 2 + 2  # the sum runs in one warp per CTA
    assert c["shuffle"] == 2
    assert c["synchronisation"] == 4
    assert c["warp_instructions"] == sum(
        c[n] for n in ("move", "integer", "conversion", "floating", "shuffle", "synchronisation", "control")
    )
    assert c["thread_instructions"] < 32 * c["warp_instructions"]
    assert c["simt_efficiency"] == c["thread_instructions"] / (32 * c["warp_instructions"])


def test_counters_add_up_and_split_by_line():
    before = '.file 1 "/x/k.py"'
    code = ".loc 1 3 0\nmov.u32 %r1, %tid.x;\n.loc 1 11 0\nadd.u32 %r2, %r1, 1; add.u32 %r2, %r2, 1;\n.loc 1 4 0\n"
    c = launch(kernel(code, before=before), []).counters
    lines = c.by_line()
    assert list(lines) == ["k.py:3", "k.py:4", "k.py:11"]
    assert lines["k.py:11"]["integer"] == 2
    both = c + c
    assert both["integer"] == 4
    assert both.by_line()["k.py:11"]["integer"] == 4
    assert sum(lines.values(), Counters()) == {**c}
    assert dict(c).keys() == set(c)
    table = c.table().splitlines()
    assert table[0].split()[0] == "line"
    assert table[1].startswith("k.py:11")


@pytest.mark.parametrize("options", [{"schedule": "random", "seed": 4}, {"checks": False}])
def test_schedule_and_checks_do_not_change_the_work(options):
    code = f"{ADDRESS.format(4)} ld.global.b32 %r2, [%rd2]; bar.sync 0; st.global.b32 [%rd2], %r2;"
    module = kernel(code, ["u64"])
    plain = launch(module, [np.zeros(256, np.uint32)], 256, 1)
    other = launch(module, [np.zeros(256, np.uint32)], 256, 1, **options)
    assert dict(plain.counters) == dict(other.counters)
