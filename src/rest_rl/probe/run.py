"""Measure where a model's reward signal is and whether token weights would help, without training."""

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

from rest_rl.config import DataTable, EnvTable, RestTable, RunConfig, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.prepare import Prepared
from rest_rl.errors import UserError, check_minimums
from rest_rl.evaluate.generate import eos_token_ids
from rest_rl.evaluate.held_out import derive_response_limit
from rest_rl.evaluate.origin import model_label, resolve_origin
from rest_rl.jsonl import as_json, describe_os_error
from rest_rl.objects import describe_address
from rest_rl.probe.figures import (
    compute_region_facts,
    compute_rule_facts,
    measure_signal,
    summarize_rollouts,
    summarize_samples,
)
from rest_rl.probe.measure import SampledBatch, count_progress_steps, measure_gradients
from rest_rl.probe.page import build_formats_table, draw_probe, render_page, to_mapping
from rest_rl.probe.report import ProbeReport
from rest_rl.probe.rollouts import World
from rest_rl.probe.rules import SHUFFLED, select_rules
from rest_rl.probe.sample import Sampling, sample_groups
from rest_rl.probe.variance import max_prompts_per_step
from rest_rl.runlog import SILENT, Observer, replace_file
from rest_rl.train.environment import EnvironmentData, read_tasks, with_turn_weights
from rest_rl.train.policy import (
    add_adapter,
    load_policy,
    load_policy_tokenizer,
    new_adapter_config,
    policy_context_length,
)
from rest_rl.train.prompts import TrainingData, read_data, render_gold
from rest_rl.train.request import read_run_source
from rest_rl.train.trl.settings import with_machine_defaults
from rest_rl.weights import WeightRule

JSON_FILE, PAGE_FILE = "probe.json", "probe.md"
MIN_PROMPTS = 8
"""With fewer prompts, too few pairs of prompts remain when a jackknife block is left out."""


def probe(
    model: str | Path | None = None,
    data: str | Path | None = None,
    *,
    env: Any = None,
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
    """Predict the effect of each region and weight rule on the next optimizer step; return one report per format.

    Args:
        model: A run folder, a model, an adapter or a hub name; the embedded model if None.
        data: Dialogues, as for `train`; those of the model's run if None.
        env: An environment, as for `train`, whose tasks replace the dialogues; that of the model's run if None.
        formats: Tool-call formats, one report each; the run's format if empty.
        prompts: Number of prompts to draw from the data, at least 8.
        group: Responses per prompt, at least 2.
        seed: Seed for drawing prompts and for sampling.
        progress: Training progress in [0, 1] at which reward and curriculum are evaluated.
        step: Prompts per optimizer step for which the effect is predicted; the run's if None.
        norm_cap: Scale down prompts whose gradient norm exceeds this multiple of the median; 0 for none.
        max_new_tokens: Maximum length of a response, or of a turn in an environment; the run's if None.
        batch_size: Responses per forward pass; the run's if None.
        overrides: Settings of the run, such as "rest.preset=paper".
        out: Folder for probe.md, probe.json and the plots; nothing is written if None.
        on_report: Called with each report as soon as it is measured, before anything is written.
        observer: Receives the progress.

    Raises:
        UserError: For a wrong argument before anything is sampled, or if the folder cannot be written at the end.
    """
    check_numbers(prompts, step, norm_cap)
    config = resolve_run(model, data, overrides, env)  # fails on mistakes before minutes of loading and sampling
    layouts = build_layouts(config, formats, observer)
    limited = config.with_response_limit(layouts[0].context)
    sampling = build_sampling(limited, group, seed, progress, max_new_tokens, batch_size)
    drawn_prompts = [draw_format(config, own, sampling, prompts, observer, max_new_tokens is None) for own in layouts]
    if out is not None:
        create_folder(Path(out), JSON_FILE)
    policy, rule, reports = load_model(config, seed, observer), config.rest.resolve().weights, list[ProbeReport]()
    for layout, (drawn, own) in zip(layouts, drawn_prompts, strict=True):
        size = resolve_prompts_per_step(config, step, len(drawn), observer)
        reports.append(probe_format(policy, layout, drawn, own, rule, size, norm_cap, observer))
        on_report(reports[-1])  # at once, so that an interrupt in the next format loses nothing
    if len(reports) > 1:
        observer.show_table(*build_formats_table(reports))
    if out is not None:
        write_reports(f"{label_model(model)} {label_prompts(config, data)}", reports, Path(out))
    return reports


def check_numbers(prompts: int, step: int | None, norm_cap: float) -> None:
    check_minimums({"the number of prompts": (prompts, MIN_PROMPTS), "the number of prompts per step": (step, 1)})
    if not 0 <= norm_cap < float("inf"):
        raise UserError(f"the norm cap is {norm_cap}", "0 (no cap) or a positive multiple of the median norm")


def write_reports(subject: str, reports: Sequence[ProbeReport], folder: Path) -> None:
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
    name, progress, world = layout.format.name, sampling.progress, sampling.world
    rules = select_rules(name, rule, by_turn=world is not None)
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
        environment=world and summarize_rollouts(groups, world.environment.name, world.credit.kind),
    )


def resolve_run(
    model: str | Path | None, data: str | Path | None, overrides: Sequence[str], env: Any = None
) -> RunConfig:
    """Return the configuration of the model's run, or of the default run, with `data` or `env`, and `overrides`."""
    # A supervised run is followed by reinforcement learning, so its model is probed under the preset `rest`. Held-out
    # prompts belong to the run's own data; with other data they are dropped.
    if data and env:
        raise UserError("--data and --env are both given", "dialogues or an environment", "remove one of them")
    path, run, _ = resolve_origin(str(model)) if model else (None, None, None)
    address = describe_address(env, "env") if env else None
    given = {"model.path": path, "data.path": str(data) if data else None, "env.path": address}
    options = [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value), *overrides]
    if run is None:
        return with_turn_weights(read_run_file(None, options))
    if run.rest.is_supervised:
        run = replace(run, rest=RestTable(format=run.rest.format), trl=read_run_file(None, options).trl)
    # What the run trained contains the adapter that it started from.
    run = replace(run, eval=replace(run.eval, every=0), model=replace(run.model, adapter=""))
    run = replace(leave_world(run), data=replace(run.data, held_out="")) if data else run
    run = enter_world(run, address) if address and address != run.env.path else run
    return read_run_source(run, options)


# A run records every field of its weights, so a normalization that only suits its own kind of responses looks chosen.
def without_normalization(rest: RestTable, kind: str) -> RestTable:
    weights = {key: value for key, value in rest.weights.items() if (key, value) != ("normalization", kind)}
    return replace(rest, weights=weights)


def leave_world(run: RunConfig) -> RunConfig:
    """Return a run on dialogues, without the settings of its environment, if it has one."""
    rest = replace(without_normalization(run.rest, "turn"), credit=None)
    return replace(run, env=EnvTable(), rest=rest) if run.env.path else run


def enter_world(run: RunConfig, address: str) -> RunConfig:
    """Return a run in the environment at `address`, without settings of its own data or environment."""
    if run.env.path:
        return replace(run, env=EnvTable(path=address))
    rest = replace(without_normalization(run.rest, "response"), resample_rounds=0)
    config = replace(run, run=replace(run.run, engine="trl"), data=DataTable(), env=EnvTable(path=address), rest=rest)
    return with_turn_weights(config)


def build_sampling(
    config: RunConfig, group: int, seed: int, progress: float, max_new_tokens: int | None, batch_size: int | None
) -> Sampling:
    """Return the sampling settings and reward of the run, changed by the arguments that are not None."""
    return Sampling(
        group,
        config.max_response_tokens if max_new_tokens is None else max_new_tokens,
        config.eval.batch_size if batch_size is None else batch_size,
        seed,
        progress,
        config.rest.resolve().reward,
    )


def build_layouts(config: RunConfig, formats: Sequence[str], observer: Observer) -> list[PromptLayout]:
    """Return a prompt layout for each distinct format, or only for the run's format if `formats` is empty."""
    new_adapter_config(config)  # raises for a [peft] that does not fit the model
    tokenizer, variables = load_policy_tokenizer(config.model, observer), config.model.chat_template_kwargs
    names = [
        resolve_format(name, tokenizer, variables, keeps_prompts=config.data.keep_prompts)[0]
        for name in formats or [config.rest.format]
    ]
    context = policy_context_length(config.model, tokenizer)
    return [PromptLayout(tokenizer, name, variables, context) for name in dict.fromkeys(names)]


def draw_format(
    config: RunConfig, layout: PromptLayout, sampling: Sampling, count: int, observer: Observer, derives_limit: bool
) -> tuple[list[Prepared], Sampling]:
    """Draw the prompts or tasks for one format; return them with the settings for sampling."""
    data = read_prompts(config, layout, observer, sampling.max_new_tokens)
    drawn = draw_prompts(data, count, sampling.seed, observer)
    return drawn, in_environment(sampling, config, layout, data, derives_limit=derives_limit)


def in_environment(
    sampling: Sampling, config: RunConfig, layout: PromptLayout, data: TrainingData, *, derives_limit: bool
) -> Sampling:
    """Return the settings for rollouts if the data are tasks.

    With `derives_limit`, a limit of 0 tokens is derived from the gold calls, as in training.
    """
    if not isinstance(data, EnvironmentData) or data.environment is None:
        return sampling
    sampling = replace(sampling, world=World.from_run(config, data.environment))
    if not derives_limit or config.trl.get("max_completion_length") != 0:
        return sampling
    golds = [render_gold(each.sample, layout) for each in data.prepared]
    return replace(sampling, max_new_tokens=derive_response_limit(golds, layout, sampling.max_new_tokens))


def read_prompts(config: RunConfig, layout: PromptLayout, observer: Observer, response_tokens: int) -> TrainingData:
    """Read the prompts that training would use in this format and that leave room for a response, or the tasks."""
    # Held-out measurement is switched off, so that `read_data` returns all training prompts.
    rest = replace(config.rest, format=layout.format.name)
    unmeasured = replace(config, rest=rest, eval=replace(config.eval, prompts=0, every=0))
    if config.env.path:
        return read_tasks(unmeasured, layout, observer)
    return read_data(unmeasured, layout, observer, response_tokens)


def draw_prompts(
    data: TrainingData,
    count: int,
    seed: int,
    observer: Observer,
    min_prompts: int = MIN_PROMPTS,
    remedy: str = "add data",
) -> list[Prepared]:
    """Draw up to `count` of the prompts."""
    prompts = data.prepared
    if len(prompts) < min_prompts:
        raise UserError(f"the data has {len(prompts)} usable samples", f"at least {min_prompts}", remedy)
    if len(prompts) < count:
        observer.say(
            f"the data has {len(prompts)} samples, fewer than the {count} prompts requested; using all of them"
        )
    return random.Random(seed).sample(prompts, min(count, len(prompts)))


def resolve_prompts_per_step(config: RunConfig, requested: int | None, num_prompts: int, observer: Observer) -> int:
    """Return the prompts per step of the prediction: the requested number or the run's, limited by `num_prompts`."""
    if requested is None:
        # TRL counts responses: a step has batch size x accumulation / group size prompts on one device.
        names = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}
        responses, parts, group = (int(config.trl.get(name, default)) for name, default in names.items())
        requested = max(1, responses * parts // max(1, group))
    if requested > (most := max_prompts_per_step(num_prompts)):
        observer.say(
            f"{num_prompts} prompts can predict a step of at most {most}, not {requested}; predicting a step of {most}"
        )
    return min(requested, most)


def load_model(config: RunConfig, seed: int, observer: Observer) -> Any:
    """Load the policy. Its trainable parameters are those that the run would train: with `[peft]`, an adapter's."""
    with observer.track("loading"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for a new adapter
        model, _ = load_policy(replace(config.model, dtype=with_machine_defaults(config).weights_dtype), config.peft)
        model = add_adapter(model, new_adapter_config(config))
        return model.to(torch.accelerator.current_accelerator() or "cpu")


@contextmanager
def track_steps(observer: Observer, name: str, total: int) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Show one progress bar for several kinds of work; the yielded function returns the step callback for a label."""
    pieces = count(1)
    with observer.track(name, total) as advance:
        yield lambda what: lambda: advance(next(pieces), note=what)


def label_model(model: str | Path | None) -> str:
    return model_label(str(model)) if model else "the embedded model"


def label_prompts(config: RunConfig, data: str | Path | None) -> str:
    return f"in {config.env.path}" if config.env.path else f"on {Path(data).name if data else 'its own prompts'}"


def choose_unused_folder(verb: str, model: str | Path | None, file: str) -> Path:
    """Return the folder runs/VERB-MODEL, with a number appended if that folder already contains `file`."""
    base = f"runs/{verb}-{model_label(str(model))}" if model else f"runs/{verb}"
    names = chain([base], (f"{base}-{number}" for number in count(2)))
    return next(Path(name) for name in names if not (Path(name) / file).exists())


def create_folder(folder: Path, file: str) -> None:
    """Create the results folder and test that it is writable, before the long measurement starts."""
    if (folder / file).exists():
        raise UserError(f"--out {folder} already contains a {file}", remedy="pass another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to --out {folder} ({describe_os_error(error)})", remedy="pass another --out"
        ) from error


@contextmanager
def convert_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing results into a UserError that suggests saving the printed results."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the results to --out {folder} ({describe_os_error(error)})",
            remedy="save the output above, or free disk space and measure again (the same seed gives the same figures)",
        ) from error
