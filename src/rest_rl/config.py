"""The configuration of a run: TOML tables, validated key by key.

Each table is a dataclass below; pydantic checks every value strictly against its annotation. `[trl]`, `[peft]` and
`[verl]` pass through unchanged, because their libraries define the keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError

from rest_rl.credit import AdvantageKind, CreditConfig
from rest_rl.errors import UserError, warn_renamed
from rest_rl.objects import UserObject, add_search_folder
from rest_rl.presets import RENAMED_PRESETS, REWARD_RULES, SUPERVISED, WEIGHT_RULES, Preset, get_preset
from rest_rl.rewards import try_reward
from rest_rl.runlog import CHECKPOINTS, CONFIG, ENVIRONMENT, MODEL, add_module_folders, read_toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Value of `model.path` and `data.path` for the model and the tool world that ship with the package.
EMBEDDED = "embedded"
# Values of `data.path` for the worlds, the generators of dialogues, and the names that the commands have for them.
WORLDS = {EMBEDDED: "tool-world", "office": "office", "shop": "shop"}
# Value of `rest.format` and `data.source` for detection from the chat template and from the rows.
AUTO = "auto"
# Maximum response length in tokens if neither the run nor the model's context length limits it.
DEFAULT_RESPONSE_LIMIT = 1024

# Default of `rest.entropy_decay`: close to the best value in every run we measured (docs/results.md).
ENTROPY_DECAY = 0.7

# A bound of the ratio so high that it never acts.
NO_DUAL_CLIP = 1e9

# Deprecated keys and the keys of the same table that replace them.
RENAMED_KEYS = {
    "run.responses_per_step": "run.recorded_responses",
    "data.keep": "data.allow",
    "data.samples": "data.num_samples",
    "eval.samples": "eval.samples_per_prompt",
    "eval.slice": "eval.interim_prompts",
}

T = TypeVar("T")
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Table:
    """Base class of the tables; validates the values when a table is built in Python, too."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Table").lower()
        validate_fields(type(self), vars(self), name)


@dataclass(frozen=True)
class RunTable(Table):
    """`[run]`: the run folder, the seed, the engine, and how many responses to show and record."""

    out: str = "runs/tool-world"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    show_every: NonNegativeInt = 10
    """Steps between sample responses in the terminal; 0 shows none."""
    recorded_responses: NonNegativeInt = 8
    """Responses written to responses.jsonl per step."""
    engine: Literal["trl", "verl"] = "trl"
    """`trl` trains on one or a few machines, `verl` on a Ray cluster (docs/cluster.md)."""


@dataclass(frozen=True)
class ModelTable(Table):
    """`[model]`: the model and how to load it."""

    path: str = EMBEDDED
    """A folder or hub name. An adapter is merged into its base model."""
    adapter: str = ""
    """An adapter for the model of `path` to start from: a folder, a hub name, or `smollm2-office` of this package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; `auto` is float32, but bfloat16 with `[peft]` unless the CPU is slow at it."""
    load_in_4bit: bool = False
    """Load frozen 4-bit weights (bitsandbytes, CUDA) and train adapters on them: QLoRA, needs `[peft]`."""
    attn_implementation: str = ""
    """Attention implementation, for example `flash_attention_2`; empty for the library's default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for example `enable_thinking = false`."""


@dataclass(frozen=True)
class DataTable(Table):
    """`[data]`: a generator of dialogues (`embedded`, the tool world; `office`; `shop`), or your own (docs/data.md)."""

    path: str = EMBEDDED
    source: str = "auto"
    """Row shape; `auto` detects it from the keys."""
    num_samples: PositiveInt = 2000
    """Training prompts to draw from a generator; files are always read whole."""
    seed: int = 0
    """Seed of the generator and of name masking."""
    decision: Literal["reasoning", "call"] = "reasoning"
    """Whether the tool world's responses choose the tool in their reasoning or only in the call itself. `call` needs a
    model that was trained for it."""
    turns: Literal["all", "calls"] = "all"
    """`calls` trains only on turns with gold calls; the held-out set keeps all turns."""
    held_out: str = ""
    """Held-out set for your own data; if empty, nothing is evaluated. A generator has its own held-out set."""
    max_prompt_tokens: NonNegativeInt = 0
    """Maximum prompt length in tokens; 0 allows the context length minus the maximum response length."""
    too_long: Literal["drop", "refuse"] = "drop"
    """What to do with samples over the limit: drop and count them, or refuse to train."""
    allow: tuple[str, ...] = ()
    """Reasons in the report of `rest-rl data check` to accept instead of repairing or rejecting the sample."""
    keep_prompts: bool = False
    """Use the published prompts of ToolRL and API-Bank rows instead of rendering them with the chat template."""
    mask_names: Fraction = 0.0
    """Fraction of samples whose tool and argument names become random strings (Hammer, arXiv 2410.04587)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out and self.path in WORLDS:
            problem = f"data.held_out is {self.held_out!r}, but data.path {self.path!r} has its own held-out set"
            raise UserError(problem, remedy="set data.path to your own data, or remove data.held_out")
        if self.decision == "call" and self.path in WORLDS and self.path != EMBEDDED:
            problem = f"data.decision is 'call', but data.path {self.path!r} does not use it"
            raise UserError(problem, f"data.path {EMBEDDED!r}", "remove data.decision")


@dataclass(frozen=True)
class EnvTable(Table):
    """`[env]`: an environment whose tools run, to train in instead of on `[data]` (docs/environments.md)."""

    path: str = ""
    """A world that ships (`shop`), `module:OBJECT`, `FILE.py:OBJECT` or `mcp:COMMAND`; empty for none."""
    tasks: str = ""
    """A file of task rows, for an environment that brings none."""
    reward: str = ""
    """`module:FUNCTION` that scores a rollout, for tools without a score of their own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the environment, such as the `verify_tool` of an MCP server."""
    thoughts: Literal["keep"] = "keep"
    """Thoughts of earlier turns stay in the context: what the policy sampled is never rendered again."""
    turns: PositiveInt = 8
    """Maximum number of responses in a rollout."""
    calls_per_turn: PositiveInt = 16
    """Maximum number of calls in one response; further ones are refused."""
    result_tokens: PositiveInt = 512
    """Maximum length of one tool result in tokens; the rest is cut."""
    timeout: PositiveFloat = 30.0
    """Seconds for one call, and for starting and scoring a session."""


@dataclass(frozen=True)
class EvalTable(Table):
    """`[eval]`: evaluation before, during and after training, with greedy responses and at two temperatures."""

    prompts: NonNegativeInt = 256
    """Held-out prompts per split; 0 turns evaluation off."""
    before: bool = True
    """Evaluate also before training; false for further runs of a model whose scores are known."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt, sampled at temperature 1."""
    low_temperature: Decay = 0.2
    """Temperature at which each prompt is sampled once more, below 1; 0 for no such responses."""
    batch_size: PositiveInt = 128
    max_new_tokens: NonNegativeInt = 0
    """Maximum response length in tokens; 0 derives it from the longest gold response, up to the limit in training."""
    seed: int = 20_000
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 for none."""
    interim_prompts: PositiveInt = 64
    """Held-out prompts per evaluation during training: a fixed subset, balanced over splits and kinds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and not self.prompts:
            problem = f"eval.every is {self.every}, but eval.prompts is 0"
            raise UserError(problem, remedy="raise eval.prompts, or set eval.every to 0")


@dataclass(frozen=True)
class RestTable(Table):
    """`[rest]`: the preset, the tool-call format, and overrides of the preset's fields."""

    preset: str = "rest"
    format: str = AUTO
    """Tool-call format; `auto` detects it from the chat template."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    advantage: AdvantageKind | None = None
    entropy_decay: float = ENTROPY_DECAY
    """Decay per step of the moving average of the region entropies; 0 uses only the previous step."""
    progress_steps: NonNegativeInt = 0
    """Steps over which curriculum progress goes from 0 to 1; 0 for the whole run. If `--resume` extends a run, it sets
    this key, so that progress stays at 1 in the added steps."""
    resample_rounds: NonNegativeInt = 0
    """Rounds in which groups with equal rewards are replaced by groups for other prompts (DAPO's dynamic sampling)."""
    share_prompts: bool = True
    """Whether to compute each prompt once per group of responses where the model allows it: the same gradients in less
    time (docs/training.md). The verl engine ignores it."""
    credit: str | None = None
    """How the rewards of a rollout in an environment are credited to its turns: outcome, return_to_go, matched or
    anchor (docs/method.md). Default: return_to_go if the environment rewards single calls, otherwise outcome. Without
    an environment, return_to_go credits the tokens of a response with the parts of the reward that they can still
    change."""
    gamma: Fraction = 1.0
    """Discount per turn of the rewards that follow it."""
    region_weights: Mapping[str, float] = field(default_factory=dict)
    """Loss weights of a supervised preset by region, for example `name = 2.0`; 1 for the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset in RENAMED_PRESETS:
            object.__setattr__(self, "preset", get_preset(self.preset).name)
        if self.credit is not None:
            CreditConfig(cast(Any, self.credit), self.gamma)
        # A field that the preset ignores must keep its default, or users would believe that it has an effect.
        rl_fields: dict[str, Any] = {"weights": {}, "reward": {}, "advantage": None, "entropy_decay": ENTROPY_DECAY}
        rl_fields |= {"progress_steps": 0, "resample_rounds": 0, "share_prompts": True, "credit": None, "gamma": 1.0}
        supervised_fields: dict[str, Any] = {"region_weights": {}}
        for name, default in (rl_fields if self.is_supervised else supervised_fields).items():
            if (value := getattr(self, name)) != default:
                kind = "supervised" if self.is_supervised else "not supervised"
                problem = f"rest.{name} is {value}, but preset {self.preset!r} is {kind} and does not use it"
                raise UserError(problem, remedy=f"remove rest.{name}")

    @property
    def is_supervised(self) -> bool:
        """Whether the preset trains on demonstrations instead of rewards."""
        return self.preset in SUPERVISED

    def loss_weights(self) -> dict[str, float]:
        """Return the loss weight of each region in a supervised preset, with this table's overrides applied."""
        return {**SUPERVISED[self.preset], **self.region_weights}

    def resolve(self) -> Preset:
        """Return the preset with this table's overrides applied; UserError for an unknown key or an invalid value."""
        if self.is_supervised:
            problem = f"preset {self.preset!r} is supervised and has no reward or advantages"
            raise UserError(problem, "a reinforcement-learning preset", f"use rest-rl train --preset {self.preset}")
        preset = get_preset(self.preset)
        changes: dict[str, Any] = {} if self.advantage is None else {"advantage": self.advantage}
        for name, rules, what in (("weights", WEIGHT_RULES, "weight rule"), ("reward", REWARD_RULES, "reward")):
            if table := getattr(self, name):
                changes[name] = override_rule(getattr(preset, name), table, rules, what, f"rest.{name}")
        return dataclasses.replace(preset, **changes)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run.

    `trl`, `peft` and `verl` are passed to TRL's trainer configuration, PEFT's LoraConfig and verl's YAML.
    """

    run: RunTable = field(default_factory=RunTable)
    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    env: EnvTable = field(default_factory=EnvTable)
    rest: RestTable = field(default_factory=RestTable)
    eval: EvalTable = field(default_factory=EvalTable)
    peft: Mapping[str, Any] = field(default_factory=dict)
    trl: Mapping[str, Any] = field(default_factory=dict)
    verl: Mapping[str, Any] = field(default_factory=dict)
    """verl settings, which take precedence over those derived from the other tables; the trl engine ignores them."""

    def __post_init__(self) -> None:
        if self.model.load_in_4bit and not self.peft:
            problem = "model.load_in_4bit is true without [peft], and 4-bit weights cannot be trained"
            raise UserError(problem, remedy="add [peft] with r = 16 to train adapters")
        if self.eval.every and self.data.path not in WORLDS and not self.data.held_out:
            problem = f"eval.every is {self.eval.every}, but there is no held-out set"
            raise UserError(problem, remedy="set data.held_out, or eval.every to 0")
        self._check_environment()

    def _check_environment(self) -> None:
        if not self.env.path:
            if self.rest.credit not in (None, "outcome", "return_to_go"):
                problem = f"rest.credit is {self.rest.credit!r}, but there is no environment"
                raise UserError(problem, remedy="set env.path, or remove rest.credit")
            return
        others = {
            "data.path": self.data.path not in (EMBEDDED, self.env.path),
            "data.held_out": bool(self.data.held_out),
            f"preset {self.rest.preset!r}, which is supervised": self.rest.is_supervised,
            "rest.resample_rounds": bool(self.rest.resample_rounds),
            "run.engine = 'verl'": self.run.engine == "verl",
        }
        if found := [name for name, is_set in others.items() if is_set]:
            problem = f"env.path cannot be combined with {found[0]}"
            raise UserError(problem, remedy="remove one of them (docs/environments.md)")

    @classmethod
    def from_toml(
        cls, text: str, overrides: Iterable[str] = (), *, origin: str = "run file", is_recorded: bool = False
    ) -> RunConfig:
        """Parse TOML text and `table.key=value` overrides; UserError for an unknown key or an invalid value.

        `origin` names the text in error messages. Pass `is_recorded` for the config.toml of a run folder:
        deprecated keys then cause no warning.
        """
        tables = parse_recorded_run(text, origin) if is_recorded else rename_keys(parse_toml(text, origin))
        return from_mapping(cls, apply_overrides(tables, overrides), "")

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
        """Build the configuration from Python mappings, as `from_toml` does from text."""
        return from_mapping(cls, apply_overrides(rename_keys(tables), overrides), "")

    @property
    def max_response_tokens(self) -> int:
        """Maximum number of response tokens in training: the value in `[trl]`, or 512 if it sets none."""
        return int(self.trl.get("max_completion_length", self.trl.get("max_length")) or 512)

    def with_response_limit(self, context: int | None) -> RunConfig:
        """If `trl.max_completion_length` is 0, return a copy with `default_response_limit(context)`."""
        if self.trl.get("max_completion_length") != 0:
            return self
        return dataclasses.replace(self, trl={**self.trl, "max_completion_length": default_response_limit(context)})

    @property
    def weights_dtype(self) -> str:
        """Data type in which the model is loaded: `model.dtype`, or the type that `auto` selects."""
        if self.model.dtype != AUTO:
            return self.model.dtype
        return "bfloat16" if self.peft else "float32"

    def to_toml(self) -> str:
        """Return TOML with every default and preset field written out; parsing it gives the same configuration."""
        if self.rest.is_supervised:
            # A supervised preset ignores some fields and rejects any value of them but the default. If a later version
            # changed a default, it would reject the old default in a recorded run, so we record no value.
            method: dict[str, Any] = {"region_weights": self.rest.loss_weights(), "entropy_decay": None}
            method |= dict.fromkeys(("progress_steps", "resample_rounds", "share_prompts", "credit", "gamma"))
        else:
            preset = preset_to_table(self.rest.resolve())
            method = {name: preset[name] for name in ("advantage", "weights", "reward") if name in preset}
        plain = dataclasses.asdict(self)
        return tomli_w.dumps(without_none({**plain, "rest": {**plain["rest"], **method}}))


def preset_to_table(preset: Preset) -> dict[str, Any]:
    """Return the fields of a preset, except its name and origin, as plain TOML values."""
    names = [field.name for field in dataclasses.fields(preset) if field.name not in ("name", "origin")]
    table = {name: getattr(preset, name) for name in names}
    return without_none({**table, "weights": rule_to_table(preset.weights), "reward": rule_to_table(preset.reward)})


def rule_to_table(rule: Any) -> dict[str, Any]:
    if isinstance(rule, UserObject):
        return {"rule": rule.address, **rule.options}
    return dataclasses.asdict(rule) if dataclasses.is_dataclass(rule) and not isinstance(rule, type) else {}


def override_rule(own: Any, table: Mapping[str, Any], rules: Mapping[str, type], what: str, where: str) -> Any:
    # Three cases: `rule` is a user's object; `rule` names one of the package's rules, which starts from its defaults
    # unless the preset already uses that class; no `rule`, only fields of the preset's own rule change.
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
        raise UserError(f"{where}.rule is {name!r}", expected, "change it")
    base = own if type(own) is kind else kind()
    has_rule = any(field.name == "rule" for field in dataclasses.fields(kind))
    return override_fields(base, table if has_rule else options, where)


def read_run_file(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file.

    Without a path, reads a run file of this package: the one for the shop, for SmolLM2 in the office or on your own
    data, for your own model, data or environment or a supervised preset, otherwise the one for the tool world.
    """
    if path is None:
        overrides = list(overrides)
        text = read_asset(choose_run_file(apply_overrides({}, overrides)))
        return RunConfig.from_toml(text, overrides, origin="the embedded run")
    text, folder = read_toml_text(Path(path)), Path(path).parent
    add_search_folder(folder)  # a user's rule or reward may be defined next to the run file
    is_recorded = Path(path).name == CONFIG and (folder / ENVIRONMENT).exists()
    if Path(path).name == CONFIG:
        add_module_folders(folder)
    return RunConfig.from_toml(text, overrides, origin=str(path), is_recorded=is_recorded)


def choose_run_file(changes: Mapping[str, Any]) -> str:
    """Return the name of the package's run file that suits a run with these changes, given as tables."""
    # The tool world's settings do not suit your own model or data, so such runs start from other defaults.
    paths = {table: changes.get(table, {}).get("path") for table in ("model", "data", "env")}
    is_small = find_base_model(paths["model"]) in ("smollm2", "smollm2-office")
    if changes.get("rest", {}).get("preset") in SUPERVISED:
        return "smollm2_sft.toml" if is_small else "own_model_sft.toml"
    if paths["env"] == "shop" and paths["model"] in (None, "shop"):
        return "shop.toml"
    if paths["data"] == "office" and paths["model"] in (None, "smollm2"):
        return "office.toml"
    if is_small:
        return "smollm2.toml"
    return "own_model.toml" if any(paths.values()) else "tool_world.toml"


def find_base_model(path: Any) -> Any:
    """Return the model from which the runs started that led to the model at `path`, or `path` if no run did."""
    seen: list[Any] = []
    with suppress(OSError, ValueError, KeyError, TypeError):  # no file, or that of another program
        while isinstance(path, str) and path not in seen and (folder := Path(path).absolute()).is_dir():
            seen.append(path)
            run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
            run = folder.parent if folder.name == MODEL else run
            path = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))["model"]["path"]
    return path


def read_asset(name: str = "tool_world.toml") -> str:
    """Return the text of a TOML file that ships with the package; by default, the run file for the tool world."""
    return resources.files("rest_rl").joinpath("assets", name).read_text(encoding="utf-8")


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Parse TOML text; UserError for a syntax error. `origin` names the text in the message."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML ({error})", remedy="correct the syntax") from error


def parse_recorded_run(text: str, origin: str) -> dict[str, Any]:
    """Parse the config.toml of a run folder, with deprecated keys renamed and older presets translated."""
    return translate_older_preset(rename_keys(parse_toml(text, origin), warn=False))


def translate_older_preset(tables: dict[str, Any]) -> dict[str, Any]:
    # Runs of earlier versions lack `resample_rounds`, which every recorded run has. Then all weights followed running
    # entropies, `rest` was today's `rest_live`, `authors-code` had no dual clip, and TRL corrected the KL term. The
    # other fields of a preset are recorded.
    rest, trl = tables.get("rest"), tables.get("trl") or {}
    weights = rest.get("weights") if isinstance(rest, Mapping) else None
    if not isinstance(rest, Mapping) or not isinstance(weights, Mapping) or "resample_rounds" in rest:
        return tables
    if rest.get("preset") == "authors-code":
        trl = {"delta": NO_DUAL_CLIP, **trl}
    if trl.get("beta"):
        trl = {"use_bias_correction_kl": True, **trl}
    if "strength" in weights:  # one of the package's own rules
        # Its curriculum tells the older `rest` from the older `paper`, which has been renamed to `rest` by now.
        is_older_rest = rest.get("preset") == "rest" and not weights.get("decay_format")
        name = "rest_live" if is_older_rest else rest.get("preset")
        rest = {**rest, "preset": name, "weights": {"entropies": "running", **weights}}
    return {**tables, "rest": rest, "trl": trl}


def rename_keys(tables: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Replace the deprecated keys and presets of a run's tables; UserError if a table has both names of a key."""
    result = dict(tables)
    rest = result.get("rest")
    preset = rest.get("preset") if isinstance(rest, Mapping) else None
    if isinstance(rest, Mapping) and isinstance(preset, str) and preset in RENAMED_PRESETS:
        if warn:
            warn_renamed(f"the preset {preset}", RENAMED_PRESETS[preset])
        result["rest"] = {**rest, "preset": RENAMED_PRESETS[preset]}
    # Tables are rebuilt rather than edited: the caller's are not modified, and the key keeps its position.
    for old, new in RENAMED_KEYS.items():
        (name, old_key), new_key = old.split("."), new.split(".")[1]
        table = result.get(name)
        if not isinstance(table, Mapping) or old_key not in table:
            continue
        if new_key in table:
            raise UserError(f"{old} and {new} are both set, but {old} is only the old name", remedy=f"remove {old}")
        if warn:
            warn_renamed(old, new)
        result[name] = {new_key if key == old_key else key: value for key, value in table.items()}
    return result


def apply_overrides(tables: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `table.key=value` overrides; a value is TOML, and a bare word is a string."""
    result = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for override in overrides:
        path, separator, text = override.partition("=")
        *parents, key = path.strip().split(".")
        if not separator or not key or not all(parents):
            raise UserError(f"--set {override} is not an assignment", "--set table.key=value, such as run.seed=1")
        value = parse_toml_value(text.strip(), override)
        # Overrides are renamed separately: an override may use the old name of a key and the run file the new name.
        if len(parents) == 1:
            ((key, value),) = rename_keys({parents[0]: {key: value}})[parents[0]].items()
        elif not parents:
            value = rename_keys({key: value})[key]
        target: Any = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {override}: {parent} is not a table", remedy=f"set {parent} itself")
        target[key] = value
    return result


def parse_toml_value(text: str, override: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z_~./][\w~./:+-]*", text):
            return text
        remedy = "quote strings: 'key=\"text\"'"
        raise UserError(f"--set {override} is not a TOML value ({error})", remedy=remedy) from error
    if parsed.keys() != {"value"}:
        raise UserError(f"--set {override} sets several keys", remedy="use one --set per key")
    return parsed["value"]


def override_fields(config: T, changes: Mapping[str, Any], where: str) -> T:
    """Return a copy with validated changes, in which mappings are merged; `where` is the path in error messages."""
    merged = {name: merge(getattr(config, name, None), value) for name, value in changes.items()}
    return dataclasses.replace(cast(Any, config), **validate_fields(type(config), merged, where))


def merge(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, Mapping) and isinstance(new, Mapping) else new


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a table, including nested dataclasses; `where` is the table's path in error messages."""
    return cls(**validate_fields(cls, values, where))


def validate_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            table, _, key = name.partition(".")  # a dotted key in quotes: report an unknown key of its table as such
            if key and dataclasses.is_dataclass(kind := hints.get(table)):
                validate_fields(cast(type, kind), {key: values[name]}, f"{where}.{table}".lstrip("."))
                raise UserError(
                    f"unknown key {name!r}", remedy=f"write {name} without quotes, or use a table [{table}]"
                )
            raise unknown_key_error(f"{where}.{name}".lstrip("."), name, known)
    return {name: validate_value(value, hints[name], f"{where}.{name}".lstrip(".")) for name, value in values.items()}


def unknown_key_error(path: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown key, with the closest known key as a hint."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    library = {"trl": "TRL", "peft": "PEFT"}.get(path.partition(".")[0], "the library")
    expected = f"one of {', '.join(known)}" if len(known) <= 40 else f"one of {library}'s {len(known)} keys"
    return UserError(f"unknown key {path}", expected, f"did you mean {near[0]}?" if near else "remove or rename it")


def validate_value(value: Any, hint: Any, path: str) -> Any:
    """Validate a value against a type annotation, and return it; an integer may become a float, a list a tuple."""
    if dataclasses.is_dataclass(hint):
        kind = cast(type, hint)
        if not isinstance(value, (kind, Mapping)):
            raise UserError(f"{path} is {value!r}", "a table", f"write [{path}]")
        return from_mapping(kind, value, path) if isinstance(value, Mapping) else value
    if typing.get_origin(hint) is tuple and isinstance(value, list):  # TOML has lists only
        value = tuple(value)
    # Strict, because pydantic would otherwise accept "1" as a number and 1 as true.
    try:
        return type_adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    # One fault: name the key inside a table or list. Several faults come from the members of a union.
    if len(faults) == 1:
        path, value = ".".join(map(str, (path, *faults[0]["loc"]))), faults[0]["input"]
    expected = dict.fromkeys(
        EXPECTED_TEXTS[fault["type"]].format_map(fault.get("ctx") or {})
        if fault["type"] in EXPECTED_TEXTS
        else fault["msg"].removeprefix("Input should be ")
        for fault in faults
    )
    is_rule = path in ("rest.weights", "rest.reward")
    remedy = f"to use your own rule, set {path}.rule" if is_rule else "change the value"
    raise UserError(f"{path} is {value!r}", " or ".join(expected), remedy)


# Wording for pydantic's error types; other types keep pydantic's message.
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


type_adapter = cache(TypeAdapter)


def without_none(value: Any) -> Any:
    """Remove entries that are None, which TOML cannot represent; a missing key has the same meaning."""
    if isinstance(value, Mapping):
        return {str(key): without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def default_response_limit(context: int | None) -> int:
    """Return the default maximum of response tokens: half the context length, at most 1024; 1024 if it is None."""
    return min(DEFAULT_RESPONSE_LIMIT, max(1, (context or 2 * DEFAULT_RESPONSE_LIMIT) // 2))
