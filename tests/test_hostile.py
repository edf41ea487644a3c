"""Random, truncated, mutated, adversarial responses: no exception, one region a token, sound weights and scores."""

from __future__ import annotations

import random

import pytest
import torch

from rest_rl.formats import FORMATS, get_format
from rest_rl.presets import compute_token_weights, score_response
from rest_rl.regions import decode_ids, tag_regions
from rest_rl.response import Gold, ToolCall
from tests.tokenizers_in_memory import KINDS

TOKENIZERS = {name: build() for name, build in KINDS.items()}
NAMES = [*FORMATS, *(f"{name}+think" for name in FORMATS)]
GOLDS = [
    Gold((ToolCall("get_weather", {"city": "東京", "count": 1}), ToolCall("f", {}))),
    Gold((), "Done"),
    Gold((ToolCall("f", {"a": [1, {"b": None}]}),), "ok"),
]
FRAGMENTS = [
    *dict.fromkeys(tag for tool_format in FORMATS.values() for tag in tool_format.tags),
    '{"name": "f", "parameters": {}}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {}}]',
    '[TOOL_CALLS]f[ARGS]{"a": ',
    "<function=f>\n",
    "<parameter=a>\n",
    '[f(a=1, b="x"), ',
    "f(**{'a-b': [1]})",
    "[f(",
    "'" * 3,
    '"' * 3,
    "(",
    ")",
    ",",
    ";",
    "=",
    "True",
    "\\N{BULLET}",
    '{"name": "f", "arguments": {"a": NaN}}',
    '"name"',
    '"parameters": ',
    "\n",
    "\\",
    '"',
    "{",
    "}",
    "[",
    "1e999",
    "-Infinity",
    "\x00",
    "\ud800",
    "\ufffd",
    "😀",
    "東京",
    "\u2028",
    "__import__('os').system('true')",
    "9" * 500,
    "<|im_end|>",
]


def hostile_text(rng: random.Random) -> str:
    """A response to one of the golds, cut, spliced and mutated, or plain noise."""
    gold, tool_format = rng.choice(GOLDS), get_format(rng.choice(NAMES))
    text = tool_format.render("I should call", gold.calls, gold.answer)
    for _ in range(rng.randrange(5)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(5):
            case 0:
                text = text[:at] + rng.choice(FRAGMENTS) + text[at:]
            case 1:
                text = text[:at] + text[end:]
            case 2:
                text = text[:end]
            case 3:
                text = text + text[at:end]
            case _:
                text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(30)))
    return text


def check_scores(text: str, rng: random.Random) -> None:
    gold, progress = rng.choice(GOLDS), rng.random()
    for name in [*FORMATS, rng.choice(NAMES)]:
        reward = score_response(text, gold, format=name, progress=progress)
        assert 0 <= reward.total <= 1
        assert 0 <= reward.accuracy <= 1
        assert reward.format in (0.0, 1.0)
        assert len(str(reward.explanation)) < 20_000
    assert -6 <= score_response(text, gold, preset="authors-code", progress=progress).total <= 6


def check_weights(rows: list[list[int]], kind: str, rng: random.Random) -> None:
    width = max(1, *map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    entropies_BT = torch.rand(ids_BT.shape) * rng.choice([0.0, 1e-9, 1.0, 12.0])
    for name in rng.sample(NAMES, 3):
        tool_format = get_format(name)
        regions_BT = tag_regions(ids_BT, mask_BT, TOKENIZERS[kind], tool_format)
        assert ((regions_BT >= 0) & (regions_BT < 6)).all()
        for preset in ("rest", "rest_live", *["authors-code"] * (name == "toolrl")):
            weights_BT = compute_token_weights(
                ids_BT,
                mask_BT,
                TOKENIZERS[kind],
                format=name,
                preset=preset,
                progress=rng.random(),
                entropies=entropies_BT,
            )
            assert weights_BT.isfinite().all()
            assert (weights_BT >= 0).all()
            if preset != "authors-code":  # whose mean is taken over the tokens with weight alone
                means_B = weights_BT.sum(-1) / mask_BT.sum(-1).clamp_min(1)
                assert torch.allclose(means_B, (mask_BT.sum(-1) > 0).float(), atol=1e-5)


def check_campaign(num_responses: int, seed: int) -> None:
    rng = random.Random(seed)
    for start in range(0, num_responses, 64):
        kind = rng.choice(list(KINDS))
        texts = [hostile_text(rng) for _ in range(min(64, num_responses - start))]
        for text in texts:
            check_scores(text, rng)
        vocabulary = len(TOKENIZERS[kind])
        rows = [
            TOKENIZERS[kind](text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False)["input_ids"]
            if rng.random() < 0.6
            else [rng.randrange(vocabulary + 3) for _ in range(rng.randrange(40))]
            for text in texts
        ]
        check_weights(rows, kind, rng)


def test_two_thousand_hostile_responses():
    check_campaign(2_048, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_responses():
    check_campaign(100_000, seed=1)


def huge_texts(megabytes: float) -> dict[str, str]:
    """Texts on which quadratic work would take hours at 5 MB."""
    head, n = "<think> a </think>\n<tool_call>\n", int(megabytes * 1_000_000)
    call = '{"name": "f", "parameters": {"a": 1}}\n'
    function = "<tool_call>\n<function=f>\n"
    return {
        "long argument": head + '{"name": "f", "parameters": {"a": "' + "x" * n + '"}}\n</tool_call>',
        "opening tags": "<think>" * (n // 7),
        "mixed tags": "<think><tool_call></think>" * (n // 26),
        "calls": head + call * (n // len(call)) + "</tool_call>",
        "junk lines": head + "x\n" * (n // 2) + "</tool_call>",
        "deep lists": head + '{"name": "f", "parameters": ' + "[" * n + "\n</tool_call>",
        "deep objects": head + '{"name": "f", "parameters": ' + '{"a":' * (n // 5) + "\n</tool_call>",
        "long integer": head + '{"name": "f", "parameters": {"a": ' + "9" * n + "}}\n</tool_call>",
        "unclosed string of quotes": head + '{"name": "f", "parameters": {"a": "' + '\\"' * (n // 2) + "\n</tool_call>",
        "blanks": head + '{"name"' + " " * n + ': "f"}\n</tool_call>',
        "calls of Llama": call * (n // len(call)),
        "broken calls of Llama": '{"name": "f", "parameters": {"a": }}\n' * (n // 36),
        "starts of calls of Llama": '\n{"name": ' * (n // 10),
        "markers of Mistral": "[TOOL_CALLS]" * (n // 12),
        "calls of Mistral": '[TOOL_CALLS]f[ARGS]{"a": 1}' * (n // 27),
        "cut-off calls of Mistral": '[TOOL_CALLS]f[ARGS]{"a": "' * (n // 26),
        "cut-off lists of Mistral": '[TOOL_CALLS] [{"a":"","":"' * (n // 26),
        "broken items of a list of Mistral": "[TOOL_CALLS] ["
        + '{"name": "f", "arguments": {"a": }},' * (n // 36)
        + "]",
        "long name of Mistral": "[TOOL_CALLS]" + " x" * (n // 2),
        "functions of Qwen": (function + "</function>\n</tool_call>") * (n // 48),
        "functions of Qwen that stay open": function * (n // 25),
        "parameters of Qwen": function + "<parameter=a>" * (n // 13) + "</function></tool_call>",
        "quotes in a value of Qwen": function
        + "<parameter=a>"
        + '"\\"' * (n // 3)
        + "</parameter></function></tool_call>",
        "names of Qwen": "<function=" * (n // 10),
        "Python calls": "[" + "f(a=1)," * (n // 7) + "]",
        "Python calls that stay open": "[f(" * (n // 3),
        "starts of Python lists": "\n[f" * (n // 3),
        "deep Python lists": "[f(a=" + "[" * n,
        "deep Python dicts": "[f(a=" + '{"a":' * (n // 5),
        "Python quotes": "[f(a=" + "\"'" * (n // 2),
        "escaped Python quotes": "[f(a='" + "\\'" * (n // 2),
        "triple quotes": "[f(a=" + '"' * 3 + '"" ' * (n // 3),
        "long Python integer": "[f(a=" + "9" * n,
        "blanks in a Python list": "[" + " " * n + "f()]",
    }


TITLES = list(huge_texts(0.0))


@pytest.mark.parametrize("title", TITLES)
def test_long_responses_take_linear_time(title):
    text = huge_texts(0.1)[title]
    check_scores(text, random.Random(0))
    for name in NAMES:
        assert len(get_format(name).parse(text).problems) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("title", TITLES)
def test_five_megabytes_take_linear_time(title):
    check_scores(huge_texts(5.0)[title], random.Random(0))


def test_five_megabytes_of_tokens_are_tagged():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("x" * 20, add_special_tokens=False)["input_ids"] * 50_000
    ids_BT = torch.tensor([ids])
    weights_BT = compute_token_weights(ids_BT, torch.ones_like(ids_BT), tokenizer, entropies={"other": 1.0})
    assert torch.equal(weights_BT, torch.ones(ids_BT.shape))
    assert len(decode_ids(ids, tokenizer)) == 1_000_000
