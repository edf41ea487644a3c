"""The model of a run on verl: the whole model or its adapter, merged from the shards that verl writes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rest_rl.config import ModelTable
from rest_rl.runlog import read_run
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.policy import load_policy, load_tokenizer
from rest_rl.train.verl.model import find_target_modules, join_shards, merge_model
from tests.verl_cpu.shards import drawn_model, save_checkpoint
from tests.verl_cpu.test_rest import run_file, train
from tests.verl_cpu.tiny import CPU_SETTINGS, run_cpu

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl: make test-verl"),
]
TOKENS = torch.arange(4, 28)[None]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def merged(checkpoint: Path, strategy: str = "fsdp2") -> Path:
    target = checkpoint.parents[1] / "model"
    merge_model(checkpoint, strategy, target, base=embedded_model_dir(), trust_remote_code=False)
    assert not target.with_name(".model.part").exists()
    return target


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def check_tokenizer(tokenizer: Any) -> None:
    ours = load_tokenizer(embedded_model_dir())
    assert tokenizer.chat_template == ours.chat_template
    assert tokenizer.get_vocab() == ours.get_vocab()
    assert tokenizer.eos_token == ours.eos_token


@pytest.mark.parametrize("shape", [(1,), (2,)], ids=str)
def test_the_whole_model(tmp_path, shape):
    part = tmp_path / ".model.part"  # of a command that was killed
    part.mkdir()
    (part / "model-00001-of-00002.safetensors").write_text("half")
    target = merged(save_checkpoint(tmp_path, shape))
    assert not (target / "model-00001-of-00002.safetensors").exists()
    trained = drawn_model(None)
    model, tokenizer = load_policy(ModelTable(path=str(target), attn_implementation="eager"))
    check_tokenizer(tokenizer)
    for (name, weight), ours in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(weight, ours.bfloat16().float()), name  # verl's merger rounds weights, and nothing else
    # 8 bits: a weight is off by up to 2^-9 of itself at random, and a few dozen such sums separate input from output.
    size = logits_of(trained).std()
    assert 0 < (logits_of(model) - logits_of(trained)).abs().max() < 2**-4 * size
    assert not (target / "adapter_config.json").exists()


@pytest.mark.parametrize("shape", [(1,), (2, 2)], ids=str)  # rank 3 over 2 shards: 2 rows and 1
def test_an_adapter_without_its_base(tmp_path, shape):
    target = merged(save_checkpoint(tmp_path, shape, LORA))
    names = {path.name for path in target.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    recorded = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    assert recorded["base_model_name_or_path"] == str(embedded_model_dir())
    assert (recorded["r"], recorded["lora_alpha"], recorded["target_modules"]) == (3, 12, LINEAR)
    trained = drawn_model(LORA)
    table = ModelTable(path=str(target), attn_implementation="eager")
    model, tokenizer = load_policy(table, {"r": 3, "lora_alpha": 12})
    check_tokenizer(tokenizer)
    assert torch.equal(logits_of(model), logits_of(trained))  # every weight as it was trained, in float32
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in trained.named_parameters() if p.requires_grad
    ]
    alone, _ = load_policy(table)  # merged in: sums in another order
    torch.testing.assert_close(logits_of(alone), logits_of(trained), rtol=0, atol=1e-4)
    base, _ = load_policy(ModelTable(attn_implementation="eager"))
    assert (logits_of(base) - logits_of(trained)).abs().max() > 0.1


def test_the_adapter_equals_the_one_that_peft_saves(tmp_path):
    target = merged(save_checkpoint(tmp_path, lora=LORA))
    drawn_model(LORA).save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (target, tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (target, tmp_path / "peft"))
    theirs["target_modules"] = sorted(theirs["target_modules"])
    assert ours == theirs


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"target_modules": r".*layers\.0\.self_attn\.(k|v)_proj"}, "layers.0 alone"),
        ({"exclude_modules": ["model.layers.1.mlp.up_proj"]}, "some"),
    ],
    ids=["names", "a pattern", "all but one"],
)
def test_modules_that_are_adapted(tmp_path, asked, recorded):
    lora = LORA | asked
    target = merged(save_checkpoint(tmp_path, lora=lora))
    found = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    if isinstance(recorded, list):
        assert found == recorded
    else:
        assert all(name.startswith("model.layers.") for name in found)
    trained = drawn_model(lora)
    model, _ = load_policy(ModelTable(path=str(target), attn_implementation="eager"), {"r": 3, "lora_alpha": 12})
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in trained.named_parameters()}
    assert torch.equal(logits_of(model), logits_of(trained))


def test_targets_by_hand():
    names = [
        "base_model.model.a.0.q.lora_A.default.weight",
        "base_model.model.a.0.q.base_layer.weight",
        "base_model.model.a.0.norm.weight",
    ]
    assert find_target_modules(names) == ["q"]
    assert find_target_modules([*names, "base_model.model.a.1.q.weight"]) == ["a.0.q"]


def test_an_unsharded_tensor_comes_from_the_first_rank():
    assert join_shards([torch.ones(2), torch.zeros(2)]).tolist() == [1, 1]


def test_broken_checkpoints(tmp_path):
    for name in ("whole", "adapter"):
        (tmp_path / name).mkdir()
    checkpoint = save_checkpoint(tmp_path / "whole")
    file = checkpoint / "actor" / "model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the checkpoint .*-m verl\.model_merger merge --backend fsdp .*--resume"):
        merged(checkpoint)
    checkpoint = save_checkpoint(tmp_path / "adapter", lora=LORA)
    (checkpoint / "actor" / "model_world_size_1_rank_0.pt").unlink()
    with pytest.raises(ValueError, match=r"FileNotFoundError: .*rank_0\.pt.*: restore .*--resume --out"):
        merged(checkpoint)
    assert not list(tmp_path.glob("*/*model*"))


def test_an_adapter_without_its_rank_is_refused(tmp_path):
    checkpoint = save_checkpoint(tmp_path, lora=LORA)
    (checkpoint / "actor" / "lora_train_meta.json").unlink()
    with pytest.raises(ValueError, match="an adapter without its rank"):
        merged(checkpoint)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".model.part").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    checkpoint = save_checkpoint(tmp_path, lora=LORA)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ValueError, match="cannot write to run folder"):
        merged(checkpoint)


def test_a_model_exported_by_megatron_is_copied(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "global_step_1"
    exported = checkpoint / "actor" / "model" / "huggingface"
    shutil.copytree(embedded_model_dir(), exported)
    model, tokenizer = load_policy(ModelTable(path=str(merged(checkpoint, "megatron")), attn_implementation="eager"))
    check_tokenizer(tokenizer)
    base, _ = load_policy(ModelTable(attn_implementation="eager"))
    assert torch.equal(logits_of(model), logits_of(base))


def test_an_adapter_that_megatron_exports_gets_its_base(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "global_step_1"
    exported = checkpoint / "actor" / "model" / "huggingface"
    shutil.copytree(embedded_model_dir(), exported, ignore=shutil.ignore_patterns("*.safetensors"))
    trained = drawn_model(LORA)
    trained.peft_config["default"].base_model_name_or_path = None
    trained.save_pretrained(exported / "adapter")
    model, tokenizer = load_policy(ModelTable(path=str(merged(checkpoint, "megatron")), attn_implementation="eager"))
    check_tokenizer(tokenizer)
    torch.testing.assert_close(logits_of(model), logits_of(trained), rtol=0, atol=1e-4)


# A whole run


def test_a_run_leaves_its_adapter(tmp_path):
    # The rollout accepts only whole models.
    model = {**CPU_SETTINGS["actor_rollout_ref"]["model"], "lora": {"merge": True}}
    settings = {**CPU_SETTINGS, "actor_rollout_ref": {**CPU_SETTINGS["actor_rollout_ref"], "model": model}}
    path = run_file(tmp_path, 1, verl=settings)
    path.write_text(path.read_text(encoding="utf-8") + "\n[peft]\nr = 4\n", encoding="utf-8")
    run_cpu(train(path), tmp_path)
    folder = tmp_path / "run"
    row = read_run(folder).metrics[0]
    assert row["grad_norm"] > 0
    # The rollout is given weights in 8 bits' precision and the trainer's are float32.
    assert row["training/rollout_probs_diff_mean"] < 2**-8
    recorded = json.loads((folder / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (recorded["r"], recorded["lora_alpha"], recorded["target_modules"]) == (4, 8, LINEAR)
    assert not (folder / "model" / "config.json").exists()
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    # Adam's first step is the learning rate, whatever the gradient; peft begins with B = 0.
    assert max(w.abs().max().item() for n, w in weights.items() if ".lora_B." in n) == pytest.approx(3e-4, rel=1e-3)
    adapted, tokenizer = load_policy(ModelTable(path=str(folder / "model")), {"r": 4})
    check_tokenizer(tokenizer)
    base, _ = load_policy(ModelTable())
    assert (logits_of(adapted) - logits_of(base)).abs().max() > 0
