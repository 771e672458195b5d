"""The stored corpus: a folder of memory-mapped shards, a tokenizer and a manifest.

    corpus.json            manifest: hashes, counts, options, report
    tokenizer.json
    train-00000.shard ...  validation-00000.shard ...

A shard holds whole documents, each as its tokens followed by `end_id`:

    header    128 bytes: magic, version, item size, counts, tokenizer hash, root and header digests
    tokens    n_tokens x uint16 or uint32, padded to 8 bytes
    offsets   (n_documents + 1) x int64, of documents in `tokens`
    n_bytes   n_documents x int64, UTF-8 bytes of each text
    digests   16 bytes (BLAKE2b) per 4 MiB block of everything between header and digests; the root is their digest

Opening checks header, size and manifest; `verify` reads everything. All integers are little-endian.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from hotloop.engine.data.tokenizer import dtype_of, tokenizer_hash
from hotloop.engine.errors import UserError

MAGIC = b"HOTLSHRD"
VERSION = 1
MANIFEST_FORMAT = "hotloop corpus"
HEADER_BYTES = 128
BLOCK = 1 << 22
DIGEST = 16
_FIELDS = struct.Struct("<8sIIQQQQ32s16s")


def digest(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=DIGEST).digest()


@dataclass(frozen=True)
class Header:
    itemsize: int
    vocab_size: int
    n_documents: int
    n_tokens: int
    n_bytes: int
    tokenizer_hash: str
    root: bytes

    @property
    def offsets_at(self) -> int:
        return HEADER_BYTES + -(-self.n_tokens * self.itemsize // 8) * 8

    @property
    def n_bytes_at(self) -> int:
        return self.offsets_at + 8 * (self.n_documents + 1)

    @property
    def digests_at(self) -> int:
        return self.n_bytes_at + 8 * self.n_documents

    @property
    def file_size(self) -> int:
        return self.digests_at + DIGEST * -(-(self.digests_at - HEADER_BYTES) // BLOCK)

    def pack(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC, VERSION, self.itemsize, self.vocab_size, self.n_documents, self.n_tokens, self.n_bytes,
            bytes.fromhex(self.tokenizer_hash), self.root,
        )  # fmt: skip
        fields = fields.ljust(HEADER_BYTES - DIGEST, b"\0")
        return fields + digest(fields)

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> Header:
        if data[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path}: not a shard of hotloop, or one that was never finished")
        if len(data) < HEADER_BYTES:
            raise UserError(f"{path}: truncated (shorter than its header)")
        _, version, itemsize, vocab_size, n_documents, n_tokens, n_bytes, tokenizer, root = _FIELDS.unpack_from(data)
        if version != VERSION:
            raise UserError(f"{path}: version {version} of the format, this hotloop reads version {VERSION}")
        if digest(data[: HEADER_BYTES - DIGEST]) != data[HEADER_BYTES - DIGEST :]:
            raise UserError(f"{path}: altered (the header does not match its checksum)")
        return cls(itemsize, vocab_size, n_documents, n_tokens, n_bytes, tokenizer.hex(), root)


class BlockHasher:
    """Digests of consecutive blocks of a stream."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self._open = blake2b(digest_size=DIGEST)
        self._filled = 0

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while len(data):
            part = data[: BLOCK - self._filled]
            self._open.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK:
                self._close()

    def finish(self) -> bytes:
        if self._filled:
            self._close()
        return b"".join(self.digests)

    def _close(self) -> None:
        self.digests.append(self._open.digest())
        self._open, self._filled = blake2b(digest_size=DIGEST), 0


# Writing


class _ShardWriter:
    def __init__(self, path: Path, dtype: np.dtype, vocab_size: int, tokenizer: str):
        self.path, self.dtype, self.vocab_size, self.tokenizer = path, dtype, vocab_size, tokenizer
        self.file = open(path, "xb")  # noqa: SIM115  (closed by finish or abandon)
        self.file.write(bytes(HEADER_BYTES))  # not a shard until `finish` writes the real one
        self.hasher = BlockHasher()
        self.offsets, self.n_bytes = array("q", [0]), array("q")
        self.n_tokens = 0

    @property
    def size(self) -> int:
        return self.n_tokens * self.dtype.itemsize + 16 * len(self.n_bytes)

    def write(self, tokens: np.ndarray) -> None:
        self._write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self.n_tokens += len(tokens)

    def end_document(self, n_bytes: int) -> None:
        self.offsets.append(self.n_tokens)
        self.n_bytes.append(n_bytes)

    def finish(self) -> dict[str, Any]:
        """Returns the shard's line in the manifest."""
        self._write(bytes(-self.n_tokens * self.dtype.itemsize % 8))
        self._write(np.frombuffer(self.offsets, dtype=np.int64).astype("<i8").tobytes())
        self._write(np.frombuffer(self.n_bytes, dtype=np.int64).astype("<i8").tobytes())
        table = self.hasher.finish()
        self.file.write(table)
        header = Header(
            self.dtype.itemsize, self.vocab_size, len(self.n_bytes), self.n_tokens, sum(self.n_bytes), self.tokenizer,
            digest(table),
        )  # fmt: skip
        self.file.seek(0)
        self.file.write(header.pack())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "file": self.path.name,
            "documents": header.n_documents,
            "tokens": header.n_tokens,
            "bytes": header.n_bytes,
            "digest": digest(header.pack()).hex(),
        }

    def _write(self, data: bytes) -> None:
        self.hasher.update(data)
        self.file.write(data)


class SplitWriter:
    """Writes the documents of one split into `<split>-00000.shard`, a new shard once `max_shard_bytes` are full."""

    def __init__(self, folder: Path, split: str, vocab_size: int, tokenizer: str, max_shard_bytes: int):
        self.folder, self.split, self.vocab_size, self.tokenizer = folder, split, vocab_size, tokenizer
        self.dtype = dtype_of(vocab_size)
        self.max_shard_bytes = max_shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._writer: _ShardWriter | None = None

    def write(self, tokens: np.ndarray) -> None:
        """A run of the current document's tokens; its last run ends with end_id."""
        if self._writer is None:
            path = self.folder / f"{self.split}-{len(self.shards):05d}.shard"
            self._writer = _ShardWriter(path, self.dtype, self.vocab_size, self.tokenizer)
        self._writer.write(tokens)

    def end_document(self, n_bytes: int) -> None:
        assert self._writer is not None
        self._writer.end_document(n_bytes)
        if self._writer.size >= self.max_shard_bytes:
            self._finish_shard()

    def finish(self) -> dict[str, Any]:
        """Returns the split's part of the manifest."""
        if self._writer is not None:
            self._finish_shard()
        totals = {name: sum(shard[name] for shard in self.shards) for name in ("documents", "tokens", "bytes")}
        return {**totals, "shards": self.shards}

    def close(self) -> None:
        """Let go of an unfinished shard."""
        if self._writer is not None:
            self._writer.file.close()

    def _finish_shard(self) -> None:
        assert self._writer is not None
        self.shards.append(self._writer.finish())
        self._writer = None


# Reading


class MappedFile:
    """A file mapped for reading."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: str, at: int, count: int) -> np.ndarray:
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=at)

    def release(self) -> None:
        """Give mapped pages back to the system's file cache, so that resident memory does not grow as a run goes on.

        Safe at any time, from any thread: a page is mapped again when it is next read.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


class Shard:
    """One memory-mapped shard. Raises UserError if it is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        header = self.header = Header.unpack(raw, path)
        if size != header.file_size:
            what = "truncated" if size < header.file_size else "too long"
            raise UserError(f"{path}: {what} ({size} bytes where its header says {header.file_size})")
        self.map = MappedFile(path)
        self.tokens = self.map.array(f"<u{header.itemsize}", HEADER_BYTES, header.n_tokens)
        self.offsets = self.map.array("<i8", header.offsets_at, header.n_documents + 1)
        self.n_bytes = self.map.array("<i8", header.n_bytes_at, header.n_documents)

    def verify(self, end_id: int) -> None:
        """Read the whole shard: checksums, document ends, token ids. Raises UserError."""
        header, hasher = self.header, BlockHasher()
        with open(self.path, "rb") as file:
            for block in _blocks(file, HEADER_BYTES, header.digests_at):
                hasher.update(block)
            hasher.finish()
            stored = file.read(header.file_size - header.digests_at)
        if digest(stored) != header.root:
            raise UserError(f"{self.path}: altered (its table of checksums does not match the header)")
        for number, found in enumerate(hasher.digests):
            if found != stored[DIGEST * number : DIGEST * (number + 1)]:
                at = HEADER_BYTES + number * BLOCK
                raise UserError(f"{self.path}: altered between bytes {at} and {min(at + BLOCK, header.digests_at)}")
        if self.offsets[0] != 0 or self.offsets[-1] != header.n_tokens or (np.diff(self.offsets) < 1).any():
            raise UserError(f"{self.path}: document offsets do not cover the tokens")
        if (self.tokens[self.offsets[1:] - 1] != end_id).any():
            raise UserError(f"{self.path}: a document does not end with end_id {end_id}")
        for start in range(0, header.n_tokens, BLOCK):
            if (largest := int(self.tokens[start : start + BLOCK].max())) >= header.vocab_size:
                raise UserError(f"{self.path}: token id {largest} beyond the vocabulary of {header.vocab_size}")


def _blocks(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end and (block := file.read(min(BLOCK, end - start))):
        yield block
        start += len(block)


class Split:
    """The documents of one split, over all its shards, numbered in stored order.

    `starts` and token positions below are global: those of the concatenation of all the split's documents.
    """

    def __init__(self, name: str, folder: Path, shards: list[Shard], end_id: int, vocab_size: int):
        self.name, self.folder, self.shards = name, folder, shards
        self.end_id, self.vocab_size = end_id, vocab_size
        documents = [shard.header.n_documents for shard in shards]
        tokens = [shard.header.n_tokens for shard in shards]
        self._first_document = np.cumsum([0, *documents])
        self._first_token = np.cumsum([0, *tokens])
        self.n_documents = sum(documents)
        self.n_tokens = sum(tokens)
        self.n_text_bytes = sum(shard.header.n_bytes for shard in shards)
        self.tokenizer_hash = shards[0].header.tokenizer_hash
        self.fingerprint = digest(b"".join(shard.header.pack() for shard in shards)).hex()
        """Changes with any stored token: the headers hold the roots of the checksums."""

    @property
    def lengths(self) -> np.ndarray:
        """(n_documents,) int64: stored tokens of each document, its end included."""
        return np.concatenate([np.diff(shard.offsets) for shard in self.shards])

    @property
    def document_bytes(self) -> np.ndarray:
        """(n_documents,) int64: UTF-8 bytes of each document."""
        return np.concatenate([shard.n_bytes for shard in self.shards])

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """Global position of the first token of each of `documents`."""
        which = np.searchsorted(self._first_document, documents, side="right") - 1
        starts = np.empty(len(documents), dtype=np.int64)
        for shard in np.unique(which):
            mine = which == shard
            starts[mine] = (
                self._first_token[shard] + self.shards[shard].offsets[documents[mine] - self._first_document[shard]]
            )
        return starts

    def length_chunks(self, n_documents: int) -> Iterator[tuple[int, np.ndarray]]:
        """(global start, lengths) of runs of `n_documents` documents, the same whatever the size of the shards."""
        start, pending = 0, np.empty(0, dtype=np.int64)
        for shard in self.shards:
            for first in range(0, shard.header.n_documents, n_documents):
                pending = np.concatenate([pending, np.diff(shard.offsets[first : first + n_documents + 1])])
                while len(pending) >= n_documents:
                    chunk, pending = pending[:n_documents], pending[n_documents:]
                    yield start, chunk
                    start += int(chunk.sum())
        if len(pending):
            yield start, pending

    def document(self, index: int) -> np.ndarray:
        """Stored tokens of a document, end_id last."""
        shard, local = self._locate(index)
        return shard.tokens[shard.offsets[local] : shard.offsets[local + 1]]

    def n_bytes(self, index: int) -> int:
        shard, local = self._locate(index)
        return int(shard.n_bytes[local])

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(sum(lengths),) int64: the tokens of runs that stay inside one document each, one after the other."""
        which = np.searchsorted(self._first_token, starts, side="right") - 1
        goes_to = np.cumsum(lengths) - lengths
        at = np.arange(int(lengths.sum())) + np.repeat(starts - self._first_token[which] - goes_to, lengths)
        touched = np.unique(which)
        if len(touched) == 1:
            return self.shards[touched[0]].tokens[at].astype(np.int64)
        out = np.empty(len(at), dtype=np.int64)
        which = np.repeat(which, lengths)
        for shard in touched:
            mine = which == shard
            out[mine] = self.shards[shard].tokens[at[mine]]
        return out

    def before(self, starts: np.ndarray) -> np.ndarray:
        """The token before each start: end_id, where a document begins (every document ends with it)."""
        previous = np.full(len(starts), self.end_id, dtype=np.int64)
        later = starts > 0  # position 0 has no token before it
        previous[later] = self.read(starts[later] - 1, np.ones(int(later.sum()), dtype=np.int64))
        return previous

    def verify(self) -> None:
        for shard in self.shards:
            shard.verify(self.end_id)

    def release(self) -> None:
        """Give all mapped pages back to the system's file cache."""
        for shard in self.shards:
            shard.map.release()

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return self.shards[shard], index - int(self._first_document[shard])


class Corpus:
    """A folder that `hotloop prepare` wrote. Raises UserError, naming the file, for anything that does not fit."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "corpus.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); expected a folder that `hotloop prepare` wrote"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        manifest = self.manifest if isinstance(self.manifest, dict) else {}
        if manifest.get("format") != MANIFEST_FORMAT:
            raise UserError(f"{path}: not the manifest of a corpus")
        if manifest["version"] != VERSION:
            raise UserError(f"{path}: version {manifest['version']} of the format, this hotloop reads {VERSION}")
        try:
            self.vocab_size: int = manifest["vocab_size"]
            self.end_id: int = manifest["end_id"]
            self.end_token: str = manifest["end_token"]
            self.tokenizer_hash: str = manifest["tokenizer_hash"]
            self.dtype = np.dtype(manifest["dtype"])
            splits = {name: part["shards"] for name, part in manifest["splits"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: altered (no valid entry {error})") from error
        if dtype_of(self.vocab_size).itemsize > self.dtype.itemsize:
            raise UserError(f"{path}: a vocabulary of {self.vocab_size} does not fit the shards' {self.dtype}")
        self.tokenizer_path = self.folder / "tokenizer.json"
        try:
            found = tokenizer_hash(self.tokenizer_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.tokenizer_path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{self.tokenizer_path}: not valid JSON ({error})") from error
        if found != self.tokenizer_hash:
            raise UserError(
                f"{self.tokenizer_path}: not the tokenizer of these shards (hash {found[:12]}, "
                f"corpus.json has {self.tokenizer_hash[:12]}); put the original back or run `hotloop prepare` again"
            )
        self.splits = {name: self._open(name, shards) for name, shards in splits.items()}

    def identity(self) -> dict[str, bytes]:
        """The files that say which corpus this is, as a run keeps them."""
        return {path.name: path.read_bytes() for path in (self.folder / "corpus.json", self.tokenizer_path)}

    def split(self, name: str) -> Split:
        """ "train" or "validation"."""
        if name not in self.splits:
            raise UserError(f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def verify(self) -> None:
        """Read every shard whole. Raises UserError for the first that is altered."""
        for split in self.splits.values():
            split.verify()

    def _open(self, name: str, lines: list[dict[str, Any]]) -> Split:
        shards = []
        for line in lines:
            shard = Shard(self.folder / line["file"])
            header = shard.header
            if header.tokenizer_hash != self.tokenizer_hash:
                raise UserError(
                    f"{shard.path}: made with another tokenizer (hash {header.tokenizer_hash[:12]}, "
                    f"corpus.json has {self.tokenizer_hash[:12]})"
                )
            if header.vocab_size != self.vocab_size or header.itemsize != self.dtype.itemsize:
                raise UserError(
                    f"{shard.path}: stores a vocabulary of {header.vocab_size} in {header.itemsize} bytes per token, "
                    f"corpus.json has {self.vocab_size} in {self.dtype.itemsize}"
                )
            if digest(header.pack()).hex() != line["digest"]:
                raise UserError(f"{shard.path}: not the shard that corpus.json lists (other documents or other tokens)")
            shards.append(shard)
        return Split(name, self.folder, shards, self.end_id, self.vocab_size)
