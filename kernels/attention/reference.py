"""Attention by its formula in plain PyTorch, on any device and in any precision up to fp64: the definition of right.

    s = (q @ k.T) * scale                                      # (B, Hq, Tq, Tk); head h of q reads head h // (Hq / Hk)
    s = softcap * torch.tanh(s / softcap)
    s = s - alibi_slopes * (i + Tk - Tq - j).abs()             # query i, key j
    s = s.masked_fill(~visible, -inf)                          # i + Tk - Tq - left <= j <= i + Tk - Tq + right
    lse = torch.logsumexp(s, -1)                               # with sinks: logaddexp(lse, sinks) where lse > -inf
    p = torch.exp(s - lse)
    o = (p * keep / (1 - dropout_p)) @ v                       # keep: see `dropout_keep`

A row that sees no key has o = 0, lse = -inf (with sinks, too) and no gradient. The scores of a segment, or of a dense
batch, are held at once.
The dropout mask is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.attention.options import Call, Options, lse_dtype
from hotloop.kernels.dispatch import Backend
from hotloop.kernels.philox import MASK_32, philox_4x32_10


def dropout_keep(
    seed: Tensor,  # () int64
    batch: Tensor,  # (B,) int64, row of the batch, or segment of a packed one
    Hq: int,
    Tq: int,
    Tk: int,
    dropout_p: float,
) -> Tensor:  # (B, Hq, Tq, Tk) bool
    """Which probabilities are kept. The contract of every backend: element (b, h, i, j) is

        word = philox_4x32_10(counter=(j // 4, i, h, b), key=(seed & 0xFFFFFFFF, seed >> 32))[j % 4]
        keep = word >= floor(dropout_p * 2**32)

    with i and j counted from the start of the segment, so that neither the tiling nor the packing matters.
    """
    device = seed.device
    key = (seed & MASK_32, (seed >> 32) & MASK_32)
    words = philox_4x32_10(
        (
            torch.arange((Tk + 3) // 4, device=device),
            torch.arange(Tq, device=device)[:, None],
            torch.arange(Hq, device=device)[:, None, None],
            batch[:, None, None, None],
        ),
        key,
    )
    return torch.stack(words, -1).flatten(-2)[..., :Tk] >= int(dropout_p * 2**32)


@dataclass(frozen=True)
class _Block:
    """One dense problem: the whole batch, or one segment of a packed one (then B = 1).

    Where lengths are device values, a segment is padded with rows of zeros up to max_seqlen.
    """

    q: Tensor  # (B, Hq, Tq, D), as all below in the precision of lse
    k: Tensor  # (B, Hq, Tk, D), heads repeated
    v: Tensor  # (B, Hq, Tk, D)
    length_q: int | Tensor
    length_k: int | Tensor
    alibi_slopes: Tensor | None  # (B or 1, Hq, 1, 1)
    sinks: Tensor | None  # (Hq, 1)
    keep: Tensor | None  # (B, Hq, Tq, Tk), 1 / (1 - dropout_p) or 0
    options: Options

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """s (B, Hq, Tq, Tk) with -inf where masked, the distance |i + Tk - Tq - j| (Tq, Tk), and ds/d(q @ k.T)."""
        options = self.options
        i = torch.arange(self.q.shape[2], device=self.q.device)[:, None]
        j = torch.arange(self.k.shape[2], device=self.q.device)
        diagonal = i + (self.length_k - self.length_q)
        visible = (i < self.length_q) & (j < self.length_k)
        if options.window_left >= 0:
            visible = visible & (j >= diagonal - options.window_left)
        if options.window_right >= 0:
            visible = visible & (j <= diagonal + options.window_right)
        distance = (diagonal - j).abs().to(self.q.dtype)
        s = (self.q @ self.k.mT) * options.scale
        slope = torch.full((), options.scale, dtype=s.dtype, device=s.device)
        if options.softcap > 0:
            t = torch.tanh(s / options.softcap)
            s, slope = options.softcap * t, options.scale * (1 - t * t)
        if self.alibi_slopes is not None:
            s = s - self.alibi_slopes * distance
        return s.masked_fill(~visible, float("-inf")), distance, slope

    def probabilities(self, s: Tensor, lse: Tensor) -> Tensor:
        return torch.exp(s - lse.masked_fill(lse == float("-inf"), 0)[..., None])

    def forward(self) -> tuple[Tensor, Tensor]:
        """o (B, Hq, Tq, D), lse (B, Hq, Tq)."""
        s, _, _ = self.scores()
        lse = torch.logsumexp(s, -1)
        if self.sinks is not None:
            lse = torch.where(lse == float("-inf"), lse, torch.logaddexp(lse, self.sinks))
        p = self.probabilities(s, lse)
        return (p if self.keep is None else p * self.keep) @ self.v, lse

    def backward(
        self,
        do: Tensor,  # (B, Hq, Tq, D)
        dlse: Tensor | None,  # (B, Hq, Tq)
        o: Tensor,  # (B, Hq, Tq, D)
        lse: Tensor,  # (B, Hq, Tq)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq (B, Hq, Tq, D), dk and dv (B, Hq, Tk, D), dalibi_slopes (B, Hq) and dsinks (Hq) where given.

        With dp = (do @ v.T) * keep: do/ds gives p * (dp - rowsum(do * o)), because rowsum(p * dp) = rowsum(do * o), and
        dlse/ds gives p * dlse, hence one subtraction serves both.
        """
        masked = lse == float("-inf")
        do = do.masked_fill(masked[..., None], 0)
        delta = (do * o).sum(-1)
        if dlse is not None:
            delta = delta - dlse
        delta = delta.masked_fill(masked, 0)
        s, distance, slope = self.scores()
        p = self.probabilities(s, lse)
        dv = (p if self.keep is None else p * self.keep).mT @ do
        dp = do @ self.v.mT
        ds = p * ((dp if self.keep is None else dp * self.keep) - delta[..., None])
        dalibi_slopes = None if self.alibi_slopes is None else -(ds * distance).sum((-2, -1))
        dsinks = None
        if self.sinks is not None:
            p_sink = torch.exp(self.sinks - lse.masked_fill(masked, float("inf")))
            dsinks = -(p_sink * delta).sum((0, 2))
        ds = ds * slope
        return ds @ self.k, ds.mT @ self.q, dv, dalibi_slopes, dsinks


def _block(
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    length_q: int | Tensor,
    length_k: int | Tensor,
    batch: Tensor,  # (B,) int64
    alibi_slopes: Tensor | None,  # (Hq,) or (B, Hq)
    sinks: Tensor | None,  # (Hq,)
    seed: Tensor | None,
    options: Options,
) -> _Block:
    dtype = lse_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    keep = None
    if seed is not None and options.dropout_p > 0:
        mask = dropout_keep(seed, batch, q.shape[2], q.shape[1], k.shape[1], options.dropout_p)
        keep = mask.to(dtype) * (1 / (1 - options.dropout_p))
    return _Block(
        q.transpose(1, 2).to(dtype),
        k.repeat_interleave(group, 2).transpose(1, 2).to(dtype),
        v.repeat_interleave(group, 2).transpose(1, 2).to(dtype),
        length_q,
        length_k,
        None if alibi_slopes is None else alibi_slopes.to(dtype)[..., None, None],
        None if sinks is None else sinks.to(dtype)[:, None],
        keep,
        options,
    )


def _sum_groups(
    x: Tensor,  # (B, Hq, Tk, D)
    Hk: int,
) -> Tensor:  # (B, Tk, Hk, D)
    return x.unflatten(1, (Hk, -1)).sum(2).transpose(1, 2)


@dataclass(frozen=True)
class _Segment:
    ordinal: int
    index_q: Tensor  # (Tq,) int64; `total` for a row past the segment's end
    index_k: Tensor  # (Tk,)
    length_q: int | Tensor
    length_k: int | Tensor


def _segments(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, totals: tuple[int, int], options: Options
) -> Iterator[_Segment]:
    """The segments of a packed batch. On the CPU with their own lengths; elsewhere padded, so that nothing waits."""

    def rows(cu_seqlens: Tensor, i: int, max_seqlen: int, total: int) -> tuple[Tensor, int | Tensor]:
        if cu_seqlens.device.type == "cpu":
            start, stop = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
            return torch.arange(start, stop), stop - start
        start_, stop_ = cu_seqlens[i].long(), cu_seqlens[i + 1].long()
        index = start_ + torch.arange(max_seqlen, device=cu_seqlens.device)
        return torch.where(index < stop_, index, total), stop_ - start_

    for i in range(cu_seqlens_q.shape[0] - 1):
        index_q, length_q = rows(cu_seqlens_q, i, options.max_seqlen_q, totals[0])
        index_k, length_k = rows(cu_seqlens_k, i, options.max_seqlen_k, totals[1])
        yield _Segment(i, index_q, index_k, length_q, length_k)


def _with_zero_row(x: Tensor) -> Tensor:
    """(total, ...) -> (total + 1, ...): row `total` is what rows past a segment's end read and write."""
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])


def _segment_alibi(alibi_slopes: Tensor | None, ordinal: int) -> Tensor | None:
    return alibi_slopes[ordinal : ordinal + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes


def forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options = call
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch = torch.arange(q.shape[0], device=q.device)
        block = _block(q, k, v, q.shape[1], k.shape[1], batch, alibi_slopes, sinks, seed, options)
        o, lse = block.forward()
        return o.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format, copy=True), lse.contiguous()

    total = q.shape[0]
    o = q.new_zeros((total + 1, *q.shape[1:]))
    lse = torch.full((total + 1, q.shape[1]), float("-inf"), dtype=lse_dtype(q.dtype), device=q.device)
    q, k, v = _with_zero_row(q), _with_zero_row(k), _with_zero_row(v)
    for segment in _segments(cu_seqlens_q, cu_seqlens_k, (total, k.shape[0] - 1), options):
        block = _segment_block(segment, q, k, v, alibi_slopes, sinks, seed, options)
        o_, lse_ = block.forward()
        o.index_copy_(0, segment.index_q, o_[0].transpose(0, 1).to(o.dtype))
        lse.index_copy_(0, segment.index_q, lse_[0].mT)
    return o[:total].clone(), lse[:total].mT.contiguous()


def _segment_block(
    segment: _Segment,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> _Block:
    return _block(
        q[segment.index_q][None],
        k[segment.index_k][None],
        v[segment.index_k][None],
        segment.length_q,
        segment.length_k,
        torch.full((1,), segment.ordinal, device=q.device),
        _segment_alibi(alibi_slopes, segment.ordinal),
        sinks,
        seed,
        options,
    )


def backward(
    call: Call, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options = call
    dtype, Hk = lse_dtype(q.dtype), k.shape[-2]
    dalibi: Tensor | None = None
    dsinks: Tensor | None = None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch = torch.arange(q.shape[0], device=q.device)
        block = _block(q, k, v, q.shape[1], k.shape[1], batch, alibi_slopes, sinks, seed, options)
        dq, dk, dv, dalibi, dsinks = block.backward(
            do.transpose(1, 2).to(dtype), dlse, o.transpose(1, 2).to(dtype), lse
        )
        dq, dk, dv = dq.transpose(1, 2), _sum_groups(dk, Hk), _sum_groups(dv, Hk)
        if dalibi is not None and alibi_slopes is not None and alibi_slopes.dim() == 1:
            dalibi = dalibi.sum(0)
    else:
        total_q, total_k = q.shape[0], k.shape[0]
        q, k, v, do, o = (_with_zero_row(x) for x in (q, k, v, do, o))
        lse = F.pad(lse, (0, 1), value=float("-inf"))
        dlse = None if dlse is None else F.pad(dlse, (0, 1))
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
        dalibi = None if alibi_slopes is None else torch.zeros_like(alibi_slopes, dtype=dtype)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=dtype)
        for segment in _segments(cu_seqlens_q, cu_seqlens_k, (total_q, total_k), options):
            block = _segment_block(segment, q, k, v, alibi_slopes, sinks, seed, options)
            rows = segment.index_q
            dq_, dk_, dv_, dalibi_, dsinks_ = block.backward(
                do[rows].transpose(0, 1)[None].to(dtype),
                None if dlse is None else dlse[None, :, rows],
                o[rows].transpose(0, 1)[None].to(dtype),
                lse[None, :, rows],
            )
            dq.index_copy_(0, rows, dq_[0].transpose(0, 1))
            dk.index_copy_(0, segment.index_k, _sum_groups(dk_, Hk)[0])
            dv.index_copy_(0, segment.index_k, _sum_groups(dv_, Hk)[0])
            if dalibi is not None and dalibi_ is not None:
                (dalibi[segment.ordinal] if dalibi.dim() == 2 else dalibi).add_(dalibi_[0])
            if dsinks is not None and dsinks_ is not None:
                dsinks.add_(dsinks_)
        dq, dk, dv = dq[:total_q], dk[:total_k], dv[:total_k]

    def result(x: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
        if x is None or like is None or not needed:
            return q.new_empty(0)
        return x.to(like.dtype, memory_format=torch.contiguous_format, copy=True)

    return (
        result(dq, q, needs[0]),
        result(dk, k, needs[1]),
        result(dv, v, needs[2]),
        result(dalibi, alibi_slopes, needs[3]),
        result(dsinks, sinks, needs[4]),
    )


def supports(*args: object, **kwargs: object) -> str | None:
    return None


BACKEND = Backend("reference", supports, forward, backward)
