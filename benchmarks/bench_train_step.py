"""One training step: a GPT of 6 layers x 384, context 256, 8 sequences, ours against plain PyTorch; and BERT on
documents of mixed length, masked and classified, against padded batches (see encoder_step.py).

    python benchmarks/bench_train_step.py --out benchmarks/results/train_step

Precision policies, the same on both sides: fp32, and bf16 (bf16 parameters and activations, fp32 masters and moments).
Beside them `autocast` (fp32 parameters, bf16 autocast), which is what most people use; ours has no such mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from encoder_step import encoder_cases
from torch import Tensor

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import Batch
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.engine.recipe import from_dict
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.throughput import step_flops
from hotloop.engine.train.training import Training

from harness.case import Case, Provider, Results, agrees_with
from harness.command import bench, ids, main
from harness.measure import device
from peers.plain_gpt import PlainGPT, PlainStep

B, T, LAYERS, D, HEADS, LR = 8, 256, 6, 384, 6, 1e-3
STEPS_OF_GATE = 3
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}  # of each loss, relative


def recipe_of(vocab: int, precision: str, compiled: bool) -> Recipe:
    return from_dict(
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


def batch_of(vocab: int) -> Batch:
    """Eight documents of exactly the context: the plain model has no packing to compare with."""
    tokens = torch.randint(vocab, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(),
        positions=torch.arange(T).expand(B, T).contiguous(),
        document_ids=torch.arange(B, dtype=torch.int32)[:, None].expand(B, T).contiguous(),
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32), n_supervised=B * T, n_tokens=B * T,
        sum_squares=B * T * T,
    ).to(device())  # fmt: skip


def plain_model(vocab: int) -> PlainGPT:
    torch.manual_seed(0)
    model = PlainGPT(vocab, T, LAYERS, D, HEADS)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device())


def our_names(plain: PlainGPT) -> dict[str, Tensor]:
    """The plain model's weights under our names."""
    modules = {"ln_1": "attention_norm", "ln_2": "feed_forward_norm", "qkv": "attention.qkv", "proj": "attention.out",
               "fc": "feed_forward.up", "out": "feed_forward.down"}  # fmt: skip
    outside = {"wte": "embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    renamed = {}
    for name, tensor in plain.state_dict().items():
        match name.split("."):
            case ["blocks", number, module, kind]:
                renamed[f"layers.{number}.{modules[module]}.{kind}"] = tensor
            case [module, kind]:
                renamed[f"{outside[module]}.{kind}"] = tensor
    return renamed


def provider(step: Callable[[], Tensor]) -> Provider:
    def results() -> Results:
        return tuple(step().float() for _ in range(STEPS_OF_GATE))

    return Provider(step, results)


def plain_provider(vocab: int, batch: Batch, precision: str, compiled: bool) -> Provider:
    step = PlainStep(plain_model(vocab), precision, compiled, LR)
    return provider(lambda: step(batch.tokens, batch.targets))


def our_provider(vocab: int, batch: Batch, precision: str, compiled: bool) -> Provider:
    training = Training(recipe_of(vocab, precision, compiled), Ranks(0, 1, device()), CausalObjective)
    weights = our_names(plain_model(vocab))
    own = training.model.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(f"the models differ in {sorted(own.keys() ^ weights.keys())}")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return provider(lambda: training.take_step([batch], batch.n_supervised, LR).loss)


def providers(vocab: int, precision: str, modes: tuple[str, ...]) -> dict[str, Callable[[], Provider]]:
    batch = batch_of(vocab)
    found: dict[str, Callable[[], Provider]] = {}
    for mode in modes:
        compiled = mode == "compile"
        found[f"hotloop {mode}"] = partial(our_provider, vocab, batch, precision, compiled)
        found[f"plain {mode}"] = partial(plain_provider, vocab, batch, precision, compiled)
        if precision == "bf16":
            found[f"plain {mode} autocast"] = partial(plain_provider, vocab, batch, "autocast", compiled)
    return found


def case_of(vocab: int, precision: str, modes: tuple[str, ...]) -> Case:
    model = recipe_of(vocab, precision, False).model
    pairs = tuple((f"hotloop {mode}", f"plain {mode}{end}") for mode in modes for end in ("", " autocast"))
    return Case(
        kernel_name="train_step", mode="full", x=("V", "vocabulary", vocab),
        config={"layers": LAYERS, "d_model": D, "heads": HEADS, "context": T, "tokens": B * T, "precision": precision},
        providers=lambda: providers(vocab, precision, modes),
        gate=agrees_with("plain eager", TOLERANCE[precision]), pairs=pairs, memory=True,
        work=step_flops(model, B * T, sum_squares=B * T * T).exact, unit="FLOP",
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    for vocab in (4096, 50304):
        for precision in ("fp32", "bf16"):
            yield case_of(vocab, precision, ("eager", "compile"))
    yield from encoder_cases(("eager", "compile"))


# Under pytest eager only, to stay short: the script has the compiled rows.
SMALL = [case_of(vocab, precision, ("eager",)) for vocab in (4096, 50304) for precision in ("fp32", "bf16")]
SMALL += encoder_cases(("eager",))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_train_step(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
