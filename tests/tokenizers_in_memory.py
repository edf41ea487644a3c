"""Small tokenizers of every kind that the region tagger supports, trained in memory."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rest_rl.formats import FORMATS
from rest_rl.response import ToolCall

_CORPUS = [
    "f; g, (h)",  # separators between calls
]
_CORPUS += [
    tool_format.render(
        f"I should call the {name} tool with 😀 and 東京.",
        [ToolCall(name, {"city": city, "count": n})],
        f"Done: {city} has {n} naïve points.",
    )
    for tool_format in FORMATS.values()
    for n, (name, city) in enumerate([("get_weather", "Paris"), ("find-flight", "東京"), ("rate it", "Zürich")] * 4)
]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, tags_added: bool = True) -> PreTrainedTokenizerFast:
    """Return a GPT-2 style byte-level BPE as in Qwen and Llama 3; the tags are added tokens, as in Qwen3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    if tags_added:
        tags = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def special_tags() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose tags are special tokens, which `decode` drops by default."""
    tokenizer = byte_level(tags_added=False)
    tags = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<response>", "</response>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(tag, special=True) for tag in tags]})
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """Return a SentencePiece-style BPE with byte fallback, as in Llama 2, Mistral and Gemma."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ascii_corpus = ["".join(char for char in text if char.isascii()) for text in _CORPUS]
    backend.train_from_iterator(
        ascii_corpus,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *_BYTE_TOKENS],
            max_token_length=12,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """Return a SentencePiece-style Unigram with a Metaspace decoder, as in T5."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    alphabet = sorted({char for text in _CORPUS for char in text})
    backend.train_from_iterator(
        _CORPUS,
        trainers.UnigramTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "</s>"],
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer; decoding one token alone loses the space to its neighbors."""
    words = sorted({word for text in _CORPUS for word in text.split()})
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: n for n, word in enumerate(words, 2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


KINDS = {
    "byte_level": byte_level,
    "special_tags": special_tags,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_level": word_level,
}


def gold_line(name: str, arguments: dict[str, object], key: str = "parameters") -> str:
    """Return one call as a model would write it, independent of the tested renderer."""
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)
