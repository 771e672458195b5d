"""A step of Muon on the hidden matrices of a GPT, 768 wide, against torch.optim.Muon.

python benchmarks/bench_muon.py --all --out benchmarks/results/muon

The FLOPs are those of full products, 2 m^2 (2 n + m) for each Newton-Schulz step of an (m, n) matrix, m <= n, which
torch.optim.Muon makes. `made` is what hotloop makes of them: a symmetric product from its diagonal blocks to the right.
The share of the limit is of full products for everyone, so ours says how fast one would have to be that makes them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import Muon, muon_cpu

from harness.case import Case, Provider, Results, no_worse_than
from harness.command import bench, ids, main
from harness.measure import device

WIDTH = 768
LAYER = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
NS_STEPS = 5
PEER = "torch.optim.Muon"


def matrices(layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draw).mul_(0.02).to(device()) for shape in LAYER * layers]
    return params, [torch.randn(p.shape, generator=draw).mul_(0.01).to(device()) for p in params]


def changed(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], layers: int) -> Provider:
    params, grads = matrices(layers)
    own = [nn.Parameter(p.clone()) for p in params]
    for p, g in zip(own, grads, strict=True):
        p.grad = g
    optimizer = make(own)

    def results() -> Results:
        optimizer.step()
        # The change, not the weight: an update is a hundredth of it.
        return tuple(w.detach() - p for w, p in zip(own, params, strict=True))

    return Provider(optimizer.step, results)


def exact(layers: int) -> Results:
    with use_backend("reference"):
        return changed(Muon, layers).results()


def flops(share_of_symmetric: float) -> float:
    """Of a layer, with symmetric products making this share of the full ones."""
    total = 0.0
    for shape in LAYER:
        m, n = sorted(shape)
        total += NS_STEPS * 2 * m * m * (share_of_symmetric * (n + m) + n)
    return total


def case_of(layers: int) -> Case:
    blocks = WIDTH // muon_cpu.BLOCK
    made = layers * flops((blocks + 1) / (2 * blocks))
    parameters = layers * sum(r * c for r, c in LAYER)
    return Case(
        kernel_name="muon", mode="full", x=("L", "layers", layers),
        config={"width": WIDTH, "matrices": layers * len(LAYER), "parameters": f"{parameters / 1e6:.0f} M",
                "GFLOP": round(layers * flops(1.0) / 1e9), "made": round(made / 1e9), "dtype": "fp32, products bf16"},
        providers=lambda: {
            "hotloop": partial(changed, Muon, layers),
            PEER: partial(changed, torch.optim.Muon, layers),
        },
        gate=no_worse_than(PEER, cache(partial(exact, layers)), torch.bfloat16, factor=1.1),
        work=layers * flops(1.0), unit="FLOP", dtype=torch.bfloat16,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    for layers in (1, 12) if everything else (1,):
        yield case_of(layers)


SMALL = list(cases(False))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_muon(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
