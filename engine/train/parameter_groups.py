"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

from hotloop.engine.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: named parameters that are decayed, then those that are not.

    Decayed are matrices (two dimensions or more). Norms and biases, which have fewer, never are; nor are the weights of
    `nn.Embedding`, tied to an output projection or not, unless `config.decay_embeddings`. Frozen parameters are left
    out, tied ones come once, a group without parameters is left out. Order within a group is the model's.

    Returns dicts of "params" [(name, parameter)], "weight_decay". Raises ValueError if no parameter is trainable.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim >= 2 and (config.decay_embeddings or p not in embeddings)
        (decayed if decays else others).append((name, p))
    if not decayed and not others:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: set requires_grad on some")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
