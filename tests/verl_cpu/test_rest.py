"""ResT on verl, whole runs on a CPU: from run file to model, killed and resumed, compared with stock verl and TRL."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from trl import GRPOTrainer

from rest_rl.config import RunConfig, read_run_file
from rest_rl.data.tool_world import tool_world
from rest_rl.response import Region
from rest_rl.runlog import read_rows, read_run
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.record import RESPONSE_INDEX
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.train.weighing import EntropyTracker
from rest_rl.weights import region_weights
from tests.verl_cpu.tiny import CPU_SETTINGS, LOG, run_cpu, started

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl: make test-verl"),
]
PROMPTS, GROUP = 4, 4


def run_file(folder: Path, steps: int, ranks: int = 1, **tables: dict[str, Any]) -> Path:
    """A run of `steps` batches of 4 prompts x 4 responses, with one optimizer step per batch and every prompt once."""
    run = {
        "run": {"engine": "verl", "out": str(folder / "run"), "recorded_responses": PROMPTS * GROUP, "show_every": 0},
        "data": {"num_samples": PROMPTS * steps},
        "eval": {"prompts": 0},
        "rest": {"preset": "rest"},
        "trl": {
            "max_steps": steps,
            "per_device_train_batch_size": PROMPTS * GROUP // ranks,
            "num_generations": GROUP,
            "max_completion_length": 64,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "save_steps": steps,
            "bf16": False,
            "gradient_checkpointing": False,
        },
        "verl": {**CPU_SETTINGS, "trainer": {**CPU_SETTINGS["trainer"], "n_gpus_per_node": ranks}},
    }
    for name, table in tables.items():
        run[name] = {**run[name], **table}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(run), encoding="utf-8")
    return path


def train(path: Path, *options: str) -> list[str]:
    return ["-m", "rest_rl", "train", str(path), *options]


# Whole runs


def test_a_killed_run_on_two_ranks_resumes(tmp_path):
    path = run_file(tmp_path, 4, ranks=2, trl={"save_steps": 2}, eval={"prompts": 4, "max_new_tokens": 64})
    folder = tmp_path / "run"
    with started(train(path), tmp_path) as run:  # its Ray is killed as well
        while len(read_rows(folder / "metrics.jsonl")) < 3:
            assert run.poll() is None, (tmp_path / LOG).read_text(encoding="utf-8")[-5000:]
            time.sleep(0.1)
    half = read_run(folder)
    run_cpu(train(path, "--resume"), tmp_path)
    whole = read_run(folder)
    assert [row["step"] for row in whole.metrics] == [1, 2, 3, 4]
    assert whole.metrics[:2] == half.metrics[:2]
    progress = {row["step"]: row["progress"] for row in whole.responses}
    assert progress == {1: 0.0, 2: pytest.approx(1 / 3), 3: pytest.approx(2 / 3), 4: 1.0}
    # Nothing is trained twice or skipped: four responses to every prompt.
    ids = [row["id"] for row in whole.responses]
    assert sorted(ids) == sorted(sample.id for sample in tool_world(0, 4 * PROMPTS, "train") for _ in range(GROUP))
    assert all(row["grad_norm"] > 0 for row in whole.metrics)
    assert all(row["training/rollout_probs_diff_max"] < 1e-4 for row in whole.metrics)
    # The third step is weighted by the statistics of the two steps before it.
    rest = RunConfig.from_toml(whole.config).rest
    tracker = EntropyTracker(rest.entropy_decay, first_batches=5)
    tracker.table = json.loads((folder / "checkpoints" / "global_step_2" / "rest.json").read_text(encoding="utf-8"))
    weights_R = region_weights(tracker.statistics(), rest.resolve().weights)
    recorded = whole.metrics[2]["rest/rule_weight/name"]  # which the curriculum does not change
    assert recorded == pytest.approx(float(weights_R[Region.NAME]), rel=1e-9)
    assert whole.summary["before"]["n"] == whole.summary["after"]["n"] == 8
    assert whole.summary["before"] == half.summary["before"]
    model, tokenizer = load_policy(RunConfig.from_toml(f'[model]\npath = "{folder / "model"}"').model)
    assert tokenizer.chat_template
    start, _ = load_policy(RunConfig().model)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_weights_of_zero_give_no_gradient(tmp_path):
    """With a user's rule in a file next to the run file."""
    rule = "def silent(batch, statistics, progress):\n    return 0.0 * batch.mask_BT\n"
    (tmp_path / "own_rule.py").write_text(rule, encoding="utf-8")
    run_cpu(train(run_file(tmp_path, 1, rest={"weights": {"rule": "own_rule:silent"}})), tmp_path)
    row = read_run(tmp_path / "run").metrics[0]
    assert row["reward_std"] > 0
    assert row["loss"] == row["grad_norm"] == 0.0


def test_weights_of_one_are_stock_grpo(tmp_path):
    figures = {}
    for variant in ("ours", "stock"):
        folder = tmp_path / variant
        folder.mkdir()
        settings = {**CPU_SETTINGS, "algorithm": {"adv_estimator": "grpo"}}
        settings["trainer"] = {**settings["trainer"], "logger": ["file"]}
        path = run_file(folder, 2, rest={"preset": "grpo"}, verl=settings)
        arguments = train(path) if variant == "ours" else ["-m", f"{__package__}.variants", "stock", str(path)]
        run_cpu(arguments, folder)
        lines = (folder / "verl.jsonl").read_text(encoding="utf-8").splitlines()
        figures[variant] = [json.loads(line)["data"] for line in lines]
    exact = ("critic/advantages/max", "critic/advantages/min", "critic/score/mean", "response_length/mean")
    for ours, stock in zip(figures["ours"], figures["stock"], strict=True):
        assert {name: ours[name] for name in exact} == {name: stock[name] for name in exact}
        # Sums over the batch, whose rows verl orders at random; advantages add up to 0, so the loss is rounding noise.
        # That a weight of 1 changes no bit of an advantage is tested without verl (tests/test_verl_responses.py).
        for name in ("actor/pg_loss", "actor/entropy", "actor/grad_norm"):
            assert ours[name] == pytest.approx(stock[name], rel=1e-6, abs=1e-6), name
        assert ours["actor/grad_norm"] > 0
        assert not [name for name in stock if name.startswith("rest/")]


# The same responses on TRL


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trl_computes_the_same_update_from_the_same_responses(tmp_path, monkeypatch, beta):
    """With a KL term, too, which neither engine multiplies by the token weights; it is 0 in the first step."""
    path = run_file(tmp_path, 2, trl={"beta": beta})
    run_cpu(["-m", f"{__package__}.variants", "recording", str(path)], tmp_path)
    folder = tmp_path / "run"
    batches = [torch.load(folder / f"batch-{step}.pt", weights_only=False) for step in (1, 2)]
    trainer, seen = trl_on(batches, read_run_file(folder / "config.toml"), tmp_path / "trl", monkeypatch)
    trainer.train()
    for batch, weighed, rows in zip(batches, seen["weighed"], seen["rows"], strict=True):
        ours_BT = batch["advantages"][rows]
        trl_BT = weighed.advantages_B[:, None] * weighed.weights_BT * batch["response_mask"][rows]
        torch.testing.assert_close(ours_BT, trl_BT, rtol=0, atol=1e-6)
        assert ours_BT.abs().max() > 0.1
    assert max(seen["rounding"]) < 1e-4  # nats by which the entropies of the two forward passes differ
    figures = read_rows(folder / "metrics.jsonl")
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    if beta:
        # A mean over each response on verl and over all tokens on TRL: only the gradients below are equal.
        assert min(figures[1]["actor/kl_loss"], logged[1]["kl"]) > 1e-3
    for ours, theirs in zip(figures, logged, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
        for name in [name for name in ours if name.startswith("rest/") and theirs[name] is not None]:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def trl_on(
    batches: list[dict[str, Any]], config: RunConfig, out: Path, patch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, list[Any]]]:
    """A trainer on TRL that gets verl's responses and entropies, and the values that it computes.

    `rows` are the row numbers of the responses on verl. A weight can be a thousand times as sensitive as an entropy:
    the rounding differences between the two forward passes are kept out of the comparison and checked separately.
    """
    model, tokenizer = load_policy(RunConfig().model)
    samples = {sample.id: sample for sample in tool_world(0, len(batches) * PROMPTS, "train")}
    order = [in_groups(batch) for batch in batches]
    ids = [batch["extra_info"][rows[0]]["id"] for batch, places in zip(batches, order, strict=True) for rows in places]
    turn = iter(zip(batches, order, strict=True))
    seen: dict[str, list[Any]] = {"weighed": [], "rows": [], "rounding": []}

    def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
        batch, places = next(turn)
        rows = [row for group in places for row in group]
        lengths = batch["response_mask"][rows].sum(-1).tolist()
        seen["rows"].append(rows)
        return {
            "prompt_ids": [batch["prompts"][row] for row in rows],
            "completion_ids": [batch["responses"][row, :n].tolist() for row, n in zip(rows, lengths, strict=True)],
            "logprobs": None,
        }

    table = {name: value for name, value in config.trl.items() if name != "save_steps"}
    args = ResTConfig(
        str(out), preset=config.rest.preset, use_cpu=True, shuffle_dataset=False, save_strategy="no", report_to=[],
        logging_steps=1, disable_tqdm=True, adam_beta2=0.999, **table,
    )  # fmt: skip
    dataset = build_training_dataset([samples[name] for name in ids], tokenizer)
    trainer = ResTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, rollout_func=replay)
    trainer._prepare_inputs = in_order(trainer)
    forward = GRPOTrainer._get_per_token_logps_and_entropies

    def measured_on_verl(*arguments: Any, **settings: Any) -> Any:
        logps_BT, entropies_BT, *rest = forward(*arguments, **settings)
        if entropies_BT is None:  # of the reference model
            return (logps_BT, None, *rest)
        batch, rows = batches[len(seen["rows"]) - 1], seen["rows"][-1]
        theirs_BT, mask_BT = batch["entropy"][rows], batch["response_mask"][rows]
        seen["rounding"].append(float(((entropies_BT - theirs_BT) * mask_BT).abs().max()))
        return (logps_BT, theirs_BT, *rest)

    patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", measured_on_verl)
    trainer.on_weighed = seen["weighed"].append
    return trainer, seen


def in_groups(batch: dict[str, Any]) -> list[list[int]]:
    """The row numbers of each group's responses."""
    groups: dict[str, list[int]] = {}
    for row, uid in enumerate(batch["uid"]):
        groups.setdefault(str(uid), []).append(row)
    return list(groups.values())


def in_order(trainer: Any) -> Any:
    """TRL shuffles a generation batch before it trains on it; the response numbers undo that."""
    prepare = trainer._prepare_inputs

    def prepared(inputs: Any) -> Any:
        batch = prepare(inputs)
        order = batch[RESPONSE_INDEX].argsort()
        rows = len(order)
        return {k: v[order] if isinstance(v, torch.Tensor) and v.shape[:1] == (rows,) else v for k, v in batch.items()}

    return prepared
