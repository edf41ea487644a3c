"""The verb `eval`: one command per benchmark and one for a user's own; comparing and tabulating what they gave."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from rest_rl.cli.options import AsJson, Verb, verb_group
from rest_rl.errors import UserError
from rest_rl.evaluate.request import EvalRequest, option_name

EPILOG = """\
examples:
  rest-rl eval api-bank --data DIR --model runs/mine
  rest-rl eval bfcl --version v3 --model Qwen/Qwen3-1.7B --format hermes --out runs/eval-base
  rest-rl eval bfcl --version v3 --endpoint http://localhost:8000/v1 --model NAME --prompt native
  rest-rl eval bfcl --oracle                          the gold through the whole path: does everything work here?
  rest-rl eval tool-world --model runs/tool-world
  rest-rl eval run my_bench:BENCH --model runs/mine   your own benchmark
  rest-rl eval diff runs/eval-base runs/eval-mine  differences with intervals, McNemar's test, what flipped
  rest-rl eval table runs/eval-*                      Markdown, CSV, LaTeX and a radar figure
a killed evaluation goes on with --resume; --responses FILE scores recorded responses without a model
"""
SHOWN_FLIPS = 10

eval_app = verb_group(epilog=EPILOG)


def _parameter(name: str, default: Any, about: Mapping[str, Any]) -> inspect.Parameter:
    """A field of `EvalRequest` as an option; lists are texts with commas, but for --set."""
    text, kind = about["help"], type(default)
    if about.get("choices"):
        kind: Any = Literal[about["choices"]]
    if default is None or default == ():
        kind = (int if about["metavar"] == "N" else str if "choices" not in about else kind) | None
        default = None
    elif kind is not bool:
        text += f" (default: {default})"
    if name == "changes":
        kind, default = list[str], []
    panel = {"rich_help_panel": about["panel"], "show_default": False}
    declared = typer.Option(option_name(name), metavar=about["metavar"], help=text, **panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


DRY_RUN = {"panel": "Output", "help": "show the first prompt and which prompts fit; do not evaluate", "metavar": None}


def _add_benchmark(name: str, help: str, example: str, *arguments: inspect.Parameter) -> None:
    def command(**values: Any) -> int:
        return _evaluate({"benchmark": name, **values})

    options = [own for own in fields(EvalRequest) if own.metadata.get("only_for", name) == name and own.metadata]
    options.sort(key=lambda own: "only_for" not in own.metadata)
    parameters = [*arguments, *(_parameter(own.name, own.default, own.metadata) for own in options)]
    parameters.append(_parameter("dry_run", False, DRY_RUN))
    command.__doc__ = help
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    epilog = f"example: rest-rl eval {example}\n"
    eval_app.command(name, cls=Verb, short_help=help.partition(". ")[0].rstrip("."), epilog=epilog)(command)


_add_benchmark(
    "api-bank",
    "API-Bank: 597 prompts as ToolRL processed them, by the published metric and by a strict one.",
    "api-bank --data DIR --model runs/mine",
)
_add_benchmark(
    "bfcl",
    "BFCL: non-live, live and multi-turn, by bfcl-eval's own data, executors and checkers.",
    "bfcl --version v3 --categories multi_turn --model runs/mine",
)
_add_benchmark(
    "tool-world",
    "Tool world: exact match on unseen tools and unseen values.",
    "tool-world --model runs/tool-world",
)
ADDRESS = typer.Argument(metavar="MODULE:OBJECT", help="a rest_rl.Benchmark, or what makes one: my_bench:BENCH")
_add_benchmark(
    "run",
    "Your own benchmark, a Python object of a module here or on the Python path. docs/evaluation.md has an example.",
    "run my_bench:BENCH --model runs/mine",
    inspect.Parameter("benchmark", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, ADDRESS]),
)


def _evaluate(values: dict[str, Any]) -> int:
    is_dry = values.pop("dry_run")
    values["changes"] = tuple(values["changes"])
    values |= {name: _parts(name, values[name]) for name in ("categories", "ids")}
    if values["extra_body"] is not None:
        values["extra_body"] = _extra_body(values["extra_body"])
    request = EvalRequest(**values, command=tuple(sys.argv))
    if request.source == "checkpoint":
        from rest_rl.evaluate.origin import resolve_origin

        resolve_origin(request.checkpoint)  # before anything heavy is loaded
    from rich.console import Console

    from rest_rl.cli.terminal import Screen, say
    from rest_rl.evaluate.run import preview, run_request

    console = Console()
    if request.source == "checkpoint" and "--debug" not in sys.argv:
        from rest_rl.train.policy import silence_transformers

        silence_transformers()
    if is_dry:
        shown = preview(request, Screen(console))
        for title, text in shown.parts:
            console.rule(title or shown.identity, align="left", style="dim")
            say(console, text)
        if shown.tokens is not None:
            console.rule(f"{shown.tokens} tokens", align="left", style="dim")
        return 0
    result = run_request(request, Screen(console))
    _show_summary(result.summary)
    for row in result.failed[:10]:
        say(console, f"no response to {row['id']}: {row['error']}")
    if result.failed:
        again = f"ask for them again with --resume --out {result.folder}"
        say(console, f"{len(result.failed)} samples are not scored; {again}")
    say(console, f"written to {result.folder}")
    return 1 if result.failed else 0


def _parts(name: str, text: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not parts:
        raise UserError(f"--{name} without a name", "some with commas between them", "leave it out for all")
    return parts


def _extra_body(text: str) -> dict[str, Any]:
    from rest_rl.data.reading import load_json

    try:
        body = load_json(text)
    except ValueError as error:
        body = str(error)
    if not isinstance(body, dict) or not isinstance(body.get("chat_template_kwargs", {}), dict):
        expected, remedy = "a JSON object (and so its chat_template_kwargs)", '{"repetition_penalty": 1.0}'
        raise UserError(f"--extra-body {text:.80}", expected, f"write --extra-body '{remedy}'")
    return body


def _show_summary(summary: Any) -> None:
    from rest_rl.evaluate.tables import terminal_table

    _show(terminal_table(summary))


def _show(table: Any) -> None:
    from rich.console import Console
    from rich.markup import escape

    from rest_rl.cli.terminal import show_table

    console = Console()
    show_table(escape(table.title), table.header, table.rows, console)
    for note in table.notes:
        console.print(note, highlight=False, markup=False)


@eval_app.command("diff", cls=Verb, short_help="two evaluations: paired differences, McNemar's test, what flipped")
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="an evaluation's folder")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="another one's")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="write comparison.md, .json and flips.jsonl")] = None,
    json: AsJson = False,
) -> None:
    """Compare two evaluations: paired differences, McNemar's test, the samples that flipped."""
    from rich.console import Console

    from rest_rl.cli.terminal import say
    from rest_rl.evaluate.compare import FLIPS, compare_evaluations, write_comparison
    from rest_rl.evaluate.tables import comparison_tables
    from rest_rl.jsonl import as_json

    found = compare_evaluations(base, tuned)
    if out:
        write_comparison(found, out)
    if json:
        print(as_json(found.to_json(), indent=2))
        return
    for table in comparison_tables(found.to_json()):
        _show(table)
    console = Console()
    for flip in found.flips[:SHOWN_FLIPS]:
        reasons = f"{flip.base_reason or 'right'} → {flip.tuned_reason or 'right'}"
        say(console, f"{flip.direction} {flip.id}: {reasons}")
    if len(found.flips) > SHOWN_FLIPS:
        say(console, f"{len(found.flips)} samples flipped in all; --out DIR writes them to {FLIPS}")


@eval_app.command(
    "table", cls=Verb, short_help="evaluations as Markdown, CSV, LaTeX in the paper's layout, a radar figure"
)
def table(
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="evaluations' folders")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="where to (default: the folder of a single one, else ./tables)")
    ] = None,
) -> None:
    """Tabulate evaluations: Markdown, CSV, LaTeX in the paper's layout, a radar figure for each benchmark."""
    from rich.console import Console

    from rest_rl.cli.terminal import say
    from rest_rl.evaluate.compare import read_evaluation
    from rest_rl.evaluate.radar import draw_radars
    from rest_rl.evaluate.tables import write_tables

    summaries = [read_evaluation(folder).summary for folder in folders]
    target = out or (folders[0] if len(summaries) == 1 else "tables")
    for summary in summaries:
        _show_summary(summary)
    for line in (*write_tables(summaries, target), *draw_radars(summaries, target)):
        say(Console(), f"wrote {line}")
