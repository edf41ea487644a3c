"""`python -m research.theory`: test the lemmas and theorems behind the weights on a model, without training."""

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

from research.command import run_command
from research.theory.expected_squares import expected_squares
from research.theory.measure import (
    Theory,
    TheorySettings,
    count_steps,
    count_token_passes,
    has_spread,
    max_coordinates,
    measure,
)
from research.theory.optimal_weights import NO_SPREAD_NOTE
from research.theory.page import build_tables, findings, render_page, to_mapping
from research.theory.plots import draw_theory
from rest_rl.cli.terminal import Screen
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError, check_minimums
from rest_rl.jsonl import as_json
from rest_rl.probe.gradients import Coordinates
from rest_rl.probe.run import (
    MIN_PROMPTS,
    build_layouts,
    build_sampling,
    choose_unused_folder,
    convert_write_errors,
    create_folder,
    draw_prompts,
    label_model,
    load_model,
    read_prompts,
    resolve_prompts_per_step,
    resolve_run,
    track_steps,
)
from rest_rl.probe.sample import SampledGroup, Sampling, sample_groups
from rest_rl.probe.variance import choose_num_blocks
from rest_rl.runlog import SILENT, Observer, replace_file
from rest_rl.train.policy import silence_transformers

JSON_FILE, PAGE_FILE = "theory.json", "theory.md"
MIN_PILOT, MIN_PILOT_GROUP = 4, 8
LONG_PILOT_SECONDS = 600.0
"""Estimated time of a pilot above which the command prints a warning."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m research.theory",
        description="Test, without training, where the variance theory of ResT holds: Lemmas 1 and 2, Theorems 1 and "
        "2, and the variance, direction and expected improvement of each weight rule.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR_OR_ID",
        help="a run folder, a model, an adapter or a hub name (default: the embedded model)",
    )
    add("--data", metavar="FILE", help="dialogues, as in train (default: those of the model's run)")
    add("--format", action="append", default=[], metavar="F", help="tool-call format (default: auto)")
    add(
        "--prompts",
        type=int,
        default=96,
        metavar="N",
        help="prompts on which the rules are judged, at least 8 (%(default)s)",
    )
    add("--group", type=int, default=8, metavar="G", help="responses per prompt for the rules (%(default)s)")
    add(
        "--pilot",
        type=int,
        default=12,
        metavar="N",
        help="pilot prompts for lemmas and theorems, at least 4 (%(default)s)",
    )
    add("--pilot-group", type=int, default=16, metavar="G", help="responses per pilot prompt, at least 8 (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="seed for drawing prompts and for sampling (%(default)s)")
    add(
        "--progress",
        type=float,
        default=0.0,
        metavar="X",
        help="training progress for reward and curriculum, 0 to 1 (0)",
    )
    add("--step", type=int, metavar="P", help="prompts of the optimizer step to predict (default: the run's)")
    add("--cap", type=float, default=3.0, metavar="C", help="norm cap, in multiples of the median norm (%(default)s)")
    add("--max-new-tokens", type=int, metavar="N", help="maximum tokens per response (default: the run's)")
    add("--batch-size", type=int, metavar="N", help="responses per forward pass (default: eval.batch_size)")
    add("--set", action="append", default=[], metavar="A.B=C", help="set one key of the run file")
    add("--out", metavar="DIR", help="output folder (default: runs/theory-MODEL)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run_theory(arguments))


def run_theory(arguments: argparse.Namespace) -> None:
    # Everything that depends on the user is checked before the model is loaded and anything is sampled.
    silence_transformers()
    screen = Screen(Console(stderr=arguments.json))
    check_numbers(arguments)
    out = Path(arguments.out) if arguments.out else choose_unused_folder("theory", arguments.model, JSON_FILE)
    config = resolve_run(arguments.model, arguments.data, arguments.set)
    if config.env.path:
        raise UserError(f"the run has an environment, {config.env.path}", "dialogues", "pass --data")
    # The pilot is sampled with seed 2 S, the judged prompts with seed 2 S + 1, so that no two values of S share a seed.
    samplings = [
        build_sampling(config, group, seed, arguments.progress, arguments.max_new_tokens, arguments.batch_size)
        for seed, group in enumerate((arguments.pilot_group, arguments.group), start=2 * arguments.seed)
    ]
    (layout,) = build_layouts(config, arguments.format, SILENT)
    remedy = "add data" + (f", or lower --pilot (at least {MIN_PILOT})" * (arguments.pilot > MIN_PILOT))
    number, least = arguments.prompts + arguments.pilot, MIN_PROMPTS + arguments.pilot
    data = read_prompts(config, layout, screen, samplings[0].max_new_tokens)
    prompts = draw_prompts(data, number, arguments.seed, screen, least, remedy)
    # The sets are disjoint: no rule is judged on a prompt that the optimum was computed from.
    pilot, judged = prompts[: arguments.pilot], prompts[arguments.pilot :]
    settings = TheorySettings(
        token_responses=arguments.group,
        batch=resolve_prompts_per_step(config, arguments.step, len(judged), screen),
        progress=arguments.progress,
        cap=arguments.cap,
        blocks=choose_num_blocks(len(judged)),
        batch_size=samplings[0].batch_size,
        seed=arguments.seed,
    )
    create_folder(out, JSON_FILE)
    model = load_model(config, arguments.seed, screen)
    found, what = sample_and_measure(model, layout, (pilot, judged), samplings, settings, screen)
    content = {"measured on": what, **to_mapping(found, settings)}
    if arguments.json:
        print(as_json(content, indent=2), flush=True)
    else:
        show_results(what, found, screen)
    with convert_write_errors(out):
        pictures = draw_theory(found, out)
        title = f"The theory of ResT, measured on {label_model(arguments.model)}"
        replace_file(out / PAGE_FILE, render_page(title, what + ".", found, settings.batch, pictures))
        replace_file(out / JSON_FILE, as_json(content, indent=2) + "\n")
    screen.say(f"{out / PAGE_FILE}, {JSON_FILE} and plots")


def check_numbers(arguments: argparse.Namespace) -> None:
    least = {"prompts": MIN_PROMPTS, "pilot": MIN_PILOT, "pilot_group": MIN_PILOT_GROUP, "seed": 0, "step": 1}
    check_minimums({f"--{name.replace('_', '-')}": (getattr(arguments, name), low) for name, low in least.items()})
    if len(arguments.format) > 1:
        raise UserError(
            f"--format is given {len(arguments.format)} times", "one format", "measure the formats one by one"
        )
    if arguments.pilot_group < arguments.group:
        raise UserError(
            f"--pilot-group is {arguments.pilot_group}",
            f"at least the --group of {arguments.group}",
            "raise --pilot-group",
        )
    if not arguments.cap > 0:
        raise UserError(f"--cap is {arguments.cap}", "a positive multiple of the median norm", "raise it")


def sample_and_measure(
    model: Any,
    layout: PromptLayout,
    prompts: tuple[Sequence[Prepared], Sequence[Prepared]],
    samplings: Sequence[Sampling],
    settings: TheorySettings,
    observer: Observer,
) -> tuple[Theory, str]:
    pilots, judged = map(len, prompts)
    with track_steps(observer, layout.format.name, pilots + judged + count_steps(pilots, judged)) as done:
        pilot, groups = (
            sample_groups(model, layout, own, sampling, done("sampling"))
            for own, sampling in zip(prompts, samplings, strict=True)
        )
        if not has_spread(pilot, settings):
            observer.say(f"{NO_SPREAD_NOTE}.")
        settings = limit_coordinates(model, pilot, len(groups), settings, observer)
        found = measure(model, pilot, groups, settings, layout.tokenizer, done("gradients"))
    what = (
        f"{layout.format.name}: pilot of {len(pilot)} prompts × {samplings[0].group_size} responses, rules on "
        f"{len(groups)} other prompts × {samplings[1].group_size} ({found.live_groups:.0%} of these groups have "
        "unequal rewards); "
        f"{found.coordinate_share:.0%} of the parameters, progress {settings.progress:g}, seed {settings.seed}, norm "
        f"cap {settings.cap:g} × median"
    )
    return found, what


def limit_coordinates(
    model: torch.nn.Module, pilot: Sequence[SampledGroup], groups: int, settings: TheorySettings, observer: Observer
) -> TheorySettings:
    # Keep as many coordinates as memory allows. One timed response predicts the time of the pilot, which needs two
    # backward passes per token, and a long pilot is announced before it starts.
    longest = max((one for group in pilot for one in group.responses), key=lambda one: len(one.ids))
    settings = replace(settings, coordinates=max_coordinates(len(longest.ids), groups))
    coordinates = Coordinates.choose(model, settings.coordinates, settings.seed)
    begun = time.monotonic()
    expected_squares(model, pilot[0].prompt_ids, longest.ids[:4], coordinates)
    passes = count_token_passes(pilot, settings.token_responses)
    seconds = passes * (time.monotonic() - begun) / max(1, len(longest.ids[:4]))
    if seconds > LONG_PILOT_SECONDS:
        observer.say(
            f"the pilot needs {passes:,} backward passes through single tokens, about {seconds / 60:.0f} "
            "minutes; to shorten it, lower --pilot, --group or --max-new-tokens"
        )
    return settings


def show_results(what: str, found: Theory, screen: Screen) -> None:
    for table in build_tables(found):
        screen.show_table(*table)
    screen.say(f"{what}.\n")
    for line in findings(found):
        screen.say(f"• {line}.")


if __name__ == "__main__":
    sys.exit(main())
