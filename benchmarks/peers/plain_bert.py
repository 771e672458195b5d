"""BERT and its training jobs as people write them today: padded batches, SDPA with a mask, F.cross_entropy.

The weights are those of transformers' BertForMaskedLM or BertForSequenceClassification, under its names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig


class Layer(nn.Module):
    def __init__(self, c: BertConfig):
        super().__init__()
        D = c.hidden_size
        self.n_heads = c.num_attention_heads
        self.qkv, self.proj, self.ln_1 = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D, c.layer_norm_eps)
        self.fc, self.out = nn.Linear(D, c.intermediate_size), nn.Linear(c.intermediate_size, D)
        self.ln_2 = nn.LayerNorm(D, c.layer_norm_eps)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:  # (B, T, D), (B, 1, 1, T)
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = self.ln_1(x + self.proj(y.transpose(1, 2).reshape(B, T, D)))
        return self.ln_2(x + self.out(F.gelu(self.fc(x))))


class PlainBert(nn.Module):
    def __init__(self, c: BertConfig):
        super().__init__()
        D = c.hidden_size
        self.words, self.positions = nn.Embedding(c.vocab_size, D), nn.Embedding(c.max_position_embeddings, D)
        self.types, self.norm = nn.Embedding(c.type_vocab_size, D), nn.LayerNorm(D, c.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # (B, T), (B, T) bool -> (B, T, D)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x


class PlainMasked(nn.Module):
    """gather: the head sees the masked positions only, whose number then differs from step to step."""

    def __init__(self, c: BertConfig, *, gather: bool):
        super().__init__()
        self.gather = gather
        self.bert = PlainBert(c)
        self.dense, self.norm = nn.Linear(c.hidden_size, c.hidden_size), nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, tokens: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        h = self.bert(tokens, mask)
        if self.gather:
            chosen = targets != -100
            h, targets = h[chosen], targets[chosen]
        logits = F.linear(self.norm(F.gelu(self.dense(h))), self.bert.words.weight, self.bias)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.flatten())


class PlainClassifier(nn.Module):
    def __init__(self, c: BertConfig):
        super().__init__()
        self.bert = PlainBert(c)
        self.pooler, self.out = nn.Linear(c.hidden_size, c.hidden_size), nn.Linear(c.hidden_size, c.num_labels)

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        x = torch.tanh(self.pooler(self.bert(tokens, mask)[:, 0]))
        return F.cross_entropy(self.out(x).float(), labels)


OUTSIDE = {
    "bert.embeddings.word_embeddings": "bert.words", "bert.embeddings.position_embeddings": "bert.positions",
    "bert.embeddings.token_type_embeddings": "bert.types", "bert.embeddings.LayerNorm": "bert.norm",
    "cls.predictions.transform.dense": "dense", "cls.predictions.transform.LayerNorm": "norm",
    "bert.pooler.dense": "pooler", "classifier": "out",
}  # fmt: skip
INSIDE = {
    "attention.output.dense": "proj", "attention.output.LayerNorm": "ln_1", "intermediate.dense": "fc",
    "output.dense": "out", "output.LayerNorm": "ln_2",
}  # fmt: skip


def renamed(theirs: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """transformers' weights under the names of this file."""
    found = {
        f"{ours}.{kind}": theirs[f"{name}.{kind}"]
        for name, ours in OUTSIDE.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in theirs
    }
    if "cls.predictions.bias" in theirs:
        found["bias"] = theirs["cls.predictions.bias"]
    for i in range(n_layers):
        prefix = f"bert.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{prefix}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            found[f"bert.layers.{i}.qkv.{kind}"] = torch.cat(parts)
            for name, ours in INSIDE.items():
                found[f"bert.layers.{i}.{ours}.{kind}"] = theirs[f"{prefix}{name}.{kind}"]
    return found
