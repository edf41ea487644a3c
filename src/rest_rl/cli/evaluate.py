"""The verb `eval`: one command per benchmark and one for a user's own; comparing and tabulating what they gave."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any, Literal

import typer

from rest_rl.cli.options import AsJson, Verb, verb_group
from rest_rl.errors import UserError
from rest_rl.evaluate.request import EvalRequest

EPILOG = """\
examples:
  rest-rl eval api-bank --data DIR --model runs/mine
  rest-rl eval bfcl --version v3 --model Qwen/Qwen3-1.7B --format hermes --out runs/eval-base
  rest-rl eval bfcl --version v3 --endpoint http://localhost:8000/v1 --model NAME --prompt native
  rest-rl eval bfcl --oracle                          the gold through the whole path: does everything work here?
  rest-rl eval tool-world --model runs/tool-world
  rest-rl eval run my_bench:BENCH --model runs/mine   your own benchmark
  rest-rl eval compare runs/eval-base runs/eval-mine  differences with intervals, McNemar's test, what flipped
  rest-rl eval table runs/eval-*                      Markdown, CSV, LaTeX and a radar figure
a killed evaluation goes on with --resume; --responses FILE scores recorded responses without a model
"""
SHOWN_FLIPS = 10
ANSWERS, ASKED, SERVER, SAMPLES, FOLDER = "who answers", "how it is asked", "a server", "which samples", "where to"

eval_app = verb_group(epilog=EPILOG)


def _option(
    name: str, kind: Any, panel: str, help: str, metavar: str | None = None, flag: str = ""
) -> inspect.Parameter:
    """An option of all benchmarks; its default is that of the field of `EvalRequest`."""
    flag = flag or f"--{name.replace('_', '-')}"
    declared = EvalRequest.__dataclass_fields__.get(name)
    default = declared.default if declared and declared.default != () else None
    shown = f"{help} (default: {default})" if isinstance(default, (int, float, str)) and default is not False else help
    option = typer.Option(flag, metavar=metavar, help=shown, rich_help_panel=panel, show_default=False)
    if kind == list[str]:
        default = []
    default = False if kind is bool else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


TEXT, NUMBER = str | None, int | None
MODEL_TEXT = "a run folder, a model or adapter folder, a hub name; a server's model (tool-world: the embedded one)"
PROMPT_TEXT = (
    "training (the default): laid out as in the model's run, or in --format; native: the model's (server's) own "
    "function calling; published: ToolRL's prompts with the texts of --prompt-from, for api-bank the benchmark's own"
)
TOKENIZER_TEXT = (
    "the model's: prompts exactly as in training are sent to /completions as token ids, instead of messages to "
    "/chat/completions; also tells the format and what fits"
)
OPTIONS = (
    _option("model", TEXT, ANSWERS, MODEL_TEXT, "DIR_OR_ID"),
    _option("endpoint", TEXT, ANSWERS, "an OpenAI-compatible server that holds --model", "URL"),
    _option("vllm", bool, ANSWERS, "generate with vLLM instead of transformers"),
    _option("responses", TEXT, ANSWERS, 'score recorded responses: JSONL of {"id", "response"}', "FILE"),
    _option("oracle", bool, ANSWERS, "answer with the gold: a self-test of the whole path"),
    _option("changes", list[str], ANSWERS, "a key of [model], as in a run: model.dtype=bfloat16", "A.B=C", "--set"),
    _option("prompt", Literal["training", "native", "published"] | None, ASKED, PROMPT_TEXT),
    _option("prompt_from", TEXT, ASKED, "rows as ToolRL published them, such as rlla_sft.json", "FILE"),
    _option("format", TEXT, ASKED, "how the model writes calls (default: as its run, else its template)", "F"),
    _option("max_new_tokens", NUMBER, ASKED, "per response (default: 4096; tool world: 160)", "N"),
    _option("context", NUMBER, ASKED, "tokens that the model holds (default: what it says)", "N"),
    _option("batch_size", NUMBER, ASKED, "of a local model (default: 16; vLLM 256, BFCL 64)", "N"),
    _option("concurrency", int, SERVER, "requests at once", "N"),
    _option("timeout", float, SERVER, "seconds", "S"),
    _option("retries", int, SERVER, "per request", "N"),
    _option("requests_per_minute", NUMBER, SERVER, "at most (default: no limit)", "N"),
    _option("api_key_env", str, SERVER, "the environment variable that holds the key", "NAME"),
    _option("tokenizer", TEXT, SERVER, TOKENIZER_TEXT, "DIR_OR_ID"),
    _option("extra_body", TEXT, SERVER, "an object whose fields go into every request", "JSON"),
    _option("categories", TEXT, SAMPLES, "groups of samples, as the tables name them", "A,B"),
    _option("limit", NUMBER, SAMPLES, "the first N samples of each category", "N"),
    _option("ids", TEXT, SAMPLES, "these samples only", "A,B"),
    _option("out", TEXT, FOLDER, "the evaluation's folder (default: runs/eval-BENCHMARK-MODEL)", "DIR"),
    _option("name", TEXT, FOLDER, "what tables call the model (default: its path)", "NAME"),
    _option("resume", bool, FOLDER, "ask for what is missing or failed in the folder"),
    _option("dry_run", bool, FOLDER, "show one prompt and what fits, ask for nothing"),
)


def _add_benchmark(name: str, help: str, example: str, *own: inspect.Parameter) -> None:
    """Add the command of a benchmark: its own options, then those of all."""

    def command(**values: Any) -> int:
        return _evaluate({"benchmark": name, **values})

    parameters = [*own, *OPTIONS]
    command.__doc__ = help
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    short = help.partition(".")[0]
    epilog = f"example: rest-rl eval {example}\n"
    eval_app.command(
        name, cls=Verb, short_help=short[0].lower() + short[1:] if name == "run" else short, epilog=epilog
    )(command)


OF_BENCHMARK = "the benchmark"
_add_benchmark(
    "api-bank",
    "API-Bank: 597 prompts as ToolRL processed them, by the published metric and by a strict one.",
    "api-bank --data DIR --model runs/mine",
    _option("data", TEXT, OF_BENCHMARK, "folder of level-{1,2,3}-api_processed.json", "DIR"),
)
_add_benchmark(
    "bfcl",
    "BFCL: non-live, live and multi-turn, by bfcl-eval's own data, executors and checkers.",
    "bfcl --version v3 --categories multi_turn --model runs/mine",
    _option("version", Literal["v3", "v4"], OF_BENCHMARK, "v3: bfcl-eval 2025.6.14, the paper's; v4: 2026.3.23"),
)
_add_benchmark(
    "tool-world",
    "Tool world: exact match on unseen tools and unseen values.",
    "tool-world --model runs/tool-world",
    _option("prompts", int, OF_BENCHMARK, "per split", "N"),
    _option("seed", int, OF_BENCHMARK, "of the prompts", "S"),
    _option("decision", Literal["reasoning", "call"], OF_BENCHMARK, "where it is decided what to call, as in [data]"),
)
ADDRESS = typer.Argument(metavar="MODULE:OBJECT", help="a rest_rl.Benchmark, or what makes one: my_bench:BENCH")
_add_benchmark(
    "run",
    "Your own benchmark, a Python object of a module here or on the Python path. docs/evaluation.md has an example.",
    "run my_bench:BENCH --model runs/mine",
    inspect.Parameter("benchmark", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, ADDRESS]),
)


def _evaluate(values: dict[str, Any]) -> int:
    """Ask, judge, write and show; returns 1 if a sample was left without a response."""
    from rich.console import Console

    from rest_rl.cli.terminal import Screen, say
    from rest_rl.evaluate.run import preview, run_request

    console = Console()
    is_dry = values.pop("dry_run")
    values["changes"] = tuple(values["changes"])
    values |= {name: _parts(name, values[name]) for name in ("categories", "ids")}
    if values["extra_body"] is not None:
        values["extra_body"] = _extra_body(values["extra_body"])
    request = EvalRequest(**values, command=tuple(sys.argv))
    if request.source == "checkpoint" and "--debug" not in sys.argv:
        from rest_rl.train.policy import quiet_loading

        quiet_loading()
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
    """The parts of a list with commas."""
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
    """A table and its notes."""
    from rich.console import Console
    from rich.markup import escape

    from rest_rl.cli.terminal import show_table

    console = Console()
    show_table(escape(table.title), table.header, table.rows, console)
    for note in table.notes:
        console.print(note, highlight=False, markup=False)


@eval_app.command("compare", cls=Verb, short_help="two evaluations: paired differences, McNemar's test, what flipped")
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="an evaluation's folder")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="another one's")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="write comparison.md, .json and flips.jsonl")] = None,
    json: AsJson = False,
) -> None:
    """Compare two evaluations: paired differences, McNemar's test, the samples that flipped."""
    from rich.console import Console

    from rest_rl.cli.terminal import say
    from rest_rl.evaluate.compare import FLIPS, compare, write_comparison
    from rest_rl.evaluate.tables import comparison_tables
    from rest_rl.jsonl import as_json

    found = compare(base, tuned)
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
        say(Console(), str(line))
