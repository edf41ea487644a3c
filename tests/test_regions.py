from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rest_rl.formats import FORMATS, get_format
from rest_rl.regions import TIE_ORDER, decode_ids, find_turns, get_token_bytes, region_means, region_sums, tag_regions
from rest_rl.response import Region, Span, ToolCall
from tests.test_formats import ALL
from tests.tokenizers_in_memory import KINDS, byte_level

TOKENIZERS = {name: build() for name, build in KINDS.items()}
BYTE_LEVEL = TOKENIZERS["byte_level"]
TOOLRL, HERMES = FORMATS["toolrl"], FORMATS["hermes"]
GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden" / "responses.jsonl").read_text().splitlines()]


def tag(ids, tokenizer=BYTE_LEVEL, tool_format=TOOLRL, mask=None):
    ids_BT = torch.tensor([ids], dtype=torch.long)
    mask_BT = torch.ones_like(ids_BT) if mask is None else torch.tensor([mask])
    return tag_regions(ids_BT, mask_BT, tokenizer, tool_format)[0].tolist()


def ids_of(text, tokenizer=BYTE_LEVEL):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def naive_regions(pieces: list[bytes], spans: list[Span], text: str) -> list[int]:
    """Every byte of the text gets a region, every token the most frequent one: slow and independent of the tagger."""
    region_of_byte = []
    for n, char in enumerate(text):
        region = next((span.region for span in spans if span.start <= n < span.end), Region.OTHER)
        region_of_byte += [region] * len(char.encode("utf-8", "surrogateescape"))
    regions, at = [], 0
    for piece in pieces:
        own = region_of_byte[at : at + len(piece)] or region_of_byte[at : at + 1] or [Region.OTHER]
        regions.append(int(max(TIE_ORDER, key=lambda region: (own.count(region), -TIE_ORDER.index(region)))))
        at += len(piece)
    return regions


def gpt2_bytes(tokenizer, ids) -> list[bytes]:
    """The bytes of byte-level ids through the library's decoder, one token at a time with markers around it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [bytes(byte_of[char] for char in token) for token in tokens]


@settings(max_examples=60)
@given(st.lists(st.integers(2, len(BYTE_LEVEL) - 1), min_size=1, max_size=60), st.sampled_from(list(FORMATS)))
def test_random_ids_agree_with_a_naive_tagger(ids, name):
    pieces = gpt2_bytes(BYTE_LEVEL, ids)
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    assert tag(ids, tool_format=FORMATS[name]) == naive_regions(pieces, list(FORMATS[name].parse(text).spans), text)


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["text"]], ids=lambda row: row["title"])
def test_golden_responses_agree_with_a_naive_tagger(row):
    ids, tool_format = ids_of(row["text"]), get_format(row["format"])
    expected = naive_regions(gpt2_bytes(BYTE_LEVEL, ids), list(tool_format.parse(row["text"]).spans), row["text"])
    assert tag(ids, tool_format=tool_format) == expected


@pytest.mark.parametrize("kind", ["byte_level", "special_tags", "byte_fallback", "metaspace"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_character_is_in_a_token_of_its_region(kind, name):
    tokenizer, tool_format = TOKENIZERS[kind], FORMATS[name]
    text = tool_format.render(
        "find 東京 and 😀 there", [ToolCall("get_weather", {"city": "東京"}), ToolCall("f", {"n": 1})], "ok Zürich"
    )
    ids = ids_of(text, tokenizer)
    joined = decode_ids(ids, tokenizer, tool_format.tags)
    assert joined.strip() == tokenizer.decode(ids, skip_special_tokens=False).strip()
    regions = tag(ids, tokenizer, tool_format)
    text_of = dict.fromkeys(Region, "")
    for piece, region in zip(get_token_bytes(tokenizer).to_bytes(ids), regions, strict=True):
        text_of[Region(region)] += piece.decode("utf-8", "replace")
    assert "get_weather" in text_of[Region.NAME]
    assert "ity" in text_of[Region.ARGUMENTS]  # the BPE without pre-tokenizer merges across the brace
    assert "and" in text_of[Region.REASONING]
    assert "ok" in text_of[Region.ANSWER]
    assert "/think" in text_of[Region.FORMAT].lower()
    assert Region.OTHER not in regions


def test_a_word_level_tokenizer_uses_the_incremental_decoder():
    tokenizer = TOKENIZERS["word_level"]
    assert get_token_bytes(tokenizer).pieces_V == ()
    # <think> I should call </think>  ->  one token per word; the space before a word belongs to the word
    ids = ids_of("<think> I should call </think>", tokenizer)
    assert decode_ids(ids, tokenizer) == "<think> I should call </think>"
    assert tag([*ids, tokenizer.eos_token_id], tokenizer) == [0, 3, 3, 3, 0, 0]


def test_a_context_dependent_decoder_with_word_pieces():
    vocabulary = {"<unk>": 0, "<think>": 1, "</think>": 2, "rain": 3, "##ing": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    assert decode_ids([1, 3, 4, 2], backend) == "<think> raining </think>"
    assert tag([1, 3, 4, 2], backend) == [0, 3, 3, 0]


def test_characters_split_over_tokens_belong_to_their_region():
    text = "<think>😀</think>"
    ids = ids_of(text)
    emoji = [i for i in ids if i not in ids_of("<think></think>")]
    assert len(emoji) > 1  # the corpus is too small for the emoji to be one token
    assert tag(ids) == [0] + [3] * len(emoji) + [0]


def test_an_incomplete_character_at_the_end_is_tagged_and_decoded_as_replacement():
    ids = ids_of("<think>x</think>😀")[:-1]
    assert tag(ids)[-1] == Region.OTHER
    assert decode_ids(ids, BYTE_LEVEL).endswith("\ufffd")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_end_of_sequence_token_is_format_and_carries_no_text(kind):
    tokenizer = TOKENIZERS[kind]
    eos, ids = tokenizer.eos_token_id, ids_of("I should call", tokenizer)
    assert tag([*ids, eos], tokenizer) == [5] * len(ids) + [0]
    assert decode_ids([*ids, eos], tokenizer) == decode_ids(ids, tokenizer)
    assert tag([*ids, eos], tokenizer, HERMES)[-2:] == [4, 0]


def test_a_special_tag_at_the_end_is_text_and_not_the_end_of_the_sequence():
    tokenizer = TOKENIZERS["special_tags"]
    ids = ids_of("<think> a</think>", tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " a"  # why a plain decode will not do
    assert tag(ids, tokenizer)[0] == tag(ids, tokenizer)[-1] == Region.FORMAT
    assert decode_ids(ids, tokenizer, TOOLRL.tags) == "<think> a</think>"


def with_special(*tokens):
    """A byte-level tokenizer in which these tokens are special, as in Mistral's and Llama's tokenizers."""
    tokenizer = byte_level(tags_added=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, special=True) for token in tokens]})
    return tokenizer


MADE = [ToolCall("get_weather", {"city": "東京"}), ToolCall("f", {"n": 1})]


@pytest.mark.parametrize("name", [*FORMATS, "hermes+think", "mistral_v11+think", "llama3+think"])
def test_several_calls_are_tagged_where_the_markers_are_special_tokens(name):
    tool_format = get_format(name)
    tokenizer = with_special(*tool_format.tags, "<|eom_id|>", "<|eot_id|>")
    answer = "I look." if name == "toolrl" else None  # elsewhere the calls end the response
    text = tool_format.render("find 東京", MADE, answer)
    ids = ids_of(text, tokenizer)
    assert any(tag in tokenizer.convert_ids_to_tokens(ids) for tag in tool_format.tags)
    assert decode_ids(ids, tokenizer, tool_format.tags) == text
    end = [tokenizer.convert_tokens_to_ids(token) for token in ("<|eom_id|>", "<|eot_id|>")]
    regions = tag([*ids, *end], tokenizer, tool_format)
    assert regions[-2:] == [Region.FORMAT, Region.FORMAT]
    assert decode_ids([*ids, *end], tokenizer, tool_format.tags) == text
    # the naive tagger knows the pieces of the byte-level vocabulary and of the added tokens
    pieces = list(get_token_bytes(tokenizer).to_bytes(ids))
    assert b"".join(pieces).decode() == text
    assert regions[:-2] == naive_regions(pieces, list(tool_format.parse(text).spans), text)
    assert Region.OTHER not in regions
    named = "".join(
        piece.decode("utf-8", "replace")
        for piece, region in zip(pieces, regions, strict=False)
        if region == Region.NAME
    )
    assert "get_weather" in named


def test_a_marker_of_llama_at_the_end_is_text_and_the_end_of_the_message_is_not():
    tokenizer = with_special("<|python_tag|>", "<|eom_id|>")
    ids = ids_of("<|python_tag|><|eom_id|>", tokenizer)
    assert decode_ids(ids, tokenizer, FORMATS["llama3"].tags) == "<|python_tag|>"
    assert tag(ids, tokenizer, FORMATS["llama3"]) == [Region.OTHER, Region.FORMAT]  # the tag opens no call


def test_ids_of_another_tokenization_keep_their_offsets():
    letters = [ids_of(char)[0] for char in "<think>ab</think>"]
    assert len(letters) > len(ids_of("<think>ab</think>"))
    assert tag(letters) == [0] * 7 + [3, 3] + [0] * 8


def test_a_token_over_two_regions_gets_the_one_with_most_bytes_and_the_more_specific_on_a_tie():
    vocabulary = {"ab": 0, "cd": 1, "abc": 2, "d": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="d"))
    backend.decoder = decoders.Fuse()
    spans = (
        Span(0, 1, Region.FORMAT),
        Span(1, 2, Region.NAME),
        Span(2, 3, Region.ARGUMENTS),
        Span(3, 4, Region.FORMAT),
    )

    def tag_spans(ids):
        ids_BT = torch.tensor([ids])
        return tag_regions(ids_BT, torch.ones_like(ids_BT), backend, lambda text: spans)[0].tolist()

    assert tag_spans([0, 1]) == [Region.NAME, Region.ARGUMENTS]  # ties: NAME before FORMAT, ARGUMENTS before FORMAT
    assert tag_spans([2, 3]) == [Region.NAME, Region.FORMAT]  # one byte each of FORMAT, NAME, ARGUMENTS
    wide = (Span(0, 2, Region.FORMAT), Span(2, 3, Region.NAME), Span(3, 4, Region.FORMAT))
    ids_BT = torch.tensor([[2, 3]])
    assert tag_regions(ids_BT, torch.ones_like(ids_BT), backend, lambda text: wide)[0].tolist() == [
        0,
        0,
    ]  # 2 of 3 bytes


MASKED = ["Rome </think>", "<think>", "[f(a=1)]", '{"name": "f", "parameters": {}}', "<tool_call>", "\n", "x"]
"""Tool results, some of which would close or open a block of the turns around them."""
TURNS = [
    (thought, made, answer)
    for thought in (None, "find 東京", "so")
    for made, answer in (([], "It is sunny."), (MADE[:1], None), (MADE, None), (MADE[1:], "I look."), ([], "ok Zürich"))
]
SPECIAL = with_special(
    *dict.fromkeys(tag for form in FORMATS.values() for tag in form.tags), "<|eom_id|>", "<|eot_id|>"
)


def joined(parts, results):
    """(ids, mask) of a row: a masked result before each turn and after the last."""
    ids, mask = list(results[0]), [0] * len(results[0])
    for turn, result in zip(parts, results[1:], strict=True):
        ids += [*turn, *result]
        mask += [1] * len(turn) + [0] * len(result)
    return ids, mask


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60)
@given(data=st.data())
def test_the_turns_of_a_row_are_tagged_separately(name, data):
    tool_format = get_format(name)
    tokenizer = data.draw(st.sampled_from([*TOKENIZERS.values(), SPECIAL]))
    ends = [[], [tokenizer.eos_token_id], [*tokenizer.all_special_ids[-2:], tokenizer.eos_token_id]]
    made = data.draw(st.lists(st.sampled_from(TURNS), min_size=1, max_size=4))
    parts = [ids_of(tool_format.render(*turn), tokenizer) + data.draw(st.sampled_from(ends)) for turn in made]
    result = st.sampled_from([ids_of(text, tokenizer) or [1] for text in MASKED])
    first, last = data.draw(st.just([]) | result), data.draw(st.just([]) | result)
    ids, mask = joined(parts, [first, *(data.draw(result) for _ in parts[1:]), last])
    regions = tag(ids, tokenizer, tool_format, mask)
    assert [region for region, own in zip(regions, mask, strict=True) if own] == [
        region for turn in parts for region in tag(turn, tokenizer, tool_format)
    ]
    assert {region for region, own in zip(regions, mask, strict=True) if not own} <= {Region.OTHER}


@pytest.mark.parametrize("name", ALL)
def test_every_turn_of_a_row_has_its_name_reasoning_and_answer(name):
    tool_format, end = get_format(name), BYTE_LEVEL.eos_token_id
    texts = [tool_format.render("find 東京", MADE[:1], None), tool_format.render("so", [], "It is sunny.")]
    parts = [[*ids_of(text), end] for text in texts]
    ids, mask = joined(parts, [[], ids_of("24 degrees"), []])
    regions = tag(ids, tool_format=tool_format, mask=mask)
    pieces, text_of = get_token_bytes(BYTE_LEVEL).to_bytes(ids), dict.fromkeys(Region, b"")
    for piece, region in zip(pieces, regions, strict=True):
        text_of[Region(region)] += piece
    assert text_of[Region.NAME] == b"get_weather"
    assert b"sunny" in text_of[Region.ANSWER]
    assert b"find" in text_of[Region.REASONING]
    assert b"so" in text_of[Region.REASONING]
    assert text_of[Region.OTHER] == b"24 degrees"
    assert [region for i, region in zip(ids, regions, strict=True) if i == end] == [Region.FORMAT] * 2


def test_turns_are_the_runs_of_ones_of_each_row():
    mask_BT = np.array([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=bool)
    rows, starts, ends = find_turns(mask_BT)
    expected = [(0, 0, 1), (0, 2, 4), (1, 0, 2), (3, 0, 1), (3, 3, 4)]  # the ones of rows 0 and 1 touch in memory
    assert list(zip(rows, starts, ends, strict=True)) == expected
    assert [len(column) for column in find_turns(np.zeros((2, 0), dtype=bool))] == [0, 0, 0]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_beyond_the_vocabulary_and_empty_rows_are_tagged(kind):
    tokenizer = TOKENIZERS[kind]
    assert tag([10**6, 3, 10**6], tokenizer)
    assert tag([5, 6], tokenizer, mask=[0, 0]) == [5, 5]
    empty_BT = torch.zeros(2, 0, dtype=torch.long)
    assert tag_regions(empty_BT, empty_BT, tokenizer, lambda text: ()).shape == (2, 0)


def test_rows_of_a_batch_do_not_touch_each_other():
    texts = ["<think>a</think>", "", "no tags", "<think>b", "<think>c</think>\n<response>d</response>"]
    rows = [ids_of(text) for text in texts]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    together = tag_regions(ids_BT, mask_BT, BYTE_LEVEL, TOOLRL).tolist()
    for row, regions in zip(rows, together, strict=True):
        assert regions[: len(row)] == (tag(row) if row else [])


def test_adding_tokens_rebuilds_the_byte_table():
    tokenizer = byte_level()
    before = get_token_bytes(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert get_token_bytes(tokenizer) is not before
    assert decode_ids([len(tokenizer) - 1], tokenizer) == "<new>"


def test_sums_and_means_by_region():
    # FORMAT: 1 + 2 = 3 over two tokens; NAME: 4 over one; the masked 100 does not count
    values_BT, regions_BT = torch.tensor([[1.0, 2.0, 4.0, 100.0]]), torch.tensor([[0, 0, 1, 1]])
    mask_BT = torch.tensor([[1, 1, 1, 0]])
    sums_R, counts_R = region_sums(values_BT, regions_BT, mask_BT)
    assert sums_R.tolist() == [3, 4, 0, 0, 0, 0]
    assert counts_R.tolist() == [2, 1, 0, 0, 0, 0]
    means = region_means(values_BT, regions_BT, mask_BT)
    assert means[:2].tolist() == [1.5, 4.0]
    assert means[2:].isnan().all()


def test_invalid_shapes_and_tokenizers_are_errors():
    with pytest.raises(ValueError, match=r"expected \(B, T\) for both"):
        tag_regions(torch.zeros(1, 2), torch.zeros(1, 3), BYTE_LEVEL, lambda text: ())
    with pytest.raises(ValueError, match=r"expected \(B, T\) for all"):
        region_sums(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="use_fast=True"):
        get_token_bytes("gpt2")
    with pytest.raises(ValueError, match="use_fast=True"):
        get_token_bytes({})
