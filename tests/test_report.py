"""Reports: groups of runs, curves with spread against numbers computed by hand, a page whose plots exist."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from rest_rl.config import RunConfig
from rest_rl.report.page import render_sample_responses, write_report
from rest_rl.report.palette import REGION_COLORS
from rest_rl.report.plots import find_gaps, with_gaps
from rest_rl.report.tables import before_after_rows, group_runs, markdown_table, mean_and_sd, metric_curve, running_mean
from rest_rl.response import Region
from rest_rl.runlog import Run, RunLog, read_run


def make_run(folder: Path, seed: int, preset: str = "rest", steps: int = 20, strength: float = 0.5) -> Path:
    overrides = [f"run.seed={seed}", f"rest.preset={preset}", f"rest.weights.strength={strength}"]
    log = RunLog.create(folder, RunConfig.from_toml("", overrides).to_toml(), [])
    for step in range(1, steps + 1):
        row = {"step": step, "reward": seed + step / 100, "rest/accuracy": 0.5, "frac_reward_zero_std": 0.1}
        for region in Region:
            value = None if region is Region.OTHER else 1.0 + region / 10
            row |= {f"rest/{quantity}/{region.label}": value for quantity in ("entropy", "weight", "share")}
        log.add_metrics(row)
    log.add_responses([{"step": 1, "response": "```{|}", "reward": 0.5}])
    scores = {"exact_match": 0.25, "s_acc": 0.5, "s_format": 1.0, "exact_match_error": 0.03, "n": 100}
    better = {**scores, "exact_match": 0.5, "exact_match_error": 0.04}
    log.update_summary(
        before={**scores, "kinds": {"single": scores}, "greedy": scores},
        after={**better, "kinds": {"single": better}, "greedy": better},
    )
    return folder


def test_every_region_has_its_own_color() -> None:
    assert list(REGION_COLORS) == [region.label for region in Region]
    assert len(set(REGION_COLORS.values())) == len(Region)


def test_the_page_of_one_run_is_in_its_folder(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run", seed=0)])
    text = page.read_text()
    assert page == tmp_path / "run" / "report.md"
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {Path(picture).name for picture in pictures} >= {"learning.png", "entropy.png", "weights.png", "reward.png"}
    for picture in pictures:
        assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")
        assert (page.parent / picture).stat().st_size < 150_000
    # 0.25 -> 0.5 with errors 0.03 and 0.04: +25 points, sqrt(3^2 + 4^2) = 5
    assert "| greedy | 100 | 25.0 → 50.0 | +25.0 ± 5.0 | 50.0 → 50.0 | 100.0 → 100.0 |" in text


def test_a_grid_folder_in_place_of_its_runs_is_explained(tmp_path: Path) -> None:
    make_run(tmp_path / "grid" / "runs" / "rest-0", seed=0, steps=1)
    with pytest.raises(ValueError, match=r"contains no config\.toml, .*; did you mean .*/grid/runs/\*\?"):
        write_report([tmp_path / "grid"])
    with pytest.raises(ValueError, match=r"did you mean .*/grid/runs/\*\?"):
        write_report([tmp_path / "grid" / "runs"])
    with pytest.raises(ValueError, match="pass the --out of a run"):
        write_report([tmp_path / "none"])


def test_seeds_of_one_configuration_are_one_group(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"rest-{seed}", seed) for seed in (0, 1, 2)]
    folders += [make_run(tmp_path / "grpo", 0, "grpo"), make_run(tmp_path / "weak", 0, strength=0.1)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("rest strength=0.5", 3),
        ("grpo", 1),
        ("rest strength=0.1", 1),
    ]
    line = metric_curve(groups[0].runs, "reward")
    # step 1 of seeds 0, 1, 2: 0.01, 1.01, 2.01, so mean 1.01 and sample deviation 1
    assert (line.steps[0], line.mean[0]) == (1, pytest.approx(1.01))
    assert (line.low[0], line.high[0]) == (pytest.approx(0.01), pytest.approx(2.01))
    page = write_report(folders, tmp_path / "report")
    assert "| rest strength=0.5 | 3 | 0.250 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 |" in page.read_text()


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, seed=1) for name in ("once", "twice")]
    with pytest.raises(ValueError, match=r"once and .*twice have the same configuration and the same seed"):
        write_report(folders, tmp_path / "report")


def test_missing_numbers_are_left_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", seed=0))
    assert metric_curve([run], "rest/entropy/other").steps == []
    assert metric_curve([run], "nonsense").steps == []


def test_unfinished_runs_have_dashes() -> None:
    rows = before_after_rows({"before": {"exact_match": 0.25, "s_acc": 0.5, "s_format": 1.0, "n": 4}})
    assert rows[0] == ("sampled, T = 1", "4", "25.0 → –", "–", "50.0 → –", "100.0 → –")


def test_greedy_scores_come_first_and_entropy_is_next_to_temperature_one() -> None:
    def evaluation(exact: float, entropy: float) -> dict[str, Any]:
        scores = {"exact_match": exact, "exact_match_error": 0.0, "s_acc": 1.0, "s_format": 1.0, "n": 8}
        one, two = ({**scores, "exact_match": exact + shift} for shift in (0.25, 0.125))
        kinds = {"kinds": {"single": scores, "parallel": scores}}
        return {**scores, **kinds, "greedy": {**one, **kinds}, "low_temperature": {**two, "temperature": 0.3},
                "policy_entropy": entropy}  # fmt: skip

    rows = before_after_rows({"before": evaluation(0.25, 0.5), "after": evaluation(0.5, 0.125)})
    assert [row[:4] for row in rows] == [
        ("greedy", "8", "50.0 → 75.0", "+25.0 ± 0.0"),
        ("  single", "8", "25.0 → 50.0", "+25.0 ± 0.0"),
        ("  parallel", "8", "25.0 → 50.0", "+25.0 ± 0.0"),
        ("sampled, T = 1", "8", "25.0 → 50.0", "+25.0 ± 0.0"),
        ("  policy entropy, nats", "", "0.500 → 0.125", "-0.375"),
        ("sampled, T = 0.3", "8", "37.5 → 62.5", "+25.0 ± 0.0"),
    ]


def test_mean_spread_and_smoothing_by_hand() -> None:
    assert mean_and_sd([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_and_sd([2.0]) == (2.0, 0.0)
    assert running_mean([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]


def test_missing_steps_are_gaps_in_the_line() -> None:
    steps = [1, 2, 4, 20, 21]  # every step but two, then sixteen without a number
    assert find_gaps(steps) == [3]
    assert [value for value in with_gaps(steps, find_gaps(steps)) if value == value] == steps
    assert math.isnan(with_gaps(steps, find_gaps(steps))[3])


def test_cells_cannot_break_a_table() -> None:
    assert markdown_table(("a", "b"), [("x|y", "1\n2")]).splitlines()[2] == "| x\\|y | 1 2 |"


@pytest.mark.parametrize("make", [lambda path: path, lambda path: RunLog.create(path, "", []).folder])
def test_folders_without_a_run_are_named(tmp_path: Path, make) -> None:
    with pytest.raises(ValueError, match=r"contains no config\.toml|does not exist|no training step is finished in"):
        write_report([make(tmp_path)])


def test_a_response_with_a_fence_is_quoted_in_a_longer_fence(tmp_path: Path) -> None:
    row = {"step": 1, "reward": 1.0, "response": "a ``` b\n````\nc"}
    text = render_sample_responses(Run(tmp_path, "", {}, (), (row,), (), (), {}))
    assert text.count("`````text\na ``` b\n````\nc\n`````") == 2


def test_a_run_of_an_older_version_belongs_to_the_same_group(tmp_path: Path) -> None:
    old, new = (make_run(tmp_path / name, seed, steps=1) for seed, name in enumerate(("old", "new")))
    config = (old / "config.toml").read_text()
    (old / "config.toml").write_text(config.replace("recorded_responses", "responses_per_step"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(group_runs([read_run(old), read_run(new)])) == 1
