"""The plan of a linear cross entropy agrees with what PyTorch's allocator is asked for, and keeps the bounds."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hotloop.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_plan
from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.workspace import release_workspaces

MIB = 1 << 20


def meta(
    n: int, v: int, d: int, dtype: torch.dtype, *, grad: bool = True, device: str = "meta"
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ((n, d), (v, d))
    return tuple(torch.empty(s, dtype=dtype, device=device, requires_grad=grad) for s in shapes)  # type: ignore


def measured_peak(n: int, v: int, d: int, dtype: torch.dtype, schedule: str) -> int:
    """Bytes beside the inputs at the peak of forward and backward, workspaces included."""
    draw = torch.Generator().manual_seed(0)
    h, w = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in ((n, d), (v, d)))
    t = torch.randint(v, (n,), generator=draw)
    release_workspaces()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, use_backend("cpu"):
        linear_cross_entropy(h, w, t, schedule=schedule).backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["one_pass", "recompute"])
def test_the_plan_is_what_is_allocated(monkeypatch, schedule, dtype):
    """At a sixteenth of the sizes, so that small matrices go in several chunks."""
    from hotloop.kernels.cross_entropy import config

    for name in ("CHUNK_BYTES", "WIDE_CHUNK_BYTES", "RECOMPUTE_BYTES", "PRODUCT_BYTES"):
        monkeypatch.setattr(config, name, getattr(config, name) // 16)
    n, v, d = 1500, 9000, 192
    plan = linear_cross_entropy_plan(*meta(n, v, d, dtype, device="cpu"), schedule=schedule)
    assert plan.chunk_rows < n
    assert plan.tile_columns < v
    expected = plan.gradients + getattr(plan, schedule)
    assert measured_peak(n, v, d, dtype, schedule) == pytest.approx(expected, rel=0.05)


def test_recompute_is_bounded():
    """8,192 tokens, 256,000 classes of width 2,304 in bf16."""
    n, v, d = 8192, 256_000, 2304
    plan = linear_cross_entropy_plan(*meta(n, v, d, torch.bfloat16))
    assert plan.schedule == "one_pass"
    assert plan.gradients == (n + v) * d * 2  # 1,217 MB
    assert plan.recompute <= 128 * MIB
    assert plan.one_pass <= 128 * MIB + 4 * v * d + plan.chunk_rows * v * 2
    assert linear_cross_entropy_plan(*meta(n, v, d, torch.bfloat16), reduction="none").schedule == "recompute"


def test_frozen_tensors_and_ignored_rows_cost_less():
    full = linear_cross_entropy_plan(*meta(8192, 50_000, 512, torch.bfloat16))
    frozen = linear_cross_entropy_plan(*meta(8192, 50_000, 512, torch.bfloat16, grad=False))
    assert frozen.gradients == 0
    assert frozen.one_pass < full.one_pass
    few = linear_cross_entropy_plan(*meta(8192, 50_000, 512, torch.bfloat16), max_valid=1000)
    assert few.projected == 1024
    assert few.recompute < full.recompute


def test_what_it_prints():
    text = str(linear_cross_entropy_plan(*meta(2048, 50_304, 512, torch.bfloat16), schedule="recompute"))
    first, second, *rows = text.splitlines()
    assert first == "2,048 tokens, 2,048 projected, 50,304 classes, width 512, bfloat16"
    assert second == "inputs 51 MiB, gradients 51 MiB; beside them:"
    assert [row.split()[0] for row in rows] == ["one_pass", "*"]
    with pytest.raises(ValueError, match="schedule 'best': expected one of"):
        linear_cross_entropy_plan(*meta(2, 3, 4, torch.float32), schedule="best")
    with pytest.raises(ValueError, match=r"linear_weight has shape \(3, 5\) and input \(2, 4\)"):
        linear_cross_entropy_plan(torch.empty(2, 4), torch.empty(3, 5))
