"""The Transformer against `transformers`, and what it promises about packing, padding and the vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.model import KeyValueCache, Transformer, padded_vocabulary
from hotloop.engine.pretrained import load_pretrained, save_pretrained

TINY = ModelConfig(context=32, vocab_size=70, n_layers=2, d_model=32, n_heads=4)
GPT2_LIKE = replace(TINY, positions="learned", norm="layer", activation="gelu_tanh", bias=True)


def theirs(family: str, tied: bool, grouped: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=70, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=70, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2 if grouped else 4, intermediate_size=72, tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # so that biases and norm weights matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_logits_equal_those_of_transformers(tmp_path, family, tied, grouped):
    peer = theirs(family, tied, grouped)
    peer.save_pretrained(tmp_path / "peer")
    ours = load_pretrained(tmp_path / "peer").eval()
    tokens = torch.randint(0, 70, (3, 32))
    with torch.no_grad():
        expected = peer(tokens).logits
        torch.testing.assert_close(ours.logits(tokens), expected, rtol=0, atol=1e-5)
        save_pretrained(ours, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-5)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


def test_sharded_checkpoints_load(tmp_path):
    peer = theirs("llama", True)
    peer.save_pretrained(tmp_path / "peer", max_shard_size="10KB")
    assert (tmp_path / "peer" / "model.safetensors.index.json").exists()
    tokens = torch.randint(0, 70, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path / "peer").logits(tokens), peer(tokens).logits, rtol=0, atol=1e-5
        )


def test_what_cannot_be_loaded_is_named(tmp_path):
    peer = theirs("llama", False)
    folder = tmp_path / "peer"
    peer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(words: str, **changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words):
            load_pretrained(folder)

    refused("model_type 'mamba'", model_type="mamba")
    refused("hidden_act", hidden_act="relu")
    refused("attention_bias", attention_bias=True)
    refused("rope type 'yarn'", rope_parameters={"rope_type": "yarn"})
    refused(r"q_proj.weight: shape \(32, 32\), expected \(64, 32\)", head_dim=16)
    refused(r"mlp.gate_proj.weight: shape \(72, 32\), expected \(80, 32\)", intermediate_size=80)
    refused(r"layers.2.*is missing", num_hidden_layers=3)
    refused("not of llama", num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_pretrained(folder)
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(tmp_path / "nothing")


def test_what_no_family_covers_is_not_written(tmp_path):
    mixed = Transformer(replace(TINY, positions="learned"))
    with pytest.raises(UserError, match="no family covers"):
        save_pretrained(mixed, tmp_path / "mixed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(Transformer(TINY), tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize("config", [TINY, GPT2_LIKE, replace(TINY, tied_head=False)])
def test_vocabulary_padding_never_enters(config):
    model = Transformer(config).initialize(0)
    assert padded_vocabulary(70) == 128 == model.embedding.weight.shape[0]
    tokens = torch.randint(0, 70, (2, 8))
    before = model.logits(tokens)
    with torch.no_grad():
        (model.embedding if config.tied_head else model.head).weight[70:] = float("nan")
    assert before.shape == (2, 8, 70)
    assert torch.equal(model.logits(tokens), before)


@pytest.mark.parametrize("config", [TINY, GPT2_LIKE, replace(TINY, n_kv_heads=2)])
def test_the_cache_changes_nothing(config):
    model = Transformer(config).initialize(0).eval()
    tokens = torch.randint(0, 70, (2, 12))
    whole = model.logits(tokens)
    cache = KeyValueCache()
    parts = [model.logits(part, cache=cache) for part in tokens.split([5, 1, 1, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, GPT2_LIKE])
def test_right_padding_is_isolated(config):
    model = Transformer(config).initialize(0).eval()
    tokens = torch.randint(0, 70, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    padded = model.logits(tokens, attention_mask=mask)
    torch.testing.assert_close(padded[0], model.logits(tokens[:1])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[1, :6], model.logits(tokens[1:, :6])[0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="give one of them"):
        model.logits(tokens, attention_mask=mask, cu_seqlens=torch.tensor([0, 20]))


def test_initialization_is_a_function_of_the_seed():
    a, b, c = (Transformer(TINY).initialize(seed) for seed in (3, 3, 4))
    wide = Transformer(TINY).to(torch.bfloat16).initialize(3)
    for x, y, z, w in zip(a.parameters(), b.parameters(), c.parameters(), wide.parameters(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x.to(torch.bfloat16), w)
        assert x.ndim == 1 or not torch.equal(x, z)
    std = TINY.init_std / (2 * TINY.n_layers) ** 0.5
    assert a.layers[0].attention.out.weight.std().item() == pytest.approx(std, rel=0.1)
    assert a.layers[0].feed_forward.up.weight.std().item() == pytest.approx(TINY.init_std, rel=0.1)


def test_angles_stay_in_fp32():
    model = Transformer(TINY).to(torch.bfloat16)
    assert model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.rotary.cos, Transformer(TINY).rotary.cos)


def test_activation_checkpointing_gives_the_same_gradients():
    tokens = torch.randint(0, 70, (2, 16))
    grads = []
    for checkpointing in (False, True):
        model = Transformer(TINY, activation_checkpointing=checkpointing).initialize(0)
        model.logits(tokens).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match=r"33 tokens.*context is 32"):
        Transformer(TINY).logits(torch.zeros(1, 33, dtype=torch.int64))
