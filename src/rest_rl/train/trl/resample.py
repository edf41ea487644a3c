"""DAPO's dynamic sampling on TRL (https://arxiv.org/abs/2503.14476, section 3.2).

A group whose rewards are all equal has no gradient. After TRL has generated and scored a batch, such groups are
replaced by groups for other prompts of the training set. Each round draws as many prompts as groups are missing,
generates and scores their responses with TRL's own code, and keeps the groups whose rewards differ. Groups that are
still without spread after the last round stay in the batch with an advantage of 0.

The prompts depend only on the seed of the run, the step and the batch, so a resumed run draws the same ones.

Shapes: P processes, K groups of one process, B responses of one process, G responses per group, N = P B responses in
all, F reward functions, T tokens.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from copy import deepcopy
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rest_rl.errors import UserError
from rest_rl.train.record import RESPONSE_INDEX

# TRL's key for the number of tokens in the loss of all processes: the only entry without one row per response.
NUM_ITEMS = "num_items_in_batch"
# The padding values of TRL's tensors with one column per token; None stands for the padding token. Prompts are padded
# on the left, responses on the right.
PADDING: Mapping[str, int | None] = {
    "prompt_ids": None,
    "prompt_mask": 0,
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "old_per_token_logps": 0,
    "ref_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 1,
}
PADDED_LEFT = ("prompt_ids", "prompt_mask")
# With other values of these settings, the advantages of a group depend on the other groups of the batch.
GROUPWISE_VALUES = {"scale_rewards": ("group", "none"), "multi_objective_aggregation": ("sum_then_normalize",)}


def check_resampling(args: GRPOConfig, rounds: int) -> None:
    """Raise a UserError if groups cannot be replaced with these settings; `rounds` is `rest.resample_rounds`."""
    if rounds < 0:
        raise UserError(f"rest.resample_rounds is {rounds}", "at least 0", "change it")
    if rounds == 0:
        return
    for name, allowed in GROUPWISE_VALUES.items():
        if (value := getattr(args, name)) not in allowed:
            raise UserError(
                f"rest.resample_rounds is {rounds}, but with trl.{name} = {value!r} the advantages of a group depend "
                "on the other groups of the batch",
                " or ".join(map(repr, allowed)),
                f"change trl.{name}, or remove rest.resample_rounds",
            )
    own = args.per_device_train_batch_size * cast(int, args.steps_per_generation)
    if own % cast(int, args.num_generations):
        raise UserError(
            f"rest.resample_rounds is {rounds}, but each process generates {own} responses per batch in groups of "
            f"{args.num_generations}, so that some groups are split over processes",
            "whole groups in each process",
            "make trl.per_device_train_batch_size a multiple of trl.num_generations",
        )


def check_resampling_data(dataset: Any, args: GRPOConfig) -> None:
    """Raise a UserError if the training set has no other prompts to draw, or if their batches could not be merged."""
    if not isinstance(dataset, Sized):
        problem = "rest.resample_rounds draws prompts from the training set, but this one is a stream"
        raise UserError(problem, "a datasets.Dataset", "load it as one, or remove rest.resample_rounds")
    if columns := {"image", "images"} & set(getattr(dataset, "column_names", None) or ()):
        problem = f"rest.resample_rounds cannot merge batches with images (column {min(columns)})"
        raise UserError(problem, remedy="remove the column, or rest.resample_rounds")
    prompts = cast(int, args.generation_batch_size) // cast(int, args.num_generations)
    if len(dataset) <= prompts:
        problem = f"rest.resample_rounds needs other prompts than those of the batch, but all {len(dataset)} are in it"
        remedy = "add data, lower trl.per_device_train_batch_size or trl.gradient_accumulation_steps, or remove it"
        raise UserError(problem, f"more than {prompts} prompts", remedy)


def has_spread(rewards_NF: Tensor, weights_F: Tensor, group_size: int) -> Tensor:
    """Return for each group whether its rewards differ. Shape (N / G,), bool.

    A reward is the weighted sum over the reward functions, as in TRL. NaN stands for no reward, and responses without
    any reward are ignored.
    """
    rewards_NG = (rewards_NF * weights_F).nansum(-1).view(-1, group_size)
    is_scored_NG = (~rewards_NF.isnan().all(-1)).view(-1, group_size)
    highest_N = rewards_NG.where(is_scored_NG, -torch.inf).amax(-1)
    return highest_N > rewards_NG.where(is_scored_NG, torch.inf).amin(-1)


def replace_groups(
    batch: Mapping[str, Any], drawn: Mapping[str, Any], sources: Mapping[int, int], group_size: int, pad_id: int
) -> dict[str, Any]:
    """Return TRL's batch with group k replaced by group `sources[k]` of `drawn`, both padded to a common width.

    `num_items_in_batch` stays as it was; the caller counts the tokens again over all processes.

    Raises:
        UserError: the batches have entries that cannot be merged, or not the same entries.
    """
    known = {*PADDING, "advantages", RESPONSE_INDEX, NUM_ITEMS}
    if unknown := (batch.keys() - known) | (batch.keys() ^ drawn.keys()):
        problem = f"rest.resample_rounds cannot merge TRL's batches with {', '.join(sorted(unknown))}"
        raise UserError(problem, remedy="remove rest.resample_rounds")
    rows_B = torch.arange(len(batch["advantages"]))
    rows_KG = rows_B.view(-1, group_size)  # a view: writing to it changes rows_B
    for target, source in sources.items():
        rows_KG[target] = len(rows_B) + source * group_size + torch.arange(group_size)
    merged = dict(batch)
    for name in batch.keys() - {NUM_ITEMS}:
        parts = [batch[name], drawn[name]]
        if name in PADDING:
            width, value = max(part.shape[1] for part in parts), PADDING[name]
            value = pad_id if value is None else value
            parts = [_pad(part, width, value, left=name in PADDED_LEFT) for part in parts]
        merged[name] = torch.cat(parts)[rows_B.to(parts[0].device)]
    return merged


def _pad(values_BT: Tensor, width: int, value: int, *, left: bool) -> Tensor:
    missing = width - values_BT.shape[1]
    return torch.nn.functional.pad(values_BT, (missing, 0) if left else (0, missing), value=value)


def row_key(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)


class ResamplingTrainer(GRPOTrainer):
    """`GRPOTrainer` that replaces groups without spread in `args.resample_rounds` rounds; with 0 rounds, TRL's own.

    With rounds, it logs two figures of each generation batch, over all processes:

    - rest/resampled: the share of groups that were replaced
    - rest/extra_responses: the number of responses generated in addition to the batch

    Figures that TRL computes when it generates (reward, frac_reward_zero_std, completions/*, those of the reward
    functions, the table of completions) describe the batch before groups were replaced, so that they do not depend on
    the selection; only num_tokens counts all responses. Figures of the loss describe the batch that is trained on.
    """

    _rewards_NF: Tensor

    @property
    def _group_size(self) -> int:
        return cast(int, self.num_generations)

    # TRL's batch has advantages but no rewards. These are the rewards of all processes: every process knows how many
    # groups each process is missing, so all make the same calls, as collective operations require.
    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_NF = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_NF

    # Returns TRL's batch with the numbers of its responses (`RESPONSE_INDEX`): a response's position in the sequence of
    # all responses that this process generated for the batch.
    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        rounds = cast(Any, self.args).resample_rounds if cast(Any, self.model).training else 0
        if not rounds:
            return self._generate_numbered(inputs, 0)
        in_batch = [row_key(row) for row in inputs[:: self._group_size]]  # before a rollout adds columns
        batch = self._generate_numbered(inputs, 0)
        missing_PK = self._find_zero_spread()
        before, num_drawn = missing_PK.double().mean().item(), 0
        if missing_PK.any():
            metrics, logs = deepcopy(self._metrics), deepcopy(self._logs)
            batch, num_drawn = self._replace_zero_spread(batch, missing_PK, in_batch, rounds)
            tokens = self._metrics["train"]["num_tokens"]
            self._metrics, self._logs = metrics, logs
            self._metrics["train"]["num_tokens"] = tokens
        self._metrics["train"]["rest/resampled"].append(before - missing_PK.double().mean().item())
        self._metrics["train"]["rest/extra_responses"].append(float(num_drawn))
        return batch

    # `missing_PK` marks the groups without spread of all processes and is updated. In each round every process
    # generates for its own part of the same drawn prompts, as many as the process that is missing most groups needs.
    def _replace_zero_spread(
        self, batch: dict[str, Any], missing_PK: Tensor, in_batch: Sequence[str], rounds: int
    ) -> tuple[dict[str, Any], int]:
        processes, rank, group_size = len(missing_PK), self.accelerator.process_index, self._group_size
        others, num_drawn = self._iter_other_rows(in_batch), 0
        for _ in range(rounds):
            rows = list(islice(others, processes * int(missing_PK.sum(1).max())))
            count = len(rows) // processes  # less than needed if a small training set has no more prompts
            if count == 0:
                break
            own = [dict(row) for row in rows[rank * count : (rank + 1) * count] for _ in range(group_size)]
            drawn = self._generate_numbered(own, len(batch["advantages"]) + num_drawn)
            num_drawn += len(own)
            for process, is_useless_K in enumerate(self._find_zero_spread()):
                targets = missing_PK[process].nonzero().flatten().tolist()
                sources = dict(zip(targets, (~is_useless_K).nonzero().flatten().tolist(), strict=False))
                missing_PK[process, list(sources)] = False
                if process == rank and sources:
                    tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
                    batch = replace_groups(batch, drawn, sources, group_size, cast(Any, tokenizer).pad_token_id)
        mask_BT = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch[NUM_ITEMS] = cast(Tensor, self.accelerator.gather(mask_BT.sum())).sum()
        return batch, processes * num_drawn

    def _generate_numbered(self, inputs: Any, first: int) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        return {**batch, RESPONSE_INDEX: torch.arange(first, first + len(batch["advantages"]))}

    def _find_zero_spread(self) -> Tensor:
        weights_F = self.reward_weights.to(self._rewards_NF.device)
        spread_N = has_spread(self._rewards_NF, weights_F, self._group_size)
        return (~spread_N).view(self.accelerator.num_processes, -1).cpu()

    # The rows of the training set that are not in the batch, in random order. The batch is part of the seed, because a
    # step that accumulates gradients may use several generation batches.
    def _iter_other_rows(self, in_batch: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        keys: list[str] = gather_object(list(in_batch))
        seed, seen, dataset = zlib.crc32("\n".join(keys).encode()), set(keys), cast(Any, self.train_dataset)
        order = np.random.default_rng([self.args.seed, self.state.global_step, seed]).permutation(len(dataset))
        for at in order.tolist():
            row = dataset[at]
            if (key := row_key(row)) not in seen:
                seen.add(key)
                yield row
