"""Where the reward signal of a model lies and whether token weights would help, without training."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from rest_rl.config import RestTable, RunConfig, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import eos_token_ids
from rest_rl.evaluate.origin import model_label, resolve_origin
from rest_rl.jsonl import as_json, reason
from rest_rl.probe.figures import compute_region_facts, compute_rule_facts, measure_signal, summarize_samples
from rest_rl.probe.measure import SampledBatch, count_progress_steps, measure_gradients
from rest_rl.probe.page import build_formats_table, draw_probe, render_page, to_mapping
from rest_rl.probe.report import ProbeReport
from rest_rl.probe.rules import SHUFFLED, select_rules
from rest_rl.probe.sample import Sampling, check_minimums, sample_groups
from rest_rl.probe.variance import max_prompts_per_step
from rest_rl.runlog import SILENT, Observer, replace_file
from rest_rl.train.policy import load_policy, load_policy_tokenizer, policy_context_length
from rest_rl.train.prompts import read_data
from rest_rl.train.request import read_run_source
from rest_rl.weights import WeightRule

JSON_FILE, PAGE_FILE = "probe.json", "probe.md"
MIN_PROMPTS = 8
"""Fewer leave no pairs to speak of when some are left out."""


def probe(
    model: str | Path | None = None,
    data: str | Path | None = None,
    *,
    formats: Sequence[str] = (),
    prompts: int = 96,
    group: int = 8,
    seed: int = 0,
    progress: float = 0.0,
    step: int | None = None,
    norm_cap: float = 0.0,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    on_report: Callable[[ProbeReport], Any] = lambda report: None,
    observer: Observer = SILENT,
) -> list[ProbeReport]:
    """Sample responses and measure what each region and each weight rule means for the next training step.

    Args:
        model: a run folder, a model, an adapter or a hub name; the embedded model if None.
        data: dialogues, as `train` takes them; those of the model's run if None.
        formats: tool-call formats, a report each; the run's if empty.
        prompts: drawn from the data; at least 8.
        group: responses to each prompt, at least 2.
        seed: of the choice of prompts and of sampling.
        progress: training progress in [0, 1] that reward and curriculum are taken at.
        step: prompts of the optimizer step that is predicted; the run's if None.
        norm_cap: scale prompts whose gradient is longer than so many medians down to that length; 0 for none.
        max_new_tokens: of a response; the run's if None.
        batch_size: responses in one forward pass; the run's if None.
        overrides: settings of the run, such as "rest.preset=paper".
        out: a folder for probe.md, probe.json and the pictures; nothing is written if None.
        on_report: is given each report as soon as it is measured, before anything is written.
        observer: gets the progress.

    Raises:
        UserError: before anything is sampled, except for a folder that cannot be written at the end.
    """
    check_minimums(prompts=(prompts, MIN_PROMPTS), step=(step, 1))
    if not 0 <= norm_cap < float("inf"):
        raise UserError(f"norm cap {norm_cap}", "a multiple of the median norm, 0 for none", "change it")
    config = resolve_run(model, data, overrides)
    own = build_layouts(config, formats)
    limited = config.with_response_limit(own[0].context)
    sampling = build_sampling(limited, group, seed, progress, max_new_tokens, batch_size)
    asked = [(each, draw_prompts(config, each, prompts, seed, observer, sampling.max_new_tokens)) for each in own]
    if out is not None:
        create_folder(Path(out), JSON_FILE)
    policy, rule, reports = load_model(config, observer), config.rest.resolve().weights, list[ProbeReport]()
    for layout, drawn in asked:
        size = resolve_prompts_per_step(config, step, len(drawn), observer)
        reports.append(probe_format(policy, layout, drawn, sampling, rule, size, norm_cap, observer))
        on_report(reports[-1])
    if len(reports) > 1:
        observer.show_table(*build_formats_table(reports))
    if out is not None:
        write_reports(f"{label_model(model)} on {Path(data).name if data else 'its own prompts'}", reports, Path(out))
    return reports


def write_reports(subject: str, reports: Sequence[ProbeReport], folder: Path) -> None:
    """Write probe.md, probe.json and the pictures; UserError if the folder cannot be written."""
    with convert_write_errors(folder):
        pictures = {report.format: draw_probe(report, folder) for report in reports}
        replace_file(folder / PAGE_FILE, render_page(f"Probe of {subject}", reports, pictures))
        replace_file(folder / JSON_FILE, as_json([to_mapping(report) for report in reports], indent=2) + "\n")


def probe_format(
    model: Any,
    layout: PromptLayout,
    prompts: Sequence[Prepared],
    sampling: Sampling,
    rule: WeightRule,
    step: int,
    norm_cap: float,
    observer: Observer,
) -> ProbeReport:
    """The report on one format; `rule` is the run's own, `step` the prompts of the step to predict."""
    name, progress = layout.format.name, sampling.progress
    rules = select_rules(name, rule)
    with track_steps(observer, name, 2 * len(prompts) + count_progress_steps(len(prompts), len(rules))) as done:
        groups = sample_groups(model, layout, prompts, sampling, done("sampling"))
        batch = SampledBatch.from_groups(groups, model, layout.tokenizer, name, progress, done("entropies"))
        found = measure_gradients(
            model, batch, rules, progress, prompts_per_step=step, batch_size=sampling.batch_size,
            seed=sampling.seed, cap=norm_cap, advance=done("gradients"),
        )  # fmt: skip
    regions, sure = compute_region_facts(groups, batch.tokens, found.gram_KMKM)
    signal, snr, heaviest = measure_signal(found.gram_KMKM)
    return ProbeReport(
        format=name,
        sampled=summarize_samples(groups, eos_token_ids(model, layout.tokenizer)),
        regions=regions,
        rules=compute_rule_facts(found.rules, SHUFFLED),
        sure=sure,
        signal=signal,
        snr=snr,
        heaviest=heaviest,
        prompts_per_step=step,
        progress=progress,
        coordinates=found.coordinates.size,
        parameters=found.coordinates.num_parameters,
        tokens=batch.tokens,
    )


def resolve_run(model: str | Path | None, data: str | Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run that would train this model: that of its run folder, or the package's own with the settings given.

    What a supervised run has trained is probed as the preset `rest` would go on from it, other data than a run's own
    without its held-out prompts.
    """
    path, run, _ = resolve_origin(str(model)) if model else (None, None, None)
    given = {"model.path": path, "data.path": str(data) if data else None}
    options = [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value), *overrides]
    if run is None:
        return read_run_file(None, options)
    if run.rest.is_supervised:
        run = replace(run, rest=RestTable(format=run.rest.format), trl=read_run_file(None, options).trl)
    own = replace(run.data, held_out="") if data else run.data
    return read_run_source(replace(run, data=own, eval=replace(run.eval, every=0)), options)


def build_sampling(
    config: RunConfig, group: int, seed: int, progress: float, max_new_tokens: int | None, batch_size: int | None
) -> Sampling:
    """Sampling and reward as the run has them, where nothing else is asked for."""
    return Sampling(
        group,
        config.max_response_tokens if max_new_tokens is None else max_new_tokens,
        config.eval.batch_size if batch_size is None else batch_size,
        seed,
        progress,
        config.rest.resolve().reward,
    )


def build_layouts(config: RunConfig, formats: Sequence[str]) -> list[PromptLayout]:
    """How prompts are laid out in each format, each once; in the run's own if there is none."""
    tokenizer, variables = load_policy_tokenizer(config.model), config.model.chat_template_kwargs
    names = [
        resolve_format(name, tokenizer, variables, keeps_prompts=config.data.keep_prompts)[0]
        for name in formats or [config.rest.format]
    ]
    context = policy_context_length(config.model, tokenizer)
    return [PromptLayout(tokenizer, name, variables, context) for name in dict.fromkeys(names)]


def draw_prompts(
    config: RunConfig,
    layout: PromptLayout,
    count: int,
    seed: int,
    observer: Observer,
    response_tokens: int,
    min_prompts: int = MIN_PROMPTS,
    remedy: str = "add data",
) -> list[Prepared]:
    """A random part of what training would see in this format, or all of it; each with room for a response."""
    rest = replace(config.rest, format=layout.format.name)
    unmeasured = replace(config, rest=rest, eval=replace(config.eval, prompts=0, every=0))
    prompts = read_data(unmeasured, layout, observer, response_tokens).prepared
    if len(prompts) < min_prompts:
        raise UserError(f"{len(prompts)} samples", f"at least {min_prompts}", remedy)
    if len(prompts) < count:
        observer.say(f"{len(prompts)} samples, fewer than the {count} prompts asked for: all are taken")
    return random.Random(seed).sample(prompts, min(count, len(prompts)))


def resolve_prompts_per_step(config: RunConfig, requested: int | None, num_prompts: int, observer: Observer) -> int:
    """Prompts of the step to predict: as many as asked for, or the run's, as far as so many prompts can tell."""
    if requested is None:
        names = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}
        responses, parts, group = (int(config.trl.get(name, default)) for name, default in names.items())
        requested = max(1, responses * parts // max(1, group))
    if requested > (most := max_prompts_per_step(num_prompts)):
        observer.say(
            f"{num_prompts} prompts can predict a step of {most} at most, not of {requested}: it is taken for {most}"
        )
    return min(requested, most)


def load_model(config: RunConfig, observer: Observer) -> Any:
    """The model on the accelerator where there is one."""
    with observer.track("loading"):
        model, _ = load_policy(replace(config.model, dtype=config.weights_dtype))
        return model.to(torch.accelerator.current_accelerator() or "cpu")


@contextmanager
def track_steps(observer: Observer, name: str, total: int) -> Iterator[Callable[[str], Callable[[], None]]]:
    """A bar over several kinds of work: `done("sampling")` is to be called after each piece of it."""
    pieces = count(1)
    with observer.track(name, total) as advance:
        yield lambda what: lambda: advance(next(pieces), note=what)


def label_model(model: str | Path | None) -> str:
    """What a page calls the model."""
    return model_label(str(model)) if model else "the embedded model"


def choose_unused_folder(verb: str, model: str | Path | None, file: str) -> Path:
    """runs/probe-MODEL, or with a number after it where results are already."""
    base = f"runs/{verb}-{model_label(str(model))}" if model else f"runs/{verb}"
    names = chain([base], (f"{base}-{number}" for number in count(2)))
    return next(Path(name) for name in names if not (Path(name) / file).exists())


def create_folder(folder: Path, file: str) -> None:
    """Make the folder of the results and try to write to it, before there are any."""
    if (folder / file).exists():
        raise UserError(f"{folder}, which holds a {file} already", "another folder", "pass a new --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder} ({reason(error)})", "a folder to write to", "pass another --out") from error


@contextmanager
def convert_write_errors(folder: Path) -> Iterator[None]:
    """Write results that have been shown; UserError for a folder that can be written to no more."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {folder} ({reason(error)})",
            "to write the results to it",
            "save what stands above, or make room and measure again (the same seed gives the same figures)",
        ) from error
