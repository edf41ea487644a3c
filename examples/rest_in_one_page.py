"""ResT on one page: the whole method in a plain PyTorch loop without a trainer library, about two minutes on a CPU.

    python examples/rest_in_one_page.py --steps 20

Every equation is that of `rest-rl train`. A trainer adds several updates per batch of samples, gradient accumulation,
several processes and checkpoints. Shapes: B = P * G responses (P prompts, G responses each), S prompt tokens, T
completion tokens, R regions, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rest_rl.credit import group_advantages, weight_advantages, zero_spread_mask
from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import tool_world
from rest_rl.formats import get_format
from rest_rl.loss import clipped_surrogate, token_entropy
from rest_rl.presets import Preset, get_preset
from rest_rl.regions import decode_ids, region_sums, tag_regions
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.rewards import Reward, judge
from rest_rl.weights import RegionStatistics, apply_curriculum, assign_weights, region_weights

FORMAT = get_format("toolrl")


class Rollout(NamedTuple):
    """B sampled responses: prompts padded on the left, completions on the right; masks are 1 for real tokens."""

    prompt_ids_BS: Tensor
    prompt_mask_BS: Tensor
    ids_BT: Tensor
    mask_BT: Tensor


@torch.no_grad()
def sample(model: Any, tokenizer: Any, samples: Sequence[ToolSample], group_size: int, max_tokens: int) -> Rollout:
    """Sample G responses to every prompt at temperature 1; the responses to one prompt are adjacent."""
    texts = [
        tokenizer.apply_chat_template(list(s.messages), tools=list(s.tools), add_generation_prompt=True, tokenize=False)
        for s in samples
        for _ in range(group_size)
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids_BT = out[:, prompts["input_ids"].shape[1] :]
    ended_BT = (ids_BT == tokenizer.eos_token_id).long()
    mask_BT = (ended_BT.cumsum(-1) - ended_BT == 0).long()  # up to and including the first end-of-sequence token
    return Rollout(prompts["input_ids"], prompts["attention_mask"], ids_BT, mask_BT)


def forward(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return log-probability and policy entropy of every completion token: two tensors (B, T)."""
    T = rollout.ids_BT.shape[1]
    logits_BTV = model(
        input_ids=torch.cat([rollout.prompt_ids_BS, rollout.ids_BT], dim=1),
        attention_mask=torch.cat([rollout.prompt_mask_BS, rollout.mask_BT], dim=1),
        logits_to_keep=T + 1,
    ).logits[:, :-1]
    logprobs_BTV = torch.log_softmax(logits_BTV, dim=-1)
    return logprobs_BTV.gather(-1, rollout.ids_BT[..., None])[..., 0], token_entropy(logits_BTV.detach())


def rest_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    entropies_BT: Tensor,
    advantages_B: Tensor,
    rollout: Rollout,
    tokenizer: Any,
    preset: Preset,
    progress: float,
    known: RegionStatistics | None,
) -> tuple[Tensor, Tensor, RegionStatistics]:
    """Return the ResT loss of a batch, its token weights (B, T), and the region statistics of this batch.

    `known` are the region statistics of earlier steps, from which the weights are computed; None in the first step.
    """
    regions_BT = tag_regions(rollout.ids_BT, rollout.mask_BT, tokenizer, FORMAT)
    entropy_sums_R, counts_R = region_sums(entropies_BT, regions_BT, rollout.mask_BT)
    measured = RegionStatistics(counts_R, entropy_sums_R / counts_R)
    # Eq. 9 of the paper: the weight of a region follows from its mean entropy; the curriculum shifts it with progress.
    weights_R = apply_curriculum(region_weights(known, preset.weights), progress, preset.weights)
    weights_BT = assign_weights(weights_R, regions_BT, rollout.mask_BT)
    # Eq. 19: the clipped surrogate of GRPO with the advantage w_it A_i for each token.
    loss = clipped_surrogate(
        logprobs_BT,
        old_logprobs_BT,
        weight_advantages(advantages_B, weights_BT),
        rollout.mask_BT,
        epsilon_low=preset.epsilon_low,
        epsilon_high=preset.epsilon_high,
        aggregation=preset.advantage,
        max_length=rollout.ids_BT.shape[1],
    )
    return loss, weights_BT, measured


def compute_rewards(
    rollout: Rollout, tokenizer: Any, samples: Sequence[ToolSample], preset: Preset, nu: float
) -> list[Reward]:
    """Return the rule-based reward of every response; one without an end-of-sequence token was cut off."""
    group_size = len(rollout.ids_BT) // len(samples)
    rows = zip(rollout.ids_BT.tolist(), rollout.mask_BT.sum(-1).tolist(), strict=True)
    responses = [ids[:length] for ids, length in rows]
    golds = [s.gold for s in samples for _ in range(group_size)]
    judged = [
        judge(decode_ids(ids, tokenizer, FORMAT.tags), gold, FORMAT, truncated=ids[-1] != tokenizer.eos_token_id)
        for ids, gold in zip(responses, golds, strict=True)
    ]
    return [preset.reward(judgement, nu) for judgement in judged]


def smooth(old: RegionStatistics | None, new: RegionStatistics, decay: float) -> RegionStatistics:
    """Average over steps, weighted by token counts: sums and counts decay alike (`EntropyTracker` in the trainer)."""
    if old is None:
        return new
    counts_R = decay * old.counts_R + new.counts_R
    sums_R = decay * (old.entropies_R * old.counts_R).nan_to_num() + (new.entropies_R * new.counts_R).nan_to_num()
    return dataclasses.replace(new, counts_R=counts_R, entropies_R=sums_R / counts_R)


def train(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[float]:
    """Train the model in place; return the mean S_acc of the sampled responses of each step."""
    preset, known, history = get_preset(args.preset), None, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    prompts = tool_world(args.seed, args.steps * args.prompts)
    for step in range(args.steps):
        progress = step / max(1, args.steps - 1)
        samples = prompts[step * args.prompts : (step + 1) * args.prompts]
        rollout = sample(model, tokenizer, samples, args.group, args.max_tokens)
        rewards = compute_rewards(rollout, tokenizer, samples, preset, progress)
        rewards_B = torch.tensor([reward.total for reward in rewards])
        logprobs_BT, entropies_BT = forward(model, rollout)
        loss, weights_BT, measured = rest_loss(
            logprobs_BT,
            logprobs_BT.detach(),  # one update per batch: the old policy is the current one
            entropies_BT,
            group_advantages(rewards_B, args.group, preset.advantage),
            rollout,
            tokenizer,
            preset,
            progress,
            known,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Only now: the weights of a step come from earlier steps, so that no response influences its own weight.
        if (first := preset.weights.statistics_batches) == 0 or step < first:  # 0: a moving average over all steps
            known = smooth(known, measured, decay=1.0 if first else 0.7)
        history.append(sum(reward.accuracy for reward in rewards) / len(rewards))
        flat = zero_spread_mask(rewards_B, args.group).float().mean().item()
        report(step, history[-1], flat, rewards, measured, weights_BT)
    return history


def report(
    step: int, accuracy: float, flat: float, rewards: list[Reward], measured: RegionStatistics, weights_BT: Tensor
) -> None:
    """Print one line: scores, share of groups with equal rewards, entropy of each region, range of the weights."""
    exact = sum(reward.format == 1 == reward.accuracy for reward in rewards) / len(rewards)
    entropies = " ".join(f"{Region(r).label} {measured.entropies_R[r]:.2f}" for r in range(NUM_REGIONS - 1))
    scores = f"S_acc {accuracy:.3f}  exact {exact:.3f}  flat {flat:.2f}  H: {entropies}"
    print(f"step {step:3d}  {scores}  w: {weights_BT[weights_BT > 0].min():.2f}..{weights_BT.max():.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(resources.files("rest_rl") / "assets" / "tool_world"))
    parser.add_argument("--preset", default="rest", choices=["rest", "rest_live", "grpo", "dr_grpo", "dapo"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16, help="P, prompts per step")
    parser.add_argument("--group", type=int, default=8, help="G, responses per prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    train(policy, AutoTokenizer.from_pretrained(arguments.model), arguments)
