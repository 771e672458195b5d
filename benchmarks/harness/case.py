"""What is compared: the providers of one piece of work, and the accuracy gate that each passes before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hotloop.kernels.dispatch import Table, use_backend

OURS = "hotloop"  # our providers' names start with it

Results = tuple[Tensor, ...]
Call = Callable[[], object]


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work."""

    run: Call
    """What is timed."""
    results: Callable[[], Results]
    """What the gate compares. Called once, before anything is timed."""
    prepare: Call | None = None
    """Called before each run, not timed: restores what the run overwrites."""


@dataclass(frozen=True)
class Verdict:
    """How far a provider's worst result is from the expected one, and how far it may be; both relative L2 norms."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


Gate = Callable[[Mapping[str, Results]], dict[str, Verdict]]


@dataclass(frozen=True)
class Case:
    """One row of a comparison: op x shape x dtype x mode."""

    kernel_name: str
    mode: Literal["forward", "backward", "full"]
    x: tuple[str, str, float]
    """Name, label and value of the size that varies from case to case."""
    config: Mapping[str, object]
    """The other sizes, the dtype, and whatever else tells cases apart."""
    providers: Callable[[], dict[str, Callable[[], Provider]]]
    """Draws the inputs. Returns name -> a function that makes the provider (compiles, allocates)."""
    gate: Gate
    work: float
    """FLOPs or bytes that one run must do or move, whoever runs it."""
    unit: Literal["FLOP", "B"]
    dtype: torch.dtype
    pairs: tuple[tuple[str, str], ...] | None = field(default=None)
    """(ours, peer) whose ratio is quoted; None: each of ours with each peer."""
    in_place: bool = False
    """Whether the bytes are those of tensors that are updated where they lie, for the machine's limit."""
    memory: bool = False
    """Whether peak memory tells the providers apart."""
    counted: Mapping[str, float] = field(default_factory=dict)
    """What one run gets through besides `work`, whoever runs it: tokens, documents. Shown as rates."""

    @property
    def name(self) -> str:
        x = f"{self.x[0]}={self.x[2]:g}"
        return "-".join([self.kernel_name, self.mode, x, *(f"{k}={v}" for k, v in self.config.items())])

    def compared(self, names: list[str]) -> list[tuple[str, str]]:
        """The pairs among these providers."""
        if self.pairs is not None:
            return [(ours, peer) for ours, peer in self.pairs if ours in names and peer in names]
        ours = [name for name in names if name.startswith(OURS)]
        return [(a, b) for a in ours for b in names if b not in ours]


def distance(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| in fp64; infinite where x is not finite. Bounded memory: in pieces."""
    if x.shape != expected.shape:
        raise ValueError(f"result of shape {tuple(x.shape)}, expected {tuple(expected.shape)}")
    error = norm = 0.0
    pieces = (t.detach().reshape(-1).split(1 << 22) for t in (x, expected))
    for part, truth in zip(*pieces, strict=True):
        truth = truth.to(x.device, torch.float64)
        error += (part.double() - truth).square().sum().item()
        norm += truth.square().sum().item()
    found = math.sqrt(error / norm) if norm else math.sqrt(error)
    return found if math.isfinite(found) else math.inf


def agrees_with(peer: str, tolerance: float) -> Gate:
    """Every result within `tolerance` of the peer's."""

    def judge(results: Mapping[str, Results]) -> dict[str, Verdict]:
        return {
            name: Verdict(max(distance(x, e) for x, e in zip(own, results[peer], strict=True)), tolerance)
            for name, own in results.items()
        }

    return judge


def no_worse_than(peer: str, truth: Callable[[], Results], dtype: torch.dtype, factor: float = 2.0) -> Gate:
    """Every result at most `factor` times as far from the formula in fp64 as the peer's, and one rounding of `dtype`.

    The rounding is for results that are single numbers: there the peer's error may be near zero by luck.
    """

    def judge(results: Mapping[str, Results]) -> dict[str, Verdict]:
        expected = truth()
        limits = [
            factor * distance(x, exact) + torch.finfo(dtype).eps
            for x, exact in zip(results[peer], expected, strict=True)
        ]
        verdicts = {}
        for name, own in results.items():
            found = [Verdict(distance(x, e), most) for x, e, most in zip(own, expected, limits, strict=True)]
            verdicts[name] = max(found, key=lambda verdict: verdict.error / verdict.allowed)
        return verdicts

    return judge


def simple(call: Callable[[], Results]) -> Callable[[], Provider]:
    """A provider whose results are what each run returns."""
    return lambda: Provider(run=call, results=call)


def by_backend(
    table: Table, arguments: tuple[object, ...], call: Callable[[], Results], *, reference: bool = False
) -> dict[str, Callable[[], Provider]]:
    """`call` under each backend that serves it: "hotloop torch", "hotloop cpu" and so on, the default choice first.

    `arguments` are the table's. The backend `reference` is the definition of right, not of fast: left out unless asked
    for.
    """
    served = [name for name, why_not in table.reasons(*arguments).items() if why_not is None]

    def forced(name: str) -> Callable[[], Results]:
        def run() -> Results:
            with use_backend(name):
                return call()

        return run

    return {f"{OURS} {name}": simple(forced(name)) for name in served if reference or name != "reference"}
