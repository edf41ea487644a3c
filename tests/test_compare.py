"""Comparisons: metrics of synthetic runs checked by hand, every verdict, the page and its plots."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rest_rl.compare.collect import ComparisonReport, compute_metrics, step_curves
from rest_rl.compare.grid import METHODS, Grid, RunName, is_finished, read_grid
from rest_rl.compare.run import compare as compare_grid
from rest_rl.compare.statistics import area_under_curve
from rest_rl.config import RunConfig
from rest_rl.runlog import RunLog, read_run
from tests.made_up_grid import Effect, make_grid, make_run


def compare(folder: Path, reference: str | None = None) -> ComparisonReport:
    return compare_grid(out=folder, only_report=True, reference=reference)


def texts(report: ComparisonReport) -> list[str]:
    return [statement.text for statement in report.verdict]


def kinds(report: ComparisonReport) -> list[str]:
    return [statement.kind for statement in report.verdict]


def text_of(report: ComparisonReport, kind: str) -> str:
    return next(statement.text for statement in report.verdict if statement.kind == kind)


def page_of(report: ComparisonReport) -> str:
    assert report.page is not None
    return report.page.read_text()


def said(folder: Path) -> str:
    return "\n".join(texts(compare(folder)))


def test_metrics_of_a_run_by_hand(tmp_path: Path) -> None:
    log = RunLog.create(tmp_path / "run", "", [])
    for step, exact in enumerate((0.0, 0.2, 0.4, 0.4, 0.6), start=1):
        log.add_metrics(
            {"step": step, "rest/exact_match": exact, "rest/accuracy": 0.5, "completions/mean_length": 30.0}
        )
    for step, exact in ((2, 0.2), (4, 0.4), (8, 0.6)):
        log.add_evaluation({"step": step, "exact_match": exact})
    log.update_summary(
        before={"exact_match": 0.25},
        after={
            "exact_match": 0.5,
            "s_acc": None,
            "greedy": {"exact_match": 1},
            "policy_entropy": 0.125,
            "low_temperature": {"exact_match": 0.75, "temperature": 0.2},
        },
    )
    found = compute_metrics(read_run(tmp_path / "run"))
    # mean of five steps 1.6 / 5; the last fifth is the last step; trapezoids 2 * .3 + 4 * .5 over 6 steps
    assert found == {
        "exact": 0.5,
        "exact_greedy": 1.0,
        "exact_low": 0.75,
        "policy_entropy": 0.125,
        "train_exact": pytest.approx(0.32),
        "train_s_acc": 0.5,
        "train_exact_end": 0.6,
        "slice_exact": pytest.approx((2 * 0.3 + 4 * 0.5) / 6),
        "gain": 0.25,
        "tokens": 30.0,
    }
    assert area_under_curve({3: 0.5}) is None
    # with both greedy scores the gain is greedy: 1 - .75
    log.update_summary(before={"exact_match": 0.25, "greedy": {"exact_match": 0.75}})
    assert compute_metrics(read_run(tmp_path / "run"))["gain"] == 0.25


def test_greedy_exact_match_is_primary_and_the_fallback_is_sampled(tmp_path: Path) -> None:
    make_grid(tmp_path, LEADING, seeds=3)
    assert compare(tmp_path).primary == "exact_greedy"
    for place in (tmp_path / "runs").iterdir():
        summary = json.loads((place / "summary.json").read_text())
        for when in ("before", "after"):  # as an older version or verl writes it
            for key in ("greedy", "low_temperature", "policy_entropy"):
                del summary[when][key]
        (place / "summary.json").write_text(json.dumps(summary))
    found = compare(tmp_path)
    assert found.primary == "exact"
    text = page_of(found)
    assert "## Sampled responses" not in text
    assert text.split("## After training")[1].split("\n")[4].startswith("| percent | seeds | exact match at T = 1 |")
    assert "nan" not in text.lower()


def test_the_sampled_scores_are_next_to_the_entropy_and_the_start(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(), "rest": Effect(lead=0.05)}, seeds=1)
    found = compare(tmp_path)
    section = page_of(found).split("## Sampled responses and policy entropy")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.split("\n") if line.startswith("|")]
    # before: .4 at T = 1, .5 greedy, .45 at T = .2 and .9 - .4 nats; one seed has no interval
    assert rows[2] == ["before training", "50.0", "40.0", "", "45.0", "", "0.500", ""]
    assert [row[0] for row in rows[3:]] == ["grpo", "rest"]
    assert [rows[4][column] for column in (3, 5, 7)] == ["+5.0", "+5.0", "-0.050"]


def with_entropy_of_accuracy(folder: Path) -> None:
    """Let the entropy of every run depend on its accuracy alone."""
    for path in (folder / "runs").glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "entropy": 1 - row["rest/exact_match"]}) + "\n" for row in rows))


def test_a_lead_that_is_gone_at_equal_entropy_is_not_confirmed(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.004), "rest": Effect(0.08, noise=0.004)})
    found = compare(tmp_path)
    rest = found.line("rest")
    assert rest is not None
    assert rest.at_entropy is not None
    # both entropies fall alike, to a mean of .2 + .3 * 5 / 120 over the last six steps
    assert rest.at_entropy.entropy == pytest.approx(0.2125)
    assert rest.at_entropy.paired.difference.low > 0.06
    assert "not_at_equal_entropy" not in kinds(found)
    with_entropy_of_accuracy(tmp_path)
    found = compare(tmp_path)
    rest = found.line("rest")
    assert rest is not None
    assert rest.at_entropy is not None
    assert abs(rest.at_entropy.paired.difference.value) < 0.005
    assert "not_at_equal_entropy" in kinds(found)
    assert "## At equal policy entropy" in page_of(found)
    figures = json.loads((tmp_path / "compare.json").read_text())["methods"]["rest"]["at_equal_entropy"]
    assert figures["paired"]["n"] == 5


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(), "rest": Effect(lead=0.05)}, seeds=3)
    rest = compare(tmp_path).line("rest")
    assert rest is not None
    test = rest.metrics["exact"].paired
    assert test is not None
    # seeds shift both methods equally, so the paired difference is .05 although the means spread far more
    assert test.difference.value == pytest.approx(0.05)
    assert test.sd < 1e-12
    mean = rest.metrics["exact"].mean
    assert mean.high - mean.low > 0.06
    assert rest.seeds == [0, 1, 2]


def test_no_difference_beyond_seed_noise(tmp_path: Path) -> None:
    noisy = Effect(noise=0.03)
    make_grid(tmp_path, {"grpo": noisy, "rest": noisy, "permuted": noisy, "inverted": noisy})
    found = compare(tmp_path)
    assert kinds(found) == ["no_difference", "reference_learnt", "power"]
    assert found.seeds == 5
    assert f"{100 * found.detectable:.1f} points" in text_of(found, "power")


def test_a_lead_over_shuffled_weights(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.004), "rest": Effect(0.08, 2, 0.004), "permuted": Effect(noise=0.004)})
    found = compare(tmp_path)
    assert kinds(found)[:2] == ["some_differ", "difference"]
    assert "regions_matter" in kinds(found)
    assert re.search(r"`rest`: \+\d.* 0\.\d\d times the steps", text_of(found, "difference"))


def test_shuffled_weights_with_the_same_lead(tmp_path: Path) -> None:
    better = Effect(0.08, noise=0.004)
    make_grid(tmp_path, {"grpo": Effect(noise=0.004), "rest": better, "permuted": better})
    assert "shuffled_as_good" in kinds(compare(tmp_path))


LEADING = {"grpo": Effect(noise=0.004), "rest": Effect(0.08, noise=0.004)}


@pytest.mark.parametrize(("seeds", "words"), [((7, 8), "no seed"), ((0,), "one seed")])
def test_shuffled_weights_with_other_seeds_are_no_control(tmp_path: Path, seeds: tuple[int, ...], words: str) -> None:
    grid = make_grid(tmp_path, LEADING)
    for seed in seeds:
        make_run(tmp_path, RunName("permuted", "", seed), permuted_run(grid, seed), Effect(0.08, noise=0.004))
    found = compare(tmp_path)
    assert words in text_of(found, "control_unknown")
    assert "nan" not in said(tmp_path)
    assert "shuffled_as_good" not in kinds(found)


def test_noisy_shuffled_weights_leave_it_open(tmp_path: Path) -> None:
    make_grid(tmp_path, {**LEADING, "permuted": Effect(0.06, noise=0.06)})
    found = compare(tmp_path)
    assert "[-" in text_of(found, "control_unknown")
    assert "shuffled_as_good" not in kinds(found)


def permuted_run(grid: Grid, seed: int) -> RunConfig:
    return replace(grid, methods={**grid.methods, "permuted": METHODS_AS_TABLES["permuted"]}).run_config(
        "permuted", "", seed
    )


METHODS_AS_TABLES = read_grid(None, methods=list(METHODS)).methods


def test_a_lead_without_the_control_is_open(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.004), "rest": Effect(0.08, noise=0.004)})
    assert "no_control" in kinds(compare(tmp_path))


def test_only_the_control_leads(tmp_path: Path) -> None:
    make_grid(
        tmp_path, {"grpo": Effect(noise=0.004), "rest": Effect(noise=0.004), "permuted": Effect(0.1, noise=0.004)}
    )
    assert "only_control_leads" in kinds(compare(tmp_path))


def with_gains(folder: Path, gains: dict[str, tuple[float, ...]]) -> ComparisonReport:
    """The comparison of runs with these gains over their start, seed by seed."""
    make_grid(folder, dict.fromkeys(gains, Effect()), seeds=max(map(len, gains.values())))
    for method, own in gains.items():
        for seed in range(max(map(len, gains.values()))):
            place = folder / "runs" / f"{method}-{seed}"
            if seed < len(own):
                scores = {"before": {"exact_match": 0.4}, "after": {"exact_match": 0.4 + own[seed]}}
                (place / "summary.json").write_text(json.dumps({"steps": 60, **scores}))
            else:
                shutil.rmtree(place)
    return compare(folder)


def test_whether_the_baseline_learned_has_three_answers(tmp_path: Path) -> None:
    # five gains of .0 ± .002: half = 2.776 * .0016 / sqrt(5) = .002, so certainly below 3 points
    flat = with_gains(tmp_path / "a", {"grpo": (0.002, -0.002, 0.0, 0.001, -0.001)})
    assert "reference_flat" in kinds(flat)
    learnt = with_gains(tmp_path / "b", {"grpo": (0.2, 0.25, 0.21)})
    assert "+22.0 [" in text_of(learnt, "reference_learnt")
    # .4, -.3, .2: mean .1 and a half of .9
    unknown = with_gains(tmp_path / "c", {"grpo": (0.4, -0.3, 0.2)})
    assert "+10.0 [" in text_of(unknown, "reference_unknown")
    assert "+20.0 points" in text_of(with_gains(tmp_path / "d", {"grpo": (0.2,)}), "reference_gain")


def test_whether_random_rewards_help_has_three_answers(tmp_path: Path) -> None:
    grpo = (0.2, 0.25, 0.21)
    taught = with_gains(tmp_path / "a", {"grpo": grpo, "random": (0.1, 0.12, 0.11)})
    assert "+11.0 [+8.5, +13.5] points" in text_of(taught, "random_gains")
    assert "no_difference" not in kinds(taught)  # `random` is no rival
    assert "random_flat" in kinds(with_gains(tmp_path / "b", {"grpo": grpo, "random": (0.001, -0.001, 0.0)}))
    for name, gains in (("c", (0.2,)), ("d", (0.4, -0.3, 0.2))):
        assert "random_unknown" in kinds(with_gains(tmp_path / name, {"grpo": grpo, "random": gains}))


def test_methods_with_fewer_seeds_are_named_except_random(tmp_path: Path) -> None:
    noisy = Effect(noise=0.02)
    grid = make_grid(tmp_path, {"grpo": noisy, "rest": noisy, "dapo": noisy})
    make_run(tmp_path, RunName("random", "", 0), grid.run_config("grpo", "", 0), noisy)
    found = compare(tmp_path)
    assert found.seeds == 5
    assert "power" in kinds(found)
    assert not {"one_seed", "fewer_seeds"} & set(kinds(found))
    for seed in (1, 2, 3, 4):
        shutil.rmtree(tmp_path / "runs" / f"dapo-{seed}")
    found = compare(tmp_path)
    assert found.seeds == 5
    assert "`dapo` 1" in text_of(found, "fewer_seeds")


@pytest.mark.parametrize(
    ("lead", "kind", "words"),
    [
        (0.0, "no_difference", "`rest` differs by "),
        (0.1, "above", "(greedy exact match, p ≤ 0.05)"),
        (-0.1, "below", "(greedy exact match, p ≤ 0.05)"),
    ],
)
def test_two_methods_are_one_test_without_correction(tmp_path: Path, lead: float, kind: str, words: str) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.02), "rest": Effect(lead, noise=0.02)})
    found = compare(tmp_path)
    assert found.verdict[0].kind == kind
    assert words in found.verdict[0].text
    text = page_of(found)
    assert "number of methods" not in text
    assert " q " not in text
    section = text.split("## Seed by seed")[1].split("##")[0]
    figures = [[float(cell) for cell in line.split("|")[2:5]] for line in section.split("\n") if "| seed" in line]
    assert len(figures) == 5
    for theirs, ours, difference in figures:
        assert difference == pytest.approx(ours - theirs, abs=0.11)
    assert "nan" not in text.lower()
    assert "## Ablations" not in text


def test_one_seed_allows_no_test(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(), "rest": Effect(0.2)}, seeds=1)
    assert kinds(compare(tmp_path)) == ["no_verdict", "reference_gain", "one_seed"]


def test_q_corrects_for_the_number_of_methods(tmp_path: Path) -> None:
    noisy = Effect(noise=0.03)
    make_grid(tmp_path, dict.fromkeys(("grpo", "rest", "rest_live", "dapo", "dr_grpo", "inverted"), noisy), seeds=4)
    for line in compare(tmp_path).rivals():
        versus = line.metrics["exact"]
        assert versus.paired is not None
        assert versus.q >= versus.paired.p_t


def test_steps_are_counted_on_the_held_out_slice_where_there_is_one(tmp_path: Path) -> None:
    make_grid(tmp_path / "a", {"grpo": Effect(), "rest": Effect(speed=2)}, every=10)
    found = compare(tmp_path / "a")
    assert found.counted_on.startswith("the held-out slice")
    rest, grpo = found.line("rest"), found.line("grpo")
    assert rest is not None
    assert grpo is not None
    assert rest.to_final is not None
    # twice the speed: grpo is at step 60 where rest is at 30
    assert rest.to_final.share == rest.to_final.by_seed.value == pytest.approx(0.5)
    assert "sooner" not in kinds(found)  # equally fast under every seed: no spread, no interval
    assert grpo.to_final is not None
    assert grpo.to_final.share == 1.0
    make_grid(tmp_path / "b", {"grpo": Effect(), "rest": Effect(speed=2)})
    found = compare(tmp_path / "b")
    assert found.counted_on.startswith("the training samples")
    # windows of 6 steps: the curves begin at step 6
    curves, _ = step_curves([run for line in found.lines for run in line.runs])
    assert min(curves[RunName("rest", "", 0)]) == 6


def test_a_method_that_is_faster_with_the_same_final_score(tmp_path: Path) -> None:
    noisy = Effect(noise=0.004)
    make_grid(tmp_path, {"grpo": noisy, "rest": Effect(0.01, 2, 0.004), "permuted": noisy}, every=2)
    text = text_of(compare(tmp_path), "sooner")
    assert re.search(r"`rest` in 0\.\d\d \[0\.\d\d, 0\.\d\d\] times the steps", text)
    assert "`permuted`" not in text


def test_settings_that_differ_between_runs_are_named(tmp_path: Path) -> None:
    grid = make_grid(tmp_path, {"grpo": Effect(), "rest": Effect()}, seeds=2)
    assert compare(tmp_path).unequal == ()
    other = read_grid(None, methods=["grpo", "dapo"], overrides=["trl.max_steps=30", "data.num_samples=100"])
    make_run(tmp_path, RunName("dapo", "", 0), other.run_config("dapo", "", 0), Effect(), steps=30)
    make_run(tmp_path, RunName("rest", "", 2), grid.run_config("grpo", "", 2), Effect())
    text = "\n".join(compare(tmp_path).unequal)
    assert "trl.max_steps: 30 in dapo-0; 60 in grpo-0, grpo-1, rest-0 and 2 more" in text
    assert "data.num_samples: 100 in dapo-0" in text
    assert "the settings of rest differ between its seeds: rest.preset" in text


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(), "rest": Effect()}, seeds=2)
    log = RunLog.create(tmp_path / "runs" / "dapo-0", "", [])
    log.update_summary(before={"exact_match": 0.1})
    log.add_metrics({"step": 7})
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "grpo-0.log").write_text("a log next to the runs")
    RunLog.create(tmp_path / "runs" / "mine", "", []).update_summary(steps=3)
    log.add_metrics({"step": None, "loss": 1.0})
    found = compare(tmp_path)
    assert found.unfinished == {
        "dapo-0": "is unfinished at step 7",
        "mine": "is not named METHOD-SEED",
        "notes": "contains no run",
    }
    with pytest.raises(ValueError, match=r"no finished run of the baseline 'rest_live'.*rest, grpo"):
        compare(tmp_path, "rest_live")
    with pytest.raises(ValueError, match="has no finished run"):
        compare(tmp_path / "runs")


def test_planned_runs_without_a_folder_are_named(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.02), "rest": Effect(noise=0.02), "dapo": Effect()}, seeds=3)
    for name, text in read_grid(None, methods=["grpo", "rest", "dapo", "inverted"]).to_files().items():
        (tmp_path / name).write_text(text)
    for name in ("dapo-0", "dapo-1", "dapo-2", "rest-2"):
        shutil.rmtree(tmp_path / "runs" / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dapo-0.log").write_text("error: the model does not exist")
    (tmp_path / "logs" / "dapo-1.log").write_text("")
    found = compare(tmp_path)
    assert found.unfinished["dapo-0"] == "has no run folder (see logs/dapo-0.log)"
    assert found.unfinished["dapo-1"] == found.unfinished["rest-2"] == "has not started"
    assert len(found.unfinished) == 7  # of 12: all of dapo and inverted, one of rest
    assert found.verdict[0].kind == "unfinished"
    assert "7 of 12 runs" in found.verdict[0].text
    assert set(found.absent) == {"dapo", "inverted"}
    text = page_of(found)
    assert text.split("* ")[1].startswith("**7 of 12 runs")
    assert "* `dapo-0` has no run folder (see logs/dapo-0.log) and is left out." in text
    table = text.split("## After training")[1].split("##")[0]
    assert re.search(r"\n\| dapo \| 0 \|( – \|)+\n", table)
    figures = json.loads((tmp_path / "compare.json").read_text())
    assert figures["unfinished"] == found.unfinished
    assert sorted(figures["without_a_finished_run"]) == ["dapo", "inverted"]


def test_a_grid_without_learning_says_so_first(tmp_path: Path) -> None:
    found = with_gains(tmp_path / "a", {"grpo": (0.0, 0.0, 0.0), "rest": (0.0, 0.0, 0.0)})
    assert found.verdict[0].kind == "nothing_learnt"
    # no difference, but both learn
    found = with_gains(tmp_path / "b", {"grpo": (0.1, 0.2, 0.1), "rest": (0.1, 0.2, 0.1)})
    assert found.verdict[0].kind == "no_difference"
    make_grid(tmp_path / "c", {"grpo": Effect(), "rest": Effect()}, seeds=2)
    for place in (tmp_path / "c" / "runs").iterdir():
        (place / "summary.json").write_text('{"steps": 60, "after": {"exact_match": 0.0}}')
    assert compare(tmp_path / "c").verdict[0].kind == "nothing_learnt"


def test_a_run_is_finished_after_its_second_evaluation() -> None:
    assert is_finished({"steps": 3, "before": {}, "after": {}})
    assert is_finished({"steps": 3})
    assert not is_finished({"steps": 3, "before": {}})
    assert not is_finished({"before": {}})
    # with `eval.before = false`, only the status tells a run that was killed in its evaluation from one without any
    assert not is_finished({"steps": 3, "status": "evaluating"})
    assert is_finished({"steps": 3, "status": "finished"})


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    effects = {name: Effect(0.004 * index, 1 + index / 20, 0.01) for index, name in enumerate(METHODS)}
    make_grid(folder, effects, seeds=3, every=10)
    page = compare(folder).page
    assert page is not None
    return page


def test_the_page_has_every_section_and_every_run(whole_page: Path) -> None:
    text = whole_page.read_text()
    for title in (
        "After training",
        "During training",
        "Steps to the same score",
        "Entropy and gradient norm",
        "Ablations",
        "Every run",
    ):
        assert f"\n## {title}\n" in text
    assert "nan" not in text.lower()
    for method in METHODS:
        for seed in range(3):
            assert f"\n| {method}-{seed} |" in text
    # Table 3: `rest` first, then without each of its parts, with a column per kind of task
    table = text.split("## Ablations")[1]
    assert table.split("\n")[4].startswith("| percent | single | parallel | none | all | – rest |")
    assert table.split("\n")[6].startswith("| rest |")
    assert "| rest without gradient on reasoning |" in table
    rows = [line for line in table.split("\n## ")[0].split("\n") if line.startswith("| rest")]
    assert len(rows) == 1 + sum(method.role == "ablation" for method in METHODS.values()) == 5
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [Path(picture).name for picture in pictures] == [
        "differences.png",
        "learning.png",
        "slice.png",
        "dynamics.png",
    ]
    for picture in pictures:
        assert (whole_page.parent / picture).read_bytes().startswith(b"\x89PNG")
        assert (whole_page.parent / picture).stat().st_size < 250_000


def test_the_results_are_also_json(whole_page: Path) -> None:
    figures = json.loads((whole_page.parent / "compare.json").read_text())
    rest = figures["methods"]["rest"]["figures"]["exact"]
    assert set(rest) >= {"mean", "by_seed", "difference", "sd", "p_t", "p_flip", "q", "n"}
    grpo = figures["methods"]["grpo"]["figures"]["exact"]
    differences = [rest["by_seed"][seed] - grpo["by_seed"][seed] for seed in ("0", "1", "2")]
    assert rest["difference"]["value"] == pytest.approx(sum(differences) / 3)
    assert figures["verdict"]


def test_warm_starts_have_their_own_table(tmp_path: Path) -> None:
    effects = {"grpo@cold": Effect(-0.1), "rest@cold": Effect(-0.1), "grpo@sft": Effect(), "rest@sft": Effect(0.02)}
    make_grid(tmp_path, effects, seeds=2)
    found = compare(tmp_path)
    table = page_of(found).split("## Warm starts")[1].split("##")[0]
    rows = [line.split(" | ")[0] for line in table.split("\n") if line.startswith("| ")][1:]
    indented = ["| &nbsp;&nbsp;+ grpo", "| &nbsp;&nbsp;+ rest"]
    assert rows[1:] == ["| cold", *indented, "| sft", *indented]
    rest = found.line("rest", "sft")
    assert rest is not None
    assert rest.metrics["exact"].paired is not None
    assert rest.metrics["exact"].paired.difference.value == pytest.approx(
        0.02
    )  # compared with grpo from the same start


def test_runs_without_held_out_data_are_compared_on_training_samples(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.01), "rest": Effect(0.1, noise=0.01)}, seeds=3)
    for place in (tmp_path / "runs").iterdir():
        (place / "summary.json").write_text('{"steps": 60}')
    found = compare(tmp_path)
    assert found.primary == "train_exact_end"
    assert "exact match, last fifth" in texts(found)[0]
    assert "nan" not in page_of(found).lower()


def test_a_section_without_its_plot_is_left_out(tmp_path: Path) -> None:
    make_grid(tmp_path, {"grpo": Effect(noise=0.01), "rest": Effect(0.1, noise=0.01)}, seeds=3)
    for place in (tmp_path / "runs").iterdir():
        (place / "metrics.jsonl").write_text('{"step": 60, "rest/exact_match": 0.5}\n')
    found = compare(tmp_path)
    assert "Entropy and gradient norm" not in page_of(found)
