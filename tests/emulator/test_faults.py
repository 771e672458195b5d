"""Every check finds the fault planted for it, and says where: kind, source line, buffer, offset, CTA and thread.

The faulty kernels are in gallery/faults.py and faults.cu, or a kernel of the gallery with a line taken out. A comment
`fault: KIND` marks the line that the report must name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from hotloop import emulator
from hotloop.emulator import Module, Report

from gallery import attention, faults, matmul, reduction
from gallery.case import SCHEDULES, module

GALLERY = Path(__file__).with_name("gallery")
EARLY = SCHEDULES["random 1, early copies"]


def marked(file: str, marker: str) -> str:
    """ "faults.cu:12" of the line with that comment, or of the line that holds that text."""
    lines = (GALLERY / file).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if re.search(marker + "$", line)]
    return f"{file}:{number}"


COPY = marked("attention.cu", r" copy_async\(.*")
READ_K = marked("attention.cu", r" load_matrices\(key.*")
READ_V = marked("attention.cu", r" load_matrices_transposed\(value.*")


def only(reports: Sequence[Report], kind: str) -> Report:
    assert {report.kind for report in reports} == {kind}, [str(report) for report in reports]
    return reports[0]


def in_triton(target: str, launch: Callable[[], object]) -> list[Report]:
    with emulator.triton(target, on_report="collect") as gpu:
        launch()
    return gpu.reports


def in_cuda(kernel: str, *arguments: object, grid: int = 1) -> list[Report]:
    return module("faults", "sm_80").launch(kernel, (grid,), (64,), 0, arguments, on_report="collect").reports


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_out_of_bounds_in_triton(target):
    x, y = torch.zeros(1000), torch.zeros(1000)
    report = only(in_triton(target, lambda: faults.copy_past_the_end[(4,)](x, y, 1000, BLOCK=256)), "out-of-bounds")
    assert report.source_line == marked("faults.py", "fault: out-of-bounds")
    assert (report.buffer, report.offset, report.cta, report.count) == (
        "x",
        4000,
        (3, 0, 0),
        12,
    )  # threads, two elements each


def test_out_of_bounds_in_cuda():
    report = only(in_cuda("past_the_end", torch.zeros(64), torch.zeros(100), grid=2), "out-of-bounds")
    assert report.source_line == marked("faults.cu", "fault: out-of-bounds")
    assert (report.offset, report.cta, report.thread, report.count) == (400, (1, 0, 0), 36, 28)
    assert report.buffer.endswith("param_1")


def test_misaligned_in_triton():
    """The kernel was told that `start` divides by 4."""
    x, y = torch.zeros(1024), torch.zeros(512)
    report = only(in_triton("sm_80", lambda: faults.copy_from_odd_start[(1,)](x, y, 5, 512, BLOCK=512)), "misaligned")
    assert report.source_line == marked("faults.py", "fault: misaligned")
    assert (report.buffer, report.offset, report.cta, report.thread) == ("x", 20, (0, 0, 0), 0)


def test_misaligned_in_cuda():
    report = only(in_cuda("odd_start", torch.zeros(300), torch.zeros(64), 2), "misaligned")
    assert report.source_line == marked("faults.cu", "fault: misaligned")
    assert (report.offset, report.thread, report.count) == (8, 0, 64)


def test_uninitialised():
    report = only(in_cuda("uninitialised", torch.zeros(64), torch.zeros(64)), "uninitialised")
    assert report.source_line == marked("faults.cu", "fault: uninitialised")
    assert (report.cta, report.thread, report.count) == ((0, 0, 0), 63, 1)


def test_missing_syncthreads_in_attention():
    t = attention.tensors((1, 100, 0))
    for machine in SCHEDULES.values():
        launch = attention.launch_cuda(module("attention", "sm_80", "NO_SYNC"), t, {**machine, "on_report": "collect"})
        kinds = {report.kind for report in launch.reports}
        assert "shared-race" in kinds <= {"shared-race", "copy-in-flight"}
        # the next K arrives over the one that is read
        assert {report.source_line for report in launch.reports} <= {COPY, READ_K}
        assert {report.buffer for report in launch.reports} == {"shared"}


def test_missing_syncthreads():
    report = only(in_cuda("missing_syncthreads", torch.zeros(64), torch.zeros(64)), "shared-race")
    assert report.source_line == marked("faults.cu", "fault: shared-race-between-warps")
    assert report.buffer == "shared"


def test_missing_syncwarp():
    report = only(in_cuda("missing_syncwarp", torch.zeros(64), torch.zeros(64)), "shared-race")
    assert report.source_line == marked("faults.cu", "fault: shared-race")


def test_global_race_between_ctas_in_triton():
    x, total = torch.zeros(1024), torch.zeros(1)
    reports = in_triton("sm_80", lambda: faults.add_without_atomics[(4,)](x, total, BLOCK=256))
    report = only(reports, "global-race")
    assert report.source_line == marked("faults.py", "fault: global-race")
    assert (report.buffer, report.offset, report.count) == ("total", 0, 4)


def test_missing_fence_before_the_last_cta_reads():
    t = reduction.tensors((2999,))
    launch = reduction.launch_cuda(module("reduction", "sm_80", "NO_FENCE"), t, {"on_report": "collect"})
    report = only(launch.reports, "global-race")
    assert report.buffer.endswith("param_4")  # partial
    assert reduction.launch_cuda(module("reduction", "sm_80"), t, {"on_report": "collect"}).reports == []


def test_missing_wait_group():
    for machine in SCHEDULES.values():
        t = attention.tensors((1, 100, 0))
        launch = attention.launch_cuda(module("attention", "sm_80", "NO_WAIT"), t, {**machine, "on_report": "collect"})
        assert {report.kind for report in launch.reports} == {"copy-in-flight"}
        assert launch.reports[0].source_line == READ_V
        assert {report.source_line for report in launch.reports} <= {READ_V, COPY}


def without(target: str, launch: Callable[[], object], instruction: str) -> list[Report]:
    """Reports of a Triton kernel of the gallery whose PTX has lost every such instruction."""
    with emulator.triton(target) as gpu:
        launch()
    (done,) = gpu.launches
    ptx, dropped = re.subn(rf"(?m)^\s*{re.escape(instruction)}[^;]*;", "", done.compiled.asm["ptx"])
    assert dropped > 0
    return done.again(Module(ptx), {}).reports


def matmul_for_wgmma() -> None:
    matmul.launch_triton(matmul.tensors((72, 136, 104)))


DOT = r"total = tl\.dot\(left, right, total\)"


def test_missing_proxy_fence():
    report = only(without("sm_90", matmul_for_wgmma, "fence.proxy.async"), "proxy-fence")
    assert report.source_line == marked("matmul.py", DOT)
    assert report.buffer == "shared"


def test_missing_wgmma_wait():
    reports = without("sm_90", matmul_for_wgmma, "wgmma.wait_group")
    assert "wgmma-in-flight" in {report.kind for report in reports}


def test_missing_wgmma_fence():
    report = only(without("sm_90", matmul_for_wgmma, "wgmma.fence"), "wgmma-fence")
    assert report.source_line == marked("matmul.py", DOT)


def test_divergent_barrier():
    reports = in_cuda("divergent_barrier", torch.zeros(64), torch.zeros(64))
    assert reports[0].kind == "divergent-barrier"
    assert reports[0].source_line == marked("faults.cu", "fault: divergent-barrier")


def test_barrier_deadlock():
    report = only(in_cuda("deadlock", torch.zeros(64), torch.zeros(64)), "barrier-deadlock")
    assert report.source_line == marked("faults.cu", "fault: barrier-deadlock")


def test_conflicting_stores_in_triton():
    x, y = torch.arange(128.0), torch.zeros(64)
    report = only(in_triton("sm_80", lambda: faults.pairs_to_one_place[(1,)](x, y, BLOCK=128)), "conflicting-stores")
    assert report.source_line == marked("faults.py", "fault: conflicting-stores")
    assert (report.buffer, report.offset) == ("y", 0)


def test_conflicting_stores_in_cuda():
    report = only(in_cuda("last_writer", torch.arange(64.0), torch.zeros(16)), "conflicting-stores")
    assert report.source_line == marked("faults.cu", "fault: conflicting-stores")


def test_equal_values_in_one_place_are_no_fault():
    assert in_cuda("last_writer", torch.ones(64), torch.zeros(16)) == []


@pytest.mark.parametrize("kernel", ["missing_syncwarp", "missing_syncthreads", "uninitialised", "deadlock"])
def test_the_faults_are_found_under_a_random_schedule_too(kernel):
    launch = module("faults", "sm_80").launch(
        kernel, (1,), (64,), 0, [torch.zeros(64), torch.zeros(64)], on_report="collect", **EARLY
    )
    assert launch.reports != []
