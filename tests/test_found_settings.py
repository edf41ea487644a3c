"""The settings that `train` finds itself: precision, checkpointing, sizes of groups, and the response limit."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_rl.config import EMBEDDED, RunConfig, choose_run_file
from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.held_out import derive_response_limit
from rest_rl.runlog import Observer
from rest_rl.train.request import read_run_source, resolve_run, with_recorded_defaults
from rest_rl.train.run import RunPlan, make_plan, train
from rest_rl.train.trl.settings import has_fast_bfloat16, with_machine_defaults, with_whole_groups
from tests.model_families import family_tokenizer
from tests.tiny_policy import tiny_run


class Heard(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.tracked: list[str] = []

    def track(self, what: str, total: int | None = None, done: int = 0) -> Any:
        self.tracked.append(what)
        return super().track(what, total, done)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_run_that_goes_on_from_smollm2_gets_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model in (("sft", "smollm2"), ("rl", "runs/sft/model"), ("big", "a-model"), ("loop", "runs/loop")):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text(f'[model]\npath = "{model}"', encoding="utf-8")
    (tmp_path / "other").mkdir()
    for text in ("model = 3", "[model]\npath = 3", "[model", "\xff"):
        (tmp_path / "other" / "config.toml").write_bytes(text.encode("latin-1"))
        assert choose_run_file({"model": {"path": "other"}}) == "own_model.toml"
    (tmp_path / "runs" / "sft" / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "config.toml").write_text('[model]\npath = "smollm2"', encoding="utf-8")  # the run in this folder
    small = ("smollm2", "smollm2-office", "runs/sft", "runs/sft/model", "runs/rl", "runs/sft/checkpoints/checkpoint-8")
    for path in (*small, "a-model", "runs/big", "runs/loop", "a" * 300, "a\0b"):
        start = "smollm2" if path in small else "own_model"
        for given, name in (({}, f"{start}.toml"), ({"rest": {"preset": "tsft"}}, f"{start}_sft.toml")):
            assert choose_run_file({"model": {"path": path}, **given}) == name


def run(model: str = "a-model", **trl: Any) -> RunConfig:
    return RunConfig.from_tables({"model": {"path": model}, "trl": trl})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_bfloat16_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, is_fast in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        heard = Heard()
        assert has_fast_bfloat16() == is_fast
        assert with_machine_defaults(run(), heard).trl == {"use_cpu": True, "bf16": is_fast}
        assert len(heard.said) == 1
        # what is set stays, and is not talked about; float16 excludes bfloat16
        assert with_machine_defaults(run(bf16=False), heard).trl["bf16"] is False
        assert len(heard.said) == 1
        assert with_machine_defaults(run(fp16=True)).trl["bf16"] is False
        assert with_machine_defaults(run(EMBEDDED), heard).trl["bf16"] is False
        assert len(heard.said) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_cpu_without_bfloat16_loads_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    lora = RunConfig.from_tables({"model": {"path": "a-model"}, "peft": {"r": 8}})
    assert lora.weights_dtype == "bfloat16"
    found = with_machine_defaults(lora)
    assert found.weights_dtype == "float32"
    assert with_recorded_defaults(lora, found).model == found.model  # `--resume` with the same run file
    # a choice of the user is kept, with a warning
    heard = Heard()
    slow = replace(lora, model=replace(lora.model, dtype="bfloat16"), trl={"bf16": True})
    kept = with_machine_defaults(slow, heard)
    assert (kept.weights_dtype, kept.trl["bf16"]) == ("bfloat16", True)
    assert [said.rpartition("use ")[2] for said in heard.said] == ["--set trl.bf16=false", "--set model.dtype=float32"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert with_machine_defaults(lora).weights_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {}),
        ({"num_generations": 4}, {}),  # 8 is two groups
        ({"num_generations": 16}, {"per_device_train_batch_size": 16}),
        ({"num_generations": 6}, {"per_device_train_batch_size": 6}),
        ({"num_generations": 3}, {"per_device_train_batch_size": 6}),  # 8 // 3 groups
        ({"per_device_train_batch_size": 16}, {}),
        ({"per_device_train_batch_size": 4}, {"num_generations": 4}),
        ({"per_device_train_batch_size": 12}, {"num_generations": 6}),
        ({"per_device_train_batch_size": 2}, {}),  # groups of two are too small
        ({"per_device_train_batch_size": 4, "num_generations": 8}, {}),
    ],
)
def test_micro_batches_hold_whole_groups(given: dict[str, int], found: dict[str, int]) -> None:
    heard = Heard()
    assert with_whole_groups(run(**given), heard).trl == {**given, **found}
    assert len(heard.said) == len(found)
    supervised = replace(run(**given), rest=RunConfig.from_tables({"rest": {"preset": "sft"}}).rest)
    assert with_whole_groups(supervised).trl == given


def test_the_response_limit_leaves_room_for_reasoning() -> None:
    golds, most = ["a", "1" * 40], 1024
    # llama's template knows no reasoning, but the message that describes toolrl asks for it
    plain = family_tokenizer("llama3_2")
    longest = max(len(plain(gold, add_special_tokens=False)["input_ids"]) for gold in golds)
    layout = PromptLayout(plain, "llama3")
    assert derive_response_limit(golds, layout, most) == 2 * longest + 64
    assert derive_response_limit(golds, layout, 50) == 50
    assert derive_response_limit([], layout, most) == 64
    assert derive_response_limit(golds, PromptLayout(plain, "toolrl"), most) == 2 * longest + 256
    # qwen3 was trained to reason, unless the prompt closes its think block
    thinking = family_tokenizer("qwen3")
    assert derive_response_limit(golds, PromptLayout(thinking, "hermes"), most) == most
    silent = PromptLayout(thinking, "hermes", {"enable_thinking": False})
    assert derive_response_limit(golds, silent, most) < most


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = tiny_run(tmp_path_factory.mktemp("tiny"))
    trl = {key: found["trl"][key] for key in ("max_steps", "gradient_accumulation_steps", "save_steps", "use_cpu")}
    trl |= {"num_generations": 3, "max_completion_length": 0, "bf16": False, "lr_scheduler_type": "constant"}
    return {**found, "trl": trl}


def test_found_settings_are_recorded_and_a_resumed_run_keeps_them(tables: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    result = train({**tables, "trl": {**tables["trl"], "max_steps": 2}}, out=tmp_path / "run", observer=heard)
    found = result.config.trl
    gold = max(len(ids) for ids in make_golds(tables))
    assert found["max_completion_length"] == min(128, 2 * gold + 256) == 128  # half of the context
    assert (found["per_device_train_batch_size"], found["gradient_checkpointing"]) == (6, False)
    for name in ("max_completion_length", "per_device_train_batch_size", "gradient_checkpointing"):
        assert sum(f"trl.{name} = " in line for line in heard.said) == 1
    assert any("loading the model" in what for what in heard.tracked)  # the engine reports to the same observer
    assert resolve_run(None, out=tmp_path / "run", resume=True, overrides=()).trl == found
    again = read_run_source({**tables, "trl": {**tables["trl"], "max_steps": 2}}, ())
    assert resolve_run(again, out=tmp_path / "run", resume=True, overrides=()).trl == found
    longer = train(out=tmp_path / "run", resume=True, overrides=["trl.max_steps=4"])
    assert (longer.steps, longer.config.trl) == (4, {**found, "max_steps": 4})


def make_golds(tables: dict[str, Any]) -> list[list[int]]:
    plan = make_plan(tables, is_dry=True)
    return plan.layout.tokenizer(plan.render_golds())["input_ids"]


def checkpointing(plan: RunPlan) -> tuple[Any, bool]:
    return plan.config.trl.get("gradient_checkpointing"), bool(getattr(plan.engine, "args").gradient_checkpointing)  # noqa: B009


def test_checkpointing_only_where_memory_is_short(tables: dict[str, Any]) -> None:
    assert checkpointing(make_plan(tables, is_dry=True)) == (False, False)
    short = {**tables, "trl": {**tables["trl"], "per_device_train_batch_size": 3 * 10**9}}
    assert checkpointing(make_plan(short, is_dry=True)) == (True, True)
    chosen = {**tables, "trl": {**tables["trl"], "gradient_checkpointing": True}}
    assert checkpointing(make_plan(chosen, is_dry=True)) == (True, True)


def test_the_embedded_run_sets_everything_itself() -> None:
    heard, config = Heard(), read_run_source(None, ())
    assert make_plan(config, is_dry=True, observer=heard).config.trl == config.trl
    assert not any("trl." in line for line in heard.said)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept() -> None:
    # page faults of 100 MB that are allocated and freed ten times: ten times the pages, or those of one or two places
    script = """
import resource, sys
import torch
from rest_rl.train.policy import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def count_page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(25_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(count_page_faults(10))
"""
    faults: list[int] = []
    for how in ("usual", "kept"):
        output = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout
        faults.append(int(output))
    usual, kept = faults
    assert kept < usual / 3
