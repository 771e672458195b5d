"""AdamW with gradient clipping on the tensors of a GPT of 6 layers x 384, against torch.optim.AdamW.

python benchmarks/bench_optimizers.py --out benchmarks/results/optimizers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import AdamW
from hotloop.kernels.optimizers.adamw import ADAMW

from harness.case import Case, Provider, Results, agrees_with
from harness.command import bench, ids, main
from harness.measure import device
from peers.plain_gpt import PlainGPT, PlainMasters

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
EAGER = "torch foreach"
STEPS_OF_GATE = 3


def tensors(vocab: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients; the norm is above 1, so that clipping has work."""
    with torch.device("meta"):
        shapes = [p.shape for p in PlainGPT(vocab, context=256, n_layers=6, d_model=384, n_heads=6).parameters()]
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draw).mul_(0.02).to(device(), dtype) for shape in shapes]
    grads = [torch.randn(shape, generator=draw).mul_(0.01).to(device(), dtype) for shape in shapes]
    return params, grads


def provider(
    make: Callable[[list[Tensor]], tuple[Callable[[], object], Callable[[], list[Tensor]]]],
    params: list[Tensor],
    grads: list[Tensor],
) -> Provider:
    """`make` takes parameters and returns a step, and the tensors that hold what the step knows of the weights."""
    own = [p.clone().requires_grad_() for p in params]
    step, weights = make(own)
    room = [g.clone() for g in grads]

    def prepare() -> None:
        """Fresh gradients, as after a backward pass: clipping may write into them."""
        torch._foreach_copy_(room, grads)
        for p, g in zip(own, room, strict=True):
            p.grad = g

    def results() -> Results:
        for _ in range(STEPS_OF_GATE):
            prepare()
            step()
        # The change, not the weight: an update is a thousandth of it.
        return tuple(w.detach().double() - p.double() for w, p in zip(weights(), params, strict=True))

    return Provider(step, results, prepare)


def torch_adamw(params: list[Tensor], **how: bool) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    optimizer = torch.optim.AdamW(params, **OPTIONS, **how)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step, lambda: params


def torch_compiled(params: list[Tensor]) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    step, weights = torch_adamw([*params], foreach=True)
    return torch.compile(step), weights


def torch_masters(params: list[Tensor]) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    masters = PlainMasters(params)
    optimizer = torch.optim.AdamW(masters.masters, **OPTIONS, fused=True)

    def step() -> None:
        masters.take_gradients()
        nn.utils.clip_grad_norm_(masters.masters, 1.0)
        optimizer.step()
        masters.give_weights()

    return step, lambda: masters.masters


def ours(backend: str, params: list[Tensor]) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    master = None if params[0].dtype == torch.float32 else "float32"
    optimizer = AdamW(params, **OPTIONS, max_grad_norm=1.0, master=master)

    def step() -> None:
        with use_backend(backend):
            optimizer.step()

    return step, lambda: params if master is None else [optimizer.state[p]["master"] for p in params]


def providers(vocab: int, dtype: torch.dtype, everything: bool) -> dict[str, Callable[[], Provider]]:
    params, grads = tensors(vocab, dtype)
    ways: dict[str, Callable[[list[Tensor]], Any]] = {
        f"hotloop {backend.name}": partial(ours, backend.name)
        for backend in ADAMW.backends
        if everything or backend.name != "reference"
    }
    if dtype == torch.float32:
        ways |= {EAGER: partial(torch_adamw, foreach=True), "torch fused": partial(torch_adamw, fused=True)}
        if everything:
            ways["torch compile"] = torch_compiled
    else:
        ways["torch fused, fp32 masters"] = torch_masters
    return {name: partial(provider, make, params, grads) for name, make in ways.items()}


def case_of(vocab: int, dtype: torch.dtype, everything: bool) -> Case:
    with torch.device("meta"):
        model = PlainGPT(vocab, context=256, n_layers=6, d_model=384, n_heads=6)
    count = sum(p.numel() for p in model.parameters())
    # Read twice for the norm and the update: gradients. Read and written: weights (masters), two moments.
    width = dtype.itemsize
    moved = 2 * width + 3 * 2 * 4 + (width if width < 4 else 0)
    peer = EAGER if dtype == torch.float32 else "torch fused, fp32 masters"
    return Case(
        kernel_name="adamw_clipped", mode="full", x=("P", "parameters", count),
        config={"V": vocab, "tensors": len(list(model.parameters())), "max_grad_norm": 1.0,
                "dtype": str(dtype).removeprefix("torch."), "state": "fp32" if width == 4 else "fp32, fp32 masters"},
        providers=lambda: providers(vocab, dtype, everything),
        gate=agrees_with(peer, 1e-4),
        work=count * moved, unit="B", dtype=dtype,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in (4096, 50304):
            yield case_of(vocab, dtype, everything)


SMALL = list(cases(False))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_optimizers(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
