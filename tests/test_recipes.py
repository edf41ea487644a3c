"""Every recipe in configs/ parses, is accepted by the trainer, names its sources, adds up, and fits its GPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from trl import SFTConfig

from rest_rl.config import RunConfig, read_run_file
from rest_rl.train.estimate import GIB, Device, Estimate, Sharding, estimate_resources, judge_fit
from rest_rl.train.policy import lora_config
from rest_rl.train.trl.settings import make_trainer_config
from rest_rl.train.trl.trainer import ResTConfig
from tests.architectures import published_config

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if not path.name.startswith("compare-"))
PAPER = [path for path in RECIPES if not path.stem.startswith(("sft-", "own-"))]
COLD_START = [path for path in RECIPES if path.stem.startswith("sft-")]
SOURCES = ("published script", "published code", "paper", "TRL default", "ours")
A100 = Device("NVIDIA A100-SXM4-80GB", int(79.1 * GIB))
HERE = ("trl.use_vllm=false", "trl.use_cpu=true")
"""Overrides for a machine without GPU and vLLM."""
SHOWN = {"own-tools": ("rest.format=hermes",)}
"""The format that `auto` detects from the model's chat template."""

pytestmark = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def processes_of(path: Path) -> int:
    nodes = re.search(r"-(\d)nodes$", path.stem)
    return 8 * int(nodes[1]) if nodes else 8 if path.stem.endswith("8gpu") else 1


def model_of(config: RunConfig) -> str:
    if config.model.path.startswith("runs/"):  # the result of another recipe
        before = next(p for p in COLD_START if read_run_file(p).run.out + "/model" == config.model.path)
        return read_run_file(before).model.path
    return config.model.path


def test_every_recipe_is_accepted_by_the_trainer(path: Path) -> None:
    config = read_run_file(path)
    args = make_trainer_config(read_run_file(path, [*HERE, *SHOWN.get(path.stem, ())]))
    assert isinstance(args, SFTConfig if config.rest.is_supervised else ResTConfig)
    known = {field.name for field in dataclasses.fields(type(args))}
    assert set(config.trl) <= known
    if not config.rest.is_supervised:
        config.rest.resolve()
    assert RunConfig.from_toml(config.to_toml()) is not None


def test_every_value_names_its_source(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\w+ = ", line):
            _, _, comment = line.partition("  # ")
            assert comment.startswith(SOURCES), line


def test_the_header_shows_the_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"train configs/{path.name}" in text
    for named in re.findall(r"configs/[\w./-]+\.(?:toml|yaml)", text):
        assert (CONFIGS.parent / named).is_file(), named
    on_cluster = path.stem.startswith("verl-")
    assert ("accelerate launch" in text) == (processes_of(path) > 1 and not on_cluster)
    assert ("ray start" in text) == on_cluster == (read_run_file(path).run.engine == "verl")


def test_batches_match_the_published_ones(path: Path) -> None:
    trl, processes = read_run_file(path).trl, processes_of(path)
    together = trl["per_device_train_batch_size"] * processes
    if path in PAPER:
        # train_ResT.sh: 512 prompts x 4 responses a batch, 64 x 4 an optimizer step, 15 epochs of 3,920 // 512 batches
        assert together * trl["steps_per_generation"] == 512 * trl["num_generations"] == 2048
        assert together * trl["gradient_accumulation_steps"] == 64 * 4
        work = estimated(path, prompts=3920).work
        assert (work.prompts, work.responses // work.per_step, work.steps) == (512, 8, 105 * 8)
        assert trl["save_steps"] == 15 * work.responses // work.per_step
    elif path in COLD_START:
        # train_node_0.sh: 1 x 4 x 8 GPUs, 3 epochs of 400 demonstrations
        assert together * trl["gradient_accumulation_steps"] == 32
        assert estimated(path, prompts=400).work.steps == 3 * 13
    else:
        work = estimated(path, prompts=1000).work
        assert (work.prompts, work.responses, work.per_step, work.steps) == (2, 16, 64, 125)


def estimated(path: Path, prompts: int = 3920, device: Device = A100) -> Estimate:
    config, processes = read_run_file(path), processes_of(path)
    sharding: Sharding = "none"
    if processes > 1:
        sharding = "zero2" if path in COLD_START else "fsdp"
    args = make_trainer_config(read_run_file(path, [*HERE, *SHOWN.get(path.stem, ())]))
    args.use_vllm = config.trl.get("use_vllm", False)
    longest = config.trl.get("max_length") or config.data.max_prompt_tokens
    return estimate_resources(
        config,
        published_config(model_of(config)),
        args,
        lora=lora_config(config.peft),
        prompt_tokens=[*[700] * (prompts - 1), longest],
        processes=processes,
        sharding=sharding,
        device=device,
    )


def test_fits_the_intended_gpu(path: Path) -> None:
    device = Device("NVIDIA GeForce RTX 3090", int(23.6 * GIB)) if path.stem == "own-tools" else A100
    guessed = estimated(path, device=device)
    assert device.bytes - guessed.total > device.bytes / 20, judge_fit(guessed)
