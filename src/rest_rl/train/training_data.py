"""What a run learns from and is measured on, and an account of the rows that were left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rest_rl.config import EMBEDDED, RunConfig
from rest_rl.data.check import CheckConfig, CheckedRow, Report, checked_rows, prompts_of
from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.train.prompt_layout import PromptLayout

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

    def refuse(self, sample: ToolSample, error: ValueError) -> None:
        """Leave out a sample that the model's format or chat template cannot hold."""
        self.rejected.append({"sample": sample.id, "reason": str(error)})


def read_data(config: RunConfig, layout: PromptLayout, say: Callable[[str], Any]) -> TrainingData:
    """The data of a run; a ValueError if a file gives no sample. What was left out of it is said aloud."""
    data, number = config.data, config.eval.prompts
    if data.path == EMBEDDED:
        unseen = {split: tool_world(config.eval.seed, number, split) for split in SPLITS if split != "train"}
        held_out = [(split, sample) for split, group in unseen.items() for sample in group]
        return TrainingData(tool_world(data.seed, data.samples), held_out)
    check = CheckConfig(
        source=data.source,
        keep_prompts=data.keep_prompts,
        keep=tuple(data.keep),
        mask_names=data.mask_names,
        seed=data.seed,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    training = TrainingData([], held_out_samples(config, check, layout))
    report = Report()
    unseen_prompts = prompts_of(data.held_out, check) if data.held_out and data.held_out != data.path else frozenset()
    for row in checked_rows(data.path, check, prompt_tokens=layout.count_tokens, test_prompts=unseen_prompts):
        report.add(row)
        training.samples += row.samples
        training.rejected += rejection(row)
    training.report = {name: value for name, value in report.to_json().items() if name in COUNTS}
    say(account(data.path, training.report))
    if not training.samples:
        first = training.rejected[0]["reasons"] if training.rejected else "the file has no rows"
        raise ValueError(
            f"got {data.path}, none of whose {report.rows} rows gives a sample ({first}), expected dialogues; "
            f"see rest-rl data check {data.path}"
        )
    return training


def held_out_samples(config: RunConfig, check: CheckConfig, layout: PromptLayout) -> list[tuple[str, ToolSample]]:
    """The first samples of the evaluation file, checked as the training file is but never masked."""
    if not config.data.held_out or not config.eval.prompts:
        return []
    plain = CheckConfig(check.source, check.keep_prompts, check.keep, max_prompt_tokens=check.max_prompt_tokens)
    rows = checked_rows(config.data.held_out, plain, prompt_tokens=layout.count_tokens)
    samples = (sample for row in rows for sample in row.samples)
    return [("held out", sample) for sample in islice(samples, config.eval.prompts)]


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
