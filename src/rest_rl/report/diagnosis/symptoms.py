"""What can be wrong with a run: each symptom a function of its history that says figure, cause and remedy, or nothing.

A limit is either beyond noise, by `History.sure` standard errors, or a size at which harm begins, or both;
docs/diagnosis.md derives every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from rest_rl.report.diagnosis.causes import percent, why_cut, why_flat
from rest_rl.report.diagnosis.history import WINDOW, History, Mean, is_number
from rest_rl.report.diagnosis.settings import CURRICULUM, Settings

Kind = Literal[
    "not_finite",
    "no_spread",
    "truncated",
    "format_falls",
    "calls_fall",
    "entropy_collapses",
    "sampler_disagrees",
    "weight_at_its_clip",
    "gradient_spike",
    "exact_match_falls",
    "held_out_falls",
    "format_alone",
    "no_progress",
]
SPENT = 0.9
"""Share of the first entropy whose loss is a collapse: what is left can buy a ninth of what was gained."""
CLOSED = 0.5
"""Share of the gap to full accuracy that a spent entropy must have closed."""
MISMATCH = 0.05
"""Excess surprise as a share of the entropy: about what a temperature of 0.95 or 1.05 does."""
SEEN_NATS = 1000.0
"""Entropy of all tokens of a window from which its excess surprise can be judged: rare tokens bring some ten nats each,
so about a hundred of them were due."""
MATERIAL = 0.1
"""Share of the tokens from which a region's weight matters."""
DOMINANT = 0.75
"""Share of the second moment that one step holds when it doubles Adam's denominator: 1 / sqrt(1 - 0.75) = 2."""
ENOUGH_ROWS = 5 * WINDOW
"""Rows without progress that are worth a word."""
SKIPPED_STEPS = 16
"""Steps that float16 may skip while its loss scale falls from 2**16."""


class Finding(NamedTuple):
    """One thing that is wrong, first seen at `step` and last at `last`."""

    kind: Kind
    figure: str
    cause: str
    remedy: str
    step: int
    last: int


class Told(NamedTuple):
    """What a symptom says."""

    figure: str
    cause: str
    remedy: str


def not_finite(history: History, settings: Settings) -> Told | None:
    """A loss or gradient norm that is NaN or infinite."""
    broken = [key for key in ("loss", "grad_norm") if key in history.row and not is_number(history.row[key])]
    if not broken or (settings.is_half_precision and history.step <= SKIPPED_STEPS):
        return None
    return Told(
        f"{' and '.join(broken)} of step {history.step} is not finite",
        "numbers that overflow: steps that are too large, float16, or a model whose weights are broken already",
        f"{settings.slower}; use bf16 instead of fp16; the last checkpoint may hold the broken weights already",
    )


def no_spread(history: History, settings: Settings) -> Told | None:
    """Most groups have equal rewards throughout: they have no advantage and no gradient."""
    flat = history.now("frac_reward_zero_std")
    if flat is None or not flat.exceeds(0.5, history.sure):
        return None
    return Told(
        f"{percent(flat)} of the groups have equal rewards and so no gradient ({steps(flat)})",
        *why_flat(history, settings, flat),
    )


def truncated(history: History, settings: Settings) -> Told | None:
    """Responses hit the length limit in most groups."""
    cut = history.now("completions/clipped_ratio")
    if cut is None or not cut.exceeds(settings.most_groups, history.sure):
        return None
    return Told(
        f"{percent(cut)} of the responses hit the length limit{settings.at_limit} ({steps(cut)})",
        *why_cut(history, settings),
    )


def format_falls(history: History, settings: Settings) -> Told | None:
    """Fewer responses keep the format than did before, by enough to show in most groups."""
    now, best = history.now("rest/format"), history.best("rest/format")
    if now is None or best is None or not best.above(now, history.sure, settings.most_groups):
        return None
    cut, was_cut = (window(history, "completions/clipped_ratio", mean) for mean in (now, best))
    if cut and was_cut and cut.above(was_cut, history.sure, (best.value - now.value) / 2):
        cause = f"more of them hit the length limit ({percent(was_cut)} → {percent(cut)}), and what is cut off fails it"
        remedy = settings.longer_or_slower
    else:
        cause = "updates so large that the policy forgets what it knew, or a reward that no longer asks for format"
        remedy = f"{settings.slower}; lower rest.reward.accuracy_share_end, so that format stays worth something"
    return Told(f"format rate {change(best, now)}", cause, remedy)


def calls_fall(history: History, settings: Settings) -> Told | None:
    """Fewer responses attempt a call, accuracy has not gained by it, and broken format is not why."""
    now, best = history.now("rest/call_rate"), history.best("rest/call_rate")
    if now is None or best is None or not best.above(now, history.sure, settings.most_groups):
        return None
    accuracy, before = (window(history, "rest/accuracy", mean) for mean in (now, best))
    if (accuracy and before and accuracy.above(before, history.sure)) or format_falls(history, settings):
        return None
    gained = f", S_acc {change(before, accuracy)}" if accuracy and before else ""
    return Told(
        f"share of responses with a call {change(best, now)}{gained}",
        "a call costs more in bad format than it earns, or prompts that need none outweigh those that do",
        f"{settings.slower}; raise rest.reward.accuracy_share_start; check the share of prompts whose gold has no call "
        "(rest-rl data check)",
    )


def entropy_collapses(history: History, settings: Settings) -> Told | None:
    """Nearly all entropy is spent, and accuracy has little to show for it."""
    now, start = history.now("entropy"), history.start("entropy")
    if now is None or start is None or start.value <= 0:
        return None
    if now.value + history.sure * now.error > (1 - SPENT) * start.value:
        return None
    accuracy, before = history.now("rest/accuracy"), history.start("rest/accuracy")
    if accuracy is None or before is None or before.value >= 1:
        return None
    closed = (accuracy.value - before.value) / (1 - before.value)
    if closed >= CLOSED:
        return None
    return Told(
        f"entropy fell {start.value:.3f} → {now.value:.3f} nats a token, while S_acc went {before.value:.2f} → "
        f"{accuracy.value:.2f} ({steps(start)} → {steps(now)})",
        "the policy has settled on its answers before they were right; it no longer tries others",
        f"{settings.slower}; raise trl.epsilon_high (0.28 as in dapo) or trl.num_generations (now {settings.group}); "
        "keep trl.temperature at 1",
    )


def sampler_disagrees(history: History, settings: Settings) -> Told | None:
    """The trained policy finds the responses more or less surprising than its own samples are."""
    excess, entropy = history.now("rest/surprise/excess"), history.now("entropy")
    errors, nats = history.latest("rest/surprise/error"), history.latest("rest/surprise/nats")
    if excess is None or entropy is None or entropy.value <= 0 or not errors or sum(nats) < SEEN_NATS:
        return None
    error = math.hypot(*errors) / len(errors)
    if abs(excess.value) - history.sure * error < MISMATCH * entropy.value:
        return None
    side, share = ("less", -excess.value) if excess.value < 0 else ("more", excess.value)
    figure = (
        f"the responses are {100 * share / entropy.value:.0f} ± {100 * error / entropy.value:.0f} % {side} surprising "
        f"than the trained policy's own samples would be ({steps(excess)})"
    )
    if settings.sampling:
        changed = ", ".join(f"{name} = {value}" for name, value in settings.sampling.items())
        return Told(
            figure,
            f"{changed}: responses come from another distribution than the loss has gradients for",
            f"remove {', '.join(settings.sampling)}",
        )
    cause = "responses are sampled by other weights, in another precision, or from a changed distribution"
    remedy = "take top_p, top_k and penalties out of the model's generation_config.json; give vLLM the trainer's dtype"
    return Told(figure, cause, f"{remedy}; switch dropout off")


def weight_at_its_clip(history: History, settings: Settings) -> Told | None:
    """A region's weight has been at its clip for a whole window: it no longer follows the entropies."""
    stuck = clipped_weights(history, settings)
    if not stuck:
        return None
    figures = [
        f"{region} at {name} = {bound:g} ({100 * share:.0f} % of the tokens)" for region, name, bound, share in stuck
    ]
    figure = f"the weight of {', '.join(figures)} throughout the last {WINDOW} rows"
    strength = "" if settings.strength is None else f" (now {settings.strength:g})"
    widen = f"widen rest.weights.w_min and rest.weights.w_max, or lower rest.weights.strength{strength}"
    if settings.is_shuffled:
        return Told(
            figure, "it was dealt the weight of another region, which asks for more than the clip allows", widen
        )
    pushed = [push for region, name, _, _ in stuck if (push := curriculum_push(history, settings, region, name))]
    if pushed:
        keys = dict.fromkeys(f"rest.weights.{CURRICULUM[region][0]}" for region, _ in pushed)
        moved = ", ".join(text for _, text in pushed)
        return Told(figure, f"the curriculum has moved it there: {moved}", f"lower {' and '.join(keys)}, or {widen}")
    cause = "its entropy lies so far from that of the other tokens that the rule asks for more than the clip allows"
    return Told(figure, cause, widen)


def clipped_weights(history: History, settings: Settings) -> list[tuple[str, str, float, float]]:
    """Regions of some size whose weight was at an end of the clip for a window: label, which end, its value, share."""
    if settings.clip is None or settings.clip[0] == settings.clip[1]:
        return []
    w_min, w_max = settings.clip
    stuck = []
    for region in history.labels("rest/rule_weight/"):
        weights, share = history.latest(f"rest/rule_weight/{region}"), history.now(f"rest/share/{region}")
        if not weights or share is None or share.value < MATERIAL or min(weights) <= 0:
            continue
        if max(weights) <= w_min:
            stuck.append((region, "w_min", w_min, share.value))
        if min(weights) >= w_max:
            stuck.append((region, "w_max", w_max, share.value))
    return stuck


def curriculum_push(history: History, settings: Settings, region: str, end: str) -> tuple[str, str] | None:
    """The region and how far the curriculum has moved its weight, if without it the weight was last inside the clip.

    What the rule asks for shows only where the clip does not cut it: in the last row inside, less the shift of then.
    """
    column = history.column(f"rest/rule_weight/{region}")
    shift = settings.shift(region, history.step)
    if column is None or settings.clip is None or shift * (1 if end == "w_max" else -1) <= 0:
        return None
    w_min, w_max = settings.clip
    inside = [at for at, weight in enumerate(column.values) if w_min < weight < w_max]
    if not inside:
        return None
    ruled = column.values[inside[-1]] - settings.shift(region, column.steps[inside[-1]])
    return (
        region,
        f"{region} by {shift:+.2f} so far, from {ruled:.2f} by its entropy in step {column.steps[inside[-1]]}",
    )


def gradient_spike(history: History, settings: Settings) -> Told | None:
    """One step holds so much of Adam's second moment that the steps after it are halved."""
    column, moment = history.column("grad_norm"), history.second_moment
    if column is None or moment.share <= DOMINANT:
        return None
    median = sorted(column.values)[len(column.values) // 2]
    if not median > 0:
        return None
    now = f" (now {settings.max_norm:g})" if settings.max_norm else ""
    return Told(
        f"step {moment.step} holds {100 * moment.share:.0f} % of all squared gradient norms in Adam's average (norm "
        f"{moment.norm:.2g}, median {median:.2g})",
        "one batch with a very unlikely or very long response; Adam's steps after it are less than half as long",
        f"set trl.max_grad_norm{now} to about {3 * median:.1g}, three times the median norm",
    )


def exact_match_falls(history: History, settings: Settings) -> Told | None:
    """The reward rises while exact match falls: what is paid for is not what is wanted."""
    best, now = history.best("rest/exact_match"), history.now("rest/exact_match")
    if best is None or now is None or not best.above(now, history.sure):
        return None
    reward, before = (window(history, "reward", mean) for mean in (now, best))
    if reward is None or before is None or not reward.above(before, history.sure):
        return None
    return Told(
        f"exact match {change(best, now)}, while the reward rose {before.value:.3f} → {reward.value:.3f}",
        "the reward pays for something else than right calls, such as format or a part of the arguments",
        "read what is rewarded (rest-rl report, rest-rl score); raise rest.reward.accuracy_share_start and "
        "accuracy_share_end",
    )


def held_out_falls(history: History, settings: Settings) -> Told | None:
    """Exact match on held-out prompts falls while that of training does not: the policy learns its prompts by heart."""
    scores = [
        (row["exact_match"], row["exact_match_error"], row.get("step"))
        for row in history.evaluations
        if is_number(row.get("exact_match")) and is_number(row.get("exact_match_error"))
    ]
    training, start = history.now("rest/exact_match"), history.start("rest/exact_match")
    if len(scores) < 2 or training is None or start is None or start.above(training, history.sure):
        return None
    best, last = max(scores, key=lambda score: score[0]), scores[-1]
    if best[0] - last[0] <= history.sure * math.hypot(best[1], last[1]):
        return None
    return Told(
        f"held-out exact match {100 * best[0]:.0f} ± {100 * best[1]:.0f} % (step {best[2]}) → {100 * last[0]:.0f} ± "
        f"{100 * last[1]:.0f} % (step {last[2]}), while that of training went {percent(start)} → {percent(training)}",
        "the policy learns its training prompts by heart",
        f"more prompts or fewer epochs; take the checkpoint of step {best[2]}",
    )


def format_alone(history: History, settings: Settings) -> Told | None:
    """The reward rose by format alone, and there is no more of it to gain."""
    pairs = {key: (history.start(key), history.now(key)) for key in ("reward", "rest/format", "rest/accuracy")}
    (reward, paid), (rough, formed), (before, accuracy) = pairs.values()
    if not (reward and paid and rough and formed and before and accuracy):
        return None
    rose = paid.above(reward, history.sure) and formed.above(rough, history.sure)
    if not rose or formed.value < 1 - settings.most_groups:
        return None
    gain, error = accuracy.value - before.value, math.hypot(accuracy.error, before.error)
    if gain + history.sure * error > (formed.value - rough.value) / 2:
        return None
    return Told(
        f"the reward rose {reward.value:.3f} → {paid.value:.3f} by format ({percent(rough)} → {percent(formed)}); "
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points ({steps(before)} → {steps(accuracy)})",
        "format is learnt, and is no longer a reason for spread; accuracy weighs too little to be learnt",
        "raise rest.reward.accuracy_share_start; begin with demonstrations (rest-rl sft) if S_acc is near 0",
    )


def no_progress(history: History, settings: Settings) -> Told | None:
    """Half of the run is over, and the slope of accuracy over it is not distinguishable from none."""
    column = history.column("rest/accuracy")
    if column is None or len(column.values) < ENOUGH_ROWS or 2 * history.step < settings.total:
        return None
    gain, error = column.gain()
    if gain > 2 * error:
        return None
    return Told(
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points in {history.step} steps",
        "too small a learning rate or batch, a reward that does not tell better from worse, or nothing left to learn",
        "see the other findings and the responses in the report; raise trl.learning_rate or the responses per step",
    )


SYMPTOMS: Mapping[Kind, Callable[[History, Settings], Told | None]] = {
    "not_finite": not_finite,
    "no_spread": no_spread,
    "truncated": truncated,
    "format_falls": format_falls,
    "calls_fall": calls_fall,
    "entropy_collapses": entropy_collapses,
    "sampler_disagrees": sampler_disagrees,
    "weight_at_its_clip": weight_at_its_clip,
    "gradient_spike": gradient_spike,
    "exact_match_falls": exact_match_falls,
    "held_out_falls": held_out_falls,
    "format_alone": format_alone,
    "no_progress": no_progress,
}


def window(history: History, key: str, mean: Mean) -> Mean | None:
    """Another metric over the window of a mean."""
    return history.until(key, mean.last)


def change(before: Mean, now: Mean) -> str:
    """Two shares and their steps."""
    return f"{percent(before)} → {percent(now)} ({steps(before)} → {steps(now)})"


def steps(mean: Mean) -> str:
    """The steps of a window."""
    return f"steps {mean.first}-{mean.last}"
