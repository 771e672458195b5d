"""`hotloop`: one verb per file of this folder."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType

import tyro

from hotloop.engine.commands.compare import Compare
from hotloop.engine.commands.demo import Demo
from hotloop.engine.commands.doctor import Doctor
from hotloop.engine.commands.evaluate import Evaluate
from hotloop.engine.commands.export import Export
from hotloop.engine.commands.fill_mask import FillMask
from hotloop.engine.commands.finetune import Finetune
from hotloop.engine.commands.generate import Generate
from hotloop.engine.commands.predict import Predict
from hotloop.engine.commands.prepare import Prepare
from hotloop.engine.commands.pretrain import Pretrain
from hotloop.engine.commands.tune import Tune
from hotloop.engine.errors import UserError

HELP = """usage: hotloop VERB [arguments]

Train language models on your own documents.

  hotloop prepare my_documents/ --out corpora/mine     documents -> tokenizer and shards
  hotloop pretrain recipes/mine.toml --out runs/mine   shards -> model; the same command again resumes
  hotloop generate runs/mine --prompt "Once"           text from the model
  hotloop fill-mask runs/bert "The [MASK] falls."      what a masked model puts there
  hotloop finetune recipes/labels.toml --out runs/l    labelled texts, checkpoint -> classifier, beside baselines
  hotloop predict runs/l texts.csv --out labels.csv    label and probabilities for each text
  hotloop eval runs/mine                               held-out loss, perplexity; accuracy of a classifier
  hotloop compare recipes/compare.toml                 general, continued, from scratch, TF-IDF: points and costs
  hotloop export runs/mine --out exported/mine         a folder that `transformers` loads
  hotloop doctor                                       what this machine has, which backend serves each op
  hotloop tune attention                               measures launch configurations on this GPU
  hotloop demo                                         all of it on Python's own library, in five minutes

  hotloop VERB --help                                  what a verb does, its arguments and their defaults
  hotloop --version

Exit codes: 0 done; 1 it failed on the way (checkpoints are intact); 2 bad input, nothing was written over;
128 + N stopped by signal N, a run saves before (130 Ctrl-C, 143 SIGTERM)."""

VERBS: dict[str, type[Callable[[], int]]] = {
    "prepare": Prepare,
    "pretrain": Pretrain,
    "generate": Generate,
    "fill-mask": FillMask,
    "finetune": Finetune,
    "predict": Predict,
    "compare": Compare,
    "export": Export,
    "eval": Evaluate,
    "doctor": Doctor,
    "tune": Tune,
    "demo": Demo,
}

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 128 + 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. Raises SystemExit for a verb's --help (0), for wrong arguments (2) and on
    SIGTERM outside of training (143)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        with sigterm_unwinds():
            return run(arguments)
    except UserError as error:
        sys.stderr.write(f"hotloop: {error}\n")  # in one piece, beside the lines of other ranks
        return BAD_INPUT
    except KeyboardInterrupt:
        print("hotloop: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as in `hotloop generate RUN | head`. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a folder that went away: of the machine, not of the program
        print(f"hotloop: {error}", file=sys.stderr)
        return FAILED


def run(arguments: Sequence[str]) -> int:
    verb, *rest = arguments or ["--help"]
    if verb in ("--help", "-h"):
        print(HELP)
        return 0
    if verb == "--version":
        print(f"hotloop {version('hotloop')}")
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"no verb {verb!r}{hint} (verbs: {', '.join(VERBS)}; see hotloop --help)")
    command = tyro.cli(
        VERBS[verb],
        prog=f"hotloop {verb}",
        description=inspect.cleandoc(VERBS[verb].__doc__ or ""),
        args=rest,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
    try:
        return command()
    except RuntimeError as error:
        from hotloop.kernels.dispatch import ENVIRONMENT_VARIABLE, BackendError, forced_backend

        if isinstance(error, BackendError) and forced_backend():
            raise UserError(f"{ENVIRONMENT_VARIABLE}: {error}") from error
        raise


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends a verb like Ctrl-C does: what it has half written is removed. (A run in training saves instead.)"""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
