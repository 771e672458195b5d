"""`hotloop tune`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hotloop.engine.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Tune:
    """Measure launch configurations of an op's Triton kernels on this GPU, and remember the fastest.

    Examples:
      hotloop tune attention
      hotloop tune attention --head-dims 64 128 --dtype float32

    Takes minutes for each head_dim, most of which is compilation. What it finds is written to the user's cache folder,
    for this model of GPU and version of Triton, and used by later processes.
    """

    op: Annotated[Literal["attention"], tyro.conf.Positional]
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dimensions to measure; each serves those that its tiles are padded for."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """bfloat16 and float16 share their entries."""
    device: int = 0
    """Number of the GPU."""

    def __call__(self) -> int:
        import torch

        if not torch.cuda.is_available():
            raise UserError("hotloop tune measures on a GPU, and this machine has none that PyTorch can use")
        if not 0 <= self.device < torch.cuda.device_count():
            raise UserError(f"--device {self.device}: this machine has {torch.cuda.device_count()} GPU(s)")
        from hotloop.kernels.attention import tune

        device = torch.device("cuda", self.device)
        path = tune.path_of(device)
        for D in self.head_dims:
            dtype = getattr(torch, self.dtype)
            for key, tile, time, before in tune.tune(device, dtype, D, timer(device)):
                print(f"{key}: {time:.3f} ms, {before / time:.2f} times as fast as before, {tile}", flush=True)
                tune.remember(path, {key: tile})
        print(f"written to {path}")
        return 0


def timer(device: Any) -> Callable[[Callable[[], Any]], float]:
    """Milliseconds of a call: the median of 20 by events, after one that compiles."""
    import torch

    def measure(call: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            call()
            times = []
            for _ in range(20):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        return sorted(times)[10]

    return measure
