"""The one place that chooses a backend and explains the choice.

Each op has a table: an ordered tuple of `Backend(name, supports, forward, backward)`. `supports(...)` gets the op's own
arguments and returns None, or the reason why this backend cannot serve them. `choose` takes the forced backend
(`use_backend`, then the environment variable HOTLOOP_BACKEND) or the first backend of the table that serves the call.
A forced backend that cannot serve a call is an error that carries the reason, never another backend.

Only metadata is read (device, dtype, shape), so a choice never waits for a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

ENVIRONMENT_VARIABLE = "HOTLOOP_BACKEND"

_forced: ContextVar[str | None] = ContextVar("hotloop_forced_backend", default=None)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `supports` takes the op's arguments and returns None or the reason why not. `forward` and `backward` take what the
    op's schema says; an op with a single phase (an optimizer's update) has no `backward`.
    """

    name: str
    supports: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None


class BackendError(RuntimeError):
    """No backend serves the call, or the forced one does not."""


class Table:
    """The backends of one op, best first."""

    def __init__(self, op: str, *backends: Backend):
        self.op = op
        self.backends = backends
        self._by_name = {backend.name: backend for backend in backends}

    def __getitem__(self, name: str) -> Backend:
        return self._by_name[name]

    def choose(self, *args: Any, **kwargs: Any) -> Backend:
        """The backend for a call with these arguments. Raises BackendError with every reason."""
        forced = forced_backend()
        if forced is None:
            for backend in self.backends:
                if backend.supports(*args, **kwargs) is None:
                    return backend
            raise BackendError(f"no backend serves this call of {self.op}:\n{self.explain(*args, **kwargs)}")
        backend = self._by_name.get(forced)
        if backend is None:
            raise BackendError(f"backend {forced!r} was asked for, but {self.op} has only {', '.join(self._by_name)}")
        reason = backend.supports(*args, **kwargs)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was asked for, but does not serve this call of {self.op}: {reason}")
        return backend

    def reasons(self, *args: Any, **kwargs: Any) -> dict[str, str | None]:
        """Backend name -> None if it serves the call, else why not."""
        return {backend.name: backend.supports(*args, **kwargs) for backend in self.backends}

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """A table of backends for a call with these arguments: which serve it, which is chosen, why not the others."""
        reasons = self.reasons(*args, **kwargs)
        forced = forced_backend()
        chosen = forced if forced is not None else next((name for name, why in reasons.items() if why is None), None)
        rows = []
        for name, why in reasons.items():
            mark = "*" if name == chosen and why is None else " "
            rows.append(f"  {mark} {name:<10} {'serves' if why is None else why}")
        return "\n".join(rows)


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or the environment, if any."""
    return _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for all ops called inside; None lifts an outer `use_backend`."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
