"""Supervised fine-tuning of a causal language model on tool samples, on top of TRL's `SFTTrainer`.

The labels are the tokens of the demonstration: reasoning, calls or answer, end of sequence. With region weights, the
loss is L = -sum_t w_t log p_t / sum_t 1, where w_t is the weight of token t, by its region, with mean 1 per response.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared, Rejected
from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat
from rest_rl.regions import tag_regions
from rest_rl.response import Region
from rest_rl.train.prompts import IGNORED_LABEL, encode_demonstration, render_demonstration
from rest_rl.weights import assign_weights

if TYPE_CHECKING:
    from datasets import Dataset


class RegionSFTTrainer(SFTTrainer):
    """`SFTTrainer` whose token losses are weighted by region; with weights of 1 it is the stock trainer."""

    def __init__(
        self, *, layout: PromptLayout, region_weights: Mapping[str, float], args: SFTConfig, **kwargs: Any
    ) -> None:
        if args.packing or args.padding_free:
            raise UserError(
                "region weights cannot be combined with trl.packing or trl.padding_free",
                "one response per row, because the weights have mean 1 over a row",
                "set both to false",
            )
        self._layout, self._weights_R = layout, make_region_weights(region_weights)
        self._labels_BT: Tensor | None = None
        super().__init__(args=args, **kwargs)
        policy: Any = self.model
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        model.register_forward_hook(self._weight_log_probs)

    # TRL 1.16 computes the labels' log-probabilities inside the model's patched head, tile by tile, and the loss from
    # the head's output. A forward hook weights these log-probabilities: the loss stays TRL's own and no (B, T, V)
    # logits are built. The labels travel to the hook in `_labels_BT`; if it is still set afterwards, the hook never saw
    # them.
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._labels_BT = inputs["labels"]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._labels_BT is not None:
            raise UserError("the installed trl computes its supervised loss in another way", "trl 1.16", "upgrade trl")
        return loss

    def _weight_log_probs(self, module: Any, args: Any, output: Any) -> Any:
        labels_BT = self._labels_BT
        if labels_BT is None or getattr(output, "log_probs", None) is None:
            return output
        self._labels_BT = None
        # log_probs[t] belongs to label t + 1 and is 0 where the label is IGNORED_LABEL.
        weights_BT = compute_loss_weights(labels_BT[:, 1:], self._layout, self._weights_R)
        output.log_probs = output.log_probs * weights_BT.to(output.log_probs)
        return output


def make_sft_trainer(
    args: SFTConfig, layout: PromptLayout, dataset: Dataset, region_weights: Mapping[str, float], **settings: Any
) -> SFTTrainer:
    """Return a trainer for the rows of `build_demonstrations`: TRL's own trainer if all regions have weight 1.

    `region_weights` maps region labels (`name`, `reasoning`, ...) to loss weights; other regions have weight 1.
    UserError for an unknown label or a negative weight.
    """
    if set(make_region_weights(region_weights).tolist()) == {1.0}:
        return SFTTrainer(args=args, train_dataset=dataset, **settings)
    return RegionSFTTrainer(layout=layout, region_weights=region_weights, args=args, train_dataset=dataset, **settings)


def build_demonstrations(
    prepared: Iterable[Prepared], layout: PromptLayout, max_length: int | None = None
) -> tuple[list[dict[str, list[int]]], list[Rejected]]:
    """Return rows of input_ids and labels (-100 for prompt tokens), and the samples that cannot be trained on.

    Samples longer than `max_length` or the model's context are rejected and not truncated, because a model trained on
    truncated responses would not learn to end them. Samples that the format cannot express are rejected too. If the
    prompt ends in a closed think block, the demonstration has no thought.
    """
    limits = {"trl.max_length": max_length, "the model's context": layout.context}
    limit, name = min(((limit, name) for name, limit in limits.items() if limit), default=(None, ""))
    rows: list[dict[str, list[int]]] = []
    rejected: list[Rejected] = []
    for each in prepared:
        try:
            response = render_demonstration(each.sample, layout.format, thinks=not layout.closes_think)
        except ValueError as error:
            rejected.append(Rejected(each.sample, str(error)))
            continue
        ids, labels = encode_demonstration(each.prompt_ids, response, layout.tokenizer)
        if limit is not None and len(ids) > limit:
            size = f"has {len(ids)} tokens of prompt and demonstration, expected at most {limit}, {name}"
            reason = f"sample {each.sample.id!r} {size}; raise the limit or shorten the row"
            rejected.append(Rejected(each.sample, reason, is_too_long=True))
        else:
            rows.append({"input_ids": ids, "labels": labels})
    return rows, rejected


def make_region_weights(region_weights: Mapping[str, float]) -> Tensor:
    """Return the loss weights of all regions, by default 1; UserError for an unknown label or a negative weight."""
    known = {region.label: int(region) for region in Region}
    weights_R = torch.ones(len(known))
    for label, weight in region_weights.items():
        if label not in known or not weight >= 0:
            expected = f"a weight of at least 0 for one of {', '.join(known)}"
            raise UserError(f"rest.region_weights.{label} is {weight}", expected, "change it")
        weights_R[known[label]] = weight
    return weights_R


def compute_loss_weights(labels_BT: Tensor, layout: PromptLayout, weights_R: Tensor) -> Tensor:
    """Return the loss weight of every label from its region: mean 1 over each response, 0 for prompt tokens."""
    tool_format: ToolFormat = layout.format
    labels_BT = labels_BT.cpu()
    mask_BT = labels_BT != IGNORED_LABEL
    regions_BT = tag_regions(labels_BT.clamp(min=0), mask_BT, layout.tokenizer, tool_format)
    return assign_weights(weights_R, regions_BT, mask_BT)
