"""Scratch memory of the CPU backends: kept, grown, apart between threads and names, and never in a result."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hotloop.kernels.cross_entropy import linear_cross_entropy
from hotloop.kernels.cross_entropy.cases import small_blocks, targets
from hotloop.kernels.workspace import empty, release_workspaces, workspace

CPU = torch.device("cpu")


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_memory_is_kept_and_grown():
    release_workspaces()
    first = workspace("a", (10, 3), torch.float32, CPU)
    assert (first.shape, first.dtype) == ((10, 3), torch.float32)
    assert storage(workspace("a", (7,), torch.bfloat16, CPU)) == storage(first)
    assert storage(workspace("b", (7,), torch.bfloat16, CPU)) != storage(first)
    assert workspace("a", (1000, 1000), torch.float32, CPU).shape == (1000, 1000)
    assert workspace("a", (0, 5), torch.float32, CPU).shape == (0, 5)
    release_workspaces()


def test_threads_have_their_own():
    def address(_: int) -> int:
        return storage(workspace("a", (64,), torch.float32, CPU))

    here = address(0)
    with ThreadPoolExecutor(1) as pool:
        there, again = pool.map(address, range(2))
    assert here != there == again


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_large_results_ask_for_huge_pages():
    """`hg` among the flags of the mapping."""

    def advised(x: torch.Tensor) -> bool:
        address, inside = x.data_ptr() + x.numel() // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
                first, last = (int(number, 16) for number in line.split()[0].split("-"))
                inside = first <= address < last
            elif inside and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError("the tensor is in no mapping")

    assert advised(empty((40 << 20,), torch.uint8, CPU))


def test_other_devices_get_fresh_tensors():
    meta = torch.device("meta")
    assert workspace("a", (4,), torch.float32, meta) is not workspace("a", (4,), torch.float32, meta)


def test_no_result_lives_in_scratch():
    """Results of one call are what they were after another call has used the same scratch."""
    h, w = torch.randn(64, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    t = targets(64, 37, 0, 0.2)
    for dtype in (torch.float32, torch.bfloat16):
        for schedule in ("one_pass", "recompute"):
            with small_blocks():
                x, y = h.to(dtype).detach().requires_grad_(), w.to(dtype).detach().requires_grad_()
                loss = linear_cross_entropy(x, y, t, schedule=schedule)
                gradients = torch.autograd.grad(loss, (x, y))
                kept = [g.clone() for g in (loss, *gradients)]
                other = linear_cross_entropy((x * 3).detach().requires_grad_(), (y + 1).detach(), t, schedule=schedule)
                other.backward()
            assert all(torch.equal(a, b) for a, b in zip(kept, (loss, *gradients), strict=True))
