"""Optimizers whose step stays on the device: `from hotloop.kernels.optimizers import AdamW`."""

from hotloop.kernels.optimizers.adamw import AdamW
from hotloop.kernels.optimizers.lion import Lion
from hotloop.kernels.optimizers.muon import Muon
from hotloop.kernels.optimizers.muon_polynomials import polar_express
from hotloop.kernels.optimizers.sgd import SGD

__all__ = ["SGD", "AdamW", "Lion", "Muon", "polar_express"]
