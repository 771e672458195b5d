"""What all optimizers share: groups, master copies, clipping, the finite check, skipping, state dictionaries.

A step is one reduction over all gradients (the norm, which also is the finite check) and then one update a group,
device and pair of dtypes. The update rule is a table of backends that a subclass names; it gets an `Update` and two
device scalars, the factor that gradients are multiplied by and whether to skip.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import platform, reference
from hotloop.kernels.optimizers.philox import ELEMENTS_PER_CALL
from hotloop.kernels.optimizers.update import Update

GRAD_NORM = Table(
    "grad_norm",
    Backend("torch", platform.supports_sum_of_squares, platform.sum_of_squares),
    Backend("reference", reference.supports_sum_of_squares, reference.sum_of_squares),
)
# As `torch.nn.utils.clip_grad_norm_` has it.
CLIP_EPS = 1e-6
PARAMETER_DTYPES = (torch.float32, torch.bfloat16)
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How things are stored is the choice of the optimizer that loads a state dictionary, not of the one that saved it.
STORAGE_OPTIONS = ("state_dtype", "master", "rounding")


class BaseOptimizer(torch.optim.Optimizer):
    """Common part of the optimizers; see `AdamW` for the meaning of the options.

    A subclass names its backends in `table`, its moments in `moments` (keys of the state dictionary), and options of
    other implementations that a loaded state dictionary may carry in `foreign_options`.
    """

    table: ClassVar[Table]
    moments: ClassVar[tuple[str, ...]]
    foreign_options: ClassVar[tuple[str, ...]] = ()

    # GradScaler then sets `grad_scale` and `found_inf` before `step` and deletes them after it.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, max_grad_norm: float | None, seed: int):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm = {max_grad_norm}: expected a number greater than 0, or None not to clip")
        if not (isinstance(seed, int) and 0 <= seed < 1 << 64):
            raise ValueError(f"seed = {seed!r}: expected an integer from 0 to 2^64 - 1")
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self._backends: dict[tuple[Any, ...], Backend] = {}
        super().__init__(params, defaults)
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError or TypeError before anything is added."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a dict with the key 'params', got {type(param_group).__name__}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("params is a set, whose order changes between runs: give a list")
        params = [params] if isinstance(params, Tensor) else list(params)
        seen = {p: self._name(p) for p in self._parameters()}
        for i, entry in enumerate(params):
            name, p = (repr(entry[0]), entry[1]) if isinstance(entry, tuple) else (None, entry)
            name = f"parameter {name or i} of group {len(self.param_groups)}"
            self._check_parameter(name, p)
            if p in seen:
                raise ValueError(f"{name} is the same tensor as {seen[p]}: give a tied parameter once")
            seen[p] = name
        group = {**param_group, "params": params}
        self._check_options({**self.defaults, **group})
        super().add_param_group(group)
        self._number_elements()

    def _check_parameter(self, name: str, p: Any) -> None:
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
        if p.dtype not in PARAMETER_DTYPES:
            raise TypeError(f"{name} is {p.dtype}: expected float32 or bfloat16")
        if p.layout != torch.strided or hasattr(p, "device_mesh"):
            raise TypeError(
                f"{name} is a {type(p).__name__} of layout {p.layout}: expected a dense tensor, not sharded"
            )

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise on options that no step could use. A subclass adds its own."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.ndim != 0:
                raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: expected a number or a 0-dim tensor")
        elif not lr >= 0:
            raise ValueError(f"lr = {lr}: must not be negative")
        if not 0 <= group["weight_decay"] < math.inf:
            raise ValueError(f"weight_decay = {group['weight_decay']}: expected a finite number, at least 0")
        if group["state_dtype"] == "int8":
            raise ValueError("state_dtype = 'int8': block-quantised moments are not implemented; use 'bfloat16'")
        for name, allowed in (
            ("state_dtype", tuple(STATE_DTYPES)),
            ("master", (None, "float32")),
            ("rounding", ("nearest", "stochastic")),
        ):
            if group[name] not in allowed:
                raise ValueError(f"{name} = {group[name]!r}: expected one of {', '.join(map(repr, allowed))}")

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _name(self, p: Tensor) -> str:
        for g, group in enumerate(self.param_groups):
            for i, q in enumerate(group["params"]):
                if p is q:
                    given = repr(group["param_names"][i]) if "param_names" in group else i
                    return f"parameter {given} of group {g} (shape {tuple(p.shape)})"
        raise KeyError("not a parameter of this optimizer")

    def _number_elements(self) -> None:
        # The logical index of an element: its place in all parameters laid end to end, each rounded up to the elements
        # of one Philox call, so that a launch works on whole calls.
        self._starts, start = {}, 0
        for p in self._parameters():
            self._starts[p] = start
            start += -(-p.numel() // ELEMENTS_PER_CALL) * ELEMENTS_PER_CALL

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what the closure returns, if one is given.

        Does not wait for the device. Raises on sparse gradients and on gradients that are not float32 or bfloat16.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates, counters = self._gather()
        if not counters:
            return loss
        factor, skip = self._factor_and_skip([update.grads for update, _ in updates], counters[0].device)
        on_device = {factor.device: (factor, skip)}
        for counter in counters:
            device = counter.device
            if device not in on_device:
                on_device[device] = factor.to(device, non_blocking=True), skip.to(device, non_blocking=True)
            counter.add_(1 - on_device[device][1])
        for update, backend in updates:
            backend.forward(update, *on_device[update.step.device])
        return loss

    def _gather(self) -> tuple[list[tuple[Update, Backend]], list[Tensor]]:
        """The updates of this step with their backends, and the step counters that they share."""
        updates, counters = [], []
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            self._check_gradients(params)
            self._initialise(group, params)
            counters += self._share_counters(group, params)
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in params:
                if p.numel() > 0:
                    alike[p.device, p.dtype, p.grad.dtype, id(self.state[p]["step"])].append(p)
            for (device, dtype, grad_dtype, _), members in alike.items():
                states = [self.state[p] for p in members]
                update = Update(
                    params=members,
                    masters=[s["master"] for s in states] if "master" in states[0] else None,
                    grads=[p.grad for p in members if p.grad is not None],
                    moments=tuple([s[name] for s in states] for name in self.moments),
                    starts=[self._starts[p] for p in members],
                    step=states[0]["step"],
                    group=group,
                    seed=self.seed,
                )
                key = (self.table.op, number, device, dtype, grad_dtype)
                if key not in self._backends:
                    self._backends[key] = self.table.choose(update)
                updates.append((update, self._backends[key]))
        return updates, counters

    def _check_gradients(self, params: list[Tensor]) -> None:
        for p in params:
            grad = p.grad
            assert grad is not None
            if grad.layout != torch.strided:
                raise RuntimeError(f"{self._name(p)} has a {grad.layout} gradient: expected a dense one")
            if grad.dtype not in PARAMETER_DTYPES:
                raise RuntimeError(f"{self._name(p)} has a {grad.dtype} gradient: expected float32 or bfloat16")

    def _initialise(self, group: dict[str, Any], params: list[Tensor]) -> None:
        new = [p for p in params if not self.state[p]]
        counters: dict[torch.device, Tensor] = {}
        for p in new:
            if p.device not in counters:
                counters[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
            self.state[p] = {"step": counters[p.device]}
            for name in self.moments:
                self.state[p][name] = torch.zeros(p.shape, dtype=STATE_DTYPES[group["state_dtype"]], device=p.device)
            if _has_master(group, p):
                self.state[p]["master"] = _master_of(p)

    def _share_counters(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The distinct step counters of these parameters, none of them shared with a parameter without a gradient.

        Parameters that are stepped together have one tensor as their counter, so that bias corrections are computed
        once; parameters left out of a step part from the others.
        """
        counters = {id(self.state[p]["step"]): self.state[p]["step"] for p in params}
        left_out = {id(self.state[p]["step"]) for p in group["params"] if p.grad is None and self.state.get(p)}
        for shared in left_out & counters.keys():
            fresh = counters.pop(shared).clone()
            counters[id(fresh)] = fresh
            for p in params:
                if id(self.state[p]["step"]) == shared:
                    self.state[p]["step"] = fresh
        return list(counters.values())

    def _factor_and_skip(self, grads: list[list[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """What gradients are multiplied by and whether (1 or 0) nothing may change; both () fp32 on the device."""
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for some in grads:
            by_device[some[0].device] += some
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for place, some in by_device.items():
            key = (GRAD_NORM.op, place)
            if key not in self._backends:
                self._backends[key] = GRAD_NORM.choose(some)
            squares = squares + self._backends[key].forward(some).to(device, non_blocking=True)
        # GradScaler's attributes exist during its step only; it multiplies into `grad_scale` where there is one.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = squares.sqrt()
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
            norm = norm / grad_scale
        norm = norm.float()
        skip = ~norm.isfinite()
        if found_inf is not None:
            skip = skip | (found_inf.to(device, non_blocking=True) != 0)
        factor = torch.ones((), dtype=torch.float32, device=device)
        if self.max_grad_norm is not None:
            # A tensor over a tensor: PyTorch computes a number over a tensor as its product with the reciprocal.
            factor = (torch.full_like(norm, self.max_grad_norm) / (norm + CLIP_EPS)).clamp(max=1.0)
        if grad_scale is not None:
            factor = factor / grad_scale
        if self.grad_norm.device != device:  # the model was moved after the optimizer was made
            self.grad_norm, self.skipped_steps = self.grad_norm.to(device), self.skipped_steps.to(device)
        self.grad_norm.copy_(norm)
        self.skipped_steps.add_(skip)
        return factor.float(), skip.float()

    @property
    def backends(self) -> dict[str, str]:
        """What was chosen so far, e.g. {"adamw, group 0, cuda:0, float32, gradients bfloat16": "torch"}."""
        names = {}
        for (op, *where), backend in self._backends.items():
            if where[1:]:
                number, device, dtype, grad_dtype = where
                short = [str(x).removeprefix("torch.") for x in (dtype, grad_dtype)]
                names[f"{op}, group {number}, {device}, {short[0]}, gradients {short[1]}"] = backend.name
            else:
                names[f"{op}, {where[0]}"] = backend.name
        return names

    # State

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`. Every parameter gets a step counter of its own; other tensors are the
        optimizer's, not copies."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in state_dict["state"].items()
        }
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and group options; tensors are copied, to the parameters' devices.

        Moments are stored in this optimizer's `state_dtype`, whatever dtype the parameters have; a master copy that the
        dictionary lacks is made from the parameter, so load the model's parameters first. Also takes the dictionary of
        the optimizer of `torch.optim` with the same name.

        Raises ValueError, naming the parameter, where shapes or entries do not fit; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = self._loaded_groups(state_dict["param_groups"])
        ids = [i for saved in state_dict["param_groups"] for i in saved["params"]]
        places = [(group, p) for group in groups for p in group["params"]]
        unknown = [i for i in state_dict["state"] if i not in ids]
        if unknown:
            raise ValueError(f"the state dict has state for {unknown}, which is in none of its parameter groups")
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        counters: dict[tuple[int, torch.device, float], Tensor] = {}
        for i, (group, p) in zip(ids, places, strict=True):
            if not state_dict["state"].get(i):
                continue
            state[p] = self._loaded_state(group, p, state_dict["state"][i])
            step = state[p]["step"]
            state[p]["step"] = counters.setdefault((id(group), p.device, step.item()), step)
        self.state, self.param_groups = state, groups
        self._backends.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes, saved_sizes = ([len(g["params"]) for g in groups] for groups in (self.param_groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(
                f"the state dict has parameter groups of {saved_sizes} parameters, this optimizer has groups of {sizes}"
            )
        loaded = []
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            self._check_foreign(saved)
            options = {k: deepcopy(v) for k, v in saved.items() if k not in ("params", *self.foreign_options)}
            kept = {k: group[k] for k in ("params", *STORAGE_OPTIONS)}
            loaded.append({**group, **options, **kept})
            self._check_options(loaded[-1])
        return loaded

    def _check_foreign(self, saved: dict[str, Any]) -> None:
        """Raise where another implementation's group has options that this one does not implement."""

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
        known = ("step", "master", *self.moments)
        missing = [name for name in ("step", *self.moments) if name not in saved]
        surplus = [name for name in saved if name not in known]
        if missing or surplus:
            raise ValueError(f"state of {self._name(p)} has the entries {list(saved)}: expected {', '.join(known)}")
        if "master" in saved and not _has_master(group, p):
            raise ValueError(
                f"state of {self._name(p)} has a master copy, which this optimizer would drop: load the master into a "
                "float32 parameter and delete it from the state, or use bfloat16 parameters with master='float32'"
            )
        step = torch.as_tensor(saved["step"]).detach()
        state = {"step": step.to(p.device, torch.float32, copy=True).reshape(())}
        dtypes = dict.fromkeys(self.moments, STATE_DTYPES[group["state_dtype"]])
        if _has_master(group, p):
            dtypes["master"] = torch.float32
        for name, dtype in dtypes.items():
            if name not in saved:  # the master
                state[name] = _master_of(p)
                continue
            if saved[name].shape != p.shape:
                raise ValueError(
                    f"state of {self._name(p)}: {name} has shape {tuple(saved[name].shape)}, expected {tuple(p.shape)}"
                )
            copied = saved[name].detach().to(p.device, dtype, copy=True, memory_format=torch.contiguous_format)
            state[name] = copied
        return state

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "seed", "grad_norm", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._backends = {}
        self._number_elements()


def _has_master(group: dict[str, Any], p: Tensor) -> bool:
    return group["master"] == "float32" and p.dtype != torch.float32


def _master_of(p: Tensor) -> Tensor:
    return p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
