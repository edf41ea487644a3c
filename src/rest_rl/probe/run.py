"""Where the reward signal of a model lies and whether token weights would help, without training."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from rest_rl.config import RunConfig, read_run_file
from rest_rl.data.layout import PromptLayout, resolve_format
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import end_ids
from rest_rl.evaluate.origin import model_label, recorded_run
from rest_rl.jsonl import as_json, reason
from rest_rl.probe.figures import region_facts, rule_facts, sampled_facts, signal_and_noise
from rest_rl.probe.measure import SampledBatch, passes, probe_gradients
from rest_rl.probe.page import as_mapping, draw_probe, format_table, numbered, page
from rest_rl.probe.report import ProbeReport
from rest_rl.probe.rules import SHUFFLED, rules_for
from rest_rl.probe.sample import check_reads, sample_groups
from rest_rl.probe.variance import most_per_step
from rest_rl.runlog import SILENT, Observer, replace_file
from rest_rl.train.policy import load_policy, policy_tokenizer
from rest_rl.train.prompts import read_data

JSON, PAGE = "probe.json", "probe.md"
LEAST_PROMPTS = 8
"""Fewer leave no pairs to speak of when some are left out."""


@dataclass(frozen=True)
class Sampling:
    """How much is sampled, and which training step is predicted; see `probe`."""

    prompts: int
    group: int
    seed: int = 0
    progress: float = 0.0
    step: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        least = {"prompts": LEAST_PROMPTS, "group": 2, "seed": 0, "step": 1, "max_new_tokens": 1, "batch_size": 1}
        check_least({name: (getattr(self, name), number) for name, number in least.items()})
        if not 0 <= self.progress <= 1:
            raise UserError(f"progress {self.progress}", "training progress in [0, 1]", "change it")


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
        prompts: at least 8.
        group: responses to each prompt, at least 2.
        seed: of the choice of prompts and of sampling.
        progress: training progress in [0, 1] that reward and curriculum are taken at.
        step: prompts of the optimizer step that is predicted; the run's if None.
        norm_cap: scale prompts whose gradient is longer than so many medians down to that length; 0 for none.
        max_new_tokens: of a response; the run's if None.
        batch_size: responses in one forward pass; the run's if None.
        overrides: settings of the run, "rest.preset=paper".
        out: a folder for probe.md, probe.json and the pictures; nothing is written if None.
        on_report: is given each report as soon as it is measured, before anything is written.
        observer: is told how far the work is.

    Raises:
        UserError: before anything is sampled, except for a folder that cannot be written at the end.
    """
    sampling = Sampling(prompts, group, seed, progress, step, max_new_tokens, batch_size)
    if not 0 <= norm_cap < float("inf"):
        raise UserError(f"norm cap {norm_cap}", "a multiple of the median norm, 0 for none", "change it")
    folder = None if out is None else unused_folder(Path(out), JSON)
    config = probed_run(model, data, overrides)
    layouts = layouts_of(config, formats)
    samples = [draw_samples(config, layout, prompts, seed, observer) for layout in layouts]
    if folder is not None:
        make_folder(folder)
    policy = load_model(config, observer)
    reports = []
    for layout, own in zip(layouts, samples, strict=True):
        reports.append(measure(policy, layout, own, config, sampling, norm_cap, observer))
        on_report(reports[-1])
    if len(reports) > 1:
        observer.show_table(*format_table(reports))
    if folder is not None:
        title = f"Probe of {label_of(model)} on {Path(data).name if data else 'its own prompts'}"
        with writing(folder):
            pictures = {report.format: draw_probe(report, folder) for report in reports}
            replace_file(folder / PAGE, page(title, reports, pictures))
            replace_file(folder / JSON, as_json([as_mapping(report) for report in reports], indent=2) + "\n")
    return reports


def measure(
    model: Any,
    layout: PromptLayout,
    samples: Sequence[ToolSample],
    config: RunConfig,
    sampling: Sampling,
    norm_cap: float,
    observer: Observer,
) -> ProbeReport:
    """The report on one format."""
    name, number, progress = layout.format.name, len(samples), sampling.progress
    rules = rules_for(name, config.rest.resolve().weights)
    step = step_size(config, sampling.step, number, observer)
    with counting(observer, name, number * 2 + passes(number, len(rules))) as advance:
        groups = list(sample_run_groups(model, layout, samples, config, sampling, lambda: advance("sampling")))
        batch = SampledBatch.of(groups, model, layout.tokenizer, name, progress, lambda: advance("entropies"))
        found = probe_gradients(
            model, batch, rules, progress, prompts_per_step=step,
            batch_size=sampling.batch_size or config.eval.batch_size, seed=sampling.seed, cap=norm_cap,
            advance=lambda: advance("gradients"),
        )  # fmt: skip
    regions, sure = region_facts(groups, batch.tokens, found.gram_KMKM)
    signal, snr, heaviest = signal_and_noise(found.gram_KMKM)
    return ProbeReport(
        format=name,
        sampled=sampled_facts(groups, end_ids(model, layout.tokenizer)),
        regions=regions,
        rules=rule_facts(found.rules, SHUFFLED),
        sure=sure,
        signal=signal,
        snr=snr,
        heaviest=heaviest,
        prompts_per_step=step,
        progress=progress,
        coordinates=found.coordinates.size,
        parameters=found.coordinates.total,
        tokens=batch.tokens,
    )


def probed_run(model: str | Path | None, data: str | Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run that would train this model: that of its run folder, or the package's own with the settings given."""
    path, _, folder = recorded_run(str(model)) if model else (None, None, None)
    options = [f"model.path={json.dumps(path)}"] if path else []
    options += [f"data.path={json.dumps(str(data))}"] if data else []
    return read_run_file(folder / "config.toml" if folder else None, [*options, *overrides])


def layouts_of(config: RunConfig, formats: Sequence[str]) -> list[PromptLayout]:
    """How prompts are laid out in each format, each once; in the run's own if there is none."""
    tokenizer, variables = policy_tokenizer(config.model), config.model.chat_template_kwargs
    names = [
        resolve_format(name, tokenizer, variables, keeps_prompts=config.data.keep_prompts)[0]
        for name in formats or [config.rest.format]
    ]
    return [PromptLayout(policy_tokenizer(config.model), name, variables) for name in dict.fromkeys(names)]


def draw_samples(
    config: RunConfig,
    layout: PromptLayout,
    number: int,
    seed: int,
    observer: Observer,
    least: int = LEAST_PROMPTS,
    remedy: str = "add data",
) -> list[ToolSample]:
    """A random part of what training would see in this format, or all of it."""
    check_reads(config.rest.resolve().reward)
    rest = replace(config.rest, format=layout.format.name)
    unmeasured = replace(config, rest=rest, eval=replace(config.eval, prompts=0, every=0))
    samples = read_data(unmeasured, layout, observer.say).samples
    if len(samples) < least:
        raise UserError(f"{len(samples)} samples", f"at least {least}", remedy)
    if len(samples) < number:
        observer.say(f"{len(samples)} samples, fewer than the {number} prompts asked for: all are taken")
    return random.Random(seed).sample(samples, min(number, len(samples)))


def sample_run_groups(
    model: Any,
    layout: PromptLayout,
    samples: Sequence[ToolSample],
    config: RunConfig,
    sampling: Sampling,
    advance: Callable[[], Any],
) -> Iterator[Any]:
    """Groups of responses, scored as the run would; `advance` is called for each."""
    limit = sampling.max_new_tokens or int(config.trl.get("max_completion_length", config.eval.max_new_tokens))
    for group in sample_groups(
        model, layout, samples, group_size=sampling.group, max_new_tokens=limit,
        batch_size=sampling.batch_size or config.eval.batch_size, seed=sampling.seed, progress=sampling.progress,
        reward=config.rest.resolve().reward,
    ):  # fmt: skip
        advance()
        yield group


def step_size(config: RunConfig, wanted: int | None, prompts: int, observer: Observer) -> int:
    """Prompts of the step to predict: as many as asked for, or the run's, as far as so many prompts can tell."""
    if wanted is None:
        names = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}
        responses, parts, group = (int(config.trl.get(name, default)) for name, default in names.items())
        wanted = max(1, responses * parts // max(1, group))
    if wanted > (most := most_per_step(prompts)):
        steps = numbered(most, "prompt")
        observer.say(f"{prompts} prompts can predict steps of {steps} at most, not {wanted}: taken for {most}")
    return min(wanted, most)


def load_model(config: RunConfig, observer: Observer) -> Any:
    """The model on the accelerator where there is one."""
    with observer.track("loading"):
        model, _ = load_policy(replace(config.model, dtype=config.weights_dtype))
        return model.to(torch.accelerator.current_accelerator() or "cpu")


@contextmanager
def counting(observer: Observer, name: str, total: int) -> Iterator[Callable[[str], None]]:
    """Progress of one format; call it with what has been done."""
    done = 0
    with observer.track(name, total) as advance:

        def step(what: str) -> None:
            nonlocal done
            done += 1
            advance(done, note=f"{name}: {what}")

        yield step


def check_least(values: dict[str, tuple[int | None, int]]) -> None:
    """UserError for a value below its least; by name."""
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise UserError(f"{name.replace('_', ' ')} {value}", f"at least {least}", "raise it")


def label_of(model: str | Path | None) -> str:
    """What a page calls the model."""
    return model_label(str(model)) if model else "the embedded model"


def free_folder(verb: str, model: str | Path | None, file: str) -> Path:
    """runs/probe-MODEL, or with a number after it where results are already."""
    base = f"runs/{verb}-{model_label(str(model))}" if model else f"runs/{verb}"
    names = chain([base], (f"{base}-{number}" for number in count(2)))
    return next(Path(name) for name in names if not (Path(name) / file).exists())


def unused_folder(folder: Path, file: str) -> Path:
    """The folder, unless results are in it already."""
    if (folder / file).exists():
        raise UserError(f"{folder}, which holds a {file} already", "another folder", "pass a new --out")
    return folder


def make_folder(folder: Path) -> None:
    """Make the folder of the results, and try to write to it, before there are any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder} ({reason(error)})", "a folder to write to", "pass another --out") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write results that have been shown; UserError for a folder that can be written to no more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"--out {folder} ({reason(error)})",
            "to write the results to it",
            "what was measured stands above, save it from there, or make room and measure again (the same seed gives "
            "the same figures)",
        ) from error
