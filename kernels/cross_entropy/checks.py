"""What the public functions refuse, and how they read their arguments: from metadata only, never from a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SCHEDULES = ("auto", "one_pass", "recompute")


def check_options(options: Options, reduction: str, normalizer: Tensor | float | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}")
    if normalizer is not None and reduction == "none":
        raise ValueError(
            "normalizer was given with reduction 'none', which divides by nothing: divide the losses, or use 'sum'"
        )
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {options.label_smoothing}: expected a number from 0 to 1")
    if not (options.z_loss >= 0.0 and math.isfinite(options.z_loss)):
        raise ValueError(f"z_loss {options.z_loss}: expected a finite number that isn't negative")
    if options.softcap is not None and not (options.softcap > 0.0 and math.isfinite(options.softcap)):
        raise ValueError(f"softcap {options.softcap}: expected a finite number above 0, or None for no cap")
    if not math.isfinite(options.logit_scale):
        raise ValueError(f"logit_scale {options.logit_scale}: expected a finite number")


def check_tensors(
    input: Tensor,  # (*, width)
    target: Tensor,  # (*)
    n_classes: int,
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (*)
    **others: Tensor | None,  # further floating-point tensors of input's dtype
) -> None:
    tensors = {"input": input, "target": target, "weight": weight, "token_weight": token_weight, **others}
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: expected a Tensor")
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor, which cross entropy doesn't shard: pass its full_tensor() or to_local(); "
                "under FSDP2 let the module LinearCrossEntropy own the projection, so that FSDP2 gathers it"
            )
        if x.device != input.device:
            raise ValueError(f"{name} is on {x.device} and input on {input.device}: move one of them")
    if input.dtype not in DTYPES:
        raise TypeError(f"input has dtype {input.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    for name, x in others.items():
        if x is not None and x.dtype != input.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and input {input.dtype}: cast one of them, or use torch.autocast"
            )
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}: expected class indices in torch.int64 (target.long())")
    if input.dim() == 0 or target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} and input {tuple(input.shape)}: expected input's shape without "
            "its last dimension"
        )
    if n_classes == 0:
        raise ValueError("there are 0 classes: expected at least one")
    if weight is not None and weight.shape != (n_classes,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected one number for each class, ({n_classes},)")
    if token_weight is not None and token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight has shape {tuple(token_weight.shape)}: expected target's, {tuple(target.shape)}"
        )


def check_constant(**tensors: Tensor | float | None) -> None:
    """Refuse tensors that want a gradient which isn't computed, rather than give them none."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which cross entropy doesn't compute: pass {name}.detach(), or apply "
                "it to the losses of reduction='none'"
            )


def check_normalizer(normalizer: Tensor, input: Tensor) -> None:
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: expected a single number")
    if normalizer.device != input.device:
        raise ValueError(
            f"normalizer is on {normalizer.device} and input on {input.device}: move one of them (or pass a number)"
        )


def check_target_range(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """Raise IndexError for a class that doesn't exist. Reads values, so for CPU tensors alone."""
    wrong = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"target {target[at].item()} (flat position {at}): expected a class from 0 to {n_classes - 1}, or "
            f"ignore_index {ignore_index}"
        )


def as_constant(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A detached, flat copy (or view) in the accumulation dtype."""
    return None if x is None else x.detach().reshape(-1).to(dtype)


def loss_scale(
    target: Tensor,  # (N,)
    weight: Tensor | None,  # (V,) accumulation dtype
    normalizer: Tensor | float | None,
    reduction: str,
    ignore_index: int,
    max_valid: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (), ()
    """What the sum of the row losses is multiplied by, and the number of valid rows; both stay on the device.

    0 where no row is valid, NaN where there are more valid rows than `max_valid`.
    """
    valid = target != ignore_index
    n_valid = valid.sum()
    if isinstance(normalizer, Tensor):
        scale = normalizer.detach().reshape(()).to(dtype).reciprocal()
    elif normalizer is not None:
        scale = torch.full((), 1.0 / normalizer, dtype=dtype, device=target.device)
    elif reduction != "mean":
        scale = torch.ones((), dtype=dtype, device=target.device)
    elif weight is None:
        scale = n_valid.to(dtype).reciprocal()
    else:
        scale = torch.where(valid, weight[torch.where(valid, target, 0)], 0.0).sum().reciprocal()
    scale = torch.where(n_valid == 0, 0.0, scale)
    if max_valid is not None:
        scale = torch.where(n_valid > max_valid, torch.nan, scale)
    return scale, n_valid


def under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch.autocast would give them to a matrix product."""
    first = tensors[0]
    assert first is not None
    device_type = first.device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in tensors
    )
