"""The compiled code, where it was built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why there is no hotloop.kernels._C, or None."""
    try:
        loaded()
    except ImportError as error:
        return f"needs the compiled extension, which is missing ({error}): `hotloop doctor` says how to build it"
    return None


def loaded() -> Any:
    """hotloop.kernels._C."""
    return import_module("hotloop.kernels._C")
