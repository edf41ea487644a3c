"""Test Lemma 1 on measured gradients: how the variance of a prompt's gradient falls with the group size G.

Shapes: n responses to one prompt (many more than a group), K group sizes. `gram_nn` contains the inner products of the
responses' gradients 1 / T_i sum_t grad log pi(y_it).

The lemma is tested in the form Var(1/G sum_i A_i g_i) = Var(A_1 g_1) / G. For advantages that do not depend on the
other responses of the group (a fixed baseline) it is an identity, and so is its estimate from random divisions: that
curve is 1 / G by construction and serves as the reference. With the group's own mean and standard deviation the lemma
is an approximation, and its error is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from research.theory.estimates import jackknife
from rest_rl.credit import group_advantages
from rest_rl.errors import UserError
from rest_rl.probe.variance import Estimate


class PromptResponses(NamedTuple):
    """Rewards of many responses to one prompt and the inner products of their gradients."""

    rewards_n: np.ndarray
    gram_nn: np.ndarray


class GroupSizeCurve(NamedTuple):
    """Variance of a prompt's gradient by group size for one kind of advantage; the log-log slope is -1 in Lemma 1."""

    advantage: str
    sizes: tuple[int, ...]
    variances: tuple[Estimate, ...]
    slope: Estimate


FIXED_BASELINE = "fixed baseline"
"""The advantage whose curve is 1 / G by construction."""
Advantages = Callable[[np.ndarray, float], np.ndarray]
"""Maps rewards (groups, G) and the mean reward of the other prompts to advantages (groups, G)."""


def subtract_fixed_baseline(rewards_kG: np.ndarray, elsewhere: float) -> np.ndarray:
    return rewards_kG - elsewhere


def subtract_leave_one_out_mean(rewards_kG: np.ndarray, _elsewhere: float) -> np.ndarray:
    size = rewards_kG.shape[1]
    return (rewards_kG - rewards_kG.mean(1, keepdims=True)) * size / (size - 1)


def standardize(rewards_kG: np.ndarray, _elsewhere: float) -> np.ndarray:
    size = rewards_kG.shape[1]
    return group_advantages(torch.from_numpy(rewards_kG.ravel()), size, "grpo").numpy().reshape(rewards_kG.shape)


ADVANTAGES: dict[str, Advantages] = {
    FIXED_BASELINE: subtract_fixed_baseline,
    "leave-one-out": subtract_leave_one_out_mean,
    "grpo": standardize,
}


def measure_group_size_curves(
    prompts: Sequence[PromptResponses], *, repeats: int = 128, seed: int = 0
) -> list[GroupSizeCurve]:
    """Return, for each kind of advantage, the variance at group sizes 2, 4, ... up to half the responses.

    Each size averages over `repeats` random divisions of the responses into groups. Errors are jackknife errors over
    prompts. UserError for fewer than 3 prompts or 8 responses.
    """
    count = min((len(one.rewards_n) for one in prompts), default=0)
    if len(prompts) < 3 or count < 8:
        raise UserError(
            f"there are {len(prompts)} prompts with {count} responses each",
            "at least 3 prompts with 8 responses",
            "sample more",
        )
    sizes = tuple(2**k for k in range(1, count.bit_length()) if 2 ** (k + 1) <= count)
    # The fixed baseline comes from the other prompts: computed from the same responses, it would not be fixed.
    rewards = np.array([one.rewards_n.mean() for one in prompts])
    elsewhere_P = (rewards.sum() - rewards) / (len(rewards) - 1)
    curves = []
    for name, advantages in ADVANTAGES.items():
        rng = np.random.default_rng(seed)  # the same divisions for every advantage
        variances_PK = np.array(
            [
                [measure_within_variance(one, size, advantages, elsewhere, repeats, rng) for size in sizes]
                for one, elsewhere in zip(prompts, elsewhere_P, strict=True)
            ]
        )
        curves.append(fit_curve(name, sizes, variances_PK))
    return curves


def measure_within_variance(
    prompt: PromptResponses,
    size: int,
    advantages: Advantages,
    elsewhere: float,
    repeats: int,
    rng: np.random.Generator,
) -> float:
    # The gradient of a group is sum_i c_i g_i with c = A / G on its members, so every squared norm is c'Kc and no
    # vector is needed. Disjoint groups are independent gradients of one prompt: their sample covariance is unbiased.
    groups = len(prompt.rewards_n) // size
    found = []
    for _ in range(repeats):
        order_kG = rng.permutation(len(prompt.rewards_n))[: groups * size].reshape(groups, size)
        weights_kn = np.zeros((groups, len(prompt.rewards_n)))
        np.put_along_axis(weights_kn, order_kG, advantages(prompt.rewards_n[order_kG], elsewhere) / size, axis=1)
        centred_kn = weights_kn - weights_kn.mean(0)
        found.append(np.einsum("kn,nm,km->", centred_kn, prompt.gram_nn, centred_kn) / (groups - 1))
    return float(np.mean(found))


def fit_curve(name: str, sizes: tuple[int, ...], variances_PK: np.ndarray) -> GroupSizeCurve:
    prompts = len(variances_PK)
    measured = tuple(
        jackknife(prompts, lambda kept, k=k: float(variances_PK[kept, k].mean())) for k in range(len(sizes))
    )
    return GroupSizeCurve(
        name, sizes, measured, jackknife(prompts, lambda kept: fit_log_log_slope(sizes, variances_PK[kept].mean(0)))
    )


def fit_log_log_slope(sizes: Sequence[int], variances_K: np.ndarray) -> float:
    """Return the least-squares slope of log variance over log size; NaN for zero variance or a single size."""
    if len(sizes) < 2 or not (variances_K > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(variances_K), 1)[0])
