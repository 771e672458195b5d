"""Backend `triton` of attention in the emulator: bf16 and the fp32 of tensor cores, races, counted work, budgets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hotloop.kernels import gpu as hardware
from hotloop.kernels.attention import config
from hotloop.kernels.attention import triton as backend
from hotloop.kernels.attention.cases import Case, check, draw, run
from hotloop.kernels.attention.config import Tile

triton = pytest.importorskip("triton", reason="triton is not installed")
emulator = pytest.importorskip("hotloop.emulator")

BUDGETS = Path(__file__).with_name("attention_budgets.json")
EMULATED = ("sm_80", "sm_90", "sm_120")
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "lockstep", "async_copies": "late"},
    {"schedule": "random", "seed": 1, "async_copies": "early"},
    {"schedule": "random", "seed": 2, "async_copies": "late"},
]


@contextmanager
def emulated(target: str, tile: Tile | None = None, **schedule: Any) -> Iterator[Any]:
    """tile: for all kernels, instead of the target's own."""
    with pytest.MonkeyPatch.context() as patch, emulator.triton(target, **schedule) as gpu:
        patch.setattr(hardware, "arch_of", lambda device: int(target.removeprefix("sm_")))
        if tile is not None:
            patch.setattr(config, "tile", lambda *_: tile)
        yield gpu


def check_everywhere(case: Case, dtype: torch.dtype, target: str, tile: Tile | None = None) -> None:
    """The oracle, and the same bits under all schedules."""
    found: list[list[torch.Tensor]] = []
    for schedule in SCHEDULES:
        with emulated(target, tile, **schedule):
            found.append(check(backend, case, dtype) if not found else run(backend, case, draw(case, dtype)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


PLAIN = Case(70, 70, Hq=4, Hk=2, D=64, right=0)
PACKED = Case(90, 90, Hq=2, Hk=2, D=64, right=0, cu_q=(0, 3, 3, 50, 83, 83))
RICH = Case(70, 95, Hq=3, D=24, B=2, left=30, right=2, scale=-0.3, softcap=1.5, alibi=2, sinks=True, dropout_p=0.3)
RICH_PACKED = Case(
    100, 80, Hq=4, Hk=2, D=40, left=20, right=0, softcap=2.0, alibi=2, sinks=True, dropout_p=0.1,
    cu_q=(0, 3, 3, 50, 90, 90), cu_k=(0, 9, 12, 12, 70, 70),
)  # fmt: skip


@pytest.mark.parametrize(("case", "target"), [(PLAIN, "sm_80"), (PACKED, "sm_90")], ids=["sm_80", "packed, sm_90"])
def test_bf16(case: Case, target: str) -> None:
    """In tiles that compile fast; the others are slow."""
    check_everywhere(replace(case, D=32), torch.bfloat16, target, Tile(64, 32, 4, 2, BLOCK_D=32, DEPTH=32))


@pytest.mark.slow
@pytest.mark.parametrize("case", [PLAIN, PACKED, RICH, RICH_PACKED], ids=["plain", "packed", "rich", "rich, packed"])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *((target, torch.bfloat16) for target in EMULATED),
        ("sm_80", torch.float16),
        ("sm_80", torch.float32),
        ("sm_90", torch.float32),
    ],
)
def test_every_option(target: str, dtype: torch.dtype, case: Case) -> None:
    check_everywhere(case, dtype, target)


@pytest.mark.slow
@pytest.mark.parametrize("D", [8, 32, 96, 192, 256, 512])
@pytest.mark.parametrize(
    ("target", "dtype"), [("sm_80", torch.float16), ("sm_90", torch.bfloat16), ("sm_120", torch.float32)]
)
def test_every_head_dim(target: str, dtype: torch.dtype, D: int) -> None:
    check_everywhere(Case(40, 33, Hq=2, D=D, right=0), dtype, target)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["offset", "padded", "transposed", "strided"])
def test_layouts(layout: str) -> None:
    """Rows that begin anywhere are read element by element, or copied first."""
    check_everywhere(Case(40, 50, Hq=4, Hk=2, D=24, right=0, layout=layout), torch.bfloat16, "sm_80")


# --- counted work ---

SMALL = Tile(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, BLOCK_D=16, DEPTH=16)


def counted(case: Case, kernel: str) -> Any:
    """The counters of one kernel, sm_80, tiles of 64 by 64."""
    with emulated("sm_80", SMALL) as gpu:
        found = {}

        def note(on: Any, function: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
            before = gpu.counters
            function[grid](**arguments)
            found[function.__name__] = {name: gpu.counters[name] - before[name] for name in gpu.counters}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "run", note)
            run(backend, case, draw(case, torch.bfloat16))
    return found[kernel]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward_kernel", "dkdv_kernel", "dq_kernel"])
def test_tiles_that_nothing_sees_are_skipped(kernel: str) -> None:
    """Of 4 x 4 tiles: 10 of a causal mask, 7 of a window of one tile's length, 4 of four documents."""
    causal, window = {"right": 0}, {"left": 63, "right": 0}
    documents = {"cu_q": (0, 64, 128, 192, 256)}
    whole, *masked = (
        counted(Case(256, 256, Hq=1, D=16, **options), kernel)["mma_m16n8k16"]
        for options in ({}, causal, window, documents)
    )
    assert [m / whole for m in masked] == [10 / 16, 7 / 16, 4 / 16]


@pytest.mark.slow
def test_keys_and_values_are_read_once_for_a_group() -> None:
    """16 positions of 4 heads are one tile of 64 rows: its reads are q, and each key and value once."""
    case = Case(16, 256, Hq=4, D=16, has_dlse=False)
    work = counted(case, "forward_kernel")
    assert work["global_load_bytes"] == 2 * (16 * 4 * 16 + 2 * 256 * 16)
    assert work["global_store_bytes"] == 2 * 16 * 4 * 16 + 4 * 16 * 4


# --- machine code ---

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
TENSOR_CORES = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
CALLS: dict[str, Case] = {
    "causal": Case(1024, 1024, Hq=4, Hk=2, right=0),
    "rich": Case(1024, 1024, Hq=4, Hk=2, left=100, right=0, softcap=5.0, alibi=1, dropout_p=0.1),
}
COMPILED = [
    *itertools.product(("sm_80", "sm_90", "sm_100", "sm_120"), ("causal",), (torch.bfloat16,), (64, 128, 256, 512)),
    *itertools.product(("sm_80", "sm_90", "sm_100", "sm_120"), ("causal",), (torch.float32,), (64, 512)),
    *itertools.product(("sm_80", "sm_90", "sm_100", "sm_120"), ("rich",), (torch.bfloat16,), (128,)),
    *itertools.product(("sm_86",), ("causal",), (torch.bfloat16,), (64, 128, 256, 512)),
]


def compiled(target: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels of a call that have tiles, forward and backward, by name; none is launched."""
    found = {}

    def compile_only(on: Any, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        if "BLOCK_M" in arguments:
            found[kernel.__name__.removesuffix("_kernel")] = kernel.warmup(**arguments, grid=grid)

    with emulated(target), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "run", compile_only)
        run(backend, case, draw(case, dtype))
    return found


def measured() -> dict[str, dict[str, int]]:
    rows = {}
    for target, call, dtype, D in COMPILED:
        for kernel, binary in compiled(target, replace(CALLS[call], D=D), dtype).items():
            budget = emulator.static(binary).budget("HMMA", "HGMMA", "UTCHMMA", "LDGSTS.128")
            rows[f"{kernel} {call} {str(dtype).removeprefix('torch.')} D {D}, {target}"] = budget
    return rows


@pytest.mark.slow  # compiles for every target
def test_budgets() -> None:
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of Triton 3.9, not of {triton.__version__}")
    rows = measured()
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        target = name.rsplit(", ", 1)[1]
        assert row["spills"] == row["stack"] == 0, name
        assert row["shared"] <= SHARED_KIB[target] << 10, name
        assert row.get("HMMA", 0) + row.get(TENSOR_CORES[target], 0) > 0, name
        if "bfloat16" in name and "D 64" in name:
            assert row[TENSOR_CORES[target]] > 0, name
            assert row["LDGSTS.128"] > 0, name


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(measured(), indent=1) + "\n")
