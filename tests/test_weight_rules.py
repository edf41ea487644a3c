"""Rules of the package and of a user as objects of one protocol."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import rest_rl
from rest_rl.config import RestTable, RunConfig
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.evaluate.origin import resolve_origin
from rest_rl.objects import add_search_folder, load_object
from rest_rl.presets import PRESETS, WEIGHT_RULES
from rest_rl.report.diagnosis.settings import DiagnosisSettings
from rest_rl.runlog import RunLog
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.trainer import REGION_LABELS, ResTConfig, ResTTrainer
from rest_rl.weights import RegionStatistics, TaggedBatch, WeightConfig, apply_weight_rule, get_region_weights
from tests.test_trl_trainer import tokenizer  # noqa: F401
from tests.tiny_policy import tiny_model, tiny_samples, tiny_settings

RULES = """
def later(batch, statistics, progress):
    positions_BT = batch.mask_BT.cumsum(-1)
    return 1.0 + positions_BT / positions_BT.max()


class Arguments:
    def __init__(self, factor=2.0):
        self.factor = factor

    def __call__(self, batch, statistics, progress):
        return 1.0 + (self.factor - 1.0) * (batch.regions_BT == 2)


def wrong_shape(batch, statistics, progress):
    return batch.mask_BT[0].float()


def negative(batch, statistics, progress):
    return -1.0 * batch.mask_BT


NUMBER = 3
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_rules_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return name


def batch(rows: int = 2, width: int = 4) -> TaggedBatch:
    mask_BT = torch.ones(rows, width, dtype=torch.long)
    mask_BT[-1, -1] = 0
    regions_BT = torch.arange(rows * width).reshape(rows, width) % 6
    return TaggedBatch(torch.zeros_like(mask_BT), mask_BT, regions_BT, None, "toolrl")


def test_a_function_can_be_a_rule_and_its_mean_is_one(rules):
    rule = RestTable(weights={"rule": f"{rules}:later"}).resolve().weights
    weights_BT = apply_weight_rule(rule, batch(), None, 0.0)
    # 1.25, 1.5, 1.75, 2 have mean 1.625; 1.25, 1.5, 1.75 have mean 1.5
    assert weights_BT.tolist() == [
        pytest.approx([1.25 / 1.625, 1.5 / 1.625, 1.75 / 1.625, 2 / 1.625]),
        pytest.approx([1.25 / 1.5, 1.0, 1.75 / 1.5, 0.0]),
    ]
    assert get_region_weights(rule, None, 0.0) is None


def test_a_class_takes_its_options_from_the_table(rules):
    rule = RestTable(weights={"rule": f"{rules}:Arguments", "factor": 5.0}).resolve().weights
    assert apply_weight_rule(rule, batch(), None, 0.0)[0].tolist() == pytest.approx([0.5, 0.5, 2.5, 0.5])  # 1, 1, 5, 1


@pytest.mark.parametrize("name", ["wrong_shape", "negative"])
def test_invalid_weights_are_an_error_that_names_the_rule(rules, name):
    rule = RestTable(weights={"rule": f"{rules}:{name}"}).resolve().weights
    with pytest.raises(UserError) as error:
        apply_weight_rule(rule, batch(), None, 0.0)
    assert f"{rules}:{name}" in error.value.problem


@pytest.mark.parametrize(
    "table",
    [
        {"rule": "nowhere_to_be_found:rule"},
        {"rule": "{}:missing"},
        {"rule": "{}:NUMBER"},
        {"rule": "{}:later", "factor": 2.0},
        {"rule": "{}:Arguments", "fcator": 2.0},
        {"rule": "entropyy"},
        {"rule": 3},
        {"rule": "uniform", "strenght": 0.5},
    ],
)
def test_a_rule_that_cannot_be_loaded_is_a_user_error(rules, table):
    table = {key: value.format(rules) if isinstance(value, str) else value for key, value in table.items()}
    with pytest.raises(ValueError, match=r"weight rule|expected"):
        RestTable(weights=table).resolve()


def test_your_own_rule_is_recorded_and_loaded_again(rules):
    config = RunConfig.from_toml(f"[rest.weights]\nrule = '{rules}:Arguments'\nfactor = 3.0")
    again = RunConfig.from_toml(config.to_toml())
    assert again.to_toml() == config.to_toml()
    assert again.rest.resolve() == config.rest.resolve()
    assert RestTable(weights={"rule": "authors-code"}).resolve().weights == PRESETS["authors-code"].weights


@pytest.mark.parametrize("name", WEIGHT_RULES)
def test_every_built_in_rule_follows_the_protocol(name):
    rule = RestTable(weights={"rule": name}).resolve().weights
    measured = RegionStatistics(torch.ones(6), torch.linspace(0.1, 2.0, 6), torch.linspace(0.1, 0.9, 6))
    ids_BT = torch.zeros(2, 4, dtype=torch.long)
    tagged = batch()
    if name == "authors-code":
        return  # tests/test_presets.py has the published numbers
    tagged = TaggedBatch(
        ids_BT, tagged.mask_BT, tagged.regions_BT, None, "toolrl", entropies_BT=torch.rand(2, 4).double() + 0.1
    )
    weights_BT = apply_weight_rule(rule, tagged, measured, 0.5)
    assert (weights_BT.sum(-1) / tagged.mask_BT.sum(-1)).tolist() == pytest.approx([1.0, 1.0])
    assert (get_region_weights(rule, measured, 0.5) is not None) is (name not in ("constant", "uniform", "top_entropy"))


def test_a_micro_batch_uses_the_threshold_of_the_global_batch():
    rule = WeightConfig(rule="top_entropy", quantile=0.25)
    entropies_BT = torch.tensor([[4.0, 3.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.5]]).double()
    mask_BT = torch.ones(2, 4, dtype=torch.long)

    def weights(rows: slice, *own: torch.Tensor) -> torch.Tensor:
        return rule(TaggedBatch(mask_BT[rows], mask_BT[rows], mask_BT[rows], None, "toolrl", 1, *own), None, 0.0)

    whole_BT = weights(slice(0, 2), entropies_BT)
    parts = [weights(slice(i, i + 1), entropies_BT[i : i + 1], entropies_BT.flatten()) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole_BT)
    assert whole_BT.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]  # the second row keeps its own most uncertain token


def test_your_own_reward_is_read_from_the_run_file(rules, tmp_path):
    (tmp_path / f"{rules}_reward.py").write_text(
        "def short(judgement, progress, step):\n    return judgement.accuracy - 0.001 * len(judgement.text)\n"
    )
    reward = RestTable(reward={"rule": f"{rules}_reward:short"}).resolve().reward
    judgement = rest_rl.judge("<think> a </think>\n<response> b </response>", rest_rl.Gold((), "b"))
    assert reward(judgement, 0.0, 1) == pytest.approx(1.0 - 0.001 * len(judgement.text))


def test_the_trainer_uses_your_own_rule_and_tags_regions_once(tokenizer, tmp_path, rules):  # noqa: F811
    args = ResTConfig(**tiny_settings(tmp_path / "out", weights={"rule": f"{rules}:Arguments", "factor": 4.0}))
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=args,
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    tags = []
    tag = trainer._weighter.tag
    object.__setattr__(trainer._weighter, "tag", lambda *given: tags.append(1) or tag(*given))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "rest/weight/format" in row]
    assert rows
    weights = [(row["rest/weight/arguments"], row["rest/weight/format"]) for row in rows]
    assert any(None not in pair for pair in weights)
    assert all(None in pair or pair[0] == pytest.approx(4 * pair[1], rel=0.5) for pair in weights)
    batches = sum(1 for row in trainer.state.log_history if "reward" in row)
    assert len(tags) == batches  # once for each batch of responses, never inside the loss
    assert REGION_LABELS in trainer._buffered_inputs[0]
    json.loads(args.to_json_string())


def test_two_modules_of_the_same_name_are_an_error(tmp_path):
    for name, constant in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        code = f"def rule(batch, statistics, progress):\n    return {constant} * batch.mask_BT\n"
        (tmp_path / name / "rule_in_two_folders.py").write_text(code)
    add_search_folder(tmp_path / "first")
    assert load_object("rule_in_two_folders:rule", "weight rule")(batch(), None, 0.0).max() == 1.0
    add_search_folder(tmp_path / "second")
    with pytest.raises(UserError, match="second"):
        load_object("rule_in_two_folders:rule", "weight rule")


def test_every_reader_of_a_run_folder_finds_the_rule_next_to_its_run_file(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rule_of_a_recorded_run.py").write_text("def rule(batch, statistics, progress):\n    pass\n")
    config = "[rest.weights]\nrule = 'rule_of_a_recorded_run:rule'\n"
    RunLog.create(tmp_path / "run", config, [], run_file=tmp_path / "own" / "run.toml")
    RunLog.create(tmp_path / "again", config, [], run_file=tmp_path / "run" / "config.toml")
    (tmp_path / "again" / "model").mkdir()
    run = resolve_origin(str(tmp_path / "again")).run
    assert callable(run.rest.resolve().weights)


def test_the_diagnosis_does_not_take_your_own_rule_for_a_built_in_one(rules, tmp_path):
    (tmp_path / f"{rules}_fields.py").write_text(
        "class Own:\n    w_min, w_max, strength = 'a', 'b', 'high'\n    def __call__(self, *_): ...\n"
    )
    own = DiagnosisSettings.from_table({"rest": {"weights": {"rule": f"{rules}_fields:Own"}}})
    assert (own.weight_clip, own.strength, own.curriculum_shifts, own.is_shuffled) == (None, None, {}, False)


class UnnormalizedRule:
    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> torch.Tensor:
        return torch.full(batch.mask_BT.shape, 3.0)


@pytest.mark.parametrize("attribute", ["is_normalized", "is_normalised"])
def test_a_rule_that_normalizes_itself_keeps_its_weights(attribute: str) -> None:
    rule = UnnormalizedRule()
    batch = TaggedBatch(
        torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), None, "toolrl"
    )
    assert apply_weight_rule(rule, batch, None, 0.0).tolist() == [[1.0, 1.0]]
    setattr(rule, attribute, True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert apply_weight_rule(rule, batch, None, 0.0).tolist() == [[3.0, 3.0]]
    assert [warning.category for warning in caught] == [RenamedWarning] * (attribute == "is_normalised")
