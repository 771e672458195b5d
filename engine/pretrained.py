"""Checkpoints of other libraries in and out: folders of config.json + model.safetensors (+ tokenizer.json).

A family is data: how its configuration reads as a ModelConfig, and which of its tensors make up each of ours. Our fused
matrices (qkv, gate and up) are concatenations of theirs along the output dimension.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer, feed_forward_width


@dataclass(frozen=True)
class Source:
    """One of our tensors, from theirs: concatenated along dim 0; `transposed` where they store (in, out)."""

    names: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    architecture: str
    prefix: str
    """Their prefix of every tensor but the head; older files lack it."""
    head: str
    to_model: Callable[[dict[str, Any]], ModelConfig]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    top: Mapping[str, Source]
    layer: Mapping[str, Source]
    """Names inside `layers.{i}` and `{layer_prefix}{i}`."""
    layer_prefix: str
    parts: Callable[[ModelConfig, str], tuple[int, ...]]
    """Rows of each part of one of our concatenated tensors, by its name inside the layer."""
    ignored: tuple[str, ...] = ()
    """Buffers that carry no weights."""


def _one(name: str, *, transposed: bool = False) -> Source:
    return Source((name,), transposed)


def _parts(config: ModelConfig, name: str) -> tuple[int, ...]:
    head_dim = config.d_model // config.n_heads
    kv = (config.n_kv_heads or config.n_heads) * head_dim
    if name.startswith("attention.qkv"):
        return (config.d_model, kv, kv)
    if name.startswith("feed_forward.up"):
        return (feed_forward_width(config),) * 2
    raise KeyError(name)


def _gpt2_to_model(c: dict[str, Any]) -> ModelConfig:
    _expect(c, "activation_function", {"gelu_new", "gelu_pytorch_tanh", "gelu"}, "gelu_new")
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        _expect(c, name, {False}, False)
    dropouts = {c.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(dropouts) > 1:
        raise UserError(f"config.json: resid_pdrop, embd_pdrop and attn_pdrop differ ({dropouts}): one rate is served")
    return ModelConfig(
        context=c["n_positions"], vocab_size=c["vocab_size"], n_layers=c["n_layer"], d_model=c["n_embd"],
        n_heads=c["n_head"], d_ff=c.get("n_inner") or 4 * c["n_embd"], positions="learned", norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5), bias=True, tied_head=c.get("tie_word_embeddings", True),
        activation="gelu" if c.get("activation_function") == "gelu" else "gelu_tanh", dropout=dropouts.pop(),
    )  # fmt: skip


def _gpt2_from_model(m: ModelConfig) -> dict[str, Any]:
    _only(m, positions="learned", norm="layer", bias=True, causal=True)
    if m.activation == "swiglu" or (m.n_kv_heads or m.n_heads) != m.n_heads:
        raise UserError("GPT-2 has neither swiglu nor grouped keys and values: this model cannot be written as one")
    return {
        "model_type": "gpt2", "vocab_size": m.vocab_size, "n_positions": m.context, "n_embd": m.d_model,
        "n_layer": m.n_layers, "n_head": m.n_heads, "n_inner": feed_forward_width(m),
        "activation_function": "gelu" if m.activation == "gelu" else "gelu_new",
        "resid_pdrop": m.dropout, "embd_pdrop": m.dropout, "attn_pdrop": m.dropout, "layer_norm_epsilon": m.norm_eps,
        "initializer_range": m.init_std, "tie_word_embeddings": m.tied_head,
    }  # fmt: skip


def _llama_to_model(c: dict[str, Any]) -> ModelConfig:
    _expect(c, "hidden_act", {"silu"}, "silu")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        kind = rope.get("rope_type", rope.get("type"))
        raise UserError(f"config.json: rope type {kind!r} is not served, only 'default'")
    if c.get("head_dim") not in (None, c["hidden_size"] // c["num_attention_heads"]):
        raise UserError(f"config.json: head_dim = {c['head_dim']}: must be hidden_size / num_attention_heads")
    for name in ("attention_bias", "mlp_bias"):
        _expect(c, name, {False}, False)
    return ModelConfig(
        context=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"], n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], d_ff=c["intermediate_size"],
        positions="rotary", rope_theta=float(c.get("rope_theta") or rope.get("rope_theta", 10_000.0)), norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6), activation="swiglu", bias=False,
        tied_head=c.get("tie_word_embeddings", False),
    )  # fmt: skip


def _llama_from_model(m: ModelConfig) -> dict[str, Any]:
    _only(m, positions="rotary", norm="rms", bias=False, causal=True, activation="swiglu")
    return {
        "model_type": "llama", "vocab_size": m.vocab_size, "max_position_embeddings": m.context,
        "hidden_size": m.d_model, "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.n_kv_heads or m.n_heads, "intermediate_size": feed_forward_width(m),
        "hidden_act": "silu", "rope_theta": m.rope_theta, "rms_norm_eps": m.norm_eps, "attention_bias": False,
        "mlp_bias": False, "initializer_range": m.init_std, "tie_word_embeddings": m.tied_head,
    }  # fmt: skip


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        head="lm_head.weight",
        to_model=_gpt2_to_model,
        from_model=_gpt2_from_model,
        top={
            "embedding.weight": _one("wte.weight"),
            "position_embedding.weight": _one("wpe.weight"),
            "final_norm.weight": _one("ln_f.weight"),
            "final_norm.bias": _one("ln_f.bias"),
        },
        layer={
            "attention_norm.weight": _one("ln_1.weight"),
            "attention_norm.bias": _one("ln_1.bias"),
            "attention.qkv.weight": _one("attn.c_attn.weight", transposed=True),
            "attention.qkv.bias": _one("attn.c_attn.bias"),
            "attention.out.weight": _one("attn.c_proj.weight", transposed=True),
            "attention.out.bias": _one("attn.c_proj.bias"),
            "feed_forward_norm.weight": _one("ln_2.weight"),
            "feed_forward_norm.bias": _one("ln_2.bias"),
            "feed_forward.up.weight": _one("mlp.c_fc.weight", transposed=True),
            "feed_forward.up.bias": _one("mlp.c_fc.bias"),
            "feed_forward.down.weight": _one("mlp.c_proj.weight", transposed=True),
            "feed_forward.down.bias": _one("mlp.c_proj.bias"),
        },
        layer_prefix="h.",
        parts=_parts,
        ignored=("attn.bias", "attn.masked_bias"),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        head="lm_head.weight",
        to_model=_llama_to_model,
        from_model=_llama_from_model,
        top={"embedding.weight": _one("embed_tokens.weight"), "final_norm.weight": _one("norm.weight")},
        layer={
            "attention_norm.weight": _one("input_layernorm.weight"),
            "attention.qkv.weight": Source(
                ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
            ),
            "attention.out.weight": _one("self_attn.o_proj.weight"),
            "feed_forward_norm.weight": _one("post_attention_layernorm.weight"),
            "feed_forward.up.weight": Source(("mlp.gate_proj.weight", "mlp.up_proj.weight")),
            "feed_forward.down.weight": _one("mlp.down_proj.weight"),
        },
        layer_prefix="layers.",
        parts=_parts,
        ignored=("rotary_emb.inv_freq",),
    ),
}


def load_pretrained(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a folder with config.json and model.safetensors (or model.safetensors.index.json).

    Raises UserError for an unknown family, a setting that this model does not compute, or a tensor that is missing,
    misshapen or unknown, by name. Pickled weights are refused.
    """
    folder = Path(folder)
    values = _read_json(folder / "config.json")
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        kind = values.get("model_type")
        raise UserError(f"{folder}: model_type {kind!r} is not served (one of {', '.join(FAMILIES)})")
    try:
        config = family.to_model(values)
    except KeyError as error:
        raise UserError(f"{folder}/config.json: field {error} is missing") from error
    theirs = _read_tensors(folder)
    model = Transformer(config)
    ours = dict(model.named_parameters())
    used = set()

    def take(name: str, prefix: str) -> Tensor:
        full = family.prefix + prefix + name
        full = full if full in theirs else prefix + name
        if full not in theirs:
            raise UserError(f"{folder}: tensor {family.prefix + prefix + name} is missing")
        used.add(full)
        return theirs[full]

    with torch.no_grad():
        for name, prefix, source in _entries(family, config):
            tensor = torch.cat([take(part, prefix) for part in source.names])
            tensor = tensor.T if source.transposed else tensor
            rows = config.vocab_size if name == "embedding.weight" else None
            _copy(ours[name], tensor, f"{folder}: {prefix}{'+'.join(source.names)}", rows)
        used.add(family.head)
        if not config.tied_head:
            if family.head not in theirs:
                raise UserError(f"{folder}: tensor {family.head} is missing, and tie_word_embeddings is false")
            _copy(ours["head.weight"], theirs[family.head], f"{folder}: {family.head}", config.vocab_size)
    unknown = [name for name in theirs if name not in used and not name.endswith(family.ignored)]
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} tensors are not part of {family.architecture}: {unknown[:5]}")
    return model.to(dtype)


def save_pretrained(model: Transformer, folder: Path | str, *, tokenizer: Path | None = None) -> None:
    """Write config.json and model.safetensors that `transformers` loads to equal logits.

    The folder must not exist or be empty; it is assembled aside and renamed. Raises UserError for a configuration that
    no family of this module covers.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: give another folder")
    family, values = _family_of(model.config)
    ours = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = {}
    for name, prefix, source in _entries(family, model.config):
        tensor = ours[name]
        if name == "embedding.weight":
            tensor = tensor[: model.vocab_size]
        tensor = tensor.T if source.transposed else tensor
        sizes = family.parts(model.config, name.split(".", 2)[-1]) if len(source.names) > 1 else (tensor.shape[0],)
        for part_name, part in zip(source.names, tensor.split(sizes), strict=True):
            tensors[family.prefix + prefix + part_name] = part.contiguous()
    if not model.config.tied_head:
        tensors[family.head] = ours["head.weight"][: model.vocab_size].contiguous()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {"architectures": [family.architecture], **values, "dtype": dtype}
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    (aside / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        shutil.copy(tokenizer, aside / "tokenizer.json")
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)


def _entries(family: Family, config: ModelConfig) -> list[tuple[str, str, Source]]:
    """(our name, their prefix, source) of every tensor but the head."""
    entries = [(name, "", source) for name, source in family.top.items()]
    for i in range(config.n_layers):
        entries += [(f"layers.{i}.{n}", f"{family.layer_prefix}{i}.", source) for n, source in family.layer.items()]
    return entries


def _family_of(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    reasons = []
    for name, family in FAMILIES.items():
        try:
            return family, family.from_model(config)
        except UserError as error:
            reasons.append(f"{name}: {error}")
    raise UserError("no family covers this model; " + "; ".join(reasons))


def _copy(ours: Tensor, theirs: Tensor, what: str, rows: int | None = None) -> None:
    """Copy into the first `rows` rows (all by default); the rest, a vocabulary's padding, becomes zero."""
    target = ours[:rows]
    if theirs.shape != target.shape:
        raise UserError(f"{what}: shape {tuple(theirs.shape)}, expected {tuple(target.shape)}")
    ours.zero_()
    target.copy_(theirs)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        reason = f"{pickled[0]} is a pickle, which can run code when it is read" if pickled else "no weights there"
        raise UserError(f"{folder}: model.safetensors is missing ({reason}): save the model as safetensors")
    tensors = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error})") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _expect(values: dict[str, Any], name: str, allowed: set[Any], default: Any) -> None:
    if values.get(name, default) not in allowed:
        raise UserError(f"config.json: {name} = {values[name]!r} is not served (one of {sorted(map(str, allowed))})")


def _only(config: ModelConfig, **fields: Any) -> None:
    if replace(config, **fields) != config:
        found = {name: getattr(config, name) for name in fields}
        wrong = [f"{name} = {value!r}" for name, value in found.items() if value != fields[name]]
        raise UserError(f"needs {fields}, but the model has {', '.join(wrong)}")
