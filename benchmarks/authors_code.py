"""Compare the preset `authors-code` with the published code: rewards and weights of mutated responses, bit by bit.

    python benchmarks/authors_code.py --published DIR --responses 400

DIR is a checkout of https://github.com/1229095296/ResT_Tool_use_LLM at d6c29b5. The script prints every difference and
exits with 1 if there is one. Responses on which the published code raises an exception are counted and skipped.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from method_cost import FORMAT, load_module, make_responses, train_tokenizer

from rest_rl.presets import compute_token_weights, score_response
from rest_rl.response import Gold

FRAGMENTS = ['"', "{", "}", "\n", "</think>", "<tool_call>", "<response>", "</response>", "\\", " ", "1.0", "true"]


# Cut the text, insert or remove a fragment, or leave it unchanged.
def mutate(text: str, rng: random.Random) -> str:
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    match rng.randrange(5):
        case 0:
            return text[:end]
        case 1:
            return text[:at] + rng.choice(FRAGMENTS) + text[at:]
        case 2:
            return text[:at] + text[min(at + 6, end) :]
        case 3:
            return mutate(mutate(text, rng), rng)
        case _:
            return text


# Return whether both sides give the tokens of the text equal weights; None if the published code raises.
def compare_weights(text: str, step: int, tokenizer: Any, weighting: Any) -> bool | None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask_BT = torch.ones(1, len(ids))
    try:
        batch = {"loss_mask": mask_BT, "response_text": [text], "step": step}
        published_BT = weighting.build_token_weight(batch, tokenizer)
    # The published code raises an exception if a span begins after the last token.
    except (StopIteration, RuntimeError):
        return None
    ours_BT = compute_token_weights(torch.tensor([ids]), mask_BT, tokenizer, preset="authors-code", step=step)
    return torch.equal(ours_BT, published_BT)


# Return whether both sides give the same reward, format score and correctness.
def compare_rewards(text: str, gold: Gold, step: int, reward: Any) -> bool:
    total, well_formatted, correctness, _ = reward.compute_score(
        text, FORMAT.render("a", gold.calls, gold.answer), step
    )
    return score_response(text, gold, preset="authors-code", step=step)[:3] == (total, well_formatted, correctness)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="a checkout of the published code")
    parser.add_argument("--responses", type=int, default=400)
    args = parser.parse_args()
    os.environ["SCHEDULEREWARD"] = "1"  # the published training script sets it
    weighting = load_module(args.published / "recipe/custom/token_weighting.py")
    reward = load_module(args.published / "verl/utils/reward_score/rlla.py")
    rng = random.Random(0)
    rows = make_responses(args.responses, rng)
    tokenizer = train_tokenizer([text for text, _ in rows])
    different = raised = 0
    for text, gold in rows:
        changed, step = mutate(text, rng), rng.randrange(300)
        weights_agree = compare_weights(changed, step, tokenizer, weighting) if changed else None
        raised += weights_agree is None
        if weights_agree is False or not compare_rewards(changed, gold, step, reward):
            different += 1
            print(f"step {step}: {changed!r}")
    print(f"{args.responses} responses: {different} differ; the published weights raise an exception on {raised}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
