"""One global batch, however it is cut: the same gradients. Packed documents: none of another's business."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hotloop.engine.config import ModelConfig
from hotloop.engine.data.batches import IGNORE_INDEX, Batch, BatchSource
from hotloop.engine.data.shards import Corpus
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.kernels.cross_entropy import linear_cross_entropy

LLAMA = ModelConfig(context=32, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
GPT2 = ModelConfig(
    context=32, n_layers=2, d_model=32, n_heads=4, positions="learned", norm="layer", activation="gelu", bias=True,
    tied_head=False,
)  # fmt: skip


def supervise_unevenly(batch: Batch) -> Batch:
    """Leave row r of the global batch about 1 / (r + 1) of its targets: counts differ by a factor of 8."""
    targets = batch.targets.clone()
    for row in range(targets.shape[0]):
        keep = torch.rand(targets.shape[1], generator=torch.Generator().manual_seed(row)) < 1 / (row + 1)
        targets[row][~keep] = IGNORE_INDEX
    return replace(batch, targets=targets, n_supervised=int((targets != IGNORE_INDEX).sum()))


def cut(batch: Batch, rows: int) -> list[Batch]:
    """Micro-batches of `rows` rows, as BatchSource would cut them."""
    parts = []
    for start in range(0, batch.tokens.shape[0], rows):
        part = slice(start, start + rows)
        T = batch.tokens.shape[1]
        low, high = start * T, (start + rows) * T
        bounds = batch.cu_seqlens[(batch.cu_seqlens >= low) & (batch.cu_seqlens <= high)] - low
        targets = batch.targets[part]
        parts.append(
            Batch(
                tokens=batch.tokens[part], targets=targets, positions=batch.positions[part],
                document_ids=batch.document_ids[part], cu_seqlens=bounds.to(torch.int32),
                n_supervised=int((targets != IGNORE_INDEX).sum()), n_tokens=batch.n_tokens,
                sum_squares=batch.sum_squares,
            )
        )  # fmt: skip
    return parts


def gradients(model: Transformer, batches: list[Batch], normalizers: list[float]) -> list[torch.Tensor]:
    objective = CausalObjective(model)
    model.zero_grad()
    for batch, n in zip(batches, normalizers, strict=True):
        normalizer = torch.tensor(n, dtype=torch.float32)
        objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, normalizer).backward()
    return [p.grad.clone() for p in model.parameters()]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Relative L2 over all tensors, and the largest of a single tensor."""

    def norm(x):
        return torch.stack([t.double().norm() for t in x])

    differences = norm([x.double() - y.double() for x, y in zip(a, b, strict=True)])
    return (differences.norm() / norm(b).norm()).item(), (differences / norm(b)).max().item()


@pytest.fixture
def global_batch(corpus) -> Batch:
    source = BatchSource(Corpus(corpus).split("train"), 32, 8, seed=0)
    (batch,) = source.micro_batches(3)
    return supervise_unevenly(batch)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_accumulation_and_micro_batch_do_not_matter(corpus, global_batch, config):
    model = Transformer(replace(config, vocab_size=Corpus(corpus).vocab_size)).initialize(0)
    n = float(global_batch.n_supervised)
    whole = gradients(model, [global_batch], [n])
    exact = gradients(_double(model), [global_batch], [n])
    rounding, _ = distance(whole, exact)
    for rows in (1, 2, 4):
        parts = cut(global_batch, rows)
        found = gradients(model, parts, [n] * len(parts))
        overall, worst = distance(found, whole)
        assert overall <= 1e-6, (rows, overall)
        assert worst <= 5e-6, (rows, worst)
        assert distance(found, exact)[0] <= 2 * rounding + 1e-9, (rows, rounding)
        # The mistake that loops make: the mean over micro-batches of each one's mean.
        planted = gradients(model, parts, [float(len(parts) * part.n_supervised) for part in parts])
        assert distance(planted, whole)[0] >= 100 * 1e-6, rows


def _double(model: Transformer) -> Transformer:
    copy = Transformer(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy


RANKS = """
import sys
import torch
from dataclasses import replace
from hotloop.engine.config import ModelConfig
from hotloop.engine.data.batches import BatchSource
from hotloop.engine.data.shards import Corpus
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.kernels.cross_entropy import linear_cross_entropy
from hotloop.engine.train import distributed

corpus, out, how, micro_batch = Corpus(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
wrapped = how in ("ddp", "mean of means")
torch.set_num_threads(1)
ranks = distributed.start("cpu")
source = BatchSource(corpus.split("train"), 32, 8, seed=0)
config = ModelConfig(context=32, n_layers=2, d_model=32, n_heads=4, vocab_size=corpus.vocab_size)
model = Transformer(config).initialize(0)
if how == "fp64":
    model.double()
objective = CausalObjective(model)
W = ranks.world_size
scale = float(W) if wrapped else 1.0  # DistributedDataParallel averages over ranks: the sum is asked for
call = torch.nn.parallel.DistributedDataParallel(objective) if wrapped else objective
batches = list(source.micro_batches(3, ranks.rank, W, micro_batch))
row = ranks.rank * (8 // W)
for b in batches:  # row r of the global batch keeps every (r + 1)-th target: ranks differ by more than a factor of 2
    for targets in b.targets:
        row += 1
        targets[torch.arange(len(targets)) % row != 0] = -100
counts = torch.tensor([float(sum((b.targets != -100).sum() for b in batches))])
ranks.sum_([counts])
normalizer = counts[0] / scale
if how == "mean of means":  # the mistake: each rank its own count, and the mean of that over ranks
    normalizer = sum((b.targets != -100).sum() for b in batches).float()
for i, b in enumerate(batches):
    if wrapped and i < len(batches) - 1:
        with call.no_sync():
            call(b.tokens, b.targets, b.positions, b.cu_seqlens, normalizer).backward()
    else:
        call(b.tokens, b.targets, b.positions, b.cu_seqlens, normalizer).backward()
if not wrapped:
    ranks.sum_([p.grad for p in model.parameters()])
if ranks.is_main:
    torch.save([p.grad for p in model.parameters()], out)
ranks.barrier()
ranks.stop()
"""


def by_ranks(corpus, folder, n: int, how: str, micro_batch: int) -> list[torch.Tensor]:
    script, out = folder / "ranks.py", folder / "gradients.pt"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    arguments = [str(script), str(corpus), str(out), how, str(micro_batch)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of one process and one micro-batch, in fp32 and in fp64."""
    folder = tmp_path_factory.mktemp("one")
    whole, exact = (by_ranks(corpus, folder, 1, how, 8) for how in ("engine", "fp64"))
    assert exact[0].dtype == torch.float64
    return whole, exact


@pytest.mark.parametrize(("how", "micro_batch"), [("engine", 4), ("engine", 1), ("ddp", 4), ("ddp", 1)])
def test_two_processes_do_not_matter(corpus, tmp_path, one_process, how, micro_batch):
    whole, exact = one_process
    found = by_ranks(corpus, tmp_path, 2, how, micro_batch)
    overall, worst = distance(found, whole)
    assert overall <= 1e-6
    assert worst <= 5e-6
    assert distance(found, exact)[0] <= 2 * distance(whole, exact)[0] + 1e-9


def test_the_mean_of_two_processes_means_is_found_out(corpus, tmp_path, one_process):
    planted = by_ranks(corpus, tmp_path, 2, "mean of means", 4)
    assert distance(planted, one_process[0])[0] >= 100 * 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [False, True])
def test_packed_documents_are_isolated_bit_for_bit(corpus, dtype, poison):
    """Another document's tokens, or NaN in them, leave logits and input gradients of the others as they are."""
    source = BatchSource(Corpus(corpus).split("train"), 32, 8, seed=1)
    batches = [b for step in range(50) for b in source.micro_batches(step)]
    batch = max(batches, key=lambda b: int(b.document_ids.max()))
    assert batch.document_ids.max() >= 10
    model = Transformer(replace(LLAMA, vocab_size=Corpus(corpus).vocab_size)).initialize(0).to(dtype)
    normalizer = torch.tensor(float(batch.n_supervised))
    changed = (batch.document_ids == batch.document_ids.flatten()[100]).flatten()
    assert 0 < changed.sum() < changed.numel()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        h = model.transform(x, batch.positions, batch.cu_seqlens)
        logits = torch.nn.functional.linear(h, model.head_weight)
        linear_cross_entropy(h, model.head_weight, batch.targets, normalizer=normalizer).backward()
        return logits.detach().flatten(0, 1), x.grad.flatten(0, 1)

    x = model.embed(batch.tokens, batch.positions).detach()
    other = x.clone().flatten(0, 1)
    other[changed] = float("nan") if poison else torch.randn_like(other[changed])
    logits, dx = run(x)
    logits_after, dx_after = run(other.view_as(x))
    assert torch.equal(logits[~changed], logits_after[~changed])
    assert torch.equal(dx[~changed], dx_after[~changed])
    assert not torch.equal(logits[changed], logits_after[changed])


def test_packed_equals_unpacked(corpus):
    source = BatchSource(Corpus(corpus).split("train"), 32, 8, seed=1)
    (batch,) = source.micro_batches(0)
    model = Transformer(replace(LLAMA, vocab_size=Corpus(corpus).vocab_size)).initialize(0)
    n = torch.tensor(float(batch.n_supervised))
    objective = CausalObjective(model)
    packed = objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, n)
    packed_grads = torch.autograd.grad(packed, list(model.parameters()))

    alone = torch.zeros(())
    for id_ in batch.document_ids.unique():
        at = batch.document_ids == id_
        if (batch.targets[at] == IGNORE_INDEX).all():
            continue
        h = model.hidden_states(batch.tokens[at][None])
        logits = torch.nn.functional.linear(h[0], model.head_weight)
        alone = alone + torch.nn.functional.cross_entropy(logits, batch.targets[at], reduction="sum") / n
    alone_grads = torch.autograd.grad(alone, list(model.parameters()))
    assert abs(packed.item() - alone.item()) <= 1e-6 * abs(alone.item())
    assert distance(list(packed_grads), list(alone_grads))[0] <= 1e-5
