"""What can be wrong with a run: each symptom a function of its history that says figure, cause and remedy, or nothing.

A limit is either beyond noise, by `History.sure` standard errors, or a size at which harm begins, or both;
docs/diagnosis.md derives every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rest_rl.report.diagnosis.history import WINDOW, History, Mean, is_number
from rest_rl.report.diagnosis.settings import CURRICULUM, Settings

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
ENDLESS = 0.25
"""Mean length of the responses that end, as a share of the limit, below which the others do not end: with a constant
chance to end at every token it would be 0.31 where most groups hold one that is cut off, and more where more are."""


class Finding(NamedTuple):
    """One thing that is wrong, first seen at `step` and last at `last`."""

    kind: str
    """A key of SYMPTOMS; docs/diagnosis.md has a section for each."""
    figure: str
    cause: str
    remedy: str
    step: int
    last: int


class Symptom(NamedTuple):
    """What the metrics show, the likely cause and the remedy."""

    figure: str
    cause: str
    remedy: str


def not_finite(history: History, settings: Settings) -> Symptom | None:
    """A loss or gradient norm that is NaN or infinite."""
    broken = [key for key in ("loss", "grad_norm") if key in history.row and not is_number(history.row[key])]
    if not broken or (settings.is_half_precision and history.step <= SKIPPED_STEPS):
        return None
    return Symptom(
        f"{' and '.join(broken)} of step {history.step} is not finite",
        "numbers that overflow: steps that are too large, float16, or a model whose weights are broken already",
        f"{settings.slower}; use bf16 instead of fp16; the last checkpoint may hold the broken weights already",
    )


def reward_not_finite(history: History, settings: Settings) -> Symptom | None:
    """A mean reward that is NaN or infinite."""
    if "reward" not in history.row or is_number(history.row["reward"]):
        return None
    return Symptom(
        f"the mean reward of step {history.step} is not finite",
        "a reward function that returned inf or NaN: its group, and with inf the whole batch, has no gradient",
        "guard the reward function, and begin anew",
    )


def rows_out_of_order(history: History, settings: Settings) -> Symptom | None:
    """Rows of metrics whose step is not after that of the row before."""
    if not history.repeats:
        return None
    before, step = history.repeats[0]
    return Symptom(
        f"rows of metrics that repeat a step or go back: {len(history.repeats)}, the first step {step} after {before}",
        "two processes trained in this folder at once, or files of two runs were joined: curves and model are mixed",
        "trust none of its numbers; train it anew in a folder of its own",
    )


def no_spread(history: History, settings: Settings) -> Symptom | None:
    """Most groups have equal rewards throughout: they have no advantage and no gradient."""
    zero_variance = history.now("frac_reward_zero_std")
    if zero_variance is None or not zero_variance.exceeds(0.5, history.threshold):
        return None
    return Symptom(
        f"{percent(zero_variance)} of the groups have equal rewards and so no gradient ({steps(zero_variance)})",
        *zero_variance_cause(history, settings, zero_variance),
    )


def truncated(history: History, settings: Settings) -> Symptom | None:
    """Responses hit the length limit in most groups."""
    cut = history.now("completions/clipped_ratio")
    if cut is None or not cut.exceeds(settings.most_groups, history.threshold):
        return None
    return Symptom(
        f"{percent(cut)} of the responses hit the length limit{settings.at_limit} ({steps(cut)})",
        *truncation_cause(history, settings),
    )


def format_falls(history: History, settings: Settings) -> Symptom | None:
    """Fewer responses keep the format than did before, by enough to show in most groups."""
    fall = history.fall("rest/format", settings.most_groups)
    if not fall:
        return None
    best, now = fall
    cut, was_cut = (history.until("completions/clipped_ratio", mean.last) for mean in (now, best))
    if cut and was_cut and cut.above(was_cut, history.threshold, (best.value - now.value) / 2):
        cause = f"more of them hit the length limit ({percent(was_cut)} → {percent(cut)}), and what is cut off fails it"
        remedy = settings.longer_or_slower
    else:
        cause = "updates so large that the policy forgets what it knew, or a reward that no longer asks for format"
        remedy = f"{settings.slower}; lower rest.reward.accuracy_share_end, so that format stays worth something"
    return Symptom(f"format rate {change(best, now)}", cause, remedy)


def calls_fall(history: History, settings: Settings) -> Symptom | None:
    """Fewer responses attempt a call, accuracy has not gained by it, and broken format is not why."""
    fall = history.fall("rest/call_rate", settings.most_groups)
    if not fall:
        return None
    best, now = fall
    accuracy, before = (history.until("rest/accuracy", mean.last) for mean in (now, best))
    if (accuracy and before and accuracy.above(before, history.threshold)) or format_falls(history, settings):
        return None
    gained = f", S_acc {change(before, accuracy)}" if accuracy and before else ""
    return Symptom(
        f"share of responses with a call {change(best, now)}{gained}",
        "a call costs more in bad format than it earns, or prompts that need none outweigh those that do",
        f"{settings.slower}; raise rest.reward.accuracy_share_start; check the share of prompts whose gold has no call "
        "(rest-rl data check)",
    )


def entropy_collapses(history: History, settings: Settings) -> Symptom | None:
    """Nearly all entropy is spent, and accuracy has little to show for it."""
    now, start = history.now("entropy"), history.start("entropy")
    if now is None or start is None or start.value <= 0:
        return None
    if now.value + history.threshold * now.error > (1 - SPENT) * start.value:
        return None
    accuracy, before = history.now("rest/accuracy"), history.start("rest/accuracy")
    if accuracy is None or before is None or before.value >= 1:
        return None
    closed = (accuracy.value - before.value) / (1 - before.value)
    if closed >= CLOSED:
        return None
    return Symptom(
        f"entropy fell {start.value:.3f} → {now.value:.3f} nats a token, while S_acc went {before.value:.2f} → "
        f"{accuracy.value:.2f} ({steps(start)} → {steps(now)})",
        "the policy has settled on its answers before they were right; it no longer tries others",
        f"{settings.slower}; raise trl.epsilon_high (0.28 as in dapo) or trl.num_generations "
        f"(now {settings.group_size}); keep trl.temperature at 1",
    )


def sampler_disagrees(history: History, settings: Settings) -> Symptom | None:
    """The trained policy finds the responses more or less surprising than its own samples are."""
    excess, entropy = history.now("rest/surprise/excess"), history.now("entropy")
    errors, nats = history.latest("rest/surprise/error"), history.latest("rest/surprise/nats")
    if excess is None or entropy is None or entropy.value <= 0 or not errors or sum(nats) < SEEN_NATS:
        return None
    error = math.hypot(*errors) / len(errors)
    if abs(excess.value) - history.threshold * error < MISMATCH * entropy.value:
        return None
    side, share = ("less", -excess.value) if excess.value < 0 else ("more", excess.value)
    figure = (
        f"the responses are {100 * share / entropy.value:.0f} ± {100 * error / entropy.value:.0f} % {side} surprising "
        f"than the trained policy's own samples would be ({steps(excess)})"
    )
    if settings.sampling:
        changed = ", ".join(f"{name} = {value}" for name, value in settings.sampling.items())
        return Symptom(
            figure,
            f"{changed}: responses come from another distribution than the loss has gradients for",
            f"remove {', '.join(settings.sampling)}",
        )
    cause = "responses are sampled by other weights, in another precision, or from a changed distribution"
    remedy = "take top_p, top_k and penalties out of the model's generation_config.json; give vLLM the trainer's dtype"
    return Symptom(figure, cause, f"{remedy}; switch dropout off")


def weight_at_its_clip(history: History, settings: Settings) -> Symptom | None:
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
        return Symptom(
            figure, "it was dealt the weight of another region, which asks for more than the clip allows", widen
        )
    pushed = [push for region, name, _, _ in stuck if (push := curriculum_push(history, settings, region, name))]
    if pushed:
        keys = dict.fromkeys(f"rest.weights.{CURRICULUM[region][0]}" for region, _ in pushed)
        moved = ", ".join(text for _, text in pushed)
        return Symptom(figure, f"the curriculum has moved it there: {moved}", f"lower {' and '.join(keys)}, or {widen}")
    cause = "its entropy lies so far from that of the other tokens that the rule asks for more than the clip allows"
    return Symptom(figure, cause, widen)


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


def gradient_spike(history: History, settings: Settings) -> Symptom | None:
    """One step holds so much of Adam's second moment that the steps after it are halved."""
    column, moment = history.column("grad_norm"), history.second_moment
    if column is None or moment.share <= DOMINANT:
        return None
    median = sorted(column.values)[len(column.values) // 2]
    if not median > 0:
        return None
    now = f" (now {settings.max_norm:g})" if settings.max_norm else ""
    return Symptom(
        f"step {moment.step} holds {100 * moment.share:.0f} % of all squared gradient norms in Adam's average (norm "
        f"{moment.norm:.2g}, median {median:.2g})",
        "one batch with a very unlikely or very long response; Adam's steps after it are less than half as long",
        f"set trl.max_grad_norm{now} to about {3 * median:.1g}, three times the median norm",
    )


def exact_match_falls(history: History, settings: Settings) -> Symptom | None:
    """The reward rises while exact match falls: what is paid for is not what is wanted."""
    fall = history.fall("rest/exact_match")
    if not fall:
        return None
    best, now = fall
    reward, before = (history.until("reward", mean.last) for mean in (now, best))
    if reward is None or before is None or not reward.above(before, history.threshold):
        return None
    return Symptom(
        f"exact match {change(best, now)}, while the reward rose {before.value:.3f} → {reward.value:.3f}",
        "the reward pays for something else than right calls, such as format or a part of the arguments",
        "read what is rewarded (rest-rl report, rest-rl score); raise rest.reward.accuracy_share_start and "
        "accuracy_share_end",
    )


def held_out_falls(history: History, settings: Settings) -> Symptom | None:
    """Exact match on held-out prompts falls while that of training does not: the policy learns its prompts by heart."""
    scores = [
        (row["exact_match"], row["exact_match_error"], row.get("step"))
        for row in history.evaluations
        if is_number(row.get("exact_match")) and is_number(row.get("exact_match_error"))
    ]
    training, start = history.now("rest/exact_match"), history.start("rest/exact_match")
    if len(scores) < 2 or training is None or start is None or start.above(training, history.threshold):
        return None
    best, last = max(scores, key=lambda score: score[0]), scores[-1]
    if best[0] - last[0] <= history.threshold * math.hypot(best[1], last[1]):
        return None
    return Symptom(
        f"held-out exact match {100 * best[0]:.0f} ± {100 * best[1]:.0f} % (step {best[2]}) → {100 * last[0]:.0f} ± "
        f"{100 * last[1]:.0f} % (step {last[2]}), while that of training went {percent(start)} → {percent(training)}",
        "the policy learns its training prompts by heart",
        f"more prompts or fewer epochs; take the checkpoint of step {best[2]}",
    )


def format_alone(history: History, settings: Settings) -> Symptom | None:
    """The reward rose by format alone, and there is no more of it to gain."""
    pairs = {key: (history.start(key), history.now(key)) for key in ("reward", "rest/format", "rest/accuracy")}
    (reward, paid), (rough, formed), (before, accuracy) = pairs.values()
    if not (reward and paid and rough and formed and before and accuracy):
        return None
    rose = paid.above(reward, history.threshold) and formed.above(rough, history.threshold)
    if not rose or formed.value < 1 - settings.most_groups:
        return None
    gain, error = accuracy.value - before.value, math.hypot(accuracy.error, before.error)
    if gain + history.threshold * error > (formed.value - rough.value) / 2:
        return None
    return Symptom(
        f"the reward rose {reward.value:.3f} → {paid.value:.3f} by format ({percent(rough)} → {percent(formed)}); "
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points ({steps(before)} → {steps(accuracy)})",
        "format is learnt, and is no longer a reason for spread; accuracy weighs too little to be learnt",
        "raise rest.reward.accuracy_share_start; begin with demonstrations (rest-rl sft) if S_acc is near 0",
    )


def no_progress(history: History, settings: Settings) -> Symptom | None:
    """Half of the run is over, and the slope of accuracy over it is not distinguishable from none."""
    column = history.column("rest/accuracy")
    if column is None or len(column.values) < ENOUGH_ROWS or 2 * history.step < settings.total:
        return None
    gain, error = column.gain()
    if gain > 2 * error:
        return None
    return Symptom(
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points in {history.step} steps",
        "too small a learning rate or batch, a reward that does not tell better from worse, or nothing left to learn",
        "see the other findings and the responses in the report; raise trl.learning_rate or the responses per step",
    )


SYMPTOMS: Mapping[str, Callable[[History, Settings], Symptom | None]] = {
    symptom.__name__: symptom
    for symptom in (
        not_finite,
        reward_not_finite,
        rows_out_of_order,
        no_spread,
        truncated,
        format_falls,
        calls_fall,
        entropy_collapses,
        sampler_disagrees,
        weight_at_its_clip,
        gradient_spike,
        exact_match_falls,
        held_out_falls,
        format_alone,
        no_progress,
    )
}
"""By the kind of the finding."""


# Causes of what can have several


def zero_variance_cause(history: History, settings: Settings, zero_variance: Mean) -> tuple[str, str]:
    exact, well_formed = history.now("rest/exact_match"), history.now("rest/format")
    solved = exact.value - (1 - zero_variance.value) if exact else 0.0  # were every response of the other groups right
    is_learnt = exact is not None and exact.value >= 1 - settings.most_groups
    is_broken = well_formed is not None and well_formed.value < 0.5
    is_same = is_deterministic(history, settings)
    if not is_learnt and (is_same or (settings.is_cold and not is_broken)):
        return identical_responses_cause(history, settings, is_same)
    if exact and solved >= zero_variance.value / 2:
        share = min(1.0, solved / zero_variance.value)
        return (
            f"at least {100 * share:.0f} % of them are right throughout (exact match {percent(exact)})",
            "little is left to learn here: take harder prompts or more kinds of them, or end",
        )
    if well_formed and is_broken:
        return broken_format_cause(history, settings, well_formed)
    remedy = (
        f"raise trl.num_generations (now {settings.group_size}); begin with demonstrations (rest-rl sft); leave out "
        "prompts that are never or always answered right"
    )
    return "responses to one prompt hardly differ, or the prompts are beyond the policy", remedy


def is_deterministic(history: History, settings: Settings) -> bool:
    """Whether most groups hold one response G times, in the newest window as in the first rows.

    By Jensen the chance of G equal responses, E[p^(G-1)], is at least exp(-(G-1) H) with H the entropy of a response,
    so more than 1/2 where (G-1) H < ln 2.
    """
    latest, length = history.latest("entropy"), history.now("completions/mean_length")
    tokens = length.value if length else settings.max_length
    if not latest or tokens is None:
        return False
    most = max(*history.values("entropy")[:WINDOW], *latest)
    return (settings.group_size - 1) * most * tokens < math.log(2)


def identical_responses_cause(history: History, settings: Settings, is_same: bool) -> tuple[str, str]:
    now, entropy = settings.temperature, history.now("entropy")
    figures = [f"trl.temperature = {now:g}"] if now is not None else []
    figures += [f"entropy {entropy.value:.1g} nats a token{', as in the first rows' * is_same}"] if entropy else []
    return (
        f"the responses to a prompt {'do not differ' if is_same else 'hardly differ'} ({', '.join(figures)})",
        f"raise trl.temperature{f' (now {now:g})' if now is not None else ''}",
    )


def broken_format_cause(history: History, settings: Settings, well_formed: Mean) -> tuple[str, str]:
    cut, was = history.now("completions/clipped_ratio"), max(history.values("rest/format"))
    if cut and cut.value >= (1 - well_formed.value) / 2:
        cause = (
            f"{percent(cut)} of the responses hit the length limit{settings.at_limit}, and what is cut off fails the "
            f"format and so scores alike (format {percent(well_formed)})"
        )
        return cause, truncation_cause(history, settings)[1]
    cause = f"most responses break the format and so score alike (format {percent(well_formed)})"
    if was >= 0.5:
        forgotten = f", which {100 * was:.0f} % of them kept in the best step: the policy has forgotten it"
        return cause + forgotten, settings.slower
    return cause, "begin with demonstrations (rest-rl sft); check that rest.format is how this model writes calls"


def truncation_cause(history: History, settings: Settings) -> tuple[str, str]:
    limit = settings.max_length
    ended, least = history.now("completions/mean_terminated_length"), min(history.values("completions/clipped_ratio"))
    if least < settings.most_groups:
        return (
            f"they fitted before ({100 * least:.0f} % cut off in the best step): the policy rambles or forgets to end",
            settings.longer_or_slower,
        )
    if limit and ended and 0 < ended.value < ENDLESS * limit:
        return (
            f"those that end do so after {ended.value:.0f} tokens: the others run on and would not end",
            "begin with demonstrations (rest-rl sft), which teach the end; check that the end-of-turn token is right",
        )
    return (
        "the limit is shorter than what the policy has to say; what is cut off fails the format",
        f"raise trl.max_completion_length{f' (now {limit})' if limit else ''}",
    )


# Figures


def percent(mean: Mean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


def change(before: Mean, now: Mean) -> str:
    return f"{percent(before)} → {percent(now)} ({steps(before)} → {steps(now)})"


def steps(mean: Mean) -> str:
    return f"steps {mean.first}-{mean.last}"
