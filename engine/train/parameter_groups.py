"""Which parameters are trained, which are decayed, and at which share of the learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from hotloop.engine.config import FinetuneConfig, OptimizerConfig


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, finetune: FinetuneConfig | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: named parameters that are decayed, then those that are not.

    Decayed are matrices (two dimensions or more). Norms and biases, which have fewer, never are; nor are the weights of
    `nn.Embedding`, tied to an output projection or not, unless `config.decay_embeddings`. Frozen parameters are left
    out, tied ones come once, a group without parameters is left out. Order within a group is the model's.

    With `finetune.layer_decay` d, the layers and the embeddings below them have groups of their own, from the top down,
    with an "lr_scale" of d^(L + 1 - depth): depth 0 for embeddings, i + 1 for layer i of L, L + 1 for all above.

    Returns dicts of "params" [(name, parameter)], "weight_decay", "lr_scale". Raises ValueError if no parameter is
    trainable.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decay = 1.0 if finetune is None else finetune.layer_decay
    groups: dict[tuple[bool, int], list[tuple[str, nn.Parameter]]] = {}
    top = n_layers(model) + 1
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim >= 2 and (config.decay_embeddings or p not in embeddings)
        depth = top if decay == 1.0 else depth_of(name, top)
        groups.setdefault((decays, depth), []).append((name, p))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: set requires_grad on some")
    return [
        {
            "params": groups[decays, depth],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": decay ** (top - depth),
        }
        for decays, depth in sorted(groups, reverse=True)
    ]


def freeze(model: nn.Module, config: FinetuneConfig) -> None:
    """Take the gradients off what stays as it is. Raises ValueError for more layers than there are."""
    top = n_layers(model) + 1
    if config.frozen_layers > top - 1:
        raise ValueError(f"{config.frozen_layers} layers to freeze, the model has {top - 1}")
    below = config.frozen_layers or (0 if config.freeze_embeddings else -1)
    for name, p in model.named_parameters():
        if depth_of(name, top) <= below:
            p.requires_grad_(False)


def n_layers(model: nn.Module) -> int:
    return len(getattr(model, "layers", ()))


def depth_of(name: str, top: int) -> int:
    """0 for an embedding (and its norm), i + 1 for what belongs to layer i, `top` for what is above the layers."""
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 1
    return 0 if "embedding" in first else top
