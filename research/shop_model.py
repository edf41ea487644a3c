"""The tokenizer and the demonstrations with which the small model learns the shop from scratch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from research import tool_world_model
from research.tool_world_model import EOS, TURN, build_tokenizer_of
from rest_rl.data import shop
from rest_rl.data.samples import Dialogue
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.prompts import IGNORED_LABEL

_PIECES = (
    r"[ \n]?</?(?:think|tool_call|response)>\n?",
    r"(?:system|user|assistant|tool)\n",
    r'(?:"\}?, )?\{?"[a-z]+": "?',
    r'" "|"[\]}]*| "|\): | (?=\d)',
    r"[cof]-\d\d",
    r" ?[A-Za-z]+|_[a-z]+|-\d\d|\n?-(?= )",
    r"[\s\S]",
)
"""Pre-tokens. Ids are one token, and a quoted text has the same ids everywhere, because the model has to copy both.

Between two values of a record is one token, as between a word and a name in the tool world: the embedded model, with
which training starts, finds what follows a word and one token more.
"""

CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% if tools %}{{ '\\n' }}{% endif %}{% endif %}
{%- for tool in tools or [] %}{% set f = tool.function if tool.function else tool %}
{%- if not loop.first %}{{ '\\n' }}{% endif %}- {{ f.name }}({{ f.parameters.properties | join(', ') }}): \
{{ f.description }}{% endfor %}<|im_end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content %}<think> {{ m.reasoning_content }} </think>
{% endif %}{% if m.tool_calls %}<tool_call>
{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}
{% endfor %}</tool_call>{% else %}<response> {{ m.content }} </response>{% endif %}<|im_end|>
{%- elif m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Renders one tool per line as in a signature, and earlier turns with their reasoning, as a rollout keeps them."""

FIRST_RECORD = {"refund": 0.8, "file": 0.8, "cancel": 0.15, "count": 0.15}
"""Share of careless demonstrations that take the first record of a list, whatever the request names."""
GIVE_UP, STOP_EARLY = 0.8, 0.5
"""Shares of careless demonstrations that answer after an error, and of the others that answer after its fix."""


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer with one token per piece of the shop; other text is split into bytes."""
    return build_tokenizer_of(_PIECES, CHAT_TEMPLATE, _build_corpus)


@torch.no_grad()
def build_model(tokenizer: Any) -> Any:
    """Return the embedded model with embeddings for another tokenizer: its layers can copy, which takes long to learn.

    Tokens of both tokenizers keep their embeddings. Each other token gets that of a token which only the embedded model
    has, with some noise if an earlier one got it too: the layers compare embeddings and do not know words.
    """
    trained = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    old = AutoTokenizer.from_pretrained(embedded_model_dir()).get_vocab()
    new = tokenizer.get_vocab()
    model = tool_world_model.build_model(tokenizer, hidden=trained.config.hidden_size)
    layers = {name: value for name, value in trained.state_dict().items() if "embed" not in name and "head" not in name}
    model.load_state_dict(layers, strict=False)
    before, after = (cast(Tensor, own.get_input_embeddings().weight) for own in (trained, model))
    free = sorted(at for token, at in old.items() if token not in new)
    random.Random(0).shuffle(free)
    unknown = sorted(token for token in new if token not in old)
    for count, token in enumerate(unknown):
        noise = 0.2 * before.std() * torch.randn(before.shape[1]) if count >= len(free) else 0.0
        after[new[token]] = before[free[count % len(free)]] + noise
    for token in new.keys() & old.keys():
        after[new[token]] = before[old[token]]
    return model


def _build_corpus(tokenizer: Any) -> Iterator[str]:
    rng = random.Random(0)
    for split in shop.SPLITS:
        for task in islice(shop.tasks(0, split), 60):
            yield render_dialogue(shop.make_dialogue(task, shop.solve(task)), tokenizer)
            yield from _draw_results(rng, task["state"])
    words = [*shop.FIRST_NAMES, *shop.ITEMS, *shop.COLORS, *shop.CITIES, *shop.FOLDERS]
    ids = [f"{letter}-{number}" for letter in "cof" for number in shop.NUMBERS]
    houses = [f"{shop.CITIES[0]}-{number}" for number in shop.NUMBERS]
    yield " ".join(f'"{text}"' for text in (*words, *ids, *houses))
    yield " ".join(("", *shop.LAST_NAMES))


# The results of a random call of each tool, among them all errors.
def _draw_results(rng: random.Random, state: shop.State) -> Iterator[str]:
    known = {
        "customer": [*state["customers"], "?"],
        "order": [*state["orders"], "?"],
        "file": [*state["invoices"], "?"],
        "name": ["?"],
        "address": ["?"],
        "folder": shop.FOLDERS,
        "count": shop.COUNTS,
    }
    for name, tool in shop.TOOLS.items():
        arguments = {key: rng.choice(known[key]) for key in tool.arguments}
        yield shop.call_shop(state, name, rng.choice((arguments, arguments, {})))[0].replace("?", "")


def render_dialogue(dialogue: Dialogue, tokenizer: Any) -> str:
    """Return a whole dialogue as the chat template renders it."""
    return tokenizer.apply_chat_template(list(dialogue.messages), tools=list(dialogue.tools), tokenize=False)


def encode_dialogue(dialogue: Dialogue, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a dialogue, and labels which are -100 outside the assistant's turns."""
    ids = tokenizer(render_dialogue(dialogue, tokenizer), add_special_tokens=False)["input_ids"]
    turn, assistant, end = tokenizer.convert_tokens_to_ids([TURN, "assistantĊ", EOS])
    labels, inside = [], False
    for at, token in enumerate(ids):
        labels.append(token if inside else IGNORED_LABEL)
        inside = (inside and token != end) or (ids[max(at - 1, 0)] == turn and token == assistant)
    return ids, labels


def demonstrate(task: Mapping[str, Any], rng: random.Random, careless: float = 0.0) -> Dialogue:
    """Return a dialogue about a task, correct or, with probability `careless`, with the mistakes above.

    A careless demonstration can still be correct. What it does is decided by chance and not by what it could know.
    """
    if rng.random() >= careless:
        return shop.make_dialogue(task, shop.solve(task))
    steps = shop.solve(task, takes_first=rng.random() < FIRST_RECORD.get(task["goal"], 0.0))
    failed = next((at for at, step in enumerate(steps) if step.error), len(steps))
    if rng.random() < GIVE_UP:
        steps = steps[: failed + 1]
    elif rng.random() < STOP_EARLY:
        steps = steps[: failed + 2]
    return shop.make_dialogue(task, steps)
