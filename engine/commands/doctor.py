"""`hotloop doctor`"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotloop.kernels.selfcheck import Outcome

PACKAGES = ("hotloop", "torch", "triton", "numpy", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class Doctor:
    """Show what this machine has, which backend serves each op and why not the others, and check them all.

    Examples:
      hotloop doctor
      hotloop doctor --no-measure --json

    Every backend of every op is compared with the formula in fp64. Exit code 1 if the numbers of one are wrong.
    """

    measure: bool = True
    """Leave out the measured peaks of matmul and copy, which take some seconds."""
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> int:
        import torch

        from hotloop.kernels.selfcheck import self_check

        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        findings: dict[str, Any] = {"machine": machine()}
        say = (lambda text: None) if self.json else (lambda text: print(text, flush=True))
        say(_machine_text(findings["machine"]))
        if self.measure:
            say("\nMeasured peaks")
            findings["peaks"] = []
            for device in devices:
                for peak in peaks(device):
                    findings["peaks"].append(peak)
                    say(_peak_text(peak))
        outcomes: list[Outcome] = []
        for device in devices:
            say(f"\nBackends on {device} against the formula in fp64 (* serves the call by itself)")
            outcomes += (found := self_check(device))
            say(_outcomes_text(found))
        wrong = [outcome for outcome in outcomes if not outcome.fine]
        findings |= {"checks": [asdict(outcome) for outcome in outcomes], "ok": not wrong}
        say("\n" + _conclusion(outcomes))
        if self.json:
            print(json.dumps(findings, indent=2))
        return 1 if wrong else 0


def machine() -> dict[str, Any]:
    """Versions, compilers, the extension, processor, memory and GPUs: plain values that JSON keeps."""
    import torch

    from hotloop.engine.train.environment import cpu_model

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        # torch's own word says for what it was built; its metadata may not.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},
        "cuda": torch.version.cuda,
        "c++ compiler": _tool(os.environ.get("CXX"), "c++", "g++", "clang++"),
        "nvcc": _tool("nvcc"),
        "extension": extension(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable cores": usable_cores(),
            "torch threads": torch.get_num_threads(),
            "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_gb": memory_gb(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "no_gpu_because": None if torch.cuda.is_available() else _no_gpu(),
        "HOTLOOP_BACKEND": os.environ.get("HOTLOOP_BACKEND"),
    }


def extension() -> dict[str, Any]:
    """What hotloop.kernels._C was built by and can use, or why it is missing."""
    try:
        from hotloop.kernels import _C
    except ImportError as error:
        compiler = _tool(os.environ.get("CXX"), "c++", "g++", "clang++")
        cure = "install hotloop again to build it" if compiler else "install a C++ compiler, then hotloop again"
        return {"missing": f"{error}; {cure}"}
    return {"built_by": _C.compiler(), "instruction_sets": _C.instruction_sets(), "threads": _C.threads()}


def usable_cores() -> int | None:
    """Cores that this process may run on (Linux), fewer than the machine's in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gb() -> float | None:
    """Memory of the machine in GB (10^9 bytes), or of the container where that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(limit, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        total = min(total, int(text)) if text.isdigit() else total
    return round(total / 1e9, 1)


def peaks(device: str) -> list[dict[str, Any]]:
    """Measured FLOP/s of matrix products for each dtype, and bytes/s of a copy."""
    import torch

    from hotloop.engine.train.throughput import measure_copy_bandwidth, measure_matmul_peak

    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device != "cpu" else [])]
    found = []
    for dtype in dtypes:
        peak = measure_matmul_peak(device, dtype)
        name = f"matmul {str(dtype).removeprefix('torch.')}"
        found.append({"device": device, "what": name, "rate": peak.rate, "unit": "FLOP/s", "workload": peak.workload})
    copy = measure_copy_bandwidth(device)
    return [*found, {"device": device, "what": "copy", "rate": copy.rate, "unit": "B/s", "workload": copy.workload}]


def _machine_text(found: dict[str, Any]) -> str:
    packages, cpu, built = found["packages"], found["cpu"], found["extension"]
    cuda = f" (CUDA {found['cuda']})" if found["cuda"] else ""
    rows = [
        (
            "hotloop",
            f"{packages['hotloop'] or 'not installed'}, Python {found['python']}, torch {packages['torch']}{cuda}",
        ),
        ("packages", ", ".join(f"{name} {packages[name] or 'missing'}" for name in PACKAGES[2:])),
        ("system", found["system"]),
        ("CPU", f"{cpu['model']}, {cpu['usable cores']} of {cpu['cores']} cores usable"),
        ("", f"torch: {cpu['torch threads']} threads, {cpu['torch instruction set']}"),
        ("memory", "unknown" if found["memory_gb"] is None else f"{found['memory_gb']:g} GB"),
    ]
    for gpu in found["gpus"]:
        text = (
            f"{gpu['name']}, {gpu['memory_gb']:g} GB, compute capability {gpu['capability']}, {gpu['processors']} SMs"
        )
        rows.append((f"GPU {gpu['index']}", text))
    if not found["gpus"]:
        rows.append(("GPU", f"none: {found['no_gpu_because']}"))
    rows.append(("compiler", found["c++ compiler"] or "no C++ compiler on PATH: only needed to build the extension"))
    rows.append(("nvcc", found["nvcc"] or "not on PATH"))
    if "missing" in built:
        rows.append(("extension", f"hotloop.kernels._C is missing: {built['missing']}"))
    else:
        sets = " ".join(built["instruction_sets"]) or "no vector instructions that it knows"
        rows.append(("extension", f"hotloop.kernels._C built by {built['built_by']}, {built['threads']} threads"))
        rows.append(("", f"chooses among: {sets}"))
    if found["HOTLOOP_BACKEND"]:
        rows.append(("forced", f"HOTLOOP_BACKEND={found['HOTLOOP_BACKEND']}: every op takes that backend or refuses"))
    return "Machine\n" + "\n".join(f"  {name:<10} {text}" for name, text in rows)


def _peak_text(peak: dict[str, Any]) -> str:
    scale, unit = (1e9, f"G{peak['unit']}") if peak["rate"] < 1e12 else (1e12, f"T{peak['unit']}")
    return f"  {peak['device']:<7} {peak['what']:<16} {peak['rate'] / scale:8.1f} {unit:<8} {peak['workload']}"


def _outcomes_text(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for (op, call), group in groupby(outcomes, key=lambda outcome: (outcome.op, outcome.call)):
        lines.append(f"  {op}: {call}")
        for o in group:
            if o.status in ("ok", "mismatch"):
                word = "ok" if o.status == "ok" else "MISMATCH"
                text = f"{word}: error {o.error:.1e} in {o.detail}, tolerance {o.tolerance:.0e}"
            else:
                text = f"FAILED: {o.detail}" if o.status == "failed" else f"does not serve it: {o.detail}"
            lines.append(f"    {'*' if o.chosen else ' '} {o.backend:<10} {o.dtype:<9} {text}")
    return "\n".join(lines)


def _conclusion(outcomes: Sequence[Outcome]) -> str:
    wrong = [outcome for outcome in outcomes if not outcome.fine]
    checked = sum(outcome.status != "not served" for outcome in outcomes)
    if not wrong:
        return f"All {checked} checks are fine."
    names = ", ".join(sorted({f"{o.op} by {o.backend} on {o.device}" for o in wrong}))
    return f"{len(wrong)} of {checked} checks FAILED ({names}): do not train with these backends."


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
    }


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no NVIDIA driver answers" if shutil.which("nvidia-smi") is None else "torch sees no device (see nvidia-smi)"


def _tool(*names: str | None) -> str | None:
    """Path and first line of `--version` of the first of these programs that is there."""
    path = next((path for name in names if name and (path := shutil.which(name))), None)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} (does not run: {error})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    told = next(
        (line for line in lines if "release" in line), lines[0] if lines else "no version"
    )  # nvcc's is not first
    return f"{path} ({told})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        module = sys.modules.get(package)
        return getattr(module, "__version__", None)
