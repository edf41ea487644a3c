"""`python -m research.theory` on a small policy, and its parts against the trainer's own weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from research.theory import __main__ as cli_theory
from research.theory.measure import (
    TheorySettings,
    build_batch,
    count_steps,
    has_spread,
    max_coordinates,
    measure,
    measure_pilot,
    measure_responses,
    measure_tokens,
    select_theory_rules,
)
from research.theory.page import (
    build_tables,
    direction_cells,
    findings,
    format_significant,
    judge_slope,
    render_page,
    to_mapping,
)
from research.theory.plots import draw_theory
from rest_rl.data.layout import PromptLayout
from rest_rl.jsonl import as_json
from rest_rl.presets import compute_token_weights
from rest_rl.probe.gradients import Coordinates, compute_token_statistics, pad_responses
from rest_rl.probe.rules import UNIFORM
from rest_rl.probe.sample import SampledGroup, Sampling, sample_groups
from rest_rl.probe.variance import Estimate
from rest_rl.response import Region
from rest_rl.weights import apply_weight_rule
from tests.tiny_policy import tiny_model, tiny_prompts, tiny_tokenizer

SETTINGS = TheorySettings(token_responses=4, batch=1, blocks=4, coordinates=20_000)


@pytest.fixture(scope="module")
def policy():
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer), tokenizer


@pytest.fixture(scope="module")
def sampled(policy):
    model, tokenizer = policy
    layout = PromptLayout(tokenizer)
    groups = sample_groups(model, layout, tiny_prompts(layout, 16), Sampling(8, 20, seed=3))
    return groups[:6], groups[6:]


@pytest.fixture(scope="module")
def measured(policy, sampled):
    model, tokenizer = policy
    calls: list[int] = []
    found = measure(model, *sampled, SETTINGS, tokenizer, lambda: calls.append(1))
    return found, len(calls)


def test_token_products_add_up_to_the_response_norm(policy, sampled):
    # The gram of the tokens adds up to the squared norm of the response's gradient, from another pass.
    model, _ = policy
    group: SampledGroup = sampled[0][0]
    coordinates = Coordinates.choose(model, 20_000)
    by_response = measure_responses(model, group, coordinates)
    for i, one in enumerate(measure_tokens(model, group, 0, 4, coordinates)):
        length = len(one.regions_T)
        assert one.gram_TT.sum() / length**2 == pytest.approx(by_response.gram_nn[i, i], rel=1e-3)
        assert one.advantage == pytest.approx(
            float(group._replace(responses=group.responses[:4]).advantages()[i]), abs=1e-9
        )


def test_statistics_and_weights_match_training(policy, sampled):
    model, tokenizer = policy
    statistics, lemma = measure_pilot(model, sampled[0])
    assert lemma.violations == 0
    assert lemma.tokens == int(statistics.counts_R.sum()) == sum(len(r.ids) for g in sampled[0] for r in g.responses)
    group = sampled[1][0]
    ids_BT, mask_BT = pad_responses([response.ids for response in group.responses])
    regions_BT, _ = pad_responses([response.regions for response in group.responses], Region.OTHER)
    entropies_BT = compute_token_statistics(
        model, group.prompt_ids, [response.ids for response in group.responses]
    ).entropies_BT
    batch = build_batch(regions_BT, mask_BT, entropies_BT)
    for name, rule in select_theory_rules().items():
        reads = entropies_BT if rule.needs_entropies else statistics
        expected = compute_token_weights(ids_BT, mask_BT, tokenizer, rule=rule, progress=0.5, entropies=reads)
        torch.testing.assert_close(apply_weight_rule(rule, batch, statistics, 0.5), expected, msg=name)


def test_everything_is_measured(measured):
    found, calls = measured
    assert calls == count_steps(6, 10)
    rules = {rule.name: rule for rule in found.rules}
    assert list(rules) == [*select_theory_rules(), "Theorem 2"]
    assert rules[UNIFORM].plain.lead == (0, 0)
    assert set(rules[UNIFORM].weights.values()) == {1.0}
    assert rules["no reasoning"].weights["reasoning"] == 0
    assert all(rule.plain.variance.value > 0 for rule in found.rules)
    assert all(chain.looseness > 1 for chain in found.bounds.values())
    assert abs(found.closed_form.entropy_excess) < 1e-6
    assert found.coordinate_share == pytest.approx(20_000 / Coordinates.choose(tiny_model(tiny_tokenizer()), None).size)


def test_page_and_json_show_the_figures(measured, tmp_path: Path):
    found, _ = measured
    text = render_page("Title", "what.", found, 1, draw_theory(found, tmp_path))
    assert "nan" not in text.lower().replace("finance", "")
    for name in ("Lemma 1", "Lemma 2", "Theorem 1", "Theorem 2", "Rules"):
        assert f"## {name}" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("group-size.png", "rules.png", "bound.png"))
    content = json.loads(as_json(to_mapping(found, SETTINGS)))
    assert content["settings"]["batch"] == 1
    assert len(content["findings"]) == len(findings(found))
    assert all(len(row) == len(table.header) for table in build_tables(found) for row in table.rows)


@pytest.mark.parametrize(
    ("slope", "word"),
    [
        (Estimate(-1.02, 0.01), "holds"),
        (Estimate(-0.8, 0.05), "fails"),
        (Estimate(-0.8, 0.5), "is undecided"),
        (Estimate(math.nan, math.nan), "is undecided"),
    ],
)
def test_a_large_error_leaves_the_slope_undecided(slope, word):
    assert judge_slope(slope, 2.0) == word


def test_random_signs_differ_between_prompts(policy, sampled):
    model, _ = policy
    coordinates = Coordinates.choose(model, 20_000)
    first, second = (measure_tokens(model, sampled[0][0], number, 1, coordinates)[0] for number in (0, 1))
    assert not (first.expected_T == second.expected_T).all()
    assert (first.gram_TT == second.gram_TT).all()


def test_gradients_stay_within_memory():
    # 2 GiB of float32 are 2^29 numbers: 2^19 of 1024 tokens, or 2^29 / (9 * 2000) of 2000 groups
    assert max_coordinates(1024, 8) == 2**19
    assert max_coordinates(10, 2000) == 2**29 // 18_000
    assert max_coordinates(10, 8) == 2**20


def test_figures_are_rounded_to_the_second_digit_of_their_error():
    assert format_significant(Estimate(0.123456, 0.0123)) == "0.123 ± 0.012"
    assert format_significant(Estimate(6012.3, 4900.0)) == "6012 ± 4900"
    assert format_significant(Estimate(math.nan, 1.0)) == "–"
    assert format_significant(Estimate(1.0, 0.0)) == "1.000 ± 0.000"


def test_a_pilot_without_spread_keeps_the_lemmas(policy, sampled, tmp_path: Path):
    model, tokenizer = policy
    flat = [
        group._replace(responses=tuple(response._replace(reward=1.0) for response in group.responses))
        for group in sampled[0]
    ]
    assert has_spread(sampled[0], SETTINGS)
    assert not has_spread(flat, SETTINGS)
    found = measure(model, flat[:4], sampled[1][:8], SETTINGS, tokenizer)
    assert found.lemma_two.violations == 0
    assert found.optimum is None
    assert [rule.name for rule in found.rules] == list(select_theory_rules())
    assert any("region form of Theorem 2 are left out" in line for line in findings(found))
    text = render_page("Title", "what.", found, 1, draw_theory(found, tmp_path))
    assert "nan" not in text.lower().replace("finance", "")
    assert "For a step of 1 prompt." in text
    assert "## Lemma 1" in text
    assert "## Theorem 1" not in text
    assert json.loads(as_json(to_mapping(found, SETTINGS)))["optimum"] is None


def test_an_insignificant_mean_gradient_has_no_ratio(measured):
    found, _ = measured
    lost = found.rules[0].plain._replace(ratio=Estimate(51.0, 1.2e19), cosine=Estimate(0.3, 35.0))
    assert direction_cells(lost)[-2:] == ("–", "–")


def test_the_folder_is_checked_before_the_measurement(tmp_path, monkeypatch, capsys):
    def measured_too_early(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_theory, "sample_and_measure", measured_too_early)
    (tmp_path / "file").write_text("")
    assert cli_theory.main(["--prompts", "8", "--pilot", "4", "--out", str(tmp_path / "file")]) == 2
    assert "pass another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "2"), "--prompts is 2, expected at least 8"),
        (("--pilot-group", "8", "--group", "9"), "expected at least the --group of 9"),
        (("--step", "-3"), "step is -3, expected at least 1"),
        (("--format", "toolrl", "--format", "hermes"), "--format is given 2 times"),
        (("--progress", "2"), "progress is 2"),
        (("--cap", "0"), "--cap is 0"),
        (
            ("--prompts", "8", "--pilot", "1996", "--set", "data.num_samples=2000"),
            "2000 usable samples, expected at least 2004",
        ),
        (("--format", "nonsense"), "nonsense"),
    ],
)
def test_mistakes_print_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli_theory.main([*options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_command_measures_the_embedded_model(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--prompts", "8", "--pilot", "6", "--pilot-group", "8", "--group", "4", "--step", "1", "--out", str(out)]
    assert cli_theory.main([*small, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "theory.json").read_text())
    assert printed["lemma_two"]["violations"] == 0
    assert cli_theory.main([*small]) == 2
    assert "holds a theory.json already" in capsys.readouterr().err
