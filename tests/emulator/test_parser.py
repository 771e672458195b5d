"""parser.py and lower.py: declarations, scopes, calls, source lines, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import HEADER, evaluate, kernel, launch, text

from hotloop.emulator import EmulatorError, Module, UnsupportedPTX


def test_kernels_and_their_parameters():
    ptx = HEADER.format(target="sm_90a") + (
        ".visible .entry first(.param .u64 .ptr .global .align 16 first_0, .param .b32 n, .param .align 8 .b8 s[24])"
        ".reqntid 64, 2, 1 { .shared .align 16 .b8 tile[100]; .shared .f32 more[3]; ret; }\n"
        ".entry _Z6secondPf(.param .u64 x) { ret; }"
    )
    module = Module(ptx, "m")
    assert list(module.kernels) == ["first", "_Z6secondPf"]
    first = module.kernels["first"]
    assert [(p.name, p.type, p.size, p.align, p.offset) for p in first.parameters] == [
        ("first_0", "u64", 8, 8, 0),
        ("n", "b32", 4, 4, 8),
        ("s", "b8", 24, 8, 16),
    ]
    assert (first.reqntid, first.static_shared, first.target) == ((64, 2, 1), 112, "sm_90a")
    assert module.kernels["second"].name == "_Z6secondPf"
    with pytest.raises(KeyError, match="no kernel 'third'"):
        module.kernels["third"]


def test_text_that_is_no_ptx():
    with pytest.raises(EmulatorError, match="no PTX"):
        Module("int main() {}")


def line_of(ptx: str, part: str) -> int:
    (number,) = [n for n, line in enumerate(ptx.splitlines(), 1) if part in line]
    return number


def test_comments_keep_line_numbers():
    ptx = text("/* one\ntwo */ // three\n  bogus.op %r1, %r2;")
    with pytest.raises(UnsupportedPTX, match=r"bogus\.op %r1, %r2") as error:
        launch(Module(ptx), [])
    assert error.value.ptx_line == line_of(ptx, "bogus")


@pytest.mark.parametrize(
    "instruction",
    [
        "mbarrier.init.shared::cta.b64 [%r1], 1;",
        "cp.async.bulk.commit_group;",
        "tcgen05.fence::before_thread_sync;",
        "cluster.arrive;",
        "barrier.cluster.arrive.aligned;",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];",
        "setmaxnreg.inc.sync.aligned.u32 64;",
        "add.cc.u32 %r1, %r2, %r3;",
        "fma.rz.f64 %fd1, %fd2, %fd3, %fd4;",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1};",
        "call.uni (%r1), %rd1, (%r2), prototype;",
        "mapa.shared::cluster.u32 %r1, %r2, %r3;",
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd1], [%r1], 128;",
    ],
)
def test_what_is_not_emulated_is_refused_with_its_lines(instruction):
    ptx = text(f"\n.loc 1 42 3\n{instruction}", before='.file 1 "/somewhere/kernel.cu"', target="sm_90a")
    with pytest.raises(UnsupportedPTX) as error:
        launch(Module(ptx), [])
    assert (error.value.source_line, error.value.ptx_line) == ("kernel.cu:42", line_of(ptx, instruction))
    assert f"PTX line {error.value.ptx_line}, kernel.cu:42" in str(error.value)


def test_clusters_are_refused():
    with pytest.raises(UnsupportedPTX, match="clusters"):
        launch(kernel("", attributes=".explicitcluster .reqnctapercluster 2, 1, 1", target="sm_90"), [])


def test_an_undeclared_register():
    with pytest.raises(UnsupportedPTX, match="%nothing is not declared"):
        launch(kernel("add.u32 %r1, %nothing, 1;"), [])


def test_scopes_hide_registers_and_labels():
    code = """mov.u32 %d, %a0;
    { .reg .b32 %x; mov.u32 %x, 10; bra L; add.u32 %x, %x, 1000; L: add.u32 %d, %d, %x; }
    { .reg .b32 %x; mov.u32 %x, 20; bra L; add.u32 %x, %x, 1000; L: add.u32 %d, %d, %x; }"""
    np.testing.assert_array_equal(evaluate(code, [np.arange(4, dtype=np.uint32)]), np.arange(4) + 30)


FUNCTIONS = """
.func (.param .b32 out) twice(.param .b32 x) { .reg .b32 %r<4>; .reg .pred %p;
    ld.param.b32 %r1, [x]; setp.gt.u32 %p, %r1, 100; @%p bra big; add.u32 %r2, %r1, %r1; st.param.b32 [out], %r2; ret;
    big: st.param.b32 [out], 7; ret; }
.func (.param .b32 out) four_times(.param .b32 x) { .reg .b32 %r<4>; ld.param.b32 %r1, [x];
    { .param .b32 a; st.param.b32 [a], %r1; .param .b32 b; call.uni (b), twice, (a); ld.param.b32 %r1, [b]; }
    { .param .b32 a; st.param.b32 [a], %r1; .param .b32 b; call.uni (b), twice, (a); ld.param.b32 %r2, [b]; }
    st.param.b32 [out], %r2; ret; }
.func (.param .b32 out) endless(.param .b32 x) { { .param .b32 b; call.uni (b), endless, (x); } ret; }
"""
CALL = "{{ .param .b32 a; st.param.b32 [a], %a0; .param .b32 b; call.uni (b), {}, (a); ld.param.b32 %d, [b]; }}"


def test_device_functions():
    x = np.array([1, 2, 60, 101, 1000], np.uint32)
    np.testing.assert_array_equal(evaluate(CALL.format("four_times"), [x], before=FUNCTIONS), [4, 8, 7, 14, 14])


def test_a_guarded_call():
    code = f".reg .pred %c; setp.lt.u32 %c, %a0, 2; mov.u32 %d, 99; {CALL.format('twice').replace('call', '@%c call')}"
    # The threads that do not call read a result that nobody wrote.
    code = code.replace("ld.param.b32 %d", "@%c ld.param.b32 %d")
    np.testing.assert_array_equal(evaluate(code, [np.arange(4, dtype=np.uint32)], before=FUNCTIONS), [0, 2, 99, 99])


@pytest.mark.parametrize(("name", "reason"), [("endless", "recursive"), ("nowhere", "no body")])
def test_calls_that_are_refused(name, reason):
    with pytest.raises(UnsupportedPTX, match=reason):
        evaluate(CALL.format(name), [np.zeros(1, np.uint32)], before=FUNCTIONS)


def test_source_lines_of_inlined_code_are_the_kernels_own():
    before = '.file 1 "/a/kernel.py"\n.file 2 "/b/library.py"'
    code = """.loc 1 5 0
    .loc 1 10 1
    .loc 2 90 3, function_name $L__info, inlined_at 1 10 1
    .loc 2 70 5, function_name $L__info, inlined_at 2 90 3
    mov.u64 %rd1, 16; st.global.b32 [%rd1], 0;"""
    done = launch(kernel(code, before=before), [], on_report="collect")
    assert [r.source_line for r in done.reports] == ["kernel.py:10"]
    assert done.reports[0].ptx_line.endswith("st.global.b32 [%rd1], 0")
    assert done.counters.by_line()["kernel.py:10"]["global_store_requests"] == 1


def test_structures_special_registers_and_vectors_in_parameters():
    code = """.reg .b32 %d; ld.param.v2.b32 {%r1, %r2}, [p0+8]; ld.param.b64 %rd1, [p1]; ld.param.b8 %h1, [p0];
    mov.u32 %r3, %tid.x; mad.wide.u32 %rd2, %r3, 4, %rd1; cvt.u32.u16 %r4, %h1; add.u32 %r1, %r1, %r4;
    add.u32 %r1, %r1, %r2;
    st.global.b32 [%rd2], %r1;"""
    module = Module(
        HEADER.format(target="sm_80")
        + ".entry k(.param .align 8 .b8 p0[16], .param .u64 p1) "
        + f"{{ .reg .b16 %h<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>; {code} ret; }}"
    )
    out = np.zeros(32, np.uint32)
    launch(module, [np.array([3, 0, 20, 100], np.uint32).tobytes(), out])
    np.testing.assert_array_equal(out, np.full(32, 123))
