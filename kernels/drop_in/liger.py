"""Loss modules of Liger-Kernel (0.8) by their own names, signatures and values.

Where Liger's value differs from ours Liger's is given: it adds z-loss over the number of rows, whatever the class
weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hotloop.kernels.cross_entropy.linear import linear_cross_entropy as _linear
from hotloop.kernels.cross_entropy.linear import linear_cross_entropy_stats
from hotloop.kernels.cross_entropy.op import cross_entropy as _logits
from hotloop.kernels.drop_in.torch_functional import total_weight


class CrossEntropyOutput(NamedTuple):
    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None
    predicted_tokens: Tensor | None


class LigerCrossEntropyLoss(nn.Module):
    """Liger's module of this name. What it can return besides the loss costs a pass of PyTorch's over the logits."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        self.weight, self.ignore_index, self.lse_square_scale = weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        apart = self.weight is not None and self.lse_square_scale != 0 and self.reduction == "mean"
        loss = _logits(
            _input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=0.0 if apart else self.lse_square_scale, softcap=self.softcap,
        )  # fmt: skip
        asked = self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        if not (apart or asked):
            return loss.to(_input.dtype)
        valid = target != self.ignore_index
        count = valid.sum().clamp(min=1)
        x = _input.float()
        x = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
        z_rows = None
        if apart or self.return_z_loss:
            z_rows = torch.where(valid, self.lse_square_scale * x.logsumexp(-1).square(), 0.0)
            z_rows = z_rows / count if self.reduction == "mean" else z_rows
        if apart:
            assert z_rows is not None
            loss = loss + z_rows.sum()
        if not asked:
            return loss.to(_input.dtype)
        predicted = torch.where(valid, x.detach().argmax(-1), -1)
        return _liger_output(self, loss.to(_input.dtype), z_rows, predicted, target, valid)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Liger's module of this name. Gradients are accumulated in fp32 whatever `accum_dtype` says."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy, self.return_predicted_tokens = return_token_accuracy, return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        options: dict[str, Any] = {
            "linear_bias": bias, "weight": self.ce_weight, "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing, "softcap": self.softcap,
        }  # fmt: skip
        asked = self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        apart = self.ce_weight is not None and self.lse_square_scale != 0 and self.reduction == "mean"
        if not (asked or apart or self.use_token_scaling):
            return _linear(
                _input, lin_weight, target, z_loss=self.lse_square_scale, reduction=self.reduction, **options
            )
        rows = linear_cross_entropy_stats(_input, lin_weight, target, reduction="none", **options)
        valid = target != self.ignore_index
        loss, z_rows = rows.loss, self.lse_square_scale * rows.lse.square()
        if self.use_token_scaling:
            share = torch.where(valid, torch.exp(-rows.nll.detach()), 0.0)
            loss, z_rows = loss * share, z_rows * share
        if self.reduction == "mean":
            total = total_weight(target, self.ce_weight, self.ignore_index)
            loss = loss / torch.where(total == 0, 1.0, total)
            z_rows = z_rows / valid.sum().clamp(min=1)
        loss = loss + z_rows
        loss = loss if self.reduction == "none" else loss.sum()
        return _liger_output(self, loss, z_rows, rows.predicted, target, valid) if asked else loss


def _liger_output(
    module: LigerCrossEntropyLoss | LigerFusedLinearCrossEntropyLoss,
    loss: Tensor,
    z_rows: Tensor | None,
    predicted: Tensor,
    target: Tensor,
    valid: Tensor,
) -> CrossEntropyOutput:
    correct = ((predicted == target) & valid).float()
    accuracy = correct if module.reduction == "none" else correct.sum() / valid.sum()
    z_loss = None if z_rows is None else z_rows.detach() if module.reduction == "none" else z_rows.detach().sum()
    return CrossEntropyOutput(
        loss,
        z_loss if module.return_z_loss else None,
        accuracy if module.return_token_accuracy else None,
        predicted if module.return_predicted_tokens else None,
    )


__all__ = ["CrossEntropyOutput", "LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss"]
