"""The encoder's cases of bench_train_step.py: a step of masked language modelling and one of classification with BERT
of 6 layers x 384, on 16 documents of 8 to 512 tokens, 120 on average.

Ours packs the documents into rows of 512 and isolates them; the others pad them to the longest, as is the custom, with
`transformers` (its own attention, and SDPA) and in plain PyTorch. `gather` selects the masked positions before the
projection, which waits for the device and has another shape each step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import IGNORE_INDEX, Batch
from hotloop.engine.data.packing import best_fit_decreasing
from hotloop.engine.initial import Initial, read_initial
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.classification import ClassificationObjective
from hotloop.engine.objectives.masked import MaskedObjective
from hotloop.engine.recipe import from_dict, to_dict
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.throughput import step_flops
from hotloop.engine.train.training import Training

from harness.case import Case, Provider, agrees_with
from harness.measure import device
from peers.plain_bert import PlainClassifier, PlainMasked, renamed
from peers.plain_gpt import PlainStep

LAYERS, D, HEADS, VOCAB, CONTEXT, DOCUMENTS, MEAN = 6, 384, 12, 30_522, 512, 16, 120
RATE, LABELS, LR = 0.15, 2, 1e-4
STEPS_OF_GATE = 2
# Of each loss, relative. In bf16 transformers rounds the loss itself, by up to 2^-9, and its parts before.
TOLERANCE = {"fp32": 1e-5, "bf16": 2**-7}


@cache
def lengths() -> np.ndarray:
    """(DOCUMENTS,) from a log-normal distribution, scaled until they are MEAN on average between 8 and CONTEXT."""
    drawn = np.exp(0.8 * np.random.default_rng(0).standard_normal(DOCUMENTS))
    low, high = 1.0, float(CONTEXT)
    for _ in range(50):
        middle = (low + high) / 2
        found = np.clip(middle * drawn, 8, CONTEXT).astype(np.int64)
        low, high = (middle, high) if found.mean() < MEAN else (low, middle)
    return found


@cache
def documents() -> list[tuple[Tensor, Tensor, int]]:
    """Tokens, targets of the masked ones, and the label of each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in lengths():
        tokens = torch.randint(5, VOCAB, (n,), generator=generator)
        hidden = torch.zeros(n, dtype=torch.bool)
        hidden[torch.randperm(n, generator=generator)[: max(1, round(RATE * n))]] = True
        label = int(torch.randint(LABELS, (), generator=generator))
        found.append((torch.where(hidden, 4, tokens), torch.where(hidden, tokens, IGNORE_INDEX), label))
    return found


def padded(job: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask (DOCUMENTS, longest), and targets like them or labels (DOCUMENTS,)."""
    tokens, targets, labels = zip(*documents(), strict=True)
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(t, dtype=torch.bool) for t in tokens], padding_value=False)
    wanted = torch.tensor(labels) if job == "classification" else pad(list(targets), padding_value=IGNORE_INDEX)
    return pad(list(tokens)).to(device()), mask.to(device()), wanted.to(device())


def packed(job: str) -> Batch:
    """The same in rows of CONTEXT; what ends a row is a segment without targets."""
    row, n_rows = best_fit_decreasing(lengths(), CONTEXT)
    tokens = torch.zeros(n_rows, CONTEXT, dtype=torch.int64)
    targets, positions = torch.full_like(tokens, IGNORE_INDEX), torch.zeros_like(tokens)
    bounds, labels = [], []
    for r in range(n_rows):
        at = 0
        for number in np.flatnonzero(row == r):
            text, hidden, label = documents()[number]
            part = slice(at, at + len(text))
            tokens[r, part], targets[r, part], positions[r, part] = text, hidden, torch.arange(len(text))
            bounds.append(r * CONTEXT + at)
            labels.append(label)
            at += len(text)
        if at < CONTEXT:
            bounds.append(r * CONTEXT + at)
            labels.append(IGNORE_INDEX)
    cu_seqlens = torch.tensor([*bounds, n_rows * CONTEXT], dtype=torch.int32)
    segments = torch.repeat_interleave(torch.arange(len(bounds), dtype=torch.int32), cu_seqlens.diff())
    classified = job == "classification"
    return Batch(
        tokens=tokens, targets=torch.tensor(labels) if classified else targets, positions=positions,
        document_ids=segments.view(n_rows, CONTEXT), cu_seqlens=cu_seqlens,
        n_supervised=DOCUMENTS if classified else n_masked(), n_tokens=int(lengths().sum()),
        sum_squares=int(np.square(lengths()).sum()),
    ).to(device())  # fmt: skip


def n_masked() -> int:
    return sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in documents())


@dataclass(frozen=True)
class Job:
    theirs: type[PreTrainedModel]
    plain: Mapping[str, Callable[[BertConfig], nn.Module]]
    objective: Callable[[Transformer], nn.Module]


JOBS = {
    "masked": Job(
        BertForMaskedLM,
        {"plain": partial(PlainMasked, gather=False), "plain gather": partial(PlainMasked, gather=True)},
        # No row of CONTEXT tokens has more than the rate and the rounding of each document's share.
        lambda model: MaskedObjective(model, round(CONTEXT * RATE) + 16),
    ),
    "classification": Job(BertForSequenceClassification, {"plain": PlainClassifier}, ClassificationObjective),
}


def their_model(job: str, attention: str = "sdpa") -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * D,
        max_position_embeddings=CONTEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=LABELS,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return JOBS[job].theirs(config)


@cache
def weights(job: str) -> Initial:
    """Theirs, as this project reads them from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        their_model(job).save_pretrained(folder)
        return read_initial(folder, n_labels=None if job == "classification" else 0)


class Theirs(nn.Module):
    """Padded batch -> loss, by a model of transformers."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def provider(step: Callable[[], Tensor]) -> Provider:
    return Provider(step, lambda: tuple(step().float() for _ in range(STEPS_OF_GATE)))


def padded_provider(job: str, precision: str, compiled: bool, make: Callable[[], nn.Module]) -> Provider:
    batch, step = padded(job), PlainStep(make().to(device()), precision, compiled, LR)
    return provider(lambda: step(*batch))


def plain_model(job: str, name: str) -> nn.Module:
    theirs = their_model(job)
    model = JOBS[job].plain[name](theirs.config)
    model.load_state_dict(renamed(theirs.state_dict(), LAYERS))
    return model


def recipe_of(job: str, precision: str, compiled: bool) -> Recipe:
    batch = packed(job)
    return from_dict(
        Recipe,
        {
            "objective": job, "model": to_dict(weights(job).config),
            "optimizer": {"lr": LR, "weight_decay": 0.1, "decay_embeddings": True, "max_grad_norm": 1.0},
            "train": {
                "global_batch": len(batch.tokens), "micro_batch": len(batch.tokens), "precision": precision,
                "compile": compiled,
            },
        },
    )  # fmt: skip


def our_provider(job: str, precision: str, compiled: bool) -> Provider:
    recipe, batch = recipe_of(job, precision, compiled), packed(job)
    training = Training(recipe, Ranks(0, 1, device()), JOBS[job].objective, weights(job).state)
    return provider(lambda: training.take_step([batch], batch.n_supervised, LR).loss)


def providers(job: str, precision: str, modes: tuple[str, ...]) -> dict[str, Callable[[], Provider]]:
    found: dict[str, Callable[[], Provider]] = {}
    for mode in modes:
        compiled = mode == "compile"
        found[f"hotloop {mode}"] = partial(our_provider, job, precision, compiled)
        for name in JOBS[job].plain:
            # A compiled function cannot select rows by a mask: their number is not known to it.
            if not (compiled and name.endswith("gather")):
                make = partial(plain_model, job, name)
                found[f"{name} {mode}"] = partial(padded_provider, job, precision, compiled, make)
    for attention in ("eager", "sdpa"):
        make = lambda attention=attention: Theirs(their_model(job, attention))  # type: ignore[misc]
        found[f"transformers, {attention} attention"] = partial(padded_provider, job, precision, False, make)
    return found


def case_of(job: str, precision: str, modes: tuple[str, ...]) -> Case:
    n, squares = int(lengths().sum()), int(np.square(lengths()).sum())
    longest = int(lengths().max())
    flops = step_flops(weights(job).config, n, sum_squares=squares, head_tokens=n_masked())
    supervised = {"masked": n_masked(), "classification": DOCUMENTS}[job]
    peers = ("transformers, eager attention", "transformers, sdpa attention", "plain eager", "plain gather eager")
    pairs = [("hotloop eager", peer) for peer in peers]
    if "compile" in modes:
        pairs += [("hotloop compile", "plain compile")]
    return Case(
        kernel_name=f"{job}_step", mode="full", x=("documents", "documents", DOCUMENTS),
        config={
            "layers": LAYERS, "d_model": D, "heads": HEADS, "V": VOCAB, "tokens": n, "padded": DOCUMENTS * longest,
            "supervised": supervised, "precision": precision,
        },
        providers=lambda: providers(job, precision, modes),
        gate=agrees_with("plain eager", TOLERANCE[precision]), pairs=tuple(pairs), memory=True,
        work=flops.exact, unit="FLOP", dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        counted={"tokens": n, "documents": DOCUMENTS},
    )  # fmt: skip


def encoder_cases(modes: tuple[str, ...]) -> Iterator[Case]:
    for job in JOBS:
        for precision in ("fp32", "bf16"):
            yield case_of(job, precision, modes)
