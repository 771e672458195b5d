"""The command as a user types it: what it does, what it says, its exit codes, and that nothing is ever written over."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from hotloop.engine.commands.main import VERBS, main
from hotloop.engine.config import Recipe
from hotloop.engine.train.metrics import read_metrics

RECIPE = """
[data]
path = "corpus"
workers = 0
[model]
context = 32
n_layers = 1
d_model = 16
n_heads = 2
[train]
steps = 12
global_batch = 8
precision = "fp32"
device = "cpu"
threads = 1
[evaluation]
every = 6
max_bytes = 4000
[checkpoint]
every = 4
[log]
every = 4
tensorboard = false
"""
HOTLOOP = [sys.executable, "-m", "hotloop.engine"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


Hotloop = Callable[..., Said]


@pytest.fixture
def hotloop(capfd: pytest.CaptureFixture[str]) -> Hotloop:
    """hotloop("eval", "run") -> exit code and what was printed, without a new process."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as leaving:  # as argparse does
            code = leaving.code
        return Said(code, *capfd.readouterr())

    return run


def write_documents(folder: Path, n: int = 40) -> Path:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(f"document {i} says é and " + " ".join(str(i * k) for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents/, corpus/, recipe.toml and run/, a run that has ended. Copied by `here`."""
    folder = tmp_path_factory.mktemp("made")
    write_documents(folder / "documents")
    before = Path.cwd()
    os.chdir(folder)
    try:
        command = ["prepare", "documents", "--out", "corpus", "--vocab-size", "300", "--validation-fraction", "0.2"]
        assert main(command) == 0
        (folder / "recipe.toml").write_text(RECIPE)
        assert main(["pretrain", "recipe.toml", "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of `made`."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def content(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file, and of every folder none."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# What works


def test_from_documents_to_text(here: Path, hotloop: Hotloop):
    said = hotloop("prepare", "documents", "--out", "other", "--vocab-size", "280", "--kind", "bpe")
    assert said.code == 0
    assert re.search(r"train +\d+", said.out)
    assert "40 files, 40 documents, 0 exact duplicates dropped" in said.out

    said = hotloop("pretrain", "recipe.toml", "--out", "runs/new", "--set", "data.path=other", "--set", "train.steps=8")
    assert said.code == 0
    assert said.out == "finished at step 8: runs/new/report.html\n"
    assert re.search(r"step 4/8  loss \d\.\d+ \(z [+-]\d", said.err)
    assert re.search(
        r"steps of 8 x 32 tokens from \d+ packs, \d+\.\d+% full, [1-9]\d* documents longer than a pack\n", said.err
    )
    assert "\x1b" not in said.err  # no terminal: plain lines
    assert (here / "runs/new/log.txt").read_text() == said.err
    assert json.loads((here / "runs/new/report.json").read_text())["complete"]

    said = hotloop("eval", "runs/new", "--json")
    found = json.loads(said.out)
    assert (said.code, found["step"], found["stride"]) == (0, 8, 16)
    ours = [line for line in read_metrics(here / "runs/new/metrics.jsonl") if line["kind"] == "eval"]
    assert found["bits_per_byte"] == pytest.approx(ours[-1]["bits_per_byte"], rel=0.05)
    said = hotloop("eval", "runs/new")
    assert f"{found['bits_per_byte']:.4f} bits/byte" in said.out

    first = hotloop("generate", "runs/new", "--prompt", "document é", "--max-tokens", "20", "--samples", "2")
    assert first.code == 0
    assert re.match(
        "--- sample 1, seed 0 ---\ndocument é.*\n--- sample 2, seed 1 ---\ndocument é", first.out, re.DOTALL
    )
    again = hotloop("generate", "runs/new", "--prompt", "document é", "--max-tokens", "20", "--seed", "1")
    assert first.out.split("seed 1 ---\n")[1] == again.out


def test_the_demo_leaves_all_that_it_promises(here: Path, hotloop: Hotloop):
    """On a corpus that is there already; continuous integration runs it whole."""
    for _ in range(2):  # the second time everything is there: it ends again, with the same report
        said = hotloop("demo", "--out", "shown", "--recipe", "recipe.toml")
        assert said.code == 0, said.err
        report = json.loads((here / "shown/report.json").read_text())
        baseline = report["kneser_ney_bits_per_byte"]
        assert list(baseline) == ["2", "3", "4", "6"]
        assert all(0 < value < 8 for value in baseline.values())
        not_beaten = [int(context) for context, value in baseline.items() if value <= report["bits_per_byte"]]
        assert report["kneser_ney_not_beaten"] == not_beaten != []  # 12 steps of a model of 5,000 parameters
        assert "not beat" in said.out
        assert {"prepare", "train", "evaluate", "baseline", "sample"} <= report["timings"].keys()
        assert len(report["samples"]) == said.out.count("--- sample ---") == 3
        assert said.out.endswith("shown/report.html\n")
    page = (here / "shown/report.html").read_text()
    words = (
        "bits per byte",
        "Loss",
        "Learning rate",
        "Speed",
        "Where the time went",
        "Samples",
        "Environment",
        "not beat",
    )
    assert [word for word in words if word not in page] == []
    assert {"config.toml", "checkpoints", "metrics.jsonl"} <= {path.name for path in (here / "shown").iterdir()}


def test_the_folder_of_a_run_has_the_recipe_s_name_by_default(here: Path, hotloop: Hotloop):
    assert hotloop("pretrain", "recipe.toml", "--set", "train.steps=2").code == 0
    assert (here / "runs/recipe/report.html").exists()


def test_an_ended_run_ends_again(here: Path, hotloop: Hotloop):
    checkpoints = content(here / "run/checkpoints")
    said = hotloop("pretrain", "recipe.toml", "--out", "run")
    assert (said.code, said.out) == (0, "finished at step 12: run/report.html\n")
    assert content(here / "run/checkpoints") == checkpoints


def test_unset_fields_survive_a_resumed_run(here: Path, hotloop: Hotloop):
    """TOML has no null: what the recipe sets to none must not come back as the default."""
    command = ["pretrain", "recipe.toml", "--out", "free", "--set", "optimizer.max_grad_norm=none"]
    command += ["--set", "guards.outlier_z=none", "--set", "train.steps=4"]
    assert hotloop(*command).code == 0
    said = hotloop(*command)
    assert (said.code, said.out) == (0, "finished at step 4: free/report.html\n")
    assert hotloop("eval", "free").code == 0


@pytest.mark.parametrize(
    "settings",
    [
        ["train.steps=1"],
        ["model.context=1"],
        ["data.context=1"],
        ["train.global_batch=1", "train.micro_batch=1", "checkpoint.every=1"],
        ["train.global_batch=4096", "train.micro_batch=512"],  # more than the corpus has packs
        ["data.path=one"],
        ["data.path=one", "train.global_batch=256"],
        ["evaluation.every=0"],
        ["evaluation.every=1", "checkpoint.keep_best=0"],
        ["schedule.warmup_steps=99"],
    ],
    ids=" ".join,
)
def test_runs_at_the_edge(here: Path, hotloop: Hotloop, settings):
    """The smallest of everything: one step, one token of context, one document, no held-out text."""
    if "data.path=one" in settings:
        assert hotloop("prepare", "documents/0.txt", "--out", "one", "--validation-fraction", "0").code == 0
    command = [word for setting in ["train.steps=2", *settings] for word in ("--set", setting)]
    said = hotloop("pretrain", "recipe.toml", "--out", "edge", *command)
    assert said.code == 0, said.err
    train = [line for line in read_metrics(here / "edge/metrics.jsonl") if line["kind"] == "train"]
    assert len(train) == (1 if "train.steps=1" in settings else 2)
    assert all(5 < line["loss"] < 6 and not line["skipped"] for line in train)  # ln 300 = 5.7
    said = hotloop("eval", "edge", "--split", "train", "--max-bytes", "2000")
    assert said.code == 0, said.err
    prompt = "a prompt beyond every context: " + "7 " * 100
    said = hotloop("generate", "edge", "--prompt", prompt, "--max-tokens", "40")
    assert (said.code, said.out[: len(prompt)]) == (0, prompt)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_resumes(here: Path, number, code):
    settings = ["train.steps=600", "evaluation.every=0", "checkpoint.every=300"]
    command = [*HOTLOOP, "pretrain", "recipe.toml", "--out", "long"]
    command += [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = here / "long/log.txt"
    while not (log.exists() and "step   4/" in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    stopped = re.fullmatch(rf"{signal.Signals(number).name} at step (\d+): long/report.html\n", out)
    assert stopped is not None, out
    assert "Traceback" not in err
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed: from step-{int(stopped[1]):08}" in done.stderr
    if number == signal.SIGTERM:
        command[command.index("long")] = "whole"
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        for group in ("model", "optimizer"):
            ours, whole = (
                load_file(here / run / f"checkpoints/step-00000600/{group}.safetensors") for run in ("long", "whole")
            )
            assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_on_a_terminal_there_is_a_live_bar(here: Path):
    ours, theirs = pty.openpty()
    command = [*HOTLOOP, "pretrain", "recipe.toml", "--out", "shown", "--set", "train.steps=60"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert re.search(r"\d+/60", text)
    assert "ETA" in text
    assert "finished at step 60: shown/report.html" in text
    assert "\x1b" not in (here / "shown/log.txt").read_text()


def test_a_reader_that_goes_away_is_no_error(here: Path):
    command = " ".join([*HOTLOOP, "generate", "run", "--samples", "200", "--max-tokens", "5"])
    done = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, check=False)
    assert done.stdout == "--- sample 1, seed 0 ---\n"
    assert done.stderr == ""


def test_a_terminal_that_is_not_utf8(here: Path):
    done = subprocess.run(
        [*HOTLOOP, "generate", "run", "--prompt", "é漢", "--max-tokens", "1"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é?".encode("latin-1"))


def test_a_damaged_checkpoint_is_passed_over_and_said(here: Path, hotloop: Hotloop):
    path = here / "run/checkpoints/step-00000012/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = hotloop("eval", "run")
    assert said.code == 0
    assert said.out.startswith("step 8: ")
    assert said.err.startswith("hotloop: step-00000012 is not used: truncated: model.safetensors")
    assert "step-00000012 is not used" in hotloop("generate", "run", "--max-tokens", "1").err


def test_eval_of_another_corpus_with_the_run_s_tokenizer(here: Path, hotloop: Hotloop):
    command = ["prepare", "documents", "--out", "other", "--tokenizer", "run", "--validation-fraction", "0.5"]
    assert hotloop(*command).code == 0
    assert hotloop("eval", "run", "--data", "other", "--split", "train", "--stride", "32").code == 0


# What is refused


def bad(name: str, command: str, *words: str, before: Callable[[Path], object] = lambda here: None):
    return pytest.param(command.split(), words, before, id=name)


def with_manifest(**entries: object) -> Callable[[Path], None]:
    def alter(here: Path) -> None:
        path = here / "corpus/corpus.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return alter


def binary(here: Path) -> None:
    (here / "binary").mkdir()
    (here / "binary/image.txt").write_bytes(b"GIF\0\1\2")


def another_tokenizer(here: Path) -> None:
    assert main(["prepare", "documents", "--out", "other", "--vocab-size", "290"]) == 0


def tokenizer_of_another(here: Path) -> None:
    another_tokenizer(here)
    shutil.copy(here / "other/tokenizer.json", here / "corpus/tokenizer.json")


def prepared_again(here: Path) -> None:
    another_tokenizer(here)
    shutil.rmtree(here / "corpus")
    (here / "other").rename(here / "corpus")


def no_validation(here: Path) -> None:
    assert main(["prepare", "documents", "--out", "all", "--tokenizer", "run", "--validation-fraction", "0"]) == 0


def checkpoint_of_another_model(here: Path) -> None:
    change(here / "run/config.toml", "d_model = 16", "d_model = 32")


def all_checkpoints_damaged(here: Path) -> None:
    for path in (here / "run/checkpoints").glob("*/manifest.json"):
        path.write_text("{}")


TRAIN = "pretrain recipe.toml --out new --set "
AGAIN = "pretrain recipe.toml --out run "

BAD = [
    bad("no verb", "pretrian recipe.toml", "no verb 'pretrian'", "did you mean 'pretrain'", "doctor"),
    # prepare
    bad("missing documents", "prepare nowhere --out new", "nowhere", "no such file or folder"),
    bad("no documents", "prepare --out new", "no paths given"),
    bad("empty folder", "prepare empty --out new", "empty", "no file to read", ".parquet",
        before=lambda here: (here / "empty").mkdir()),
    bad("binary file", "prepare binary/image.txt --out new", "binary/image.txt", "NUL at byte 3", before=binary),
    bad("folder of binary files", "prepare binary --out new", "no document has any text", "image.txt", "NUL at byte 3",
        before=binary),
    bad("a kind that is not read", "prepare a.pdf --out new", "a.pdf", "'.pdf'", ".jsonl",
        before=lambda here: (here / "a.pdf").write_bytes(b"%PDF")),
    bad("output that exists", "prepare documents --out corpus", "corpus: exists and is not empty", "--out"),
    bad("output that is a file", "prepare documents --out recipe.toml", "recipe.toml: exists and is not a folder"),
    bad("tiny vocabulary", "prepare documents --out new --vocab-size 10", "vocab_size = 10", "at least 257"),
    bad("no tokenizer", "prepare documents --out new --tokenizer recipe.toml", "recipe.toml", "not a tokenizer.json"),
    bad("one document", "prepare documents/0.txt --out new", "one document", "--validation-fraction 0"),
    # pretrain: the recipe
    bad("missing recipe", "pretrain nowhere.toml", "nowhere.toml: cannot be read (No such file or directory)"),
    bad("a folder as recipe", "pretrain documents", "documents: cannot be read (Is a directory)"),
    bad("broken recipe", "pretrain recipe.toml", "recipe.toml: not valid TOML",
        before=lambda here: change(here / "recipe.toml", "[model]", "[model")),
    bad("misspelt key", "pretrain recipe.toml", "recipe.toml: train: unknown field 'stepz'", "did you mean 'steps'",
        before=lambda here: change(here / "recipe.toml", "steps", "stepz")),
    bad("key without its section", TRAIN + "steps=5", "unknown field 'steps'", "did you mean 'train.steps'"),
    bad("wrong type", TRAIN + "train.steps=many", "train.steps = 'many'", "an integer"),
    bad("wrong choice", TRAIN + "schedule.kind=cosin", "schedule.kind = 'cosin'", "'cosine'"),
    bad("not finite", TRAIN + "optimizer.lr=inf", "optimizer.lr = inf", "a finite number"),
    bad("patience without evaluations", TRAIN + "evaluation.every=0 --set evaluation.patience=2",
        "evaluation.patience = 2", "evaluation.every > 0"),
    bad("no path of data", TRAIN + "data.path=", "data.path is not set", "hotloop prepare"),
    bad("context beyond the model's", TRAIN + "data.context=64", "data.context = 64", "model.context = 32"),
    bad("batch that does not divide", TRAIN + "train.micro_batch=3", "train.global_batch = 8", "micro_batch = 3"),
    bad("seed too large", TRAIN + "train.seed=9223372036854775808", "train.seed = 9223372036854775808", "below 2^63"),
    # pretrain: the corpus
    bad("missing corpus", TRAIN + "data.path=nowhere", "nowhere/corpus.json: cannot be read", "hotloop prepare"),
    bad("vocabulary of another tokenizer", TRAIN + "model.vocab_size=400", "model.vocab_size = 400", "300"),
    bad("tokenizer of other shards", "pretrain recipe.toml --out new", "corpus/tokenizer.json",
        "not the tokenizer of these shards", before=tokenizer_of_another),
    bad("vocabulary beyond the shard's dtype", "pretrain recipe.toml --out new",
        "a vocabulary of 70000 does not fit the shards' uint16", before=with_manifest(vocab_size=70_000)),
    bad("truncated shard", "pretrain recipe.toml --out new", "train-00000.shard", "truncated",
        before=lambda here: os.truncate(here / "corpus/train-00000.shard", 1000)),
    bad("no held-out document fits", TRAIN + "evaluation.max_bytes=10", "evaluation.max_bytes = 10",
        "no document of 'validation' fits", "the shortest has"),
    bad("patience without held-out documents", TRAIN + "data.path=all --set evaluation.patience=2",
        "evaluation.patience = 2", "all has no validation split", before=no_validation),
    # pretrain: the folder
    bad("run of another configuration", AGAIN + "--set train.seed=1", "run is a run of another configuration",
        "train.seed: 0 -> 1", "--out"),
    bad("corpus prepared again", AGAIN, "not what run began with", "prepared again", "--out", before=prepared_again),
    bad("folder of something else", "pretrain recipe.toml --out documents", "documents is not empty and not a run",
        "--out"),
    bad("file as folder", "pretrain recipe.toml --out recipe.toml", "recipe.toml is a file", "--out"),
    bad("run that is not whole", AGAIN, "run/tokenizer.json is missing",
        before=lambda here: (here / "run/tokenizer.json").unlink()),
    bad("no whole checkpoint left", AGAIN, "no checkpoint in run/checkpoints is whole", "manifest.json",
        before=all_checkpoints_damaged),
    # eval and generate
    bad("eval of no run", "eval documents", "documents is not a run of hotloop"),
    bad("generate from no run", "generate nowhere", "nowhere is not a run of hotloop"),
    bad("run without checkpoint", "generate run", "run has no checkpoint yet",
        before=lambda here: shutil.rmtree(here / "run/checkpoints")),
    bad("no checkpoint but damaged ones", "eval run", "run has no whole checkpoint", "step-00000012 is not used",
        "does not match", before=all_checkpoints_damaged),
    bad("checkpoint of another model", "generate run", "not of the model that run/config.toml describes",
        before=checkpoint_of_another_model),
    bad("tokenizer lost", "generate run", "run/tokenizer.json: cannot be read",
        before=lambda here: (here / "run/tokenizer.json").unlink()),
    bad("tokenizer damaged", "generate run", "run/tokenizer.json", "altered",
        before=lambda here: change(here / "run/tokenizer.json", "{", "")),
    bad("tokenizer exchanged", "generate run", "run/tokenizer.json: altered",
        before=lambda here: change(here / "run/tokenizer.json", '"ignore_merges": false', '"ignore_merges": true')),
    bad("unknown split", "eval run --split test", "no split 'test'", "train, validation"),
    bad("no validation split", "eval run --data all", "no split 'validation'", before=no_validation),
    bad("eval with another tokenizer", "eval run --data other", "another tokenizer than run",
        "--tokenizer run/tokenizer.json", before=another_tokenizer),
    bad("corpus moved away", "eval run", "corpus, the corpus of run, is not there", "--data",
        before=lambda here: (here / "corpus").rename(here / "elsewhere")),
    bad("stride 0", "eval run --stride 0", "--stride 0: must be between 1 and the context, 32"),
    bad("nothing fits", "eval run --max-bytes 10", "no document of 'validation' fits into 10 bytes"),
    bad("temperature", "generate run --temperature=-0.5", "--temperature -0.5: must be 0 or more"),
    bad("temperature nan", "generate run --temperature nan", "--temperature nan"),
    bad("top p", "generate run --top-p 1.5", "--top-p 1.5: must be above 0 and at most 1"),
    bad("top k", "generate run --top-k 0", "--top-k 0: must be at least 1"),
    bad("samples", "generate run --samples 0", "--samples 0"),
    bad("seed", "generate run --seed 99999999999999999999", "--seed 99999999999999999999", "below 2^63"),
    bad("prompt that is no text", "generate run --prompt \udcff", "--prompt", "not valid UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "before"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(here: Path, hotloop: Hotloop, command, words, before):
    before(here)
    was = content(here)
    said = hotloop(*command)
    assert said.code == 2, said
    assert said.err.startswith("hotloop: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    for word in words:
        assert word in said.err
    now = content(here)
    assert now.items() >= was.items()
    # Nothing new either, but for the plan of the packs, which is a cache beside the shards.
    assert {name for name in now.keys() - was.keys() if not name.endswith(".index")} == set()


@pytest.mark.parametrize(
    "command", ["pretrain", "eval", "prepare documents", "generate run --top-k some", "eval run --no-such-flag 3"]
)
def test_wrong_arguments_are_explained_too(here: Path, hotloop: Hotloop, command):
    said = hotloop(*command.split())
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "--help" in said.err


def test_a_folder_that_cannot_be_written(here: Path, hotloop: Hotloop):
    if os.geteuid() == 0:
        arguments = ["--out", "/proc/run"]  # root may write anywhere else
    else:
        (here / "closed").mkdir(mode=0o500)
        arguments = ["--out", "closed/run"]
    said = hotloop("pretrain", "recipe.toml", *arguments)
    assert said.code == 2, said
    assert said.err.startswith(f"hotloop: {arguments[1]}: cannot be")
    assert said.err.count("\n") == 1
    assert hotloop("prepare", "documents", *arguments).code == 2


def test_a_backend_that_is_not_there(here: Path, hotloop: Hotloop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOTLOOP_BACKEND", "cudnn")
    for command in ("pretrain recipe.toml --out new", "eval run", "generate run"):
        said = hotloop(*command.split())
        assert said.code == 2
        assert said.err.splitlines()[-1].startswith("hotloop: HOTLOOP_BACKEND: backend 'cudnn' was asked for, but ")
        assert "Traceback" not in said.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_prepare_that_is_stopped_leaves_nothing(here: Path, number, code):
    (here / "documents/long.txt").write_text("".join(f"line {i} of a long document\n" for i in range(2_000_000)))
    process = subprocess.Popen(
        [*HOTLOOP, "prepare", "documents", "--out", "new"], stderr=subprocess.PIPE, text=True,
        # A shell that runs these tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(here.glob(".aside-*-new")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not list(here.glob("*new"))
    assert not list(here.glob(".aside-*"))


def test_a_full_disk_is_no_traceback(here: Path, hotloop: Hotloop, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr("hotloop.engine.train.metrics.MetricsLog.event", full)
    said = hotloop("pretrain", "recipe.toml", "--out", "run")
    assert said.code == 1
    assert said.err == "hotloop: [Errno 28] No space left on device: 'run/metrics.jsonl'\n"


# Help


def test_help_lists_every_verb(hotloop: Hotloop):
    for arguments in ([], ["--help"], ["-h"]):
        said = hotloop(*arguments)
        assert said.code == 0
        for verb in VERBS:
            assert f"  hotloop {verb} " in said.out
    assert re.fullmatch(r"hotloop \d+\.\d+.*\n", hotloop("--version").out)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "demo"])
def test_help_of_a_verb_has_an_example_that_parses(verb, hotloop: Hotloop, monkeypatch: pytest.MonkeyPatch):
    said = hotloop(verb, "--help")
    assert said.code == 0
    examples = re.findall(rf"^  hotloop {verb}\b(.*)$", said.out, re.MULTILINE)
    assert examples
    monkeypatch.setattr(VERBS[verb], "__call__", lambda self: 0)
    for example in examples:
        words = re.sub(r'"([^"]*)"', lambda m: m[1].replace(" ", "_"), example).split()
        assert hotloop(verb, *words).code == 0, example


def test_help_explains_every_field_of_a_recipe(hotloop: Hotloop):
    out = hotloop("pretrain", "--help").out
    section = ""
    explained = {}
    for line in out.splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        elif found := re.fullmatch(r"[* ] (\w+) = (\S+)( +\S.*)?", line):
            explained[f"{section}.{found[1]}"] = (found[2], found[3])
    recipe = Recipe()
    for part in fields(Recipe):
        if is_dataclass(values := getattr(recipe, part.name)):
            for field in fields(values):
                default, meaning = explained.pop(f"{part.name}.{field.name}")
                assert meaning, f"{part.name}.{field.name} has no explanation"
                value = getattr(values, field.name)
                value = list(value) if isinstance(value, tuple) else value
                assert default.strip('"').lower() == str(value).lower() or float(default) == value
    assert explained == {}
    assert "objective" in out
