"""What a probe found, what it says in words, and what it recommends: weights only where their gain is not chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rest_rl.probe.rules import NO_REASONING, candidate_rules
from rest_rl.probe.variance import Estimate
from rest_rl.response import NUM_REGIONS

SIGNIFICANT = 2.0
"""Standard errors that a figure must be from 0 to be read."""
SIGNIFICANT_FOR_BEST = 2.5
"""The same for the most striking of several: at a one-sided 5 % Bonferroni's would be 2.33 for 5, 2.39 for 6."""
MIN_USEFUL_GAIN = 0.05
"""A gain per step of 5 % is what a 5 % larger learning rate gives as well; runs of this project could not tell less."""
MAX_NAMED_REGIONS = 3
NO_SPREAD_LIMIT, TRUNCATED_LIMIT, DOMINANT_LIMIT = 0.5, 0.1, 0.25
"""Shares from which on a lack of spread, cut responses and a single prompt's gradient are worth a word."""
FORMAT_NEVER_MET = "the format is never met (S_format is 0 for every response)"
FORMAT_REMEDY = "check --format, or warm-start the model with `rest-rl sft` on such calls"
Sureness = Literal["likely", "unsure", "not measurable"]


class SampledTokens(NamedTuple):
    """All sampled tokens, those of each prompt one after the other."""

    prompts: int
    """M"""
    prompts_T: np.ndarray
    """The position of each token's prompt."""
    regions_T: np.ndarray
    entropies_T: np.ndarray
    """Nats."""
    collisions_T: np.ndarray
    """1 - sum_v p_v²."""

    def sums(self, values_T: np.ndarray) -> np.ndarray:
        """Sums by prompt and region: float64 (M, R)."""
        cells_T = self.prompts_T * NUM_REGIONS + self.regions_T
        return np.bincount(cells_T, weights=values_T, minlength=self.prompts * NUM_REGIONS).reshape(-1, NUM_REGIONS)


class TokenFacts(NamedTuple):
    """What the tokens of a region are like: entropies in nats, `collision` the mean of 1 - sum_v p_v²."""

    number: int
    share: Estimate
    entropy: Estimate
    entropy_p90: float
    collision: Estimate


class DifferenceFacts(NamedTuple):
    """How a region differs between responses to one prompt.

    `best_worst` is how often the best and the worst response of a group differ in it, over groups with spread; `auc`
    that of "the region differs" for "the reward differs", over pairs of a group: 0.5 tells nothing, 1 everything.
    """

    best_worst: Estimate
    auc: Estimate


class GradientFacts(NamedTuple):
    """What a region contributes to the gradient g; t is the gradient of the expected reward."""

    norm_share: Estimate
    """E<g_r, g> / E|g|²: with its share of the overlaps, so that regions add up to 1."""
    signal_share: Estimate
    """<E g_r, t> / <E g, t>; regions add up to 1."""
    surplus: Estimate
    """norm_share - signal_share: above 0 where there is more noise than signal."""
    snr: Estimate
    """|E g_r|² / E|g_r - E g_r|² of one prompt; of a step of P prompts it is P times as much."""


class RegionFacts(NamedTuple):
    """Everything about one region; a region without a token is left out of a probe."""

    tokens: TokenFacts
    differences: DifferenceFacts
    gradient: GradientFacts


class RuleFacts(NamedTuple):
    """What a weight rule would do in the next step, against uniform weights on the same responses.

    `weights` is the mean weight of each region's tokens, `bounds` the least and greatest region weight before it is
    normalised (NaN for a rule that has none). `noise_ratio` is variance / |mean|² of a step's gradient (less is not by
    itself better), `cosine` that of the mean gradient to the gradient of the expected reward. `gain` is the expected
    improvement per step of given length relative to uniform weights (0.05 is 5 % more), `adam_gain` the same after
    Adam's scaling, `adam_over_shuffled` how far that is above the mean of the rules with shuffled weights.
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
    """What was sampled; shares are of responses, that without spread of groups."""

    prompts: int
    group_size: int
    no_spread: float
    exact_match: float
    s_format: float
    s_acc: float
    reward: float
    truncated: float
    mean_tokens: float


class LowEntropyFacts(NamedTuple):
    """The regions whose mean entropy is below that of all tokens, taken together; surplus is signal_share - share."""

    regions: tuple[str, ...]
    share: Estimate
    signal_share: Estimate
    surplus: Estimate


class Remark(NamedTuple):
    """A sentence of the verdict, and its kind, which stays the same whatever the words are."""

    kind: str
    text: str


class Advice(NamedTuple):
    """What to train with; rule, strength and clip range are settings of `[rest.weights]`, None for grpo."""

    preset: Literal["rest", "grpo"]
    rule: str | None
    strength: float | None
    w_min: float | None
    w_max: float | None
    sureness: Sureness
    what: str
    why: str


@dataclass(frozen=True)
class ProbeReport:
    """All figures of one model, format and set of prompts, and what follows from them."""

    format: str
    sampled: SamplingFacts
    regions: Mapping[str, RegionFacts]
    rules: tuple[RuleFacts, ...]
    """Uniform weights first."""
    sure: LowEntropyFacts
    signal: Estimate
    """<E g, t>: first-order improvement by the unweighted gradient; shares of it mean nothing unless it is above 0."""
    snr: Estimate
    """Of the unweighted gradient of one prompt."""
    heaviest: float
    """Share of the most extreme prompt in the sum of |g|²."""
    prompts_per_step: int
    """Of the training step that the rules are judged for."""
    progress: float
    coordinates: int
    """Parameters whose gradients were kept."""
    parameters: int
    tokens: SampledTokens
    """For the picture of their entropies; not in probe.json."""

    @property
    def misses_format(self) -> bool:
        """Whether no response is in the format, for which no number of prompts makes up."""
        return self.sampled.s_format == 0 and self.sampled.no_spread == 1

    @property
    def has_signal(self) -> bool:
        """Whether the first-order improvement is above 0 beyond its error."""
        return self.signal.is_above(0, SIGNIFICANT)

    @property
    def verdict(self) -> list[Remark]:
        """What stands in the way, where signal and noise are, which region decides over the reward."""
        return [*obstacle_remarks(self), *signal_remarks(self), *auc_remarks(self)]

    @property
    def advice(self) -> Advice:
        """Weights of `rest` where their gain is beyond chance and beyond that of shuffled weights, else grpo."""
        return recommend(self)


def obstacle_remarks(probe: ProbeReport) -> Iterator[Remark]:
    """What keeps any weights from working."""
    own = probe.sampled
    if probe.misses_format:
        yield Remark("no format", f"{FORMAT_NEVER_MET}, so all rewards are alike and teach nothing: {FORMAT_REMEDY}")
    elif own.no_spread >= NO_SPREAD_LIMIT:
        text = "of the groups have no spread of rewards and teach nothing: prompts of fitting difficulty matter most"
        yield Remark("no spread", f"{whole_percent(own.no_spread)} {text}")
    if own.truncated >= TRUNCATED_LIMIT:
        yield Remark("cut off", f"{whole_percent(own.truncated)} of the responses are cut off: raise --max-new-tokens")
    if probe.heaviest >= DOMINANT_LIMIT:
        text = "of the squared gradient norm and dominates the gradient figures; --norm-cap 2 scales such prompts down"
        yield Remark("one prompt", f"one prompt makes {whole_percent(probe.heaviest)} {text}")


def signal_remarks(probe: ProbeReport) -> Iterator[Remark]:
    """Which regions carry the signal, against their share of the tokens and of the gradient."""
    if probe.misses_format:
        return
    if not probe.has_signal:
        text = f"{probe.sampled.prompts} prompts cannot tell the signal from noise, so its shares mean nothing yet"
        yield Remark("no signal", f"{text}; take more --prompts")
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
        yield Remark("noise", f"the region {noisiest} holds more noise than signal: {text}")
    gain = next((rule.adam_gain for rule in probe.rules if rule.name == NO_REASONING), Estimate(math.nan, math.nan))
    if gain.is_above(0, SIGNIFICANT):
        change = percent_text(gain, "+.0f")
        text = f"without the gradient of the reasoning the next step improves by {change} under Adam"
        yield Remark("no reasoning", f"{text}; a longer run may need it all the same")
    if probe.sure.regions:
        yield low_entropy_remark(probe.sure)


def low_entropy_remark(sure: LowEntropyFacts) -> Remark:
    """Whether the regions of low entropy carry more signal than tokens, which is what ResT builds on."""
    kind, against = "sure regions alike", "which may well be their share"
    if sure.surplus.is_above(0, SIGNIFICANT):
        kind, against = "sure regions above", "more than their share, as ResT supposes"
    elif Estimate(-sure.surplus.value, sure.surplus.error).is_above(0, SIGNIFICANT):
        kind, against = "sure regions below", "less than their share, against what ResT supposes"
    carried = f"{percent_text(sure.signal_share)} of the signal in {whole_percent(sure.share.value)} of the tokens"
    return Remark(kind, f"the regions of low entropy ({', '.join(sure.regions)}) carry {carried}, {against}")


def auc_remarks(probe: ProbeReport) -> Iterator[Remark]:
    """Which region's differences go with differences in reward."""
    known = {label: facts.differences.auc for label, facts in probe.regions.items()}
    known = {label: auc for label, auc in known.items() if auc.is_above(0.5, SIGNIFICANT)}
    if known:
        label, auc = max(known.items(), key=lambda item: item[1].value)
        text = f"a difference in the region {label} tells best of a difference in reward"
        yield Remark("telling", f"{text} (AUC {auc.value:.2f} ± {auc.error:.2f})")


def recommend(probe: ProbeReport) -> Advice:
    """See `ProbeReport.advice`."""
    if probe.misses_format:
        return recommend_uniform("not measurable", f"{FORMAT_NEVER_MET}; {FORMAT_REMEDY}")
    if not probe.has_signal:
        return recommend_uniform(
            "not measurable", f"{probe.sampled.prompts} prompts cannot tell the signal from noise; take more"
        )
    named = [rule for rule in probe.rules if rule.name in candidate_rules()]
    best = max(named, key=lambda rule: rule.adam_gain.value)
    change = percent_text(best.adam_gain, "+.1f")
    found = f"under Adam, {best.name} changes the predicted improvement per step by {change}"
    shuffled = f"{percent_text(best.adam_over_shuffled, '+.1f')} against shuffled weights"
    if not math.isfinite(best.adam_gain.error):
        return recommend_uniform("not measurable", "no improvement under Adam can be told; take more --prompts")
    if best.adam_gain.is_above(MIN_USEFUL_GAIN, SIGNIFICANT_FOR_BEST):
        if best.adam_over_shuffled.is_above(0, SIGNIFICANT):
            return recommend_rest(best, f"{found}, {shuffled}")
        return recommend_uniform("unsure", f"{found}, but only {shuffled}: which region weighs more may not matter")
    if all(rule.adam_gain.value + SIGNIFICANT * rule.adam_gain.error < MIN_USEFUL_GAIN for rule in named):
        worst = min(named, key=lambda rule: rule.adam_gain.value)
        loss = Estimate(-worst.adam_gain.value, worst.adam_gain.error)
        harm = f"; {worst.name} would cost {percent_text(loss)}" if loss.is_above(0, SIGNIFICANT) else ""
        why = (
            f"weights are unlikely to help: {found}, the best of {len(named)} ways to set rest, and a gain below "
            f"{whole_percent(MIN_USEFUL_GAIN)} is not worth a setting{harm}"
        )
        return recommend_uniform("likely", why)
    return recommend_uniform("unsure", f"{found}, which may be chance; more --prompts, or `rest-rl compare`, can tell")


def recommend_uniform(sureness: Sureness, why: str) -> Advice:
    return Advice("grpo", None, None, None, None, sureness, "preset grpo", f"{why[0].upper()}{why[1:]}.")


def recommend_rest(rule: RuleFacts, why: str) -> Advice:
    """Preset `rest` by a rule, clipped to the region weights that it gives here: the prediction holds for no others."""
    config = candidate_rules()[rule.name]
    w_min = max(0.1, math.floor(10 * min(rule.bounds[0], 1)) / 10)
    w_max = math.ceil(10 * max(rule.bounds[1], 1)) / 10
    what = f"preset rest, rule {config.rule}, strength {config.strength:g}, w_min {w_min:g}, w_max {w_max:g}"
    later = "this is a prediction for the next step; `rest-rl compare` shows whether it lasts"
    why = f"{why[0].upper()}{why[1:]}; {later}."
    return Advice("rest", config.rule, config.strength, w_min, w_max, "likely", what, why)


def percent_text(estimate: Estimate, digits: str = ".0f") -> str:
    """`62 ± 5 %`; with digits `+.1f` as `+6.2 ± 0.7 %`."""
    return f"{100 * estimate.value:{digits}} ± {100 * estimate.error:{digits.removeprefix('+')}} %"


def whole_percent(share: float) -> str:
    """`14 %`."""
    return f"{100 * share:.0f} %"
