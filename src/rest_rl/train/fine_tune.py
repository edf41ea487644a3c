"""Supervised fine-tuning of any causal model on tool samples, riding TRL's `SFTTrainer`.

The labels are the demonstration (reasoning, calls or answer, end of sequence). With region weights the loss is
L = -sum_t w_t log p_t / sum_t 1 with w_t the weight of token t's region, per response of mean 1: weight on calls or on
reasoning instead of all tokens alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from rest_rl.data.samples import ToolSample
from rest_rl.formats import ToolFormat, get_format
from rest_rl.regions import tag_regions
from rest_rl.response import Region
from rest_rl.train.prompts import render_prompt
from rest_rl.train.sft import IGNORED, encode
from rest_rl.weights import assign_weights


def fine_tune(
    model: Any,
    tokenizer: Any,
    samples: Iterable[ToolSample],
    out: str | Path,
    *,
    tool_format: str | ToolFormat = "toolrl",
    region_weights: Mapping[str, float] | None = None,
    trl: Mapping[str, Any] | None = None,
) -> Path:
    """Fine-tune, then save model and tokenizer in `out`; returns `out`.

    `trl` takes every field of TRL's SFTConfig. `region_weights` maps region labels (`name`, `reasoning`, ...) to loss
    weights, 1 where absent; ValueError for another label or a negative weight.
    """
    chosen, out = get_format(tool_format), Path(out)
    settings = {"report_to": [], "save_strategy": "no", **(trl or {})}
    trainer = SFTTrainer(
        model=model,
        args=TrlConfig(output_dir=str(out), **settings),
        train_dataset=labelled_dataset(samples, tokenizer, chosen),
        processing_class=tokenizer,
        compute_loss_func=region_loss(tokenizer, chosen, region_weights) if region_weights else None,
    )
    trainer.train()
    trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    return out


def labelled_dataset(samples: Iterable[ToolSample], tokenizer: Any, tool_format: ToolFormat) -> Dataset:
    """Columns input_ids and labels (-100 on the prompt); ValueError for no samples."""
    rows = []
    for sample in samples:
        response = tool_format.render(sample.thought, sample.gold.calls, sample.gold.answer)
        ids, labels = encode(render_prompt(sample, tokenizer, tool_format), response, tokenizer)
        rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise ValueError("got no samples; expected at least one; check the data file")
    return Dataset.from_list(rows)


def region_loss(tokenizer: Any, tool_format: ToolFormat, region_weights: Mapping[str, float]) -> Callable[..., Tensor]:
    """A `compute_loss_func`: cross entropy of the labels, each token weighted by its region."""
    known = {region.label: int(region) for region in Region}
    weights_R = torch.ones(len(known))
    for label, weight in region_weights.items():
        if label not in known or not weight >= 0:
            raise ValueError(f"got region weight {label} = {weight}; expected >= 0 for one of {', '.join(known)}")
        weights_R[known[label]] = weight

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        labels_BT, mask_BT = labels[:, 1:], labels[:, 1:] != IGNORED
        regions_BT = tag_regions(
            labels_BT.clamp(min=0), mask_BT, tokenizer, lambda text: tool_format.parse(text).spans, tool_format.tags
        )
        weights_BT = assign_weights(weights_R.to(labels.device), regions_BT, mask_BT)
        nll_BT = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
        )
        return (weights_BT * nll_BT).sum() / (mask_BT.sum() if num_items_in_batch is None else num_items_in_batch)

    return loss
