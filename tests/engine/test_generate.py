"""Sampling on hand-made logits, and text that streams out of a model whatever its tokens are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from hotloop.engine.checkpointed import TrainedModel
from hotloop.engine.config import ModelConfig, Recipe
from hotloop.engine.data.tokenizer import END_TOKEN, tokenizer_hash, train_tokenizer
from hotloop.engine.errors import UserError
from hotloop.engine.generate import Sampling, complete, generate, sample
from hotloop.engine.model import Transformer

CONFIG = ModelConfig(context=16, vocab_size=50, n_layers=2, d_model=32, n_heads=4)
END = 0
DRAWS = 4000


def random_model(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    """Weights so large that its distributions are peaked, and differ from token to token."""
    model = Transformer(replace(config, init_std=0.5)).initialize(seed)
    return model.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(logits: torch.Tensor, sampling: Sampling) -> list[float]:
    """How often each token is drawn."""
    g = generator()
    drawn = torch.stack([sample(logits, sampling, g) for _ in range(DRAWS)])
    return (torch.bincount(drawn, minlength=len(logits)) / DRAWS).tolist()


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


# Sampling


def test_temperature_0_takes_the_most_likely_token():
    logits = torch.tensor([0.1, 3.0, 2.9999, -5.0])
    assert {int(sample(logits, Sampling(temperature=0), generator(seed))) for seed in range(20)} == {1}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # p^2 / sum p^2
        (Sampling(temperature=1e-30), [1, 0, 0, 0]),  # logits / temperature alone would overflow
        (Sampling(temperature=1e30), [0.25, 0.25, 0.25, 0.25]),
        (Sampling(temperature=1, top_k=1), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_k=99), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1, top_p=0.4), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1, top_k=3, top_p=0.8), [0.625, 0.375, 0, 0]),  # of the three: 0.526, 0.316, 0.158
    ],
)
def test_shares_of_what_is_drawn(sampling, expected):
    found = shares(log(0.15, 0.5, 0.05, 0.3)[[1, 3, 0, 2]], sampling)
    for share, probability in zip(found, expected, strict=True):
        assert (share == 0) == (probability == 0)
        assert share == pytest.approx(probability, abs=5 * (0.25 / DRAWS) ** 0.5)


def test_the_order_of_the_vocabulary_does_not_matter():
    logits = log(0.05, 0.15, 0.5, 0.3)
    assert shares(logits, Sampling(temperature=1, top_p=0.6))[:2] == [0, 0]
    assert shares(logits, Sampling(temperature=1, top_k=2))[:2] == [0, 0]


def test_top_k_is_exact_among_equals():
    """Logits of bf16 models are often equal."""
    found = shares(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), Sampling(temperature=1, top_k=2))
    assert sum(share > 0 for share in found) == 2


# Tokens


def test_generation_with_the_cache_is_the_argmax_of_the_full_model():
    model = random_model()
    tokens = list(generate(model, [END, 5], Sampling(temperature=0, max_tokens=10), end_id=-1))
    assert len(tokens) == 10
    assert len(set(tokens)) > 2  # else a constant would pass
    for i, token in enumerate(tokens):
        logits = model.logits(torch.tensor([[END, 5, *tokens[:i]]]))[0, -1]
        assert token == int(logits.argmax())


def test_the_seed_decides():
    model = random_model()

    def draw(seed: int) -> list[int]:
        return list(generate(model, [END], Sampling(temperature=2, max_tokens=30, seed=seed), end_id=-1))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)  # the global generator has no part in it
    assert draw(7) == first
    assert draw(8) != first


@pytest.mark.parametrize("context", [1, 2, 3, 16])
def test_beyond_the_context_the_window_slides(context):
    model = random_model(replace(CONFIG, context=context))
    tokens = list(generate(model, [END], Sampling(temperature=0, max_tokens=40), end_id=-1))
    assert len(tokens) == 40
    seen, window = [END], [END]  # what the model has read when it chooses
    for token in tokens:
        if len(window) > context:
            window = seen[-max(context // 2, 1) :]
        assert token == int(model.logits(torch.tensor([window]))[0, -1].argmax())
        seen.append(token)
        window = [*window, token]


def test_of_a_prompt_beyond_the_context_the_last_tokens_are_read():
    model = random_model()
    prompt = [END, *(i % 49 + 1 for i in range(99))]
    long = list(generate(model, prompt, Sampling(temperature=0, max_tokens=5), end_id=-1))
    short = list(generate(model, prompt[-16:], Sampling(temperature=0, max_tokens=5), end_id=-1))
    assert long == short
    other = list(generate(model, prompt[-15:], Sampling(temperature=0, max_tokens=5), end_id=-1))
    assert other != long  # the sixteenth token counts


def test_the_end_token_ends():
    model = random_model()
    free = list(generate(model, [END], Sampling(temperature=0, max_tokens=10), end_id=-1))
    end = free[4]
    stopped = list(generate(model, [END], Sampling(temperature=0, max_tokens=10), end_id=end))
    assert stopped == free[: free.index(end)]


# Text


class Scripted(Transformer):
    """Says a given sequence of tokens, one after the other."""

    def say(self, tokens: list[int]) -> Scripted:
        self.script = iter(tokens)
        self.read: list[list[int]] = []
        return self

    def logits(self, tokens, **_):
        self.read.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], self.vocab_size)
        logits[0, -1, next(self.script)] = 1.0
        return logits


@pytest.fixture(scope="module")
def byte_tokenizer() -> str:
    return train_tokenizer(["the same few words, the same"], "bpe", 257)


def trained(tokenizer_json: str, says: list[int], context: int = 512) -> TrainedModel:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    config = replace(CONFIG, vocab_size=tokenizer.get_vocab_size(), context=context)
    end_id = tokenizer.token_to_id(END_TOKEN)
    model = Scripted(config).say([*says, end_id])
    return TrainedModel(model, tokenizer, tokenizer_hash(tokenizer_json), Recipe(model=config), 0, end_id)


GREEDY = Sampling(temperature=0, max_tokens=100)


def test_characters_of_several_bytes_come_whole(byte_tokenizer):
    text = "aé漢🙂b"
    says = Tokenizer.from_str(byte_tokenizer).encode(text).ids
    assert len(says) == len(text.encode())  # one token per byte
    assert list(complete(trained(byte_tokenizer, says), "", GREEDY)) == list(text)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(byte_tokenizer):
    says = Tokenizer.from_str(byte_tokenizer).encode("ab🙂").ids[:-1]
    pieces = list(complete(trained(byte_tokenizer, says), "", GREEDY))
    assert pieces[:2] == ["a", "b"]
    assert set("".join(pieces[2:])) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_replacement_character_of_the_text_is_not_lost(byte_tokenizer):
    text = "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    says = Tokenizer.from_str(byte_tokenizer).encode(text).ids
    assert "".join(complete(trained(byte_tokenizer, says), "", GREEDY)) == text


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_what_streams_is_what_the_tokenizer_decodes(kind):
    text = "the loss falls and the token model learns, the same words"
    tokenizer_json = train_tokenizer([text] * 3, kind, 300)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    prompt, says = "the loss", tokenizer.encode(text, add_special_tokens=False).ids[2:]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    streamed = "".join(complete(trained(tokenizer_json, says), prompt, GREEDY))
    assert streamed == tokenizer.decode(prompt_ids + says)[len(tokenizer.decode(prompt_ids)) :]
    assert len(streamed) > 20


def test_a_document_begins_with_the_end_token(byte_tokenizer):
    for prompt in ("", "ab"):
        model = trained(byte_tokenizer, [])
        assert "".join(complete(model, prompt, GREEDY)) == ""
        assert model.model.read == [[model.end_id, *model.tokenizer.encode(prompt).ids]]


def test_a_prompt_that_is_no_text_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match="not valid UTF-8 at character 1"):
        list(complete(trained(byte_tokenizer, []), "a\udcff", GREEDY))
