"""Measure the cost of tagging, weighting and scoring, compared with the published code if a copy is given.

    python benchmarks/method_cost.py --published DIR

DIR is a checkout of https://github.com/1229095296/ResT_Tool_use_LLM (for `recipe/custom/token_weighting.py` and
`verl/utils/reward_score/rlla.py`). Both sides run alternately in one process on the same texts, ids and tokenizer. The
table shows their median CPU times and the ratio. The output of the published code is discarded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rest_rl.formats import get_format
from rest_rl.presets import compute_token_weights, score_response
from rest_rl.response import Gold, ToolCall

FORMAT = get_format("toolrl")
WORDS = (
    "the", "user", "wants", "to", "know", "whether", "this", "tool", "can", "look", "up", "a", "city", "and", "its",
    "weather", "so", "I", "should", "call", "it", "with",
)  # fmt: skip


def make_responses(count: int, rng: random.Random) -> list[tuple[str, Gold]]:
    """Return responses of about 400 tokens with one to three calls, most of which differ from the gold calls."""
    rows = []
    for _ in range(count):
        thought = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(250, 410)))
        gold = [
            ToolCall(
                f"get_{rng.choice(WORDS)}_{n}", {f"key_{k}": rng.choice(WORDS) for k in range(rng.randrange(1, 4))}
            )
            for n in range(rng.randrange(1, 4))
        ]
        made = [ToolCall(call.name, {k: rng.choice([v, "x"]) for k, v in call.arguments.items()}) for call in gold]
        rows.append((FORMAT.render(thought, made, None), Gold(tuple(gold))))
    return rows


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer like Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in FORMAT.tags[:4]])
    return tokenizer


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.print = lambda *_, **__: None  # type: ignore[attr-defined] - shadows the built-in only in that module
    return module


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(title: str, count: int, ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int) -> None:
    """Print one line of the table: median CPU time per response of both sides, measured alternately."""
    ours()  # warm up caches before the first round
    mine, other = [], []
    for _ in range(rounds):
        mine.append(cpu_seconds(ours) / count)
        if theirs is not None:
            other.append(cpu_seconds(theirs) / count)
    ratio = f"{statistics.median(other) / statistics.median(mine):8.1f}" if other else "       -"
    published = f"{statistics.median(other) * 1e6:12.1f}" if other else "           -"
    print(f"{title:28s} {statistics.median(mine) * 1e6:12.1f} {published} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a checkout of the published code")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["SCHEDULEREWARD"] = "1"  # the published training script sets it
    rows = make_responses(args.responses, random.Random(0))
    texts = [text for text, _ in rows]
    tokenizer = train_tokenizer(texts)
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    ids_BT, mask_BT = ids["input_ids"], ids["attention_mask"]
    entropies_BT = torch.rand(ids_BT.shape)
    weight_theirs = score_theirs = None
    if args.published:
        weighting = load_module(args.published / "recipe/custom/token_weighting.py")
        reward = load_module(args.published / "verl/utils/reward_score/rlla.py")
        batch = {"loss_mask": mask_BT.float(), "response_text": texts, "step": 30}
        golds = [FORMAT.render("a", gold.calls, gold.answer) for _, gold in rows]

        def weight_theirs() -> None:
            weighting.build_token_weight(batch, tokenizer)

        def score_theirs() -> None:
            for text, gold in zip(texts, golds, strict=True):
                reward.compute_score(text, gold, 30)

    print(
        f"{args.responses} responses, mean {mask_BT.sum(-1).float().mean():.0f} tokens; CPU microseconds per response"
    )
    print(f"{'':28s} {'rest-rl':>12s} {'published':>12s} {'ratio':>8s}")
    for preset in ("rest", "authors-code"):
        compare(
            f"tag and weight, {preset}",
            args.responses,
            lambda preset=preset: compute_token_weights(
                ids_BT, mask_BT, tokenizer, preset=preset, entropies=entropies_BT
            ),
            weight_theirs,
            args.rounds,
        )
    for preset in ("rest", "authors-code"):
        compare(
            f"score, {preset}",
            args.responses,
            lambda preset=preset: [score_response(text, gold, preset=preset, progress=0.2) for text, gold in rows],
            score_theirs,
            args.rounds,
        )


if __name__ == "__main__":
    main()
