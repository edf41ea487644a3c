"""What `ResTTrainer` takes for granted about TRL's private code; a failure here means that upstream has moved."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import torch
from transformers.trainer_callback import ExportableState, TrainerState
from trl import GRPOConfig, GRPOTrainer

from rest_rl.credit import weight_advantages
from rest_rl.loss import clipped_surrogate
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.reward import make_tool_reward
from rest_rl.train.trl.resample import NUM_ITEMS, PADDING
from rest_rl.train.trl.shared_prompts import _is_known_trl
from rest_rl.train.trl.trainer import FROM_PRESET, ResTConfig, ResTTrainer
from tests.test_trl_trainer import batch_far_from_its_policy
from tests.tiny_policy import tiny_model, tiny_samples, tiny_settings, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def stock_trainer(tokenizer, folder, **changes):
    trainer = GRPOTrainer(
        tiny_model(tokenizer),
        reward_funcs=make_tool_reward(tokenizer),
        args=GRPOConfig(**tiny_settings(folder, **changes)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_the_loss_reads_the_advantages_after_its_forward_pass():
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    forwards = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "_get_per_token_logps_and_entropies"
    ]
    reads = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == "advantages"]
    assert len(forwards) == 1, "the loss makes another number of forward passes"
    assert reads, "the loss reads no advantages"
    assert min(reads) > forwards[0], "the loss reads the advantages before its forward pass"


def test_signatures():
    assert list(inspect.signature(GRPOTrainer.compute_loss).parameters) == [
        "self", "model", "inputs", "return_outputs", "num_items_in_batch",
    ]  # fmt: skip
    assert callable(GRPOTrainer._compute_loss)
    assert callable(GRPOTrainer._get_per_token_logps_and_entropies)
    assert list(inspect.signature(GRPOTrainer._calculate_rewards).parameters)[1:] == [
        "inputs", "prompts", "completions", "completion_ids_list",
    ]  # fmt: skip


def test_what_shared_prompts_rely_on(tokenizer, tmp_path):
    assert _is_known_trl()
    trainer = stock_trainer(tokenizer, tmp_path)
    assert trainer._buffered_inputs is None
    assert {"_step", "beta", "_entropy_bonus_enabled", "aux_loss_enabled", "_is_vlm"} <= vars(trainer).keys()
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_single_turn)))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".generate")
    ]
    plain = [node for node in calls if "vllm" not in ast.unparse(node.func)]
    assert len(plain) == 1, "transformers' generate is called another number of times"
    assert [keyword.arg for keyword in plain[0].keywords] == [None, "generation_config"]


IMAGES = ["pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids"]
IMAGES += ["mm_token_type_ids", "image_position_ids", "num_images", "num_tiles"]


def test_a_batch_has_only_entries_that_resampling_can_merge_and_images():
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("output"):
            keys = node.value.keys if isinstance(node.value, ast.Dict) else [node.targets[0].slice]
            found |= {key.value for key in keys}
    assert found - {*IMAGES} == {*PADDING, "advantages", NUM_ITEMS}


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_advantages_of_every_token_are_accepted(tokenizer, tmp_path, loss_type):
    trainer = stock_trainer(tokenizer, tmp_path, loss_type=loss_type)
    inputs, logps_BT = batch_far_from_its_policy(trainer, tokenizer)
    weights_BT = torch.rand(logps_BT.shape, generator=torch.Generator().manual_seed(2)) * 2
    reference = {"aggregation": loss_type, "max_length": trainer.max_completion_length}
    for w_BT in (torch.ones_like(weights_BT), weights_BT):
        advantages_BT = weight_advantages(inputs["advantages"], w_BT)
        loss = trainer.compute_loss(trainer.model, {**inputs, "advantages": advantages_BT})
        mask_BT, old_BT = inputs["completion_mask"], inputs["old_per_token_logps"]
        expected = clipped_surrogate(logps_BT, old_BT, advantages_BT, mask_BT, **reference)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    unweighed = trainer.compute_loss(trainer.model, inputs)
    assert abs(unweighed.item() - loss.item()) > 1e-4


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_every_loss_is_linear_in_the_weights(tokenizer, tmp_path, loss_type, level):
    """So no loss type ignores or distorts them: L(w1) + L(w2) = L(w1 + w2), and L(1) is the stock loss."""
    trainer = stock_trainer(tokenizer, tmp_path, loss_type=loss_type, importance_sampling_level=level)
    inputs, logps_BT = batch_far_from_its_policy(trainer, tokenizer)
    generator = torch.Generator().manual_seed(3)
    one_BT, two_BT = (torch.rand(logps_BT.shape, generator=generator) + 0.1 for _ in range(2))

    def loss(weights_BT):
        advantages_BT = weight_advantages(inputs["advantages"], weights_BT)
        return trainer.compute_loss(trainer.model, {**inputs, "advantages": advantages_BT}).item()

    assert loss(one_BT) + loss(two_BT) == pytest.approx(loss(one_BT + two_BT), rel=1e-5, abs=2e-6)
    assert loss(torch.ones_like(one_BT)) == trainer.compute_loss(trainer.model, inputs).item()


def test_entropies_are_those_of_the_scored_distribution_in_nats(tokenizer, tmp_path):
    trainer = stock_trainer(tokenizer, tmp_path, temperature=0.7)
    inputs, _ = batch_far_from_its_policy(trainer, tokenizer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / 0.7
        out = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, compute_entropy=True)
    log_p = logits.log_softmax(-1)
    kept = inputs["completion_mask"] > 0
    torch.testing.assert_close(out[1][kept], -(log_p.exp() * log_p).sum(-1)[kept], rtol=1e-4, atol=1e-5)
    logps = log_p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(out[0][kept], logps[kept], rtol=1e-4, atol=1e-5)


class ReadsAdvantagesFirst(ResTTrainer):
    def _compute_loss(self, model, inputs):
        inputs["advantages"].sum()
        return super()._compute_loss(model, inputs)


class MakesNoForwardPass(ResTTrainer):
    def _compute_loss(self, model, inputs):
        return torch.zeros(())


@pytest.mark.parametrize(
    ("trainer_class", "rule", "error"),
    [
        (ReadsAdvantagesFirst, "top_entropy", KeyError),  # its weights wait for the forward pass
        (MakesNoForwardPass, "top_entropy", RuntimeError),
        (MakesNoForwardPass, "one_minus_exp", RuntimeError),
    ],
)
def test_a_loss_that_would_bypass_the_weights_fails(tokenizer, tmp_path, trainer_class, rule, error):
    trainer = trainer_class(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(tmp_path, weights={"rule": rule})),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    inputs, _ = batch_far_from_its_policy(trainer, tokenizer)
    with pytest.raises(error):
        trainer.compute_loss(trainer.model, inputs)


def test_trls_own_defaults_are_the_ones_that_presets_fill():
    fields = GRPOConfig.__dataclass_fields__
    assert fields["epsilon"].default == 0.2
    assert fields["epsilon_high"].default is None
    assert fields["beta"].default == 0.0
    assert fields["entropy_coef"].default == 0.0
    assert fields["top_entropy_quantile"].default == 1.0
    assert fields["loss_type"].default != FROM_PRESET


def test_exported_callback_state_reaches_the_checkpoint():
    assert hasattr(TrainerState(), "stateful_callbacks")
    assert callable(ExportableState.state)
