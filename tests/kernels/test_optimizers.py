"""AdamW: the formula to the bit, both backends along trajectories, and every promise about what a step leaves alone."""

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hotloop.kernels.dispatch import BackendError, use_backend
from hotloop.kernels.optimizers import AdamW, platform, reference
from hotloop.kernels.optimizers.adamw import ADAMW
from hotloop.kernels.optimizers.philox import MULTIPLIERS, random_bits, round_stochastic_
from hotloop.kernels.philox import philox_4x32_10

BACKENDS = ("reference", "torch")
# dtype of parameters, dtype of gradients, options of the optimizer: every way of storing things.
STORAGE: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, torch.float32, {"state_dtype": "bfloat16"}),
    "bf16 and master": (torch.bfloat16, torch.bfloat16, {"master": "float32"}),
    "bf16 and master, fp32 gradients": (torch.bfloat16, torch.float32, {"master": "float32"}),
    "bf16 and master, bf16 moments": (torch.bfloat16, torch.bfloat16, {"master": "float32", "state_dtype": "bfloat16"}),
    "bf16 nearest": (torch.bfloat16, torch.bfloat16, {"state_dtype": "bfloat16"}),
    "bf16 stochastic": (torch.bfloat16, torch.bfloat16, {"rounding": "stochastic"}),
    "bf16 stochastic, fp32 gradients": (torch.bfloat16, torch.float32, {"rounding": "stochastic"}),
    "bf16 stochastic, bf16 moments": (
        torch.bfloat16, torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}
    ),
}  # fmt: skip
storages = pytest.mark.parametrize("storage", STORAGE)
# A vector, a matrix, a scalar, an empty one, and one of more than a chunk of the norm and a bucket of the update.
SHAPES: list[tuple[int, ...]] = [(7,), (33, 17), (), (0, 5), (300_001,)]
SMALL = SHAPES[:4]
# Relative: the reference rounds an fp64 norm to fp32, the platform's sums chunks in fp32.
NORM_ERROR = {"cpu": 2.0**-24, "torch": 1e-5}


@pytest.fixture(params=("cpu", "torch"))  # cpu stands for the reference: test_optimizers_bits.py
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype, grad_dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in params:
        set_grad_dtype(p, grad_dtype)
    return params


def set_grad_dtype(p: Tensor, dtype: torch.dtype) -> None:
    """Gradients of another dtype than the parameter's; a copy of the parameter forgets it."""
    if p.dtype != dtype:
        p.grad_dtype = dtype


def set_grads(params: Sequence[Tensor], step: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype or p.dtype)


def make(storage: str, shapes: list[tuple[int, ...]] = SMALL, **options: Any) -> tuple[list[nn.Parameter], AdamW, Any]:
    """Parameters, optimizer, and a function that sets the gradients of a step."""
    dtype, grad_dtype, stored = STORAGE[storage]
    params = make_params(shapes, dtype, grad_dtype)
    optimizer = AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, **stored, **options})
    return params, optimizer, lambda step, scale=1.0: set_grads(params, step, scale, grad_dtype)


def snapshot(optimizer: AdamW) -> dict[str, Tensor]:
    tensors = {}
    for i, p in enumerate(optimizer._parameters()):
        tensors[f"{i}"] = p.detach().clone()
        tensors |= {f"{i}.{name}": x.clone() for name, x in optimizer.state[p].items()}
    return tensors


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        left, right = (x[name].reshape(-1).contiguous().view(torch.uint8) for x in (a, b))
        assert torch.equal(left, right), f"{name} differs"


def ulps(a: Tensor, b: Tensor) -> float:
    spacing = np.spacing(np.maximum(np.abs(a.detach().numpy()), np.abs(b.detach().numpy())))
    return float(np.max(np.abs(a.detach().double().numpy() - b.detach().double().numpy()) / spacing))


class Oracle:
    """AdamW with clipping in fp64, written from the papers."""

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, decay: float):
        self.p = [x.detach().double().clone() for x in params]
        self.m, self.v = ([torch.zeros_like(x) for x in self.p] for _ in range(2))
        self.lr, self.betas, self.eps, self.decay, self.t = lr, betas, eps, decay, 0

    def step(self, grads: list[Tensor], max_norm: float | None) -> float:
        self.t += 1
        b1, b2 = self.betas
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
        clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm is not None else 1.0
        for p, m, v, g in zip(self.p, self.m, self.v, grads, strict=True):
            g = g.double() * clip
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            m_hat, v_hat = m / (1 - b1**self.t), v / (1 - b2**self.t)
            p.sub_(self.lr * self.decay * p).sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))
        return norm


# The formula


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), log_scale=st.integers(-30, 15), t=st.integers(1, 3), maximize=st.booleans())
def test_reference_is_the_written_formula_to_the_bit(seed: int, log_scale: int, t: int, maximize: bool) -> None:
    """The docstring's lines in NumPy's fp32, whose operations are IEEE; gradients from denormal to large."""
    rng = np.random.default_rng(seed)
    f = np.float32
    p: np.ndarray = rng.standard_normal(50).astype(f)
    param = nn.Parameter(torch.from_numpy(p.copy()))
    lr, b1, b2, eps, decay = 3e-3, 0.9, 0.95, 1e-8, 0.1
    optimizer = AdamW([param], lr, (b1, b2), eps, decay, maximize=maximize, max_grad_norm=1.5)
    m, v = np.zeros(50, f), np.zeros(50, f)
    with use_backend("reference"):
        for step in range(1, t + 1):
            g = (rng.standard_normal(50) * 10.0**log_scale).astype(f)
            param.grad = torch.from_numpy(g.copy())
            optimizer.step()
            norm = f(np.sqrt((g.astype(np.float64) ** 2).sum()))
            assert abs(optimizer.grad_norm.item() - norm) <= np.spacing(norm)
            factor = f(min(f(1.5) / (f(optimizer.grad_norm.item()) + f(1e-6)), f(1)))
            g = (g * factor).astype(f)
            if maximize:
                g = -g
            p = p * f(1 - lr * decay)
            m = m * f(b1) + g * f(1 - b1)
            v = v * f(b2) + (g * f(1 - b2)) * g
            bias2_sqrt = np.sqrt(1 - np.power(b2, step))
            step_size, eps_t = f(lr * bias2_sqrt / (1 - np.power(b1, step))), f(eps * bias2_sqrt)
            p = p - (step_size * m) / (np.sqrt(v) + eps_t)
            assert p.dtype == m.dtype == v.dtype == f
            np.testing.assert_array_equal(param.detach().numpy().view(np.int32), p.view(np.int32))
            np.testing.assert_array_equal(optimizer.state[param]["exp_avg"].numpy().view(np.int32), m.view(np.int32))
            np.testing.assert_array_equal(optimizer.state[param]["exp_avg_sq"].numpy().view(np.int32), v.view(np.int32))


def test_square_root_is_rounded_to_nearest() -> None:
    """NumPy's is the processor's instruction, which IEEE 754 requires to be."""
    x = np.random.default_rng(0).random(1 << 20, dtype=np.float32) * np.float32(1e-6)
    np.testing.assert_array_equal(reference.sqrt_rn(torch.from_numpy(x)).numpy(), np.sqrt(x))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("storage", ["fp32", "bf16 and master", "bf16 and master, fp32 gradients"])
def test_a_hundred_steps_stay_at_the_fp64_trajectory(backend: str, storage: str, max_grad_norm: float | None) -> None:
    """Bound for T steps: two roundings of p a step, and an update of size about lr whose moments carry at most about
    T roundings: T u (2 max|p| + 2 T lr) with u = 2^-24."""
    lr, betas, eps, decay, steps = 1e-2, (0.9, 0.95), 1e-8, 0.1, 100
    params, optimizer, set_gradients = make(
        storage, [(7,), (33, 17), (), (0, 5), (5_000,)], betas=betas, max_grad_norm=max_grad_norm
    )
    oracle = Oracle(params, lr, betas, eps, decay)
    for step in range(steps):
        set_gradients(step, 10.0 ** (step % 5 - 3))
        norm = oracle.step([p.grad.clone() for p in params if p.grad is not None], max_grad_norm)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=NORM_ERROR[backend])
    for p, expected in zip(params, oracle.p, strict=True):
        state = optimizer.state[p]
        actual = state.get("master", p.detach())
        if p.numel():
            bound = steps * 2.0**-24 * (2 * expected.abs().max().item() + 2 * steps * lr)
            assert (actual.double() - expected).abs().max().item() <= bound
        assert state["step"].item() == steps
        if "master" in state:
            assert torch.equal(p.detach(), state["master"].bfloat16())
    assert optimizer.skipped_steps.item() == 0
    assert set(optimizer.backends.values()) == {backend}


@pytest.mark.parametrize(
    "storage", ["fp32, bf16 moments", "bf16 and master, bf16 moments", "bf16 stochastic, bf16 moments"]
)
def test_bf16_moments_follow_the_fp64_trajectory(backend: str, storage: str) -> None:
    """Mean movement of 50 steps along a drifting gradient within 3 % of fp64's: bf16 moments are 2^-9 off each."""
    params, optimizer, _ = make(storage, [(4096,)], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    oracle = Oracle(params, 1e-2, (0.9, 0.95), 1e-8, 0.0)
    before = params[0].detach().double().clone()
    for step in range(50):
        set_grads(params, step)
        assert params[0].grad is not None
        params[0].grad += 1.0
        oracle.step([params[0].grad], None)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    moved, expected = (params[0].double() - before).mean().item(), (oracle.p[0] - before).mean().item()
    assert moved == pytest.approx(expected, rel=0.03)


@storages
def test_torch_backend_agrees_with_the_reference(storage: str) -> None:
    """After one step from the same state: moments and masters to 4 ulp of their largest term, bf16 to one bf16 ulp."""
    runs = {}
    for name in BACKENDS:
        _, optimizer, set_gradients = make(storage, SHAPES)
        with use_backend(name):
            set_gradients(0)
            optimizer.step()
        runs[name] = snapshot(optimizer)
    for name, expected in runs["reference"].items():
        actual = runs["torch"][name]
        assert actual.dtype == expected.dtype
        if not expected.numel():
            continue
        u = 2.0**-7 if expected.dtype == torch.bfloat16 else 4 * 2.0**-23
        error = (actual.double() - expected.double()).abs()
        assert (error <= u * expected.double().abs() + 4 * 2.0**-23 * 1e-2).all(), name
        if expected.dtype == torch.bfloat16:
            # Rounding decides alike but where the fp32 value lies within an ulp of a decision.
            assert (error > 0).sum() <= 2 + 1e-3 * error.numel(), name


# The norm and clipping


def test_norm_is_summed_in_a_fixed_order_and_cannot_overflow() -> None:
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 65_536, 65_537, 200_000)]
    expected = sum(float((g.double() ** 2).sum()) for g in grads)
    huge, small = torch.full((70_000,), 1e38), torch.full((70_000,), 2.0**-60).bfloat16()
    for f, tolerance in ((reference.sum_of_squares, 1e-14), (platform.sum_of_squares, 2e-5)):
        assert f(grads).item() == pytest.approx(expected, rel=tolerance)
        assert f(grads).dtype == torch.float64
        assert f([huge]).item() == pytest.approx(7e4 * huge[0].item() ** 2, rel=tolerance)
        assert f([torch.zeros(3), small]).item() == pytest.approx(7e4 * 2.0**-120, rel=tolerance)
        assert not f([torch.zeros(3), torch.tensor([math.inf])]).isfinite()
    # The chunk, not the tensor's shape or strides, decides the order.
    x = torch.randn(600, 700)
    whole = reference.sum_of_squares([x])
    assert torch.equal(whole, reference.sum_of_squares([x.t().contiguous().t()]))
    assert torch.equal(whole, reference.sum_of_squares([x.view(-1)]))
    chunks = list(x.view(-1).split(reference.CHUNK))
    assert torch.equal(whole, reference.sum_of_squares(chunks))


def test_clipping_is_clip_grad_norm_over_all_groups(backend: str) -> None:
    ours, theirs = (make_params([(40, 30), (11,), (5, 2)], torch.float32, torch.float32) for _ in range(2))
    groups: list[list[dict[str, Any]]] = [[{"params": x[:1], "lr": 3e-2}, {"params": x[1:]}] for x in (ours, theirs)]
    optimizer, peer = AdamW(groups[0], max_grad_norm=0.5), torch.optim.AdamW(groups[1])
    for step in range(5):
        set_grads(ours, step, 10.0 ** (step - 4))
        set_grads(theirs, step, 10.0 ** (step - 4))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        peer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            for name in optimizer.moments:
                torch.testing.assert_close(optimizer.state[a][name], peer.state[b][name], rtol=1e-5, atol=1e-8)


def test_infinite_max_grad_norm_measures_and_never_clips(backend: str) -> None:
    runs = []
    for max_grad_norm in (None, math.inf):
        _, optimizer, set_gradients = make("fp32", max_grad_norm=max_grad_norm)
        set_gradients(0, 1e20)
        optimizer.step()
        assert optimizer.grad_norm.item() > 1e20
        runs.append(snapshot(optimizer))
    assert_same_bits(*runs)


def test_huge_finite_gradients_are_clipped_and_not_skipped(backend: str) -> None:
    params, optimizer, set_gradients = make("fp32", max_grad_norm=1.0)
    set_gradients(0, 1e30)
    before = params[0].detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert (params[0] != before).all()
    assert all(p.isfinite().all() for p in params)
    assert optimizer.state[params[1]]["exp_avg"].abs().max() < 0.1


# Skipping


@storages
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing(backend: str, storage: str, bad: float) -> None:
    for max_grad_norm, warm in itertools.product((None, 1.0), (0, 2)):
        params, optimizer, set_gradients = make(storage, max_grad_norm=max_grad_norm)
        for step in range(warm):
            set_gradients(step)
            optimizer.step()
        set_gradients(10)
        optimizer._gather(
            list(optimizer._parameters())
        )  # creates the state of the first step, so that there is something to compare
        before = snapshot(optimizer)
        assert params[1].grad is not None
        params[1].grad[3, 4] = bad
        optimizer.step()
        assert_same_bits(before, snapshot(optimizer))
        assert optimizer.skipped_steps.item() == 1
        assert not optimizer.grad_norm.isfinite()
        set_gradients(11)
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        assert optimizer.grad_norm.isfinite()
        assert optimizer.state[params[0]]["step"].item() == warm + 1


@storages
def test_found_inf_from_outside_skips(backend: str, storage: str) -> None:
    params, optimizer, set_gradients = make(storage)
    set_gradients(0)
    optimizer.step()
    before = snapshot(optimizer)
    for value in (torch.tensor(1.0), torch.tensor(2.5), torch.tensor(True), torch.tensor(math.nan)):
        set_gradients(1)
        optimizer.found_inf = value
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.skipped_steps.item() == 4
    assert optimizer.grad_norm.isfinite()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 4
    assert (params[1] != before["1"]).any()


def test_a_skipped_step_leaves_no_trace_in_what_follows(backend: str) -> None:
    runs = []
    for skipped in (False, True):
        _, optimizer, set_gradients = make("bf16 stochastic, bf16 moments")
        for step in range(6):
            if skipped and step == 3:
                set_gradients(99, math.nan)
                optimizer.step()
            set_gradients(step)
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(backend: str, unscale: bool) -> None:
    ours, theirs = (make_params([(9, 4), (5,)], torch.float32, torch.float32) for _ in range(2))
    optimizer = AdamW(ours, lr=1e-2, max_grad_norm=0.5)
    peer = torch.optim.AdamW(theirs, lr=1e-2)
    scaler, peer_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    for step in range(6):
        for params, opt, s in ((ours, optimizer, scaler), (theirs, peer, peer_scaler)):
            x = torch.full((4,), math.inf if step == 3 else 1.0 + step)
            loss = (params[0] @ x).square().sum() + params[1].sum()
            s.scale(loss).backward()
            if opt is peer:
                s.unscale_(opt)
                norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
            elif unscale:
                s.unscale_(opt)
            s.step(opt)
            s.update()
            opt.zero_grad()
        assert scaler.get_scale() == peer_scaler.get_scale()
        assert optimizer.skipped_steps.item() == (step >= 3)
        if step != 3:
            assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not hasattr(optimizer, "found_inf")


@storages
@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_on_a_device_reads_nothing_from_it(name: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand for a device: whatever needs a value of one raises. All backends take the path of a GPU."""
    monkeypatch.setattr(platform, "_DEVICES", ("meta",))
    dtype, grad_dtype, options = STORAGE[storage]
    params = make_params([(7,), (33, 17), (0, 5)], dtype, grad_dtype)
    params = [nn.Parameter(torch.empty_like(p, device="meta")) for p in params]
    # PyTorch has no meta kernel of its fused AdamW with a tensor as learning rate.
    lr = torch.tensor(1e-3, device="meta") if name == "reference" else 1e-3
    optimizer = AdamW(params, lr=lr, max_grad_norm=1.0, **options)
    optimizer.found_inf = torch.zeros((), device="meta")
    for p in params:
        set_grad_dtype(p, grad_dtype)
        p.grad = torch.empty(p.shape, dtype=grad_dtype, device="meta")
    with use_backend(name):
        optimizer.step()
        optimizer.grad_scale = torch.ones((), device="meta")
        optimizer.step()
    assert optimizer.grad_norm.is_meta
    assert set(optimizer.backends.values()) == {name}
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.grad_norm.item()


# Rounding


def test_philox_known_answers() -> None:
    """The vectors for philox4x32-10 that come with the authors' library Random123."""
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, expected in cases:
        a, b, c, d = (torch.tensor([x]) for x in counter)
        assert tuple(w.item() for w in philox_4x32_10((a, b, c, d), key)) == expected


def test_random_bits_depend_on_seed_step_stream_and_index_only() -> None:
    draw = lambda start, count, seed=5, step=3.0, stream=0: random_bits(
        start, count, seed=seed, step=torch.tensor(step), stream=stream
    )
    whole = draw(0, 1000)
    for start, count in ((0, 1), (3, 5), (7, 2), (8, 8), (999, 1), (13, 700)):
        assert torch.equal(draw(start, count), whole[start : start + count])
    far = 8 * 2**32 - 40
    assert torch.equal(draw(far, 80)[40:], draw(far + 40, 40))
    others = [draw(8, 1000), draw(0, 1000, seed=6), draw(0, 1000, seed=5 + 2**32), draw(0, 1000, step=4.0),
              draw(0, 1000, stream=1), draw(8 * 2**32, 1000)]  # fmt: skip
    for other in others:
        assert (other == whole).sum() < 10
    # 16 equally likely leading digits: chi-square with 15 degrees of freedom, 99.99 % quantile 44.3.
    streams = [draw(0, 1 << 18, stream=stream) for stream in range(3)]
    for bits in streams:
        for digits in (bits >> 12, bits & 15):
            counts = torch.bincount(digits, minlength=16).double()
            assert ((counts - 2**14) ** 2 / 2**14).sum() < 44.3
        assert bits.min() >= 0
        assert bits.max() < 1 << 16
    # Leading digits of two streams of the same elements: 256 equally likely pairs, 255 degrees of freedom, 346.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        counts = torch.bincount((streams[a] >> 12) * 16 + (streams[b] >> 12), minlength=256).double()
        assert ((counts - 2**10) ** 2 / 2**10).sum() < 346


def test_multipliers_permute_the_16_bit_numbers_and_have_no_short_lattice_vector() -> None:
    """Spectral test: whole numbers (h, k), not both zero, with h a + k b a multiple of 2^16, are at least 255 long."""
    size = 1 << 16
    x = torch.arange(size)
    for a in MULTIPLIERS:
        assert (x * a % size).unique().numel() == size
    k = torch.arange(1, 256)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        ratio = MULTIPLIERS[b] * pow(MULTIPLIERS[a], -1, size) % size
        h = -k * ratio % size
        h = torch.minimum(h, size - h)
        assert (h**2 + k**2).min() >= 255**2


def test_stochastic_rounding_is_unbiased_and_keeps_what_bf16_holds() -> None:
    n = 1 << 18
    step = torch.tensor(1.0)
    for value in (1.0 + 2.0**-9, -3.001, 1e-3, 2.0**-130 * 1.3):
        x = torch.full((n,), value)
        out = torch.empty(n, dtype=torch.bfloat16)
        round_stochastic_(out, x, 0, seed=0, step=step, stream=0)
        low, high = out.double().min().item(), out.double().max().item()
        exact = x[0].double().item()
        ulp = high - low
        assert low < exact < high
        assert out.unique().numel() == 2
        # Five standard deviations of the mean of n draws of two values.
        p = (exact - low) / ulp
        assert abs(out.double().mean().item() - exact) < 5 * ulp * math.sqrt(p * (1 - p) / n)
    kept = torch.tensor([0.0, -0.0, 1.5, -(2.0**-133), math.inf, -math.inf, 3.3895313892515355e38])
    out = torch.empty(7, dtype=torch.bfloat16)
    for seed in range(20):
        round_stochastic_(out, kept, 0, seed=seed, step=step, stream=0)
        assert torch.equal(out.float().view(torch.int32), kept.view(torch.int32))
    round_stochastic_(out, torch.full((7,), math.nan), 0, seed=0, step=step, stream=0)
    assert out.isnan().all()


def test_stochastic_rounding_keeps_small_updates_that_nearest_loses(backend: str) -> None:
    """Parameters of 1, updates of 2^-12 each, sixteen below half a bf16 ulp: after 64 steps 1 - 2^-6 on average."""
    means = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=2.0**-12, weight_decay=0.0, rounding=rounding)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means[rounding] = p.double().mean().item()
    assert means["nearest"] == 1.0
    # 64 draws with standard deviation below 2^-9 over 20,000 elements: five standard deviations are 5.6e-4.
    assert means["stochastic"] == pytest.approx(1 - 2.0**-6, abs=5.6e-4)


def test_second_moment_in_bf16_falls_only_with_stochastic_rounding(backend: str) -> None:
    falls = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.zeros(2000))
        optimizer = AdamW([p], betas=(0.9, 0.999), state_dtype="bfloat16", rounding=rounding)
        for step in range(101):
            p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
            optimizer.step()
        falls[rounding] = optimizer.state[p]["exp_avg_sq"].double().mean().item() / 1e-3
    assert falls["nearest"] == pytest.approx(1.0, abs=2.0**-8)
    assert falls["stochastic"] == pytest.approx(0.999**100, abs=5e-3)


def test_rounding_does_not_depend_on_how_parameters_are_cut_or_strided(backend: str) -> None:
    torch.manual_seed(0)
    weights, grads = torch.randn(24, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    options: dict[str, Any] = {"rounding": "stochastic", "lr": 0.1, "seed": 2**63 + 1}

    def run(params: list[Tensor], gradients: list[Tensor]) -> Tensor:
        leaves = [p.requires_grad_() for p in params]
        optimizer = AdamW(leaves, **options)
        for _ in range(3):
            for p, g in zip(leaves, gradients, strict=True):
                p.grad = g
            optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in leaves])

    whole = run([weights.clone()], [grads])
    assert torch.equal(whole, run(list(weights.clone().split(8)), list(grads.split(8))))
    transposed = weights.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(whole, run([transposed], [grads]))
    assert torch.equal(whole, run([weights.clone()], [grads.t().contiguous().t()]))
    options["seed"] = 1
    assert not torch.equal(whole, run([weights.clone()], [grads]))


@storages
def test_non_contiguous_parameters_and_gradients(backend: str, storage: str) -> None:
    """Transposed, sliced and expanded tensors get what contiguous ones get, and their gaps are not touched."""
    dtype, grad_dtype, options = STORAGE[storage]
    torch.manual_seed(0)
    dense = torch.randn(12, 10).to(dtype)
    base = torch.full((12, 20), 7.0, dtype=dtype)
    base[:, ::2] = dense
    variants = [dense.clone(), dense.t().contiguous().t(), base[:, ::2]]
    grad = torch.randn(10).to(grad_dtype).expand(12, 10)
    results = []
    for values in variants:
        p = values.requires_grad_()
        set_grad_dtype(p, grad_dtype)
        optimizer = AdamW([p], lr=1e-2, max_grad_norm=1.0, **options)
        for _ in range(3):
            p.grad = grad
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert (base[:, 1::2] == 7.0).all()
    assert not torch.equal(results[0], dense)


# The interface of torch.optim


def test_lr_tensor_and_scheduler(backend: str) -> None:
    runs = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params, optimizer, set_gradients = make("fp32", lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for step in range(5):
            set_gradients(step)
            optimizer.step()
            scheduler.step()
        runs.append(snapshot(optimizer))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0, abs=1e-12)
        set_gradients(9)
        optimizer.step()
        assert all(torch.allclose(p, runs[-1][f"{i}"], atol=1e-9) for i, p in enumerate(params))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-6, atol=1e-7)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


def test_groups_have_options_of_their_own(backend: str) -> None:
    alone = []
    shapes: list[tuple[int, ...]] = [(4, 3), (6,)]
    per_group: list[dict[str, Any]] = [
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.01, "betas": (0.5, 0.6), "maximize": True},
    ]
    for options, p in zip(per_group, make_params(shapes, torch.float32, torch.float32), strict=True):
        optimizer = AdamW([p], **options)
        set_grads([p], 0)
        optimizer.step()
        alone.append(p)
    together = make_params(shapes, torch.float32, torch.float32)
    optimizer = AdamW([{"params": [together[0]], **per_group[0]}])
    optimizer.add_param_group({"params": together[1], **per_group[1]})
    for p in together:
        set_grads([p], 0)
    optimizer.step()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_maximize_ascends(backend: str) -> None:
    up, down = (make("fp32", maximize=maximize, weight_decay=0.0) for maximize in (True, False))
    for step in range(3):
        up[2](step)
        down[2](step, -1.0)
        up[1].step()
        down[1].step()
    for a, b in zip(up[0], down[0], strict=True):
        assert torch.equal(a, b)


def test_closure_and_hooks(backend: str) -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([p], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert calls == ["before", "closure", "after"]
    assert p.item() < 3.0
    assert p.grad is not None
    optimizer.zero_grad()
    assert p.grad is None


def test_parameters_without_gradient_stay_and_count_their_own_steps(backend: str) -> None:
    """As torch.optim.AdamW does, whose state has a counter for each parameter."""
    ours, theirs = (make_params([(5,), (6,), (7,)], torch.float32, torch.float32) for _ in range(2))
    optimizer, peer = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step, absent in enumerate([(2,), (), (0, 1), (1,), (), (0, 1, 2)]):
        for params, opt in ((ours, optimizer), (theirs, peer)):
            set_grads(params, step)
            for i in absent:
                params[i].grad = None
            opt.step()
    for a, b in zip(ours, theirs, strict=True):
        assert optimizer.state[a]["step"].item() == peer.state[b]["step"].item()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    params, optimizer, set_gradients = make("fp32")
    set_gradients(0)
    optimizer.step()
    assert len({id(s["step"]) for s in optimizer.state.values()}) == 1, "parameters stepped together share a counter"


def test_an_overwritten_parameter_is_seen_by_autograd(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    y = p.square()
    p.grad = torch.ones(4)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# State dictionaries


@storages
@pytest.mark.parametrize("way", ["copy", "file", "deepcopy", "pickle"])
def test_a_resumed_optimizer_goes_on_to_the_same_bits(backend: str, storage: str, way: str) -> None:
    grad_dtype = STORAGE[storage][1]

    def steps(optimizer: AdamW, numbers: range) -> None:
        params = list(optimizer._parameters())
        for p in params:
            set_grad_dtype(p, grad_dtype)
        for step in numbers:
            set_grads(params, step, dtype=grad_dtype)
            optimizer.step()

    shapes = SHAPES if way == "copy" else SMALL
    params, optimizer, _ = make(storage, shapes, max_grad_norm=20.0, seed=9)
    steps(optimizer, range(3))
    if way in ("copy", "file"):
        saved = copy.deepcopy(optimizer.state_dict())
        resumed_params, resumed, _ = make(storage, shapes, max_grad_norm=20.0, seed=9)
        with torch.no_grad():
            for a, b in zip(resumed_params, params, strict=True):
                a.copy_(b)
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved)
    elif way == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        resumed = torch.load(file, weights_only=False)
    assert_same_bits(snapshot(optimizer), snapshot(resumed))
    steps(resumed, range(3, 5))
    assert optimizer.state[params[1]]["step"].item() == 3, "the copy shares nothing with its source"
    steps(optimizer, range(3, 5))
    assert_same_bits(snapshot(optimizer), snapshot(resumed))
    assert torch.equal(optimizer.grad_norm, resumed.grad_norm)


def test_state_dict_has_a_counter_for_each_parameter() -> None:
    params, optimizer, set_gradients = make("bf16 and master")
    set_gradients(0)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert set(state[0]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert len({s["step"].data_ptr() for s in state.values()}) == len(params)
    assert state[1]["exp_avg"] is optimizer.state[params[1]]["exp_avg"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("into", ["ours", "theirs"])
def test_state_goes_into_and_comes_from_torch(backend: str, into: str, fused: bool) -> None:
    """The next step of both from one state: 2 ulp."""
    shapes: list[tuple[int, ...]] = [(64, 64), (100,)]

    def make_pair() -> tuple[list[nn.Parameter], list[nn.Parameter], AdamW, torch.optim.AdamW]:
        ours, theirs = (
            [nn.Parameter(torch.rand(s, generator=torch.Generator().manual_seed(3)) + 0.5) for s in shapes]
            for _ in range(2)
        )
        options: dict[str, Any] = {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
        return ours, theirs, AdamW(ours, **options), torch.optim.AdamW(theirs, fused=fused, **options)

    ours, theirs, optimizer, peer = make_pair()
    source: torch.optim.Optimizer = peer if into == "ours" else optimizer
    source_params = theirs if into == "ours" else ours
    for step in range(10):
        set_grads(source_params, step)
        source.step()
    target: torch.optim.Optimizer = optimizer if into == "ours" else peer
    for group in target.param_groups:
        group["lr"] = 123.0
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.param_groups[0]["lr"] == 1e-3
    target_params = ours if into == "ours" else theirs
    with torch.no_grad():
        for a, b in zip(target_params, source_params, strict=True):
            a.copy_(b)
    for params, opt in ((ours, optimizer), (theirs, peer)):
        set_grads(params, 10)
        opt.step()
    for a, b in zip(ours, theirs, strict=True):
        assert ulps(a, b) <= 2
    assert "fused" not in optimizer.param_groups[0]
    assert float(target.state[target_params[0]]["step"]) == 11


def test_torch_state_of_bf16_parameters_is_widened_and_given_a_master() -> None:
    theirs = make_params([(30,)], torch.bfloat16, torch.bfloat16)
    peer = torch.optim.AdamW(theirs)
    set_grads(theirs, 0)
    peer.step()
    ours = [nn.Parameter(theirs[0].detach().clone())]
    optimizer = AdamW(ours, master="float32")
    optimizer.load_state_dict(peer.state_dict())
    state = optimizer.state[ours[0]]
    assert {name: x.dtype for name, x in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
    )
    assert torch.equal(state["exp_avg"], peer.state[theirs[0]]["exp_avg"].float())
    assert torch.equal(state["master"], ours[0].float())


def test_storage_is_the_loading_optimizers_choice() -> None:
    params, optimizer, set_gradients = make("bf16 and master")
    set_gradients(0)
    optimizer.step()
    _, other, _ = make("bf16 and master, bf16 moments")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["state_dtype"] == "bfloat16"
    p = next(other._parameters())
    assert torch.equal(other.state[p]["exp_avg"], optimizer.state[params[0]]["exp_avg"].bfloat16())
    _, plain, _ = make("fp32")
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* has a master copy"):
        plain.load_state_dict(optimizer.state_dict())


def test_load_hooks_run() -> None:
    params, optimizer, set_gradients = make("fp32")
    set_gradients(0)
    optimizer.step()
    calls = []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {**s, "exp_avg": 2 * s["exp_avg"]} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    before = optimizer.state[params[1]]["exp_avg"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], 2 * before)
    assert calls == ["after"]


def broken(change: Callable[[dict[str, Any]], None]) -> tuple[AdamW, dict[str, Any]]:
    params = [("embed", nn.Parameter(torch.ones(4, 3))), ("norm", nn.Parameter(torch.ones(3)))]
    optimizer = AdamW(params)
    set_grads([p for _, p in params], 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return optimizer, saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["state"][1].update(exp_avg=torch.ones(4)),
         r"parameter 'norm' of group 0 .*exp_avg has shape \(4,\), expected \(3,\)"),
        (lambda d: d["state"][0].pop("exp_avg_sq"), r"parameter 'embed' of group 0 .*entries \['step', 'exp_avg'\]"),
        (lambda d: d["state"][0].update(max_exp_avg_sq=torch.ones(4, 3)), r"parameter 'embed' .*max_exp_avg_sq"),
        (lambda d: d["state"].update({7: {}}), r"state for \[7\]"),
        (lambda d: d["param_groups"][0].update(params=[0]), r"groups of \[1\] parameters, this optimizer has .*\[2\]"),
        (lambda d: d["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
        (lambda d: d["param_groups"][0].update(decoupled_weight_decay=False), "decoupled"),
        (lambda d: d["param_groups"][0].update(betas=(0.9, 1.0)), "betas"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused_whole(change: Any, message: str) -> None:
    optimizer, saved = broken(change)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.param_groups[0]["betas"] == groups[0]["betas"]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "float16"}, "state_dtype = 'float16': expected one of 'float32', 'bfloat16', 'int8'"),
        ({"master": "bfloat16"}, "master = 'bfloat16': expected one of None, 'float32'"),
        ({"rounding": "up"}, "rounding = 'up'"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"lr": torch.ones(1)}, r"lr is a tensor of shape \(1,\)"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = "),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(2))], **options)


def test_bad_parameters_are_refused_by_name() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"parameter 'head' of group 0 is the same tensor as parameter 'embed'"):
        AdamW([("embed", p), ("head", p)])
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 1 is the same tensor as parameter 0 of group 0 \(shape"
    ):
        AdamW([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is torch.float16: expected float32 or bfloat16"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))])
    with pytest.raises(TypeError, match="expected a tensor, got float"):
        AdamW([1.0])
    with pytest.raises(TypeError, match="set"):
        AdamW([{"params": {p}}])
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match="lr = -2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -2})
    assert len(optimizer.param_groups) == 1


def test_bad_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 'weight' of group 0 \(shape \(5, 3\)\) has a torch.sparse_coo"):
        optimizer.step()
    p = nn.Parameter(torch.ones(2))
    p.grad_dtype = torch.float64
    p.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* torch.float64 gradient"):
        AdamW([p]).step()


def test_nothing_to_do_is_no_step() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], max_grad_norm=1.0)
    assert optimizer.step() is None
    assert not optimizer.state
    empty = nn.Parameter(torch.empty(0, 3))
    empty.grad = torch.empty(0, 3)
    optimizer = AdamW([empty])
    optimizer.step()
    assert optimizer.state[empty]["step"].item() == 1
    assert optimizer.grad_norm.item() == 0


# Backends


def test_a_backend_is_chosen_at_the_first_step_and_kept() -> None:
    _, optimizer, set_gradients = make("fp32", [(5,)])
    set_gradients(0)
    with use_backend("reference"):
        optimizer.step()
    set_gradients(1)
    optimizer.step()
    assert optimizer.backends == {
        "adamw, group 0, cpu, float32, gradients float32": "reference",
        "grad_norm, cpu": "reference",
    }
    _, optimizer, set_gradients = make("fp32", [(5,)])
    set_gradients(0)
    optimizer.step()
    assert set(optimizer.backends.values()) == {"cpu"}
    reason = "does not serve this call of adamw: serves cuda tensors, got cpu"
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        make_first_step()


def make_first_step() -> None:
    _, optimizer, set_gradients = make("fp32", [(5,)])
    set_gradients(0)
    optimizer.step()


def test_platform_names_the_devices_it_serves() -> None:
    params, optimizer, _ = make("fp32", [(5,)])
    params[0].grad = torch.ones(5)
    ((update, _),), _ = optimizer._gather(list(optimizer._parameters()))
    assert ADAMW["torch"].supports(update) is None
    assert platform._supports_device(torch.device("meta")) == "serves cpu and cuda tensors, got meta"
