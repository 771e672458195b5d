"""`static(...)`: registers, stack, spills, shared memory and SASS classes, against the committed budgets.json.

A budget holds for one compiler: nvcc 13.0, Triton 3.9. `python test_static.py` writes it anew, for a reviewed diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from hotloop import emulator
from hotloop.emulator import EmulatorError, cuda, static
from hotloop.emulator.resources import Resources, instruction_class

from gallery import attention, matmul
from gallery.case import CUDA_TARGETS, TRITON_TARGETS

BUDGETS = Path(__file__).with_name("budgets.json")
GALLERY = Path(__file__).with_name("gallery")
REPORTED = ("HMMA", "HGMMA", "LDSM", "LDGSTS.128", "LDG.128", "STG.128")


def triton_attention(target: str) -> Resources:
    tensors = [torch.bfloat16] * 4 + [torch.float32]
    with emulator.triton(target):
        kernel = attention.attention.warmup(*tensors, 100, 0.1, True, 64, 64, 32, num_warps=4, grid=(1,))
    return static(kernel)


def measured() -> Iterator[tuple[str, Resources]]:
    for target in CUDA_TARGETS:
        yield f"nvcc attention {target}", static(GALLERY / "attention.cu", target)
        yield f"nvcc matmul {target}", static(GALLERY / "matmul.cu", target)
    for target in TRITON_TARGETS:
        yield f"triton attention {target}", triton_attention(target)


def test_the_gallery_keeps_its_budget():
    if "release 13.0" not in cuda.version(cuda.find_nvcc()) or not triton.__version__.startswith("3.9."):
        pytest.skip(f"the budgets are of nvcc 13.0 and Triton 3.9, not of this nvcc with Triton {triton.__version__}")
    rows = {name: resources.budget(*REPORTED) for name, resources in measured()}
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        assert row.get("HGMMA" if name == "triton attention sm_90" else "HMMA", 0) > 0, name


def test_local_arrays_and_calls_count_as_stack():
    adamw = static(GALLERY / "adamw.cu")
    assert adamw.name == "adamw"
    assert adamw.stack > 0
    assert adamw.spills > 0
    assert adamw.sass["CALL"] > 0


def test_shared_memory_is_what_the_source_declares():
    # 256 bins and 5 floats and flags; from sm_90 on the system keeps 1 KiB more
    sizes = [static(GALLERY / "reduction.cu", target).shared for target in ("sm_80", "sm_90a")]
    assert 1024 + 16 < sizes[0] < 1024 + 32
    assert sizes[1] >= sizes[0]
    with emulator.triton() as gpu:
        matmul.launch_triton(matmul.CASE.tensors((40, 24, 72)))
    (launch,) = gpu.launches
    assert static(launch.compiled).shared == launch.shared > 0


def test_a_file_with_several_kernels_needs_a_name():
    with pytest.raises(EmulatorError, match=r"kernel None: expected one of deadlock, divergent_barrier"):
        static(GALLERY / "faults.cu")
    assert static(GALLERY / "faults.cu", name="odd_start").sass["LDG.128"] == 1


def test_cubins_and_bytes(tmp_path: Path):
    code = cuda.compile_cubin(GALLERY / "softmax.cu", "sm_90a")
    (tmp_path / "softmax.cubin").write_bytes(code)
    assert static(code) == static(tmp_path / "softmax.cubin") == static(GALLERY / "softmax.cu", "sm_90a")
    with pytest.raises(EmulatorError, match="int: expected a path"):
        static(3)
    with pytest.raises(EmulatorError, match="cuobjdump -res-usage failed"):
        static(b"no cubin")


@pytest.mark.parametrize(
    ("operation", "modifiers", "kind"),
    [
        ("LDG", ".E.128.CONSTANT", "LDG.128"),
        ("LDG", ".E.U16", "LDG.16"),
        ("STS", "", "STS.32"),
        ("LDGSTS", ".E.BYPASS.128", "LDGSTS.128"),
        ("HMMA", ".16816.F32.BF16", "HMMA"),
        ("LDSM", ".16.MT88.4", "LDSM"),
    ],
)
def test_instruction_classes(operation: str, modifiers: str, kind: str):
    assert instruction_class(operation, modifiers) == kind


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps({name: r.budget(*REPORTED) for name, r in measured()}, indent=1) + "\n")
