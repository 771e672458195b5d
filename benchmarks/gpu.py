"""`make gpu`: on a machine with a GPU, correctness first, then the benchmarks; one JSON under benchmarks/results/."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hotloop.engine.files import write_file
from hotloop.engine.train.environment import environment
from hotloop.kernels.selfcheck import self_check

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    tests = subprocess.run([sys.executable, "-P", "-m", "pytest", "-q", "tests/kernels"], cwd=ROOT, check=False)
    checks = self_check("cuda")
    wrong = [check for check in checks if not check.fine]
    for check in wrong:
        print(f"MISMATCH {check.op} ({check.call}) {check.dtype} on {check.backend}: {check.detail}", file=sys.stderr)
    result = {
        "environment": environment(),
        "tests_exit_code": tests.returncode,
        "self_check": [asdict(check) for check in checks],
    }
    if tests.returncode == 0 and not wrong:  # a row is reported only behind a green gate
        out = RESULTS / f"train_step-{name}"
        script = [sys.executable, str(ROOT / "benchmarks" / "bench_train_step.py"), "--out", str(out)]
        subprocess.run(script, cwd=ROOT, check=True)
        result["train_step"] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    write_file(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print(RESULTS / f"{name}.json")
    return 1 if tests.returncode or wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
