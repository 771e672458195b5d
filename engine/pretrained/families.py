"""Families as data: which of their modules make up each of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hotloop.engine.config import ModelConfig
from hotloop.engine.pretrained import settings

Modules = Mapping[str, str | tuple[str, ...]]
"""Our module -> theirs, or several concatenated along the output dimension; `{i}` is the number of a layer. Both kinds
of tensors are meant, `.weight` and `.bias`, as far as our model has them."""


@dataclass(frozen=True)
class Head:
    architectures: tuple[str, ...]
    """What `architectures` of config.json may say; we write the first."""
    auto: str
    """The class of `transformers` that loads it."""
    modules: Modules = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    to_model: Callable[[dict[str, Any]], ModelConfig]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    prefix: str
    """Begins the name of every tensor of the body; files of the body alone lack it."""
    body: Modules
    heads: Mapping[str, Head]
    """By "none", "linear", "masked" and "classifier"."""
    transposed: tuple[str, ...] = ()
    """Their modules that store (in, out)."""
    twins: Mapping[str, str] = field(default_factory=dict)
    """A tensor that is another one under a second name."""
    other_heads: tuple[str, ...] = ()
    """Beginnings of tensors of heads that this model never has."""
    buffers: tuple[str, ...] = ()
    """Endings of tensors that carry no weights."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Endings of older files, and what they are today."""


def _causal(body: str, classes: str) -> dict[str, Head]:
    return {
        "none": Head((f"{classes}Model",), "AutoModel"),
        "linear": Head((body,), "AutoModelForCausalLM", {"head": "lm_head"}),
        "classifier": Head(
            (f"{classes}ForSequenceClassification",), "AutoModelForSequenceClassification", {"classifier.out": "score"}
        ),
    }


GPT2 = Family(
    to_model=settings.gpt2_to_model,
    from_model=settings.gpt2_from_model,
    prefix="transformer.",
    body={
        "embedding": "wte",
        "position_embedding": "wpe",
        "layers.{i}.attention_norm": "h.{i}.ln_1",
        "layers.{i}.attention.qkv": "h.{i}.attn.c_attn",
        "layers.{i}.attention.out": "h.{i}.attn.c_proj",
        "layers.{i}.feed_forward_norm": "h.{i}.ln_2",
        "layers.{i}.feed_forward.up": "h.{i}.mlp.c_fc",
        "layers.{i}.feed_forward.down": "h.{i}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    heads=_causal("GPT2LMHeadModel", "GPT2"),
    transposed=(".c_attn", ".c_proj", ".c_fc"),
    buffers=(".attn.bias", ".attn.masked_bias"),
)

LLAMA_BODY: Modules = {
    "embedding": "embed_tokens",
    "layers.{i}.attention_norm": "layers.{i}.input_layernorm",
    "layers.{i}.attention.qkv": (
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    "layers.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
    "layers.{i}.attention.out": "layers.{i}.self_attn.o_proj",
    "layers.{i}.feed_forward_norm": "layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "layers.{i}.feed_forward.down": "layers.{i}.mlp.down_proj",
    "final_norm": "norm",
}


def _llama_like(
    classes: str, to_model: Callable[[dict[str, Any]], ModelConfig], from_model: Callable[[ModelConfig], dict[str, Any]]
) -> Family:
    return Family(
        to_model=to_model,
        from_model=from_model,
        prefix="model.",
        body=LLAMA_BODY,
        heads=_causal(f"{classes}ForCausalLM", classes),
        buffers=(".rotary_emb.inv_freq",),
    )


BERT = Family(
    to_model=settings.bert_to_model,
    from_model=settings.bert_from_model,
    prefix="bert.",
    body={
        "embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "token_type_embedding": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "layers.{i}.attention.qkv": (
            "encoder.layer.{i}.attention.self.query",
            "encoder.layer.{i}.attention.self.key",
            "encoder.layer.{i}.attention.self.value",
        ),
        "layers.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
        "layers.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
        "layers.{i}.feed_forward.up": "encoder.layer.{i}.intermediate.dense",
        "layers.{i}.feed_forward.down": "encoder.layer.{i}.output.dense",
        "layers.{i}.feed_forward_norm": "encoder.layer.{i}.output.LayerNorm",
    },
    heads={
        "none": Head(("BertModel",), "AutoModel"),
        "masked": Head(
            ("BertForMaskedLM", "BertForPreTraining"),
            "AutoModelForMaskedLM",
            {
                "masked_head.dense": "cls.predictions.transform.dense",
                "masked_head.norm": "cls.predictions.transform.LayerNorm",
                "masked_head": "cls.predictions",
                "head": "cls.predictions.decoder",
            },
        ),
        "classifier": Head(
            ("BertForSequenceClassification",),
            "AutoModelForSequenceClassification",
            {"classifier.dense": "bert.pooler.dense", "classifier.out": "classifier"},
        ),
    },
    twins={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    other_heads=("cls.seq_relationship.",),
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    renamed=((".gamma", ".weight"), (".beta", ".bias")),
)

MODERNBERT = Family(
    to_model=settings.modernbert_to_model,
    from_model=settings.modernbert_from_model,
    prefix="model.",
    body={
        "embedding": "embeddings.tok_embeddings",
        "embedding_norm": "embeddings.norm",
        "layers.{i}.attention_norm": "layers.{i}.attn_norm",
        "layers.{i}.attention.qkv": "layers.{i}.attn.Wqkv",
        "layers.{i}.attention.out": "layers.{i}.attn.Wo",
        "layers.{i}.feed_forward_norm": "layers.{i}.mlp_norm",
        "layers.{i}.feed_forward.up": "layers.{i}.mlp.Wi",
        "layers.{i}.feed_forward.down": "layers.{i}.mlp.Wo",
        "final_norm": "final_norm",
    },
    heads={
        "none": Head(("ModernBertModel",), "AutoModel"),
        "masked": Head(
            ("ModernBertForMaskedLM",),
            "AutoModelForMaskedLM",
            {
                "masked_head.dense": "head.dense",
                "masked_head.norm": "head.norm",
                "masked_head": "decoder",
                "head": "decoder",
            },
        ),
        "classifier": Head(
            ("ModernBertForSequenceClassification",),
            "AutoModelForSequenceClassification",
            {"classifier.dense": "head.dense", "classifier.norm": "head.norm", "classifier.out": "classifier"},
        ),
    },
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": GPT2,
    "llama": _llama_like("Llama", settings.llama_to_model, settings.llama_from_model),
    "qwen2": _llama_like("Qwen2", settings.qwen2_to_model, settings.qwen2_from_model),
    "qwen3": _llama_like("Qwen3", settings.qwen3_to_model, settings.qwen3_from_model),
    "bert": BERT,
    "modernbert": MODERNBERT,
}
"""By `model_type` of config.json."""
