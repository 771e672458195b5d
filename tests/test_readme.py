"""Every command and snippet of the README runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The repository's files by links, and an empty runs/."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "runs"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "hotloop"):
        (folder / ".venv" / "bin" / name).symlink_to(Path(sys.executable).with_name(name))
    return folder


def test_the_commands_run_in_order(checkout):
    own = [command for command in COMMANDS if not command.startswith("make ")]
    assert len(own) == 7
    for command in own:
        program, *arguments = command.split(" ", 1)
        program = str(Path(sys.executable).with_name(Path(program).name))
        done = subprocess.run(
            f"{program} {arguments[0]}", shell=True, cwd=checkout, capture_output=True, text=True, check=False,
            env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_make_targets_exist():
    """`make test` is running this; continuous integration runs `make demo`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    integration = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.removeprefix('make ')}:", makefile, flags=re.MULTILINE)
            assert command in integration


def test_the_snippet_runs():
    snippet, _ = blocks("python")
    assert len(snippet.strip().splitlines()) <= 14
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_second_snippet_is_the_example():
    """Which is short, and which one of the commands runs."""
    _, snippet = blocks("python")
    example = (ROOT / "examples" / "train.py").read_text(encoding="utf-8")
    assert textwrap.indent(snippet, "    ", lambda line: line.strip()) in example
    assert len(example.splitlines()) <= 60
    assert any("examples/train.py" in command for command in COMMANDS)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
