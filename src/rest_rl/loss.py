"""The reference objective, for the one-page example, the analyses and the tests; training uses the engine's own.

Shapes: B responses, T completion tokens, V vocabulary. `logprobs_BT[b, t]` is the log-probability of token t itself.
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
    """The loss to minimise: a scalar, -aggregate(min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)) (ResT's objective).

    Aggregation grpo: mean over responses of the mean over their tokens, 1/B sum_i 1/T_i sum_t; dapo: mean over all
    tokens; dr_grpo: sum over tokens divided by the constant B * max_length. Responses without tokens count as 0.
    """
    tensors = (logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    if len({tensor.shape for tensor in tensors}) != 1 or logprobs_BT.ndim != 2:
        raise ValueError(f"got shapes {[tuple(tensor.shape) for tensor in tensors]}, expected one (B, T) for all")
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"got aggregation {aggregation!r}, expected one of {', '.join(get_args(Aggregation))}")
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    mask_BT = mask_BT.to(losses_BT.dtype)
    losses_BT = torch.where(mask_BT > 0, losses_BT, 0.0)
    if aggregation == "grpo":
        return (losses_BT.sum(-1) / mask_BT.sum(-1).clamp_min(1)).mean()
    if aggregation == "dapo":
        return losses_BT.sum() / mask_BT.sum().clamp_min(1)
    if max_length is None:
        raise ValueError("aggregation 'dr_grpo' divides by a constant length; pass max_length")
    return losses_BT.sum() / (len(losses_BT) * max_length)


def token_entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """H_t = -sum_v p log p in nats of the temperature-scaled distribution: (B, T)."""
    log_p_BTV = torch.log_softmax(logits_BTV / temperature, dim=-1)
    return -(log_p_BTV.exp() * log_p_BTV).sum(-1)


def collision_mass(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - sum_v p_v^2 = E||e_y - p||^2, the exact second moment that Lemma 2 bounds by 1 - exp(-H): (B, T)."""
    return 1 - torch.softmax(logits_BTV / temperature, dim=-1).square().sum(-1)
