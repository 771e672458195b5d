"""The state of a parameter: how it is made, how it is stored, how it comes from another optimizer's dictionary.

Entries: `step` () fp32; each moment in the group's `state_dtype` and in the parameter's shape; for 8-bit moments also
`<moment>_scale`, fp32 (rows, blocks); `master`, fp32. All but `step` are sharded as the parameter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import quantised, sharding
from hotloop.kernels.optimizers.quantised import SCALE_SUFFIX, UNSIGNED_MOMENTS

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}

State = dict[str, Tensor]


def has_master(group: dict[str, Any], p: Tensor) -> bool:
    return group["master"] == "float32" and p.dtype != torch.float32


def is_quantised(group: dict[str, Any], p: Tensor) -> bool:
    return group["state_dtype"] == "int8" and quantised.is_quantised(p.numel(), sharding.row_size(p))


def moment_dtype(group: dict[str, Any], p: Tensor) -> torch.dtype:
    """int8 leaves small tensors in fp32."""
    if group["state_dtype"] == "int8" and not is_quantised(group, p):
        return torch.float32
    return STATE_DTYPES[group["state_dtype"]]


def new_moment(group: dict[str, Any], p: Tensor, name: str) -> State:
    """A moment of zeros."""
    dtype = moment_dtype(group, p)
    made = {name: sharding.like(p, lambda rows: torch.zeros(rows.shape, dtype=dtype, device=rows.device))}
    if is_quantised(group, p):
        blocks = quantised.blocks_of(sharding.row_size(p))
        made[name + SCALE_SUFFIX] = sharding.like(
            p, lambda rows: torch.zeros(rows.shape[0], blocks, dtype=torch.float32, device=rows.device)
        )
    return made


def new_master(p: Tensor) -> Tensor:
    return sharding.like(
        p, lambda rows: rows.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    )


def loaded(group: dict[str, Any], p: Tensor, name: str, moments: Sequence[str], saved: dict[str, Any]) -> State:
    """This rank's copy of what was saved of p, stored as the group says. name: p's, for errors.

    Raises ValueError where entries or shapes do not fit.
    """
    known = ("step", "master", *moments)
    saved = {entry: x for entry, x in saved.items() if x is not None}  # SGD without momentum has a buffer of None
    scales = [entry + SCALE_SUFFIX for entry in moments if entry + SCALE_SUFFIX in saved]
    missing = [entry for entry in moments if entry not in saved]
    if missing or [entry for entry in saved if entry not in (*known, *scales)]:
        raise ValueError(f"state of {name} has the entries {list(saved)}: expected {', '.join(known)}")
    if "master" in saved and not has_master(group, p):
        raise ValueError(
            f"state of {name} has a master copy, which this optimizer would drop: load the master into a "
            "float32 parameter and delete it from the state, or use bfloat16 parameters with master='float32'"
        )
    for entry in (*moments, "master"):
        if entry in saved and saved[entry].shape != p.shape:
            raise ValueError(
                f"state of {name}: {entry} has shape {tuple(saved[entry].shape)}, expected {tuple(p.shape)}"
            )
    step = sharding.local(torch.as_tensor(saved.get("step", 0.0))).detach()  # torch's SGD counts no steps
    state = {"step": step.to(p.device, torch.float32, copy=True).reshape(())}
    for entry in moments:
        state |= _loaded_moment(group, p, name, entry, saved)
    if has_master(group, p):
        state["master"] = _copied(p, saved["master"], torch.float32) if "master" in saved else new_master(p)
    return state


def _loaded_moment(group: dict[str, Any], p: Tensor, name: str, entry: str, saved: dict[str, Any]) -> State:
    row, unsigned, scale = sharding.row_size(p), entry in UNSIGNED_MOMENTS, saved.get(entry + SCALE_SUFFIX)
    if (scale is None) != (saved[entry].dtype != torch.uint8):
        how = "without" if scale is None else "with"
        raise ValueError(
            f"state of {name}: {entry} is {saved[entry].dtype} {how} {entry + SCALE_SUFFIX}: expected a float dtype "
            "without, or uint8 with it"
        )
    if scale is not None:
        expected = (p.shape[0], quantised.blocks_of(row)) if p.ndim else ()
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"state of {name}: {entry + SCALE_SUFFIX} has shape {tuple(scale.shape)}, expected {expected}"
            )
    to_codes = is_quantised(group, p)
    if (scale is not None) == to_codes:
        dtypes = {entry: moment_dtype(group, p), entry + SCALE_SUFFIX: torch.float32}
        return {e: _copied(p, saved[e], dtype) for e, dtype in dtypes.items() if e in saved}
    if scale is not None:
        codes, scale = (sharding.rows_of(x.detach(), p).to(p.device) for x in (saved[entry], scale))
        floats = quantised.dequantise(codes, scale, row, unsigned)
        return {entry: sharding.like(p, lambda _: floats.to(moment_dtype(group, p)))}
    x = sharding.rows_of(saved[entry].detach(), p).to(p.device, torch.float32).contiguous()
    codes, scale = quantised.quantise(x, row, unsigned)
    return {entry: sharding.like(p, lambda _: codes), entry + SCALE_SUFFIX: sharding.like(p, lambda _: scale)}


def _copied(p: Tensor, saved: Tensor, dtype: torch.dtype) -> Tensor:
    rows = sharding.rows_of(saved.detach(), p)
    return sharding.like(p, lambda _: rows.to(p.device, dtype, copy=True, memory_format=torch.contiguous_format))
