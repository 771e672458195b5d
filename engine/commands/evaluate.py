"""`hotloop eval RUN`"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a run's model on held-out documents."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    data: Path | None = None
    """Folder that `hotloop prepare` wrote with the run's tokenizer. [default: the run's own]"""
    split: str = "validation"
    stride: int | None = None
    """Tokens by which the window advances; a smaller one gives each token more context. [default: half the context]"""
    max_bytes: int | None = None
    """Text to score: whole documents, drawn by the seed. [default: all]"""
    seed: int = 0
    checkpoint: Literal["last", "best"] = "last"
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> int:
        from hotloop.engine.checkpointed import load_run
        from hotloop.engine.data.shards import Corpus
        from hotloop.engine.errors import UserError
        from hotloop.engine.train.evaluate import evaluate

        trained = load_run(self.run, self.checkpoint)
        corpus = Corpus(self.data or trained.recipe.data.path)
        if corpus.tokenizer_path.read_bytes() != (self.run / "tokenizer.json").read_bytes():
            raise UserError(
                f"{corpus.folder} was prepared with another tokenizer than {self.run}: prepare it with --tokenizer"
            )
        context = trained.recipe.data.context or trained.recipe.model.context
        stride = self.stride or context // 2
        if not 0 < stride <= context:
            raise UserError(f"--stride {stride}: must be between 1 and the context, {context}")
        result = evaluate(
            trained.model, corpus.split(self.split), context=context, stride=stride, max_bytes=self.max_bytes,
            seed=self.seed,
        )  # fmt: skip
        assert result is not None
        if self.json:
            print(json.dumps({"step": trained.step, **result.to_dict()}))
        else:
            print(
                f"step {trained.step}: loss {result.loss:.4f} nats/token  perplexity {result.perplexity:.2f}  "
                f"{result.bits_per_byte:.4f} bits/byte\n{result.documents} documents, {result.tokens:,} tokens, "
                f"{result.bytes:,} bytes; windows of {context} tokens, stride {stride}; {result.seconds:.1f} s"
            )
        return 0
