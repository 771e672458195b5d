"""A pytest fixture: a test that takes `emulated` runs once under every schedule.

In a conftest.py or a test file: `from hotloop.emulator.fixture import emulated`. Then

    def test_softmax(emulated):
        with emulated.triton("sm_90") as gpu:
            softmax[(rows,)](x, y, columns, BLOCK=1024)
        torch.testing.assert_close(y, torch.softmax(x, -1))

    def test_attention(emulated):
        emulated.launch(module, "forward", grid, (128,), shared_bytes, [q, k, v, o, T, scale])

A report fails the test: both raise ReportsError unless told to collect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from hotloop.emulator.launch import Launch
from hotloop.emulator.module import Module
from hotloop.emulator.triton_driver import Session, triton

SCHEDULES: dict[str, Mapping[str, Any]] = {
    "lockstep, late copies": {"schedule": "lockstep", "async_copies": "late"},
    "random 1, early copies": {"schedule": "random", "seed": 1, "async_copies": "early"},
    "random 2, late copies": {"schedule": "random", "seed": 2, "async_copies": "late"},
}


@dataclass(frozen=True)
class Emulated:
    machine: Mapping[str, Any]  # schedule, seed, async_copies

    def triton(self, target: str = "sm_80", **options: Any) -> AbstractContextManager[Session]:
        return triton(target, **{**self.machine, **options})

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: Any,
        block: Any,
        shared: int,
        args: Sequence[Any] | Mapping[str, Any],
        **options: Any,
    ) -> Launch:
        return module.launch(kernel, grid, block, shared, args, **{**self.machine, **options})


@pytest.fixture(params=list(SCHEDULES.values()), ids=list(SCHEDULES))
def emulated(request: pytest.FixtureRequest) -> Emulated:
    return Emulated(request.param)
