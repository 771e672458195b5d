"""Documents -> corpus folder, in two readings of the files and bounded memory.

1. Scan: find duplicates, decide each document's split, draw the tokenizer's sample from the training split.
2. Encode: tokens of the kept documents into shards.

Memory: a few batches of text, the sample, and per document one byte plus about 110 bytes for its digest.
The folder is written aside, flushed to the disk and renamed: under its own name it is whole or not there.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hotloop.engine.data.comparison import bytes_per_token, own_tokenizer
from hotloop.engine.data.documents import Documents, OnBadEncoding, Segment
from hotloop.engine.data.extend import extend_tokenizer, new_tokens
from hotloop.engine.data.files import Report, printable, walk
from hotloop.engine.data.shards import MANIFEST_FORMAT, VERSION, SplitWriter
from hotloop.engine.data.tokenizer import END_TOKEN, Encoder, Kind, Special, load_tokenizer, train_tokenizer
from hotloop.engine.errors import UserError
from hotloop.engine.files import aside_of, fsync_folder, write_synced

TRAIN, VALIDATION = "train", "validation"
BATCH_CHARACTERS = 1 << 20  # the library's encodings take 50 times the memory of their text
BATCH_SEGMENTS = 1 << 12
COMPARED_CHARACTERS = 1 << 22
"""Held-out text on which tokenizers are compared."""

_TO_TRAIN, _TO_VALIDATION, _DUPLICATE = range(3)


@dataclass(frozen=True)
class PrepareConfig:
    text_field: str = "text"
    """Column or key that holds the text in .jsonl, .csv and .parquet files."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of names, or of paths below the given folder, that are left out."""
    on_bad_encoding: OnBadEncoding = "replace"
    """A document with invalid UTF-8: replace the bytes with U+FFFD, skip the document, or stop with an error."""
    tokenizer: Path | None = None
    """tokenizer.json to reuse, or a folder that has one; none: train one on the training split."""
    extend_tokenizer: Path | None = None
    """The same, and add tokens learnt from the training split. A run that begins with the folder's checkpoint grows its
    embeddings."""
    add_tokens: int = 1000
    """Tokens to add to --extend-tokenizer; fewer where too little repeats itself."""
    compare_tokenizers: bool = True
    """With a reused or extended tokenizer, train one of one's own of the same kind and size besides, and say how many
    bytes of held-out text a token of each is."""
    kind: Kind = "bpe"
    """Kind of tokenizer to train; bpe is byte-level and lossless."""
    vocab_size: int = 16_384
    """Vocabulary to train, special tokens included."""
    tokenizer_bytes: int = 64 << 20
    """Text to train the tokenizer on, drawn evenly from the training split and held in memory."""
    special: Special = "causal"
    """Special tokens of a trained tokenizer: masked adds [CLS] [SEP] [MASK] [PAD] [UNK], for objective = "masked"."""
    end_token: str | None = None
    """Token that ends each document, any that a reused tokenizer has; none: <|endoftext|>, else [SEP] or what else ends
    a text in its family."""
    split_by: Literal["document", "folder"] = "document"
    """Hold out single documents, or whole folders: the first component below each given path is one group."""
    validation_fraction: float = 0.05
    """Share to hold out, of the documents or of the files' bytes by folder; 0: nothing."""
    seed: int = 0
    """Decides which documents or folders are held out and which train the tokenizer."""
    max_shard_mb: float = 256
    """A new shard begins once one has reached this size (MiB)."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: the manifest, and the time it took in seconds by phase."""

    folder: Path
    manifest: dict[str, Any]
    seconds: dict[str, float]


Progress = Callable[[str, int, int], None]
"""Called with the phase, and the bytes of files done and in all."""


def prepare(paths: Sequence[Path], out: Path, config: PrepareConfig, progress: Progress | None = None) -> Prepared:
    """Write a corpus folder `out` from the documents in `paths`.

    Raises UserError for bad input, and for an `out` that exists and is not empty; whatever fails, nothing is left under
    the name `out`.
    """
    out = Path(os.path.abspath(out))
    _check(config, paths, out)
    started = time.perf_counter()
    seconds = {}
    given = config.tokenizer or config.extend_tokenizer
    general = None if given is None else load_tokenizer(given, config.end_token)
    # Every path, before anything is read or written.
    group_bytes: dict[str, int] = {}
    for file in walk(paths, config.exclude):
        group_bytes[file.group] = group_bytes.get(file.group, 0) + file.size
    held_out = _held_out_groups(group_bytes, config) if config.split_by == "folder" else frozenset()
    track = _Tracker(progress, sum(group_bytes.values()))
    documents = Documents(
        paths, text_field=config.text_field, on_bad_encoding=config.on_bad_encoding, exclude=config.exclude
    )
    with _written_aside(out) as folder:
        with open(folder / "problems.log", "w", encoding="utf-8") as sink:
            report = Report(sink=sink)
            scan = _scan(track("scan", documents.read(report)), config, held_out, report)
            sink.flush()
            os.fsync(sink.fileno())
        seconds["scan"] = time.perf_counter() - started

        track.say("train tokenizer")
        encoder = Encoder(_tokenizer(general, scan.sample, config), config.end_token)
        rivals = _rivals(general, encoder, scan.sample, config)
        scan.sample.clear()
        seconds["tokenizer"] = time.perf_counter() - started - sum(seconds.values())

        splits, unknown, held_out_text = _encode(
            track("encode", documents.read(Report())), scan, encoder, folder, config
        )
        write_synced(folder / "tokenizer.json", [encoder.json.encode()])
        manifest: dict[str, Any] = {
            "format": MANIFEST_FORMAT,
            "version": VERSION,
            "tokenizer_hash": encoder.hash,
            "vocab_size": encoder.vocab_size,
            "end_token": encoder.end_token,
            "end_id": encoder.end_id,
            "dtype": encoder.dtype.name,
            "splits": splits,
            "report": {
                **report.to_dict(),
                "duplicate_documents": scan.decisions.count(_DUPLICATE),
                "unknown_tokens": unknown,
                "held_out_folders": sorted(map(printable, held_out)),
                "added_tokens": 0 if general is None else len(new_tokens(general, encoder.json)),
                "bytes_per_token": {name: bytes_per_token(rival, held_out_text) for name, rival in rivals.items()},
            },
            "options": {
                "paths": [printable(path) for path in paths],
                **{name: _plain(value) for name, value in dataclasses.asdict(config).items()},
            },
        }
        write_synced(folder / "corpus.json", [json.dumps(manifest, indent=2).encode(), b"\n"])
        seconds["encode"] = time.perf_counter() - started - sum(seconds.values())
    return Prepared(out, manifest, seconds)


# First reading


@dataclass
class _Scan:
    sample: Sample
    decisions: bytearray = field(default_factory=bytearray)
    """Per document, in the order they are read: _TO_TRAIN, _TO_VALIDATION or _DUPLICATE."""
    content: str = ""
    """Digest of all text: the second reading must find the same."""


class Sample:
    """An even draw of segments within a byte budget: those with the smallest keyed hashes.

    The draw depends on the texts and the seed only, not on the order in which they are added.
    """

    def __init__(self, budget: int, key: bytes):
        self.budget, self.key = budget, key
        self.n_bytes = 0
        self._heap: list[tuple[int, int, bytes]] = []  # (-hash, document, text): the largest hash on top

    def add(self, text: bytes, document: int) -> None:
        self._push((-_keyed_hash(text, self.key), document, text))

    def merge(self, other: Sample) -> None:
        for entry in other._heap:
            self._push(entry)

    def discard(self, document: int) -> None:
        self._heap = [entry for entry in self._heap if entry[1] != document]
        heapq.heapify(self._heap)
        self.n_bytes = sum(len(text) for _, _, text in self._heap)

    def texts(self) -> Iterator[str]:
        """In the order of the documents: the trainer's result may depend on it."""
        return (text.decode() for _, text in sorted((document, text) for _, document, text in self._heap))

    def clear(self) -> None:
        self._heap.clear()

    def _push(self, entry: tuple[int, int, bytes]) -> None:
        heapq.heappush(self._heap, entry)
        self.n_bytes += len(entry[2])
        while self.n_bytes > self.budget and len(self._heap) > 1:
            self.n_bytes -= len(heapq.heappop(self._heap)[2])


def _scan(segments: Iterator[Segment], config: PrepareConfig, held_out: frozenset[str], report: Report) -> _Scan:
    sample_key = _key(config.seed, "sample")
    scan = _Scan(Sample(config.tokenizer_bytes, sample_key))
    decisions, sample = scan.decisions, scan.sample
    content = blake2b(digest_size=32)
    seen: set[bytes] = set()
    split_key = _key(config.seed, "split")
    threshold = int(config.validation_fraction * 2**64)
    nearest = (2**64, -1)  # (hash, document) of the training document that is next to be held out
    document = blake2b(digest_size=16)
    pending = Sample(config.tokenizer_bytes, sample_key)
    training = config.tokenizer is None or _compares(config)
    for segment in segments:
        data = segment.text.encode()
        document.update(data)
        if training:
            pending.add(data, len(decisions))
        if not segment.last:
            continue
        name = document.digest()
        content.update(name)
        if name in seen:
            decisions.append(_DUPLICATE)
        else:
            seen.add(name)
            if config.split_by == "folder":
                validation = segment.file.group in held_out
            else:
                value = _keyed_hash(name, split_key)
                validation = value < threshold
                if not validation:
                    nearest = min(nearest, (value, len(decisions)))
            decisions.append(_TO_VALIDATION if validation else _TO_TRAIN)
            if training and not validation:
                sample.merge(pending)
        document = blake2b(digest_size=16)
        pending = Sample(config.tokenizer_bytes, sample_key)
    scan.content = content.hexdigest()
    kept = len(seen)
    if not kept:
        raise UserError(f"no document has any text ({report.first_problem()})")
    if config.validation_fraction and not decisions.count(_TO_VALIDATION):
        if config.split_by == "folder":
            raise UserError("the held-out folders have no documents of their own; raise --validation-fraction")
        if kept == 1:
            raise UserError(
                "one document cannot be split into training and validation; give more documents or "
                "--validation-fraction 0"
            )
        decisions[nearest[1]] = _TO_VALIDATION  # a small corpus still has a document to evaluate on
        sample.discard(nearest[1])
    if not decisions.count(_TO_TRAIN):
        raise UserError(f"--validation-fraction {config.validation_fraction}: no document is left to train on")
    return scan


def _held_out_groups(sizes: dict[str, int], config: PrepareConfig) -> frozenset[str]:
    """Groups in keyed order, passing over those that would exceed the fraction of the bytes; at least the smallest."""
    if not config.validation_fraction:
        return frozenset()
    if len(sizes) < 2:
        raise UserError(
            f"--split-by folder: only one folder or file below the given paths ({next(iter(sizes))!r}); "
            "give more, or --split-by document"
        )
    key = _key(config.seed, "split")
    left = config.validation_fraction * sum(sizes.values())
    chosen = set()
    for group in sorted(sizes, key=lambda name: (_keyed_hash(os.fsencode(name), key), name)):
        if 0 < sizes[group] <= left:
            chosen.add(group)
            left -= sizes[group]
    return frozenset(chosen or [min(sizes, key=lambda name: (sizes[name] == 0, sizes[name], name))])


def _key(seed: int, purpose: str) -> bytes:
    return blake2b(f"{purpose}:{seed}".encode(), digest_size=32).digest()


def _keyed_hash(data: bytes, key: bytes) -> int:
    """64 bits."""
    return int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), "little")


# Tokenizers


def _compares(config: PrepareConfig) -> bool:
    given = config.tokenizer is not None or config.extend_tokenizer is not None
    return given and config.compare_tokenizers and config.validation_fraction > 0


def _tokenizer(general: str | None, sample: Sample, config: PrepareConfig) -> str:
    if general is None:
        return train_tokenizer(sample.texts(), config.kind, config.vocab_size, config.special)
    if config.extend_tokenizer is not None:
        return extend_tokenizer(general, sample.texts(), config.add_tokens)
    return general


def _rivals(general: str | None, encoder: Encoder, sample: Sample, config: PrepareConfig) -> dict[str, Encoder]:
    """The tokenizers to compare where one is given: itself, the extended one, and one of one's own of the same size."""
    if general is None or not _compares(config):
        return {}
    own = own_tokenizer(encoder, sample.texts())
    extended = {} if config.extend_tokenizer is None else {"extended": encoder}
    return {"general": Encoder(general, config.end_token), **extended, **({} if own is None else {"own": own})}


# Second reading


def _encode(
    segments: Iterator[Segment], scan: _Scan, encoder: Encoder, folder: Path, config: PrepareConfig
) -> tuple[dict[str, Any], int, list[str]]:
    """Returns the manifest's splits, the number of unknown tokens, and the first of the held-out text."""
    max_shard_bytes = int(config.max_shard_mb * (1 << 20))
    names = [TRAIN, *([VALIDATION] if scan.decisions.count(_TO_VALIDATION) else [])]
    writers = [SplitWriter(folder, name, encoder.vocab_size, encoder.hash, max_shard_bytes) for name in names]
    unknown = 0
    n_bytes = 0  # of the current document, so far
    held_out: list[str] = []
    room = COMPARED_CHARACTERS

    def flush(batch: list[tuple[SplitWriter, str, bool]]) -> None:
        nonlocal unknown, n_bytes, room
        for (writer, text, last), tokens in zip(batch, encoder.encode([text for _, text, _ in batch]), strict=True):
            if encoder.unknown_id is not None:
                unknown += int((tokens == encoder.unknown_id).sum())
            writer.write(tokens)
            n_bytes += len(text.encode())
            if writer.split == VALIDATION and room > 0:
                held_out.append(text[:room])
                room -= len(text)
            if last:
                writer.write(end)
                writer.end_document(n_bytes)
                n_bytes = 0

    end = np.array([encoder.end_id], dtype=encoder.dtype)
    content, document = blake2b(digest_size=32), blake2b(digest_size=16)
    batch: list[tuple[SplitWriter, str, bool]] = []
    size = index = 0
    changed = UserError("the files changed while they were read; nothing was written")
    try:
        for segment in segments:
            document.update(segment.text.encode())
            if index == len(scan.decisions):
                raise changed
            decision = scan.decisions[index]
            if decision != _DUPLICATE:
                batch.append((writers[decision], segment.text, segment.last))
                size += len(segment.text)
            if segment.last:
                content.update(document.digest())
                document = blake2b(digest_size=16)
                index += 1
            if size >= BATCH_CHARACTERS or len(batch) >= BATCH_SEGMENTS:
                flush(batch)
                batch, size = [], 0
        flush(batch)
        if content.hexdigest() != scan.content:
            raise changed
        return {writer.split: writer.finish() for writer in writers}, unknown, held_out
    finally:
        for writer in writers:
            writer.close()


# Files and progress


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name if the block succeeds and disappears if it does not."""
    aside = aside_of(out)
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()
        except OSError as error:
            raise UserError(f"{printable(out)}: cannot be created ({error.strerror})") from error
        yield aside
        fsync_folder(aside)
        # Replaces an empty folder, fails on any other: nothing is ever written over.
        aside.rename(out)
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{printable(out)}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Tracker:
    """Passes segments on and reports how far the files are read, once per file."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total = progress, total

    def say(self, phase: str) -> None:
        if self.progress is not None:
            self.progress(phase, 0, 0)

    def __call__(self, phase: str, segments: Iterator[Segment]) -> Iterator[Segment]:
        if self.progress is None:
            yield from segments
            return
        done, current = 0, None
        self.progress(phase, 0, self.total)
        for segment in segments:
            if segment.file is not current:
                self.progress(phase, done, self.total)
                current = segment.file
                done += current.size
            yield segment
        self.progress(phase, self.total, self.total)


def _check(config: PrepareConfig, paths: Sequence[Path], out: Path) -> None:
    if not paths:
        raise UserError("no paths given; expected folders or files of documents")
    if not 0 <= config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction}: must be at least 0 and below 1")
    if config.max_shard_mb <= 0:
        raise UserError(f"--max-shard-mb {config.max_shard_mb}: must be greater than 0")
    if config.tokenizer_bytes <= 0:
        raise UserError(f"--tokenizer-bytes {config.tokenizer_bytes}: must be greater than 0")
    if config.tokenizer is not None and config.extend_tokenizer is not None:
        raise UserError("--tokenizer and --extend-tokenizer are both given: give one of them")
    if config.add_tokens <= 0:
        raise UserError(f"--add-tokens {config.add_tokens}: must be greater than 0")
    reused = config.tokenizer is not None or config.extend_tokenizer is not None
    if reused and config.special != "causal":
        raise UserError(f"--special {config.special}: only for a tokenizer that is trained, not for a reused one")
    if not reused and config.end_token not in (None, END_TOKEN):
        raise UserError(f"--end-token {config.end_token}: only for a reused --tokenizer; a trained one has {END_TOKEN}")
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"{printable(out)}: exists and is not empty; give another --out, or remove it")
    elif os.path.lexists(out):
        raise UserError(f"{printable(out)}: exists and is not a folder; give another --out")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return printable(value)
    return list(value) if isinstance(value, tuple) else value
