"""A reference loss for the one-page example, the analyses and the tests; training uses the engine's loss.

Shapes: B responses, T completion tokens, V vocabulary size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["grpo", "dr_grpo", "dapo"]


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    aggregation: Aggregation = "grpo",
    max_length: int | None = None,
) -> Tensor:
    """Return the loss -aggregate(min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)), a scalar (ResT's objective).

    Args:
        logprobs_BT: Log-probability of each sampled token under the policy; the ratio r = exp(logprobs - old_logprobs).
        old_logprobs_BT: Log-probability of each sampled token under the policy that sampled it.
        advantages_BT: Advantage A of each token, already multiplied by its weight.
        mask_BT: 1 for tokens in the loss.
        epsilon_low: The ratio r is clipped to at least 1 - epsilon_low.
        epsilon_high: The ratio r is clipped to at most 1 + epsilon_high.
        aggregation: `grpo` averages over the tokens of a response, then over responses; `dapo` averages over all
            tokens; `dr_grpo` divides the sum over tokens by B * max_length. A response without tokens counts as 0.
        max_length: The constant response length in tokens by which `dr_grpo` divides.
    """
    tensors = (logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    if len({tensor.shape for tensor in tensors}) != 1 or logprobs_BT.ndim != 2:
        raise ValueError(f"shapes are {[tuple(tensor.shape) for tensor in tensors]}, expected (B, T) for all")
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"unknown aggregation {aggregation!r}, expected one of {', '.join(get_args(Aggregation))}")
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    mask_BT = mask_BT.to(losses_BT.dtype)
    # `where`, not a product: padding may have infinite or NaN log-probabilities, and 0 * inf is NaN.
    losses_BT = torch.where(mask_BT > 0, losses_BT, 0.0)
    if aggregation == "grpo":
        return (losses_BT.sum(-1) / mask_BT.sum(-1).clamp_min(1)).mean()
    if aggregation == "dapo":
        return losses_BT.sum() / mask_BT.sum().clamp_min(1)
    if max_length is None:
        raise ValueError("aggregation 'dr_grpo' needs max_length, expected the maximum response length")
    return losses_BT.sum() / (len(losses_BT) * max_length)


def token_entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy H = -sum_v p_v log p_v (nats) of each token's distribution at `temperature`. Shape (B, T)."""
    log_p_BTV = torch.log_softmax(logits_BTV / temperature, dim=-1)
    return -(log_p_BTV.exp() * log_p_BTV).sum(-1)


def collision_mass(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return 1 - sum_v p_v^2 of each token's distribution p, at most 1 - exp(-H) by ResT's Lemma 2. Shape (B, T)."""
    return 1 - torch.softmax(logits_BTV / temperature, dim=-1).square().sum(-1)
