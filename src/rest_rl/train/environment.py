"""Training in an environment: its tasks as the data of a run, its rewards, metrics and evaluation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from rest_rl.config import RunConfig
from rest_rl.credit import CreditKind, find_turn_stages
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.data.samples import ToolSample
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.load import load_environment
from rest_rl.envs.rollout import Generated, Rollouts, Trajectory, derive_seed, make_sample
from rest_rl.envs.session import Environment, Task
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import EntropyMeter, eos_token_ids, generate
from rest_rl.evaluate.held_out import HeldOutPrompt, plan_draws
from rest_rl.regions import decode_ids, token_char_lengths
from rest_rl.response import Gold
from rest_rl.rewards import match_calls_by_stage
from rest_rl.runlog import SILENT, Observer, Row
from rest_rl.statistics import Outcome, summarize
from rest_rl.train.prompts import TrainingData
from rest_rl.train.record import ResponseRecord
from rest_rl.train.reward import compute_progress

OPENED_TASKS = 16
"""Tasks that are opened before training, to check the environment and to estimate lengths."""


@dataclass
class EnvironmentData(TrainingData):
    """The tasks of an environment as the data of a run; a sample stands for a task, which its message contains."""

    environment: Environment | None = None
    gold_turns: tuple[int, ...] = ()
    """Turns of the gold paths of the first tasks, with one call per turn and an answer."""

    def get_task(self, sample: ToolSample) -> Task:
        """Return the task that a sample stands for."""
        return json.loads(sample.messages[0]["content"])


def make_limits(config: RunConfig) -> Limits:
    """Return the limits of a run's rollouts."""
    table = config.env
    return Limits(table.turns, table.calls_per_turn, table.result_tokens, table.timeout)


# With several turns, weights of mean 1 over the whole rollout would let a turn of long reasoning drain the others.
def with_turn_weights(config: RunConfig) -> RunConfig:
    """Return a run in an environment with weights normalized per turn, unless it sets `normalization`."""
    if not config.env.path or "normalization" in config.rest.weights:
        return config
    if getattr(config.rest.resolve().weights, "normalization", None) != "response":
        return config
    weights = {**config.rest.weights, "normalization": "turn"}
    return replace(config, rest=replace(config.rest, weights=weights))


def read_tasks(config: RunConfig, layout: PromptLayout, observer: Observer = SILENT) -> EnvironmentData:
    """Load the environment of a run and draw its tasks.

    Raises:
        UserError: the environment cannot be loaded, has no tasks, or fails to start a session for the first ones.
    """
    table = config.env
    environment = load_environment(
        table.path, tasks=table.tasks or None, reward=table.reward or None, options=table.options
    )
    training = environment.tasks(environment.splits[0], config.data.seed, config.data.num_samples)
    if not training:
        raise UserError(f"the environment {table.path} has no tasks", remedy="pass a file of tasks with env.tasks")
    # Opening a session may start a server, so only the first tasks are opened; the others borrow their prompts, which
    # serve estimates only. Rollouts open every task.
    opened, gold_calls = zip(
        *(_open_task(task, environment, config, layout, number) for number, task in enumerate(training[:OPENED_TASKS])),
        strict=True,
    )
    prepared = _prepare_tasks(training, opened, layout)
    held_out = [
        (split, each)
        for split in environment.splits[1:] * bool(config.eval.prompts)
        for each in _prepare_tasks(
            environment.tasks(split, config.eval.seed, config.eval.prompts), prepared[:1], layout
        )
    ]
    observer.say(f"{table.path}: {len(prepared)} tasks for training, {len(held_out)} held out")
    gold_turns = tuple(min(table.turns, number + 1) for number in gold_calls if number)
    return EnvironmentData(prepared, held_out, environment=environment, gold_turns=gold_turns)


def _prepare_tasks(tasks: Sequence[Task], opened: Sequence[Prepared], layout: PromptLayout) -> list[Prepared]:
    texts, golds = [each.prompt_text for each in opened], [each.sample.gold for each in opened]
    samples = []
    for number, task in enumerate(tasks):
        message = {"role": "user", "content": json.dumps(task, ensure_ascii=False, default=str)}
        sample = make_sample({"id": number, **task}, [message], (), golds[number % len(golds)])
        samples.append(Prepared(sample, texts[number % len(texts)], layout.tokenizer))
    duplicates = [identity for identity, n in Counter(each.sample.id for each in samples).items() if n > 1]
    if duplicates:
        raise UserError(f"several tasks have the id {duplicates[0]!r}", "one id per task", "rename them")
    return samples


# Returns the prompt of a task, and the number of its gold calls.
def _open_task(
    task: Task, environment: Environment, config: RunConfig, layout: PromptLayout, number: int
) -> tuple[Prepared, int]:
    guard = Guard(environment, task, derive_seed(config.run.seed, task.get("id", number)), make_limits(config))
    try:
        guard.wait_for_start()
        if guard.failure:
            problem = f"the environment {config.env.path} cannot start task {task.get('id', number)!r}: {guard.failure}"
            raise UserError(problem, "a session", f"run rest-rl env check {config.env.path}")
        longest = max(guard.gold_calls or [], key=lambda call: len(json.dumps(call.arguments)), default=None)
        gold = Gold((longest,)) if longest else Gold()
        sample = make_sample(task, guard.messages, guard.tools, gold)
        return Prepared(sample, layout.render(sample), layout.tokenizer), len(guard.gold_calls or [])
    finally:
        guard.close()


class Staged(NamedTuple):
    """The stages of one trajectory: rewards, hashes of the states before them, and rewards of matched gold calls."""

    rewards: Sequence[float | None]
    states: Sequence[str | None]
    matched: Sequence[float]


def resolve_credit(credit: str | None, environment: Environment | None) -> CreditKind:
    """Return `credit` or, if it is None, `return_to_go` if the environment rewards single calls, else `outcome`."""
    has_steps = getattr(environment, "step_rewards", False)
    return cast(CreditKind, credit or ("return_to_go" if has_steps else "outcome"))


def stage_rollouts(
    trajectories: Sequence[Trajectory], mask_BT: Tensor, credit: CreditKind
) -> tuple[list[Staged], Tensor]:
    """Return the stages of rollouts, which are their turns, and the stage of each token (`find_turn_stages`).

    Raises:
        UserError: `matched` credit, and a session does not know the calls that solve its task.
    """
    stages_BT = find_turn_stages(mask_BT)
    for row, each in zip(stages_BT, trajectories, strict=True):  # the mask of a truncated row can be empty
        turns = int(row.max()) + 1 if len(row) else 0
        assert turns in (0, len(each.turns)), "every turn is one run of sampled tokens"
    staged = [
        Staged(each.rewards, [turn.state_hash for turn in each.turns] or [None], _match_gold(each, credit))
        for each in trajectories
    ]
    return staged, stages_BT


def _match_gold(trajectory: Trajectory, credit: CreditKind) -> list[float]:
    calls = [turn.calls for turn in trajectory.turns] or [()]
    if credit != "matched":
        return [0.0] * len(calls)
    if trajectory.gold_calls is None and trajectory.turns:
        problem = f"rest.credit is 'matched', but task {trajectory.task.get('id')!r} has no gold_calls()"
        raise UserError(problem, "sessions that know the calls which solve their task", "choose another rest.credit")
    return match_calls_by_stage(calls, trajectory.gold_calls or [])


def make_rows(data: EnvironmentData, seed: int) -> Iterable[Row]:
    """Return the rows of the training dataset: a group's rollouts share the task and the seed of its sessions."""
    for each in data.prepared:
        sample = each.sample
        task = sample.messages[0]["content"]
        yield {
            "prompt": sample.id,
            "id": sample.id,
            "kind": sample.kind,
            "task": task,
            "session_seed": derive_seed(seed, sample.id),
        }


def make_environment_reward(
    tokenizer: Any, tags: Sequence[str], record: ResponseRecord | None = None, progress_steps: int = 0
) -> Callable[..., list[float | None]]:
    """Return the reward function for TRL: the total reward of each trajectory, None if nothing was scored.

    It logs env/success, env/reward, env/turns, env/calls, env/part/<name> and env/error/<kind> per rollout,
    env/stop/<why>, env/repeated_calls (share of the calls), env/step_reward_gap (successes minus failures), and the
    success rate as rest/exact_match too, which all reports show.
    """

    def environment_reward(
        trajectory: Sequence[Trajectory],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        id: Sequence[Any] = (),
        **_: Any,
    ) -> list[float | None]:
        totals = [each.total for each in trajectory]
        for name, value in compute_metrics(trajectory).items() if log_metric else ():
            log_metric(name, value)  # type: ignore[misc]
        if record is not None and trainer_state is not None:
            step, progress = trainer_state.global_step + 1, compute_progress(trainer_state, progress_steps)
            record.add_scored(
                (
                    lambda each=each, name=name: {
                        "step": step,
                        "progress": progress,
                        "id": name,
                        **make_trajectory_row(each, tokenizer, tags),
                    }
                )
                for each, name in zip(trajectory, id, strict=True)
            )
        return totals

    return environment_reward


def compute_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the means over rollouts of success, reward and its parts, turns, calls, errors and ends."""
    n, rewards = len(trajectories), [each.total for each in trajectories if each.total is not None]
    sums: defaultdict[str, float] = defaultdict(float)
    for each in trajectories:
        sums["env/success"] += each.has_succeeded
        sums["env/turns"] += len(each.turns)
        sums["env/calls"] += sum(len(turn.calls) for turn in each.turns)
        sums["rest/call_rate"] += any(turn.calls for turn in each.turns)
        for kind, count in each.events.items():
            sums[f"env/stop/{kind[6:]}" if kind.startswith("stop: ") else f"env/error/{kind}"] += count
        for part, value in (each.verdict.parts if each.verdict else {}).items():
            sums[f"env/part/{part}"] += value
    metrics = {name: total / n for name, total in sums.items()}
    if sums["env/calls"]:
        metrics["env/repeated_calls"] = sum(map(count_repeated_calls, trajectories)) / sums["env/calls"]
    steps = [(each.has_succeeded, sum(turn.reward or 0.0 for turn in each.turns)) for each in trajectories]
    good, bad = ([reward for success, reward in steps if success is wanted] for wanted in (True, False))
    if good and bad:
        metrics["env/step_reward_gap"] = sum(good) / len(good) - sum(bad) / len(bad)
    metrics["rest/exact_match"] = metrics["env/success"]
    if rewards:
        metrics["env/reward"] = sum(rewards) / len(rewards)
    return metrics


def count_repeated_calls(trajectory: Trajectory) -> int:
    """Return how many calls of a rollout have the same name and arguments as an earlier one."""
    calls = [repr((call.name, sorted(call.arguments.items()))) for turn in trajectory.turns for call in turn.calls]
    return len(calls) - len(set(calls))


def make_trajectory_row(trajectory: Trajectory, tokenizer: Any, tags: Sequence[str]) -> Row:
    """Return the fields of responses.jsonl for a rollout that are known as soon as it is scored."""
    turns = [
        {
            "start": turn.start,
            "end": turn.end,
            "calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in turn.calls],
            "results": [
                {"text": result.text[:2000], "reward": result.reward, "error": result.error} for result in turn.results
            ],
            "reward": reward,
        }
        for turn, reward in zip(trajectory.turns, trajectory.rewards, strict=False)
    ]
    return {
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "response": decode_ids(trajectory.ids, tokenizer, tags),
        "ids": trajectory.ids,
        "mask": trajectory.mask,
        "turns": turns,
        "reward": trajectory.total,
        "success": trajectory.has_succeeded,
        "stop": trajectory.stop,
        "failure": trajectory.failure,
        "states": list(trajectory.states),
        "truncated": trajectory.stop == "truncated",
        "lengths": token_char_lengths(trajectory.ids, tokenizer, tags),
    }


class EnvironmentEvaluator:
    """Evaluates a policy on held-out tasks, with the same three kinds of sampling as `evaluate_held_out`.

    Exact match is success, s_acc the total reward, and s_format the share of turns without an unreadable call.
    """

    def __init__(self, data: EnvironmentData, layout: PromptLayout, config: RunConfig) -> None:
        assert data.environment is not None
        self.data, self.layout, self.config = data, layout, config
        self.environment = data.environment

    def evaluate(self, model: Any, prompts: Sequence[HeldOutPrompt], observer: Observer = SILENT) -> dict[str, Any]:
        """Return the scores of sampled, greedy and low-temperature rollouts, in the form of `evaluate_held_out`."""
        table, meter = self.config.eval, EntropyMeter()
        passes = plan_draws(table)
        outcomes: dict[str, list[Outcome]] = {}
        turns = self.config.env.turns
        with observer.track(f"evaluating {len(prompts)} held-out tasks, turns", turns * len(passes)) as advance:
            for number, (kind, draw) in enumerate(passes):
                found = self._run(
                    model,
                    prompts,
                    draw.seed,
                    {"temperature": draw.temperature, "meter": meter},
                    lambda turn, active, kind=kind, before=number * turns: advance(before + turn, note=kind),
                )
                outcomes.setdefault(kind, []).extend(map(make_outcome, found, prompts, range(len(prompts))))
            advance(turns * len(passes))
        scores = {**summarize(outcomes["sampled"]), "greedy": summarize(outcomes["greedy"])}
        scores["policy_entropy"] = meter.mean
        if "low temperature" in outcomes:
            scores["low_temperature"] = {**summarize(outcomes["low temperature"]), "temperature": table.low_temperature}
        return scores

    def _run(
        self,
        model: Any,
        prompts: Sequence[HeldOutPrompt],
        seed: int,
        settings: Mapping[str, Any],
        on_turn: Callable[[int, int], Any],
    ) -> list[Trajectory]:
        table, limit = self.config.eval, max(prompt.limit for prompt in prompts)
        tasks = [(self.data.get_task(prompt.sample), derive_seed(table.seed, prompt.sample.id)) for prompt in prompts]
        own = {"max_new_tokens": limit, "batch_size": table.batch_size, "seed": seed, **settings}
        return sample_rollouts(model, self.environment, self.layout, make_limits(self.config), tasks, on_turn, **own)


def sample_rollouts(
    model: Any,
    environment: Environment,
    layout: PromptLayout,
    limits: Limits,
    tasks: Sequence[tuple[Task, int]],
    on_turn: Callable[[int, int], Any] = lambda turn, active: None,
    *,
    max_new_tokens: int,
    seed: int = 0,
    **settings: Any,
) -> list[Trajectory]:
    """Roll out tasks, given with the seeds of their sessions, outside of a trainer; `settings` are those of `generate`.

    `max_new_tokens` limits each turn. `on_turn` is that of `Rollouts.run`.
    """
    turn, tokenizer = 0, layout.tokenizer

    def respond(ids: Sequence[list[int]], is_first: bool) -> Generated:
        nonlocal turn
        turn += 1
        own = {"max_new_tokens": max_new_tokens, "seed": seed + 1000 * turn, **settings}
        return Generated(generate(model, tokenizer, ids, **own))

    ends: Collection[int] = eos_token_ids(model, tokenizer)
    return Rollouts(environment, layout, limits, ends, max_new_tokens).run(tasks, respond, on_turn)


def make_outcome(trajectory: Trajectory, prompt: HeldOutPrompt, index: int) -> Outcome:
    success, reward = float(trajectory.has_succeeded), trajectory.total or 0.0
    readable = compute_readable_share(trajectory)
    return Outcome(prompt.sample.kind, prompt.split, index, success, reward, readable, "calls")


def compute_readable_share(trajectory: Trajectory) -> float:
    """Return the share of a rollout's turns without an unreadable call, which is reported as S_format."""
    return 1 - trajectory.events["unreadable call"] / max(1, len(trajectory.turns))
