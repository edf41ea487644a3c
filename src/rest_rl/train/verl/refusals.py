"""What `[verl]` cannot ask for: another objective, weights that would not apply, sizes that verl trips over later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.train.verl.batches import (
    BEGIN,
    EPOCHS,
    GPUS,
    KEEP,
    MINI,
    NODES,
    PROMPTS,
    RESPONSE,
    SAVE,
    TEST,
    TOTAL,
    N,
    world_size,
)
from rest_rl.train.verl.trl_keys import ACTOR, MODEL, ROLLOUT

HOMOGENEOUS = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo")
"""verl's policy losses of which w >= 0 times the advantage is w times the loss of each token.

Not clip_cov and kl_cov (they choose tokens by the covariance with the advantage), geo_mean (it sums a response's
advantages), dro (its penalty has no advantage in it) and bypass_mode (it needs no old log-probabilities).
"""
ONE_PER_RESPONSE = ("rest_group", "grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo")
"""verl's estimators that give all tokens of a response one advantage, without a critic."""

OWNED = {
    "data.train_files": "set data.path",
    "data.val_files": "set data.held_out",
    "data.prompt_key": "remove it",
    "data.return_raw_chat": "remove it",
    "trainer.default_local_dir": "set run.out",
    "trainer.resume_mode": "use --resume",
    "trainer.resume_from_path": "use --resume",
    "trainer.use_v1": "remove it",
    "trainer.v1.trainer_mode": "remove it; the asynchronous modes are not supported",
    "reward.reward_manager.source": "remove it",
    "reward.reward_manager.name": "remove it",
    "reward.reward_manager.module.path": "remove it",
    "critic.enable": "remove it",
    "algorithm.norm_adv_by_std_in_grpo": "set rest.advantage",
    f"{MODEL}.path": "set model.path",
    f"{MODEL}.tokenizer_path": "remove it: it is a copy of the tokenizer of model.path",
    f"{ROLLOUT}.agent.default_agent_loop": "remove it",
    f"{ROLLOUT}.agent.agent_loop_config_path": "remove it",
}
"""Settings that the plugin depends on, each with what to do about another value of it."""

MICRO_BATCHES = (f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu")
"""Sizes that verl wants where it does not fill micro-batches by tokens: in the update, in the pass before it."""
WHOLE = (
    *(NODES, GPUS, PROMPTS, MINI, N, TOTAL, EPOCHS, "data.gen_batch_size", "data.max_prompt_length"),
    *(RESPONSE, SAVE, f"{ACTOR}.ppo_epochs", f"{ACTOR}.ppo_max_token_len_per_gpu"),
    *(*MICRO_BATCHES, f"{ACTOR}.ulysses_sequence_parallel_size"),
    *(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.megatron.tensor_model_parallel_size"),
    *(f"{ACTOR}.megatron.pipeline_model_parallel_size", f"{ACTOR}.megatron.context_parallel_size"),
    *(f"{ROLLOUT}.tensor_model_parallel_size", f"{ROLLOUT}.data_parallel_size"),
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
)
"""Settings that the checks reckon with."""
MAY_BE_NULL = (TOTAL, "data.gen_batch_size", *MICRO_BATCHES)
"""Those of them that verl may be left without."""
CHECKPOINT, PARTS = f"{ACTOR}.checkpoint", ("model", "optimizer", "extra")
"""verl's table on checkpoints, and what a run goes on from: weights, Adam's states, schedule and random states."""


class Rule(NamedTuple):
    """Values of one of verl's keys that are allowed."""

    key: str
    allows: Callable[[Any], bool]
    expected: str
    remedy: str
    reshaping_only: bool = False
    """Whether presets that weigh all tokens alike may have any value."""


def _off(value: Any) -> bool:
    return not value


def _has_parts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and set(PARTS) <= set(value)


UNWEIGHED = "remove it, or use preset 'grpo', 'dr_grpo' or 'dapo'"
RULES = (
    Rule("algorithm.rollout_correction.bypass_mode", _off, "false: it skips the entropies", "remove it"),
    Rule(
        "algorithm.rollout_correction.rollout_rs",
        _off,
        "none: rejection takes tokens out of responses, which are read whole",
        "set rollout_is, which weighs them instead",
    ),
    Rule("distillation.enabled", _off, "false: its loss is another one", "remove it"),
    Rule("reward.reward_model.enable", _off, "false: rewards are the run file's", "remove it"),
    Rule("reward.custom_reward_function.path", _off, "none: rewards are the run file's", "set [rest.reward]"),
    Rule("custom_reward_function.path", _off, "none: rewards are the run file's", "set [rest.reward]"),
    Rule("data.custom_cls.path", _off, "none: prompts are laid out already", "remove it"),
    Rule("data.filter_overlong_prompts", _off, "false: steps are counted before it", "set data.max_prompt_tokens"),
    Rule(
        "data.train_max_samples",
        lambda value: value in (None, -1),
        "all rows, -1: epochs of fewer end the run early",
        "take a smaller file as data.path",
    ),
    Rule(f"{ROLLOUT}.calculate_log_probs", bool, "true: they show whether sampler and trainer agree", "remove it"),
    Rule(f"{ROLLOUT}.multi_turn.enable", _off, "false: a prompt has one response", "remove it"),
    Rule(f"{ROLLOUT}.agent.agent_loop_manager_class", _off, "none", "remove it"),
    Rule("actor_rollout_ref.hybrid_engine", bool, "true: sampling is on the GPUs that train", "remove it"),
    Rule(f"{MODEL}.lora_adapter_path", _off, "none: the run file says what is trained", "set model.path or [peft]"),
    Rule(f"{MODEL}.target_parameters", _off, "none: the adapter that is kept would not name them", "remove it"),
    Rule("trainer.critic_warmup", _off, "0: there is no critic", "remove it"),
    Rule(
        "trainer.v1.sync.parameter_sync_step",
        lambda value: value == 1,
        "1: a batch of responses is weighed as a whole",
        "remove it",
    ),
    Rule("trainer.v1.sampler.custom_sampler.path", _off, "none: a batch is all that was sampled", "remove it"),
    Rule("skip.rollout_tq.enable", _off, "false: responses would be those of another step", "remove it"),
    Rule(f"{CHECKPOINT}.save_contents", _has_parts, f"{', '.join(PARTS)}, by which a run goes on", "add them"),
    Rule(f"{CHECKPOINT}.load_contents", _has_parts, f"{', '.join(PARTS)}, by which a run goes on", "add them"),
    Rule(f"{CHECKPOINT}.async_save", _off, "false: an unfinished checkpoint would count as whole", "remove it"),
    Rule(
        KEEP,
        lambda value: value != 1,
        "2 or more: with 1 verl deletes the old weights before the new checkpoint is whole",
        "raise it",
    ),
    Rule("trainer.remove_previous_ckpt_in_save", _off, f"false: it is {KEEP} = 1", "remove it"),
    Rule("trainer.val_only", _off, "false: nothing would be trained", "use rest-rl eval"),
    Rule(
        f"{ACTOR}.policy_loss.loss_mode", lambda v: v != "bypass_mode", "another loss: it skips entropies", "change it"
    ),
    Rule(
        "algorithm.adv_estimator",
        lambda value: value in ONE_PER_RESPONSE,
        f"one of {', '.join(ONE_PER_RESPONSE)}, which need no critic and give a response one advantage",
        "set rest.advantage instead",
    ),
    Rule(
        f"{ACTOR}.policy_loss.loss_mode",
        lambda value: value in HOMOGENEOUS,
        f"one of {', '.join(HOMOGENEOUS)}, in which a weighted advantage is a weighted loss",
        "change it, or use preset 'grpo', 'dr_grpo' or 'dapo'",
        reshaping_only=True,
    ),
    Rule(f"{ACTOR}.entropy_coeff", _off, "0: weights would not apply to that term", UNWEIGHED, reshaping_only=True),
    Rule(f"{ACTOR}.use_kl_loss", _off, "false: weights would not apply to that term", UNWEIGHED, reshaping_only=True),
    Rule("algorithm.use_kl_in_reward", _off, "false: it moves the reward", UNWEIGHED, reshaping_only=True),
    Rule(
        f"{ACTOR}.clip_ratio_c",
        lambda value: isinstance(value, (int, float)) and value > 1,
        "more than 1",
        "raise it; 1e9 is none",
    ),
)


def check_whole(given: Mapping[str, Any]) -> None:
    """ValueError for a size that is no whole number above 0, None for some that verl may be left without."""
    for key in WHOLE:
        value = given.get(key, 1)
        if value is None and key in MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            remedy = "set trl.save_strategy = 'no' for a checkpoint at the end alone" if key == SAVE else "change it"
            raise UserError(f"verl.{key} = {value!r}", "a whole number of at least 1", f"{remedy}")


def check_owned(ours: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ValueError for a setting of `[verl]` that would part the run from its run file or the plugin."""
    for key, remedy in OWNED.items():
        if key in given and given[key] != ours[key]:
            raise UserError(f"verl.{key} = {given[key]!r}", f"{ours[key]!r}", f"{remedy}")
    if any(key == "rest" or key.startswith("rest.") for key in given):
        raise UserError("a table [verl.rest]", "none: it is what the plugin reads", "use [rest]")


def check_measured(given: Mapping[str, Any], *, measures: bool) -> None:
    """ValueError for measurements that are asked for without held-out rows: verl would take a training prompt."""
    every = given.get(TEST)
    asked = [BEGIN] if given.get(BEGIN) else [TEST] if isinstance(every, int) and every > 0 else []
    for key in () if measures else asked:
        raise UserError(
            f"verl.{key} = {given[key]!r} without held-out rows to measure",
            "none of it",
            "set data.held_out and eval.prompts, or remove it",
        )


def check_refused(flat: Mapping[str, Any], *, reshapes: bool) -> None:
    """ValueError for a value that would leave the weights unapplied or make the objective another one."""
    for rule in RULES:
        if rule.key in flat and (reshapes or not rule.reshaping_only) and not rule.allows(flat[rule.key]):
            raise UserError(f"verl.{rule.key} = {flat[rule.key]!r}", f"{rule.expected}", f"{rule.remedy}")


def check_sizes(flat: Mapping[str, Any], prompt_tokens: int, engine: str) -> None:
    """ValueError for sizes that do not divide as verl's workers assert, minutes after the start."""
    devices, responses = world_size(flat), int(flat[N])
    _check_prompts(flat, prompt_tokens)
    if (cut := flat.get(f"{ROLLOUT}.response_length", flat[RESPONSE])) != flat[RESPONSE]:
        raise UserError(
            f"verl.{ROLLOUT}.response_length = {cut!r}",
            f"{flat[RESPONSE]}, which the run reckons with",
            f"set trl.max_completion_length or verl.{RESPONSE} instead",
        )
    engines = _product(flat, ROLLOUT, "tensor_model_parallel_size", "data_parallel_size")
    if devices % engines:
        raise UserError(
            f"{devices} GPUs (verl.trainer nnodes x n_gpus_per_node)",
            f"a multiple of {engines}, those of one rollout engine",
            f"change trl.vllm_tensor_parallel_size or verl.{ROLLOUT}",
        )
    copies, a_copy = _copies(flat, devices, engine)
    if flat[MINI] * responses % copies:
        raise UserError(
            f"{flat[MINI]} prompts x {responses} = {flat[MINI] * responses} responses an optimizer step",
            f"a multiple of {copies}, the copies of the model that share them",
            f"change verl.{MINI}",
        )
    _check_micro_batches(flat, prompt_tokens, copies, a_copy)


def _copies(flat: Mapping[str, Any], devices: int, engine: str) -> tuple[int, int]:
    """(data-parallel ranks, GPUs that share one sequence)."""
    if engine == "megatron":
        inner = f"{ACTOR}.megatron"
        context = _product(flat, inner, "context_parallel_size")
        a_copy = context * _product(flat, inner, "tensor_model_parallel_size", "pipeline_model_parallel_size")
    else:
        keys = (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size")
        context = a_copy = max(int(flat.get(key, 1)) for key in keys)
    if devices % a_copy:
        raise UserError(
            f"{devices} GPUs (verl.trainer nnodes x n_gpus_per_node)",
            f"a multiple of {a_copy}, those that share a sequence or a copy of the model",
            "change one of them",
        )
    return devices // a_copy, context


def _product(flat: Mapping[str, Any], prefix: str, *names: str) -> int:
    product = 1
    for name in names:
        product *= int(flat.get(f"{prefix}.{name}", 1))
    return product


def _check_prompts(flat: Mapping[str, Any], prompt_tokens: int) -> None:
    if flat["data.max_prompt_length"] < prompt_tokens:
        raise UserError(
            f"verl.data.max_prompt_length = {flat['data.max_prompt_length']}",
            f"at least {prompt_tokens}, the longest prompt",
            "set data.max_prompt_tokens instead, which leaves longer ones out",
        )
    fetched = flat.get("data.gen_batch_size") or flat[PROMPTS]
    if flat[PROMPTS] % fetched:
        raise UserError(
            f"verl.data.gen_batch_size = {fetched}",
            f"a divisor of {flat[PROMPTS]}, the prompts of a batch",
            "change it",
        )


def _check_micro_batches(flat: Mapping[str, Any], prompt_tokens: int, copies: int, context: int) -> None:
    is_dynamic = flat[f"{ACTOR}.use_dynamic_bsz"]
    if flat.get(f"{ROLLOUT}.log_prob_use_dynamic_bsz", is_dynamic) != is_dynamic:
        raise UserError(
            f"verl.{ROLLOUT}.log_prob_use_dynamic_bsz other than verl.{ACTOR}.use_dynamic_bsz",
            "the same",
            "leave the former out",
        )
    longest = max(prompt_tokens, flat["data.max_prompt_length"]) + flat[RESPONSE]
    if is_dynamic:
        for key in (f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"):
            if key in flat and flat[key] * context < longest:
                raise UserError(
                    f"verl.{key} = {flat[key]} x {context} GPUs a sequence",
                    f"at least {longest}, the longest prompt and response",
                    "raise it",
                )
        return
    for key, prompts in zip(MICRO_BATCHES, (flat[MINI], flat[PROMPTS]), strict=True):
        share = prompts * int(flat[N]) // copies
        if not flat.get(key) or share % flat[key]:
            raise UserError(
                f"verl.{key} = {flat.get(key)} without use_dynamic_bsz",
                f"a divisor of {share}, the responses that one copy of the model takes",
                f"set it, or leave verl.{ACTOR}.use_dynamic_bsz out",
            )
