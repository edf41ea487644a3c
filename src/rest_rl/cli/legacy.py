"""Verbs whose options argparse still reads; each moves to a Typer command in a file of its own."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2

PROBE_EPILOG = """\
examples:
  rest-rl probe                                                      the embedded model in its tool world
  rest-rl probe --model Qwen/Qwen3-0.6B --data dialogues.jsonl --prompts 128 --out probes/base
  rest-rl probe --model runs/mine --progress 0.5                     a trained model on its run's own data
  rest-rl probe --model DIR --data FILE --format hermes --format toolrl
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where to read more, then exit with code 2."""
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(
        prog="rest-rl",
        description="Train language models to call tools with ResT: token-level policy gradients, reshaped by region.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    _add_probe(verbs)
    return parser


def _add_probe(verbs: argparse._SubParsersAction[Parser]) -> None:
    verb = verbs.add_parser(
        "probe",
        help="before training: where the reward signal lies, and whether weights would help",
        description="Sample responses and measure, without training, what each region of them means for reward and "
        "gradient and what each weight rule would do; ends with a recommendation.",
        epilog=PROBE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--model", metavar="DIR_OR_ID", help="a run folder, a model, an adapter or a hub name")
    verb.add_argument("--data", metavar="FILE", help="dialogues, as in train (default: the model's run's own)")
    verb.add_argument(
        "--format", action="append", default=[], metavar="F", help="tool-call format, once for each section (auto)"
    )
    verb.add_argument("--prompts", type=int, default=96, metavar="N", help="prompts, at least 8 (default: %(default)s)")
    verb.add_argument("--group", type=int, default=8, metavar="G", help="responses per prompt (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and sampling (default: %(default)s)")
    verb.add_argument(
        "--progress", type=float, default=0.0, metavar="X", help="training progress of reward and curriculum (0)"
    )
    verb.add_argument("--step", type=int, metavar="P", help="prompts of the training step to predict (the run's)")
    verb.add_argument(
        "--norm-cap",
        type=float,
        default=0.0,
        metavar="C",
        help="scale prompts above C median gradient norms down (off)",
    )
    verb.add_argument("--max-new-tokens", type=int, metavar="N", help="per response (default: the run's)")
    verb.add_argument("--batch-size", type=int, metavar="N", help="responses in one pass (default: eval.batch_size)")
    verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set one key of the run")
    verb.add_argument("--out", metavar="DIR", help="where to (default: runs/probe-MODEL)")
    verb.add_argument("--json", action="store_true", help="print a line of JSON per format instead of tables")


def run_verb(arguments: argparse.Namespace) -> int:
    """Call the verb; the heavy imports happen here."""
    from rest_rl.cli.probe import probe

    return probe(arguments)


def main(argv: Sequence[str], *, debug: bool) -> int:
    """Run a verb of the old parser; returns its exit code."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    arguments.debug = debug
    try:
        return run_verb(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # Some integrations of the trainer report a missing package as a RuntimeError.
        is_missing = isinstance(error, ImportError) or "pip install" in str(error)
        if debug or (isinstance(error, RuntimeError) and not is_missing):
            raise
        message = missing_package(error) if is_missing and not isinstance(error, ValueError) else str(error)
        print(f"error: {one_line(message or repr(error))}", file=sys.stderr)
        return EXIT_USER_ERROR


def missing_package(error: Exception) -> str:
    """What to install after an import that failed."""
    text = str(error)
    patterns = (r"pip install (?:-\S+ )*['\"]?([\w.-]+)", r"'([\w-]+)[<>=]", r"No module named '(\w+)")
    named = next((match[1].rstrip(".") for pattern in patterns if (match := re.search(pattern, text))), None)
    extra = next((extra for extra in ("vllm", "peft") if extra in f"{named} {text}".lower()), None)
    package = f"'rest-rl[{extra}]'" if extra else named
    remedy = f"install it: pip install {package}" if package else "install it, or see --debug"
    return f"got an import that failed ({text}), expected the package it needs; {remedy}"


def one_line(text: str) -> str:
    """A message without its line breaks."""
    return " ".join(text.split())
