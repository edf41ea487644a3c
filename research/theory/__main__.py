"""`python -m research.theory`: the lemmas and theorems behind the weights, measured on a model, without training."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

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
from rest_rl.cli.terminal import Screen
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.probe.gradients import Coordinates
from rest_rl.probe.run import (
    LEAST_PROMPTS,
    counted,
    draw_prompts,
    free_folder,
    label_of,
    layouts,
    load_model,
    make_folder,
    probed_run,
    sampling_of,
    step_size,
    writing,
)
from rest_rl.probe.sample import Group, Sampling, check_least, sample_groups
from rest_rl.probe.variance import blocks_for
from rest_rl.runlog import Observer, replace_file
from rest_rl.train.policy import quiet_loading

JSON, PAGE = "theory.json", "theory.md"
LEAST_PILOT, LEAST_PILOT_GROUP = 4, 8
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: theory(arguments))


def theory(arguments: argparse.Namespace) -> None:
    """Sample, measure, show and write; whatever a user can have got wrong is found before anything is sampled."""
    quiet_loading()
    screen = Screen(Console(stderr=arguments.json))
    check_numbers(arguments)
    out = Path(arguments.out) if arguments.out else free_folder("theory", arguments.model, JSON)
    config = probed_run(arguments.model, arguments.data, arguments.set)
    samplings = [
        sampling_of(config, group, seed, arguments.progress, arguments.max_new_tokens, arguments.batch_size)
        for seed, group in enumerate((arguments.pilot_group, arguments.group), start=2 * arguments.seed)
    ]
    (layout,) = layouts(config, arguments.format)
    remedy = "add data" + (f", or lower --pilot (to {LEAST_PILOT} at the least)" * (arguments.pilot > LEAST_PILOT))
    number, least = arguments.prompts + arguments.pilot, LEAST_PROMPTS + arguments.pilot
    prompts = draw_prompts(config, layout, number, arguments.seed, screen, samplings[0].max_new_tokens, least, remedy)
    pilot, judged = prompts[: arguments.pilot], prompts[arguments.pilot :]
    settings = TheorySettings(
        token_responses=arguments.group,
        batch=step_size(config, arguments.step, len(judged), screen),
        progress=arguments.progress,
        cap=arguments.cap,
        blocks=blocks_for(len(judged)),
        batch_size=samplings[0].batch_size,
        seed=arguments.seed,
    )
    make_folder(out, JSON)
    model = load_model(config, screen)
    found, what = measured(model, layout, (pilot, judged), samplings, settings, screen)
    content = {"measured on": what, **as_mapping(found, settings)}
    if arguments.json:
        print(as_json(content, indent=2), flush=True)
    else:
        show(what, found, screen)
    with writing(out):
        pictures = draw_theory(found, out)
        title = f"The theory of ResT, measured on {label_of(arguments.model)}"
        replace_file(out / PAGE, page(title, what + ".", found, settings.batch, pictures))
        replace_file(out / JSON, as_json(content, indent=2) + "\n")
    screen.say(f"{out / PAGE}, {JSON} and plots")


def check_numbers(arguments: argparse.Namespace) -> None:
    """UserError for numbers with which nothing can be estimated."""
    least = {"prompts": LEAST_PROMPTS, "pilot": LEAST_PILOT, "pilot_group": LEAST_PILOT_GROUP, "seed": 0, "step": 1}
    check_least(**{name: (getattr(arguments, name), number) for name, number in least.items()})
    if len(arguments.format) > 1:
        raise UserError(f"{len(arguments.format)} times --format", "one", "measure them one by one")
    if arguments.pilot_group < arguments.group:
        raise UserError(
            f"--pilot-group {arguments.pilot_group} with --group {arguments.group}", "at least as many", "raise it"
        )
    if not arguments.cap > 0:
        raise UserError(f"--cap {arguments.cap}", "a positive multiple of the median norm", "raise it")


def measured(
    model: Any,
    layout: PromptLayout,
    prompts: tuple[Sequence[Prepared], Sequence[Prepared]],
    samplings: Sequence[Sampling],
    settings: TheorySettings,
    observer: Observer,
) -> tuple[Theory, str]:
    """The theory on this model, and what it was measured on."""
    pilots, judged = map(len, prompts)
    with counted(observer, layout.format.name, pilots + judged + steps(pilots, judged)) as done:
        pilot, groups = (
            sample_groups(model, layout, own, sampling, done("sampling"))
            for own, sampling in zip(prompts, samplings, strict=True)
        )
        if not has_spread(pilot, settings):
            observer.say(f"{NO_SPREAD}.")
        settings = within_reach(model, pilot, len(groups), settings, observer)
        found = measure(model, pilot, groups, settings, layout.tokenizer, done("gradients"))
    what = (
        f"{layout.format.name}: pilot of {len(pilot)} prompts × {samplings[0].group} responses, rules on "
        f"{len(groups)} other prompts × {samplings[1].group} ({found.live_groups:.0%} of these groups have spread); "
        f"{found.coordinate_share:.0%} of the parameters, progress {settings.progress:g}, seed {settings.seed}, norm "
        f"cap {settings.cap:g} × median"
    )
    return found, what


def within_reach(
    model: torch.nn.Module, pilot: Sequence[Group], groups: int, settings: TheorySettings, observer: Observer
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
        observer.say(
            f"{passes:,} backward passes through single tokens: about {seconds / 60:.0f} minutes before the rules are "
            "judged; fewer --pilot prompts, a smaller --group or --max-new-tokens take less"
        )
    return settings


def show(what: str, found: Theory, screen: Screen) -> None:
    """The tables and findings."""
    for table in theory_tables(found):
        screen.show_table(*table)
    screen.say(f"{what}.\n")
    for line in findings(found):
        screen.say(f"• {line}.")


if __name__ == "__main__":
    sys.exit(main())
