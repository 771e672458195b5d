"""Do 8-bit moments cost anything? The demo's model, trained in pairs that differ in the moments alone.

    python benchmarks/moments.py --corpus runs/corpus-python --out benchmarks/results/moments-cpu

For each seed one run with fp32 moments and one with int8 moments (stochastically rounded): the same weights at first,
the same data. Reported are the held-out losses, their paired relative difference, and its 95 % interval (Student's t).
At the demo's learning rate the runs of a pair end up to 7 % apart after 120 steps, in either direction: hence a third
of it, twice the steps and a longer warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from hotloop.engine.checkpointed import load_run
from hotloop.engine.commands.demo import HELD_OUT_BYTES, SEED
from hotloop.engine.config import Recipe
from hotloop.engine.data.shards import Corpus
from hotloop.engine.files import write_file
from hotloop.engine.recipe import load_recipe
from hotloop.engine.train.environment import environment
from hotloop.engine.train.evaluate import evaluate
from hotloop.engine.train.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ("float32", "int8")
# Student's t at 97.5 %, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def recipe_of(base: Recipe, corpus: Path, moments: str, seed: int, steps: int) -> Recipe:
    return replace(
        base,
        data=replace(base.data, path=str(corpus)),
        optimizer=replace(base.optimizer, moments=moments, lr=base.optimizer.lr / 3),
        schedule=replace(base.schedule, warmup_steps=max(1, steps // 3)),
        train=replace(base.train, steps=steps, seed=seed),
        evaluation=replace(base.evaluation, every=steps),
        checkpoint=replace(base.checkpoint, every=steps),
    )


def held_out_loss(recipe: Recipe, corpus: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        pretrain(recipe, Path(folder, "run"))
        trained = load_run(Path(folder, "run"))
        context = trained.model.config.context
        found = evaluate(
            trained.model, Corpus(corpus).split("validation"), context=context, stride=context // 2,
            max_bytes=HELD_OUT_BYTES, seed=SEED,
        )  # fmt: skip
    assert found is not None
    return found.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="what `hotloop demo` or `hotloop prepare` has made")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args()
    if options.seeds - 1 not in T:
        parser.error(f"--seeds {options.seeds}: expected 2 to {max(T) + 1}")
    base = load_recipe(ROOT / "recipes" / "demo.toml")
    losses: dict[str, list[float]] = {moments: [] for moments in MOMENTS}
    for seed in range(options.seeds):
        for moments in MOMENTS:
            recipe = recipe_of(base, options.corpus, moments, seed, options.steps)
            losses[moments].append(held_out_loss(recipe, options.corpus))
            print(f"seed {seed}, {moments}: {losses[moments][-1]:.4f}", flush=True)
    differences = [(b - a) / a for a, b in zip(losses["float32"], losses["int8"], strict=True)]
    mean = statistics.mean(differences)
    half = T[options.seeds - 1] * statistics.stdev(differences) / math.sqrt(options.seeds)
    lines = [
        f"Made by `python benchmarks/moments.py --corpus runs/corpus-python --seeds {options.seeds} --steps "
        f"{options.steps} --out benchmarks/results/{options.out.name}`: the demo's model after {options.steps} steps.",
        "",
        "| seed | held-out loss, fp32 moments | int8 moments | difference |",
        "|---:|---:|---:|---:|",
        *(
            f"| {seed} | {a:.4f} | {b:.4f} | {d:+.2%} |"
            for seed, (a, b, d) in enumerate(zip(losses["float32"], losses["int8"], differences, strict=True))
        ),
        "",
        f"Mean difference {mean:+.2%}, 95 % interval {mean - half:+.2%} to {mean + half:+.2%}.",
    ]
    found = {"losses": losses, "difference": mean, "interval": [mean - half, mean + half], "steps": options.steps}
    write_file(options.out.with_suffix(".json"), json.dumps({**found, "environment": environment()}, indent=1) + "\n")
    write_file(options.out.with_suffix(".md"), "\n".join(lines) + "\n")
    print(lines[-1])


if __name__ == "__main__":
    main()
