"""Cross entropy of logits, and of a projection's input, against PyTorch's ways to compute it.

python benchmarks/bench_cross_entropy.py --out benchmarks/results/cross_entropy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from hotloop.kernels.cross_entropy.linear import ONE_PASS
from hotloop.kernels.cross_entropy.op import CROSS_ENTROPY

from harness.case import Case, Provider, Results, by_backend, no_worse_than, simple
from harness.command import bench, ids, main
from harness.measure import device

N = 2048
REFERENCE_UP_TO = 4096  # classes: beyond, a round of the reference takes longer than those of all others together
EAGER = "torch eager"


def targets(vocab: int, supervised: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, (N,), generator=draw)
    ignored = torch.rand(N, generator=draw) >= supervised
    return target.masked_fill(ignored, -100).to(device())


def values(*shape: int, dtype: torch.dtype, scale: float, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device(), dtype)


def step(loss: Callable[..., Tensor], mode: str, *inputs: Tensor) -> Results:
    """forward: the loss, under no_grad as in evaluation. full: the loss and fresh gradients of the inputs."""
    if mode == "forward":
        with torch.no_grad():
            return (loss(*inputs),)
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, inputs))


# --- of logits ---


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def logits_truth(logits: Tensor, target: Tensor, mode: str) -> Results:
    """In fp64, in pieces; the gradient in fp32 to keep it small."""
    count = (target >= 0).sum()
    loss, gradients = torch.zeros((), dtype=torch.float64, device=logits.device), []
    for x, t in zip(logits.detach().split(256), target.split(256), strict=True):
        x = x.double().requires_grad_()
        part = F.cross_entropy(x, t, reduction="sum") / count
        loss += part.detach()
        if mode == "full":
            gradients.append(torch.autograd.grad(part, x)[0].float())
    return (loss, torch.cat(gradients)) if mode == "full" else (loss,)


def logits_providers(vocab: int, dtype: torch.dtype, mode: str, everything: bool) -> dict[str, Callable[[], Provider]]:
    logits = values(N, vocab, dtype=dtype, scale=2.0, seed=1).requires_grad_()
    target = targets(vocab, 1.0)
    compiled = torch.compile(plain)
    own = partial(step, lambda x: cross_entropy(x, target), mode, logits)
    found = by_backend(CROSS_ENTROPY, (logits, target), own, reference=everything and vocab <= REFERENCE_UP_TO)
    if mode == "full":
        found["hotloop, overwrites logits"] = partial(in_place, logits, target)
    found[EAGER] = simple(partial(step, lambda x: plain(x, target), mode, logits))
    found["torch compile"] = simple(partial(step, lambda x: compiled(x, target), mode, logits))
    return found


def in_place(logits: Tensor, target: Tensor) -> Provider:
    """The gradient overwrites the logits, as where a training step has no other use for them."""
    kept = logits.detach()
    room = torch.empty_like(kept)

    def run() -> Results:
        x = room.requires_grad_().view_as(room)
        loss = cross_entropy(x, target, inplace_backward=True)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def prepare() -> None:
        room.detach_().requires_grad_(False).copy_(kept)

    def results() -> Results:
        prepare()
        loss, gradient = run()
        return loss, gradient.clone()

    return Provider(run, results, prepare)


def logits_case(vocab: int, dtype: torch.dtype, mode: str, everything: bool) -> Case:
    def truth() -> Results:
        logits = values(N, vocab, dtype=dtype, scale=2.0, seed=1)
        return logits_truth(logits, targets(vocab, 1.0), mode)

    return Case(
        kernel_name="cross_entropy", mode=mode, x=("V", "vocabulary", vocab),
        config={"N": N, "dtype": str(dtype).removeprefix("torch.")},
        providers=lambda: logits_providers(vocab, dtype, mode, everything),
        gate=no_worse_than(EAGER, truth, dtype),
        work=N * vocab * dtype.itemsize * (2 if mode == "full" else 1), unit="B", dtype=dtype,
    )  # fmt: skip


# --- of a projection's input ---


def plain_linear(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), target)


def rows_first(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """What a careful user writes where most rows are ignored."""
    kept = target != -100
    return plain_linear(h[kept], w, target[kept])


@dataclass(frozen=True)
class Head:
    vocab: int
    D: int = 384
    supervised: float = 1.0  # share of the rows
    frozen: bool = False

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        h = values(N, self.D, dtype=dtype, scale=1.0, seed=1).requires_grad_()
        w = values(self.vocab, self.D, dtype=dtype, scale=0.05, seed=2).requires_grad_(not self.frozen)
        return h, w, targets(self.vocab, self.supervised)


LARGE = (
    Head(50304, 512), Head(50304, 768), Head(50304, 512, supervised=0.15), Head(50304, 512, frozen=True),
)  # fmt: skip


def linear_step(loss: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str, inputs: tuple[Tensor, ...]) -> Results:
    h, w, target = inputs
    if w.requires_grad:
        return step(lambda h, w: loss(h, w, target), mode, h, w)
    return step(lambda h: loss(h, w, target), mode, h)


def linear_providers(head: Head, dtype: torch.dtype, mode: str, everything: bool) -> dict[str, Callable[[], Provider]]:
    inputs = head.inputs(dtype)

    def way(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Results]:
        return partial(linear_step, loss, mode, inputs)

    reference = everything and head.vocab <= REFERENCE_UP_TO
    found = by_backend(ONE_PASS, inputs, way(linear_cross_entropy), reference=reference)
    found[EAGER] = simple(way(plain_linear))
    found["torch compile"] = simple(way(torch.compile(plain_linear)))
    # Of the large heads not PyTorch's chunks, which take five times as long as all others together.
    chunked = hasattr(nn, "LinearCrossEntropyOptions") and hasattr(F, "linear_cross_entropy")  # PyTorch 2.13
    if chunked and head not in LARGE:
        chunks = nn.LinearCrossEntropyOptions()
        found["torch chunked"] = simple(way(lambda h, w, t: F.linear_cross_entropy(h, w, t, options=chunks)))
    if head.supervised < 1:
        found["torch rows first"] = simple(way(rows_first))
    if head.frozen:
        h, w, target = inputs
        trainable = (h, w.detach().requires_grad_(), target)
        found["its own trainable head"] = lambda: Provider(
            run=partial(linear_step, linear_cross_entropy, mode, trainable), results=way(linear_cross_entropy)
        )
    return found


def linear_truth(head: Head, dtype: torch.dtype, mode: str) -> Results:
    h, w, target = head.inputs(dtype)
    count, wide = (target >= 0).sum(), w.detach().double().requires_grad_(not head.frozen)
    loss, dh, dw = torch.zeros((), dtype=torch.float64, device=h.device), [], torch.zeros_like(wide)
    for x, t in zip(h.detach().split(256), target.split(256), strict=True):
        x = x.double().requires_grad_()
        part = F.cross_entropy(F.linear(x, wide), t, reduction="sum") / count
        loss += part.detach()
        if mode == "full":
            part_dh, *part_dw = torch.autograd.grad(part, (x,) if head.frozen else (x, wide))
            dh.append(part_dh)
            for g in part_dw:
                dw += g
    if mode == "forward":
        return (loss,)
    return (loss, torch.cat(dh)) if head.frozen else (loss, torch.cat(dh), dw)


def linear_case(head: Head, dtype: torch.dtype, mode: str, everything: bool) -> Case:
    rows = int((targets(head.vocab, head.supervised) >= 0).sum())
    products = 1 if mode == "forward" else 2 if head.frozen else 3
    config = {"N": N, "D": head.D, "supervised": head.supervised, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        kernel_name="linear_cross_entropy", mode=mode, x=("V", "vocabulary", head.vocab),
        config={**config, "head": "frozen"} if head.frozen else config,
        providers=lambda: linear_providers(head, dtype, mode, everything),
        gate=no_worse_than(EAGER, lambda: linear_truth(head, dtype, mode), dtype),
        work=2 * rows * head.D * head.vocab * products, unit="FLOP", dtype=dtype, memory=not head.frozen,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in (4096, 50304) if everything else (4096,):
            for mode in ("forward", "full"):
                yield logits_case(vocab, dtype, mode, everything)
        if everything:
            yield linear_case(Head(4096), dtype, "forward", everything)
        for head in (Head(4096), Head(4096, supervised=0.15), Head(50304), *(LARGE if everything else ())):
            if head.D < 768 or dtype != torch.float32:  # half a minute a round
                yield linear_case(head, dtype, "full", everything)


SMALL = list(cases(False))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_cross_entropy(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
