"""What a run learns from and is measured on, prepared for its model, and an account of what was left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.config import EMBEDDED, DataTable, RunConfig
from rest_rl.data.check import CheckConfig, CheckedRow, DataReport, check_rows, format_turn_mix, warn_about_answers
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared, Rejected, find_refusals, prepare, prepare_row
from rest_rl.data.reasons import REASONS
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS, ToolFormat, demonstration_format
from rest_rl.response import TURNS
from rest_rl.runlog import SILENT, Observer

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED_LABEL = -100
"""The label of a token that is not learnt."""
TOO_LONG_REASONS = ("beyond_context", "prompt_too_long")
REPORTED_COUNTS = ("rows", "kept", "repaired", "rejected", "samples", "turns", "reasons")


def build_training_dataset(
    samples: Iterable[ToolSample],
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
) -> Dataset:
    """The dataset that `ResTTrainer` reads: columns prompt (text), gold (JSON text), id and kind.

    Raises:
        ValueError: no samples, a tokenizer without a chat template, a sample that the template fails on, or gold that
            no response in the format could match (NaN, tags of the format in the answer).
    """
    layout = PromptLayout(tokenizer, tool_format, variables)
    return build_prompt_dataset([prepare_or_raise(sample, layout) for sample in samples], layout)


def build_prompt_dataset(rows: Sequence[Prepared], layout: PromptLayout) -> Dataset:
    """As `build_training_dataset`, of prepared samples.

    The prompt is text because GRPOTrainer ignores a `tools` column; TRL adds the first token once more, so it is taken
    off here. `gold` is text because Arrow would give every row the argument names of all rows.
    """
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
    """The gold of a sample as JSON text."""
    return json.dumps(to_json(sample)["gold"], ensure_ascii=False)


def build_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The rows as a dataset; UserError for none."""
    from datasets import Dataset  # only here: rendering a prompt needs no more than a tokenizer

    if not (listed := [dict(row) for row in rows]):
        raise UserError("no samples", "at least one", "check the data file")
    return Dataset.from_list(listed)


def make_rejection_error(rejected: Rejected) -> UserError:
    return UserError(
        rejected.reason, "a sample that the model and its format can hold", "correct or leave out the sample"
    )


def prepare_or_raise(sample: ToolSample, layout: PromptLayout) -> Prepared:
    prepared = prepare(sample, layout)
    if isinstance(prepared, Rejected):
        raise make_rejection_error(prepared)
    return prepared


def render_prompt(
    sample: ToolSample,
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of one sample up to where the response begins; see `PromptLayout`."""
    return PromptLayout(tokenizer, tool_format, variables).render(sample)


def render_demonstration(sample: ToolSample, tool_format: ToolFormat, *, thinks: bool = True) -> str:
    """What supervised training has a model say to a sample; ValueError for what the format cannot write.

    What a turn says before its calls stands there as text where the format has room for it, and else as its thought if
    it has no other. Without `thinks` there is no thought, for prompts that end in a closed think block.
    """
    thought, said = (sample.thought if thinks else None), sample.gold.answer
    if sample.preamble and said is None:
        has_room = tool_format.parse("", spans=False).untagged_answer
        said, thought = (sample.preamble, thought) if has_room else (said, thought or sample.preamble)
    return demonstration_format(tool_format).render(thought, sample.gold.calls, said)


def render_gold(sample: ToolSample, layout: PromptLayout) -> str:
    """The gold as a response, with its thought; nothing where the format cannot write it."""
    try:
        return render_demonstration(sample, layout.format, thinks=not layout.closes_think)
    except ValueError:
        return ""


def encode_demonstration(prompt: str | Sequence[int], response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of a prompt (text or its ids) and its response, which ends with the end-of-sequence token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*ids, *response_ids], [IGNORED_LABEL] * len(ids) + response_ids


@dataclass
class TrainingData:
    """Training samples, held-out samples with the name of their split, and what was left out of the former."""

    prepared: list[Prepared]
    held_out: list[tuple[str, Prepared]]
    report: dict[str, Any] = field(default_factory=dict)
    """Counts of the training file, as `rest-rl data check --json` prints them; empty for the tool world."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Lines of rejected.jsonl: rows that gave fewer samples than they hold, and samples that the engine cannot use."""

    @property
    def samples(self) -> list[ToolSample]:
        """The training samples."""
        return [prepared.sample for prepared in self.prepared]

    @cached_property
    def digest(self) -> str:
        """Of all training samples in their order: a resumed run must go on with the same."""
        sha = hashlib.sha256()
        for sample in self.samples:
            row = json.dumps(to_json(sample), ensure_ascii=False, sort_keys=True)
            sha.update(row.encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]

    def reject(self, samples: Iterable[Rejected]) -> None:
        """Note samples that the engine leaves out, such as a demonstration that is too long."""
        self.rejected += [{"sample": each.sample.id, "reason": each.reason} for each in samples]


def read_data(
    config: RunConfig, layout: PromptLayout, observer: Observer = SILENT, response_tokens: int = 1
) -> TrainingData:
    """The data of a run; UserError if a file gives no sample. It reports to the observer what it left out.

    The model has to hold a prompt with `response_tokens` more, and a held-out prompt with `eval.max_new_tokens`.
    """
    data, say = config.data, observer.say
    check_response_limit("trl.max_completion_length", response_tokens, layout)
    check = make_check_config(config, response_tokens)
    if data.path == EMBEDDED:
        if config.model.path != EMBEDDED:
            say("no data given: the prompts are the tool world's")
        return make_tool_world_data(config, check, layout, say)
    held_out = read_held_out(config, check, layout, observer)
    if not data.held_out and (beside := find_test_split(data.path)):
        say(f"{beside} lies beside {data.path} and is not measured: --held-out {beside} measures on it")
    if data.held_out == data.path:
        say(f"{data.path} is both data.path and data.held_out: what is measured was trained on")
    elsewhere = bool(data.held_out) and data.held_out != data.path
    report, training = DataReport(), TrainingData([], held_out)
    for row, prepared in prepare_rows(
        data.path, check, layout, test=data.held_out if elsewhere else None, observer=observer
    ):
        report.add(row)
        training.prepared += select_turns(prepared, data)
        training.rejected += make_rejection_lines(row)
    training.report = select_counts(report)
    say(summarize_file(data.path, training.report))
    if data.turns == "calls" and report.turns["answers"]:
        say(f'data.turns = "calls": {report.turns["answers"]} {TURNS["answers"]} are not trained on')
    elif (warning := warn_about_answers(report.turns)) and accepts_any_answer(config):
        say(f"warning: {warning}")
    if report.samples and not training.prepared:
        raise UserError(f'data.turns = "calls" and {data.path}, none of whose turns calls', "calls", "remove it")
    if not training.prepared:
        first = training.rejected[0]["reasons"][0] if training.rejected else "the file has no rows"
        raise make_no_samples_error(data.path, report.rows, first)
    refuse_too_long(data, data.path, report)
    if config.rest.format in FORMATS and any(sample.tools_in_prompt for sample in training.samples):
        say(f"some prompts describe their own tools and format; {config.rest.format} must be the one they ask for")
    return training


def refuse_too_long(data: DataTable, path: str, report: DataReport) -> None:
    """UserError for prompts that are too long, where that is refused."""
    long = [f"{reason} {report.reasons[reason]}" for reason in TOO_LONG_REASONS if reason in report.reasons]
    if long and data.too_long == "refuse":
        remedy = f'see rest-rl data check {path} --model DIR, or set data.too_long = "drop"'
        raise UserError(f'{path}, {", ".join(long)} rows with data.too_long = "refuse"', "none", remedy)


def check_response_limit(key: str, response_tokens: int, layout: PromptLayout) -> None:
    """UserError for responses that leave no room for a prompt."""
    if layout.context and response_tokens >= layout.context:
        expected = f"less than the {layout.context} tokens that the model holds, prompt included"
        raise UserError(f"{key} = {response_tokens}", expected, "lower it, or take a model with a longer context")


def make_tool_world_data(
    config: RunConfig, check: CheckConfig, layout: PromptLayout, say: Callable[[str], Any]
) -> TrainingData:
    data, evaluation = config.data, config.eval
    training = drop_too_long(tool_world(data.seed, data.num_samples, decision=data.decision), layout, check, data, say)
    check = make_held_out_check(config, check, layout)
    held_out = [
        (split, prepared)
        for split in SPLITS[1:]
        for prepared in drop_too_long(
            tool_world(evaluation.seed, evaluation.prompts, split, decision=data.decision), layout, check, data, say
        )
    ]
    return TrainingData(select_turns(training, data), held_out)


def select_turns(prepared: Sequence[Prepared], data: DataTable) -> list[Prepared]:
    """The samples that `data.turns` trains on."""
    return [each for each in prepared if data.turns == "all" or each.sample.gold.turn == "calls"]


def accepts_any_answer(config: RunConfig) -> bool:
    """Whether the reward of a run takes any text as an answer: not where answers are demonstrated or scored."""
    return not config.rest.is_supervised and getattr(config.rest.resolve().reward, "answer", "") == "presence"


def find_test_split(path: str) -> Path | None:
    """The other part of a split beside `X.train.*`, which `rest-rl data split` wrote; None without one."""
    file = Path(path)
    stem, part, ending = file.name.partition(".train.")
    other = file.with_name(f"{stem}.test.{ending}") if part and file.is_file() else None
    return other if other and other.is_file() else None


def drop_too_long(
    samples: Sequence[ToolSample], layout: PromptLayout, check: CheckConfig, data: DataTable, say: Callable[[str], Any]
) -> list[Prepared]:
    """The samples that the model has room for; UserError if none is left, or one is not and that is refused."""
    prepared = [prepare_or_raise(sample, layout) for sample in samples]
    told = {index: detail for index, each in enumerate(prepared) for _, detail in find_refusals(each, layout, check)}
    if told:
        text = f"{len(told)} of {len(samples)} prompts that are too long ({next(iter(told.values()))})"
        if len(told) == len(samples) or data.too_long == "refuse":
            raise UserError(text, "room for them", "lower the length of responses, or take a longer context")
        say(f"left out: {text}")
    return [each for index, each in enumerate(prepared) if index not in told]


def make_check_config(config: RunConfig, response_tokens: int) -> CheckConfig:
    """`[data]` as the checks of a file take it."""
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


def make_held_out_check(config: RunConfig, check: CheckConfig, layout: PromptLayout) -> CheckConfig:
    """As for training, with the evaluation's own length of responses if it has one; nothing is masked."""
    if config.eval.prompts:
        check_response_limit("eval.max_new_tokens", config.eval.max_new_tokens, layout)
    response_tokens = config.eval.max_new_tokens or check.max_response_tokens
    return replace(check, mask_names=0.0, max_response_tokens=response_tokens)


def prepare_rows(
    path: str, check: CheckConfig, layout: PromptLayout, **settings: Any
) -> Iterable[tuple[CheckedRow, list[Prepared]]]:
    """Each row of a file, and its samples prepared for the model."""
    return (prepare_row(row, layout, check) for row in check_rows(path, check, **settings))


def read_held_out(
    config: RunConfig, check: CheckConfig, layout: PromptLayout, observer: Observer
) -> list[tuple[str, Prepared]]:
    """At most `eval.prompts` samples that the model can be given, checked as the training file is and never masked.

    Of more they are taken at even distances, so that a sorted file is measured as a whole. UserError if none is left.
    """
    path, number = config.data.held_out, config.eval.prompts
    if not path or not number:
        return []
    report, samples = DataReport(), list[Prepared]()
    for row, prepared in prepare_rows(path, make_held_out_check(config, check, layout), layout, observer=observer):
        report.add(row)
        samples += prepared
    counts = select_counts(report)
    observer.say(f"held out, {summarize_file(path, counts)}")
    refuse_too_long(config.data, path, report)
    if not samples:
        raise make_no_samples_error(path, report.rows, ", ".join(counts["reasons"]) or "no rows")
    number = min(number, len(samples))
    return [("held out", samples[index * len(samples) // number]) for index in range(number)]


def select_counts(report: DataReport) -> dict[str, Any]:
    return {name: value for name, value in report.to_json().items() if name in REPORTED_COUNTS}


def make_no_samples_error(path: str, rows: int, first: str) -> UserError:
    """The error for a file without a usable sample; `first` begins with the first reason."""
    reason = REASONS.get(first.partition(":")[0])
    remedy = f"{reason.remedy}; see" if reason else "see"
    got = f"{path}, none of whose {rows} rows gives a sample ({first})"
    return UserError(got, "dialogues", f"{remedy} rest-rl data check {path}")


def make_rejection_lines(row: CheckedRow) -> list[dict[str, Any]]:
    """What a row lost, as one line of rejected.jsonl; nothing for a row that lost nothing."""
    reasons = [f"{found.reason}: {found.detail}" for found in row.findings if found.severity == "rejected"]
    return [{"file": row.file, "row": row.number, "reasons": reasons}] if reasons else []


def summarize_file(path: str, report: Mapping[str, Any]) -> str:
    """One line on a file: what was kept, and why the rest was not."""
    counts = ", ".join(f"{report[name]} {name}" for name in ("kept", "repaired", "rejected"))
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["reasons"].items())
    samples = f"{report['samples']} samples: {format_turn_mix(report['turns'])}" if report["samples"] else "0 samples"
    return f"{path}: {report['rows']} rows, {counts}, {samples}" + (f" ({reasons})" if reasons else "")
