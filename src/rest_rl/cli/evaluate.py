"""The verb `eval`: BFCL, API-Bank and the tool world, one command each; comparing and tabulating what they gave."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

EPILOG = """\
examples:
  rest-rl eval api-bank --data DIR --model runs/mine
  rest-rl eval bfcl --version v3 --model Qwen/Qwen3-1.7B --format hermes --out runs/eval-base
  rest-rl eval bfcl --version v3 --endpoint http://localhost:8000/v1 --model NAME --prompt native
  rest-rl eval bfcl --oracle                          the gold through the whole path: does everything work here?
  rest-rl eval tool-world --model runs/tool-world
  rest-rl eval compare runs/eval-base runs/eval-mine  differences with intervals, McNemar's test, what flipped
  rest-rl eval table runs/eval-*                      Markdown, CSV, LaTeX and a radar figure
a killed evaluation goes on with --resume; --responses FILE scores recorded responses without a model
"""


def add_eval(verbs: Any) -> None:
    """Add the verb and its own verbs to the parser."""
    verb = verbs.add_parser(
        "eval",
        help="evaluate on BFCL, API-Bank or the tool world; compare, tabulate",
        description="Evaluate a model by the benchmarks' own checkers, in the format that it was trained in.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(verb))
    _add_api_bank(actions)
    _add_bfcl(actions)
    _add_tool_world(actions)
    _add_compare(actions)
    _add_table(actions)


def run_eval(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    from rest_rl.cli import eval_run as cli_eval_run
    from rest_rl.cli import eval_tables as cli_eval_tables

    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "compare": cli_eval_tables.compare,
        "table": cli_eval_tables.table,
    }
    return actions.get(arguments.action, cli_eval_run.evaluate)(arguments)


def _add(actions: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: rest-rl eval {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_api_bank(actions: Any) -> None:
    text = "API-Bank: 597 prompts as ToolRL processed them, by the published metric and by a strict one"
    verb = _add(actions, "api-bank", text, "api-bank --data DIR --model runs/mine")
    verb.add_argument("--data", required=True, metavar="DIR", help="folder of level-{1,2,3}-api_processed.json")
    _add_run_options(verb, "levels, such as 1,2", published=True)


def _add_bfcl(actions: Any) -> None:
    text = "BFCL: non-live, live and multi-turn, by bfcl-eval's own data, executors and checkers"
    verb = _add(actions, "bfcl", text, "bfcl --version v3 --categories multi_turn --model runs/mine")
    verb.add_argument(
        "--version",
        dest="edition",
        choices=("v3", "v4"),
        default="v3",
        help="v3: bfcl-eval 2025.6.14, the paper's; v4: 2026.3.23, other multi-turn data (default: %(default)s)",
    )
    _add_run_options(verb, "names or groups: non_live, live, multi_turn, simple, ...")


def _add_tool_world(actions: Any) -> None:
    text = "the tool world: exact match on unseen tools and unseen values"
    verb = _add(actions, "tool-world", text, "tool-world --model runs/tool-world")
    verb.add_argument("--prompts", type=int, default=256, metavar="N", help="per split (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=20_000, metavar="S", help="of the prompts (default: %(default)s)")
    verb.add_argument(
        "--decision",
        choices=("reasoning", "call"),
        default="reasoning",
        help="where it is decided what to call, as in [data] (default: %(default)s)",
    )
    _add_run_options(verb, "splits: unseen_tools, unseen_values")


def _add_run_options(verb: argparse.ArgumentParser, categories: str, *, published: bool = False) -> None:
    _add_who(verb)
    _add_how(verb, published=published)
    what = verb.add_argument_group("which samples")
    what.add_argument("--categories", metavar="A,B", help=categories)
    what.add_argument("--limit", type=int, metavar="N", help="the first N samples of each category")
    what.add_argument("--ids", metavar="A,B", help="these samples only")
    where = verb.add_argument_group("where to")
    where.add_argument("--out", metavar="DIR", help="the evaluation's folder (default: runs/eval-BENCHMARK-MODEL)")
    where.add_argument("--name", metavar="NAME", help="what tables call the model (default: its path)")
    where.add_argument("--resume", action="store_true", help="ask for what is missing or failed in the folder")
    where.add_argument("--dry-run", action="store_true", help="show one prompt and what fits, ask for nothing")


def _add_who(verb: argparse.ArgumentParser) -> None:
    who = verb.add_argument_group("who answers")
    who.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a run folder, a model or adapter folder, a hub name; a server's model (tool-world: the embedded one)",
    )
    who.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server that holds --model")
    who.add_argument("--vllm", action="store_true", help="generate with vLLM instead of transformers")
    who.add_argument("--responses", metavar="FILE", help='score recorded responses: JSONL of {"id", "response"}')
    who.add_argument("--oracle", action="store_true", help="answer with the gold: a self-test of the whole path")
    who.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="a key of [model], as in a run: model.dtype=bfloat16",
    )


def _add_how(verb: argparse.ArgumentParser, *, published: bool) -> None:
    how = verb.add_argument_group("how it is asked")
    texts = "the benchmark's own texts" if published else "ToolRL's prompts, with the texts of --prompt-from"
    how.add_argument(
        "--prompt",
        choices=("training", "native", "published"),
        help="training (the default): laid out as in the model's run, or in --format; native: the model's (server's) "
        f"own function calling; published: {texts}",
    )
    if not published:
        how.add_argument(
            "--prompt-from",
            metavar="FILE",
            help="rows as ToolRL published them, such as rlla_sft.json (default: what a run that kept prompts read)",
        )
    how.add_argument(
        "--format", metavar="F", help="how the model writes calls (default: as its run, else its template)"
    )
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="per response (default: 4096; tool world: 160)")
    how.add_argument("--context", type=int, metavar="N", help="tokens that the model holds (default: what it says)")
    how.add_argument("--batch-size", type=int, metavar="N", help="of a local model (default: 16; vLLM 256, BFCL 64)")
    server = verb.add_argument_group("a server")
    server.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at once (default: %(default)s)"
    )
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds (default: %(default)s)")
    server.add_argument("--retries", type=int, default=5, metavar="N", help="per request (default: %(default)s)")
    server.add_argument("--requests-per-minute", type=int, metavar="N", help="at most (default: no limit)")
    server.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="default: %(default)s")
    server.add_argument(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="the model's: prompts exactly as in training are sent to /completions as token ids, instead of messages "
        "to /chat/completions; also tells the format and what fits",
    )
    server.add_argument("--extra-body", metavar="JSON", help="an object whose fields go into every request")


def _add_compare(actions: Any) -> None:
    text = "compare two evaluations: paired differences, McNemar's test, the samples that flipped"
    verb = _add(actions, "compare", text, "compare runs/eval-base runs/eval-mine")
    verb.add_argument("base", metavar="BASE", help="an evaluation's folder")
    verb.add_argument("tuned", metavar="TUNED", help="another one's")
    verb.add_argument("--out", metavar="DIR", help="also write comparison.md, comparison.json and flips.jsonl there")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _add_table(actions: Any) -> None:
    text = "tabulate evaluations of one benchmark: Markdown, CSV, LaTeX in the paper's layout, a radar figure"
    verb = _add(actions, "table", text, "table runs/eval-base runs/eval-mine --out tables")
    verb.add_argument("folders", nargs="+", metavar="DIR", help="evaluations' folders")
    verb.add_argument("--out", metavar="DIR", help="where to (default: the folder of a single one, else ./tables)")
