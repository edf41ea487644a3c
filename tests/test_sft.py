"""Supervised baselines with the workflow of the RL presets: loss weights by region, run folder, resume, SFT then RL."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from rest_rl.cli.app import main
from rest_rl.config import RunConfig
from rest_rl.data.layout import PromptLayout
from rest_rl.formats import demonstration_format, get_format
from rest_rl.presets import SUPERVISED
from rest_rl.regions import tag_regions
from rest_rl.response import Gold, Region, ToolCall
from rest_rl.runlog import read_run
from rest_rl.train.prompts import IGNORED_LABEL
from rest_rl.train.sft import RegionSFTTrainer, compute_loss_weights, make_region_weights, make_sft_trainer
from tests.sample_files import labelled_dataset, save_samples
from tests.scores import exact_match
from tests.tiny_policy import tiny_model, tiny_samples, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LAYOUT = PromptLayout(TOKENIZER, "toolrl")
SAMPLES = [replace(sample, thought=" a b a") for sample in tiny_samples(4)]
ARGS: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
}


def trained(tmp_path: Path, weights: dict[str, float], **changes: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    settings = {
        "model": tiny_model(TOKENIZER),
        "args": SFTConfig(str(tmp_path), **ARGS | changes),
        "processing_class": TOKENIZER,
    }
    trainer = make_sft_trainer(
        layout=LAYOUT, dataset=labelled_dataset(SAMPLES, LAYOUT), region_weights=weights, **settings
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}, losses


def test_weights_of_one_are_the_stock_trainer_bit_for_bit(tmp_path: Path) -> None:
    stock = SFTTrainer(
        model=tiny_model(TOKENIZER),
        args=SFTConfig(str(tmp_path), **ARGS),
        train_dataset=labelled_dataset(SAMPLES, LAYOUT),
        processing_class=TOKENIZER,
    )
    stock.train()
    ours = RegionSFTTrainer(
        layout=LAYOUT,
        region_weights={},
        model=tiny_model(TOKENIZER),
        args=SFTConfig(str(tmp_path), **ARGS),
        train_dataset=labelled_dataset(SAMPLES, LAYOUT),
        processing_class=TOKENIZER,
    )
    ours.train()
    for (name, one), other in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("preset", ["tsft", "rsft"])
def test_the_first_loss_is_the_weighted_mean_of_token_losses(preset: str, tmp_path: Path) -> None:
    # by the definition: sum_t w_t (-log p_t) / sum_t 1 over the labelled tokens of the batch, from full logits
    rows = [labelled_dataset([sample], LAYOUT)[0] for sample in SAMPLES]
    model, total, count = tiny_model(TOKENIZER).eval(), 0.0, 0
    for row in rows:
        ids_BT, labels_BT = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            log_probs_BTV = model(ids_BT).logits[:, :-1].log_softmax(-1)
        targets_BT = labels_BT[:, 1:]
        mask_BT = targets_BT != IGNORED_LABEL
        regions_BT = tag_regions(
            targets_BT.clamp(min=0),
            mask_BT,
            TOKENIZER,
            LAYOUT.format,
        )
        raw_BT = make_region_weights(SUPERVISED[preset])[regions_BT] * mask_BT
        weights_BT = raw_BT / (raw_BT.sum() / mask_BT.sum())
        nll_BT = -log_probs_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
        total, count = total + float((weights_BT * nll_BT).sum()), count + int(mask_BT.sum())
    _, losses = trained(tmp_path, SUPERVISED[preset])
    assert losses[0] == pytest.approx(total / count, rel=1e-4)
    _, plain = trained(tmp_path, {"name": 1.0})
    assert abs(plain[0] - losses[0]) > 1e-3


def test_gradient_accumulation_is_the_full_batch(tmp_path: Path) -> None:
    full, _ = trained(tmp_path, SUPERVISED["tsft"], max_steps=1)
    parts, _ = trained(
        tmp_path, SUPERVISED["tsft"], max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert all(torch.allclose(full[name], parts[name], atol=2e-4) for name in full)


def test_tsft_weights_calls_twice_with_mean_one() -> None:
    row = labelled_dataset(SAMPLES[:1], LAYOUT)[0]
    labels_BT = torch.tensor([row["labels"]])[:, 1:]
    weights_BT = compute_loss_weights(labels_BT, LAYOUT, make_region_weights(SUPERVISED["tsft"]))
    mask_BT = labels_BT != IGNORED_LABEL
    assert weights_BT[mask_BT].mean().item() == pytest.approx(1.0)
    regions_BT = tag_regions(labels_BT.clamp(min=0), mask_BT, TOKENIZER, LAYOUT.format)
    reasoning = weights_BT[mask_BT & (regions_BT == Region.REASONING)]
    name = weights_BT[mask_BT & (regions_BT == Region.NAME)]
    assert len(reasoning) > 0
    assert name[0].item() == pytest.approx(2 * reasoning[0].item())


def test_invalid_region_weights_and_packing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a weight of at least 0 for one of format, name"):
        make_region_weights({"nam": 1.0})
    with pytest.raises(ValueError, match=r"trl\.packing or trl\.padding_free"):
        trained(tmp_path, SUPERVISED["tsft"], packing=True)
    with pytest.raises(ValueError, match=r"rest\.region_weights is .*, but preset 'rest' is not supervised"):
        RunConfig.from_toml("[rest]\nregion_weights = {name = 2.0}")
    with pytest.raises(ValueError, match=r"rest\.weights is .*, but preset 'tsft' is supervised"):
        RunConfig.from_toml("[rest]\npreset = 'tsft'\nweights = {strength = 1.0}")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_model(TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = save_samples(SAMPLES, tmp_path_factory.mktemp("data") / "samples.jsonl")
    changes = ["trl.max_steps=4", "trl.per_device_train_batch_size=4", "trl.save_steps=2", "trl.max_length=200"]
    changes += [f"data.held_out={str(data)!r}", "eval.max_new_tokens=20", "trl.gradient_accumulation_steps=1"]
    changes += ["trl.learning_rate=1e-3", "trl.lr_scheduler_type=constant"]
    return ["--model", str(policy), "--data", str(data), *(part for change in changes for part in ("--set", change))]


@pytest.mark.parametrize("preset", ["sft", "rsft"])
def test_a_supervised_run_leaves_a_complete_run_folder(preset: str, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(["train", "--preset", preset, *options, "--out", str(folder)]) == 0
    run = read_run(folder)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert {"before", "after", "steps"} <= run.summary.keys()
    assert RunConfig.from_toml(run.config).rest.format == "toolrl"
    assert RunConfig.from_toml(run.config).rest.region_weights == SUPERVISED[preset]
    AutoModelForCausalLM.from_pretrained(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    before = [row["loss"] for row in run.metrics]
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert [row["loss"] for row in read_run(folder).metrics] == before


def test_sft_then_rl_is_two_commands(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    assert main(["sft", *options, "--out", str(sft)]) == 0
    data = options[3]
    changes = ["trl.max_steps=1", "trl.num_generations=4", "trl.max_completion_length=20", "eval.prompts=0"]
    command = ["train", "--model", str(sft / "model"), "--data", data]
    command += [part for change in changes for part in ("--set", change)]
    assert main([*command, "--out", str(tmp_path / "few")]) == 2
    assert "gives 4 training prompts" in capsys.readouterr().err
    assert main([*command, "--set", "trl.gradient_accumulation_steps=2", "--out", str(rl)]) == 0
    assert read_run(rl).metrics[0]["step"] == 1


def test_one_run_file_serves_all_presets(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.toml"
    run.write_text("[trl]\nnum_generations = 4\nmax_completion_length = 20\nlogging_steps = 1\nsave_steps = 2\n")
    changes = [*options, "--set", "eval.prompts=0", "--set", "trl.max_steps=2"]
    for preset in ("grpo", "tsft"):
        assert main(["train", str(run), "--preset", preset, *changes, "--out", str(tmp_path / preset)]) == 0
    assert "ignores trl.num_generations, trl.max_completion_length" in capsys.readouterr().out
    assert len(read_run(tmp_path / "tsft").metrics) == 2


def test_demonstrations_follow_the_models_own_style() -> None:
    # a number as text is quoted by qwen3_coder's render, so that it reads back, but never by the models themselves
    call = ToolCall("send", {"zip": "12345", "note": "true", "n": 5, "tags": "a <function=x> b"})
    for name in ("qwen3_coder", "qwen3_coder+think"):
        tool_format = get_format(name)
        text = demonstration_format(tool_format).render("hm", [call], None)
        assert "<parameter=zip>\n12345\n" in text
        assert "<parameter=note>\ntrue\n" in text
        assert '"12345"' in tool_format.render("hm", [call], None)
        parsed = tool_format.parse(text)
        assert exact_match(parsed, Gold((call,)))
        assert parsed.well_formed
    assert demonstration_format(get_format("hermes")) is get_format("hermes")
