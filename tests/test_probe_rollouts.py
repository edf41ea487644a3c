"""The probe in an environment: the trainer's gradient, masks, credit per turn, run folders, and refused options."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

import rest_rl
from rest_rl.cli.app import main
from rest_rl.config import RunConfig
from rest_rl.credit import CreditConfig, CreditKind
from rest_rl.data.layout import PromptLayout
from rest_rl.envs.rollout import Rollouts, Trajectory
from rest_rl.envs.session import Result
from rest_rl.errors import UserError
from rest_rl.presets import PRESETS
from rest_rl.probe import run as probe_run
from rest_rl.probe.figures import count_pairs, summarize_rollouts, summarize_samples
from rest_rl.probe.gradients import Coordinates
from rest_rl.probe.measure import (
    SampledBatch,
    compute_gradients,
    compute_grpo_weights,
    compute_region_and_true_weights,
)
from rest_rl.probe.page import describe_samples, to_mapping
from rest_rl.probe.report import EnvironmentFacts, ProbeReport
from rest_rl.probe.rollouts import make_group
from rest_rl.probe.rules import built_in_rules, select_rules
from rest_rl.probe.sample import SampledGroup, SampledResponse, sample_groups
from rest_rl.response import Region
from rest_rl.runlog import SILENT
from rest_rl.train.environment import EnvironmentData, make_environment_reward, make_rows
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import build_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.weights import WeightConfig, apply_weight_rule
from tests.live_environment import TEMPLATE
from tests.test_probe import kinds, made_probe
from tests.tiny_policy import tiny_model, tiny_settings, tiny_tokenizer

GROUP = 4
NAME, REASONING, OTHER = int(Region.NAME), int(Region.REASONING), int(Region.OTHER)
COUNTER = f"{Path(__file__).with_name('live_environment.py')}:Counter"


# Rollouts in the shop, and the trainer's loss on them


class Shopping:
    """Groups of rollouts of the shipped model in the shop, some of which have advantages."""

    def __init__(self) -> None:
        self.config = probe_run.resolve_run("shop", None, ["env.turns=4"], "shop")
        (self.layout,) = probe_run.build_layouts(self.config, (), SILENT)
        sampling = probe_run.build_sampling(self.config, GROUP, 0, 0.0, None, None)
        data: Any = probe_run.read_prompts(self.config, self.layout, SILENT, 64)
        self.sampling = probe_run.in_environment(sampling, self.config, self.layout, data, derives_limit=True)
        self.model = load_policy(self.config.model)[0]
        drawn = data.prepared[:16]
        assert self.sampling.world is not None
        groups = sample_groups(self.model, self.layout, drawn, self.sampling)
        self.kept = [at for at, group in enumerate(groups) if group.has_spread][:2]
        self.groups, self.prompts = [groups[at] for at in self.kept], [drawn[at] for at in self.kept]
        assert len(self.groups) == 2

    def credited(self, credit: CreditKind) -> list[SampledGroup]:
        found = [[one.rollout for one in group.responses if one.rollout] for group in self.groups]
        return [make_group(rollouts, self.layout, CreditConfig(credit)) for rollouts in found]


@pytest.fixture(scope="module")
def shop() -> Shopping:
    return Shopping()


def train_on(shop: Shopping, groups: Sequence[SampledGroup], folder: Path, **settings: Any) -> Tensor:
    """The gradient of the trainer's loss in its first step, on these rollouts."""
    by_task: dict[str, list[Trajectory]] = defaultdict(list)
    for group in groups:
        for one in group.responses:
            assert one.rollout
            by_task[one.rollout.task["id"]].append(one.rollout)

    class Replayed(Rollouts):
        def run(self, tasks: Any, *_: Any, **__: Any) -> list[Trajectory]:
            return [by_task[task["id"]].pop(0) for task, _ in tasks]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            seen.append(torch.cat(parts).clone())

    seen: list[Tensor] = []
    layout, world = shop.layout, shop.sampling.world
    assert world is not None
    args = tiny_settings(folder, max_completion_length=64, max_steps=1, max_grad_norm=0.0, **settings)
    trainer = ResTTrainer(
        load_policy(shop.config.model)[0],
        reward_funcs=make_environment_reward(layout.tokenizer, layout.format.tags),
        args=ResTConfig(**args),
        train_dataset=build_dataset(make_rows(EnvironmentData(shop.prompts, []), world.seed)),
        processing_class=layout.tokenizer,
        rollouts=Replayed(world.environment, layout, world.limits, [layout.tokenizer.eos_token_id], 64),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen[0]


UNIFORM, CONSTANT = {"rule": "uniform"}, {"rule": "constant", "normalization": "turn"}


@pytest.mark.parametrize(
    ("credit", "weights"),
    [("outcome", UNIFORM), ("return_to_go", UNIFORM), ("matched", CONSTANT), ("anchor", CONSTANT)],
)
def test_the_gradient_is_that_of_the_trainers_loss(
    shop: Shopping, tmp_path: Path, credit: CreditKind, weights: dict[str, Any]
) -> None:
    groups = shop.credited(credit)
    trained_N = train_on(shop, groups, tmp_path, preset="grpo", weights=weights, credit=credit)
    batch = SampledBatch.from_groups(groups, shop.model, shop.layout.tokenizer, "toolrl")
    weights_BT = apply_weight_rule(WeightConfig(**weights), batch.tagged, batch.statistics, 0.0)
    own_BT = weights_BT * compute_grpo_weights(groups)
    coordinates = Coordinates.choose(shop.model, None)
    found_MN = compute_gradients(shop.model, batch, own_BT[None], coordinates, 3, lambda: None)[0]
    assert trained_N.norm() > 1e-3
    # The loss is the mean over both groups, and its gradient points downhill.
    assert float((trained_N + found_MN.mean(0)).norm() / trained_N.norm()) < 1e-4


def test_tokens_of_the_environment_have_no_weight_region_or_statistics(shop: Shopping) -> None:
    batch = SampledBatch.from_groups(shop.groups, shop.model, shop.layout.tokenizer, "toolrl")
    responses = [one for group in shop.groups for one in group.responses]
    masked = 0
    for row, one in enumerate(responses):
        assert one.mask is not None
        assert one.rollout is not None
        mask = torch.zeros(batch.tagged.mask_BT.shape[1], dtype=torch.bool)
        for turn in one.rollout.turns:
            mask[turn.start : turn.end] = True
        assert torch.equal(batch.tagged.mask_BT[row], mask)
        masked += one.mask.count(0)
    assert masked > 100
    outside_BT = ~batch.tagged.mask_BT
    assert (batch.tagged.regions_BT[outside_BT] == OTHER).all()
    weights_KBT = compute_region_and_true_weights(shop.groups)
    assert not weights_KBT[:, outside_BT].any()
    assert weights_KBT[-1].any()
    assert len(batch.tokens.entropies_T) == int(batch.tagged.mask_BT.sum())
    assert set(batch.tokens.regions_T.tolist()) >= {int(Region.FORMAT), NAME, int(Region.ARGUMENTS), REASONING}
    for rule in select_rules("toolrl", PRESETS["grpo"].weights, by_turn=True).values():
        weights_BT = apply_weight_rule(rule, batch.tagged, batch.statistics, 0.0)
        assert not weights_BT[outside_BT].any()
        for row, one in enumerate(responses):
            for turn in one.rollout.turns if one.rollout and getattr(rule, "normalization", "") == "turn" else ():
                own_T = weights_BT[row, turn.start : turn.end]
                assert float(own_T.mean()) in (pytest.approx(0.0), pytest.approx(1.0, abs=1e-5))


def test_rollouts_repeat_under_equal_seeds(shop: Shopping) -> None:
    first, again = (sample_groups(shop.model, shop.layout, shop.prompts, shop.sampling) for _ in range(2))
    assert [group.responses for group in first] == [group.responses for group in again]
    assert len({tuple(one.ids) for one in first[0].responses}) > 1
    facts = summarize_rollouts(first, "shop", "outcome")
    rollouts = [one.rollout for group in first for one in group.responses if one.rollout]
    assert facts is not None
    assert facts.success == sum(each.has_succeeded for each in rollouts) / 8
    assert facts.turns == sum(len(each.turns) for each in rollouts) / 8
    sampled = summarize_samples(first, [])
    assert sampled.exact_match == facts.success
    assert sampled.mean_tokens == sum(sum(each.mask) for each in rollouts) / 8


# By hand


def rollout(ids: list[int], mask: list[int], reward: float, credits: list[float] | None = None) -> SampledResponse:
    regions = [NAME if own else OTHER for own in mask]
    return SampledResponse(ids, regions, reward, 1.0, reward, reward == 1, mask, credits)


def test_only_the_policys_tokens_count() -> None:
    # Rewards 1 and 0: mean 1/2, sd 0.7071. Two and one tokens are the policy's: divided by G T_i = 4 and 2.
    own = SampledGroup([1], (rollout([5, 9, 6], [1, 0, 1], 1.0), rollout([5], [1], 0.0)))
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert compute_grpo_weights([own]).tolist() == [
        pytest.approx([advantage / 4, 0, advantage / 4]),
        pytest.approx([-advantage / 2, 0, 0]),
    ]
    assert compute_region_and_true_weights([own])[-1].tolist() == [[0.5, 0, 0.5], [-0.5, 0, 0]]  # (1 - 1/2) / (2 - 1)
    credited = SampledGroup([1], (rollout([5, 9, 6], [1, 0, 1], 1.0, [0.75, 0, 0.5]), rollout([5], [1], 0.0, [-1.0])))
    assert compute_grpo_weights([credited]).tolist() == [[0.75 / 4, 0, 0.5 / 4], [-0.5, 0, 0]]
    assert compute_region_and_true_weights([credited])[-1].tolist() == [[0.5, 0, 0.5], [-0.5, 0, 0]]


def test_credits_of_turns_are_advantages_even_of_equal_totals() -> None:
    flat = SampledGroup([1], (rollout([5], [1], 1.0), rollout([6], [1], 1.0)))
    turns = SampledGroup([1], (rollout([5, 6], [1, 1], 1.0, [0.5, -0.5]), rollout([5], [1], 1.0, [0.0])))
    zero = SampledGroup([1], (rollout([5], [1], 1.0, [0.0]), rollout([6], [1], 1.0, [0.0])))
    assert [group.has_spread for group in (flat, turns, zero)] == [False, True, False]


def test_an_unscored_rollout_is_no_failure() -> None:
    # The mean is that of the scored rollouts, 1/2, and (1 - 1/2) / (2 - 1) = 1/2; the third has no advantage.
    own = SampledGroup([1], (rollout([5], [1], 1.0), rollout([6], [1], 0.0), rollout([7], [1], math.nan)))
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4) / 3
    assert compute_grpo_weights([own])[:, 0].tolist() == pytest.approx([advantage, -advantage, 0])
    assert compute_region_and_true_weights([own])[-1].tolist() == [[0.5], [-0.5], [0.0]]
    assert count_pairs(own.responses, Region.NAME) == (1, 1, 0, 0, 1, 1)  # one pair, and it differs


def test_what_the_environment_says_is_no_difference() -> None:
    own = [rollout([5, 8, 6], [1, 0, 1], 1.0), rollout([5, 9, 6], [1, 0, 1], 0.0)]
    assert count_pairs(own, Region.NAME)[0] == count_pairs(own, Region.OTHER)[0] == 0


def play(prompt_ids: list[int], ids: list[int], reward: float) -> Trajectory:
    found = Trajectory({"id": "a"}, prompt_ids, ids, [1] * len(ids), stop="answered")
    found.verdict = Result(reward=reward)
    return found


def test_a_prompt_that_differs_is_context() -> None:
    layout = PromptLayout(tiny_tokenizer(), "toolrl")
    rollouts = [play([3, 4, 7], [9], 1.0), play([3, 4, 8], [9], 0.0), play([], [], 0.0)]
    found = make_group(rollouts, layout, CreditConfig())
    assert found.prompt_ids == [3, 4]
    assert [one.ids for one in found.responses] == [[7, 9], [8, 9], []]
    assert [one.mask for one in found.responses] == [[0, 1], [0, 1], []]


def test_built_in_rules_are_normalized_by_turn() -> None:
    found = select_rules("toolrl", WeightConfig(rule="uniform", normalization="turn"), by_turn=True)
    assert list(found) == list(built_in_rules())  # the run's own rule is among them
    own = [rule for rule in found.values() if isinstance(rule, WeightConfig)]
    assert {rule.normalization for rule in own} == {"turn"}
    assert list(select_rules("toolrl", PRESETS["rest"].weights, by_turn=True))[-1] == "this run"


def in_world(**changes: Any) -> ProbeReport:
    facts = EnvironmentFacts("shop", "return_to_go", 0.5, 3.25, 2.5, 0.9, 0.25, 0.0)
    return replace(made_probe(), environment=facts._replace(**changes))


def test_the_report_says_how_the_rollouts_went() -> None:
    own = in_world()
    text = describe_samples(own)
    assert all(part in text for part in ("64 tasks of shop", "3.2 turns", "2.5 calls", "success 50.0%", "25.0%"))
    assert to_mapping(own)["environment"]["turns"] == 3.25
    assert "environment" not in to_mapping(made_probe())
    assert kinds(own) == kinds(made_probe())
    bad = in_world(failed=0.06, turn_limit=0.51, call_rate=0.07)
    assert kinds(bad) == ["failed", "turn limit", "no calls", *kinds(own)]


# The command, run folders and refused options


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step in the counter."""
    out = tmp_path_factory.mktemp("runs") / "counter"
    trl = {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24}
    trl |= {"bf16": False, "use_cpu": True, "save_steps": 1, "logging_steps": 1}
    run = {
        "model": {"path": str(policy)},
        "env": {"path": COUNTER, "turns": 3},
        "rest": {"format": "toolrl", "credit": "anchor", "gamma": 0.5},
        "eval": {"prompts": 0},
        "trl": trl,
    }
    rest_rl.train(run, out=out)
    return out


def probe(folder: Path, *arguments: object) -> int:
    return main(["probe", *map(str, arguments), "--prompts", "8", "--group-size", "4", "--out", str(folder / "out")])


def test_a_run_folder_is_probed_in_its_environment(trained: Path, tmp_path: Path) -> None:
    assert probe(tmp_path, "--model", trained) == 0
    (found,) = json.loads((tmp_path / "out" / "probe.json").read_text(encoding="utf-8"))
    world, sampled = found["environment"], found["sampled"]
    assert (world["name"], world["credit"]) == ("counter", "anchor")
    assert 1 < world["turns"] <= 3
    assert 0 < world["success"] == sampled["exact_match"] < 1
    assert sampled["no_spread"] < 1
    assert found["regions"]["name"]["tokens"]["number"] > 8
    assert sum(one["gradient"]["norm_share"][0] for one in found["regions"].values()) == pytest.approx(1)
    assert [rule["name"] for rule in found["rules"]] == list(built_in_rules())
    assert found["rules"][0]["gain"] == [0.0, 0.0]
    text = (tmp_path / "out" / "probe.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Probe of counter in {COUNTER}\n")


def test_the_settings_of_rollouts_are_those_of_training(trained: Path, policy: Path, tmp_path: Path) -> None:
    own = probe_run.resolve_run(trained, None, [])
    assert (own.env.path, own.env.turns, own.rest.credit, own.rest.gamma) == (COUNTER, 3, "anchor", 0.5)
    assert own.rest.weights["normalization"] == "turn"
    other = probe_run.resolve_run(trained, None, [], "shop")
    assert (other.env.path, other.env.turns, other.data) == ("shop", 8, own.data)
    dialogues = probe_run.resolve_run(trained, "rows.jsonl", [])
    assert (dialogues.env.path, dialogues.data.path, dialogues.rest.credit) == ("", "rows.jsonl", None)
    assert dialogues.rest.weights["normalization"] == "response"
    bare = probe_run.resolve_run(policy, None, [], COUNTER)
    (layout,) = probe_run.build_layouts(bare, ("toolrl",), SILENT)
    data: Any = probe_run.read_prompts(bare, layout, SILENT, 128)
    assert len(data.prepared) == 20
    sampling = probe_run.build_sampling(bare, 4, 0, 0.0, 2000, None)
    limits = [
        probe_run.in_environment(sampling, bare, layout, data, derives_limit=is_derived).max_new_tokens
        for is_derived in (True, False)
    ]
    assert 256 < limits[0] < limits[1] == 2000  # by default twice the longest gold call and an allowance of 256
    world = probe_run.in_environment(sampling, bare, layout, data, derives_limit=False).world
    assert world is not None
    assert (world.credit.kind, world.limits.turns, world.seed) == ("return_to_go", 8, bare.run.seed)


def test_the_model_of_a_run_on_dialogues_is_probed_in_an_environment(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    run = RunConfig.from_toml(
        '[data]\npath = "a.jsonl"\nheld_out = "b.jsonl"\n[rest]\nresample_rounds = 1\n[eval]\nevery = 5'
    )
    (tmp_path / "run" / "config.toml").write_text(run.to_toml(), encoding="utf-8")
    found = probe_run.resolve_run(tmp_path / "run", None, [], "shop")
    assert (found.env.path, found.data.path, found.data.held_out) == ("shop", "embedded", "")
    assert found.rest.resample_rounds == 0
    assert found.rest.weights["normalization"] == "turn"
    assert probe_run.resolve_run(tmp_path / "run", None, []).rest.weights["normalization"] == "response"


def test_refused_options(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--env", COUNTER, "--data", "rows.jsonl"), "--data and --env"),
        (("--env", "nowhere.py:World"), "nowhere.py"),
        (("--env", COUNTER, "--set", "rest.credit=turn_index"), "turn_index"),
        (("--env", COUNTER, "--set", "rest.resample_rounds=1"), "rest.resample_rounds"),
    ):
        assert probe(tmp_path, "--model", policy, "--format", "toolrl", *options) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        rest_rl.probe(policy, "rows.jsonl", env=COUNTER)


def test_an_environment_that_scores_nothing_is_refused(policy: Path) -> None:
    config = probe_run.resolve_run(policy, None, ["trl.max_completion_length=24"], COUNTER)
    (layout,) = probe_run.build_layouts(config, ("toolrl",), SILENT)
    data: Any = probe_run.read_prompts(config, layout, SILENT, 24)
    opened = data.environment.open

    def open_unscored(task: Any, seed: int) -> Any:
        session = opened(task, seed)
        session.call_tool, session.verify = (lambda *_: Result("ok")), (lambda *_: Result())
        return session

    data.environment.open = open_unscored
    sampling = probe_run.build_sampling(config, 4, 0, 0.0, None, None)
    sampling = probe_run.in_environment(sampling, config, layout, data, derives_limit=False)
    assert sampling.world is not None
    model = tiny_model(layout.tokenizer)
    with pytest.raises(UserError, match="scored no rollout"):
        sample_groups(model, layout, data.prepared[:2], sampling)
    with pytest.raises(UserError, match="no rollout has a response"):  # the context has no room for a turn
        sample_groups(model, PromptLayout(layout.tokenizer, "toolrl", context=30), data.prepared[:2], sampling)
