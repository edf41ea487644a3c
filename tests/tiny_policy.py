"""A policy that calls tools without training: a Qwen3 model whose logits are initialized to a table of next pieces.

Its responses are well-formed often enough that every region except OTHER has tokens, and vary enough that the rewards
of a group differ. Only the small noise in its attention weights is random, with a fixed seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.data.samples import ToolSample
from rest_rl.response import Gold, ToolCall
from tests.sample_files import save_samples

EOS, PAD = "<|im_end|>", "<|endoftext|>"
ASK, CALL, ANSWER, ENDED = "assistant:", "</think>\n<tool_call>\n", "</think>\n<response>", "\n</tool_call>"
NAME, KEY, VALUE, CLOSE, NEXT = '{"name": "', '", "parameters": {"', '": ', "}}", "}}\n"
CHAIN: dict[str, dict[str, float]] = {
    ASK: {"<think>": 0.97, " a": 0.03},
    "<think>": {" a": 0.5, " b": 0.3, " c": 0.2},
    **{word: {" a": 0.2, " b": 0.2, " c": 0.1, CALL: 0.4, ANSWER: 0.1} for word in (" a", " b", " c")},
    CALL: {NAME: 1.0},
    NAME: {"f": 0.7, "g": 0.3},
    **{name: {KEY: 1.0} for name in "fg"},
    KEY: {"x": 0.6, "y": 0.4},
    **{key: {VALUE: 1.0} for key in "xy"},
    VALUE: {"1": 0.5, "2": 0.25, "3": 0.25},
    **{value: {CLOSE: 0.8, NEXT: 0.2} for value in "123"},
    NEXT: {NAME: 1.0},
    CLOSE: {ENDED: 1.0},
    ENDED: {EOS: 1.0},
    ANSWER: {" a": 0.1, " ok": 0.9},
    " ok": {" ok": 0.3, "</response>": 0.7},
    "</response>": {EOS: 1.0},
}
TEMPLATE = """\
{#- writes calls as <tool_call> {"name": ..., "parameters": ...} </tool_call> -#}
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}{{ message.content }};{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    pieces = sorted({*CHAIN, *(piece for row in CHAIN.values() for piece in row)} - {EOS}, key=len, reverse=True)
    pattern = "|".join(
        piece.translate(str.maketrans({c: f"\\{c}" for c in "{}|"})) for piece in pieces if len(piece) > 1
    )
    split = pre_tokenizers.Split(Regex(pattern + r"|[\s\S]"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = {to_bytes.pre_tokenize_str(piece)[0][0] for piece in pieces}
    vocabulary = [*alphabet, *sorted(encoded - set(alphabet))]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(vocabulary)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=PAD, padding_side="left", chat_template=TEMPLATE
    )


def tiny_model(tokenizer: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    size = len(tokenizer)
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.02,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    logits_VV = torch.full((size, size), -12.0)
    logits_VV[:, tokenizer.eos_token_id] = 0.0
    for piece, row in CHAIN.items():
        at = single_token_id(tokenizer, piece)
        logits_VV[at] = -9.0
        for successor, probability in row.items():
            logits_VV[at, single_token_id(tokenizer, successor)] = torch.log(torch.tensor(probability))
        logits_VV[at] -= logits_VV[at].logsumexp(0)
    with torch.no_grad():  # the final norm scales a one-hot vector to length sqrt(V)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits_VV.T / size**0.5)
    return model


def single_token_id(tokenizer: Any, piece: str) -> int:
    ids = tokenizer(piece)["input_ids"]
    assert len(ids) == 1, (piece, ids)
    return ids[0]


def tiny_samples(n: int = 8) -> list[ToolSample]:
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    call = ToolCall("f", {"x": 1})
    return [
        ToolSample(f"s{i}", ({"role": "user", "content": f"do {i}"},), (tool,), Gold((call,), None)) for i in range(n)
    ]


def tiny_prompts(layout: PromptLayout, n: int = 8) -> list[Prepared]:
    return [Prepared(sample, layout.render(sample), layout.tokenizer) for sample in tiny_samples(n)]


def tiny_settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Return trainer settings for a fast, deterministic run of a few steps that logs every step."""
    settings = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 20,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    return settings | changes


def tiny_run(folder: Path) -> dict[str, Any]:
    """Write a tiny model and its data to the folder; return the run-file tables of a run of four steps."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = str(save_samples(tiny_samples(8), folder / "samples.jsonl"))
    trl = {"max_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4}
    trl |= {"max_completion_length": 20, "save_steps": 2, "logging_steps": 1, "bf16": False, "use_cpu": True}
    return {"model": {"path": str(folder)}, "data": {"path": data}, "trl": trl}


def logged_steps(trainer: Any) -> list[dict[str, Any]]:
    """Return the log rows of all steps without times and without the final summary row."""
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    return [{key: value for key, value in row.items() if key != "step_time"} for row in rows]


def copy_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def scripted_completions(prompts, trainer):
    """Return completions that depend only on the prompt and the position in its group, not on the process."""
    tokenizer, seen = trainer.processing_class, {}
    rows = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        rng, piece, ids = random.Random(f"{prompt} {seen[prompt]}"), ASK, []
        while piece != EOS and len(ids) < 20:
            piece = rng.choices(list(CHAIN[piece]), list(CHAIN[piece].values()))[0]
            ids.append(tokenizer.eos_token_id if piece == EOS else single_token_id(tokenizer, piece))
        rows.append(ids)
    return {"prompt_ids": tokenizer(list(prompts))["input_ids"], "completion_ids": rows, "logprobs": None}
