"""Ranks of a run: started by torchrun, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hotloop.engine.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run. Every method is a no-op in a run of one process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over ranks. Small tensors travel together, in buckets of 64 MiB.

        The gradients are summed once per step, after accumulation, in the dtype they were accumulated in (fp32 for bf16
        parameters). DistributedDataParallel's buckets have the parameter's dtype and would round to bf16.
        """
        if self.world_size == 1:
            return
        works = []
        for bucket in _buckets(list(tensors), 64 << 20):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            works.append((dist.all_reduce(flat, async_op=True), flat, bucket))
        for work, flat, bucket in works:
            work.wait()
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (anything picklable) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. A UserError there is raised on every rank: the others would
        wait for rank 0 and bury its message under those of a broken connection."""
        if self.world_size == 1:
            return make()
        value, error = None, None
        if self.is_main:
            try:
                value = make()
            except UserError as refused:
                error = refused
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun's environment describes. `device` is auto, cpu or cuda."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=chosen if device == "cuda" else None)
    return Ranks(rank, world_size, chosen)


def _buckets(tensors: list[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors of one dtype, at most max_bytes together; a larger one travels alone."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + bytes_ > max_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += bytes_
    return buckets
