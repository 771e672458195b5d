"""Text from a model: one token at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.engine.checkpointed import TrainedModel
from hotloop.engine.errors import UserError
from hotloop.engine.model import KeyValueCache, Transformer


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together have at least this probability (Holtzman et al., arXiv:1904.09751)."""
    max_tokens: int = 200
    seed: int = 0


@torch.no_grad()
def generate(model: Transformer, prompt: list[int], sampling: Sampling, end_id: int) -> Iterator[int]:
    """Yield tokens after `prompt` (which starts with end_id, as every document did) until end_id or max_tokens.

    Of a longer prompt the last `context` tokens are read. Where the context is full, its newest half is read again as
    if a sequence began there, and the rest is forgotten.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    context = model.config.context
    tokens = list(prompt)
    cache, unread = KeyValueCache(), tokens[-context:]
    for _ in range(sampling.max_tokens):
        if cache.length + len(unread) > context:
            cache, unread = KeyValueCache(), tokens[-max(context // 2, 1) :]
        logits = model.logits(torch.tensor([unread], device=device), cache=cache)[0, -1].float()
        token = int(sample(logits, sampling, generator))
        if token == end_id:
            return
        yield token
        tokens.append(token)
        unread = [token]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:  # (V,) fp32 -> ()
    if sampling.temperature == 0:
        return logits.argmax()
    logits = (logits - logits.max()) / sampling.temperature  # at most 0: no temperature is too small
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        values, kept = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, float("-inf")).index_copy(0, kept, values)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None:
        sorted_, order = probabilities.sort(descending=True)
        outside = sorted_.cumsum(0) - sorted_ >= sampling.top_p
        probabilities = probabilities.index_fill(0, order[outside], 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def complete(trained: TrainedModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the text after `prompt` piece by piece; a character whose bytes are not all there yet waits for them.

    Raises UserError for a prompt that is not valid Unicode.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 at character {error.start}") from error
    tokenizer, end_id = trained.tokenizer, trained.end_id
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
    new: list[int] = []
    shown = len(tokenizer.decode(ids))
    for token in generate(trained.model, [end_id, *ids], sampling, end_id):
        new.append(token)
        text = tokenizer.decode(ids + new)
        if len(text) > shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    if rest := tokenizer.decode(ids + new)[shown:]:
        yield rest
