"""FLOPs by the formulas against FLOPs counted by torch, and measured peaks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hotloop.engine.config import ModelConfig
from hotloop.engine.model import Transformer
from hotloop.engine.train import throughput
from hotloop.engine.train.throughput import (
    Throughput,
    matmul_parameters,
    measure_copy_bandwidth,
    measure_matmul_peak,
    memory_mb,
    step_flops,
)

CONFIGS = {
    "llama": ModelConfig(context=12, vocab_size=70, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2),
    "gpt2": ModelConfig(
        context=12, vocab_size=64, n_layers=3, d_model=16, n_heads=2, activation="gelu", positions="learned",
        norm="layer", bias=True, tied_head=False,
    ),
    "encoder": ModelConfig(context=12, vocab_size=65, n_layers=1, d_model=24, n_heads=3, d_ff=40, causal=False),
    "qwen3": ModelConfig(context=12, vocab_size=70, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=16),
    "modernbert": ModelConfig(
        context=12, vocab_size=70, n_layers=2, d_model=32, n_heads=4, activation="geglu", causal=False, head="masked",
    ),
}  # fmt: skip


def counted_flops(config: ModelConfig, lengths: list[int], *, masked: bool) -> int:
    """FLOPs that torch counts in a forward and backward pass of a plain model over one pack of pieces.

    Unmasked attention is one product over the whole pack. Masked, every query meets just the keys that it may see, one
    small product each: slow, and independent of the formula.
    """
    D, C, T = config.d_model, config.head_dim or config.d_model // config.n_heads, sum(lengths)
    H, Hk = config.n_heads, config.n_kv_heads or config.n_heads
    gated = config.activation in ("swiglu", "geglu")
    width = config.d_ff or (64 * -(-8 * D // (3 * 64)) if gated else 4 * D)
    assert config.vocab_size is not None
    embedding = torch.randn(config.vocab_size, D, requires_grad=True)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (H, n, C) each
        return (q @ k.mT / C**0.5).softmax(-1) @ v

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not masked:
            return attend(q, k, v)
        outputs = []
        for start, end in pairwise(starts):
            for i in range(start, end):
                seen = slice(start, i + 1 if config.causal else end)
                outputs.append(attend(q[:, i : i + 1], k[:, seen], v[:, seen]))
        return torch.cat(outputs, dim=1)

    def linear(x: Tensor, n: int) -> Tensor:
        return nn.Linear(x.shape[-1], n, bias=config.bias)(x)

    with FlopCounterMode(display=False) as counter:
        x = F.embedding(torch.randint(config.vocab_size, (T,)), embedding)
        for _ in range(config.n_layers):
            h = F.rms_norm(x, (D,))
            q = linear(h, H * C).view(T, H, C).transpose(0, 1)
            k, v = (linear(h, Hk * C).view(T, Hk, C).transpose(0, 1) for _ in range(2))
            o = attention(q, k.repeat_interleave(H // Hk, 0), v.repeat_interleave(H // Hk, 0))
            x = x + linear(o.transpose(0, 1).reshape(T, H * C), D)
            h = F.rms_norm(x, (D,))
            up = F.silu(linear(h, width)) * linear(h, width) if gated else F.gelu(linear(h, width))
            x = x + linear(up, D)
        h = F.rms_norm(x, (D,))
        h = linear(h, D) if config.head == "masked" else h
        (h @ embedding.mT).logsumexp(-1).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_palm_flops_are_those_of_full_attention(name: str) -> None:
    config = CONFIGS[name]
    assert step_flops(config, 12).palm == counted_flops(config, [12], masked=False)
    # A shorter pack than the model's context, three times.
    assert step_flops(config, 27, context=9).palm == 3 * counted_flops(config, [9], masked=False)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [(name, lengths) for name in ("llama", "gpt2", "encoder") for lengths in ([12], [1, 7, 4], [1] * 12, [3, 3])]
    + [(name, [1, 7, 4]) for name in ("qwen3", "modernbert")],  # the masks are those of the others
)
def test_exact_flops_are_those_that_the_masks_leave(name: str, lengths: list[int]) -> None:
    config = CONFIGS[name]
    squares = sum(n * n for n in lengths)
    flops = step_flops(config, sum(lengths), sum_squares=squares)
    assert flops.exact == counted_flops(config, lengths, masked=True)
    assert flops.exact <= step_flops(config, sum(lengths)).exact  # without the lengths: a bound
    assert step_flops(config, 12).exact == counted_flops(config, [12], masked=True)


def test_local_layers_and_the_head_count_what_they_see() -> None:
    """A local layer: at most the window a token. A masked model's head: the hidden tokens only."""
    config = CONFIGS["modernbert"]
    whole, local = (step_flops(c, 24, sum_squares=2 * 12**2) for c in (config, replace(config, local_window=2)))
    assert whole.exact == local.exact  # every layer is global
    local = step_flops(replace(config, local_window=2, global_every=2), 24, sum_squares=2 * 12**2)
    pairs = sum(len(range(max(0, i - 2), min(12, i + 3))) for i in range(12)) * 2
    saved = 12 * 32 * (2 * 12**2 - pairs)
    assert 0 < whole.exact - local.exact <= saved  # a bound: the ends of a piece see less
    hidden = step_flops(config, 24, sum_squares=2 * 12**2, head_tokens=5)
    assert whole.exact - hidden.exact == 6 * (70 * 32 + 32 * 32) * 19
    rates = Throughput(config, torch.float32, "cpu", context=12)
    row = rates.of_step(0.5, tokens=24, supervised=5, positions=24, sum_squares=2 * 12**2)
    assert row["mfu"] == pytest.approx(hidden.exact / (0.5 * rates.peak.rate))


@pytest.mark.parametrize("name", CONFIGS)
def test_matmul_parameters_are_those_of_the_model(name: str) -> None:
    model = Transformer(CONFIGS[name])
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head")
    assert matmul_parameters(CONFIGS[name]) == linear + model.head_weight.numel()


def test_matmul_parameters_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"config\.vocab_size: got None"):
        matmul_parameters(ModelConfig())


def test_of_step() -> None:
    rates = Throughput(CONFIGS["llama"], torch.float32, "cpu", context=12, world_size=2)
    row = rates.of_step(0.5, tokens=90, supervised=60, positions=96, sum_squares=500)
    flops = step_flops(CONFIGS["llama"], 90, context=12, sum_squares=500)
    assert (row["tokens_per_second"], row["supervised_per_second"]) == (180.0, 120.0)
    assert (row["tokens"], row["supervised"]) == (90, 60)
    assert row["padding_share"] == pytest.approx(6 / 96)
    assert row["mfu"] == pytest.approx(flops.exact / (0.5 * 2 * rates.peak.rate))
    assert row["mfu_palm"] == pytest.approx(flops.palm / (0.5 * 2 * rates.peak.rate))
    assert 0 < row["mfu"] < row["mfu_palm"] < 1


def test_the_matmul_peak_is_the_median_of_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only a product moves: 2 n^3 FLOPs at 50 GFLOP/s, one in three of them ten times slower."""
    now, calls = [0.0], [0]
    mm = torch.mm

    def timed(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        calls[0] += 1
        now[0] += 2 * a.shape[0] ** 3 / 50e9 * (10 if calls[0] % 3 == 0 else 1)
        return mm(a[:1], b, out=out[:1])

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", timed)
    peak = measure_matmul_peak("cpu", torch.float32, seconds=1.0)
    assert peak.rate == pytest.approx(50e9)
    assert peak.samples >= 3
    assert peak.workload.startswith("mm ")
    assert peak.workload.endswith(" float32")
    assert now[0] < 1.5


def test_peaks_of_this_machine() -> None:
    peak = measure_matmul_peak("cpu", torch.float32, seconds=0.3)
    copy = measure_copy_bandwidth("cpu", size=1 << 26, seconds=0.1)
    assert 1e8 < peak.rate < 1e15
    assert 1e8 < copy.rate < 1e14
    assert copy.workload == "copy of 64 MiB"


def test_the_clock_of_a_copy_counts_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_sample", lambda run, device, seconds: [0.25, 0.5, 9.0])
    assert measure_copy_bandwidth("cpu", size=1 << 20).rate == 2 * (1 << 20) / 0.5


def test_memory_is_the_peak_of_this_process(tmp_path: Path) -> None:
    """In a process of its own: what it reports covers what it held, also when that is gone, and not its parent's."""
    script = (
        "from hotloop.engine.train.throughput import memory_mb\n"
        "before = memory_mb('cpu')\n"
        "data = bytearray(b'x') * 300_000_000\n"
        "held = memory_mb('cpu')\n"
        "del data\n"
        "print(before, held, memory_mb('cpu'))\n"
    )
    ballast = bytearray(b"x") * 900_000_000
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    assert memory_mb("cpu") > len(ballast) / 1e6
    before, held, after = map(float, done.stdout.split())
    assert before < len(ballast) / 1e6
    assert before + 250 < held < before + 350
    assert abs(after - held) < 20  # the kernel counts pages in batches
