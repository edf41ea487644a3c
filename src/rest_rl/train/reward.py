"""Score responses with the preset's rule reward, one at a time or in a reward function for TRL."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed

from rest_rl.errors import UserError
from rest_rl.evaluate.generate import eos_token_ids, has_ended
from rest_rl.formats import ToolFormat, get_format
from rest_rl.objects import display_name
from rest_rl.presets import Preset, get_preset
from rest_rl.regions import decode_ids
from rest_rl.response import Gold, Turn, gold_from_json
from rest_rl.rewards import RewardRule, apply_reward, judge, random_rewards, uses_random_rewards


class ResponseScore(NamedTuple):
    """The reward of one response (`total`) and its parts, which are in [0, 1] and do not depend on progress."""

    total: float
    format: float
    accuracy: float
    exact_match: float
    call_rate: float


SCORE_METRICS = ResponseScore._fields[1:]
# Metrics that are also logged separately for call turns and answer turns, with their field of `ResponseScore`.
METRICS_BY_TURN = {"reward": "total", "accuracy": "accuracy", "exact_match": "exact_match"}


def collect_by_turn(rows: Iterable[tuple[Turn, ResponseScore]]) -> dict[str, list[float]]:
    """Collect scores by kind of turn, under metric names such as rest/exact_match_calls and rest/reward_answers."""
    found: dict[str, list[float]] = {}
    for turn, scored in rows:
        for name, field in METRICS_BY_TURN.items():
            found.setdefault(f"rest/{name}_{turn}", []).append(getattr(scored, field))
    return found


def get_stop_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """Return the ids that end a response: end tokens of model and tokenizer, and padding, which some models sample."""
    ends = eos_token_ids(model, tokenizer)
    return frozenset(ends if tokenizer.pad_token_id is None else [*ends, tokenizer.pad_token_id])


def compute_progress(state: Any, steps: int = 0) -> float:
    """Return training progress nu from a `TrainerState`: 0 in the first optimizer step, 1 in the last.

    With `steps` > 0, progress already reaches 1 in step number `steps` and stays there.
    """
    return min(1.0, state.global_step / max(1, (steps or state.max_steps) - 1))


def make_tool_reward(
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    preset: str | Preset = "rest",
    steps_per_batch: int = 1,
    seed: int = 0,
    ends: Collection[int] | None = None,
    progress_steps: int = 0,
) -> Callable[..., list[float]]:
    """Return the preset's rule reward as a reward function for TRL; it also works with TRL's stock trainers.

    The function decodes the sampled ids, because TRL's text lacks special tokens. It also needs the dataset column
    `gold`: a JSON string or a mapping {"calls": [{"name", "arguments"}], "answer"}.

    Args:
        tokenizer: the policy's tokenizer.
        tool_format: how the model writes tool calls.
        preset: the method whose reward to use.
        steps_per_batch: the number of optimizer steps per generation batch; some rewards have a schedule that counts
            batches (preset `authors-code`).
        seed: the run's seed, for random rewards.
        ends: the stop tokens; a response that ends with none of them counts as truncated. Default: `get_stop_ids`.
        progress_steps: the number of steps in which progress goes from 0 to 1; 0 for all steps of the run.
    """
    chosen_format, reward = get_format(tool_format), get_preset(preset).reward
    ends = get_stop_ids(tokenizer) if ends is None else ends

    # TRL generates at the first of the `steps_per_batch` steps that train on a batch: all of its responses get that
    # step's progress, and `step // steps_per_batch + 1` counts generation batches.
    def tool_reward(
        completion_ids: list[list[int]],
        gold: list[Any],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        id: Sequence[Any] = (),
        **_: Any,
    ) -> list[float]:
        step = 0 if trainer_state is None else trainer_state.global_step
        progress = 0.0 if trainer_state is None else compute_progress(trainer_state, progress_steps)
        golds, rows = [parse_gold(target) for target in gold], []
        for at, (ids, target) in enumerate(zip(completion_ids, golds, strict=True)):
            text = decode_ids(ids, tokenizer, chosen_format.tags)
            batch, is_cut = step // steps_per_batch + 1, not has_ended(ids, ends)
            try:
                rows.append(score_response(text, target, chosen_format, reward, progress, batch, truncated=is_cut))
            except UserError as error:
                raise with_sample_id(error, id[at] if id else None) from error
        if log_metric is not None:
            for name in SCORE_METRICS:
                log_metric(f"rest/{name}", sum(getattr(row, name) for row in rows) / len(rows))
            for name, values in collect_by_turn(zip((target.turn for target in golds), rows, strict=True)).items():
                for value in values:  # not their mean: TRL averages over processes, which have different counts
                    log_metric(name, value)
        if uses_random_rewards(reward):
            return random_rewards(len(rows), seed, step, first=_process_rank() * len(rows))
        return [row.total for row in rows]

    tool_reward.is_rule_reward = True  # type: ignore[attr-defined]  # `return_to_go` can split it
    return tool_reward


def with_sample_id(error: UserError, name: Any) -> UserError:
    return error if name is None else UserError(f"{error.problem} (sample {name!r})", error.expected, error.remedy)


def refuse_non_finite(reward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reward function for TRL so that inf and NaN raise a UserError, as they would make advantages NaN.

    None, which TRL reads as "no reward", is allowed. Reward models and names of models are returned unchanged.
    """
    if not callable(reward) or isinstance(reward, torch.nn.Module):
        return reward

    def checked(values: Any, columns: Mapping[str, Any]) -> Any:
        for at, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                problem = f"the reward function {display_name(reward)} returned {float(value)}"
                error = UserError(problem, "a finite number, or None for no reward", "guard against it")
                raise with_sample_id(error, columns["id"][at] if "id" in columns else None)
        return values

    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):

        @functools.wraps(reward)
        async def async_wrapper(**columns: Any) -> Any:
            return checked(await reward(**columns), columns)

        return async_wrapper

    @functools.wraps(reward)  # TRL names its metrics after the function
    def wrapper(**columns: Any) -> Any:
        return checked(reward(**columns), columns)

    return wrapper


def _process_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def score_response(
    text: str, gold: Gold, tool_format: ToolFormat, reward: RewardRule, progress: float, batch: int, *, truncated: bool
) -> ResponseScore:
    """Score one response; `batch` is the number of its generation batch, from 1."""
    judgement = judge(text, gold, tool_format, truncated=truncated)
    total = apply_reward(reward, judgement, progress, batch).total
    exact, called = float(judgement.exact_match), float(judgement.parsed.attempted_call)
    return ResponseScore(total, judgement.format, judgement.accuracy, exact, called)


def parse_gold(value: Any) -> Gold:
    """Parse the value of the dataset column `gold`, JSON text or a mapping; UserError for anything else."""
    try:
        return gold_from_json(json.loads(value) if isinstance(value, str) else value)
    except json.JSONDecodeError as error:
        remedy = "build the dataset with build_training_dataset(samples, tokenizer)"
        raise UserError(f"gold is {value!r} ({error})", "JSON", remedy) from None
