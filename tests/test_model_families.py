"""Models as users bring them: their own chat templates, special tokens and architectures, trained from the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rest_rl.cli.app import main
from rest_rl.config import ModelTable, RunConfig
from rest_rl.data.layout import PromptLayout, assign_call_ids, resolve_format
from rest_rl.data.load import load_dataset
from rest_rl.data.samples import ToolSample
from rest_rl.formats import Qwen3CoderFormat
from rest_rl.regions import decode_ids, tag_regions
from rest_rl.response import Gold, Region
from rest_rl.runlog import read_run
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import build_training_dataset, encode_demonstration
from rest_rl.train.run import make_plan
from tests.model_families import DIALOGUES, FAMILIES, TEMPLATES, family_tokenizer, save_dialogues, save_family
from tests.sample_files import labelled_dataset
from tests.scores import exact_match

RL = ["trl.max_steps=2", "trl.num_generations=2", "trl.per_device_train_batch_size=4", "trl.max_completion_length=12"]
RL += ["trl.gradient_accumulation_steps=1", "trl.save_steps=1", "eval.max_new_tokens=8"]
SFT = ["trl.max_steps=6", "trl.per_device_train_batch_size=4", "trl.gradient_accumulation_steps=1", "eval.prompts=0"]
SFT += ["trl.learning_rate=1e-2", "trl.warmup_steps=0", "trl.save_steps=3"]


def options(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


@pytest.fixture(scope="module")
def samples(data: Path) -> list[ToolSample]:
    return load_dataset(str(data))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_format_is_what_the_template_shows(name: str) -> None:
    resolved, why = resolve_format("auto", family_tokenizer(name))
    assert resolved == FAMILIES[name].tool_format
    assert "from the chat template" in why


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_hold_tools_and_history_and_one_first_token(name: str, samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer(name)
    layout = PromptLayout(tokenizer, FAMILIES[name].tool_format)
    assert layout.is_native
    assert layout.bos_prefix == (FAMILIES[name].bos or "")
    for sample in samples:
        text = layout.render(sample)
        assert text.count("Flights to a city") == 1
        assert text.count("sky") == sum(message["role"] == "tool" for message in sample.messages)
        sampled = tokenizer(build_training_dataset([sample], tokenizer, layout.format)[0]["prompt"])[
            "input_ids"
        ]  # as TRL tokenises it
        assert sampled == tokenizer(text, add_special_tokens=False)["input_ids"]  # as evaluation does
        assert sampled.count(tokenizer.bos_token_id) == (FAMILIES[name].bos is not None)
    second = next(sample for sample in samples if len(sample.messages) == 4)
    assert "get_weather" in layout.render(second).partition("What is the weather")[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_demonstrations_are_read_back_from_their_ids(name: str, samples: list[ToolSample]) -> None:
    tokenizer, found = family_tokenizer(name), set()
    layout = PromptLayout(tokenizer, FAMILIES[name].tool_format)
    tags, parse = layout.format.tags, layout.format.parse
    for sample in samples:
        response = layout.format.render("I look.", sample.gold.calls, sample.gold.answer)
        ids, labels = encode_demonstration(layout.render(sample), response, tokenizer)
        learnt = [label for label in labels if label != -100]
        assert len(ids) > len(learnt) > 0
        parsed = parse(decode_ids(learnt, tokenizer, tags))
        assert exact_match(parsed, sample.gold)
        assert parsed.thought == "I look."
        ids_BT = torch.tensor([learnt])
        regions_BT = tag_regions(ids_BT, torch.ones_like(ids_BT), tokenizer, layout.format)
        assert regions_BT[0, -1] == Region.FORMAT  # the end of the sequence
        found |= set(regions_BT.flatten().tolist())
    assert found == set(Region) - {Region.OTHER}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_needs_a_model_and_dialogues_only(
    name: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", "--model", str(folders[name]), "--data", str(data), *options(RL), "--out", str(run)]
    assert main([*command, "--set", f"data.held_out={str(data)!r}", "--set", "eval.prompts=2"]) == 0
    finished = read_run(run)
    assert len(finished.metrics) == 2
    assert RunConfig.from_toml(finished.config).rest.format == FAMILIES[name].tool_format
    assert finished.summary["data"]["samples"] == 3 * len(DIALOGUES)
    assert finished.summary["after"]["n"] == 2
    AutoModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_demonstrations_are_learnt(name: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    command = ["sft", "--model", str(folders[name]), "--data", str(data), *options(SFT), "--preset", "tsft"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    losses = [row["loss"] for row in read_run(tmp_path).metrics]
    assert losses[-1] < losses[0] - 0.5


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


def test_lora_trains_resumes_and_goes_on_into_reinforcement_learning(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, rl, still = tmp_path / "sft", tmp_path / "rl", tmp_path / "still"
    command = ["--data", str(data), "--lora", "4", "--set", "model.dtype=float32"]
    assert main(["sft", "--model", str(folders["llama3_2"]), *command, *options(SFT), "--out", str(sft)]) == 0
    losses = [row["loss"] for row in read_run(sft).metrics]
    assert losses[-1] < losses[0]
    adapter = json.loads((sft / "model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)
    for last in (sft / "checkpoints").glob("checkpoint-6"):
        (last / "trainer_state.json").unlink()
    assert main(["train", "--resume", "--out", str(sft)]) == 0
    assert [row["loss"] for row in read_run(sft).metrics] == losses

    # the second run goes on with the first one's adapter: at a learning rate of 0 it ends where that one ended
    chain = ["train", "--model", str(sft / "model"), *command, *options(RL)]
    assert main([*chain, "--set", "trl.learning_rate=0.0", "--out", str(still)]) == 0
    assert main([*chain, "--set", "trl.learning_rate=1e-2", "--out", str(rl)]) == 0
    base = AutoModelForCausalLM.from_pretrained(folders["llama3_2"])
    warm, same = (load_policy(ModelTable(path=str(run / "model")), {"r": 4})[0] for run in (sft, still))
    assert torch.equal(logits_of(warm), logits_of(same))
    assert not torch.allclose(logits_of(warm), logits_of(base), atol=1e-2)
    assert json.loads((rl / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folders["llama3_2"]
    )
    merged = load_policy(ModelTable(path=str(sft / "model")))[0]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert torch.allclose(logits_of(warm), logits_of(merged), atol=1e-4)

    assert main([*chain, "--set", "peft.r=8", "--out", str(tmp_path / "other")]) == 2
    assert "peft.r is 8, but the adapter" in capsys.readouterr().err


def test_a_run_killed_after_its_last_step_keeps_its_adapter(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["--model", str(folders["qwen3"]), "--data", str(data), "--lora", "2", *options(RL)]
    # the second run starts from the first one's adapter
    for run, start in ((first, []), (second, ["--set", f"model.adapter={first / 'model'}"])):
        assert main(["train", *command, *start, "--out", str(run)]) == 0
        weights = (run / "model" / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(run / "model")
        assert main(["train", "--resume", "--out", str(run)]) == 0
        assert (run / "model" / "adapter_model.safetensors").read_bytes() == weights


def test_another_format_than_the_template_s_is_described_in_words(samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("llama3_2")
    name, why = resolve_format("toolrl", tokenizer)
    assert (name, "a system message describes it" in why) == ("toolrl", True)
    layout = PromptLayout(tokenizer, name)
    second = next(sample for sample in samples if len(sample.messages) == 4)
    text = layout.render(second)
    assert text.count('"name": "find_flight"') == 1
    assert "You help with travel." in text
    assert '<tool_call>\n{"name": "get_weather", "parameters": {"city": "Rome", "days": 1}}\n</tool_call>' in text
    assert '<obs> {"sky": "clear"} </obs>' in text
    assert "tool_response" not in text
    assert "Respond in the format" not in text  # Llama's own words
    assert len(build_training_dataset(samples, tokenizer, name)) == len(samples)


def test_results_in_words_stand_in_the_tags_of_hermes(samples: list[ToolSample]) -> None:
    second = next(sample for sample in samples if len(sample.messages) == 4)
    text = PromptLayout(family_tokenizer("llama3_2"), "hermes").render(second)
    assert '<tool_response>\n{"sky": "clear"}\n</tool_response>' in text
    assert text.count("<tool_response>") == 2  # the system message explains it
    assert "<obs>" not in text


def test_a_format_of_one_s_own_is_described_in_words_unless_it_says_it_is_native(samples: list[ToolSample]) -> None:
    class Own(Qwen3CoderFormat):
        """A user's format."""

    own = Own(name="own")
    text = PromptLayout(family_tokenizer("qwen3"), own).render(samples[0])
    assert own.instructions(samples[0].tools)[:40] in text
    assert "return a json object" not in text  # Hermes' own words
    object.__setattr__(own, "is_native", True)
    assert "return a json object" in PromptLayout(family_tokenizer("qwen3"), own).render(samples[0])


def test_a_format_that_needs_its_tags_is_described_without_tools_too() -> None:
    sample = ToolSample("s", ({"role": "user", "content": "hi"},), (), Gold((), "hello"))
    assert "<response>" in PromptLayout(family_tokenizer("qwen3"), "toolrl").render(sample)
    assert "system" not in PromptLayout(family_tokenizer("qwen3"), "llama3").render(sample)


def test_a_first_token_that_only_the_tokenizer_adds_is_in_every_prompt_once(samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("llama3_2")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "")
    layout = PromptLayout(tokenizer, "llama3")
    text = layout.render(samples[0])
    assert text.count("<|begin_of_text|>") == 1
    sampled = tokenizer(build_training_dataset(samples[:1], tokenizer, layout.format)[0]["prompt"])["input_ids"]
    assert sampled == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_thinking_demonstrations_do_not_think(samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("qwen3")
    thoughtful = [replace(sample, thought="I should look.") for sample in samples]
    for variables, thinks in (({"enable_thinking": False}, False), ({}, True)):
        layout = PromptLayout(tokenizer, "hermes", variables)
        row = labelled_dataset(thoughtful, layout)[0]
        assert layout.closes_think is not thinks
        learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert ("I should look." in learnt) is thinks
        assert tokenizer.decode(row["input_ids"]).count("</think>") == 1


def test_text_before_calls_is_learnt_as_text_where_the_format_has_room_for_it(samples: list[ToolSample]) -> None:
    said = [replace(samples[0], preamble="Let me check.", thought=None)]
    for family, name, expected in (
        ("llama3_2", "llama3", 'Let me check.\n\n{"name"'),
        ("qwen3", "hermes", "Let me check.\n<tool_call>"),
        ("qwen3", "toolrl", "<think> Let me check. </think>\n<tool_call>"),
    ):
        tokenizer = family_tokenizer(family)
        row = labelled_dataset(said, PromptLayout(tokenizer, name))[0]
        assert expected in tokenizer.decode([label for label in row["labels"] if label != -100])


def test_demonstrations_that_are_too_long_are_accounted_for(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = PromptLayout(family_tokenizer("qwen3"), "hermes")
    sizes = sorted(len(row) for row in labelled_dataset(load_dataset(str(data))[0], layout)["input_ids"])
    limit = sizes[len(sizes) // 2]
    command = ["sft", "--model", str(folders["qwen3"]), "--data", str(data), *options(SFT)]
    assert main([*command, "--set", f"trl.max_length={limit}", "--out", str(tmp_path)]) == 0
    left_out = sum(size > limit for size in sizes)
    assert f"{left_out} of these samples cannot be used" in " ".join(capsys.readouterr().out.split())
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == left_out == read_run(tmp_path).summary["data"]["refused"]
    assert all("trl.max_length" in row["reason"] for row in rejected)


def test_held_out_samples_are_accounted_for(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel = json.loads(json.dumps(DIALOGUES[0]))
    parallel["messages"][2]["tool_calls"] *= 2  # Llama's template takes one call at a time
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(parallel) + "\n{torn\n")
    command = ["train", "--model", str(folders["llama3_2"]), "--data", str(data), *options(RL)]
    command += ["--set", f"data.held_out={str(held_out)!r}"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 rows: 0 kept, 1 repaired, 1 rejected" in shown
    assert "not_laid_out 1" in shown  # a row whose turns after the two calls are left out
    assert read_run(tmp_path / "run").summary["after"]["n"] == 1
    held_out.write_text("{torn\n")
    assert main([*command, "--out", str(tmp_path / "never")]) == 2
    assert "none of the 1 rows of " in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_held_out_samples_of_a_long_file_are_taken_from_all_of_it(folders: dict[str, Path], data: Path) -> None:
    """At even distances: 3 of 7 are those at 0, 2 and 4."""
    paths = {"model": {"path": str(folders["qwen3"])}, "data": {"path": str(data), "held_out": str(data)}}
    tables: dict[str, Any] = {**paths, "trl": {"max_completion_length": 16}}
    ids = [each.sample.id for _, each in make_plan({**tables, "eval": {"prompts": 1000}}, is_dry=True).data.held_out]
    few = [each.sample.id for _, each in make_plan({**tables, "eval": {"prompts": 3}}, is_dry=True).data.held_out]
    assert few == [ids[index * len(ids) // 3] for index in range(3)]
    assert len(ids) > 4


def test_a_resumed_run_goes_on_with_the_same_data(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = save_dialogues(tmp_path / "data.jsonl"), tmp_path / "run"
    command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), *options(RL), "--out", str(run)]
    assert main(command) == 0
    (run / "checkpoints" / "checkpoint-2" / "trainer_state.json").unlink()
    whole = data.read_text()
    data.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert main(["train", "--resume", "--out", str(run)]) == 2
    assert "the training data has changed" in capsys.readouterr().err
    data.write_text(whole)
    assert main([*command, "--resume"]) == 0


def test_kept_prompts_need_their_format(
    folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), "--set", "data.keep_prompts=true"]
    assert main([*command, "--out", "never"]) == 2
    assert "toolrl for ToolRL and API-Bank" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [False, True])
def test_sft_takes_what_train_takes(resume: bool, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text('[rest]\npreset = "rsft"\n')
    command = ["sft", str(run_file), "--model", str(folders["qwen3"]), "--data", str(data), *options(SFT)]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    if resume:
        assert main(["sft", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert RunConfig.from_toml(read_run(tmp_path / "run").config).rest.preset == "rsft"


def test_a_template_that_opens_the_think_block_is_told_by_its_prompt() -> None:
    tokenizer = family_tokenizer("qwen3_5")
    assert resolve_format("qwen3_coder", tokenizer)[0] == "qwen3_coder+think"
    assert resolve_format("toolrl", tokenizer)[0] == "toolrl+think"
    assert resolve_format("auto", tokenizer, {"enable_thinking": False})[0] == "qwen3_coder"
    with pytest.raises(ValueError, match=r"the format is 'hermes\+think'.* does not open a think block"):
        resolve_format("hermes+think", family_tokenizer("qwen3"))


def test_a_template_of_no_known_format_gets_one_in_words(samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("qwen3")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    name, why = resolve_format("auto", tokenizer)
    assert name == "hermes"
    assert "uses no known format" in why
    text = PromptLayout(tokenizer, name).render(samples[0])
    assert text.startswith("system: You can call these tools")
    assert "You help with travel." in text
    assert text.count("system: ") == 1


def test_prompts_that_describe_their_tools_are_left_as_they_are(samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("qwen3")
    messages = ({"role": "system", "content": "Tools: f"}, {"role": "user", "content": "go"})
    sample = ToolSample("s", messages, samples[0].tools, samples[0].gold, tools_in_prompt=True)
    for name in ("hermes", "toolrl"):
        text = PromptLayout(tokenizer, name).render(sample)
        assert "find_flight" not in text
        assert "<|im_start|>system\nTools: f<|im_end|>" in text


def test_trackers_that_are_not_there_are_named_before_the_run_begins(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), *options(RL)]
    assert main([*command, "--set", 'trl.report_to=["swanlab"]', "--out", str(tmp_path / "run")]) == 2
    assert "pip install swanlab" in capsys.readouterr().err
    assert main([*command, "--set", "model.load_in_4bit=true", "--out", str(tmp_path / "run")]) == 2
    assert "without [peft]" in capsys.readouterr().err
    assert main([*command, "--lora", "2", "--set", "peft.rank=3", "--out", str(tmp_path / "run")]) == 2
    assert "unknown key peft.rank" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def without_count(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the number of tokens, which TRL's supervised trainer counts anew after a resume."""
    return [{key: value for key, value in row.items() if key != "num_tokens"} for row in read_run(run).metrics]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "changes"), [("rest", RL), ("rsft", SFT)])
def test_two_processes_train_and_resume(
    preset: str, changes: list[str], folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # accelerate's own launcher starts several processes on CPUs through MPI alone
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "rest_rl"]
    command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), "--preset", preset, *options(changes)]
    command += ["--set", "trl.per_device_train_batch_size=2", "--set", "trl.max_steps=2", "--set", "trl.save_steps=1"]
    done = subprocess.run([*launch, *command, "--out", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_run(run).metrics] == [1, 2]
    last = run / "checkpoints" / "checkpoint-2"
    assert {path.name for path in last.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    (last / "trainer_state.json").unlink()
    before = without_count(run)
    done = subprocess.run([*launch, "train", "--resume", "--out", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert without_count(run) == before
    AutoModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.slow
def test_two_supervised_processes_are_one_of_twice_the_batch(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    weights = {}
    for processes, batch in ((1, 4), (2, 2)):
        run = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "rest_rl"]
        changes = [*SFT, "trl.max_steps=1", "trl.save_steps=1", f"trl.per_device_train_batch_size={batch}"]
        command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), "--preset", "tsft"]
        done = subprocess.run(
            [*launch, *command, *options([*changes, "trl.optim=sgd"]), "--out", str(run)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        weights[processes] = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(folders["qwen3"]).state_dict()
    assert any(not torch.equal(before[name], weights[1][name]) for name in before)
    assert all(torch.allclose(weights[1][name], weights[2][name], atol=1e-6) for name in before)


@pytest.mark.parametrize("preset", ["rest", "sft"])
def test_a_dry_run_prints_the_estimate_and_leaves_nothing(
    preset: str, folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(folders["llama3_2"]), "--data", str(data), "--preset", preset, "--lora", "2"]
    assert main([*command, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders["llama3_2"]).parameters())
    assert f"parameters {parameters:,}" in shown
    assert "12 samples" in shown
    assert "optimizer states" in shown
    assert ("KV cache" in shown) is (preset == "rest")
    assert not (tmp_path / "run").exists()


SHIPPED = sorted(path.name for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
FOR_IMAGES = ("idefics3.jinja", "llava_next.jinja", "smolvlm.jinja")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_template_that_trl_ships_gets_tools_history_and_system_text(name: str, samples: list[ToolSample]) -> None:
    tokenizer = family_tokenizer("llama3_2")
    tokenizer.chat_template = (TEMPLATES / name).read_text(encoding="utf-8")
    if name in FOR_IMAGES:
        with pytest.raises(ValueError, match="ignores the text of messages"):
            resolve_format("auto", tokenizer)
        return
    layout = PromptLayout(tokenizer, resolve_format("auto", tokenizer)[0])
    for turn, sample in enumerate(samples[:3]):
        text = layout.render(sample)
        assert all(part in text for part in ("find_flight", "What is the weather in Rome", "You help with travel."))
        assert (text.count("get_weather") > 1) is (turn > 0)
        assert ("clear" in text) is (turn > 0)
        assert text.count("You help with travel.") == 1


def test_results_of_calls_with_one_id_go_to_the_calls_in_order() -> None:
    call = {"type": "function", "id": "x", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "x"}, {**call, "id": "y"}]},
        {"role": "tool", "tool_call_id": "y", "content": "third"},
        {"role": "tool", "tool_call_id": "x", "content": "first"},
        {"role": "tool", "tool_call_id": "x", "content": "second"},
    ]
    named = assign_call_ids(messages)
    assert [c["id"] for c in named[0]["tool_calls"]] == ["call00000", "call00001", "call00002"]
    assert [m["tool_call_id"] for m in named[1:]] == ["call00002", "call00000", "call00001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trl.per_device_train_batch_size=0", "trl.per_device_train_batch_size is 0, expected at least 1"),
        ("trl.logging_steps=2", "trl.save_steps is 1 and trl.logging_steps is 2"),
    ],
)
def test_numbers_that_mean_nothing_are_named_also_in_a_dry_run(
    change: str, message: str, folders: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(folders["qwen3"]), "--data", str(data), *options([*RL, change]), "--dry-run"]
    assert main(command) == 2
    assert message in capsys.readouterr().err
