"""What all optimizers share: groups, clipping, the finite check, skipping, state dictionaries.

A step is one reduction over all gradients (the norm, which also is the finite check) and then one update a group,
device and storage. The update rule is a table of backends that a subclass names; it gets an `Update` and two device
scalars, the factor that gradients are multiplied by and whether to skip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import checks, clipping, sharding
from hotloop.kernels.optimizers import state as states
from hotloop.kernels.optimizers.philox import ELEMENTS_PER_CALL
from hotloop.kernels.optimizers.quantised import SCALE_SUFFIX, UNSIGNED_MOMENTS
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# How things are stored is the choice of the optimizer that loads a state dictionary, not of the one that saved it.
STORAGE_OPTIONS = ("state_dtype", "master", "rounding")


class BaseOptimizer(torch.optim.Optimizer):
    """Common part of the optimizers; see `AdamW` for the meaning of the options.

    A subclass names its backends in `table`, its moments in `moments` (keys of the state dictionary), and options of
    other implementations that a loaded state dictionary may carry in `foreign_options`. Where groups differ in rule or
    moments it overrides `_table_of` and `_moments_of`.
    """

    table: ClassVar[Table]
    moments: ClassVar[tuple[str, ...]]
    foreign_options: ClassVar[tuple[str, ...]] = ()

    # GradScaler then sets `grad_scale` and `found_inf` before `step` and deletes them after it.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        seed: int,
        check_finite: bool = True,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm = {max_grad_norm}: expected a number greater than 0, or None not to clip")
        if not (isinstance(seed, int) and 0 <= seed < 1 << 64):
            raise ValueError(f"seed = {seed!r}: expected an integer from 0 to 2^64 - 1")
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.check_finite = check_finite
        self._backends: dict[tuple[Any, ...], Backend] = {}
        self._tables = DeviceTables()
        super().__init__(params, defaults)
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    def _table_of(self, group: dict[str, Any]) -> Table:
        return self.table

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments

    def _is_collective(self, group: dict[str, Any]) -> bool:
        """Whether the rule communicates, so that every rank takes part, whether or not it has rows of a parameter."""
        return False

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
            checks.check_parameter(name, p)
            if p in seen:
                raise ValueError(f"{name} is the same tensor as {seen[p]}: give a tied parameter once")
            seen[p] = name
        group = {**param_group, "params": params}
        self._check_options({**self.defaults, **group})
        super().add_param_group(group)
        self._number_elements()

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise on options that no step could use. A subclass adds its own."""
        checks.check_options(group)

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
            self._starts[p] = start + sharding.first_row(p) * sharding.row_size(p)
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
        self._update([p for p in self._parameters() if p.grad is not None])
        return loss

    def step_in_backward(self) -> list[RemovableHandle]:
        """From now on update each parameter as soon as its gradient is complete, and free the gradient.

        The backward pass then holds one gradient at a time. Each parameter is a step of its own: its finite check and
        its count are its own, and `step` finds nothing to do. Gradients cannot be accumulated over backward passes.
        Raises ValueError where gradients are clipped: the norm over all of them is known after the last. Returns the
        handles of the hooks; removing them all ends it.

        >>> optimizer.step_in_backward()
        >>> loss.backward()                                       # updates the parameters
        """
        self._check_no_clipping()

        def update(p: Tensor) -> None:
            self._check_no_clipping()
            with torch.no_grad():
                self._update([p])
            p.grad = None

        return [p.register_post_accumulate_grad_hook(update) for p in self._parameters()]

    def _check_no_clipping(self) -> None:
        if self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm = {self.max_grad_norm} with step_in_backward: the norm over all gradients is not known "
                "before the backward pass has ended; use max_grad_norm=None, or call step()"
            )

    def _update(self, params: list[Tensor]) -> None:
        """One step of the parameters, all of which have a gradient."""
        self._check_gradients(params)
        updates, counters = self._gather(params)
        if not counters:
            return
        factor, skip = self._factor_and_skip(params, counters[0].device)
        on_device = {factor.device: (factor, skip)}
        for counter in counters:
            device = counter.device
            if device not in on_device:
                on_device[device] = factor.to(device, non_blocking=True), skip.to(device, non_blocking=True)
            counter.add_(1 - on_device[device][1])
        for update, backend in updates:
            backend.forward(update, *on_device[update.device])

    def _gather(self, params: list[Tensor]) -> tuple[list[tuple[Update, Backend]], list[Tensor]]:
        """The updates of this step with their backends, and the step counters that they share."""
        updates, counters, stepped = [], [], set(params)
        for number, group in enumerate(self.param_groups):
            members = [p for p in group["params"] if p in stepped]
            self._initialise(group, members)
            counters += self._share_counters(group, members)
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in members:
                if p.numel() > 0 and (self._is_collective(group) or sharding.local(p).numel() > 0):
                    assert p.grad is not None
                    storage = p.device, p.dtype, p.grad.dtype, states.moment_dtype(group, p), sharding.layout(p)
                    alike[(*storage, id(self.state[p]["step"]))].append(p)
            for (device, dtype, grad_dtype, *_), members in alike.items():
                update = self._update_of(group, members)
                table = self._table_of(group)
                key = (table.op, number, device, dtype, grad_dtype, update.quantised)
                if key not in self._backends:
                    self._backends[key] = table.choose(update)
                updates.append((update, self._backends[key]))
        return updates, counters

    def _update_of(self, group: dict[str, Any], members: list[Tensor]) -> Update:
        kept, names = [self.state[p] for p in members], self._moments_of(group)
        has_scales = any(name + SCALE_SUFFIX in kept[0] for name in names)
        return Update(
            tensors=members,
            params=[sharding.local(p) for p in members],
            masters=[sharding.local(s["master"]) for s in kept] if "master" in kept[0] else None,
            grads=[sharding.local(p.grad) for p in members],
            moments=tuple([sharding.local(s[name]) for s in kept] for name in names),
            scales=tuple([sharding.local(s[name + SCALE_SUFFIX]) for s in kept] for name in names)
            if has_scales
            else (),
            unsigned=tuple(name in UNSIGNED_MOMENTS for name in names),
            rows=[sharding.row_size(p) for p in members],
            starts=[self._starts[p] for p in members],
            step=kept[0]["step"],
            group=group,
            seed=self.seed,
            tables=self._tables,
        )

    def _check_gradients(self, params: list[Tensor]) -> None:
        for p in params:
            grad = p.grad
            assert grad is not None
            if grad.layout != torch.strided:
                raise RuntimeError(f"{self._name(p)} has a {grad.layout} gradient: expected a dense one")
            if grad.dtype not in checks.DTYPES:
                raise RuntimeError(f"{self._name(p)} has a {grad.dtype} gradient: expected float32 or bfloat16")
            if sharding.layout(grad) != sharding.layout(p):
                raise RuntimeError(
                    f"{self._name(p)} has a gradient placed as {sharding.layout(grad)}: expected {sharding.layout(p)}"
                )

    def _initialise(self, group: dict[str, Any], params: list[Tensor]) -> None:
        counters: dict[torch.device, Tensor] = {}
        for p in params:
            state = self.state[p]
            if "step" not in state:
                if p.device not in counters:
                    counters[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = counters[p.device]
                if states.has_master(group, p):
                    state["master"] = states.new_master(p)
            for name in self._moments_of(group):
                if name not in state:
                    state |= states.new_moment(group, p, name)

    def _share_counters(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The distinct step counters of these parameters, none of them shared with a parameter that is not among them.

        Parameters that are stepped together have one tensor as their counter, so that bias corrections are computed
        once; parameters left out of a step part from the others.
        """
        counters = {id(self.state[p]["step"]): self.state[p]["step"] for p in params}
        stepped = set(params)
        left_out = {id(self.state[p]["step"]) for p in group["params"] if p not in stepped and self.state.get(p)}
        for shared in left_out & counters.keys():
            fresh = counters.pop(shared).clone()
            counters[id(fresh)] = fresh
            for p in params:
                if id(self.state[p]["step"]) == shared:
                    self.state[p]["step"] = fresh
        return list(counters.values())

    def _factor_and_skip(self, params: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """What gradients are multiplied by and whether (1 or 0) nothing may change; both () fp32 on the device."""
        # GradScaler's attributes exist during its step only; it multiplies into `grad_scale` where there is one.
        grad_scale, found_inf = (sharding.local(getattr(self, name, None)) for name in ("grad_scale", "found_inf"))
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        factor = torch.ones((), dtype=torch.float32, device=device)
        skip = torch.zeros((), dtype=torch.bool, device=device)
        if self.grad_norm.device != device:  # the model was moved after the optimizer was made
            self.grad_norm, self.skipped_steps = self.grad_norm.to(device), self.skipped_steps.to(device)
        if self.check_finite or self.max_grad_norm is not None:
            norm = clipping.sum_of_squares(params, device, self._backends, self._tables).sqrt()
            norm = (norm if grad_scale is None else norm / grad_scale).float()
            skip = ~norm.isfinite()
            self.grad_norm.copy_(norm)
        if found_inf is not None:
            skip = skip | (found_inf.to(device, non_blocking=True) != 0)
        if self.max_grad_norm is not None:
            # A tensor over a tensor: PyTorch computes a number over a tensor as its product with the reciprocal.
            factor = (torch.full_like(norm, self.max_grad_norm) / (norm + clipping.EPS)).clamp(max=1.0)
        if grad_scale is not None:
            factor = factor / grad_scale
        self.skipped_steps.add_(skip)
        return factor.float(), skip.float()

    @property
    def backends(self) -> dict[str, str]:
        """What was chosen so far, e.g. {"adamw, group 0, cuda:0, float32, gradients bfloat16": "torch"}."""
        names = {}
        for (op, *where), backend in self._backends.items():
            if where[1:]:
                number, device, dtype, grad_dtype, quantised = where
                short = [str(x).removeprefix("torch.") for x in (dtype, grad_dtype)]
                moments = ", 8-bit moments" if quantised else ""
                names[f"{op}, group {number}, {device}, {short[0]}, gradients {short[1]}{moments}"] = backend.name
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
            state[p] = states.loaded(group, p, self._name(p), self._moments_of(group), state_dict["state"][i])
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

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "seed", "check_finite", "grad_norm", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._backends, self._tables = {}, DeviceTables()
        self._number_elements()
