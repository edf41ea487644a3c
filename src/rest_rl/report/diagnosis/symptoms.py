"""The symptoms of a run that does not learn: each function returns what it observed, the likely cause and a remedy.

Depending on the symptom, a metric must pass its limit by `History.threshold` standard errors, the harm must reach a
minimum size, or both. docs/diagnosis.md derives every limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rest_rl.report.diagnosis.findings import Symptom, format_change, format_percent, format_steps
from rest_rl.report.diagnosis.history import WINDOW, History, WindowMean, has_finite_square
from rest_rl.report.diagnosis.rollouts import ROLLOUT_SYMPTOMS
from rest_rl.report.diagnosis.settings import CURRICULUM_FIELDS, DiagnosisSettings

# Losing this share of the initial entropy is a collapse: the rest can buy a ninth of the reward gained so far.
LOST_ENTROPY_SHARE = 0.9
# The share of the gap to S_acc = 1 that the policy must have closed in exchange for that entropy.
MIN_GAP_CLOSED = 0.5
# Excess surprise as a share of the entropy; sampling at temperature 0.95 or 1.05 causes about this much.
MAX_EXCESS_SHARE = 0.05
# Excess surprise is tested only if the entropies of a window's tokens add up to this many nats. Rare tokens contribute
# some ten nats each, so the window is then expected to contain about a hundred of them.
MIN_WINDOW_NATS = 1000.0
# The weight of a region with fewer tokens than this share moves the mean weight too little to matter.
MIN_REGION_SHARE = 0.1
# One step with this share of the second moment doubles Adam's denominator: 1 / sqrt(1 - 0.75) = 2.
SPIKE_SHARE = 0.75
MIN_TREND_ROWS = 5 * WINDOW
# float16 may skip this many steps while its loss scale falls from 2**16.
FP16_WARMUP_STEPS = 16
# If the responses that end are, on average, shorter than this share of the length limit, the truncated ones would
# never end. With a constant chance of ending at every token, the average is 0.31 of the limit if most groups have one
# truncated response, and higher if they have more.
ENDED_LENGTH_SHARE = 0.25


def not_finite(history: History, settings: DiagnosisSettings) -> Symptom | None:
    row = history.newest_row
    broken = [key for key in ("loss", "grad_norm") if key in row and not has_finite_square(row[key])]
    if not broken or (settings.is_half_precision and history.step <= FP16_WARMUP_STEPS):
        return None
    return Symptom(
        f"NaN or infinite at step {history.step}: {' and '.join(broken)}",
        "a numerical overflow: updates too large, float16 out of range, or model weights that were already broken",
        f"{settings.lower_rate_remedy}; use bf16 instead of fp16; do not trust the last checkpoint, which may already "
        "contain broken weights",
    )


def reward_not_finite(history: History, settings: DiagnosisSettings) -> Symptom | None:
    if "reward" not in history.newest_row or has_finite_square(history.newest_row["reward"]):
        return None
    return Symptom(
        f"the mean reward of step {history.step} is NaN or infinite",
        "a reward function returned NaN or infinity, which removes the gradient of its group or of the whole batch",
        "make the reward function return finite values only, then train again from the start",
    )


def rows_out_of_order(history: History, settings: DiagnosisSettings) -> Symptom | None:
    if not history.repeated_steps:
        return None
    before, step = history.repeated_steps[0]
    return Symptom(
        f"rows of metrics.jsonl out of order: {len(history.repeated_steps)}; the first is step {step} after step "
        f"{before}",
        "two processes trained in this folder at once, or files of two runs were joined: curves and model are mixed",
        "discard this run and train it again in a separate folder",
    )


def no_spread(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # The limit is half, because beyond it more than half of the generated responses contribute no gradient.
    zero_variance = history.newest_window("frac_reward_zero_std")
    if zero_variance is None or not zero_variance.exceeds(0.5, history.threshold):
        return None
    return Symptom(
        f"{format_percent(zero_variance)} of the groups have equal rewards and therefore no gradient "
        f"({format_steps(zero_variance)})",
        *explain_zero_variance(history, settings, zero_variance),
    )


def truncated(history: History, settings: DiagnosisSettings) -> Symptom | None:
    cut = history.newest_window("completions/clipped_ratio")
    if cut is None or not cut.exceeds(settings.most_groups_threshold, history.threshold):
        return None
    return Symptom(
        f"{format_percent(cut)} of the responses hit the length limit{settings.limit_text} ({format_steps(cut)})",
        *explain_truncation(history, settings),
    )


def format_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    fall = history.find_fall("rest/format", settings.most_groups_threshold)
    if not fall:
        return None
    best, now = fall
    cut, was_cut = (history.window_ending_at("completions/clipped_ratio", mean.last) for mean in (now, best))
    if cut and was_cut and cut.is_above(was_cut, history.threshold, (best.value - now.value) / 2):
        cause = (
            f"more responses hit the length limit ({format_percent(was_cut)} → {format_percent(cut)}), and a truncated "
            "response violates the format"
        )
        remedy = settings.truncation_remedy
    else:
        cause = "the updates are so large that the policy forgets the format, or the reward no longer pays for it"
        remedy = f"{settings.lower_rate_remedy}; lower rest.reward.accuracy_share_end to keep rewarding the format"
    return Symptom(f"the share of well-formed responses fell {format_change(best, now)}", cause, remedy)


def calls_fall(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # Fewer calls are no problem if accuracy rose, or if that of call turns did not fall: some prompts need no call. A
    # falling format is reported separately.
    fall = history.find_fall("rest/call_rate", settings.most_groups_threshold)
    if not fall:
        return None
    best, now = fall
    accuracy, before = (history.window_ending_at("rest/accuracy", mean.last) for mean in (now, best))
    if (accuracy and before and accuracy.is_above(before, history.threshold)) or format_falls(history, settings):
        return None
    on_calls, before_on_calls = (history.window_ending_at("rest/accuracy_calls", mean.last) for mean in (now, best))
    if on_calls and before_on_calls and on_calls.value >= before_on_calls.value:
        return None
    gained = f", S_acc {format_change(before, accuracy)}" if accuracy and before else ""
    return Symptom(
        f"the share of responses with a call fell {format_change(best, now)}{gained}",
        "a call loses more reward by format errors than it earns, or prompts that need no call outweigh those that do",
        f"{settings.lower_rate_remedy}; raise rest.reward.accuracy_share_start; check how many prompts "
        "have no gold call (rest-rl data check)",
    )


def entropy_collapses(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # Reward R and entropy H trade as R = b - a exp(H) (arXiv 2505.22617), so the last tenth of the entropy can buy a
    # ninth of the reward gained so far. A low entropy is harmless if accuracy has risen in exchange.
    now, start = history.newest_window("entropy"), history.first_window("entropy")
    if now is None or start is None or start.value <= 0:
        return None
    if now.value + history.threshold * now.error > (1 - LOST_ENTROPY_SHARE) * start.value:
        return None
    accuracy, before = history.newest_window("rest/accuracy"), history.first_window("rest/accuracy")
    if accuracy is None or before is None or before.value >= 1:
        return None
    closed = (accuracy.value - before.value) / (1 - before.value)
    if closed >= MIN_GAP_CLOSED:
        return None
    return Symptom(
        f"entropy fell {start.value:.3f} → {now.value:.3f} nats per token, while S_acc went {before.value:.2f} → "
        f"{accuracy.value:.2f} ({format_steps(start)} → {format_steps(now)})",
        "the policy became certain of its responses before they were right, and no longer explores",
        f"{settings.lower_rate_remedy}; raise trl.epsilon_high (dapo uses 0.28) or trl.num_generations "
        f"(now {settings.group_size}); keep trl.temperature at 1",
    )


def sampler_disagrees(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # For a token drawn from the policy p, the expected surprise -log p equals the entropy of p. Surprises minus
    # entropies are therefore a martingale with mean 0, wherever a response ends; a drift means another sampler.
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
            f"{changed}: the responses are sampled from another distribution than the one that the loss differentiates",
            f"remove {', '.join(settings.changed_sampling)}",
        )
    cause = "the sampler uses other weights, another precision, or a modified distribution"
    remedy = (
        "remove top_p, top_k and penalties from generation_config.json; run vLLM in the trainer's dtype; no dropout"
    )
    return Symptom(figure, cause, remedy)


def weight_at_its_clip(history: History, settings: DiagnosisSettings) -> Symptom | None:
    stuck = find_clipped_weights(history, settings)
    if not stuck:
        return None
    figures = [
        f"{region} at {name} = {bound:g} ({100 * share:.0f} % of the tokens)" for region, name, bound, share in stuck
    ]
    figure = f"a region's weight stayed at its limit in the last {WINDOW} rows: {', '.join(figures)}"
    strength = "" if settings.strength is None else f" (now {settings.strength:g})"
    widen = f"widen the range from rest.weights.w_min to rest.weights.w_max, or lower rest.weights.strength{strength}"
    if settings.is_shuffled:
        cause = "the rule `permuted` gave it the weight of another region, which lies outside this range"
        return Symptom(figure, cause, widen)
    pushed = [push for region, name, _, _ in stuck if (push := explain_push(history, settings, region, name))]
    if pushed:
        keys = dict.fromkeys(f"rest.weights.{CURRICULUM_FIELDS[region][0]}" for region, _ in pushed)
        moved = ", ".join(text for _, text in pushed)
        return Symptom(figure, f"the curriculum moved it there: {moved}", f"lower {' and '.join(keys)}, or {widen}")
    cause = "its entropy is so far from that of the other tokens that the rule's weight falls outside this range"
    return Symptom(figure, cause, widen)


def find_clipped_weights(history: History, settings: DiagnosisSettings) -> list[tuple[str, str, float, float]]:
    # Returns (region, "w_min" or "w_max", that bound, share of the tokens). A zero weight means that the rule drops the
    # region, which is not clipping.
    if settings.weight_clip is None or settings.weight_clip[0] == settings.weight_clip[1]:
        return []
    w_min, w_max = settings.weight_clip
    stuck = []
    for region in history.find_labels("rest/rule_weight/"):
        weights = history.newest_values(f"rest/rule_weight/{region}")
        share = history.newest_window(f"rest/share/{region}")
        if not weights or share is None or share.value < MIN_REGION_SHARE or min(weights) <= 0:
            continue
        if max(weights) <= w_min:
            stuck.append((region, "w_min", w_min, share.value))
        if min(weights) >= w_max:
            stuck.append((region, "w_max", w_max, share.value))
    return stuck


def explain_push(history: History, settings: DiagnosisSettings, region: str, end: str) -> tuple[str, str] | None:
    # The curriculum is the cause if it moves the weight towards this bound and the weight was in the clip range before.
    # Clipped weights hide the weight that the entropy by itself gives: the last unclipped one minus its shift.
    series = history.current_series(f"rest/rule_weight/{region}")
    shift = settings.curriculum_shift(region, history.step)
    if series is None or settings.weight_clip is None or shift * (1 if end == "w_max" else -1) <= 0:
        return None
    w_min, w_max = settings.weight_clip
    inside = [at for at, weight in enumerate(series.values) if w_min < weight < w_max]
    if not inside:
        return None
    step = series.steps[inside[-1]]
    ruled = series.values[inside[-1]] - settings.curriculum_shift(region, step)
    return region, f"{region} by {shift:+.2f} so far (its entropy by itself gave {ruled:.2f} at step {step})"


def gradient_spike(history: History, settings: DiagnosisSettings) -> Symptom | None:
    series, moment = history.current_series("grad_norm"), history.second_moment
    if series is None or moment.peak_share <= SPIKE_SHARE:
        return None
    median = sorted(series.values)[len(series.values) // 2]
    if not median > 0:
        return None
    now = f" (now {settings.max_norm:g})" if settings.max_norm else ""
    return Symptom(
        f"step {moment.step} accounts for {100 * moment.peak_share:.0f} % of Adam's second moment (gradient norm "
        f"{moment.norm:.2g}, median {median:.2g})",
        "a batch contained a very unlikely or very long response; Adam's steps after it are less than half as long",
        f"set trl.max_grad_norm{now} to about {3 * median:.1g}, three times the median norm",
    )


def exact_match_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    fall = history.find_fall("rest/exact_match")
    if not fall:
        return None
    best, now = fall
    reward, before = (history.window_ending_at("reward", mean.last) for mean in (now, best))
    if reward is None or before is None or not reward.is_above(before, history.threshold):
        return None
    return Symptom(
        f"exact match fell {format_change(best, now)}, while the reward rose {before.value:.3f} → {reward.value:.3f}",
        "the reward pays for something other than correct calls, such as the format or some of the arguments",
        "check which responses are rewarded (rest-rl report, rest-rl score); raise rest.reward.accuracy_share_start "
        "and rest.reward.accuracy_share_end",
    )


def held_out_falls(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # The errors are over prompts. Every evaluation uses the same prompts, so the true error of the difference is
    # smaller: the finding may come late, but is rarely a false alarm.
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
        f"held-out exact match fell {100 * best[0]:.0f} ± {100 * best[1]:.0f} % (step {best[2]}) → {100 * last[0]:.0f} "
        f"± {100 * last[1]:.0f} % (step {last[2]}), while training exact match went {format_percent(start)} → "
        f"{format_percent(training)}",
        "the policy overfits to its training prompts",
        f"train on more prompts or for fewer epochs; use the checkpoint of step {best[2]}",
    )


def format_alone(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # Early in a run the format is expected to improve first. Accuracy stands still if most groups are free of format
    # errors and S_acc, at its upper limit, gained less than half of what the format gained.
    reward_before, reward = history.first_window("reward"), history.newest_window("reward")
    format_before, well_formed = history.first_window("rest/format"), history.newest_window("rest/format")
    before, accuracy = history.first_window("rest/accuracy"), history.newest_window("rest/accuracy")
    if not (reward_before and reward and format_before and well_formed and before and accuracy):
        return None
    rose = reward.is_above(reward_before, history.threshold) and well_formed.is_above(format_before, history.threshold)
    if not rose or well_formed.value < 1 - settings.most_groups_threshold:
        return None
    gain, error = accuracy.value - before.value, math.hypot(accuracy.error, before.error)
    if gain + history.threshold * error > (well_formed.value - format_before.value) / 2:
        return None
    return Symptom(
        f"the reward rose {reward_before.value:.3f} → {reward.value:.3f} only through the format "
        f"({format_percent(format_before)} → {format_percent(well_formed)}); S_acc changed by {100 * gain:+.1f} ± "
        f"{100 * error:.1f} points ({format_steps(before)} → {format_steps(accuracy)})",
        "the format is learned and no longer separates responses; accuracy has too small a share of the reward",
        "raise rest.reward.accuracy_share_start; if S_acc is near 0, start with supervised fine-tuning (rest-rl sft)",
    )


def no_progress(history: History, settings: DiagnosisSettings) -> Symptom | None:
    # Only this finding is about a change that did not occur. The error in it shows how large a gain it can miss.
    series = history.current_series("rest/accuracy")
    if series is None or len(series.values) < MIN_TREND_ROWS or 2 * history.step < settings.total_steps:
        return None
    gain, error = series.fit_trend()
    if gain > 2 * error:
        return None
    return Symptom(
        f"S_acc changed by {100 * gain:+.1f} ± {100 * error:.1f} points in {history.step} steps",
        "the learning rate or batch is too small, the reward does not rank responses, or nothing is left to learn",
        "read the other findings and the recorded responses; raise trl.learning_rate or the responses per step",
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
        *ROLLOUT_SYMPTOMS,
    )
}
"""The symptoms by kind of finding, in the order in which they are checked."""


# Symptoms with several possible causes


def explain_zero_variance(history: History, settings: DiagnosisSettings, zero_variance: WindowMean) -> tuple[str, str]:
    exact, well_formed = history.newest_window("rest/exact_match"), history.newest_window("rest/format")
    # `solved` is a lower bound on the share of all groups in which every response is right: even if every response of
    # the groups with spread were right, the rest of the exact match comes from groups without spread.
    solved = exact.value - (1 - zero_variance.value) if exact else 0.0
    is_learnt = exact is not None and exact.value >= 1 - settings.most_groups_threshold
    is_broken = well_formed is not None and well_formed.value < 0.5
    is_same = is_deterministic(history, settings)
    if not is_learnt and (is_same or (settings.is_low_temperature and not is_broken)):
        return explain_identical_responses(history, settings, is_same)
    if exact and solved >= zero_variance.value / 2:
        share = min(1.0, solved / zero_variance.value)
        return (
            f"in at least {100 * share:.0f} % of them every response is right (exact match {format_percent(exact)})",
            "little is left to learn here: use harder or more varied prompts, or stop training",
        )
    if well_formed and is_broken:
        return explain_broken_format(history, settings, well_formed)
    remedy = (
        f"raise trl.num_generations (now {settings.group_size}); start with supervised fine-tuning (rest-rl "
        "sft); remove prompts that are never or always answered correctly"
    )
    return "the responses to a prompt hardly differ, or the prompts are too hard for the policy", remedy


def is_deterministic(history: History, settings: DiagnosisSettings) -> bool:
    # Returns whether most groups are one response, repeated G times, both in the first rows and in the newest window.
    # By Jensen's inequality the chance of G equal responses, E[p^(G-1)], is at least exp(-(G-1) H), where H is the
    # entropy of a response. It exceeds 1/2 if (G-1) H < ln 2.
    latest, length = history.newest_values("entropy"), history.newest_window("completions/mean_length")
    tokens = length.value if length else settings.max_length
    if not latest or tokens is None:
        return False
    most = max(*history.all_values("entropy")[:WINDOW], *latest)
    return (settings.group_size - 1) * most * tokens < math.log(2)


def explain_identical_responses(history: History, settings: DiagnosisSettings, is_same: bool) -> tuple[str, str]:
    now, entropy = settings.temperature, history.newest_window("entropy")
    figures = [f"trl.temperature = {now:g}"] if now is not None else []
    figures += [f"entropy {entropy.value:.1g} nats per token{', as in the first rows' * is_same}"] if entropy else []
    return (
        f"the responses to a prompt {'do not differ' if is_same else 'hardly differ'} ({', '.join(figures)})",
        f"raise trl.temperature{f' (now {now:g})' if now is not None else ''}",
    )


def explain_broken_format(history: History, settings: DiagnosisSettings, well_formed: WindowMean) -> tuple[str, str]:
    cut, was = history.newest_window("completions/clipped_ratio"), max(history.all_values("rest/format"))
    if cut and cut.value >= (1 - well_formed.value) / 2:
        cause = (
            f"{format_percent(cut)} of the responses hit the length limit{settings.limit_text}; truncated responses "
            f"violate the format and therefore score alike (well-formed: {format_percent(well_formed)})"
        )
        return cause, explain_truncation(history, settings)[1]
    cause = f"most responses violate the format and therefore score alike (well-formed: {format_percent(well_formed)})"
    if was >= 0.5:
        forgotten = f"; in the best step {100 * was:.0f} % were well-formed, so the policy has forgotten the format"
        return cause + forgotten, settings.lower_rate_remedy
    return cause, "start with supervised fine-tuning (rest-rl sft); check that rest.format fits this model"


def explain_truncation(history: History, settings: DiagnosisSettings) -> tuple[str, str]:
    limit = settings.max_length
    ended = history.newest_window("completions/mean_terminated_length")
    least = min(history.all_values("completions/clipped_ratio"))
    if least < settings.most_groups_threshold:
        best = f"{100 * least:.0f} % truncated in the best step"
        cause = f"the responses fitted before ({best}); the policy has become verbose or forgets to end"
        return cause, settings.truncation_remedy
    if limit and ended and 0 < ended.value < ENDED_LENGTH_SHARE * limit:
        return (
            f"responses that end do so after {ended.value:.0f} tokens, so the others would not end at any limit",
            "start with supervised fine-tuning (rest-rl sft), which teaches the end; check the end-of-turn token",
        )
    return (
        "the limit is shorter than the responses need to be, and a truncated response violates the format",
        f"raise trl.max_completion_length{f' (now {limit})' if limit else ''}",
    )
