"""What a probe says in plain words, and what it recommends: weights only where their predicted gain is not chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rest_rl.probe.figures import Probe, RuleFacts
from rest_rl.probe.rules import NO_REASONING, candidates
from rest_rl.probe.variance import Estimate

SURE = 2.0
"""Standard errors that a figure must be from 0 to be read."""
SURE_OF_BEST = 2.5
"""The same for the most striking of several: at a one-sided 5 % Bonferroni's would be 2.33 for 5, 2.39 for 6."""
MATTERS = 0.05
"""A gain per step of 5 % is what a 5 % larger learning rate gives as well; runs of this project could not tell less."""
NAMED = 3
"""Regions that the verdict names."""
MANY, CUT_OFF, EXTREME = 0.5, 0.1, 0.25
"""Shares from which on a lack of spread, cut responses and a single prompt's gradient are worth a word."""
NO_CALL = "the format is never met (S_format is 0 for every response)"
FORMAT_REMEDY = "check --format, or warm-start the model with `rest-rl sft` on such calls"
PHRASES = {
    "format": "the format",
    "name": "the tool name",
    "arguments": "the arguments",
    "reasoning": "the reasoning",
    "answer": "the answer",
    "other": "text that belongs to no region",
}
Sureness = Literal["likely", "unsure", "not measurable"]


class Advice(NamedTuple):
    """What to train with; rule, strength and clip range are settings of `[rest] weights`, None for grpo."""

    preset: Literal["rest", "grpo"]
    rule: str | None
    strength: float | None
    w_min: float | None
    w_max: float | None
    sureness: Sureness
    what: str
    why: str


def verdict(probe: Probe) -> list[str]:
    """Plain sentences: what stands in the way, where signal and noise are, which region decides over the reward."""
    return [*obstacles(probe), *signal_sentences(probe), *telling_sentence(probe)]


def obstacles(probe: Probe) -> Iterator[str]:
    """What keeps any weights from working."""
    own = probe.sampled
    if misses_format(probe):
        yield f"{NO_CALL}, so no reward differs and nothing teaches: {FORMAT_REMEDY}"
    elif own.no_spread >= MANY:
        yield (
            f"{whole(own.no_spread)} of the groups have no spread of rewards and teach nothing: prompts of fitting "
            "difficulty matter more than weights"
        )
    if own.truncated >= CUT_OFF:
        yield f"{whole(own.truncated)} of the responses are cut off: allow more tokens (--max-new-tokens)"
    if probe.heaviest >= EXTREME:
        yield (
            f"one prompt makes {whole(probe.heaviest)} of the squared gradient norm, and the gradient figures lean on "
            "it; --norm-cap 2 scales such prompts down"
        )


def signal_sentences(probe: Probe) -> Iterator[str]:
    """Which regions carry the signal, against their share of the tokens and of the gradient."""
    if misses_format(probe):
        return
    if not has_signal(probe):
        yield (
            f"the signal cannot be told from noise with {probe.sampled.prompts} prompts, so its shares mean nothing "
            "yet; take more --prompts"
        )
        return
    ranked = sorted(probe.regions.items(), key=lambda item: -item[1].gradient.signal_share.value)
    for label, facts in ranked[:NAMED]:
        if facts.gradient.signal_share.is_above(0, SURE):
            yield (
                f"{PHRASES[label]} {verb(label, 'carry')} {percent(facts.gradient.signal_share)} of the reward signal "
                f"in {whole(facts.tokens.share.value)} of the tokens, and {percent(facts.gradient.norm_share)} of the "
                "squared gradient norm"
            )
    yield from noise_sentences(probe)
    if probe.sure.regions:
        yield sure_sentence(probe)


def noise_sentences(probe: Probe) -> Iterator[str]:
    """The region whose gradient is noise above all, and what the step would be without that of the reasoning."""
    label = max(probe.regions, key=lambda name: probe.regions[name].gradient.surplus.value)
    own = probe.regions[label].gradient
    if own.surplus.is_above(0, SURE_OF_BEST):
        yield (
            f"more noise than signal comes from {PHRASES[label]}: {percent(own.norm_share)} of the squared gradient "
            f"norm, {percent(own.signal_share)} of the signal"
        )
    gain = next((rule.adam_gain for rule in probe.rules if rule.name == NO_REASONING), Estimate(math.nan, math.nan))
    if gain.is_above(0, SURE):
        yield (
            f"without the gradient of the reasoning the next step would improve by {percent(gain, '+.0f')} under Adam; "
            "a longer run may need it all the same"
        )


def sure_sentence(probe: Probe) -> str:
    """Whether the regions of low entropy carry more signal than tokens, which is what ResT builds on."""
    sure = probe.sure
    if sure.surplus.is_above(0, SURE):
        against = "more than their share, as ResT supposes"
    elif Estimate(-sure.surplus.value, sure.surplus.error).is_above(0, SURE):
        against = "less than their share, against what ResT supposes"
    else:
        against = "which may well be their share"
    names = ", ".join(sure.regions)
    return (
        f"the regions of low entropy ({names}) carry {percent(sure.signal_share)} of the signal in "
        f"{whole(sure.share.value)} of the tokens, {against}"
    )


def telling_sentence(probe: Probe) -> Iterator[str]:
    """Which region's differences go with differences in reward."""
    known = {label: facts.differences.auc for label, facts in probe.regions.items()}
    known = {label: auc for label, auc in known.items() if auc.is_above(0.5, SURE)}
    if known:
        label = max(known, key=lambda name: known[name].value)
        auc = known[label]
        yield (
            f"whether {PHRASES[label]} {verb(label, 'differ')} tells best whether the reward differs (AUC "
            f"{auc.value:.2f} ± {auc.error:.2f})"
        )


def misses_format(probe: Probe) -> bool:
    """Whether no response is in the format, for which no prompts of any number make up."""
    return probe.sampled.s_format == 0 and probe.sampled.no_spread == 1


def has_signal(probe: Probe) -> bool:
    """Whether the first-order improvement is above 0 beyond its error."""
    return probe.signal.is_above(0, SURE)


def advice_on(probe: Probe) -> Advice:
    """Weights of `rest` where their gain is beyond chance and beyond that of shuffled weights, else grpo."""
    rules = {rule.name: rule for rule in probe.rules}
    if misses_format(probe):
        return uniform_advice("not measurable", f"{NO_CALL}; {FORMAT_REMEDY}")
    if not has_signal(probe):
        return uniform_advice(
            "not measurable", f"with {probe.sampled.prompts} prompts the signal cannot be told from noise; take more"
        )
    named = [rules[name] for name in candidates() if name in rules]
    best = max(named, key=lambda rule: rule.adam_gain.value)
    found = f"under Adam, {best.name} changes the predicted improvement per step by {percent(best.adam_gain, '+.1f')}"
    shuffled = f"{percent(best.adam_over_shuffled, '+.1f')} against shuffled weights"
    if not math.isfinite(best.adam_gain.error):
        return uniform_advice(
            "not measurable", "the improvement under Adam cannot be told from none; take more --prompts"
        )
    if best.adam_gain.is_above(MATTERS, SURE_OF_BEST):
        if best.adam_over_shuffled.is_above(0, SURE):
            return rest_advice(best, f"{found}, {shuffled}")
        return uniform_advice("unsure", f"{found}, but only {shuffled}: which region weighs more may not matter")
    if all(rule.adam_gain.value + SURE * rule.adam_gain.error < MATTERS for rule in named):
        why = (
            f"weights are unlikely to help: {found}, the best of {len(named)} ways to set rest, and a gain below "
            f"{whole(MATTERS)} is not worth a setting{harm(named)}"
        )
        return uniform_advice("likely", why)
    return uniform_advice("unsure", f"{found}, which may be chance; more --prompts, or `rest-rl compare`, can tell")


def harm(rules: Sequence[RuleFacts]) -> str:
    """The rule that would cost most, if one certainly costs something."""
    worst = min(rules, key=lambda rule: rule.adam_gain.value)
    loss = Estimate(-worst.adam_gain.value, worst.adam_gain.error)
    return f"; {worst.name} would cost {percent(loss)}" if loss.is_above(0, SURE) else ""


def uniform_advice(sureness: Sureness, why: str) -> Advice:
    """Uniform weights."""
    return Advice("grpo", None, None, None, None, sureness, "preset grpo", f"{why[0].upper()}{why[1:]}.")


def rest_advice(rule: RuleFacts, why: str) -> Advice:
    """Preset `rest` by a rule, clipped to the region weights that it gives here: the prediction holds for no others."""
    config = candidates()[rule.name]
    w_min = max(0.1, math.floor(10 * min(rule.bounds[0], 1)) / 10)
    w_max = math.ceil(10 * max(rule.bounds[1], 1)) / 10
    what = f"preset rest, rule {config.rule}, strength {config.strength:g}, w_min {w_min:g}, w_max {w_max:g}"
    later = "it is a prediction for the next step; `rest-rl compare` shows whether it lasts"
    why = f"{why[0].upper()}{why[1:]}; {later}."
    return Advice("rest", config.rule, config.strength, w_min, w_max, "likely", what, why)


def percent(estimate: Estimate, digits: str = ".0f") -> str:
    """`62 ± 5 %`; with digits `+.1f` as `+6.2 ± 0.7 %`."""
    return f"{100 * estimate.value:{digits}} ± {100 * estimate.error:{digits.removeprefix('+')}} %"


def whole(share: float) -> str:
    """`14 %`."""
    return f"{100 * share:.0f} %"


def verb(label: str, plural: str) -> str:
    """The verb that fits a region's phrase."""
    return plural if label == "arguments" else {"carry": "carries", "differ": "differs"}[plural]
