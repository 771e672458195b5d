"""Cross entropy of logits, and of a projection whose logits never exist all at once.

| name                         |                                                                       |
|------------------------------|-----------------------------------------------------------------------|
| `cross_entropy`              | loss of logits                                                        |
| `linear_cross_entropy`       | loss of hidden states and a projection weight                         |
| `linear_cross_entropy_stats` | the same with nll, lse, z_loss, entropy, correct, predicted, n_valid  |
| `linear_cross_entropy_plan`  | what both schedules would hold in memory                              |
| `LinearCrossEntropy`         | the projection and its loss as a module                               |

Read `contract.py` (the formula), then `reference.py`, `platform.py` (rows of logits), `schedule.py` (chunks),
`triton_projection.py` (products that know how many rows there are), `op.py` and `linear.py` (operators and public
functions). Peers' signatures: `hotloop.kernels.drop_in`.
"""

from hotloop.kernels.cross_entropy.linear import (
    LinearCrossEntropyOutput,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)
from hotloop.kernels.cross_entropy.module import LinearCrossEntropy
from hotloop.kernels.cross_entropy.op import cross_entropy
from hotloop.kernels.cross_entropy.plan import Plan, linear_cross_entropy_plan

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "Plan",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_plan",
    "linear_cross_entropy_stats",
]
