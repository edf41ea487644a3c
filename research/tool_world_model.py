"""The tokenizer and the small stock Qwen3 model that are trained on the tool world from scratch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from research.demonstrations import render_demonstration
from rest_rl.data.layout import PromptLayout
from rest_rl.data.tool_world import (
    KEY_PARTS,
    SLOTS,
    SPLITS,
    YIELDS,
    Decision,
    draw_name,
    draw_value,
    tool_world,
)

EOS, PAD, TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"

_PIECES = (
    r"[ \n]?</?(?:think|tool_call|response)>\n?",
    r"(?:system|user|assistant|tool)\n",
    r'\{"name": "|", "parameters": |\{"result": "',
    r'": "|", "|" "|: "| "|\{"|"\}|\{\}',
    r" ?[A-Za-z]+|_[a-z]+|-\d\d|\n?-(?= )",
    r"[\s\S]",
)
"""Pre-tokens. A quoted name or value has the same ids everywhere, because the model has to copy it."""

CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% if tools %}{{ '\\n' }}{% endif %}{% endif %}
{%- for tool in tools or [] %}{% set f = tool.function if tool.function else tool %}
{%- if not loop.first %}{{ '\\n' }}{% endif %}- {{ f.description }}: "{{ f.name }}"
{%- for key, p in f.parameters.properties.items() %} {{ p.description }}: "{{ key }}"{% endfor %}
{%- endfor %}<|im_end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if m.tool_calls %}<tool_call>
{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}
{% endfor %}</tool_call>{% else %}<response> {{ m.content }} </response>{% endif %}<|im_end|>
{%- elif m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Renders one tool per line, the description before the name, and earlier turns without their reasoning."""


def build_tokenizer(decision: Decision = "reasoning") -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token per piece of the tool world; other text is split into bytes.

    `decode(encode(text)) == text` holds for every text.
    """
    return build_tokenizer_of(_PIECES, CHAT_TEMPLATE, lambda tokenizer: _build_corpus(tokenizer, decision))


def build_tokenizer_of(
    pieces: Sequence[str], chat_template: str, build_corpus: Callable[[Any], Iterable[str]]
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token for each pre-token of a corpus.

    Args:
        pieces: Regular expressions of the pre-tokens, the first that matches wins.
        chat_template: The chat template.
        build_corpus: Returns rendered texts for a tokenizer with this chat template, which knows only bytes.
    """
    split = pre_tokenizers.Split(Regex("|".join(pieces)), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = pre_tokenizers.Sequence([split, to_bytes])
    # The vocabulary comes from rendered texts, which need a tokenizer with a chat template: a first one that knows only
    # bytes renders the corpus, and every pre-token found there becomes one token of the second.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    corpus = build_corpus(_wrap_backend(_build_backend(alphabet, steps), chat_template))
    parts = (part for text in corpus for part in text.replace(TURN, EOS).split(EOS))
    seen = {piece for part in parts for piece, _ in steps.pre_tokenize_str(part)}
    return _wrap_backend(_build_backend(alphabet + sorted(seen - set(alphabet)), steps), chat_template)


def _build_backend(vocabulary: Sequence[str], steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    # BPE without merges: a pre-token in the vocabulary is one token, any other falls back to its bytes.
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    backend.pre_tokenizer = steps
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, TURN, EOS])
    return backend


def _wrap_backend(backend: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _build_corpus(tokenizer: Any, decision: Decision) -> list[str]:
    samples = [sample for split in SPLITS for sample in tool_world(0, 600, split, decision=decision)]
    prompts = [PromptLayout(tokenizer).render(sample) for sample in samples]
    return prompts + [render_demonstration(sample) for sample in samples]


def build_model(tokenizer: Any, *, hidden: int = 128, layers: int = 3) -> Qwen3ForCausalLM:
    """Return a stock Qwen3 model with about half a million parameters, tied embeddings and float32 weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    initialize_shift_heads(model)
    return model


@torch.no_grad()
def initialize_shift_heads(model: Any, offsets: Sequence[int] = (1, 2, 3), gain: float = 3.0) -> None:
    """Initialize head h of the first layer to attend `offsets[h]` tokens back; everything stays trainable.

    Copying requires the token before the current one. With the default initialization the model had not learned to bind
    words to names after 2,200 recall steps (one seed, 3 pairs); with this one it did within 1,500.
    """
    # All embeddings get the same first coordinate, which adds one constant to all logits of the tied head and changes
    # no probability. Query and key projections read only that coordinate, so query and key are constants u and v, and
    # the rotary score is sum_j |u_j| |v_j| cos(theta_j (distance - offset)), which is largest at the offset.
    config, layer = model.config, model.model.layers[0].self_attn
    size, frequencies = config.head_dim, 4
    theta = model.model.rotary_emb.inv_freq.float()
    model.model.embed_tokens.weight[:, 0] = 0.5
    turned = [*range(frequencies), *range(size // 2, size // 2 + frequencies)]
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight[turned] = gain
    for head, offset in enumerate(offsets):
        query, key = torch.zeros(size), torch.zeros(size)
        key[:frequencies] = 1.0
        query[:frequencies] = torch.cos(theta[:frequencies] * offset)
        query[size // 2 : size // 2 + frequencies] = -torch.sin(theta[:frequencies] * offset)
        for projection, value in ((layer.q_proj, query), (layer.k_proj, key)):
            rows = projection.weight.view(-1, size, config.hidden_size)[head]
            rows.zero_()
            rows[:, 0] = value
    # A larger spread than the default, so that what the heads copy reaches the residual stream from the first step.
    for projection in (layer.v_proj, layer.o_proj):
        projection.weight.normal_(0.0, config.hidden_size**-0.5)


def build_recall_batch(
    tokenizer: Any, rng: random.Random, batch: int, pairs: int, decision: Decision = "reasoning"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels of pairs of a word and a quoted text, then the same pairs in another order.

    Only the second mention of a quoted text has labels; all others are -100. Shapes (`batch`, tokens).
    """
    # The model can predict the second mention only by copying the first, which trains the copy circuit that attention
    # finds slowly on the task itself.
    rows = [_build_recall_row(tokenizer, rng, pairs, decision) for _ in range(batch)]
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids_BT, labels_BT


def _build_recall_row(
    tokenizer: Any, rng: random.Random, pairs: int, decision: Decision
) -> tuple[list[int], list[int]]:
    separator = rng.choice([': "', ' "'])
    words = rng.sample([*YIELDS, *SLOTS], pairs)
    table = [(word, _draw_quoted(rng, decision)) for word in words]
    ids: list[int] = []
    labels: list[int] = []
    for mention in (table, rng.sample(table, pairs)):
        for word, pieces in mention:
            text_ids = tokenizer.convert_tokens_to_ids([f"Ġ{word}", separator.replace(" ", "Ġ"), *pieces, '"'])
            copied = [-100, -100, *text_ids[2:-1], -100]
            ids += text_ids
            labels += copied if mention is not table else [-100] * len(text_ids)
    return ids, labels


def _draw_quoted(rng: random.Random, decision: Decision) -> list[str]:
    # Returns pieces of a training tool name, argument name or value, so that held-out texts stay unseen. If
    # the call decides, names are fixed and only values are copied.
    kind = rng.randrange(3) if decision == "reasoning" else 2
    if kind == 0:
        first, second = draw_name(rng, "train").split("_")
        return [first, f"_{second}"]
    if kind == 1:
        return [rng.choice(KEY_PARTS)]
    word, number = draw_value(rng, rng.choice(list(SLOTS)), "train").split("-")
    return [word, f"-{number}"]
