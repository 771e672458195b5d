"""`make gpu`: on a machine with a CUDA device correctness first, then the benchmarks; one JSON in benchmarks/results/.

    python benchmarks/gpu.py

1. The tests of the kernels.
2. The first-use check: every backend against the formula in fp64 on this device.
3. Every benchmark, if both were right: nothing is timed behind a failure.

Exit codes: 0; 1 where something was wrong (the JSON says what); 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hotloop.engine.files import write_file
from hotloop.engine.train.environment import environment
from hotloop.kernels.selfcheck import self_check

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/NAME-OF-THE-GPU.json")
    parser.add_argument("--rounds", type=int, default=15, help="of each benchmark (default: 15)")
    parser.add_argument("--all", action="store_true", help="larger shapes too, and the reference backends")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    from suite import cases

    from harness.command import run  # after the check: without a device this script needs nothing but torch
    from harness.table import contents, device_name, markdown

    out = options.out or RESULTS / f"{device_name()}.json"
    result: dict[str, Any] = {"environment": environment()}

    result["tests"] = tests()
    checks = self_check("cuda")
    wrong = [check for check in checks if not check.fine]
    for check in wrong:
        print(f"MISMATCH {check.op} ({check.call}) {check.dtype} on {check.backend}: {check.detail}", file=sys.stderr)
    result["self_check"] = [asdict(check) for check in checks]
    right = result["tests"]["exit_code"] == 0 and not wrong
    if right:
        measured = run(cases(options.all), options.rounds)
        result["benchmarks"] = contents(measured)
        right = not any(m.ours_refused for m in measured)
        write_file(out.with_suffix(".md"), markdown(measured))
    else:
        print("nothing is timed: the tests or the first-use check failed", file=sys.stderr)
    write_file(out, json.dumps(result, indent=1) + "\n")
    print(out)
    return 0 if right else 1


def tests() -> dict[str, Any]:
    """The kernels' tests in a process of their own; their output is shown as it comes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
    # Not from the root: there the bare name `kernels` would be found.
    done = subprocess.run([*command, f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"], cwd=RESULTS)
    return {"command": "pytest tests/kernels", "exit_code": done.returncode}


if __name__ == "__main__":
    raise SystemExit(main())
