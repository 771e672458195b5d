"""One training step: GPT 6 x 384, context 256, 8 sequences; ours against plain PyTorch, eager and compiled.

    python benchmarks/bench_train_step.py --out benchmarks/results/train_step

prints a table and writes it beside the JSON of its rows. As part of `make bench` it is one benchmark per case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotloop.engine.config import Recipe, from_dict
from hotloop.engine.data.batches import Batch
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.throughput import measure_matmul_peak, step_flops
from hotloop.engine.train.training import Training

from harness import Row, gate, interleave, markdown, ratio, write
from peers.plain_gpt import PlainGPT, PlainStep

B, T, LAYERS, D, HEADS, LR = 8, 256, 6, 384, 6, 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# provider -> (precision, compiled). The same policy on both sides: parameters in the compute dtype, for bf16 with an
# fp32 master; beside them "autocast" (fp32 parameters), which is what people use today.
PLAIN = {
    "plain eager fp32": ("fp32", False), "plain compile fp32": ("fp32", True),
    "plain eager autocast": ("autocast", False), "plain compile autocast": ("autocast", True),
    "plain eager bf16": ("bf16", False), "plain compile bf16": ("bf16", True),
}  # fmt: skip
OURS = {
    "hotloop eager fp32": ("fp32", False), "hotloop compile fp32": ("fp32", True),
    "hotloop eager bf16": ("bf16", False), "hotloop compile bf16": ("bf16", True),
}  # fmt: skip


def batch_of(vocab: int) -> Batch:
    """Eight documents of exactly the context: the plain model has no packing to compare with."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (B, T + 1), generator=draw)
    return Batch(
        tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(),
        positions=torch.arange(T).expand(B, T).contiguous(),
        document_ids=torch.arange(B, dtype=torch.int32)[:, None].expand(B, T).contiguous(),
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32), n_supervised=B * T, n_tokens=B * T,
    ).to(DEVICE)  # fmt: skip


def weights_for(plain: PlainGPT) -> dict[str, torch.Tensor]:
    """The plain model's weights under our names."""
    names = {"ln_1": "attention_norm", "ln_2": "feed_forward_norm", "qkv": "attention.qkv", "proj": "attention.out",
             "fc": "feed_forward.up", "out": "feed_forward.down"}  # fmt: skip
    state = {}
    for name, tensor in plain.state_dict().items():
        first, *rest = name.split(".")
        if first == "blocks":
            number, module, kind = rest
            state[f"layers.{number}.{names[module]}.{kind}"] = tensor
        else:
            state[{"wte": "embedding", "wpe": "position_embedding", "ln_f": "final_norm"}[first] + f".{rest[0]}"] = (
                tensor
            )
    return state


def plain_model(vocab: int) -> PlainGPT:
    torch.manual_seed(0)
    model = PlainGPT(vocab, T, LAYERS, D, HEADS)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(DEVICE)


def our_step(vocab: int, precision: str, compiled: bool) -> Callable[[Batch], torch.Tensor]:
    recipe = from_dict(
        Recipe,
        {
            "model": {
                "context": T, "vocab_size": vocab, "n_layers": LAYERS, "d_model": D, "n_heads": HEADS, "bias": True,
                "positions": "learned", "norm": "layer", "activation": "gelu_tanh",
            },
            "optimizer": {"lr": LR, "weight_decay": 0.1, "decay_embeddings": True, "max_grad_norm": 1.0},
            "train": {"global_batch": B, "micro_batch": B, "precision": precision, "compile": compiled},
        },
    )  # fmt: skip
    training = Training(recipe, Ranks(0, 1, DEVICE))
    state = training.model.state_dict()
    for name, tensor in weights_for(plain_model(vocab)).items():
        state[name].copy_(tensor)
    return lambda batch: training.take_step([batch], batch.n_supervised, LR).loss


def run(vocab: int, policies: tuple[str, ...], rounds: int) -> tuple[list[Row], dict[str, list[float]]]:
    """Every provider of these policies on one vocabulary: gate, warm up, take turns."""
    batch = batch_of(vocab)
    steps: dict[str, Callable[[], Any]] = {}
    for name, (precision, compiled) in PLAIN.items():
        if precision in policies:
            plain = PlainStep(plain_model(vocab), precision, compiled, LR)
            steps[name] = lambda step=plain: step(batch.tokens, batch.targets)
    for name, (precision, compiled) in OURS.items():
        if precision in policies:
            ours = our_step(vocab, precision, compiled)
            steps[name] = lambda step=ours: step(batch)
    losses = {name: torch.stack([step() for _ in range(4)]).float() for name, step in steps.items()}
    for precision in policies:
        group = {name: loss for name, loss in losses.items() if {**PLAIN, **OURS}[name][0] == precision}
        gate(group, f"plain eager {precision}", 1e-5 if precision == "fp32" else 2e-3)
    times = interleave(steps, rounds)
    model = our_config(vocab)
    flops = step_flops(model, B * T, sum_squares=B * T * T).exact
    rows = []
    for name, milliseconds in times.items():
        dtype = torch.float32 if "fp32" in name else torch.bfloat16
        limit = measure_matmul_peak(DEVICE, dtype).rate
        rows.append(
            Row("train_step", name, "full", "V", "vocabulary", vocab, milliseconds, flops, "FLOP", limit,
                {"tokens_per_second": B * T / sorted(milliseconds)[len(milliseconds) // 2] * 1e3})
        )  # fmt: skip
    return rows, times


def our_config(vocab: int) -> Any:
    from hotloop.engine.config import ModelConfig

    return ModelConfig(context=T, vocab_size=vocab, n_layers=LAYERS, d_model=D, n_heads=HEADS, activation="gelu_tanh")


def bars(vocab: int, times: dict[str, list[float]]) -> list[tuple[str, float]]:
    """Ours against the same policy, eager and compiled: times faster."""
    return [
        (f"V {vocab} {precision} {mode}", ratio(times, f"plain {mode} {precision}", f"hotloop {mode} {precision}"))
        for precision in ("fp32", "bf16")
        for mode in ("eager", "compile")
        if f"hotloop {mode} {precision}" in times
    ]


@pytest.mark.parametrize("vocab", [4096, 50304])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_step(benchmark, vocab: int, precision: str) -> None:
    """Eager only, to stay short: the script has the compiled rows. Peers take their turns in the untimed set-up."""
    batch = batch_of(vocab)
    plain, ours = PlainStep(plain_model(vocab), precision, False, LR), our_step(vocab, precision, False)
    losses = {"ours": torch.stack([ours(batch) for _ in range(3)]).float()}
    losses["plain"] = torch.stack([plain(batch.tokens, batch.targets) for _ in range(3)]).float()
    gate(losses, "plain", 1e-5 if precision == "fp32" else 2e-3)
    peers: list[float] = []
    peer = {"plain": lambda: plain(batch.tokens, batch.targets)}
    benchmark.pedantic(
        lambda: ours(batch), setup=lambda: peers.extend(interleave(peer, 1)["plain"]), rounds=5, warmup_rounds=0
    )
    median = sorted(peers)[len(peers) // 2]
    benchmark.extra_info |= {"plain eager ms": median, "times faster": median / benchmark.stats["median"] / 1e3}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="file without suffix: .json and .md are written")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--vocab", type=int, nargs="+", default=[4096, 50304])
    options = arguments.parse_args()
    rows, found = [], []
    for vocab in options.vocab:
        for policies in (("fp32",), ("autocast", "bf16")):
            more, times = run(vocab, policies, options.rounds)
            rows += more
            found += bars(vocab, times)
            torch.compiler.reset()
    table = markdown(rows, found)
    print(table)
    if options.out:
        write(options.out, rows, table)


if __name__ == "__main__":
    main()
