"""Measure the cost of the token weights in the driver process of a verl run, by number of responses per step.

The responses are generated: a thought and one to five calls, 130 to 700 tokens, in jagged tensors as from verl's
TransferQueue. The script times the stock trainer's work at this point with verl's own functions (padding and GRPO
advantages; pass --sides ours if verl is not installed) and ours: regions, weights, sums, the weighted advantages and
the metrics of the step. Each side runs in a separate process and reports its memory peak above the batch.

    python benchmarks/verl_hook.py --tokenizer DIR --sizes 2048,8192,32768,131072
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rest_rl.formats import FORMATS
from rest_rl.presets import PRESETS
from rest_rl.response import ToolCall
from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.policy import load_tokenizer
from rest_rl.train.verl.responses import PER_TOKEN, Responses, compute_group_advantages, weight_batch
from rest_rl.train.weighing import EntropyTracker, TokenWeighter

WORDS = "the user asks for a table near the station so check what is open at eight and then book it for two".split()  # noqa: SIM905
DISTINCT, GROUP = 512, 8


def make_response(rng: random.Random) -> str:
    calls = [
        ToolCall(f"tool_{rng.randrange(40)}", {rng.choice(WORDS): " ".join(rng.choices(WORDS, k=6)) for _ in range(3)})
        for _ in range(rng.randint(1, 5))
    ]
    return FORMATS["toolrl"].render(" ".join(rng.choices(WORDS, k=rng.randint(60, 300))), calls, None)


def to_jagged(rows: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


# Return a batch of `size` responses, of which `DISTINCT` are different.
def make_batch(size: int, tokenizer: Any) -> dict[str, Any]:
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    texts = [make_response(rng) for _ in range(DISTINCT)]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    # Repeated texts only save tokenizing time here: the hook parses every response anew.
    rows = [torch.tensor(ids[i % DISTINCT]) for i in range(size)]
    rewards_B = torch.rand(size, generator=generator)
    entropies = [torch.rand(len(row), generator=generator) for row in rows]
    columns = (rows, [torch.ones_like(row) for row in rows], entropies, [-e for e in entropies])
    batch: dict[str, Any] = {name: to_jagged(column) for name, column in zip(PER_TOKEN[:4], columns, strict=True)}
    batch["advantages"] = to_jagged([reward.expand(len(row)) for reward, row in zip(rewards_B, rows, strict=True)])
    batch["rewards"] = rewards_B
    batch["groups"] = [f"prompt {i // GROUP}" for i in range(size)]
    return batch


# Do the work of verl's trainer at this point with verl's own functions.
def run_stock(batch: dict[str, Any], tokenizer: Any) -> None:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.workers.utils.padding import response_to_nested

    # The stock trainer pads the jagged tensors, computes advantages, and makes them jagged again.
    mask_BT = batch["response_mask"].to_padded_tensor(0)
    rewards_BT = torch.zeros(mask_BT.shape)
    rewards_BT[:, 0] = batch["rewards"]
    for name in PER_TOKEN[3:]:
        batch[name].to_padded_tensor(0.0)
    index = np.array(batch["groups"], dtype=object)
    advantages_BT, returns_BT = compute_grpo_outcome_advantage(rewards_BT, mask_BT, index)
    response_to_nested(advantages_BT, batch["response_mask"])
    response_to_nested(returns_BT, batch["response_mask"])


# Do the additional work of the plugin.
def run_ours(batch: dict[str, Any], tokenizer: Any) -> None:
    tool_format = FORMATS["toolrl"]
    tracker = EntropyTracker(0.7)
    tracker.update(torch.tensor([[9.0] * 6, [0.3, 0.5, 1.0, 3.0, 2.0, 2.0], [1.0] * 6]), batch=0)
    compute_group_advantages(batch["rewards"], batch["groups"], "grpo")
    size = len(batch["groups"])
    scores = [{"format": 1.0, "accuracy": 1.0, "exact_match": 1.0, "call_rate": 1.0}] * size
    responses = Responses(
        indices=range(size),
        ids=batch["responses"].unbind(),
        rewards_B=batch["rewards"],
        groups=batch["groups"],
        golds=['{"calls": [], "answer": "x"}'] * size,
        origins=[{"index": i // GROUP, "id": str(i)} for i in range(size)],
        scores=scores,
        prompts=["p"] * size,
        tokenizer=tokenizer,
        tool_format=tool_format,
        ends={tokenizer.eos_token_id},
    )
    chosen, weigher = responses.select_first(8), TokenWeighter(tokenizer, tool_format, PRESETS["rest"].weights)
    _, _, tokens = weight_batch(batch, weigher, tracker, 0.5, 10, chosen)
    responses.compute_metrics()
    responses.make_rows(chosen, tokens, 10, 0.5)


SIDES: dict[str, Callable[[dict[str, Any], Any], None]] = {"stock": run_stock, "ours": run_ours}


# Return the memory peak of the process so far, in GiB.
def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(side: str, size: int, folder: str) -> dict[str, float]:
    """Measure CPU seconds on one thread and memory of one side at one size, after a small warm-up batch."""
    # The batch exists before the clock and the memory baseline start.
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    SIDES[side](make_batch(2 * GROUP, tokenizer), tokenizer)
    batch = make_batch(size, tokenizer)
    before, begin = peak_gib(), process_time()
    SIDES[side](batch, tokenizer)
    tokens = batch["responses"].values().numel()
    return {"seconds": process_time() - begin, "gib": peak_gib() - before, "tokens": tokens}


def main() -> int:
    """Measure every size in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", default=str(embedded_model_dir()), help="tokenizer folder (default: the embedded model)"
    )
    parser.add_argument("--sizes", default="2048,8192,32768,131072", help="responses per step")
    parser.add_argument("--sides", default="stock,ours", help="stock, ours or both")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    rows = []
    print("responses    tokens    side  CPU seconds  ms each   GiB above the batch   MB from and to the queue")
    for size in map(int, arguments.sizes.split(",")):
        for side in arguments.sides.split(","):
            # `ru_maxrss` never falls, so every measurement needs a fresh process.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (side, size, arguments.tokenizer))
            # int64 ids and mask, float32 entropies, log-probabilities and advantages out, advantages back
            moved = found["tokens"] * (8 + 8 + 4 + 4 + 4 + 4) / 1e6 if side == "ours" else float("nan")
            rows.append({"responses": size, "side": side, "moved_mb": moved, **found})
            each = 1000 * found["seconds"] / size
            print(
                f"{size:9d} {found['tokens']:9.0f} {side:>7} {found['seconds']:12.2f} {each:8.3f} {found['gib']:12.2f} "
                f"{moved:18.0f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
