"""The command `probe`: a policy with unequal rewards, one without, several formats, and refused options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rest_rl.probe
from rest_rl.cli.app import main
from rest_rl.config import RunConfig, read_run_file
from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.presets import compute_token_weights, score_response
from rest_rl.probe import run as probe_run
from rest_rl.probe.gradients import Coordinates, compute_weighted_gradients
from rest_rl.probe.measure import SampledBatch, measure_gradients
from rest_rl.probe.report import ProbeReport
from rest_rl.probe.rules import built_in_rules
from rest_rl.probe.run import resolve_prompts_per_step
from rest_rl.probe.sample import SampledGroup, Sampling, sample_groups
from rest_rl.regions import decode_ids
from rest_rl.runlog import SILENT, Observer
from rest_rl.weights import apply_weight_rule
from tests.model_families import save_family
from tests.test_probe import made_probe
from tests.tiny_policy import tiny_model, tiny_prompts, tiny_tokenizer

SMALL = ("--prompts", "8", "--group-size", "4", "--max-new-tokens", "20")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 4096  # room for a format in words, a token for each of its letters
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "description": "does it", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"do {number}"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "tools": [tool],
        }
        for number in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    return main(["probe", *map(str, arguments)])


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "probe.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_policy_with_spread(here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", policy, "--data", dialogues, "--format", "toolrl", *SMALL)
    assert run(*options, "--out", "first") == 0
    shown = capsys.readouterr().out
    assert "Recommendation" in shown
    assert "mean weight by rule" in shown
    assert sorted(path.name for path in (here / "first").iterdir()) == [
        "probe.json", "probe.md", "toolrl-entropy.png", "toolrl-rules.png", "toolrl-shares.png"
    ]  # fmt: skip
    (found,) = written(here / "first")
    assert (found["sampled"]["prompts"], found["sampled"]["group_size"]) == (8, 4)
    assert found["sampled"]["no_spread"] < 0.5
    regions = found["regions"]
    assert {"format", "name", "arguments", "reasoning"} <= set(regions)
    for part in ("tokens.share", "gradient.norm_share", "gradient.signal_share"):
        table, figure = part.split(".")
        assert sum(facts[table][figure][0] for facts in regions.values()) == pytest.approx(1)
    assert regions["reasoning"]["tokens"]["entropy"][0] > regions["format"]["tokens"]["entropy"][0]
    uniform = found["rules"][0]
    assert set(uniform["weights"].values()) == {1.0}
    assert uniform["gain"] == [0.0, 0.0]
    assert "![](toolrl-shares.png)" in (here / "first" / "probe.md").read_text(encoding="utf-8")
    assert run(*options, "--json") == 0  # into a new folder, with the same figures
    assert json.loads(capsys.readouterr().out) == found
    assert run(*options, "--out", "first") == 2
    assert "already contains a probe.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_user_defined_rule_is_added(here: Path, policy: Path, dialogues: Path) -> None:
    (here / "my_rules.py").write_text(
        "def by_place(batch, statistics, progress):\n    return batch.mask_BT.cumsum(1)\n"
    )
    rule = ("--set", "rest.weights.rule=my_rules:by_place")
    assert run("--model", policy, "--data", dialogues, "--format", "toolrl", *SMALL, *rule, "--out", "out") == 0
    *_, own = written(here / "out")[0]["rules"]
    assert own["name"] == "my_rules:by_place"
    assert own["bounds"] == [None, None]
    assert own["weights"]["reasoning"] < own["weights"]["arguments"]  # arguments come later
    assert own["adam_gain"][0] != 0


@pytest.mark.slow
def test_a_random_model_in_two_formats(
    here: Path, tmp_path: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family("qwen3", tmp_path / "model")
    options = ("--model", model, "--data", dialogues, *SMALL, "--group-size", "2")
    assert run(*options, "--format", "auto", "--format", "toolrl", "--format", "hermes", "--out", "out") == 0
    found = written(here / "out")
    assert [one["format"] for one in found] == ["hermes", "toolrl"]  # auto is hermes, once
    assert all(one["sampled"]["no_spread"] == 1 for one in found)  # no response is in the format
    assert all(one["signal"] == [0, 0] for one in found)
    assert all(one["recommendation"]["sureness"] == "not measurable" for one in found)
    shown = capsys.readouterr().out
    assert "no response is in the format" in shown
    assert "have equal rewards" not in shown
    assert "--prompts" not in shown
    assert "how sure" in shown
    text = (here / "out" / "probe.md").read_text(encoding="utf-8")
    assert "| hermes | 0.0 | 0.0 | 100.0 |" in text
    assert (here / "out" / "hermes-rules.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "7"), "expected at least 8"),
        (("--group-size", "1"), "expected at least 2"),
        (("--prompts-per-step", "0"), "prompts per step is 0, expected at least 1"),
        (("--set", "rest.preset=grpo", "--set", "rest.reward.random=true"), "expected a reward that reads"),
        (("--progress", "1.5"), "1.5"),
        (("--norm-cap", "-1"), "0 (no cap)"),
        (("--format", "nonsense"), "nonsense"),
        (("--model", "nowhere/to/be/found"), "--model is 'nowhere/to/be/found'"),
        (("--data", "missing.jsonl", "--max-new-tokens", "20"), "missing.jsonl"),
        (("--set", "data.sampels=3"), "did you mean num_samples"),
    ],
)
def test_refused_options_leave_no_files(
    here: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(*options, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert list(here.iterdir()) == []


def two_formats(policy: Path, dialogues: Path) -> tuple[object, ...]:
    return ("--model", policy, "--data", dialogues, "--format", "toolrl", "--format", "hermes", *SMALL)


def fake_measurement(monkeypatch: pytest.MonkeyPatch, *, formats: int) -> None:
    """Replace the measurement by a fixed report; interrupt it after `formats` formats."""
    left = iter(range(formats))

    def measure(_model: Any, layout: PromptLayout, *_: Any) -> ProbeReport:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(made_probe(), format=layout.format.name)

    monkeypatch.setattr(probe_run, "probe_format", measure)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_unwritable_folder_is_refused_before_the_measurement(
    here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, out: str,
) -> None:  # fmt: skip
    (here / "file").write_text("")
    fake_measurement(monkeypatch, formats=0)  # any measurement would interrupt
    assert run(*two_formats(policy, dialogues), "--out", out) == 2
    error = capsys.readouterr().err
    assert f"cannot write to --out {out} (" in error
    assert "pass another --out" in error
    assert "--resume" not in error


def test_a_write_error_at_the_end_keeps_the_shown_results(
    here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "out" / "probe.md").mkdir(parents=True)  # blocks writing the page
    fake_measurement(monkeypatch, formats=2)
    assert run(*two_formats(policy, dialogues), "--out", "out") == 2
    shown = capsys.readouterr()
    assert shown.out.count("Recommendation") == 2
    assert "how sure" in shown.out
    assert "cannot write the results to --out out (" in shown.err
    assert "--resume" not in shown.err


@pytest.mark.parametrize("json_lines", [False, True])
def test_an_interrupt_in_the_second_format_keeps_the_first(
    here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, json_lines: bool,
) -> None:  # fmt: skip
    fake_measurement(monkeypatch, formats=1)
    assert run(*two_formats(policy, dialogues), *["--json"] * json_lines, "--out", "out") == 130
    shown = capsys.readouterr().out
    if json_lines:
        assert [json.loads(line)["format"] for line in shown.splitlines()] == ["toolrl"]
    else:
        assert "toolrl: signal" in shown
        assert "Recommendation" in shown


def test_too_little_data_is_an_error(
    here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = here / "few.jsonl"
    few.write_text("".join(dialogues.read_text().splitlines(keepends=True)[:5]))
    assert run("--model", policy, "--data", few, "--format", "toolrl", *SMALL, "--out", "out") == 2
    assert "the data has 5 usable samples, expected at least 8" in capsys.readouterr().err


def test_the_help_names_the_minimums(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--help"]) == 0
    assert "at least 8" in " ".join(capsys.readouterr().out.split())


class Listener(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_few_prompts_predict_only_small_steps() -> None:
    listener = Listener()
    assert resolve_prompts_per_step(read_run_file(None, []), 4, 8, listener) == 1
    assert "a step of at most 1, not 4" in listener.said[0]


def test_from_python(here: Path, policy: Path, dialogues: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measurement(monkeypatch, formats=2)
    seen: list[str] = []
    probe: Any = rest_rl.probe
    found = probe(
        policy, dialogues, formats=["toolrl", "hermes"], prompts=8, on_report=lambda one: seen.append(one.format)
    )
    assert [one.format for one in found] == seen == ["toolrl", "hermes"]
    assert found[0].advice.preset == "grpo"
    assert list(here.iterdir()) == []
    with pytest.raises(UserError):
        probe(policy, dialogues, group=1)


def test_a_supervised_run_folder_is_probed_with_the_preset_rest(here: Path) -> None:
    (here / "warm" / "model").mkdir(parents=True)
    supervised = RunConfig.from_toml(
        '[rest]\npreset = "tsft"\nformat = "hermes"\n[data]\npath = "a.jsonl"\nheld_out = "b.jsonl"\n[eval]\nevery = 5'
    )
    (here / "warm" / "config.toml").write_text(supervised.to_toml(), encoding="utf-8")
    own, other = (probe_run.resolve_run("warm", data, []) for data in (None, "b.jsonl"))
    assert own.rest.resolve().name == "rest"
    assert (own.model.path, own.rest.format, own.data.path) == ("warm/model", "hermes", "a.jsonl")
    assert (own.with_response_limit(None).max_response_tokens, own.data.held_out) == (1024, "b.jsonl")
    assert (other.data.path, other.data.held_out, other.eval.every) == ("b.jsonl", "", 0)


def test_the_model_of_a_run_is_probed_without_the_adapter_that_it_started_from(here: Path) -> None:
    (here / "office" / "model").mkdir(parents=True)
    run = RunConfig.from_toml(
        '[model]\npath = "smollm2"\nadapter = "smollm2-office"\n[peft]\nr = 8\n[data]\npath = "office"'
    )
    (here / "office" / "config.toml").write_text(run.to_toml(), encoding="utf-8")
    for data in (None, "office"):
        own = probe_run.resolve_run("office", data, [])
        assert (own.model.path, own.model.adapter, own.data.path) == ("office/model", "", "office")


def gradient_of(model: Any) -> dict[str, torch.Tensor]:
    """The gradient of the log-probability of a response, by the name of the trained parameter."""
    whole = Coordinates.choose(model, None)
    (vector_N,) = compute_weighted_gradients(model, [5, 9, 2], [[4, 7, 1]], torch.ones(1, 1, 3), whole)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(zip(names, vector_N.split(whole.parameter_sizes), strict=True))


def test_the_gradient_of_a_new_adapter_is_that_of_the_weights_times_its_input_matrix(policy: Path) -> None:
    overrides = ["peft.r=2", "peft.lora_alpha=6"]
    full, adapted = (
        probe_run.load_model(probe_run.resolve_run(policy, None, changes), 3, SILENT) for changes in ([], overrides)
    )
    of_weights, of_adapter = gradient_of(full), gradient_of(adapted)
    assert len(of_adapter) == 2 * 7 * full.config.num_hidden_layers
    weights, factors = (dict(model.named_parameters()) for model in (full, adapted))
    for name, found in of_adapter.items():
        if "lora_A" in name:
            assert not found.any()  # because B is 0
            continue
        own = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
        expected = of_weights[own].view_as(weights[own]) @ factors[name.replace("lora_B", "lora_A")].T
        torch.testing.assert_close(found, 6 / 2 * expected.flatten(), rtol=1e-4, atol=1e-6)
        assert found.norm() > 1e-3


def test_the_same_seed_gives_the_same_adapter(policy: Path) -> None:
    config = probe_run.resolve_run(policy, None, ["peft.r=2"])
    state = torch.get_rng_state()
    one, same, other = (
        next(p.clone() for n, p in probe_run.load_model(config, seed, SILENT).named_parameters() if "lora_A" in n)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lora_run_is_probed_at_its_own_adapter(here: Path, policy: Path) -> None:
    run = RunConfig.from_toml(f'[model]\npath = "{policy}"\n[peft]\nr = 2')
    trained = probe_run.load_model(run, 0, SILENT)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(here / "mine" / "model")
    (here / "mine" / "config.toml").write_text(run.to_toml(), encoding="utf-8")
    model = probe_run.load_model(probe_run.resolve_run("mine", None, []), 1, SILENT)
    found, expected = gradient_of(model), gradient_of(trained)
    assert found.keys() == expected.keys()
    for name, vector in found.items():
        torch.testing.assert_close(vector, expected[name])
        assert vector.any()  # B is no longer 0, so A has a gradient as well


def test_another_rank_than_that_of_the_run_is_refused(
    here: Path, policy: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe_run.load_model(RunConfig.from_toml(f'[model]\npath = "{policy}"\n[peft]\nr = 2'), 0, SILENT).save_pretrained(
        here / "adapter"
    )
    assert run("--model", "adapter", "--data", dialogues, "--lora", "4", *SMALL, "--out", "out") == 2
    assert "peft.r is 4" in (error := capsys.readouterr().err)
    assert "has 2" in error
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def sampled() -> tuple[Any, PromptLayout, list[SampledGroup]]:
    tokenizer = tiny_tokenizer()
    model, layout = tiny_model(tokenizer), PromptLayout(tokenizer, "toolrl")
    groups = sample_groups(model, layout, tiny_prompts(layout, 8), Sampling(4, 20, seed=1))
    return model, layout, groups


@pytest.mark.parametrize("preset", ["rest", "rest_live", "authors-code"])
def test_responses_get_the_reward_of_the_run(preset: str) -> None:
    tokenizer = tiny_tokenizer()
    layout = PromptLayout(tokenizer, "toolrl")
    prompts = tiny_prompts(layout, 4)
    reward = read_run_file(None, [f"rest.preset={preset}"]).rest.resolve().reward
    sampling = Sampling(4, 20, seed=1, progress=0.25, reward=reward)
    groups = sample_groups(tiny_model(tokenizer), layout, prompts, sampling)
    for group, prompt in zip(groups, prompts, strict=True):
        for one in group.responses:
            text = decode_ids(one.ids, tokenizer, layout.format.tags)
            wanted = score_response(text, prompt.sample.gold, format=layout.format, preset=preset, progress=0.25)
            assert one.reward == wanted.total
            assert 0 <= one.s_format <= 1  # and not the published code's own scores


def test_rules_give_the_weights_of_training(sampled: tuple[Any, PromptLayout, list[SampledGroup]]) -> None:
    model, layout, groups = sampled
    batch = SampledBatch.from_groups(groups, model, layout.tokenizer, "toolrl", 0.5)
    own = batch.tagged
    for rule in built_in_rules().values():
        found_BT = apply_weight_rule(rule, own, batch.statistics, 0.5)
        wanted_BT = compute_token_weights(
            own.ids_BT, own.mask_BT, layout.tokenizer, format="toolrl", rule=rule, progress=0.5,
            entropies=own.entropies_BT, collisions=batch.collisions_BT,
        )  # fmt: skip
        assert torch.allclose(found_BT, wanted_BT, atol=1e-6)


def test_tokens_keep_their_prompts(sampled: tuple[Any, PromptLayout, list[SampledGroup]]) -> None:
    model, layout, groups = sampled
    batch = SampledBatch.from_groups(groups, model, layout.tokenizer, "toolrl")
    found = batch.tokens
    for m, group in enumerate(groups):
        regions = [region for response in group.responses for region in response.regions]
        assert found.regions_T[found.prompts_T == m].tolist() == regions
    assert found.sums(found.entropies_T).sum(0) == pytest.approx(
        (batch.statistics.entropies_R * batch.statistics.counts_R).nan_to_num().numpy()
    )


def test_a_rule_of_uniform_weights_gains_nothing(sampled: tuple[Any, PromptLayout, list[SampledGroup]]) -> None:
    model, layout, groups = sampled
    batch = SampledBatch.from_groups(groups, model, layout.tokenizer, "toolrl")
    uniform = built_in_rules()["uniform"]
    calls: list[int] = []
    found = measure_gradients(
        model, batch, {"uniform": uniform, "again": uniform}, 0.0, prompts_per_step=1, batch_size=3,
        advance=lambda: calls.append(1),
    )  # fmt: skip
    first, again = found.rules  # the sum of the regions' gradients against one backward pass of its own
    assert first.series.progress_1K == pytest.approx(again.series.progress_1K, rel=1e-4)
    assert first.series.adam_1K == pytest.approx(again.series.adam_1K, rel=1e-3)
    assert len(calls) == 2 * len(groups)
    assert found.gram_KMKM.shape == (7, 8, 7, 8)
    assert found.coordinates.size == found.coordinates.num_parameters
