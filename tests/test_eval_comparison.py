"""Comparisons of two evaluation folders: paired counts by hand, flips, warnings, refusals."""

from __future__ import annotations

import json
from itertools import product
from math import sqrt
from operator import mul
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from rest_rl.errors import UserError
from rest_rl.evaluate.compare import Change, compare_evaluations, compute_change, write_comparison
from rest_rl.evaluate.tables import comparison_markdown
from rest_rl.jsonl import as_json
from rest_rl.statistics import clustered_difference, mcnemar_p_value, paired_difference

SUMMARY: dict[str, Any] = {
    "benchmark": "bfcl",
    "version": "v3",
    "pin": "bfcl-eval 2025.6.14 (BFCL v3)",
    "model": "base",
    "prompt": "training",
    "format": "toolrl",
    "metrics": ["correct"],
    "groups": {"simple": {}, "java": {}},
    "settings": {"model": "base", "max_new_tokens": 512},
}


def write_folder(folder: Path, rows: list[dict[str, Any]], **summary: Any) -> Path:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(as_json(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "summary.json").write_text(as_json({**SUMMARY, **summary}), encoding="utf-8")
    return folder


def row(category: str, index: int, correct: bool | None, **more: Any) -> dict[str, Any]:
    return {"id": f"{category}_{index}", "category": category, "response": "", "calls": [], "correct": correct, **more}


def rows(simple: str, java: str) -> list[dict[str, Any]]:
    """Verdicts as text: `1` correct, `0` wrong, `?` not scored."""
    verdicts = {"1": True, "0": False, "?": None}
    return [
        row(category, index, verdicts[letter], reason=f"{category} says {letter}")
        for category, text in (("java", java), ("simple", simple))
        for index, letter in enumerate(text)
    ]


def test_changes_are_paired_and_follow_the_summary(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("1100000000", "111"))
    tuned = write_folder(tmp_path / "tuned", rows("1011111110", "110"), model="tuned")
    result = compare_evaluations(base, tuned)
    simple, java, everything = result.metrics["correct"]
    assert [simple.group, java.group, everything.group] == ["simple", "java", "all"]
    # simple: right 2 and 8 of 10; sample 1 lost, samples 2 to 8 gained; exact p = 2 (1 + 8) / 2^8 = 18 / 256
    assert (simple.n, simple.base, simple.tuned, simple.lost, simple.gained) == (10, 0.2, 0.8, 1, 7)
    assert simple.difference == pytest.approx(0.6)
    assert simple.p == pytest.approx(18 / 256)
    # one flipped sample is no evidence: p = 1; q = p times 2 groups / rank, and never above 1
    assert (java.lost, java.gained, java.p) == (1, 0, 1.0)
    assert (simple.q, java.q, everything.q) == (pytest.approx(36 / 256), 1.0, None)
    # all: 2 lost and 7 gained of 13; p = 2 (C(9,0) + C(9,1) + C(9,2)) / 2^9 = 92 / 512
    assert (everything.n, everything.lost, everything.gained) == (13, 2, 7)
    assert everything.p == pytest.approx(92 / 512)
    assert (everything.low, everything.high) == paired_difference(2, 7, 13)[1:]
    assert result.warnings == ()


def test_official_averages_are_compared_by_their_weights(tmp_path: Path) -> None:
    weights = {"simple": 0.75, "java": 0.25}
    official = {
        "Overall": {"accuracy": 0.4, "of": [*weights], "weights": weights},
        "Live": {"accuracy": 0.4, "weights": {"live_simple": 1.0}},
        "Multi-Turn": {"accuracy": 0.4, "of": ["simple"]},
    }
    base = write_folder(tmp_path / "base", rows("1100000000", "11110"), official=official)
    tuned = write_folder(tmp_path / "tuned", rows("1011111110", "11011"), official=official)
    table = {found.group: found for found in compare_evaluations(base, tuned).metrics["correct"]}
    # neither averages of one side only nor those without weights
    assert list(table) == ["simple", "java", "Overall", "all"]
    overall = table["Overall"]
    # simple 2 and 8 of 10, java 4 and 4 of 5: 0.75 * 0.2 + 0.25 * 0.8 = 0.35 and 0.75 * 0.8 + 0.25 * 0.8 = 0.8
    assert (overall.base, overall.tuned, overall.difference) == pytest.approx((0.35, 0.8, 0.45))
    assert (overall.n, overall.lost, overall.gained, overall.p, overall.q) == (15, 2, 8, None, None)
    # simple: p = 2 / 12, q = 8 / 12, q - p = 0.5, half = z sqrt((10 / 12 - 0.25) / 12) = 0.4321: [0.0679, 0.9321]
    # java: p = q = 2 / 7, half = z sqrt((4 / 7) / 7) = 0.5600: [-0.5600, 0.5600]
    # low = 0.45 - sqrt((0.75 * 0.5321)² + (0.25 * 0.56)²), high = 0.45 + sqrt((0.75 * 0.3321)² + (0.25 * 0.56)²)
    assert (overall.low, overall.high) == pytest.approx((0.0270, 0.7357), abs=1e-4)
    other = {"Overall": {"accuracy": 0.4, "weights": {"simple": 0.5, "java": 0.5}}}
    for name, others in (("none", {}), ("other", other)):
        side = write_folder(tmp_path / name, rows("1011111110", "11011"), official=others)
        assert [found.group for found in compare_evaluations(base, side).metrics["correct"]] == [
            "simple",
            "java",
            "all",
        ]


def test_flips_list_samples_with_both_reasons(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("10", "1"))
    overflown = [
        row("simple", 0, False, overflow="too long"),
        row("simple", 1, True),
        row("java", 0, False, refused="no such role"),
    ]
    result = compare_evaluations(base, write_folder(tmp_path / "tuned", overflown))
    told = {flip.id: (flip.group, flip.direction, flip.base_reason, flip.tuned_reason) for flip in result.flips}
    assert told == {
        "simple_0": ("simple", "lost", "simple says 1", "too long"),
        "simple_1": ("simple", "gained", "simple says 0", ""),
        "java_0": ("java", "lost", "java says 1", "no such role"),
    }
    path, *_ = write_comparison(result, tmp_path / "new")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == json.loads(json.dumps(result.to_json()["flips"]))
    assert lines[0]["metric"] == "correct"
    assert sorted(one.name for one in path.parent.iterdir()) == ["comparison.json", "comparison.md", "flips.jsonl"]
    with pytest.raises(UserError, match="cannot write to"):
        write_comparison(result, path / "below-a-file")


def test_both_metrics_of_api_bank_are_compared(tmp_path: Path) -> None:
    def levels(soft: str, strict: str) -> list[dict[str, Any]]:
        pairs = enumerate(zip(soft, strict, strict=True))
        return [{"id": f"L{i}", "level": 1 + i % 2, "soft": a == "1", "strict": b == "1"} for i, (a, b) in pairs]

    how = {
        "benchmark": "api_bank",
        "metrics": ["soft", "strict"],
        "groups": {"Level1": {}, "Level2": {}, "overall": {}},
    }
    base = write_folder(tmp_path / "base", levels("1100", "0000"), **how)
    tuned = write_folder(tmp_path / "tuned", levels("1111", "0001"), **how)
    result = compare_evaluations(base, tuned)
    found = {metric: [(c.group, c.n, c.gained) for c in table] for metric, table in result.metrics.items()}
    assert found == {
        "soft": [("Level1", 2, 1), ("Level2", 2, 1), ("all", 4, 2)],
        "strict": [("Level1", 2, 0), ("Level2", 2, 1), ("all", 4, 1)],
    }
    assert json.loads(as_json(result.to_json()))["metrics"]["soft"][2]["q"] is None


def test_only_samples_scored_on_both_sides_count(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("11?1", ""))
    tuned = write_folder(tmp_path / "tuned", [*rows("0?1", ""), row("simple", 9, True)])
    result = compare_evaluations(base, tuned)
    assert [(change.group, change.n, change.lost) for change in result.metrics["correct"]] == [
        ("simple", 1, 1),
        ("all", 1, 1),
    ]
    assert result.warnings == ("left out, scored on one side only: 2 of the base model, 2 of the tuned model",)


def test_other_explanations_of_a_difference_are_warnings(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("11", ""))
    settings = {"model": "tuned", "weights": "abc", "max_new_tokens": 1024, "note": "x" * 500}
    tuned = write_folder(
        tmp_path / "tuned", rows("111", ""), model="tuned", prompt="native", format="hermes", settings=settings
    )
    warnings = compare_evaluations(base, tuned).warnings
    assert warnings[:4] == (
        "prompt differs: 'training' and 'native'",
        "format differs: 'toolrl' and 'hermes'",
        "number of samples differs: 2 and 3",
        "left out, scored on one side only: 0 of the base model, 1 of the tuned model",
    )
    assert warnings[4] == "max_new_tokens differs: 512 and 1024"
    assert warnings[5].startswith("note differs: None and 'xxx")
    assert len(warnings[5]) < 220
    assert len(warnings) == 6


def test_comparing_a_model_with_itself_warns(tmp_path: Path) -> None:
    pair = [write_folder(tmp_path / name, rows("10", ""), settings={"weights": "abc"}) for name in ("one", "other")]
    result = compare_evaluations(*pair)
    assert result.warnings == ("both evaluations use the same weights: any difference is due to settings or chance",)
    assert (result.flips, result.metrics["correct"][-1].p) == ((), 1.0)


@pytest.mark.parametrize(
    ("key", "value"), [("benchmark", "api_bank"), ("version", "v4"), ("pin", "bfcl-eval 2026.3.23 (BFCL v4)")]
)
def test_different_versions_are_refused(tmp_path: Path, key: str, value: str) -> None:
    base, tuned = (
        write_folder(tmp_path / "a", rows("1", "")),
        write_folder(tmp_path / "b", rows("1", ""), **{key: value}),
    )
    with pytest.raises(
        ValueError, match=rf"different {key}: .* expected the same samples .* compare evaluations of one"
    ):
        compare_evaluations(base, tuned)


def test_folders_without_an_evaluation_are_refused(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("1", ""))
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text('{"before": {}}', encoding="utf-8")
    for other in (run, tmp_path / "nothing"):
        with pytest.raises(
            ValueError, match=r"(contains no summary.json of an evaluation|does not exist), expected .* --resume"
        ):
            compare_evaluations(base, other)
    with pytest.raises(ValueError, match=r"contains no samples.jsonl"):
        compare_evaluations(write_folder(tmp_path / "empty", []), base)


def test_disjoint_evaluations_are_refused(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("1?", ""))
    for name, others in (("other", rows("", "1")), ("failed", rows("?1", ""))):
        with pytest.raises(ValueError, match="share no scored sample"):
            compare_evaluations(base, write_folder(tmp_path / name, others))


def test_incomplete_lines_and_earlier_attempts_are_ignored(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", rows("10", ""))
    tuned = write_folder(tmp_path / "tuned", [row("simple", 0, None, error="503"), row("simple", 0, True)])
    with (tuned / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "simple_1", "correct": tr')
    simple = compare_evaluations(base, tuned).metrics["correct"][0]
    assert (simple.n, simple.tuned) == (1, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_the_change_is_the_difference_of_the_accuracies(pairs: list[tuple[bool, bool]]) -> None:
    found = compute_change("any", pairs)
    assert found.difference == pytest.approx(found.tuned - found.base)
    assert found.low <= found.difference <= found.high
    assert found.p == mcnemar_p_value(found.lost, found.gained)
    swapped = compute_change("any", [(new, old) for old, new in pairs])
    assert (swapped.lost, swapped.gained, swapped.base) == (found.gained, found.lost, found.tuned)
    assert isinstance(swapped, Change)


attempts = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3)


@given(st.lists(attempts, min_size=2, max_size=8))
def test_attempts_at_one_task_are_compared_as_one_sample(tasks: list[list[tuple[bool, bool]]]) -> None:
    pairs = [pair for task in tasks for pair in task]
    found = compute_change("any", pairs, [str(number) for number, task in enumerate(tasks) for _ in task])
    sums = [sum(new - old for old, new in task) for task in tasks]
    means = [total / 3 for total in sums]
    assert found.clusters == len(tasks)
    assert found.difference == pytest.approx(sum(means) / len(means))
    if len(set(means)) > 1:
        low, high = ttest_1samp(means, 0).confidence_interval()
        assert (found.low, found.high) == pytest.approx((max(-1, low), min(1, high)))
    flipped = [abs(sum(map(mul, signs, sums))) for signs in product((-1, 1), repeat=len(sums))]
    assert found.p == pytest.approx(sum(total >= abs(sum(sums)) for total in flipped) / len(flipped))


def test_equal_changes_of_all_tasks_count_as_one_sample_each() -> None:
    interval, p = clustered_difference([(1, 3)] * 12)
    # Bonett and Price with 4 gained of 12: p = 1 / 14, q = 5 / 14
    half = 1.959964 * sqrt((6 / 14 - (4 / 14) ** 2) / 14)
    assert interval == pytest.approx((1 / 3, 4 / 14 - half, 4 / 14 + half))
    assert p == pytest.approx(2 / 2**12)
    assert clustered_difference([(0, 3)] * 12)[1] == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_with_one_attempt_the_test_is_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    changes = [new - old for old, new in pairs]
    p = clustered_difference([(change, 1) for change in changes])[1]
    assert p == pytest.approx(mcnemar_p_value(changes.count(-1), changes.count(1)))


def test_clusters_of_one_sample_change_nothing() -> None:
    pairs = [(True, False), (False, True), (False, True), (True, True), (False, False)]
    assert compute_change("any", pairs, list("abcde")) == compute_change("any", pairs)


def test_the_field_of_the_clusters_comes_from_the_summary(tmp_path: Path) -> None:
    def attempts_of(verdicts: str) -> list[dict[str, Any]]:
        own = [row("simple", number, verdict == "1") for number, verdict in enumerate(verdicts)]
        return [{**each, "task": str(number // 2)} for number, each in enumerate(own)]

    folders = [
        write_folder(tmp_path / name, attempts_of(name), cluster_field="task") for name in ("00000001", "11110001")
    ]
    comparison = compare_evaluations(*folders)
    change = comparison.metrics["correct"][-1]
    assert (change.n, change.clusters, change.difference) == (8, 4, 0.5)
    assert change.p == 0.5  # two of the four combinations of signs have a total of at least 4
    assert "sign-flip test over the tasks" in comparison_markdown(comparison.to_json())
