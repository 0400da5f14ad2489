"""AdamW on rows: each row has its own step count, learning rate and right to stay as it is.

The formula is that of Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
with the bias correction of Kingma and Ba, "Adam", ICLR 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.config import OptimizerConfig


@dataclass(frozen=True)
class Rows:
    """Parameters and their optimizer state, one row each."""

    weight: Tensor
    """float32 [..., P]."""
    first: Tensor
    """First moment [..., P]."""
    second: Tensor
    """Second moment [..., P]."""
    count: Tensor
    """int64 [...]: steps that each row has made."""


def adamw(rows: Rows, grad: Tensor, lr: Tensor, update: Tensor, config: OptimizerConfig) -> Rows:
    """Make one AdamW step where `update` is true; other rows come back bit for bit as they were.

    Args:
        rows: the rows as they are.
        grad: gradients [..., P].
        lr: float32 [...]: learning rate of each row, displacement scale included.
        update: bool [...].
        config: the decay rates and the weight decay.
    """
    count = rows.count + 1
    first = torch.lerp(rows.first, grad, 1 - config.beta1)
    second = (rows.second * config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    power = count.to(torch.float64)
    correct_1 = (1 - config.beta1**power).to(grad.dtype)[..., None]
    correct_2 = (1 - config.beta2**power).to(grad.dtype)[..., None]
    size = (second / correct_2).sqrt_().add_(config.eps)
    rate = lr[..., None]
    weight = rows.weight * (1 - rate * config.weight_decay)
    weight.addcdiv_(first * (-rate / correct_1), size)
    on = update[..., None]
    return Rows(
        torch.where(on, weight, rows.weight),
        torch.where(on, first, rows.first),
        torch.where(on, second, rows.second),
        torch.where(update, count, rows.count),
    )


def clip_factor(squared_norm: Tensor, limit: float) -> Tensor:
    """Factor [L] that brings gradients of the given squared norm [L] down to `limit`."""
    if not limit:
        return torch.ones_like(squared_norm)
    return (limit / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)
