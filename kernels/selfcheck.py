"""Every backend against the formula in fp64 on small drawn cases, gradients included.

`hotloop doctor` runs it for the reader, the engine at start for GPU backends that are new on a device. A case is one
call of a public function. It is made under each backend of the op's table in the case's dtype, and once in fp64 (by the
reference on the CPU; for optimizers by the formula written here) from the same rounded inputs:

    error = ((x - truth).abs() / (truth.abs() + truth.square().mean().sqrt())).max()      # worst of all results

Tolerances are several times the rounding errors of these cases and far below what a wrong mask, a lost tile or a
missing factor does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.attention import attention, attention_varlen, attention_with_lse
from hotloop.kernels.attention.op import TABLE as ATTENTION
from hotloop.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from hotloop.kernels.cross_entropy.linear import ONE_PASS, RECOMPUTE
from hotloop.kernels.cross_entropy.op import CROSS_ENTROPY
from hotloop.kernels.dispatch import BackendError, Table, forced_backend, use_backend
from hotloop.kernels.optimizers import SGD, AdamW, Lion, Muon
from hotloop.kernels.optimizers.adamw import ADAMW
from hotloop.kernels.optimizers.lion import LION
from hotloop.kernels.optimizers.muon import MUON
from hotloop.kernels.optimizers.sgd import SGD_TABLE

OPTIMIZERS = (ADAMW, LION, SGD_TABLE, MUON)
TOLERANCE = {torch.float32: 3e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}

Results = dict[str, Tensor]
Run = Callable[[torch.dtype, torch.dtype, torch.device], Results]
"""(dtype that inputs are rounded to, dtype they are computed in, device) -> results and gradients by name"""


@dataclass(frozen=True)
class Case:
    """One call of a public function with drawn arguments."""

    op: str
    call: str
    table: Table
    run: Run
    truth: Run
    """The same in fp64 on the CPU."""


@dataclass(frozen=True)
class Outcome:
    """What one backend did with one case."""

    op: str
    call: str
    dtype: str
    device: str
    backend: str
    chosen: bool
    """Whether the op takes this backend for this call by itself."""
    status: str
    """ok, mismatch, failed (raised), or not served"""
    error: float | None
    tolerance: float
    detail: str
    """The worst result's name, the exception, or the reason why the call is not served."""

    @property
    def fine(self) -> bool:
        return self.status in ("ok", "not served")


def self_check(device: torch.device | str, dtypes: Sequence[torch.dtype] | None = None) -> list[Outcome]:
    """Run every case under every backend on `device`. dtypes None: fp32 and bf16, on a GPU also fp16."""
    device = torch.device(device)
    if dtypes is None:
        dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])]
    return [outcome for case in CASES for dtype in dtypes for outcome in check(case, dtype, device)]


def check(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Outcome]:
    """One case under each backend of its table, in the table's order."""
    if case.table in OPTIMIZERS and dtype == torch.float16:  # parameters are fp32 or bf16
        return
    truth = case.truth(dtype, torch.float64, torch.device("cpu"))
    # Muon's products are in bf16 whatever the parameters are.
    tolerance, forced = tolerance_of(torch.bfloat16 if case.table is MUON else dtype, device), forced_backend()
    chosen = None
    for backend in case.table.backends:
        error, detail = None, ""
        try:
            with use_backend(backend.name):
                results = case.run(dtype, dtype, device)
            detail, error = worst(results, truth)
            status = "ok" if error <= tolerance else "mismatch"
        except BackendError as refusal:
            status, detail = "not served", str(refusal).rsplit("does not serve this call of ", 1)[-1].split(": ", 1)[-1]
        except Exception as failure:  # a compiler's, a launcher's, a driver's: all of them are findings here
            status, detail = "failed", f"{type(failure).__name__}: {failure}".splitlines()[0]
        if chosen is None and status != "not served" and forced in (None, backend.name):
            chosen = backend.name
        yield Outcome(
            op=case.op,
            call=case.call,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            backend=backend.name,
            chosen=chosen == backend.name,
            status=status,
            error=error,
            tolerance=tolerance,
            detail=detail,
        )


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """That of TOLERANCE; fp32 products that the user lets a GPU round to TF32 have the precision of fp16."""
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return TOLERANCE[torch.float16 if tf32 else dtype]


def worst(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[str, float]:
    """The result that is furthest from the truth, and how far; infinitely far where one is not finite."""
    if results.keys() != truth.keys():
        raise ValueError(f"results {', '.join(results)}: expected {', '.join(truth)}")
    errors = {}
    for name, expected in truth.items():
        x = results[name].detach().double().cpu()
        if x.shape != expected.shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {tuple(expected.shape)}")
        scale = expected.abs() + expected.square().mean().sqrt()
        error = ((x - expected).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
        errors[name] = error if math.isfinite(error) else math.inf
    name = max(errors, key=lambda name: errors[name])
    return name, errors[name]


class Draw:
    """Seeded values, drawn on the CPU and rounded, so that every device and dtype computes from the same ones."""

    def __init__(self, rounded: torch.dtype, computed: torch.dtype, device: torch.device, seed: int = 0):
        self.rounded, self.computed, self.device = rounded, computed, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32) * scale
        return x.to(self.rounded).to(self.device, self.computed).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def gradients(output: Tensor, upstream: Tensor, inputs: Mapping[str, Tensor]) -> Results:
    grads = torch.autograd.grad(output, list(inputs.values()), upstream)
    return {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


# --- attention ---


def dense_attention(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    draw = Draw(rounded, computed, device)
    q = draw.normal(2, 77, 4, 64, grad=True)
    k, v = (draw.normal(2, 77, 2, 64, grad=True) for _ in range(2))
    o = attention(q, k, v, causal=True)
    return {"o": o, **gradients(o, draw.normal(*o.shape), {"q": q, "k": k, "v": v})}


def packed_attention(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    """Segments of 1, 69, 0 and 59 positions, and the last entry repeated as the engine's fixed capacity does."""
    draw = Draw(rounded, computed, device, seed=1)
    q, k, v = (draw.normal(129, 3, 32, grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 1, 70, 70, 129, 129, 129], dtype=torch.int32, device=device)
    o = attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, causal=True)
    return {"o": o, **gradients(o, draw.normal(*o.shape), {"q": q, "k": k, "v": v})}


def attention_options(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    draw = Draw(rounded, computed, device, seed=2)
    q = draw.normal(1, 40, 4, 40, grad=True)
    k, v = (draw.normal(1, 67, 4, 40, grad=True) for _ in range(2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device, dtype=computed).requires_grad_()
    sinks = draw.normal(4, grad=True)
    o, lse = attention_with_lse(q, k, v, window_size=(20, 3), softcap=5.0, alibi_slopes=slopes, sinks=sinks)
    inputs = {"q": q, "k": k, "v": v, "alibi_slopes": slopes, "sinks": sinks}
    loss = (o * draw.normal(*o.shape)).sum() + (lse * draw.normal(*lse.shape)).sum()
    return {"o": o, "lse": lse, **gradients(loss, torch.ones_like(loss), inputs)}


def attention_dropout(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    """Packed cross attention: segments of 30, 0 and 21 queries and 25, 10 and 40 keys."""
    draw = Draw(rounded, computed, device, seed=7)
    q = draw.normal(51, 6, 48, grad=True)
    k, v = (draw.normal(75, 2, 48, grad=True) for _ in range(2))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 30, 30, 51], [0, 25, 35, 75])
    )
    o = attention_varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=True, dropout_p=0.25, seed=3 * 2**40 + 1
    )
    return {"o": o, **gradients(o, draw.normal(*o.shape), {"q": q, "k": k, "v": v})}


# --- cross entropy ---


def mean_linear_cross_entropy(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    """A third of the rows ignored, a vocabulary that no tile divides."""
    draw = Draw(rounded, computed, device, seed=3)
    input, linear_weight = draw.normal(90, 64, grad=True), draw.normal(777, 64, scale=0.2, grad=True)
    target = draw.integers(777, 90)
    target[::3] = -100
    loss = linear_cross_entropy(input, linear_weight, target, schedule="one_pass")
    return {
        "loss": loss,
        **gradients(loss, torch.full_like(loss, 3.0), {"input": input, "linear_weight": linear_weight}),
    }


def linear_cross_entropy_options(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    draw = Draw(rounded, computed, device, seed=4)
    input, linear_weight = draw.normal(50, 48, grad=True), draw.normal(300, 48, scale=0.3, grad=True)
    linear_bias = draw.normal(300, grad=True)
    target = draw.integers(300, 50)
    target[7] = -100
    losses = linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, reduction="none", label_smoothing=0.4, z_loss=0.02,
        softcap=8.0, schedule="recompute",
    )  # fmt: skip
    inputs = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    return {"losses": losses, **gradients(losses, draw.normal(50).to(losses.dtype), inputs)}


def cross_entropy_options(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    draw = Draw(rounded, computed, device, seed=5)
    input, target = draw.normal(60, 1001, scale=3.0, grad=True), draw.integers(1001, 60)
    target[::4] = -100
    losses = cross_entropy(input, target, reduction="none", label_smoothing=0.4, z_loss=0.02)
    return {"losses": losses, **gradients(losses, draw.normal(60).to(losses.dtype), {"input": input})}


# --- optimizers ---

SHAPES, STEPS, CLIP = ((70, 33), (129,)), 3, 2.0
ADAMW_OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD_OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
MUON_OPTIONS: dict[str, Any] = {"lr": 0.05, "ns_coefficients": (2.0, -1.5, 0.5)}  # converge: no error is amplified


def clipped_steps(
    kind: type[AdamW | Lion | SGD | Muon], shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]
) -> Run:
    """Parameters in bf16 keep an fp32 master."""

    def run(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
        draw = Draw(rounded, computed, device, seed=6)
        params = [draw.normal(*shape, grad=True) for shape in shapes]
        master = None if computed == torch.float32 else "float32"
        optimizer = kind(params, max_grad_norm=CLIP, master=master, **options)
        for _ in range(STEPS):
            for p in params:
                p.grad = draw.normal(*p.shape)
            optimizer.step()
        results = {"grad_norm": optimizer.grad_norm}
        for i, p in enumerate(params):
            state = optimizer.state[p]
            results |= {f"param{i}": state["master"] if master else p, f"stored{i}": p}
            results |= {f"{name}{i}": state[name] for name in optimizer.moments}
        return results

    return run


Formula = Callable[[Tensor, Tensor, list[Tensor], int], None]
"""(p, g, moments, t): one step in place, in fp64"""


def by_formula(step: Formula, moments: Sequence[str]) -> Run:
    """What `clipped_steps` gives, by a formula written here."""

    def truth(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
        draw = Draw(rounded, computed, device, seed=6)
        params = [draw.normal(*shape) for shape in SHAPES]
        kept = [[torch.zeros_like(p) for _ in moments] for p in params]
        norm = torch.zeros((), dtype=computed)
        for t in range(1, STEPS + 1):
            grads = [draw.normal(*p.shape) for p in params]
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for p, g, own in zip(params, grads, kept, strict=True):
                step(p, g * (CLIP / (norm + 1e-6)).clamp_max(1.0), own, t)
        results = {"grad_norm": norm}
        for i, (p, own) in enumerate(zip(params, kept, strict=True)):
            results |= {f"param{i}": p, f"stored{i}": p}
            results |= {f"{name}{i}": x for name, x in zip(moments, own, strict=True)}
        return results

    return truth


def adamw_formula(p: Tensor, g: Tensor, moments: list[Tensor], t: int) -> None:
    (m, v), (beta1, beta2), lr = moments, ADAMW_OPTIONS["betas"], ADAMW_OPTIONS["lr"]
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    update = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + ADAMW_OPTIONS["eps"])
    p.mul_(1 - lr * ADAMW_OPTIONS["weight_decay"]).sub_(lr * update)


def lion_formula(p: Tensor, g: Tensor, moments: list[Tensor], t: int) -> None:
    (m,), (beta1, beta2), lr = moments, ADAMW_OPTIONS["betas"], ADAMW_OPTIONS["lr"]
    p.mul_(1 - lr * ADAMW_OPTIONS["weight_decay"]).sub_(lr * (m * beta1 + g * (1 - beta1)).sign())
    m.mul_(beta2).add_((1 - beta2) * g)


def sgd_formula(p: Tensor, g: Tensor, moments: list[Tensor], t: int) -> None:
    (b,), momentum = moments, SGD_OPTIONS["momentum"]
    g = g + p * SGD_OPTIONS["weight_decay"]
    b.mul_(momentum).add_(g)
    p.sub_(SGD_OPTIONS["lr"] * (g + b * momentum))


def muon_truth(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
    """The reference takes fp32 and bf16, and computes in fp64."""
    with use_backend("reference"):
        results = clipped_steps(Muon, SHAPES[:1], MUON_OPTIONS)(rounded, rounded, device)
        return {name: x.detach().double() for name, x in results.items()}


def _by_reference(run: Run) -> Run:
    def truth(rounded: torch.dtype, computed: torch.dtype, device: torch.device) -> Results:
        with use_backend("reference"):
            return {name: x.detach().double() for name, x in run(rounded, computed, device).items()}

    return truth


def _case(op: str, call: str, table: Table, run: Run, truth: Run | None = None) -> Case:
    return Case(op, call, table, run, truth or _by_reference(run))


CASES = (
    _case("attention", "causal, grouped heads", ATTENTION, dense_attention),
    _case("attention", "packed documents, causal", ATTENTION, packed_attention),
    _case("attention", "window, softcap, ALiBi, sinks, lse", ATTENTION, attention_options),
    _case("attention", "packed cross attention, dropout", ATTENTION, attention_dropout),
    _case("linear_cross_entropy", "mean, ignored rows (one_pass)", ONE_PASS, mean_linear_cross_entropy),
    _case("linear_cross_entropy", "rows, bias, options (recompute)", RECOMPUTE, linear_cross_entropy_options),
    _case("cross_entropy", "rows, ignored rows, smoothing, z-loss", CROSS_ENTROPY, cross_entropy_options),
    _case(
        "AdamW", "clipped steps", ADAMW, clipped_steps(AdamW, SHAPES, ADAMW_OPTIONS),
        by_formula(adamw_formula, AdamW.moments),
    ),
    _case(
        "Lion", "clipped steps", LION,
        clipped_steps(Lion, SHAPES, {k: v for k, v in ADAMW_OPTIONS.items() if k != "eps"}),
        by_formula(lion_formula, Lion.moments),
    ),
    _case(
        "SGD", "clipped steps, Nesterov", SGD_TABLE, clipped_steps(SGD, SHAPES, SGD_OPTIONS),
        by_formula(sgd_formula, SGD.moments),
    ),
    _case("Muon", "clipped steps", MUON, clipped_steps(Muon, SHAPES[:1], MUON_OPTIONS), muon_truth),
)  # fmt: skip
