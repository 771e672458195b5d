"""Stores the PTX that the installed Triton makes of the gallery's kernels, each with a launch to replay.

Run once per Triton version, from the folder that holds `gallery` and `corpus`, in an environment with that version:

    PYTHONPATH=.:WHERE_THAT_TRITON_IS python corpus/make.py

It writes corpus/triton-VERSION.json.xz: the PTX as the compiler gave it, less the DWARF at its end and the folders of
source files, which are of the machine that ran this.
"""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import triton

import hotloop.emulator

from gallery import attention, matmul, reduction, softmax
from gallery.case import Case

CASES: list[tuple[Case, tuple[int, ...]]] = [
    (softmax.CASE, (5, 130)),
    (matmul.CASE, (72, 136, 40)),
    (attention.CASE, (2, 100, 1)),
    (reduction.CASE, (1111,)),
]


def record(case: Case, shape: tuple[int, ...], target: str) -> dict[str, object]:
    with hotloop.emulator.triton(target) as gpu:
        assert case.launch_triton is not None
        case.launch_triton(case.tensors(shape))
    (launch,) = gpu.launches
    scalars = {name: value.hex() for name, value in launch.arguments.items() if isinstance(value, bytes)}
    return {
        "case": case.name,
        "shape": shape,
        "target": target,
        "grid": launch.grid,
        "block": launch.block,
        "shared": launch.shared,
        "arguments": list(launch.arguments),  # a tensor of the case, a scalar of the table, or a null pointer
        "scalars": scalars,
        "ptx": portable(launch.compiled.asm["ptx"]),
    }


def portable(ptx: str) -> str:
    code, _, _ = ptx.partition("\t.section\t.debug")
    return re.sub(r'(\.file\s+\d+ )"[^"]*?([^/"]+)"', r'\1"\2"', code)


if __name__ == "__main__":
    entries = [record(case, shape, target) for case, shape in CASES for target in ("sm_80", "sm_90")]
    path = Path(__file__).with_name(f"triton-{triton.__version__}.json.xz")
    path.write_bytes(lzma.compress(json.dumps(entries).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(path.name, len(entries), "kernels", path.stat().st_size, "bytes")
