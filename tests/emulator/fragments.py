"""Kernels of one fragment of PTX, for the unit tests of opcodes: inputs per thread in, results per thread out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hotloop.emulator import Launch, Module

HEADER = ".version 8.7\n.target {target}\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<80>; .reg .b64 %rd<40>; .reg .f32 %f<80>; .reg .f64 %fd<20>;
"""
WIDTH = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
PREFIX = {"b16": "h", "b32": "r", "b64": "rd", "f32": "f", "f64": "fd"}


def text(
    code: str, parameters: Sequence[str] = (), *, target: str = "sm_80", before: str = "", attributes: str = ""
) -> str:
    """PTX of the kernel `k`; parameter j is p{j}."""
    listed = ", ".join(f".param .{t} p{j}" for j, t in enumerate(parameters))
    entry = f".visible .entry k({listed}) {attributes}"
    return f"{HEADER.format(target=target)}\n{before}\n{entry}\n{{{REGISTERS}\n{code}\n ret;\n}}\n"


def kernel(code: str, parameters: Sequence[str] = (), **options: str) -> Module:
    return Module(text(code, parameters, **options))


def launch(
    module: Module, args: Sequence[Any], threads: int = 32, grid: Any = 1, shared: int = 0, **options: Any
) -> Launch:
    return module.launch("k", grid, threads, shared, args, **options)


def evaluate(
    code: str,
    inputs: Sequence[np.ndarray],
    out: str = "b32",
    *,
    into: type = np.uint32,
    target: str = "sm_80",
    before: str = "",
) -> np.ndarray:
    """Runs `code` once per element. Input j is in %a{j}, the result is left in %d; registers of 16 bits are .b16."""
    count = len(inputs[0])
    threads = max(32, count)
    size = {2: "b16", 4: "b32", 8: "b64"}
    lines = ["mov.u32 %t, %tid.x;", f"setp.ge.u32 %q, %t, {count};", "@%q exit;"]
    declared = [".reg .pred %q; .reg .b32 %t; .reg .b64 %addr, %base;", f".reg .{out} %d;"]
    for j, x in enumerate(inputs):
        kind = size[x.dtype.itemsize]
        kind = f"f{x.dtype.itemsize * 8}" if x.dtype.kind == "f" and x.dtype.itemsize > 2 else kind
        declared.append(f".reg .{kind} %a{j};")
        lines += [
            f"ld.param.b64 %base, [p{j}];",
            f"mad.wide.u32 %addr, %t, {x.dtype.itemsize}, %base;",
            f"ld.global.{kind} %a{j}, [%addr];",
        ]
    lines += [
        code,
        f"ld.param.b64 %base, [p{len(inputs)}];",
        f"mad.wide.u32 %addr, %t, {WIDTH[out]}, %base;",
        f"st.global.{out} [%addr], %d;",
    ]
    module = kernel("\n".join([*declared, *lines]), ["u64"] * (len(inputs) + 1), target=target, before=before)
    result = np.zeros(count, into)
    launch(module, [*inputs, result], threads)
    return result
