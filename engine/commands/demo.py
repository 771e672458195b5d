"""`hotloop demo`: the whole way on real text that every machine has, Python's own standard library."""

from __future__ import annotations

import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotloop.engine.checkpointed import TrainedModel
    from hotloop.engine.data.shards import Corpus

# Not the library's own source: tests (their size and style would drown it), generated tables of characters and of
# topics, other people's packages.
LEFT_OUT = ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
            "*.txt", "*.md", "*.csv")  # fmt: skip
# Which modules are held out decides how hard they are: of the seeds 0 to 8 this one's set has the median
# Kneser-Ney figure (contexts of 3 bytes: 2.09 to 2.34); no model's figure was looked at.
SPLIT_SEED = 1
VOCABULARY = 2048
HELD_OUT_SHARE = 0.1
HELD_OUT_BYTES = 128 * 1024
SEED = 0
CONTEXTS = (2, 3, 4, 6)
PROMPTS = ("", "def read_lines(path):\n", "class Connection:\n    def __init__(self")


@dataclass(frozen=True)
class Demo:
    """Pretrain a small GPT on Python's standard library; write samples, a baseline and a report. About five minutes."""

    out: Path = Path("runs/demo")
    """Folder of the run; the same command resumes it."""
    recipe: Path = Path("recipes/demo.toml")

    def __call__(self) -> int:
        from hotloop.engine.checkpointed import load_run
        from hotloop.engine.data.shards import Corpus
        from hotloop.engine.recipe import load_recipe
        from hotloop.engine.report import write_report
        from hotloop.engine.report.summary import verdict
        from hotloop.engine.train.environment import environment
        from hotloop.engine.train.evaluate import evaluate
        from hotloop.engine.train.loop import RunFailed
        from hotloop.engine.train.pretrain import pretrain

        recipe = load_recipe(self.recipe)
        folder = Path(recipe.data.path)
        clock = Stopwatch()
        if not folder.exists():
            prepare_standard_library(folder)
        clock.lap("prepare")
        try:
            outcome = pretrain(recipe, self.out)
        except RunFailed as error:
            print(f"hotloop: {error}", file=sys.stderr)
            return 1
        if outcome.signal is not None:
            print(f"{outcome.reason}: saved at step {outcome.step}; the same command resumes")
            return 128 + outcome.signal
        clock.lap("train")
        trained, corpus = load_run(self.out), Corpus(folder)
        context = trained.model.config.context
        evaluation = evaluate(
            trained.model, corpus.split("validation"), context=context, stride=max(context // 2, 1),
            max_bytes=HELD_OUT_BYTES, seed=SEED,
        )  # fmt: skip
        assert evaluation is not None  # nothing polls for a stop here
        clock.lap("evaluate")
        baseline = counting_baseline(corpus, trained)
        clock.lap("baseline")
        samples = draw_samples(trained)
        clock.lap("sample")
        report = write_report(
            self.out,
            {
                "samples": samples,
                "evaluation": evaluation.to_dict(),
                "baseline": baseline,
                "timings": clock.laps,
                "corpus": corpus.manifest["splits"],
                "environment": environment(),
            },
        )
        clock.lap("report")
        for sample in samples:
            print(f"--- sample ---\n{sample['prompt']}{sample['text']}")
        print("--- times ---")
        print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.laps.items()))
        print(verdict(report))
        print(f"{self.out}/report.html")
        return 0


class Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def prepare_standard_library(out: Path) -> None:
    """Tokenizer and shards from the library's source, held out by top-level module or package."""
    from hotloop.engine.data.prepare import PrepareConfig, prepare

    config = PrepareConfig(
        exclude=LEFT_OUT, vocab_size=VOCABULARY, split_by="folder", validation_fraction=HELD_OUT_SHARE, seed=SPLIT_SEED
    )
    prepare([Path(sysconfig.get_paths()["stdlib"])], out, config)


def counting_baseline(corpus: Corpus, trained: TrainedModel) -> dict[int, float]:
    """Kneser-Ney byte models of the training documents, on the documents that the model was evaluated on."""
    from hotloop.engine.data.evaluation import evaluation_documents
    from hotloop.engine.report.kneser_ney import kneser_ney_bits_per_byte

    train, held_out = corpus.split("train"), corpus.split("validation")
    documents = evaluation_documents(held_out, HELD_OUT_BYTES, SEED).documents
    return kneser_ney_bits_per_byte(
        (text_of(train.document(i), trained) for i in range(train.n_documents)),
        [text_of(held_out.document(int(i)), trained) for i in documents],
        CONTEXTS,
    )


def text_of(tokens: NDArray[Any], trained: TrainedModel) -> bytes:
    """The UTF-8 bytes of a stored document; byte-level tokens lose nothing."""
    return trained.tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False).encode()


def draw_samples(trained: TrainedModel) -> list[dict[str, str]]:
    from hotloop.engine.generate import Sampling, complete

    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=160, seed=SEED)
    return [{"prompt": prompt, "text": "".join(complete(trained, prompt, sampling))} for prompt in PROMPTS]
