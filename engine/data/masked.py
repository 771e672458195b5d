"""Batches for masked language modelling: every piece of a document is [CLS] tokens [SEP], and some of it is hidden.

    targets[i] = the stored token where it is hidden, else IGNORE_INDEX
    tokens[i]  = the stored token, or what stands in its place

Inputs are not shifted, and the end that is stored after each document is not used: a tokenizer without [CLS] or [SEP]
leaves pieces bare on that side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hotloop.engine.data.batches import IGNORE_INDEX, Batch, BatchSource, Layout, Pieces
from hotloop.engine.data.masking import Masked, Masking, Vocabulary
from hotloop.engine.data.packing import Frame, best_fit_decreasing
from hotloop.engine.data.shards import Split


def frame_of(vocabulary: Vocabulary) -> Frame:
    return Frame((vocabulary.first is not None) + (vocabulary.last is not None), stored_ends=False)


class Framed(NamedTuple):
    """Pieces with [CLS] and [SEP] around them."""

    tokens: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n_pieces,) int64, frames included
    begins: np.ndarray  # (n,) bool, the first token of each piece


def framed(stored: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> Framed:
    first, last = vocabulary.first, vocabulary.last
    whole = lengths + frame_of(vocabulary).around
    end = np.cumsum(whole)
    text = np.ones(int(whole.sum()), dtype=bool)
    begins = np.zeros(len(text), dtype=bool)
    begins[end - whole] = True
    tokens = np.empty(len(text), dtype=np.int64)
    for token, at in ((first, end - whole), (last, end - 1)):
        if token is not None:
            tokens[at], text[at] = token, False
    tokens[text] = stored
    return Framed(tokens, whole, begins)


class MaskedSource(BatchSource):
    """The global batches of a run, as BatchSource has them, for a masked model."""

    def __init__(
        self,
        splits: Split | Sequence[Split],
        context: int,
        global_batch: int,
        masking: Masking,
        *,
        weights: Sequence[float] | None = None,
        index_folder: Path | None = None,
    ):
        super().__init__(
            splits, context, global_batch, masking.seed,
            weights=weights, index_folder=index_folder, frame=frame_of(masking.vocabulary),
        )  # fmt: skip
        self.masking = masking

    def max_valid(self, micro_batch: int) -> int:
        """Targets that any micro-batch of this size may have."""
        return micro_batch * self.masking.most(self.context)

    def n_supervised(self, step: int) -> int:
        """Targets in the whole global batch: the host draws them all, on every rank alike."""
        source, epoch, pack = self.order.draw(step)
        pieces = self._pieces(source, pack)
        if not self.masking.config.whole_words:
            row = np.repeat(pieces.row, pieces.lengths)
            return int(self.masking.counts(pieces.stored, row, self.masking.keys(source, epoch, pack)).sum())
        _, _, masked = self._hide(pieces, self.masking.keys(source, epoch, pack))
        return int(masked.hidden.sum())

    def _batch(self, source: np.ndarray, epoch: np.ndarray, pack: np.ndarray) -> Batch:
        whole, layout, masked = self._hide(self._pieces(source, pack), self.masking.keys(source, epoch, pack))
        targets = np.where(masked.hidden, whole.tokens, IGNORE_INDEX)
        return layout.batch(masked.inputs, targets, self.capacity(len(source)), self.end_id)

    def _hide(self, pieces: Pieces, keys: np.ndarray) -> tuple[Framed, Layout, Masked]:
        return hide(pieces.stored, pieces.lengths, pieces.row, keys, self.masking, self.context)


def hide(
    stored: np.ndarray,  # (n,) int64
    lengths: np.ndarray,  # (n_pieces,) int64
    row: np.ndarray,  # (n_pieces,) int64, ascending
    keys: np.ndarray,  # (rows,) uint64
    masking: Masking,
    context: int,
) -> tuple[Framed, Layout, Masked]:
    """Frame the pieces, lay them out and mask them."""
    whole = framed(stored, lengths, masking.vocabulary)
    layout = Layout(whole.lengths, row, len(keys), context)
    which, position = np.divmod(layout.at, context)
    return whole, layout, masking(whole.tokens, which, position, whole.begins, keys)


# Evaluation

HELD_OUT = 1 << 32
"""In a row's key the number of its source: one that no source of training has."""


def held_out_batches(
    split: Split, masking: Masking, context: int, documents: np.ndarray, micro_batch: int = 8
) -> Iterator[Batch]:
    """`documents` cut into framed pieces that do not overlap, packed, with noise that is always the same."""
    starts, lengths = pieces_of(split, documents, context - frame_of(masking.vocabulary).around)
    rows, n_rows = best_fit_decreasing(lengths + frame_of(masking.vocabulary).around, context)
    if not n_rows:
        return
    by_row = np.lexsort((np.arange(len(rows)), rows))
    starts, lengths, rows = starts[by_row], lengths[by_row], rows[by_row]
    capacity = micro_batch * (int(np.bincount(rows).max()) + 1)
    for first in range(0, n_rows, micro_batch):
        low, high = np.searchsorted(rows, [first, first + micro_batch])
        part = slice(low, high)
        number = np.arange(first, first + micro_batch)
        keys = masking.keys(np.full(micro_batch, HELD_OUT), np.zeros(micro_batch, dtype=np.int64), number)
        stored = split.read(starts[part], lengths[part])
        whole, layout, masked = hide(stored, lengths[part], rows[part] - first, keys, masking, context)
        targets = np.where(masked.hidden, whole.tokens, IGNORE_INDEX)
        yield layout.batch(masked.inputs, targets, capacity, split.end_id)


def one_at_a_time(
    split: Split, vocabulary: Vocabulary, context: int, documents: np.ndarray, micro_batch: int = 8
) -> Iterator[Batch]:
    """Every ordinary token of `documents` in turn is masked, alone in a copy of its piece."""
    around = frame_of(vocabulary).around
    for start, length in zip(*pieces_of(split, documents, context - around), strict=True):
        whole = framed(split.read(np.array([start]), np.array([length])), np.array([length]), vocabulary)
        text = whole.tokens
        hidden = np.flatnonzero(~vocabulary.special[text])
        each = context // len(text)  # copies in a row
        for first in range(0, len(hidden), micro_batch * each):
            at = hidden[first : first + micro_batch * each]
            copies = np.tile(text, (len(at), 1))
            targets = np.full_like(copies, IGNORE_INDEX)
            which = np.arange(len(at))
            targets[which, at] = copies[which, at]
            copies[which, at] = vocabulary.mask
            layout = Layout(np.full(len(at), len(text)), which // each, micro_batch, context)
            yield layout.batch(copies.reshape(-1), targets.reshape(-1), micro_batch * (each + 1), split.end_id)


def pieces_of(split: Split, documents: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the pieces of the documents' text, int64, in order."""
    text = split.lengths[documents] - 1
    n_pieces = -(-text // longest)
    document = np.repeat(np.arange(len(documents)), n_pieces)
    begin = (np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * longest
    return split.document_starts(documents)[document] + begin, np.minimum(longest, text[document] - begin)
