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
from dataclasses import dataclass
from typing import Any

ENVIRONMENT_VARIABLE = "HOTLOOP_BACKEND"

# A plain global, shared by all threads: torch.compile guards on it and so compiles again when it changes, which it can
# do neither for a ContextVar nor for a threading.local.
_forced: str | None = None


_tables: dict[str, Table] = {}
_used: dict[str, str] = {}


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
    """The backends of one op, best first. A table is known to `explain` by its op's name."""

    def __init__(self, op: str, *backends: Backend):
        self.op = op
        self.backends = backends
        self._by_name = {backend.name: backend for backend in backends}
        _tables[op] = self

    def __getitem__(self, name: str) -> Backend:
        """The backend that an op was told to run on; noted for `used`."""
        _used[self.op] = name
        return self._by_name[name]

    def choose(self, *args: Any, **kwargs: Any) -> Backend:
        """The backend for a call with these arguments. Raises BackendError with every reason."""
        forced = forced_backend()
        if forced is None:
            for candidate in self.backends:
                if candidate.supports(*args, **kwargs) is None:
                    return candidate
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
    """The backend asked for by `use_backend` or the environment, if any.

    A compiled function follows `use_backend`; the environment it reads once, when it is compiled.
    """
    return _forced or os.environ.get(ENVIRONMENT_VARIABLE) or None


def used() -> dict[str, str]:
    """Op -> the backend that last ran it in this process."""
    return dict(_used)


def explain(op: str | Table, *args: Any, **kwargs: Any) -> str:
    """Which backends serve a call of an op with these arguments, which one (*) is chosen, and why not the others.

    >>> print(explain("linear_cross_entropy", input, linear_weight, target))

    `op` is a table, its name, or the name's part before a dot, which stands for all tables of that op (schedules that
    are chosen between by other means). The module that declares the op must have been imported. Raises BackendError for
    an unknown name.
    """
    if isinstance(op, Table):
        tables = [op]
    else:
        tables = [table for name, table in _tables.items() if name == op or name.startswith(f"{op}.")]
    if not tables:
        known = ", ".join(sorted(_tables)) or "none; import the op first"
        raise BackendError(f"no op is called {op!r} (known: {known})")
    forced = forced_backend()
    lines = [] if forced is None else [f"backend {forced!r} is forced by use_backend or {ENVIRONMENT_VARIABLE}"]
    for table in tables:
        lines += [table.op, table.explain(*args, **kwargs)]
    return "\n".join(lines)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for all ops that the process calls meanwhile; None lifts an outer `use_backend`."""
    global _forced
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer
