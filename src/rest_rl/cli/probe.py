"""The verb `probe`: where the reward signal of a model lies and whether weights would help, without training."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from rest_rl.cli.terminal import Screen, show_table
from rest_rl.config import RunConfig, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import end_ids
from rest_rl.evaluate.origin import model_label, recorded_run
from rest_rl.jsonl import as_json, reason
from rest_rl.presets import Preset
from rest_rl.probe.advice import advice_on, verdict
from rest_rl.probe.figures import (
    LEAST_PROMPTS,
    GroupTokens,
    Probe,
    region_facts,
    rule_facts,
    sampled_facts,
    signal_and_noise,
)
from rest_rl.probe.measure import (
    Weigher,
    passes,
    probe_gradients,
    sampled_tokens,
)
from rest_rl.probe.page import (
    as_mapping,
    draw_probe,
    format_table,
    gradient_line,
    numbered,
    page,
    plain_advice_text,
    probe_tables,
    sampled_line,
)
from rest_rl.probe.rules import SHUFFLED, rivals
from rest_rl.probe.sample import Group, check_reads, sample_groups
from rest_rl.probe.variance import most_per_step
from rest_rl.rewards import RewardRule
from rest_rl.runlog import replace_file
from rest_rl.train.policy import load_policy, policy_tokenizer, quiet_loading
from rest_rl.train.prompts import read_data

JSON, PAGE = "probe.json", "probe.md"
LEAST = {"max_new_tokens": 1, "batch_size": 1, "seed": 0, "step": 1}
NO_TAGS = ("authors-code",)
"""Rules of the published code, which knows the tags of toolrl and hermes alone."""


class Asked(NamedTuple):
    """One format with its prompts."""

    layout: PromptLayout
    samples: list[ToolSample]


def probe(arguments: argparse.Namespace) -> int:
    """Sample, measure, show and write; whatever a user can have got wrong is found before anything is sampled."""
    if not arguments.debug:
        quiet_loading()
    console = Console(stderr=arguments.json)
    check_numbers(arguments)
    out = fresh_folder(arguments, JSON)
    config = run_of(arguments)
    asked = [ask(config, name, arguments, arguments.prompts, console) for name in formats_of(config, arguments)]
    make_folder(out)
    with console.status("loading"):
        model, _ = load_policy(replace(config.model, dtype=config.weights_dtype))
        model.to(torch.accelerator.current_accelerator() or "cpu")
    found: list[tuple[Probe, list[GroupTokens]]] = []
    for one in asked:
        found.append(measure(model, one, config, arguments, console))
        show(found[-1][0], arguments, console)
    probes = [one for one, _ in found]
    if len(probes) > 1 and not arguments.json:
        formats = format_table(probes)
        show_table(formats.title, formats.header, formats.rows, console)
    write(out, title_of(arguments), probes, {one.format: tokens for one, tokens in found})
    say(console, f"{out / PAGE}, {JSON} and plots")
    return 0


def check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError for numbers with which nothing can be estimated."""
    check_least(arguments, {**LEAST, "prompts": LEAST_PROMPTS, "group": 2})
    if not 0 <= arguments.norm_cap < float("inf"):
        raise UserError(f"--norm-cap {arguments.norm_cap}", "a multiple of the median, 0 for none", "change it")
    if not 0 <= arguments.progress <= 1:
        raise UserError(f"--progress {arguments.progress}", "training progress in [0, 1]", "change it")


def check_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """ValueError for an option below its least value."""
    for name, number in least.items():
        value = getattr(arguments, name)
        if value is not None and value < number:
            raise UserError(f"--{name.replace('_', '-')} {value}", f"at least {number}", "raise it")


def fresh_folder(arguments: argparse.Namespace, file: str) -> Path:
    """Where the results of the verb go, `file` among them; ValueError for a folder that holds one already."""
    if arguments.out is None:
        verb = arguments.verb
        base = f"runs/{verb}-{model_label(arguments.model)}" if arguments.model else f"runs/{verb}"
        names = chain([base], (f"{base}-{number}" for number in count(2)))
        return next(Path(name) for name in names if not (Path(name) / file).exists())
    out = Path(arguments.out)
    if (out / file).exists():
        raise UserError(f"--out {out}, which holds a {file} already", "another folder", "pass a new one")
    return out


def make_folder(out: Path) -> None:
    """The folder of the results, tried before there are any; ValueError if nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out} ({reason(error)})", "a folder that can be written", "pass another --out"
        ) from error


def unwritten(out: Path, error: OSError) -> ValueError:
    """The error for a folder that can be written no more when the results are known, and have been shown."""
    return UserError(
        f"--out {out} ({reason(error)})",
        "to write the results to it",
        "what was measured stands above, save it from there, or make room and measure again (the same --seed gives "
        "the same figures)",
    )


def run_of(arguments: argparse.Namespace) -> RunConfig:
    """The run that would train this model: that of its run folder, or the package's own with the options set."""
    path, run, folder = recorded_run(arguments.model) if arguments.model else (None, None, None)
    options = [f"model.path={json.dumps(path)}"] if path else []
    options += [f"data.path={json.dumps(arguments.data)}"] if arguments.data else []
    if run is None or folder is None:
        return read_run_file(None, [*options, *arguments.set])
    return read_run_file(folder / "config.toml", [*options, *arguments.set])


def formats_of(config: RunConfig, arguments: argparse.Namespace) -> list[str]:
    """The formats to probe, each once, in the order of the options."""
    tokenizer, variables = policy_tokenizer(config.model), config.model.chat_template_kwargs
    names = arguments.format or [config.rest.format]
    return list(
        dict.fromkeys(
            resolve_format(name, tokenizer, variables, keeps_prompts=config.data.keep_prompts)[0] for name in names
        )
    )


def ask(
    config: RunConfig,
    name: str,
    arguments: argparse.Namespace,
    prompts: int,
    console: Console,
    least: int = LEAST_PROMPTS,
    remedy: str = "add data",
) -> Asked:
    """So many prompts of one format, or all there are: a random part of what training would see."""
    check_reads(scoring_of(config))
    layout = PromptLayout(policy_tokenizer(config.model), name, config.model.chat_template_kwargs)
    unmeasured = replace(config, rest=replace(config.rest, format=name), eval=replace(config.eval, prompts=0, every=0))
    samples = read_data(unmeasured, layout, lambda text: say(console, text)).samples
    if len(samples) < least:
        raise UserError(f"{len(samples)} samples", f"at least {least}", f"{remedy}")
    if len(samples) < prompts:
        say(console, f"{len(samples)} samples, fewer than the {prompts} prompts asked for: all are taken")
    return Asked(layout, random.Random(arguments.seed).sample(samples, min(prompts, len(samples))))


def scoring_of(config: RunConfig) -> RewardRule:
    """The reward that training by this run would use."""
    return config.rest.resolve().reward


def measure(
    model: Any, asked: Asked, config: RunConfig, arguments: argparse.Namespace, console: Console
) -> tuple[Probe, list[GroupTokens]]:
    """The probe of one format, and its tokens."""
    layout, pad_id = asked.layout, asked.layout.tokenizer.pad_token_id
    rules = rules_for(layout.format.name)
    limit = arguments.max_new_tokens or int(config.trl.get("max_completion_length", config.eval.max_new_tokens))
    batch_size = arguments.batch_size or config.eval.batch_size
    number = len(asked.samples)
    with bar(console, layout.format.name, number * 2 + passes(number, len(rules))) as advance:
        groups: list[Group] = []
        for group in sample_groups(
            model, layout, asked.samples, group_size=arguments.group, max_new_tokens=limit,
            batch_size=batch_size, seed=arguments.seed, progress=arguments.progress,
            reward=scoring_of(config),
        ):  # fmt: skip
            groups.append(group)
            advance("sampling")
        tokens = sampled_tokens(groups, model, pad_id, lambda: advance("entropies"))
        weigher = Weigher(groups, tokens, layout.tokenizer, layout.format, arguments.progress)
        step = step_of(config, arguments, number, console)
        found = probe_gradients(
            model, weigher, rules, prompts_per_step=step, pad_id=pad_id, batch_size=batch_size,
            seed=arguments.seed, cap=arguments.norm_cap, advance=lambda: advance("gradients"),
        )  # fmt: skip
    regions, sure = region_facts(groups, tokens, found.gram_KMKM)
    signal, snr, heaviest = signal_and_noise(found.gram_KMKM)
    return Probe(
        format=layout.format.name,
        sampled=sampled_facts(groups, end_ids(model, layout.tokenizer)),
        regions=regions,
        rules=rule_facts(found.rules, SHUFFLED),
        sure=sure,
        signal=signal,
        snr=snr,
        heaviest=heaviest,
        prompts_per_step=step,
        progress=arguments.progress,
        coordinates=found.coordinates.size,
        parameters=found.coordinates.total,
    ), tokens


def step_of(config: RunConfig, arguments: argparse.Namespace, prompts: int, console: Console) -> int:
    """Prompts of the step to predict: as many as asked for, or the run's, as far as so many prompts can tell."""
    wanted = prompts_per_step(config) if arguments.step is None else arguments.step
    if wanted > (most := most_per_step(prompts)):
        steps = numbered(most, "prompt")
        say(console, f"{prompts} prompts can predict steps of {steps} at most, not {wanted}: taken for {most}")
    return min(wanted, most)


def rules_for(tool_format: str) -> dict[str, Preset]:
    """The rules that know a format."""
    is_known = tool_format in ("toolrl", "hermes")
    return {name: preset for name, preset in rivals().items() if is_known or name not in NO_TAGS}


def prompts_per_step(config: RunConfig) -> int:
    """Prompts of one optimizer step of the run."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    responses, parts, group = (
        int(config.trl.get(name, default)) for name, default in zip(names, (8, 1, 8), strict=True)
    )
    return max(1, responses * parts // max(1, group))


@contextmanager
def bar(console: Console, name: str, total: int) -> Iterator[Callable[[str], None]]:
    """The progress bar of one format; call it with what is being done."""
    done = 0
    with Screen(console).track("sampling", total) as advance:

        def step(what: str) -> None:
            nonlocal done
            done += 1
            advance(done, note=f"{name}: {what}")

        yield step


def say(console: Console, text: str) -> None:
    """One line, as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def title_of(arguments: argparse.Namespace) -> str:
    """What the page calls the probe."""
    model = model_label(arguments.model) if arguments.model else "the embedded model"
    data = Path(arguments.data).name if arguments.data else "its own prompts"
    return f"Probe of {model} on {data}"


def write(out: Path, title: str, probes: Sequence[Probe], tokens: Mapping[str, Sequence[GroupTokens]]) -> None:
    """The JSON objects, the page and the plots; ValueError for a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = {one.format: draw_probe(one, tokens[one.format], out) for one in probes}
        replace_file(out / PAGE, page(title, probes, pictures))
        replace_file(out / JSON, as_json(as_mapping(probes), indent=2) + "\n")
    except OSError as error:
        raise unwritten(out, error) from error


def show(one: Probe, arguments: argparse.Namespace, console: Console) -> None:
    """Tables, the verdict and the recommendation of a format, or its JSON object on a line."""
    if arguments.json:
        print(as_json(as_mapping([one])[0]), flush=True)
        return
    for table in probe_tables(one):
        show_table(escape(table.title), table.header, table.rows, console)
    say(console, f"{sampled_line(one)}.\n{gradient_line(one)}\n")
    for line in verdict(one):
        console.print(f"• {line}.", highlight=False, markup=False)
    console.print()
    console.print(plain_advice_text(advice_on(one)), highlight=False, markup=False, style="bold")
    console.print()
