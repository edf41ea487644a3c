"""The verb `theory`: the lemmas and theorems behind the weights, measured on a model, without training."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from rest_rl.analyze.theory import Theory, TheorySettings, check_spread, measure, steps
from rest_rl.analyze.theory_plots import draw_theory
from rest_rl.analyze.theory_text import as_mapping, findings, page, theory_tables
from rest_rl.cli_eval_origin import model_label
from rest_rl.cli_probe import Asked, ask, bar, formats_of, prompts_per_step, run_of, say
from rest_rl.config import RunConfig
from rest_rl.data.groups import Group
from rest_rl.evaluate.sampling import sample_groups
from rest_rl.jsonl import as_json
from rest_rl.runlog import replace_file, unwritable
from rest_rl.terminal import show_table
from rest_rl.train.policy import load_policy, quiet_loading

JSON, PAGE = "theory.json", "theory.md"
BLOCKS = 16
"""Blocks of the jackknife over prompts."""
LEAST = {"prompts": 8, "pilot": 4, "group": 2, "pilot_group": 8, "max_new_tokens": 1, "batch_size": 1, "seed": 0}


def theory(arguments: argparse.Namespace) -> int:
    """Sample, measure, write and show; whatever a user can have got wrong is found before anything is sampled."""
    if not arguments.debug:
        quiet_loading()
    console = Console(stderr=arguments.json)
    check_numbers(arguments)
    out = checked_folder(arguments)
    config = run_of(arguments)
    wanted = argparse.Namespace(**{**vars(arguments), "prompts": arguments.prompts + arguments.pilot})
    asked = ask(config, formats_of(config, arguments)[0], wanted, console)
    number = len(asked.samples) - arguments.pilot
    if number < LEAST["prompts"]:
        raise ValueError(
            f"got {len(asked.samples)} samples, of which --pilot takes {arguments.pilot}, expected at least "
            f"{LEAST['prompts']} more; add data, or lower --pilot"
        )
    settings = settings_of(arguments, config, number)
    with console.status("loading"):
        model, _ = load_policy(replace(config.model, dtype=config.weights_dtype))
        model.to(torch.accelerator.current_accelerator() or "cpu")
    found, what = measured(model, asked, config, settings, arguments, console)
    write(out, title_of(arguments), what, found, settings)
    show(out, what, found, settings, arguments, console)
    return 0


def check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError for numbers with which nothing can be estimated."""
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"got --{name.replace('_', '-')} {value}, expected at least {least}; raise it")
    if arguments.pilot_group < arguments.group:
        raise ValueError(
            f"got --pilot-group {arguments.pilot_group} with --group {arguments.group}, expected at least as many; "
            "raise it"
        )
    if not 0 <= arguments.progress <= 1:
        raise ValueError(f"got --progress {arguments.progress}, expected training progress in [0, 1]; change it")
    if not arguments.cap > 0:
        raise ValueError(f"got --cap {arguments.cap}, expected a positive multiple of the median norm; raise it")


def checked_folder(arguments: argparse.Namespace) -> Path:
    """Where the measurement goes; ValueError for a folder that holds one already."""
    if arguments.out is None:
        base = f"runs/theory-{model_label(arguments.model)}" if arguments.model else "runs/theory"
        names = chain([base], (f"{base}-{number}" for number in count(2)))
        return next(Path(name) for name in names if not (Path(name) / JSON).exists())
    out = Path(arguments.out)
    if (out / JSON).exists():
        raise ValueError(f"got --out {out}, which holds a measurement already, expected another folder; pass a new one")
    return out


def settings_of(arguments: argparse.Namespace, config: RunConfig, prompts: int) -> TheorySettings:
    """How much is measured: a step as large as the run's, if so many prompts are left when a block is."""
    blocks = max(2, min(BLOCKS, prompts // 4))
    most = prompts - -(-prompts // blocks)
    return TheorySettings(
        token_responses=arguments.group,
        batch=min(arguments.step or prompts_per_step(config), most),
        progress=arguments.progress,
        cap=arguments.cap,
        blocks=blocks,
        seed=arguments.seed,
    )


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
                batch_size=arguments.batch_size or config.eval.batch_size, progress=arguments.progress,
            ):  # fmt: skip
                parts[-1].append(group)
                advance("sampling")
            check_spread(parts[0], settings)
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
        raise unwritable(out, error) from error


def show(
    out: Path, what: str, found: Theory, settings: TheorySettings, arguments: argparse.Namespace, console: Console
) -> None:
    """The tables and findings, or the JSON object."""
    if arguments.json:
        print(as_json({"measured on": what, **as_mapping(found, settings)}, indent=2))
    else:
        for table in theory_tables(found):
            show_table(escape(table.title), table.header, table.rows, console)
        say(console, f"{what}.\n")
        for line in findings(found):
            console.print(f"• {line}.", highlight=False, markup=False)
    say(console, f"{out / PAGE}, {JSON} and plots")
