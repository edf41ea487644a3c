"""A grid of runs: which methods, from which warm starts, under which seeds, and what each run is.

A method is a table of changes to the base run. Its run for a seed differs from the other methods' in `[rest]` alone:
data, order of prompts, steps and evaluation are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w

from rest_rl.config import (
    RunConfig,
    apply_overrides,
    embedded_run,
    from_mapping,
    parse_toml,
    unknown_key,
    without_none,
)
from rest_rl.errors import UserError
from rest_rl.jsonl import reason
from rest_rl.presets import PRESETS
from rest_rl.rewards import RewardConfig
from rest_rl.scoring import PRESET_REWARDS
from rest_rl.weights import WeightConfig

Role = Literal["method", "baseline", "rival", "control", "ablation"]
REFERENCE = "grpo"
SEEDS = (0, 1, 2)
TUNED_CURRICULUM = "rest-tuned-curriculum"
RUNS, LOGS, GRID, BASE = "runs", "logs", "grid.toml", "base.toml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

Tables = Mapping[str, Any]


class Method(NamedTuple):
    """A method of the package: its changes to a run, and what it is there for."""

    role: Role
    text: str
    changes: tuple[str, ...]


_REWARD, _PUBLISHED = PRESET_REWARDS["rest"] or RewardConfig(), PRESETS["paper"].weights or WeightConfig()
_MEAN_SHARE = (_REWARD.accuracy_share_start + _REWARD.accuracy_share_end) / 2
_CURRICULUM = {name: getattr(_PUBLISHED, name) for name in ("decay_format", "gain_arguments", "gain_reasoning")}

METHODS: dict[str, Method] = {
    "rest": Method("method", "ResT, our default", ("rest.preset=rest",)),
    "paper": Method("method", "ResT by the paper's equations, its reward included", ("rest.preset=paper",)),
    "authors-code": Method("method", "ResT as published, its reward included", ("rest.preset=authors-code",)),
    "grpo": Method("baseline", "every token weighs 1", ("rest.preset=grpo",)),
    "dr_grpo": Method("baseline", "advantages without their deviation, constant length", ("rest.preset=dr_grpo",)),
    "dapo": Method("baseline", "mean over tokens, clip-higher", ("rest.preset=dapo",)),
    "top_entropy": Method(
        "rival",
        "the 20 % most uncertain tokens alone (80/20)",
        ("rest.preset=grpo", "rest.weights.rule=top_entropy"),
    ),
    "inverted": Method("rival", "rest, uncertain regions get more", ("rest.preset=rest", "rest.weights.rule=inverted")),
    "permuted": Method(
        "control", "rest, weights dealt to shuffled regions", ("rest.preset=rest", "rest.weights.rule=permuted")
    ),
    "random": Method("control", "grpo, rewards that know nothing", ("rest.preset=grpo", "rest.reward.random=true")),
    "rest-no-dynamic-reward": Method(
        "ablation",
        "rest, the reward's shares stay at their mean",
        (
            "rest.preset=rest",
            f"rest.reward.accuracy_share_start={_MEAN_SHARE}",
            f"rest.reward.accuracy_share_end={_MEAN_SHARE}",
        ),
    ),
    "rest-no-reasoning": Method(
        "ablation", "rest, no gradient on reasoning", ("rest.preset=rest", 'rest.weights.dropped=["reasoning"]')
    ),
    TUNED_CURRICULUM: Method(
        "ablation",
        "rest with the curriculum of the published schedule "
        f"(a_f = a_p = a_t = {'/'.join(f'{value:g}' for value in dict.fromkeys(_CURRICULUM.values()))})",
        ("rest.preset=rest", *(f"rest.weights.{name}={value}" for name, value in _CURRICULUM.items())),
    ),
}
"""What `rest-rl compare` knows by name. `inverted`, `permuted` and the ablations change one thing of `rest`."""

DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.role != "ablation")


class RunName(NamedTuple):
    """What a run folder `METHOD-SEED`, or `METHOD@START-SEED`, is called after."""

    method: str
    start: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def label(self) -> str:
        """The method, with its start if the grid has several."""
        return f"{self.method}@{self.start}" if self.start else self.method

    @classmethod
    def parse(cls, folder: str) -> RunName | None:
        """The name of a run folder; None if it is none of a grid's."""
        label, separator, seed = folder.rpartition("-")
        method, _, start = label.partition("@")
        return cls(method, start, int(seed)) if separator and method and seed.isdecimal() else None


@dataclass(frozen=True)
class Grid:
    """Methods x starts x seeds over one base run."""

    base: Tables
    methods: Mapping[str, Tables]
    seeds: tuple[int, ...] = SEEDS
    starts: Mapping[str, Tables] = field(default_factory=dict)
    reference: str = REFERENCE

    def __post_init__(self) -> None:
        """ValueError for a grid that compares nothing, or twice the same."""
        for name in (*self.methods, *self.starts):
            if not NAME.fullmatch(name):
                raise UserError(f"the name {name!r}", "letters, digits and _ . + - for a folder", "rename the method")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"seeds {list(self.seeds)}", "one or more, each once", "mend --seeds")
        if self.reference not in self.methods:
            raise UserError(
                f"methods {', '.join(self.methods)} without the reference {self.reference!r}",
                "it among them",
                "add it, or set [grid] reference",
            )
        self._refuse_twins()

    def _refuse_twins(self) -> None:
        seen: dict[str, RunName] = {}
        for name, run in self.runs():
            twin = seen.setdefault(run.to_toml(), name)
            if twin is not name:
                raise UserError(
                    f"{twin.label} and {name.label}, which are the same run", "methods that differ", "leave one out"
                )

    def runs(self) -> list[tuple[RunName, RunConfig]]:
        """Every run, seed by seed, so that an unfinished grid has its pairs complete."""
        return [
            (RunName(method, start, seed), self.run(method, start, seed))
            for seed in self.seeds
            for start in (*self.starts,) or ("",)
            for method in self.methods
        ]

    def run(self, method: str, start: str, seed: int) -> RunConfig:
        """The run of one cell; its `run.out` is the base's. ValueError for changes that no run takes."""
        changes = self.methods[method]
        tables = merged(merged(for_preset(self.base, changes), self.starts.get(start, {})), changes)
        tables = merged(tables, {"run": {"seed": seed}})
        weights = (tables.get("rest") or {}).get("weights") or {}
        if weights.get("rule") == "permuted" and "seed" not in weights:
            tables = merged(tables, {"rest": {"weights": {"seed": seed}}})
        try:
            config = from_mapping(RunConfig, tables, "")
            if not config.rest.is_supervised:
                config.rest.resolve()
            return config
        except ValueError as error:
            raise ValueError(f"method {method}: {error}") from error

    def joined(self, older: Grid) -> Grid:
        """This grid with the methods, starts and seeds of an older one of the same runs.

        ValueError if the two grids mean other runs by the same names.
        """
        ours, theirs = self._parts(), older._parts()
        changed = [key for key, table in theirs.items() if key in ours and ours[key] != table]
        if bool(self.starts) != bool(older.starts):
            changed.append("[starts]")
        if changed:
            raise UserError(
                f"a grid that differs in {', '.join(changed[:3])} from the one that was begun in this folder",
                "the same runs, or more methods, starts or seeds",
                "pass another --out",
            )
        methods, starts = {**older.methods, **self.methods}, {**older.starts, **self.starts}
        return replace(self, methods=methods, starts=starts, seeds=tuple(sorted({*older.seeds, *self.seeds})))

    def _parts(self) -> dict[str, Any]:
        """What the names in the grid stand for, as it is written down."""
        parts = {f"[base.{table.name}]": self.base.get(table.name, {}) for table in fields(RunConfig)}
        parts |= {f"[methods.{name}]": table for name, table in self.methods.items()}
        parts |= {f"[starts.{name}]": table for name, table in self.starts.items()}
        return {key: without_none(table) for key, table in parts.items()}

    def files(self) -> dict[str, str]:
        """The grid as the files `grid.toml` and, beside it, `base.toml`; `read_grid` gives the same grid back."""
        head = {"seeds": list(self.seeds), "reference": self.reference, "methods": list(self.methods), "base": BASE}
        tables = {"grid": head, "methods": self.methods, "starts": self.starts}
        return {GRID: tomli_w.dumps(without_none(tables)), BASE: tomli_w.dumps(without_none(self.base))}


@dataclass(frozen=True)
class GridTable:
    """`[grid]` of a grid file."""

    methods: tuple[str, ...] = ()
    """Names of the package's methods or of `[methods]`; without any the file's own and `grpo`, or the default ones."""
    seeds: tuple[int, ...] = SEEDS
    reference: str = REFERENCE
    """What every method is compared with."""
    base: str = ""
    """A run file, as seen from the grid file; without it the package's own run."""


def for_preset(base: Tables, changes: Tables) -> Tables:
    """The base run without what it sets for another preset than the method's.

    `[rest] weights` and `advantage` belong to the base's own preset: GRPO would no longer be GRPO with them. A reward
    stays where the two presets share one.
    """
    rest = base.get("rest") or {}
    preset = (changes.get("rest") or {}).get("preset", rest.get("preset", "rest"))
    own = rest.get("preset", "rest")
    if preset == own:
        return base
    foreign = {"weights", "advantage"}
    if PRESET_REWARDS.get(preset) != PRESET_REWARDS.get(own):
        foreign.add("reward")
    return {**base, "rest": {key: value for key, value in rest.items() if key not in foreign}}


def merged(tables: Tables, changes: Tables) -> dict[str, Any]:
    """Tables with changes, table by table; neither is touched."""
    result = dict(tables)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def method_tables(name: str, own: Mapping[str, Tables]) -> Tables:
    """The changes of a method of the grid file, or of the package; ValueError for an unknown name."""
    if name in own:
        return own[name]
    if name not in METHODS:
        raise UserError(
            f"method {name!r}",
            f"one of {', '.join((*own, *METHODS))}",
            f"or define it in the grid file: [methods.{name}]",
        )
    return apply_overrides({}, METHODS[name].changes)


def read_grid(
    path: str | Path | None,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    base: str | None = None,
    overrides: Iterable[str] = (),
    reference: str | None = None,
) -> Grid:
    """The grid of a file, or of the package's default run; arguments go before what the file says.

    `[grid]` has `methods`, `seeds`, `reference` and `base`, a run file beside it; `[base]` holds a run's tables, or
    changes to that file; `[methods.NAME]` and `[starts.NAME]` hold changes to the run.
    """
    tables = {} if path is None else parse_toml(read_text(path), str(path))
    check_keys(tables, ("grid", "base", "methods", "starts"), "")
    head = from_mapping(GridTable, tables.get("grid") or {}, "grid")
    own, starts = (named_tables(tables, kind) for kind in ("methods", "starts"))
    reference = reference or head.reference
    names = [*(methods or head.methods or (dict.fromkeys((reference, *own)) if own else DEFAULT_METHODS))]
    return Grid(
        base=base_tables(base or beside(path, head.base), tables.get("base") or {}, overrides),
        methods={name: method_tables(name, own) for name in names},
        seeds=tuple(seeds or head.seeds),
        starts=starts,
        reference=reference,
    )


def base_tables(path: str, changes: Tables, overrides: Iterable[str]) -> Tables:
    """The base run's tables: the run file, `[base]`, the overrides. Folder and seed of a run are the grid's."""
    tables = parse_toml(read_text(path) if path else embedded_run(), path or "the embedded run")
    tables = apply_overrides(merged(tables, changes), overrides)
    run = {key: value for key, value in (tables.get("run") or {}).items() if key not in ("out", "seed")}
    tables = {**tables, "run": {"show_every": 0, **run}}
    from_mapping(RunConfig, tables, "")
    return tables


def beside(path: str | Path | None, name: str) -> str:
    """A file's name as seen from where the grid file lies."""
    return str(Path(path or ".").parent / name) if name else ""


def named_tables(tables: Tables, kind: str) -> dict[str, Tables]:
    """`[methods]` or `[starts]`: a table of changes for each name."""
    found = tables.get(kind) or {}
    for name, value in found.items():
        if not isinstance(value, Mapping):
            raise UserError(f"{kind}.{name} = {value!r}", "a table of changes", f"write [{kind}.{name}]")
    return dict(found)


def check_keys(table: Tables, known: Sequence[str], where: str) -> None:
    """ValueError for a key of the grid file that nobody reads."""
    for key in table:
        if key not in known:
            raise unknown_key(f"{where}{key}", key, known)


def read_text(path: str | Path) -> str:
    """A file's text; ValueError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} ({reason(error)})", "a readable TOML file", "check the path") from error


def is_finished(summary: Mapping[str, Any]) -> bool:
    """Whether a run has all its steps and, if it was measured before training, was measured after it too."""
    return "steps" in summary and ("after" in summary or "before" not in summary)
