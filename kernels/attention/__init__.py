"""Exact attention, dense and over packed documents."""

from hotloop.kernels.attention.op import (
    AttentionOutput,
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_with_lse,
)
from hotloop.kernels.attention.packing import cu_seqlens_from_document_ids

__all__ = [
    "AttentionOutput",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "cu_seqlens_from_document_ids",
]
