"""Supervised fine-tuning of any causal model on tool samples, riding TRL's `SFTTrainer`.

The labels are the demonstration (reasoning, calls or answer, end of sequence). With region weights the loss is
L = -sum_t w_t log p_t / sum_t 1 with w_t the weight of token t's region, per response of mean 1: weight on calls or on
reasoning instead of all tokens alike.
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
    """`SFTTrainer` whose token losses are weighed by region; with weights of 1 it is the stock trainer.

    TRL computes the log-probabilities of the labels in the model's head; they are multiplied on their way out, so
    the loss is TRL's own and no logits are built. UserError where this TRL's head does not hand them out.
    """

    def __init__(
        self, *, layout: PromptLayout, region_weights: Mapping[str, float], args: SFTConfig, **kwargs: Any
    ) -> None:
        if args.packing or args.padding_free:
            raise UserError(
                "packing or padding_free with region weights, which are normalised per row of a batch",
                "one response a row",
                "set both false",
            )
        self._layout, self._weights_R = layout, make_region_weights(region_weights)
        self._labels_BT: Tensor | None = None
        super().__init__(args=args, **kwargs)
        policy: Any = self.model
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        model.register_forward_hook(self._weight_log_probs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, with the labels at hand for `_weigh`."""
        self._labels_BT = inputs["labels"]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._labels_BT is not None:
            raise UserError("a TRL whose supervised loss is not the head's own", "TRL 1.16", "upgrade trl")
        return loss

    def _weight_log_probs(self, module: Any, args: Any, output: Any) -> Any:
        """The head's output with its log-probabilities (zero where nothing is learnt) times the region weights."""
        labels_BT = self._labels_BT
        if labels_BT is None or getattr(output, "log_probs", None) is None:
            return output
        self._labels_BT = None
        weights_BT = compute_loss_weights(labels_BT[:, 1:], self._layout, self._weights_R)
        output.log_probs = output.log_probs * weights_BT.to(output.log_probs)
        return output


def make_sft_trainer(
    args: SFTConfig, layout: PromptLayout, dataset: Dataset, region_weights: Mapping[str, float], **settings: Any
) -> SFTTrainer:
    """A trainer on a dataset of `build_demonstrations`; stock where all regions weigh alike.

    `region_weights` maps region labels (`name`, `reasoning`, ...) to loss weights, 1 where absent; UserError for
    another label or a negative weight.
    """
    if set(make_region_weights(region_weights).tolist()) == {1.0}:
        return SFTTrainer(args=args, train_dataset=dataset, **settings)
    return RegionSFTTrainer(layout=layout, region_weights=region_weights, args=args, train_dataset=dataset, **settings)


def build_demonstrations(
    prepared: Iterable[Prepared], layout: PromptLayout, max_length: int | None = None
) -> tuple[list[dict[str, list[int]]], list[Rejected]]:
    """Rows of input_ids and labels (-100 on the prompt), and the samples that cannot be learnt from.

    A sample of more than `max_length` tokens, or than the model holds, is rejected: cut off, it would teach a response
    without its end. So is a thought that the format cannot hold. Where the prompt ends in a closed think block, the
    demonstration does not think either.
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
            told = f"got {len(ids)} tokens of prompt and demonstration, expected at most {limit}, {name}"
            reason = f"sample {each.sample.id!r}: {told}; raise it, or shorten the row"
            rejected.append(Rejected(each.sample, reason, is_too_long=True))
        else:
            rows.append({"input_ids": ids, "labels": labels})
    return rows, rejected


def make_region_weights(region_weights: Mapping[str, float]) -> Tensor:
    """Loss weights (R,) from labels, 1 where absent; UserError for an unknown label or a negative weight."""
    known = {region.label: int(region) for region in Region}
    weights_R = torch.ones(len(known))
    for label, weight in region_weights.items():
        if label not in known or not weight >= 0:
            raise UserError(f"region weight {label} = {weight}", f">= 0 for one of {', '.join(known)}", "change it")
        weights_R[known[label]] = weight
    return weights_R


def compute_loss_weights(labels_BT: Tensor, layout: PromptLayout, weights_R: Tensor) -> Tensor:
    """The weight of every labelled token by its region, mean 1 over each response, 0 where nothing is learnt."""
    tool_format: ToolFormat = layout.format
    labels_BT = labels_BT.cpu()
    mask_BT = labels_BT != IGNORED_LABEL
    regions_BT = tag_regions(labels_BT.clamp(min=0), mask_BT, layout.tokenizer, tool_format)
    return assign_weights(weights_R, regions_BT, mask_BT)
