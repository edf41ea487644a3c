"""The command line `rest-rl`. Commands import heavy libraries only when they run.

A mistake of the user (`UserError`) is printed as one line, with exit code 2; `--debug` shows the traceback. Any other
exception is a bug: it keeps its traceback, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rest_rl.cli import compare, data, env, inspect, model, probe, report, score, train
from rest_rl.cli.evaluate import eval_app
from rest_rl.cli.options import EXIT_INTERRUPTED, EXIT_USER_ERROR, Verb, verb_group, with_new_names
from rest_rl.errors import RenamedWarning, UserError

EPILOG = """\
examples:
  rest-rl train                              train the embedded model (minutes on a CPU)
  rest-rl train run.toml --set rest.preset=grpo --set run.seed=1 --out runs/grpo-1
  rest-rl train --resume --out runs/grpo-1   resume after Ctrl-C, a crash or kill -9
  rest-rl report runs/grpo-* runs/rest-*     learning curves, averaged over seeds
"""
EXPECTED_NUMBERS = {"int_parsing": "a whole number", "float_parsing": "a number"}
TAKE_SETTINGS_AFTER_DASHES = ("train", "sft")

app = verb_group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True, epilog=EPILOG)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
) -> None:
    """Train language models to call tools with ResT, which weights each token by its region."""
    del debug  # `run_command` and `is_debug` read the option from the context
    if version:
        from rest_rl import __version__

        print(f"rest-rl {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(EXIT_USER_ERROR)
    if context.obj and context.invoked_subcommand not in TAKE_SETTINGS_AFTER_DASHES:
        context.fail(f"unrecognized arguments: -- {' '.join(context.obj)}")


def add(verb: Callable[..., Any], short_help: str, epilog: str | None = None) -> None:
    """Add a function as a command; Typer derives its name, options and help from the function."""
    app.command(verb.__name__, cls=Verb, short_help=short_help, epilog=epilog)(verb)


add(train.train, "train a model with ResT or a baseline method", train.TRAIN_EPILOG)
app.command(
    "sft",
    cls=Verb,
    short_help="fine-tune a model on demonstrations (supervised)",
    help="Fine-tune a model on demonstrations; the same as train --preset sft.",
    epilog=train.SFT_EPILOG,
)(train.train)
add(report.report, "summarize run folders as Markdown and plots, or as one HTML file")
add(compare.compare, "train several methods with several seeds and test which learns better", epilog=compare.EPILOG)
add(probe.probe, "estimate before training whether token weights would help", probe.EPILOG)
app.add_typer(data.group, name="data", short_help="check, convert, show, split, mix or generate training data")
app.add_typer(env.group, name="env", short_help="check an environment whose tools run")
app.add_typer(eval_app, name="eval", short_help="evaluate on a benchmark; compare and tabulate evaluations")
add(inspect.inspect, "show the region and weight of each token of a response")
add(score.score, "score responses against gold calls, with explanations")
add(model.model, "download and verify a named model such as smollm2")
add(inspect.presets, "list the presets, or print one as TOML")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = warning_printer()
        warnings.simplefilter("always", RenamedWarning)  # `warning_printer` drops repetitions
        return run_command(*split_overrides(sys.argv[1:] if argv is None else argv))


def warning_printer() -> Callable[..., None]:
    # Print a warning about a renamed name as one line, only once, and other warnings as Python does.
    # A run file is read more than once per command, so the same warning would repeat.
    show_other, printed = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if not issubclass(category, RenamedWarning):
            show_other(message, category, *where, **options)
        elif (line := f"warning: {message}") not in printed:
            printed.add(line)
            print(line, file=sys.stderr)

    return show


def run_command(given: list[str], after_dashes: list[str]) -> int:
    context: Any = None
    try:
        command = typer.main.get_command(app)
        context = command.make_context("rest-rl", with_new_names(given), obj=after_dashes)
        with context:
            return command.invoke(context) or 0
    except typer.Exit as stopped:
        return stopped.exit_code
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        page = f"{where.command_path if where else 'rest-rl'} --help"
        print(f"error: {describe_usage_error(error)}; see {page}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        # Without a context, the mistake is in the definition of the command line, not in its use.
        if context is None or context.params["debug"]:
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has exited (`| head`). Python flushes stdout at exit and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def describe_usage_error(error: typer.TyperException) -> str:
    # Typer 0.29 explains a value of the wrong type in pydantic's words, which name neither the value nor valid ones.
    text = one_line(error.format_message()).rstrip(".")
    option, faults = re.match(r"Invalid value for '(\S+)'", text), getattr(error.__cause__, "errors", list)()
    if not option or not faults:
        return text
    choices = faults[0]["msg"].partition(" is not one of ")[2].rstrip(".").replace("'", "")
    expected = EXPECTED_NUMBERS.get(faults[0]["type"]) or (choices and f"one of {choices}")
    return f"{option[1]} is {faults[0]['input']!r}, expected {expected}" if expected else text


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before the first `--` and those after it; the parser would merge them."""
    given = list(argv)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


def one_line(text: str) -> str:
    return " ".join(text.split())
