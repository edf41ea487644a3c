"""A run as one TOML file: tables checked key by key, presets resolved, the result written back.

`[trl]` passes through to the trainer's own configuration untouched; every other table is a dataclass below and a key
it does not know is an error that names the ones it knows.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tomli_w

from rest_rl.advantages import AdvantageKind
from rest_rl.jsonl import reason
from rest_rl.presets import Preset, get_preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EMBEDDED = "embedded"
"""The value of `model.path` and `data.path` that means what the package ships."""

T = TypeVar("T")


@dataclass(frozen=True)
class RunTable:
    """`[run]`: where the run writes, its seed, how often it shows and keeps what the policy says."""

    out: str = "runs/tool-world"
    seed: int = 0
    show_every: int = 10
    """Steps between two sample responses in the terminal; 0 for none."""
    responses_per_step: int = 8
    """Responses kept in responses.jsonl per step."""

    def __post_init__(self) -> None:
        """ValueError for numbers outside their range."""
        check_least("run", self, seed=0, show_every=0, responses_per_step=0)
        if self.seed >= 2**32:
            raise ValueError(f"got run.seed = {self.seed}, expected less than 2**32; lower it")


@dataclass(frozen=True)
class ModelTable:
    """`[model]`: a directory or hub name, and the type its weights are loaded in."""

    path: str = EMBEDDED
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DataTable:
    """`[data]`: the tool world (`embedded`) or a JSONL file of single-turn samples."""

    path: str = EMBEDDED
    samples: int = 2000
    """Training prompts drawn from the tool world; a file is read whole."""
    seed: int = 0
    held_out: str = ""
    """JSONL file of evaluation samples when `path` is a file; without it nothing is evaluated."""

    def __post_init__(self) -> None:
        """ValueError for a number outside its range or a file that would not be read."""
        check_least("data", self, samples=1)
        if self.held_out and self.path == EMBEDDED:
            raise ValueError(
                f"got data.held_out = {self.held_out!r} with data.path = {EMBEDDED!r}, whose held-out prompts are its "
                "own, expected a JSONL file as data.path; set it, or remove data.held_out"
            )


@dataclass(frozen=True)
class EvalTable:
    """`[eval]`: the measurement before and after training, sampled at temperature 1 and greedy."""

    prompts: int = 256
    """Held-out prompts per split; 0 switches the evaluation off."""
    samples: int = 1
    """Sampled responses per prompt."""
    batch_size: int = 128
    max_new_tokens: int = 160
    seed: int = 20_000

    def __post_init__(self) -> None:
        """ValueError for numbers outside their range."""
        check_least("eval", self, prompts=0, samples=1, batch_size=1, max_new_tokens=1)


@dataclass(frozen=True)
class RestTable:
    """`[rest]`: preset and format, and any field of the preset to set differently."""

    preset: str = "rest"
    format: str = "toolrl"
    weights: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    advantage: AdvantageKind | None = None
    entropy_decay: float | None = None
    """Of the moving average of region entropies; without it the trainer's default."""

    def resolve(self) -> Preset:
        """The preset with the overrides of this table applied; a wrong key or value is a ValueError."""
        preset, kinds = get_preset(self.preset), typing.get_args(AdvantageKind)
        if self.advantage not in (None, *kinds):
            raise ValueError(f"got advantage {self.advantage!r}, expected one of {', '.join(kinds)}")
        changes: dict[str, Any] = {} if self.advantage is None else {"advantage": self.advantage}
        for name in ("weights", "reward"):
            if table := getattr(self, name):
                if getattr(preset, name) is None:
                    own = f"preset {preset.name!r}, whose {name} are the published code's own"
                    raise ValueError(f"got {name} {dict(table)} for {own}, expected none; remove rest.{name}")
                changes[name] = overridden(getattr(preset, name), table, f"rest.{name}")
        return dataclasses.replace(preset, **changes)


@dataclass(frozen=True)
class RunConfig:
    """A whole run; `trl` holds whatever the trainer's own configuration takes."""

    run: RunTable = field(default_factory=RunTable)
    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    rest: RestTable = field(default_factory=RestTable)
    eval: EvalTable = field(default_factory=EvalTable)
    trl: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, text: str, overrides: Iterable[str] = (), *, origin: str = "run file") -> RunConfig:
        """Read a run from TOML text and `a.b=c` overrides; unknown keys and wrong types are ValueErrors."""
        return from_mapping(cls, apply_overrides(parse_toml(text, origin), overrides), "")

    def to_toml(self) -> str:
        """The run with every default and every field of its preset written out; reading it back gives the same run."""
        preset = preset_table(self.rest.resolve())
        method = {name: preset[name] for name in ("advantage", "weights", "reward") if name in preset}
        plain = dataclasses.asdict(self)
        return tomli_w.dumps(without_none({**plain, "rest": {**plain["rest"], **method}}))


def check_least(where: str, table: Any, **least: int) -> None:
    """ValueError for the first field below its least value."""
    for name, value in least.items():
        if getattr(table, name) < value:
            raise ValueError(f"got {where}.{name} = {getattr(table, name)}, expected at least {value}; raise it")


def preset_table(preset: Preset) -> dict[str, Any]:
    """A preset as plain TOML values, without its name."""
    table = dataclasses.asdict(preset)
    del table["name"]
    return without_none(table)


def read_run_file(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run in a TOML file, or the embedded default without one."""
    if path is None:
        return RunConfig.from_toml(embedded_run(), overrides, origin="the embedded run")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path} ({reason(error)}), expected a readable TOML file; check the path") from error
    return RunConfig.from_toml(text, overrides, origin=str(path))


def embedded_run() -> str:
    """The text of the run that `rest-rl train` does without arguments."""
    return resources.files("rest_rl").joinpath("assets/tool_world.toml").read_text(encoding="utf-8")


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """TOML text as a dictionary; a syntax error is a ValueError that names `origin`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"got {origin} that is not TOML ({error}), expected `key = value` lines; mend it") from error


def apply_overrides(tables: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `a.b=value` for each override; the value is TOML, a bare word is a string."""
    result = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for override in overrides:
        path, separator, text = override.partition("=")
        *parents, key = path.strip().split(".")
        if not separator or not key or not all(parents):
            raise ValueError(f"got --set {override}, expected --set table.key=value, for example --set run.seed=1")
        target: Any = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"got --set {override}, expected {parent} to be a table; set {parent} itself")
        target[key] = toml_value(text.strip(), override)
    return result


def toml_value(text: str, override: str) -> Any:
    """One TOML value; a bare word (`grpo`, `runs/a`) that is no TOML value counts as a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z_~./][\w~./+-]*", text):
            return text
        message = f"got --set {override} ({error}), expected a TOML value; quote strings: 'key=\"text\"'"
        raise ValueError(message) from error
    if parsed.keys() != {"value"}:
        raise ValueError(f"got --set {override}, expected one value; use one --set per key")
    return parsed["value"]


def overridden(config: T, changes: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass with some fields changed, each checked against its declared type."""
    merged = {name: merge(getattr(config, name, None), value) for name, value in changes.items()}
    return dataclasses.replace(cast(Any, config), **checked_fields(type(config), merged, where))


def merge(old: Any, new: Any) -> Any:
    """A table of numbers is changed key by key, anything else replaced."""
    return {**old, **new} if isinstance(old, Mapping) and isinstance(new, Mapping) else new


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a TOML table, nested dataclasses included."""
    return cls(**checked_fields(cls, values, where))


def checked_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments for `cls`: known names only, each of its declared type."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(unknown_key(f"{where}.{name}".lstrip("."), name, known))
    return {name: checked(value, hints[name], f"{where}.{name}".lstrip(".")) for name, value in values.items()}


def unknown_key(path: str, name: str, known: Iterable[str]) -> str:
    """The message for a key nobody reads: the nearest known one and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it or pick one of these."
    return f"got unknown key {path}, expected one of {', '.join(known)}; {hint}"


def checked(value: Any, hint: Any, path: str) -> Any:
    """`value` if it fits the annotation `hint` (an integer fits float); ValueError otherwise."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"got {path} = {value!r}, expected a table; write [{path}]")
        return from_mapping(cast(type, hint), value, path)
    if not fits(value, hint):
        raise ValueError(f"got {path} = {value!r}, expected {describe(hint)}; change the value")
    return float(value) if isinstance(value, int) and wants_float(hint) else value


def options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union annotation."""
    return typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)


def wants_float(hint: Any) -> bool:
    """Whether an integer must become a float to fit."""
    return float in options(hint) and int not in options(hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value fits an annotation: scalars, Literal, unions, sequences and tables of such."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if len(options(hint)) > 1:
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is type(None) or origin is None:
        return value is None
    if origin is Any:
        return True
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in {tuple, list} or (isinstance(origin, type) and issubclass(origin, (list, tuple))):
        return isinstance(value, (list, tuple)) and all(fits(item, arguments[0]) for item in value if arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values() if arguments)
    return isinstance(value, origin)


def describe(hint: Any) -> str:
    """An annotation in words for an error message."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if len(options(hint)) > 1:
        return " or ".join(describe(option) for option in options(hint) if option is not type(None))
    return getattr(hint, "__name__", str(hint))


def without_none(value: Any) -> Any:
    """Drop None entries, which TOML cannot write; a missing key means the same."""
    if isinstance(value, Mapping):
        return {str(key): without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, (list, tuple)) else value
