"""Packing, order and batches: every stored token once, the same global batches however they are cut, at any scale."""

import json
import math
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.engine.data.batches import IGNORE_INDEX, BatchSource, Prefetcher
from hotloop.engine.data.evaluation import evaluation_batches, evaluation_documents
from hotloop.engine.data.order import PERIOD, SORTED_BELOW, Order, Source, derive_key, permute
from hotloop.engine.data.packing import Packs, best_fit_decreasing, plan
from hotloop.engine.data.shards import Corpus, SplitWriter
from hotloop.engine.data.tokenizer import tokenizer_hash, train_tokenizer
from hotloop.engine.errors import UserError

TOKENIZER = train_tokenizer(["a"], "bpe", 257)
END = 0
V = 60_000
ISOLATED = [sys.executable, "-I"]


def make_corpus(folder, lengths, seed=0, max_shard_bytes=1 << 30, vocab_size=V, tokenizer=TOKENIZER):
    """A corpus of documents with `lengths` stored tokens, drawn at random; returns it with the documents."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer)
    key = tokenizer_hash(tokenizer)
    writer = SplitWriter(folder, "train", vocab_size, key, max_shard_bytes)
    documents = []
    for length in lengths:
        tokens = np.append(rng.integers(1, vocab_size, length - 1), END)
        documents.append(tokens)
        writer.write(tokens)
        writer.end_document(3 * int(length))
    manifest = {
        "format": "hotloop corpus", "version": 1, "tokenizer_hash": key, "vocab_size": vocab_size, "end_token": "x",
        "end_id": END, "dtype": writer.dtype.name, "splits": {"train": writer.finish()},
    }  # fmt: skip
    (folder / "corpus.json").write_text(json.dumps(manifest))
    return Corpus(folder).split("train"), documents


def drawn_lengths(n, seed=0, largest=400):
    return np.random.default_rng(seed).geometric(1 / 60, n).clip(1, largest)


# Packing


def best_fit_naive(lengths, capacity):
    """The definition: longest first, each into the fullest bin that holds it."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_best_fit_decreasing_is_what_it_says(data, capacity):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)))
    bins, n_bins = best_fit_decreasing(lengths, capacity)
    filled = np.bincount(bins, weights=lengths, minlength=n_bins)
    assert sorted((capacity - filled).tolist()) == best_fit_naive(lengths.tolist(), capacity)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=60),
    context=st.integers(1, 50),
    together=st.sampled_from([3, 1 << 17]),
)
def test_every_stored_token_is_packed_once(tmp_path_factory, lengths, context, together):
    import hotloop.engine.data.packing as packing

    split, _ = make_corpus(tmp_path_factory.mktemp("c") / "c", lengths, max_shard_bytes=300)
    seen = np.zeros(split.n_tokens, dtype=int)
    document = np.repeat(np.arange(len(lengths)), lengths)
    before = packing.PLANNED_TOGETHER, packing.FULL_PIECES_AT_ONCE
    packing.PLANNED_TOGETHER, packing.FULL_PIECES_AT_ONCE = together, 4
    try:
        for starts, pieces, per_pack in plan(split, context):
            for start, length in zip(starts, pieces, strict=True):
                seen[start : start + length] += 1
                assert len(set(document[start : start + length])) == 1, "a piece must stay inside its document"
            filled = np.add.reduceat(pieces, np.cumsum(per_pack) - per_pack)
            assert filled.max() <= context
        packs = Packs.of(split, context)
    finally:
        packing.PLANNED_TOGETHER, packing.FULL_PIECES_AT_ONCE = before
    assert (seen == 1).all()
    packs.verify()
    assert packs.n_split_documents == sum(length > context for length in lengths)
    assert packs.tokens(np.arange(packs.n_packs)).sum() == split.n_tokens == packs.n_tokens
    assert packs.efficiency == pytest.approx(split.n_tokens / (packs.n_packs * context))


def test_the_plan_does_not_depend_on_the_size_of_shards(tmp_path):
    lengths = drawn_lengths(500)
    one, _ = make_corpus(tmp_path / "one", lengths)
    many, _ = make_corpus(tmp_path / "many", lengths, max_shard_bytes=1000)
    assert len(many.shards) > 20
    a, b = BatchSource(one, 64, 16), BatchSource(many, 64, 16)
    for step in range(5):
        for x, y in zip(a.micro_batches(step), b.micro_batches(step), strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.targets, y.targets)


def test_the_index_is_reused_rebuilt_and_checked(tmp_path):
    split, _ = make_corpus(tmp_path / "c", drawn_lengths(300))
    packs = Packs.of(split, 64)
    path = tmp_path / "c" / "packs-train-T64.index"
    assert packs.path == path
    before, data = path.stat().st_mtime_ns, path.read_bytes()
    Packs.of(split, 64)
    assert path.stat().st_mtime_ns == before, "a valid index is reused"
    for damaged in (data[:-1], data[:50], b"", data[:9] + b"\xff" + data[10:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"packs-train-T64\.index: "):
            Packs(path, split, 64)
        Packs.of(split, 64)
        assert path.read_bytes() == data, "a damaged index is planned again"
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(UserError, match="altered"):
        Packs(path, split, 64).verify()
    other, _ = make_corpus(tmp_path / "other", drawn_lengths(300), seed=1)
    path.write_bytes(Packs.of(other, 64).path.read_bytes())
    with pytest.raises(UserError, match="of another corpus or context"):
        Packs(path, split, 64)
    Packs.of(split, 64)
    assert path.read_bytes() == data, "an index of another corpus is planned again"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "corpus.json", "packs-train-T64.index", "tokenizer.json", "train-00000.shard",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    import tempfile

    split, _ = make_corpus(tmp_path / "c", [5, 6])

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"packs-train-T8\.index: the packs cannot be written \(Permission denied\)"):
        Packs.of(split, 8)
    monkeypatch.undo()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Packs.of(split, 8, elsewhere).path.parent == elsewhere


# Order


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    image = permute(np.arange(n), n, derive_key(seed, 0, epoch))
    assert sorted(image.tolist()) == list(range(n))
    some = np.array([n - 1, 0, n // 2])
    assert permute(some, n, derive_key(seed, 0, epoch)).tolist() == image[some].tolist(), "any element by itself"


@pytest.mark.parametrize("n", [3, 7, 50, SORTED_BELOW, 3000])
def test_permutations_are_uniform(n):
    """Over many keys every element lands everywhere equally often, and so do distances of neighbours (chi-squared)."""
    keys = derive_key(1, np.arange(40_000))
    first, second = (permute(np.full(len(keys), i), n, keys) for i in (0, 1))
    assert (first != second).all()
    for value, cells in ((first, n), (second, n), ((second - first) % n - 1, n - 1)):
        expected = len(keys) / cells
        chi2 = float(((np.bincount(value, minlength=cells) - expected) ** 2 / expected).sum())
        freedom = cells - 1
        assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom) + 6


def test_epochs_and_seeds_differ_and_repeat():
    n = 1000
    a, b, c = (Order([Source(n)], 10, seed).samples(0)[1].tolist() for seed in (0, 0, 1))
    assert a == b != c
    order = Order([Source(n)], 10, 0)
    epochs = [np.concatenate([order.samples(step)[1] for step in range(e * 100, (e + 1) * 100)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert (epochs[0] == epochs[1]).mean() < 0.02
    assert [order.epoch_of(step) for step in (0, 50, 100, 250)] == [0, 0.5, 1, 2.5]


def test_a_step_across_epochs_takes_from_both():
    order = Order([Source(7)], 5, 3)
    stream = np.concatenate([order.samples(step)[1] for step in range(7)])
    for epoch in range(5):
        assert sorted(stream[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (5, 1e-9), (1, 2, 3, 4, 5)])
def test_sources_are_mixed_by_weight(weights):
    sources = [Source(17 + 5 * i, weight) for i, weight in enumerate(weights)]
    order = Order(sources, 32, 0)
    share = np.array(weights) / sum(weights)
    drawn = {i: [] for i in range(len(weights))}
    for step in range(2 * PERIOD // 32):
        counts = np.bincount(order.samples(step)[0], minlength=len(weights))
        assert (np.abs(counts - 32 * share) < 2.5).all(), "every global batch holds the mixture, not just the long run"
        for i in drawn:
            assert order.epoch_of(step, i) == len(drawn[i]) / sources[i].n_packs
        for source, pack in zip(*order.samples(step), strict=True):
            drawn[int(source)].append(int(pack))
    for i, source in enumerate(sources):
        assert len(drawn[i]) == pytest.approx(2 * PERIOD * share[i], abs=4)
        for epoch in range(len(drawn[i]) // source.n_packs):
            part = drawn[i][epoch * source.n_packs : (epoch + 1) * source.n_packs]
            assert sorted(part) == list(range(source.n_packs)), "each source is shuffled by its own epochs"


@pytest.mark.parametrize(
    ("sources", "global_batch", "message"),
    [
        ([], 1, "no source"),
        ([Source(0)], 1, "source 0 has no packs"),
        ([Source(1, -1.0)], 1, "weight -1.0"),
        ([Source(1, math.nan)], 1, "weight nan"),
        ([Source(1)], 0, "global_batch = 0"),
    ],
)
def test_orders_that_cannot_be(sources, global_batch, message):
    with pytest.raises(UserError, match=message):
        Order(sources, global_batch, 0)


# Batches


def rows_of(batches):
    """Per row: inputs, targets, positions, and where segments begin, whatever the micro-batch."""
    rows = []
    for batch in batches:
        B, T = batch.tokens.shape
        starts = np.zeros(B * T + 1, dtype=int)
        starts[np.unique(batch.cu_seqlens.numpy())] = 1
        for b in range(B):
            rows.append(
                (
                    batch.tokens[b].tolist(),
                    batch.targets[b].tolist(),
                    batch.positions[b].tolist(),
                    starts[b * T : (b + 1) * T].tolist(),
                )
            )
    return rows


@pytest.mark.parametrize("n_sources", [1, 2])
def test_the_global_batch_is_the_same_for_ranks_micro_batches_and_workers(tmp_path, n_sources):
    splits = [make_corpus(tmp_path / f"{i}", drawn_lengths(200 + 90 * i, seed=i), seed=i)[0] for i in range(n_sources)]
    source = BatchSource(splits, 64, 16, seed=4, weights=[3, 1][:n_sources] if n_sources > 1 else None)
    steps = [0, 1, 7, 100_003]
    expected = {step: rows_of(source.micro_batches(step)) for step in steps}
    assert expected[0] != expected[1]
    for world_size, micro_batch in ((1, 1), (1, 8), (2, 8), (2, 4), (4, 2), (16, 1), (8, 2)):
        for step in steps:
            parts = [list(source.micro_batches(step, rank, world_size, micro_batch)) for rank in range(world_size)]
            assert [row for part in parts for row in rows_of(part)] == expected[step]
            flat = [batch for part in parts for batch in part]
            assert sum(batch.n_supervised for batch in flat) == source.n_supervised(step)
            assert {batch.cu_seqlens.shape[0] for batch in flat} == {source.capacity(micro_batch) + 1}
    again = BatchSource(splits, 64, 16, seed=4, weights=[3, 1] if n_sources > 1 else None)
    for workers in (0, 1, 3):
        with Prefetcher(again, 7, workers=workers, world_size=2, rank=1, micro_batch=4, stop_step=9) as prefetcher:
            got = list(prefetcher)
        assert [len(batches) for batches in got] == [2, 2]
        assert rows_of(got[0]) == expected[7][8:]


def test_a_batch_is_what_the_contract_says(tmp_path):
    """Field by field, by plain loops over the documents themselves."""
    lengths = [*drawn_lengths(150).tolist(), 64, 128, 1, 1, 63, 65]
    split, documents = make_corpus(tmp_path / "c", lengths, max_shard_bytes=2000)
    T, B = 64, 4
    source = BatchSource(split, T, B, seed=1)
    steps = math.ceil(source.packs[0].n_packs / B)
    found = {}  # stored token (document, index) -> how often it was a target
    place = {}
    for d, document in enumerate(documents):
        for i in range(0, len(document), T):
            place.setdefault(tuple(document[i : i + T]), []).append((d, i))
    with_padding = 0
    for step in range(steps):
        (batch,) = source.micro_batches(step)
        assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
        assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32
        assert batch.tokens.shape == batch.targets.shape == batch.positions.shape == batch.document_ids.shape == (B, T)
        tokens, targets, positions, ids = (
            getattr(batch, name).reshape(-1).tolist() for name in ("tokens", "targets", "positions", "document_ids")
        )
        cu = batch.cu_seqlens.tolist()
        n = cu.index(B * T)
        assert cu[0] == 0
        assert cu[n:] == [B * T] * (len(cu) - n)
        assert all(a < b for a, b in pairwise(cu[: n + 1]))
        n_tokens = 0
        for segment, (start, end) in enumerate(pairwise(cu[: n + 1])):
            assert start // T == (end - 1) // T, "a segment stays in its row"
            assert ids[start:end] == [segment] * (end - start)
            if targets[start] == IGNORE_INDEX:
                with_padding += 1
                assert targets[start:end] == [IGNORE_INDEX] * (end - start)
                assert tokens[start:end] == [END] * (end - start)
                assert positions[start:end] == [0] * (end - start)
                assert end % T == 0, "padding ends a row"
                continue
            n_tokens += end - start
            assert positions[start:end] == list(range(end - start))
            piece = tuple(targets[start:end])
            assert piece in place
            matches = [
                (d, i) for d, i in place[piece]
                if tokens[start:end] == [END if i == 0 else documents[d][i - 1], *documents[d][i : i + len(piece) - 1]]
            ]  # fmt: skip
            assert matches, "inputs are the stored tokens shifted right behind end_id"
            found[piece] = found.get(piece, 0) + 1
        assert batch.n_tokens == batch.n_supervised == n_tokens
    assert with_padding
    extra = B * steps - source.packs[0].n_packs  # the next epoch begins in the last step
    assert sum(found.values()) - sum(map(len, place.values())) >= 0
    if extra == 0:
        assert found == {piece: len(where) for piece, where in place.items()}
    assert set(found) == set(place), "every piece of every document was seen"


def test_batches_move_as_a_whole(tmp_path):
    split, _ = make_corpus(tmp_path / "c", [30, 40])
    (batch,) = BatchSource(split, 16, 2).micro_batches(0)
    moved = batch.to("meta")
    assert {
        getattr(moved, n).device.type for n in ("tokens", "targets", "positions", "document_ids", "cu_seqlens")
    } == {"meta"}
    assert (moved.n_supervised, moved.n_tokens) == (batch.n_supervised, batch.n_tokens)


def test_batches_that_cannot_be_cut(tmp_path):
    split, _ = make_corpus(tmp_path / "c", [30, 40])
    source = BatchSource(split, 16, 6)
    for world_size, micro_batch in ((4, 1), (2, 2), (1, 4), (1, 0)):
        with pytest.raises(UserError, match=r"global_batch = 6: must be a multiple"):
            list(source.micro_batches(0, 0, world_size, micro_batch))
    other, _ = make_corpus(tmp_path / "d", [30], tokenizer=train_tokenizer(["ab ab ab"], "bpe", 258))
    with pytest.raises(UserError, match="different tokenizers"):
        BatchSource([split, other], 16, 6)
    with pytest.raises(UserError, match="context = 0"):
        BatchSource(split, 0, 6)


# Prefetching


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_exception_surfaces_at_its_step(tmp_path, workers):
    split, _ = make_corpus(tmp_path / "c", [30, 40])
    source = BatchSource(split, 16, 2)
    original = source.order.draw

    def draw(step):
        if step == 5:
            raise RuntimeError("planted")
        return original(step)

    source.order.draw = draw
    prefetcher = Prefetcher(source, 3, workers=workers)
    assert len(next(prefetcher)) == len(next(prefetcher)) == 1
    with pytest.raises(RuntimeError, match="planted"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_prefetching_works_ahead_and_stops_cleanly(tmp_path):
    split, _ = make_corpus(tmp_path / "c", [30, 40])
    source = BatchSource(split, 16, 2)
    threads = threading.active_count()
    original, slow = source.order.draw, 0.15

    def draw(step):
        time.sleep(slow)
        return original(step)

    source.order.draw = draw
    prefetcher = Prefetcher(source, workers=2)
    next(prefetcher)
    assert prefetcher.wait_seconds >= slow / 2
    time.sleep(slow * 4)
    next(prefetcher)
    assert prefetcher.wait_seconds < slow / 2, "it was assembled while the step ran"
    assert prefetcher.total_wait_seconds >= prefetcher.wait_seconds
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == threads
    with Prefetcher(source, workers=0) as in_the_loop:
        next(in_the_loop)
    assert in_the_loop.wait_seconds >= slow * 0.9


# Evaluation


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    context=st.integers(1, 24),
    data=st.data(),
    micro_batch=st.integers(1, 5),
)
def test_every_held_out_token_is_scored_once_with_enough_context(tmp_path_factory, lengths, context, data, micro_batch):
    stride = data.draw(st.integers(1, context))
    split, documents = make_corpus(tmp_path_factory.mktemp("e") / "c", lengths, max_shard_bytes=100)
    # Unique tokens say which stored token a target is.
    unique = {}
    for d, document in enumerate(documents):
        for i, token in enumerate(document):
            unique.setdefault((int(documents[d][i - 1]) if i else END, int(token)), []).append((d, i))
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    scored = 0
    shapes = set()
    keys = []
    for batch in evaluation_batches(split, context, stride, np.array(chosen), micro_batch):
        shapes.add((tuple(batch.tokens.shape), batch.cu_seqlens.shape[0]))
        assert batch.n_supervised == int((batch.targets != IGNORE_INDEX).sum())
        scored += batch.n_supervised
        for b, t in (batch.targets != IGNORE_INDEX).nonzero().tolist():
            key = (int(batch.tokens[b, t]), int(batch.targets[b, t]))
            assert key in unique
            keys.append(key)
            context_seen = int(batch.positions[b, t])
            needed = min(min(i for _, i in unique[key]), context - stride)
            assert context_seen >= needed, "a token is scored with at least context - stride tokens before it"
    assert scored == sum(lengths[d] for d in chosen)
    assert len(shapes) == 1, "shapes never change"
    expected = [
        (int(documents[d][i - 1]) if i else END, int(documents[d][i])) for d in chosen for i in range(lengths[d])
    ]
    assert sorted(keys) == sorted(expected)


def test_evaluation_documents_are_whole_seeded_and_within_the_budget(tmp_path):
    split, documents = make_corpus(tmp_path / "c", drawn_lengths(200))
    chosen, n_bytes, n_tokens = evaluation_documents(split, 9000, seed=3)
    assert n_bytes == sum(split.n_bytes(int(d)) for d in chosen) <= 9000
    assert n_tokens == sum(len(documents[d]) for d in chosen)
    assert len(set(chosen.tolist())) == len(chosen)
    left = 9000 - n_bytes
    assert not [d for d in range(200) if d not in chosen and split.n_bytes(d) <= left], "no room was left unused"
    np.testing.assert_array_equal(chosen, evaluation_documents(split, 9000, seed=3).documents)
    assert chosen.tolist() != evaluation_documents(split, 9000, seed=4).documents.tolist()
    # The greedy rule itself, one document at a time.
    everything = evaluation_documents(split, None, seed=3).documents
    assert sorted(everything.tolist()) == list(range(200))
    taken, room = [], 9000
    for d in everything:
        if split.n_bytes(int(d)) <= room:
            taken.append(int(d))
            room -= split.n_bytes(int(d))
    assert taken == chosen.tolist()
    assert evaluation_documents(split, None, 3, max_tokens=500).n_tokens <= 500
    with pytest.raises(UserError, match=r"no document of 'train' fits into 1 bytes"):
        evaluation_documents(split, 1)


def test_a_bad_stride(tmp_path):
    split, _ = make_corpus(tmp_path / "c", [5])
    for stride in (0, 9):
        with pytest.raises(UserError, match="between 1 and the context of 8"):
            next(evaluation_batches(split, 8, stride))


# Scale

SCALE = """
import json, re, sys, time
import numpy as np
from hotloop.engine.data.packing import Packs
from hotloop.engine.data.shards import HEADER_BYTES, Corpus, Header, digest
from pathlib import Path

folder, n = Path(sys.argv[1]), int(sys.argv[2])
sizes = np.random.default_rng(0).lognormal(6.3, 1.1, n).astype(np.int64).clip(1, None)
offsets = np.concatenate([[0], np.cumsum(sizes)])
key = json.loads((folder / "corpus.json").read_text())["tokenizer_hash"]
header = Header(2, 60_000, n, int(offsets[-1]), 3 * int(offsets[-1]), key, bytes(16))
with open(folder / "train-00000.shard", "wb") as file:  # the tokens are a hole: all zero, nothing on the disk
    file.write(header.pack())
    file.seek(header.offsets_at)
    file.write(offsets.astype("<i8").tobytes())
    file.write((3 * sizes).astype("<i8").tobytes())
    file.truncate(header.file_size)
manifest = json.loads((folder / "corpus.json").read_text())
manifest["splits"]["train"]["shards"][0]["digest"] = digest(header.pack()).hex()
(folder / "corpus.json").write_text(json.dumps(manifest))
del sizes, offsets
split = Corpus(folder).split("train")

def peak():  # not ru_maxrss: a child inherits its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

started = time.perf_counter()
packs = Packs.of(split, 256)
result = {"documents": n, "tokens": split.n_tokens, "plan_seconds": time.perf_counter() - started,
          "efficiency": packs.efficiency, "plan_mb": peak()}
if len(sys.argv) > 3:
    import torch
    from hotloop.engine.data.batches import BatchSource

    result["imports_mb"] = peak()
    source = BatchSource(split, 256, 64, seed=1)
    def batch_ms(step):
        times = []
        for i in range(40):
            started = time.perf_counter()
            source.n_supervised(step + i)
            for batch in source.micro_batches(step + i, 0, 1, 16):
                pass
            times.append(time.perf_counter() - started)
        return 1000 * float(np.median(times))
    batch_ms(50)
    pairs = [(batch_ms(0), batch_ms(100_000)) for _ in range(3)]
    result["ms_at_0"], result["ms_at_100000"] = (float(np.median(side)) for side in zip(*pairs))
    result["all_mb"] = peak()
print(json.dumps(result))
"""


def test_a_million_documents_a_billion_tokens(tmp_path, capsys):
    """Planning is linear and bounded in memory; the batch of step 100,000 costs what that of step 0 costs."""
    results = []
    for n, more in ((500_000, []), (1_000_000, ["batches"])):
        make_corpus(tmp_path / f"{n}", [1])
        run = subprocess.run(
            [*ISOLATED, "-c", SCALE, str(tmp_path / f"{n}"), str(n), *more],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        results.append(json.loads(run.stdout))
    half, full = results
    with capsys.disabled():
        print(
            f"\n{full['documents']:,} documents, {full['tokens']:,} tokens: planned in {full['plan_seconds']:.2f} s "
            f"(half of them {half['plan_seconds']:.2f} s), packs {full['efficiency']:.2%} full, "
            f"peak {full['plan_mb']:.0f} MB; "
            f"batch {full['ms_at_0']:.2f} ms at step 0, {full['ms_at_100000']:.2f} ms at step 100,000; "
            f"peak with torch ({full['imports_mb']:.0f} MB) {full['all_mb']:.0f} MB"
        )
    assert full["tokens"] >= 0.95e9
    assert full["plan_seconds"] < 3.5 * half["plan_seconds"] + 0.3
    assert full["plan_mb"] < 300
    # torch itself takes from 200 MB (CPU build) to a gigabyte (CUDA build): bounded is what comes on top
    assert full["all_mb"] - full["imports_mb"] < 100
    assert full["ms_at_100000"] < 2 * full["ms_at_0"]
    assert full["efficiency"] > 0.98
