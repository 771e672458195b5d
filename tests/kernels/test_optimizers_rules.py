"""SGD's exchange of state with torch, updates during the backward pass, no finite check; trajectories."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import SGD, AdamW, Lion


def pair() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    values = [torch.rand(shape, generator=draw) + 0.5 for shape in ((40, 50), (9,))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in values] for _ in range(2))
    return ours, theirs


def set_grads(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("into", ["ours", "theirs"])
def test_sgd_state_goes_into_and_comes_from_torch(backend: str, options: dict[str, Any], into: str) -> None:
    """The next step of both from one state: 2 ulp."""
    ours, theirs = pair()
    optimizer = SGD(ours, lr=1e-3, weight_decay=0.1, **options)
    peer = torch.optim.SGD(theirs, lr=1e-3, weight_decay=0.1, **options)
    source, target = (peer, optimizer) if into == "ours" else (optimizer, peer)
    source_params, target_params = (theirs, ours) if into == "ours" else (ours, theirs)
    with use_backend(backend):
        for step in range(5):
            set_grads(source_params, step)
            source.step()
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        with torch.no_grad():
            for a, b in zip(target_params, source_params, strict=True):
                a.copy_(b)
        for params, one in ((ours, optimizer), (theirs, peer)):
            set_grads(params, 5)
            one.step()
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= 2 * 2.0**-23 * b.abs()).all()


def test_options_of_sgd_that_no_step_could_use() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"nesterov=True with momentum = 0"):
        SGD([p], nesterov=True)
    with pytest.raises(ValueError, match=r"momentum = 1\.0"):
        SGD([p], momentum=1.0)
    saved = torch.optim.SGD([p], momentum=0.9, dampening=0.5).state_dict()
    with pytest.raises(ValueError, match=r"dampening = 0\.5"):
        SGD([p], momentum=0.9).load_state_dict(saved)


def test_step_in_backward_is_the_step_after_it() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    other = copy.deepcopy(one)
    after, within = (AdamW(m.parameters(), lr=0.1) for m in (one, other))
    handles = within.step_in_backward()
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        one(x).square().sum().backward()
        after.step()
        after.zero_grad()
        other(x).square().sum().backward()
        assert all(p.grad is None for p in other.parameters())
        within.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for handle in handles:
        handle.remove()
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_step_in_backward_cannot_clip() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))], max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm = 1\.0 with step_in_backward"):
        optimizer.step_in_backward()


def test_without_the_finite_check_nothing_is_measured() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], check_finite=False)
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    assert optimizer.skipped_steps.item() == 0
    assert torch.equal(p.isnan(), torch.tensor([False, True, False]))
    assert not any("grad_norm" in name for name in optimizer.backends)


# Trajectories


SHAPES = [(7,), (33, 17), (), (70, 71)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "lion"])
def test_a_hundred_steps_stay_at_the_fp64_trajectory(backend: str, rule: str) -> None:
    """Bound for T steps of SGD: each moves p by at most lr (1 + ... + momentum^T) |g|, known to some roundings, and
    rounds p: T u (2 max|p| + 20 lr max|g|) with u = 2^-24 and momentum 0.9. Lion's steps are lr, exactly but for one
    rounding of p: T u 2 max|p|; where a mean of gradients is nearly 0 its sign, hence a step, may differ."""
    lr, decay, momentum, steps = 1e-2, 0.1, 0.9, 100
    draw = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    exact = [p.detach().double() for p in params]
    kept = [torch.zeros_like(p) for p in exact]
    optimizer: SGD | Lion
    if rule == "lion":
        optimizer = Lion(params, lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    else:
        heavy = {} if rule == "sgd" else {"momentum": momentum, "nesterov": rule == "nesterov"}
        optimizer = SGD(params, lr=lr, weight_decay=decay, **heavy)
    largest = 0.0
    for _ in range(steps):
        for p, x, m in zip(params, exact, kept, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            g = p.grad.double()
            if rule == "lion":
                x.mul_(1 - lr * decay).sub_(lr * (m * 0.9 + g * 0.1).sign())
                m.mul_(0.99).add_(g * 0.01)
                continue
            g = g + decay * x
            largest = max(largest, g.abs().max().item())
            m.mul_(momentum if rule != "sgd" else 0.0).add_(g)
            x.sub_(lr * (g + momentum * m if rule == "nesterov" else m))
        with use_backend(backend):
            optimizer.step()
    apart = torch.cat([(p.detach().double() - x).abs().reshape(-1) for p, x in zip(params, exact, strict=True)])
    biggest = max(x.abs().max().item() for x in exact)
    bound = steps * 2.0**-24 * (2 * biggest + (0.0 if rule == "lion" else 20 * lr * largest))
    assert (apart > bound).double().mean().item() <= (1e-3 if rule == "lion" else 0.0)
    assert apart.max().item() <= max(bound, 4 * lr if rule == "lion" else 0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_8_bit_moments_follow_the_fp64_trajectory(backend: str, rounding: str) -> None:
    """Mean movement of 100 steps along a drifting gradient within 3 % of fp64's, all of it within 10 %."""
    draw = torch.Generator().manual_seed(4)
    p = nn.Parameter(torch.randn(64, 512, generator=draw))
    before = p.detach().double()
    exact, m, v = before.clone(), torch.zeros_like(before), torch.zeros_like(before)
    optimizer = AdamW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, state_dtype="int8", rounding=rounding)
    for t in range(1, 101):
        p.grad = 1 + torch.randn(p.shape, generator=draw)
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        exact -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        with use_backend(backend):
            optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    moved, expected = p.detach().double() - before, exact - before
    assert moved.mean().item() == pytest.approx(expected.mean().item(), rel=0.03)
    assert (moved - expected).norm() <= 0.1 * expected.norm()
