"""The settings of each family, from its config.json to ours and back.

`to_model` refuses what this model does not compute, `from_model` what the family does not: a UserError with the names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.model import feed_forward_width, head_dimension, is_local

Values = dict[str, Any]

GELU: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# GPT-2


def gpt2_to_model(c: Values) -> ModelConfig:
    activation = one_of(c, "activation_function", GELU, "gelu_new")
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        one_of(c, name, (False,), False)
    one_of(c, "scale_attn_weights", (True,), True)
    return ModelConfig(
        context=c["n_positions"], vocab_size=c["vocab_size"], n_layers=c["n_layer"], d_model=c["n_embd"],
        n_heads=c["n_head"], d_ff=c.get("n_inner") or 4 * c["n_embd"], positions="learned", norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5), bias=True, tied_head=c.get("tie_word_embeddings", True),
        activation=GELU[activation], init_std=c.get("initializer_range", 0.02),
        dropout=same(c, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1), **_DECODERS_CLASSIFIER,
    )  # fmt: skip


def gpt2_from_model(m: ModelConfig) -> Values:
    m = _needs(
        m, _DECODER, positions="learned", norm="layer", bias=True, qkv_bias=True, norm_bias=True, qk_norm=False,
        activation=("gelu", "gelu_tanh"), n_kv_heads=m.n_heads, head_dim=m.d_model // m.n_heads,
    )  # fmt: skip
    return {
        "model_type": "gpt2", "vocab_size": m.vocab_size, "n_positions": m.context, "n_embd": m.d_model,
        "n_layer": m.n_layers, "n_head": m.n_heads, "n_inner": m.d_ff,
        "activation_function": "gelu" if m.activation == "gelu" else "gelu_new",
        "resid_pdrop": m.dropout, "embd_pdrop": m.dropout, "attn_pdrop": m.dropout, "layer_norm_epsilon": m.norm_eps,
        "initializer_range": m.init_std, "tie_word_embeddings": m.tied_head,
    }  # fmt: skip


# Llama, Qwen2 (biases of q, k, v) and Qwen3 (norms of q and k)


def llama_to_model(c: Values) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        one_of(c, name, (False,), False)
    return _llama_like(c)


def qwen2_to_model(c: Values) -> ModelConfig:
    return replace(_llama_like(c), qkv_bias=True)


def qwen3_to_model(c: Values) -> ModelConfig:
    one_of(c, "attention_bias", (False,), False)
    return replace(_llama_like({"head_dim": 128, **c}), qk_norm=True)


def _llama_like(c: Values) -> ModelConfig:
    one_of(c, "hidden_act", ("silu",), "silu")
    one_of(c, "attention_dropout", (0.0,), 0.0)
    one_of(c, "use_sliding_window", (False,), False)
    if set(c.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise UserError(f"config.json: layer_types = {c['layer_types']} is not served, only 'full_attention'")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    return ModelConfig(
        context=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"], n_heads=c["num_attention_heads"], head_dim=c.get("head_dim"),
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], d_ff=c["intermediate_size"],
        positions="rotary", rope_theta=_rope_theta(rope, c.get("rope_theta") or 10_000.0), norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6), activation="swiglu", bias=False,
        init_std=c.get("initializer_range", 0.02), tied_head=c.get("tie_word_embeddings", False),
        **_DECODERS_CLASSIFIER,
    )  # fmt: skip


def llama_from_model(m: ModelConfig) -> Values:
    m = _needs(m, _LLAMA_LIKE, qkv_bias=False, qk_norm=False)
    return {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": m.head_dim,
        **_llama_values(m),
    }


def qwen2_from_model(m: ModelConfig) -> Values:
    m = _needs(m, _LLAMA_LIKE, qkv_bias=True, qk_norm=False, head_dim=m.d_model // m.n_heads)
    return {"model_type": "qwen2", "use_sliding_window": False, **_llama_values(m)}


def qwen3_from_model(m: ModelConfig) -> Values:
    m = _needs(m, _LLAMA_LIKE, qkv_bias=False, qk_norm=True)
    return {
        "model_type": "qwen3", "attention_bias": False, "head_dim": m.head_dim, "use_sliding_window": False,
        **_llama_values(m),
    }  # fmt: skip


def _llama_values(m: ModelConfig) -> Values:
    return {
        "vocab_size": m.vocab_size, "max_position_embeddings": m.context, "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads, "num_key_value_heads": m.n_kv_heads,
        "intermediate_size": m.d_ff, "hidden_act": "silu", "rope_theta": m.rope_theta, "rms_norm_eps": m.norm_eps,
        "initializer_range": m.init_std, "tie_word_embeddings": m.tied_head,
    }  # fmt: skip


# BERT


def bert_to_model(c: Values) -> ModelConfig:
    activation = one_of(c, "hidden_act", GELU, "gelu")
    one_of(c, "position_embedding_type", ("absolute", None), "absolute")
    one_of(c, "is_decoder", (False,), False)
    one_of(c, "tie_word_embeddings", (True,), True)
    dropout = same(c, ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)
    one_of(c, "classifier_dropout", (None, dropout), None)
    return ModelConfig(
        context=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"], n_heads=c["num_attention_heads"], d_ff=c["intermediate_size"], positions="learned",
        norm="layer", norm_eps=c.get("layer_norm_eps", 1e-12), norm_position="post", embedding_norm=True, bias=True,
        token_types=c.get("type_vocab_size", 2), activation=GELU[activation], causal=False, dropout=dropout,
        init_std=c.get("initializer_range", 0.02), classifier_head="bert", pooling="cls",
    )  # fmt: skip


def bert_from_model(m: ModelConfig) -> Values:
    m = _needs(
        m, _ENCODER, positions="learned", norm_position="post", bias=True, norm_bias=True, tied_head=True,
        activation=("gelu", "gelu_tanh"), local_window=None,
    )  # fmt: skip
    if m.n_labels:
        _needs(m, {}, classifier_head="bert", pooling="cls", classifier_bias=True)
    if not m.token_types:
        raise UserError("token_types = 0 (it needs at least 1)")
    return {
        "model_type": "bert", "vocab_size": m.vocab_size, "max_position_embeddings": m.context,
        "hidden_size": m.d_model, "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads,
        "intermediate_size": m.d_ff, "hidden_act": "gelu" if m.activation == "gelu" else "gelu_new",
        "hidden_dropout_prob": m.dropout, "attention_probs_dropout_prob": m.dropout, "type_vocab_size": m.token_types,
        "layer_norm_eps": m.norm_eps, "initializer_range": m.init_std, "tie_word_embeddings": True,
    }  # fmt: skip


# ModernBERT


def modernbert_to_model(c: Values) -> ModelConfig:
    for name in ("hidden_activation", "classifier_activation"):
        one_of(c, name, ("gelu",), "gelu")
    one_of(c, "decoder_bias", (True,), True)
    bias = same(c, ("attention_bias", "mlp_bias", "classifier_bias"), False)
    dropout = same(c, ("attention_dropout", "mlp_dropout", "embedding_dropout", "classifier_dropout"), 0.0)
    n_layers = c["num_hidden_layers"]
    every = _global_every(c, n_layers)
    rope = c.get("rope_parameters") or {}
    theta = _rope_theta(rope.get("full_attention") or {}, c.get("global_rope_theta") or 160_000.0)
    local = _rope_theta(rope.get("sliding_attention") or {}, c.get("local_rope_theta", 10_000.0) or theta)
    return ModelConfig(
        context=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layers=n_layers, d_model=c["hidden_size"],
        n_heads=c["num_attention_heads"], d_ff=c["intermediate_size"], positions="rotary", rope_theta=theta,
        local_rope_theta=local, local_window=c.get("local_attention", 128) // 2, global_every=every, norm="layer",
        norm_eps=c.get("norm_eps", 1e-5), norm_bias=c.get("norm_bias", False), embedding_norm=True, bias=bias,
        activation="geglu", causal=False, dropout=dropout, tied_head=c.get("tie_word_embeddings", True),
        init_std=c.get("initializer_range", 0.02), classifier_head="modernbert",
        pooling=one_of(c, "classifier_pooling", ("cls", "mean"), "cls"),
    )  # fmt: skip


def _global_every(c: Values, n_layers: int) -> int:
    kinds = c.get("layer_types")
    if kinds is None:
        return c.get("global_attn_every_n_layers", 3)
    for every in range(1, n_layers + 1):
        if kinds == ["sliding_attention" if i % every else "full_attention" for i in range(n_layers)]:
            return every
    raise UserError(
        f"config.json: layer_types = {kinds} is not served: full attention every so many layers, from the first"
    )


def modernbert_from_model(m: ModelConfig) -> Values:
    m = _needs(
        m, _ENCODER, positions="rotary", norm_position="pre", activation="geglu", qkv_bias=m.bias, token_types=0,
        local_window=m.local_window or None,
    )  # fmt: skip
    if m.n_labels:
        _needs(m, {}, classifier_head="modernbert", pooling=("cls", "mean"), classifier_bias=True)
    kinds = ["sliding_attention" if is_local(m, i) else "full_attention" for i in range(m.n_layers)]
    local_theta = m.rope_theta if m.local_rope_theta is None else m.local_rope_theta
    return {
        "model_type": "modernbert", "vocab_size": m.vocab_size, "max_position_embeddings": m.context,
        "hidden_size": m.d_model, "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads,
        "intermediate_size": m.d_ff, "hidden_activation": "gelu", "layer_types": kinds,
        "local_attention": 2 * (m.local_window or 64),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": m.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "norm_eps": m.norm_eps, "norm_bias": m.norm_bias, "attention_bias": m.bias, "mlp_bias": m.bias,
        "classifier_bias": m.bias, "classifier_activation": "gelu",
        "classifier_pooling": m.pooling if m.n_labels else "cls",
        "decoder_bias": True, "attention_dropout": m.dropout, "mlp_dropout": m.dropout,
        "embedding_dropout": m.dropout, "classifier_dropout": m.dropout, "initializer_range": m.init_std,
        "tie_word_embeddings": m.tied_head,
    }  # fmt: skip


# What is shared


def one_of(values: Values, name: str, allowed: Iterable[Any], default: Any) -> Any:
    """The value of a field, the default where it is absent. Raises UserError for one that is not allowed."""
    value = values.get(name, default)
    if value not in tuple(allowed):
        raise UserError(f"config.json: {name} = {value!r} is not served (one of {', '.join(map(repr, allowed))})")
    return value


def same(values: Values, names: tuple[str, ...], default: Any) -> Any:
    """The one value of several fields. Raises UserError where they differ."""
    found = {name: values.get(name, default) for name in names}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} = {value!r}" for name, value in found.items())
        raise UserError(f"config.json: {listed}: they differ, one value for all is served")
    return found[names[0]]


def _rope_theta(rope: Values, default: float) -> float:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope type {kind!r} is not served, only 'default'")
    return float(rope.get("rope_theta") or default)


def explicit(m: ModelConfig) -> ModelConfig:
    """The configuration with nothing left to a default that depends on another field."""
    return replace(
        m, n_kv_heads=m.n_kv_heads or m.n_heads, d_ff=feed_forward_width(m), head_dim=head_dimension(m),
        qkv_bias=m.bias if m.qkv_bias is None else m.qkv_bias, norm_bias=m.bias if m.norm_bias is None else m.norm_bias,
    )  # fmt: skip


_DECODER: Values = {
    "causal": True, "norm_position": "pre", "embedding_norm": False, "token_types": 0, "local_window": None,
    "head": "linear",
}  # fmt: skip
_LLAMA_LIKE: Values = {
    **_DECODER, "positions": "rotary", "norm": "rms", "bias": False, "activation": "swiglu",
}  # fmt: skip
_ENCODER: Values = {"causal": False, "norm": "layer", "embedding_norm": True, "qk_norm": False}
_DECODERS_CLASSIFIER: Values = {"classifier_head": "linear", "pooling": "last", "classifier_bias": False}


def _needs(m: ModelConfig, common: Values, **more: Any) -> ModelConfig:
    """The configuration made explicit. Raises UserError with each field that is not as the family has it."""
    m = explicit(m)
    needed = {**common, **more}
    if common.get("embedding_norm"):
        needed = {**needed, "n_kv_heads": m.n_heads, "head_dim": m.d_model // m.n_heads}
    if common.get("causal") and m.n_labels:
        needed = {**needed, **_DECODERS_CLASSIFIER}
    wrong = []
    for name, value in needed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if (given := getattr(m, name)) not in allowed:
            wrong.append(f"{name} = {given!r} (it has {' or '.join(map(repr, allowed))})")
    if wrong:
        raise UserError(", ".join(wrong))
    return m
