"""A GPT and its training step as people write them today: nn modules, SDPA, F.cross_entropy, clip_grad_norm_, fused
AdamW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.fc, self.out = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocab: int, context: int, n_layers: int, d_model: int, n_heads: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d_model), nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.ln_f = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # (B, T), (B, T) -> ()
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class PlainMasters:
    """fp32 copies of bf16 parameters, which the optimizer steps instead of them."""

    def __init__(self, params: list[Tensor]):
        self.params = params
        self.masters = [p.detach().float().requires_grad_() for p in params]

    def take_gradients(self) -> None:
        for master, p in zip(self.masters, self.params, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None

    @torch.no_grad()
    def give_weights(self) -> None:
        torch._foreach_copy_(self.params, self.masters)


class PlainStep:
    """precision: fp32; autocast (fp32 parameters, bf16 autocast); bf16 (bf16 parameters with fp32 masters)."""

    def __init__(self, model: nn.Module, precision: str, compiled: bool, lr: float):
        self.precision = precision
        # Masters of the weights before they are rounded to bf16 would start elsewhere than ours, made from bf16.
        self.params: list[Tensor] = list(
            model.to(torch.bfloat16 if precision == "bf16" else torch.float32).parameters()
        )
        self.masters = PlainMasters(self.params) if precision == "bf16" else None
        self.stepped = self.params if self.masters is None else self.masters.masters
        self.loss = torch.compile(model) if compiled else model
        decayed = [p for p in self.stepped if p.ndim >= 2]
        others = [p for p in self.stepped if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def __call__(self, *batch: Tensor) -> Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            loss = self.loss(*batch)
        loss.backward()
        if self.masters is not None:
            self.masters.take_gradients()
        nn.utils.clip_grad_norm_(self.stepped, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.give_weights()
        return loss.detach()
