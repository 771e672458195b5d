"""The training loop, and what surrounds it: start or resume, log, evaluate, save, stop, rewind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import Batch, Prefetcher
from hotloop.engine.errors import UserError
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.environment import environment, guarantee_lost
from hotloop.engine.train.folder import RunFolder
from hotloop.engine.train.guards import LAG
from hotloop.engine.train.metrics import DeviceMetrics, MetricsLog
from hotloop.engine.train.progress import Progress
from hotloop.engine.train.schedule import learning_rate
from hotloop.engine.train.signals import StopSignal
from hotloop.engine.train.step import StepResult
from hotloop.engine.train.task import Task
from hotloop.engine.train.throughput import Throughput
from hotloop.engine.train.training import Training


class RunFailed(RuntimeError):
    """The run cannot go on by itself; its checkpoints are intact."""


@dataclass(frozen=True)
class Outcome:
    step: int
    reason: str
    """finished, stopped early, or the name of the signal."""
    signal: int | None = None
    is_main: bool = True
    """Whether this process is the one that writes."""


class Run:
    """One process's part of a run: `train` is the loop, the rest is what it calls at its edges."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        task: Task,
        ranks: Ranks,
        stop: StopSignal,
        fault: Callable[[str], None] | None = None,
    ):
        self.recipe, self.folder, self.task, self.ranks, self.stop = recipe, folder, task, ranks, stop
        self.training = Training(recipe, ranks, task.objective, task.initial)
        self.micro_batch = recipe.train.micro_batch
        self.throughput = Throughput(
            recipe.model, self.training.policy.dtype, ranks.device, context=task.context, world_size=ranks.world_size
        )
        self.pending = DeviceMetrics()
        self.prefetcher: Prefetcher | None = None
        self.saved_environment: dict[str, Any] | None = None
        self.stall_ms = 0.0  # of checkpoints since the last line
        if ranks.is_main:
            keep = recipe.checkpoint
            self.store = CheckpointStore(folder.checkpoints, keep.keep_last, keep.keep_best, fault=fault)
        notes = self._resume()
        step = self.training.step
        self.progress = Progress(recipe, enabled=ranks.is_main, start_step=step, log=folder.path / "log.txt")
        if ranks.is_main:
            self.log = MetricsLog(folder.path, step if notes else None, recipe.log.tensorboard)
        for name, message in notes:
            self._event(name, message)
        self.progress.say(self._header())

    def train(self) -> Outcome:
        """Run to the last step, or until a signal, early stopping or failure."""
        t, r = self.training, self.recipe
        if t.ended is not None:
            return Outcome(t.step, t.ended, is_main=self.ranks.is_main)
        if t.step == 0 and self.task.judged_first and r.evaluation.every:
            self._judge()
        clock = time.perf_counter()
        while t.step < r.train.steps:
            batches, n_supervised, data_wait = self._next_batches()
            lr = learning_rate(r.optimizer, r.schedule, t.step, r.train.steps)
            try:
                self._seed_step()
                shared, phases = t.take_step.accumulate(batches, n_supervised, stop=bool(self.stop))
            except (RuntimeError, MemoryError) as error:
                self._halve_micro_batch(error)
                continue
            result = t.take_step.update(shared, phases, n_supervised, lr)
            t.step += 1
            clock, ms = time.perf_counter(), (time.perf_counter() - clock) * 1e3
            t.seconds += ms / 1e3
            self._push(result, batches, n_supervised, lr=lr, ms=ms, data_wait_ms=data_wait * 1e3)
            self._compare_environments()
            stopping = self._drain(keep=LAG) or (bool(self.stop) and self.ranks.world_size == 1)
            if t.budget.exceeded(t.step - LAG):
                self._rewind()
            elif stopping:
                return self._end(self._signal_name(), self.stop.number or signal.SIGTERM)
            elif t.step < r.train.steps and self._due():
                loss = self._evaluate() if self._due(r.evaluation.every) else None
                if r.evaluation.patience is not None and t.evaluations_since_best >= r.evaluation.patience:
                    return self._end("stopped early", loss=loss)
                self._save(loss)
            else:
                continue
            t.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
        loss = self._evaluate() if r.evaluation.every else None
        return self._end(self._signal_name(), self.stop.number) if self.stop else self._end("finished", loss=loss)

    def _header(self) -> str:
        r = self.recipe
        parameters = sum(p.numel() for p in self.training.model.parameters())
        return (
            f"{parameters / 1e6:.2f} M parameters, {r.train.precision} on {self.ranks.device}, "
            f"{torch.get_num_threads()} threads x {self.ranks.world_size} ranks; {r.train.steps:,} steps "
            f"of {r.train.global_batch} x {self.task.context} tokens from {self.task.describe()}"
        )

    def close(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        if self.ranks.is_main:
            try:
                self.store.wait()  # the folder's lock must outlive the write
            except CheckpointError as error:
                self._event("checkpoint_failed", str(error))
            self.log.close()
        self.progress.close()

    # Data -----------------------------------------------------------------------------------------------------------

    def _next_batches(self) -> tuple[Sequence[Batch], float, float]:
        """This rank's micro-batches of the next global batch, what all of it supervises, and the seconds the loop
        waited for them."""
        if self.prefetcher is None:
            self.prefetcher = Prefetcher(
                self.task.source, self.training.step + self.training.data_offset, rank=self.ranks.rank,
                world_size=self.ranks.world_size, micro_batch=self.micro_batch, workers=self.recipe.data.workers,
                pin_memory=self.ranks.device.type == "cuda",
            )  # fmt: skip
        batches = next(self.prefetcher)
        return batches, self.prefetcher.n_supervised, self.prefetcher.wait_seconds

    def _restart_data(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.prefetcher = None

    def _seed_step(self) -> None:
        """Dropout's generator is a function of (seed, step, rank), so no generator state needs saving."""
        if self.recipe.model.dropout > 0:
            seeds = np.random.SeedSequence((self.recipe.train.seed, self.training.step, self.ranks.rank))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def _halve_micro_batch(self, error: BaseException) -> None:
        """After running out of memory: the same global batch in smaller pieces. Raises any other error again."""
        # torch has a class for a GPU that is full, but not for a machine whose memory is.
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
        if not full:
            raise error
        if self.ranks.world_size > 1 or self.micro_batch == 1:
            raise RunFailed(
                f"out of memory with micro-batches of {self.micro_batch} x {self.task.context} tokens: resume with a "
                "smaller train.micro_batch; the global batches stay the same"
            ) from error
        self.training.optimizer.zero_grad(set_to_none=True)
        self.micro_batch //= 2 if self.micro_batch % 2 == 0 else self.micro_batch
        self.training.accumulate()
        self._restart_data()
        self._event("out_of_memory", f"micro-batch is now {self.micro_batch}; the global batches stay the same")

    # Metrics --------------------------------------------------------------------------------------------------------

    def _push(
        self, result: StepResult, batches: Sequence[Batch], n_supervised: float, *, lr: float, ms: float, **host: Any
    ) -> None:
        """Hand the step's device scalars over; `_drain` turns them into a line some steps later."""
        t = self.training
        W = self.ranks.world_size
        tokens = self.task.source.n_tokens(t.step - 1 + t.data_offset)
        work = self.throughput.of_step(
            ms / 1e3, tokens=tokens, supervised=n_supervised,
            positions=sum(batch.tokens.numel() for batch in batches) * W,
            # The other ranks' pieces are taken to be like this one's.
            sum_squares=sum(batch.sum_squares for batch in batches) * W,
        )  # fmt: skip
        self.pending.push(
            t.step,
            {
                "loss": result.loss,
                "loss_z": result.loss_z,
                "grad_norm": result.grad_norm,
                "skipped": result.skipped,
                "stop": result.stop,
            },
            phases=result.phases,
            lr=lr,
            ms=ms,
            checkpoint_stall_ms=self.stall_ms,
            seconds=t.seconds,
            **work,
            **host,
        )
        self.stall_ms = 0.0

    def _drain(self, keep: int) -> bool:
        """Log the steps that have arrived, all but the last `keep`. True where a rank was asked to stop."""
        stopping = False
        for line in self.pending.drain(block=True, keep=keep):
            step, phases = line.pop("step"), line.pop("phases")
            stopping |= line.pop("stop") > 0
            line["skipped"] = int(line["skipped"])
            if line["skipped"] and line["supervised"]:  # a batch that supervises nothing is no sign of trouble
                self.training.budget.record(step)
            if self.ranks.is_main:
                written = self.log.train(step, **line, **phases.milliseconds())
                self.progress.train(written)
                if line["skipped"]:
                    why = f"loss {line['loss']:.4g} (z {line['loss_z']:+.1f})" if line["supervised"] else "no target"
                    self._event("skipped", f"{why}: nothing updated", step)
        return stopping

    def _event(self, name: str, message: str, step: int | None = None) -> None:
        if self.ranks.is_main:
            self.progress.event(self.log.event(self.training.step if step is None else step, name, message))

    # Edges of the loop ----------------------------------------------------------------------------------------------

    def _due(self, *every: int) -> bool:
        """Whether this step ends one of the intervals; by default that of evaluations or that of checkpoints."""
        intervals = every or (self.recipe.evaluation.every, self.recipe.checkpoint.every)
        return any(n and self.training.step % n == 0 for n in intervals)

    def _judge(self) -> float | None:
        """Held-out loss; None without held-out documents or when asked to stop."""
        self._drain(keep=0)
        t, loss = self.training, None
        if self.ranks.is_main:
            result = self.task.evaluate(t.model, lambda: bool(self.stop))
            if result is not None:
                loss = result.loss
                self.progress.eval(self.log.eval(t.step, **result.to_dict()))
        return self.ranks.broadcast(loss)

    def _evaluate(self) -> float | None:
        """The held-out loss, noted as the best or not."""
        t, loss = self.training, self._judge()
        if loss is not None:
            better = t.best_loss is None or loss < t.best_loss
            t.best_loss = loss if better else t.best_loss
            t.evaluations_since_best = 0 if better else t.evaluations_since_best + 1
        return loss

    def _save(self, held_out_loss: float | None = None, *, wait: bool = False) -> None:
        self._drain(keep=0)
        if not self.ranks.is_main:
            return
        t = self.training
        try:
            stall = self.store.save_async(t.step, t.tensors(), t.state(self._environment()), held_out_loss)
            if wait:
                self.store.wait()
        except CheckpointError as error:
            # The last good checkpoint is untouched. A later save may find room again; the last one must succeed.
            self._event("checkpoint_failed", str(error))
            if wait:
                raise RunFailed(f"the last checkpoint could not be written: {error}") from error
            return
        self.stall_ms += stall * 1e3

    def _resume(self) -> list[tuple[str, str]]:
        """Load the newest good checkpoint, if there is one. Returns events to log."""
        path, notes = self.ranks.from_main(self._newest_checkpoint)
        if path is None:
            # Killed before its first checkpoint: it starts again, and the lines it wrote are superseded.
            return [("resumed", "from the start: no checkpoint yet")] if self._has_metrics() else []
        self.saved_environment = self.training.load(checkpoints.read_manifest(path))
        return [*notes, ("resumed", f"from {path.name}")]

    def _newest_checkpoint(self) -> tuple[Path | None, list[tuple[str, str]]]:
        """The newest good one, and an event for each newer one that is damaged."""
        found = self.store.latest()
        if found.checkpoint is None and found.rejected:
            raise UserError(
                f"no checkpoint in {self.folder.checkpoints} is whole ({found.rejected[0].reason}): "
                "move the run's folder away to start it again"
            )
        notes = [("checkpoint_rejected", f"{bad.path.name}: {bad.reason}") for bad in found.rejected]
        return found.checkpoint.path if found.checkpoint else None, notes

    def _compare_environments(self) -> None:
        """After the first step of a resumed run, when it is known which backend serves what: say what is lost."""
        if self.saved_environment is None:
            return
        saved, now = self.saved_environment, self._environment()
        # Ops that only one of the two has called so far are no difference.
        a, b = saved["backends"], now["backends"]
        for line in guarantee_lost({**saved, "backends": {**b, **a}}, {**now, "backends": {**a, **b}}):
            self._event("guarantee_lost", line)
        self.saved_environment = None

    def _has_metrics(self) -> bool:
        path = self.folder.path / "metrics.jsonl"
        return path.exists() and path.stat().st_size > 0

    def _rewind(self) -> None:
        """Too many skipped steps: back to the last good checkpoint before them, on with the data after them."""
        self._drain(keep=0)
        t = self.training
        bad_from, bad_to, rewinds = t.budget.skipped[0], t.step, t.rewinds + 1
        if rewinds > self.recipe.guards.max_rewinds:
            raise RunFailed(
                f"{len(t.budget.skipped)} steps skipped between {bad_from} and {bad_to}, after {t.rewinds} rewinds "
                "(guards.max_rewinds): look at the data and the learning rate"
            )
        next_data = t.step + t.data_offset
        good: Checkpoint | None = None
        if self.ranks.is_main:
            self.store.wait()
            good = checkpoints.latest(self.folder.checkpoints, before=bad_from).checkpoint
        good = self.ranks.broadcast(good)
        if good is None:
            t.start()
        else:
            t.load(good)
        t.rewinds, t.data_offset = rewinds, next_data - t.step
        self._restart_data()
        if self.ranks.is_main:
            self.log.close()
            self.log = MetricsLog(self.folder.path, t.step, self.recipe.log.tensorboard)
        self._event(
            "rewound",
            f"steps {bad_from} to {bad_to} skipped too often: back to step {t.step}, data of the range is left",
        )

    def _end(self, reason: str, number: int | None = None, loss: float | None = None) -> Outcome:
        if number is None:
            self.training.ended = reason  # the same command then has nothing left to do
        self._save(loss, wait=True)
        self._event("ended", reason)
        return Outcome(self.training.step, reason, number, self.ranks.is_main)

    def _signal_name(self) -> str:
        return signal.Signals(self.stop.number or signal.SIGTERM).name

    def _environment(self) -> dict[str, Any]:
        return environment(
            backends=self.training.backends, micro_batch=self.micro_batch, world_size=self.ranks.world_size
        )
