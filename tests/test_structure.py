"""The arrows between the parts point one way, and the folders answer to their import names only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "engine", "emulator")
OPS = sorted(p.name for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists() and p.name != "drop_in")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_kernels_do_not_import_the_engine():
    for path in sources("kernels"):
        for name in imports(path):
            assert not name.startswith(("hotloop.engine", "hotloop.emulator")), f"{path} imports {name}"


def test_emulator_imports_nothing_of_the_rest():
    """Triton is the business of its front end and of the tools in its wheel; both import it where they use it."""
    front_ends = ("triton_driver.py", "resources.py")
    for path in sources("emulator"):
        foreign = ("hotloop.engine", "hotloop.kernels", *(() if path.name in front_ends else ("torch", "triton")))
        for name in imports(path):
            assert not name.startswith(foreign), f"{path}: {name}"


@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_import_each_other(op):
    others = tuple(f"hotloop.kernels.{other}." for other in OPS if other != op)
    for path in sources(f"kernels/{op}"):
        for name in imports(path):
            assert not name.startswith(others), f"{path} imports {name}"


def test_the_engine_imports_no_backend():
    allowed = (*(f"hotloop.kernels.{op}." for op in OPS), "hotloop.kernels.dispatch.", "hotloop.kernels.selfcheck.")
    allowed += ("hotloop.kernels._C",)
    for path in sources("engine"):
        for name in imports(path):
            if name.startswith("hotloop.kernels"):
                assert name.startswith(allowed), f"{path} imports {name}"
                backend = name.split(".")[3:-1]
                assert backend == [], f"{path} imports {name}: the public path of an op is its folder"


def test_the_engine_has_no_autocast():
    """Its dtypes are explicit: engine/train/precision.py."""
    for path in sources("engine"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        names |= {name.rsplit(".", 1)[-1] for name in imports(path)}
        assert not {name for name in names if "autocast" in name}, path


def test_nothing_imports_by_the_bare_folder_names():
    for package in PACKAGES:
        for path in sources(package):
            for name in imports(path):
                assert name.split(".")[0] not in PACKAGES, f"{path} imports {name}"


def test_peers_are_no_run_time_needs():
    """But for the function that registers with one, which imports it when called."""
    peers = ("transformers", "liger_kernel", "peft", "flash_attn", "pytest", "hypothesis")
    for package in PACKAGES:
        for path in sources(package):
            if path.name in ("testing.py", "fixture.py") or path == ROOT / "kernels/drop_in/transformers.py":
                continue
            for name in imports(path):
                assert name.split(".")[0] not in peers, f"{path} imports {name}"


def test_commands_run_on_the_oldest_python():
    """Python 3.10 has no -P, and with it a script does not find the modules beside it: benchmarks/gpu.py did not."""
    files = [ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md")]
    files += [*(ROOT / ".ci").iterdir(), *(ROOT / "tests").rglob("*.py")]
    option = "-" + "P"
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert f'"{option}"' not in text, path
        assert f"python {option}" not in text, path


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


MODELS = """
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
BertModel(BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=32))
"""


@pytest.mark.parametrize("other_kernels_package", [False, True])
def test_transformers_works_from_the_repository_root(tmp_path, other_kernels_package):
    """With the root on sys.path our folder answers to `kernels`, a package that transformers probes for."""
    program = MODELS
    if other_kernels_package:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("__version__ = '0.0.1'\n")
        program = f"import sys; sys.path.append({str(tmp_path)!r})\n" + MODELS
    done = run_python("-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_the_bare_name_says_what_is_wrong(package):
    done = run_python("-c", f"import {package}; {package}.anything", cwd=ROOT)
    assert f"imported as hotloop.{package}" in done.stderr


def test_the_engine_takes_models_in_and_out():
    import hotloop.engine
    from hotloop.engine import load_pretrained, pretrained, save_pretrained

    assert (load_pretrained, save_pretrained) == (pretrained.load_pretrained, pretrained.save_pretrained)
    with pytest.raises(AttributeError, match="no attribute 'load_pretraind'"):
        hotloop.engine.load_pretraind  # noqa: B018


def test_importing_a_package_imports_nothing_heavy():
    for package in PACKAGES:
        heavy = "{'torch', 'triton'} & set(sys.modules)"
        done = run_python("-c", f"import sys, hotloop.{package}; print({heavy})", cwd=ROOT / "tests")
        assert done.stdout.strip() == "set()", done.stderr
