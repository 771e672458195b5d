"""Muon's Triton kernels in the emulator: bf16 on tensor cores, where the interpreter is wrong; work; budgets."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import Muon, muon_reference, muon_triton
from hotloop.kernels.optimizers.update import Update

triton = pytest.importorskip("triton", reason="triton is not installed")
emulator = pytest.importorskip("hotloop.emulator")

BUDGETS = Path(__file__).with_name("muon_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_120")
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "lockstep", "async_copies": "late"},
    {"schedule": "random", "seed": 1, "async_copies": "early"},
    {"schedule": "random", "seed": 2, "async_copies": "late"},
]
BF16_ROUNDING = 2.0**-8


@pytest.mark.parametrize("shape", [(1, 70, 90), (2, 33, 40), (1, 130, 64), (1, 1, 5)])
@pytest.mark.parametrize("target", TARGETS)
def test_symmetric_products(target: str, shape: tuple[int, int, int]) -> None:
    """X X^T, and alpha A A^T + beta A: within one rounding of fp64, symmetric, the same under all schedules."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found: list[tuple[Tensor, Tensor]] = []
    for schedule in SCHEDULES:
        gram, quadratic = (torch.full((shape[0], shape[1], shape[1]), torch.nan).bfloat16() for _ in range(2))
        with emulator.triton(target, **schedule):
            muon_triton.symmetric_product(gram, x)
            scaled = (gram / gram.float().norm()).bfloat16()
            muon_triton.symmetric_product(quadratic, scaled, alpha=2.0, beta=-4.75)
        found.append((gram, quadratic))
    gram, quadratic = found[0]
    for exact, got in (
        (x.double() @ x.double().mT, gram),
        (2 * scaled.double() @ scaled.double().mT - 4.75 * scaled.double(), quadratic),
    ):
        assert ((got.double() - exact).abs() <= BF16_ROUNDING * exact.abs() + 1e-5 * exact.abs().max()).all()
        assert torch.equal(got, got.mT)
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))


def test_half_of_a_symmetric_product_is_made() -> None:
    """Tensor-core operations of 4 x 4 tiles: 10 tiles of 16. One row of tiles is a full product."""
    counted = {}
    for rows in (128, 512):
        x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        out = torch.empty(1, rows, rows).bfloat16()
        with emulator.triton("sm_80") as gpu:
            muon_triton.symmetric_product(out, x)
        counted[rows] = gpu.counters["mma_m16n8k16"]
        if rows == 128:
            assert counted[rows] == 128 * 128 * 64 / (16 * 8 * 16)
    assert counted[512] == 10 * counted[128]


SHAPES = [(70, 66), (66, 70), (5, 33), (70, 66)]
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16 and master": (torch.bfloat16, {"master": "float32"}),
    "bf16 stochastic": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
}


def updates(storage: str) -> tuple[dict[str, Tensor], list[Update]]:
    """All tensors by name, and the updates of a second step."""
    dtype, options = STORAGE[storage]
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    optimizer = Muon(params, lr=0.1, ns_coefficients=(2.0, -1.5, 0.5), seed=7 * 2**40 + 5, **options)
    for step in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw).to(dtype)
        if not step:
            with use_backend("reference"):
                optimizer.step()
    found = [update for update, _ in optimizer._gather(params)[0]]
    for counter in {id(u.step): u.step for u in found}.values():
        counter.add_(1)
    tensors = {f"p{i}": p.detach() for i, p in enumerate(params)} | {f"g{i}": p.grad for i, p in enumerate(params)}
    for i, p in enumerate(params):
        tensors |= {f"{name}{i}": x for name, x in optimizer.state[p].items() if name != "step"}
    return tensors, found


@pytest.mark.parametrize(("storage", "target"), zip(STORAGE, TARGETS, strict=True))
def test_a_step_is_the_reference(storage: str, target: str) -> None:
    factor, skip = torch.tensor(0.5), torch.tensor(0.0)
    expected, found = updates(storage)
    with torch.no_grad():
        for update in found:
            muon_reference.muon(update, factor, skip)
    ours, found = updates(storage)
    with emulator.triton(target) as gpu, torch.no_grad():
        gpu.memory.update(ours)
        for update in found:
            muon_triton.muon(update, factor, skip)
    for name, x in ours.items():
        moved = (x.double() - expected[name].double()).norm() / expected[name].double().norm()
        # Stochastic rounding of a number that is off by its last fp32 bit goes the other way in one of 2^16.
        assert moved <= (3e-3 if x.dtype == torch.bfloat16 else 2e-3), (name, moved)


def measured() -> dict[str, dict[str, int]]:
    """Of X X^T, and with the sum b A, for few and for many rows."""
    found = {}
    for target, size, beta in itertools.product(TARGETS, (64, 256), (0.0, 1.0)):
        x, out = torch.zeros(1, size, size).bfloat16(), torch.zeros(1, size, size).bfloat16()
        with emulator.triton(target) as gpu:
            muon_triton.symmetric_product(out, x, beta=beta)
        r = emulator.static(gpu.launches[0].compiled)
        found[f"symmetric product, {size} rows, b = {beta:g}, {target}"] = r.budget("HMMA", "HGMMA", "LDGSTS.128")
    return found


@pytest.mark.slow  # compiles for every target
def test_budgets() -> None:
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of Triton 3.9, not of {triton.__version__}")
    rows = measured()
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        assert row.get("HMMA", 0) + row.get("HGMMA", 0) > 0, name
        assert row["LDGSTS.128"] > 0, name


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(measured(), indent=1) + "\n")
