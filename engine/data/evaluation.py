"""Held-out documents -> tensors, with every token scored once and as much context as the window allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hotloop.engine.data.batches import Batch, Pieces, assemble
from hotloop.engine.data.order import derive_key, permute
from hotloop.engine.data.packing import best_fit_decreasing
from hotloop.engine.data.shards import Split
from hotloop.engine.errors import UserError


class EvaluationDocuments(NamedTuple):
    documents: np.ndarray  # (n,) int64, in the seeded order
    n_bytes: int
    """UTF-8 bytes of their text: the denominator of bits per byte."""
    n_tokens: int
    """Stored tokens, ends included: as many losses are summed."""


def evaluation_documents(
    split: Split, max_bytes: int | None = None, seed: int = 0, *, max_tokens: int | None = None
) -> EvaluationDocuments:
    """Whole documents in a seeded order, taken while they fit into `max_bytes` and `max_tokens`.

    A document that would overflow is passed over, so the set is as full as the order allows. Raises UserError if not
    one fits.
    """
    n_bytes, n_tokens = split.document_bytes, split.lengths
    budgets = [
        (sizes, budget) for sizes, budget in ((n_bytes, max_bytes), (n_tokens, max_tokens)) if budget is not None
    ]
    waiting = permute(np.arange(split.n_documents), split.n_documents, derive_key(seed, 0x6576616C))
    left = [budget for _, budget in budgets]
    taken = [waiting[:0]]
    while len(waiting):
        for (sizes, _), room in zip(budgets, left, strict=True):
            waiting = waiting[sizes[waiting] <= room]
        fits = len(waiting)
        for (sizes, _), room in zip(budgets, left, strict=True):
            fits = min(fits, int(np.searchsorted(np.cumsum(sizes[waiting]), room, side="right")))
        taken.append(waiting[:fits])
        left = [room - int(sizes[waiting[:fits]].sum()) for (sizes, _), room in zip(budgets, left, strict=True)]
        waiting = waiting[fits:]
    documents = np.concatenate(taken)
    if not len(documents):
        limits = [f"{max_bytes} bytes"] * (max_bytes is not None) + [f"{max_tokens} tokens"] * (max_tokens is not None)
        raise UserError(
            f"{split.folder}: no document of {split.name!r} fits into {' and '.join(limits)} "
            f"(the shortest has {n_bytes.min()} bytes, the one of fewest tokens {n_tokens.min()})"
        )
    return EvaluationDocuments(documents, int(n_bytes[documents].sum()), int(n_tokens[documents].sum()))


def evaluation_batches(
    split: Split,
    context: int,
    stride: int | None = None,
    documents: np.ndarray | None = None,
    micro_batch: int = 8,
) -> Iterator[Batch]:
    """Overlapping windows over `documents` (none: all of the split), packed like training batches.

    Each document is cut into windows of `context` tokens that advance by `stride` (none: half the context). A token is
    scored in the first window that holds it and is context in the later ones (its target there is IGNORE_INDEX), so
    each stored token is scored once, with at least `context - stride` tokens of context where the document has them.
    Windows are segments: short documents share rows. The last batch is filled with rows of padding.
    """
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride = {stride}: must be between 1 and the context of {context}")
    documents = np.arange(split.n_documents) if documents is None else np.asarray(documents, dtype=np.int64)
    if not len(documents):
        return
    stored = split.lengths[documents]
    # The first window scores `context` tokens, every later one `stride` more.
    n_windows = 1 + -(-np.maximum(stored - context, 0) // stride)
    document = np.repeat(np.arange(len(documents)), n_windows)
    number = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    begin = number * stride
    lengths = np.minimum(context, stored[document] - begin)
    starts = split.document_starts(documents)[document] + begin
    unscored = np.where(number > 0, context - stride, 0)

    rows, n_rows = best_fit_decreasing(lengths, context)
    by_row = np.lexsort((np.arange(len(rows)), rows))
    starts, lengths, unscored, rows = starts[by_row], lengths[by_row], unscored[by_row], rows[by_row]
    capacity = micro_batch * (int(np.bincount(rows).max()) + 1)
    for first in range(0, n_rows, micro_batch):
        low, high = np.searchsorted(rows, [first, first + micro_batch])
        part = slice(low, high)
        pieces = Pieces(
            stored=split.read(starts[part], lengths[part]),
            lengths=lengths[part],
            row=rows[part] - first,
            before=split.before(starts[part]),
            unscored=unscored[part],
        )
        yield assemble(pieces, micro_batch, context, capacity, split.end_id)
