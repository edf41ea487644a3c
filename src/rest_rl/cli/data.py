"""The command `data`: check, convert, show, split, mix and generate training data."""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rest_rl.cli.options import AsJson, Verb, verb_group
from rest_rl.errors import UserError

if TYPE_CHECKING:
    from rest_rl.data.build import Mix
    from rest_rl.data.check import CheckedRow, DataReport
    from rest_rl.data.layout import PromptLayout
    from rest_rl.data.samples import ToolSample
    from rest_rl.response import Turn
    from rest_rl.runlog import Observer

EPILOG = """\
examples:
  rest-rl data check my.jsonl
  rest-rl data check train.parquet --test test.jsonl --json --strict
  rest-rl data convert rlla_sft.json --out train.jsonl
  rest-rl data convert OWNER/NAME:train --out train.parquet --source messages
  rest-rl data show my.jsonl 17 --model Qwen/Qwen3-0.6B
  rest-rl data split train.jsonl --test 0.1 --seed 0
  rest-rl data world --out world.jsonl -n 1000
  rest-rl data office --out office.jsonl -n 1000
  rest-rl data shop --out shop.jsonl -n 1000
  rest-rl data build toolrl-4k --out mix.parquet --seed 0

A FILE is one of: a .jsonl, .ndjson, .json or .parquet file (text files also
with .gz), a folder of such files, a folder written by datasets.save_to_disk,
or a hub dataset, as OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG/SPLIT.
"""
SHAPES = "auto, samples, messages, toolace, xlam, api_bank, api_bank_train, toolrl, or package.module:OBJECT"
SHOWN_PER_REASON = 10
STYLES = {"rejected": "red", "repaired": "yellow", "noted": "dim"}

group = verb_group(epilog=EPILOG, help="Check data files, and prepare them for training.")
Files = Annotated[list[str], typer.Argument(metavar="FILE", help="data files, folders or hub datasets")]
File = Annotated[str, typer.Argument(metavar="FILE", help="a data file, a folder or a hub dataset")]
OutFile = Annotated[str, typer.Option("--out", metavar="OUT", help="file to write: NAME.jsonl or NAME.parquet")]
Count = Annotated[int, typer.Option("-n", metavar="N", help="number of samples")]
SequenceSeed = Annotated[int, typer.Option("--seed", metavar="S", help="seed of the sequence")]
Strict = Annotated[bool, typer.Option("--strict", help="exit with 1 if anything is rejected or no sample is left")]
TestFile = Annotated[
    str | None, typer.Option("--test", metavar="FILE", help="test file; reject prompts that it also contains")
]
Option = partial(typer.Option, rich_help_panel="Reading")


@dataclass(frozen=True)
class Reading:
    """The file-reading options shared by the commands `check`, `convert`, `show` and `split`."""

    source: Annotated[str, Option(metavar="S", help=f"row shape: {SHAPES}")] = "auto"
    keep_prompts: Annotated[bool, Option("--keep-prompts", help="keep published prompts word for word")] = False
    allow: Annotated[
        list[str] | None, Option(metavar="REASON", help="only note findings with this reason; repeat it for more")
    ] = None
    max_prompt_tokens: Annotated[
        int, Option("--max-prompt-tokens", metavar="N", help="reject prompts with more than N tokens (0: no limit)")
    ] = 0
    max_response_tokens: Annotated[
        int | None,
        Option(
            "--max-completion-length",
            metavar="N",
            help="reject prompts that leave fewer than N tokens for the response (default: as in training)",
        ),
    ] = None
    model: Annotated[
        str | None, Option("--model", "--tokenizer", metavar="DIR", help="also check the samples for this model")
    ] = None
    format: Annotated[str, Option(metavar="F", help="tool-call format (auto: from the chat template)")] = "auto"
    limit: Annotated[int, Option(metavar="N", help="read only the first N rows (0: all)")] = 0
    mask_names: Annotated[
        float, Option("--mask-names", metavar="SHARE", help="share of samples whose tool names are randomized")
    ] = 0.0
    seed: Annotated[int, Option(metavar="S", help="seed of masking and splitting")] = 0

    def layout(self) -> PromptLayout | None:
        # Returns the prompt layout of --model, in the format that training would use; None without --model.
        from rest_rl.formats import get_format

        if self.model is None:
            limits = {"prompt-tokens": self.max_prompt_tokens, "completion-length": self.max_response_tokens}
            for option, is_given in limits.items():
                if is_given:
                    raise UserError(f"--max-{option} needs a tokenizer to count with", remedy="pass --model")
            if self.format != "auto":
                get_format(self.format)
            return None
        from rest_rl.data.layout import PromptLayout, resolve_format
        from rest_rl.evaluate.origin import resolve_origin

        path = resolve_origin(self.model).path  # before the slow imports below, so that a wrong --model fails at once
        from rich.console import Console

        from rest_rl.cli.terminal import Screen
        from rest_rl.config import ModelTable
        from rest_rl.train.policy import load_policy_tokenizer, policy_context_length

        tokenizer = load_policy_tokenizer(ModelTable(path=path), Screen(Console(stderr=True)))
        name, why = resolve_format(self.format, tokenizer, keeps_prompts=self.keep_prompts)
        print(f"format {name}: {why}", file=sys.stderr)
        return PromptLayout(tokenizer, name, context=policy_context_length(ModelTable(path=path), tokenizer))

    def settings(self, layout: PromptLayout | None, test: str | None = None) -> dict[str, Any]:
        # Returns the arguments of `check_data` and `read_rows`, with a progress bar on a terminal.
        settings = {**vars(self), "allow": self.allow or (), "layout": layout, "test": test}
        del settings["model"], settings["format"]
        if self.max_response_tokens is None:
            from rest_rl.config import default_response_limit

            settings["max_response_tokens"] = default_response_limit(layout.context) if layout else 1
        return {**settings, "observer": reading_observer()}


def reading_observer() -> Observer:
    # Shows a progress bar on a terminal.
    from rest_rl.runlog import SILENT

    if not sys.stderr.isatty():
        return SILENT
    from rich.console import Console

    from rest_rl.cli.terminal import Screen

    return Screen(Console(stderr=True))


def add(example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a function a subcommand of `data`; a parameter `reading` adds `Reading`."""
    # Typer builds options from signatures and has no way to share them. `call` therefore pretends to have the
    # parameters of the function and the fields of `Reading`, and packs the latter into one object.

    def add_verb(verb: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(verb, eval_str=True, globals=globals()).parameters
        shared = inspect.signature(Reading, eval_str=True).parameters if "reading" in own else {}

        def call(**options: Any) -> Any:
            given = {name: options.pop(name) for name in shared}
            return verb(**options, **({"reading": Reading(**given)} if shared else {}))

        every = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own.values(), *shared.values()) if p.name != "reading"]
        call.__signature__ = inspect.Signature(every)
        text = inspect.cleandoc(verb.__doc__ or "")
        epilog = f"example: rest-rl data {verb.__name__} {example}\n"
        group.command(verb.__name__, cls=Verb, help=text, short_help=text.split("\n")[0], epilog=epilog)(call)
        return verb

    return add_verb


@add("my.jsonl --strict")
def check(
    files: Files,
    reading: Reading,
    test: TestFile = None,
    as_json: AsJson = False,
    strict: Strict = False,
    list_all: Annotated[
        bool, typer.Option("--all", help="list all findings instead of the first ten per reason")
    ] = False,
) -> int:
    """Check every row, and report which are kept, repaired or rejected, and why."""
    from rest_rl.data.load import check_data

    report = check_data(*files, **reading.settings(reading.layout(), test))
    require_rows(report, files)
    if not as_json:
        show_report(report, len(report.findings) if list_all else SHOWN_PER_REASON)
    return finish(report, {} if as_json else None, strict)


@add("rlla_sft.json --out train.jsonl")
def convert(
    files: Files, reading: Reading, out: OutFile, test: TestFile = None, as_json: AsJson = False, strict: Strict = False
) -> int:
    """Convert files to samples in JSONL or Parquet; rejected rows go to a file next to the output."""
    from rest_rl.data.check import DataReport
    from rest_rl.data.load import read_rows
    from rest_rl.data.write import check_output, rejected_path, rejected_writer, sample_writer

    path, report = Path(out), DataReport()
    check_output(path, files)
    rows = read_rows(files, **reading.settings(reading.layout(), test))
    with rejected_writer(path) as write_rejected, sample_writer(path) as write:
        for row in rows:
            report.add(row)
            for sample in row.samples:
                write(sample)
            write_rejected(row)
        require_rows(report, files)  # within the block, so that an error leaves no empty file
    if not as_json:
        show_report(report, 0)
        rejected = rejected_path(path)
        print(f"wrote {path}" + (f" and {rejected}" if rejected.exists() else ""))
    return finish(report, {"out": str(path)} if as_json else None, strict)


@add("my.jsonl 17 --model Qwen/Qwen3-0.6B")
def show(
    file: File,
    reading: Reading,
    number: Annotated[int, typer.Argument(metavar="N", help="number of the row, counted from 1")] = 1,
    test: TestFile = None,
) -> None:
    """Show the prompts and the gold of one row."""
    from rest_rl.data.load import read_rows

    layout, count = reading.layout(), 0
    for count, row in enumerate(read_rows(file, **reading.settings(layout, test)), 1):
        if count == number:
            show_row(row, layout, reading.format)
            return
    raise UserError(f"{file} has no row {number}, only {count} {'row' if count == 1 else 'rows'}")


@add("train.jsonl --test 0.1 --seed 0")
def split(
    file: File,
    reading: Reading,
    test: Annotated[float, typer.Option(metavar="SHARE", help="share of samples for the test file, such as 0.1")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="folder for the two files (default: that of FILE)")
    ] = None,
) -> None:
    """Split a file into train and test; dialogues and equal prompts stay together."""
    from rest_rl.data.check import DataReport
    from rest_rl.data.load import read_rows
    from rest_rl.data.split import Split
    from rest_rl.data.write import check_output, sample_writer

    source = Path(file)
    folder = Path(out) if out else source.parent if source.exists() else Path()
    stem = source.name.removesuffix(".gz")
    outs = {side: folder / f"{Path(stem).stem or stem}.{side}.jsonl" for side in ("train", "test")}
    for path in outs.values():
        check_output(path, [file])
    settings, report, samples = reading.settings(reading.layout()), DataReport(), dict.fromkeys(outs, 0)
    # First pass: groups and sides, from digests. Second pass: the samples. Neither keeps the file in memory.
    sides = Split(read_rows(file, **settings), test, reading.seed)
    with ExitStack() as stack:
        writers = {side: stack.enter_context(sample_writer(path)) for side, path in outs.items()}
        for row in read_rows(file, **settings):
            report.add(row)
            for sample in row.samples:
                side = "test" if sides.is_test(row, sample) else "train"
                writers[side](sample)
                samples[side] += 1
    for side, path in outs.items():
        print(f"{path}: {count_of(samples[side], 'sample')}")
    print(
        format_counts(report)
        + (f"; for the reasons, run: rest-rl data check {file}" if report.kept < report.rows else "")
    )


@add("--out world.jsonl -n 1000 --split unseen_tools")
def world(
    out: OutFile,
    n: Count = 1000,
    seed: SequenceSeed = 0,
    split: Annotated[
        Literal["train", "unseen_tools", "unseen_values"], typer.Option(help="split of the tool world")
    ] = "train",
    decision: Annotated[
        Literal["reasoning", "call"], typer.Option(help="where the model decides what to call")
    ] = "reasoning",
) -> None:
    """Generate samples of the embedded tool world."""
    from rest_rl.config import EMBEDDED

    _write_world(EMBEDDED, out, n, seed, split, decision)


@add("--out office.jsonl -n 1000 --split unseen_phrasings")
def office(
    out: OutFile,
    n: Count = 1000,
    seed: SequenceSeed = 0,
    split: Annotated[
        Literal["train", "unseen_tools", "unseen_phrasings", "unseen_values"], typer.Option(help="split of the office")
    ] = "train",
) -> None:
    """Generate samples with the tools of an office, in plain English."""
    _write_world("office", out, n, seed, split)


@add("--out shop.jsonl -n 1000 --split unseen_values")
def shop(
    out: OutFile,
    n: Count = 1000,
    seed: SequenceSeed = 0,
    split: Annotated[
        Literal["train", "unseen_goals", "unseen_values"], typer.Option(help="split of the shop")
    ] = "train",
) -> None:
    """Generate samples of the shop: the turns of tasks in which later calls need earlier results."""
    _write_world("shop", out, n, seed, split)


def _write_world(
    path: str, out: str, n: int, seed: int, split: str, decision: Literal["reasoning", "call"] = "reasoning"
) -> None:
    from rest_rl.data.samples import iterate_samples
    from rest_rl.data.worlds import open_world
    from rest_rl.data.write import check_output, sample_writer

    check_output(Path(out), [])
    if n < 1:
        raise UserError(f"-n is {n}", "at least 1")
    drawn = open_world(path, decision).dialogues(seed, split)
    with sample_writer(Path(out)) as write:
        for sample in islice(iterate_samples(drawn), n):
            write(sample)
    print(f"wrote {out}: {count_of(n, 'sample')}, split {split}, seed {seed}")


@add("toolrl-4k --out mix.parquet --seed 0")
def build(
    recipe: Annotated[Literal["toolrl-4k"], typer.Argument(metavar="RECIPE", help="toolrl-4k")],
    out: OutFile,
    toolace: Annotated[
        str | None, typer.Option(metavar="FILE", help="rows of ToolACE (default: Team-ACE/ToolACE on the hub)")
    ] = None,
    xlam: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="rows of xLAM (default: Salesforce/xlam-function-calling-60k on the hub)"),
    ] = None,
    hammer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="rows with masked names (default: other rows of xLAM, masked here)"),
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(metavar="A,H,X", help="samples from ToolACE, Hammer and xLAM (default: 2000,1000,1000)"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="seed of the draw, the masked names and the order")] = 0,
    as_json: AsJson = False,
) -> None:
    """Build a mix like ToolRL's 4,000 rows: 2,000 samples of ToolACE, 1,000 of Hammer (masked names), 1,000 of xLAM.

    A sample is one assistant turn, as a row of ToolRL is. Which rows ToolRL and the ResT paper drew is not known: the
    mix follows their recipe but does not have their rows. ToolRL's published train.parquet is the closest to them.
    """
    from rest_rl.data.build import TOOLRL_4K, build_toolrl_4k
    from rest_rl.data.write import check_output, sample_writer

    path, sources = Path(out), {"toolace": toolace, "xlam": xlam, "hammer": hammer}
    given: dict[str, Any] = {name: source for name, source in sources.items() if source}
    check_output(path, given.values())
    if counts is not None:
        sizes = counts.split(",")
        if len(sizes) != len(TOOLRL_4K) or not all(size.strip().isdecimal() for size in sizes):
            raise UserError(f"--counts is {counts}", "three whole numbers, such as 2000,1000,1000")
        given["counts"] = {part: int(size) for part, size in zip(TOOLRL_4K, sizes, strict=True)}
    mix = build_toolrl_4k(**given, seed=seed, observer=reading_observer())
    with sample_writer(path) as write:
        for sample in mix.samples:
            write(sample)
    show_mix(mix, path, as_json=as_json)


def show_mix(mix: Mix, path: Path, *, as_json: bool) -> None:
    from rest_rl import jsonl
    from rest_rl.data.check import format_turn_mix, warn_about_answers

    turns: Counter[Turn] = Counter(sample.gold.turn for sample in mix.samples)
    if as_json:
        sources = [source.to_json() for source in mix.sources]
        told = {"out": str(path), "samples": len(mix.samples), "turns": turns, "sources": sources}
        print(jsonl.as_json(told, indent=2))
        return
    for source in mix.sources:
        drawn = " and ".join(f"{count} for the part {part}" for part, count in source.drawn.items())
        print(f"{source.source}: {drawn}, out of {count_of(source.usable, 'usable sample')}")
        print(f"not usable: {source.repeated} with a repeated prompt, {source.overlapping} already in another part")
        show_report(source.rows, 0)
        print()
    print(f"wrote {path}: {count_of(len(mix.samples), 'sample')}, {format_turn_mix(turns)}")
    if warning := warn_about_answers(turns):
        print(f"warning: {warning}")
    print("note: which rows ToolRL and the ResT paper drew is not known; ToolRL's train.parquet is the closest")


def require_rows(report: DataReport, files: Sequence[str]) -> None:
    # Raise UserError if the input has no rows, which is most likely a wrong path or an incomplete file.
    if not report.rows:
        raise UserError(f"{', '.join(files)} has no rows", remedy="check that it is the right file")


def finish(report: DataReport, printed: Mapping[str, Any] | None, strict: bool) -> int:
    # If `printed` is not None, print it merged with the report, as JSON. Return the exit code.
    from rest_rl.jsonl import as_json

    if printed is not None:
        print(as_json({**report.to_json(), **printed}, indent=2))
    if strict and not report.samples:
        print(f"no samples are left ({count_of(report.rows, 'row')} read)", file=sys.stderr)
    return int(strict and (not report.samples or bool(report.rejected or report.lost_turns)))


def format_counts(report: DataReport) -> str:
    lost = f" ({report.lost_turns} of them lost turns)" if report.lost_turns else ""
    repaired = f"{report.repaired} repaired{lost}"
    rows = f"{count_of(report.rows, 'row')}: {report.kept} kept, {repaired}, {report.rejected} rejected"
    return f"{rows}; {count_of(report.samples, 'sample')}"


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def show_report(report: DataReport, per_reason: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from rest_rl.cli.terminal import say
    from rest_rl.data.check import format_turn_mix, warn_about_answers
    from rest_rl.data.reasons import REASONS

    console = Console()
    shapes = ", ".join(f"{name} ({count_of(count, 'row')})" for name, count in report.sources.items()) or "unknown"
    mix = f": {format_turn_mix(report.turns)}" if report.samples else ""
    say(console, f"shape: {shapes}\n{format_counts(report)}{mix}")
    if warning := warn_about_answers(report.turns):
        say(console, f"warning: {warning}", style="yellow")
    known = [reason for reason in REASONS if reason in report.reasons]
    columns = ("reason", "what happened", "rows", "first rows", "meaning")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True  # a cut reason could not be passed to --allow
    for reason in known:
        happened = ", ".join(sorted(report.outcomes[reason]))
        first = ", ".join(map(str, report.first_rows[reason]))
        count, meaning, style = str(report.reasons[reason]), REASONS[reason].meaning, STYLES.get(happened, "red")
        table.add_row(reason, happened, count, first, meaning, style=style)
    if known:
        console.print(table)
    for reason in known if per_reason else ():
        say(console, f"\n{reason}: {REASONS[reason].remedy}", style="bold")
        shown = [located for located in report.findings if located.finding.reason == reason][:per_reason]
        for file, row, found in shown:
            name = f"{file}, row {row}" if len(report.files) > 1 else f"row {row}"
            say(console, f"  {name}: {found.detail}")
        if (left := report.occurrences[reason] - len(shown)) > 0:
            say(console, f"  and {left} more; list them with --all or --json")


def show_row(row: CheckedRow, layout: PromptLayout | None, tool_format: str) -> None:
    # Show the findings of a row, then the prompt and the colored demonstration of each sample. Without a layout, tools
    # and messages are shown as they are.
    from rich.console import Console
    from rich.markup import escape

    from rest_rl.cli.terminal import legend, say, show_colored, split_at_spans
    from rest_rl.data.check import describe_outcome
    from rest_rl.data.reasons import REASONS
    from rest_rl.data.samples import to_json
    from rest_rl.formats import get_format
    from rest_rl.train.prompts import render_demonstration

    console = Console()
    say(console, f"row {row.number} of {row.file}: {row.status}, shape {row.source or 'unknown'}")
    for found in row.findings:
        line = f"{describe_outcome(row, found)}: {found.reason}: {found.detail}; {REASONS[found.reason].remedy}"
        say(console, line, style=STYLES[found.severity])
    if not row.samples:
        is_text = isinstance(row.raw, str)
        say(console, row.raw if is_text else json.dumps(row.raw, ensure_ascii=False, indent=2, default=str))
        return
    # Without a model there is no chat template to follow; the demonstration then uses a default format.
    chosen = layout.format if layout else get_format("hermes" if tool_format == "auto" else tool_format)
    how = "" if layout or tool_format != "auto" else " (the default without --model)"
    for sample in row.samples:
        console.rule(escape(f"{sample.id} ({sample.kind}): prompt"), align="left", style="dim")
        say(console, layout.render(sample) if layout else plain_prompt(sample))
        console.rule(f"demonstration in {chosen.name} format{how}", align="left", style="dim")
        try:
            text = render_demonstration(sample, chosen, thinks=not (layout and layout.closes_think))
        except ValueError as error:
            say(
                console,
                f"this format cannot write the demonstration, so supervised training skips it: {error}",
                style="dim",
            )
            say(console, json.dumps(to_json(sample)["gold"], ensure_ascii=False))
            continue
        if sample.preamble and sample.preamble not in text:
            say(console, f"left out, because the format allows no text next to calls: {sample.preamble}")
        show_colored(split_at_spans(text, chosen.parse(text).spans), console)
    console.print(legend())


def plain_prompt(sample: ToolSample) -> str:
    as_text = partial(json.dumps, ensure_ascii=False)
    lines = [] if sample.tools_in_prompt else [f"tool: {as_text(tool.get('function', tool))}" for tool in sample.tools]
    for message in sample.messages:
        lines.append(f"{message['role']}: {message.get('content') or ''}".rstrip())
        lines += [f"  calls {as_text(call['function'])}" for call in message.get("tool_calls") or ()]
    return "\n".join(lines)
