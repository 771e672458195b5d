"""Which pieces of documents share a sequence: planned once per (split, context), kept in an index beside the shards.

A document's stored tokens are cut into pieces of `context` tokens and one shorter remainder. A full piece is a pack of
its own; remainders are packed best-fit-decreasing. No token is cropped, dropped or repeated. A `Frame` leaves room
around each piece for tokens that are not stored ([CLS], [SEP]). Planning works on runs of `PLANNED_TOGETHER` documents,
so its time is linear and its memory constant; it depends on the lengths alone.

    header     128 bytes: magic, version, context, frame, counts, fingerprint of the split, digest of the rest
    starts     n_pieces x int64, global token positions, pack by pack
    lengths    n_pieces x int32, stored tokens
    packs      (n_packs + 1) x int64, of packs in the pieces
    filled     n_packs x int32, positions that hold a token, frames included
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

import numpy as np

from hotloop.engine.data.shards import MappedFile, Split, digest
from hotloop.engine.errors import UserError
from hotloop.engine.files import aside_of, fsync_folder

PLANNED_TOGETHER = 1 << 17
FULL_PIECES_AT_ONCE = 1 << 18

MAGIC = b"HOTLPACK"
VERSION = 2
HEADER_BYTES = 128
DIGEST = 16
_FIELDS = struct.Struct("<8sIIIIQQQQQ16s16s")


@dataclass(frozen=True)
class Frame:
    """What a sequence holds besides the text of its pieces."""

    around: int = 0
    """Positions that each piece takes besides its tokens."""
    stored_ends: bool = True
    """Whether the end that is stored after each document is one of its tokens."""


BARE = Frame()


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Pack items of 1 <= length <= capacity: (bin of each item, number of bins).

    Each item, longest first, goes into the fullest bin that still holds it. All items of one length are placed at once
    on groups of bins with equal room, so that the work is linear in the items and no item is handled by itself.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    key = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.uint32)
    longest_first = np.argsort(key, kind="stable")  # a radix sort for 16 bits
    bins = np.empty(len(lengths), dtype=np.int64)
    room: dict[int, list[np.ndarray]] = {}  # tokens left -> bins
    rooms = 0  # bit r: some bin has r tokens left
    n_bins = at = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        n = int(counts[length])
        items = longest_first[at : at + n]
        at += n
        done = 0
        while done < n:
            fitting = rooms >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                group = room[left].pop()
            else:
                left = capacity
                group = np.arange(n_bins, n_bins - (done - n) // (capacity // length))  # ceil((n - done) / each)
                n_bins += len(group)
            each = left // length
            used = min(len(group), -(-(n - done) // each))
            placed = min(n - done, used * each)
            bins[items[done : done + placed]] = np.repeat(group[:used], each)[:placed]
            done += placed
            last = placed - (used - 1) * each  # items in the last bin used; the others got `each`
            for tokens, part in (
                (left - each * length, group[: used - 1]),
                (left - last * length, group[used - 1 : used]),
                (left, group[used:]),
            ):
                if tokens and len(part):
                    room.setdefault(tokens, []).append(part)
                    rooms |= 1 << tokens
            if not room.get(left, True):
                rooms &= ~(1 << left)
    return bins, n_bins


def plan(split: Split, context: int, frame: Frame = BARE) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Consecutive packs as (starts int64, lengths int32, pieces per pack int32)."""
    longest = context - frame.around
    for first, stored in split.length_chunks(PLANNED_TOGETHER):
        lengths = stored if frame.stored_ends else stored - 1
        starts_at = first + np.cumsum(stored) - stored
        n_full, remainder = np.divmod(lengths, longest)
        # Full pieces, numbered through the documents of the chunk.
        until = np.cumsum(n_full)
        total = int(until[-1])
        for low in range(0, total, FULL_PIECES_AT_ONCE):
            piece = np.arange(low, min(low + FULL_PIECES_AT_ONCE, total))
            document = np.searchsorted(until, piece, side="right")
            within = piece - (until - n_full)[document]
            starts = starts_at[document] + within * longest
            yield starts, np.full(len(piece), longest, np.int32), np.ones(len(piece), np.int32)
        some = np.flatnonzero(remainder)
        if len(some):
            pieces = remainder[some]
            bins, n_bins = best_fit_decreasing(pieces + frame.around, context)
            by_pack = np.lexsort((-pieces, bins))
            yield (
                (starts_at + lengths)[some][by_pack] - pieces[by_pack],
                pieces[by_pack].astype(np.int32),
                np.bincount(bins, minlength=n_bins).astype(np.int32),
            )


class Packs:
    """The packs of a split at one context and frame, memory-mapped."""

    def __init__(self, path: Path, split: Split, context: int, frame: Frame = BARE):
        """Open an index. Raises UserError if it is not whole or not of this split, context and frame."""
        self.path, self.frame = path, frame
        try:
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        if len(raw) < HEADER_BYTES or raw[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path}: not an index of packs, or truncated")
        if digest(raw[:-DIGEST]) != raw[-DIGEST:]:
            raise UserError(f"{path}: altered (the header does not match its checksum)")
        (_, version, self.context, around, stored_ends, self.n_packs, self.n_pieces, self.n_tokens, self.max_segments,
         self.n_split_documents, fingerprint, self._digest) = _FIELDS.unpack_from(raw)  # fmt: skip
        if version != VERSION:
            raise UserError(f"{path}: version {version} of the format, this hotloop reads version {VERSION}")
        found = (fingerprint.hex(), self.context, Frame(around, bool(stored_ends)), self.n_tokens)
        if found != (split.fingerprint, context, frame, _n_filled(split, frame, self.n_pieces)):
            raise UserError(f"{path}: of another corpus or context")
        lengths_at = HEADER_BYTES + 8 * self.n_pieces
        packs_at = lengths_at + -(-4 * self.n_pieces // 8) * 8
        tokens_at = packs_at + 8 * (self.n_packs + 1)
        if size != tokens_at + 4 * self.n_packs:
            raise UserError(f"{path}: truncated or too long ({size} bytes, expected {tokens_at + 4 * self.n_packs})")
        self.map = MappedFile(path)
        self._starts = self.map.array("<i8", HEADER_BYTES, self.n_pieces)
        self._lengths = self.map.array("<i4", lengths_at, self.n_pieces)
        self._packs = self.map.array("<i8", packs_at, self.n_packs + 1)
        self._filled = self.map.array("<i4", tokens_at, self.n_packs)

    @classmethod
    def of(cls, split: Split, context: int, folder: Path | None = None, frame: Frame = BARE) -> Packs:
        """The index beside the shards (or in `folder`), planned now if it is missing, damaged or of another corpus."""
        if context <= frame.around:
            raise UserError(f"context = {context}: must be at least {frame.around + 1}")
        kind = "" if frame == BARE else f"-framed{frame.around}{'-ends' if frame.stored_ends else ''}"
        path = (folder or split.folder) / f"packs-{split.name}-T{context}{kind}.index"
        if path.exists():
            try:
                return cls(path, split, context, frame)
            except UserError:
                pass  # derived from the shards alone: planned again below, written over it by a rename
        try:
            _write(path, split, context, frame)
        except OSError as error:
            raise UserError(f"{path}: the packs cannot be written ({error.strerror or error})") from error
        return cls(path, split, context, frame)

    @property
    def efficiency(self) -> float:
        """Share of the packs' positions that hold a token."""
        return self.n_tokens / (self.n_packs * self.context)

    def pieces(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(starts, lengths, row) of all pieces of `packs`, int64, frames not counted; row = index into `packs`."""
        first = self._packs[packs]
        counts = self._packs[packs + 1] - first
        row = np.repeat(np.arange(len(packs)), counts)
        at = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return self._starts[at], self._lengths[at].astype(np.int64), row

    def tokens(self, packs: np.ndarray) -> np.ndarray:
        """Positions that hold a token in each of `packs`, int64."""
        return self._filled[packs].astype(np.int64)

    def verify(self) -> None:
        """Read the whole index. Raises UserError if it was altered."""
        hasher = blake2b(digest_size=DIGEST)
        with open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            while data := file.read(1 << 20):
                hasher.update(data)
        if hasher.digest() != self._digest:
            raise UserError(f"{self.path}: altered; remove it, it is planned again from the shards")


def _n_filled(split: Split, frame: Frame, n_pieces: int) -> int:
    """Positions that hold a token, in all packs."""
    return split.n_tokens - (0 if frame.stored_ends else split.n_documents) + frame.around * n_pieces


def _write(path: Path, split: Split, context: int, frame: Frame) -> None:
    """Plan into temporary sections, then join them aside and rename."""
    aside = aside_of(path)
    folder = path.parent
    with (
        tempfile.TemporaryFile(dir=folder) as starts,
        tempfile.TemporaryFile(dir=folder) as lengths,
        tempfile.TemporaryFile(dir=folder) as packs,
        tempfile.TemporaryFile(dir=folder) as tokens,
    ):
        n_packs = n_pieces = n_tokens = max_segments = 0
        packs.write(np.zeros(1, "<i8").tobytes())
        for start, length, pieces in plan(split, context, frame):
            starts.write(start.astype("<i8").tobytes())
            lengths.write(length.astype("<i4").tobytes())
            until = np.cumsum(pieces, dtype=np.int64)
            in_pack = np.add.reduceat(length + frame.around, until - pieces, dtype=np.int64)
            packs.write((n_pieces + until).astype("<i8").tobytes())
            tokens.write(in_pack.astype("<i4").tobytes())
            max_segments = max(max_segments, int((pieces + (in_pack < context)).max()))
            n_packs, n_pieces, n_tokens = n_packs + len(pieces), n_pieces + len(start), n_tokens + int(in_pack.sum())
        if n_tokens != _n_filled(split, frame, n_pieces):
            raise UserError(
                f"{split.folder}: the documents of {split.name!r} do not cover its tokens; the shards are damaged"
            )
        if not n_packs:
            raise UserError(f"{split.folder}: no document of {split.name!r} has any text")
        lengths.write(bytes(-4 * n_pieces % 8))
        longest = context - frame.around + (0 if frame.stored_ends else 1)
        n_split = sum(int((chunk > longest).sum()) for _, chunk in split.length_chunks(PLANNED_TOGETHER))
        try:
            with open(aside, "xb") as out:
                out.write(bytes(HEADER_BYTES))
                hasher = blake2b(digest_size=DIGEST)
                for section in (starts, lengths, packs, tokens):
                    _append(section, out, hasher)
                header = _FIELDS.pack(
                    MAGIC, VERSION, context, frame.around, frame.stored_ends, n_packs, n_pieces, n_tokens,
                    max_segments, n_split, bytes.fromhex(split.fingerprint), hasher.digest(),
                ).ljust(HEADER_BYTES - DIGEST, b"\0")  # fmt: skip
                out.seek(0)
                out.write(header + digest(header))
                out.flush()
                os.fsync(out.fileno())
            aside.replace(path)
            fsync_folder(folder)
        finally:
            aside.unlink(missing_ok=True)


def _append(section: IO[bytes], out: IO[bytes], hasher: blake2b) -> None:
    section.seek(0)
    while data := section.read(1 << 20):
        hasher.update(data)
        out.write(data)
