"""`hotloop`: one verb per file of this folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from hotloop.engine.commands.demo import Demo
from hotloop.engine.commands.doctor import Doctor
from hotloop.engine.commands.evaluate import Evaluate
from hotloop.engine.commands.generate import Generate
from hotloop.engine.commands.prepare import Prepare
from hotloop.engine.commands.pretrain import Pretrain
from hotloop.engine.errors import UserError

DESCRIPTION = """Train language models on your own documents.

  hotloop prepare my_documents/ --out corpora/mine      documents -> tokenizer and shards
  hotloop pretrain recipes/small.toml --out runs/mine   shards -> model; run it again to resume
  hotloop generate runs/mine --prompt "Once"            text from the model
  hotloop eval runs/mine                                held-out loss, perplexity, bits per byte
  hotloop doctor                                        what this machine has and which backend serves what

Exit codes: 0 done; 1 the run failed (its checkpoints are intact); 2 bad input, nothing was changed;
128 + N stopped by signal N after saving."""

Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("eval")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    command = tyro.cli(
        Command,
        prog="hotloop",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagConversionOff),
    )
    try:
        return command()
    except UserError as error:
        print(f"hotloop: {error}", file=sys.stderr)
        return 2
