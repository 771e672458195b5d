"""What backends share that read and write rows of logits by their address: layouts, results, refusals.

A backend supplies two functions that make one pass each; everything they get lies as a kernel takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options, Rows
from hotloop.kernels.dispatch import BackendError

Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""loss, nll, lse, entropy, predicted, as in `Rows`; None: not wanted"""


class RunRows(Protocol):
    def __call__(
        self,
        logits: Tensor,  # (N, V) raw, N > 0; a row's elements next to each other
        target: Tensor,  # (N,) int64
        weight: Tensor | None,  # (V,) fp32
        token_weight: Tensor | None,  # (N,) fp32
        options: Options,
        results: Results,
        out: Tensor | None,  # (N, V): gradient of (dloss * loss).sum(); may be the logits
        dloss: Tensor | None,  # (N,) fp32, of any stride
        /,
    ) -> None: ...


class RunColumns(Protocol):
    def __call__(
        self,
        logits: Tensor,  # (N, width) raw, neither empty; overwritten with the gradient
        first: int,  # column of the vocabulary in logits[:, 0]
        target: Tensor,  # (N,) int64
        factors: Coefficients,  # zero in ignored rows
        weight: Tensor | None,  # (V,)
        lse: Tensor,  # (N,)
        entropy: Tensor | None,  # (N,); None where factors.dentropy is None
        options: Options,
        /,
    ) -> None: ...


class RawRows:
    """The kernels of a backend; see `schedule.RowKernels` for what they promise."""

    def __init__(self, name: str, supports: Callable[[Tensor], str | None], rows: RunRows, columns: RunColumns):
        self.name, self.supports, self._rows, self._columns = name, supports, rows, columns

    def rows_forward(
        self,
        logits: Tensor,  # (N, V) raw; not written
        target: Tensor,  # (N,) int64
        weight: Tensor | None,  # (V,) fp32
        token_weight: Tensor | None,  # (N,) fp32
        options: Options,
        stats: bool,
    ) -> Rows:
        return self._results(logits, target, weight, token_weight, options, stats, None, None)

    def rows_forward_backward_(
        self,
        logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
        target: Tensor,  # (N,) int64
        weight: Tensor | None,  # (V,)
        token_weight: Tensor | None,  # (N,)
        scale: Tensor,  # ()
        options: Options,
        stats: bool,
    ) -> Rows:
        dloss = scale.expand(target.shape)
        return self._results(logits, target, weight, token_weight, options, stats, logits, dloss)

    def rows_backward(
        self,
        dloss: Tensor,  # (N,)
        logits: Tensor,  # (N, V) raw
        target: Tensor,  # (N,)
        weight: Tensor | None,  # (V,)
        token_weight: Tensor | None,  # (N,)
        lse: Tensor,  # (N,); not needed: exp(x - lse) would be less accurate where |x| is large
        options: Options,
        out: Tensor,  # (N, V): a new tensor, or logits itself
    ) -> None:
        dense = _by_rows(out)  # out itself, but where its columns are apart
        self._run(logits, target, weight, token_weight, options, (None,) * 5, dense, dloss)
        if dense is not out:
            out.copy_(dense)

    def columns_backward_(
        self,
        logits: Tensor,  # (N, width) raw, a tile of the vocabulary; overwritten with the gradient
        first: int,  # column of the vocabulary in logits[:, 0]
        target: Tensor,  # (N,) int64
        factors: Coefficients,  # zero in ignored rows
        weight: Tensor | None,  # (V,)
        lse: Tensor,  # (N,)
        entropy: Tensor,  # (N,); (0,) where factors.dentropy is None
        options: Options,
    ) -> None:
        self.refuse_others(logits)
        if logits.numel():
            self._columns(
                logits, first, target.contiguous(), factors.dense(), _dense(weight),
                lse.contiguous(), None if factors.dentropy is None else entropy.contiguous(), options,
            )  # fmt: skip

    def loss_and_lse(
        self, input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        rows = self.rows_forward(input, target, weight, token_weight, options, False)
        return rows.loss, rows.lse

    def _results(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        options: Options,
        stats: bool,
        out: Tensor | None,
        dloss: Tensor | None,
    ) -> Rows:
        n = logits.shape[0]
        loss, nll, lse, entropy = (logits.new_empty(k, dtype=torch.float32) for k in (n, n, n, n if stats else 0))
        rows = Rows(loss, nll, lse, entropy, logits.new_empty(n if stats else 0, dtype=torch.int64))
        wanted = (loss, nll, lse, entropy if stats else None, rows.predicted if stats else None)
        self._run(logits, target, weight, token_weight, options, wanted, out, dloss)
        return rows

    def _run(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        options: Options,
        results: Results,
        out: Tensor | None,
        dloss: Tensor | None,
    ) -> None:
        self.refuse_others(logits)
        if logits.shape[0]:
            self._rows(
                _by_rows(logits), target.contiguous(), _dense(weight), _dense(token_weight), options, results, out,
                None if dloss is None else dloss.float(),
            )  # fmt: skip

    def refuse_others(self, logits: Tensor) -> None:
        """The operators take a backend's name from anyone, and what follows reads memory by its address."""
        reason = self.supports(logits)
        if reason is not None:
            raise BackendError(f"backend {self.name!r} {reason}")


def _by_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
