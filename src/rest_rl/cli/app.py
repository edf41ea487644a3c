"""The command `rest-rl`: one verb per job; a verb's heavy imports happen when it is called.

A user's mistake (`UserError`) is one line, `error: got ..., expected ..., what to do`, and exit code 2; `--debug` shows
where it was found. Any other exception is a bug: it keeps its traceback, and the exit code is 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rest_rl.cli import compare, data, inspect, probe, report, score, train
from rest_rl.cli.evaluate import eval_app
from rest_rl.cli.options import EXIT_INTERRUPTED, EXIT_USER_ERROR, Verb, verb_group, with_new_names
from rest_rl.errors import RenamedWarning, UserError

EPILOG = """\
examples:
  rest-rl train                                      the embedded small model in its tool world
  rest-rl train run.toml --set rest.preset=grpo --set run.seed=1 --out runs/grpo-1
  rest-rl train --resume --out runs/grpo-1           go on after Ctrl-C, a crash or kill -9
  rest-rl report runs/grpo-* runs/rest-*             curves with mean and spread over seeds
"""
TAKE_SETTINGS_AFTER_DASHES = ("train", "sft")

app = verb_group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True, epilog=EPILOG)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Train language models to call tools with ResT: token-level policy gradients, reshaped by region."""
    del debug  # read by `main` and `is_debug`
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
    """Add a verb: its name and options are the function's, its help is the docstring."""
    app.command(verb.__name__, cls=Verb, short_help=short_help, epilog=epilog)(verb)


add(train.train, "train a model with ResT or a baseline", train.TRAIN_EPILOG)
app.command(
    "sft",
    cls=Verb,
    short_help="fine-tune a model on demonstrations",
    help="Supervised fine-tuning: the same as train --preset sft.",
    epilog=train.SFT_EPILOG,
)(train.train)
add(report.report, "a page from run folders: Markdown and plots, or one HTML file")
add(
    compare.compare,
    "methods x seeds on the same data: which of them learns better, beyond seed noise?",
    epilog=compare.EPILOG,
)
add(probe.probe, "before training: where the reward signal lies, and whether weights would help", probe.EPILOG)
app.add_typer(data.group, name="data", short_help="check, convert, show, split or make training data")
app.add_typer(
    eval_app, name="eval", short_help="evaluate on BFCL, API-Bank, the tool world or your own; compare, tabulate"
)
add(inspect.inspect, "show each token of a response with its region and weight")
add(score.score, "score responses against gold calls, with the reasons")
add(inspect.presets, "the presets; presets NAME prints one as TOML")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = warning_printer()
        return run_command(*split_overrides(sys.argv[1:] if argv is None else argv))


def warning_printer() -> Callable[..., None]:
    """Show renamed names as one line, each once, and other warnings as Python does."""
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
        print(f"error: {one_line(error.format_message()).rstrip('.')}; see {page}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        if context is None or context.params["debug"]:
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what stands before `--`, what stands after it); a parser would mix the two."""
    given = list(argv)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


def one_line(text: str) -> str:
    """A message without its line breaks."""
    return " ".join(text.split())
