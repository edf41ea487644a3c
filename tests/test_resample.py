"""Dynamic sampling: groups whose rewards are all equal are replaced by groups for other prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback

from rest_rl.config import RunConfig
from rest_rl.credit import group_advantages, zero_spread_mask
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS
from rest_rl.loss import clipped_surrogate
from rest_rl.response import Gold, ToolCall
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.record import RESPONSE_INDEX, FlushAtEnd, ResponseRecord, with_response_record
from rest_rl.train.trl.resample import check_resampling, has_spread, replace_groups, row_key
from rest_rl.train.trl.settings import make_trainer_config
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.test_trl_trainer import run_worker, same_parameters, trained
from tests.tiny_policy import logged_steps, scripted_completions, tiny_model, tiny_run, tiny_settings, tiny_tokenizer

NEW_FIGURES = {"rest/resampled", "rest/extra_responses"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def samples(count: int = 12) -> list[ToolSample]:
    """Samples whose prompts differ in length."""
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    gold = Gold((ToolCall("f", {"x": 1}),), None)
    content = [f"do {i:02}" + " again!" * (i % 5) for i in range(count)]
    return [ToolSample(f"s{i}", ({"role": "user", "content": content[i]},), (tool,), gold) for i in range(count)]


def varies(name: str) -> bool:
    """Whether the rewards of this sample have a spread: one sample in three."""
    return int(name[1:]) % 3 == 1


def score(ids: list[int], name: str) -> float:
    return sum((at + 1) * token for at, token in enumerate(ids)) % 101 / 101 if varies(name) else 1.0


def reward(completion_ids: Any, id: Any, **_: Any) -> list[float]:
    return [score(ids, name) for ids, name in zip(completion_ids, id, strict=True)]


def make_trainer(tokenizer: Any, folder: Path, rounds: int, count: int = 12, **changes: Any) -> ResTTrainer:
    own = {name: changes.pop(name) for name in ("reward_funcs", "rollout_func") if name in changes}
    settings = {"preset": "grpo", "max_steps": 4, "learning_rate": 1e-4, "resample_rounds": rounds, **changes}
    model = tiny_model(tokenizer)
    model.save_pretrained(folder / "initial")
    model.config._name_or_path = str(folder / "initial")  # where TRL finds the reference model of the KL term
    trainer = ResTTrainer(
        model,
        args=ResTConfig(**tiny_settings(folder, **settings)),
        train_dataset=build_training_dataset(samples(count), tokenizer),
        processing_class=tokenizer,
        **{"reward_funcs": reward, **own},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_record(trainer: ResTTrainer, tokenizer: Any, limit: int = 8) -> list[dict[str, Any]]:
    """Record the responses of the trainer; the list fills while it trains."""
    kept: list[dict[str, Any]] = []
    record = ResponseRecord(lambda step, rows: kept.extend(rows), limit)
    trainer.reward_funcs[0] = with_response_record(trainer.reward_funcs[0], tokenizer, FORMATS["toolrl"], record)
    trainer.on_generated, trainer.on_weighed = record.start_batch, record.add_token_fields
    trainer.add_callback(FlushAtEnd(record))
    return kept


def generate(trainer: ResTTrainer, names: list[int]) -> dict[str, Any]:
    """Return the batch that the trainer generates for the samples with these numbers."""
    assert trainer.model is not None
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i] for i in names for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


# Parts


def test_a_group_has_spread_if_its_rewards_differ():
    rewards_NF = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [0.1, 0.0], [0.1, 0.1]])
    assert has_spread(rewards_NF, torch.tensor([1.0, 1.0]), 2).tolist() == [False, False, True]
    assert has_spread(rewards_NF, torch.tensor([1.0, 2.0]), 2).tolist() == [False, True, True]
    assert has_spread(rewards_NF, torch.tensor([1.0, 1.0]), 3).tolist() == [False, True]
    none = math.nan  # a response without a reward, and a response with one of two rewards
    rewards_NF = torch.tensor([[none, none], [1.0, 0.0], [none, none], [none, none], [none, 1.0], [0.5, 0.0]])
    assert has_spread(rewards_NF, torch.tensor([1.0, 1.0]), 2).tolist() == [False, False, True]
    values = torch.rand(60, 1, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    expected = ~zero_spread_mask(values[:, 0], 2)[::2]
    assert expected.any()
    assert torch.equal(has_spread(values, torch.ones(1), 2), expected)


def test_replaced_groups_are_padded_to_a_common_width():
    batch = {
        "prompt_ids": torch.tensor([[1, 2], [1, 2], [3, 4], [3, 4]]),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[5, 6, 7], [5, 6, 9], [8, 6, 5], [8, 9, 9]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]]),
        "old_per_token_logps": torch.full((4, 3), -1.0),
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0]),
        "num_items_in_batch": torch.tensor(9),
        RESPONSE_INDEX: torch.arange(4),
    }
    drawn = {
        "prompt_ids": torch.tensor([[9, 9, 4]] * 2 + [[1, 2, 3]] * 2),
        "prompt_mask": torch.tensor([[0, 0, 1]] * 2 + [[1, 1, 1]] * 2),
        "completion_ids": torch.tensor([[5, 9], [7, 7], [6, 8], [7, 9]]),
        "completion_mask": torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]]),
        "tool_mask": torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]]),
        "old_per_token_logps": torch.full((4, 2), -2.0),
        "advantages": torch.tensor([0.5, -0.5, 2.0, -2.0]),
        "num_items_in_batch": torch.tensor(6),
        RESPONSE_INDEX: torch.arange(4, 8),
    }
    merged = replace_groups(batch, drawn, {0: 1}, 2, 9)
    assert {name: values.tolist() for name, values in merged.items()} == {
        "prompt_ids": [[1, 2, 3], [1, 2, 3], [9, 3, 4], [9, 3, 4]],
        "prompt_mask": [[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]],
        "completion_ids": [[6, 8, 9], [7, 9, 9], [8, 6, 5], [8, 9, 9]],
        "completion_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]],
        "tool_mask": [[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]],
        "old_per_token_logps": [[-2, -2, 0], [-2, -2, 0], [-1, -1, -1], [-1, -1, -1]],
        "advantages": [2.0, -2.0, 1.0, -1.0],
        "num_items_in_batch": 9,
        RESPONSE_INDEX: [6, 7, 2, 3],
    }
    assert list(merged) == list(batch)  # TRL takes the batch size from the first entry
    for other in ({"pixel_values": torch.zeros(4, 3)}, {"ref_per_token_logps": torch.zeros(4, 2)}):
        with pytest.raises(UserError):
            replace_groups(batch, {**drawn, **other}, {0: 1}, 2, 9)
    both = ({**each, "pixel_values": torch.zeros(4, 3)} for each in (batch, drawn))
    with pytest.raises(UserError):
        replace_groups(*both, {0: 1}, 2, 9)


def test_the_draw_depends_on_seed_step_and_batch_but_not_on_the_global_generators(tokenizer, tmp_path):
    trainer, other = (make_trainer(tokenizer, tmp_path, 1, seed=seed) for seed in (0, 1))
    rows = [trainer.train_dataset[i] for i in range(12)]

    def draw(trainer: ResTTrainer, step: int = 3, batch: tuple[int, ...] = (4, 7)) -> list[str]:
        trainer.state.global_step = step
        torch.rand(3)
        return [row["id"] for row in trainer._iter_other_rows([row_key(rows[i]) for i in batch])]

    first = draw(trainer)
    assert sorted(first) == sorted(f"s{i}" for i in range(12) if i not in (4, 7))
    assert draw(trainer) == first
    assert len({tuple(each) for each in (first, draw(other), draw(trainer, 4), draw(trainer, 3, (7, 4)))}) == 4


# The batch


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo"])
def test_the_loss_is_that_of_the_merged_batch(tokenizer, tmp_path, preset):
    trainer = make_trainer(tokenizer, tmp_path, 6, preset=preset)
    rows = make_record(trainer, tokenizer)
    batch = generate(trainer, [2, 1])  # group 0 has no spread, and prompt 2 is longer than prompt 1
    loss = trainer.compute_loss(trainer.model, batch)
    assert [row["id"] for row in rows[4:]] == ["s1"] * 4
    assert len({row["id"] for row in rows[:4]}) == 1
    assert varies(rows[0]["id"])
    by_id = {row["id"]: row for row in trainer.train_dataset}
    totals = torch.tensor([score(row["ids"], row["id"]) for row in rows])
    advantages_B = group_advantages(totals, 4, preset)
    torch.testing.assert_close(batch["advantages"], advantages_B, rtol=1e-5, atol=1e-6)
    width = batch["completion_ids"].shape[1]
    logps_BT, mask_BT = torch.zeros(8, width), torch.zeros(8, width)
    for at, row in enumerate(rows):
        prompt, ids = tokenizer(by_id[row["id"]]["prompt"])["input_ids"], row["ids"]
        assert batch["prompt_ids"][at][batch["prompt_mask"][at] > 0].tolist() == prompt
        assert batch["completion_ids"][at][batch["completion_mask"][at] > 0].tolist() == ids
        with torch.no_grad():  # without padding
            logits_TV = trainer.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps_BT[at, : len(ids)] = logits_TV.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        mask_BT[at, : len(ids)] = 1
    assert batch["num_items_in_batch"] == mask_BT.sum()
    advantages_BT = advantages_B[:, None].expand(8, width)
    expected = clipped_surrogate(
        logps_BT, logps_BT, advantages_BT, mask_BT, aggregation=preset, max_length=trainer.max_completion_length
    )
    assert abs(expected) > 1e-4 or preset == "grpo"  # with ratios of 1, grpo's loss is the mean of the advantages
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)


def test_groups_are_filled_in_order_up_to_the_last_round(tokenizer, tmp_path):
    def names(rounds: int) -> tuple[list[str], float, float]:
        trainer = make_trainer(tokenizer, tmp_path, rounds, per_device_train_batch_size=16)
        rows = make_record(trainer, tokenizer, 16)
        trainer.compute_loss(trainer.model, generate(trainer, [0, 1, 2, 3]))
        figures = trainer._metrics["train"]
        assert figures["frac_reward_zero_std"] == [0.75]
        return [row["id"] for row in rows[::4]], *(figures[name][0] for name in sorted(NEW_FIGURES)[::-1])

    expected, drawn, found, sizes = ["s0", "s1", "s2", "s3"], 0, 0, []
    trainer = make_trainer(tokenizer, tmp_path, 1)
    others = [row["id"] for row in trainer._iter_other_rows([row_key(trainer.train_dataset[i]) for i in (0, 1, 2, 3)])]
    for rounds in range(1, 7):
        missing = 3 - found
        new, drawn = others[drawn : drawn + missing], drawn + len(others[drawn : drawn + missing])
        for name in new:
            if varies(name):
                expected[[0, 2, 3][found]] = name
                found += 1
        assert names(rounds) == (expected, found / 4, 4.0 * drawn)
        sizes.append(found)
    assert sizes[0] < sizes[-1] == 3


def test_what_cannot_be_replaced_stays_with_advantage_0(tokenizer, tmp_path):
    def constant(completion_ids: Any, **_: Any) -> list[float]:
        return [0.5] * len(completion_ids)

    trainer = make_trainer(tokenizer, tmp_path, 20, reward_funcs=constant)
    batch = generate(trainer, [2, 1])
    assert batch[RESPONSE_INDEX].tolist() == list(range(8))
    assert not batch["advantages"].any()
    assert trainer._metrics["train"]["rest/resampled"] == [0.0]
    assert trainer._metrics["train"]["rest/extra_responses"] == [40.0]  # the ten other prompts
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [1.0]


# Every tensor that TRL may add to a batch: rollouts with tool results and log-probabilities, KL, several steps a batch.
def test_every_tensor_of_a_row_belongs_to_its_response(tokenizer, tmp_path):
    def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
        out = scripted_completions(prompts, trainer)
        ids = out["completion_ids"]
        logps = [[-token / 100 for token in row] for row in ids]
        return {**out, "logprobs": logps, "env_mask": [[int(token % 3 > 0) for token in row] for row in ids]}

    changes = {"beta": 0.1, "per_device_train_batch_size": 4, "steps_per_generation": 2, "rollout_func": rollout}
    trainer = make_trainer(tokenizer, tmp_path, 6, **changes)
    batch = generate(trainer, [2, 1])
    assert batch[RESPONSE_INDEX].tolist()[4:] == [4, 5, 6, 7]
    assert batch[RESPONSE_INDEX][0] >= 8
    assert batch["num_items_in_batch"] == (batch["completion_mask"] * batch["tool_mask"]).sum()
    width = batch["completion_ids"].shape[1]
    for at in range(8):
        is_own = batch["completion_mask"][at] > 0
        ids, prompt = batch["completion_ids"][at][is_own], batch["prompt_ids"][at][batch["prompt_mask"][at] > 0]
        assert batch["tool_mask"][at].tolist() == [int(token % 3 > 0) for token in ids] + [1] * (width - len(ids))
        torch.testing.assert_close(batch["sampling_per_token_logps"][at][is_own], -ids / 100)
        with torch.no_grad():
            logits_TV = trainer.model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        logps_T = logits_TV.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            assert batch[name].shape == (8, width)
            torch.testing.assert_close(batch[name][at][is_own], logps_T, rtol=1e-4, atol=1e-5)


# Runs


def test_a_run_without_zero_spread_groups_is_not_changed(tokenizer, tmp_path):
    def spread(completion_ids: Any, **_: Any) -> list[float]:
        return [at % 4 + 0.01 * len(ids) for at, ids in enumerate(completion_ids)]

    plain, resampled = (
        trained(make_trainer(tokenizer, tmp_path, rounds, preset="rest", reward_funcs=spread)) for rounds in (0, 3)
    )
    for one, two in zip(logged_steps(plain), logged_steps(resampled), strict=True):
        assert {name: two[name] for name in NEW_FIGURES} == dict.fromkeys(NEW_FIGURES, 0.0)
        # the check of the sampler is off, because a selection by rewards would bias it
        assert one.keys() - two.keys() == {f"rest/surprise/{name}" for name in ("excess", "error", "nats")}
        assert {name: value for name, value in one.items() if name in two} == {
            name: value for name, value in two.items() if name not in NEW_FIGURES
        }
    same_parameters(plain, resampled, rtol=0, atol=0)


def test_figures_of_the_generation_describe_the_batch_before_the_selection(tokenizer, tmp_path):
    plain, resampled = (logged_steps(trained(make_trainer(tokenizer, tmp_path, rounds))) for rounds in (0, 12))
    generated = ("reward", "frac_reward_zero_std", "completions/")
    for name in plain[0]:
        if name.startswith(generated):
            assert plain[0][name] == resampled[0][name], name
    assert any(row["frac_reward_zero_std"] for row in resampled)
    for row in resampled:  # there are enough other prompts with spread
        assert row["rest/resampled"] == row["frac_reward_zero_std"]
        assert row["rest/extra_responses"] >= 8 * row["rest/resampled"]
    assert plain[-1]["num_tokens"] < resampled[-1]["num_tokens"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2},
        {"num_iterations": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    ],
    ids=["plain", "two steps a batch", "seen twice", "two batches a step"],
)
def test_resume_is_bit_identical_and_the_record_is_right(tokenizer, tmp_path, changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "preset": "rest", "seed": 1, **changes}
    whole, resumed = (make_trainer(tokenizer, tmp_path, 12, **settings) for _ in range(2))
    rows, after = make_record(whole, tokenizer), make_record(resumed, tokenizer)
    trained(whole)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged_steps(resumed) == logged_steps(whole)
    assert sum(row.get("rest/resampled", 0) for row in logged_steps(whole)[2:]) > 0
    same_parameters(whole, resumed, rtol=0, atol=0)
    assert after == [row for row in rows if row["step"] > 2]
    for at in range(0, len(rows), 4):
        group = rows[at : at + 4]
        assert len({row["id"] for row in group}) == 1
        assert f"do {int(group[0]['id'][1:]):02}" in group[0]["prompt"]
        assert varies(group[0]["id"])
        assert [row["reward"] for row in group] == [score(row["ids"], row["id"]) for row in group]
        expected = group_advantages(torch.tensor([row["reward"] for row in group]), 4)
        assert [row["advantage"] for row in group] == pytest.approx(expected.tolist(), abs=2e-4)


def test_evaluation_replaces_nothing(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, 6, max_steps=1)
    trainer.eval_dataset = trainer.train_dataset
    trained(trainer)
    row = trainer.evaluate()
    assert row["eval_frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert "eval_rest/resampled" not in row


@pytest.mark.slow
def test_every_process_replaces_its_own_groups(tmp_path):
    done = run_worker("resampled", tmp_path / "rank", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(f"{tmp_path / 'rank'}{rank}.pt") for rank in range(2))
    assert first["history"] == second["history"]
    assert any(row["rest/resampled"] for row in first["history"])
    for one, two in zip(first["ids"], second["ids"], strict=True):
        names = [*one[::4], *two[::4]]
        assert len(set(names)) == len(names) == 4
        assert all(varies(name) for name in names)
    for row in first["history"]:
        assert row["rest/resampled"] == row["frac_reward_zero_std"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name])


# Refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"resample_rounds": -1},
        {"scale_rewards": "batch"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_refused_settings(tmp_path, changes):
    with pytest.raises(UserError):
        ResTConfig(**tiny_settings(tmp_path, **{"preset": "grpo", "resample_rounds": 2, **changes}))


def test_groups_that_are_split_over_processes_are_refused(tmp_path):
    args = ResTConfig(**tiny_settings(tmp_path, preset="grpo"))
    args.per_device_train_batch_size = 6  # two processes with 6 responses each, in groups of 4
    check_resampling(args, 0)
    with pytest.raises(UserError):
        check_resampling(args, 1)


def test_refused_training_sets(tokenizer, tmp_path):
    data = build_training_dataset(samples(3), tokenizer)
    args = ResTConfig(**tiny_settings(tmp_path, preset="grpo", resample_rounds=2))
    for refused in (data.select(range(2)), data.to_iterable_dataset(), data.add_column("image", [None] * 3)):
        with pytest.raises(UserError):
            ResTTrainer(tiny_model(tokenizer), reward, args, refused, processing_class=tokenizer)
    assert isinstance(data, Dataset)
    ResTTrainer(tiny_model(tokenizer), reward, args, data, processing_class=tokenizer)


def test_the_run_file_sets_the_rounds(tmp_path):
    tables = {**tiny_run(tmp_path), "rest": {"format": "toolrl"}}
    config = RunConfig.from_tables({**tables, "run": {"out": str(tmp_path / "run")}}, ["rest.resample_rounds=3"])
    args = make_trainer_config(config)
    assert isinstance(args, ResTConfig)
    assert args.resample_rounds == 3
    assert RunConfig.from_toml(config.to_toml()).rest.resample_rounds == 3
    assert RunConfig.from_tables(tables).rest.resample_rounds == 0
    for overrides in (
        ["rest.resample_rounds=-1"],
        ["rest.preset=sft", "rest.resample_rounds=1"],
        ["trl.resample_rounds=1"],
    ):
        with pytest.raises(UserError):
            make_trainer_config(RunConfig.from_tables(tables, overrides))
    assert "resample_rounds" not in RunConfig.from_tables(tables, ["rest.preset=sft"]).to_toml()
