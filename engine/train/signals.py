"""SIGINT and SIGTERM ask the run to save and leave."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Truthy once a signal has come. A second SIGINT interrupts at once."""

    def __enter__(self) -> StopSignal:
        self.number: int | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
