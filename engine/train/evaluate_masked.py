"""How well a masked model finds what is hidden in held-out documents, with noise that is the same every time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hotloop.engine.data.batches import Batch
from hotloop.engine.data.evaluation import evaluation_documents
from hotloop.engine.data.masked import held_out_batches, one_at_a_time
from hotloop.engine.data.masking import Masking
from hotloop.engine.data.shards import Split
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.masked import supervised_rows
from hotloop.kernels.cross_entropy import linear_cross_entropy_stats


@dataclass(frozen=True)
class MaskedEvaluation:
    loss: float
    """Nats per hidden token, under the noise of training."""
    accuracy: float
    """Share of the hidden tokens that the model finds."""
    pseudo_perplexity: float
    """exp(nats per token that is hidden by the mask token); exact: each alone in an otherwise whole text."""
    tokens: int
    """Hidden tokens that were scored."""
    bytes: int
    documents: int
    context: int
    exact: bool
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


@torch.no_grad()
def evaluate_masked(
    model: Transformer,
    split: Split,
    masking: Masking,
    *,
    context: int,
    max_bytes: int | None = None,
    seed: int = 0,
    exact: bool = False,
    micro_batch: int = 16,
    poll: Callable[[], bool] = lambda: False,
) -> MaskedEvaluation | None:
    """Score whole documents, drawn by the seed up to `max_bytes` of text (none: all).

    `exact` masks every token in turn, one at a time (Salazar et al., arXiv:1910.14659): as many passes over a text as
    it has tokens. Returns None if `poll` asks to stop.
    """
    began = time.perf_counter()
    documents, n_bytes, _ = evaluation_documents(split, max_bytes, seed)
    batches: Iterable[Batch]
    if exact:
        batches = one_at_a_time(split, masking.vocabulary, context, documents, micro_batch)
    else:
        batches = held_out_batches(split, masking, context, documents, micro_batch)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, correct, nats and count of those behind [MASK]
    n = 0
    try:
        for batch in batches:
            if poll():
                return None
            n += batch.n_supervised
            sums += _score(model, batch, batch.to(device), masking.vocabulary.mask)
    finally:
        model.train(was_training)
    nats, correct, behind_mask, n_behind_mask = sums.tolist()
    return MaskedEvaluation(
        loss=nats / max(n, 1),
        accuracy=correct / max(n, 1),
        pseudo_perplexity=math.exp(min(behind_mask / max(n_behind_mask, 1), 700.0)),
        tokens=n,
        bytes=n_bytes,
        documents=len(documents),
        context=context,
        exact=exact,
        seconds=time.perf_counter() - began,
    )


def _score(model: Transformer, host: Batch, batch: Batch, mask: int) -> Tensor:
    h = model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    row, target, _ = supervised_rows(batch.targets, max(host.n_supervised, 1))
    stats = linear_cross_entropy_stats(
        model.head_input(h.flatten(0, 1)[row]), model.head_weight, target, linear_bias=model.head_bias, reduction="none"
    )
    masked = batch.tokens.flatten()[row] == mask
    nll = stats.nll.double()
    return torch.stack([nll.sum(), stats.correct.double().sum(), (nll * masked).sum(), masked.double().sum()])
