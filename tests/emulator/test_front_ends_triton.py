"""`emulator.triton(...)`: Triton's own launch machinery, the emulator as its device."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from hotloop import emulator
from hotloop.emulator import EmulatorError, ReportsError, UnsupportedPTX
from hotloop.emulator.triton_driver import Session

from gallery import faults, matmul


@triton.jit
def add_scalars(out, a: tl.bfloat16, b: tl.float64, c, d: tl.int64, e: tl.int8, flag, f: tl.float16):
    tl.store(out + 0, a.to(tl.float64))
    tl.store(out + 1, b)
    tl.store(out + 2, c.to(tl.float64))
    tl.store(out + 3, d.to(tl.float64))
    tl.store(out + 4, e.to(tl.float64))
    tl.store(out + 5, tl.where(flag, 1.0, 0.0).to(tl.float64))
    tl.store(out + 6, f.to(tl.float64))


def test_scalars_arrive_as_tritons_launcher_passes_them():
    out = torch.zeros(8, dtype=torch.float64)
    with emulator.triton():
        add_scalars[(1,)](out, 1.00390625 + 2**-9, 0.1, 0.1, -(2**53) + 1, -3, True, 0.1)
    bf16 = 1.0  # 1 + 1/256 + 1/512 cut off, not rounded (to 1 + 1/128)
    float32, float16 = torch.tensor(0.1).double().item(), torch.tensor(0.1).half().double().item()
    assert out.tolist() == [bf16, 0.1, float32, -(2**53) + 1, -3, 1, float16, 0]


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float


@triton.jit
def scale_pairs(pairs, bias, y, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(pairs[0].x + i, mask=i < n) * pairs[0].scale
    second = tl.load(pairs[1].x + i, mask=i < n) * pairs[1].scale
    if bias is not None:
        first += tl.load(bias + i, mask=i < n)
    tl.store(y + i, (first + second) * FACTOR, mask=i < n)


@pytest.mark.parametrize("with_bias", [False, True])
def test_tuples_none_and_constants(with_bias):
    a, b, bias = torch.randn(3, 100).unbind()
    y = torch.zeros(100)
    with emulator.triton("sm_90"):
        pairs = (Pair(a, 2.0), Pair(b, 0.5))
        scale_pairs[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](
            pairs, bias if with_bias else None, y, 100, 4, BLOCK=32
        )
    torch.testing.assert_close(y, (2 * a + 0.5 * b + (bias if with_bias else 0)) * 4)


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    i = (
        tl.program_id(2) * tl.num_programs(1) * tl.num_programs(0) + tl.program_id(1) * tl.num_programs(0)
    ) + tl.program_id(0)
    i = i * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


def test_arguments_are_specialised_as_on_a_gpu():
    """Divisible by 16, equal to 1, aligned: each makes its own PTX; what differs in nothing else shares it."""
    x, y = torch.zeros(2, 4096)
    with emulator.triton() as gpu:
        for tensor, n in ((x, 32), (x, 48), (x, 33), (x, 1), (x[1:], 32)):
            add_one[(1,)](tensor, y, n, BLOCK=1024)
    ptx = [launch.compiled.asm["ptx"] for launch in gpu.launches]
    assert ptx[0] == ptx[1]
    assert len(set(ptx)) == 4
    assert "ld.global.v4" in ptx[0]
    assert "ld.global.v4" not in ptx[4]
    assert "n" not in gpu.launches[3].arguments


def test_grids_of_three_dimensions_and_empty_ones():
    x, y = torch.randn(2, 6 * 16).unbind()
    with emulator.triton() as gpu:
        add_one[(3, 1, 2)](x, y, 96, BLOCK=16)
        add_one[(0,)](x, torch.empty(0), 96, BLOCK=16)
    torch.testing.assert_close(y, x + 1)
    assert len(gpu.launches) == 1


def test_writes_land_in_the_view_and_nowhere_else():
    whole = torch.zeros(100)
    x = torch.ones(20)
    with emulator.triton():
        add_one[(2,)](x, whole[37:57], 20, BLOCK=16)
    assert whole[37:57].tolist() == [2.0] * 20
    assert whole.sum() == 40


def test_reports_and_counters_of_all_launches_add_up():
    x, y = torch.zeros(2, 100)
    with emulator.triton() as gpu:
        add_one[(1,)](x, y, 100, BLOCK=128)
        once = gpu.counters["warp_instructions"]
        add_one[(1,)](x, y, 100, BLOCK=128)
    assert gpu.counters["warp_instructions"] == 2 * once > 0
    assert gpu.reports == []
    assert "test_front_ends_triton.py" in gpu.counters.table()


def test_a_report_raises_unless_it_is_collected():
    x, y = torch.zeros(100), torch.zeros(100)
    with emulator.triton() as gpu, pytest.raises(ReportsError, match="out-of-bounds"):
        faults.copy_past_the_end[(1,)](x, y, 100, BLOCK=128)
    assert len(gpu.reports) == 1
    with emulator.triton(on_report="collect") as gpu:
        faults.copy_past_the_end[(1,)](x, y, 100, BLOCK=128)
    assert [report.kind for report in gpu.reports] == ["out-of-bounds"]


def tuned(**options: object) -> Session:
    t = matmul.CASE.tensors((72, 136, 40))
    with emulator.triton(**options) as gpu:
        matmul.launch_triton(t)
    return gpu


def test_autotuned_kernels_take_the_first_configuration_or_the_named_one():
    assert tuned().launches[0].grid == (2, 3, 1)  # 64 x 64
    assert tuned(configs={"matmul": 1}).launches[0].grid == (3, 5, 1)  # 32 x 32
    assert tuned(configs={"another": 1}).launches[0].grid == (2, 3, 1)
    with pytest.raises(EmulatorError, match=r"configs\['matmul'\] is 2: matmul has 2"):
        tuned(configs={"matmul": 2})


def test_a_choice_made_here_does_not_outlive_the_block():
    """On a GPU later in the same process, the kernel must be tuned for real."""
    tuned()
    assert matmul.matmul.cache == {}
    assert "do_bench" not in vars(matmul.matmul)


def test_a_pruned_configuration_is_missed():
    @triton.autotune(
        [triton.Config({"BLOCK": size}) for size in (32, 64, 128)],
        key=["n"],
        prune_configs_by={"early_config_prune": lambda configs, args, **_: configs[1:]},
    )
    @triton.jit
    def pruned(x, y, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)

    x, y = torch.zeros(2, 100)
    with emulator.triton() as gpu:
        pruned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, y, 100)
    assert gpu.launches[0].grid == (2, 1, 1)
    with emulator.triton(configs={"pruned": 0}), pytest.raises(EmulatorError, match="pruning has dropped"):
        pruned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, y, 100)


def test_launch_hooks_are_called():
    calls = []
    hooks = triton.knobs.runtime
    enter, leave = (lambda metadata: calls.append("enter")), (lambda metadata: calls.append("leave"))
    hooks.launch_enter_hook.add(enter)
    hooks.launch_exit_hook.add(leave)
    try:
        with emulator.triton():
            add_one[(1,)](torch.zeros(4), torch.zeros(4), 4, BLOCK=16)
    finally:
        hooks.launch_enter_hook.remove(enter)
        hooks.launch_exit_hook.remove(leave)
    assert calls == ["enter", "leave"]


def test_the_driver_before_is_back_afterwards():
    before = triton.runtime.driver._active
    mine = object()
    triton.runtime.driver.set_active(mine)
    try:
        with emulator.triton():
            assert triton.runtime.driver.active is not mine
        assert triton.runtime.driver.active is mine
        with pytest.raises(KeyError), emulator.triton():
            raise KeyError
        assert triton.runtime.driver.active is mine
    finally:
        triton.runtime.driver.set_active(before)


def test_a_block_inside_a_block_is_refused():
    with emulator.triton() as gpu:
        with pytest.raises(EmulatorError, match="another"), emulator.triton():
            pass
        add_one[(1,)](torch.zeros(4), torch.zeros(4), 4, BLOCK=16)
    assert len(gpu.launches) == 1


def test_threads_launch_in_turn():
    outputs = [torch.zeros(500) for _ in range(4)]
    with emulator.triton(schedule="random") as gpu:
        threads = [threading.Thread(target=add_one[(8,)], args=(y, y, 500, 64)) for y in outputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(gpu.launches) == 4
    assert all(y.tolist() == [1.0] * 500 for y in outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sm_75"}, "sm_75.*expected one of sm_80"),
        ({"on_report": "ignore"}, "expected 'raise' or 'collect'"),
    ],
)
def test_bad_options_say_what_was_expected(options, message):
    with pytest.raises(EmulatorError, match=message), emulator.triton(**options):
        pass
    with emulator.triton():  # the refusal left nothing behind
        pass


def test_tensors_elsewhere_and_descriptors_are_refused():
    x = torch.zeros(64, 64)
    with emulator.triton():
        with pytest.raises(EmulatorError, match="x: a tensor on meta was given"):
            add_one[(1,)](x.to("meta"), x, 4, BLOCK=16)
        with pytest.raises(UnsupportedPTX, match="tensor descriptor"):
            load_tile[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), x)


@triton.jit
def load_tile(tile, y):
    tl.store(y + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tile.load([0, 0]))


def run_python(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_interpreter_is_refused():
    program = """
from hotloop import emulator
try:
    with emulator.triton():
        pass
except emulator.EmulatorError as error:
    print(error)
"""
    assert "TRITON_INTERPRET is set" in run_python(program, TRITON_INTERPRET="1")


def test_importing_the_emulator_imports_neither_triton_nor_torch():
    program = "import sys, hotloop.emulator; print({'torch', 'triton'} & set(sys.modules))"
    assert run_python(program) == "set()"


FRESH = """
import sys
sys.path.insert(0, {folder!r})
import torch, triton
from hotloop import emulator
from gallery import softmax
triton.knobs.compilation.listener = lambda **event: print(event["cache_hit"])
with emulator.triton():
    softmax.launch_triton(softmax.CASE.tensors((3, 7)))
"""


def test_a_fresh_process_finds_what_the_last_one_compiled(tmp_path):
    program = FRESH.format(folder=str(Path(__file__).parent))
    assert run_python(program, TRITON_CACHE_DIR=str(tmp_path)) == "False"
    assert run_python(program, TRITON_CACHE_DIR=str(tmp_path)) == "True"


def test_the_fixture_runs_every_schedule(emulated, request):
    x = torch.randn(100)
    y = torch.zeros(100)
    with emulated.triton("sm_80") as gpu:
        add_one[(7,)](x, y, 100, BLOCK=16)
    torch.testing.assert_close(y, x + 1)
    (launch,) = gpu.launches
    again = emulated.launch(
        launch.compiled.module, "add_one", launch.grid, launch.block, launch.shared, launch.arguments
    )
    assert again.reports == []
    assert emulated.machine["schedule"] in request.node.name


@triton.jit
def double_all(table, n, BLOCK: tl.constexpr):
    x = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_memory_behind_a_table_of_addresses():
    a, b = torch.ones(20), torch.arange(40.0)
    table = torch.tensor([a.data_ptr(), b[10:].data_ptr()])
    with emulator.triton(on_report="collect") as gpu:
        double_all[(2,)](table, 20, BLOCK=32)
        assert {r.kind for r in gpu.reports} == {"out-of-bounds"}
        gpu.memory |= {"a": a, "b": b}
        gpu.reports.clear()
        double_all[(2,)](table, 20, BLOCK=32)
    assert gpu.reports == []
    assert a.tolist() == [2.0] * 20
    assert b.tolist() == [*range(10), *range(20, 60, 2), *range(30, 40)]
