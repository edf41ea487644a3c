"""`python -m research.theory`: the lemmas and theorems behind the weights, measured on a model, without training."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from research.command import exit_code
from research.theory.expected_squares import expected_squares
from research.theory.measure import (
    Theory,
    TheorySettings,
    affordable_coordinates,
    has_spread,
    measure,
    steps,
    token_passes,
)
from research.theory.optimal_weights import NO_SPREAD
from research.theory.page import as_mapping, findings, page, theory_tables
from research.theory.plots import draw_theory
from rest_rl.cli.probe import (
    LEAST,
    Asked,
    ask,
    bar,
    check_least,
    formats_of,
    fresh_folder,
    make_folder,
    run_of,
    say,
    scoring_of,
    step_of,
    unwritten,
)
from rest_rl.cli.terminal import show_table
from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.evaluate.origin import model_label
from rest_rl.jsonl import as_json
from rest_rl.probe.gradients import Coordinates
from rest_rl.probe.sample import Group, sample_groups
from rest_rl.probe.variance import blocks_for
from rest_rl.runlog import replace_file
from rest_rl.train.policy import load_policy, quiet_loading

JSON, PAGE = "theory.json", "theory.md"
FEWEST = {"prompts": 8, "pilot": 4, "group": 2, "pilot_group": 8}
LONG = 600.0
"""Seconds of a pilot from which on a user is warned."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m research.theory",
        description="Measure, without training, where the variance theory of ResT holds and where it does not: Lemmas "
        "1 and 2, Theorems 1 and 2, and for each weight rule variance, direction and expected improvement.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="a run folder, a model, an adapter or a hub name (the embedded model)")
    add("--data", metavar="FILE", help="dialogues, as in train (default: the model's run's own)")
    add("--format", action="append", default=[], metavar="F", help="tool-call format (default: auto)")
    add("--prompts", type=int, default=96, metavar="N", help="prompts for the rules, at least 8 (%(default)s)")
    add("--group", type=int, default=8, metavar="G", help="responses per prompt (%(default)s)")
    add("--pilot", type=int, default=12, metavar="N", help="prompts for lemmas and theorems, at least 4 (%(default)s)")
    add("--pilot-group", type=int, default=16, metavar="G", help="responses to each, at least 8 (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of prompts and sampling (%(default)s)")
    add("--progress", type=float, default=0.0, metavar="X", help="training progress of reward and curriculum (0)")
    add("--step", type=int, metavar="P", help="prompts of the training step to predict (the run's)")
    add("--cap", type=float, default=3.0, metavar="C", help="norm cap in medians (%(default)s)")
    add("--max-new-tokens", type=int, metavar="N", help="per response (default: the run's)")
    add("--batch-size", type=int, metavar="N", help="responses sampled at once (eval.batch_size)")
    add("--set", action="append", default=[], metavar="A.B=C", help="set one key of the run")
    add("--out", metavar="DIR", help="where to (default: runs/theory-MODEL)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(verb="theory")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: theory(arguments))


def theory(arguments: argparse.Namespace) -> None:
    """Sample, measure, show and write; whatever a user can have got wrong is found before anything is sampled."""
    quiet_loading()
    console = Console(stderr=arguments.json)
    check_numbers(arguments)
    out = fresh_folder(arguments, JSON)
    config, least = run_of(arguments), FEWEST["pilot"]
    asked = ask(
        config, formats_of(config, arguments)[0], arguments, arguments.prompts + arguments.pilot, console,
        FEWEST["prompts"] + arguments.pilot,
        "add data" + (f", or lower --pilot (to {least} at the least)" if arguments.pilot > least else ""),
    )  # fmt: skip
    settings = settings_of(arguments, config, len(asked.samples) - arguments.pilot, console)
    make_folder(out)
    with console.status("loading"):
        model, _ = load_policy(replace(config.model, dtype=config.weights_dtype))
        model.to(torch.accelerator.current_accelerator() or "cpu")
    found, what = measured(model, asked, config, settings, arguments, console)
    show(what, found, settings, arguments, console)
    write(out, title_of(arguments), what, found, settings)
    say(console, f"{out / PAGE}, {JSON} and plots")


def check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError for numbers with which nothing can be estimated."""
    check_least(arguments, {**LEAST, **FEWEST})
    if len(arguments.format) > 1:
        raise UserError(f"{len(arguments.format)} times --format", "one", "measure them one by one")
    if arguments.pilot_group < arguments.group:
        raise UserError(
            f"--pilot-group {arguments.pilot_group} with --group {arguments.group}", "at least as many", "raise it"
        )
    if not 0 <= arguments.progress <= 1:
        raise UserError(f"--progress {arguments.progress}", "training progress in [0, 1]", "change it")
    if not arguments.cap > 0:
        raise UserError(f"--cap {arguments.cap}", "a positive multiple of the median norm", "raise it")


def settings_of(arguments: argparse.Namespace, config: RunConfig, prompts: int, console: Console) -> TheorySettings:
    """How much is measured on so many prompts."""
    return TheorySettings(
        token_responses=arguments.group,
        batch=step_of(config, arguments, prompts, console),
        progress=arguments.progress,
        cap=arguments.cap,
        blocks=blocks_for(prompts),
        batch_size=arguments.batch_size or config.eval.batch_size,
        seed=arguments.seed,
    )


def within_reach(
    model: torch.nn.Module, pilot: Sequence[Group], groups: int, settings: TheorySettings, console: Console
) -> TheorySettings:
    """The settings with as many coordinates as memory has room for; says how long a long pilot will take."""
    longest = max((one for group in pilot for one in group.responses), key=lambda one: len(one.ids))
    settings = replace(settings, coordinates=affordable_coordinates(len(longest.ids), groups))
    coordinates = Coordinates.choose(model, settings.coordinates, settings.seed)
    begun = time.monotonic()
    expected_squares(model, pilot[0].prompt_ids, longest.ids[:4], coordinates)
    passes = token_passes(pilot, settings.token_responses)
    seconds = passes * (time.monotonic() - begun) / max(1, len(longest.ids[:4]))
    if seconds > LONG:
        say(
            console,
            f"{passes:,} backward passes through single tokens: about {seconds / 60:.0f} minutes before the rules are "
            "judged; fewer --pilot prompts, a smaller --group or --max-new-tokens take less",
        )
    return settings


def measured(
    model: torch.nn.Module,
    asked: Asked,
    config: RunConfig,
    settings: TheorySettings,
    arguments: argparse.Namespace,
    console: Console,
) -> tuple[Theory, str]:
    """The theory on this model, and what it was measured on."""
    layout, pilots = asked.layout, arguments.pilot
    limit = arguments.max_new_tokens or int(config.trl.get("max_completion_length", config.eval.max_new_tokens))
    number = len(asked.samples)
    with bar(console, layout.format.name, number + steps(pilots, number - pilots)) as advance:
        parts: list[list[Group]] = []
        shares = ((asked.samples[:pilots], arguments.pilot_group), (asked.samples[pilots:], arguments.group))
        for seed, (samples, size) in enumerate(shares, start=2 * arguments.seed):
            parts.append([])
            for group in sample_groups(
                model, layout, samples, group_size=size, max_new_tokens=limit, seed=seed,
                batch_size=settings.batch_size, progress=arguments.progress, reward=scoring_of(config),
            ):  # fmt: skip
                parts[-1].append(group)
                advance("sampling")
        if not has_spread(parts[0], settings):
            say(console, f"{NO_SPREAD}.")
        settings = within_reach(model, parts[0], len(parts[1]), settings, console)
        pad_id = layout.tokenizer.pad_token_id
        found = measure(model, parts[0], parts[1], settings, pad_id, lambda: advance("gradients"))
    pilot, groups = parts
    what = (
        f"{layout.format.name}: pilot of {len(pilot)} prompts × {arguments.pilot_group} responses, rules on "
        f"{len(groups)} other prompts × {arguments.group} ({found.live_groups:.0%} of these groups have spread); "
        f"{found.coordinate_share:.0%} of the parameters, progress {settings.progress:g}, seed {settings.seed}, norm "
        f"cap {settings.cap:g} × median"
    )
    return found, what


def title_of(arguments: argparse.Namespace) -> str:
    """What the page calls the measurement."""
    model = model_label(arguments.model) if arguments.model else "the embedded model"
    return f"The theory of ResT, measured on {model}"


def write(out: Path, title: str, what: str, found: Theory, settings: TheorySettings) -> None:
    """The JSON object, the page and the pictures; ValueError for a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw_theory(found, out)
        replace_file(out / PAGE, page(title, what + ".", found, settings.batch, pictures))
        replace_file(out / JSON, as_json({"measured on": what, **as_mapping(found, settings)}, indent=2) + "\n")
    except OSError as error:
        raise unwritten(out, error) from error


def show(what: str, found: Theory, settings: TheorySettings, arguments: argparse.Namespace, console: Console) -> None:
    """The tables and findings, or the JSON object."""
    if arguments.json:
        print(as_json({"measured on": what, **as_mapping(found, settings)}, indent=2), flush=True)
    else:
        for table in theory_tables(found):
            show_table(escape(table.title), table.header, table.rows, console)
        say(console, f"{what}.\n")
        for line in findings(found):
            console.print(f"• {line}.", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
