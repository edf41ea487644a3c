"""Synthetic run folders of a grid: level and speed of each method are given, seeds shift all methods equally."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rest_rl.compare.grid import Grid, RunName, read_grid
from rest_rl.config import RunConfig

KINDS = ("single", "parallel", "none")


class Effect(NamedTuple):
    """The effect of a synthetic method: its lead in final exact match, its speed relative to the base, its noise."""

    lead: float = 0.0
    speed: float = 1.0
    noise: float = 0.0


def make_grid(folder: Path, effects: Mapping[str, Effect], seeds: int = 5, steps: int = 60, every: int = 0) -> Grid:
    """Write finished runs of every method and seed, as `rest-rl train` would."""
    names = list(dict.fromkeys(name.split("@")[0] for name in effects))
    grid = read_grid(None, methods=names, seeds=range(seeds), overrides=[f"trl.max_steps={steps}"])
    for label, effect in effects.items():
        method, _, start = label.partition("@")
        for seed in range(seeds):
            make_run(folder, RunName(method, start, seed), grid.run_config(method, "", seed), effect, steps, every)
    return grid


def make_run(folder: Path, name: RunName, config: RunConfig, effect: Effect, steps: int = 60, every: int = 0) -> Path:
    place = folder / "runs" / str(name)
    place.mkdir(parents=True)
    (place / "config.toml").write_text(replace(config, run=replace(config.run, out=str(place))).to_toml())
    of_seed, own = random.Random(name.seed), random.Random(f"a {name}")
    shift = of_seed.gauss(0, 0.05)
    end = 0.6 + shift + effect.lead + own.gauss(0, effect.noise)
    metrics, evaluations = [], []
    for step in range(1, steps + 1):
        reached = 0.4 + (end - 0.4) * (1 - math.exp(-4 * effect.speed * step / steps))
        row = {"rest/exact_match": reached + own.gauss(0, effect.noise / 2), "rest/accuracy": reached + 0.1}
        row |= {"completions/mean_length": 40.0, "entropy": 0.5 - 0.3 * effect.speed * step / steps, "grad_norm": 0.4}
        metrics.append({"step": step, **row})
        if every and step % every == 0:
            evaluations.append({"step": step, "exact_match": reached, "greedy": {"exact_match": reached}})
    for file, rows in (("metrics.jsonl", metrics), ("evaluations.jsonl", evaluations)):
        (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"s_acc": 0.8, "s_format": 1.0, "n": 100, "exact_match_error": 0.01}
    summary = {"steps": steps, "data": {"digest": "abc"}}
    for when, exact in (("before", 0.4), ("after", end)):
        own = {"sampled": exact, "greedy": exact + 0.1, "low": exact + 0.05}
        by_way = {
            way: {**scores, "exact_match": value, "kinds": {kind: {"exact_match": value + 0.01 * index} for index, kind
                  in enumerate(KINDS)}} for way, value in own.items()
        }  # fmt: skip
        low = {**by_way["low"], "temperature": 0.2}
        summary[when] = {**by_way["sampled"], "greedy": by_way["greedy"], "low_temperature": low}
        summary[when]["policy_entropy"] = 0.9 - exact
    (place / "summary.json").write_text(json.dumps(summary))
    return place
