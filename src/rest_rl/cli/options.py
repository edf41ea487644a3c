"""What the verbs of the command share: common options, help pages in plain text, the settings after `--`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
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
"""Old names of options and subcommands by command; they still work, with a warning."""
AUTO = "auto"  # as in rest_rl.config, which takes a while to import

RowsFile = Annotated[str, typer.Argument(metavar="FILE.jsonl", help="the rows; - for standard input")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="set one key; C is a TOML value")]
OutFolder = Annotated[str | None, typer.Option("--out", metavar="DIR", help="where to write")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
FormatName = Annotated[str, typer.Option("--format", metavar="F", help="tool-call format; auto: found out")]
PresetName = Annotated[str, typer.Option("--preset", metavar="P", help="see rest-rl presets")]


def check_share(value: float) -> float:
    if math.isnan(value) or not 0 <= value <= 1:
        raise typer.BadParameter(f"got {value}, expected a number in [0, 1]")
    return value


Progress = Annotated[
    float, typer.Option("--progress", metavar="X", help="training progress in [0, 1]", callback=check_share)
]


class _Help:
    """Help in plain text: options under their panel's title (`rich_help_panel`), the epilog as it is written."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)  # pyright: ignore[reportAttributeAccessIssue]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                name = record[0].partition(" <")[0] if is_argument else record[0]  # without its type
                sections.setdefault(panel, []).append((name, record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write(f"\n{self.epilog}")


class Verb(_Help, TyperCommand):
    """A verb; `app.add` makes it from a function. In a group: `group.command("check", cls=Verb, epilog=...)(check)`."""


class VerbGroup(_Help, TyperGroup):
    """Verbs of a verb, such as `data check`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def verb_group(**settings: Any) -> typer.Typer:
    """A Typer application in the style of this command; `app.add_typer(group, name="data")` adds it as a verb."""
    return typer.Typer(cls=VerbGroup, rich_markup_mode=None, add_completion=False, **settings)


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """Return the command line with renamed options and subcommands under their new names; warn about each on stderr."""
    command_at = next((at for at, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    renamed = RENAMED.get(arguments[command_at], {}) if command_at < len(arguments) else {}
    changed = list(arguments)
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in renamed and (name.startswith("--") or at == command_at + 1):
            print(f"warning: {name} is now {renamed[name]}", file=sys.stderr)
            changed[at] = f"{renamed[name]}{equals}{value}"
    return changed


def is_debug(context: typer.Context) -> bool:
    """Whether the command was called with `--debug`."""
    return bool(context.find_root().params["debug"])


def settings_after_dashes(context: typer.Context) -> list[str]:
    """The settings of verl's own, which stand after `--`."""
    return list(context.find_root().obj)
