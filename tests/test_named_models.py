"""Named models: a made-up wheel with a tiny Llama as a GGUF file, served to pip from a folder instead of an index."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rest_rl.cli.app import main
from rest_rl.config import ModelTable
from rest_rl.errors import UserError
from rest_rl.evaluate.origin import model_label, resolve_origin, weights_digest
from rest_rl.runlog import Observer
from rest_rl.train import named_models
from rest_rl.train.named_models import (
    NAMED_MODELS,
    SMOLLM2,
    WheelModel,
    compute_sha256,
    fetch_model,
    is_intact,
    locate_model,
)
from rest_rl.train.policy import load_policy, load_policy_tokenizer, policy_context_length, resolve_adapter

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "ĠĠ",
    "12",
    "ab",
]
MERGES = ["Ġ Ġ", "1 2", "a b"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
HEADS, KV_HEADS = 4, 2


class Heard(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():  # large enough to matter, and exact in bfloat16
            weight.copy_((weight + 0.3 * torch.randn_like(weight)).bfloat16())
    return model.eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    # GGUF stores the two halves of each head's rotary dimensions interleaved.
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    writer, config = gguf.GGUFWriter(str(path), "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleave(weight, HEADS if "q_proj" in name else KV_HEADS)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip takes instead of an index: one wheel with a GGUF file."""
    folder, file = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(make_llama(), file)
    with zipfile.ZipFile(folder / "tiny_llama-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "tiny_llama/tiny.gguf")
        about = "tiny_llama-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def converted(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the converted model, to copy."""
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        offer(shelf, cache, patch)
        fetch_model(tiny_model(shelf))
    return cache


def offer(shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("REST_RL_CACHE", str(cache))
    monkeypatch.setattr(named_models, "PIP_FAILURES", {})


def tiny_model(shelf: Path) -> WheelModel:
    (wheel,) = shelf.glob("*.whl")
    return dataclasses.replace(
        SMOLLM2, title="Tiny", folder="tiny-llama", requirement="tiny-llama==1.0", sha256=compute_sha256(wheel)
    )


@pytest.fixture
def tiny(shelf: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """The tiny model, with the name `tiny` and in the cache already; pip finds nothing."""
    shutil.copytree(converted, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    offer(tmp_path / "empty", tmp_path / "cache", monkeypatch)
    monkeypatch.setitem(NAMED_MODELS, "tiny", tiny_model(shelf))
    return tiny_model(shelf)


def test_the_converted_model_equals_its_source(tiny: WheelModel) -> None:
    model, tokenizer = load_policy(ModelTable(path="tiny"))
    ids_BT = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected_BTV, logits_BTV = make_llama()(ids_BT).logits, model(ids_BT).logits
    assert expected_BTV.std() > 0.1
    torch.testing.assert_close(logits_BTV, expected_BTV)
    assert (model.dtype, model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        torch.float32,
        2,
        2,
    )
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|im_end|>", "<|im_end|>", TEMPLATE)
    assert policy_context_length(ModelTable(path="tiny"), tokenizer) == 96
    # Digits are tokens of their own, as in SmolLM2: "12" stays in two parts, and both spaces before it are one token.
    assert tokenizer.tokenize("ab  12<|im_end|>") == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]


def test_an_existing_copy_is_not_made_again(tiny: WheelModel, tmp_path: Path) -> None:
    heard = Heard()
    assert fetch_model(tiny, heard, verify=True) == tmp_path / "cache" / "tiny-llama"
    assert heard.said == []
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tiny-llama", "tiny-llama.lock"]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    record = json.loads((folder / "source.json").read_text())
    assert record["source_sha256"] == tiny.sha256
    assert record["sha256"] == compute_sha256(folder / "model.safetensors")


def test_a_damaged_copy_is_replaced(
    tiny: WheelModel, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    folder = tmp_path / "cache" / "tiny-llama"
    weights = folder / "model.safetensors"
    content, heard = weights.read_bytes(), Heard()
    (folder.parent / ".tiny-llama-killed").mkdir()  # what a killed process leaves behind
    weights.write_bytes(content[:-1])
    assert not is_intact(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fetch_model(tiny, heard) == folder  # not visible in the size: only `verify` reads the whole file
    assert heard.said == []
    assert fetch_model(tiny, heard, verify=True) == folder
    assert weights.read_bytes() == content
    assert len(heard.said) == 3
    (folder / "source.json").unlink()
    assert not is_intact(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny-llama", "tiny-llama.lock"]


def test_a_wheel_with_another_checksum_is_refused(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(shelf, tmp_path, monkeypatch)
    with pytest.raises(UserError) as refused:
        fetch_model(dataclasses.replace(tiny_model(shelf), sha256="0" * 64))
    assert refused.value.expected == "0" * 64
    assert tiny_model(shelf).sha256 in refused.value.problem
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama.lock"]


def test_without_a_wheel_the_hub_is_next_and_an_error_last(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    offer(tmp_path / "empty", tmp_path / "cache", monkeypatch)
    model, heard = tiny_model(shelf), Heard()
    with pytest.raises(UserError, match=r"tiny-llama==1\.0") as refused:
        fetch_model(model)
    assert str(tmp_path / "cache" / "tiny-llama") in refused.value.remedy
    cached = tmp_path / "hub" / "models--who--what"
    (cached / "snapshots" / "c0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0")
    (cached / "snapshots" / "c0" / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch_model(dataclasses.replace(model, hub_name="who/what"), heard) == "who/what"
    assert [line.partition(":")[0] for line in heard.said] == ["warning"]  # pip was not asked again


def test_two_processes_make_one_copy(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(shelf, tmp_path, monkeypatch)
    heard = [Heard(), Heard()]  # the lock belongs to an open file, so threads exclude each other like processes
    threads = [threading.Thread(target=fetch_model, args=(tiny_model(shelf), each)) for each in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(each.said) for each in heard) == [0, 2]
    assert fetch_model(tiny_model(shelf), verify=True) == tmp_path / "tiny-llama"


def test_a_name_is_a_model_everywhere(tiny: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of that name does not hide it
    folder = str(tmp_path / "cache" / "tiny-llama")
    assert resolve_origin("tiny") == ("tiny", None, None)
    assert model_label("tiny") == "tiny"
    digest = weights_digest(ModelTable(path="tiny"))
    assert digest is not None
    assert digest == weights_digest(ModelTable(path=folder))
    assert resolve_adapter(ModelTable(path="tiny")) == (folder, None)
    assert locate_model("who/what") == "who/what"


@pytest.mark.parametrize("base", ["tiny", "/nowhere/tiny-llama"])
def test_an_adapter_finds_its_named_base(tiny: WheelModel, tmp_path: Path, base: str) -> None:
    folder = tmp_path / "cache" / "tiny-llama"
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    ids_BT = torch.arange(20)[None]
    expected_BTV = adapted.eval()(ids_BT).logits.detach()
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    adapter = str(tmp_path / "adapter")
    for table in (ModelTable(path=adapter), ModelTable(path="tiny", adapter=adapter)):
        assert tuple(map(str, resolve_adapter(table))) == (str(folder), adapter)
        model, tokenizer = load_policy(table)
        with torch.no_grad():
            torch.testing.assert_close(model(ids_BT).logits, expected_BTV, rtol=1e-4, atol=1e-4)
    going_on, _ = load_policy(ModelTable(path="tiny", adapter=adapter), {"r": 2})
    assert going_on.peft_config["default"].base_model_name_or_path == str(folder)
    for table in (ModelTable(path=adapter, adapter=adapter), ModelTable(path="tiny", adapter="tiny")):
        with pytest.raises(UserError, match=r"model\.adapter"):
            resolve_adapter(table)
    assert tokenizer.get_vocab() == load_policy_tokenizer(ModelTable(path="tiny")).get_vocab()


def test_the_command_describes_a_model(tiny: WheelModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "tiny"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["folder"] == str(tmp_path / "cache" / "tiny-llama")
    assert facts["checksum"].split()[-1] == "verified"
    assert main(["model", "embedded"]) == 0
    assert main(["model", "smollm3"]) == 2
    assert "smollm2" in capsys.readouterr().err


def test_a_misspelled_name_gets_the_usual_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean smollm2"):
        resolve_origin("./smolm2")
    with pytest.raises(UserError) as refused:
        resolve_origin("./nothing-like-it")
    assert "did you mean" not in refused.value.remedy
