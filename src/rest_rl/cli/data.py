"""The verb `data`: check, convert, show, split and make training data; heavy libraries load only when asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_rl.data.check import CheckConfig, CheckedRow, Report, checked_rows, prompts_of
from rest_rl.data.reading import RowReader
from rest_rl.data.reasons import KEEPABLE
from rest_rl.data.samples import decompose
from rest_rl.data.shapes import SOURCES
from rest_rl.data.split import Split
from rest_rl.data.tool_world import SPLITS, dialogues
from rest_rl.data.write import check_output, rejected_path, rejected_writer, sample_writer
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json

if TYPE_CHECKING:
    from rest_rl.data.layout import PromptLayout

EPILOG = """\
examples:
  rest-rl data check my.jsonl                        every row kept, repaired or rejected, and why
  rest-rl data check train.parquet --test test.jsonl --json --strict
  rest-rl data convert rlla_sft.json --out train.jsonl
  rest-rl data convert OWNER/NAME:train --out train.parquet --source messages
  rest-rl data show my.jsonl 17 --model Qwen/Qwen3-0.6B
  rest-rl data split train.jsonl --test 0.1 --seed 0
  rest-rl data world --out world.jsonl -n 1000
files: .jsonl .ndjson .json .parquet (text also as .gz), a folder of them, a folder of datasets.save_to_disk, or
OWNER/NAME:SPLIT or OWNER/NAME:CONFIG/SPLIT of the hub
"""
SHOWN_PER_REASON = 10
PROGRESS_EVERY = 256


def add_data(verbs: Any) -> None:
    """Add the verb and its own verbs to the parser."""
    verb = verbs.add_parser(
        "data",
        help="check, convert, show, split or make training data",
        description="Every row of a data file accounted for, and what training makes of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(verb))
    _add_check(actions)
    _add_convert(actions)
    _add_show(actions)
    _add_split(actions)
    _add_world(actions)


def _add(actions: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: rest-rl data {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_check(actions: Any) -> None:
    verb = _add(actions, "check", "account for every row: kept, repaired or rejected", "check my.jsonl --strict")
    verb.add_argument("files", nargs="+", metavar="FILE", help="data files, folders or hub names")
    _add_reading(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object with the counts and findings")
    verb.add_argument(
        "--strict", action="store_true", help="exit with 1 if any row or turn is rejected, or without samples"
    )
    verb.add_argument("--all", action="store_true", help="list every finding, not the first ten of each reason")


def _add_convert(actions: Any) -> None:
    verb = _add(
        actions,
        "convert",
        "write the samples of a file as JSONL or Parquet, and the rejected rows beside it",
        "convert rlla_sft.json --out train.jsonl",
    )
    verb.add_argument("files", nargs="+", metavar="FILE", help="data files, folders or hub names")
    verb.add_argument("--out", required=True, metavar="OUT", help="the samples: NAME.jsonl or NAME.parquet")
    _add_reading(verb)
    verb.add_argument("--json", action="store_true", help="print the report as JSON")
    verb.add_argument(
        "--strict", action="store_true", help="exit with 1 if any row or turn is rejected, or without samples"
    )


def _add_show(actions: Any) -> None:
    verb = _add(actions, "show", "show the prompts and gold of a row", "show my.jsonl 17 --model Qwen/Qwen3-0.6B")
    verb.add_argument("file", metavar="FILE", help="the data file")
    verb.add_argument("number", type=int, metavar="N", help="the row, counted from 1")
    _add_reading(verb)


def _add_split(actions: Any) -> None:
    verb = _add(
        actions,
        "split",
        "write train and test files; a dialogue and equal prompts stay on one side",
        "split train.jsonl --test 0.1 --seed 0",
    )
    verb.add_argument("file", metavar="FILE", help="the data file")
    verb.add_argument("--test", type=float, required=True, metavar="SHARE", help="share of the test side, as 0.1")
    verb.add_argument(
        "--out", metavar="DIR", help="where FILE.train.jsonl and FILE.test.jsonl go (default: beside FILE)"
    )
    _add_reading(verb, test=False)


def _add_world(actions: Any) -> None:
    verb = _add(
        actions, "world", "write data of the tool world", "world --out world.jsonl -n 1000 --split unseen_tools"
    )
    verb.add_argument("--out", required=True, metavar="OUT", help="the samples: NAME.jsonl or NAME.parquet")
    verb.add_argument("-n", type=int, default=1000, metavar="N", help="samples (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: %(default)s)")
    verb.add_argument("--split", default="train", choices=SPLITS, help="split (default: %(default)s)")
    decisions = ("reasoning", "call")
    verb.add_argument(
        "--decision", default="reasoning", choices=decisions, help="where it is decided what to call (%(default)s)"
    )


def _add_reading(verb: argparse.ArgumentParser, *, test: bool = True) -> None:
    group = verb.add_argument_group("reading")
    names = ", ".join(SOURCES)
    group.add_argument("--source", default="auto", metavar="S", help=f"shape of the rows: auto, {names}")
    group.add_argument("--keep-prompts", action="store_true", help="keep published prompts word for word")
    group.add_argument(
        "--keep", action="append", default=[], metavar="REASON", help=f"only note it, one of {', '.join(KEEPABLE)}"
    )
    group.add_argument("--max-prompt", type=int, default=0, metavar="N", help="reject longer prompts, in tokens")
    group.add_argument(
        "--model", "--tokenizer", dest="tokenizer", metavar="DIR", help="reject what its chat template cannot lay out"
    )
    group.add_argument("--format", default="auto", metavar="F", help="format of the calls (default: the template's)")
    group.add_argument("--limit", type=int, default=0, metavar="N", help="read the first N rows only")
    group.add_argument("--mask", type=float, default=0.0, metavar="SHARE", help="share of samples with random names")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: %(default)s)")
    if test:
        group.add_argument("--test", metavar="FILE", help="reject prompts that this file has as well")


def data(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "check": check, "convert": convert, "show": show, "split": split, "world": world
    }  # fmt: skip
    return actions[arguments.action](arguments)


def check(arguments: argparse.Namespace) -> int:
    """Count and list what was found."""
    report = Report()
    with reading(arguments, arguments.files, asked_layout(arguments)) as rows:
        for row in rows:
            report.add(row)
    if arguments.json:
        print(as_json(report.to_json(), indent=2))
    else:
        from rest_rl.cli.data_tables import show_report

        show_report(report, len(report.findings) if arguments.all else SHOWN_PER_REASON)
    return int(arguments.strict and not is_clean(report))


def is_clean(report: Report) -> bool:
    """Whether there are samples and nothing was rejected, no turn either; the lack of samples is said on stderr."""
    if not report.samples:
        print(f"{report.rows} rows give no sample", file=sys.stderr)
    return report.samples > 0 and not report.rejected and not report.lost_turns


def convert(arguments: argparse.Namespace) -> int:
    """Write samples and rejected rows."""
    out, report = Path(arguments.out), Report()
    check_output(out, arguments.files)
    rejected = rejected_path(out)
    with (
        reading(arguments, arguments.files, asked_layout(arguments)) as rows,
        rejected_writer(out) as write_rejected,
        sample_writer(out) as write,
    ):
        for row in rows:
            report.add(row)
            for sample in row.samples:
                write(sample)
            if any(found.severity == "rejected" for found in row.findings):
                write_rejected(row)
    if arguments.json:
        print(as_json({**report.to_json(), "out": str(out)}, indent=2))
    else:
        from rest_rl.cli.data_tables import show_report

        show_report(report, 0)
        print(f"wrote {out}" + (f" and {rejected}" if rejected.exists() else ""))
    return int(arguments.strict and not is_clean(report))


def show(arguments: argparse.Namespace) -> int:
    """Show one row as training sees it."""
    from rest_rl.cli.data_tables import show_row

    if arguments.number < 1:
        raise UserError(f"row {arguments.number}", "a number from 1", "rows are counted from 1")
    last, layout = 0, asked_layout(arguments)
    with reading(arguments, [arguments.file], layout) as rows:
        for last, row in enumerate(rows, 1):
            if last == arguments.number:
                show_row(row, layout, arguments.format)
                return 0
    raise ValueError(f"got row {arguments.number} of {arguments.file}, which has {last}; choose a smaller number")


def split(arguments: argparse.Namespace) -> int:
    """Write the two sides."""
    share, arguments.test = arguments.test, None
    source = Path(arguments.file)
    folder = Path(arguments.out) if arguments.out else source.parent if source.exists() else Path()
    stem = source.name.removesuffix(".gz")
    outs = {side: folder / f"{Path(stem).stem or stem}.{side}.jsonl" for side in ("train", "test")}
    for out in outs.values():
        check_output(out, [arguments.file])
    rejected, layout = 0, asked_layout(arguments)
    with reading(arguments, [arguments.file], layout) as rows:
        sides = Split(rows, share, arguments.seed)
    counts = dict.fromkeys(outs, 0)
    with ExitStack() as stack:
        rows = stack.enter_context(reading(arguments, [arguments.file], layout))
        writers = {side: stack.enter_context(sample_writer(out)) for side, out in outs.items()}
        for row in rows:
            rejected += row.status == "rejected"
            for sample in row.samples:
                side = "test" if sides.is_test(row, sample) else "train"
                writers[side](sample)
                counts[side] += 1
    for side, out in outs.items():
        print(f"{out}: {counts[side]} samples")
    if rejected:
        print(f"{rejected} rows rejected; see them with: rest-rl data check {arguments.file}")
    return 0


def world(arguments: argparse.Namespace) -> int:
    """Write samples of the tool world."""
    out = Path(arguments.out)
    check_output(out, [])
    if arguments.n < 1:
        raise ValueError(f"got -n {arguments.n}, expected a number of samples from 1")
    drawn = dialogues(arguments.seed, arguments.split, decision=arguments.decision)
    endless = (sample for dialogue in drawn for sample in decompose(dialogue))
    with sample_writer(out) as write:
        for sample in islice(endless, arguments.n):
            write(sample)
    print(f"wrote {out}: {arguments.n} samples, split {arguments.split}, seed {arguments.seed}")
    return 0


@contextmanager
def reading(
    arguments: argparse.Namespace, files: list[str], layout: PromptLayout | None
) -> Iterator[Iterator[CheckedRow]]:
    """The checked rows of the files, with a progress bar on a terminal; `layout` refuses what it cannot hold."""
    config = CheckConfig(
        source=arguments.source,
        keep_prompts=arguments.keep_prompts,
        keep=tuple(arguments.keep),
        mask_names=arguments.mask,
        seed=arguments.seed,
        max_prompt_tokens=arguments.max_prompt,
    )
    reader = RowReader(*files)
    test_prompts = prompts_of(arguments.test, config) if getattr(arguments, "test", None) else frozenset()
    rows = checked_rows(reader, replace(config, max_prompt_tokens=0), test_prompts=test_prompts)
    if layout is not None:
        from rest_rl.data.prepare import prepare_row

        rows = (prepare_row(row, layout, config)[0] for row in rows)
    rows = islice(rows, arguments.limit) if arguments.limit else rows
    if not sys.stderr.isatty():
        yield rows
        return
    from rest_rl.cli.data_tables import reading_bar

    with reading_bar(reader.total_bytes) as advance:
        yield _advancing(rows, reader, advance)


def _advancing(
    rows: Iterator[CheckedRow], reader: RowReader, advance: Callable[[int, int], None]
) -> Iterator[CheckedRow]:
    for count, row in enumerate(rows, 1):
        if count % PROGRESS_EVERY == 0:
            advance(count, reader.read_bytes)
        yield row


def asked_layout(arguments: argparse.Namespace) -> PromptLayout | None:
    """How the model that was named lays out prompts, in the format that a run would take; None without a model.

    The format is said aloud on stderr.
    """
    if not arguments.tokenizer:
        if arguments.max_prompt:
            raise UserError("--max-prompt without --model", "the model that counts", "add --model DIR")
        return None
    from rest_rl.data.layout import PromptLayout, resolve_format
    from rest_rl.train.policy import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    name, why = resolve_format(arguments.format, tokenizer, keeps_prompts=arguments.keep_prompts)
    print(f"format {name}: {why}", file=sys.stderr)
    return PromptLayout(tokenizer, name)
