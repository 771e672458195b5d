"""`make bench` ends with the tables: pytest-benchmark's own shows our provider only."""

from __future__ import annotations

import pytest

from harness.command import finished
from harness.table import markdown


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if finished:
        terminalreporter.section("ours and peers, interleaved")
        terminalreporter.write_line(markdown(finished))
