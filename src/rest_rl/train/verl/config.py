"""Compose verl's configuration for a run: verl's defaults, overridden by values from the run file and then by `[verl]`.

`[verl]` may change any key except the fifteen of `make_fixed_values`, which point verl to this package and the run
folder. This module can be imported without verl; `compose_config` requires it.
"""

# pyright: reportMissingImports=false
# verl is installed in a separate environment.
from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl import GRPOConfig

from rest_rl.config import AUTO, NO_DUAL_CLIP, RunConfig, parse_toml, read_asset
from rest_rl.errors import UserError
from rest_rl.formats import get_format
from rest_rl.presets import Preset
from rest_rl.rewards import check_reward_rule, uses_random_rewards
from rest_rl.train.trl.settings import check_trl_table
from rest_rl.train.verl.responses import LOOP, PLUGIN, TRAINER
from rest_rl.train.weighing import check_weight_rule
from rest_rl.weights import is_uniform

if TYPE_CHECKING:
    from omegaconf import DictConfig

ACTOR, ROLLOUT, MODEL = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model")
NODES, GPUS, N, PASSES = ("trainer.nnodes", "trainer.n_gpus_per_node", f"{ROLLOUT}.n", f"{ACTOR}.ppo_epochs")
PROMPTS, MINI = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"
TOTAL, EPOCHS = "trainer.total_training_steps", "trainer.total_epochs"
SAVE, TEST, EXTERNAL_LIB = ("trainer.save_freq", "trainer.test_freq", f"{MODEL}.external_lib")
# Keys that `compute_schedule` fills in if `[verl]` does not set them.
SCHEDULE_KEYS = (PROMPTS, MINI, TOTAL, EPOCHS, SAVE, TEST)
TRAIN_FILE, HELD_OUT_FILE, LOOPS_FILE, TOKENIZER = "train.parquet", "held_out.parquet", "agent_loops.yaml", "tokenizer"

# Which keys of the run file verl gets under which name, and which values of verl's keys are allowed.
KEY_TABLES = parse_toml(read_asset("verl.toml"), "verl.toml")
DERIVED_TRL_KEYS = [name for names in KEY_TABLES["trl_counted"].values() for name in names]


class VerlJob(NamedTuple):
    """Values that verl's configuration needs in addition to the run file."""

    folder: Path  # the run folder, absolute
    model: str
    num_train: int  # rows of the training file
    prompt_tokens: int  # of the longest prompt
    ends: tuple[int, ...] = ()  # the stop tokens
    has_held_out: bool = False
    resume_from: Path | None = None

    @property
    def files(self) -> Path:
        """The folder for verl's input files: prompts, agent loop and tokenizer."""
        return self.folder / "verl"


# From the run file to verl's keys


def make_fixed_values(method: Preset, job: VerlJob) -> dict[str, Any]:
    """Return the fifteen keys that `[verl]` must not change: they load this package's classes and the run's files."""
    return {
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": TRAINER,
        "algorithm.norm_adv_by_std_in_grpo": method.advantage != "dr_grpo",
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "ReSTRewardManager",
        "reward.reward_manager.module.path": f"pkg://{PLUGIN}",
        f"{ROLLOUT}.agent.default_agent_loop": LOOP,
        f"{ROLLOUT}.agent.agent_loop_config_path": str(job.files / LOOPS_FILE),
        "data.train_files": str(job.files / TRAIN_FILE),
        "data.val_files": str(job.files / (HELD_OUT_FILE if job.has_held_out else TRAIN_FILE)),  # verl requires one
        f"{MODEL}.path": job.model,
        f"{MODEL}.tokenizer_path": str(job.files / TOKENIZER),  # stripped of remote code, see `write_verl_files`
        "trainer.default_local_dir": str(job.folder / "checkpoints"),
        "trainer.resume_mode": "resume_path" if job.resume_from else "disable",
        "trainer.resume_from_path": str(job.resume_from) if job.resume_from else None,
    }


def make_initial_values(config: RunConfig, job: VerlJob, *, megatron: bool = False) -> dict[str, Any]:
    """Return verl's keys with the values from the run file; keys that `compute_schedule` sets are None."""
    method, trl = config.rest.resolve(), with_trl_defaults(config)
    check_run(config, trl, method, megatron=megatron)
    low = method.epsilon_low if trl["epsilon"] == 0.2 else trl["epsilon"]
    high = low if method.epsilon_high == method.epsilon_low else method.epsilon_high
    seeded = ("data.seed", f"{ROLLOUT}.seed", f"{ACTOR}.data_loader_seed")
    seeded += (f"{ACTOR}.megatron.seed" if megatron else f"{ACTOR}.fsdp_config.seed",)
    values = {
        **make_fixed_values(method, job),
        **dict.fromkeys(SCHEDULE_KEYS),
        **dict.fromkeys(seeded, config.run.seed),
        **KEY_TABLES["start"],
        **{key: trl[name] for name, key in KEY_TABLES["trl"].items()},
        f"{ACTOR}.loss_agg_mode": KEY_TABLES["aggregation"][method.advantage],
        f"{ACTOR}.loss_scale_factor": "${data.max_response_length}" if method.advantage == "dr_grpo" else None,
        f"{ACTOR}.clip_ratio": low,
        f"{ACTOR}.clip_ratio_low": low,
        f"{ACTOR}.clip_ratio_high": high if trl["epsilon_high"] is None else trl["epsilon_high"],
        # Without `delta` TRL has no such bound, verl always has one.
        f"{ACTOR}.clip_ratio_c": trl["delta"] or method.delta or NO_DUAL_CLIP,
        f"{ACTOR}.ppo_max_token_len_per_gpu": max(16384, job.prompt_tokens + trl["max_completion_length"]),
        "data.max_prompt_length": job.prompt_tokens,
        f"{MODEL}.trust_remote_code": config.model.trust_remote_code,
        f"{ROLLOUT}.top_k": trl["top_k"] or -1,  # no limit is 0 in TRL and -1 in vLLM
        f"{ROLLOUT}.val_kwargs.n": config.eval.samples_per_prompt,
        "trainer.val_before_train": config.eval.before,
        "trainer.experiment_name": Path(config.run.out).name,
    }
    if trl["beta"]:  # TRL's KL term: exp(d) - d - 1 with d = log(p_ref / p); the token weights do not multiply it
        kl = {"use_kl_loss": True, "kl_loss_coef": trl["beta"], "kl_loss_type": "low_var_kl"}
        values |= {f"{ACTOR}.{name}": value for name, value in kl.items()}
    if not megatron:
        values[f"{ACTOR}.strategy"] = "fsdp2"
    if config.peft:
        rank = config.peft.get("r", 16)
        table = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **config.peft}
        values |= {key: table[name] for name, key in KEY_TABLES["peft"].items()}
    if trl["save_total_limit"]:  # with 1, verl 0.9 deletes the old checkpoint before the new one is complete
        values["trainer.max_actor_ckpt_to_keep"] = max(2, trl["save_total_limit"])
    return values


# GRPOConfig is not instantiated: its __post_init__ looks for devices on this machine, and the run trains elsewhere.
def with_trl_defaults(config: RunConfig) -> dict[str, Any]:
    """Return all fields of TRL's GRPOConfig, with the values of `[trl]` where set and the defaults elsewhere."""
    # vLLM is installed on the cluster, not on this machine.
    check_trl_table({name: value for name, value in config.trl.items() if name != "use_vllm"})
    fields = dataclasses.fields(GRPOConfig)
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields}
    return {**defaults, **config.trl}


def find_unread_keys(config: RunConfig) -> list[str]:
    """Return the keys of `[trl]`, `[peft]` and `[model]` that a run on verl ignores."""
    unread = [f"trl.{name}" for name in config.trl if name not in (*KEY_TABLES["trl"], *DERIVED_TRL_KEYS)]
    unread += [f"peft.{name}" for name in config.peft if name not in KEY_TABLES["peft"]]
    unread += [f"model.{name}" for name in ("attn_implementation", "load_in_4bit") if getattr(config.model, name)]
    return unread + (["model.dtype"] if config.model.dtype not in (AUTO, "float32") else [])


def compute_schedule(given: Mapping[str, Any], config: RunConfig, num_train: int) -> dict[str, int]:
    """Convert the batch sizes and step counts of `[trl]` and `[eval]` to verl's units, rounding up to whole batches.

    TRL counts responses per device, and a step is an optimizer step; verl counts prompts, and a step is a generation
    batch. Example: 8 responses x 8 GPUs x steps_per_generation 32 / num_generations 4 = 512 prompts per batch; with
    gradient_accumulation_steps 4, an optimizer step has 64 prompts, so a batch has 8 optimizer steps. `given` contains
    verl's configuration; a key of `SCHEDULE_KEYS` keeps its value there unless it is None.
    """
    trl, group, devices = with_trl_defaults(config), given[N], given[NODES] * given[GPUS]
    together, accumulated = trl["per_device_train_batch_size"] * devices, trl["gradient_accumulation_steps"]
    # If TRL generates several batches per optimizer step (steps_per_generation below gradient_accumulation_steps),
    # verl generates them as one.
    steps = max(trl["steps_per_generation"] or accumulated, accumulated)
    prompts, mini = given[PROMPTS] or together * steps / group, given[MINI] or together * accumulated / group
    if prompts % 1 or mini % 1 or prompts > num_train:
        problem = f"{num_train} training prompts give batches of {prompts:g} prompts and optimizer steps of {mini:g}"
        remedy = f"change trl.per_device_train_batch_size, or set verl.{PROMPTS} and verl.{MINI}"
        raise UserError(problem, "whole numbers, and enough prompts for one batch", remedy)
    updates, an_epoch = math.ceil(prompts / mini) * given[PASSES], num_train // int(prompts)
    total = math.ceil((given[EPOCHS] or trl["num_train_epochs"]) * an_epoch)
    if given[EPOCHS] is None and trl["max_steps"] > 0:
        total = math.ceil(trl["max_steps"] / updates)
    total = given[TOTAL] or total
    save = -1 if trl["save_strategy"] == "no" else math.ceil(trl["save_steps"] / updates)
    save = given[SAVE] or save
    return {
        PROMPTS: int(prompts),
        MINI: int(mini),
        TOTAL: total,
        EPOCHS: given[EPOCHS] or math.ceil(total / an_epoch),
        # verl writes the last checkpoint, which becomes the run's model, only if a frequency is set.
        SAVE: save if save > 0 else total,
        TEST: given[TEST] or math.ceil(config.eval.every / updates) or total,
    }


# Refused settings


# The weights multiply the advantages. A loss, estimator or correction that skips verl's advantages, mixes them over
# tokens or adds a term without them would silently train another objective: `[allowed]` in assets/verl.toml lists what
# works for every preset, `[allowed_with_weights]` what works for weights other than 1, each with its reason. Fixed keys
# must keep their value: they load the plugin and point verl at the run's own files.
def check_allowed_values(values: Mapping[str, Any], fixed: Mapping[str, Any], *, reshapes: bool) -> None:
    weighing = KEY_TABLES["allowed_with_weights"]
    allowed = KEY_TABLES["allowed"] | (weighing if reshapes else {}) | {key: [value] for key, value in fixed.items()}
    for key, texts in allowed.items():
        choices = [None if text == "null" else text for text in texts]
        if (value := values.get(key, None if key in fixed else choices[0])) not in choices:
            remedy = "change it or use preset 'grpo', 'dr_grpo' or 'dapo'" if key in weighing else "see docs/cluster.md"
            raise UserError(f"verl.{key} is {value!r}", " or ".join(map(repr, choices)), remedy)


# Refuses settings that verl would not follow: random rewards need the batch, but verl scores each response separately;
# progress on verl always spans the whole run; verl's own resampling has no limit on rounds; Megatron would train all
# weights despite [peft]; and verl expands the name of the run folder as a file pattern.
def check_run(config: RunConfig, trl: Mapping[str, Any], method: Preset, *, megatron: bool) -> None:
    if uses_random_rewards(method.reward):
        problem = "rest.reward.random is true, but verl scores each response separately"
        raise UserError(problem, "false", "set run.engine = 'trl'")
    if config.rest.progress_steps:
        problem = f"rest.progress_steps is {config.rest.progress_steps}, which verl does not support"
        raise UserError(problem, "0, for all steps of the run", "remove it")
    if config.rest.resample_rounds:
        problem = f"rest.resample_rounds is {config.rest.resample_rounds}, which only run.engine = 'trl' supports"
        raise UserError(problem, "0", "remove it; for verl's own dynamic sampling see docs/cluster.md")
    if config.peft and megatron:
        raise UserError("[peft] has no effect with Megatron", remedy=f"remove it and set verl.{MODEL}.lora")
    if pattern := next((sign for sign in ("[", "]", "*", "?", "::") if sign in config.run.out), None):
        problem = f"the run folder {config.run.out} contains {pattern}, which verl expands as a file name pattern"
        raise UserError(problem, remedy="pass another --out")
    tool_format = "toolrl" if config.rest.format == AUTO else config.rest.format
    truncates = trl["top_p"] < 1 or trl["top_k"] > 0
    check_weight_rule(method.weights, tool_format, config.rest.entropy_decay, truncates=truncates)
    check_reward_rule(method.reward, get_format(tool_format))


# verl's configuration


def compose_config(config: RunConfig, job: VerlJob) -> DictConfig:
    """Compose verl's configuration and let verl validate it; UserError for keys and values that verl rejects.

    The added table `rest` is for this package's code in verl's processes: `rest.run` is the text of the run file,
    `rest.folder` the run folder, `rest.ends` the ids of the stop tokens.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    method, typed = config.rest.resolve(), list(config.verl.get("overrides", ()))
    table = {name: value for name, value in config.verl.items() if isinstance(value, Mapping)}
    choices = [f"{name}={value}" for name, value in config.verl.items() if isinstance(value, str)]
    choices += [text for text in typed if "." not in text.partition("=")[0]]  # model_engine=megatron
    with explain_config_errors(), initialize_config_module("verl.trainer.config", version_base=None):
        verl = compose("ppo_trainer", overrides=choices)
        parsed = OverridesParser.create().parse_overrides([text for text in typed if text not in choices])
        last = [(f"{'+' * each.is_add()}{each.key_or_group}", each.value()) for each in parsed]
    start = make_initial_values(config, job, megatron=verl.actor_rollout_ref.actor.strategy == "megatron")
    with explain_config_errors():
        for path, value in [*start.items(), *iter_leaves(table), *last]:
            OmegaConf.update(verl, path.replace("+", ""), value, merge=False, force_add="+" in path)
    given = {key: OmegaConf.select(verl, key) for key in (NODES, GPUS, N, PASSES, *SCHEDULE_KEYS)}
    with explain_config_errors(TypeError, ZeroDivisionError):  # sizes that are not numbers
        for path, value in compute_schedule(given, config, job.num_train).items():
            OmegaConf.update(verl, path, value)
    if not job.has_held_out:  # verl would evaluate on training prompts
        verl.trainer.test_freq, verl.trainer.val_before_train = -1, False
    libraries = OmegaConf.select(verl, EXTERNAL_LIB) or []
    libraries = [libraries] if isinstance(libraries, str) else libraries
    OmegaConf.update(verl, EXTERNAL_LIB, ["rest_rl.train.verl.trl_shim", *libraries])
    with explain_config_errors(AssertionError, TypeError, ValueError), redirect_stdout(io.StringIO()):
        plain: Any = OmegaConf.to_container(verl, resolve=True)
        fixed, reshapes = make_fixed_values(method, job), not is_uniform(method.weights)
        check_allowed_values(dict(iter_leaves(plain)), fixed, reshapes=reshapes)
        # verl 0.9 checks an adapter's rank against vLLM's limits, which needs vLLM on this machine: rank 0 skips that.
        checked: Any = OmegaConf.merge(verl, {"actor_rollout_ref": {"model": {"lora_rank": 0}}})
        omega_conf_to_dataclass(checked.actor_rollout_ref.rollout)
        omega_conf_to_dataclass(checked.algorithm)
        validate_config(checked, use_reference_policy=need_reference_policy(checked), use_critic=False)
    # OmegaConf would interpolate ${...} in the run file; \u0024 is the same dollar sign in TOML.
    rest = {"run": config.to_toml().replace("${", "\\u0024{"), "folder": str(job.folder), "ends": list(job.ends)}
    OmegaConf.update(verl, "rest", rest, force_add=True)
    return verl


# Turns the exceptions of verl, Hydra and OmegaConf about a configuration into errors of the user.
@contextmanager
def explain_config_errors(*kinds: type[Exception]) -> Iterator[None]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, *kinds) as error:
        text = " ".join(str(error).split())
        raise UserError(f"verl rejects the configuration ({text:.300})", remedy="change [verl]") from error


# Dotted paths and values of nested tables, "null" as None. A key with Hydra's `+` adds its value as a whole.
def iter_leaves(table: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and "+" not in name:
            yield from iter_leaves(value, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", None if value == "null" else value
