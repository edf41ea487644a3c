"""Why a run is not learning: every symptom from rows that show it alone, none from rows that are well, sums by hand."""

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
    "rest": {"weights": {"w_min": 0.25, "w_max": 4.0, "strength": 0.5}},
}
Columns = Mapping[str, Callable[[int], Any]]


def line(start: float, end: float) -> Callable[[int], float]:
    """From start to end in 60 steps, 0.03 to either side of it in turn."""
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
    """One every ten steps, of 400 prompts: their error is that of a coin, sqrt(p (1 - p) / 400)."""
    return [
        {"step": 10 * (i + 1), "exact_match": share, "exact_match_error": math.sqrt(share * (1 - share) / 400)}
        for i, share in enumerate(shares)
    ]


def constant(value: Any) -> Callable[[int], Any]:
    return lambda step: value


STEADY: Columns = {"rest/format": line(0.9, 0.9)}
ILL: list[tuple[str, Columns, str]] = [
    ("not_finite", {"grad_norm": lambda step: None if step == 33 else 0.3}, "grad_norm of step 33 is not finite"),
    ("not_finite", {"loss": lambda step: math.nan if step > 50 else 0.0}, "loss of step 60 is not finite"),
    ("reward_not_finite", {"reward": lambda step: None if step == 33 else 0.6}, "mean reward of step 33"),
    (
        "rows_out_of_order",
        {"step": lambda step: 29 if step == 31 else step},
        "go back: 1, the first step 29 after 30",
    ),
    ("no_spread", {"frac_reward_zero_std": line(0.8, 0.8)}, "80.0 ± 1.3 % of the groups have equal rewards"),
    ("truncated", {"completions/clipped_ratio": constant(0.2)}, "20.0 ± 0.0 % of the responses hit the length limit"),
    ("format_falls", {"rest/format": falls(0.95, 0.5)}, "format rate 95.0 ± "),
    ("calls_fall", {"rest/call_rate": falls(0.8, 0.2), "rest/accuracy": falls(0.5, 0.3, 11), **STEADY}, "80.0 ± "),
    (
        "entropy_collapses",
        {"entropy": lambda step: 0.25 * 0.93**step, "rest/accuracy": line(0.5, 0.65)},
        "entropy fell",
    ),
    ("sampler_disagrees", {"rest/surprise/excess": constant(-0.05)}, "less surprising"),
    ("weight_at_its_clip", {"rest/rule_weight/reasoning": constant(0.25)}, "reasoning at w_min = 0.25 (60 % of the"),
    ("weight_at_its_clip", {"rest/rule_weight/format": constant(4.0)}, "format at w_max = 4 (30 % of the tokens)"),
    ("gradient_spike", {"grad_norm": lambda step: 5.0 if step == 40 else 0.02}, "step 40 holds "),
    ("exact_match_falls", {"rest/exact_match": line(0.7, 0.4)}, ", while the reward rose "),
    ("format_alone", {"rest/accuracy": line(0.5, 0.5), "rest/exact_match": line(0.4, 0.4)}, "the reward rose "),
    ("no_progress", {"rest/accuracy": line(0.5, 0.5), **STEADY}, "S_acc changed by "),
]
EXPECTED_BESIDE = {"calls_fall": {"no_progress"}, "format_alone": {"no_progress"}}
"""Where accuracy does not rise at all, that is said too."""


# Well and ill


@pytest.mark.parametrize("steps", [1, 9, 10, 20, 59, 60])
def test_a_run_that_is_well_is_left_alone(steps: int) -> None:
    evaluations = evaluations_of(0.4, 0.45, 0.5, 0.55, 0.6, 0.6)
    assert diagnose(rows_of({}, steps), evaluations, TABLE) == []


@pytest.mark.parametrize(("kind", "changes", "figure"), ILL, ids=[f"{kind}-{i}" for i, (kind, _, _) in enumerate(ILL)])
def test_each_symptom_is_told_by_its_figure_and_alone(kind: str, changes: Columns, figure: str) -> None:
    findings = {finding.kind: finding for finding in diagnose(rows_of(changes), (), TABLE)}
    assert kind in findings
    assert findings.keys() - {kind} <= EXPECTED_BESIDE.get(kind, set())
    assert figure in findings[kind].figure
    assert findings[kind].cause
    assert findings[kind].remedy


def test_held_out_prompts_are_forgotten_while_the_training_prompts_are_learnt() -> None:
    # 0.6 -> 0.4: errors sqrt(.24 / 400) = 0.0245 each, of the difference 0.0346; 0.2 is 5.8 of them, at 60 rows 5.0 do
    (finding,) = diagnose(rows_of({}), evaluations_of(0.5, 0.6, 0.55, 0.5, 0.45, 0.4), TABLE)
    assert finding.kind == "held_out_falls"
    assert (finding.step, finding.last) == (60, 60)
    assert finding.figure.startswith("held-out exact match 60 ± 2 % (step 20) → 40 ± 2 % (step 60), while that of")
    assert "checkpoint of step 20" in finding.remedy
    assert diagnose(rows_of({}), evaluations_of(0.5, 0.6, 0.55, 0.5, 0.5, 0.5), TABLE) == []


def test_every_symptom_is_triggered_here_and_documented() -> None:
    assert {kind for kind, _, _ in ILL} | {"held_out_falls"} == set(SYMPTOMS)
    page = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    assert [kind for kind in SYMPTOMS if f"\n### `{kind}`" not in page] == []


def test_what_is_told_while_a_run_goes_on_is_what_its_report_says() -> None:
    rows = rows_of({"rest/format": falls(0.95, 0.5), "frac_reward_zero_std": line(0.8, 0.8)})
    diagnosis = Diagnosis(TABLE)
    told = [finding for row in rows for finding in diagnosis.add(row, 60)]
    assert [finding.kind for finding in told] == ["no_spread", "format_falls"]
    assert [finding.last for finding in told] == [finding.step for finding in told]
    assert diagnosis.findings == diagnose(rows, (), TABLE)
    assert [(finding.kind, finding.step) for finding in diagnosis.findings] == [(f.kind, f.step) for f in told]


def test_a_symptom_that_passes_has_an_end() -> None:
    (finding,) = diagnose(rows_of({"completions/clipped_ratio": lambda step: 0.4 if step <= 20 else 0.0}), (), TABLE)
    # Row 25: a window of five rows of 0.4 has mean 0.2; one difference of 0.4 in 24 makes a scatter of sqrt(0.16 / 48)
    # = 0.058 and an error of 0.0183; 5.08 of them leave 0.107, above 0.083. Row 26: 0.16 - 5.07 x 0.0179 = 0.069.
    assert (finding.step, finding.last) == (10, 25)


def test_chance_alone_is_rarely_an_alarm() -> None:
    """Rates of 200 responses a step that stay what they are, in 20 runs of 300 steps."""
    alarms: list[Finding] = []
    for seed in range(20):
        rng = random.Random(seed)
        rows = [
            {"step": step, **{key: rng.gauss(mean, 0.08) for key, mean in steady.items()}} for step in range(1, 301)
        ]
        alarms += diagnose(rows, (), {"trl": {"num_generations": 8, "max_steps": 10_000}})
    assert alarms == []


steady = {
    "reward": 0.6,
    "frac_reward_zero_std": 0.4,
    "completions/clipped_ratio": 0.05,
    "rest/format": 0.8,
    "rest/accuracy": 0.5,
    "rest/exact_match": 0.4,
    "rest/call_rate": 0.7,
}


# Causes


def cause_of(kind: str, changes: Columns) -> Finding:
    return next(finding for finding in diagnose(rows_of(changes), (), TABLE) if finding.kind == kind)


def test_groups_without_spread_are_solved_unreadable_or_alike() -> None:
    flat: Columns = {"frac_reward_zero_std": line(0.8, 0.8)}
    solved = cause_of("no_spread", {**flat, "rest/exact_match": line(0.9, 0.9), "rest/accuracy": line(0.9, 0.95)})
    # if all responses of the other 20 % were right, 70 % of the 80 % without spread still must be: 87.5 %
    assert solved.cause == "at least 88 % of them are right throughout (exact match 90.0 ± 1.3 %)"
    unreadable = cause_of("no_spread", {**flat, "rest/format": line(0.1, 0.2), "rest/exact_match": line(0.1, 0.1)})
    assert "break the format" in unreadable.cause
    assert "hardly differ" in cause_of("no_spread", {**flat, "rest/exact_match": line(0.2, 0.4)}).cause


def test_responses_that_do_not_differ_are_told_by_the_entropy_or_the_temperature() -> None:
    flat: Columns = {"frac_reward_zero_std": constant(1.0), "rest/exact_match": line(0.75, 0.75)}
    flat = {**flat, "rest/accuracy": line(0.7, 0.9), "completions/mean_length": constant(38.0)}

    def told(changes: Columns, temperature: float | None) -> Finding:
        trl = TABLE["trl"] if temperature is None else {**TABLE["trl"], "temperature": temperature}
        found = diagnose(rows_of({**flat, **changes}), (), {**TABLE, "trl": trl})
        return next(finding for finding in found if finding.kind == "no_spread")

    # 8 equal responses in most groups: 7 x 38 tokens x 2e-3 nats = 0.53 < ln 2 = 0.69; at 3e-3 0.80
    cold = told({"entropy": constant(2e-3)}, 0.01)
    assert cold.remedy == "raise trl.temperature (now 0.01)"
    assert cold.cause == (
        "the responses to a prompt do not differ (trl.temperature = 0.01, entropy 0.002 nats a token, as in the first "
        "rows)"
    )
    assert told({"entropy": constant(2e-3)}, None).remedy == "raise trl.temperature"
    warm = told({"entropy": constant(3e-3)}, 0.01)
    assert (warm.cause[:42], warm.remedy) == ("the responses to a prompt hardly differ (t", cold.remedy)
    assert told({"entropy": constant(3e-3)}, 1.0).cause.startswith("at least 75 % of them are right throughout")
    # spent by learning, or right as good as everywhere: a temperature would not change it
    spent: Columns = {"entropy": lambda step: 0.25 if step < 5 else 1e-4}
    assert told(spent, 1.0).cause.startswith("at least 75 %")
    for temperature in (0.01, 1.0):
        learnt = told({"entropy": constant(1e-4), "rest/exact_match": line(0.95, 0.95)}, temperature)
        assert learnt.remedy.startswith("little is left to learn here")
    # an unreadable policy needs demonstrations, unless its responses are surely the same
    unreadable: Columns = {"rest/format": line(0.1, 0.1), "rest/exact_match": line(0.1, 0.1)}
    assert "break the format" in told(unreadable, 0.5).cause
    assert "do not differ" in told({**unreadable, "entropy": constant(2e-3)}, 0.5).cause


def test_groups_that_are_cut_off_throughout_are_told_of_the_limit() -> None:
    # 80 % cut off are more than half of the 90 % or so without format; 30 % are not
    broken: Columns = {"frac_reward_zero_std": line(0.9, 0.9), "rest/format": line(0.1, 0.1)}
    broken = {**broken, "rest/exact_match": line(0.1, 0.1), "completions/mean_terminated_length": constant(80.0)}
    cut = cause_of("no_spread", {**broken, "completions/clipped_ratio": constant(0.8)})
    assert cut.cause.startswith("80.0 ± 0.0 % of the responses hit the length limit of 96 tokens, and what is cut off")
    assert cut.remedy == "raise trl.max_completion_length (now 96)"
    assert "break the format" in cause_of("no_spread", {**broken, "completions/clipped_ratio": constant(0.3)}).cause


def test_figures_that_nobody_knows_say_nothing() -> None:
    assert diagnose(rows_of({"completions/failed": constant(3.0)}), (), TABLE) == []


def test_a_limit_that_is_short_and_a_policy_that_does_not_end() -> None:
    cut: Columns = {"completions/clipped_ratio": constant(0.5), "completions/mean_terminated_length": constant(20.0)}
    endless = cause_of("truncated", cut)  # of 96 tokens
    assert "run on" in endless.cause
    assert "demonstrations" in endless.remedy
    short = cause_of("truncated", {**cut, "completions/mean_terminated_length": constant(80.0)})
    assert short.remedy == "raise trl.max_completion_length (now 96)"
    none_ends = cause_of(
        "truncated", {"completions/clipped_ratio": constant(1.0), "completions/mean_terminated_length": constant(0.0)}
    )
    assert none_ends.remedy == short.remedy
    grown = cause_of("truncated", {"completions/clipped_ratio": falls(0.0, 0.5)})
    assert "they fitted before (-3 % cut off" in grown.cause  # the noise of these rows goes below 0
    assert "(now 0.0003)" in grown.remedy


def test_format_that_falls_because_responses_grow() -> None:
    grown = cause_of("format_falls", {"rest/format": falls(0.9, 0.5), "completions/clipped_ratio": falls(0.0, 0.4)})
    assert "more of them hit the length limit" in grown.cause
    assert "if they make sense raise trl.max_completion_length" in grown.remedy
    assert "updates so large" in cause_of("format_falls", {"rest/format": falls(0.9, 0.5)}).cause


def test_calls_that_fall_with_the_format_are_told_once() -> None:
    lost: Columns = {
        "rest/call_rate": falls(0.8, 0.2),
        "rest/format": falls(0.9, 0.3),
        "rest/accuracy": falls(0.5, 0.1),
    }
    assert "calls_fall" not in {finding.kind for finding in diagnose(rows_of(lost), (), TABLE)}


def test_fewer_calls_are_no_symptom_where_accuracy_gains() -> None:
    assert diagnose(rows_of({"rest/call_rate": falls(0.9, 0.6)}), (), TABLE) == []


def test_a_distribution_that_the_run_asked_to_change_is_named() -> None:
    rows = rows_of({"rest/surprise/excess": constant(-0.05)})
    (finding,) = diagnose(rows, (), {**TABLE, "trl": {**TABLE["trl"], "top_p": 0.9, "top_k": 0}})
    assert finding.cause.startswith("trl.top_p = 0.9: ")
    assert finding.remedy == "remove trl.top_p"


def test_too_few_nats_say_nothing_about_the_sampler() -> None:
    few: Columns = {"rest/surprise/excess": constant(-0.05), "rest/surprise/nats": constant(99.0)}
    assert diagnose(rows_of(few), (), TABLE) == []


def test_float16_may_skip_its_first_steps() -> None:
    rows = rows_of({"grad_norm": lambda step: None if step <= 3 else 0.3})
    assert diagnose(rows, (), {**TABLE, "trl": {**TABLE["trl"], "fp16": True}}) == []
    assert [finding.kind for finding in diagnose(rows, (), TABLE)] == ["not_finite"]


def test_supervised_training_has_no_entropy_to_keep() -> None:
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "entropy": 2.0 * 0.8**step} for step in range(1, 61)]
    assert diagnose(rows, (), TABLE) == []


def test_a_weight_that_the_curriculum_pushed_to_its_clip_is_not_the_entropy_s() -> None:
    # strength 0.5, gain 0.6: shifts of 0.3 * (step - 1) / 59; what the rule puts at 3.9 is at 4 from step 21 on
    weights = {**TABLE["rest"]["weights"], "gain_reasoning": 0.6, "decay_format": 0.6}
    table = {**TABLE, "rest": {"weights": weights}}

    def told(region: str, weight: Callable[[int], float], changes: Mapping[str, Any] | None = None) -> Finding:
        rows = rows_of({f"rest/rule_weight/{region}": weight})
        rested = {**weights, **(changes or {})}
        return next(
            f for f in diagnose(rows, (), {**table, "rest": {"weights": rested}}) if f.kind == "weight_at_its_clip"
        )

    pushed = told("reasoning", lambda step: min(4.0, 3.9 + 0.3 * (step - 1) / 59))
    assert (
        pushed.cause
        == "the curriculum has moved it there: reasoning by +0.30 so far, from 3.90 by its entropy in step 20"
    )
    assert pushed.remedy.startswith("lower rest.weights.gain_reasoning, or widen")
    down = told("format", lambda step: max(0.25, 0.3 - 0.3 * (step - 1) / 59))
    assert "format by -0.30 so far, from 0.30 by its entropy" in down.cause
    # at the clip from the first row, where the curriculum had moved nothing; or moved the other way; or dealt
    for region, weight in (("reasoning", 4.0), ("reasoning", 0.25), ("format", 4.0)):
        assert told(region, constant(weight)).cause.startswith("its entropy lies so far")
    late = told("reasoning", lambda step: max(0.25, 0.6 - 0.02 * step))
    assert late.cause.startswith("its entropy lies so far")
    assert told("reasoning", constant(4.0), {"rule": "permuted"}).cause.startswith("it was dealt the weight of another")


# Messages


def words_of_all_findings() -> Iterator[str]:
    for _, changes, _ in ILL:
        for finding in diagnose(rows_of(changes), (), TABLE):
            yield f"{finding.figure} {finding.cause} {finding.remedy}"


def test_remedies_name_settings_that_there_are() -> None:
    text = " ".join(words_of_all_findings())
    named = {prefix: set(re.findall(rf"\b{prefix}\.(\w+)", text)) for prefix in ("trl", "rest.reward", "rest.weights")}
    homes: dict[str, type] = {"trl": ResTConfig, "rest.reward": RewardConfig, "rest.weights": WeightConfig}
    for prefix, names in named.items():
        assert names
        assert names <= {field.name for field in dataclasses.fields(homes[prefix])}


def test_messages_are_single_lines_without_a_full_stop() -> None:
    for _, changes, _ in ILL:
        for finding in diagnose(rows_of(changes), (), TABLE):
            for text in (finding.figure, finding.cause, finding.remedy):
                assert text == text.strip().rstrip(".")
                assert "\n" not in text


# Sums by hand


def column_of(*values: float) -> MetricSeries:
    column = MetricSeries()
    for step, value in enumerate(values, 1):
        column.add(step, value)
    return column


def test_scatter_is_that_of_single_rows_whatever_the_trend() -> None:
    # differences 1 + 0.2, 1 - 0.2, ...: half their mean square is (1 + 0.04) / 2
    trend = column_of(*(row + 0.1 * (-1) ** (row + 1) for row in range(11)))
    assert trend.scatter() == pytest.approx(math.sqrt(1.04 / 2))
    # without a trend 0.2^2 / 2 = 0.02, so the error of ten rows is sqrt(0.02 / 10)
    level = column_of(*(0.1 * (-1) ** row for row in range(11)))
    mean = level.window_mean(11)
    assert (mean.value, mean.error) == (pytest.approx(0.0), pytest.approx(math.sqrt(0.002)))
    assert (mean.first, mean.last) == (2, 11)


def test_the_best_window_does_not_overlap_the_newest() -> None:
    peak = column_of(*[0.0] * 5, *[1.0] * WINDOW, *[0.5] * WINDOW)
    best = peak.best_window()
    assert best is not None
    assert (best.value, best.first, best.last) == (1.0, 6, 15)
    assert column_of(*range(10)).best_window() is None
    (first,) = [
        column_of(3.0, 1.0, *[0.0] * WINDOW).best_window()
    ]  # rows 1 and 2 are all that is before the newest window
    assert first is not None
    assert (first.value, first.first, first.last) == (2.0, 1, 2)


def test_the_gain_of_a_straight_line_is_its_rise() -> None:
    gain, error = column_of(*(0.5 + 0.01 * row for row in range(60))).fit_trend()
    assert gain == pytest.approx(0.59)
    # scatter 0.01 / sqrt(2); over sqrt(60 (60^2 - 1) / 12) = 134.14 rows, times 59
    assert error == pytest.approx(0.01 / math.sqrt(2) * 59 / math.sqrt(60 * 3599 / 12))


def test_most_groups_hold_a_response_that_one_in_twelve_is() -> None:
    # 1 - (1 - s)^8 = 1/2 at s = 1 - 2^(-1/8) = 0.0830
    assert DiagnosisSettings(group_size=8).most_groups_threshold == pytest.approx(0.0830, abs=5e-5)
    assert 1 - (1 - DiagnosisSettings(group_size=4).most_groups_threshold) ** 4 == pytest.approx(0.5)


def test_errors_asked_for_grow_with_the_looks_taken() -> None:
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


def test_a_difference_passes_its_errors_and_its_least() -> None:
    high, low = WindowMean(0.5, 0.03, 1, 10), WindowMean(0.3, 0.04, 11, 20)  # 0.2 apart, error of the difference 0.05
    assert high.is_above(low, errors=3.9)
    assert not high.is_above(low, errors=4.1)
    assert not high.is_above(low, errors=1, min_difference=0.21)
    assert high.exceeds(0.4, errors=3)
    assert not high.exceeds(0.42, errors=3)


# Hostile input


NASTY = [None, True, "x", math.nan, math.inf, -math.inf, 1e308, 10**400, -1e-320, [], {}]


def test_no_value_of_a_row_or_table_is_an_error() -> None:
    rng = random.Random(0)
    rows = [
        {key: rng.choice([*NASTY, make(step)]) for key, make in {**HEALTHY, "step": lambda step: step}.items()}
        for step in range(1, 120)
    ]
    tables = [
        {"trl": value, "rest": {"weights": {"w_min": value, "w_max": value}}} for value in [*NASTY, {"top_p": "x"}]
    ]
    tables += [
        {"trl": dict.fromkeys(("num_generations", "adam_beta2", "max_steps", "max_grad_norm"), value)}
        for value in NASTY
    ]
    for table in tables:
        for finding in diagnose(rows, [dict.fromkeys(("step", "exact_match", "exact_match_error"), 0.1)] * 3, table):
            assert isinstance(finding.figure, str)
    evaluations = [{"step": value, "exact_match": value, "exact_match_error": value} for value in NASTY]
    assert isinstance(diagnose(rows, evaluations), list)


def test_a_run_of_an_older_version_is_read_as_far_as_it_goes() -> None:
    old = DiagnosisSettings.from_table({**TABLE, "rest": {**TABLE["rest"], "gone": 1}, "removed": {"x": 1}})
    assert (old.max_length, old.total_steps) == (96, 60)
    assert (
        old.weight_clip == DiagnosisSettings.from_table({"trl": TABLE["trl"]}).weight_clip
    )  # [rest] as if it were not there
    elsewhere = DiagnosisSettings.from_table({**TABLE, "rest": {"weights": {"rule": "no_such_module:RULE"}}})
    assert (elsewhere.weight_clip, elsewhere.curriculum_shifts) == (None, {})
