"""Measure what shared prompts save in evaluation and in the probe's gradients, as ratios of CPU seconds.

An evaluation draws a greedy response and one at T = 1 to random prompts: together with shared prompts, and one after
the other as transformers generates them. The gradients are those of 8 responses to one prompt under two weightings.
Both ways alternate in one process and must agree.

python benchmarks/shared_evaluation.py --model smollm2 --prompt-tokens 400 --pairs 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rest_rl.config import ModelTable
from rest_rl.evaluate import shared_attention
from rest_rl.evaluate.generate import Draw, generate_draws
from rest_rl.probe import gradients
from rest_rl.train.policy import load_policy

GROUP_SIZE = 8


def time_pairs(shared: Callable[[], Any], usual: Callable[[], Any], pairs: int) -> tuple[list[float], Any, Any]:
    """Return the ratios of usual to shared CPU seconds, and the last results."""
    can_share, ratios, results = shared_attention.can_share, list[float](), [None, None]
    for _ in range(pairs):
        seconds = [0.0, 0.0]
        for place, run in enumerate((shared, usual)):
            for module in (shared_attention, gradients):
                module.can_share = (lambda model: False) if place else can_share
            begin = time.process_time()
            results[place] = run()
            seconds[place] = time.process_time() - begin
        ratios.append(seconds[1] / seconds[0])
        shared_attention.can_share = gradients.can_share = can_share
    return ratios, *results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--response-tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()

    model, tokenizer = load_policy(ModelTable(path=args.model, dtype="float32"))
    assert shared_attention.can_share(model)
    tokens = args.response_tokens
    ids = torch.randint(9, len(tokenizer), (args.prompts, args.prompt_tokens), generator=torch.manual_seed(0)).tolist()
    settings: dict[str, Any] = {"max_new_tokens": tokens, "batch_size": args.prompts}
    draws = [Draw(1.0, 1), Draw(0.0)]
    ratios, ours, stock = time_pairs(
        lambda: generate_draws(model, tokenizer, ids, draws, **settings),
        lambda: [generate_draws(model, tokenizer, ids, [draw], **settings)[0] for draw in draws],
        args.pairs,
    )
    same = sum(a == b for one, other in zip(ours, stock, strict=True) for a, b in zip(one, other, strict=True))
    show("two draws", ratios, f"{same} of {2 * args.prompts} responses are equal")

    responses = torch.randint(9, len(tokenizer), (GROUP_SIZE, tokens), generator=torch.manual_seed(1)).tolist()
    weights_KBT = torch.randn(2, GROUP_SIZE, tokens, generator=torch.manual_seed(2))
    coordinates = gradients.Coordinates.choose(model)
    ratios, ours, stock = time_pairs(
        *[lambda: gradients.compute_weighted_gradients(model, ids[0], responses, weights_KBT, coordinates)] * 2,
        args.pairs,
    )
    show("gradients", ratios, f"relative distance {float((ours - stock).norm() / stock.norm()):.1e}")


def show(what: str, ratios: list[float], note: str) -> None:
    low, high = min(ratios), max(ratios)
    print(f"{what}: {statistics.median(ratios):.2f} times less CPU time ({low:.2f} to {high:.2f}); {note}")


if __name__ == "__main__":
    main()
