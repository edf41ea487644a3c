"""What a run learns from and is measured on, and an account of the rows that were left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.formats import ToolFormat, as_demonstrated
from rest_rl.rewards import exact_match

if TYPE_CHECKING:
    from datasets import Dataset
import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from rest_rl.config import EMBEDDED, RunConfig
from rest_rl.data.check import CheckConfig, CheckedRow, Report, checked_rows, prompts_of
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.errors import UserError
from rest_rl.formats import FORMATS

IGNORED = -100
"""The label of a token that is not learnt."""
OnRefused = Callable[[ToolSample, ValueError], None]
"""Who is told of a sample that the model's format or chat template cannot hold."""


def training_dataset(
    samples: Iterable[ToolSample],
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
    on_refused: OnRefused | None = None,
) -> Dataset:
    """The dataset that `ResTTrainer` reads: columns prompt (text), gold (JSON text), id and kind.

    Prompts are laid out here because GRPOTrainer ignores a `tools` column. `gold` is text because Arrow would give
    every row the argument names of all rows. ValueError for no samples, for a tokenizer without a chat template, and
    for gold that no response in the format could match (NaN, tags of the format in the answer); with `on_refused` it
    is told of such samples, and the others are kept.
    """
    layout = PromptLayout(tokenizer, tool_format, variables)
    return dataset_of(samples, lambda sample: _training_row(sample, layout), on_refused)


def dataset_of(
    samples: Iterable[ToolSample], row: Callable[[ToolSample], dict[str, Any]], on_refused: OnRefused | None
) -> Dataset:
    """One row per sample, without those whose `row` is a ValueError if `on_refused` is told; ValueError for none."""
    from datasets import Dataset  # only here: rendering a prompt needs no more than a tokenizer

    rows: list[dict[str, Any]] = []
    first: ValueError | None = None
    for sample in samples:
        try:
            rows.append(row(sample))
        except ValueError as error:  # noqa: PERF203 - rendering a template costs more than any try
            if on_refused is None:
                raise
            first = first or error
            on_refused(sample, error)
    if not rows:
        raise first or UserError("no samples", "at least one", "check the data file")
    return Dataset.from_list(rows)


def _training_row(sample: ToolSample, layout: PromptLayout) -> dict[str, Any]:
    check_gold(sample, layout.format)
    gold = json.dumps(to_json(sample)["gold"], ensure_ascii=False)
    return {"prompt": layout.training_text(sample), "gold": gold, "id": sample.id, "kind": sample.kind}


def check_gold(sample: ToolSample, tool_format: ToolFormat) -> None:
    """ValueError for gold that no response in the format could match."""
    try:
        text = tool_format.render(None, sample.gold.calls, sample.gold.answer)
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: its gold has no response in the format: {error}") from None
    if not exact_match(tool_format.parse(text, spans=False), sample.gold):
        raise ValueError(
            f"sample {sample.id!r}: got gold that scores less than full marks when written in format "
            f"{tool_format.name!r} ({text!r:.200}); expected JSON within the limits of rest_rl.json_spans; mend the row"
        )


def render_prompt(
    sample: ToolSample,
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of one sample up to where the response begins; see `PromptLayout`."""
    return PromptLayout(tokenizer, tool_format, variables).render(sample)


def demonstration_text(sample: ToolSample, tool_format: ToolFormat, *, thinks: bool = True) -> str:
    """What supervised training has a model say to a sample; ValueError for what the format cannot write.

    What a turn says before its calls stands there as text where the format has room for it, and else as its thought if
    it has no other. Without `thinks` there is no thought, for prompts that end in a closed think block.
    """
    thought, said = (sample.thought if thinks else None), sample.gold.answer
    if sample.preamble and said is None:
        has_room = tool_format.parse("", spans=False).untagged_answer
        said, thought = (sample.preamble, thought) if has_room else (said, thought or sample.preamble)
    return as_demonstrated(tool_format).render(thought, sample.gold.calls, said)


def encode(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of a prompt and its response, which ends with the end-of-sequence token."""
    prompt_ids, response_ids = tokenizer([prompt, response], add_special_tokens=False)["input_ids"]
    response_ids = [*response_ids, tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids


COUNTS = ("rows", "kept", "repaired", "rejected", "samples", "reasons")


@dataclass
class TrainingData:
    """Training samples, held-out samples with the name of their split, and what was left out of the former."""

    samples: list[ToolSample]
    held_out: list[tuple[str, ToolSample]]
    report: dict[str, Any] = field(default_factory=dict)
    """Counts of the training file, as `rest-rl data check --json` prints them; empty for the tool world."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the training file that gave fewer samples than they hold, and samples that the model cannot be given."""

    @cached_property
    def digest(self) -> str:
        """Of all training samples in their order: a resumed run must go on with the same."""
        rows = (json.dumps(to_json(sample), ensure_ascii=False, sort_keys=True) for sample in self.samples)
        sha = hashlib.sha256()
        for row in rows:
            sha.update(row.encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]

    def refuse(self, sample: ToolSample, error: ValueError) -> None:
        """Leave out a sample whose demonstration is too long, or has a thought that the format cannot hold."""
        self.rejected.append({"sample": sample.id, "reason": str(error)})


def read_data(config: RunConfig, layout: PromptLayout, say: Callable[[str], Any]) -> TrainingData:
    """The data of a run; a ValueError if a file gives no sample. What was left out of it is said aloud."""
    data, number = config.data, config.eval.prompts
    if data.path == EMBEDDED:
        if config.model.path != EMBEDDED:
            say("no data given: the prompts are the tool world's")
        draw = partial(tool_world, decision=data.decision)
        unseen = {split: draw(config.eval.seed, number, split) for split in SPLITS if split != "train"}
        held_out = [(split, sample) for split, group in unseen.items() for sample in group]
        return TrainingData(draw(data.seed, data.samples), held_out)
    check = CheckConfig(
        source=data.source,
        keep_prompts=data.keep_prompts,
        keep=tuple(data.keep),
        mask_names=data.mask_names,
        seed=data.seed,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    training = TrainingData([], held_out_samples(config, check, layout, say))
    report = Report()
    if data.held_out == data.path:
        say(f"{data.path} is both data.path and data.held_out: what is measured was trained on")
    elsewhere = bool(data.held_out) and data.held_out != data.path
    unseen_prompts = prompts_of(data.held_out, check) if elsewhere else frozenset()
    for row in checked_rows(data.path, check, test_prompts=unseen_prompts, **model_checks(layout)):
        report.add(row)
        training.samples += row.samples
        training.rejected += rejection(row)
    training.report = {name: value for name, value in report.to_json().items() if name in COUNTS}
    say(account(data.path, training.report))
    if not training.samples:
        first = training.rejected[0]["reasons"] if training.rejected else "the file has no rows"
        raise empty(data.path, report.rows, first)
    if config.rest.format in FORMATS and any(sample.tools_in_prompt for sample in training.samples):
        say(f"some prompts describe their own tools and format; {config.rest.format} must be the one they ask for")
    return training


def held_out_samples(
    config: RunConfig, check: CheckConfig, layout: PromptLayout, say: Callable[[str], Any]
) -> list[tuple[str, ToolSample]]:
    """The first samples of the evaluation file that the model can be given, checked as the training file is.

    They are never masked. What was left out is said aloud; ValueError if nothing is left.
    """
    path, number = config.data.held_out, config.eval.prompts
    if not path or not number:
        return []
    plain, report = replace(check, mask_names=0.0), Report()
    samples: list[ToolSample] = []
    for row in checked_rows(path, plain, **model_checks(layout)):
        report.add(row)
        samples += row.samples
        if len(samples) >= number:
            break
    counts = {name: value for name, value in report.to_json().items() if name in COUNTS}
    say(f"held out, {account(path, counts)}")
    if not samples:
        raise empty(path, report.rows, ", ".join(counts["reasons"]) or "no rows")
    return [("held out", sample) for sample in samples[:number]]


def model_checks(layout: PromptLayout) -> dict[str, Any]:
    """What `checked_rows` asks the model for, by the names of its arguments."""
    return {"prompt_tokens": layout.count_tokens, "refusal": partial(refusal, layout=layout)}


def refusal(sample: ToolSample, layout: PromptLayout) -> str | None:
    """Why a model cannot be given a sample, or None."""
    try:
        check_gold(sample, layout.format)
        layout.render(sample)
    except ValueError as error:
        return str(error)
    return None


def empty(path: str, rows: int, first: object) -> ValueError:
    """The error for a file without a usable sample."""
    return UserError(
        f"{path}, none of whose {rows} rows gives a sample ({first})", "dialogues", f"see rest-rl data check {path}"
    )


def rejection(row: CheckedRow) -> list[dict[str, Any]]:
    """What a row lost, as one line of rejected.jsonl; nothing for a row that lost nothing."""
    reasons = [f"{found.reason}: {found.detail}" for found in row.findings if found.severity == "rejected"]
    return [{"file": row.file, "row": row.number, "reasons": reasons}] if reasons else []


def account(path: str, report: dict[str, Any]) -> str:
    """One line on a file: what was kept, and why the rest was not."""
    counts = ", ".join(f"{report[name]} {name}" for name in ("kept", "repaired", "rejected"))
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["reasons"].items())
    return f"{path}: {report['rows']} rows, {counts}, {report['samples']} samples" + (
        f" ({reasons})" if reasons else ""
    )
