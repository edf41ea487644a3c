"""Small models of common families, built from their configurations, with the original chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MISTRAL = """\
{{- bos_token }}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == "user" %}[INST] {{ message.content }}[/INST]
{%- elif message.role == "system" %}[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]
{%- elif message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if not call.id or call.id | length != 9 %}{{ raise_exception("call ids have nine characters") }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- elif message.role == "tool" %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception("call ids have nine characters") }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' }}{{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}
{{- "[/TOOL_RESULTS]" }}
{%- else %} {{ message.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""


class Family(NamedTuple):
    """Chat template, special tokens and architecture of a model family."""

    template: Callable[[], str]
    specials: list[str]
    bos: str | None
    eos: str
    config: Callable[..., Any]
    tool_format: str


def read_template(name: str) -> Callable[[], str]:
    return lambda: (TEMPLATES / name).read_text(encoding="utf-8")


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
MISTRAL_TOKENS = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
MISTRAL_TOKENS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
FAMILIES = {
    "qwen3": Family(read_template("qwen3.jinja"), CHATML, None, "<|im_end|>", Qwen3Config, "hermes"),
    "qwen3_5": Family(
        read_template("qwen3_5_think.jinja"), CHATML, None, "<|im_end|>", Qwen3_5TextConfig, "qwen3_coder+think"
    ),
    "llama3_2": Family(read_template("llama3_2.jinja"), LLAMA, LLAMA[0], "<|eot_id|>", LlamaConfig, "llama3"),
    "mistral": Family(lambda: MISTRAL, MISTRAL_TOKENS, "<s>", "</s>", MistralConfig, "mistral"),
}
DIALOGUES = [
    {
        "id": f"d{n}",
        "messages": [
            {"role": "system", "content": "You help with travel."},
            {"role": "user", "content": f"What is the weather in {city}?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_abcdef0123456789",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": json.dumps({"city": city, "days": n + 1})},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_abcdef0123456789", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": f"It is clear in {city}."},
            {"role": "user", "content": "And a flight there?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_2",
                        "type": "function",
                        "function": {"name": "find_flight", "arguments": {"to": city, "direct": n % 2 == 0}},
                    }
                ],
            },
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Weather of a city",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                        "required": ["city"],
                    },
                },
            },
            {
                "type": "function",
                "function": {
                    "name": "find_flight",
                    "description": "Flights to a city",
                    "parameters": {
                        "type": "object",
                        "properties": {"to": {"type": "string"}, "direct": {"type": "boolean"}},
                        "required": ["to"],
                    },
                },
            },
        ],
    }
    for n, city in enumerate(("Rome", "Oslo", "Lima", "東京"))
]


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the special tokens of the family, including its BOS token if it has one."""
    family = FAMILIES[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [family.template(), *(json.dumps(dialogue, ensure_ascii=False) for dialogue in DIALOGUES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, settings)
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.specials])
    if family.bos:
        at = [(family.bos, backend.token_to_id(family.bos))]
        byte_level = processors.ByteLevel(trim_offsets=False)
        first = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=at)
        backend.post_processor = processors.Sequence([byte_level, first])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = family.template()
    if name.startswith("qwen3"):
        tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
        tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def family_model(name: str, tokenizer: Any) -> Any:
    """Return a model with the architecture of the family and about ten thousand parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    more: dict[str, Any] = {}
    if name == "qwen3_5":  # one layer of each kind
        more = {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
    config = FAMILIES[name].config(vocab_size=len(tokenizer), dtype="float32", **sizes, **ids, **more)
    return AutoModelForCausalLM.from_config(config)


def save_family(name: str, folder: Path) -> Path:
    tokenizer = family_tokenizer(name)
    family_model(name, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dialogues(path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    return path
