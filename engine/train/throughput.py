"""How much work a step is, and how much this machine can do: model FLOPs, measured peaks, memory.

L layers, D model width, Hq and Hk query and key heads of dimension C, F feed-forward width, V vocabulary, T context.
A product of (m, k) and (k, n) is 2 m n k FLOPs; the backward pass of a product is two such products. Model FLOPs count
what the mathematics needs: neither recomputation nor padding (of packs or of the vocabulary), no norm, no softmax.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from hotloop.engine.config import ModelConfig
from hotloop.engine.model import feed_forward_width, head_dimension, is_local


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of one optimizer step, counted in the two ways that are in use.

    palm: (6 N + 12 L Hq C T) per token, every token as if it attended to a full context (Chowdhery et al.,
    arXiv:2204.02311, appendix B). exact: only the pairs of query and key that the masks (causal, document) leave.
    """

    palm: int
    exact: int


def matmul_parameters(config: ModelConfig) -> int:
    """N: weights that multiply every token. The head counts, tied or not; look-ups, norms and biases do not."""
    head = head_parameters(config)
    D, F = config.d_model, feed_forward_width(config)
    C = head_dimension(config)
    kv_heads = config.n_kv_heads or config.n_heads
    attention = 2 * D * C * (config.n_heads + kv_heads)
    feed_forward = (3 if config.activation in ("swiglu", "geglu") else 2) * D * F
    return config.n_layers * (attention + feed_forward) + head


def head_parameters(config: ModelConfig) -> int:
    """Of these the language model's head."""
    if config.vocab_size is None:
        raise ValueError("head_parameters needs config.vocab_size: got None, expected the tokenizer's size")
    if config.n_labels:  # a classifier's is of one row a text, which is next to nothing
        return 0
    return config.vocab_size * config.d_model + (config.d_model**2 if config.head == "masked" else 0)


def step_flops(
    config: ModelConfig,
    tokens: int,
    *,
    context: int | None = None,
    sum_squares: int | None = None,
    head_tokens: int | None = None,
) -> StepFlops:
    """Model FLOPs of a forward and backward pass over `tokens` tokens without padding.

    context: T, the length of packs (default: the model's). sum_squares: the sum over the step's pieces of length^2
    (a piece is what attends within itself); without it each pack is taken as one piece of length T, an upper bound.
    head_tokens: those that reach the head (of a masked model the hidden ones); by default all.

    With pairs = sum n^2, or sum n (n + 1) / 2 when causal: exact = 6 N tokens + 12 L Hq C pairs. A local layer has at
    most 2 local_window + 1 pairs a token, or local_window + 1.
    """
    T = config.context if context is None else context
    squares = tokens * T if sum_squares is None else sum_squares
    pairs = (squares + tokens) // 2 if config.causal else squares
    idle = 0 if head_tokens is None else head_parameters(config) * (tokens - head_tokens)
    dense = 6 * (matmul_parameters(config) * tokens - idle)
    n_local = sum(is_local(config, layer) for layer in range(config.n_layers))
    window = (config.local_window or 0) * (1 if config.causal else 2) + 1
    layer_pairs = (config.n_layers - n_local) * pairs + n_local * min(pairs, window * tokens)
    per_pair = 12 * config.n_heads * head_dimension(config)
    return StepFlops(palm=dense + per_pair * config.n_layers * tokens * T, exact=dense + per_pair * layer_pairs)


class Throughput:
    """Rates of a step, against the matmul peak of this machine, which the first one in a process measures (a second).

    `context` is the length of packs; tokens of all ranks are given, so the peak counts `world_size` times.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        context: int | None = None,
        world_size: int = 1,
    ):
        self.config, self.device, self.context, self.world_size = config, torch.device(device), context, world_size
        self.peak = _peak(self.device, dtype, torch.get_num_threads())

    def of_step(
        self, seconds: float, *, tokens: int, supervised: float, positions: int, sum_squares: int | None = None
    ) -> dict[str, float]:
        """Fields of a train line. tokens, supervised, positions (tokens and padding) and sum_squares (see `step_flops`)
        are of the global batch. mfu is of the exact count, mfu_palm of the other."""
        head_tokens = int(supervised) if self.config.head == "masked" else None
        flops = step_flops(self.config, tokens, context=self.context, sum_squares=sum_squares, head_tokens=head_tokens)
        capacity = seconds * self.peak.rate * self.world_size
        return {
            "tokens": tokens,
            "supervised": supervised,
            "tokens_per_second": tokens / seconds,
            "supervised_per_second": supervised / seconds,
            "padding_share": 1 - tokens / positions,
            "mfu": flops.exact / capacity,
            "mfu_palm": flops.palm / capacity,
            "memory_mb": memory_mb(self.device),
        }


@cache
def _peak(device: torch.device, dtype: torch.dtype, n_threads: int) -> Peak:
    return measure_matmul_peak(device, dtype)


@dataclass(frozen=True)
class Peak:
    """A measured rate: FLOP/s or bytes/s, and what was run to measure it."""

    rate: float
    workload: str
    samples: int


def measure_matmul_peak(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 1.0) -> Peak:
    """FLOP/s of torch.mm on square matrices: for each size the median of some runs, and of these the highest.

    Sizes double from 256 until one product takes `seconds` / 32. Takes about `seconds`; never called in the loop.
    """
    device = torch.device(device)
    largest = 8192 if device.type == "cuda" else 4096
    best, size = Peak(0.0, "", 0), 256
    while True:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        times = _sample(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds / 8)  # type: ignore[misc]
        median = statistics.median(times)
        if (rate := 2 * size**3 / median) > best.rate:
            best = Peak(rate, f"mm {size} x {size} x {size} {str(dtype).removeprefix('torch.')}", len(times))
        # The next size has eight times the work, and takes at least four runs. Judged by the fastest sample: on a busy
        # machine the median of small products says how long threads wait for each other, which large ones hide.
        if size == largest or min(times) > seconds / 32:
            return best
        size *= 2


def measure_copy_bandwidth(device: torch.device | str, *, size: int = 1 << 28, seconds: float = 0.5) -> Peak:
    """Bytes/s of a copy, read and written bytes both counted; the buffers of `size` bytes exceed the caches."""
    device = torch.device(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = _sample(lambda: target.copy_(source), device, seconds)
    return Peak(2 * size / statistics.median(times), f"copy of {size >> 20} MiB", len(times))


def measure_update_bandwidth(device: torch.device | str, *, size: int = 1 << 28, seconds: float = 0.5) -> Peak:
    """Bytes/s of an update in place, read and written bytes both counted: no cache line is fetched only to be
    overwritten, so that more gets through than in a copy."""
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    times = _sample(lambda: x.mul_(1.0), torch.device(device), seconds)
    return Peak(2 * size / statistics.median(times), f"update in place of {size >> 20} MiB", len(times))


def memory_mb(device: torch.device | str) -> float:
    """Peak memory so far in MB (10^6 bytes): of torch's allocator on CUDA, else resident memory of this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "linux":
        # Not getrusage: its ru_maxrss survives exec, so a small process started by a large one reports the parent's.
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _sample(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Times of single runs after a warm-up: at least 3, at most 30, for about `seconds`."""
    run()
    if device.type != "cuda":
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or (len(times) < 30 and time.perf_counter() < end):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    once = max(time.perf_counter() - begin, 1e-6)
    count = max(3, min(30, int(seconds / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    stream = torch.cuda.current_stream(device)
    for event in events[:-1]:
        event.record(stream)
        run()
    events[-1].record(stream)
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
