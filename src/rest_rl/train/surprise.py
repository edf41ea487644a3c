"""Whether responses were drawn from the distribution that the loss computes gradients for, at no forward pass.

A token drawn from p has an expected surprise -log p(token) equal to the entropy of p. So over a response the surprises
minus the entropies have mean 0 (they are a martingale, wherever it stops) if the sampler and the loss agree, whatever
made the tokens: `generate`, vLLM, a server. A sampler at temperature 1 + d is off by d times the variance of log p in
first order; top-p, top-k, stale weights, another precision or another template show as well.

Shapes: B responses, T completion tokens. Nats throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SUMS = 4
"""Numbers that `surprise_sums` returns; they add up over micro-batches and processes."""


def surprise_sums(logps_BT: Tensor, entropies_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Tokens, entropy, excess surprise -log p - H, and the excess of each response squared, summed: float64 (4,)."""
    mask_BT = mask_BT.to(torch.float64)
    entropies_BT = entropies_BT.double().where(mask_BT > 0, 0.0)
    excess_B = (-logps_BT.double()).where(mask_BT > 0, 0.0).sum(-1) - entropies_BT.sum(-1)
    return torch.stack([mask_BT.sum(), entropies_BT.sum(), excess_B.sum(), excess_B.square().sum()])


def surprise_metrics(sums_4: Tensor) -> dict[str, float]:
    """Excess surprise per token with its standard error, and the entropy it was measured over; empty without tokens.

    The standard error is sqrt(sum_i D_i^2) / tokens, D_i the excess of response i: its mean under agreement is known.
    `nats` says how much chance was seen: of 10 nats hardly any token can have been surprising.
    """
    tokens, nats, excess, squares = sums_4.tolist()
    if tokens == 0:
        return {}
    return {
        "rest/surprise/excess": excess / tokens,
        "rest/surprise/error": math.sqrt(squares) / tokens if squares >= 0 else math.nan,
        "rest/surprise/nats": nats,
    }
