"""Read the training and held-out samples of a run, render their prompts, and record the rejected rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.config import EMBEDDED, WORLDS, DataTable, RunConfig
from rest_rl.data.check import CheckConfig, CheckedRow, DataReport, check_rows, format_turn_mix, warn_about_answers
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared, Rejected, find_refusals, prepare, prepare_row
from rest_rl.data.reasons import REASONS
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.data.worlds import open_world
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS, ToolFormat, demonstration_format
from rest_rl.response import TURNS
from rest_rl.runlog import SILENT, Observer

if TYPE_CHECKING:
    from datasets import Dataset

# The label of a token that supervised training does not train on (torch's `ignore_index`).
IGNORED_LABEL = -100
TOO_LONG_REASONS = ("beyond_context", "prompt_too_long")
REPORTED_COUNTS = ("rows", "kept", "repaired", "rejected", "samples", "turns", "reasons")


def build_training_dataset(
    samples: Iterable[ToolSample],
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
) -> Dataset:
    """Build the dataset that `ResTTrainer` reads, with the columns prompt (text), gold (JSON text), id and kind.

    Raises:
        ValueError: there are no samples, the tokenizer has no chat template, the template fails on a sample, or no
            response in the format could match the gold (it contains NaN, or its answer contains tags of the format).
    """
    layout = PromptLayout(tokenizer, tool_format, variables)
    return build_prompt_dataset([prepare_or_raise(sample, layout) for sample in samples], layout)


# The prompt is text because GRPOTrainer (TRL 1.16) ignores a `tools` column. TRL tokenizes it with special tokens,
# which adds the first token again, so that token is removed here. `gold` is JSON text because Arrow would give every
# row the argument names of all rows.
def build_prompt_dataset(rows: Sequence[Prepared], layout: PromptLayout) -> Dataset:
    """Build the same dataset as `build_training_dataset`, from samples whose prompts are already rendered."""
    return build_dataset(
        {
            "prompt": row.prompt_text.removeprefix(layout.bos_prefix),
            "gold": gold_to_json(row.sample),
            "id": row.sample.id,
            "kind": row.sample.kind,
        }
        for row in rows
    )


def gold_to_json(sample: ToolSample) -> str:
    return json.dumps(to_json(sample)["gold"], ensure_ascii=False)


def build_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Build a dataset from rows; UserError if there are none."""
    from datasets import Dataset  # slow to import, and rendering a prompt does not need it

    if not (records := [dict(row) for row in rows]):
        raise UserError("the data has no samples", remedy="check the data file")
    return Dataset.from_list(records)


def make_rejection_error(rejected: Rejected) -> UserError:
    return UserError(rejected.reason, remedy="correct or remove the sample")


def prepare_or_raise(sample: ToolSample, layout: PromptLayout) -> Prepared:
    prepared = prepare(sample, layout)
    if isinstance(prepared, Rejected):
        raise make_rejection_error(prepared)
    return prepared


# Some gold turns have text before their calls, the preamble. Where the format allows text outside its tags, the
# preamble stays text; elsewhere it becomes the thought, unless the turn has one. `thinks` is false for prompts
# that end in a closed think block, after which the model was trained to answer directly.
def render_demonstration(sample: ToolSample, tool_format: ToolFormat, *, thinks: bool = True) -> str:
    """Render the response to a sample for supervised training; ValueError if the format cannot express it."""
    thought, text = (sample.thought if thinks else None), sample.gold.answer
    if sample.preamble and text is None:
        has_room = tool_format.parse("", spans=False).untagged_answer
        text, thought = (sample.preamble, thought) if has_room else (text, thought or sample.preamble)
    return demonstration_format(tool_format).render(thought, sample.gold.calls, text)


def render_gold(sample: ToolSample, layout: PromptLayout) -> str:
    """Render the gold response of a sample, with its thought; return "" if the format cannot express it."""
    try:
        return render_demonstration(sample, layout.format, thinks=not layout.closes_think)
    except ValueError:
        return ""


def encode_demonstration(prompt: str | Sequence[int], response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a prompt, its response and an end-of-sequence token; prompt labels are -100."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*ids, *response_ids], [IGNORED_LABEL] * len(ids) + response_ids


@dataclass
class TrainingData:
    """The data of a run: training samples, held-out samples with their splits' names, and rejected training rows."""

    prepared: list[Prepared]
    held_out: list[tuple[str, Prepared]]
    # Counts of the training file, as `rest-rl data check --json` prints them; empty for a world.
    report: dict[str, Any] = field(default_factory=dict)
    # Lines of rejected.jsonl: rows that lost samples, and samples that the engine cannot train on.
    rejected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def samples(self) -> list[ToolSample]:
        """The training samples without their rendered prompts."""
        return [prepared.sample for prepared in self.prepared]

    @cached_property
    def digest(self) -> str:
        """A hash of all training samples in order, which tells whether the data changed before a resume."""
        sha = hashlib.sha256()
        for sample in self.samples:
            row = json.dumps(to_json(sample), ensure_ascii=False, sort_keys=True)
            sha.update(row.encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]

    def reject(self, samples: Iterable[Rejected]) -> None:
        """Record samples that the engine cannot train on, for example because their demonstrations are too long."""
        self.rejected += [{"sample": each.sample.id, "reason": each.reason} for each in samples]


def read_data(
    config: RunConfig, layout: PromptLayout, observer: Observer = SILENT, response_tokens: int = 1
) -> TrainingData:
    """Read the data of a run, and tell the observer how many rows were kept, repaired and rejected.

    Prompt and response must fit the model's context: a training prompt must leave room for `response_tokens` tokens, a
    held-out prompt for `eval.max_new_tokens`.

    Raises:
        UserError: a file yields no samples, or a prompt is too long and `data.too_long` is "refuse".
    """
    data, say = config.data, observer.say
    check_response_limit("trl.max_completion_length", response_tokens, layout)
    check = make_check_config(config, response_tokens)
    if data.path in WORLDS:
        if data.path == EMBEDDED != config.model.path:
            say("no data given: training on the built-in tool world")
        return make_world_data(config, check, layout, say)
    held_out = read_held_out(config, check, layout, observer)
    if not data.held_out and (test_split := find_test_split(data.path)):
        say(f"{test_split} belongs to {data.path} but is not evaluated; to evaluate on it pass --held-out {test_split}")
    if data.held_out == data.path:
        say(f"{data.path} is both data.path and data.held_out: the held-out scores are those of training samples")
    has_other_file = bool(data.held_out) and data.held_out != data.path
    report, training = DataReport(), TrainingData([], held_out)
    test = data.held_out if has_other_file else None
    for row, prepared in prepare_rows(data.path, check, layout, test=test, observer=observer):
        report.add(row)
        training.prepared += select_turns(prepared, data)
        training.rejected += make_rejection_lines(row)
    training.report = select_counts(report)
    say(summarize_file(data.path, training.report))
    if data.turns == "calls" and report.turns["answers"]:
        say(f'data.turns is "calls": {report.turns["answers"]} {TURNS["answers"]} are not trained on')
    elif (warning := warn_about_answers(report.turns)) and accepts_any_answer(config):
        say(f"warning: {warning}")
    if report.samples and not training.prepared:
        problem = f'data.turns is "calls", but no turn of {data.path} calls a tool'
        raise UserError(problem, remedy="remove data.turns")
    if not training.prepared:
        first = training.rejected[0]["reasons"][0] if training.rejected else "the file has no rows"
        raise make_no_samples_error(data.path, report.rows, first)
    refuse_too_long(data, data.path, report)
    if config.rest.format in FORMATS and any(sample.tools_in_prompt for sample in training.samples):
        say(f"some prompts describe tools and format in words; make sure that they request {config.rest.format}")
    return training


def refuse_too_long(data: DataTable, path: str, report: DataReport) -> None:
    long = [f"{reason} {report.reasons[reason]}" for reason in TOO_LONG_REASONS if reason in report.reasons]
    if long and data.too_long == "refuse":
        remedy = f'run rest-rl data check {path} --model DIR to see them, or set data.too_long = "drop"'
        raise UserError(f"{path} has prompts that are too long ({', '.join(long)})", remedy=remedy)


# The prompt budget: a prompt may use the context minus the response limit, or the context would cut responses off.
def check_response_limit(key: str, response_tokens: int, layout: PromptLayout) -> None:
    if layout.context and response_tokens >= layout.context:
        expected = f"less than the model's context length of {layout.context} tokens, which includes the prompt"
        raise UserError(f"{key} is {response_tokens}", expected, "lower it, or use a model with a longer context")


def make_world_data(
    config: RunConfig, check: CheckConfig, layout: PromptLayout, say: Callable[[str], Any]
) -> TrainingData:
    data, evaluation = config.data, config.eval
    world = open_world(data.path, data.decision)
    training = drop_too_long(world.draw(data.seed, data.num_samples, world.splits[0]), layout, check, data, say)
    check = make_held_out_check(config, check, layout)
    held_out = [
        (split, prepared)
        for split in world.held_out
        for prepared in drop_too_long(world.draw(evaluation.seed, evaluation.prompts, split), layout, check, data, say)
    ]
    return TrainingData(select_turns(training, data), held_out)


def select_turns(prepared: Sequence[Prepared], data: DataTable) -> list[Prepared]:
    return [each for each in prepared if data.turns == "all" or each.sample.gold.turn == "calls"]


# With the reward `answer = "presence"` any text scores as an answer: if most gold turns are answers, a policy that
# never calls scores well. Supervised training and scored answers do not have this problem.
def accepts_any_answer(config: RunConfig) -> bool:
    return not config.rest.is_supervised and getattr(config.rest.resolve().reward, "answer", "") == "presence"


# `rest-rl data split` writes X.train.jsonl and X.test.jsonl; the latter is easily forgotten.
def find_test_split(path: str) -> Path | None:
    file = Path(path)
    stem, part, ending = file.name.partition(".train.")
    other = file.with_name(f"{stem}.test.{ending}") if part and file.is_file() else None
    return other if other and other.is_file() else None


def drop_too_long(
    samples: Sequence[ToolSample], layout: PromptLayout, check: CheckConfig, data: DataTable, say: Callable[[str], Any]
) -> list[Prepared]:
    prepared = [prepare_or_raise(sample, layout) for sample in samples]
    details = {index: detail for index, each in enumerate(prepared) for _, detail in find_refusals(each, layout, check)}
    if details:
        text = f"{len(details)} of {len(samples)} prompts are too long ({next(iter(details.values()))})"
        if len(details) == len(samples) or data.too_long == "refuse":
            raise UserError(text, remedy="lower trl.max_completion_length, or use a model with a longer context")
        say(f"{text} and are left out")
    return [each for index, each in enumerate(prepared) if index not in details]


def make_check_config(config: RunConfig, response_tokens: int) -> CheckConfig:
    data = config.data
    return CheckConfig(
        source=data.source,
        keep_prompts=data.keep_prompts,
        allow=tuple(data.allow),
        mask_names=data.mask_names,
        seed=data.seed,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=response_tokens,
    )


# Held-out prompts are never masked, and their responses may have another limit than in training.
def make_held_out_check(config: RunConfig, check: CheckConfig, layout: PromptLayout) -> CheckConfig:
    if config.eval.prompts:
        check_response_limit("eval.max_new_tokens", config.eval.max_new_tokens, layout)
    response_tokens = config.eval.max_new_tokens or check.max_response_tokens
    return replace(check, mask_names=0.0, max_response_tokens=response_tokens)


def prepare_rows(
    path: str, check: CheckConfig, layout: PromptLayout, **settings: Any
) -> Iterable[tuple[CheckedRow, list[Prepared]]]:
    return (prepare_row(row, layout, check) for row in check_rows(path, check, **settings))


# The held-out file is checked like the training file. If it has more samples than `eval.prompts`, they are taken at
# equal distances, because the first ones of a sorted file would represent only its beginning.
def read_held_out(
    config: RunConfig, check: CheckConfig, layout: PromptLayout, observer: Observer
) -> list[tuple[str, Prepared]]:
    path, number = config.data.held_out, config.eval.prompts
    if not path or not number:
        return []
    report, samples = DataReport(), list[Prepared]()
    for row, prepared in prepare_rows(path, make_held_out_check(config, check, layout), layout, observer=observer):
        report.add(row)
        samples += prepared
    counts = select_counts(report)
    observer.say(f"held out: {summarize_file(path, counts)}")
    refuse_too_long(config.data, path, report)
    if not samples:
        raise make_no_samples_error(path, report.rows, ", ".join(counts["reasons"]) or "no rows")
    number = min(number, len(samples))
    return [("held out", samples[index * len(samples) // number]) for index in range(number)]


def select_counts(report: DataReport) -> dict[str, Any]:
    return {name: value for name, value in report.to_json().items() if name in REPORTED_COUNTS}


def make_no_samples_error(path: str, rows: int, first: str) -> UserError:
    reason = REASONS.get(first.partition(":")[0])
    remedy = f"{reason.remedy}; run" if reason else "run"
    problem = f"none of the {rows} rows of {path} gives a sample ({first})"
    return UserError(problem, "dialogues", f"{remedy} rest-rl data check {path} for details")


def make_rejection_lines(row: CheckedRow) -> list[dict[str, Any]]:
    reasons = [f"{found.reason}: {found.detail}" for found in row.findings if found.severity == "rejected"]
    return [{"file": row.file, "row": row.number, "reasons": reasons}] if reasons else []


def summarize_file(path: str, report: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{report[name]} {name}" for name in ("kept", "repaired", "rejected"))
    rows, samples = (f"{report[name]} {name.removesuffix('s' * (report[name] == 1))}" for name in ("rows", "samples"))
    mix = f": {format_turn_mix(report['turns'])}" if report["samples"] else ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(report["reasons"]).most_common(3))
    hint = f"; most frequent reasons: {reasons}; for all, run rest-rl data check {path} --model DIR" if reasons else ""
    return f"{path}: {rows}: {counts}; {samples}{mix}{hint}"
