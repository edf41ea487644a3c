"""The warm start's tokenizer, model, recipe, and the checkpoint that the package ships."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from research.demonstrations import render_demonstration
from research.tool_world_model import build_model, build_recall_batch, build_tokenizer
from research.warm_start import RECORD_FILE, WarmStartConfig, generate_batches, warm_start
from rest_rl.data.layout import PromptLayout
from rest_rl.data.tool_world import SPLITS, is_held_out_name, is_held_out_value, tool_world
from rest_rl.evaluate.generate import generate
from rest_rl.formats import get_format
from rest_rl.regions import decode_ids, tag_regions
from rest_rl.response import Region
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.prompts import IGNORED_LABEL
from tests.scores import exact_match

TOKENIZER: Any = build_tokenizer()
SAMPLES = [sample for split in SPLITS for sample in tool_world(9, 60, split)]


def test_the_tokenizer_is_deterministic() -> None:
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_tool_world_texts_round_trip_in_few_tokens() -> None:
    for sample in SAMPLES:
        text = PromptLayout(TOKENIZER).render(sample) + render_demonstration(sample) + TOKENIZER.eos_token
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(ids) == text
        assert len(ids) <= 170


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_names_and_values_have_the_same_ids_in_prompt_and_call() -> None:
    for sample in tool_world(9, 40, kinds=["single"]):
        prompt, response = PromptLayout(TOKENIZER).render(sample), render_demonstration(sample)
        for call in sample.gold.calls:
            for text in (call.name, *call.arguments, *call.arguments.values()):
                ids = TOKENIZER(text)["input_ids"]
                for where in (prompt, response):
                    every = TOKENIZER(where)["input_ids"]
                    assert any(every[i : i + len(ids)] == ids for i in range(len(every)))


def test_tools_are_described_before_they_are_named() -> None:
    prompt = PromptLayout(TOKENIZER).render(SAMPLES[0])
    for tool in SAMPLES[0].tools:
        f = tool["function"]
        assert f'{f["description"]}: "{f["name"]}"' in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_rendered_histories_omit_the_reasoning() -> None:
    second = tool_world(9, 2, kinds=["dependent"])[1]
    prompt = PromptLayout(TOKENIZER).render(second)
    assert "<think>" not in prompt
    assert '<tool_call>\n{"name": "' in prompt
    assert '<|im_start|>tool\n{"result": "' in prompt


def test_every_region_of_a_demonstration_is_tagged() -> None:
    rows = [TOKENIZER(render_demonstration(s))["input_ids"] + [TOKENIZER.eos_token_id] for s in SAMPLES[:20]]
    tool_format = get_format("toolrl")
    found = set()
    for row in rows:
        ids_BT = torch.tensor([row])
        regions = tag_regions(ids_BT, torch.ones_like(ids_BT), TOKENIZER, tool_format)
        found |= set(regions.flatten().tolist())
    assert found == {int(r) for r in Region} - {int(Region.OTHER)}


def test_the_first_layer_starts_by_attending_to_previous_tokens() -> None:
    torch.manual_seed(0)
    model = build_model(TOKENIZER)
    model.set_attn_implementation("eager")
    attentions = model(torch.randint(0, 500, (1, 20)), output_attentions=True).attentions[0][0]
    for head, offset in enumerate((1, 2, 3)):
        assert attentions[head, 15, 15 - offset] > 0.95


def test_recall_labels_only_the_second_mention() -> None:
    ids_BT, labels_BT = build_recall_batch(TOKENIZER, random.Random(0), batch=4, pairs=3)
    for ids, labels in zip(ids_BT.tolist(), labels_BT.tolist(), strict=True):
        first = next(i for i, label in enumerate(labels) if label != IGNORED_LABEL)
        assert all(ids[i] == label for i, label in enumerate(labels) if label != IGNORED_LABEL)
        assert {label for label in labels if label != IGNORED_LABEL} <= set(ids[:first])


def test_recall_contains_no_held_out_name_or_value() -> None:
    text = TOKENIZER.decode(build_recall_batch(TOKENIZER, random.Random(1), batch=64, pairs=6)[0].flatten().tolist())
    quoted = set(text.split('"')[1::2])
    names, values = {t for t in quoted if "_" in t}, {t for t in quoted if "-" in t}
    assert len(names) > 50
    assert len(values) > 50
    assert not any(map(is_held_out_name, names))
    assert not any(map(is_held_out_value, values))


def test_batches_label_only_the_response() -> None:
    batch = next(
        generate_batches(iter(SAMPLES), PromptLayout(TOKENIZER), random.Random(0), WarmStartConfig(batch_size=8))
    )
    for sample, ids, labels in zip(SAMPLES, batch.ids.tolist(), batch.labels.tolist(), strict=False):
        learnt = [label for label in labels if label != IGNORED_LABEL]
        assert TOKENIZER.decode(learnt) == render_demonstration(sample) + TOKENIZER.eos_token
        assert TOKENIZER.decode(ids).startswith(PromptLayout(TOKENIZER).render(sample))


def test_the_recipe_is_deterministic_and_its_folder_loads(tmp_path: Path) -> None:
    config = WarmStartConfig(hidden=64, layers=1, recall_steps=2, clean_steps=2, narrow_steps=2, batch_size=4)
    said: list[str] = []
    one, two = warm_start(config, tmp_path / "one", said.append), warm_start(config, tmp_path / "two", said.append)
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((one / RECORD_FILE).read_text())["recipe"]["clean_steps"] == 2
    assert AutoTokenizer.from_pretrained(one).chat_template == TOKENIZER.chat_template
    assert [line.split(":")[0] for line in said[1:4]] == ["recall", "clean", "narrow"]


@pytest.mark.parametrize(
    "wrong", [{"clean_steps": -1}, {"hidden": 60}, {"single_call": 1.5}, {"learning_rate": 0.0}, {"layers": 0}]
)
def test_wrong_recipes_raise(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        WarmStartConfig(**wrong)


def test_the_shipped_model_is_a_small_stock_model_with_the_recipe_tokenizer() -> None:
    folder = embedded_model_dir()
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)


def test_the_shipped_model_calls_unseen_tools() -> None:
    folder = embedded_model_dir()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.generation_config.eos_token_id, model.dtype) == (tokenizer.eos_token_id, torch.float32)
    samples = list(islice(tool_world(8, 64, "unseen_tools"), 64))
    prompts = [PromptLayout(tokenizer).render(sample) for sample in samples]
    responses = generate(model, tokenizer, prompts, max_new_tokens=80, batch_size=64, temperature=0)
    tool_format = get_format("toolrl")
    right = [
        exact_match(tool_format.parse(decode_ids(ids, tokenizer, tool_format.tags)), sample.gold)
        for ids, sample in zip(responses, samples, strict=True)
    ]
    assert sum(right) / len(right) > 0.5
