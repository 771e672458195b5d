"""From files to a corpus folder: complete, repeatable, safe, in bounded memory; damaged corpora are refused."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tyro
from tokenizers import AddedToken, Tokenizer

from hotloop.engine.commands import demo
from hotloop.engine.commands.prepare import Prepare
from hotloop.engine.data import documents, shards
from hotloop.engine.data import prepare as module
from hotloop.engine.data.files import walk
from hotloop.engine.data.packing import Packs
from hotloop.engine.data.prepare import PrepareConfig, Sample, prepare
from hotloop.engine.data.shards import HEADER_BYTES, Corpus
from hotloop.engine.data.tokenizer import train_tokenizer
from hotloop.engine.errors import UserError
from hotloop.engine.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ISOLATED = [sys.executable, "-I"]
LANGUAGES = ["the quick brown fox", "der schnelle Fuchs über", "быстрая лиса", "素早い狐。", "η γρήγορη αλεπού 🦊"]


def write_docs(folder, n=60, seed=0):
    rng = np.random.default_rng(seed)
    texts = {}
    for i in range(n):
        words = " ".join(LANGUAGES[j] for j in rng.integers(0, len(LANGUAGES), rng.integers(1, 40)))
        texts[f"part{i % 7}/doc{i:03d}.txt"] = f"Document {i}\n{words}\n"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return texts


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    return folder


SMALL = PrepareConfig(vocab_size=400, validation_fraction=0.2)


def with_options(**options):
    import dataclasses

    return dataclasses.replace(SMALL, **options)


def decoded(corpus, split):
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    texts = []
    for i in range(split.n_documents):
        tokens = split.document(i)
        assert tokens[-1] == corpus.end_id
        assert not (tokens[:-1] == corpus.end_id).any()
        texts.append(tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False))
        assert split.n_bytes(i) == len(texts[-1].encode())
    return texts


@pytest.mark.parametrize("max_shard_mb", [256, 0.001])
def test_every_document_is_stored_once(tmp_path, docs, max_shard_mb):
    texts = write_docs(docs)
    (docs / "twice.txt").write_text(texts["part3/doc003.txt"], encoding="utf-8")
    (docs / "zz.jsonl").write_text(json.dumps({"text": texts["part4/doc004.txt"]}) + "\n")
    (docs / "end.md").write_text("this <|endoftext|> is not the end")
    result = prepare([docs], tmp_path / "out", with_options(max_shard_mb=max_shard_mb))
    corpus = Corpus(tmp_path / "out")
    corpus.verify()
    train, validation = corpus.split("train"), corpus.split("validation")
    assert Counter(decoded(corpus, train) + decoded(corpus, validation)) == Counter(
        [*texts.values(), "this <|endoftext|> is not the end"]
    )
    assert 0 < validation.n_documents < 30
    assert result.manifest["report"]["duplicate_documents"] == 2
    assert (len(train.shards) > 3) == (max_shard_mb < 1)
    for split in (train, validation):
        assert split.n_tokens == split.lengths.sum()
        assert split.n_text_bytes == split.document_bytes.sum()
        part = result.manifest["splits"][split.name]
        assert (part["documents"], part["tokens"], part["bytes"]) == (
            split.n_documents, split.n_tokens, split.n_text_bytes,
        )  # fmt: skip


def test_two_runs_write_the_same_bytes(tmp_path, docs):
    write_docs(docs)
    for name in ("a", "b"):
        prepare([docs], tmp_path / name, SMALL)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["corpus.json", "problems.log", "tokenizer.json", "train-00000.shard", "validation-00000.shard"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_split_follows_content_and_seed_not_the_name(tmp_path, docs):
    texts = write_docs(docs)
    prepare([docs], tmp_path / "a", SMALL)
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, text in enumerate(reversed(texts.values())):
        (moved / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare([moved], tmp_path / "b", SMALL)
    prepare([docs], tmp_path / "c", with_options(seed=1))
    held = []
    for name in "abc":
        corpus = Corpus(tmp_path / name)
        held.append(set(decoded(corpus, corpus.split("validation"))))
    assert held[0] == held[1]
    assert held[0] != held[2]


def test_whole_folders_are_held_out(tmp_path, docs):
    texts = write_docs(docs, 200)
    result = prepare([docs], tmp_path / "out", with_options(split_by="folder", validation_fraction=0.3))
    held = result.manifest["report"]["held_out_folders"]
    assert 1 <= len(held) <= 2
    corpus = Corpus(tmp_path / "out")
    expected = {text for name, text in texts.items() if name.split("/")[0] in held}
    assert set(decoded(corpus, corpus.split("validation"))) == expected
    assert corpus.split("validation").n_text_bytes <= 0.3 * sum(len(text.encode()) for text in texts.values())


def test_the_tokenizer_never_sees_held_out_text(tmp_path, docs):
    texts = write_docs(docs, 200)
    result = prepare(
        [docs], tmp_path / "out", with_options(split_by="folder", validation_fraction=0.3, vocab_size=1000)
    )
    held = result.manifest["report"]["held_out_folders"]
    for name in texts:
        if name.split("/")[0] in held:
            (docs / name).write_text("entirely other words, unheard elsewhere " * 9 + name, encoding="utf-8")
    changed = prepare([docs], tmp_path / "b", with_options(split_by="folder", validation_fraction=0.9, vocab_size=1000))
    assert changed.manifest["report"]["held_out_folders"] != held  # sizes changed: another draw, another tokenizer
    assert changed.manifest["tokenizer_hash"] != result.manifest["tokenizer_hash"]
    seen = []
    original = module.train_tokenizer
    try:
        module.train_tokenizer = lambda texts, *a: original(seen[:] if seen.extend(texts) else seen, *a)
        prepare([docs], tmp_path / "c", with_options(tokenizer_bytes=4000))
    finally:
        module.train_tokenizer = original
    corpus = Corpus(tmp_path / "c")
    assert seen
    assert not set(seen) & set(decoded(corpus, corpus.split("validation")))
    assert sum(len(text.encode()) for text in seen) <= 4000


def test_the_sample_does_not_depend_on_the_order():
    texts = [os.urandom(50).hex().encode() for _ in range(300)]
    key = b"k" * 32
    forward, backward, merged = (Sample(5000, key) for _ in range(3))
    for i, text in enumerate(texts):
        forward.add(text, i)
        part = Sample(5000, key)
        part.add(text, i)
        merged.merge(part)
    for i, text in reversed(list(enumerate(texts))):
        backward.add(text, i)
    assert list(forward.texts()) == list(backward.texts()) == list(merged.texts())
    assert len(list(forward.texts())) == 50


def test_a_small_corpus_still_holds_one_document_out(tmp_path, docs):
    for i in range(4):
        (docs / f"{i}.txt").write_text(f"document number {i}")
    for seed in range(5):
        prepare([docs], tmp_path / f"{seed}", with_options(validation_fraction=0.001, seed=seed))
        assert Corpus(tmp_path / f"{seed}").split("validation").n_documents == 1
    prepare([docs], tmp_path / "none", with_options(validation_fraction=0))
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        Corpus(tmp_path / "none").split("validation")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_other_tokenizers_count_what_they_cannot_say(tmp_path, docs, kind):
    write_docs(docs)
    result = prepare([docs], tmp_path / "out", with_options(kind=kind, validation_fraction=0))
    assert result.manifest["report"]["unknown_tokens"] == 0
    (docs / "unseen.txt").write_text("ᚠᚢᚦ ᚨᚱᚲ ⟁", encoding="utf-8")
    reused = with_options(tokenizer=tmp_path / "out/tokenizer.json")
    again = prepare([docs], tmp_path / "again", reused)
    assert again.manifest["report"]["unknown_tokens"] > 0
    assert again.manifest["tokenizer_hash"] == result.manifest["tokenizer_hash"]


def test_a_long_document_spans_segments(tmp_path, docs, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT", 2000)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 5000)
    text = "".join(f"line {i} of a long document\n" for i in range(5000))
    for name in ("a.txt", "copy.txt"):
        (docs / name).write_text(text)
    (docs / "b.txt").write_text("short")
    result = prepare([docs], tmp_path / "out", with_options(validation_fraction=0, max_shard_mb=0.01))
    corpus = Corpus(tmp_path / "out")
    assert decoded(corpus, corpus.split("train")) == [text, "short"]
    assert result.manifest["report"]["duplicate_documents"] == 1


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, docs):
    write_docs(docs)
    tokenizer = Tokenizer.from_str(train_tokenizer(["a"], "bpe", 257))
    tokenizer.add_tokens(
        [AddedToken(f"Document {i}\n") if i < 60 else AddedToken(f"<{i}>") for i in range(70_000)][::-1]
    )
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    prepare([docs], tmp_path / "out", with_options(tokenizer=tmp_path / "t.json", validation_fraction=0))
    corpus = Corpus(tmp_path / "out")
    assert corpus.dtype == np.uint32
    assert corpus.split("train").document(0)[0] > 65_535


# What is refused


def test_out_that_exists(tmp_path, docs):
    write_docs(docs)
    out = tmp_path / "out"
    out.mkdir()
    prepare([docs], out, SMALL)  # empty is fine
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare([docs], out, with_options(seed=5))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        prepare([docs], tmp_path / "file", SMALL)


def test_out_that_appears_meanwhile_is_not_written_over(tmp_path, docs, monkeypatch):
    write_docs(docs)
    out = tmp_path / "out"
    original = module.train_tokenizer

    def slow(*arguments):
        out.mkdir()
        (out / "precious").write_text("mine")
        return original(*arguments)

    monkeypatch.setattr(module, "train_tokenizer", slow)
    with pytest.raises(UserError, match=r"out: not written \(Directory not empty\)"):
        prepare([docs], out, SMALL)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0: must be"),
        ({"vocab_size": 100}, "byte-level BPE needs at least 257"),
        ({"tokenizer": Path("missing.json")}, "missing.json: cannot be read"),
        ({"end_token": "</s>"}, "only for a reused --tokenizer"),
        ({"text_field": "body"}, r"no field 'body'"),
        ({"on_bad_encoding": "error"}, "invalid UTF-8 at byte 0"),
        ({"max_shard_mb": 0}, "must be greater than 0"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, docs, options, message):
    write_docs(docs)
    (docs / "rows.jsonl").write_text('{"text": "x"}\n')
    (docs / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=message):
        prepare([docs], tmp_path / "out", with_options(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_nothing_to_split(tmp_path, docs):
    with pytest.raises(UserError, match="no paths given"):
        prepare([], tmp_path / "out", SMALL)
    (docs / "a.txt").write_text("one")
    with pytest.raises(UserError, match=r"one document cannot be split.*--validation-fraction 0"):
        prepare([docs], tmp_path / "out", SMALL)
    with pytest.raises(UserError, match="only one folder or file below"):
        prepare([docs], tmp_path / "out", with_options(split_by="folder"))
    (docs / "a.txt").write_text("")
    with pytest.raises(UserError, match="no document has any text"):
        prepare([docs], tmp_path / "out", SMALL)


def test_files_that_change_between_the_readings(tmp_path, docs, monkeypatch):
    write_docs(docs)
    original = module.train_tokenizer

    def meddle(*arguments):
        (docs / "part0/doc000.txt").write_text("something else")
        return original(*arguments)

    monkeypatch.setattr(module, "train_tokenizer", meddle)
    with pytest.raises(UserError, match="the files changed while they were read"):
        prepare([docs], tmp_path / "out", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_out_inside_the_documents(tmp_path, docs):
    """What is being written, and what a killed run left, is not read as documents."""
    write_docs(docs)
    left = docs / ".aside-0123abcd-out"
    left.mkdir()
    (left / "x.txt").write_text("left over")
    result = prepare([docs], docs / "out", SMALL)
    assert result.manifest["report"]["documents"] == 60
    assert result.manifest["report"]["skipped"]["unfinished corpus"] == 2


# Nothing half-written under the final name


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(tmp_path, docs, monkeypatch, where):
    write_docs(docs)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*arguments, **options):
        raise full

    if where == "write":
        monkeypatch.setattr(shards._ShardWriter, "_write", fail)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match=r"out: not written \(No space left on device\)"):
        prepare([docs], tmp_path / "out", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_a_file_size_limit_leaves_nothing(tmp_path, docs):
    """A real short write, by the kernel."""
    rng = np.random.default_rng(0)
    for i in range(40):
        (docs / f"{i}.txt").write_text(rng.bytes(20_000).hex())
    run = subprocess.run(
        [*ISOLATED, "-c", COMMAND, str(docs), "--out", str(tmp_path / "out"), "--vocab-size", "300"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert run.stderr.strip() == f"error: {tmp_path}/out: not written (File too large)"
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


COMMAND = """
import sys, tyro
from hotloop.engine.commands import demo
from hotloop.engine.commands.prepare import Prepare
from hotloop.engine.recipe import load_recipe
from hotloop.engine.errors import UserError
try:
    sys.exit(tyro.cli(Prepare)())
except UserError as error:
    sys.exit(print("error:", error, file=sys.stderr) or 2)
"""


def test_killed_at_any_moment_nothing_has_the_final_name(tmp_path, docs):
    """SIGKILL at moments spread over the whole run: `out` is absent, or whole."""
    write_docs(docs, 600)
    command = [*ISOLATED, "-c", COMMAND, str(docs), "--vocab-size", "2000", "--out"]
    started = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    whole = time.perf_counter() - started
    moments = np.linspace(0.55, 1.02, 8) * whole
    outcomes = Counter()
    for i, moment in enumerate(moments):
        out = tmp_path / f"out{i}"
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            Corpus(out).verify()
            outcomes["whole"] += 1
        else:
            outcomes["absent"] += 1
    print(f"killed at {', '.join(f'{moment:.2f}' for moment in moments)} s of {whole:.2f} s: {dict(outcomes)}")
    assert outcomes["absent"]


# Damaged corpora


@pytest.fixture
def corpus_folder(tmp_path, docs):
    write_docs(docs)
    prepare([docs], tmp_path / "corpus", SMALL)
    return tmp_path / "corpus"


def test_a_truncated_shard(corpus_folder):
    path = corpus_folder / "train-00000.shard"
    data = path.read_bytes()
    for keep, message in (
        (len(data) - 1, "truncated"),
        (HEADER_BYTES, "truncated"),
        (100, "truncated"),
        (0, "not a shard"),
    ):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=f"train-00000.shard: {message}"):
            Corpus(corpus_folder)
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match="too long"):
        Corpus(corpus_folder)
    path.write_bytes(bytes(HEADER_BYTES) + data[HEADER_BYTES:])
    with pytest.raises(UserError, match="never finished"):
        Corpus(corpus_folder)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Corpus(corpus_folder)


def test_every_flipped_byte_is_found(corpus_folder):
    path = corpus_folder / "validation-00000.shard"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(0, HEADER_BYTES, 5), *rng.integers(HEADER_BYTES, len(data), 60).tolist(), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"validation-00000\.shard: (altered|not a shard|version)"):
            Corpus(corpus_folder).verify()
        if at < HEADER_BYTES:  # found without reading the tokens
            with pytest.raises(UserError):
                Corpus(corpus_folder)


def test_a_changed_tokenizer(corpus_folder):
    path = corpus_folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer))  # other whitespace: the same tokenizer
    Corpus(corpus_folder)
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer of these shards"):
        Corpus(corpus_folder)


def test_a_shard_of_another_corpus(tmp_path, docs, corpus_folder):
    shard = corpus_folder / "train-00000.shard"
    prepare([docs], tmp_path / "other", with_options(vocab_size=300))
    shutil.copy(tmp_path / "other/train-00000.shard", shard)
    with pytest.raises(UserError, match=r"train-00000\.shard: made with another tokenizer"):
        Corpus(corpus_folder)
    same = with_options(tokenizer=corpus_folder / "tokenizer.json", seed=9)
    prepare([docs], tmp_path / "same", same)
    shutil.copy(tmp_path / "same/train-00000.shard", shard)
    with pytest.raises(UserError, match=r"train-00000\.shard: not the shard that corpus\.json lists"):
        Corpus(corpus_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 70_000}, "a vocabulary of 70000 does not fit the shards' uint16"),
        ({"vocab_size": 500}, r"stores a vocabulary of 400 .* corpus\.json has 500"),
        ({"format": "other"}, "not the manifest of a corpus"),
        ({"version": 9}, "version 9 of the format"),
        ({"end_id": None}, None),
    ],
)
def test_a_changed_manifest(corpus_folder, change, message):
    path = corpus_folder / "corpus.json"
    manifest = json.loads(path.read_text())
    if message is None:
        del manifest["end_id"]
        message = r"altered \(no valid entry 'end_id'\)"
    else:
        manifest.update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        Corpus(corpus_folder)


def test_a_folder_that_is_no_corpus(tmp_path):
    with pytest.raises(
        UserError, match=r"corpus\.json: cannot be read .*expected a folder that `hotloop prepare` wrote"
    ):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(UserError, match="not the manifest"):
        Corpus(tmp_path)


# Memory and time

MEASURE = """
import json, re, sys
from pathlib import Path
from hotloop.engine.data.prepare import PrepareConfig, prepare
def peak():  # not ru_maxrss: a child inherits its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
base = peak()
config = PrepareConfig(tokenizer=Path(sys.argv[3]), validation_fraction=0, max_shard_mb=4)
prepare([Path(sys.argv[1])], Path(sys.argv[2]), config)
print(json.dumps([base, peak()]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path, docs):
    """One text file and one table, four times as large: the peak stays."""
    words = " ".join(letter * 90 for letter in "abcdefgh")  # long words, few tokens: the test is quick
    (tmp_path / "t.json").write_text(train_tokenizer([f"{words} " * 50], "bpe", 400))
    growth = []
    for times in (1, 4):
        folder = docs / f"{times}"
        folder.mkdir()
        with open(folder / "long.txt", "w") as text, open(folder / "rows.jsonl", "w") as rows:
            for i in range(10_000 * times):
                text.write(f"line {i} {words}\n")
                rows.write(json.dumps({"text": f"row {i} {words}"}) + "\n")
        run = subprocess.run(
            [*ISOLATED, "-c", MEASURE, str(folder), str(tmp_path / f"out{times}"), str(tmp_path / "t.json")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        base, peak = json.loads(run.stdout)
        growth.append((peak - base) / 1024)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        print(f"{size:.0f} MiB of documents: peak {growth[-1]:.0f} MiB above the imports")
    assert growth[1] < growth[0] + 15


def test_the_standard_library(tmp_path, capsys):
    """The corpus of the demo: time printed, packs at least 98 % full, the command's own report."""
    out = tmp_path / "corpus"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    arguments = [str(stdlib), "--out", str(out), "--vocab-size", str(demo.VOCABULARY)]
    arguments += ["--split-by", "folder", "--validation-fraction", str(demo.HELD_OUT_SHARE)]
    arguments += ["--seed", str(demo.SPLIT_SEED), "--exclude", *demo.LEFT_OUT]
    context = load_recipe(ROOT / "recipes/demo.toml").model.context
    started = time.perf_counter()
    assert tyro.cli(Prepare, args=arguments)() == 0
    seconds = time.perf_counter() - started
    shown = capsys.readouterr().out
    corpus = Corpus(out)
    corpus.verify()
    train, validation = corpus.split("train"), corpus.split("validation")
    megabytes = (train.n_text_bytes + validation.n_text_bytes) / 1e6
    packs = Packs.of(train, context)
    with capsys.disabled():
        print(
            f"\nstandard library: {megabytes:.1f} MB prepared in {seconds:.1f} s, "
            f"packs {packs.efficiency:.2%} full at {context}"
        )
    assert packs.efficiency >= 0.98
    assert 0.05 < validation.n_text_bytes / (megabytes * 1e6) <= demo.HELD_OUT_SHARE + 1e-9
    read = {part for file in walk([stdlib], demo.LEFT_OUT) for part in file.path.relative_to(stdlib).parts}
    assert {"json", "asyncio"} < read
    assert not {"test", "tests", "encodings", "pydoc_data", "site-packages"} & read
    assert "exact duplicates dropped" in shown
    assert "bytes/token" in shown
    assert re.search(r"scan [\d.]+ s, tokenizer [\d.]+ s, encode [\d.]+ s", shown)
    assert seconds < 20 * 4, "20 s on a quiet machine with 2 cores; four times that on a busy one"
