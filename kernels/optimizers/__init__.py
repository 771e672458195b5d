"""Optimizers whose step stays on the device: `from hotloop.kernels.optimizers import AdamW`."""

from hotloop.kernels.optimizers.adamw import AdamW

__all__ = ["AdamW"]
