"""Attention of `transformers` models by hotloop: call `register()` once, then name it.

    from hotloop.kernels.drop_in.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hotloop")     # or
    model.set_attn_implementation("hotloop")

Training and generation, causal or not, grouped heads, sliding windows, softcap, sinks, padding on either side, packed
documents, dynamic and static caches; results are those of "eager" wherever a token is not padding. Padding is moved
out of the way on the device, by positions computed from the mask: no mask is read on a GPU, so one that is all ones
costs a copy of q, k, v and o there; pass none. Attention weights and dense biases do not exist: what needs them is an
error.

Packed documents: pass cu_seq_lens_q (and max_length_q, as DataCollatorWithFlattening(return_flash_attn_kwargs=True)
does). Or pass position_ids that start again in each document and no attention_mask, to a model whose "eager" heeds
them; they do not say how many documents there are, so on a GPU, and under torch.compile whether or not anything is
packed, there may be as many as positions.

With a sliding window, padding must be at the ends of a row: distances are counted over valid tokens. As for
transformers' own flash attention, a model has to hand its window and is_causal to the attention function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop.kernels.attention import attention, attention_varlen, cu_seqlens_from_document_ids
from hotloop.kernels.drop_in.padding import ValidRows, attention_valid_keys, host_bound, pad_head_dim


def register(name: str = "hotloop") -> None:
    """Make `attn_implementation=name` known to the installed transformers. Calling it again changes nothing."""
    if "flash" in name or name == "eager":
        raise ValueError(f"name = {name!r}: transformers itself gives names with 'flash', and 'eager', a meaning")
    try:
        import transformers
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            f"register() needs transformers with AttentionMaskInterface ({error}): pip install -U transformers"
        ) from error
    if not {"q_length", "q_offset", "use_vmap"} <= inspect.signature(sdpa_mask).parameters.keys():
        raise ImportError(
            f"transformers {transformers.__version__} describes masks in another way than 5.23 does: "
            "pip install -U transformers"
        )
    known = AttentionInterface().get(name)
    if known not in (None, attention_forward):
        raise ValueError(f"name = {name!r}: transformers knows {known} by that name; choose another")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


# --- the mask: once for each forward pass of a model ---

PATTERNS = ("causal_mask_function", "bidirectional_mask_function", "and_mask")


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,  # (B, positions so far) bool, False for padding
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What `attention_forward` gets as its mask.

    None: nothing but what `causal` and the window hide.
    (1, 1, 1, S + 1) int32: cu_seqlens of documents, in the flattened batch.
    (B, 1, 1, q_length + kv_length) bool: the valid rows of q, then those of k.

    Four dimensions, because transformers calls this again for a mask of two, e.g. in `generate` with a static cache.
    Query i is at position i + q_offset and key j at j + kv_offset. A static cache holds keys past the last query.
    """
    pattern = _pattern(mask_function, use_vmap)
    bidirectional = allow_is_bidirectional_skip is not None
    forced = not (allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip)
    if forced and (bidirectional or pattern == "causal_mask_function") and q_length > 1:
        raise ValueError(
            "the model works on the values of its mask, which is never formed; use attn_implementation='sdpa'"
        )
    chunk = None if local_size == getattr(config, "sliding_window", None) else local_size
    if chunk is not None and kv_offset + kv_length > chunk:
        raise ValueError(f"attention in chunks of {chunk} is not served; choose another attn_implementation")
    cross = pattern == "bidirectional_mask_function"  # any query sees all valid keys, wherever both are
    static = not cross and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length)
    if attention_mask is None and not static:
        packed = forced and pattern == "and_mask" and not bidirectional and q_length == kv_length
        return _document_boundaries(mask_function, batch_size, q_length, device) if packed else None

    end = kv_offset + kv_length
    if attention_mask is None:
        valid = torch.ones(batch_size, end, dtype=torch.bool, device=device)
    elif attention_mask.dim() == 2:
        valid = F.pad(attention_mask.bool(), (0, max(0, end - attention_mask.shape[1])))
    else:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)}: expected (batch, positions)")
    queries = torch.arange(q_length, device=valid.device) + q_offset
    valid_q = valid.new_ones(valid.shape[0], q_length) if cross else valid.index_select(1, queries)
    valid_k = valid[:, kv_offset:end]
    if static:
        valid_k = valid_k & (torch.arange(kv_offset, end, device=valid.device) < q_offset + q_length)
    rows = torch.cat([valid_q, valid_k], 1)[:, None, None]
    readable = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if readable and rows.all() else rows


def _pattern(mask_function: Callable[..., Tensor] | None, use_vmap: bool) -> str:
    """The name of one of transformers' own masks; `use_vmap` says that a model added a condition of its own."""
    code = getattr(mask_function, "__code__", None)
    name = "none" if code is None else code.co_name
    if use_vmap or name not in PATTERNS:
        raise ValueError(
            f"mask function {name!r}{' with conditions of the model' if use_vmap else ''} is not served: expected a "
            "causal, bidirectional, sliding-window or packed mask; choose another attn_implementation"
        )
    return name


def _document_boundaries(
    mask_function: Callable[..., Tensor] | None, B: int, T: int, device: torch.device | str
) -> Tensor:
    """cu_seqlens (1, 1, 1, S + 1): a document starts where a query does not see the key before it."""
    assert mask_function is not None
    i, batch = torch.arange(1, T, device=device), torch.arange(B, device=device)[:, None]
    sees_previous = mask_function(batch, torch.zeros_like(batch), i, i - 1).expand(B, T - 1)
    ids = F.pad((~sees_previous).cumsum(1), (1, 0))
    capacity = None
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        capacity = B + int(ids[:, -1].sum())
    return cu_seqlens_from_document_ids(ids, capacity=capacity)[None, None, None]


# --- the attention: once for each layer ---

WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)
"""Keyword arguments that transformers hands to every attention function and that change no result here."""


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, Hq, Tq, D)
    key: Tensor,  # (B, Hk, Tk, D)
    value: Tensor,  # (B, Hk, Tk, Dv)
    attention_mask: Tensor | None,  # see `make_mask`
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,  # (Hq,) sinks
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,)
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (B, Tq, Hq, Dv)
    """The interface of transformers' AttentionInterface; there are no attention weights to return."""
    for name, given in kwargs.items():
        if name not in WITHOUT_EFFECT and given is not None and given is not False:
            raise ValueError(f"{name} is not served by hotloop's attention; choose another attn_implementation")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window = {sliding_window}: expected at least 1, or None")
    (B, _, Tq, D), Tk, Dv = query.shape, key.shape[2], value.shape[3]
    q, k, v = (x.transpose(1, 2) for x in pad_head_dim(query, key, value))
    # transformers counts the token itself as one of the window's, to either side.
    side = None if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "window_size": (side, side),
        "scale": D**-0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    packed = attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4
    if cu_seq_lens_q is not None:
        if attention_mask is not None and not packed:
            raise ValueError("cu_seq_lens_q and attention_mask exclude each other: expected one of them")
        cu_seqlens_q = cu_seq_lens_q.int()
        cu_seqlens_k = None if cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q else cu_seq_lens_k.int()
        o = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, host_bound(max_length_q), host_bound(max_length_k), options)
    elif attention_mask is None:
        o = attention(q, k, v, **options)
    elif packed:
        o = _packed(q, k, v, attention_mask.flatten().to(q.device), None, Tq, Tq, options)
    elif attention_mask.dtype != torch.bool or attention_mask.shape != (B, 1, 1, Tq + Tk):
        raise ValueError(
            f"attention_mask {attention_mask.dtype} {tuple(attention_mask.shape)}: expected that of hotloop's mask "
            f"function; pass the model a padding mask (batch, positions), or choose another attn_implementation"
        )
    else:
        valid_q, valid_k = attention_mask[:, 0, 0].to(q.device).split([Tq, Tk], 1)
        o = _padded(q, k, v, valid_q, valid_k, options)
    return (o if o.shape[-1] == Dv else o[..., :Dv]), None


def _packed(
    q: Tensor,  # (B, Tq, Hq, D), documents one after another
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    options: dict[str, Any],
) -> Tensor:
    o = attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **options,
    )  # fmt: skip
    return o.unflatten(0, q.shape[:2])


def _padded(
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    valid_q: Tensor,  # (B, Tq) bool
    valid_k: Tensor,  # (B, Tk) bool
    options: dict[str, Any],
) -> Tensor:
    """The queries of a row are its last valid positions, so that they align at the bottom right once padding is gone.

    Rows of padding give 0; without causal and a window queries need no place among the keys and none is moved.
    """
    if not options["causal"] and options["window_size"] == (None, None):
        return attention_valid_keys(q, k, v, valid_k, **options)
    rows_q, rows_k = ValidRows.of(valid_q), ValidRows.of(valid_k)
    o = attention_varlen(
        rows_q.pack(q), rows_k.pack(k), rows_k.pack(v), cu_seqlens_q=rows_q.cu_seqlens, cu_seqlens_k=rows_k.cu_seqlens,
        max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1], **options,
    )  # fmt: skip
    return rows_q.unpack(o)


__all__ = ["attention_forward", "make_mask", "register"]
