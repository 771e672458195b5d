"""Labelled texts -> token ids -> packed batches of whole examples.

A piece is what the model sees at once: `[CLS] text [SEP]` for an encoder, `text end` for a decoder; a text too long for
that is refused, cut, or becomes several pieces (windows). A batch lays pieces one after the other, so that padding
stands behind the last one only; a piece may go on in the next row, since `cu_seqlens` and not the rows bound attention.
Letters: R rows, T tokens in a row, S segments of a batch, K labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from hotloop.engine.data.batches import IGNORE_INDEX, Batch
from hotloop.engine.data.order import Order, Source, derive_key, permute
from hotloop.engine.errors import UserError

OnLong = Literal["error", "truncate", "window"]

ENCODED_TOGETHER = 1 << 12
_WINDOW = 0x77696E646F77
"""Counter that keeps the draw of windows apart from that of the order."""


@dataclass(frozen=True)
class Frame:
    """The special tokens around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, cls_id: int | None, sep_id: int | None, end_id: int | None) -> Frame:
        """Raises UserError for a tokenizer without any token that ends a text."""
        if cls_id is not None and sep_id is not None:
            return cls((cls_id,), (sep_id,))
        if end_id is None:
            raise UserError("the tokenizer has neither [CLS] and [SEP] nor an end token: a text cannot be framed")
        return cls((), (end_id,))

    def room(self, context: int) -> int:
        """Tokens of text in a piece of `context` tokens."""
        return context - len(self.before) - len(self.after)


def framing(tokenizer_json: str, frame: Frame) -> str:
    """The tokenizer, made to add the frame by itself where it does not: for libraries that read only its file."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if tokenizer.encode("").ids == [*frame.before, *frame.after]:
        return tokenizer_json

    def part(token: int) -> dict[str, object]:
        return {"SpecialToken": {"id": tokenizer.id_to_token(token), "type_id": 0}}

    def text(name: str) -> dict[str, object]:
        return {"Sequence": {"id": name, "type_id": 0}}

    before, after = [part(token) for token in frame.before], [part(token) for token in frame.after]
    names = {token: tokenizer.id_to_token(token) for token in (*frame.before, *frame.after)}
    template = {
        "type": "TemplateProcessing",
        "single": [*before, text("A"), *after],
        "pair": [*before, text("A"), *after, text("B"), *after],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for token, name in names.items()},
    }
    # Edited here and not by the library, whose reader rounds a unigram model's scores anew each time.
    return json.dumps({**json.loads(tokenizer_json), "post_processor": template}, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Pieces:
    """Tokenised texts; piece i is tokens[bounds[i] : bounds[i + 1]], text j the pieces first[j] .. first[j + 1]."""

    tokens: np.ndarray  # (n_tokens,) int32
    bounds: np.ndarray  # (n_pieces + 1,) int64
    first: np.ndarray  # (n_texts + 1,) int64

    @property
    def n_texts(self) -> int:
        return len(self.first) - 1

    @property
    def lengths(self) -> np.ndarray:  # (n_pieces,)
        return np.diff(self.bounds)

    def texts(self, start: int, stop: int) -> Pieces:
        """Those of the texts start .. stop."""
        low, high = self.first[start], self.first[stop]
        bounds = self.bounds[low : high + 1]
        return Pieces(self.tokens[bounds[0] : bounds[-1]], bounds - bounds[0], self.first[start : stop + 1] - low)


class TextEncoder:
    """Texts -> pieces of at most `context` tokens. A special token's text inside a text is ordinary text."""

    def __init__(self, tokenizer_json: str, frame: Frame, context: int, on_long: OnLong = "error"):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.frame, self.context, self.on_long = frame, context, on_long
        self.room = frame.room(context)
        if self.room < 1:
            raise UserError(f"a context of {context} tokens has no room for text between the special tokens")

    def __call__(self, texts: Sequence[str], where: Sequence[str]) -> Pieces:
        """Raises UserError for texts that are too long where on_long is error: how many, the longest and its place."""
        pieces: list[np.ndarray] = []
        counts, too_long = [], []
        for start in range(0, len(texts), ENCODED_TOGETHER):
            chunk = list(texts[start : start + ENCODED_TOGETHER])
            for i, encoding in enumerate(self.tokenizer.encode_batch_fast(chunk, add_special_tokens=False), start):
                ids = np.array(encoding.ids, dtype=np.int32)
                if len(ids) > self.room:
                    too_long.append((len(ids), i))
                cut = self._cut(ids)
                counts.append(len(cut))
                pieces += cut
        if too_long and self.on_long == "error":
            length, i = max(too_long, key=lambda one: one[0])
            raise UserError(
                f"{len(too_long):,} of {len(texts):,} texts are longer than the model, which takes {self.room} tokens "
                f"(the longest, {where[i]}, has {length:,}): set labels.on_long to truncate or window"
            )
        return Pieces(
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
            bounds=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]),
            first=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        )

    def _cut(self, ids: np.ndarray) -> list[np.ndarray]:
        """One piece, or windows that overlap by half or more, the last of which ends with the text."""
        starts = [0]
        if self.on_long == "window" and len(ids) > self.room:
            stride = max(self.room // 2, 1)
            starts = [*range(0, len(ids) - self.room, stride), len(ids) - self.room]
        before, after = np.array(self.frame.before, np.int32), np.array(self.frame.after, np.int32)
        return [np.concatenate([before, ids[start : start + self.room], after]) for start in starts]


def lay_out(
    pieces: Pieces, which: np.ndarray, labels: np.ndarray, rows: int, row_length: int, capacity: int, pad_id: int
) -> Batch:
    """A batch of the pieces `which`, with room for `capacity` of them in rows x row_length tokens.

    labels (len(which),) int64 or (len(which), K) float32 become targets (capacity,) or (capacity, K): IGNORE_INDEX
    where there is no piece. cu_seqlens (capacity + 1,) ends with the last piece; what is behind it belongs to none.
    """
    lengths = pieces.lengths[which]
    n_tokens, size = int(lengths.sum()), rows * row_length
    if n_tokens > size or len(which) > capacity:
        raise ValueError(f"{len(which)} pieces of {n_tokens} tokens in a batch of {capacity} and {size}")
    ends = np.cumsum(lengths)
    within = np.arange(n_tokens) - np.repeat(ends - lengths, lengths)
    tokens, positions = np.full(size, pad_id, dtype=np.int64), np.zeros(size, dtype=np.int64)
    segment = np.full(size, capacity, dtype=np.int32)
    tokens[:n_tokens] = pieces.tokens[np.repeat(pieces.bounds[which], lengths) + within]
    positions[:n_tokens] = within
    segment[:n_tokens] = np.repeat(np.arange(len(which)), lengths)
    cu_seqlens = np.full(capacity + 1, n_tokens, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(which) + 1] = ends
    targets = np.full((capacity, *labels.shape[1:]), IGNORE_INDEX, dtype=labels.dtype)
    targets[: len(which)] = labels
    return Batch(
        tokens=torch.from_numpy(tokens).view(rows, row_length),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions).view(rows, row_length),
        document_ids=torch.from_numpy(segment).view(rows, row_length),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        n_supervised=len(which),
        n_tokens=n_tokens,
        sum_squares=int(np.square(lengths).sum()),
    )


def row_length(lengths: np.ndarray, context: int) -> int:
    """Tokens of a row: the longest piece, in multiples of 8, at most the context. Rows must hold the longest piece,
    which bounds the attention; shorter rows leave less padding behind the last piece."""
    return min(-(-int(lengths.max(initial=1)) // 8) * 8, context)


class ExampleSource:
    """The global batches of a run: `global_batch` texts each, a pure function of (seed, step).

    An epoch is a keyed permutation of the texts. A text of several windows is seen through one of them in an epoch,
    drawn by (seed, epoch, text): in expectation each window weighs 1 / n of its text. Rank r of W takes the r-th
    contiguous part of a global batch, micro-batches are contiguous parts of that.

    Parameters:
        weights: (K,) of the classes; a batch is divided by the sum of its texts' weights; none: by their number
        steps: of the run; given, every batch has the shape of the largest among them (for torch.compile)
    """

    def __init__(
        self,
        pieces: Pieces,
        labels: np.ndarray,
        context: int,
        global_batch: int,
        seed: int = 0,
        *,
        weights: np.ndarray | None = None,
        pad_id: int = 0,
        steps: int | None = None,
    ):
        self.pieces, self.labels, self.global_batch, self.seed = pieces, labels, global_batch, seed
        self.weights, self.pad_id, self.steps = weights, pad_id, steps
        self.row_length = row_length(pieces.lengths, context)
        self.n_texts = pieces.n_texts
        self._windows = np.diff(pieces.first)
        self._order = Order([Source(self.n_texts)], global_batch, seed)
        self._largest: dict[int, int] = {}

    def epoch_of(self, step: int) -> float:
        return self._order.epoch_of(step)

    def samples(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(text, piece) at each position of the run, int64; step s has the positions from s * global_batch on."""
        epoch, at = np.divmod(position, self.n_texts)
        text = permute(at, self.n_texts, derive_key(self.seed, 0, epoch))
        piece = self.pieces.first[text]
        several = np.flatnonzero(self._windows[text] > 1)
        if len(several):
            drawn = derive_key(self.seed, _WINDOW, epoch[several], text[several])
            piece[several] += (drawn % self._windows[text[several]].astype(np.uint64)).astype(np.int64)
        return text, piece

    def _step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.samples(step * self.global_batch + np.arange(self.global_batch))

    def n_supervised(self, step: int) -> float:
        """What the loss of the global batch is divided by: the sum of its texts' weights."""
        if self.weights is None:
            return float(self.global_batch)
        text, _ = self._step(step)
        return float(self.weights[self.labels[text]].sum())

    def n_tokens(self, step: int) -> int:
        _, piece = self._step(step)
        return int(self.pieces.lengths[piece].sum())

    def check(self, world_size: int, micro_batch: int) -> None:
        """Raises UserError if the global batch cannot be cut this way."""
        if world_size < 1 or micro_batch < 1 or self.global_batch % (world_size * micro_batch):
            raise UserError(
                f"global_batch = {self.global_batch}: must be a multiple of ranks x micro_batch = "
                f"{world_size} x {micro_batch}"
            )

    def micro_batches(
        self, step: int, rank: int = 0, world_size: int = 1, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        """This rank's part of the global batch of a step; micro_batch none: all of it at once."""
        if micro_batch is None:
            micro_batch = max(self.global_batch // max(world_size, 1), 1)
        self.check(world_size, micro_batch)
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}")
        text, piece = self._step(step)
        local = self.global_batch // world_size
        for start in range(rank * local, (rank + 1) * local, micro_batch):
            part = slice(start, start + micro_batch)
            rows = max(self._rows(piece[part]), self._largest_rows(micro_batch))
            yield lay_out(
                self.pieces, piece[part], self.labels[text[part]], rows, self.row_length, micro_batch, self.pad_id
            )

    def _rows(self, piece: np.ndarray) -> int:
        return -(-int(self.pieces.lengths[piece].sum()) // self.row_length)

    def _largest_rows(self, micro_batch: int) -> int:
        """Rows of the largest micro-batch of the run; 0 where shapes may vary."""
        if self.steps is None:
            return 0
        if micro_batch not in self._largest:
            lengths, largest = self.pieces.lengths, 0
            at_once = max((1 << 20) // micro_batch, 1) * micro_batch
            for low in range(0, self.steps * self.global_batch, at_once):
                position = np.arange(low, min(low + at_once, self.steps * self.global_batch))
                _, piece = self.samples(position)
                largest = max(largest, int(lengths[piece].reshape(-1, micro_batch).sum(1).max()))
            self._largest[micro_batch] = -(-largest // self.row_length)
        return self._largest[micro_batch]


def in_order(pieces: Pieces, context: int, tokens: int, pad_id: int = 0) -> Iterator[tuple[slice, Batch]]:
    """All pieces in their order, as (which, batch) of about `tokens` tokens each, unlabelled: for predicting."""
    if not len(pieces.lengths):
        return
    length = row_length(pieces.lengths, context)
    rows = max(tokens // length, 1)
    first = 0
    while first < len(pieces.lengths):
        last = int(np.searchsorted(pieces.bounds, pieces.bounds[first] + rows * length, side="right")) - 1
        which = np.arange(first, last)
        needed = -(-int(pieces.bounds[last] - pieces.bounds[first]) // length)
        labels = np.full(len(which), IGNORE_INDEX, dtype=np.int64)
        yield slice(first, last), lay_out(pieces, which, labels, needed, length, len(which), pad_id)
        first = last
