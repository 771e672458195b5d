"""Models of transformers on hotloop's attention: logits, gradients and generated tokens are those of "eager"."""

from __future__ import annotations

import copy
import inspect
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hotloop.kernels.attention import attention
from hotloop.kernels.drop_in.transformers import attention_forward, make_mask, register

T = pytest.importorskip("transformers", reason="transformers is not installed")
try:
    register()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

V = 61
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": V,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "attn_implementation": "eager",
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def gpt2() -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": V}
    return T.GPT2LMHeadModel(T.GPT2Config(**{**SMALL, **sizes}))


def llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**GROUPED))


def mistral() -> nn.Module:  # a window
    return T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=4))


def gemma2() -> nn.Module:  # softcap, a scale of its own, layers with and without a window
    options = {"sliding_window": 4, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5}
    return T.Gemma2ForCausalLM(T.Gemma2Config(**GROUPED, **options))


def gpt_oss() -> nn.Module:  # sinks, layers with and without a window
    options = {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    options |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return T.GptOssForCausalLM(T.GptOssConfig(**GROUPED, **options))


def deepseek() -> nn.Module:  # head dimensions of q and v that differ, neither a multiple of 8
    options = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10}
    options |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    options |= {"num_key_value_heads": 4, "first_k_dense_replace": 2}
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**SMALL, **options))


def bert() -> nn.Module:
    return T.BertForMaskedLM(T.BertConfig(**SMALL))


def modernbert() -> nn.Module:  # a window to both sides
    options = {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    return T.ModernBertForMaskedLM(T.ModernBertConfig(**SMALL, **options))


def bart() -> nn.Module:  # cross attention
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    return T.BartForConditionalGeneration(T.BartConfig(**SMALL, **sizes, **heads))


ENCODERS = (bert, modernbert)
DECODERS = (gpt2, llama, mistral, gemma2, gpt_oss, deepseek)


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """One model with weights far from zero, twice: on eager and on hotloop."""
    torch.manual_seed(0)
    eager = build().eval()
    with torch.no_grad():
        for p in eager.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("hotloop")
    return eager, ours


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def padding(side: str, B: int, length: int) -> Tensor:
    mask = torch.ones(B, length, dtype=torch.int64)
    if side == "left":
        mask[0, :5], mask[2, :1] = 0, 0
    elif side == "right":
        mask[0, -5:], mask[2, -1:] = 0, 0
    return mask


def check(
    eager: nn.Module, ours: nn.Module, weight: Tensor, both: dict[str, Any], only_ours: dict[str, Any] | None = None
) -> None:
    """Logits where `weight` is not zero, and the gradient of every parameter."""
    logits = [eager(**both).logits, ours(**both, **(only_ours or {})).logits]
    kept = weight.bool()
    torch.testing.assert_close(logits[1][kept], logits[0][kept], rtol=1e-5, atol=1e-5)
    upstream = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(2)) * weight[..., None]
    for model, x in zip((eager, ours), logits, strict=True):
        model.zero_grad()
        x.backward(upstream)
    for (name, p), actual in zip(eager.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            scale = p.grad.abs().amax().item()
            torch.testing.assert_close(
                actual.grad, p.grad, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=lambda m, name=name: f"{name}: {m}"
            )


# --- training ---


@pytest.mark.parametrize("build", [*DECODERS, *ENCODERS], ids=lambda build: build.__name__)
def test_logits_and_gradients(build: Callable[[], nn.Module]) -> None:
    eager, ours = pair(build)
    x = tokens(3, 12)
    for side in ("left", "right"):
        mask = padding(side, 3, 12)
        both: dict[str, Any] = {"input_ids": x, "attention_mask": mask}
        if build in DECODERS:
            both |= {"use_cache": False, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        check(eager, ours, mask, both)
    check(eager, ours, torch.ones(3, 12), {"input_ids": x})


def test_cross_attention() -> None:
    eager, ours = pair(bart)
    for side in ("none", "left", "right"):
        both = {"input_ids": tokens(3, 12), "attention_mask": padding(side, 3, 12), "decoder_input_ids": tokens(3, 7)}
        check(eager, ours, torch.ones(3, 7), both)


@pytest.mark.parametrize("build", [gpt2, llama, gemma2], ids=lambda build: build.__name__)
def test_packed_documents(build: Callable[[], nn.Module]) -> None:
    """By position_ids alone, in one row and in two, and by the boundaries that transformers' collator makes."""
    eager, ours = pair(build)
    x, positions = tokens(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    both = {"input_ids": x, "position_ids": positions, "use_cache": False}
    check(eager, ours, torch.ones(1, 12), both)
    boundaries = torch.tensor([0, 5, 7, 12])
    lengths = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 5, "max_length_k": 5}
    check(eager, ours, torch.ones(1, 12), both, lengths)
    check(eager, ours, torch.ones(1, 12), both, {"cu_seq_lens_q": boundaries.int()})
    both = {"input_ids": x.view(2, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])}
    check(eager, ours, torch.ones(2, 6), {**both, "use_cache": False})


def test_is_causal_switches_a_decoder_to_an_encoder() -> None:
    eager, ours = pair(llama)
    for side in ("none", "right"):
        mask = padding(side, 3, 12)
        check(eager, ours, mask, {"input_ids": tokens(3, 12), "attention_mask": mask, "is_causal": False})


def test_dropout() -> None:
    """The mask that `attention` draws from the same generator, in training alone."""
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    o, _ = attention_forward(SimpleNamespace(is_causal=True), q, k, v, None, dropout=0.4)
    torch.manual_seed(1)
    expected = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, dropout_p=0.4)
    torch.testing.assert_close(o, expected)
    _, ours = pair(lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, attention_dropout=0.4)))
    x = tokens(1, 6)
    assert torch.equal(ours(x).logits, ours(x).logits)
    ours.train()
    assert not torch.equal(ours(x).logits, ours(x).logits)


# --- generation ---


@pytest.mark.parametrize("build", DECODERS, ids=lambda build: build.__name__)
def test_generate(build: Callable[[], nn.Module]) -> None:
    """Prompts padded on the left, longer than the window; with a cache that grows and one of a fixed size."""
    eager, ours = pair(build)
    x, options = tokens(3, 6), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for cache in (None, "static"):
        for mask in (padding("left", 3, 6), None):
            given = {**options, "attention_mask": mask, "cache_implementation": cache}
            assert torch.equal(ours.generate(x, **given), eager.generate(x, **given)), (cache, mask)


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, gemma2], ids=lambda build: build.__name__)
def test_generate_compiled(build: Callable[[], nn.Module]) -> None:
    """One graph for each step over a cache of fixed size, with a mask and without."""
    eager, ours = pair(build)
    x, options = tokens(3, 6), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    compile_config = T.CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True
    for mask in (padding("left", 3, 6), None):
        given = {**options, "attention_mask": mask, "cache_implementation": "static"}
        assert torch.equal(ours.generate(x, **given, compile_config=compile_config), eager.generate(x, **given))


def test_generate_with_an_encoder() -> None:
    eager, ours = pair(bart)
    given = {"attention_mask": padding("right", 3, 12), "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    assert torch.equal(ours.generate(tokens(3, 12), **given), eager.generate(tokens(3, 12), **given))


def test_prompt_in_two_parts() -> None:
    """Several queries over keys that are longer: what chunked prefill and assisted decoding do."""
    eager, ours = pair(gemma2)
    x, mask = tokens(3, 12), padding("left", 3, 12)
    logits = []
    for model in (eager, ours):
        first = model(x[:, :7], attention_mask=mask[:, :7], use_cache=True)
        logits.append(model(x[:, 7:], attention_mask=mask, past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


# --- torch.compile, checkpointing, and no wait for a device ---


@pytest.mark.parametrize("side", ["absent", "left"])
def test_compiled_without_graph_breaks(side: str) -> None:
    eager, ours = pair(llama)
    mask = padding(side, 3, 12)
    both = {"input_ids": tokens(3, 12), "use_cache": False}
    if side != "absent":
        both |= {"attention_mask": mask}
    check(eager, torch.compile(ours, fullgraph=True, backend="aot_eager"), mask, both)


def test_compiled_with_dynamic_shapes() -> None:
    eager, ours = pair(llama)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (12, 9):
        mask = padding("left", 3, length)
        check(eager, compiled, mask, {"input_ids": tokens(3, length), "attention_mask": mask, "use_cache": False})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    eager, ours = pair(llama)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    mask = padding("left", 3, 12)
    check(eager, ours.train(), mask, {"input_ids": tokens(3, 12), "attention_mask": mask, "use_cache": False})


def test_no_value_is_read() -> None:
    """Meta and fake tensors have no values: reading one raises."""
    causal = T.masking_utils.causal_mask_function
    padded = torch.empty(2, 6, dtype=torch.bool, device="meta")
    for given in ({"attention_mask": padded}, {"q_offset": torch.empty((), device="meta", dtype=torch.int64)}):
        mask = make_mask(2, 6, 6, mask_function=causal, device="meta", **given)
        assert mask is not None
        assert mask.shape == (2, 1, 1, 12)
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, 6, 8, requires_grad=True) for heads in (4, 2))
        o, _ = attention_forward(SimpleNamespace(is_causal=True), q, k, k, torch.empty(2, 1, 1, 12).bool())
        assert o.shape == (2, 6, 4, 8)
        dq, dk = torch.autograd.grad(o.sum(), (q, k))
        assert (dq.shape, dk.shape) == (q.shape, k.shape)


# --- what is refused ---


def test_attention_refuses() -> None:
    x, module = torch.zeros(1, 2, 4, 8), SimpleNamespace(is_causal=True)
    cases: list[tuple[Tensor | None, dict[str, Any], str]] = [
        (None, {"position_bias": torch.zeros(1)}, "position_bias is not served"),
        (None, {"output_attentions": True}, "output_attentions is not served"),
        (None, {"block_table": torch.zeros(1)}, "block_table is not served"),
        (None, {"sliding_window": 0}, "sliding_window = 0: expected at least 1"),
        (torch.zeros(1, 1, 4, 4), {}, r"attention_mask torch.float32 \(1, 1, 4, 4\): expected that of hotloop's mask"),
        (torch.ones(1, 1, 4, 4).bool(), {}, r"attention_mask torch.bool \(1, 1, 4, 4\): expected"),
        (torch.ones(1, 4).int(), {}, r"attention_mask torch.int32 \(1, 4\): expected"),
        (torch.ones(1, 1, 1, 8).bool(), {"cu_seq_lens_q": torch.tensor([0, 4])}, "exclude each other"),
    ]
    for mask, options, message in cases:
        with pytest.raises(ValueError, match=message):
            attention_forward(module, x, x, x, mask, **options)
    harmless = {"output_attentions": False, "head_mask": None, "use_cache": True}
    assert attention_forward(module, x, x, x, None, **harmless)[1] is None


def test_masks_of_other_kinds_are_refused() -> None:
    masking = T.masking_utils
    _, ours = pair(llama)
    embeddings = torch.zeros(1, 8, 32)
    arguments = {"config": ours.config, "inputs_embeds": embeddings, "attention_mask": None, "past_key_values": None}
    odd = lambda b, h, i, j: j % 2 == 0
    with pytest.raises(ValueError, match="'or_mask' with conditions of the model is not served"):
        masking.create_causal_mask(**arguments, or_mask_function=odd)
    with pytest.raises(ValueError, match="'and_mask' with conditions of the model is not served"):
        masking.create_causal_mask(**arguments, and_mask_function=odd)
    with pytest.raises(ValueError, match="'or_mask' is not served"):
        masking.create_causal_mask(**arguments, block_sequence_ids=torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="works on the values of its mask"):
        masking.create_causal_mask(**arguments, allow_is_causal_skip=False)
    with pytest.raises(ValueError, match="works on the values of its mask"):
        masking.create_bidirectional_mask(ours.config, embeddings, None, allow_is_bidirectional_skip=False)
    assert masking.create_bidirectional_mask(ours.config, embeddings, None) is None
    ours.config.sliding_window = 2
    assert masking.create_bidirectional_sliding_window_mask(ours.config, embeddings, None) is None
    ours.config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="attention in chunks of 4 is not served"):
        masking.create_chunked_causal_mask(**arguments)
    ours.config.attention_chunk_size = 8
    assert masking.create_chunked_causal_mask(**arguments) is None
    with pytest.raises(ValueError, match=r"attention_mask torch\.float32"):
        ours(tokens(1, 8), attention_mask=torch.zeros(1, 1, 8, 8))


def test_register() -> None:
    register()
    register("hotloop")
    register("another")
    _, ours = pair(llama)
    ours.set_attn_implementation("another")
    for name, message in (("flash_ours", "a meaning"), ("eager", "a meaning"), ("sdpa", "choose another")):
        with pytest.raises(ValueError, match=message):
            register(name)


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the module asks for nothing; another version's masks are refused, not misread."""
    monkeypatch.setattr(T.masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match=f"transformers {T.__version__} describes masks in another way"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    module = runpy.run_path(inspect.getfile(register))
    with pytest.raises(ImportError, match="needs transformers with AttentionMaskInterface"):
        module["register"]()
