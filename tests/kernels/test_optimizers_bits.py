"""The same bits: backend `cpu` against the reference, on every instruction set, storage, layout and thread count."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotloop.kernels import extension
from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.optimizers import AdamW, cpu, quantised, reference
from hotloop.kernels.optimizers.cases import PRECISIONS, RULES, assert_same_bits

cpu_extension = extension.loaded() if extension.missing() is None else None
pytestmark = pytest.mark.skipif(cpu_extension is None, reason="hotloop.kernels._C is not built")

# A vector, odd matrices (rows of more than a block of 256, and of less), a scalar, an empty one, more than one chunk.
SHAPES = [(7,), (33, 130), (9, 517), (), (0, 5), (3, 70_001)]


def instruction_sets() -> list[str]:
    found = ["baseline"]
    if cpu_extension is not None and "avx2" in cpu_extension.instruction_sets():
        found.append("avx2")
    if cpu_extension is not None and "avx512bw" in cpu_extension.instruction_sets():
        found.append("avx512")
    return found


@pytest.fixture
def any_instruction_set() -> Iterator[None]:
    yield
    assert cpu_extension is not None
    cpu_extension.force_instruction_set("")


def run(
    rule: str, precision: str, state_dtype: str, rounding: str, backend: str, steps: int = 3, **options: Any
) -> list[Tensor]:
    """All tensors after some steps, gradients from denormal to large."""
    dtype, grad_dtype, master = PRECISIONS[precision]
    kind, own = RULES[rule]
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    optimizer = kind(
        params, lr=1e-2, master=master, state_dtype=state_dtype, rounding=rounding, seed=2**40 + 3, **own, **options
    )
    with use_backend(backend):
        for step in range(steps):
            for p in params:
                if grad_dtype != dtype:
                    p.grad_dtype = grad_dtype
                exponent = torch.randint(-42 if step == 1 else -6, 3, p.shape, generator=draw)
                grad = torch.randn(p.shape, generator=draw) * 10.0**exponent
                p.grad = grad.to(grad_dtype)
            optimizer.step()
    assert set(optimizer.backends.values()) == {backend}
    kept = [x for p in params for x in optimizer.state[p].values()]
    return [*(p.detach() for p in params), *kept, optimizer.grad_norm]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", RULES)
def test_cpu_is_the_reference_to_the_bit_on_every_instruction_set(
    rule: str, precision: str, any_instruction_set: None
) -> None:
    assert cpu_extension is not None
    storages = [("float32", "nearest"), *itertools.product(("bfloat16", "int8"), ("nearest", "stochastic"))]
    if precision == "bf16":
        storages.append(("float32", "stochastic"))
    for state_dtype, rounding in storages:
        expected = run(rule, precision, state_dtype, rounding, "reference", max_grad_norm=30.0)
        for name in instruction_sets():
            cpu_extension.force_instruction_set(name)
            assert_same_bits(run(rule, precision, state_dtype, rounding, "cpu", max_grad_norm=30.0), expected)


def test_instruction_sets_are_named_in_errors() -> None:
    assert cpu_extension is not None
    with pytest.raises(ValueError, match="instruction set 'mmx': expected baseline"):
        cpu_extension.force_instruction_set("mmx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_reference_to_the_bit(dtype: torch.dtype, any_instruction_set: None) -> None:
    assert cpu_extension is not None
    draw = torch.Generator().manual_seed(1)
    sizes = (1, 63, 64, 65, 4095, 4097, 65_536, 65_537, 200_000, 0)
    grads = [torch.randn(n, generator=draw).mul(10.0 ** (i % 3)).to(dtype) for i, n in enumerate(sizes)]
    expected = reference.sum_of_squares(grads)
    for name, threads in itertools.product(instruction_sets(), (1, 2)):
        cpu_extension.force_instruction_set(name)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        assert torch.equal(cpu.sum_of_squares(grads), expected)
        assert torch.equal(cpu.sum_of_squares([grads[8].view(400, 500).t().contiguous().t()]),
                           reference.sum_of_squares([grads[8]]))  # fmt: skip
        torch.set_num_threads(before)


def test_bytes_around_the_tensors_stay() -> None:
    base = torch.full((5, 300), 7.0)
    p = base[1:4].requires_grad_()
    optimizer = AdamW([p], state_dtype="bfloat16", rounding="stochastic")
    p.grad = torch.ones_like(p)
    with use_backend("cpu"):
        optimizer.step()
    assert (base[0] == 7).all()
    assert (base[4] == 7).all()
    assert (base[1:4] != 7).all()


# 8-bit moments


@pytest.mark.parametrize("unsigned", [True, False])
def test_every_code_stands_for_one_number(unsigned: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    values = quantised.dequantise(codes, torch.ones(1, 1), 256, unsigned)
    again, scale = quantised.quantise(values, 256, unsigned)
    assert torch.equal(again, codes)
    assert abs(scale.item() - 1) < 2e-7
    magnitudes = values[0] if unsigned else values[0, :128]
    assert magnitudes[0] == 0
    gaps, (zero, fractions) = magnitudes.diff(), (2.0**-31, 8) if unsigned else (2.0**-7, 16)
    assert (gaps >= zero / fractions).all()
    assert (gaps <= (magnitudes[1:] + zero) / fractions).all()
    assert magnitudes[-1] == torch.tensor(2 - 1 / fractions) - zero
    if not unsigned:
        assert torch.equal(values[0, 128:], -values[0, :128])


@pytest.mark.parametrize("unsigned", [True, False])
def test_quantisation_is_to_the_nearest_value(unsigned: bool) -> None:
    table = quantised.dequantise(torch.arange(256, dtype=torch.uint8).view(1, -1), torch.ones(1, 1), 256, unsigned)[0]
    x = torch.rand(16, 256, generator=torch.Generator().manual_seed(2)) ** 4
    x[:, 0] = 1.0
    if not unsigned:
        x[:, 1::2] *= -1
    codes, scale = quantised.quantise(x, 256, unsigned)
    found = quantised.dequantise(codes, scale, 256, unsigned)
    nearest = (x[..., None] - table * scale[..., None]).abs().amin(-1)
    assert ((found - x).abs() <= nearest + 1e-7 * x.abs() + 2.0**-34).all()


def test_stochastic_codes_are_unbiased() -> None:
    n = 1 << 16
    for value in (0.77, 0.03, 3e-4):
        x = torch.full((n // 256, 256), value)
        x[:, 0] = 1.0
        noise = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(3))
        codes, scale = quantised.quantise(x, 256, True, noise)
        found = quantised.dequantise(codes, scale, 256, True)[:, 1:].double()
        step = (found.max() - found.min()).item()
        assert found.unique().numel() == 2
        assert abs(found.mean().item() - value) < 5 * 0.5 * step / found.numel() ** 0.5 + 1e-7


def test_a_positive_second_moment_never_becomes_zero() -> None:
    x = torch.full((1, 256), 1e-30)
    x[0, 0] = 1.0
    x[0, 1] = 0.0
    for noise in (None, torch.zeros(1, 256)):
        codes, _ = quantised.quantise(x, 256, True, noise)
        assert codes[0, 1] == 0
        assert (codes[0, 2:] == 1).all()


def test_small_tensors_and_vectors_keep_fp32_moments() -> None:
    shapes = [(40_000,), (63, 64), (64, 64), (2048, 2), (2, 40, 60)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = AdamW(params, state_dtype="int8")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert kept == [torch.float32, torch.float32, torch.uint8, torch.float32, torch.uint8]
    assert optimizer.state[params[4]]["exp_avg_sq_scale"].shape == (2, 10)
