"""The compiled code, where it was built."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def extension() -> ModuleType | None:
    """hotloop.kernels._C, or None where it was not built."""
    try:
        return import_module("hotloop.kernels._C")
    except ImportError:
        return None
