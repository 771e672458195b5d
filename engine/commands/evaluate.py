"""`hotloop eval RUN`"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run's model on held-out documents.

    Examples:
      hotloop eval runs/mine
      hotloop eval runs/mine --checkpoint best --max-bytes 1000000 --json
      hotloop eval runs/mine --data corpora/other --split train

    Every token is scored once, the end of each document included: loss is the mean in nats per token, bits per byte the
    sum / ln 2 / UTF-8 bytes of the text, which compares models of different tokenizers. Another corpus must have been
    prepared with the run's tokenizer: hotloop prepare ... --tokenizer runs/mine/tokenizer.json
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
    checkpoint: Literal["last", "best"] = "last"
    """The newest one, or the one with the lowest held-out loss."""
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> int:
        from hotloop.engine.checkpointed import load_run
        from hotloop.engine.data.shards import Corpus
        from hotloop.engine.errors import UserError
        from hotloop.engine.train.evaluate import evaluate

        trained = load_run(self.run, self.checkpoint)
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
