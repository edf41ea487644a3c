"""Diagnosis: each symptom from rows that show only that one, none from a healthy run, and sums checked by hand."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rest_rl.report.diagnosis import Diagnosis, Finding, diagnose
from rest_rl.report.diagnosis.history import WINDOW, History, MetricSeries, SecondMoment, WindowMean
from rest_rl.report.diagnosis.settings import DiagnosisSettings
from rest_rl.report.diagnosis.symptoms import SYMPTOMS
from rest_rl.rewards import RewardConfig
from rest_rl.runlog import Row
from rest_rl.train.trl.trainer import ResTConfig
from rest_rl.weights import WeightConfig

TABLE: dict[str, Any] = {
    "trl": {"num_generations": 8, "max_completion_length": 96, "learning_rate": 3e-4, "max_steps": 60},
    "rest": {"preset": "rest_live", "weights": {"w_min": 0.25, "w_max": 4.0, "strength": 0.5}},
}
Columns = Mapping[str, Callable[[int], Any]]


def line(start: float, end: float) -> Callable[[int], float]:
    """A line from start to end in 60 steps, alternately 0.03 above and below it."""
    return lambda step: start + (end - start) * (step - 1) / 59 + 0.03 * (-1) ** step


def falls(before: float, after: float, at: int = 31) -> Callable[[int], float]:
    return lambda step: line(before, before)(step) if step < at else line(after, after)(step)


HEALTHY: Columns = {
    "loss": lambda step: 0.0,
    "grad_norm": line(0.3, 0.3),
    "reward": line(0.6, 0.8),
    "frac_reward_zero_std": line(0.1, 0.2),
    "entropy": lambda step: 0.25 * 0.98**step,
    "completions/clipped_ratio": lambda step: 0.01,
    "completions/mean_terminated_length": line(35, 38),
    "rest/format": line(0.7, 0.95),
    "rest/accuracy": line(0.5, 0.8),
    "rest/exact_match": line(0.4, 0.7),
    "rest/call_rate": line(0.8, 0.8),
    "rest/surprise/excess": lambda step: 0.001 * (-1) ** step,
    "rest/surprise/error": lambda step: 0.002,
    "rest/surprise/nats": lambda step: 200.0,
    "rest/rule_weight/format": lambda step: 1.3,
    "rest/rule_weight/reasoning": lambda step: 0.6,
    "rest/rule_weight/answer": lambda step: 4.0,
    "rest/share/format": lambda step: 0.3,
    "rest/share/reasoning": lambda step: 0.6,
    "rest/share/answer": lambda step: 0.02,
}


def rows_of(changes: Columns, steps: int = 60) -> list[Row]:
    columns = {**HEALTHY, **changes}
    return [{"step": step, **{key: make(step) for key, make in columns.items()}} for step in range(1, steps + 1)]


def evaluations_of(*shares: float) -> list[Row]:
    """An evaluation of 400 prompts every ten steps, with the binomial error sqrt(p (1 - p) / 400)."""
    return [
        {"step": 10 * (i + 1), "exact_match": share, "exact_match_error": math.sqrt(share * (1 - share) / 400)}
        for i, share in enumerate(shares)
    ]


def constant(value: Any) -> Callable[[int], Any]:
    return lambda step: value


STEADY: Columns = {"rest/format": line(0.9, 0.9)}
FAULTY: list[tuple[str, Columns, str]] = [
    ("not_finite", {"grad_norm": lambda step: None if step == 33 else 0.3}, "NaN or infinite at step 33: grad_norm"),
    ("not_finite", {"loss": lambda step: math.nan if step > 50 else 0.0}, "NaN or infinite at step 60: loss"),
    ("reward_not_finite", {"reward": lambda step: None if step == 33 else 0.6}, "mean reward of step 33"),
    (
        "rows_out_of_order",
        {"step": lambda step: 29 if step == 31 else step},
        "out of order: 1; the first is step 29 after step 30",
    ),
    ("no_spread", {"frac_reward_zero_std": line(0.8, 0.8)}, "80.0 ± 1.3 % of the groups have equal rewards"),
    ("truncated", {"completions/clipped_ratio": constant(0.2)}, "20.0 ± 0.0 % of the responses hit the length limit"),
    ("format_falls", {"rest/format": falls(0.95, 0.5)}, "the share of well-formed responses fell 95.0 ± "),
    ("calls_fall", {"rest/call_rate": falls(0.8, 0.2), "rest/accuracy": falls(0.5, 0.3, 11), **STEADY}, "80.0 ± "),
    (
        "entropy_collapses",
        {"entropy": lambda step: 0.25 * 0.93**step, "rest/accuracy": line(0.5, 0.65)},
        "entropy fell",
    ),
    ("sampler_disagrees", {"rest/surprise/excess": constant(-0.05)}, "less surprising"),
    ("weight_at_its_clip", {"rest/rule_weight/reasoning": constant(0.25)}, "reasoning at w_min = 0.25 (60 % of the"),
    ("weight_at_its_clip", {"rest/rule_weight/format": constant(4.0)}, "format at w_max = 4 (30 % of the tokens)"),
    ("gradient_spike", {"grad_norm": lambda step: 5.0 if step == 40 else 0.02}, "step 40 accounts for "),
    ("exact_match_falls", {"rest/exact_match": line(0.7, 0.4)}, ", while the reward rose "),
    ("format_alone", {"rest/accuracy": line(0.5, 0.5), "rest/exact_match": line(0.4, 0.4)}, "the reward rose "),
    ("no_progress", {"rest/accuracy": line(0.5, 0.5), **STEADY}, "S_acc changed by "),
    ("rollouts_fail", {"env/stop/failed": constant(0.1)}, "10.0 ± 0.0 % of the rollouts failed"),
    ("turn_limit_reached", {"env/stop/turn limit": line(0.9, 0.9)}, "90.0 ± "),
    ("never_calls", {"env/turns": constant(1.0), "rest/call_rate": constant(0.02)}, "2.0 ± 0.0 % of the rollouts call"),
    ("repeats_itself", {"env/repeated_calls": line(0.6, 0.6)}, "of the calls repeat an earlier call"),
    ("step_reward_misleads", {"env/step_reward_gap": line(-0.3, -0.3)}, "higher in rollouts that fail"),
]
ALSO_EXPECTED = {"calls_fall": {"no_progress"}, "format_alone": {"no_progress"}}
"""Where accuracy does not rise at all, `no_progress` shows as well."""


# Healthy and faulty runs


@pytest.mark.parametrize("steps", [1, 9, 10, 20, 59, 60])
def test_a_healthy_run_has_no_finding(steps: int) -> None:
    evaluations = evaluations_of(0.4, 0.45, 0.5, 0.55, 0.6, 0.6)
    assert diagnose(rows_of({}, steps), evaluations, TABLE) == []


@pytest.mark.parametrize(
    ("kind", "changes", "figure"), FAULTY, ids=[f"{kind}-{i}" for i, (kind, _, _) in enumerate(FAULTY)]
)
def test_each_symptom_shows_without_the_others(kind: str, changes: Columns, figure: str) -> None:
    findings = {finding.kind: finding for finding in diagnose(rows_of(changes), (), TABLE)}
    assert kind in findings
    assert findings.keys() - {kind} <= ALSO_EXPECTED.get(kind, set())
    assert figure in findings[kind].figure
    assert findings[kind].cause
    assert findings[kind].remedy


def test_held_out_scores_fall_while_training_scores_rise() -> None:
    # 0.6 -> 0.4: errors sqrt(.24 / 400) = 0.0245 each, of the difference 0.0346; 0.2 is 5.8 of them, at 60 rows 5.0 do
    (finding,) = diagnose(rows_of({}), evaluations_of(0.5, 0.6, 0.55, 0.5, 0.45, 0.4), TABLE)
    assert finding.kind == "held_out_falls"
    assert (finding.step, finding.last) == (60, 60)
    assert finding.figure.startswith(
        "held-out exact match fell 60 ± 2 % (step 20) → 40 ± 2 % (step 60), while training"
    )
    assert "checkpoint of step 20" in finding.remedy
    assert diagnose(rows_of({}), evaluations_of(0.5, 0.6, 0.55, 0.5, 0.5, 0.5), TABLE) == []


def test_every_symptom_is_tested_and_documented() -> None:
    assert {kind for kind, _, _ in FAULTY} | {"held_out_falls"} == set(SYMPTOMS)
    page = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    assert [kind for kind in SYMPTOMS if f"\n### `{kind}`" not in page] == []


def test_findings_during_training_equal_those_of_the_report() -> None:
    rows = rows_of({"rest/format": falls(0.95, 0.5), "frac_reward_zero_std": line(0.8, 0.8)})
    diagnosis = Diagnosis(TABLE)
    new = [finding for row in rows for finding in diagnosis.add(row, 60)]
    assert [finding.kind for finding in new] == ["no_spread", "format_falls"]
    assert [finding.last for finding in new] == [finding.step for finding in new]
    assert diagnosis.findings == diagnose(rows, (), TABLE)
    assert [(finding.kind, finding.step) for finding in diagnosis.findings] == [(f.kind, f.step) for f in new]


def test_a_symptom_that_ends_has_a_last_step() -> None:
    (finding,) = diagnose(rows_of({"completions/clipped_ratio": lambda step: 0.4 if step <= 20 else 0.0}), (), TABLE)
    # Row 25: a window of five rows of 0.4 has mean 0.2; one difference of 0.4 in 24 makes a scatter of sqrt(0.16 / 48)
    # = 0.058 and an error of 0.0183; 5.08 of them leave 0.107, above 0.083. Row 26: 0.16 - 5.07 x 0.0179 = 0.069.
    assert (finding.step, finding.last) == (10, 25)


def test_noise_rarely_causes_a_finding() -> None:
    """20 runs of 300 steps whose rates only fluctuate."""
    alarms: list[Finding] = []
    for seed in range(20):
        rng = random.Random(seed)
        rows = [
            {"step": step, **{key: rng.gauss(mean, 0.08) for key, mean in STEADY_RATES.items()}}
            for step in range(1, 301)
        ]
        alarms += diagnose(rows, (), {"trl": {"num_generations": 8, "max_steps": 10_000}})
    assert alarms == []


STEADY_RATES = {
    "reward": 0.6,
    "frac_reward_zero_std": 0.4,
    "completions/clipped_ratio": 0.05,
    "rest/format": 0.8,
    "rest/accuracy": 0.5,
    "rest/exact_match": 0.4,
    "rest/call_rate": 0.7,
}


# Causes


def finding_of(kind: str, changes: Columns) -> Finding:
    return next(finding for finding in diagnose(rows_of(changes), (), TABLE) if finding.kind == kind)


def test_groups_without_spread_are_solved_malformed_or_identical() -> None:
    flat: Columns = {"frac_reward_zero_std": line(0.8, 0.8)}
    solved = finding_of("no_spread", {**flat, "rest/exact_match": line(0.9, 0.9), "rest/accuracy": line(0.9, 0.95)})
    # if all responses of the other 20 % were right, 70 % of the 80 % without spread still must be: 87.5 %
    assert solved.cause == "in at least 88 % of them every response is right (exact match 90.0 ± 1.3 %)"
    unreadable = finding_of("no_spread", {**flat, "rest/format": line(0.1, 0.2), "rest/exact_match": line(0.1, 0.1)})
    assert "violate the format" in unreadable.cause
    assert "hardly differ" in finding_of("no_spread", {**flat, "rest/exact_match": line(0.2, 0.4)}).cause


def test_entropy_or_temperature_shows_that_responses_do_not_differ() -> None:
    flat: Columns = {"frac_reward_zero_std": constant(1.0), "rest/exact_match": line(0.75, 0.75)}
    flat = {**flat, "rest/accuracy": line(0.7, 0.9), "completions/mean_length": constant(38.0)}

    def find(changes: Columns, temperature: float | None) -> Finding:
        trl = TABLE["trl"] if temperature is None else {**TABLE["trl"], "temperature": temperature}
        found = diagnose(rows_of({**flat, **changes}), (), {**TABLE, "trl": trl})
        return next(finding for finding in found if finding.kind == "no_spread")

    # 8 equal responses in most groups: 7 x 38 tokens x 2e-3 nats = 0.53 < ln 2 = 0.69; at 3e-3 0.80
    cold = find({"entropy": constant(2e-3)}, 0.01)
    assert cold.remedy == "raise trl.temperature (now 0.01)"
    assert cold.cause == (
        "the responses to a prompt do not differ (trl.temperature = 0.01, entropy 0.002 nats per token, as in the "
        "first rows)"
    )
    assert find({"entropy": constant(2e-3)}, None).remedy == "raise trl.temperature"
    warm = find({"entropy": constant(3e-3)}, 0.01)
    assert (warm.cause[:42], warm.remedy) == ("the responses to a prompt hardly differ (t", cold.remedy)
    assert find({"entropy": constant(3e-3)}, 1.0).cause.startswith("in at least 75 % of them every response is right")
    # the entropy fell by learning, or nearly every response is right: a higher temperature would not help
    spent: Columns = {"entropy": lambda step: 0.25 if step < 5 else 1e-4}
    assert find(spent, 1.0).cause.startswith("in at least 75 %")
    for temperature in (0.01, 1.0):
        learnt = find({"entropy": constant(1e-4), "rest/exact_match": line(0.95, 0.95)}, temperature)
        assert learnt.remedy.startswith("little is left to learn here")
    # a policy without the format needs supervised fine-tuning, unless its responses are certainly identical
    unreadable: Columns = {"rest/format": line(0.1, 0.1), "rest/exact_match": line(0.1, 0.1)}
    assert "violate the format" in find(unreadable, 0.5).cause
    assert "do not differ" in find({**unreadable, "entropy": constant(2e-3)}, 0.5).cause


def test_groups_that_are_always_truncated_blame_the_limit() -> None:
    # 80 % cut off are more than half of the 90 % or so without format; 30 % are not
    broken: Columns = {"frac_reward_zero_std": line(0.9, 0.9), "rest/format": line(0.1, 0.1)}
    broken = {**broken, "rest/exact_match": line(0.1, 0.1), "completions/mean_terminated_length": constant(80.0)}
    cut = finding_of("no_spread", {**broken, "completions/clipped_ratio": constant(0.8)})
    assert cut.cause.startswith("80.0 ± 0.0 % of the responses hit the length limit of 96 tokens; truncated responses")
    assert cut.remedy == "raise trl.max_completion_length (now 96)"
    assert "violate the format" in finding_of("no_spread", {**broken, "completions/clipped_ratio": constant(0.3)}).cause


def test_unknown_metrics_are_ignored() -> None:
    assert diagnose(rows_of({"completions/failed": constant(3.0)}), (), TABLE) == []


def test_a_short_limit_and_a_policy_that_does_not_end() -> None:
    cut: Columns = {"completions/clipped_ratio": constant(0.5), "completions/mean_terminated_length": constant(20.0)}
    endless = finding_of("truncated", cut)  # of 96 tokens
    assert "would not end at any limit" in endless.cause
    assert "supervised fine-tuning" in endless.remedy
    short = finding_of("truncated", {**cut, "completions/mean_terminated_length": constant(80.0)})
    assert short.remedy == "raise trl.max_completion_length (now 96)"
    none_ends = finding_of(
        "truncated", {"completions/clipped_ratio": constant(1.0), "completions/mean_terminated_length": constant(0.0)}
    )
    assert none_ends.remedy == short.remedy
    grown = finding_of("truncated", {"completions/clipped_ratio": falls(0.0, 0.5)})
    assert "the responses fitted before (-3 % truncated" in grown.cause  # the noise of these rows goes below 0
    assert "(now 0.0003)" in grown.remedy


def test_format_falls_because_responses_grow() -> None:
    grown = finding_of("format_falls", {"rest/format": falls(0.9, 0.5), "completions/clipped_ratio": falls(0.0, 0.4)})
    assert "more responses hit the length limit" in grown.cause
    assert "make sense, raise trl.max_completion_length" in grown.remedy
    assert "the updates are so large" in finding_of("format_falls", {"rest/format": falls(0.9, 0.5)}).cause


def test_calls_that_fall_with_the_format_are_one_finding() -> None:
    lost: Columns = {
        "rest/call_rate": falls(0.8, 0.2),
        "rest/format": falls(0.9, 0.3),
        "rest/accuracy": falls(0.5, 0.1),
    }
    assert "calls_fall" not in {finding.kind for finding in diagnose(rows_of(lost), (), TABLE)}


def test_fewer_calls_are_no_finding_if_accuracy_rises() -> None:
    assert diagnose(rows_of({"rest/call_rate": falls(0.9, 0.6)}), (), TABLE) == []


def test_sampling_settings_that_change_the_distribution_are_named() -> None:
    rows = rows_of({"rest/surprise/excess": constant(-0.05)})
    (finding,) = diagnose(rows, (), {**TABLE, "trl": {**TABLE["trl"], "top_p": 0.9, "top_k": 0}})
    assert finding.cause.startswith("trl.top_p = 0.9: ")
    assert finding.remedy == "remove trl.top_p"


def test_the_sampler_is_not_judged_from_too_few_nats() -> None:
    few: Columns = {"rest/surprise/excess": constant(-0.05), "rest/surprise/nats": constant(99.0)}
    assert diagnose(rows_of(few), (), TABLE) == []


def test_float16_may_skip_the_first_steps() -> None:
    rows = rows_of({"grad_norm": lambda step: None if step <= 3 else 0.3})
    assert diagnose(rows, (), {**TABLE, "trl": {**TABLE["trl"], "fp16": True}}) == []
    assert [finding.kind for finding in diagnose(rows, (), TABLE)] == ["not_finite"]


def test_supervised_training_may_lose_its_entropy() -> None:
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "entropy": 2.0 * 0.8**step} for step in range(1, 61)]
    assert diagnose(rows, (), TABLE) == []


def test_a_weight_at_its_clip_is_due_to_the_curriculum_or_to_the_entropy() -> None:
    # strength 0.5, gain 0.6: shifts of 0.3 * (step - 1) / 59; what the rule puts at 3.9 is at 4 from step 21 on
    weights = {**TABLE["rest"]["weights"], "gain_reasoning": 0.6, "decay_format": 0.6}
    table = {**TABLE, "rest": {"preset": "rest_live", "weights": weights}}

    def find(region: str, weight: Callable[[int], float], changes: Mapping[str, Any] | None = None) -> Finding:
        rows = rows_of({f"rest/rule_weight/{region}": weight})
        rested = {**weights, **(changes or {})}
        return next(
            f
            for f in diagnose(rows, (), {**table, "rest": {"preset": "rest_live", "weights": rested}})
            if f.kind == "weight_at_its_clip"
        )

    pushed = find("reasoning", lambda step: min(4.0, 3.9 + 0.3 * (step - 1) / 59))
    assert (
        pushed.cause
        == "the curriculum moved it there: reasoning by +0.30 so far (its entropy by itself gave 3.90 at step 20)"
    )
    assert pushed.remedy.startswith("lower rest.weights.gain_reasoning, or widen")
    down = find("format", lambda step: max(0.25, 0.3 - 0.3 * (step - 1) / 59))
    assert "format by -0.30 so far (its entropy by itself gave 0.30" in down.cause
    # at the clip from the first row, before the curriculum moved anything; moved the other way; or permuted
    for region, weight in (("reasoning", 4.0), ("reasoning", 0.25), ("format", 4.0)):
        assert find(region, constant(weight)).cause.startswith("its entropy is so far")
    late = find("reasoning", lambda step: max(0.25, 0.6 - 0.02 * step))
    assert late.cause.startswith("its entropy is so far")
    assert find("reasoning", constant(4.0), {"rule": "permuted"}).cause.startswith(
        "the rule `permuted` gave it the weight"
    )


def test_weights_from_initial_entropies_may_stay_at_their_clip() -> None:
    rows = rows_of({"rest/rule_weight/reasoning": constant(0.25)})
    assert [finding.kind for finding in diagnose(rows, (), TABLE)] == ["weight_at_its_clip"]
    weights = {**TABLE["rest"]["weights"], "entropies": "initial"}
    assert diagnose(rows, (), {**TABLE, "rest": {"preset": "rest_live", "weights": weights}}) == []


def test_a_policy_that_learns_to_refuse_is_no_finding() -> None:
    """Fewer calls, and those on call turns as good as before."""
    columns = {"rest/call_rate": falls(1.0, 0.8), "rest/accuracy": constant(0.7)}
    assert "calls_fall" in [finding.kind for finding in diagnose(rows_of(columns), (), TABLE)]
    kept = {**columns, "rest/accuracy_calls": constant(0.75)}
    assert "calls_fall" not in [finding.kind for finding in diagnose(rows_of(kept), (), TABLE)]


# Messages


def texts_of_all_findings() -> Iterator[str]:
    for _, changes, _ in FAULTY:
        for finding in diagnose(rows_of(changes), (), TABLE):
            yield f"{finding.figure} {finding.cause} {finding.remedy}"


def test_remedies_name_existing_settings() -> None:
    text = " ".join(texts_of_all_findings())
    named = {prefix: set(re.findall(rf"\b{prefix}\.(\w+)", text)) for prefix in ("trl", "rest.reward", "rest.weights")}
    homes: dict[str, type] = {"trl": ResTConfig, "rest.reward": RewardConfig, "rest.weights": WeightConfig}
    for prefix, names in named.items():
        assert names
        assert names <= {field.name for field in dataclasses.fields(homes[prefix])}


def test_messages_are_single_lines_without_a_full_stop() -> None:
    for _, changes, _ in FAULTY:
        for finding in diagnose(rows_of(changes), (), TABLE):
            for text in (finding.figure, finding.cause, finding.remedy):
                assert text == text.strip().rstrip(".")
                assert "\n" not in text


# Sums checked by hand


def series_of(*values: float) -> MetricSeries:
    series = MetricSeries()
    for step, value in enumerate(values, 1):
        series.add(step, value)
    return series


def test_a_trend_does_not_enlarge_the_scatter() -> None:
    # differences 1 + 0.2, 1 - 0.2, ...: half their mean square is (1 + 0.04) / 2
    trend = series_of(*(row + 0.1 * (-1) ** (row + 1) for row in range(11)))
    assert trend.scatter() == pytest.approx(math.sqrt(1.04 / 2))
    # without a trend 0.2^2 / 2 = 0.02, so the error of ten rows is sqrt(0.02 / 10)
    level = series_of(*(0.1 * (-1) ** row for row in range(11)))
    mean = level.window_mean(11)
    assert (mean.value, mean.error) == (pytest.approx(0.0), pytest.approx(math.sqrt(0.002)))
    assert (mean.first, mean.last) == (2, 11)


def test_the_best_window_does_not_overlap_the_newest() -> None:
    peak = series_of(*[0.0] * 5, *[1.0] * WINDOW, *[0.5] * WINDOW)
    best = peak.best_window()
    assert best is not None
    assert (best.value, best.first, best.last) == (1.0, 6, 15)
    assert series_of(*range(10)).best_window() is None
    first = series_of(3.0, 1.0, *[0.0] * WINDOW).best_window()  # only rows 1 and 2 precede the newest window
    assert first is not None
    assert (first.value, first.first, first.last) == (2.0, 1, 2)


def test_the_trend_of_a_straight_line_is_its_rise() -> None:
    gain, error = series_of(*(0.5 + 0.01 * row for row in range(60))).fit_trend()
    assert gain == pytest.approx(0.59)
    # scatter 0.01 / sqrt(2); over sqrt(60 (60^2 - 1) / 12) = 134.14 rows, times 59
    assert error == pytest.approx(0.01 / math.sqrt(2) * 59 / math.sqrt(60 * 3599 / 12))


def test_the_share_of_responses_that_affects_most_groups() -> None:
    # 1 - (1 - s)^8 = 1/2 at s = 1 - 2^(-1/8) = 0.0830
    assert DiagnosisSettings(group_size=8).most_groups_threshold == pytest.approx(0.0830, abs=5e-5)
    assert 1 - (1 - DiagnosisSettings(group_size=4).most_groups_threshold) ** 4 == pytest.approx(0.5)


def test_the_threshold_grows_with_the_number_of_tests() -> None:
    history = History(SecondMoment(0.999, 1.0))
    for step in range(1, 11):
        history.add({"step": step})
    # one pair of windows: z = sqrt(2 ln 1000) = 3.717; 9 differences, 6 degrees: z + (z^3 + z) / 24
    assert history.threshold == pytest.approx(3.717 + (3.717**3 + 3.717) / 24, abs=2e-3)
    for step in range(11, 61):
        history.add({"step": step})
    # six windows, 18 pairs: z = sqrt(2 ln 18000) = 4.427; 59 differences, 39.3 degrees
    assert history.threshold == pytest.approx(4.427 + (4.427**3 + 4.427) / (4 * 59 * 2 / 3), abs=2e-3)


def test_the_share_of_one_step_in_adams_average() -> None:
    moment = SecondMoment(decay=0.5, max_norm=2.0)
    for step, norm in enumerate((1.0, 8.0, 1.0), 1):
        moment.add(step, norm)
    # squares 1, 2^2 after the clip, 1, halved every step: 1/4 + 4/2 + 1 = 3.25
    assert moment.peak_share == pytest.approx(2 / 3.25)
    assert (moment.step, moment.norm) == (2, 8.0)


def test_a_difference_must_exceed_its_errors_and_a_minimum() -> None:
    high, low = WindowMean(0.5, 0.03, 1, 10), WindowMean(0.3, 0.04, 11, 20)  # 0.2 apart, error of the difference 0.05
    assert high.is_above(low, errors=3.9)
    assert not high.is_above(low, errors=4.1)
    assert not high.is_above(low, errors=1, min_difference=0.21)
    assert high.exceeds(0.4, errors=3)
    assert not high.exceeds(0.42, errors=3)


# Hostile input


HOSTILE = [None, True, "x", math.nan, math.inf, -math.inf, 1e308, 10**400, -1e-320, [], {}]


def test_no_value_of_a_row_or_table_raises() -> None:
    rng = random.Random(0)
    rows = [
        {key: rng.choice([*HOSTILE, make(step)]) for key, make in {**HEALTHY, "step": lambda step: step}.items()}
        for step in range(1, 120)
    ]
    tables = [
        {"trl": value, "rest": {"weights": {"w_min": value, "w_max": value}}} for value in [*HOSTILE, {"top_p": "x"}]
    ]
    tables += [
        {"trl": dict.fromkeys(("num_generations", "adam_beta2", "max_steps", "max_grad_norm"), value)}
        for value in HOSTILE
    ]
    for table in tables:
        for finding in diagnose(rows, [dict.fromkeys(("step", "exact_match", "exact_match_error"), 0.1)] * 3, table):
            assert isinstance(finding.figure, str)
    evaluations = [{"step": value, "exact_match": value, "exact_match_error": value} for value in HOSTILE]
    assert isinstance(diagnose(rows, evaluations), list)


def test_a_config_of_an_older_version_is_read_as_far_as_possible() -> None:
    old = DiagnosisSettings.from_table({**TABLE, "rest": {**TABLE["rest"], "gone": 1}, "removed": {"x": 1}})
    assert (old.max_length, old.total_steps) == (96, 60)
    # an unreadable [rest] counts as missing
    assert old.weight_clip == DiagnosisSettings.from_table({"trl": TABLE["trl"]}).weight_clip
    elsewhere = DiagnosisSettings.from_table({**TABLE, "rest": {"weights": {"rule": "no_such_module:RULE"}}})
    assert (elsewhere.weight_clip, elsewhere.curriculum_shifts) == (None, {})
