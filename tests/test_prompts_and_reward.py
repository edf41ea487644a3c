from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rest_rl.data.layout import PromptLayout
from rest_rl.presets import PRESETS
from rest_rl.response import Gold, ToolCall
from rest_rl.rewards import RewardConfig, random_rewards
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.reward import compute_progress, make_tool_reward
from tests.tiny_policy import tiny_samples, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_dataset_has_prompts_with_tools_and_gold(tokenizer):
    row = build_training_dataset(tiny_samples(1), tokenizer)[0]
    assert row["prompt"] == "f do 0;assistant:"
    assert json.loads(row["gold"]) == {"calls": [{"name": "f", "arguments": {"x": 1}}], "answer": None}
    assert (row["id"], row["kind"]) == ("s0", "single")
    with pytest.raises(ValueError, match="no samples"):
        build_training_dataset([], tokenizer)


@pytest.mark.parametrize("part", ["prompt", "gold", "thought"])
def test_unpaired_surrogates_are_refused(tokenizer, part):
    sample, half = tiny_samples(1)[0], "half \ud800"
    changes = {
        "prompt": {"messages": ({"role": "user", "content": half},)},
        "gold": {"gold": Gold((ToolCall("f", {"x": half}),))},
        "thought": {"thought": half},
    }
    with pytest.raises(ValueError, match="surrogate"):
        build_training_dataset([replace(sample, **changes[part])], tokenizer)


def test_a_template_without_tools_gets_them_as_a_system_message():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    text = PromptLayout(tokenizer, "hermes").render(tiny_samples(1)[0])
    assert text.startswith("system: ")
    assert '"name": "f"' in text
    assert "<tool_call>" in text


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*instruct"):
        build_training_dataset(tiny_samples(1), tokenizer)


def test_the_bos_token_occurs_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    assert build_training_dataset(tiny_samples(1), tokenizer)[0]["prompt"].startswith("<s>f do")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    prompt = build_training_dataset(tiny_samples(1), tokenizer)[0]["prompt"]
    assert tokenizer(prompt)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_the_reward_reads_ids_and_follows_progress(tokenizer):
    class State:
        global_step, max_steps = 0, 3

    text = '<think> a</think>\n<tool_call>\n{"name": "f", "parameters": {"x": 2}}\n</tool_call>'
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    logged = {}
    arguments = {"completion_ids": [ids], "gold": [json.dumps({"calls": [{"name": "f", "arguments": {"x": 1}}]})]}
    reward = make_tool_reward(tokenizer, "toolrl", "rest")
    # S_format = 1, S_acc = (1 name + 1 keys + 0 values) / (1 + 1 + 1) = 2/3; the accuracy share goes from .3 to .8.
    start = reward(**arguments, trainer_state=State, log_metric=logged.__setitem__)
    assert start == [pytest.approx(0.5 * 2 / 3 + 0.5)]
    assert logged == {
        "rest/format": 1.0,
        "rest/accuracy": pytest.approx(2 / 3),
        "rest/exact_match": 0.0,
        "rest/call_rate": 1.0,
        "rest/accuracy_calls": pytest.approx(2 / 3),
        "rest/exact_match_calls": 0.0,
        "rest/reward_calls": start[0],
    }
    State.global_step = 2
    assert reward(**arguments, trainer_state=State) == [pytest.approx(0.75 * 2 / 3 + 0.25)]
    State.global_step = 3  # an evaluation after the last step
    assert compute_progress(State) == 1.0
    with pytest.raises(ValueError, match="expected JSON"):
        reward(completion_ids=[ids], gold=["{"])


def test_random_rewards_ignore_the_responses_and_the_scores_are_still_logged(tokenizer):
    text = '<think> a</think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
    right, wrong = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id], tokenizer("<think>")["input_ids"]
    preset = replace(PRESETS["grpo"], reward=RewardConfig(random=True))
    reward = make_tool_reward(tokenizer, "toolrl", preset, seed=3)
    state, gold = (
        SimpleNamespace(global_step=5, max_steps=10),
        [json.dumps({"calls": [{"name": "f", "arguments": {"x": 1}}]})],
    )

    def rewards(ids, **changes):
        state.__dict__.update(changes)
        return reward(completion_ids=ids, gold=gold * len(ids), trainer_state=state, log_metric=logged.__setitem__)

    logged = {}
    drawn = rewards([right, wrong])
    assert drawn == rewards([wrong, right]) == random_rewards(2, 3, 5)
    assert logged["rest/exact_match"] == 0.5
    assert drawn != rewards([right, wrong], global_step=6)
    assert drawn != random_rewards(2, 4, 5)
    # another process of the same step draws the numbers of its own positions
    assert random_rewards(1, 3, 5, first=1) == drawn[1:]
    # 1,000 uniform draws have mean 1/2 and sd sqrt(1/12/1000) = 0.009
    assert abs(sum(random_rewards(1000, 0, 0)) / 1000 - 0.5) < 0.05


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        (Gold((ToolCall("f", {"x": float("nan")}),)), "is not JSON"),
        (Gold((ToolCall("f", {"x": 10**500}),)), "is not an exact match of itself"),
        (Gold((), "see <tool_call>"), "the answer contains '<tool_call>'"),
    ],
)
def test_the_error_for_unmatchable_gold_names_the_sample(tokenizer, gold, words):
    sample = replace(tiny_samples(1)[0], gold=gold)
    with pytest.raises(ValueError, match=words) as error:
        build_training_dataset([sample], tokenizer)
    assert "s0" in str(error.value)


def test_a_failing_chat_template_names_the_sample(tokenizer):
    sample = replace(tiny_samples(1)[0], tools=({"type": "function", "function": {"name": "f"}},))
    template = "{{ tools[0].function.parameters.properties.items() }}"
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(ValueError, match=r"the chat template failed on sample .s0."):
        PromptLayout(broken).render(sample)


def test_the_published_schedule_counts_batches_and_not_optimizer_steps():
    # its argument and think weights and its reward move by batch; 8 optimizer steps learn from one batch of responses
    tokenizer = tiny_tokenizer()
    ids = tokenizer('<think> a</think>\n<tool_call>\n{"name": "f", "parameters": {"x": 2}}\n</tool_call>')["input_ids"]
    gold = [json.dumps({"calls": [{"name": "f", "arguments": {"x": 1}}], "answer": None})]

    def total(step, steps_per_batch):
        reward = make_tool_reward(tokenizer, "toolrl", "authors-code", steps_per_batch)
        state = SimpleNamespace(global_step=step, max_steps=800)
        return reward(completion_ids=[ids], gold=gold, trainer_state=state)[0]

    assert [total(step, 8) for step in (0, 7, 8, 15, 16)] == [total(batch, 1) for batch in (0, 0, 1, 1, 2)]
    assert total(0, 1) != total(60, 1)


def test_a_reward_with_an_attribute_called_random_is_not_random(tokenizer):
    class Own:
        random = random.Random(0)

        def __call__(self, judgement, progress, step=None):
            return 2.0

    preset = replace(PRESETS["grpo"], reward=Own())
    rewards = make_tool_reward(tokenizer, "toolrl", preset)(completion_ids=[[0], [1]], gold=['{"answer": "a"}'] * 2)
    assert rewards == [2.0, 2.0]
