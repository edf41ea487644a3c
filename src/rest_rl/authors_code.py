"""Reproduces the rewards and token weights of the ResT authors' published code exactly, including its gaps.

Source: https://github.com/1229095296/ResT_Tool_use_LLM at d6c29b5, `verl/utils/reward_score/rlla.py` with
SCHEDULEREWARD=1 and `recipe/custom/token_weighting.py`. docs/method.md lists the gaps. The only deviation: if a span
starts after the last token, the published code raises an exception; this module skips the span.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from rest_rl.response import Gold, check_progress

# Length of the published schedule in steps; progress 1 corresponds to the last step.
SCHEDULE_STEPS = 150
# The highest format score and correctness score at step 0.
HIGHEST_SCORES = (2.0, 2.0)


def authors_step(progress: float) -> float:
    """Convert progress in [0, 1] to a step of the published schedule of 150 steps; exact for progress = step / 150."""
    check_progress(progress)
    return round(progress * SCHEDULE_STEPS, 9)


def authors_reward(response: str, gold: Gold, step: float) -> tuple[float, float]:
    """Return (format score, correctness score) at training step `step` (not progress); the reward is their sum."""
    text = response.rsplit("<|im_start|>assistant", maxsplit=1)[-1].split("<|im_end|>", maxsplit=1)[0].strip()
    return _format_score(text, gold, step), _correctness_score(text, gold, step)


def _format_score(text: str, gold: Gold, step: float) -> float:
    highest = max(1.0, 2 - (2 - 1.0) * step / SCHEDULE_STEPS)
    lowest = min(-1.0, -2 + (2 + 0.0) * step / SCHEDULE_STEPS)
    order = ["think"] + ["tool_call"] * bool(gold.calls) + ["response"] * (gold.answer is not None)
    tags = [tag for name in order for tag in (f"<{name}>", f"</{name}>")]
    once = tags[2:] or tags  # the published code lets think tags repeat if another block is required
    positions = [text.find(tag) for tag in tags]
    fits = min(positions) >= 0 and all(text.count(tag) == 1 for tag in once)
    if len(order) > 1:  # ... and if only a think block is required, accepts `</think>` before `<think>`
        fits = fits and positions == sorted(set(positions))
    if order == ["think", "tool_call"]:
        fits = fits and "<response>" not in text and "</response>" not in text
    return highest if fits else lowest


def _correctness_score(text: str, gold: Gold, step: float) -> float:
    if not gold.calls:
        return 0.0
    highest = min(3.0, (3.0 - 2) * step / SCHEDULE_STEPS + 2)
    lowest = max(-3.0, (-3.0 + 2) * step / SCHEDULE_STEPS - 2)
    if "<tool_call>" not in text or "</tool_call>" not in text:
        return lowest
    wanted = [{"name": call.name, "parameters": dict(call.arguments)} for call in gold.calls]
    lines = text.split("<tool_call>")[1].split("</tool_call>", maxsplit=1)[0].strip().split("\n")
    try:
        made = [json.loads(line) for line in lines]
        if wanted == made:
            return highest
        points, best = _greedy_points(wanted, made)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return lowest
    return (highest - lowest) * points / best + lowest


def _greedy_points(wanted: list[dict[str, Any]], made: list[Any]) -> tuple[float, float]:
    # (points, maximum points). The published code assigns greedily: each gold call in turn takes the best predicted
    # call that is not used yet, which can be worse than the optimal assignment (`rewards.accuracy_score`).
    points = _multiset_jaccard([call["name"] for call in wanted], [call["name"] for call in made])
    best, used = 1.0, set[int]()
    for call in wanted:
        best += 1.0 + len(call["parameters"])
        partner, partner_points = None, 0.0
        for i, other in enumerate(made):
            if i in used or other["name"] != call["name"]:
                continue
            keys = _multiset_jaccard(list(call["parameters"]), list(other["parameters"].keys()))
            given = other["parameters"]
            similarity = keys + sum(1.0 for k, v in call["parameters"].items() if k in given and given[k] == v)
            if similarity > partner_points:
                partner, partner_points = i, similarity
        if partner is not None:
            used.add(partner)
            points += partner_points
    return points, best


def _multiset_jaccard(left: list[Any], right: list[Any]) -> float:
    if left == right:
        return 1.0
    if not left or not right:
        return 0.0
    common = sum((Counter(left) & Counter(right)).values())
    return common / (len(left) + len(right) - common)


_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_BRACE_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}]', re.DOTALL)

TAG_WEIGHT, NAME_WEIGHT = 1.0, 1.2
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.001, 8.0


def authors_weights(pieces: Sequence[bytes], step: float, *, trim_spaces: bool = False) -> np.ndarray:
    """Return each token's weight before normalization, 0 where the published code assigns none. Shape (T,), float32.

    Args:
        pieces: The bytes of each of the T tokens of a response.
        step: Absolute training step.
        trim_spaces: Whether the tokenizer's offsets exclude the spaces around a token.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    starts, ends = _character_offsets(text, pieces, trim_spaces)
    weights = np.zeros(len(pieces), dtype=np.float32)
    for start, end, weight in _weighted_spans(text, step):
        low = int(np.searchsorted(starts, start, side="left"))
        high = max(low + 1, int(np.searchsorted(ends, end, side="left")))  # omits a span's last token, as published
        weights[low:high] = np.maximum(weights[low:high], np.float32(weight))
    return weights


def _weighted_spans(text: str, step: float) -> list[tuple[int, int, float]]:
    reasoning_weight = min(0.6 + 0.002 * step, TAG_WEIGHT)
    arguments_weight = min(0.6 + 0.002 * step, 1.2)
    spans: list[tuple[int, int, float]] = []
    for tag in ("think", "response", "tool_call"):
        for start, inner_start, inner_end, end in _find_blocks(text, f"<{tag}>", f"</{tag}>"):
            spans.append((start, inner_start, TAG_WEIGHT))
            spans.append((text.rindex("<", start, end), end, TAG_WEIGHT))
            if tag == "think":
                spans.append((inner_start, inner_end, reasoning_weight))
    for _, offset, inner_end, _ in _find_blocks(text, "<tool_?call>", "</tool_?call>"):
        block = text[offset:inner_end]
        if name := _NAME.search(block):
            spans.append((offset + name.start(1), offset + name.end(1), NAME_WEIGHT))
        if key := _ARGUMENTS.search(block):
            brace = block.find("{", key.end())
            end = _closing_brace(block, brace) if brace >= 0 else -1
            if end >= 0:
                spans.append((offset + brace, offset + end, arguments_weight))
    return spans


def _find_blocks(text: str, opening: str, closing: str) -> Iterator[tuple[int, int, int, int]]:
    # (start, inner start, inner end, end) of each block; an opening tag matches the first closing tag after it.
    opening_pattern, closing_pattern, at = re.compile(opening), re.compile(closing), 0
    while (first := opening_pattern.search(text, at)) and (last := closing_pattern.search(text, first.end())):
        yield first.start(), first.end(), last.start(), last.end()
        at = last.end()


def _closing_brace(block: str, start: int) -> int:
    depth = 0
    for match in _BRACE_OR_STRING.finditer(block, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return -1


def _character_offsets(text: str, pieces: Sequence[bytes], trim_spaces: bool) -> tuple[np.ndarray, np.ndarray]:
    # The characters [start, end) that each token touches, as a tokenizer's offset mapping reports them: a token with
    # only some bytes of a character covers the whole character.
    ends_in_bytes = np.fromiter(accumulate(map(len, pieces)), dtype=np.int64, count=len(pieces))
    starts_in_bytes = ends_in_bytes - np.array([len(piece) for piece in pieces], dtype=np.int64)
    sizes = [len(char.encode("utf-8", "surrogateescape")) for char in text]
    character_of_byte = np.append(np.repeat(np.arange(len(text)), sizes), len(text))
    starts = character_of_byte[starts_in_bytes]
    ends = character_of_byte[np.maximum(ends_in_bytes - 1, 0)] + 1
    ends = np.where(ends_in_bytes > starts_in_bytes, ends, starts)
    if trim_spaces:
        lead = np.array([len(piece) - len(piece.lstrip(b" ")) for piece in pieces], dtype=np.int64)
        tail = np.array([len(piece) - len(piece.rstrip(b" ")) for piece in pieces], dtype=np.int64)
        starts = np.minimum(starts + lead, ends)
        ends = np.maximum(ends - tail, starts)
    return starts, ends


def authors_normalize(weights: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Clip the positive weights of unmasked tokens and divide them by their mean; set all other weights to 0."""
    import torch  # NumPy's float32 mean differs in the last bits; the rewards above must not need torch

    raw = torch.from_numpy(weights)
    valid = torch.from_numpy(mask.astype(bool))
    positive = (raw > 0) & valid
    result = torch.zeros_like(raw)
    if positive.any():
        clipped = raw[positive].clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT)
        result[positive] = clipped / clipped.mean().clamp_min(1e-8)
    return result.numpy()
