"""PTX of earlier Triton versions, stored by corpus/make.py, still runs and agrees with PyTorch."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from hotloop.emulator import Module

from gallery import attention, matmul, reduction, softmax

CASES = {case.name: case for case in (softmax.CASE, matmul.CASE, attention.CASE, reduction.CASE)}
ENTRIES = {
    f"{path.name.removesuffix('.json.xz')} {entry['target']} {entry['case']}": entry
    for path in sorted(Path(__file__).with_name("corpus").glob("*.json.xz"))
    for entry in json.loads(lzma.decompress(path.read_bytes()))
}


def test_the_corpus_holds_every_version():
    assert {name.split(" ")[0] for name in ENTRIES} == {"triton-3.6.0", "triton-3.7.1", "triton-3.8.0"}
    assert len(ENTRIES) == 3 * 2 * len(CASES)


# See gallery.case.known_faults.
KNOWN_FAULTS = {"triton-3.6.0 sm_90 attention": {"proxy-fence"}}


@pytest.mark.parametrize("name", ENTRIES)
def test_stored_ptx_agrees_with_pytorch(name: str):
    entry = ENTRIES[name]
    case = CASES[entry["case"]]
    given, got = (case.tensors(tuple(entry["shape"])) for _ in range(2))

    def argument(name: str) -> Any:
        return bytes.fromhex(entry["scalars"][name]) if name in entry["scalars"] else got.get(name, 0)

    module = Module(entry["ptx"], name=name)
    (kernel,) = module.kernels
    arguments = {name: argument(name) for name in entry["arguments"]}
    launch = module.launch(kernel, entry["grid"], entry["block"], entry["shared"], arguments, on_report="collect")
    assert {report.kind for report in launch.reports} == KNOWN_FAULTS.get(name, set())
    case.check(given, got)
