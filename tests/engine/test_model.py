"""What the Transformer promises about packing, padding, the vocabulary and its heads. (Against `transformers`:
test_pretrained.py.)"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hotloop.engine.config import ModelConfig
from hotloop.engine.model import KeyValueCache, Transformer, padded_vocabulary

TINY = ModelConfig(context=32, vocab_size=70, n_layers=2, d_model=32, n_heads=4)
GPT2_LIKE = replace(TINY, positions="learned", norm="layer", activation="gelu_tanh", bias=True)
QWEN_LIKE = replace(TINY, n_kv_heads=2, head_dim=16, qk_norm=True, qkv_bias=True)
BERT_LIKE = replace(
    GPT2_LIKE, causal=False, norm_position="post", embedding_norm=True, token_types=2, head="masked",
    n_labels=3, classifier_head="bert",
)  # fmt: skip
MODERN_LIKE = replace(
    TINY, n_layers=4, causal=False, norm="layer", norm_bias=False, embedding_norm=True, activation="geglu",
    local_window=3, global_every=3, local_rope_theta=500.0, head="masked", n_labels=3, classifier_head="modernbert",
    pooling="mean",
)  # fmt: skip
FAMILIES = {"llama": TINY, "gpt2": GPT2_LIKE, "qwen": QWEN_LIKE, "bert": BERT_LIKE, "modernbert": MODERN_LIKE}


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these wait for threads and for nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(config: ModelConfig, seed: int = 0) -> Transformer:
    """Initialized, and then moved, so that biases and norm weights matter."""
    model = Transformer(config).initialize(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def packed(lengths: list[int], capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens (1, N), positions (1, N), cu_seqlens (capacity + 1,)"""
    tokens = torch.randint(0, 70, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths, *[0] * (capacity - len(lengths))]).cumsum(0)
    return tokens, positions, bounds.to(torch.int32)


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


@pytest.mark.parametrize("config", [TINY, GPT2_LIKE, QWEN_LIKE, replace(TINY, local_window=3, global_every=2)])
def test_the_cache_changes_nothing(config):
    model = Transformer(config).initialize(0).eval()
    tokens = torch.randint(0, 70, (2, 12))
    whole = model.logits(tokens)
    cache = KeyValueCache()
    parts = [model.logits(part, cache=cache) for part in tokens.split([5, 1, 1, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
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


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_as_alone(family):
    """Hidden states, logits and classes of each document, and not one bit from another, be it NaN."""
    config = replace(FAMILIES[family], n_labels=3)
    model, lengths = drawn(config), [9, 1, 14, 6]
    tokens, positions, cu_seqlens = packed(lengths, capacity=7)
    h = model.hidden_states(tokens, positions=positions, cu_seqlens=cu_seqlens)
    classes = model.classify(h, cu_seqlens)
    assert classes.shape == (7, 3)
    assert classes.isfinite().all()
    for i, part in enumerate(tokens[0].split(lengths)):
        alone = model.hidden_states(part[None])
        torch.testing.assert_close(h[0].split(lengths)[i], alone[0], rtol=0, atol=1e-5)
        bounds = torch.tensor([0, lengths[i]], dtype=torch.int32)
        torch.testing.assert_close(classes[i], model.classify(alone, bounds)[0], rtol=0, atol=1e-5)
    spoilt = h.clone()
    spoilt[0, 12:] = float("nan")
    again = model.classify(spoilt, cu_seqlens)
    assert torch.equal(again[:2], classes[:2])
    assert again[2].isnan().all() == (config.pooling != "cls")


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_what_a_classifier_reads(pooling):
    model = drawn(replace(TINY, n_labels=4, pooling=pooling))
    h = torch.randn(2, 8, 32)
    bounds = [0, 3, 7, 16, 16, 16]
    rows = {
        "cls": lambda a, b: h.flatten(0, 1)[a],
        "mean": lambda a, b: h.flatten(0, 1)[a:b].mean(0),
        "last": lambda a, b: h.flatten(0, 1)[b - 1],
    }
    found = model.classify(h, torch.tensor(bounds, dtype=torch.int32))
    for i, (a, b) in enumerate(pairwise(bounds[:4])):
        torch.testing.assert_close(found[i], model.classifier.out(rows[pooling](a, b)))
    with pytest.raises(ValueError, match="no classifier"):
        Transformer(TINY).classify(h, torch.tensor([0, 16], dtype=torch.int32))


@torch.no_grad()
def test_local_layers_see_their_window_and_no_more():
    """One local layer (layer 1): a changed token moves the positions within the window of it, on both sides."""
    model = drawn(replace(MODERN_LIKE, n_layers=2, global_every=2))
    x = torch.randn(1, 20, 32)
    rotary = model.local_rotary(torch.arange(20)[None])
    before = model.layers[1](x, rotary, None)
    x[0, 10] += 1
    moved = (model.layers[1](x, rotary, None) != before).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 12, 13]
    x[0, 10] -= 1
    assert model.layers[0].attention.window == (None, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_in_one_graph_with_gradients(family):
    """What a step calls, packed: hidden states, the head's input and bias, a classifier."""
    config = replace(FAMILIES[family], n_layers=2, n_labels=3)
    model = drawn(config).train()
    tokens, positions, cu_seqlens = packed([9, 1, 14, 6], capacity=7)

    def loss() -> torch.Tensor:
        h = model.hidden_states(tokens, positions=positions, cu_seqlens=cu_seqlens)
        logits = torch.nn.functional.linear(model.head_input(h), model.head_weight, model.head_bias)
        return logits.square().mean() + model.classify(h, cu_seqlens).square().mean()

    loss().backward()
    eager = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in eager.values())
    model.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, eager[name], rtol=0, atol=1e-6, msg=name)


def test_the_masked_head_stands_before_the_projection():
    model = drawn(BERT_LIKE)
    tokens = torch.randint(0, 70, (2, 8))
    h = model.hidden_states(tokens)
    logits = model.head_input(h) @ model.head_weight.T + model.head_bias
    torch.testing.assert_close(model.logits(tokens), logits)
    plain = drawn(TINY)
    assert plain.head_input(h) is h
    assert plain.head_bias is None


@torch.no_grad()
def test_token_types_are_0_unless_given():
    model = drawn(BERT_LIKE)
    tokens = torch.randint(0, 70, (2, 8))
    zeros = torch.zeros_like(tokens)
    h = model.hidden_states(tokens)
    assert torch.equal(model.hidden_states(tokens, token_types=zeros), h)
    assert not torch.equal(model.hidden_states(tokens, token_types=1 - zeros), h)
    with pytest.raises(ValueError, match="no embedding for them"):
        drawn(TINY).hidden_states(tokens, token_types=zeros)


def test_heads_are_drawn_alike_whatever_stands_below():
    """One seed gives one new classifier, whether the body is drawn, loaded, deeper or of another vocabulary."""
    small, large = (Transformer(replace(BERT_LIKE, **c)).initialize(7) for c in ({}, {"vocab_size": 99, "n_layers": 3}))
    for name, parameter in small.named_parameters():
        if name.startswith(("classifier.", "masked_head.")) and name != "masked_head.bias":
            assert torch.equal(parameter, large.get_parameter(name)), name
    assert small.classifier.out.weight.std() > 0


def test_what_is_given_is_loaded_and_the_rest_is_named():
    given = drawn(BERT_LIKE, seed=1)
    state = {name: p.detach() for name, p in given.named_parameters() if not name.startswith("classifier.")}
    state["embedding.weight"] = state["embedding.weight"][:70]  # without padding, as files have it
    model, fresh = Transformer(BERT_LIKE).initialize(2), Transformer(BERT_LIKE).initialize(2)
    drawn_anew = model.load_initial(state)
    assert drawn_anew == tuple(name for name, _ in model.named_parameters() if name.startswith("classifier."))
    assert len(drawn_anew) == 4
    for name, parameter in model.named_parameters():
        source = fresh.get_parameter(name) if name in drawn_anew else given.get_parameter(name)
        rows = 70 if name == "embedding.weight" else None
        assert torch.equal(parameter[:rows], source[:rows]), name
    assert not model.embedding.weight[70:].any()
    with pytest.raises(ValueError, match=r"attention.out.weight is not part"):
        model.load_initial({"layers.9.attention.out.weight": torch.zeros(32, 32)})
    before = model.final_norm, model.embedding.weight.clone()
    with pytest.raises(ValueError, match=r"position_embedding.weight: shape \(33, 32\), expected \(32, 32\)"):
        model.load_initial({"embedding.weight": torch.zeros(70, 32), "position_embedding.weight": torch.zeros(33, 32)})
    assert torch.equal(model.embedding.weight, before[1])
    # Heads that this model does not have are passed over.
    assert "embedding.weight" in Transformer(TINY).load_initial({"masked_head.bias": torch.zeros(70)})
