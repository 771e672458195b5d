"""Labelled rows -> training, validation and test examples that share no text.

Equal texts (but for case and the width of spaces) count once across splits: a copy in a split that comes later in the
order test, validation, training is removed and counted, and where splits are drawn, so are copies within the pool. A
pool's order is stratified: every prefix of it holds the classes in nearly the pool's proportions, so that drawing is
cutting, and a larger draw holds the smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

from hotloop.engine.config import LabelsConfig
from hotloop.engine.data.order import derive_key, mix
from hotloop.engine.data.rows import Row, read_rows, require_fields
from hotloop.engine.errors import UserError

SPLITS = ("train", "validation", "test")
TEST_FRACTION = 0.2
_DRAW, _VALIDATION, _JITTER = 0x6C6162656C, 0x76616C, 0x6A6974
"""Counters that keep the draws of one seed apart."""


@dataclass(frozen=True)
class Examples:
    """One split: texts, their labels, and where each one stands."""

    texts: list[str]
    labels: np.ndarray  # (n,) int64 classes, or (n, K) float32 of 0 and 1
    where: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        hasher = sha256(self.labels.tobytes())
        for text in self.texts:
            hasher.update(sha256(text.encode("utf-8", "surrogatepass")).digest())
        return hasher.hexdigest()


@dataclass(frozen=True)
class Counts:
    """What reading removed or noticed."""

    duplicates_across: int = 0
    """Rows left out because another split has their text."""
    duplicates_within: int = 0
    """Rows left out because the pool to draw from has their text already."""
    conflicts: int = 0
    """Rows whose text another row has with other labels."""
    unused: int = 0
    """Examples beyond the budget that no split uses."""


@dataclass(frozen=True)
class LabelledData:
    classes: tuple[str, ...]
    multi_label: bool
    train: Examples
    validation: Examples
    test: Examples
    counts: Counts

    def splits(self) -> dict[str, Examples]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def class_counts(self, split: str) -> dict[str, int]:
        labels = self.splits()[split].labels
        n = labels.sum(0) if self.multi_label else np.bincount(labels, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, n, strict=True)}

    def describe(self) -> str:
        sizes = ", ".join(f"{len(examples):,} {name}" for name, examples in self.splits().items())
        notes = [
            f"{self.counts.duplicates_across:,} duplicates across splits removed",
            f"{self.counts.duplicates_within:,} duplicates within the pool removed",
            f"{self.counts.conflicts:,} texts with conflicting labels",
            f"{self.counts.unused:,} beyond the budget",
        ]
        noted = [note for note in notes if not note.startswith("0 ")]
        return f"{sizes} examples of {len(self.classes)} classes" + "".join(f"; {note}" for note in noted)

    def to_dict(self) -> dict[str, Any]:
        return {
            "classes": list(self.classes),
            "multi_label": self.multi_label,
            "splits": {
                name: {"examples": len(examples), "classes": self.class_counts(name), "sha256": examples.digest()}
                for name, examples in self.splits().items()
            },
            "counts": vars(self.counts),
        }


@dataclass
class _Pool:
    """Rows of one split as they are read; labels are still names."""

    texts: list[str] = field(default_factory=list)
    names: list[tuple[str, ...]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def append(self, text: str, names: tuple[str, ...], where: str) -> None:
        self.texts.append(text)
        self.names.append(names)
        self.where.append(where)

    def take(self, rows: np.ndarray) -> _Pool:
        return _Pool(*([column[i] for i in rows] for column in (self.texts, self.names, self.where)))


def read_labelled(config: LabelsConfig) -> LabelledData:
    """Read, deduplicate, draw and check the splits that `[labels]` describes.

    Raises UserError naming the file and row of the first unlabelled row, empty text or label outside the set, and for a
    class without a training example or a split without any.
    """
    pools, counts = _read_pools(config)
    classes = _classes(config, pools["train"])
    known = set(classes)
    for pool in pools.values():
        for names, where in zip(pool.names, pool.where, strict=True):
            for name in names:
                if name not in known:
                    of = "labels.classes" if config.classes else "the training rows"
                    raise UserError(f"{where}: label {name!r} is outside the set of {of}: {_listed(classes)}")
    drawn, unused = _draw(config, pools)
    number = {name: i for i, name in enumerate(classes)}
    train, validation, test = (_examples(drawn[split], number, config.multi_label) for split in SPLITS)
    data = LabelledData(classes, config.multi_label, train, validation, test, replace(counts, unused=unused))
    for split, examples in data.splits().items():
        if not len(examples):
            raise UserError(f"labels: the {split} split has no example ({data.describe()})")
    missing = [name for name, n in data.class_counts("train").items() if n == 0]
    if missing:
        raise UserError(
            f"labels: class {missing[0]!r} is empty, it has no training example among {len(data.train):,}: label some, "
            "draw more (labels.budget), or leave it out of labels.classes"
        )
    return data


def read_examples(paths: Sequence[Path], config: LabelsConfig, classes: Sequence[str]) -> Examples:
    """All rows of files with labels out of `classes`, duplicates included: for evaluating."""
    pool = _Pool()
    known = set(classes)
    for row in read_rows(paths):
        text, names = _text_and_names(row, config)
        for name in names:
            if name not in known:
                raise UserError(f"{row.where}: label {name!r} is outside the model's set: {_listed(classes)}")
        pool.append(text, names, row.where)
    return _examples(pool, {name: i for i, name in enumerate(classes)}, config.multi_label)


# Reading --------------------------------------------------------------------------------------------------------------


def _read_pools(config: LabelsConfig) -> tuple[dict[str, _Pool], Counts]:
    """The rows of each split, test first, without what an earlier one has."""
    drawn = not config.split_field and not (config.validation and config.test)
    waiting = {split: _Pool() for split in SPLITS}
    for split, row in _rows(config):
        waiting[split].append(*_text_and_names(row, config), row.where)
    seen: dict[bytes, tuple[str, tuple[str, ...]]] = {}
    across = within = conflicts = 0
    pools = {}
    for split in reversed(SPLITS):
        pool = pools[split] = _Pool()
        for text, names, where in zip(*vars(waiting[split]).values(), strict=True):
            first_split, first_names = seen.setdefault(_key(text), (split, names))
            conflicts += set(first_names) != set(names)
            if first_split == split:
                pool.append(text, names, where)
            else:
                across += 1
        if drawn and split == "train":
            pools[split], within = _distinct(pool)
    return pools, Counts(duplicates_across=across, duplicates_within=within, conflicts=conflicts)


def _key(text: str) -> bytes:
    """The same for equal texts, whatever their case and the width of their spaces."""
    return blake2b(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _distinct(pool: _Pool) -> tuple[_Pool, int]:
    first: dict[bytes, int] = {}
    for i, text in enumerate(pool.texts):
        first.setdefault(_key(text), i)
    return pool.take(np.array(list(first.values()), dtype=np.int64)), len(pool.texts) - len(first)


def _rows(config: LabelsConfig) -> Iterator[tuple[str, Row]]:
    for split, files in (("test", config.test), ("validation", config.validation)):
        if files:
            yield from ((split, row) for row in read_rows([Path(file) for file in files]))
    for row in read_rows([Path(file) for file in config.train]):
        split = "train"
        if config.split_field is not None:
            require_fields(row, [config.split_field], "labels.split_field")
            split = row.values[config.split_field]
            if split not in SPLITS:
                raise UserError(
                    f"{row.where}: {config.split_field} = {split!r}: expected one of {', '.join(map(repr, SPLITS))}"
                )
        yield split, row


def _text_and_names(row: Row, config: LabelsConfig) -> tuple[str, tuple[str, ...]]:
    text = row_text(row, config.text)
    require_fields(row, [config.label], "labels.label")
    value = row.values[config.label]
    if value is None or (value == "" and not config.multi_label):
        raise UserError(f"{row.where}: unlabelled row: field {config.label!r} is empty")
    if not config.multi_label:
        return text, (_name(value, row, config),)
    if isinstance(value, str):
        value = [name.strip() for name in value.split(config.separator)] if value.strip() else []
    if not isinstance(value, list):
        raise UserError(f"{row.where}: field {config.label!r} holds {type(value).__name__}, expected a list of names")
    return text, tuple(dict.fromkeys(_name(one, row, config) for one in value))


def row_text(row: Row, field: str, option: str = "labels.text") -> str:
    """The row's text. Raises UserError where it has none."""
    require_fields(row, [field], option)
    text = row.values[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{row.where}: field {field!r} holds {type(text).__name__}, expected a string")
    if not text or text.isspace():
        raise UserError(f"{row.where}: empty text (field {field!r})")
    return text


def _name(value: Any, row: Row, config: LabelsConfig) -> str:
    """A label's name: strings as they are, integers and truth values as JSON writes them."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    got = "an empty name" if value == "" else type(value).__name__
    hint = "; set labels.multi_label = true for lists" if isinstance(value, list) else ""
    raise UserError(f"{row.where}: field {config.label!r} holds {got}, expected a label's name{hint}")


def _classes(config: LabelsConfig, train: _Pool) -> tuple[str, ...]:
    found = {name for names in train.names for name in names}
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    classes = config.classes or tuple(sorted(found, key=int if numbers else None))
    if len(classes) < (1 if config.multi_label else 2):
        raise UserError(
            f"labels: {len(classes)} class{'' if len(classes) == 1 else 'es'} in the training rows "
            f"({_listed(classes) or 'none'}), a classification needs two"
        )
    return classes


def _listed(classes: Sequence[str]) -> str:
    shown = ", ".join(map(repr, classes[:20]))
    return shown + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")


# Drawing --------------------------------------------------------------------------------------------------------------


def stratified_order(strata: Sequence[Any], seed: int, *counters: int) -> np.ndarray:
    """(n,) int64: the examples in an order of which every prefix has each stratum in nearly its proportion.

    The k-th example of a stratum of n, in an order drawn by the seed, is due at (k + u) / n, with u drawn once for the
    stratum: systematic sampling.
    """
    names, stratum = np.unique(np.asarray([_stratum_key(one) for one in strata]), return_inverse=True)
    drawn = mix(derive_key(seed, *counters, _DRAW) ^ np.arange(1, len(strata) + 1, dtype=np.uint64))
    by_stratum = np.lexsort((drawn, stratum))
    sizes = np.bincount(stratum, minlength=len(names))
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    jitter = derive_key(seed, *counters, _JITTER, np.arange(len(names))) / 2.0**64
    due = (rank + np.repeat(jitter, sizes)) / np.repeat(sizes, sizes)
    return by_stratum[np.argsort(due, kind="stable")]


def _stratum_key(stratum: tuple[str, ...]) -> str:
    return "\0".join(sorted(stratum))


def _draw(config: LabelsConfig, pools: dict[str, _Pool]) -> tuple[dict[str, _Pool], int]:
    """Cut what has no files of its own from the training pool."""
    pool = pools["train"]
    n, seed = len(pool.texts), config.split_seed
    draws_test = not config.test and not config.split_field
    draws_validation = not config.validation and not config.split_field
    order = stratified_order(pool.names, seed)
    if config.budget is not None and config.budget > n:
        raise UserError(f"labels.budget = {config.budget}: the files have {n:,} different labelled texts")
    n_test = 0
    if draws_test and config.test_fraction is None and config.budget is not None:
        n_test = n - config.budget
    elif draws_test:
        n_test = max(round(n * (TEST_FRACTION if config.test_fraction is None else config.test_fraction)), 1)
    n_labels = n - n_test if config.budget is None else config.budget
    if n_labels + n_test > n:
        raise UserError(
            f"labels.budget = {n_labels}: with {n_test:,} texts for testing it is more than the {n:,} that there are"
        )
    labelled = pool.take(order[:n_labels])
    train, drawn = labelled, dict(pools)
    if draws_validation:
        inner = stratified_order(labelled.names, seed, _VALIDATION)
        n_validation = max(round(n_labels * config.validation_fraction), 1)
        drawn["validation"], train = labelled.take(inner[:n_validation]), labelled.take(inner[n_validation:])
    drawn["train"] = train
    if draws_test:
        drawn["test"] = pool.take(order[n - n_test :])
    return drawn, n - n_labels - n_test


def _examples(pool: _Pool, number: dict[str, int], multi_label: bool) -> Examples:
    if multi_label:
        labels = np.zeros((len(pool.texts), len(number)), dtype=np.float32)
        for row, names in zip(labels, pool.names, strict=True):
            row[[number[name] for name in names]] = 1
    else:
        labels = np.array([number[names[0]] for names in pool.names], dtype=np.int64)
    return Examples(pool.texts, labels, pool.where)
