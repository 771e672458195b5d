"""The one Transformer: a decoder or an encoder, configurable to GPT-2 and to Llama exactly.

Shapes: B sequences, T tokens, D model width, V vocabulary, Hq query heads, Hk key and value heads, C head dimension.
Parameters and activations have one dtype (fp32 or bf16); autocast is not used. Norm statistics, rotary angles, softmax
and the loss are computed in fp32 whatever that dtype is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hotloop.engine.config import ModelConfig
from hotloop.kernels.attention import attention, attention_varlen

VOCABULARY_MULTIPLE = 64


def feed_forward_width(config: ModelConfig) -> int:
    if config.d_ff is not None:
        return config.d_ff
    if config.activation == "swiglu":
        return 64 * math.ceil(8 * config.d_model / 3 / 64)
    return 4 * config.d_model


def padded_vocabulary(vocab_size: int) -> int:
    return VOCABULARY_MULTIPLE * math.ceil(vocab_size / VOCABULARY_MULTIPLE)


class RMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)), statistics in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias)


class Rotary(nn.Module):
    """Rotates pairs (x_i, x_{i + C/2}) by positions * theta^(-2 i / C) (Su et al., arXiv:2104.09864)."""

    cos: Tensor  # (context, 1, C / 2) fp32
    sin: Tensor

    def __init__(self, head_dim: int, context: int, theta: float):
        super().__init__()
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)[:, None]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        # `module.to(bfloat16)` casts buffers too: keep the angles in fp32, follow the device only.
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) -> 2 x (B, T, 1, C / 2)
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, H, C), (B, T, 1, C / 2) fp32
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.causal, self.dropout = config.causal, config.dropout
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotary: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,  # (capacity + 1,) int32 over the B T positions
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        B, T, D = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)
        qk, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.split((self.n_heads, self.n_kv_heads), dim=2)
        dropout_p = self.dropout if self.training else 0.0
        if cu_seqlens is not None:
            o = attention_varlen(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
                cu_seqlens_q=cu_seqlens, max_seqlen_q=T, causal=self.causal, dropout_p=dropout_p,
            )  # fmt: skip
        else:
            if cache is not None:
                k, v = cache.append(self, k, v)
            o = attention(q, k, v, causal=self.causal, dropout_p=dropout_p)
        return self.out(o.reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = feed_forward_width(config)
        self.activation = config.activation
        gated = config.activation == "swiglu"
        self.up = nn.Linear(config.d_model, 2 * width if gated else width, bias=config.bias)  # gate first
        self.down = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = self.up(x)
        if self.activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, cu_seqlens, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


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
        head_dim = config.d_model // config.n_heads
        self.rotary = Rotary(head_dim, config.context, config.rope_theta) if config.positions == "rotary" else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.head = None if config.tied_head else nn.Linear(config.d_model, rows, bias=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> Transformer:
        """Draw the weights: normal with std init_std, output projections init_std / sqrt(2 n_layers), biases 0, norm
        weights 1 (Radford et al. 2019). The same for one seed whatever the dtype and device."""
        generator = torch.Generator().manual_seed(seed)
        std, residual_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = residual_std if name.endswith((".attention.out", ".feed_forward.down")) else std
                drawn = torch.empty(module.weight.shape).normal_(0.0, scale, generator=generator)
                module.weight.copy_(drawn)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        return self

    def load_initial(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Copy the given tensors over those of the same name. Returns the names of those that were not given.

        Raises ValueError for a tensor that the model lacks or has in another shape.
        """
        ours = dict(self.named_parameters())
        for name, tensor in state.items():
            if name not in ours:
                raise ValueError(f"the model has no tensor {name}")
            if ours[name].shape != tensor.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} given, the model has {tuple(ours[name].shape)}")
            with torch.no_grad():
                ours[name].copy_(tensor)
        return tuple(name for name in ours if name not in state)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the projection to the vocabulary, without its padding rows."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return weight if weight.shape[0] == self.vocab_size else weight[: self.vocab_size]

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        tokens (B, T) int64; positions (B, T) int64, by default 0 .. T-1; cu_seqlens (capacity + 1,) int32 over the
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
        return self.transform(self.embed(tokens, positions), positions, cu_seqlens, cache)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, T, D)
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return self.dropout(x)

    def transform(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """The layers and the final norm over embedded tokens x (B, T, D)."""
        rotary = None if self.rotary is None else self.rotary(positions)
        for layer in self.layers:
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
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, V); arguments as in `hidden_states`."""
        h = self.hidden_states(
            tokens, attention_mask=attention_mask, cu_seqlens=cu_seqlens, positions=positions, cache=cache
        )
        return F.linear(h, self.head_weight)

    forward = logits


class KeyValueCache:
    """Keys and values of the tokens seen so far, for generation one token at a time."""

    def __init__(self) -> None:
        self.length = 0
        self._kv: dict[Attention, tuple[Tensor, Tensor]] = {}

    def append(self, layer: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, Hk, C)
        if layer in self._kv:
            past_k, past_v = self._kv[layer]
            k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
        self._kv[layer] = (k, v)
        return k, v


def cu_seqlens_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) mask, padding on the right -> (2 B + 1,) int32: each row's tokens, then its padding, as segments."""
    B, T = attention_mask.shape
    lengths = attention_mask.long().sum(1)
    starts = T * torch.arange(B, device=lengths.device)
    bounds = torch.stack((starts, starts + lengths), dim=1).flatten()
    return torch.cat((bounds, bounds.new_full((1,), B * T))).to(torch.int32)
