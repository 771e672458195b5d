"""Steps of AdamW, Lion and SGD on the tensors of a GPT of 6 layers x 384, against torch.optim and what else runs.

python benchmarks/bench_optimizers.py --all --out benchmarks/results/optimizers

Bytes: each tensor read once and, where it changes, written once; gradients once more where the norm is taken. Rows
with narrow moments are compared with fused AdamW, whose moments are fp32. `state` is what a parameter's state takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.dispatch import Table, use_backend
from hotloop.kernels.optimizers import SGD, AdamW, Lion
from hotloop.kernels.optimizers.adamw import ADAMW
from hotloop.kernels.optimizers.lion import LION
from hotloop.kernels.optimizers.sgd import SGD_TABLE

from harness.case import Case, Provider, Results, agrees_with
from harness.command import bench, ids, main
from harness.measure import device
from peers.plain_gpt import PlainGPT, PlainMasters

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD_OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
LION_OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
FUSED = "torch fused"
STEPS_OF_GATE = 3
NORM = 1.0

Step = Callable[[], object]
Way = Callable[[list[Tensor]], tuple[Step, Callable[[], list[Tensor]]]]
"""Parameters -> a step, and the tensors that hold what the step knows of the weights"""


@dataclass(frozen=True)
class Kind:
    """One comparison: our optimizer's class, table and options, and what it moves."""

    name: str
    make: Any
    table: Table
    options: dict[str, Any]
    dtype: torch.dtype
    bytes_each: int  # a parameter, without the gradient's reading for the norm
    state: str
    clip: bool
    tolerance: float  # relative L2 distance of the change of the weights from the peer's
    peer: str = FUSED


def shapes(vocab: int) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in PlainGPT(vocab, context=256, n_layers=6, d_model=384, n_heads=6).parameters()]


def tensors(vocab: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients; the norm is above 1, so that clipping has work."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=draw).mul_(0.02).to(device(), dtype) for shape in shapes(vocab)]
    grads = [torch.randn(shape, generator=draw).mul_(0.01).to(device(), dtype) for shape in shapes(vocab)]
    return params, grads


def provider(way: Way, params: list[Tensor], grads: list[Tensor]) -> Provider:
    own = [p.clone().requires_grad_() for p in params]
    step, weights = way(own)
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


# --- ways ---


def ours(kind: Kind, backend: str, params: list[Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
    optimizer = kind.make(params, **kind.options, max_grad_norm=NORM if kind.clip else None, check_finite=kind.clip)

    def step() -> None:
        with use_backend(backend):
            optimizer.step()

    masters = kind.options.get("master") is not None
    return step, lambda: [optimizer.state[p]["master"] for p in params] if masters else params


def theirs(
    kind: Kind, make: Callable[..., torch.optim.Optimizer], options: dict[str, Any], params: list[Tensor]
) -> tuple[Step, Callable[[], list[Tensor]]]:
    optimizer = make(params, **options)

    def step() -> None:
        if kind.clip:
            nn.utils.clip_grad_norm_(params, NORM)
        optimizer.step()

    return step, lambda: params


def compiled(
    kind: Kind, make: Callable[..., torch.optim.Optimizer], options: dict[str, Any], params: list[Tensor]
) -> Any:
    step, weights = theirs(kind, make, {**options, "foreach": True}, params)
    return torch.compile(step), weights


def with_masters(kind: Kind, params: list[Tensor]) -> tuple[Step, Callable[[], list[Tensor]]]:
    masters = PlainMasters(params)
    optimizer = torch.optim.AdamW(masters.masters, **OPTIONS, fused=True)

    def step() -> None:
        masters.take_gradients()
        if kind.clip:
            nn.utils.clip_grad_norm_(masters.masters, NORM)
        optimizer.step()
        masters.give_weights()

    return step, lambda: masters.masters


def eight_bit(kind: Kind) -> Iterator[tuple[str, Way]]:
    """Other implementations of 8-bit AdamW, where they are installed and run on this device."""
    if find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit

        yield "torchao AdamW8bit", partial(theirs, kind, AdamW8bit, OPTIONS)
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes  # its optimizers run on CPUs from 0.50 on

        yield "bitsandbytes AdamW8bit", partial(theirs, kind, bitsandbytes.optim.AdamW8bit, OPTIONS)


def peers(kind: Kind, everything: bool) -> dict[str, Way]:
    if kind.make is Lion:  # torch.optim has none
        return {}
    if kind.options.get("master") is not None:
        return {kind.peer: partial(with_masters, kind)}
    make, options = (torch.optim.SGD, SGD_OPTIONS) if kind.make is SGD else (torch.optim.AdamW, OPTIONS)
    found: dict[str, Way] = {FUSED: partial(theirs, kind, make, {**options, "fused": True})}
    if kind.state == "8 B":
        found["torch foreach"] = partial(theirs, kind, make, {**options, "foreach": True})
        if everything:
            found["torch for-loop"] = partial(theirs, kind, make, {**options, "foreach": False})
            found["torch compile"] = partial(compiled, kind, make, options)
    if kind.options.get("state_dtype") == "int8":
        found |= dict(eight_bit(kind))
    return found


def serving(kind: Kind, params: list[Tensor]) -> Iterator[str]:
    """Names of the backends that serve the updates of these parameters."""
    own = [p.clone().requires_grad_() for p in params]
    for p in own:
        p.grad = torch.zeros_like(p)
    with use_backend("reference"):
        (update, _), *_ = kind.make(own, **kind.options)._gather(own)[0]
    yield from (name for name, why_not in kind.table.reasons(update).items() if why_not is None)


def providers(kind: Kind, vocab: int, everything: bool) -> dict[str, Callable[[], Provider]]:
    params, grads = tensors(vocab, kind.dtype)
    # The reference is not fast; where there is no other peer it is what the gate compares with.
    wanted = everything or kind.peer == "hotloop reference"
    names = [name for name in serving(kind, params[:1]) if wanted or name != "reference"]
    ways: dict[str, Way] = {f"hotloop {name}": partial(ours, kind, name) for name in names}
    ways |= peers(kind, everything)
    return {name: partial(provider, way, params, grads) for name, way in ways.items()}


# --- cases ---


def kinds() -> Iterator[Kind]:
    fp32, bf16 = torch.float32, torch.bfloat16
    for clip in (True, False):
        yield Kind("adamw", AdamW, ADAMW, OPTIONS, fp32, 28, "8 B", clip, 1e-4)
    masters = {**OPTIONS, "master": "float32"}
    yield Kind("adamw", AdamW, ADAMW, masters, bf16, 30, "12 B", True, 1e-4, "torch fused, fp32 masters")
    for state_dtype, moved, state, tolerance in (("bfloat16", 20, "4 B", 0.05), ("int8", 16, "2 B", 0.2)):
        for rounding in ("nearest", "stochastic"):
            options = {**OPTIONS, "state_dtype": state_dtype, "rounding": rounding}
            yield Kind("adamw", AdamW, ADAMW, options, fp32, moved, state, False, tolerance)
    yield Kind("sgd", SGD, SGD_TABLE, SGD_OPTIONS, fp32, 20, "4 B", False, 1e-4)
    yield Kind("lion", Lion, LION, LION_OPTIONS, fp32, 20, "4 B", False, 1e-4, "hotloop reference")


def case_of(kind: Kind, vocab: int, everything: bool) -> Case:
    count = sum(shape.numel() for shape in shapes(vocab))
    config = {
        "V": vocab, "tensors": len(shapes(vocab)), "clip": kind.clip, "dtype": str(kind.dtype).removeprefix("torch."),
        "moments": kind.options.get("state_dtype", "float32"), "rounding": kind.options.get("rounding", "nearest"),
        "state": kind.state,
    }  # fmt: skip
    return Case(
        kernel_name=kind.name, mode="full", x=("P", "parameters", count), config=config,
        providers=lambda: providers(kind, vocab, everything), gate=agrees_with(kind.peer, kind.tolerance),
        work=count * (kind.bytes_each + (kind.dtype.itemsize if kind.clip else 0)), unit="B",
        dtype=kind.dtype, in_place=True,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    for kind in kinds():
        yield case_of(kind, 50_304, everything)


SMALL = [case_of(kind, 4096, False) for kind in kinds()]


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_optimizers(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
