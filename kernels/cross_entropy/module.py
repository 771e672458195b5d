"""`LinearCrossEntropy`: the projection to the vocabulary and its loss as one module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hotloop.kernels.cross_entropy.linear import linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with a projection weight that the module owns, or shares with an embedding.

    A weight that is a parameter of this module is gathered by FSDP2's hooks around `forward`; one that is passed to a
    loss function is not. `tied_weight`: a parameter of at least `num_classes` rows to share; rows beyond `num_classes`
    (a vocabulary padded for speed) never enter the softmax. All other arguments are `linear_cross_entropy`'s. A weight
    of its own is initialised as `nn.Linear`'s.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        tied_weight: nn.Parameter | None = None,  # (at least num_classes, in_features)
        weight: Tensor | None = None,  # (num_classes,) class weights
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        shift: bool = False,
        schedule: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if tied_weight is not None:
            rows, width = tied_weight.shape
            if rows < num_classes or width != in_features:
                raise ValueError(
                    f"tied_weight has shape {tuple(tied_weight.shape)}: expected ({num_classes} or more, {in_features})"
                )
            device, dtype = tied_weight.device, tied_weight.dtype
        self.in_features, self.num_classes = in_features, num_classes
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.shift, self.schedule = shift, schedule
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
            nn.init.uniform_(tied_weight, -bound, bound)
        self.linear_weight = tied_weight
        self.linear_bias: nn.Parameter | None = None
        if bias:
            self.linear_bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
            nn.init.uniform_(self.linear_bias, -bound, bound)
        self.weight: Tensor | None
        self.register_buffer("weight", weight)

    def forward(
        self,
        input: Tensor,  # (*, D)
        target: Tensor,  # (*)
        *,
        token_weight: Tensor | None = None,  # (*)
        normalizer: Tensor | float | None = None,  # ()
        max_valid: int | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            input,
            self._rows(),
            target,
            linear_bias=self.linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            shift=self.shift,
            normalizer=normalizer,
            max_valid=max_valid,
            schedule=self.schedule,
        )

    def logits(self, input: Tensor) -> Tensor:  # (*, D) -> (*, V)
        """The logits whose softmax the loss uses."""
        x = self.logit_scale * nn.functional.linear(input, self._rows(), self.linear_bias)
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def _rows(self) -> Tensor:
        w = self.linear_weight
        return w if w.shape[0] == self.num_classes else w[: self.num_classes]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.linear_bias is not None}"
