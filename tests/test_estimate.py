"""The memory and work estimate: published parameter counts, sums by hand, and the effect of each setting."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, MambaConfig, Qwen3Config
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from rest_rl.config import RunConfig
from rest_rl.errors import UserError
from rest_rl.train.estimate import (
    GIB,
    OPTIMIZER_BYTES,
    OPTIMIZER_COPIES,
    Device,
    Estimate,
    _MemoryModel,
    count_cache_bytes,
    count_parameters,
    count_work,
    estimate_resources,
    find_device,
    judge_fit,
    make_estimate_rows,
)
from rest_rl.train.trl.trainer import ResTConfig
from tests.architectures import NUM_PARAMETERS, published_config, qwen3

H100 = Device("NVIDIA H100 80GB HBM3", int(79.1 * GIB))
TINY = {"vocab_size": 100, "head_dim": 8, "num_key_value_heads": 2}
TINY_PARAMETERS = 100 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 8 + 2 * 32) + 32  # = 18752
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def tiny(**changes: Any) -> Qwen3Config:
    return Qwen3Config(
        **{
            **TINY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
            **changes,
        }
    )


def rl(**changes: Any) -> ResTConfig:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 100,
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "share_prompts": False,
    }
    return ResTConfig(output_dir="unused", report_to=[], **{**settings, **changes})


def run(text: str = 'model.dtype = "float32"\neval.prompts = 0') -> RunConfig:
    return RunConfig.from_toml(text)


def guess(args: Any = None, model: Any = None, config: RunConfig | None = None, **settings: Any) -> Estimate:
    settings = {"prompt_tokens": [20, 30, 40, 50], "processes": 1, "sharding": "none", **settings}
    return estimate_resources(config or run(), model or tiny(), args or rl(), **settings)


def part(guessed: Estimate, name: str) -> int:
    return next(part.bytes for part in guessed.parts if part.name == name)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_parameter_counts_equal_the_published_ones(name: str) -> None:
    assert count_parameters(published_config(name)).base == NUM_PARAMETERS[name]


def test_parameters_of_an_adapter() -> None:
    # r * (in + out) of q (32, 32), k (32, 16), v (32, 16), o (32, 32), gate and up (32, 48), down (48, 32), two layers
    by_hand = 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    size = count_parameters(tiny(), LORA)
    assert (size.base, size.trained) == (TINY_PARAMETERS, by_hand)


def test_kv_cache() -> None:
    config = published_config("Qwen/Qwen3-8B")
    assert count_cache_bytes(config, 1, 2) == 36 * 8 * 128 * 2 * 2 == 147_456
    assert count_cache_bytes(config, 1000, 2) == 147_456_000


def test_kv_cache_of_sliding_window_and_linear_attention() -> None:
    kinds = ["full_attention", "sliding_attention"]
    windowed = tiny(layer_types=kinds, use_sliding_window=True, sliding_window=10)
    # 2 * 2 heads * 8 * 4 bytes = 128 a token and layer: 100 tokens in one layer, 10 in the other
    assert count_cache_bytes(windowed, 100, 4) == 128 * 100 + 128 * 10
    from transformers import AutoConfig

    hybrid = AutoConfig.for_model(
        "qwen3_next",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
    )
    # the one full layer, 2 * 2 * 8 * 2 bytes a token, and the state of the other
    assert count_cache_bytes(hybrid, 100, 2) == 64 * 100 + 4 * 16 * 8 * 2


def test_a_rollout_of_several_turns_holds_all_responses_and_results() -> None:
    config = run('model.dtype = "float32"\nenv.path = "shop"\nenv.result_tokens = 7\neval.max_new_tokens = 100')
    guessed = guess(config=config, turns=3)
    assert guessed.work.max_response == 3 * 100 + 2 * 7
    update, cache, prefill = (
        next(each.how for each in guessed.parts if each.name == name) for name in ("activations", "KV cache", "prefill")
    )
    # after the longest prompt of 50; the prompt of the last turn lacks its response
    assert "estimate: 4 x 364 tokens" in update
    assert "held-out responses at once, 364 tokens each" in cache
    assert "264 tokens each" in prefill
    longer = guess(config=run('env.path = "shop"\nenv.result_tokens = 7\neval.max_new_tokens = 1000'), turns=3)
    assert f"{50 + 3 * 1000 + 2 * 7:,} tokens" in next(each.how for each in longer.parts if each.name == "KV cache")


def test_weights_gradients_and_optimizer_states_in_float32() -> None:
    guessed = guess()
    assert guessed.size.base == TINY_PARAMETERS
    assert part(guessed, "weights") == 4 * TINY_PARAMETERS
    assert part(guessed, "gradients") == 4 * TINY_PARAMETERS
    assert part(guessed, "optimizer states") == 8 * TINY_PARAMETERS


@pytest.mark.parametrize(
    ("optimizer", "dtype", "each"),
    [
        ("adamw_torch", "float32", 8),
        ("adamw_torch_fused", "bfloat16", 4),  # torch keeps both moments in the weights' own type
        ("adamw_bnb_8bit", "float32", 2),
        ("paged_adamw_8bit", "bfloat16", 2),
        ("sgd", "float32", 0),
        ("adafactor", "float32", 0.04),
        ("lion_32bit", "bfloat16", 4),
    ],
)
def test_optimizer_states(optimizer: str, dtype: str, each: float) -> None:
    config = run(f'model.dtype = "{dtype}"\neval.prompts = 0')
    assert part(guess(rl(optim=optimizer), config=config), "optimizer states") == int(each * TINY_PARAMETERS)


def test_optimizers_have_the_names_of_transformers() -> None:
    assert {*OPTIMIZER_BYTES, *OPTIMIZER_COPIES} <= {optimizer.value for optimizer in OptimizerNames}


def test_an_adapter_is_trained_in_float32_over_frozen_weights() -> None:
    guessed = guess(lora=LORA, config=run("peft.r = 4\neval.prompts = 0"))
    trained = guessed.size.trained
    assert part(guessed, "weights") == 2 * TINY_PARAMETERS + 4 * trained
    assert (part(guessed, "gradients"), part(guessed, "optimizer states")) == (4 * trained, 8 * trained)


def test_weights_in_four_bits() -> None:
    guessed = guess(lora=LORA, config=run("peft.r = 4\nmodel.load_in_4bit = true\neval.prompts = 0"))
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    rest = 2 * (TINY_PARAMETERS - linear) + 4 * guessed.size.trained
    # half a byte, a byte of scale for 64 weights, 4 bytes for 256 scales
    assert part(guessed, "weights") == int(linear * (0.5 + 1 / 64 + 4 / 16384)) + rest


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "states"),
    [
        ("none", 4, 4, 8),
        ("fsdp", 1, 1, 2),  # accelerate keeps float32 weights; all in four parts
        ("zero1", 2, 2, 3),  # bfloat16 weights; moments and 32-bit weights in four parts
        ("zero2", 2, 0.5, 3),
        ("zero3", 0.5, 0.5, 3),
    ],
)
def test_sharding(sharding: str, weights: float, gradients: float, states: float) -> None:
    guessed = guess(rl(bf16=True), processes=4, sharding=sharding)
    held = [part(guessed, name) / TINY_PARAMETERS for name in ("weights", "gradients", "optimizer states")]
    assert held == pytest.approx([weights, gradients, states], rel=1e-3)


def test_checkpointing_shrinks_the_bound_of_activations() -> None:
    plain, checkpointed = guess(), guess(rl(gradient_checkpointing=True))
    tokens, layer = 4 * (50 + 100), 4 * (14 * 32 + 4 * 32 + 4 * 48)
    # of two layers one is run again
    # and of each pair of tokens the second layer's mask of four bytes
    pairs = 4 * (50 + 100) ** 2
    saved = tokens * layer + pairs * 4
    assert part(plain, "activations") - part(checkpointed, "activations") == saved


def test_shared_prompts_count_once_per_group() -> None:
    shared = guess(rl(share_prompts=True))
    # 4 responses of 100 tokens to one prompt of 50 have the tokens of 3 prompts with a response, and one row more pairs
    three = guess(rl(per_device_train_batch_size=3, num_generations=3))
    assert part(shared, "activations") - part(three, "activations") == 150**2 * (1 + 2 * 4)
    assert 4 * part(shared, "prefill") == part(guess(), "prefill")
    # the prompts of a second turn differ within a group
    assert part(guess(rl(share_prompts=True), turns=2), "prefill") == part(guess(turns=2), "prefill")


@pytest.mark.parametrize(
    "changes",
    [
        {"config": run('model.attn_implementation = "eager"')},
        {"sharding": "zero1"},
        {"model": tiny(attention_dropout=0.1)},
        {"model": tiny(use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None)},
        {"lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)},
    ],
)
def test_prompts_that_cannot_be_shared_count_once_per_response(changes: dict[str, Any]) -> None:
    shared, apart = (guess(rl(share_prompts=shares), **changes) for shares in (True, False))
    assert [shared.parts, shared.work] == [apart.parts, apart.work]


@pytest.mark.parametrize(
    ("attention", "bytes_of_a_pair"),
    [("", 1 + 4), ("sdpa", 1 + 4), ("flash_attention_2", 0), ("eager", 1 + 4 + 4 * 12)],
)
def test_prefill_includes_a_mask_of_all_pairs_of_tokens(attention: str, bytes_of_a_pair: int) -> None:
    config = run(f'model.dtype = "float32"\nmodel.attn_implementation = "{attention}"\neval.prompts = 0')
    layer = 4 * (14 * 32 + 4 * 32 + 4 * 48)
    # 8 responses of the longest prompt, 50 tokens
    assert part(guess(config=config), "prefill") == 8 * (50 * layer // 2 + 50**2 * bytes_of_a_pair)


def test_very_long_prompts_exceed_the_memory() -> None:
    """The embedded model's sizes and 64 responses to prompts of 15,096 tokens; the mask of 73 GB dominates."""
    sizes = {"vocab_size": 559, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256, "head_dim": 32}
    model = tiny(**sizes, num_key_value_heads=4)
    args = rl(per_device_train_batch_size=8, gradient_accumulation_steps=8, num_generations=8)
    here = Device("this machine", 20 * GIB, is_gpu=False)
    long = guess(args, model, prompt_tokens=[15_060] * 63 + [15_096], device=here)
    assert part(long, "prefill") > 64 * 5 * 15_096**2 > 72e9
    assert judge_fit(long)[0] == "does not fit"
    short = guess(args, model, prompt_tokens=[300] * 64, device=here)
    assert judge_fit(short)[0] == "fits"
    assert part(short, "context") == GIB // 4


def test_the_bound_exceeds_a_measured_run() -> None:
    """MiB of peak resident memory beyond a process with the loaded model: prompts of 3,060 tokens, torch 2.13, CPU."""
    sizes = {"vocab_size": 559, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256, "head_dim": 32}
    model = tiny(**sizes, num_key_value_heads=4)
    for checkpointing, generation, update in ((False, 2051, 2365), (True, 1198, 1235)):
        accumulated = 2 if checkpointing else 4
        settings = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 4}
        args = rl(**settings, gradient_accumulation_steps=accumulated, gradient_checkpointing=checkpointing)
        guessed = guess(args, model, prompt_tokens=[3_060] * 8, device=Device("this machine", GIB, is_gpu=False))
        assert generation <= guessed.phase_bytes("generation") / 2**20 <= 1.5 * generation
        assert update <= guessed.phase_bytes("update") / 2**20 <= 1.5 * update


def test_a_micro_step_uses_the_head_of_trl() -> None:
    """On a GPU the peak memory is read; here only the bytes of weights and gradients are checked."""
    for lora, checkpointing in ((None, False), (LORA, True)):
        model = _MemoryModel(
            run(),
            tiny(),
            rl(gradient_checkpointing=checkpointing),
            lora,
            count_parameters(tiny(), lora),
            count_work(rl(), [20] * 4),
            turns=1,
            processes=1,
            sharding="none",
            device=None,
        )
        held, seconds = model.run_micro_step(torch.device("cpu"))
        assert held == 4 * (TINY_PARAMETERS + (2 * model.size.trained if lora else TINY_PARAMETERS))
        assert seconds > 0


def test_generation_needs_a_cache_for_every_response() -> None:
    guessed = guess(rl(steps_per_generation=8))
    # 4 a micro-batch x 8 micro-batches, 50 + 100 tokens, 2 layers * 2 heads * 8 * 2 * 4 bytes
    assert part(guessed, "KV cache") == 32 * 150 * 256


def test_a_shared_prompt_is_in_the_cache_once() -> None:
    shared = guess(rl(steps_per_generation=8, share_prompts=True))
    assert part(shared, "KV cache") == (32 // 4 * 50 + 32 * 100) * 256


@pytest.mark.parametrize(("attention", "shares"), [("", True), ("eager", False)])
def test_a_cpu_holds_all_draws_of_a_held_out_prompt_at_once(attention: str, shares: bool) -> None:
    text = 'model.dtype = "float32"\neval.prompts = 99\neval.batch_size = 40\neval.max_new_tokens = 30'
    guessed = guess(config=run(f'{text}\nmodel.attn_implementation = "{attention}"\neval.samples_per_prompt = 2'))
    # two draws at T = 1, a greedy one, one at the low temperature
    assert part(guessed, "KV cache") == (40 * 50 + 4 * 40 * 30 if shares else 40 * (50 + 30)) * 256
    how = next(each.how for each in guessed.parts if each.name == "prefill")
    assert ("each once for 4" in how) == shares


def test_work_of_reinforcement_learning() -> None:
    args = rl(steps_per_generation=8, num_train_epochs=3)
    work = guess(args, prompt_tokens=[10] * 100, processes=2).work
    # 4 x 2 processes x 8 micro-batches = 64 responses of 16 prompts, trained on in 4 steps; 6 complete batches of 100
    assert (work.responses, work.prompts, work.per_step, work.steps) == (64, 16, 16, 3 * 6 * 4)
    assert guess(rl(max_steps=7)).work.steps == 7


def test_work_of_several_generations_in_one_step() -> None:
    args = rl(steps_per_generation=1, gradient_accumulation_steps=4)
    work = guess(args, prompt_tokens=[10] * 18).work
    # one prompt and its 4 responses at a time, 4 times a step: 18 prompts are 4 steps and a part, 3 epochs
    assert (work.prompts, work.responses, work.per_step, work.steps) == (1, 4, 16, 15)


def test_steps_count_all_prompts_although_only_some_are_tokenized() -> None:
    assert guess(prompt_tokens=[10] * 20, samples=200).work.steps == guess(prompt_tokens=[10] * 200).work.steps


def test_work_of_supervised_training() -> None:
    args = SFTConfig(
        output_dir="unused",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_length=40,
        bf16=False,
        use_cpu=True,
    )
    guessed = guess(args, prompt_tokens=[10, 30, 50] * 7)
    assert (guessed.work.steps, guessed.work.longest_tokens) == (2 * 3, 40)  # 21 demonstrations, 8 a step
    assert {part.phase for part in guessed.parts} == {"always", "update"}


def test_too_few_prompts_are_reported() -> None:
    word, text = judge_fit(guess(rl(steps_per_generation=8), prompt_tokens=[10] * 7))
    assert (word, "7 prompts" in text, "one batch of 8" in text) == ("cannot train", True, True)


def test_the_verdict_says_by_how_much_a_device_is_too_small_and_what_to_change() -> None:
    big = qwen3(4096, 12288, 36, 32, tied=False)
    settings = {"model": big, "device": H100, "prompt_tokens": [1000] * 64}
    full = guess(rl(bf16=True), **settings)
    assert judge_fit(full)[0] == "does not fit"
    assert "[peft]" in judge_fit(full)[1]
    config = run("peft.r = 4\neval.prompts = 0")
    adapter = guess(rl(bf16=True, gradient_checkpointing=True), lora=LORA, config=config, **settings)
    assert judge_fit(adapter)[0] == "fits"


def test_vllm_counts_always_or_with_sleep_mode_only_in_generation() -> None:
    model = qwen3(4096, 12288, 36, 32, tied=False)
    settings = {"model": model, "device": H100, "lora": LORA, "config": run("peft.r = 4\neval.prompts = 0")}
    awake = guess(rl(use_vllm=True, vllm_gpu_memory_utilization=0.4), **settings)
    asleep = guess(rl(use_vllm=True, vllm_gpu_memory_utilization=0.4, vllm_enable_sleep_mode=True), **settings)
    assert part(awake, "vLLM") == part(asleep, "vLLM") == int(0.4 * H100.bytes)
    assert awake.phase_bytes("update") - asleep.phase_bytes("update") == part(awake, "vLLM")
    assert awake.phase_bytes("generation") == asleep.phase_bytes("generation")


def test_the_table_ends_with_the_verdict() -> None:
    rows = make_estimate_rows(guess(device=H100))
    assert all(isinstance(cell, str) and cell for row in rows for cell in row)
    assert rows[-1][:2] == ("verdict", "fits")
    assert rows[0][1] == f"{TINY_PARAMETERS:,}"


def test_alternative_names_of_layer_widths() -> None:
    shape: dict[str, Any] = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
    narrow, usual = (guess(model=GPT2Config(**shape, n_inner=n)) for n in (64, None))
    # 4 bytes of 4 values a token for each of 64 more of width, in two layers and half of one more, of 4 x 150 tokens
    assert part(usual, "activations") - part(narrow, "activations") == 4 * 4 * 64 * 5 // 2 * 4 * 150
    with pytest.raises(UserError, match="mamba cannot be estimated"):
        guess(model=MambaConfig())


def test_without_a_device_there_is_no_verdict() -> None:
    guessed = guess()
    assert judge_fit(guessed)[0] == "no GPU"
    assert (find_device(rl(use_cpu=False)) is None) == (not torch.cuda.is_available())
    here = find_device(rl(use_cpu=True))
    assert here is not None
    assert not here.is_gpu
    assert 0 < here.bytes <= psutil.virtual_memory().total
    assert find_device(rl(use_vllm=True)) == find_device(rl(use_cpu=False))  # for another machine
