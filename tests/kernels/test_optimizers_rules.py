"""SGD's exchange of state with torch, updates during the backward pass, and steps without the finite check."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import SGD, AdamW


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
