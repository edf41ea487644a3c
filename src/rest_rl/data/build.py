"""Build a training file as a mix of public datasets.

The unit of a mix is the sample: a dialogue gives one sample for each assistant turn, and each is drawn by itself.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from rest_rl.data.check import DataReport
from rest_rl.data.load import read_rows
from rest_rl.data.mask import mask_names
from rest_rl.data.samples import ToolSample, compute_digest
from rest_rl.errors import UserError
from rest_rl.runlog import SILENT, Observer

TOOLACE = "Team-ACE/ToolACE"
XLAM = "Salesforce/xlam-function-calling-60k"
TOOLRL_4K = {"toolace": 2000, "hammer": 1000, "xlam": 1000}
"""The parts of ToolRL's mix and their sizes, in samples."""


@dataclass
class SourceReport:
    """The rows of one source, and what happened to its samples."""

    source: str
    rows: DataReport = field(default_factory=DataReport)
    """The counts of `check_data`: rejected rows give no samples."""
    repeated: int = 0
    """Samples left out because an earlier sample of the source has the same prompt."""
    overlapping: int = 0
    """Samples left out because another part of the mix contains the same prompt."""
    drawn: dict[str, int] = field(default_factory=dict)
    """The number of samples drawn for each part."""

    @property
    def usable(self) -> int:
        """The number of samples that could be drawn."""
        return self.rows.samples - self.repeated - self.overlapping

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; `rows` is the report of `data check`."""
        return {**vars(self), "usable": self.usable, "rows": self.rows.to_json()}


class Mix(NamedTuple):
    """The samples of a mix, shuffled, and a report for each source."""

    samples: list[ToolSample]
    sources: list[SourceReport]


def build_toolrl_4k(
    *,
    toolace: str = TOOLACE,
    xlam: str = XLAM,
    hammer: str | None = None,
    counts: Mapping[str, int] = TOOLRL_4K,
    seed: int = 0,
    observer: Observer = SILENT,
) -> Mix:
    """Draw a mix like ToolRL's 4,000 rows: 2,000 samples of ToolACE, 1,000 of Hammer and 1,000 of xLAM.

    ToolRL and the paper do not say which rows they drew, so this is the recipe and not their data; ToolRL's published
    train.parquet is the closest to it.

    Args:
        toolace: A file, a folder or a hub dataset, as for `check_data`.
        xlam: The same for xLAM.
        hammer: The same for rows whose names are already masked. By default, this part consists of further xLAM
            samples, whose tool and argument names are all masked (`rest_rl.data.mask`).
        counts: The number of samples of the parts `toolace`, `hammer` and `xlam`; a part with 0 is not read.
        seed: Decides which samples are drawn, their masked names and their order.
        observer: Receives the progress.

    Raises:
        UserError: A source does not exist or has too few usable samples.
    """
    wanted = {**dict.fromkeys(TOOLRL_4K, 0), **counts}
    if unknown := [name for name in wanted if name not in TOOLRL_4K]:
        raise UserError(f"counts has the part {unknown[0]!r}", f"only {', '.join(TOOLRL_4K)}")
    if min(wanted.values()) < 0 or not any(wanted.values()):
        raise UserError(f"counts are {wanted}", "whole numbers of at least 0, and not all 0")
    sources = {toolace: ["toolace"]}
    for source, part in ((hammer or xlam, "hammer"), (xlam, "xlam")):
        sources.setdefault(source, []).append(part)
    samples: list[ToolSample] = []
    reports: list[SourceReport] = []
    prompts: set[int] = set()  # of all samples drawn so far
    for source, parts in sources.items():
        sizes = {part: wanted[part] for part in parts if wanted[part]}
        if not sizes:
            continue
        report = SourceReport(source, drawn=sizes)
        drawn = iter(_draw(report, prompts, seed, observer))
        for part, size in sizes.items():
            for digest, sample in islice(drawn, size):
                prompts.add(digest)
                named = replace(sample, id=f"{part}/{sample.id}")
                samples.append(mask_names(named, 1.0, seed) if part == "hammer" and hammer is None else named)
        reports.append(report)
    random.Random(seed).shuffle(samples)
    return Mix(samples, reports)


def _draw(
    report: SourceReport, excluded: Collection[int], seed: int, observer: Observer
) -> list[tuple[int, ToolSample]]:
    # Every prompt has a random key that depends only on the seed and the prompt, and the smallest keys are drawn. The
    # result therefore depends neither on the order of the rows nor on the files they come from. Only the drawn samples
    # and one digest per prompt are in memory.
    size = sum(report.drawn.values())
    drawn = heapq.nsmallest(
        size, _read_distinct(report, excluded, observer), key=lambda pair: compute_digest([seed, pair[0]])
    )
    if len(drawn) < size:
        left_out = f"{report.repeated} with a repeated prompt, {report.overlapping} in another part"
        raise UserError(
            f"{report.source} has {report.usable} usable samples ({report.rows.rows} rows; left out: "
            f"{report.rows.rejected} rejected rows, {left_out})",
            f"at least {size} ({', '.join(f'{part}: {count}' for part, count in report.drawn.items())})",
            "pass another source, or smaller counts",
        )
    return drawn


def _read_distinct(
    report: SourceReport, excluded: Collection[int], observer: Observer
) -> Iterator[tuple[int, ToolSample]]:
    seen: set[int] = set()
    for row in read_rows(report.source, observer=observer):
        report.rows.add(row)
        for sample in row.samples:
            digest = compute_prompt_digest(sample)
            if digest in excluded:
                report.overlapping += 1
            elif digest in seen:
                report.repeated += 1
            else:
                seen.add(digest)
                yield digest, sample


def compute_prompt_digest(sample: ToolSample) -> int:
    """Return a digest of the roles and texts of a prompt, which masking does not change.

    White space, system messages, calls and tools do not count: a masked copy of a prompt has the same digest.
    """
    said = [
        [message["role"], "".join(str(message.get("content") or "").split())]
        for message in sample.messages
        if message["role"] != "system"
    ]
    return compute_digest(said)
