"""A grid of runs: methods x warm starts x seeds, and the configuration of each run.

A method is a table of changes to the base run. With the same seed, the runs of the package's methods
differ only in the table `[rest]` (`rest-kl` in `trl.beta`): data, order of prompts, number of steps and evaluation are
the same.
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
    choose_run_file,
    from_mapping,
    parse_toml,
    read_asset,
    rename_keys,
    without_none,
)
from rest_rl.errors import UserError, warn_renamed
from rest_rl.jsonl import describe_os_error
from rest_rl.objects import add_search_folder
from rest_rl.presets import PRESETS, RENAMED_PRESETS
from rest_rl.report.tables import flatten

DEFAULT_REFERENCE = "grpo"
DEFAULT_SEEDS = (0, 1, 2)
RUNS_FOLDER, LOGS_FOLDER, GRID_FILE, BASE_FILE = "runs", "logs", "grid.toml", "base.toml"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
OBJECT_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""`package.module:OBJECT`, the reference to an object in a module of the user."""

Tables = Mapping[str, Any]


class Method(NamedTuple):
    """A method of the package: its purpose in a grid, a description, and its changes to the base run."""

    role: Literal["method", "baseline", "rival", "control", "ablation"]
    text: str
    changes: Tables


METHODS = {
    name: Method(**table)
    for name, table in parse_toml(read_asset("compare-methods.toml"), "compare-methods.toml").items()
}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.role != "ablation")


class RunName(NamedTuple):
    """The parts of the name of a run folder, `METHOD-SEED` or `METHOD@START-SEED`."""

    method: str
    start: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def label(self) -> str:
        """`METHOD`, or `METHOD@START` if the grid has warm starts."""
        return f"{self.method}@{self.start}" if self.start else self.method

    @classmethod
    def parse(cls, folder: str) -> RunName | None:
        """Return the parts of a run folder's name, or None if the name has another form."""
        label, separator, seed = folder.rpartition("-")
        method, _, start = label.partition("@")
        return cls(method, start, int(seed)) if separator and method and seed.isdecimal() else None


@dataclass(frozen=True)
class Grid:
    """A plan of runs: every method from every warm start with every seed, each as a change to one base run."""

    base: Tables
    methods: Mapping[str, Tables]
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    starts: Mapping[str, Tables] = field(default_factory=dict)
    reference: str = DEFAULT_REFERENCE
    modules: tuple[str, ...] = field(default=(), compare=False)
    """Folders of users' modules; empty unless the grid refers to an object `package.module:OBJECT`."""

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.starts):
            if not NAME_PATTERN.fullmatch(name):
                raise UserError(f"{name!r} cannot name a folder", "letters, digits and _ . + -", "rename it")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"seeds are {list(self.seeds)}", "one or more, each once", "change the seeds")
        if self.reference not in self.methods:
            names = ", ".join(map(repr, self.methods))
            remedy = "add it to the methods, or choose another with --baseline (in the grid file: grid.reference)"
            raise UserError(f"the baseline {self.reference!r} is not among the methods ({names})", remedy=remedy)
        # Two names for one configuration would compare a method with itself and count its seeds twice.
        seen: dict[str, RunName] = {}
        for name, run in self.run_configs():
            twin = seen.setdefault(run.to_toml(), name)
            if twin is not name:
                labels = f"{twin.label} and {name.label}"
                raise UserError(f"{labels} are the same run", "methods that differ", "leave one of them out")

    def run_names(self) -> list[RunName]:
        """Return the names of all runs: all methods with the first seed, then all with the second, and so on."""
        starts = (*self.starts,) or ("",)
        return [RunName(method, start, seed) for seed in self.seeds for start in starts for method in self.methods]

    def run_configs(self) -> list[tuple[RunName, RunConfig]]:
        """Return every run with its configuration, in the order of `run_names`."""
        return [(name, self.run_config(*name)) for name in self.run_names()]

    def run_config(self, method: str, start: str, seed: int) -> RunConfig:
        """Return the configuration of one run; UserError if the changes of the method do not give a valid run."""
        # Later tables override earlier ones: base run, warm start, method, seed. `permuted` also shuffles by the seed
        # of the run, so that its seeds differ in their assignment of weights.
        changes = self.methods[method]
        tables = merge_tables(
            merge_tables(drop_foreign_overrides(self.base, changes), self.starts.get(start, {})), changes
        )
        tables = merge_tables(tables, {"run": {"seed": seed}})
        weights = (tables.get("rest") or {}).get("weights") or {}
        if weights.get("rule") == "permuted" and "seed" not in weights:
            tables = merge_tables(tables, {"rest": {"weights": {"seed": seed}}})
        try:
            config = from_mapping(RunConfig, tables, "")
            if not config.rest.is_supervised:
                config.rest.resolve()
        except ValueError as error:
            raise wrap_method_error(method, error) from error
        return config

    def merge(self, older: Grid) -> Grid:
        """Return this grid with the methods, starts and seeds of `older` added; UserError if a shared part differs."""
        ours, theirs = self._parts(), older._parts()
        changed = [key for key, table in theirs.items() if key in ours and ours[key] != table]
        if bool(self.starts) != bool(older.starts):
            changed.append("[starts]")
        if changed:
            raise UserError(
                f"the grid differs in {', '.join(changed[:3])} from the one in this folder",
                "the same runs, or additional methods, starts or seeds",
                "pass another --out",
            )
        return replace(
            self,
            methods={**older.methods, **self.methods},
            starts={**older.starts, **self.starts},
            seeds=tuple(sorted({*older.seeds, *self.seeds})),
            modules=tuple(dict.fromkeys((*older.modules, *self.modules))),
        )

    def _parts(self) -> dict[str, Any]:
        parts = {f"[base.{table.name}]": self.base.get(table.name, {}) for table in fields(RunConfig)}
        parts |= {f"[methods.{name}]": table for name, table in self.methods.items()}
        parts |= {f"[starts.{name}]": table for name, table in self.starts.items()}
        return {key: without_none(table) for key, table in parts.items()}

    def to_files(self) -> dict[str, str]:
        """Return the texts of grid.toml and base.toml by file name; `read_grid` reads the same grid from them."""
        head = {
            "seeds": list(self.seeds),
            "reference": self.reference,
            "methods": list(self.methods),
            "base": BASE_FILE,
        }
        head |= {"modules": list(self.modules)} if self.modules else {}
        tables = {"grid": head, "methods": self.methods, "starts": self.starts}
        return {GRID_FILE: tomli_w.dumps(without_none(tables)), BASE_FILE: tomli_w.dumps(without_none(self.base))}


def wrap_method_error(label: str, error: ValueError) -> UserError:
    if isinstance(error, UserError):
        return UserError(f"method {label!r}: {error.problem}", error.expected, error.remedy)
    return UserError(
        f"method {label!r}: the trainer rejects its settings ({str(error).rstrip('.')})",
        remedy="change them in the grid file, the base run or --set",
    )


@dataclass(frozen=True)
class GridTable:
    """The `[grid]` table of a grid file."""

    methods: tuple[str, ...] = ()
    """By default the methods of `[methods]` and the baseline; without `[methods]`, the package's except ablations."""
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    reference: str = DEFAULT_REFERENCE
    """The baseline, with which every method is compared."""
    base: str = ""
    """A run file, relative to the grid file; by default the embedded run."""
    modules: tuple[str, ...] = ()
    """More folders of users' modules, relative to the grid file; its folder and that of the base run are included."""


@dataclass(frozen=True)
class GridFile:
    """The tables of a grid file: `[base]` changes the base run, `[methods.NAME]` and `[starts.NAME]` its copies."""

    grid: GridTable = field(default_factory=GridTable)
    base: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_present_keys(self, *, warn: bool) -> GridFile:
        methods, starts = (
            {name: rename_keys(table, warn=warn) for name, table in tables.items()}
            for tables in (self.methods, self.starts)
        )
        return replace(self, base=rename_keys(self.base, warn=warn), methods=methods, starts=starts)


def read_grid(
    path: str | Path | None,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    base: str | Path | None = None,
    overrides: Iterable[str] = (),
    reference: str | None = None,
    is_recorded: bool = False,
) -> Grid:
    """Read a grid from a file, or build one from the package's default run; arguments take precedence over the file.

    Set `is_recorded` to read the grid.toml that `compare` has written: deprecated keys then cause no warning.
    """
    file = from_mapping(GridFile, {} if path is None else parse_toml(read_text(path), str(path)), "")
    file = file.with_present_keys(warn=not is_recorded)
    grid_folder = Path(path or ".").parent  # the paths in a grid file are relative to its folder
    base = base or (grid_folder / file.grid.base if file.grid.base else None)
    reference = reference or file.grid.reference
    names = methods or file.grid.methods
    if not names:
        names = [*dict.fromkeys((reference, *file.methods))] if file.methods else DEFAULT_METHODS
    folders = (
        *(grid_folder / each for each in file.grid.modules),
        *(Path(each).parent for each in (path, base) if each),
    )
    modules = dict.fromkeys(str(folder.resolve()) for folder in folders)
    for folder in modules:
        add_search_folder(folder)
    tables = build_base_tables(base, file.base, overrides, warn=not is_recorded)
    changes = {name: find_changes(name, file.methods) for name in names}
    values = [
        value for table in (tables, *changes.values(), *file.starts.values()) for value in flatten(table).values()
    ]
    # The folders are absolute, so recording them ties the grid to this machine: only do so if a run needs them.
    has_own_objects = any(isinstance(value, str) and OBJECT_PATTERN.fullmatch(value) for value in values)
    return Grid(
        base=tables,
        methods=changes,
        seeds=tuple(seeds or file.grid.seeds),
        starts=file.starts,
        reference=reference,
        modules=tuple(modules) if has_own_objects else (),
    )


def find_changes(name: str, file_methods: Mapping[str, Tables]) -> Tables:
    # Methods of the grid file take precedence over those of the package.
    if name in file_methods:
        return file_methods[name]
    if name in RENAMED_PRESETS:
        warn_renamed(f"the method {name}", RENAMED_PRESETS[name])
        return METHODS[RENAMED_PRESETS[name]].changes
    if name not in METHODS:
        known = ", ".join((*file_methods, *METHODS))
        raise UserError(
            f"unknown method {name!r}", f"one of {known}", f"choose one, or define [methods.{name}] in the grid file"
        )
    return METHODS[name].changes


def build_base_tables(
    path: str | Path | None, changes: Tables, overrides: Iterable[str], *, warn: bool = True
) -> Tables:
    # The run file, then `[base]`, then the overrides. The grid sets the folder and the seed of every run itself, and
    # does not print responses while it trains.
    overrides = list(overrides)
    given = apply_overrides(changes, overrides)
    has_data = any((given.get(table) or {}).get("path") for table in ("data", "env"))
    asset = choose_run_file(given) if has_data else "tool_world.toml"
    text, origin = (read_text(path), str(path)) if path else (read_asset(asset), "the embedded run")
    tables = apply_overrides(merge_tables(rename_keys(parse_toml(text, origin), warn=warn), changes), overrides)
    run = {key: value for key, value in (tables.get("run") or {}).items() if key not in ("out", "seed")}
    tables = {**tables, "run": {"show_every": 0, **run}}
    from_mapping(RunConfig, tables, "")
    return tables


def drop_foreign_overrides(base: Tables, changes: Tables) -> Tables:
    # `[rest] weights` and `advantage` of the base run belong to its own preset: with them, GRPO would no longer
    # be GRPO. The reward settings stay if both presets use the same reward.
    rest = base.get("rest") or {}
    base_preset = rest.get("preset", "rest")
    preset = (changes.get("rest") or {}).get("preset", base_preset)
    if preset == base_preset:
        return base
    foreign = {"weights", "advantage"}
    rewards = {name: known.reward for name, known in PRESETS.items()}
    if rewards.get(preset) != rewards.get(base_preset):
        foreign.add("reward")
    return {**base, "rest": {key: value for key, value in rest.items() if key not in foreign}}


def merge_tables(tables: Tables, changes: Tables) -> dict[str, Any]:
    result = dict(tables)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merge_tables(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({describe_os_error(error)})", "a TOML file", "check the path") from error


def is_finished(summary: Mapping[str, Any]) -> bool:
    """Return whether a run has all its steps and the evaluation after them, if its settings ask for one."""
    if "status" in summary:
        return summary["status"] == "finished"
    return "steps" in summary and ("after" in summary or "before" not in summary)  # a run of an older version
