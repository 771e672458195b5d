"""`hotloop export RUN --out DIR`: a model for `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write a model as `transformers` loads it: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Examples:
      hotloop export runs/mine --out exported/mine
      hotloop export runs/mine --out exported/best --checkpoint best
      AutoModelForCausalLM.from_pretrained("exported/mine"), AutoTokenizer.from_pretrained("exported/mine")

    The logits are those of the model. Written are the families gpt2, llama, qwen2 and qwen3 (language models and
    classifiers), bert and modernbert (encoders, masked language models, classifiers). A model that mixes them, such as
    learned positions with RMS norms, has no class there: it is refused with each family's reason.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or of a checkpoint with config.json."""
    out: Path
    """Folder to write; must not exist, or be empty."""
    checkpoint: Literal["last", "best"] | None = None
    """Of a run: the newest one, or the one with the lowest held-out loss; none: last, and best of a classifier."""

    def __call__(self) -> int:
        """Raises UserError for what cannot be read or written."""
        from hotloop.engine.checkpointed import LABELS
        from hotloop.engine.classifier import best_seed, judged, read_described
        from hotloop.engine.data.examples import Frame, framing
        from hotloop.engine.initial import read_initial
        from hotloop.engine.pretrained.write import write_pretrained

        folder = best_seed(self.model)
        is_classifier = (folder / LABELS).exists()
        which = self.checkpoint or (judged(folder) if is_classifier else "last")
        initial = read_initial(folder, n_labels=None, which=which)
        tokenizer = initial.tokenizer
        if is_classifier and tokenizer is not None:
            described = read_described(folder)
            tokenizer = framing(tokenizer, Frame(tuple(described["before"]), tuple(described["after"])))
        written = write_pretrained(
            initial.config, initial.state, self.out, tokenizer=tokenizer, special=initial.special,
            labels=initial.labels, multi_label=initial.multi_label,
        )  # fmt: skip
        print(
            f"{self.out}: {written.architecture} ({written.family}), {written.n_parameters:,} parameters in "
            f"{written.dtype}; {written.auto}.from_pretrained({str(self.out)!r}) loads it"
        )
        if initial.dropped:
            print(f"left out, this model has no such head: {', '.join(initial.dropped)}")
        if initial.tokenizer is None:
            print(f"{folder} has no tokenizer.json: none is written")
        return 0
