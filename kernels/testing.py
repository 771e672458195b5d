"""Accuracy oracle and drawn cases, shared by the tests and benchmarks of all ops.

The oracle: a result is right when it is no further from the formula in fp64 than PyTorch's own result in the same dtype
is. That needs no hand-picked tolerance per op and dtype, and it tightens by itself where PyTorch is accurate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "offset", "padded", "transposed", "strided")
VALUES = ("normal", "small", "large", "equal")


def assert_no_worse(
    actual: Tensor,  # (*) what is judged
    same_dtype_reference: Tensor,  # (*) PyTorch's result from the same inputs in the same dtype
    fp64_reference: Tensor,  # (*) the formula in fp64 from the same (rounded) inputs
    *,
    name: str = "result",
    factor: float = 1.25,
    ulps: float = 2.0,
    atol: float = 0.0,
    dim: int | None = None,
) -> None:
    """Assert that `actual` is no further from `fp64_reference` than PyTorch's result in the same dtype.

    error = lambda x: (x.double() - fp64_reference).abs()
    scale = fp64_reference.abs().amax(dim)
    tolerance = ulps * torch.finfo(actual.dtype).eps * scale + atol
    assert error(actual).amax(dim) <= factor * error(same_dtype_reference).amax(dim) + tolerance
    assert the same of the root mean square over the whole tensor, of the errors and of the scale

    `ulps` is for tensors so small that the comparison would be of two rounding errors' luck, `atol` for differences of
    terms that are much larger than the result: a few roundings of the terms. `dim` compares slice by slice along the
    remaining dimensions (rows whose magnitudes differ by orders); None compares the whole tensor. NaN and infinities
    must be where the fp64 result has them, with the same sign. Where only PyTorch's result in that dtype is not finite
    (an overflow), any value passes. Shapes, and the dtypes of `actual` and `same_dtype_reference`, must be equal.
    """
    assert actual.shape == fp64_reference.shape == same_dtype_reference.shape, (
        f"{name}: shape {tuple(actual.shape)}, PyTorch's {tuple(same_dtype_reference.shape)}, "
        f"fp64 {tuple(fp64_reference.shape)}"
    )
    assert actual.dtype == same_dtype_reference.dtype, (
        f"{name}: dtype {actual.dtype}, PyTorch's {same_dtype_reference.dtype}"
    )
    assert fp64_reference.dtype == torch.float64, f"{name}: fp64_reference is {fp64_reference.dtype}"
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    actual, same, truth = (x.detach().cpu().double() for x in (actual, same_dtype_reference, fp64_reference))

    finite = truth.isfinite()
    overflow = finite & ~same.isfinite()
    agrees = torch.where(finite, actual.isfinite() | overflow, (actual == truth) | (actual.isnan() & truth.isnan()))
    if not agrees.all():
        at = tuple((~agrees).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {(~agrees).sum().item()} of {actual.numel()} elements differ in being finite, NaN or infinite; "
            f"first at {at}: {actual[at].item()}, fp64 {truth[at].item()}, PyTorch {same[at].item()}"
        )
    compared = finite & ~overflow
    error = torch.where(compared, actual - truth, 0.0).abs()
    allowed = torch.where(compared, same - truth, 0.0).abs()
    scale = torch.where(compared, truth, 0.0).abs()

    def worst(x: Tensor) -> Tensor:
        return x.amax() if dim is None else x.amax(dim, keepdim=True)

    limit = factor * worst(allowed) + ulps * eps * worst(scale) + atol
    if (worst(error) > limit).any():
        excess = error - limit
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: error {error[at].item():.3e} at {at} exceeds {limit.expand_as(error)[at].item():.3e} "
            f"(PyTorch's worst is {worst(allowed).expand_as(error)[at].item():.3e}); "
            f"got {actual[at].item():.9g}, fp64 {truth[at].item():.9g}, PyTorch {same[at].item():.9g}"
        )

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    if rms(error) > factor * rms(allowed) + ulps * eps * rms(scale) + atol:
        raise AssertionError(
            f"{name}: root mean square error {rms(error):.3e}, PyTorch's {rms(allowed):.3e}, scale {rms(scale):.3e}"
        )


def draw_values(shape: tuple[int, ...], kind: str = "normal", *, seed: int = 0, dtype: torch.dtype) -> Tensor:
    """Seeded values of one of the kinds in `VALUES`: standard normal, of size 1e-4, of size 1e4, or all equal."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "small":
        x = x * 1e-4
    elif kind == "large":
        x = x * 1e4
    elif kind == "equal":
        x = torch.full_like(x, 0.5)
    elif kind != "normal":
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(VALUES)}")
    return x.to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; memory around and between them is NaN (the largest integer for integer
    dtypes), so that a read outside of the tensor shows in the result.

    contiguous; offset: contiguous, starting one element into the storage; padded: rows further apart than their length;
    transposed: the last two dimensions swapped in memory; strided: every second element of the last dimension. Tensors
    with too few dimensions for a layout get `offset`.
    """
    if layout == "contiguous":
        return x.detach().clone(memory_format=torch.contiguous_format)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    shape = list(x.shape)
    if layout == "offset" or x.dim() < (1 if layout == "strided" else 2):
        y = _poison(x, [x.numel() + 2])[1:-1].view(shape)
    elif layout == "padded":
        y = _poison(x, [*shape[:-1], shape[-1] + 3])[..., 1:-2]
    elif layout == "transposed":
        y = _poison(x, [*shape[:-2], shape[-1], shape[-2]]).transpose(-1, -2)
    else:
        y = _poison(x, [*shape[:-1], 2 * shape[-1]])[..., ::2]
    y.copy_(x)
    return y


def _poison(x: Tensor, shape: list[int]) -> Tensor:
    value = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


def streamed_bytes(counters: Any, way: str) -> float:
    """Global traffic that the emulator counted, `way` "load" or "store", but for source lines at which a warp's lanes
    share one address (tables, scalars): those come out of the cache."""
    total = 0.0
    for line in counters.by_line().values():
        requests, sectors = line[f"global_{way}_requests"], line[f"global_{way}_sectors"]
        if requests and sectors / requests > 1.5:
            total += min(line[f"global_{way}_bytes"], 32 * sectors)
    return total
