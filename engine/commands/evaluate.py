"""`hotloop eval RUN`"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from hotloop.engine.checkpointed import TrainedModel
    from hotloop.engine.data.shards import Corpus


@dataclass(frozen=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run's model on held-out documents; accuracy and F1 of a classifier.

    Examples:
      hotloop eval runs/mine
      hotloop eval runs/mine --checkpoint best --max-bytes 1000000 --json
      hotloop eval runs/mine --data corpora/other --split train
      hotloop eval runs/sentiment --labelled new.csv more.jsonl

    Every token is scored once, the end of each document included: loss is the mean in nats per token, bits per byte the
    sum / ln 2 / UTF-8 bytes of the text, which compares models of different tokenizers. Another corpus must have been
    prepared with the run's tokenizer: hotloop prepare ... --tokenizer runs/mine/tokenizer.json

    A run of `hotloop finetune` is evaluated on any files of labelled rows (--labelled).

    A masked run is scored on hidden tokens, under the noise of its training: loss, accuracy and pseudo-perplexity, or
    with --exact on all tokens, each masked alone.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, as `hotloop pretrain --out` wrote it."""
    data: Path | None = None
    """Folder that `hotloop prepare` wrote; none: the run's own."""
    split: str = "validation"
    """validation or train."""
    stride: int | None = None
    """Tokens by which the window advances; smaller: more text before each token, more time. none: half the context."""
    max_bytes: int | None = None
    """Text to score: whole documents, drawn by the seed; none: all."""
    seed: int = 0
    """Decides which documents --max-bytes draws."""
    labelled: tuple[Path, ...] = ()
    """For a classifier: CSV, JSONL or Parquet files with its fields of text and label."""
    on_long: Literal["error", "truncate", "window"] | None = None
    """For a classifier: what becomes of texts longer than the model; none: as in training."""
    exact: bool = False
    """For a masked run: mask every token in turn, one at a time, a pass for each; bound it with --max-bytes."""
    checkpoint: Literal["last", "best"] | None = None
    """The newest one, or the one with the lowest held-out loss; none: last, and best of a classifier."""
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> int:
        if self.labelled:
            return self._classifier()
        from hotloop.engine.checkpointed import LABELS, load_run
        from hotloop.engine.classifier import best_seed
        from hotloop.engine.data.shards import Corpus
        from hotloop.engine.errors import UserError
        from hotloop.engine.train.evaluate import evaluate

        if (best_seed(self.run) / LABELS).exists():
            raise UserError(f"{self.run} is a classifier: give files of labelled texts with --labelled")
        trained = load_run(self.run, self.checkpoint or "last")
        for note in trained.notes:
            print(f"hotloop: {note}", file=sys.stderr)
        folder = self.data or Path(trained.recipe.data.path)
        if self.data is None and not folder.exists():
            raise UserError(f"{folder}, the corpus of {self.run}, is not there: give a corpus with --data")
        corpus = Corpus(folder)
        if corpus.tokenizer_hash != trained.tokenizer_hash or corpus.end_id != trained.end_id:
            raise UserError(
                f"{folder} was prepared with another tokenizer than {self.run}: prepare it again with "
                f"--tokenizer {self.run / 'tokenizer.json'}"
            )
        context = trained.recipe.data.context or trained.recipe.model.context
        if trained.recipe.objective == "masked":
            return self._masked(trained, corpus, context)
        if self.exact:
            raise UserError("--exact: only for a masked run")
        stride = max(context // 2, 1) if self.stride is None else self.stride
        if not 0 < stride <= context:
            raise UserError(f"--stride {stride}: must be between 1 and the context, {context}")
        result = evaluate(
            trained.model, corpus.split(self.split), context=context, stride=stride, max_bytes=self.max_bytes,
            seed=self.seed,
        )  # fmt: skip
        assert result is not None  # nothing polls for a stop here
        if self.json:
            print(json.dumps({"run": str(self.run), "step": trained.step, **result.to_dict()}))
        else:
            print(
                f"step {trained.step}: loss {result.loss:.4f} nats/token  perplexity {result.perplexity:.2f}  "
                f"{result.bits_per_byte:.4f} bits/byte\n{result.documents:,} documents, {result.tokens:,} tokens, "
                f"{result.bytes:,} bytes; windows of {context} tokens, stride {stride}; {result.seconds:.1f} s"
            )
        return 0

    def _classifier(self) -> int:
        from hotloop.engine.classifier import load_classifier
        from hotloop.engine.data.labelled import read_examples
        from hotloop.engine.report.scores import decide, negative_log_likelihood, score

        trained = load_classifier(self.run, self.checkpoint, on_long=self.on_long)
        for note in trained.notes:
            print(f"hotloop: {note}", file=sys.stderr)
        examples = read_examples(self.labelled, trained.labels, trained.classes)
        probabilities = trained.probabilities(examples.texts, examples.where)
        answers = decide(probabilities, trained.multi_label, trained.threshold)
        found = score(examples.labels, answers, trained.classes)
        loss = negative_log_likelihood(examples.labels, probabilities)
        if self.json:
            print(json.dumps({"run": str(trained.folder), "step": trained.step, "loss": loss, **found.to_dict()}))
            return 0
        right = "all labels right" if trained.multi_label else "accuracy"
        print(
            f"{trained.folder}, step {trained.step}: {right} {found.accuracy:.4f}  macro-F1 {found.macro_f1:.4f}  "
            f"micro-F1 {found.micro_f1:.4f}  loss {loss:.4f} nats/text  on {found.examples:,} texts"
        )
        width = max(len(name) for name in ("class", *trained.classes))
        print(f"{'class':<{width}}  precision  recall      F1    texts")
        for one in found.classes:
            print(f"{one.name:<{width}}  {one.precision:9.4f}  {one.recall:6.4f}  {one.f1:6.4f}  {one.support:7,}")
        return 0

    def _masked(self, trained: TrainedModel, corpus: Corpus, context: int) -> int:
        from hotloop.engine.data.masking import Masking, Vocabulary
        from hotloop.engine.errors import UserError
        from hotloop.engine.train.evaluate_masked import evaluate_masked

        if self.stride is not None:
            raise UserError(f"--stride {self.stride}: not for a masked run, whose pieces of text do not overlap")
        vocabulary = Vocabulary.of(corpus.tokenizer_path.read_text(encoding="utf-8"))
        masking = Masking(trained.recipe.masking, vocabulary, trained.recipe.train.seed)
        result = evaluate_masked(
            trained.model, corpus.split(self.split), masking, context=context, max_bytes=self.max_bytes,
            seed=self.seed, exact=self.exact,
        )  # fmt: skip
        assert result is not None  # nothing polls for a stop here
        if self.json:
            print(json.dumps({"run": str(self.run), "step": trained.step, **result.to_dict()}))
            return 0
        how = "each masked alone" if self.exact else f"{trained.recipe.masking.rate:.0%} of the text hidden"
        print(
            f"step {trained.step}: loss {result.loss:.4f} nats/token  accuracy {result.accuracy:.4f}  "
            f"pseudo-perplexity {result.pseudo_perplexity:.2f}\n{result.documents:,} documents, "
            f"{result.bytes:,} bytes, {result.tokens:,} tokens scored, {how}; pieces of {context} tokens; "
            f"{result.seconds:.1f} s"
        )
        return 0
