"""Memory on the CPU: scratch that outlives a call, and large results.

PyTorch's CPU allocator gives large blocks back to the system, so that a fresh one is faulted in page by page: filling
412 MB takes 26 ms in memory that was used before and 250 ms in new memory (two cores, Linux), more than the arithmetic
that is done on it. Scratch is therefore kept: only what a kernel keeps to itself may live there, nothing that is handed
to the caller. Results are the caller's, from PyTorch's allocator; the system is asked to back large ones with huge
pages, as PyTorch itself asks for all of its memory where THP_MEM_ALLOC_ENABLE=1 is set (100 ms).
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

_threads = threading.local()


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
# What is larger than 32 MiB gets a mapping of its own from malloc, but for room that happens to be free elsewhere.
_OWN_MAPPING = 32 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for a result that is written whole."""
    x = torch.empty(shape, dtype=dtype, device=device)
    size = x.numel() * x.element_size()
    madvise = _madvise()
    if device.type == "cpu" and size > _OWN_MAPPING and madvise is not None:
        first = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        last = (x.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)  # advice: it may be refused
    return x


@cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, valid until the same thread asks for the same name again.

    On other devices than the CPU a fresh one: their allocators cache, and a captured graph must own its memory.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    kept: dict[str, Tensor] = _threads.__dict__
    size = math.prod(shape) * dtype.itemsize
    if name not in kept or kept[name].numel() < size:
        kept.pop(name, None)  # before the larger one is taken
        kept[name] = empty((size,), torch.uint8, device)
    return kept[name][:size].view(dtype).view(shape)


def release_workspaces() -> None:
    """Give back the memory that this thread's calls have kept."""
    _threads.__dict__.clear()
