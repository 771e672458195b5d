"""What a layer is made of: norm, rotary positions, attention, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop.engine.config import ModelConfig
from hotloop.kernels.attention import attention, attention_varlen


def feed_forward_width(config: ModelConfig) -> int:
    if config.d_ff is not None:
        return config.d_ff
    if is_gated(config):
        return 64 * math.ceil(8 * config.d_model / 3 / 64)
    return 4 * config.d_model


def head_dimension(config: ModelConfig) -> int:
    return config.head_dim or config.d_model // config.n_heads


def is_gated(config: ModelConfig) -> bool:
    return config.activation in ("swiglu", "geglu")


def is_local(config: ModelConfig, layer: int) -> bool:
    return config.local_window is not None and layer % config.global_every != 0


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
    bias = config.bias if config.norm_bias is None else config.norm_bias
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=bias)


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
    """Every position sees what `causal` and, in a local layer, the window leave it of its own document."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = head_dimension(config)
        self.causal, self.dropout = config.causal, config.dropout
        self.window = (config.local_window,) * 2 if is_local(config, layer) else (None, None)
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotary: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,  # (capacity + 1,) int32 over the B T positions
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        dropout_p = self.dropout if self.training else 0.0
        if cu_seqlens is not None:
            o = attention_varlen(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu_seqlens, max_seqlen_q=T,
                causal=self.causal, window_size=self.window, dropout_p=dropout_p,
            )  # fmt: skip
        else:
            if cache is not None:
                k, v = cache.append(self, k, v)
            o = attention(q, k, v, causal=self.causal, window_size=self.window, dropout_p=dropout_p)
        return self.out(o.reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = feed_forward_width(config)
        self.activation = config.activation
        self.gated = is_gated(config)
        self.up = nn.Linear(config.d_model, 2 * width if self.gated else width, bias=config.bias)  # gate first
        self.down = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down((F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * h)
        return self.down(F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Layer(nn.Module):
    """norm_position "pre": x + f(norm(x)), for attention, then for feed-forward; "post": norm(x + f(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.post = config.norm_position == "post"
        # ModernBERT: what the first layer would normalize has just come from the embedding's norm.
        normalized = layer == 0 and config.embedding_norm and not self.post
        self.attention_norm = nn.Identity() if normalized else make_norm(config)
        self.attention = Attention(config, layer)
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
        if self.post:
            x = self.attention_norm(x + self.dropout(self.attention(x, rotary, cu_seqlens, cache)))
            return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, cu_seqlens, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


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
