"""Muon: the formula in fp64, both CPU backends along trajectories, torch.optim.Muon beside them, and what a step leaves
alone. The quintics are in test_muon_polynomials.py, Triton in test_muon_triton.py, ranks in test_muon_sharded.py."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import AdamW, Muon, muon_cpu, polar_express
from hotloop.kernels.optimizers.muon_polynomials import KELLER_JORDAN, per_step
from hotloop.kernels.optimizers.muon_reference import newton_schulz

BACKENDS = ("reference", "cpu")
# A vector each way, one element, odd sizes, tall and wide, empty, and one that has several block rows and strips.
SHAPES = [(1, 9), (9, 1), (1, 1), (33, 17), (17, 33), (64, 64), (0, 5), (3, 0), (300, 1100)]
SMALL = SHAPES[:8]
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 momentum": (torch.float32, {"state_dtype": "bfloat16"}),
    "fp32, int8 momentum": (torch.float32, {"state_dtype": "int8"}),
    "bf16 and master": (torch.bfloat16, {"master": "float32"}),
    "bf16 nearest": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "bf16 stochastic, bf16 momentum": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
    "bf16 stochastic, int8 momentum": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8"}),
}
storages = pytest.mark.parametrize("storage", STORAGE)
# Relative error of a bf16 Newton-Schulz of 5 steps, measured 0.8 to 1.1 % on torch.optim.Muon and on ours.
BF16_NEWTON_SCHULZ = 0.02


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: on a busy machine two threads wait milliseconds for each other at every one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    # "cpu" is what a CPU takes by itself; the norm and AdamW's groups have tables of their own.
    with use_backend("reference" if request.param == "reference" else None):
        yield request.param


def matrices(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32, seed: int = 1) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).mul_(0.1).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=draw) * scale).to(p.dtype)


def bits(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found[f"{i}"] = p.detach().clone()
        found |= {f"{i}.{name}": x.clone() for name, x in optimizer.state[p].items()}
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        left, right = (t.reshape(-1).contiguous().view(torch.uint8) for t in (x, b[name]))
        assert torch.equal(left, right), f"{name} differs"


class Oracle:
    """Muon in fp64, by singular values: U p(S / |S|) V^T. Nothing of it is shared with the backends."""

    def __init__(self, params: list[nn.Parameter], **options: Any):
        self.p = [x.detach().double().clone() for x in params]
        self.m = [torch.zeros_like(x) for x in self.p]
        self.path = [0.0 for _ in self.p]  # sum of the norms of the updates: what a relative error of them adds up to
        self.o = {
            "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_coefficients": KELLER_JORDAN,
            "ns_steps": 5, "adjust_lr_fn": None, "maximize": False, **options,
        }  # fmt: skip

    def step(self, grads: list[Tensor], max_norm: float | None = None) -> None:
        o = self.o
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm is not None else 1.0
        for i, (p, m, grad) in enumerate(zip(self.p, self.m, grads, strict=True)):
            if not p.numel():
                continue
            g = grad.double() * clip * (-1 if o["maximize"] else 1)
            m.mul_(o["momentum"]).add_((1 - o["momentum"]) * g)
            u = (1 - o["momentum"]) * g + o["momentum"] * m if o["nesterov"] else m
            left, s, right = torch.linalg.svd(u, full_matrices=False)
            s = s / max(s.norm().item(), 1e-7)
            for a, b, c in per_step(o["ns_coefficients"], o["ns_steps"]):
                s = a * s + b * s**3 + c * s**5
            rows, columns = p.shape
            scale = {
                None: max(1, rows / columns) ** 0.5, "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                "spectral_norm": (rows / columns) ** 0.5, "unscaled": 1.0,
            }[o["adjust_lr_fn"]]  # fmt: skip
            change = o["lr"] * scale * (left * s @ right)
            p.mul_(1 - o["lr"] * o["weight_decay"]).sub_(change)
            self.path[i] += change.norm().item()


def error(p: Tensor, expected: Tensor) -> float:
    return (p.detach().double() - expected).norm().item()


# The formula


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (40, 40), (1, 30)])
def test_newton_schulz_converges_to_the_polar_factor(shape: tuple[int, int]) -> None:
    """U V^T of the singular value decomposition: the nearest matrix with orthonormal rows or columns."""
    x = matrices([shape])[0].detach().double()
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    assert (s / s.norm()).min() > 1e-4
    o = newton_schulz(x, polar_express(12, lower=1e-4, safety=1.0), 1e-7)
    assert (o - left @ right).abs().max() < 1e-9
    small = o @ o.mT if shape[0] < shape[1] else o.mT @ o
    assert (small - torch.eye(len(small), dtype=torch.float64)).abs().max() < 1e-9
    assert (o * x).sum() == pytest.approx(s.sum().item(), rel=1e-9)  # <polar(x), x> is the nuclear norm


def test_newton_schulz_keeps_singular_vectors_and_commutes_with_rotations() -> None:
    x = matrices([(24, 40)])[0].detach().double()
    o = newton_schulz(x, per_step(KELLER_JORDAN, 5), 1e-7)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    middle = left.mT @ o @ right.mT
    assert (middle - middle.diagonal().diag()).abs().max() < 1e-12
    assert 0.5 < middle.diagonal().min() < middle.diagonal().max() < 1.3
    q, w = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
            for n in (24, 40))  # fmt: skip
    triples = per_step(KELLER_JORDAN, 5)
    assert (newton_schulz(q @ x @ w, triples, 1e-7) - q @ o @ w).abs().max() < 1e-12
    assert (newton_schulz(x.mT, triples, 1e-7) - o.mT).abs().max() < 1e-13
    assert (newton_schulz(x * 1e4, triples, 1e-7) - o).abs().max() < 1e-13


@pytest.mark.parametrize("options", [
    {}, {"nesterov": False, "maximize": True}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    {"adjust_lr_fn": "spectral_norm", "momentum": 0.0}, {"adjust_lr_fn": "unscaled", "ns_steps": 3},
    {"ns_coefficients": polar_express(5)}, {"max_grad_norm": 1.0},
])  # fmt: skip
def test_a_hundred_steps_stay_at_the_fp64_trajectory(backend: str, options: dict[str, Any]) -> None:
    """`reference`: roundings of p and m to fp32, the latter amplified by at most 9^5 (the slope of the quintics at
    zero): the change of p is within 2^-24 (|p| + 9^5 path). `cpu`: within BF16_NEWTON_SCHULZ of the
    path; within 8 % with polar_express, whose first quintic has a slope of 22 at 1: there bf16's rounding of the only
    singular value of a vector, 2^-8, shows."""
    steps, params = 100, matrices([(1, 9), (9, 1), (33, 17), (17, 33), (0, 5), (130, 40)])
    max_grad_norm = options.get("max_grad_norm")
    optimizer, oracle = Muon(params, lr=1e-2, **options), Oracle(params, lr=1e-2, **options)
    for step in range(steps):
        set_grads(params, step, 10.0 ** (step % 5 - 3))
        oracle.step([p.grad for p in params if p.grad is not None], max_grad_norm)
        optimizer.step()
    for p, expected, path in zip(params, oracle.p, oracle.path, strict=True):
        share = 0.08 if "ns_coefficients" in options else BF16_NEWTON_SCHULZ
        share = 9.0**5 * 2.0**-24 if backend == "reference" else share
        assert error(p, expected) <= share * path + steps * 2.0**-24 * expected.norm().item()
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.backends["muon, group 0, cpu, float32, gradients float32"] == backend


@pytest.mark.parametrize("options", [
    {}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "original"}, {"ns_steps": 3},
    {"eps": 1.0}, {"ns_coefficients": (2.0, -1.5, 0.5)},
])  # fmt: skip
def test_no_further_from_fp64_than_torch(options: dict[str, Any]) -> None:
    """Three steps; torch.optim.Muon does the same products in bf16. A rounding of the change is allowed besides: of a
    vector both errors are one element's luck."""
    shapes = [(1, 9), (33, 17), (17, 33), (127, 129), (129, 128), (300, 1100), (1100, 300)]
    start = matrices(shapes)
    ours, exact, theirs = (copy.deepcopy(start) for _ in range(3))
    makers = {"weight_decay": 0.1, "lr": 1e-2, **options}
    fast, reference, peer = Muon(ours, **makers), Muon(exact, **makers), torch.optim.Muon(theirs, **makers)
    for step in range(3):
        for params in (ours, exact, theirs):
            set_grads(params, step)
        peer.step()
        fast.step()
        with use_backend("reference"):
            reference.step()
    for p, q, r, before in zip(ours, exact, theirs, start, strict=True):
        truth, change = q.detach().double(), error(before, q.detach().double())
        assert error(r, truth) <= BF16_NEWTON_SCHULZ * change
        assert error(p, truth) <= 1.1 * error(r, truth) + 2.0**-8 * change, tuple(p.shape)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (256, 256)])
def test_scales_have_the_sizes_they_are_named_for(shape: tuple[int, int]) -> None:
    """match_rms_adamw: a root mean square of 0.2 lr; spectral_norm: a spectral norm of lr sqrt(R / C)."""
    changes = {}
    for name in ("match_rms_adamw", "spectral_norm"):
        (p,) = matrices([shape])
        before = p.detach().clone()
        set_grads([p], 0)
        Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn=name, ns_coefficients=polar_express(8), ns_steps=8).step()
        changes[name] = p.detach() - before
    assert changes["match_rms_adamw"].square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)
    norm = torch.linalg.matrix_norm(changes["spectral_norm"], 2).item()
    assert norm == pytest.approx(math.sqrt(shape[0] / shape[1]), rel=0.03)


# The CPU's products


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
def test_symmetric_products_are_whole_and_symmetric(rows: int) -> None:
    """Blocks around the block size; bf16, so that a product's error is its rounding: 2^-9 of the element."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 70, generator=draw).bfloat16()
    gram, quadratic = (torch.full((rows, rows), math.nan, dtype=torch.bfloat16) for _ in range(2))
    muon_cpu.gram_(gram, x)
    expected = x.double() @ x.double().mT
    torch.testing.assert_close(gram.double(), expected, rtol=2**-8, atol=1e-4)
    assert torch.equal(gram, gram.mT)
    gram = (gram / gram.norm()).to(torch.bfloat16)
    muon_cpu.quadratic_(quadratic, gram, -4.75, 2.0)
    exact = gram.double()
    torch.testing.assert_close(quadratic.double(), -4.75 * exact + 2 * exact @ exact, rtol=2**-8, atol=1e-4)
    assert torch.equal(quadratic, quadratic.mT)


def test_work_of_a_symmetric_product_is_about_half() -> None:
    """FLOPs that PyTorch counts in the GEMMs of a product, over those of the full product."""
    from torch.utils.flop_counter import FlopCounterMode

    x, out = torch.randn(768, 64).bfloat16(), torch.empty(768, 768, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        muon_cpu.gram_(out, x)
    blocks = 768 // muon_cpu.BLOCK
    assert counter.get_total_flops() == 2 * 768 * 768 * 64 * (blocks + 1) / (2 * blocks)
    a = torch.zeros(768, 768, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        muon_cpu.quadratic_(out, a, 1.0, 1.0)
    assert counter.get_total_flops() == 2 * 768**3 * (blocks + 1) / (2 * blocks)


def test_threads_change_neither_bits_nor_pytorchs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_cpu, "_WORTH_THREADS", 0.0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            params = matrices([(100, 300), (300, 100), (100, 300), (64, 64), (7, 5)])
            optimizer = Muon(params)
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        results.append(bits(optimizer))
    assert_same_bits(*results)


# Bad luck and odd input


@storages
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(backend: str, storage: str, bad: float) -> None:
    dtype, options = STORAGE[storage]
    params = matrices([*SMALL[:6], (80, 90)], dtype)
    vector = nn.Parameter(torch.randn(7).to(dtype))
    groups = [{"params": params}, {"params": [vector], "use_muon": False}]
    optimizer = Muon(groups, **options)
    for step in range(3):
        set_grads([*params, vector], step)
        if step == 2:
            params[3].grad[2, 3] = bad
            before = bits(optimizer)
        optimizer.step()
    assert_same_bits(before, bits(optimizer))
    assert optimizer.skipped_steps.item() == 1


def test_zero_gradients_only_decay(backend: str) -> None:
    params = matrices(SMALL)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.95, rtol=1e-6, atol=0)


def test_tiny_and_huge_gradients(backend: str) -> None:
    """Below eps the direction is the gradient over eps, as in torch; its square overflows fp32 and nothing else."""
    for scale, expected in ((1e-12, 3.4445**5 * 1e-5), (1e30, None)):
        p = nn.Parameter(torch.zeros(4, 4))
        p.grad = torch.eye(4) * scale
        Muon([p], lr=1.0, momentum=0.0).step()
        size = -p.detach().diagonal()
        assert p.isfinite().all()
        if expected is not None:
            torch.testing.assert_close(size, torch.full((4,), expected), rtol=0.05, atol=0)
        else:
            assert size.min() > 0.6
            assert size.max() < 1.2


def test_nothing_to_do_is_no_step(backend: str) -> None:
    Muon([{"params": []}]).step()
    params = matrices([(3, 4)])
    optimizer = Muon(params)
    optimizer.step()
    assert not optimizer.state[params[0]]
    empty = matrices([(0, 5), (5, 0)])
    optimizer = Muon(empty)
    set_grads(empty, 0)
    optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in empty)


def test_transposed_and_cut_out_matrices(backend: str) -> None:
    """Strides of parameter and gradient do not matter."""
    whole = matrices([(40, 60)])[0].detach()
    part = whole[3:20, 5:50].clone()
    results: list[Tensor] = []
    for cut in (part.clone(), part.mT.contiguous().mT, whole.clone()[3:20, 5:50]):
        p = nn.Parameter(cut)
        p.grad = part.mT.contiguous().mT if results else part
        Muon([p], lr=0.1).step()
        results.append(p.detach().clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-6)


# Clipping, the learning rate, groups


def test_clipping_is_over_all_groups_and_leaves_directions_alone(backend: str) -> None:
    """One factor for matrices and vectors. Muon's first step does not depend on it, its momentum does."""
    params, vector = matrices([(20, 30)]), nn.Parameter(torch.zeros(3))
    optimizer = Muon([{"params": params}, {"params": [vector], "use_muon": False}], max_grad_norm=1.0)
    set_grads([*params, vector], 0)
    grads = [p.grad.clone() for p in (*params, vector)]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], grads[0] * 0.05 / norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.state[vector]["exp_avg"], grads[1] * 0.1 / norm, rtol=1e-4, atol=0)


def test_group_of_adamw_is_adamw_to_the_bit() -> None:
    """The same update, defaults and state entries as an AdamW of its own."""
    mine, theirs = ([*matrices([(5, 6)], seed=3), nn.Parameter(torch.ones(7))] for _ in range(2))
    (hidden,) = matrices([(8, 9)])
    together = Muon([{"params": [hidden]}, {"params": mine, "use_muon": False, "lr": 3e-4, "weight_decay": 0.0}])
    alone = AdamW(theirs, lr=3e-4, weight_decay=0.0)
    with use_backend("reference"):
        for step in range(3):
            set_grads([hidden], step)
            set_grads(mine, step + 7)
            set_grads(theirs, step + 7)
            together.step()
            alone.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
        assert together.state[p].keys() == alone.state[q].keys()
    assert set(together.state[hidden]) == {"step", "momentum_buffer"}
    assert together.backends["adamw, group 1, cpu, float32, gradients float32"] == "reference"


def test_lr_tensor_and_scheduler(backend: str) -> None:
    a, b = matrices([(6, 8)]), matrices([(6, 8)])
    lr = torch.tensor(0.1)
    first, second = Muon(a, lr=lr), Muon(b, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(second, 1, gamma=0.5)
    for step in range(3):
        set_grads(a, step)
        set_grads(b, step)
        first.step()
        second.step()
        schedule.step()
        lr.mul_(0.5)
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)


def test_a_step_on_a_device_reads_nothing_from_it() -> None:
    """Meta tensors stand for a device: whatever needs a value of one raises."""
    params = [nn.Parameter(torch.empty(5, 7, device="meta")), nn.Parameter(torch.empty(9, 4, device="meta"))]
    optimizer = Muon(params, lr=torch.tensor(1e-3, device="meta"), max_grad_norm=1.0)
    optimizer.found_inf = torch.zeros((), device="meta")
    for p in params:
        p.grad = torch.empty(p.shape, device="meta")
    with use_backend("reference"):
        optimizer.step()
    assert optimizer.grad_norm.is_meta


def test_an_overwritten_parameter_is_seen_by_autograd(backend: str) -> None:
    (p,) = matrices([(4, 5)])
    loss = (p * p).sum()
    set_grads([p], 0)
    Muon([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Storage and state dictionaries


@storages
def test_storage_follows_the_fp64_trajectory(backend: str, storage: str) -> None:
    """20 steps along a drifting gradient, the mean movement within 5 % of fp64's; int8 momentum is 2 % off at most."""
    dtype, options = STORAGE[storage]
    params = matrices([(64, 80)], dtype)
    optimizer = Muon(params, lr=0.02, weight_decay=0.0, **options)
    oracle = Oracle(params, lr=0.02, weight_decay=0.0)
    before = params[0].detach().double().clone()
    drift = torch.randn(64, 80, generator=torch.Generator().manual_seed(9))
    for step in range(20):
        set_grads(params, step)
        params[0].grad = (params[0].grad + drift).to(dtype)
        oracle.step([params[0].grad])
        optimizer.step()
    state = optimizer.state[params[0]]
    moved, expected = state.get("master", params[0]).detach().double() - before, oracle.p[0] - before
    assert (moved - expected).norm() <= (0.1 if "nearest" in storage else 0.05) * expected.norm()
    if "master" in state:
        assert torch.equal(params[0].detach(), state["master"].bfloat16())


@storages
def test_a_resumed_optimizer_goes_on_to_the_same_bits(backend: str, storage: str) -> None:
    """bf16 parameters keep fp32, bf16 and int8 momentum and masters: PyTorch's base class would cast them."""
    dtype, options = STORAGE[storage]
    shapes = [(33, 17), (17, 33), (80, 90)]
    params = matrices(shapes, dtype)
    optimizer = Muon(params, **options)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    again = Muon(resumed, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(bits(optimizer), bits(again))
    for step in range(2, 4):
        for some, stepped in ((params, optimizer), (resumed, again)):
            set_grads(some, step)
            stepped.step()
    assert_same_bits(bits(optimizer), bits(again))


@pytest.mark.parametrize("into", ["torch", "ours"])
def test_state_goes_into_and_comes_from_torch(backend: str, into: str) -> None:
    """The next step is the same, but for two bf16 Newton-Schulz."""
    start = matrices([(33, 17), (17, 33), (140, 150)])
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start)
    options = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    ours, peer = Muon(mine, **options), torch.optim.Muon(theirs, **options)
    source, params = (ours, mine) if into == "torch" else (peer, theirs)
    for step in range(3):
        set_grads(params, step)
        source.step()
    saved = copy.deepcopy(source.state_dict())
    for p, q in zip(mine, theirs, strict=True):
        (q if into == "torch" else p).data.copy_(p if into == "torch" else q)
    target = torch.optim.Muon(theirs) if into == "torch" else Muon(mine, lr=1.0)
    target.load_state_dict(saved)
    assert target.param_groups[0]["lr"] == 0.05
    for p, q in zip(mine, theirs, strict=True):
        x, y = ((target if one == (into == "ours") else source).state[r]["momentum_buffer"] for one, r in
                ((True, p), (False, q)))  # fmt: skip
        assert torch.equal(x, y)
    before = [p.detach().clone() for p in mine]
    set_grads(mine, 3)
    set_grads(theirs, 3)
    source.step()
    target.step()
    for p, q, old in zip(mine, theirs, before, strict=True):
        assert error(p, q.detach().double()) <= 1.5 * BF16_NEWTON_SCHULZ * error(p, old.double())


def test_a_state_dict_of_other_groups_is_refused() -> None:
    params = matrices([(4, 5)])
    set_grads(params, 0)
    optimizer = Muon(params)
    optimizer.step()
    saved = optimizer.state_dict()
    other = Muon([{"params": matrices([(4, 5)]), "use_muon": False}, {"params": []}])
    del other.param_groups[1]
    with pytest.raises(ValueError, match="group 0 has use_muon = True in the state dict and False here"):
        other.load_state_dict(saved)
    saved["state"][0]["momentum_buffer"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*: momentum_buffer has shape \(5, 4\)"):
        Muon(matrices([(4, 5)])).load_state_dict(saved)


# Bad input


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -1.0}, "lr = -1.0"),
    ({"momentum": 1.0}, "momentum = 1.0: expected a number of at least 0 and below 1"),
    ({"eps": 0.0}, "eps = 0.0: expected a finite number greater than 0"),
    ({"ns_steps": 100}, "ns_steps = 100: expected an integer from 0 to 99"),
    ({"ns_steps": 2.0}, "ns_steps = 2.0"),
    ({"ns_coefficients": (1.0, 2.0)}, "expected a triple"),
    ({"adjust_lr_fn": "rms"}, "adjust_lr_fn = 'rms': expected one of None, 'original', 'match_rms_adamw'"),
    ({"state_dtype": "float16"}, "state_dtype = 'float16'"),
    ({"weight_decay": -0.1}, "weight_decay = -0.1"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(matrices([(3, 4)]), **options)


def test_bad_parameters_are_refused_by_name() -> None:
    vector, matrix = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"parameter 'norm' of group 0 has shape \(3,\): Muon's are 2-D.*'use_muon'"):
        Muon([("hidden", matrix), ("norm", vector)])
    with pytest.raises(ValueError, match="parameter 1 of group 0 has shape"):
        Muon([matrix, nn.Parameter(torch.zeros(2, 3, 4))])
    with pytest.raises(ValueError, match="is the same tensor as parameter 0 of group 0"):
        Muon([{"params": [matrix]}, {"params": [matrix], "use_muon": False}])
    with pytest.raises(ValueError, match=r"betas = \(0.9, 1.0\)"):
        Muon([{"params": [vector], "use_muon": False, "betas": (0.9, 1.0)}])
    with pytest.raises(ValueError, match="use_muon = 'yes': expected True or False"):
        Muon([{"params": [matrix], "use_muon": "yes"}])
    with pytest.raises(TypeError, match="set"):
        Muon([{"params": {matrix}}])
    sparse = nn.Parameter(torch.zeros(3, 4))
    sparse.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*sparse"):
        Muon([sparse]).step()
