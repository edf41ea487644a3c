"""The command `eval`: one subcommand per benchmark, and the subcommands `diff` and `table` for evaluations."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from rest_rl.cli.env import ENV, parse_options
from rest_rl.cli.options import AsJson, Verb, verb_group
from rest_rl.errors import UserError
from rest_rl.evaluate.request import EvalRequest, option_name

EPILOG = """\
examples:
  rest-rl eval api-bank --data DIR --model runs/mine
  rest-rl eval bfcl --version v3 --model Qwen/Qwen3-1.7B --format hermes --out runs/eval-base
  rest-rl eval bfcl --version v3 --endpoint http://localhost:8000/v1 --model NAME --prompt native
  rest-rl eval bfcl --oracle                          self-test with the gold responses
  rest-rl eval tool-world --model runs/tool-world
  rest-rl eval run my_bench:BENCH --model runs/mine   your own benchmark
  rest-rl eval diff runs/eval-base runs/eval-mine     paired differences and flipped samples
  rest-rl eval table runs/eval-*                      Markdown, CSV, LaTeX and a radar plot

To resume an interrupted evaluation, pass --resume. To score recorded responses
without a model, pass --responses FILE.
"""
SHOWN_FLIPS = 10

eval_app = verb_group(epilog=EPILOG, help="Evaluate a model on a benchmark, or compare and tabulate evaluations.")


def _parameter(name: str, default: Any, about: Mapping[str, Any]) -> inspect.Parameter:
    # Typer options are generated from the fields of `EvalRequest`, so that Python and the command line share one list
    # of settings. Lists are comma-separated texts, except for --set, which repeats.
    text, kind = about["help"], type(default)
    if about.get("choices"):
        kind: Any = Literal[about["choices"]]
    if default is None or default == ():
        numbers = {"N": int, "T": float}
        kind = (numbers.get(about["metavar"], str) if "choices" not in about else kind) | None
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

    options = [own for own in fields(EvalRequest) if own.metadata and name in own.metadata.get("only_for", (name,))]
    # Options of this benchmark first, then the shared ones; the sort is stable.
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
    "Evaluate on API-Bank: 597 prompts as processed by ToolRL, with the published and a strict metric.",
    "api-bank --data DIR --model runs/mine",
)
_add_benchmark(
    "bfcl",
    "Evaluate on BFCL: non-live, live and multi-turn, with the data, executors and checkers of bfcl-eval.",
    "bfcl --version v3 --categories multi_turn --model runs/mine",
)
_add_benchmark(
    "tool-world",
    "Evaluate on the tool world: exact match on unseen tools and unseen values.",
    "tool-world --model runs/tool-world",
)
_add_benchmark(
    "office",
    "Evaluate on the office's tools: exact match on unseen tools, unseen phrasings and unseen values.",
    "office --model runs/mine",
)
_add_benchmark(
    "shop",
    "Evaluate on single turns of the shop: exact match on unseen goals and unseen values. `env shop` runs whole tasks.",
    "shop --model shop",
)
_add_benchmark(
    "env",
    "Evaluate in an environment: whole rollouts over several turns, success, and pass^k over several attempts.",
    "env shop --model runs/shop --attempts 4",
    inspect.Parameter("env", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, ENV]),
)
ADDRESS = typer.Argument(metavar="MODULE:OBJECT", help="a rest_rl.Benchmark, or a function that returns one")
_add_benchmark(
    "run",
    "Evaluate on your own benchmark, a Python object in an importable module. See docs/evaluation.md.",
    "run my_bench:BENCH --model runs/mine",
    inspect.Parameter("benchmark", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, ADDRESS]),
)


def _evaluate(values: dict[str, Any]) -> int:
    is_dry = values.pop("dry_run")
    values["changes"] = tuple(values["changes"])
    values |= {name: _parts(name, values[name]) for name in ("categories", "ids")}
    if values.get("options") is not None:
        values["options"] = parse_options(values["options"])
    if values["extra_body"] is not None:
        values["extra_body"] = _extra_body(values["extra_body"])
    # All checks that need no model come first: a mistake then does not cost the minutes of loading one.
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
        say(console, f"no response for {row['id']}: {row['error']}")
    if result.failed:
        count = "1 sample has" if len(result.failed) == 1 else f"{len(result.failed)} samples have"
        say(console, f"{count} no score; to retry, pass --resume --out {result.folder}")
    say(console, f"results: {result.folder}")
    return 1 if result.failed else 0


def _parts(name: str, text: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not parts:
        raise UserError(f"--{name} is empty", "names separated by commas", "leave the option out to select all")
    return parts


def _extra_body(text: str) -> dict[str, Any]:
    from rest_rl.data.reading import load_json

    try:
        body = load_json(text)
    except ValueError as error:
        body = str(error)
    if not isinstance(body, dict) or not isinstance(body.get("chat_template_kwargs", {}), dict):
        expected, remedy = (
            "a JSON object (chat_template_kwargs, if present, must be an object too)",
            '{"repetition_penalty": 1.0}',
        )
        raise UserError(f"--extra-body is {text!r:.80}", expected, f"write it as --extra-body '{remedy}'")
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


@eval_app.command("diff", cls=Verb, short_help="Compare two evaluations sample by sample")
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="folder of the baseline evaluation")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="folder of the evaluation to compare with it")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="folder for comparison.md, comparison.json and flips.jsonl")
    ] = None,
    json: AsJson = False,
) -> None:
    """Compare two evaluations sample by sample: paired differences, McNemar's test, flipped samples."""
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


@eval_app.command("table", cls=Verb, short_help="Tabulate evaluations as Markdown, CSV, LaTeX and a radar plot")
def table(
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="folders of evaluations")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="output folder (default: DIR if there is one, else ./tables)")
    ] = None,
) -> None:
    """Tabulate evaluations as Markdown, CSV, LaTeX (in the paper's layout), and a radar plot per benchmark."""
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
