"""Test Theorem 2 (Eq. 7 of the paper): the token or region weights of smallest second moment.

Shapes: T tokens, R regions, P prompts. Among weights of mean 1, sum_t w_t² beta_t is smallest at
w_t = T / (sum_u 1 / beta_u) / beta_t, where beta_t is the second moment of token t's gradient. The theorem ignores the
products of different tokens' gradients. Its optimum is therefore judged with them, on prompts that it was not computed
from. The smallest variance is not the best progress, which `rest_rl.probe.variance` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from research.theory.estimates import jackknife, ratio_or_nan
from research.theory.token_bounds import ResponseTokens
from rest_rl.errors import UserError
from rest_rl.probe.variance import Estimate
from rest_rl.response import NUM_REGIONS, Region

NO_SPREAD_NOTE = (
    "Theorem 1 and the region form of Theorem 2 are left out: they compare one half of the pilot's prompts with the "
    "other, and in one half fewer than 2 prompts have responses with different rewards; raise --pilot, or use data "
    "that the model gets right sometimes but not always"
)


class RegionOptimum(NamedTuple):
    """Region weights of smallest second moment, computed on one half of the prompts and judged on the other."""

    weights: dict[str, dict[str, float]]
    """Weights from all prompts, by solution and region."""
    predicted: dict[str, float]
    """Second moment that the theorem predicts without advantages and cross terms, relative to uniform weights."""
    second_moment: dict[str, Estimate]
    """Second moment measured on the other half, with advantages and cross terms, relative to uniform weights."""
    cross_share: Estimate
    """Share of the cross terms between regions in the second moment under uniform weights."""


class ClosedFormCheck(NamedTuple):
    """Theorem 2 compared with a numerical minimizer, token by token: the largest differences over the responses."""

    responses: int
    entropy_excess: float
    """Minimum of sum w² beta by scipy / by the closed form - 1, with beta_t = 1 - exp(-H_t); 0 if equal."""
    gradient_excess: float
    """The same with beta_t = E_y |s_t|², measured."""


def check_closed_form(responses: Sequence[ResponseTokens], floor: float = 1e-3) -> ClosedFormCheck:
    """Compare the closed form with scipy on every response; `floor` is the smallest beta relative to the largest."""

    def worst(pick: Callable[[ResponseTokens], np.ndarray]) -> float:
        excesses = [compare_with_scipy(np.maximum(pick(one), floor * pick(one).max())) for one in responses]
        return max(excesses, key=abs, default=math.nan)

    return ClosedFormCheck(len(responses), worst(lambda one: one.bounds), worst(lambda one: one.expected_T))


def compare_with_scipy(betas_T: np.ndarray) -> float:
    # The result is at least 0 if the closed form is the minimum.
    shares_T = np.full(len(betas_T), 1 / len(betas_T))
    # Token form: equal shares and a diagonal C.
    ours, theirs = (
        float(w_T**2 @ betas_T) for w_T in (solve_closed_form(betas_T), solve_numerically(np.diag(betas_T), shares_T))
    )
    return theirs / ours - 1


def solve_closed_form(betas_T: np.ndarray, shares_T: np.ndarray | None = None) -> np.ndarray:
    """Return the weights of Theorem 2, w_t = T / (sum_u 1 / beta_u) / beta_t.

    With `shares_T` (summing to 1) the constraint is sum share w = 1, and w is proportional to share / beta. This is the
    region form, in which beta is the second moment of a region's part of the gradient.
    """
    if not (betas_T > 0).all():
        raise UserError(f"the smallest beta is {betas_T.min()}", "positive betas", "floor the betas of certain tokens")
    shares_T = np.full(len(betas_T), 1 / len(betas_T)) if shares_T is None else shares_T
    raw_T = shares_T / betas_T
    return raw_T / (shares_T @ raw_T)


def solve_numerically(moments_RR: np.ndarray, shares_R: np.ndarray) -> np.ndarray:
    """Return the weights w >= 0 that minimize w'Cw under sum share w = 1, by scipy's SLSQP; C is `moments_RR`."""
    # Dividing by the trace brings the objective to order 1, which SLSQP's absolute tolerance `ftol` assumes. A diagonal
    # C is the case that the closed form solves.
    scale = float(np.trace(moments_RR)) or 1.0
    found = minimize(
        lambda w: float(w @ moments_RR @ w) / scale,
        np.ones(len(shares_R)),
        jac=lambda w: 2 * moments_RR @ w / scale,
        bounds=[(0, None)] * len(shares_R),
        constraints={"type": "eq", "fun": lambda w: float(shares_R @ w) - 1, "jac": lambda _: shares_R},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    return found.x


def find_region_optimum(responses: Sequence[ResponseTokens], uncertainty_floor: float = 1e-3) -> RegionOptimum | None:
    """Judge the closed form, the measured optimum and the entropy rule by region, each on prompts it was not fitted to.

    Return None if fewer than 2 prompts of a half have a response with a nonzero advantage.
    """
    table = MomentTable.from_responses(responses, uncertainty_floor)
    if not len(table.regions):
        return None
    names = list(SOLUTIONS)
    whole = table.mean(table.prompts)
    solved = {name: SOLUTIONS[name](whole) for name in names}
    labels = [Region(int(index)).label for index in table.regions]
    return RegionOptimum(
        weights={name: dict(zip(labels, map(float, w_R), strict=True)) for name, w_R in solved.items()},
        predicted={name: whole.relative(w_R, by_theorem=True) for name, w_R in solved.items()},
        second_moment={name: table.jackknife(lambda kept, name=name: table.cross_fit(name, kept)) for name in names},
        cross_share=table.jackknife(lambda kept: table.mean(kept).cross_share),
    )


class Moments(NamedTuple):
    """Mean second moments of the regions' parts of a gradient, and what Theorem 2 computes the weights from."""

    moments_RR: np.ndarray
    """Measured second moments, with advantages and cross terms."""
    shares_R: np.ndarray
    betas_R: np.ndarray
    """sum_{t in r} E_y |s_t|² / T², without advantages and cross terms."""
    bounds_R: np.ndarray
    """Mean 1 - exp(-H)."""

    def relative(self, weights_R: np.ndarray, *, by_theorem: bool = False) -> float:
        """Return the second moment relative to uniform weights, with the weights scaled to a token mean of 1."""
        # Weights computed on one half need not have mean 1 on the other half.
        weights_R = weights_R / (self.shares_R @ weights_R)
        moments_RR = np.diag(self.betas_R) if by_theorem else self.moments_RR
        return ratio_or_nan(float(weights_R @ moments_RR @ weights_R), float(moments_RR.sum()))

    @property
    def cross_share(self) -> float:
        """Share of the products of different regions in the second moment under uniform weights."""
        return 1 - ratio_or_nan(float(np.trace(self.moments_RR)), float(self.moments_RR.sum()))


SOLUTIONS: dict[str, Callable[[Moments], np.ndarray]] = {
    "entropy rule": lambda own: 1 / own.bounds_R,
    "closed form": lambda own: solve_closed_form(own.betas_R, own.shares_R),
    "measured optimum": lambda own: solve_numerically(own.moments_RR, own.shares_R),
}


class MomentTable(NamedTuple):
    """Sums over the responses to each prompt, for the regions in which both halves of the prompts have gradients."""

    prompts: np.ndarray
    """Positions of the prompts, 0 to P - 1."""
    regions: np.ndarray
    sums_PRR: np.ndarray
    shares_PR: np.ndarray
    betas_PR: np.ndarray
    bounds_PR: np.ndarray
    tokens_PR: np.ndarray
    counts_P: np.ndarray
    floor: float

    @classmethod
    def from_responses(cls, responses: Sequence[ResponseTokens], floor: float) -> MomentTable:
        # Sums by prompt are all that halves and jackknife need: leaving a prompt out subtracts a row.
        prompts = sorted({one.prompt for one in responses})
        own = [[one for one in responses if one.prompt == prompt] for prompt in prompts]
        sums_PRR = np.array([sum(one.second_moments() for one in some) for some in own])
        odd_P = np.arange(len(prompts)) % 2 == 1  # halves by position, as in `cross_fit`
        live_PR = np.diagonal(sums_PRR, axis1=1, axis2=2) > 0
        # At least two prompts of each half, so that one remains when the jackknife leaves one out.
        regions = np.flatnonzero((live_PR[odd_P].sum(0) >= 2) & (live_PR[~odd_P].sum(0) >= 2))
        bins = [[np.bincount(one.regions_T, minlength=NUM_REGIONS) for one in some] for some in own]
        betas = [
            [np.bincount(one.regions_T, one.expected_T, NUM_REGIONS) / len(one.regions_T) ** 2 for one in some]
            for some in own
        ]
        bounds = [[np.bincount(one.regions_T, one.bounds, NUM_REGIONS) for one in some] for some in own]
        return cls(
            np.arange(len(prompts)),
            regions,
            sums_PRR[:, regions][:, :, regions],
            np.array([sum(one.shares() for one in some) for some in own])[:, regions],
            np.array([sum(some) for some in betas])[:, regions],
            np.array([sum(some) for some in bounds])[:, regions],
            np.array([sum(some) for some in bins])[:, regions],
            np.array([len(some) for some in own]),
            floor,
        )

    def mean(self, kept: np.ndarray) -> Moments:
        """Return the mean over all responses to the prompts at the positions `kept`."""
        count = self.counts_P[kept].sum()
        # A floor for regions whose tokens are all certain: the entropy rule divides by the bound.
        bounds_R = self.bounds_PR[kept].sum(0) / np.maximum(self.tokens_PR[kept].sum(0), 1)
        shares_R = self.shares_PR[kept].sum(0) / count
        betas_R = self.betas_PR[kept].sum(0) / count
        return Moments(self.sums_PRR[kept].sum(0) / count, shares_R, betas_R, np.maximum(bounds_R, self.floor))

    def cross_fit(self, name: str, kept: np.ndarray) -> float:
        """Return the second moment of solution `name` relative to uniform weights, cross-fitted between halves."""
        # Judged on its own half, a solution fitted to noise would always look better than uniform weights.
        halves = [self.mean(kept[kept % 2 == parity]) for parity in (0, 1)]
        return sum(halves[1 - i].relative(SOLUTIONS[name](halves[i])) for i in (0, 1)) / 2

    def jackknife(self, statistic: Callable[[np.ndarray], float]) -> Estimate:
        return jackknife(len(self.prompts), statistic)
