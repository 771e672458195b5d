"""Numbers that a launch reads from memory: the addresses and sizes of its tensors, and the chunks they are cut into.

One launch updates any number of tensors. It finds them in a table of COLUMNS numbers a tensor and takes its work from a
list of chunks of 64K elements, both int64. On a GPU a table is copied again only when one of its numbers changes, and
what a captured graph reads stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers.quantised import BLOCK
from hotloop.kernels.optimizers.update import Update

# param, master, grad, moments[2], scales[2]: addresses, 0 where there is none. Then numel; row: elements after which a
# block of 8-bit moments ends, numel where moments are not 8-bit; start: logical index of the first element.
COLUMNS = 10
CHUNK = 65_536


def rows_of(update: Update, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[int]:
    """The table of an update, row after row. params, grads: contiguous."""
    none = [0] * len(params)
    columns = [addresses(params), none if update.masters is None else addresses(update.masters), addresses(grads)]
    for kept in (update.moments, update.scales):
        columns += [addresses(xs) for xs in kept] + [none] * (2 - len(kept))
    sizes = [p.numel() for p in params]
    columns += [sizes, update.rows if update.quantised else sizes, update.starts]
    return [x for row in zip(*columns, strict=True) for x in row]


def chunks_of(table: Sequence[int]) -> list[int]:
    """(tensor, first block) of each chunk: a chunk is 256 blocks, a block up to 256 elements of one row."""
    found = []
    for tensor, at in enumerate(range(0, len(table), COLUMNS)):
        numel, row = table[at + 7], table[at + 8]
        for first in range(0, numel // row * -(-row // BLOCK), CHUNK // BLOCK):
            found += [tensor, first]
    return found


def gradient_rows(grads: Sequence[Tensor], types: dict[torch.dtype, int]) -> list[int]:
    """(address, elements, type) of each gradient. grads: contiguous."""
    return [x for g in grads for x in (g.data_ptr(), g.numel(), types[g.dtype])]


def gradient_chunks(grads: Sequence[Tensor]) -> list[int]:
    """(gradient, first element) of each chunk."""
    return [x for i, g in enumerate(grads) for begin in range(0, g.numel(), CHUNK) for x in (i, begin)]


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


class DeviceTables:
    """Tables on devices, by what they are for. Belongs to an optimizer."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[tuple[int, ...], Tensor]] = {}
        self._captured: list[Tensor] = []  # what graphs read, and the pinned memory that their copies read

    def get(self, purpose: Any, numbers: Sequence[int], device: torch.device) -> Tensor:
        """(N,) int64 on the device."""
        numbers = tuple(numbers)
        known, table = self._kept.get((purpose, device), (None, None))
        if table is None or known != numbers:
            table = torch.tensor(numbers, dtype=torch.int64)
            if device.type == "cuda":
                host = table.pin_memory()
                table = host.to(device, non_blocking=True)
                if torch.cuda.is_current_stream_capturing():
                    self._captured.append(host)
            self._kept[purpose, device] = numbers, table
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(table)
        return table
