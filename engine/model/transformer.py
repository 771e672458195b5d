"""Tokens to hidden states to logits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hotloop.engine.config import ModelConfig
from hotloop.engine.model.heads import Classifier, MaskedHead
from hotloop.engine.model.layers import KeyValueCache, Layer, Rotary, head_dimension, is_local, make_norm

VOCABULARY_MULTIPLE = 64
HEADS = ("head.", "masked_head.", "classifier.")


def padded_vocabulary(vocab_size: int) -> int:
    return VOCABULARY_MULTIPLE * math.ceil(vocab_size / VOCABULARY_MULTIPLE)


class Transformer(nn.Module):
    """Tokens to hidden states to logits.

    The embedding has V rounded up to a multiple of 64 rows; the padding rows never enter a softmax: the loss and
    `logits` see `head_weight[:vocab_size]`.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("Transformer needs config.vocab_size: got None, expected the tokenizer's size")
        self.config = config
        self.vocab_size = config.vocab_size
        self.activation_checkpointing = activation_checkpointing
        rows = padded_vocabulary(config.vocab_size)
        self.embedding = nn.Embedding(rows, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.context, config.d_model) if config.positions == "learned" else None
        )
        self.token_type_embedding = nn.Embedding(config.token_types, config.d_model) if config.token_types else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.rotary = self._rotary(config.rope_theta)
        self.local_rotary = None if config.local_rope_theta is None else self._rotary(config.local_rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.final_norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.head = None if config.tied_head else nn.Linear(config.d_model, rows, bias=False)
        self.masked_head = MaskedHead(config, config.vocab_size) if config.head == "masked" else None
        self.classifier = Classifier(config) if config.n_labels else None

    def _rotary(self, theta: float) -> Rotary | None:
        c = self.config
        return Rotary(head_dimension(c), c.context, theta) if c.positions == "rotary" else None

    @torch.no_grad()
    def initialize(self, seed: int) -> Transformer:
        """Draw the weights: normal with std init_std, biases 0, norm weights 1; where norms come first, output
        projections have init_std / sqrt(2 n_layers) (Radford et al. 2019). The same for one seed whatever the dtype and
        device; a head's draw depends on nothing else in the model."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layers) if self.config.norm_position == "pre" else std
        generators = {head: torch.Generator().manual_seed(seed) for head in ("", "masked_head", "classifier")}
        for name, module in self.named_modules():
            generator = generators.get(name.split(".")[0], generators[""])
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = residual_std if name.endswith((".attention.out", ".feed_forward.down")) else std
                drawn = torch.empty(module.weight.shape).normal_(0.0, scale, generator=generator)
                module.weight.copy_(drawn)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        return self

    @torch.no_grad()
    def load_initial(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Copy the tensors given and leave the others as `initialize` made them. Returns the names of the others.

        The embedding, and a head of its own, may come without the padding rows of the vocabulary. A tensor of a head
        that this model does not have is passed over; any other that it lacks, or has in another shape, is a ValueError
        with its name. Nothing is copied then.
        """
        ours = dict(self.named_parameters())
        copied = {}
        for name, tensor in state.items():
            if name not in ours:
                if name.startswith(HEADS):
                    continue
                raise ValueError(f"tensor {name} is not part of this model")
            rows = self.vocab_size if name in ("embedding.weight", "head.weight") else None
            expected = ours[name][:rows].shape
            if tensor.shape not in (expected, ours[name].shape):
                raise ValueError(f"tensor {name}: shape {tuple(tensor.shape)}, expected {tuple(expected)}")
            copied[name] = tensor
        for name, tensor in copied.items():
            if tensor.shape != ours[name].shape:
                ours[name][tensor.shape[0] :].zero_()  # a vocabulary's padding
            ours[name][: tensor.shape[0]].copy_(tensor)
        return tuple(name for name in ours if name not in copied)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the projection to the vocabulary, without its padding rows."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return weight if weight.shape[0] == self.vocab_size else weight[: self.vocab_size]

    @property
    def head_bias(self) -> Tensor | None:
        """(V,): added to the logits; None: nothing is."""
        return None if self.masked_head is None else self.masked_head.bias

    def head_input(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """What is multiplied with `head_weight`."""
        return h if self.masked_head is None else self.masked_head(h)

    def classify(self, h: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(B, T, D) hidden states, (S + 1,) int32 over the flattened B T positions -> (S, n_labels) logits.

        The rows of empty segments (equal bounds, as in the tail of a fixed capacity) are finite and mean nothing.
        """
        if self.classifier is None:
            raise ValueError("this model has no classifier: its configuration says n_labels = 0")
        return self.classifier(h.flatten(0, 1), cu_seqlens)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        tokens (B, T) int64; positions (B, T) int64, by default 0 .. T-1; token_types (B, T) int64, by default 0 where
        the model has an embedding for them; cu_seqlens (capacity + 1,) int32 over the
        flattened B T positions isolates packed documents; attention_mask (B, T), 1 or True for tokens and 0 for padding
        on the right, isolates the padding instead. Returns (B, T, D). Raises ValueError for T beyond the context.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.context:
            raise ValueError(f"{start + T} tokens given, the model's context is {self.config.context}: give fewer")
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("attention_mask and cu_seqlens are both given: give one of them")
            cu_seqlens = cu_seqlens_from_mask(attention_mask)
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device).expand(B, T)
        return self.transform(self.embed(tokens, positions, token_types), positions, cu_seqlens, cache)

    def embed(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        """(B, T), (B, T), (B, T) -> (B, T, D)"""
        x = self.embedding(tokens)
        if self.token_type_embedding is not None:
            types = self.token_type_embedding
            x = x + (types.weight[0] if token_types is None else types(token_types))
        elif token_types is not None:
            raise ValueError("token_types are given, but this model has no embedding for them: leave them out")
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return self.dropout(self.embedding_norm(x))

    def transform(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """The layers and the final norm over embedded tokens x (B, T, D)."""
        global_rotary = None if self.rotary is None else self.rotary(positions)
        local_rotary = global_rotary if self.local_rotary is None else self.local_rotary(positions)
        for i, layer in enumerate(self.layers):
            rotary = local_rotary if is_local(self.config, i) else global_rotary
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, cu_seqlens, use_reentrant=False)
            else:
                x = layer(x, rotary, cu_seqlens, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.final_norm(x)

    def logits(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, V); arguments as in `hidden_states`."""
        h = self.hidden_states(
            tokens, attention_mask=attention_mask, cu_seqlens=cu_seqlens, positions=positions,
            token_types=token_types, cache=cache,
        )  # fmt: skip
        return F.linear(self.head_input(h), self.head_weight, self.head_bias)

    forward = logits


def cu_seqlens_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) mask, padding on the right -> (2 B + 1,) int32: each row's tokens, then its padding, as segments."""
    B, T = attention_mask.shape
    lengths = attention_mask.long().sum(1)
    starts = T * torch.arange(B, device=lengths.device)
    bounds = torch.stack((starts, starts + lengths), dim=1).flatten()
    return torch.cat((bounds, bounds.new_full((1,), B * T))).to(torch.int32)
