"""Results of a probe, its verdict in words, and its recommendation: weights only if their gain is significant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rest_rl.probe.rules import NO_REASONING, candidate_rules
from rest_rl.probe.variance import Estimate
from rest_rl.report.diagnosis.rollouts import MAX_FAILED_SHARE, MAX_LIMITED_SHARE, MIN_CALL_RATE
from rest_rl.response import NUM_REGIONS

SIGNIFICANT = 2.0
"""Standard errors from 0 at which a figure counts as significant."""
# Bonferroni at a one-sided 5 % requires 2.33 standard errors for the best of 5, 2.39 for the best of 6.
SIGNIFICANT_FOR_BEST = 2.5
"""Standard errors for the best of several figures."""
# A 5 % larger learning rate gains as much per step, and training runs of this size cannot resolve less.
MIN_USEFUL_GAIN = 0.05
"""Gain per step below which weights are not recommended."""
MAX_NAMED_REGIONS = 3
NO_SPREAD_LIMIT, TRUNCATED_LIMIT, DOMINANT_LIMIT = 0.5, 0.1, 0.25
"""Minimum shares of groups without spread, truncated responses and one prompt's gradient that the verdict reports."""
FORMAT_NEVER_MET = "no response is in the format (S_format is always 0)"
FORMAT_REMEDY = "check --format, or warm-start the model with `rest-rl sft` on calls in this format"
Sureness = Literal["likely", "unsure", "not measurable"]


class SampledTokens(NamedTuple):
    """All sampled tokens, prompt by prompt."""

    prompts: int
    """Number of prompts M."""
    prompts_T: np.ndarray
    """Index of each token's prompt."""
    regions_T: np.ndarray
    entropies_T: np.ndarray
    """Nats."""
    collisions_T: np.ndarray
    """1 - sum_v p_v²."""

    def sums(self, values_T: np.ndarray) -> np.ndarray:
        """Return the sum of the values of each prompt and region. Shape (M, R), M prompts and R regions, float64."""
        # One bin per pair of prompt and region.
        cells_T = self.prompts_T * NUM_REGIONS + self.regions_T
        return np.bincount(cells_T, weights=values_T, minlength=self.prompts * NUM_REGIONS).reshape(-1, NUM_REGIONS)


class TokenFacts(NamedTuple):
    """Statistics of the tokens of a region: entropies in nats; `collision` is the mean of 1 - sum_v p_v²."""

    number: int
    share: Estimate
    entropy: Estimate
    entropy_p90: float
    collision: Estimate


class DifferenceFacts(NamedTuple):
    """How a region differs between responses to one prompt.

    `best_worst` is how often the best and the worst response of a group differ in the region, over groups with unequal
    rewards. `auc` is the area under the curve of "the region differs" as a predictor of "the reward differs", over
    pairs within a group: 0.5 is chance, 1 is perfect.
    """

    best_worst: Estimate
    auc: Estimate


class GradientFacts(NamedTuple):
    """Contribution g_r of a region r to the policy gradient g; t is the gradient of the expected reward."""

    norm_share: Estimate
    """E<g_r, g> / E|g|², which includes half of each overlap; the regions add up to 1."""
    signal_share: Estimate
    """<E g_r, t> / <E g, t>; the regions add up to 1."""
    surplus: Estimate
    """norm_share - signal_share: above 0 if the region has more noise than signal."""
    snr: Estimate
    """|E g_r|² / E|g_r - E g_r|² of one prompt; P times as large for a step of P prompts."""


class RegionFacts(NamedTuple):
    """All statistics of one region; regions without tokens have none."""

    tokens: TokenFacts
    differences: DifferenceFacts
    gradient: GradientFacts


class RuleFacts(NamedTuple):
    """Predicted effect of a weight rule in the next step, compared with uniform weights on the same responses.

    `weights` is the mean weight of each region's tokens; `bounds` are the smallest and largest region weight before
    normalization (NaN for a rule without region weights). `noise_ratio` is variance / |mean|² of a step's gradient;
    less is not better by itself. `cosine` is between the mean gradient and the gradient of the expected reward. `gain`
    is the expected improvement per step of fixed length relative to uniform weights (0.05 is 5 % more), `adam_gain` the
    same after Adam's scaling, and `adam_over_shuffled` its difference from the mean of the shuffled rules.
    """

    name: str
    weights: Mapping[str, float]
    bounds: tuple[float, float]
    noise_ratio: Estimate
    cosine: Estimate
    gain: Estimate
    adam_gain: Estimate
    adam_over_shuffled: Estimate


class SamplingFacts(NamedTuple):
    """Shares and means over the sampled responses; `no_spread` is the share of groups whose rewards are all equal."""

    prompts: int
    group_size: int
    no_spread: float
    exact_match: float
    s_format: float
    s_acc: float
    reward: float
    truncated: float
    mean_tokens: float


class EnvironmentFacts(NamedTuple):
    """Means over the rollouts in an environment; `call_rate`, `turn_limit` and `failed` are shares of the rollouts."""

    name: str
    credit: str
    """How rewards are credited to turns."""
    success: float
    turns: float
    calls: float
    call_rate: float
    turn_limit: float
    failed: float


class LowEntropyFacts(NamedTuple):
    """Regions with a mean entropy below the overall mean: their share of the tokens and of the signal."""

    regions: tuple[str, ...]
    share: Estimate
    signal_share: Estimate
    surplus: Estimate
    """signal_share - share."""


class Remark(NamedTuple):
    """A sentence of the verdict and its kind, a stable identifier."""

    kind: str
    text: str


class Advice(NamedTuple):
    """The recommended preset and, except for `grpo`, its settings in `[rest.weights]`, with reasons."""

    preset: Literal["rest", "rest_live", "grpo"]
    rule: str | None
    strength: float | None
    w_min: float | None
    w_max: float | None
    sureness: Sureness
    what: str
    why: str


@dataclass(frozen=True)
class ProbeReport:
    """All results for one model, format and set of prompts, with the verdict and the recommendation."""

    format: str
    sampled: SamplingFacts
    regions: Mapping[str, RegionFacts]
    rules: tuple[RuleFacts, ...]
    """Uniform weights first."""
    sure: LowEntropyFacts
    signal: Estimate
    """<E g, t>: first-order improvement by the unweighted gradient; its shares are meaningless unless it is above 0."""
    snr: Estimate
    """SNR of the unweighted gradient of one prompt."""
    heaviest: float
    """Largest share of one prompt in the sum of |g|²."""
    prompts_per_step: int
    """Prompts in the training step for which the effect of the rules is predicted."""
    progress: float
    coordinates: int
    """Parameters whose gradients were kept."""
    parameters: int
    """Parameters that training would change: of an adapter, or all."""
    tokens: SampledTokens
    """For the plot of the entropies; not in probe.json."""
    environment: EnvironmentFacts | None = None
    """None for dialogues."""

    @property
    def misses_format(self) -> bool:
        """Whether no response is in the format, in which case more prompts would not help."""
        return self.sampled.s_format == 0 and self.sampled.no_spread == 1

    @property
    def has_signal(self) -> bool:
        """Whether `signal` is significantly above 0."""
        return self.signal.is_above(0, SIGNIFICANT)

    @property
    def verdict(self) -> list[Remark]:
        """Remarks on obstacles, on where signal and noise are, and on the region that best predicts the reward."""
        return [*obstacle_remarks(self), *signal_remarks(self), *auc_remarks(self)]

    @property
    def advice(self) -> Advice:
        """The recommendation: weights whose gain is significant and exceeds that of shuffled weights, else `grpo`."""
        return recommend(self)


def obstacle_remarks(probe: ProbeReport) -> Iterator[Remark]:
    own = probe.sampled
    if probe.environment is not None:
        yield from environment_remarks(probe.environment)
    if probe.misses_format:
        yield Remark(
            "no format", f"{FORMAT_NEVER_MET}, so all rewards are equal and no training signal exists: {FORMAT_REMEDY}"
        )
    elif own.no_spread >= NO_SPREAD_LIMIT:
        text = "of the groups have equal rewards and therefore no gradient: choose prompts of suitable difficulty first"
        yield Remark("no spread", f"{whole_percent(own.no_spread)} {text}")
    if own.truncated >= TRUNCATED_LIMIT:
        yield Remark("cut off", f"{whole_percent(own.truncated)} of the responses are cut off: raise --max-new-tokens")
    if probe.heaviest >= DOMINANT_LIMIT:
        text = "of the squared gradient norm and dominates the gradient figures: --norm-cap 2 scales such prompts down"
        yield Remark("one prompt", f"one prompt contributes {whole_percent(probe.heaviest)} {text}")


def environment_remarks(own: EnvironmentFacts) -> Iterator[Remark]:
    # The limits are those of the diagnosis of a run.
    if own.failed > MAX_FAILED_SHARE:
        text = "of the rollouts failed in the environment, so that their final reward is 0: run rest-rl env check"
        yield Remark("failed", f"{whole_percent(own.failed)} {text}")
    if own.turn_limit > MAX_LIMITED_SHARE:
        text = "of the rollouts reached the limit of turns: raise env.turns, or train on whole dialogues first"
        yield Remark("turn limit", f"{whole_percent(own.turn_limit)} {text}")
    if own.call_rate < MIN_CALL_RATE:
        text = "of the rollouts call a tool: check --format, or train on whole dialogues first"
        yield Remark("no calls", f"{whole_percent(own.call_rate)} {text}")


def signal_remarks(probe: ProbeReport) -> Iterator[Remark]:
    if probe.misses_format:
        return
    if not probe.has_signal:
        text = (
            f"{probe.sampled.prompts} prompts cannot distinguish the signal from noise, so its shares are meaningless"
        )
        yield Remark("no signal", f"{text}: increase --prompts")
        return
    ranked = sorted(probe.regions.items(), key=lambda item: -item[1].gradient.signal_share.value)
    for label, (tokens, _, gradient) in ranked[:MAX_NAMED_REGIONS]:
        if gradient.signal_share.is_above(0, SIGNIFICANT):
            yield Remark(
                "signal",
                f"the region {label} carries {percent_text(gradient.signal_share)} of the reward signal in "
                f"{whole_percent(tokens.share.value)} of the tokens, and {percent_text(gradient.norm_share)} of the "
                "squared gradient norm",
            )
    noisiest, own = max(
        ((label, facts.gradient) for label, facts in probe.regions.items()), key=lambda item: item[1].surplus.value
    )
    if own.surplus.is_above(0, SIGNIFICANT_FOR_BEST):
        norm, signal = percent_text(own.norm_share), percent_text(own.signal_share)
        text = f"{norm} of the squared gradient norm, {signal} of the signal"
        yield Remark("noise", f"the region {noisiest} contains more noise than signal: {text}")
    gain = next((rule.adam_gain for rule in probe.rules if rule.name == NO_REASONING), Estimate(math.nan, math.nan))
    if gain.is_above(0, SIGNIFICANT):
        change = percent_text(gain, "+.0f")
        text = f"without the gradient of the reasoning, the predicted improvement under Adam changes by {change}"
        yield Remark("no reasoning", f"{text}; a longer run may still need that gradient")
    if probe.sure.regions:
        yield low_entropy_remark(probe.sure)


def low_entropy_remark(sure: LowEntropyFacts) -> Remark:
    kind, comparison = "sure regions alike", "not distinguishable from their share of the tokens"
    if sure.surplus.is_above(0, SIGNIFICANT):
        kind, comparison = "sure regions above", "more than their share, as ResT assumes"
    elif Estimate(-sure.surplus.value, sure.surplus.error).is_above(0, SIGNIFICANT):
        kind, comparison = "sure regions below", "less than their share, contrary to what ResT assumes"
    carried = f"{percent_text(sure.signal_share)} of the signal in {whole_percent(sure.share.value)} of the tokens"
    return Remark(kind, f"the low-entropy regions ({', '.join(sure.regions)}) carry {carried}: {comparison}")


def auc_remarks(probe: ProbeReport) -> Iterator[Remark]:
    known = {label: facts.differences.auc for label, facts in probe.regions.items()}
    known = {label: auc for label, auc in known.items() if auc.is_above(0.5, SIGNIFICANT)}
    if known:
        label, auc = max(known.items(), key=lambda item: item[1].value)
        text = f"a difference in the region {label} best predicts a difference in reward"
        yield Remark("telling", f"{text} (AUC {auc.value:.2f} ± {auc.error:.2f})")


def recommend(probe: ProbeReport) -> Advice:
    # From hopeless to decided: no format, no signal, no figure, a significant gain, a significant lack of gain, unsure.
    if probe.misses_format:
        return recommend_uniform("not measurable", f"{FORMAT_NEVER_MET}; {FORMAT_REMEDY}")
    if not probe.has_signal:
        return recommend_uniform(
            "not measurable", f"{probe.sampled.prompts} prompts cannot distinguish the signal from noise; add more"
        )
    named = [rule for rule in probe.rules if rule.name in candidate_rules()]
    best = max(named, key=lambda rule: rule.adam_gain.value)
    change = percent_text(best.adam_gain, "+.1f")
    result = f"under Adam, {best.name} changes the predicted improvement per step by {change}"
    shuffled = f"{percent_text(best.adam_over_shuffled, '+.1f')} compared with shuffled weights"
    if not math.isfinite(best.adam_gain.error):
        return recommend_uniform("not measurable", "the improvement under Adam is undetermined; increase --prompts")
    if best.adam_gain.is_above(MIN_USEFUL_GAIN, SIGNIFICANT_FOR_BEST):
        # A gain that shuffled weights have too comes from unequal weights as such, not from the choice of regions.
        if best.adam_over_shuffled.is_above(0, SIGNIFICANT):
            return recommend_rest(best, f"{result}, {shuffled}")
        return recommend_uniform("unsure", f"{result}, but only {shuffled}: which region gets more may not matter")
    # "Unlikely to help" needs an upper bound below the threshold for every candidate, not only for the best.
    if all(rule.adam_gain.value + SIGNIFICANT * rule.adam_gain.error < MIN_USEFUL_GAIN for rule in named):
        worst = min(named, key=lambda rule: rule.adam_gain.value)
        loss = Estimate(-worst.adam_gain.value, worst.adam_gain.error)
        harm = f"; {worst.name} would cost {percent_text(loss)}" if loss.is_above(0, SIGNIFICANT) else ""
        why = (
            f"weights are unlikely to help: {result}, the best of {len(named)} candidates, and a gain below "
            f"{whole_percent(MIN_USEFUL_GAIN)} does not justify them{harm}"
        )
        return recommend_uniform("likely", why)
    remedy = "increase --prompts, or train both with `rest-rl compare`"
    return recommend_uniform("unsure", f"{result}, which may be chance; {remedy}")


def recommend_uniform(sureness: Sureness, why: str) -> Advice:
    return Advice("grpo", None, None, None, None, sureness, "preset grpo", f"{why[0].upper()}{why[1:]}.")


def recommend_rest(rule: RuleFacts, why: str) -> Advice:
    # The prediction covers only the weights that the rule gives to these tokens. Later in training the entropies move,
    # and without the clip range the weights would leave what was measured.
    config = candidate_rules()[rule.name]
    w_min, w_max, preset = config.w_min, config.w_max, "rest"
    if rule.name != preset:
        w_min = max(0.1, math.floor(10 * min(rule.bounds[0], 1)) / 10)
        w_max, preset = math.ceil(10 * max(rule.bounds[1], 1)) / 10, "rest_live"
    what = f"preset {preset}, rule {config.rule}, strength {config.strength:g}, w_min {w_min:g}, w_max {w_max:g}"
    later = "this is a prediction for the next step; `rest-rl compare` shows whether it lasts"
    why = f"{why[0].upper()}{why[1:]}; {later}."
    return Advice(preset, config.rule, config.strength, w_min, w_max, "likely", what, why)


def percent_text(estimate: Estimate, digits: str = ".0f") -> str:
    """Return `62 ± 5 %`, or `+6.2 ± 0.7 %` for digits `+.1f`."""
    return f"{100 * estimate.value:{digits}} ± {100 * estimate.error:{digits.removeprefix('+')}} %"


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"
