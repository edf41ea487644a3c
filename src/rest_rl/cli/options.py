"""Shared code of the commands: common options, plain-text help, renamed options, and settings after `--`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rest_rl.errors import UserError, warn_renamed

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# Old names of options and subcommands by command; they still work, with a warning.
RENAMED = {
    "compare": {"--reference": "--baseline", "--only-report": "--report-only"},
    "data": {
        "--keep": "--allow",
        "--mask": "--mask-names",
        "--max-prompt": "--max-prompt-tokens",
        "--max-response": "--max-completion-length",
    },
    "eval": {"compare": "diff", "--context": "--context-length"},
    "probe": {"--group": "--group-size", "--step": "--prompts-per-step"},
}
AUTO = "auto"  # as in rest_rl.config, which takes a while to import

RowsFile = Annotated[str, typer.Argument(metavar="FILE.jsonl", help="file of rows, or - for standard input")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="set a key of the run file; C is a TOML value")
]
OutFolder = Annotated[str | None, typer.Option("--out", metavar="DIR", help="output folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
FormatName = Annotated[str, typer.Option("--format", metavar="F", help="tool-call format")]
PresetName = Annotated[str, typer.Option("--preset", metavar="P", help="preset; rest-rl presets lists them")]


def check_share(value: float) -> float:
    if math.isnan(value) or not 0 <= value <= 1:
        raise UserError(f"--progress is {value}", "a number between 0 and 1")
    return value


Progress = Annotated[
    float,
    typer.Option("--progress", metavar="X", help="training progress, from 0 (start) to 1 (end)", callback=check_share),
]


class _Help:
    # Typer's rich help draws boxes and reflows the epilog, which breaks the examples. This prints plain text, with
    # options grouped by `rich_help_panel` and the epilog verbatim.

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                name = record[0].partition(" <")[0] if is_argument else record[0]  # without the type
                sections.setdefault(panel, []).append((name, record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write(f"\n{self.epilog}")


class Verb(_Help, TyperCommand):
    """A command with plain-text help."""


class VerbGroup(_Help, TyperGroup):
    """A group of subcommands, such as `data`, with plain-text help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def verb_group(**settings: Any) -> typer.Typer:
    """Return a Typer application for a group of commands with plain-text help."""
    return typer.Typer(cls=VerbGroup, rich_markup_mode=None, add_completion=False, **settings)


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """Replace old names of options and subcommands by the new names, with a warning on stderr for each."""
    # Runs before the parser, so that help pages and error messages know only the new names. A subcommand is replaced
    # only directly after its command: in `eval bfcl --out compare`, "compare" is a value.
    command_at = next((at for at, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    renamed = RENAMED.get(arguments[command_at], {}) if command_at < len(arguments) else {}
    changed = list(arguments)
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in renamed and (name.startswith("--") or at == command_at + 1):
            prefix = "" if name.startswith("--") else f"{arguments[command_at]} "
            warn_renamed(prefix + name, prefix + renamed[name])
            changed[at] = f"{renamed[name]}{equals}{value}"
    return changed


def is_debug(context: typer.Context) -> bool:
    return bool(context.find_root().params["debug"])


def settings_after_dashes(context: typer.Context) -> list[str]:
    """Return the settings for verl that the user passed after `--`."""
    return list(context.find_root().obj)
