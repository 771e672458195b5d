"""One global batch of texts, however it is cut: the same gradients. Packed texts: none of another's business."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hotloop.engine.config import ModelConfig
from hotloop.engine.data.batches import IGNORE_INDEX, Batch
from hotloop.engine.data.examples import ExampleSource, Pieces
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.classification import ClassificationObjective

K = 3
WEIGHTS = [0.5, 1.0, 3.0]
BERT = ModelConfig(
    context=32, vocab_size=60, n_layers=2, d_model=32, n_heads=4, positions="learned", norm="layer", activation="gelu",
    bias=True, causal=False, norm_position="post", embedding_norm=True, n_labels=K, pooling="mean",
)  # fmt: skip
LLAMA = ModelConfig(context=32, vocab_size=60, n_layers=2, d_model=32, n_heads=4, n_labels=K, pooling="last")
FAMILIES = {
    "bert-mean": BERT,
    "bert-cls": replace(BERT, pooling="cls", classifier_head="bert"),
    "llama-last": LLAMA,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(multi_label: bool, weights: bool, global_batch: int = 8, **options) -> ExampleSource:
    """40 texts of 2 to 20 tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 21, 40)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    pieces = Pieces(draw.integers(0, 60, bounds[-1]).astype(np.int32), bounds, np.arange(41))
    labels = draw.integers(0, K, 40)
    if multi_label:
        labels = (draw.random((40, K)) < 0.4).astype(np.float32)
    of_source = np.array(WEIGHTS) if weights and not multi_label else None
    return ExampleSource(pieces, labels, 32, global_batch, seed=0, weights=of_source, **options)


def gradients(model: Transformer, batches: list[Batch], normalizers: list[float], weights: bool) -> list[torch.Tensor]:
    objective = ClassificationObjective(model, WEIGHTS if weights else None)
    model.zero_grad()
    for batch, n in zip(batches, normalizers, strict=True):
        normalizer = torch.tensor(n, dtype=torch.float32)
        objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, normalizer).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Relative L2 over all tensors, and the largest of a single tensor."""
    norms = torch.stack([t.double().norm() for t in b])
    differences = torch.stack([(x.double() - y.double()).norm() for x, y in zip(a, b, strict=True)])
    single = differences[norms > 0] / norms[norms > 0]
    return (differences.norm() / norms.norm()).item(), single.max().item()


@pytest.mark.parametrize(("multi_label", "weights"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_and_micro_batch_do_not_matter(family, multi_label, weights):
    model = Transformer(FAMILIES[family]).initialize(0)
    data = source(multi_label, weights)
    n = data.n_supervised(3)
    whole = gradients(model, list(data.micro_batches(3)), [n], weights)
    assert any(g.norm() > 0 for g in whole)
    for micro_batch in (1, 2, 4):
        parts = list(data.micro_batches(3, micro_batch=micro_batch))
        overall, worst = distance(gradients(model, parts, [n] * len(parts), weights), whole)
        assert overall <= 1e-6, (micro_batch, overall)
        assert worst <= 5e-6, (micro_batch, worst)
        if weights and not multi_label:
            # The mistake that loops make: the mean over micro-batches of each one's mean.
            own = [float(np.array(WEIGHTS)[part.targets.numpy()].sum()) * len(parts) for part in parts]
            assert distance(gradients(model, parts, own, weights), whole)[0] >= 1e-2


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_a_row(family, multi_label):
    """The loss and gradients of a packed batch are those of texts one by one, by PyTorch's own loss."""
    model = Transformer(FAMILIES[family]).initialize(0)
    data = source(multi_label, True)
    (batch,) = data.micro_batches(1)
    n = data.n_supervised(1)
    packed = gradients(model, [batch], [n], True)

    model.zero_grad()
    bounds, flat = batch.cu_seqlens.tolist(), batch.tokens.flatten()
    total = 0.0
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        h = model.hidden_states(flat[low:high][None])
        logits = model.classify(h, torch.tensor([0, high - low], dtype=torch.int32))
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(
                logits[0], batch.targets[i], pos_weight=torch.tensor(WEIGHTS), reduction="sum"
            ) / (K * n)  # fmt: skip
        else:
            loss = F.cross_entropy(logits, batch.targets[i : i + 1], torch.tensor(WEIGHTS), reduction="sum") / n
        loss.backward()
        total += loss.item()
    alone = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    objective = ClassificationObjective(model, WEIGHTS)
    loss = objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, torch.tensor(n))
    assert abs(loss.item() - total) <= 1e-6 * abs(total)
    assert distance(packed, alone)[0] <= 1e-5


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_are_isolated_bit_for_bit(family, poison):
    """Other words in one text, or NaN, leave the logits and the input gradients of the others as they are."""
    model = Transformer(FAMILIES[family]).initialize(0)
    (batch,) = source(False, False).micro_batches(2)
    changed = (batch.document_ids == 3).flatten()

    # Another text's NaN must not reach a loss that all share: each row's loss by itself.
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        logits = model.classify(model.transform(x, batch.positions, batch.cu_seqlens), batch.cu_seqlens)
        rows = F.cross_entropy(logits, batch.targets, reduction="none")
        keep = torch.arange(len(rows)) != 3
        rows[keep].sum().backward()
        return logits.detach(), x.grad.flatten(0, 1)

    x = model.embed(batch.tokens, batch.positions).detach()
    other = x.clone().flatten(0, 1)
    other[changed] = float("nan") if poison else torch.randn_like(other[changed])
    logits, dx = run(x)
    logits_after, dx_after = run(other.view_as(x))
    keep = torch.arange(len(logits)) != 3
    assert torch.equal(logits[keep], logits_after[keep])
    assert torch.equal(dx[~changed], dx_after[~changed])
    assert not torch.equal(logits[3], logits_after[3])


def test_empty_segments_contribute_nothing():
    model = Transformer(BERT).initialize(0)
    (batch,) = source(False, True).micro_batches(0)
    wider = replace(
        batch,
        targets=torch.cat([batch.targets, torch.full((3,), IGNORE_INDEX)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:].expand(3)]),
    )
    assert distance(gradients(model, [wider], [8.0], True), gradients(model, [batch], [8.0], True))[0] <= 1e-7
    nothing = replace(batch, targets=torch.full_like(batch.targets, IGNORE_INDEX))
    assert all(g.norm() == 0 for g in gradients(model, [nothing], [1.0], True))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Transformer(BERT).initialize(0)
    data = source(False, True, steps=6)
    eager = ClassificationObjective(model, WEIGHTS)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in range(3):
        (batch,) = data.micro_batches(step)
        arguments = (
            batch.tokens,
            batch.targets,
            batch.positions,
            batch.cu_seqlens,
            torch.tensor(data.n_supervised(step)),
        )
        a = torch.autograd.grad(eager(*arguments), model.classifier.out.weight)[0]
        b = torch.autograd.grad(compiled(*arguments), model.classifier.out.weight)[0]
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # batches of a run have one shape


RANKS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_classification as t
from hotloop.engine.model import Transformer
from hotloop.engine.train import distributed

torch.set_num_threads(1)
ranks = distributed.start("cpu")
for kind, micro_batch in (("single", 4), ("multi", 2)):
    data = t.source(kind == "multi", True)
    model = Transformer(t.BERT).initialize(0)
    batches = list(data.micro_batches(3, ranks.rank, ranks.world_size, micro_batch))
    found = t.gradients(model, batches, [data.n_supervised(3)] * len(batches), True)
    ranks.sum_(found)
    if ranks.is_main:
        torch.save(found, sys.argv[2] + kind)
ranks.barrier()
ranks.stop()
"""


def test_two_processes_do_not_matter(tmp_path):
    script, out = tmp_path / "ranks.py", tmp_path / "gradients-"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(Path(__file__).parent), str(out)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("single", "multi"):
        data = source(kind == "multi", True)
        model = Transformer(BERT).initialize(0)
        whole = gradients(model, list(data.micro_batches(3)), [data.n_supervised(3)], True)
        overall, worst = distance(torch.load(f"{out}{kind}"), whole)
        assert overall <= 1e-6, kind
        assert worst <= 5e-6, kind
