"""The verb `probe` as a user types it: a policy with spread, one without, formats side by side, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_rl.analyze.probe_gradients import Weigher, probe_gradients, sampled_tokens
from rest_rl.analyze.rivals import rivals
from rest_rl.cli import main
from rest_rl.cli_probe import scoring_of
from rest_rl.config import read_run_file
from rest_rl.data.groups import Group
from rest_rl.data.prompt_layout import PromptLayout
from rest_rl.evaluate.sampling import sample_groups
from rest_rl.presets import token_weights
from rest_rl.regions import decode_ids
from rest_rl.scoring import score_response
from tests.model_families import save_family
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

SMALL = ("--prompts", "8", "--group", "4", "--max-new-tokens", "20")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
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
    assert run(*options, "--json") == 0  # into a folder of its own, the same figures again
    assert json.loads(capsys.readouterr().out) == [found]
    assert run(*options, "--out", "first") == 2
    assert "holds a probe.json already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_random_model_of_another_format(
    here: Path, tmp_path: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family("qwen3", tmp_path / "model")
    options = ("--model", model, "--data", dialogues, *SMALL, "--group", "2")
    assert run(*options, "--format", "auto", "--format", "toolrl", "--format", "hermes", "--out", "out") == 0
    found = written(here / "out")
    assert [one["format"] for one in found] == ["hermes", "toolrl"]  # auto is hermes, once
    assert all(one["sampled"]["no_spread"] == 1 for one in found)  # nothing it says is worth anything
    assert all(one["signal"] == [0, 0] for one in found)
    assert all(one["recommendation"]["sureness"] == "not measurable" for one in found)
    shown = capsys.readouterr().out
    assert "have no spread of rewards" in shown
    assert "how sure" in shown
    text = (here / "out" / "probe.md").read_text(encoding="utf-8")
    assert "| hermes | 0.0 | 0.0 | 100.0 |" in text
    assert (here / "out" / "hermes-rules.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "7"), "expected at least 8"),
        (("--group", "1"), "expected at least 2"),
        (("--step", "0"), "got --step 0, expected at least 1"),
        (("--set", "rest.preset=grpo", "--set", "rest.reward.random=true"), "expected a reward that reads"),
        (("--progress", "1.5"), "[0, 1]"),
        (("--norm-cap", "-1"), "0 for none"),
        (("--format", "nonsense"), "unknown format"),
        (("--model", "nowhere/to/be/found"), "expected a directory"),
        (("--data", "missing.jsonl"), "missing.jsonl"),
        (("--set", "data.sampels=3"), "did you mean samples"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    here: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(*options, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def sampled() -> tuple[Any, PromptLayout, list[Group]]:
    tokenizer = tiny_tokenizer()
    model, layout = tiny_model(tokenizer), PromptLayout(tokenizer, "toolrl")
    groups = list(sample_groups(model, layout, tiny_samples(8), group_size=4, max_new_tokens=20, seed=1))
    return model, layout, groups


@pytest.mark.parametrize("preset", ["rest", "paper", "authors-code"])
def test_responses_are_rewarded_as_the_run_would(preset: str) -> None:
    tokenizer, samples = tiny_tokenizer(), tiny_samples(4)
    layout = PromptLayout(tokenizer, "toolrl")
    reward = scoring_of(read_run_file(None, [f"rest.preset={preset}"]))
    groups = sample_groups(
        tiny_model(tokenizer), layout, samples, group_size=4, max_new_tokens=20, seed=1, progress=0.25, reward=reward
    )
    for group in groups:
        for one in group.responses:
            text = decode_ids(one.ids, tokenizer, layout.format.tags)
            wanted = score_response(text, group.sample.gold, format=layout.format, preset=preset, progress=0.25)
            assert one.reward == wanted.total
            assert 0 <= one.s_format <= 1  # and not the published code's own scores


def test_rules_weigh_as_training_does(sampled: tuple[Any, PromptLayout, list[Group]]) -> None:
    model, layout, groups = sampled
    tokens = sampled_tokens(groups, model, layout.tokenizer.pad_token_id, lambda: None)
    weigher = Weigher(groups, tokens, layout.tokenizer, layout.format, progress=0.5)
    rows = [response.ids for one in groups for response in one.responses]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[layout.tokenizer.pad_token_id] * (width - len(row))] for row in rows])
    mask_BT = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    entropies_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    entropies_BT[mask_BT] = torch.cat([torch.from_numpy(one.entropies_T) for one in tokens])
    collisions_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    collisions_BT[mask_BT] = torch.cat([torch.from_numpy(one.collisions_T) for one in tokens])
    for preset in rivals().values():
        wanted_BT = token_weights(
            ids_BT, mask_BT, layout.tokenizer, format=layout.format, preset=preset, progress=0.5,
            entropies=entropies_BT, collisions=collisions_BT,
        )  # fmt: skip
        found = weigher.weights(preset)
        for one, wanted in zip(found, wanted_BT.split(4), strict=True):
            assert torch.allclose(one, wanted[:, : one.shape[1]], atol=1e-6)


def test_a_rule_of_uniform_weights_gains_nothing(sampled: tuple[Any, PromptLayout, list[Group]]) -> None:
    model, layout, groups = sampled
    pad_id = layout.tokenizer.pad_token_id
    tokens = sampled_tokens(groups, model, pad_id, lambda: None)
    weigher = Weigher(groups, tokens, layout.tokenizer, layout.format, progress=0.0)
    rules = rivals()
    calls: list[int] = []
    found = probe_gradients(
        model, weigher, {"uniform": rules["uniform"], "again": rules["uniform"]}, prompts_per_step=1, pad_id=pad_id,
        batch_size=3, advance=lambda: calls.append(1),
    )  # fmt: skip
    first, again = found.rules  # the sum of the regions' gradients against one backward pass of its own
    assert first.series.progress_1K == pytest.approx(again.series.progress_1K, rel=1e-4)
    assert first.series.adam_1K == pytest.approx(again.series.adam_1K, rel=1e-3)
    assert len(calls) == 2 * len(groups)
    assert found.gram_KMKM.shape == (7, 8, 7, 8)
    assert found.coordinates.size == found.coordinates.total
