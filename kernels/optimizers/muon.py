"""Muon: options, table of backends, and the formula they share; AdamW for the parameters that are not matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import muon_cpu, muon_reference, muon_triton
from hotloop.kernels.optimizers.adamw import ADAMW, AdamW
from hotloop.kernels.optimizers.base import BaseOptimizer
from hotloop.kernels.optimizers.checks import check_betas
from hotloop.kernels.optimizers.muon_polynomials import KELLER_JORDAN, per_step
from hotloop.kernels.optimizers.muon_rule import LR_SCALES

MUON = Table(
    "muon",
    Backend("triton", muon_triton.supports, muon_triton.muon),
    Backend("cpu", muon_cpu.supports, muon_cpu.muon),
    Backend("reference", muon_reference.supports, muon_reference.muon),
)
# Options that a group for AdamW has of its own; lr and weight_decay it takes from the optimizer like every group.
ADAMW_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# As torch.optim.Muon has it.
MOST_NS_STEPS = 99


class Muon(BaseOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Keller Jordan, 2024), and AdamW for what is no hidden matrix.

    Per step and matrix (R, C), with g = grad * factor (-g with maximize) and lr, decay computed in fp64:

        m = m + (1 - momentum) * (g - m)
        u = g + momentum * (m - g) if nesterov else m
        X = u / max(|u|_F, eps)
        X = a X + b X X^T X + c (X X^T)^2 X                     # for each of ns_steps triples (a, b, c)
        p = p * (1 - lr * weight_decay) - lr * scale(R, C) * X

    Backend `reference` is this in fp64. The others keep X, X X^T and b X X^T + c (X X^T)^2 in bf16 with fp32 sums, as
    torch.optim.Muon does, and compute each of the two symmetric products by halves. `factor` is as in `AdamW`.

    Which parameters: the 2-D weights of hidden layers. Embeddings, the output head, norms and biases go into a group of
    their own that says so, and are updated by AdamW, with its options and state:

        Muon([
            {"params": matrices},
            {"params": others, "use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.0},
        ], lr=0.02)

    Such a group's betas and eps are AdamW's defaults where it does not give them; lr and weight_decay the optimizer's.
    Clipping and skipping are decided once, over the gradients of all groups.

    Args:
        params: tensors, (name, tensor) pairs or dicts of a group; names appear in errors. float32 or bfloat16, dense.
            2-D, but for groups with `use_muon` False. A weight of Shard(0) placement is gathered before Newton-Schulz.
        lr, weight_decay, momentum, nesterov, eps, ns_steps: as above; options of a group.
        ns_coefficients: one triple for all steps, or a sequence of triples, one a step, of which the last one repeats:
            `polar_express(5)` makes singular values converge to 1.
        adjust_lr_fn: scale(R, C), how far lr depends on the shape:
            None, "original": sqrt(max(1, R / C)).
            "match_rms_adamw": 0.2 sqrt(max(R, C)), which takes AdamW's lr and weight decay (arXiv:2502.16982).
            "spectral_norm": sqrt(R / C), equal change of the output's root mean square for every shape
                (arXiv:2310.17813).
            "unscaled": 1.
        max_grad_norm, state_dtype, master, rounding, maximize, seed: as in `AdamW`.

    Attributes `grad_norm` and `skipped_steps` are AdamW's. State dictionaries go into and come from torch.optim.Muon.
    """

    table = MUON
    moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = KELLER_JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        max_grad_norm: float | None = None,
        state_dtype: str = "float32",
        master: str | None = None,
        rounding: str = "nearest",
        maximize: bool = False,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "state_dtype": state_dtype,
            "master": master,
            "rounding": rounding,
            "maximize": maximize,
            "use_muon": True,
        }
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own: matrices, or with `use_muon` False any others, for AdamW."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set | Tensor):
            param_group = {**param_group, "params": list(param_group["params"])}
        if isinstance(param_group, dict) and not param_group.get("use_muon", True):
            param_group = {**ADAMW_DEFAULTS, **param_group}
        elif isinstance(param_group, dict):
            self._check_matrices(param_group["params"])
        super().add_param_group(param_group)

    def _check_matrices(self, params: Any) -> None:
        for i, entry in enumerate([params] if isinstance(params, Tensor) else params):
            name, p = entry if isinstance(entry, tuple) else (i, entry)
            if isinstance(p, Tensor) and p.ndim != 2:
                raise ValueError(
                    f"parameter {name!r} of group {len(self.param_groups)} has shape {tuple(p.shape)}: Muon's are 2-D; "
                    "put it into a group with 'use_muon': False, which AdamW updates"
                )

    def _table_of(self, group: dict[str, Any]) -> Table:
        return MUON if group["use_muon"] else ADAMW

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["use_muon"] else AdamW.moments

    def _is_collective(self, group: dict[str, Any]) -> bool:
        return bool(group["use_muon"])

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if not isinstance(group["use_muon"], bool):
            raise ValueError(f"use_muon = {group['use_muon']!r}: expected True or False")
        if not group["use_muon"]:
            check_betas(group["betas"])
            eps = group["eps"]
            if not 0 <= eps < math.inf:
                raise ValueError(f"eps = {eps}: expected a finite number, at least 0")
            return
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps = {group['eps']}: expected a finite number greater than 0")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum = {group['momentum']}: expected a number of at least 0 and below 1")
        steps = group["ns_steps"]
        if not (isinstance(steps, int) and 0 <= steps <= MOST_NS_STEPS):
            raise ValueError(f"ns_steps = {steps!r}: expected an integer from 0 to {MOST_NS_STEPS}")
        if group["adjust_lr_fn"] not in LR_SCALES:
            known = ", ".join(map(repr, LR_SCALES))
            raise ValueError(f"adjust_lr_fn = {group['adjust_lr_fn']!r}: expected one of {known}")
        per_step(group["ns_coefficients"], steps)

    def _loaded_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        loaded = super()._loaded_groups(saved_groups)
        for number, (group, new) in enumerate(zip(self.param_groups, loaded, strict=True)):
            if group["use_muon"] != new["use_muon"]:
                raise ValueError(
                    f"group {number} has use_muon = {new['use_muon']} in the state dict and {group['use_muon']} here: "
                    "make its groups as those that were saved"
                )
        return loaded
