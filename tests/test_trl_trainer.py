from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rest_rl.credit import weight_advantages
from rest_rl.formats import FORMATS
from rest_rl.loss import clipped_surrogate
from rest_rl.presets import PRESETS
from rest_rl.regions import tag_regions
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.reward import make_tool_reward
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.train.weighing import EntropyTracker
from rest_rl.weights import apply_curriculum, assign_weights, region_weights
from tests.tiny_policy import (
    copy_parameters,
    logged_steps,
    scripted_completions,
    tiny_model,
    tiny_samples,
    tiny_settings,
    tiny_tokenizer,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def rest_trainer(tokenizer, folder, samples=8, **changes):
    """A trainer whose model has the same initial weights every time."""
    return ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(folder, **changes)),
        train_dataset=build_training_dataset(tiny_samples(samples), tokenizer),
        processing_class=tokenizer,
    )


def trained(trainer):
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def same_parameters(left, right, **tolerance):
    left, right = copy_parameters(left.model), copy_parameters(right.model)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# The weights enter the loss; weights of 1 are stock GRPO


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "max_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 12},
    ],
    ids=["plain", "two_iterations", "accumulated", "dapo_truncated"],
)
def test_weights_of_one_are_stock_grpo_bit_for_bit(tokenizer, tmp_path, changes):
    dataset = build_training_dataset(tiny_samples(), tokenizer)
    stock = trained(
        GRPOTrainer(
            tiny_model(tokenizer),
            reward_funcs=make_tool_reward(tokenizer, preset="grpo"),
            args=GRPOConfig(**tiny_settings(tmp_path, **{"loss_type": "grpo", **changes})),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    )
    ours = trained(rest_trainer(tokenizer, tmp_path, preset="grpo", share_prompts=False, **changes))
    assert any(row["grad_norm"] > 0 for row in logged_steps(stock))
    for stock_row, our_row in zip(logged_steps(stock), logged_steps(ours), strict=True):
        assert {key: our_row[key] for key in stock_row} == stock_row
    same_parameters(stock, ours, rtol=0, atol=0)


def test_token_weights_change_the_run(tokenizer, tmp_path):
    plain = trained(rest_trainer(tokenizer, tmp_path, preset="grpo"))
    reshaped = trained(rest_trainer(tokenizer, tmp_path, preset="rest"))
    # Nothing has been measured before the first step and the curriculum starts at 0: equal weights.
    assert logged_steps(plain)[0]["grad_norm"] == logged_steps(reshaped)[0]["grad_norm"]
    assert logged_steps(plain)[1]["grad_norm"] != logged_steps(reshaped)[1]["grad_norm"]


def test_the_loss_is_the_clipped_surrogate_of_the_weighted_advantages(tokenizer, tmp_path):
    trainer = rest_trainer(tokenizer, tmp_path, preset="rest")
    totals_3R = torch.rand(3, NUM_REGIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainer.tracker.update(totals_3R * torch.tensor([[1.0], [2.0], [1.0]]), batch=0)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.global_step = 3, 1
    inputs, logps_BT = batch_far_from_its_policy(trainer, tokenizer)
    mask_BT, advantages_B = inputs["completion_mask"], inputs["advantages"]
    statistics = trainer.tracker.statistics()
    loss = trainer.compute_loss(trainer.model, inputs)

    config, parse = PRESETS["rest"].weights, FORMATS["toolrl"].parse
    regions_BT = tag_regions(inputs["completion_ids"], mask_BT, tokenizer, lambda text: parse(text).spans)
    weights_R = apply_curriculum(region_weights(statistics, config), 0.5, config)
    weights_BT = assign_weights(weights_R, regions_BT, mask_BT)
    assert (weights_BT[mask_BT > 0] - 1).abs().max() > 0.2
    expected = clipped_surrogate(
        logps_BT, inputs["old_per_token_logps"], weight_advantages(advantages_B, weights_BT), mask_BT
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    unweighed_BT = weight_advantages(advantages_B, torch.ones_like(weights_BT))
    unweighed = clipped_surrogate(logps_BT, inputs["old_per_token_logps"], unweighed_BT, mask_BT)
    assert abs(unweighed.item() - loss.item()) > 1e-3
    assert inputs["advantages"] is advantages_B
    assert advantages_B.shape == (8,)


def test_a_kl_term_is_added_without_weights(tokenizer, tmp_path):
    trainer = rest_trainer(tokenizer, tmp_path, preset="rest")
    trainer.tracker.update(torch.rand(3, NUM_REGIONS, dtype=torch.float64), batch=0)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.global_step = 9, 6  # the statistics stay as they are
    inputs, logps_BT = batch_far_from_its_policy(trainer, tokenizer)
    mask_BT = inputs["completion_mask"]
    without = trainer.compute_loss(trainer.model, dict(inputs)).item()
    reference_BT = logps_BT + 0.3 * torch.randn(logps_BT.shape, generator=torch.Generator().manual_seed(2))
    trainer.beta = 0.1
    loss = trainer.compute_loss(trainer.model, {**inputs, "ref_per_token_logps": reference_BT}).item()
    # exp(d) - d - 1 with d = log(p_ref / p), the mean over each response's tokens, every token with weight 1
    difference_BT = reference_BT - logps_BT
    kl_BT = (difference_BT.exp() - difference_BT - 1) * mask_BT
    expected = 0.1 * (kl_BT.sum(-1) / mask_BT.sum(-1)).mean().item()
    assert loss - without == pytest.approx(expected, abs=1e-6)
    assert expected > 1e-4


def batch_far_from_its_policy(trainer, tokenizer):
    """A scored batch whose old log-probabilities put most ratios outside the clip range, and its own."""
    generator = torch.Generator().manual_seed(0)
    rows = scripted_completions(["f do 0;assistant:"] * 8, trainer)["completion_ids"]
    width = max(map(len, rows))
    completion_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    completion_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    prompt_ids = torch.tensor(tokenizer(["f do 0;assistant:"] * 8)["input_ids"])
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    attention_mask = torch.cat([torch.ones_like(prompt_ids), completion_mask], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -width - 1 : -1]
    logps_BT = logits.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]
    old_BT = logps_BT + torch.randn(logps_BT.shape, generator=generator)
    assert ((logps_BT - old_BT).exp() - 1).abs()[completion_mask > 0].gt(0.2).float().mean() > 0.6
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.randn(8, generator=generator),
        "old_per_token_logps": old_BT,
        "num_items_in_batch": completion_mask.sum(),
    }
    return inputs, logps_BT


def test_tool_result_tokens_have_no_weight_and_no_statistics(tokenizer, tmp_path):
    trainer = rest_trainer(tokenizer, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    inputs, _ = batch_far_from_its_policy(trainer, tokenizer)
    inputs["tool_mask"] = inputs["completion_mask"].clone()
    inputs["tool_mask"][:, 4:7] = 0
    trainer.compute_loss(trainer.model, inputs)
    assert trainer.tracker.totals_3R[0].sum() == (inputs["tool_mask"] * inputs["completion_mask"]).sum()


# The statistics belong to the step, not to the micro-batch or the process


def test_gradient_accumulation_equals_the_full_batch(tokenizer, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
    full = trained(rest_trainer(tokenizer, tmp_path, **settings))
    split = trained(
        rest_trainer(tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    )
    for full_row, split_row in zip(logged_steps(full), logged_steps(split), strict=True):
        for key, value in full_row.items():
            if key.startswith("rest/") or key in ("grad_norm", "reward"):
                assert split_row[key] == (value and pytest.approx(value, rel=2e-4, abs=1e-6)), key
    same_parameters(full, split, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(full.tracker.totals_3R, split.tracker.totals_3R, rtol=1e-4, atol=1e-5)


def run_worker(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "tests.trl_worker", *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["one_minus_exp", "top_entropy"])
def test_two_processes_equal_one(tmp_path, rule):
    for processes in (1, 2):
        done = run_worker("scripted", tmp_path / f"{processes}.pt", 8 // processes, rule, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one["totals"][0].count_nonzero() >= 4
    torch.testing.assert_close(one["totals"], two["totals"], rtol=1e-5, atol=1e-6)
    for one_row, two_row in zip(one["history"], two["history"], strict=True):
        for key, value in one_row.items():
            if key.startswith("rest/") or key == "grad_norm":
                assert two_row[key] == (value and pytest.approx(value, rel=1e-4, abs=1e-6)), key
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-5, atol=2e-6)


# Resume


@pytest.mark.parametrize("restored_by_trainer", [False, True])
def test_resume_is_bit_identical(tokenizer, tmp_path, restored_by_trainer):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "entropy_decay": 0.9,
        "restore_callback_states_from_checkpoint": restored_by_trainer,
    }
    whole = trained(rest_trainer(tokenizer, tmp_path, **settings))
    resumed = rest_trainer(tokenizer, tmp_path, **settings)
    resumed.remove_callback(PrinterCallback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged_steps(resumed) == logged_steps(whole)
    same_parameters(whole, resumed, rtol=0, atol=0)
    assert torch.equal(whole.tracker.totals_3R, resumed.tracker.totals_3R)


def test_resume_after_a_kill_is_bit_identical(tokenizer, tmp_path):
    killed = run_worker("killed", tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert (tmp_path / "checkpoint-2").is_dir()
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    resumed = rest_trainer(tokenizer, tmp_path, **settings)
    resumed.remove_callback(PrinterCallback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = trained(rest_trainer(tokenizer, tmp_path / "whole", **settings))
    assert logged_steps(resumed) == logged_steps(whole)
    same_parameters(whole, resumed, rtol=0, atol=0)


def test_the_tracker_forgets_by_its_decay_and_survives_json():
    tracker = EntropyTracker(0.5)
    assert tracker.statistics() is None
    first, second = torch.zeros(3, NUM_REGIONS, dtype=torch.float64), torch.zeros(3, NUM_REGIONS, dtype=torch.float64)
    first[:, Region.NAME] = torch.tensor([4.0, 8.0, 2.0])
    second[:, Region.NAME] = torch.tensor([2.0, 1.0, 0.5])
    tracker.update(first, batch=0)
    tracker.update(second, batch=1)
    tracker.update(second * float("nan"), batch=2)
    statistics = tracker.statistics()
    assert statistics.counts_R[Region.NAME] == 4.0  # 0.5 * 4 + 2
    assert statistics.entropies_R[Region.NAME] == 1.25  # (0.5 * 8 + 1) / 4
    assert statistics.collisions_R[Region.NAME] == 0.375  # (0.5 * 2 + 0.5) / 4
    assert torch.isnan(statistics.entropies_R[Region.ANSWER])
    statistics.counts_R.zero_()  # a rule may change what it is given
    assert tracker.statistics().counts_R[Region.NAME] == 4.0
    restored = EntropyTracker.from_state(json.loads(json.dumps(tracker.state())))
    assert (restored.decay, restored.first_batches) == (0.5, 0)
    assert torch.equal(restored.totals_3R, tracker.totals_3R)


def test_initial_entropies_are_the_plain_mean_over_the_first_batches():
    tracker = EntropyTracker(0.5, first_batches=2)
    for batch, (tokens, entropy) in enumerate([(4.0, 8.0), (2.0, 1.0), (100.0, 500.0), (100.0, 700.0)]):
        sums_3R = torch.zeros(3, NUM_REGIONS, dtype=torch.float64)
        sums_3R[:, Region.NAME] = torch.tensor([tokens, entropy, 0.0])
        if batch >= 2:  # a region that comes later is measured once
            sums_3R[:, Region.ANSWER] = torch.tensor([tokens, entropy, 0.0])
        tracker.update(sums_3R, batch)
    assert tracker.statistics().entropies_R[Region.ANSWER] == 5.0
    assert tracker.statistics().counts_R[Region.NAME] == 6.0  # no decay, and nothing of the third step
    assert tracker.statistics().entropies_R[Region.NAME] == 1.5  # (8 + 1) / (4 + 2)
    restored = EntropyTracker.from_state(json.loads(json.dumps(tracker.state())))
    assert (restored.first_batches, restored.table) == (2, tracker.table)


# Metrics


def test_metrics_are_logged_from_the_first_step(tokenizer, tmp_path):
    trainer = trained(rest_trainer(tokenizer, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    for row in logged_steps(trainer):
        for quantity in ("entropy", "collision", "weight", "share"):
            assert {f"rest/{quantity}/{region.label}" for region in Region} <= set(row)
        for name in ("format", "accuracy", "exact_match", "call_rate"):
            assert 0 <= row[f"rest/{name}"] <= 1
        assert {"reward", "frac_reward_zero_std", "completions/clipped_ratio"} <= set(row)
        shares = [row[f"rest/share/{region.label}"] for region in Region]
        assert sum(shares) == pytest.approx(1)
        # The token mean of the weights is 1: each response's is.
        weights = [row[f"rest/weight/{region.label}"] for region in Region]
        assert sum(s * w for s, w in zip(shares, weights, strict=True) if s) == pytest.approx(1, abs=1e-6)
    first = logged_steps(trainer)[0]
    assert all(first[f"rest/weight/{region.label}"] in (None, pytest.approx(1)) for region in Region)


def test_region_entropies_add_up_to_trls_own(tokenizer, tmp_path):
    for row in logged_steps(trained(rest_trainer(tokenizer, tmp_path))):
        parts = [(row[f"rest/share/{r.label}"], row[f"rest/entropy/{r.label}"]) for r in Region]
        assert sum(share * entropy for share, entropy in parts if share) == pytest.approx(row["entropy"], rel=1e-4)


def test_evaluation_logs_regions_without_updating_the_statistics(tokenizer, tmp_path):
    trainer = rest_trainer(tokenizer, tmp_path, max_steps=2)
    trainer.eval_dataset = build_training_dataset(tiny_samples(2), tokenizer)
    trained(trainer)
    before = trainer.tracker.totals_3R.clone()
    metrics = trainer.evaluate()
    assert metrics["eval_rest/share/format"] > 0
    assert torch.equal(trainer.tracker.totals_3R, before)


# Other rules and kinds of advantage


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(tokenizer, tmp_path, preset):
    trainer = rest_trainer(tokenizer, tmp_path, preset=preset, max_steps=2)
    before = copy_parameters(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in copy_parameters(trainer.model).items())
    first = logged_steps(trainer)[0]
    if preset == "authors-code":  # step 1: arguments 0.602 against name 1.2, before normalization
        assert first["rest/weight/arguments"] < first["rest/weight/name"]
    elif preset in ("rest", "rest_live"):  # nothing has been measured before step 0, and nu is 0
        assert first["rest/weight/name"] == pytest.approx(1.0)
        assert logged_steps(trainer)[1]["rest/weight/name"] != pytest.approx(1.0)
    else:
        assert first["rest/weight/name"] == logged_steps(trainer)[1]["rest/weight/name"] == 1.0


@pytest.mark.parametrize("rule", ["inverse", "collision", "constant", "inverted", "top_entropy", "permuted"])
def test_every_rule_trains(tokenizer, tmp_path, rule):
    trainer = trained(rest_trainer(tokenizer, tmp_path, weights={"rule": rule}, max_steps=2))
    row = logged_steps(trainer)[-1]
    assert row["grad_norm"] < 1e4
    parts = [(row[f"rest/share/{r.label}"], row[f"rest/weight/{r.label}"]) for r in Region]
    assert sum(share * weight for share, weight in parts if share) == pytest.approx(1, abs=1e-6)


def test_weights_normalized_over_the_batch_have_mean_one_over_all_micro_batches(tokenizer, tmp_path):
    seen = []
    settings = {"normalization": "batch", "rule": "constant"}
    trainer = rest_trainer(
        tokenizer, tmp_path, weights=settings, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.on_weighed = seen.append
    trainer.train()
    assert len(seen) == 2
    masks = [batch.weights_BT > 0 for batch in seen]
    means = [batch.weights_BT[mask].double().mean().item() for batch, mask in zip(seen, masks, strict=True)]
    counts = [int(mask.sum()) for mask in masks]
    assert sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts) == pytest.approx(1)
    assert means != pytest.approx([1, 1], abs=1e-4)


def test_a_dropped_region_has_no_gradient(tokenizer, tmp_path):
    trainer = trained(rest_trainer(tokenizer, tmp_path, preset="grpo", weights={"dropped": ["reasoning"]}, max_steps=1))
    row = logged_steps(trainer)[0]
    assert row["rest/share/reasoning"] > 0
    assert row["rest/weight/reasoning"] == 0.0
    parts = [(row[f"rest/share/{r.label}"], row[f"rest/weight/{r.label}"]) for r in Region]
    assert sum(share * weight for share, weight in parts if share) == pytest.approx(1, abs=1e-6)


def test_random_rewards_depend_on_the_seed_of_the_run(tokenizer, tmp_path):
    rewards = [
        logged_steps(
            trained(
                rest_trainer(tokenizer, tmp_path / name, preset="grpo", reward={"random": True}, seed=seed, max_steps=1)
            )
        )[0]["reward"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert rewards[0] == rewards[1] != rewards[2]


def test_lora_trains(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(tmp_path, max_steps=2)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    before = copy_parameters(trainer.model)
    trained(trainer)
    changed = [name for name, value in copy_parameters(trainer.model).items() if not torch.equal(value, before[name])]
    assert changed
    assert all("lora" in name for name in changed)
