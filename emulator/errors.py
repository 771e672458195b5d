"""What goes wrong: a report is a fault of the kernel under test, an exception one of the caller or the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "out-of-bounds",  # an address outside every buffer, shared memory, local memory or constant
    "misaligned",  # an address that is no multiple of the access's width
    "uninitialised",  # undefined data reached a store to global memory, an address, a branch or an atomic
    "shared-race",  # two warps, or two lanes of a warp, without a barrier between them; one of them writes
    "global-race",  # two warps of a CTA, or two CTAs, without happens-before between them; one of them writes
    "conflicting-stores",  # lanes of one instruction store different values to one address
    "copy-in-flight",  # shared memory is touched while a cp.async to it has not been waited for
    "copy-unfinished",  # the kernel ends with cp.async in flight
    "wgmma-in-flight",  # registers or shared memory of a wgmma are touched before its wait_group
    "wgmma-fence",  # registers written since the last wgmma.fence are given to a wgmma
    "proxy-fence",  # the asynchronous proxy reads generic writes without fence.proxy.async
    "divergent-barrier",  # part of a warp, or warps of a CTA at different places, meet one barrier
    "barrier-deadlock",  # threads wait at a barrier that nobody else can reach
    "divergent-warp",  # a warp-wide instruction lacks lanes that it names
    "livelock",  # the resident threads spin without changing anything
    "trap",  # the kernel trapped or failed an assertion
]


@dataclass(frozen=True)
class Report:
    """One fault at one instruction. The first occurrence is described, `count` says how many threads met it in all."""

    kind: Kind
    message: str
    source_line: str  # "file.py:12", "" where the PTX carries no line information
    ptx_line: str  # "118: st.global.b32 [%rd1], %r2"
    buffer: str  # the parameter, "shared", "local"; "" where memory is not the matter
    offset: int | None  # bytes from the start of the buffer
    cta: tuple[int, int, int]
    thread: int  # linear index within the CTA
    count: int

    def __str__(self) -> str:
        where = f" at {self.source_line}" if self.source_line else ""
        place = f", {self.buffer}+{self.offset}" if self.buffer and self.offset is not None else ""
        return (
            f"{self.kind}{where}: {self.message} (CTA {self.cta}, thread {self.thread}{place}, x{self.count})\n"
            f"    PTX {self.ptx_line}"
        )


class EmulatorError(Exception):
    """The launch cannot be made or carried out; the message says what to change."""


class UnsupportedPTX(EmulatorError):
    """PTX that the emulator does not know. It is refused, never skipped."""

    def __init__(self, reason: str, text: str = "", ptx_line: int = 0, source_line: str = "") -> None:
        where = f"PTX line {ptx_line}" + (f", {source_line}" if source_line else "")
        super().__init__(f"{reason}: `{text}` ({where})" if text else reason)
        self.ptx_line = ptx_line
        self.source_line = source_line


class ReportsError(EmulatorError):
    """A launch with reports. `reports` holds all of them; the message shows the first ones."""

    def __init__(self, reports: Sequence[Report], shown: int = 8) -> None:
        lines = [str(report) for report in reports[:shown]]
        if len(reports) > shown:
            lines.append(f"and {len(reports) - shown} more")
        super().__init__(f"{len(reports)} reports\n" + "\n".join(lines))
        self.reports = list(reports)
