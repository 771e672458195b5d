"""What a kernel takes of a GPU: registers, stack, shared memory and the classes of its machine instructions.

For tests that hold a committed budget, on a machine without a GPU:

    assert static("csrc/attention/attention.cu", "sm_80", name="forward").registers <= 168
    with hotloop.emulator.triton("sm_90") as gpu:
        assert static(softmax.warmup(torch.float32, torch.float32, 1024, BLOCK=1024, grid=(1,))).spills == 0

The numbers come out of the cubin, read by `cuobjdump` of Triton's wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.emulator import cuda
from hotloop.emulator.errors import EmulatorError


@dataclass(frozen=True)
class Resources:
    name: str
    registers: int  # per thread
    stack: int  # bytes per thread, spilled registers included
    spills: int  # instructions that reach the stack: spilled registers, arrays that are indexed at run time
    shared: int  # bytes per block; Triton's and `extern __shared__` arrays included where the launch states them
    sass: Mapping[str, int]  # instructions by class: HMMA, LDSM, LDG.128, ...

    def budget(self, *classes: str) -> dict[str, int]:
        """What a committed budget holds: the numbers above, and instructions of these classes where there are any."""
        row = {"registers": self.registers, "stack": self.stack, "spills": self.spills, "shared": self.shared}
        return row | {name: self.sass[name] for name in classes if name in self.sass}


def static(kernel: Any, target: str = "sm_80", *, name: str | None = None, **compile_options: Any) -> Resources:
    """Resources of one kernel.

    kernel      the path of a `.cu` or `.cubin` file, a cubin's bytes, or a kernel that Triton compiled (what `warmup`
                and a launch return)
    target      the architecture a `.cu` file is compiled for, with `compile_options` as for `Module.from_cuda`
    name        the kernel's plain name, where the file holds several; of instances of a template the whole entry
    """
    cubin, dynamic_shared = machine_code(kernel, target, compile_options)
    usage = usages(cubin)
    found = [entry for entry in usage if name is None or name in (entry, cuda.plain_name(entry))]
    if len(found) != 1:
        names = [cuda.plain_name(entry) for entry in usage]
        known = sorted(plain if names.count(plain) == 1 else entry for plain, entry in zip(names, usage, strict=True))
        raise EmulatorError(f"kernel {name!r}: expected one of {', '.join(known)}")
    (entry,) = found
    name = cuda.plain_name(entry)
    counts = classes(cubin)[entry]
    registers, stack, shared = usage[entry]
    spills = sum(count for kind, count in counts.items() if kind.startswith(("LDL", "STL")))
    return Resources(name, registers, stack, spills, shared + dynamic_shared, dict(counts.most_common()))


def machine_code(kernel: Any, target: str, compile_options: Mapping[str, Any]) -> tuple[bytes, int]:
    """A cubin, and the bytes of shared memory that its launcher adds."""
    if isinstance(kernel, bytes):
        return kernel, 0
    if isinstance(kernel, str | Path):
        path = Path(kernel)
        is_cubin = path.suffix == ".cubin"
        return path.read_bytes() if is_cubin else cuda.compile_cubin(path, target, **compile_options), 0
    if hasattr(kernel, "asm"):
        return kernel.asm["cubin"], kernel.metadata.shared
    raise EmulatorError(f"{type(kernel).__name__}: expected a path, a cubin's bytes or a kernel that Triton compiled")


def cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_cuobjdump(), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulatorError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


def find_cuobjdump() -> str:
    try:
        from triton import knobs
    except ImportError:
        found = shutil.which("cuobjdump")
        if found is None:
            raise EmulatorError("cuobjdump: neither Triton's wheel nor PATH has it; `pip install triton`") from None
        return found
    return knobs.nvidia.cuobjdump.path


def usages(cubin: bytes) -> dict[str, tuple[int, int, int]]:
    """Registers, stack and static shared memory of each entry."""
    line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    found = re.findall(line, cuobjdump(cubin, "-res-usage"))
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


def classes(cubin: bytes) -> dict[str, Counter[str]]:
    """Machine instructions of each entry by class: the operation, and the bits a lane moves for loads and stores."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in cuobjdump(cubin, "-sass").splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            current = counts.setdefault(function[1], Counter())
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)", line):
            current[instruction_class(instruction[1], instruction[2])] += 1
    return counts


def instruction_class(operation: str, modifiers: str) -> str:
    if operation not in ("LD", "LDG", "LDS", "LDL", "LDGSTS", "ST", "STG", "STS", "STL"):
        return operation
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
    return f"{operation}.{bits[1] if bits else 32}"
