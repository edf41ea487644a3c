"""What can be wrong with a run: each symptom a function of its history that says figure, cause and remedy, or nothing.

A limit is either beyond noise, by `History.sure` standard errors, or a size at which harm begins, or both;
docs/diagnosis.md derives every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rest_rl.report.diagnosis.history import WINDOW, History, WindowMean, has_finite_square
from rest_rl.report.diagnosis.settings import CURRICULUM_FIELDS, DiagnosisSettings

COLLAPSED_ENTROPY_SHARE = 0.9
"""Share of the first entropy whose loss is a collapse: what is left can buy a ninth of what was gained."""
MIN_GAP_CLOSED = 0.5
"""Share of the gap to full accuracy that a spent entropy must have closed."""
MAX_EXCESS_SHARE = 0.05
"""Excess surprise as a share of the entropy: about what a temperature of 0.95 or 1.05 does."""
MIN_WINDOW_NATS = 1000.0
"""Entropy of all tokens of a window from which its excess surprise can be judged: rare tokens bring some ten nats each,
so about a hundred of them were due."""
MIN_REGION_SHARE = 0.1
"""Share of the tokens from which a region's weight matters."""
SPIKE_SHARE = 0.75
"""Share of the second moment that one step holds when it doubles Adam's denominator: 1 / sqrt(1 - 0.75) = 2."""
MIN_TREND_ROWS = 5 * WINDOW
"""Rows without progress that are worth a word."""
FP16_WARMUP_STEPS = 16
"""Steps that float16 may skip while its loss scale falls from 2**16."""
ENDED_LENGTH_SHARE = 0.25
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


def not_finite(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """A loss or gradient norm that is NaN or infinite."""
    broken = [
        key
        for key in ("loss", "grad_norm")
        if key in history.newest_row and not has_finite_square(history.newest_row[key])
    ]
    if not broken or (settings.is_half_precision and history.step <= FP16_WARMUP_STEPS):
        return None
    return Symptom(
        f"{' and '.join(broken)} of step {history.step} is not finite",
        "numbers that overflow: steps that are too large, float16, or a model whose weights are broken already",
        f"{settings.lower_rate_remedy}; use bf16 instead of fp16; the last checkpoint may hold the broken "
        "weights already",
    )


def reward_not_finite(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """A mean reward that is NaN or infinite."""
    if "reward" not in history.newest_row or has_finite_square(history.newest_row["reward"]):
        return None
    return Symptom(
        f"the mean reward of step {history.step} is not finite",
        "a reward function that returned inf or NaN: its group, and with inf the whole batch, has no gradient",
        "guard the reward function, and begin anew",
    )


def rows_out_of_order(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Rows of metrics whose step is not after that of the row before."""
    if not history.repeated_steps:
        return None
    before, step = history.repeated_steps[0]
    return Symptom(
        f"rows of metrics that repeat a step or go back: {len(history.repeated_steps)}, the first step {step} "
        f"after {before}",
        "two processes trained in this folder at once, or files of two runs were joined: curves and model are mixed",
        "trust none of its numbers; train it anew in a folder of its own",
    )


def no_spread(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Most groups have equal rewards throughout: they have no advantage and no gradient."""
    zero_variance = history.newest_window("frac_reward_zero_std")
    if zero_variance is None or not zero_variance.exceeds(0.5, history.threshold):
        return None
    return Symptom(
        f"{format_percent(zero_variance)} of the groups have equal rewards and so no gradient "
        f"({format_steps(zero_variance)})",
        *explain_zero_variance(history, settings, zero_variance),
    )


def truncated(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Responses hit the length limit in most groups."""
    cut = history.newest_window("completions/clipped_ratio")
    if cut is None or not cut.exceeds(settings.most_groups_threshold, history.threshold):
        return None
    return Symptom(
        f"{format_percent(cut)} of the responses hit the length limit{settings.limit_text} ({format_steps(cut)})",
        *explain_truncation(history, settings),
    )


def format_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Fewer responses keep the format than did before, by enough to show in most groups."""
    fall = history.find_fall("rest/format", settings.most_groups_threshold)
    if not fall:
        return None
    best, now = fall
    cut, was_cut = (history.window_ending_at("completions/clipped_ratio", mean.last) for mean in (now, best))
    if cut and was_cut and cut.is_above(was_cut, history.threshold, (best.value - now.value) / 2):
        cause = (
            f"more of them hit the length limit ({format_percent(was_cut)} → {format_percent(cut)}), and what is cut "
            "off fails it"
        )
        remedy = settings.truncation_remedy
    else:
        cause = "updates so large that the policy forgets what it knew, or a reward that no longer asks for format"
        remedy = (
            f"{settings.lower_rate_remedy}; lower rest.reward.accuracy_share_end, so that format stays worth something"
        )
    return Symptom(f"format rate {format_change(best, now)}", cause, remedy)


def calls_fall(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Fewer responses attempt a call, accuracy has not gained by it, and broken format is not why."""
    fall = history.find_fall("rest/call_rate", settings.most_groups_threshold)
    if not fall:
        return None
    best, now = fall
    accuracy, before = (history.window_ending_at("rest/accuracy", mean.last) for mean in (now, best))
    if (accuracy and before and accuracy.is_above(before, history.threshold)) or format_falls(history, settings):
        return None
    gained = f", S_acc {format_change(before, accuracy)}" if accuracy and before else ""
    return Symptom(
        f"share of responses with a call {format_change(best, now)}{gained}",
        "a call costs more in bad format than it earns, or prompts that need none outweigh those that do",
        f"{settings.lower_rate_remedy}; raise rest.reward.accuracy_share_start; check the share of prompts "
        "whose gold has no call "
        "(rest-rl data check)",
    )


def entropy_collapses(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Nearly all entropy is spent, and accuracy has little to show for it."""
    now, start = history.newest_window("entropy"), history.first_window("entropy")
    if now is None or start is None or start.value <= 0:
        return None
    if now.value + history.threshold * now.error > (1 - COLLAPSED_ENTROPY_SHARE) * start.value:
        return None
    accuracy, before = history.newest_window("rest/accuracy"), history.first_window("rest/accuracy")
    if accuracy is None or before is None or before.value >= 1:
        return None
    closed = (accuracy.value - before.value) / (1 - before.value)
    if closed >= MIN_GAP_CLOSED:
        return None
    return Symptom(
        f"entropy fell {start.value:.3f} → {now.value:.3f} nats a token, while S_acc went {before.value:.2f} → "
        f"{accuracy.value:.2f} ({format_steps(start)} → {format_steps(now)})",
        "the policy has settled on its answers before they were right; it no longer tries others",
        f"{settings.lower_rate_remedy}; raise trl.epsilon_high (0.28 as in dapo) or trl.num_generations "
        f"(now {settings.group_size}); keep trl.temperature at 1",
    )


def sampler_disagrees(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """The trained policy finds the responses more or less surprising than its own samples are."""
    excess, entropy = history.newest_window("rest/surprise/excess"), history.newest_window("entropy")
    errors, nats = history.newest_values("rest/surprise/error"), history.newest_values("rest/surprise/nats")
    if excess is None or entropy is None or entropy.value <= 0 or not errors or sum(nats) < MIN_WINDOW_NATS:
        return None
    error = math.hypot(*errors) / len(errors)
    if abs(excess.value) - history.threshold * error < MAX_EXCESS_SHARE * entropy.value:
        return None
    side, share = ("less", -excess.value) if excess.value < 0 else ("more", excess.value)
    figure = (
        f"the responses are {100 * share / entropy.value:.0f} ± {100 * error / entropy.value:.0f} % {side} surprising "
        f"than the trained policy's own samples would be ({format_steps(excess)})"
    )
    if settings.changed_sampling:
        changed = ", ".join(f"{name} = {value}" for name, value in settings.changed_sampling.items())
        return Symptom(
            figure,
            f"{changed}: responses come from another distribution than the loss has gradients for",
            f"remove {', '.join(settings.changed_sampling)}",
        )
    cause = "responses are sampled by other weights, in another precision, or from a changed distribution"
    remedy = "take top_p, top_k and penalties out of the model's generation_config.json; give vLLM the trainer's dtype"
    return Symptom(figure, cause, f"{remedy}; switch dropout off")


def weight_at_its_clip(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """A region's weight has been at its clip for a whole window: it no longer follows the entropies."""
    stuck = find_clipped_weights(history, settings)
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
    pushed = [
        push for region, name, _, _ in stuck if (push := explain_curriculum_push(history, settings, region, name))
    ]
    if pushed:
        keys = dict.fromkeys(f"rest.weights.{CURRICULUM_FIELDS[region][0]}" for region, _ in pushed)
        moved = ", ".join(text for _, text in pushed)
        return Symptom(figure, f"the curriculum has moved it there: {moved}", f"lower {' and '.join(keys)}, or {widen}")
    cause = "its entropy lies so far from that of the other tokens that the rule asks for more than the clip allows"
    return Symptom(figure, cause, widen)


def find_clipped_weights(history: History, settings: DiagnosisSettings) -> list[tuple[str, str, float, float]]:
    """Regions of some size whose weight was at an end of the clip for a window: label, which end, its value, share."""
    if settings.weight_clip is None or settings.weight_clip[0] == settings.weight_clip[1]:
        return []
    w_min, w_max = settings.weight_clip
    stuck = []
    for region in history.find_labels("rest/rule_weight/"):
        weights, share = (
            history.newest_values(f"rest/rule_weight/{region}"),
            history.newest_window(f"rest/share/{region}"),
        )
        if not weights or share is None or share.value < MIN_REGION_SHARE or min(weights) <= 0:
            continue
        if max(weights) <= w_min:
            stuck.append((region, "w_min", w_min, share.value))
        if min(weights) >= w_max:
            stuck.append((region, "w_max", w_max, share.value))
    return stuck


def explain_curriculum_push(
    history: History, settings: DiagnosisSettings, region: str, end: str
) -> tuple[str, str] | None:
    """The region and how far the curriculum has moved its weight, if without it the weight was last inside the clip.

    What the rule asks for shows only where the clip does not cut it: in the last row inside, less the shift of then.
    """
    series = history.current_series(f"rest/rule_weight/{region}")
    shift = settings.curriculum_shift(region, history.step)
    if series is None or settings.weight_clip is None or shift * (1 if end == "w_max" else -1) <= 0:
        return None
    w_min, w_max = settings.weight_clip
    inside = [at for at, weight in enumerate(series.values) if w_min < weight < w_max]
    if not inside:
        return None
    ruled = series.values[inside[-1]] - settings.curriculum_shift(region, series.steps[inside[-1]])
    return (
        region,
        f"{region} by {shift:+.2f} so far, from {ruled:.2f} by its entropy in step {series.steps[inside[-1]]}",
    )


def gradient_spike(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """One step holds so much of Adam's second moment that the steps after it are halved."""
    series, moment = history.current_series("grad_norm"), history.second_moment
    if series is None or moment.peak_share <= SPIKE_SHARE:
        return None
    median = sorted(series.values)[len(series.values) // 2]
    if not median > 0:
        return None
    now = f" (now {settings.max_norm:g})" if settings.max_norm else ""
    return Symptom(
        f"step {moment.step} holds {100 * moment.peak_share:.0f} % of all squared gradient norms in Adam's "
        "average (norm "
        f"{moment.norm:.2g}, median {median:.2g})",
        "one batch with a very unlikely or very long response; Adam's steps after it are less than half as long",
        f"set trl.max_grad_norm{now} to about {3 * median:.1g}, three times the median norm",
    )


def exact_match_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """The reward rises while exact match falls: what is paid for is not what is wanted."""
    fall = history.find_fall("rest/exact_match")
    if not fall:
        return None
    best, now = fall
    reward, before = (history.window_ending_at("reward", mean.last) for mean in (now, best))
    if reward is None or before is None or not reward.is_above(before, history.threshold):
        return None
    return Symptom(
        f"exact match {format_change(best, now)}, while the reward rose {before.value:.3f} → {reward.value:.3f}",
        "the reward pays for something else than right calls, such as format or a part of the arguments",
        "read what is rewarded (rest-rl report, rest-rl score); raise rest.reward.accuracy_share_start and "
        "accuracy_share_end",
    )


def held_out_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Exact match on held-out prompts falls while that of training does not: the policy learns its prompts by heart."""
    scores = [
        (row["exact_match"], row["exact_match_error"], row.get("step"))
        for row in history.evaluations
        if has_finite_square(row.get("exact_match")) and has_finite_square(row.get("exact_match_error"))
    ]
    training, start = history.newest_window("rest/exact_match"), history.first_window("rest/exact_match")
    if len(scores) < 2 or training is None or start is None or start.is_above(training, history.threshold):
        return None
    best, last = max(scores, key=lambda score: score[0]), scores[-1]
    if best[0] - last[0] <= history.threshold * math.hypot(best[1], last[1]):
        return None
    return Symptom(
        f"held-out exact match {100 * best[0]:.0f} ± {100 * best[1]:.0f} % (step {best[2]}) → {100 * last[0]:.0f} ± "
        f"{100 * last[1]:.0f} % (step {last[2]}), while that of training went {format_percent(start)} → "
        f"{format_percent(training)}",
        "the policy learns its training prompts by heart",
        f"more prompts or fewer epochs; take the checkpoint of step {best[2]}",
    )


def format_alone(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """The reward rose by format alone, and there is no more of it to gain."""
    pairs = {
        key: (history.first_window(key), history.newest_window(key))
        for key in ("reward", "rest/format", "rest/accuracy")
    }
    (reward, paid), (rough, formed), (before, accuracy) = pairs.values()
    if not (reward and paid and rough and formed and before and accuracy):
        return None
    rose = paid.is_above(reward, history.threshold) and formed.is_above(rough, history.threshold)
    if not rose or formed.value < 1 - settings.most_groups_threshold:
        return None
    gain, error = accuracy.value - before.value, math.hypot(accuracy.error, before.error)
    if gain + history.threshold * error > (formed.value - rough.value) / 2:
        return None
    return Symptom(
        f"the reward rose {reward.value:.3f} → {paid.value:.3f} by format ({format_percent(rough)} → "
        f"{format_percent(formed)}); "
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points ({format_steps(before)} → "
        f"{format_steps(accuracy)})",
        "format is learnt, and is no longer a reason for spread; accuracy weighs too little to be learnt",
        "raise rest.reward.accuracy_share_start; begin with demonstrations (rest-rl sft) if S_acc is near 0",
    )


def no_progress(history: History, settings: DiagnosisSettings) -> Symptom | None:
    """Half of the run is over, and the slope of accuracy over it is not distinguishable from none."""
    series = history.current_series("rest/accuracy")
    if series is None or len(series.values) < MIN_TREND_ROWS or 2 * history.step < settings.total_steps:
        return None
    gain, error = series.fit_trend()
    if gain > 2 * error:
        return None
    return Symptom(
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points in {history.step} steps",
        "too small a learning rate or batch, a reward that does not tell better from worse, or nothing left to learn",
        "see the other findings and the responses in the report; raise trl.learning_rate or the responses per step",
    )


SYMPTOMS: Mapping[str, Callable[[History, DiagnosisSettings], Symptom | None]] = {
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


def explain_zero_variance(history: History, settings: DiagnosisSettings, zero_variance: WindowMean) -> tuple[str, str]:
    exact, well_formed = history.newest_window("rest/exact_match"), history.newest_window("rest/format")
    solved = exact.value - (1 - zero_variance.value) if exact else 0.0  # were every response of the other groups right
    is_learnt = exact is not None and exact.value >= 1 - settings.most_groups_threshold
    is_broken = well_formed is not None and well_formed.value < 0.5
    is_same = is_deterministic(history, settings)
    if not is_learnt and (is_same or (settings.is_low_temperature and not is_broken)):
        return explain_identical_responses(history, settings, is_same)
    if exact and solved >= zero_variance.value / 2:
        share = min(1.0, solved / zero_variance.value)
        return (
            f"at least {100 * share:.0f} % of them are right throughout (exact match {format_percent(exact)})",
            "little is left to learn here: take harder prompts or more kinds of them, or end",
        )
    if well_formed and is_broken:
        return explain_broken_format(history, settings, well_formed)
    remedy = (
        f"raise trl.num_generations (now {settings.group_size}); begin with demonstrations (rest-rl sft); leave out "
        "prompts that are never or always answered right"
    )
    return "responses to one prompt hardly differ, or the prompts are beyond the policy", remedy


def is_deterministic(history: History, settings: DiagnosisSettings) -> bool:
    """Whether most groups hold one response G times, in the newest window as in the first rows.

    By Jensen the chance of G equal responses, E[p^(G-1)], is at least exp(-(G-1) H) with H the entropy of a response,
    so more than 1/2 where (G-1) H < ln 2.
    """
    latest, length = history.newest_values("entropy"), history.newest_window("completions/mean_length")
    tokens = length.value if length else settings.max_length
    if not latest or tokens is None:
        return False
    most = max(*history.all_values("entropy")[:WINDOW], *latest)
    return (settings.group_size - 1) * most * tokens < math.log(2)


def explain_identical_responses(history: History, settings: DiagnosisSettings, is_same: bool) -> tuple[str, str]:
    now, entropy = settings.temperature, history.newest_window("entropy")
    figures = [f"trl.temperature = {now:g}"] if now is not None else []
    figures += [f"entropy {entropy.value:.1g} nats a token{', as in the first rows' * is_same}"] if entropy else []
    return (
        f"the responses to a prompt {'do not differ' if is_same else 'hardly differ'} ({', '.join(figures)})",
        f"raise trl.temperature{f' (now {now:g})' if now is not None else ''}",
    )


def explain_broken_format(history: History, settings: DiagnosisSettings, well_formed: WindowMean) -> tuple[str, str]:
    cut, was = history.newest_window("completions/clipped_ratio"), max(history.all_values("rest/format"))
    if cut and cut.value >= (1 - well_formed.value) / 2:
        cause = (
            f"{format_percent(cut)} of the responses hit the length limit{settings.limit_text}, and what is cut "
            "off fails the "
            f"format and so scores alike (format {format_percent(well_formed)})"
        )
        return cause, explain_truncation(history, settings)[1]
    cause = f"most responses break the format and so score alike (format {format_percent(well_formed)})"
    if was >= 0.5:
        forgotten = f", which {100 * was:.0f} % of them kept in the best step: the policy has forgotten it"
        return cause + forgotten, settings.lower_rate_remedy
    return cause, "begin with demonstrations (rest-rl sft); check that rest.format is how this model writes calls"


def explain_truncation(history: History, settings: DiagnosisSettings) -> tuple[str, str]:
    limit = settings.max_length
    ended, least = (
        history.newest_window("completions/mean_terminated_length"),
        min(history.all_values("completions/clipped_ratio")),
    )
    if least < settings.most_groups_threshold:
        return (
            f"they fitted before ({100 * least:.0f} % cut off in the best step): the policy rambles or forgets to end",
            settings.truncation_remedy,
        )
    if limit and ended and 0 < ended.value < ENDED_LENGTH_SHARE * limit:
        return (
            f"those that end do so after {ended.value:.0f} tokens: the others run on and would not end",
            "begin with demonstrations (rest-rl sft), which teach the end; check that the end-of-turn token is right",
        )
    return (
        "the limit is shorter than what the policy has to say; what is cut off fails the format",
        f"raise trl.max_completion_length{f' (now {limit})' if limit else ''}",
    )


# Figures


def format_percent(mean: WindowMean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


def format_change(before: WindowMean, now: WindowMean) -> str:
    return f"{format_percent(before)} → {format_percent(now)} ({format_steps(before)} → {format_steps(now)})"


def format_steps(mean: WindowMean) -> str:
    return f"steps {mean.first}-{mean.last}"
