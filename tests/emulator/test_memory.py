"""Memory: every state space, arguments and aliasing, guard zones, undefined data. Each check with its clean twin."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fragments import evaluate, kernel, launch

from hotloop.emulator import EmulatorError, Report, ReportsError, Uninitialised
from hotloop.emulator.program import EMITTERS

# %rd9 = p0 + 4 * tid
AT = "ld.param.b64 %rd8, [p0]; mov.u32 %r9, %tid.x; mad.wide.u32 %rd9, %r9, 4, %rd8;"


def reports(code: str, args: list, threads: int = 32, grid: int = 1, shared: int = 0, **options) -> list[Report]:
    module = kernel(code, ["u64"] * len(args), target=options.pop("target", "sm_80"), before=options.pop("before", ""))
    return launch(module, args, threads, grid, shared, on_report="collect", **options).reports


def kinds(*arguments, **options) -> list[str]:
    return sorted({r.kind for r in reports(*arguments, **options)})


@pytest.mark.parametrize("space", ["global", "shared", "local", "param"])
@pytest.mark.parametrize(
    ("bits", "count"), [(8, 1), (8, 4), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)]
)
def test_loads_and_stores_of_every_width(space, bits, count):
    """Each thread moves its 16 bytes through the space, in vectors of `count`."""
    prefix = {8: "h", 16: "h", 32: "r", 64: "rd"}[bits]
    form = f"v{count}." if count > 1 else ""
    size, steps = bits * count // 8, 128 // (bits * count)
    registers = ["{" + ", ".join(f"%{prefix}{20 + count * s + j}" for j in range(count)) + "}" for s in range(steps)]
    if count == 1:
        registers = [r.strip("{}") for r in registers]
    declared = {
        "shared": ".shared .align 16 .b8 buf[1024];",
        "local": ".local .align 16 .b8 buf[16];",
        "param": ".param .align 16 .b8 buf[16];",
    }
    where = {"shared": "%r2", "local": "buf", "param": "buf", "global": "%rd5"}[space]
    lines = [declared.get(space, ""), "mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1;"]
    lines.append(
        """ld.param.b64 %rd3, [p1]; mad.wide.u32 %rd4, %r1, 16, %rd3; ld.param.b64 %rd5, [p2];
            mad.wide.u32 %rd5, %r1, 16, %rd5;"""
    )
    if space == "shared":
        lines.append("mov.u32 %r2, buf; mad.lo.u32 %r2, %r1, 16, %r2;")
    for s, r in enumerate(registers):
        lines.append(
            f"ld.global.{form}b{bits} {r}, [%rd2+{s * size}]; st.{space}.{form}b{bits} [{where}+{s * size}], {r};"
        )
    for s, r in enumerate(registers):
        lines.append(
            f"ld.{space}.{form}b{bits} {r}, [{where}+{s * size}]; st.global.{form}b{bits} [%rd4+{s * size}], {r};"
        )
    source = np.random.default_rng(0).integers(0, 256, 512, np.uint8)
    target, scratch = np.zeros(512, np.uint8), np.zeros(512, np.uint8)
    launch(kernel("\n".join(lines), ["u64"] * 3), [source, target, Uninitialised(scratch)])
    np.testing.assert_array_equal(target, source)


def test_signed_loads_are_extended():
    x = np.arange(32, dtype=np.int8) - 16
    out = np.zeros(32, np.int32)
    code = """mov.u32 %r1, %tid.x; cvt.u64.u32 %rd3, %r1; ld.param.b64 %rd1, [p0]; add.u64 %rd1, %rd1, %rd3;
    ld.global.s8 %r2, [%rd1]; ld.param.b64 %rd2, [p1]; mad.wide.u32 %rd2, %r1, 4, %rd2; st.global.b32 [%rd2], %r2;"""
    launch(kernel(code, ["u64", "u64"]), [x, out])
    np.testing.assert_array_equal(out, x)


def test_generic_addresses_reach_all_spaces_in_one_instruction():
    """A third of the lanes each: global, shared and local memory."""
    code = f"""{AT} .shared .align 4 .b8 s[128]; .local .align 4 .b8 l[4]; .reg .pred %a, %b;
    mov.u32 %r1, s; mad.lo.u32 %r1, %r9, 4, %r1; cvt.u64.u32 %rd1, %r1; cvta.shared.u64 %rd1, %rd1;
    cvta.local.u64 %rd2, l; rem.u32 %r2, %r9, 3; setp.eq.u32 %a, %r2, 0; setp.eq.u32 %b, %r2, 1;
    selp.b64 %rd3, %rd1, %rd2, %b; selp.b64 %rd3, %rd9, %rd3, %a;
    add.u32 %r3, %r9, 100; st.b32 [%rd3], %r3; ld.b32 %r4, [%rd3]; st.global.b32 [%rd9], %r4;"""
    out = np.zeros(32, np.uint32)
    launch(kernel(code, ["u64"]), [out])
    np.testing.assert_array_equal(out, np.arange(100, 132))


def test_constants_and_variables_of_the_module():
    before = """.const .align 4 .b32 table[4] = {10, 20, 30, -1}; .global .f32 scale = 0f40000000;
    .global .align 8 .b8 text[3] = {1, 2, 3}; .visible .global .u32 total;"""
    code = f"""{AT} mov.u64 %rd1, table; and.b32 %r1, %r9, 3; mad.wide.u32 %rd1, %r1, 4, %rd1; ld.const.b32 %r2, [%rd1];
    ld.global.f32 %f1, [scale]; cvt.rzi.u32.f32 %r3, %f1; mul.lo.u32 %r2, %r2, %r3; st.global.b32 [%rd9], %r2;
    setp.eq.u32 %p1, %r9, 0; @!%p1 exit; ld.global.u32 %r4, [total]; add.u32 %r4, %r4, 1; st.global.u32 [total], %r4;
    st.global.u32 [%rd9], %r4;"""
    module = kernel(code, ["u64"], before=before)
    for n in (1, 2):  # variables live between launches
        out = np.zeros(32, np.int32)
        launch(module, [out])
        np.testing.assert_array_equal(out[1:5], [40, 60, -2, 20])
        assert out[0] == n
    done = launch(kernel("mov.u64 %rd1, table; st.global.b32 [%rd1], 0;", before=before), [], on_report="collect")
    assert [(r.kind, r.buffer, r.count) for r in done.reports] == [("out-of-bounds", "table", 32)]


# ---------------------------------------------------------------------- arguments
ADD_ONE = f"{AT} ld.global.b32 %r1, [%rd9]; add.u32 %r1, %r1, 1; st.global.b32 [%rd9], %r1;"


def test_writes_land_in_tensors_with_an_offset():
    whole = torch.zeros(40, dtype=torch.int32)
    launch(kernel(ADD_ONE, ["u64"]), [whole[5:37]])
    assert whole.tolist() == [0] * 5 + [1] * 32 + [0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int8, torch.complex64])
def test_any_dtype(dtype):
    x = torch.zeros(128 // torch.empty((), dtype=dtype).element_size(), dtype=dtype)
    launch(kernel(f"{AT} mov.b32 %r1, 0x01010101; st.global.b32 [%rd9], %r1;", ["u64"]), [x])
    assert x.view(torch.uint8).eq(1).all()


def test_a_tensor_passed_twice_is_one_buffer():
    code = f"{AT} ld.param.b64 %rd7, [p1]; sub.u64 %rd6, %rd7, %rd8; cvt.u32.u64 %r1, %rd6; st.global.b32 [%rd9], %r1;"
    x = np.zeros(64, np.uint32)
    launch(kernel(code, ["u64", "u64"]), [x[:32], x[16:]])
    assert x[0] == 64


def test_alignment_of_views_is_kept():
    """A view that starts one element into its storage is no 16-byte address, as on a GPU."""
    code = "ld.param.b64 %rd8, [p0]; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];"
    assert kinds(code, [torch.zeros(64)[4:]]) == []
    (report,) = reports(code, [torch.zeros(64)[1:]])
    assert (report.kind, report.offset, report.count) == ("misaligned", 0, 32)


def test_gaps_between_the_rows_of_a_slice_are_out_of_bounds():
    x = np.zeros((4, 16), np.float32)[:, :8]
    assert kinds(ADD_ONE, [x], 8) == []
    load, store = reports(ADD_ONE, [x], 20)
    assert (load.kind, load.thread, load.count, load.offset) == ("out-of-bounds", 8, 8, 32)
    assert (store.kind, store.thread, store.count) == ("out-of-bounds", 8, 8)
    assert kinds(ADD_ONE, [np.zeros((8, 8), np.float32)[:, ::-1][:, ::-1]], 64) == []


def test_a_read_only_array_is_not_written():
    x = np.zeros(32, np.uint32)
    x.flags.writeable = False
    with pytest.raises(EmulatorError, match="read-only"):
        launch(kernel(ADD_ONE, ["u64"]), [x])


def test_names_of_arguments():
    done = launch(kernel(ADD_ONE, ["u64"]), {"hidden": np.zeros(31, np.uint32)}, on_report="collect")
    assert {r.buffer for r in done.reports} == {"hidden"}


# ---------------------------------------------------------------------- checks
def test_out_of_bounds_below_above_and_far_away():
    for shift, offset in ((-128, -128), (128, 128), (1 << 17, 1 << 17), (-(1 << 17), -(1 << 17))):
        found = reports(f"{AT} add.s64 %rd9, %rd9, {shift}; st.global.b32 [%rd9], 1;", [np.zeros(32, np.uint32)])
        assert [(r.kind, r.buffer, r.offset, r.count) for r in found] == [("out-of-bounds", "p0", offset, 32)]
    for address in (0, 16, 1 << 60):
        found = reports(f"mov.b64 %rd1, {address}; ld.global.b32 %r1, [%rd1];", [])
        assert [r.kind for r in found] == ["out-of-bounds"]


def test_reports_raise_unless_collected():
    with pytest.raises(ReportsError, match="past the end of p0") as error:
        launch(kernel(ADD_ONE, ["u64"]), [np.zeros(31, np.uint32)])
    assert {r.thread for r in error.value.reports} == {31}


def test_checks_can_be_left_out():
    race = f"{AT} st.global.b32 [%rd8], %r9;"
    assert kinds(race, [np.zeros(1, np.uint32)]) == ["conflicting-stores"]
    assert kinds(race, [np.zeros(1, np.uint32)], checks=False) == []


def test_shared_and_local_bounds():
    code = ".shared .align 4 .b8 s[64]; mov.u32 %r1, %tid.x; mad.lo.u32 %r1, %r1, 4, {}; st.shared.b32 [%r1], %r1;"
    (report,) = reports(code.format(0), [])
    assert (report.kind, report.buffer, report.offset, report.count) == ("out-of-bounds", "shared", 64, 16)
    assert kinds(code.format(0), [], 16) == []
    assert "misaligned" in kinds(code.format(2), [], 8)
    code = ".local .align 4 .b8 l[16]; st.local.b32 [l+{}], 1;"
    assert kinds(code.format(12), []) == []
    assert kinds(code.format(16), []) == ["out-of-bounds"]


UNDEFINED = [np.zeros(32, np.uint32), Uninitialised(np.zeros(32, np.uint32))]
LOAD = f"{AT} ld.param.b64 %rd7, [p1]; mad.wide.u32 %rd6, %r9, 4, %rd7; ld.global.b32 %r1, [%rd6];"


def test_undefined_data_matters_when_it_is_used():
    assert kinds(f"{LOAD} add.u32 %r2, %r1, 1; mul.lo.u32 %r2, %r2, %r2;", UNDEFINED) == []
    assert kinds(f"{LOAD} setp.gt.u32 %p1, %r9, 99; @%p1 st.global.b32 [%rd9], %r1;", UNDEFINED) == []
    for use, what in (
        ("add.u32 %r2, %r1, 1; st.global.b32 [%rd9], %r2;", "data stored"),
        ("setp.eq.u32 %p1, %r1, 0; @%p1 bra there; st.global.b32 [%rd9], 1; there:", "a branch condition"),
        ("mad.wide.u32 %rd1, %r1, 4, %rd8; ld.global.b32 %r2, [%rd1];", "an address"),
        ("red.global.add.u32 [%rd8], %r1;", "an operand of an atomic"),
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; st.global.b32 [%rd9], %r2;", "data stored"),
    ):
        (report,) = reports(f"{LOAD} {use}", UNDEFINED)
        assert (report.kind, what in report.message, report.count) == ("uninitialised", True, 32)


def test_undefined_data_is_overwritten_or_passes_through_memory():
    assert kinds(f"{LOAD} mov.u32 %r1, 5; st.global.b32 [%rd9], %r1;", UNDEFINED) == []
    assert (
        kinds(f"{LOAD} st.global.b32 [%rd6], 5; ld.global.b32 %r1, [%rd6]; st.global.b32 [%rd9], %r1;", UNDEFINED) == []
    )
    shared = """.shared .align 4 .b8 s[128]; mov.u32 %r3, s; mad.lo.u32 %r3, %r9, 4, %r3; {} ld.shared.b32 %r4, [%r3];
        st.global.b32 [%rd9], %r4;"""
    assert kinds(f"{LOAD} {shared.format('st.shared.b32 [%r3], %r1;')}", UNDEFINED) == ["uninitialised"]
    assert kinds(f"{LOAD} {shared.format('')}", UNDEFINED) == ["uninitialised"]
    assert kinds(f"{LOAD} {shared.format('st.shared.b32 [%r3], 1;')}", UNDEFINED) == []
    local = ".local .align 4 .b8 l[4]; {} ld.local.b32 %r4, [l]; st.global.b32 [%rd9], %r4;"
    assert kinds(f"{LOAD} {local.format('')}", UNDEFINED) == ["uninitialised"]
    assert kinds(f"{LOAD} {local.format('st.local.b32 [l], %r9;')}", UNDEFINED) == []


def test_a_register_that_was_never_written():
    assert kinds(f"{AT} st.global.b32 [%rd9], %r40;", UNDEFINED[:1]) == ["uninitialised"]


# ---------------------------------------------------------------------- cp.async
COPY = """.shared .align 16 .b8 s[512]; mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, {n}, %rd1;
mov.u32 %r2, s; mad.lo.u32 %r3, %r1, {n}, %r2; {copy}
{wait} {sync} xor.b32 %r4, %r1, 1; mad.lo.u32 %r5, %r4, {n}, %r2; ld.shared.b32 %r6, [%r5];
ld.param.b64 %rd3, [p1]; mad.wide.u32 %rd4, %r1, 4, %rd3; st.global.b32 [%rd4], %r6;"""
PLAIN = "cp.async.ca.shared.global [%r3], [%rd2], {n}; cp.async.commit_group;"


@pytest.mark.parametrize("async_copies", ["late", "early"])
@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_cp_async(n, async_copies, wait):
    x, out = np.arange(8 * n, dtype=np.uint32), np.zeros(32, np.uint32)
    code = COPY.format(n=n, copy=PLAIN.format(n=n), wait=wait, sync="bar.sync 0;")
    launch(kernel(code, ["u64", "u64"]), [x, out], async_copies=async_copies)
    np.testing.assert_array_equal(out, x[:: n // 4][np.arange(32) ^ 1])


def test_cp_async_fills_with_zeros():
    """src-size smaller than the copy: the rest is zero; a predicate ignores the source altogether."""
    x, out = np.arange(1, 129, dtype=np.uint32), np.zeros(32, np.uint32)
    sized = """and.b32 %r7, %r1, 3; shl.b32 %r7, %r7, 2; cp.async.cg.shared.global [%r3], [%rd2], 16, %r7;
        cp.async.commit_group;"""
    code = COPY.format(n=16, copy=sized, wait="cp.async.wait_all;", sync="bar.sync 0;")
    launch(kernel(code, ["u64", "u64"]), [x, out])
    other = np.arange(32) ^ 1
    np.testing.assert_array_equal(out, np.where(other & 3, x[::4][other], 0))
    ignored = "setp.eq.u32 %p1, %r1, 3; cp.async.ca.shared.global [%r3], [%rd2], 16, %p1; cp.async.commit_group;"
    code = COPY.format(n=16, copy=ignored, wait="cp.async.wait_all;", sync="bar.sync 0;")
    launch(kernel(code, ["u64", "u64"]), [x, out])
    np.testing.assert_array_equal(out, np.where(other == 3, 0, x[::4][other]))


@pytest.mark.parametrize("async_copies", ["late", "early"])
@pytest.mark.parametrize(
    ("wait", "sync", "kind"),
    [
        ("", "bar.sync 0;", "copy-in-flight"),
        ("cp.async.wait_group 1;", "bar.sync 0;", "copy-in-flight"),
        ("cp.async.wait_group 0;", "", "shared-race"),
        ("cp.async.wait_group 0;", "bar.warp.sync -1;", None),
        ("cp.async.wait_group 0;", "bar.sync 0;", None),
    ],
)
def test_cp_async_must_be_waited_for_and_published(wait, sync, kind, async_copies):
    code = COPY.format(n=16, copy=PLAIN.format(n=16), wait=wait, sync=sync)
    found = kinds(code, [np.zeros(128, np.uint32), np.zeros(32, np.uint32)], async_copies=async_copies)
    assert found == ([kind] if kind else [])


def test_a_copy_that_is_never_waited_for():
    code = COPY.split("{wait}", maxsplit=1)[0].format(n=16, copy=PLAIN.format(n=16))
    assert kinds(code, [np.zeros(128, np.uint32)]) == ["copy-unfinished"]
    assert kinds(code + "cp.async.wait_all;", [np.zeros(128, np.uint32)]) == []


def test_overwriting_a_copy_in_flight():
    code = (
        COPY.split("{wait}", maxsplit=1)[0].format(n=16, copy=PLAIN.format(n=16))
        + "{} st.shared.b32 [%r3], 1; cp.async.wait_all;"
    )
    assert kinds(code.format(""), [np.zeros(128, np.uint32)]) == ["copy-in-flight"]
    assert kinds(code.format("cp.async.wait_all;"), [np.zeros(128, np.uint32)]) == []


def test_evaluate_reads_what_it_was_given():
    np.testing.assert_array_equal(evaluate("mov.b32 %d, %a0;", [np.arange(40, dtype=np.uint32)]), np.arange(40))


# ---------------------------------------------------------------------- tables of addresses
FROM_TABLE = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; ld.param.b64 %rd1, [p0];
    mad.wide.u32 %rd2, %r2, 16, %rd1; ld.global.b64 %rd3, [%rd2]; ld.global.b64 %rd4, [%rd2+8];
    mad.wide.u32 %rd5, %r1, 4, %rd3; mad.wide.u32 %rd6, %r1, 4, %rd4; ld.global.b32 %r3, [%rd5];
    st.global.b32 [%rd6], %r3;
"""


@pytest.mark.parametrize("tensors", [True, False])
def test_a_table_of_addresses_reaches_the_memory_that_is_named(tensors):
    """Copies between tensors that are no arguments; views and an address inside a tensor; the table is left alone."""
    a, b = np.arange(100, dtype=np.int32), np.zeros(64, np.int32)
    start = a.__array_interface__["data"][0]
    table = np.array([start, b.__array_interface__["data"][0], start + 4 * 68, b[32:].__array_interface__["data"][0]])
    before = table.copy()
    given, memory = (table, {"a": a, "b": b})
    if tensors:
        given, memory = torch.from_numpy(table), {"a": torch.from_numpy(a), "b": torch.from_numpy(b)}
    launch(kernel(FROM_TABLE, ["u64"]), [given], 32, 2, memory=memory)
    assert b.tolist() == [*range(32), *range(68, 100)]
    assert (table == before).all()


def test_what_is_not_named_is_out_of_bounds():
    a, b = np.arange(32, dtype=np.int32), np.zeros(31, np.int32)
    table = np.array([x.__array_interface__["data"][0] for x in (a, b)])
    module = kernel(FROM_TABLE, ["u64"])
    found = launch(module, [table], memory={"a": a}, on_report="collect").reports
    assert [(r.kind, r.count) for r in found] == [("out-of-bounds", 32)]
    found = launch(module, [table], memory={"a": a, "b": b}, on_report="collect").reports
    assert [(r.kind, r.buffer, r.offset, r.count) for r in found] == [("out-of-bounds", "b", 124, 1)]


def test_a_table_that_the_kernel_writes_keeps_what_was_written():
    a = np.arange(4, dtype=np.int32)
    table = np.array([a.__array_interface__["data"][0], 7, 8])
    code = "ld.param.b64 %rd1, [p0]; mov.u64 %rd2, 5; st.global.b64 [%rd1+8], %rd2;"
    expected = [table[0], 5, 8]
    launch(kernel(code, ["u64"]), [table], 1, memory={"a": a})
    assert table.tolist() == expected


def test_memory_is_of_tensors():
    with pytest.raises(EmulatorError, match=r"memory\['a'\]: int was given; pass a CPU tensor"):
        launch(kernel(FROM_TABLE, ["u64"]), [np.zeros(2, np.int64)], memory={"a": 3})


# ---------------------------------------------------------------------- one NaN
@pytest.mark.parametrize("space", ["global", "shared"])
def test_lanes_may_store_different_nans_but_not_a_nan_and_a_number(space):
    """inf - inf and 0 * inf have other bits in numpy; as integers the same bits are a conflict."""
    code = """.shared .align 4 .b8 room[4]; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7; mov.f32 %f1, 0f7F800000;
        mov.f32 %f4, 0fFFC00001; add.f32 %f2, %f4, 0f3F800000; mov.f32 %f5, 0f7FC00000; add.f32 %f3, %f5, 0f3F800000;
        selp.f32 %f6, %f2, {other}, %p1; {value} ld.param.b64 %rd1, [p0]; mov.u32 %r2, room;
        st.{space}.{kind} [{where}], {register};"""
    where = {"global": "%rd1", "shared": "%r2"}[space]
    as_float = {"value": "", "kind": "f32", "register": "%f6"}
    as_bits = {
        "value": "mov.b32 %r3, %f6; and.b32 %r3, %r3, -1; add.u32 %r4, %r3, 0;",
        "kind": "b32",
        "register": "%r4",
    }
    out = np.zeros(1, np.float32)
    for how, other, expected in (
        (as_float, "%f3", []),
        (as_float, "0f3F800000", ["conflicting-stores"]),
        (as_bits, "%f3", ["conflicting-stores"]),
    ):
        text = code.replace("{space}", space).replace("{where}", where).replace("{other}", other)
        for name, part in how.items():
            text = text.replace(f"{{{name}}}", part)
        assert kinds(text, [out]) == expected, (how, other)


def test_ldu_is_a_load():
    """Of an address that is the same in all threads."""
    out = np.zeros(32, np.int32)
    code = "ld.param.b64 %rd1, [p1]; ldu.global.b32 %r1, [%rd1]; st.global.b32 [%rd9], %r1;"
    launch(kernel(AT + code, ["u64"] * 2), [out, np.array([5], np.int32)])
    assert out.tolist() == [5] * 32


def test_every_opcode_is_in_a_unit_test():
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    opcodes = [*EMITTERS, "bra", "brx", "ret", "exit", "trap", "bar", "barrier", "call"]
    assert [o for o in opcodes if not re.search(rf'(?<![\w.]){o}[.;\s{{"]', text)] == []
