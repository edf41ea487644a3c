"""A run file in verl's words: dotted keys of verl 0.9's configuration with the values that the run asks for.

Learning rates, clipping, sampling and rewards are the run file's; how the work is spread is verl's. Where both engines
have a setting the two mean the same, but for what the comments say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rest_rl.config import AUTO, RunConfig
from rest_rl.credit import AdvantageKind
from rest_rl.errors import UserError
from rest_rl.presets import Preset
from rest_rl.train.policy import lora_config
from rest_rl.train.trl.trainer import TRL_SETTINGS, reshapes
from rest_rl.train.verl.batches import BEGIN, KEEP, MINI, NODES, PROMPTS, RESPONSE, batches_of, schedule_of
from rest_rl.train.verl.names import ESTIMATOR, LOOP, PLUGIN, TRAINER
from rest_rl.train.verl.overrides import UNSET
from rest_rl.train.verl.refusals import check_measured, check_owned, check_refused, check_sizes, check_whole
from rest_rl.train.verl.trl_keys import ACTOR, MODEL, ROLLOUT, copied, trl_table
from rest_rl.train.weighing import check_method

ENGINES = ("dp", "megatron")
"""verl's training engines that a run file can be said to: FSDP2 and Megatron."""
AGGREGATION: Mapping[AdvantageKind, str] = {
    "grpo": "seq-mean-token-mean",  # (1/G) sum_i (1/T_i) sum_t
    "dr_grpo": "seq-mean-token-sum-norm",  # TRL too divides by max_completion_length: loss_scale_factor below
    "dapo": "token-mean",  # by the tokens of one optimizer step; TRL by the mean over the steps of a batch
}
"""verl's name of what TRL calls `loss_type`, over the responses of one optimizer step on all GPUs."""
NO_BOUND = 1e9
"""Of ratios or gradient norms that are not clipped: verl wants a number."""
TRACKERS = ("wandb", "mlflow", "swanlab", "tensorboard", "clearml", "trackio")
"""Trackers of TRL that verl has too."""
OPTIMIZERS = {
    "adamw_torch": ("torch.optim", "AdamW"),
    "adamw_torch_fused": ("torch.optim", "AdamW"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "adamw_bnb_8bit": ("bitsandbytes.optim", "AdamW8bit"),
}
EXTERNAL, BESIDE_TRL = f"{MODEL}.external_lib", "rest_rl.train.verl.beside_trl"
"""verl's key for modules that every worker imports, and ours."""
PATTERN_SIGNS = ("[", "]", "*", "?", "::")
"""What a path of the library datasets, which reads the prompts on verl, must not have."""
TAKEN_IN: tuple[str, ...] = (EXTERNAL, BEGIN)
"""Keys of `[verl]` that are part of settings of ours, which therefore come last."""

ALWAYS: Mapping[str, Any] = {
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": TRAINER,
    "trainer.logger": [],
    "trainer.project_name": "rest-rl",
    "algorithm.adv_estimator": ESTIMATOR,
    "algorithm.use_kl_in_reward": False,
    "critic.enable": False,
    "reward.reward_manager.source": "importlib",
    "reward.reward_manager.name": "ReSTRewardManager",
    "reward.reward_manager.module.path": f"pkg://{PLUGIN}",
    "data.prompt_key": "prompt",
    "data.filter_overlong_prompts": False,
    "data.truncation": "error",
    "data.return_raw_chat": True,
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.calculate_log_probs": True,
    f"{ROLLOUT}.agent.default_agent_loop": LOOP,
    f"{ACTOR}.use_dynamic_bsz": True,
    f"{ACTOR}.entropy_coeff": 0.0,
    f"{ACTOR}.entropy_from_logits_with_chunking": True,  # a vocabulary of 150,000 in float32 is 0.6 MB a token
}


@dataclass(frozen=True)
class VerlJob:
    """What a run on verl starts from, besides its run file."""

    folder: Path
    """The run folder, absolute."""
    train_file: Path
    held_out_file: Path | None
    num_train: int
    """Rows of the training file."""
    prompt_tokens: int
    """The longest prompt of both files."""
    model: str
    """A directory or hub name."""
    tokenizer: str
    """A folder that this package has saved the tokenizer of `model` to, without code of the model's.

    verl's reward workers load theirs with trust_remote_code = True, whatever the run says.
    """
    resume_from: Path | None
    """A checkpoint `.../global_step_N`."""
    agent_loops: Path
    """The YAML file that names the agent loop."""


def verl_settings(config: RunConfig, job: VerlJob) -> dict[str, Any]:
    """The settings that follow from a run file; `[verl]` itself, which comes over them, is not among them.

    A key whose last part begins with `+` is one that verl's YAML lacks. ValueError for what verl could not do, and for
    what it would find out minutes after its start.
    """
    method, given = checked_method(config), flat_verl(config.verl)
    check_whole(given)
    check_folder(job.folder)
    check_measured(given, measures=job.held_out_file is not None)
    table = trl_table(config)
    table["max_completion_length"] = given.get(RESPONSE, table["max_completion_length"])
    check_terms(config, table, method)
    batches = batches_of(table, given)
    schedule = schedule_of(config, table, given, batches, job.num_train)
    engine = str(given.get("model_engine", "dp"))
    if engine not in ENGINES:
        raise UserError(f"verl.model_engine = {engine!r}", f"one of {', '.join(ENGINES)}", "change it")
    settings = {
        **ALWAYS,
        **copied(table, config.trl),
        PROMPTS: batches.prompts,
        MINI: batches.mini,
        **schedule.settings(measures=job.held_out_file is not None, resumes=job.resume_from is not None),
        **folder_settings(config, table, job),
        **data_settings(config, table, job),
        **model_settings(config, given, job),
        **loss_settings(table, method),
        **optimizer_settings(table, engine),
        **engine_settings(config, table, engine),
        **rollout_settings(config, table, job),
        **queue_settings(given, batches.prompts * batches.responses),
    }
    check_owned(settings, given)
    check_refused(given, reshapes=reshapes(method))
    check_sizes(settings | given, job.prompt_tokens, engine)
    return settings


def plugin_table(config: RunConfig, job: VerlJob) -> dict[str, str]:
    """The table `rest` that verl's configuration carries to the plugin: the whole run file and the run folder."""
    return {"run": config.to_toml(), "folder": str(job.folder)}


def flat_verl(table: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """`[verl]` as dotted keys, `+` left out, the word null as None: what the checks read."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{parent}.{key}".lstrip(".").replace("+", "")
        flat |= flat_verl(value, path) if isinstance(value, Mapping) else {path: None if value == UNSET else value}
    return flat


def check_folder(folder: Path) -> None:
    """ValueError for a path that the library which reads the prompts takes for a pattern, after the start."""
    for sign in PATTERN_SIGNS:
        if sign in str(folder):
            raise UserError(
                f"the run folder {folder} on verl, which takes {sign} for part of a pattern of file names",
                "a path without it",
                "pass another --out",
            )


def checked_method(config: RunConfig) -> Preset:
    """The preset; ValueError for one that verl cannot train."""
    if config.rest.is_supervised:
        raise UserError(
            f"preset {config.rest.preset!r} with run.engine = 'verl'",
            "one of reinforcement learning",
            "set run.engine = 'trl' for demonstrations",
        )
    method = config.rest.resolve()
    if method.reward is not None and method.reward.random:
        raise UserError(
            "rest.reward.random = true with run.engine = 'verl', which scores each response by itself and gives it "
            "no place in the batch to draw by",
            "false",
            "set run.engine = 'trl'",
        )
    if config.model.load_in_4bit:
        raise UserError(
            "model.load_in_4bit = true with run.engine = 'verl', which shards weights in 16 or 32 bits",
            "false",
            "set run.engine = 'trl'",
        )
    return method


def check_terms(config: RunConfig, table: Mapping[str, Any], method: Preset) -> None:
    """ValueError for terms of the loss that verl reckons differently, or that the weights would not reach."""
    if table["beta"] and reshapes(method):
        raise ValueError(
            f"got trl.beta = {table['beta']} with preset {method.name!r}, whose token weights would not apply to that "
            "term; leave it at 0, or use preset 'grpo', 'dr_grpo' or 'dapo'"
        )
    if table["beta"] and table["use_bias_correction_kl"]:
        raise UserError(
            f"trl.beta = {table['beta']} with trl.use_bias_correction_kl = true, TRL's default, which verl does not "
            "have",
            "false",
            "set it",
        )
    truncates = table["top_p"] < 1 or (table["top_k"] or 0) > 0
    tool_format = "toolrl" if config.rest.format == AUTO else config.rest.format
    check_method(method, tool_format, config.rest.entropy_decay, truncates=truncates, named="trl.")
    for name, value in TRL_SETTINGS[method.advantage].items():
        asked = config.trl.get(name, value)
        if {True: "group", False: "none"}.get(asked, asked) != value:
            raise UserError(
                f"trl.{name} = {asked!r}",
                f"{value!r}, which preset {method.name!r} means",
                f"set rest.advantage, or verl.{ACTOR}.loss_agg_mode",
            )


def folder_settings(config: RunConfig, table: Mapping[str, Any], job: VerlJob) -> dict[str, Any]:
    """Where the run writes, what it goes on from, who is told of it."""
    names = table["report_to"]
    names = [names] if isinstance(names, str) else list(names or [])
    trackers = [name for name in names if name != "none"]
    if unknown := [name for name in trackers if name not in TRACKERS]:
        raise UserError(
            f"trl.report_to = {table['report_to']!r}",
            f"some of {', '.join(TRACKERS)}, which verl has",
            f"remove {unknown[0]}",
        )
    limit = table["save_total_limit"]
    return {
        # With 1 verl deletes the old weights before the new checkpoint is whole; without a limit it keeps all.
        KEEP: max(2, limit) if limit and limit > 0 else None,
        "trainer.logger": trackers,
        "trainer.experiment_name": table["run_name"] or Path(config.run.out).name,
        "trainer.default_local_dir": str(job.folder / "checkpoints"),
        "trainer.resume_mode": "resume_path" if job.resume_from else "disable",
        "trainer.resume_from_path": str(job.resume_from) if job.resume_from else None,
    }


def data_settings(config: RunConfig, table: Mapping[str, Any], job: VerlJob) -> dict[str, Any]:
    """The two files and their order."""
    return {
        "data.train_files": str(job.train_file),
        "data.val_files": str(job.held_out_file or job.train_file),
        # Without held-out rows nothing is measured, but verl wants a file with a row in it.
        "data.val_max_samples": -1 if job.held_out_file else 1,
        "data.max_prompt_length": job.prompt_tokens,
        "data.trust_remote_code": config.model.trust_remote_code,
        "data.seed": config.run.seed if table["data_seed"] is None else table["data_seed"],
    }


def model_settings(config: RunConfig, given: Mapping[str, Any], job: VerlJob) -> dict[str, Any]:
    """The model, how it attends, its adapter, and modules that its workers import, those of `[verl]` after ours."""
    attention, asked = config.model.attn_implementation, given.get(EXTERNAL) or []
    settings: dict[str, Any] = {
        f"{MODEL}.path": job.model,
        f"{MODEL}.tokenizer_path": job.tokenizer,
        EXTERNAL: [BESIDE_TRL, *([asked] if isinstance(asked, str) else asked)],
        f"{MODEL}.trust_remote_code": config.model.trust_remote_code,
        # Rows are packed without padding, which takes flash attention: verl's choice unless the run names another.
        f"{MODEL}.use_remove_padding": not attention or "flash" in attention,
    }
    if attention:
        settings[f"{MODEL}.override_config.+attn_implementation"] = attention
    return settings | lora_settings(config)


def lora_settings(config: RunConfig) -> dict[str, Any]:
    """`[peft]` as verl's LoRA; ValueError for fields of LoraConfig that verl does not hand on."""
    if lora_config(config.peft) is None:
        return {}
    if "megatron" in str(config.verl.get("model_engine", "")):
        raise UserError(
            "[peft] with verl.model_engine = 'megatron', whose layers have other names",
            "none",
            f"remove [peft] and set verl.{MODEL}.lora",
        )
    fixed = {"task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    for name, value in config.peft.items():
        if name not in ("r", "lora_alpha", "target_modules", "exclude_modules") and value != fixed.get(name):
            raise UserError(
                f"peft.{name} = {value!r}, which verl does not hand on to peft",
                "r, lora_alpha, target_modules and exclude_modules",
                "remove it, or train with the engine trl",
            )
    rank = config.peft.get("r", 16)
    return {
        f"{MODEL}.lora_rank": rank,
        f"{MODEL}.lora_alpha": config.peft.get("lora_alpha", 2 * rank),
        f"{MODEL}.target_modules": config.peft.get("target_modules", "all-linear"),
        f"{MODEL}.exclude_modules": config.peft.get("exclude_modules"),
    }


def loss_settings(table: Mapping[str, Any], method: Preset) -> dict[str, Any]:
    """The clipped surrogate with the preset's aggregation; `delta` is verl's clip_ratio_c, without it there is none."""
    low = method.epsilon_low if table["epsilon"] == 0.2 else table["epsilon"]
    high = low if method.epsilon_high == method.epsilon_low else method.epsilon_high
    high = high if table["epsilon_high"] is None else table["epsilon_high"]
    if table["delta"] is not None and table["delta"] <= 1 + high:
        raise UserError(
            f"trl.delta = {table['delta']}",
            f"more than 1 + {high}, or it would cut positive advantages too, in TRL but not in verl",
            "raise it",
        )
    return {
        f"{ACTOR}.loss_agg_mode": AGGREGATION[method.advantage],
        f"{ACTOR}.loss_scale_factor": table["max_completion_length"] if method.advantage == "dr_grpo" else None,
        "algorithm.norm_adv_by_std_in_grpo": method.advantage != "dr_grpo",
        f"{ACTOR}.clip_ratio": low,
        f"{ACTOR}.clip_ratio_low": low,
        f"{ACTOR}.clip_ratio_high": high,
        f"{ACTOR}.clip_ratio_c": NO_BOUND if table["delta"] is None else table["delta"],
        f"{ACTOR}.use_kl_loss": bool(table["beta"]),
        f"{ACTOR}.kl_loss_coef": table["beta"],
        f"{ACTOR}.kl_loss_type": "low_var_kl",  # TRL's estimator, which verl also holds within 10
    }


def optimizer_settings(table: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """AdamW and its learning rate, which verl changes once a batch of responses."""
    name, scheduler = str(table["optim"]), str(table["lr_scheduler_type"])
    known = [key for key in OPTIMIZERS if engine == "dp" or "8bit" not in key]
    if name not in known:
        raise UserError(
            f"trl.optim = {name!r}", f"one of {', '.join(known)}", f"change it, or set verl.{ACTOR}.optim.optimizer"
        )
    shapes = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
    shapes |= {"linear": "linear"} if engine == "megatron" else {}
    if scheduler not in shapes:
        raise UserError(
            f"trl.lr_scheduler_type = {scheduler!r}", f"one of {', '.join(shapes)}, which verl has", "set it"
        )
    optim = f"{ACTOR}.optim"
    epsilon = {"eps": table["adam_epsilon"]} if table["adam_epsilon"] != 1e-8 else None
    settings: dict[str, Any] = {
        f"{optim}.betas": [table["adam_beta1"], table["adam_beta2"]],
        f"{optim}.clip_grad": table["max_grad_norm"] or NO_BOUND,
        f"{optim}.override_optimizer_config": epsilon,
    }
    if engine == "megatron":
        no_override: dict[str, Any] = {f"{optim}.override_optimizer_config": epsilon or {}}
        return settings | no_override | {f"{optim}.lr_decay_style": shapes[scheduler]}
    module, optimizer = OPTIMIZERS[name]
    return settings | {
        f"{optim}.optimizer_impl": module,
        f"{optim}.optimizer": optimizer,
        f"{optim}.lr_scheduler_type": shapes[scheduler],
    }


def precision(table: Mapping[str, Any]) -> str:
    """What products are computed in: TRL's default is bfloat16."""
    if table["fp16"]:
        return "float16"
    return "float32" if table["bf16"] is False else "bfloat16"


def engine_settings(config: RunConfig, table: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """FSDP2 or Megatron: type of the weights and of the products, checkpointing of activations, seed."""
    products = precision(table)
    seeds = {f"{ACTOR}.data_loader_seed": config.run.seed}
    if engine == "megatron":
        if products == "float32":
            raise UserError(
                "trl.bf16 = false with verl.model_engine = 'megatron'",
                "products in 16 bits (its weights are kept in float32 anyway)",
                "set trl.bf16 = true",
            )
        inner, whole = f"{ACTOR}.megatron", bool(table["gradient_checkpointing"])
        recompute = f"{inner}.override_transformer_config.recompute"
        return seeds | {
            f"{inner}.seed": config.run.seed,
            f"{inner}.dtype": products,
            f"{recompute}_granularity": "full" if whole else None,
            f"{recompute}_method": "uniform" if whole else None,
            f"{recompute}_num_layers": 1 if whole else None,
        }
    # verl trains an adapter in the type of the weights beneath, so these are float32 with [peft]; same values, as the
    # products are in `products` either way.
    weights = "float32" if config.peft else config.weights_dtype
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    inner = f"{ACTOR}.fsdp_config"
    settings: dict[str, Any] = {
        f"{ACTOR}.strategy": "fsdp2",
        f"{inner}.model_dtype": short[weights],
        f"{inner}.seed": config.run.seed,
        f"{inner}.full_determinism": bool(table["full_determinism"]),
    }
    if products != "bfloat16":
        settings[f"{inner}.+mixed_precision"] = {
            "param_dtype": short[products],
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        }
    return seeds | settings


def rollout_settings(config: RunConfig, table: Mapping[str, Any], job: VerlJob) -> dict[str, Any]:
    """How responses are sampled, in training and when measured (as `[eval]`, at temperature 1)."""
    longest = job.prompt_tokens + table["max_completion_length"]
    room = table["vllm_max_model_length"] or longest
    if room <= job.prompt_tokens:
        raise UserError(
            f"trl.vllm_max_model_length = {room}",
            f"more than the longest prompt, {job.prompt_tokens} tokens",
            "raise it, or lower data.max_prompt_tokens",
        )
    return {
        f"{ROLLOUT}.top_k": table["top_k"] or -1,
        f"{ROLLOUT}.dtype": precision(table),
        f"{ROLLOUT}.seed": config.run.seed,
        f"{ROLLOUT}.max_model_len": room,
        f"{ROLLOUT}.agent.agent_loop_config_path": str(job.agent_loops),
        f"{ROLLOUT}.val_kwargs.n": config.eval.samples,
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.val_kwargs.temperature": 1.0,
        # As many tokens as the run file's micro-batch holds at its longest, filled with however many responses fit.
        f"{ACTOR}.ppo_max_token_len_per_gpu": table["per_device_train_batch_size"] * longest,
        **correction_settings(table),
    }


def correction_settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's correction for what vLLM and the trainer compute differently, which verl has under other names."""
    prefix = "algorithm.rollout_correction"
    if not (table["use_vllm"] and table["vllm_importance_sampling_correction"]):
        return {f"{prefix}.rollout_is": None}
    level, kind = str(table["vllm_importance_sampling_mode"]).split("_")
    low, high = table["vllm_importance_sampling_clip_min"], table["vllm_importance_sampling_clip_max"]
    high = table["vllm_importance_sampling_cap"] or high
    if high is None or (kind == "truncate" and low is not None):
        raise UserError(
            f"trl.vllm_importance_sampling_clip_min = {low} and clip_max = {high} with the mode {level}_{kind}",
            "an upper bound, and a lower one for masks alone",
            f"change them, or set verl.{prefix}",
        )
    # verl's ratios lie within exp(-20) = 2e-9 and exp(20), so 1e-9 masks none for being small.
    bounds = f"{low or 1e-9}_{high}" if kind == "mask" else high
    return {f"{prefix}.rollout_is": level, f"{prefix}.rollout_is_threshold": bounds}


def queue_settings(given: Mapping[str, Any], responses: int) -> dict[str, Any]:
    """Room for a batch of responses on its way between processes; at least verl's own."""
    storage = "transfer_queue.backend.SimpleStorage"
    return {
        f"{storage}.total_storage_size": max(100_000, 4 * responses),
        f"{storage}.num_data_storage_units": max(8, 2 * int(given.get(NODES, 1))),
    }
