"""Masked runs: one global batch, however it is cut; packed documents isolated; a killed run resumes bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hotloop.engine.checkpointed import load_run
from hotloop.engine.config import MaskingConfig, ModelConfig
from hotloop.engine.data.batches import IGNORE_INDEX
from hotloop.engine.data.evaluation import evaluation_documents
from hotloop.engine.data.masked import MaskedSource, held_out_batches, one_at_a_time
from hotloop.engine.data.masking import Masking, Vocabulary
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.data.shards import Corpus
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.masked import MaskedObjective, supervised_rows
from hotloop.engine.train.evaluate_masked import evaluate_masked
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.pretrain import pretrain

BERT = ModelConfig(
    context=32, n_layers=2, d_model=32, n_heads=4, positions="learned", norm="layer", activation="gelu", bias=True,
    norm_position="post", embedding_norm=True, token_types=2, head="masked", causal=False,
)  # fmt: skip
MODERNBERT = ModelConfig(
    context=32, n_layers=3, d_model=32, n_heads=4, norm="layer", activation="geglu", embedding_norm=True, head="masked",
    causal=False, local_window=4, global_every=3, local_rope_theta=1000.0,
)  # fmt: skip
MODELS = pytest.mark.parametrize("config", [BERT, MODERNBERT], ids=["bert", "modernbert"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_documents):
    folder = tmp_path_factory.mktemp("masked")
    prepare(
        [make_documents(folder / "documents", 40)], folder / "c",
        PrepareConfig(kind="wordpiece", vocab_size=90, special="masked", validation_fraction=0.2),
    )  # fmt: skip
    return Corpus(folder / "c")


def masking_of(corpus: Corpus, seed: int = 0, **config) -> Masking:
    return Masking(MaskingConfig(**config), Vocabulary.of(corpus.tokenizer_path.read_text(encoding="utf-8")), seed)


def source_of(corpus: Corpus, **config) -> MaskedSource:
    return MaskedSource(corpus.split("train"), 32, 8, masking_of(corpus, **config))


def model_of(config: ModelConfig, corpus: Corpus) -> Transformer:
    return Transformer(replace(config, vocab_size=corpus.vocab_size)).initialize(0)


def gradients(model: Transformer, source: MaskedSource, step: int, world_size: int, micro_batch: int, normalizers=None):
    """Of the global batch of a step, summed over micro-batches and, one after the other, ranks."""
    objective = MaskedObjective(model, source.max_valid(1))
    model.zero_grad()
    n = source.n_supervised(step)
    batches = [b for rank in range(world_size) for b in source.micro_batches(step, rank, world_size, micro_batch)]
    for batch in batches:
        normalizer = torch.tensor(float(n if normalizers is None else normalizers(batches, batch)))
        objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, normalizer).backward()
    return [p.grad.clone() for p in model.parameters()]


def distance(a, b) -> tuple[float, float]:
    """Relative L2 over all tensors, and the largest of a single tensor that is not zero but for rounding."""

    def norm(x):
        return torch.stack([t.double().norm() for t in x])

    differences, size = norm([x.double() - y.double() for x, y in zip(a, b, strict=True)]), norm(b)
    kept = size > 1e-6 * size.max()  # the bias of k has no gradient in exact arithmetic
    return (differences.norm() / size.norm()).item(), (differences / size)[kept].max().item()


@MODELS
@pytest.mark.parametrize("whole_words", [False, True])
def test_accumulation_micro_batch_and_ranks_do_not_matter(corpus, config, whole_words):
    model, source = model_of(config, corpus), source_of(corpus, whole_words=whole_words)
    double = Transformer(model.config).double()
    double.load_state_dict(model.state_dict())
    whole, exact = gradients(model, source, 3, 1, 8), gradients(double, source, 3, 1, 8)
    rounding, _ = distance(whole, exact)
    counts = {b.n_supervised for b in source.micro_batches(3, 0, 1, 1)}
    assert len(counts) > 1, "rows hide different numbers of tokens"
    for world_size, micro_batch in ((1, 1), (1, 4), (2, 2), (4, 1)):
        found = gradients(model, source, 3, world_size, micro_batch)
        overall, worst = distance(found, whole)
        assert overall <= 1e-6
        assert worst <= 5e-6
        assert distance(found, exact)[0] <= 2 * rounding + 1e-9
    # The mistake that loops make: the mean over micro-batches of each one's mean.
    planted = gradients(model, source, 3, 1, 1, lambda batches, batch: len(batches) * max(batch.n_supervised, 1))
    assert distance(planted, whole)[0] >= 100 * 1e-6


RANKS = """
import sys
import torch
from dataclasses import replace
from hotloop.engine.config import MaskingConfig, ModelConfig
from hotloop.engine.data.masked import MaskedSource
from hotloop.engine.data.masking import Masking, Vocabulary
from hotloop.engine.data.shards import Corpus
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.masked import MaskedObjective
from hotloop.engine.train import distributed

corpus, out, micro_batch, whole_words = Corpus(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
torch.set_num_threads(1)
ranks = distributed.start("cpu")
vocabulary = Vocabulary.of(corpus.tokenizer_path.read_text())
source = MaskedSource(corpus.split("train"), 32, 8, Masking(MaskingConfig(whole_words=whole_words), vocabulary, 0))
model = Transformer(replace(eval(sys.argv[5]), vocab_size=corpus.vocab_size)).initialize(0)
objective = MaskedObjective(model, source.max_valid(1))
normalizer = torch.tensor(float(source.n_supervised(3)))
for b in source.micro_batches(3, ranks.rank, ranks.world_size, micro_batch):
    objective(b.tokens, b.targets, b.positions, b.cu_seqlens, normalizer).backward()
ranks.sum_([p.grad for p in model.parameters()])
if ranks.is_main:
    torch.save([p.grad for p in model.parameters()], out)
ranks.barrier()
ranks.stop()
"""


@pytest.mark.parametrize(("micro_batch", "whole_words"), [(4, True), pytest.param(1, False, marks=pytest.mark.slow)])
def test_two_processes_do_not_matter(corpus, tmp_path, micro_batch, whole_words):
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ranks.py"]
    arguments = [str(corpus.folder), "gradients.pt", str(micro_batch), str(whole_words), repr(MODERNBERT)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = gradients(model_of(MODERNBERT, corpus), source_of(corpus, whole_words=whole_words), 3, 1, 8)
    overall, worst = distance(torch.load(tmp_path / "gradients.pt"), whole)
    assert overall <= 1e-6
    assert worst <= 5e-6


@MODELS
def test_packed_equals_unpacked(corpus, config):
    source, model = source_of(corpus, rate=0.3), model_of(config, corpus)
    (batch,) = source.micro_batches(1)
    n = torch.tensor(float(batch.n_supervised))
    objective = MaskedObjective(model, source.max_valid(1))
    packed = objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, n)
    packed_grads = torch.autograd.grad(packed, list(model.parameters()))
    alone = torch.zeros(())
    for id_ in batch.document_ids.unique():
        at = batch.document_ids == id_
        if (batch.targets[at] == IGNORE_INDEX).all():
            continue
        logits = model.logits(batch.tokens[at][None])[0]
        alone = alone + torch.nn.functional.cross_entropy(logits, batch.targets[at], reduction="sum") / n
    alone_grads = torch.autograd.grad(alone, list(model.parameters()))
    assert abs(packed.item() - alone.item()) <= 1e-6 * abs(alone.item())
    assert distance(list(packed_grads), list(alone_grads))[0] <= 1e-5


@MODELS
@pytest.mark.parametrize("poison", [False, True])
def test_packed_documents_are_isolated_bit_for_bit(corpus, config, poison):
    source, model = source_of(corpus), model_of(config, corpus)
    batches = [b for step in range(30) for b in source.micro_batches(step)]
    batch = max(batches, key=lambda b: int(b.document_ids.max()))
    assert batch.document_ids.max() >= 10
    hidden = (batch.targets != IGNORE_INDEX).flatten()
    changed = (batch.document_ids == batch.document_ids.flatten()[100]).flatten()
    assert (hidden & changed).any()

    def run(x):
        x = x.detach().requires_grad_()
        h = model.head_input(model.transform(x, batch.positions, batch.cu_seqlens))
        logits = torch.nn.functional.linear(h, model.head_weight, model.head_bias).flatten(0, 1)
        kept = hidden & ~changed
        torch.nn.functional.cross_entropy(logits[kept], batch.targets.flatten()[kept]).backward()
        return logits.detach(), x.grad.flatten(0, 1)

    x = model.embed(batch.tokens, batch.positions).detach()
    other = x.clone().flatten(0, 1)
    other[changed] = float("nan") if poison else torch.randn_like(other[changed])
    (logits, dx), (logits_after, dx_after) = run(x), run(other.view_as(x))
    assert torch.equal(logits[~changed], logits_after[~changed])
    assert torch.equal(dx[~changed], dx_after[~changed])
    assert not torch.equal(logits[changed], logits_after[changed])


# The objective


def test_the_loss_is_the_formula_whatever_the_bound(corpus):
    source, model = source_of(corpus), model_of(BERT, corpus)
    (batch,) = source.micro_batches(0)
    n = torch.tensor(float(batch.n_supervised))
    logits = model.logits(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    for most in (source.max_valid(1), 32):
        loss = MaskedObjective(model, most)(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, n)
        assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    too_low = (batch.n_supervised - 1) // 8
    assert MaskedObjective(model, too_low)(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, n).isnan(), (
        "more targets than the bound are never passed over in silence"
    )


def test_supervised_rows():
    targets = torch.tensor([[IGNORE_INDEX, 5, IGNORE_INDEX], [7, IGNORE_INDEX, 9]])
    row, target, overflow = supervised_rows(targets, 4)
    assert row.tolist() == [1, 3, 5, 0]
    assert target.tolist() == [5, 7, 9, IGNORE_INDEX]
    assert not overflow
    assert supervised_rows(targets, 3)[1].tolist() == [5, 7, 9]
    row, target, overflow = supervised_rows(targets, 2)
    assert target.tolist() == [5, 7]
    assert overflow
    assert not supervised_rows(torch.full((2, 3), IGNORE_INDEX), 2)[2]


@pytest.mark.parametrize("config", [MODERNBERT], ids=["modernbert"])
def test_the_objective_compiles_in_one_piece(corpus, config):
    source, model = source_of(corpus), model_of(config, corpus)
    (batch,) = source.micro_batches(0)
    arguments = (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, torch.tensor(7.0))
    objective = MaskedObjective(model, source.max_valid(1))
    eager = objective(*arguments)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")(*arguments)
    assert torch.allclose(compiled, eager, rtol=1e-5)


# Runs


@pytest.fixture
def run_recipe(corpus, recipe):
    def make(**sections):
        sections["model"] = {
            "causal": False, "head": "masked", "norm": "layer", "activation": "geglu", "embedding_norm": True,
            "local_window": 4, "global_every": 2, **sections.get("model", {}),
        }  # fmt: skip
        sections["data"] = {"path": str(corpus.folder), **sections.get("data", {})}
        return replace(recipe(**sections), objective="masked")

    return make


def trained(folder) -> dict[str, torch.Tensor]:
    return load_run(folder, device="cpu").model.state_dict()


def test_a_run_learns_and_is_judged(run_recipe, tmp_path):
    made = run_recipe(train={"steps": 40}, optimizer={"lr": 1e-2}, evaluation={"every": 20})
    assert pretrain(made, tmp_path / "run").reason == "finished"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    judged = [line for line in lines if line["kind"] == "eval"]
    assert judged[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert {"accuracy", "pseudo_perplexity", "tokens", "bytes"} <= judged[-1].keys()
    assert judged[0]["tokens"] == judged[1]["tokens"], "the noise of evaluations is always the same"
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(line["supervised"] < 0.2 * line["tokens"] for line in steps)


@pytest.mark.parametrize("sections", [{}, {"masking": {"whole_words": True}, "train": {"micro_batch": 2}}])
def test_a_run_that_was_stopped_resumes_bit_for_bit(run_recipe, tmp_path, sections):
    whole = run_recipe(**sections, model={"dropout": 0.1})
    pretrain(whole, tmp_path / "whole")

    class Killed(BaseException):
        pass

    calls = 0

    def fault(point: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:  # within the second checkpoint's write
            raise Killed

    with pytest.raises(Killed):
        pretrain(whole, tmp_path / "cut", fault=fault)
    assert pretrain(whole, tmp_path / "cut").reason == "finished"
    a, b = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "train"]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_batch_that_supervises_nothing_changes_nothing_and_is_counted(tmp_path, recipe):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "0.txt").write_text("the loss falls and the loss falls again")
    for i in range(6):
        (documents / f"{i + 1}.txt").write_text("✂ " * (i + 3))
    prepare([documents], tmp_path / "c", PrepareConfig(kind="wordpiece", vocab_size=45, special="masked",
                                                       validation_fraction=0))  # fmt: skip
    tokenizer = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    for name in list(tokenizer["model"]["vocab"]):
        if "✂" in name:
            del tokenizer["model"]["vocab"][name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    prepare([documents], tmp_path / "d", PrepareConfig(tokenizer=tmp_path, validation_fraction=0))
    made = recipe(
        data={"path": str(tmp_path / "d")}, model={"causal": False, "context": 8},
        train={"steps": 14, "global_batch": 1, "micro_batch": 1}, schedule={"warmup_steps": 0},
    )  # fmt: skip
    pretrain(replace(made, objective="masked"), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert {line["skipped"] for line in lines} == {0, 1}
    for line in lines:
        assert line["skipped"] == (line["supervised"] == 0)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"causal": True}}, ["model.causal = true", "sees both sides"]),
        ({"model": {"vocab_size": 7}}, ["vocab_size = 7", "leave it out"]),
    ],
)
def test_a_recipe_that_cannot_be_masked_is_refused(run_recipe, tmp_path, sections, words):
    with pytest.raises(UserError) as refused:
        pretrain(run_recipe(**sections), tmp_path / "run")
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_a_mask_token_is_refused(run_recipe, tmp_path, make_documents):
    prepare([make_documents(tmp_path / "documents", 12)], tmp_path / "plain", PrepareConfig(vocab_size=300))
    with pytest.raises(UserError, match=r"plain: the tokenizer has no mask token.*--special masked"):
        pretrain(run_recipe(data={"path": str(tmp_path / "plain")}), tmp_path / "run")


# Evaluation


def test_the_evaluation_is_the_formula(corpus):
    split, masking = corpus.split("train"), masking_of(corpus, rate=0.3)
    model = model_of(MODERNBERT, corpus).eval()
    found = evaluate_masked(model, split, masking, context=32, max_bytes=4000)
    documents = evaluation_documents(split, 4000, 0).documents
    nats, right, behind = [], [], []
    for batch in held_out_batches(split, masking, 32, documents, micro_batch=3):
        logits = model.logits(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions).flatten(0, 1)
        targets, tokens = batch.targets.flatten(), batch.tokens.flatten()
        at = targets != IGNORE_INDEX
        nats += torch.nn.functional.cross_entropy(logits[at], targets[at], reduction="none").tolist()
        right += (logits[at].argmax(-1) == targets[at]).tolist()
        behind += (tokens[at] == masking.vocabulary.mask).tolist()
    assert found.tokens == len(nats) > 50
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.pseudo_perplexity == pytest.approx(np.exp(np.mean(np.array(nats)[behind])), rel=1e-5)
    assert 0 < np.mean(behind) < 1
    again = evaluate_masked(model, split, masking, context=32, max_bytes=4000, micro_batch=1)
    assert (again.tokens, again.accuracy) == (found.tokens, found.accuracy)
    assert again.loss == pytest.approx(found.loss, rel=1e-6)


def test_exact_pseudo_perplexity_masks_every_token_once(corpus):
    split, masking = corpus.split("train"), masking_of(corpus)
    vocabulary = masking.vocabulary
    model = model_of(BERT, corpus).eval()
    documents = evaluation_documents(split, 1500, 0).documents
    nats = []
    for d in documents:
        text = split.document(int(d))[:-1].astype(np.int64)
        for start in range(0, len(text), 30):
            piece = np.concatenate([[vocabulary.first], text[start : start + 30], [vocabulary.last]])
            for i in range(1, len(piece) - 1):
                if vocabulary.special[piece[i]]:
                    continue
                masked = torch.from_numpy(piece.copy())
                masked[i] = vocabulary.mask
                nats.append(-model.logits(masked[None])[0, i].log_softmax(-1)[piece[i]].item())
    found = evaluate_masked(model, split, masking, context=32, max_bytes=1500, exact=True, micro_batch=4)
    assert found.tokens == len(nats) > 100
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.pseudo_perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    for batch in one_at_a_time(split, vocabulary, 32, documents[:2], 4):
        assert batch.tokens.shape == (4, 32)
        per_piece = np.bincount(batch.document_ids.flatten()[(batch.targets != IGNORE_INDEX).flatten()])
        assert per_piece.max() == 1


def test_an_evaluation_stops_when_it_is_asked_to(corpus):
    model = model_of(BERT, corpus)
    assert evaluate_masked(model, corpus.split("validation"), masking_of(corpus), context=32, poll=lambda: True) is None
    assert model.training
