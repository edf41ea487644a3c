from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
import trl
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rest_rl.config import ModelTable
from rest_rl.data.layout import PromptLayout
from rest_rl.envs.guard import Limits
from rest_rl.envs.load import load_environment
from rest_rl.envs.rollout import Generated, Rollouts, derive_seed
from rest_rl.envs.session import Result
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS
from rest_rl.regions import tag_regions
from rest_rl.response import Region, ToolCall
from rest_rl.train.policy import load_policy, load_policy_tokenizer
from rest_rl.train.prompts import build_dataset, build_training_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.live_environment import TEMPLATE, Counter, Hostile, describe
from tests.tiny_policy import (
    copy_parameters,
    logged_steps,
    scripted_completions,
    tiny_model,
    tiny_samples,
    tiny_settings,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def embedded_tokenizer():
    return load_policy_tokenizer(ModelTable())


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def scripted(tokenizer, texts):
    """A policy that says one text per turn, the same in every rollout."""
    turn = iter(texts)

    def generate(prompts, is_first):
        ids = tokenizer(next(turn), add_special_tokens=False)["input_ids"]
        return Generated([[*ids, tokenizer.eos_token_id] for _ in prompts])

    return generate


def run(environment, layout, texts, *, tasks=({"id": "a", "start": 0},), limits=None, generate=None):
    rollouts = Rollouts(environment, layout, limits or Limits(), [layout.tokenizer.eos_token_id], 96)
    return rollouts.run([(task, 1) for task in tasks], generate or scripted(layout.tokenizer, texts))


def split_runs(trajectory):
    """The runs of sampled tokens, and what is between them."""
    runs, kinds = [], []
    for token, kind in zip(trajectory.ids, trajectory.mask, strict=True):
        if not kinds or kinds[-1] != kind:
            runs.append([])
            kinds.append(kind)
        runs[-1].append(token)
    return runs, kinds


# A trajectory of three turns in every format


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("+think")])
def test_three_turns_token_by_token(embedded_tokenizer, name):
    layout = PromptLayout(embedded_tokenizer, name, context=1024)
    f = layout.format
    calls = [(ToolCall("f", {"x": 1}),), (ToolCall("f", {"x": 2}), ToolCall("g", {"x": 1}))]
    texts = [f.render(None, call, None) for call in calls] + [f.render(None, (), "ok")]
    (found,) = run(Counter(), layout, texts)
    runs, kinds = split_runs(found)
    assert kinds == [1, 0, 1, 0, 1]
    end = embedded_tokenizer.eos_token
    assert [embedded_tokenizer.decode(ids) for ids in runs[::2]] == [text + end for text in texts]
    between = [embedded_tokenizer.decode(ids) for ids in runs[1::2]]
    assert "1" in between[0]
    assert "3" in between[1]
    assert "no tool named g" in between[1]
    # Appending to the sampled tokens gives the same text as rendering the whole dialogue.
    if layout.is_native:
        history = [{key: value for key, value in message.items() if key != "name"} for message in found.messages[:-1]]
        whole = embedded_tokenizer.apply_chat_template(
            history,
            tools=[describe("f", x={"type": "integer", "description": "x"})],
            tokenize=False,
            add_generation_prompt=True,
        )
        said = embedded_tokenizer.decode(found.ids[: found.turns[-1].start])
        assert said.replace("<think>  </think>\n", "").endswith(whole.partition("<|im_start|>assistant\n")[2])
    assert [(turn.start, turn.end) for turn in found.turns] == [
        (0, len(runs[0])),
        (len(runs[0]) + len(runs[1]), len(runs[0]) + len(runs[1]) + len(runs[2])),
        (len(found.ids) - len(runs[4]), len(found.ids)),
    ]
    assert [turn.calls for turn in found.turns] == [*calls, ()]
    assert found.rewards == [0.25, 0.25, 0.5]
    assert (found.total, found.stop, found.has_succeeded) == (1.0, "answered", True)
    assert found.events == {"unknown tool": 1, "stop: answered": 1}
    assert found.states == ({"sum": 0}, {"sum": 3})
    # Regions are those of each turn for itself.
    ids_BT, mask_BT = torch.tensor([found.ids]), torch.tensor([found.mask])
    regions = tag_regions(ids_BT, mask_BT, embedded_tokenizer, f)[0].tolist()
    for turn in found.turns:
        alone = torch.tensor([found.ids[turn.start : turn.end]])
        expected = tag_regions(alone, torch.ones_like(alone), embedded_tokenizer, f)[0].tolist()
        assert regions[turn.start : turn.end] == expected
    assert Region.NAME in regions[: found.turns[0].end]


def test_a_template_without_an_end_is_refused(embedded_tokenizer):
    changed = load_policy_tokenizer(ModelTable())
    changed.chat_template = changed.chat_template.replace("<|im_end|>", "")
    with pytest.raises(UserError):
        run(
            Counter(),
            PromptLayout(changed, "hermes"),
            ['<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'],
        )


# Ends and limits


def say(*calls):
    return "<think> </think>\n<tool_call>\n" + "\n".join(json.dumps(call) for call in calls) + "\n</tool_call>"


def call(x=1, name="f"):
    return {"name": name, "parameters": {"x": x}}


@pytest.fixture
def layout(tokenizer):
    return PromptLayout(tokenizer, "toolrl")


def test_done_ends_the_rollout_and_later_calls_do_not_run(layout):
    environment = Counter()
    (found,) = run(environment, layout, [say(call(3), call(1))])
    assert (found.stop, found.states[1]) == ("done", {"sum": 3})
    assert [result.error for result in found.turns[0].results] == ["", "call after the end"]
    assert found.mask == [1] * len(found.ids)  # results that nothing follows are not in the row
    assert environment.sessions[0].closed or wait_for(lambda: environment.sessions[0].closed)


def wait_for(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_limits_of_turns_calls_and_tokens(layout):
    (found,) = run(Counter(), layout, [say(call())] * 3, limits=Limits(turns=3, calls_per_turn=1))
    assert (found.stop, len(found.turns), found.states[1]) == ("turn limit", 3, {"sum": 3})
    (found,) = run(Counter(), layout, [say(*[call()] * 10_000)], limits=Limits(turns=1, calls_per_turn=4))
    assert (found.events["too many calls"], found.states[1]) == (9996, {"sum": 4})
    # The context leaves room for one response only.
    context = len(found.prompt_ids) + 96
    (found,) = run(Counter(), PromptLayout(layout.tokenizer, "toolrl", context=context), [say(call())] * 3)
    assert (found.stop, len(found.turns)) == ("context", 1)


def test_a_response_that_does_not_end_is_truncated(layout):
    ids = layout.tokenizer(say(call()))["input_ids"]
    (found,) = run(Counter(), layout, [], generate=lambda prompts, is_first: Generated([ids] * len(prompts)))
    assert (found.stop, found.turns[0].results, found.states[1]) == ("truncated", [], {"sum": 0})


def test_none_is_not_zero(layout):
    class Unscored(Counter):
        def open(self, task, seed):
            session = super().open(task, seed)
            session.verify = lambda messages: Result()
            return session

    (found,) = run(Unscored(), layout, ["<think> </think>\n<response> ok </response>"])
    assert found.rewards == [None]
    assert found.total is None
    (found,) = run(Unscored(), layout, [say(call()), "<response> ok </response>"])
    assert found.rewards == [0.25, None]


# A hostile environment and a hostile model


def hostile(layout, what, texts=None, **limits):
    texts = texts or [say(call()), "<think> </think>\n<response> ok </response>"]
    begin = time.monotonic()
    (found,) = run(Hostile(), layout, texts, tasks=[{"id": "a", "what": what}], limits=Limits(**limits))
    return found, time.monotonic() - begin


@pytest.mark.parametrize(
    ("what", "event", "stop", "total"),
    [
        ("raises", "exception", "answered", 1.0),
        ("exits", "exception", "answered", 1.0),
        ("bad reward", "exception", "answered", 1.0),
        ("not text", None, "answered", 1.0),
        ("nothing", None, "answered", 1.0),
        ("mutates", None, "answered", 1.25),
        ("never done", None, "answered", 1.0),
        ("changing tools", None, "answered", 1.25),
        ("bad verdict", "failed verify", "failed", 0.25),
        ("bad schema", "failed start", "failed", 0.0),
        ("bad state", "failed start", "failed", 0.0),
        ("no start", "failed start", "failed", 0.0),
    ],
)
def test_a_hostile_environment_is_counted_and_survived(layout, what, event, stop, total):
    found, _ = hostile(layout, what)
    assert (found.stop, found.total) == (stop, total)
    assert found.events[event] == (1 if event else 0)
    assert bool(found.failure) == (stop == "failed")
    assert not found.has_succeeded or stop == "answered"


def test_a_call_that_hangs_fails_its_rollout_in_time(layout):
    texts = [say(call()), "<think> </think>\n<response> ok </response>"]
    tasks = [{"id": str(n), "what": "hangs" if n % 2 else "fine"} for n in range(8)]
    begin = time.monotonic()
    found = run(Hostile(), layout, texts, tasks=tasks, limits=Limits(timeout=0.3))
    assert time.monotonic() - begin < 20  # four calls of 30 seconds hang, and they wait at the same time
    assert [each.stop for each in found] == ["answered", "failed"] * 4
    assert [each.events["timeout"] for each in found] == [0, 1] * 4
    assert [each.total for each in found] == [1.25, 0.0] * 4


def test_calls_of_a_parallel_session_run_at_the_same_time(layout):
    barrier = threading.Barrier(3, timeout=20)

    class Together(Counter):
        def open(self, task, seed):
            session = super().open(task, seed)
            session.parallel = True
            session.call_tool = lambda name, arguments: Result(str(barrier.wait()), reward=0.1)
            return session

    (found,) = run(Together(), layout, [say(call(), call(), call()), ANSWER])
    assert sorted(result.text for result in found.turns[0].results) == ["0", "1", "2"]  # all three were waiting
    assert found.turns[0].reward == pytest.approx(0.3)


def test_large_results_are_cut_and_say_so(layout):
    found, _ = hostile(layout, "large", result_tokens=32)
    (message,) = [message for message in found.messages if message["role"] == "tool"]
    assert len(message["content"]) < 200
    assert "10000000 characters" in message["content"]


def test_a_result_cannot_end_the_turn(layout):
    found, _ = hostile(layout, "special tokens")
    runs, _ = split_runs(found)
    assert runs[1].count(layout.tokenizer.eos_token_id) == 1  # that of the template, after the result


def test_a_hostile_model_is_refused_before_the_tool_runs(layout):
    deep = '{"name": "f", "parameters": {"x": ' + "[" * 50_000 + "]" * 50_000 + "}}"
    large = json.dumps({"name": "f", "parameters": {"x": "LARGE"}})
    texts = [
        say(call("1")),  # the schema wants an integer
        say({"name": "f", "parameters": {}}),
        say({"name": "rm -rf", "parameters": {}}),
        f"<think> </think>\n<tool_call>\n{deep}\n</tool_call>",
        f"<think> </think>\n<tool_call>\n{large}\n</tool_call>",
        "<think> </think>\n<response> ok </response>",
    ]
    environment, say_text = Counter(), scripted(layout.tokenizer, texts)
    (letter,) = layout.tokenizer("y")["input_ids"]

    def generate(prompts, is_first):
        (ids,) = say_text(prompts, is_first).ids
        text = layout.tokenizer.decode(ids)
        if "LARGE" in text:  # five megabytes of arguments, without tokenizing them
            ids = [
                *(
                    id
                    for part in text.split("LARGE")
                    for id in (*layout.tokenizer(part)["input_ids"], *[letter] * 5_000_000)
                )
            ][:-5_000_000]
        return Generated([ids])

    (found,) = run(environment, layout, [], generate=generate)
    assert environment.sessions[0].sum == 0
    assert found.stop == "answered"
    assert found.events["unknown tool"] == 1
    assert found.events["bad arguments"] + found.events["unreadable call"] == 4
    assert all(len(message["content"]) < 1000 for message in found.messages if message["role"] == "tool")


def test_sessions_leave_no_threads(layout):
    before = threading.active_count()
    run(
        Counter(),
        layout,
        ["<think> </think>\n<response> ok </response>"],
        tasks=[{"id": n, "start": 0} for n in range(20)],
    )
    assert wait_for(lambda: threading.active_count() <= before)


def test_a_group_shares_its_seed():
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b")}) == 3


# Training


def task_rows(n=8):
    rows = [{"id": f"t{k}", "start": 0} for k in range(n)]
    return build_dataset(
        {"prompt": row["id"], "id": row["id"], "task": json.dumps(row), "session_seed": derive_seed(0, row["id"])}
        for row in rows
    )


def total_reward(trajectory, **_):
    return [each.total for each in trajectory]


def make_trainer(tokenizer, folder, environment=None, **changes):
    layout = PromptLayout(tokenizer, "toolrl", context=256)
    limits = Limits(turns=3)
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        reward_funcs=total_reward,
        args=ResTConfig(**tiny_settings(folder, max_completion_length=30, **{"preset": "grpo", **changes})),
        train_dataset=task_rows(),
        processing_class=tokenizer,
        rollouts=Rollouts(environment or Counter(), layout, limits, [tokenizer.eos_token_id], 30),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_outcome_with_weights_of_one_is_stock_trl_bit_for_bit(tokenizer, tmp_path):
    ours = make_trainer(tokenizer, tmp_path / "ours", credit="outcome", share_prompts=False)
    ours.train()
    rollouts = Rollouts(
        Counter(), PromptLayout(tokenizer, "toolrl", context=256), Limits(turns=3), [tokenizer.eos_token_id], 30
    )

    # TRL gives its rollout function the prompts only; here they are the tasks' ids.
    def roll_out(prompts, trainer):
        tasks = [({"id": prompt, "start": 0}, derive_seed(0, prompt)) for prompt in prompts]
        found = rollouts.run(
            tasks, lambda ids, is_first: Generated(*trainer._generate_single_turn(ids, None, {}, 4 if is_first else 1))
        )
        return {
            "prompt_ids": [each.prompt_ids for each in found],
            "completion_ids": [each.ids for each in found],
            "logprobs": None,
            "env_mask": [each.mask for each in found],
            "trajectory": found,
        }

    stock = GRPOTrainer(
        tiny_model(tokenizer),
        reward_funcs=total_reward,
        args=GRPOConfig(
            **tiny_settings(
                tmp_path / "stock",
                max_completion_length=30,
                loss_type="grpo",
                scale_rewards="group",
                use_bias_correction_kl=False,
            )
        ),
        train_dataset=task_rows(),
        processing_class=tokenizer,
        rollout_func=roll_out,
    )
    stock.remove_callback(PrinterCallback)
    stock.train()
    assert any(row["reward_std"] > 0 for row in logged_steps(stock))
    for ours_row, stock_row in zip(logged_steps(ours), logged_steps(stock), strict=True):
        assert {key: ours_row[key] for key in stock_row} == stock_row
    expected = copy_parameters(stock.model)
    assert all(value.equal(expected[name]) for name, value in copy_parameters(ours.model).items())


def scripted_rollouts(tokenizer, scripts):
    """Rollouts whose members each follow their own script."""

    class Scripted(Rollouts):
        def run(self, tasks, generate, **kwargs):
            turn = [-1] * len(tasks)

            def respond(prompts, is_first):
                ids = []
                active = (
                    range(len(tasks))
                    if is_first
                    else [i for i in range(len(tasks)) if len(scripts[i % 4]) > turn[i] + 1]
                )
                for i in active:
                    turn[i] += 1
                    text = scripts[i % 4][turn[i]]
                    ids.append([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
                assert len(ids) == len(prompts)
                return Generated(ids)

            return super().run(tasks, respond)

    return Scripted(Counter(), PromptLayout(tokenizer, "toolrl", context=512), Limits(), [tokenizer.eos_token_id], 30)


ANSWER = "<think> </think>\n<response> ok </response>"
SCRIPTS = [
    [say(call(1)), say(call(1)), ANSWER],  # rewards .25, .25, .5
    [say(call(1)), ANSWER],  # .25, 0
    [say(call(3))],  # .75, and done
    [ANSWER],  # 0
]
# Return-to-go minus the mean of the others that reached the turn, by hand:
# turn 1: returns 1, .25, .75, 0; turn 2: .75 and 0; turn 3 is reached by the first alone: its outcome credit.
LEAVE_ONE_OUT = [
    [1 - 1 / 3, 0.75 - 0.0, 1 - 1 / 3],
    [0.25 - 1.75 / 3, 0.0 - 0.75],
    [0.75 - 1.25 / 3],
    [0 - 2 / 3],
]


def test_credit_reaches_the_tokens_of_its_turn(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, credit="return_to_go")
    trainer.rollouts = scripted_rollouts(tokenizer, SCRIPTS)
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs),
        compute(model, inputs, *args, **kwargs),
    )[1]
    trainer.args.max_steps = 1
    trainer.train()
    rows = {}
    for inputs in seen:
        for ids, mask, advantages in zip(
            inputs["completion_ids"], inputs["completion_mask"] * inputs["tool_mask"], inputs["advantages"], strict=True
        ):
            rows[tuple(ids.tolist())] = (mask.tolist(), advantages.tolist())
    assert len(rows) == 4
    by_turns = sorted((split_credits(*row) for row in rows.values()), key=lambda row: (-len(row), -row[0]))
    assert by_turns == [pytest.approx(row, abs=1e-6) for row in LEAVE_ONE_OUT]


def split_credits(mask, advantages):
    """The credit of each run of ones; it must be the same for all tokens of a run, and 0 elsewhere."""
    found, before = [], 0
    for is_sampled, value in zip(mask, advantages, strict=True):
        if is_sampled and not before:
            found.append(value)
        assert value == (found[-1] if is_sampled else 0.0)
        before = is_sampled
    return found


def test_resume_in_an_environment_is_bit_identical(tokenizer, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "credit": "return_to_go", "preset": "rest"}
    whole = make_trainer(tokenizer, tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged_steps(resumed) == logged_steps(whole)
    expected = copy_parameters(whole.model)
    assert all(value.equal(expected[name]) for name, value in copy_parameters(resumed.model).items())


def test_matched_credit_needs_gold_calls(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, Hostile(), credit="matched")
    trainer.rollouts.environment = type("NoGold", (Counter,), {})()
    opened = trainer.rollouts.environment.open

    def without_gold(task, seed):
        session = opened(task, seed)
        session.gold_calls = None
        return session

    trainer.rollouts.environment.open = without_gold
    with pytest.raises(UserError):
        trainer.train()


# Single turns


def test_return_to_go_within_a_response_by_hand(tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(tmp_path, preset="grpo", credit="return_to_go", max_steps=2)),
        train_dataset=build_training_dataset(tiny_samples(8), tokenizer),
        processing_class=tokenizer,
        rollout_func=scripted_completions,
    )
    trainer.remove_callback(PrinterCallback)
    batches = []
    generate = trainer._generate_and_score_completions

    def watched(inputs):
        batch = generate(inputs)
        own = zip(inputs, batch["completion_ids"], batch["completion_mask"], strict=True)
        batches.append((batch, [trainer.split_response(row, ids[mask.bool()].tolist()) for row, ids, mask in own]))
        return batch

    trainer._generate_and_score_completions = watched
    trainer.train()
    batch, splits = batches[0]
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert max(len(rewards) for rewards, _ in splits) >= 3  # name, key, value and the rest
    checked = 0
    for group in range(0, 8, 4):
        members = splits[group : group + 4]
        for at, (rewards, stages) in enumerate(members):
            for position, stage in enumerate(stages):
                others = [sum(own[stage:]) for n, (own, _) in enumerate(members) if n != at and len(own) > stage]
                if others:
                    expected = sum(rewards[stage:]) - sum(others) / len(others)
                    assert batch["advantages"][group + at, position].item() == pytest.approx(expected, abs=1e-5)
                    checked += 1
    assert checked > 50


def test_other_credits_and_rewards_need_an_environment(tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    settings = {"train_dataset": build_training_dataset(tiny_samples(8), tokenizer), "processing_class": tokenizer}
    for changes, reward in (
        ({"credit": "matched"}, None),
        ({"credit": "return_to_go"}, lambda completions, **_: [0.0]),
    ):
        args = ResTConfig(**tiny_settings(tmp_path, preset="grpo", **changes))
        with pytest.raises(UserError):
            ResTTrainer(tiny_model(tokenizer), reward_funcs=reward, args=args, **settings)


# TRL's own loop over tools


class Weather:
    """An environment in TRL's form, which earns a third per call."""

    def reset(self, **row):
        self.calls = 0

    def check(self, city: str) -> str:
        """Check the weather.

        Args:
            city: The city.
        """
        self.calls += 1
        return f"{city} is sunny"

    def get_reward(self):
        return self.calls / 3


def qwen3_tokenizer():
    made = load_policy_tokenizer(ModelTable())
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return made


def say_by_member(trainer_class, tokenizer):
    """A trainer whose policy follows a script by the member's number in its group, and whose batches are kept."""

    def write(city, number):
        call = f'<tool_call>\n{{"name": "check", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        return "\n".join([call] * number)

    class Scripted(trainer_class):
        batches = None

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
            ids = []
            for row, prompt in enumerate(prompt_ids):
                said = tokenizer.decode(prompt).split("<|im_start|>user\n", 1)[1]
                member = int(found[1]) if (found := re.search(r"city(\d)", said)) else row % 4
                turn = said.count("<|im_start|>user\n<tool_response>")
                texts = {0: ["no"], 1: [write("city1", 1), "done"], 2: [write("city2", 2), "done"]}
                texts[3] = [write("city3", 1), write("city3", 1), "done"]
                ids.append(
                    [*tokenizer(texts[member][turn], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                )
            return ids, None

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.batches = [*(self.batches or []), batch]
            return batch

    return Scripted


def test_rollouts_equal_those_of_trl(tmp_path):
    tokenizer = qwen3_tokenizer()
    rows = [{"id": str(n), "prompt": [{"role": "user", "content": "do"}]} for n in range(4)]
    shared = tiny_settings("", max_completion_length=400, max_steps=1, learning_rate=1e-2)
    del shared["output_dir"]
    stock = say_by_member(GRPOTrainer, tokenizer)(
        load_policy(ModelTable())[0],
        reward_funcs=[],
        args=GRPOConfig(str(tmp_path / "stock"), loss_type="grpo", use_bias_correction_kl=False, **shared),
        train_dataset=build_dataset(rows),
        processing_class=tokenizer,
        environment_factory=Weather,
    )
    own_tokenizer = qwen3_tokenizer()
    layout = PromptLayout(own_tokenizer, "hermes", context=1024)
    assert layout.is_native
    tasks = [{"prompt": row["id"], "id": row["id"], "task": json.dumps(row), "session_seed": 0} for row in rows]
    ours = say_by_member(ResTTrainer, own_tokenizer)(
        load_policy(ModelTable())[0],
        reward_funcs=total_reward,
        args=ResTConfig(
            str(tmp_path / "ours"), preset="grpo", tool_format="hermes", credit="outcome", share_prompts=False, **shared
        ),
        train_dataset=build_dataset(tasks),
        processing_class=own_tokenizer,
        rollouts=Rollouts(load_environment(Weather, tasks=rows), layout, Limits(), [own_tokenizer.eos_token_id], 96),
    )
    for trainer in (stock, ours):
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    (expected,), (found,) = stock.batches, ours.batches
    assert sorted(expected["tool_mask"].diff().eq(1).sum(1).tolist()) == [0, 0, 1, 1, 1, 1, 2, 2]  # later turns
    for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "advantages"):
        assert torch.equal(expected[name], found[name]), name
    (expected,), (found,) = logged_steps(stock), logged_steps(ours)
    for name in ("reward", "reward_std", "num_tokens", "completions/mean_length"):
        assert expected[name] == found[name]
    for name in ("grad_norm", "entropy"):  # TRL shuffles the rows, so sums are rounded differently
        assert expected[name] == pytest.approx(found[name], rel=1e-6)
