"""A run as one TOML file: tables checked key by key, presets resolved, the result written back.

`[trl]` passes through to the trainer's own configuration untouched; every other table is a dataclass below. pydantic
checks each value strictly against its annotation; an unknown key is an error that names the known ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError

from rest_rl.credit import AdvantageKind
from rest_rl.errors import RenamedWarning, UserError
from rest_rl.objects import UserObject, add_search_folder
from rest_rl.presets import REWARD_RULES, SUPERVISED, WEIGHT_RULES, Preset, get_preset
from rest_rl.rewards import try_reward
from rest_rl.runlog import CONFIG, ENVIRONMENT, add_module_folders, read_toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EMBEDDED = "embedded"
"""The value of `model.path` and `data.path` that means what the package ships."""
AUTO = "auto"
"""The value of `rest.format` and `data.source` that means what the model and the file show."""
DEFAULT_RESPONSE_LIMIT = 1024
"""Tokens of a response where neither the run nor the model sets a limit."""

ENTROPY_DECAY = 0.7
"""Default of `rest.entropy_decay` on every engine: close to the best in each measured run (docs/results.md)."""

RENAMED_KEYS = {
    "run.responses_per_step": "run.recorded_responses",
    "data.keep": "data.allow",
    "data.samples": "data.num_samples",
    "eval.samples": "eval.samples_per_prompt",
    "eval.slice": "eval.interim_prompts",
}
"""Old names of keys that still work, and their new names in the same table."""

T = TypeVar("T")
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Table:
    """A table of the run file; values that do not fit their annotations are a UserError, in Python too."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Table").lower()
        validate_fields(type(self), vars(self), name)


@dataclass(frozen=True)
class RunTable(Table):
    """`[run]`: where the run writes, its seed, how often it shows and keeps what the policy says."""

    out: str = "runs/tool-world"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    show_every: NonNegativeInt = 10
    """Steps between two sample responses in the terminal; 0 for none."""
    recorded_responses: NonNegativeInt = 8
    """Responses kept in responses.jsonl per step."""
    engine: Literal["trl", "verl"] = "trl"
    """What trains: TRL on one machine or a few, verl on a Ray cluster (docs/cluster.md)."""


@dataclass(frozen=True)
class ModelTable(Table):
    """`[model]`: a directory or hub name, and the type its weights are loaded in."""

    path: str = EMBEDDED
    """Also the folder of an adapter, which is merged into its base model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the loaded weights; `auto` is float32 for weights that are trained, bfloat16 for those beneath `[peft]`."""
    load_in_4bit: bool = False
    """Frozen weights in 4 bits (bitsandbytes, CUDA); trained through `[peft]` only (QLoRA)."""
    attn_implementation: str = ""
    """Such as flash_attention_2; empty for the library's choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking = false."""


@dataclass(frozen=True)
class DataTable(Table):
    """`[data]`: the tool world (`embedded`), or dialogues in a file, a folder or a hub dataset (docs/data.md)."""

    path: str = EMBEDDED
    source: str = "auto"
    """Shape of the rows; `auto` tells it by their keys."""
    num_samples: PositiveInt = 2000
    """Training prompts drawn from the tool world; a file is read whole."""
    seed: int = 0
    """Of the tool world and of the masking."""
    decision: Literal["reasoning", "call"] = "reasoning"
    """Where the tool world decides what to call: in its reasoning, or in the call (models trained for it only)."""
    turns: Literal["all", "calls"] = "all"
    """`calls` trains on the turns that call only; the held-out prompts stay all."""
    held_out: str = ""
    """Evaluation data when `path` is not the tool world; without it nothing is evaluated."""
    max_prompt_tokens: NonNegativeInt = 0
    """Longer prompts are too long; 0 for no limit but the model's context less the longest response."""
    too_long: Literal["drop", "refuse"] = "drop"
    """Leave samples out that are too long and count them (one odd row stops no large run), or refuse to train."""
    allow: tuple[str, ...] = ()
    """Reasons of `rest-rl data check` that do not reject a sample."""
    keep_prompts: bool = False
    """Take the prompts of ToolRL and API-Bank rows as they were published instead of laying them out anew."""
    mask_names: Fraction = 0.0
    """Share of the samples whose tool and argument names are replaced by random ones (Hammer, arXiv 2410.04587)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out and self.path == EMBEDDED:
            got = f"data.held_out = {self.held_out!r} with data.path = {EMBEDDED!r}, which brings its own"
            raise UserError(got, "a file as data.path", "set it, or remove data.held_out")


@dataclass(frozen=True)
class EvalTable(Table):
    """`[eval]`: the measurement before, during and after training, sampled at temperature 1 and greedy."""

    prompts: NonNegativeInt = 256
    """Held-out prompts per split; 0 switches the evaluation off."""
    samples_per_prompt: PositiveInt = 1
    """Sampled responses per prompt."""
    batch_size: PositiveInt = 128
    max_new_tokens: NonNegativeInt = 0
    """Tokens of a response; 0 takes what the longest gold calls for, at most the limit of training."""
    seed: int = 20_000
    every: NonNegativeInt = 0
    """Steps between two measurements during training; 0 for none."""
    interim_prompts: PositiveInt = 64
    """Held-out prompts that are measured during training, as many of each split and kind; always the same ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and not self.prompts:
            raise UserError(
                f"eval.every = {self.every} with eval.prompts = 0", "held-out prompts", "raise eval.prompts"
            )


@dataclass(frozen=True)
class RestTable(Table):
    """`[rest]`: preset and format, and any field of the preset to set differently."""

    preset: str = "rest"
    format: str = AUTO
    """How the model writes calls; `auto` takes what its chat template shows."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    advantage: AdvantageKind | None = None
    entropy_decay: float = ENTROPY_DECAY
    """Decay per step of the moving average of region entropies; 0 uses the last step only."""
    progress_steps: NonNegativeInt = 0
    """Steps in which progress goes from 0 to 1, where it stays; 0 for all of the run. Set where a run is lengthened."""
    region_weights: Mapping[str, float] = field(default_factory=dict)
    """Loss weight by region of a supervised preset, such as `name = 2.0`, 1 where absent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        reinforced: dict[str, Any] = {"weights": {}, "reward": {}, "advantage": None, "entropy_decay": ENTROPY_DECAY}
        reinforced["progress_steps"] = 0
        supervised: dict[str, Any] = {"region_weights": {}}
        for name, default in (reinforced if self.is_supervised else supervised).items():
            if (value := getattr(self, name)) != default:
                kind = "supervised" if self.is_supervised else "no supervised one"
                got = f"rest.{name} = {value} with preset {self.preset!r}, which is {kind}"
                raise UserError(got, "none", "remove it")

    @property
    def is_supervised(self) -> bool:
        """Whether the preset learns from demonstrations instead of rewards."""
        return self.preset in SUPERVISED

    def loss_weights(self) -> dict[str, float]:
        """Loss weight by region of a supervised preset, with the overrides of this table."""
        return {**SUPERVISED[self.preset], **self.region_weights}

    def resolve(self) -> Preset:
        """The preset with the overrides of this table applied; a wrong key or value is a ValueError."""
        if self.is_supervised:
            got, remedy = f"preset {self.preset!r}, which is supervised", f"use rest-rl train --preset {self.preset}"
            raise UserError(got, "one of reinforcement learning", remedy)
        preset = get_preset(self.preset)
        changes: dict[str, Any] = {} if self.advantage is None else {"advantage": self.advantage}
        for name, rules, what in (("weights", WEIGHT_RULES, "weight rule"), ("reward", REWARD_RULES, "reward")):
            if table := getattr(self, name):
                changes[name] = override_rule(getattr(preset, name), table, rules, what, f"rest.{name}")
        return dataclasses.replace(preset, **changes)


@dataclass(frozen=True)
class RunConfig:
    """A whole run; `trl`, `peft` and `verl` hold what the trainer, peft's LoraConfig and verl's YAML take."""

    run: RunTable = field(default_factory=RunTable)
    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    rest: RestTable = field(default_factory=RestTable)
    eval: EvalTable = field(default_factory=EvalTable)
    peft: Mapping[str, Any] = field(default_factory=dict)
    trl: Mapping[str, Any] = field(default_factory=dict)
    verl: Mapping[str, Any] = field(default_factory=dict)
    """Read by the engine verl alone: its own settings, over those that the other tables give it."""

    def __post_init__(self) -> None:
        if self.model.load_in_4bit and not self.peft:
            raise UserError("model.load_in_4bit = true without [peft]", "adapters to train", "add [peft] with r = 16")
        if self.eval.every and self.data.path != EMBEDDED and not self.data.held_out:
            raise UserError(f"eval.every = {self.eval.every} without data.held_out", "a file to measure", "set it")

    @classmethod
    def from_toml(
        cls, text: str, overrides: Iterable[str] = (), *, origin: str = "run file", is_recorded: bool = False
    ) -> RunConfig:
        """Read a run from TOML text and `a.b=c` overrides; unknown keys and wrong types are ValueErrors.

        With `is_recorded` renamed keys pass without a warning: nobody edits the config.toml of a run folder.
        """
        tables = rename_keys(parse_toml(text, origin), warn=not is_recorded)
        return from_mapping(cls, apply_overrides(tables, overrides), "")

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
        """As `from_toml`, from the tables of a run as Python values."""
        return from_mapping(cls, apply_overrides(rename_keys(tables), overrides), "")

    @property
    def max_response_tokens(self) -> int:
        """Tokens that training allows a response: the trainer's default where `[trl]` does not say."""
        return int(self.trl.get("max_completion_length", self.trl.get("max_length")) or 512)

    def with_response_limit(self, context: int | None) -> RunConfig:
        """With `trl.max_completion_length`, if it is 0, as a model that holds `context` tokens (None: any) allows."""
        if self.trl.get("max_completion_length") != 0:
            return self
        return dataclasses.replace(self, trl={**self.trl, "max_completion_length": default_response_limit(context)})

    @property
    def weights_dtype(self) -> str:
        """The type that the model's weights are loaded in."""
        if self.model.dtype != AUTO:
            return self.model.dtype
        return "bfloat16" if self.peft else "float32"

    def to_toml(self) -> str:
        """The run with every default and every field of its preset written out; reading it back gives the same run."""
        if self.rest.is_supervised:
            # What a supervised preset does not read is left out, or a later default would refuse the recorded one.
            method: dict[str, Any] = {"region_weights": self.rest.loss_weights(), "entropy_decay": None}
            method["progress_steps"] = None
        else:
            preset = preset_to_table(self.rest.resolve())
            method = {name: preset[name] for name in ("advantage", "weights", "reward") if name in preset}
        plain = dataclasses.asdict(self)
        return tomli_w.dumps(without_none({**plain, "rest": {**plain["rest"], **method}}))


def preset_to_table(preset: Preset) -> dict[str, Any]:
    """A preset as plain TOML values, without its name."""
    table = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)[1:]}
    return without_none({**table, "weights": rule_to_table(preset.weights), "reward": rule_to_table(preset.reward)})


def rule_to_table(rule: Any) -> dict[str, Any]:
    """A weight rule or reward as the table of a run file that `override_rule` reads back."""
    if isinstance(rule, UserObject):
        return {"rule": rule.address, **rule.options}
    return dataclasses.asdict(rule) if dataclasses.is_dataclass(rule) and not isinstance(rule, type) else {}


def override_rule(own: Any, table: Mapping[str, Any], rules: Mapping[str, type], what: str, where: str) -> Any:
    """A preset's weight rule or reward with a table's changes: other fields, another rule, or a user's object."""
    name = table.get("rule")
    options = {key: value for key, value in table.items() if key != "rule"}
    if isinstance(name, str) and ":" in name:
        rule = UserObject(name, what, options)
        if what == "reward":
            try_reward(rule)
        return rule
    kind = type(own) if name is None else rules.get(name) if isinstance(name, str) else None
    if kind is None:
        expected = f"one of {', '.join(rules)}, or package.module:OBJECT"
        raise UserError(f"{where}.rule = {name!r}", expected, "choose one of them")
    base = own if type(own) is kind else kind()
    has_rule = any(field.name == "rule" for field in dataclasses.fields(kind))
    return override_fields(base, table if has_rule else options, where)


def read_run_file(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run in a TOML file; without one the tool world's, or with a model or data set, that of your own model."""
    if path is None:
        overrides = list(overrides)
        asked = apply_overrides({}, overrides)
        is_own = any("path" in asked.get(table, {}) for table in ("model", "data"))
        is_supervised = asked.get("rest", {}).get("preset") in SUPERVISED
        name = "own_model_sft.toml" if is_supervised else "own_model.toml" if is_own else "tool_world.toml"
        return RunConfig.from_toml(read_asset(name), overrides, origin="the embedded run")
    text, folder = read_toml_text(Path(path)), Path(path).parent
    add_search_folder(folder)  # a user's rule or reward may lie beside the run file
    is_recorded = Path(path).name == CONFIG and (folder / ENVIRONMENT).exists()
    if Path(path).name == CONFIG:
        add_module_folders(folder)
    return RunConfig.from_toml(text, overrides, origin=str(path), is_recorded=is_recorded)


def read_asset(name: str = "tool_world.toml") -> str:
    """The text of a run file of the package, by default of what `rest-rl train` does without arguments."""
    return resources.files("rest_rl").joinpath("assets", name).read_text(encoding="utf-8")


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """TOML text as a dictionary; a syntax error is a ValueError that names `origin`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} that is not TOML ({error})", "`key = value` lines", "correct it") from error


def parse_recorded_run(text: str, origin: str) -> dict[str, Any]:
    """The tables of a run folder's config.toml, with the keys of older versions under their present names."""
    return rename_keys(parse_toml(text, origin), warn=False)


def rename_keys(tables: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """The tables of a run with renamed keys under their new names; UserError where a table has both."""
    result = dict(tables)
    for old, new in RENAMED_KEYS.items():
        (name, old_key), new_key = old.split("."), new.split(".")[1]
        table = result.get(name)
        if not isinstance(table, Mapping) or old_key not in table:
            continue
        if new_key in table:
            raise UserError(f"both {old} and {new} are set, two names of one key", remedy=f"remove {old}")
        if warn:
            warnings.warn(f"{old} is now {new}", RenamedWarning, stacklevel=2)
        result[name] = {new_key if key == old_key else key: value for key, value in table.items()}
    return result


def apply_overrides(tables: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `a.b=value` for each override; the value is TOML, a bare word is a string."""
    result = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for override in overrides:
        path, separator, text = override.partition("=")
        *parents, key = path.strip().split(".")
        if not separator or not key or not all(parents):
            raise UserError(f"--set {override}", "--set table.key=value", "for example --set run.seed=1")
        value = parse_toml_value(text.strip(), override)
        if len(parents) == 1:
            ((key, value),) = rename_keys({parents[0]: {key: value}})[parents[0]].items()
        elif not parents:
            value = rename_keys({key: value})[key]
        target: Any = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {override}", f"{parent} to be a table", f"set {parent} itself")
        target[key] = value
    return result


def parse_toml_value(text: str, override: str) -> Any:
    """One TOML value; a bare word (`grpo`, `runs/a`) that is no TOML value counts as a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z_~./][\w~./:+-]*", text):
            return text
        raise UserError(f"--set {override} ({error})", "a TOML value", "quote strings: 'key=\"text\"'") from error
    if parsed.keys() != {"value"}:
        raise UserError(f"--set {override}", "one value", "use one --set per key")
    return parsed["value"]


def override_fields(config: T, changes: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass with some fields changed, each checked against its declared type."""
    merged = {name: merge(getattr(config, name, None), value) for name, value in changes.items()}
    return dataclasses.replace(cast(Any, config), **validate_fields(type(config), merged, where))


def merge(old: Any, new: Any) -> Any:
    """A table of numbers is changed key by key, anything else replaced."""
    return {**old, **new} if isinstance(old, Mapping) and isinstance(new, Mapping) else new


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a TOML table, nested dataclasses included."""
    return cls(**validate_fields(cls, values, where))


def validate_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments for a dataclass: known names only, each value fit for its annotation."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise unknown_key_error(f"{where}.{name}".lstrip("."), name, known)
    return {name: validate_value(value, hints[name], f"{where}.{name}".lstrip(".")) for name, value in values.items()}


def unknown_key_error(path: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a key that nothing reads: the nearest known one, and all of them if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    expected = f"one of {', '.join(known)}" if len(known) <= 40 else f"one of {len(known)} keys of the library"
    return UserError(f"unknown key {path}", expected, f"did you mean {near[0]}?" if near else "remove or rename it")


def validate_value(value: Any, hint: Any, path: str) -> Any:
    """`value` as its annotation has it (an integer becomes a float, a list a tuple); UserError if it does not fit."""
    if dataclasses.is_dataclass(hint):
        kind = cast(type, hint)
        if not isinstance(value, (kind, Mapping)):
            raise UserError(f"{path} = {value!r}", "a table", f"write [{path}]")
        return from_mapping(kind, value, path) if isinstance(value, Mapping) else value
    if typing.get_origin(hint) is tuple and isinstance(value, list):  # TOML has lists only
        value = tuple(value)
    try:
        return type_adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    if len(faults) == 1:  # name the key inside a table or list; several faults are those of a union's types
        path, value = ".".join(map(str, (path, *faults[0]["loc"]))), faults[0]["input"]
    expected = dict.fromkeys(
        EXPECTED_TEXTS[fault["type"]].format_map(fault.get("ctx") or {})
        if fault["type"] in EXPECTED_TEXTS
        else fault["msg"].removeprefix("Input should be ")
        for fault in faults
    )
    raise UserError(f"{path} = {value!r}", " or ".join(expected), "change the value")


EXPECTED_TEXTS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "mapping_type": "a table",
    "dict_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}
"""pydantic's kinds of errors in the words of a run file; others keep pydantic's own."""


type_adapter = cache(TypeAdapter)


def without_none(value: Any) -> Any:
    """Drop None entries, which TOML cannot write; a missing key means the same."""
    if isinstance(value, Mapping):
        return {str(key): without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def default_response_limit(context: int | None) -> int:
    """Tokens of a response, where the run does not say, of a model that holds `context` tokens (None: any number)."""
    return min(DEFAULT_RESPONSE_LIMIT, max(1, (context or 2 * DEFAULT_RESPONSE_LIMIT) // 2))
