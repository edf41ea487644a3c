"""Prompts computed once per group of responses: in TRL's loss and in its generation.

In tool use, prompts are long and responses short, and TRL computes every prompt once per response. Here the loss packs
a micro-batch into one row without padding, [prompt 1, its responses, prompt 2, its responses, ...], and an attention
function (`rest_rl.evaluate.shared_attention`) lets each response see its own prompt and itself. Log-probabilities and
entropies return in TRL's shape, so advantages, weights, clipping and logging stay as they are, and gradients are equal
up to rounding. A response starts one token early, at its prompt's last token: each position then has exactly one label.
In generation, a prompt's keys and values are computed and kept once per group.

Shapes: B responses, n prompts, G responses per prompt, P prompt tokens, T completion tokens, N packed positions,
H heads, K key-value heads, d their size.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import trl.trainer.utils
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from trl import GRPOTrainer

from rest_rl.evaluate.shared_attention import (
    ATTENTION,
    NO_MASK,
    PackedRow,
    find_groups,
    find_model_obstacle,
    generate_shared,
    make_up_prompts,
    pack,
    relative_difference,
    try_generation,
    without_adapter,
)
from rest_rl.train.policy import quiet_transformers

# Parameters of TRL's private methods that the overrides rely on.
_LOGPS_PARAMETERS = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
_GENERATE_PARAMETERS = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]


class SharedPromptTrainer(GRPOTrainer):
    """`GRPOTrainer` that computes each prompt once per group if `args.share_prompts` and the model allow it.

    If sharing is not possible, it warns once with the reason (`not_shared`) and computes as TRL does. In both cases
    only the responses' positions pass through the output head. Gradients equal TRL's up to rounding, with one
    exception: micro-batches hold whole groups, and losses that divide by the tokens of a micro-batch (`bnpo`) see other
    micro-batches than TRL's random ones. Responses whose advantages are all 0 get no backward pass.
    """

    not_shared: str | None = None
    """Why prompts are not shared; None if they are, or if `share_prompts` is off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shares, self._has_gradient_B = False, cast("Tensor | None", None)
        self._restricts_head = False
        if not cast(Any, self.args).share_prompts:
            return
        # On GPUs, TRL restricts the head itself.
        self._restricts_head = self.accelerator.device.type == "cpu" and _is_known_trl()
        self.not_shared = find_obstacle(self) or self._start_sharing()
        if self.not_shared:
            warnings.warn(f"prompts are not shared within groups: {self.not_shared}", stacklevel=3)

    # Sets the attention function once and for good: a checkpointed layer runs again in the backward pass, when a
    # temporary change would be undone.
    def _start_sharing(self) -> str | None:
        models = [cast(Any, self.model), *([self.ref_model] if self.ref_model is not None else [])]
        for model in models:
            self.accelerator.unwrap_model(model).set_attn_implementation(ATTENTION)
        self._shares = True
        if (obstacle := find_difference(self)) is not None:
            self._shares = False
            for model in models:
                self.accelerator.unwrap_model(model).set_attn_implementation("sdpa")
        return obstacle

    # TRL shuffles all responses of a generation batch, so a micro-batch would hold few responses of many prompts. Rows
    # move only within the micro-batches of one optimizer step, which then sums the same rows as before.
    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = cast(list[dict[str, Any]], self._buffered_inputs)
        if not self._shares or parts is before or not cast(nn.Module, self.model).training:
            return inputs
        window = self.args.gradient_accumulation_steps
        for first in range(0, len(parts), window):
            regroup(parts[first : first + window])
        return parts[self._step % cast(Any, self.args).steps_per_generation]

    # A response whose advantages are 0 adds 0 to a loss of TRL's, unless a KL or entropy term is added. In several
    # processes, DDP expects the same number of forward passes with gradients from each.
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        advantages = inputs.get("advantages")
        other_terms = self.beta != 0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        if self._shares and advantages is not None and not other_terms and self.accelerator.num_processes == 1:
            self._has_gradient_B = (advantages != 0).view(len(advantages), -1).any(1)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._has_gradient_B = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        mask_BT = attention_mask[:, -logits_to_keep:].bool()
        has_other_inputs = any(value is not None and value is not False for value in kwargs.values())
        is_shared = self.accelerator.unwrap_model(model).config._attn_implementation == ATTENTION  # noqa: SLF001
        if not (self._shares and is_shared and mask_BT.any()) or has_other_inputs:
            head = (
                _restrict_head(model, self._backbone(model), logits_to_keep) if self._restricts_head else nullcontext()
            )
            with head:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
        prompts = _unpad(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        responses = _unpad(input_ids[:, -logits_to_keep:], mask_BT)
        size = batch_size or len(responses)
        logps_BT = entropies_BT = torch.zeros(mask_BT.shape, device=input_ids.device)
        for first in range(0, len(responses), size):
            chosen = [ids if first <= row < first + size else [] for row, ids in enumerate(responses)]
            for part in self._split_by_gradient(chosen):
                packed = pack(prompts, part[0])
                if packed.ids:
                    with torch.set_grad_enabled(part[1]):
                        output = self._score(model, packed)
                    at = (torch.tensor(packed.rows), torch.tensor(packed.columns))
                    at = tuple(index.to(input_ids.device) for index in at)
                    logps_BT = logps_BT.index_put(at, output.log_probs[0])
                    if compute_entropy:
                        entropies_BT = entropies_BT.index_put(at, output.entropy[0])
        if torch.is_grad_enabled() and not logps_BT.requires_grad:
            # Every parameter gets a gradient of 0, as from TRL's loss, so the optimizer sees the same.
            zeros = (0 * p.flatten()[0] for p in cast(nn.Module, self.model).parameters() if p.requires_grad)
            logps_BT = logps_BT + sum(zeros)
        return logps_BT, entropies_BT if compute_entropy else None, None

    # The responses that need a backward pass, then the others. The order matters: autocast keeps the cast weights of
    # its first forward pass, and those made without gradients would cut the second one off.
    def _split_by_gradient(self, responses: list[list[int]]) -> list[tuple[list[list[int]], bool]]:
        if self._has_gradient_B is None or not torch.is_grad_enabled():
            return [(responses, torch.is_grad_enabled())]
        has_gradient = self._has_gradient_B.tolist()
        return [
            ([ids if has == wanted else [] for ids, has in zip(responses, has_gradient, strict=True)], wanted)
            for wanted in (True, False)
        ]

    def _score(self, model: Any, packed: PackedRow) -> Any:
        device = self.accelerator.device
        ids_1N, positions_1N = (torch.tensor([values], device=device) for values in (packed.ids, packed.positions))
        with _keep_positions(self._backbone(model), packed.scored), self.accelerator.autocast():
            return model(
                input_ids=ids_1N,
                position_ids=positions_1N,
                attention_mask=NO_MASK.to(device),
                shift_labels=torch.tensor([packed.labels], device=device),
                fused_lm_head=True,
                segments=packed.segments,
            )

    def _backbone(self, model: Any) -> nn.Module:
        return without_adapter(self.accelerator.unwrap_model(model)).base_model

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        given = (prompt_ids, images, multimodal_fields, num_generations, *args)
        if (
            not self._shares
            or self.use_vllm
            or self.use_transformers_continuous_batching
            or images
            or multimodal_fields
        ):
            return super()._generate_single_turn(*given, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        # TRL calls `model.generate`; an attribute of the instance hides the method.
        model.generate = partial(generate_shared, model, model.generate, num_generations)
        try:
            # Without the outer context, autocast would cast all weights again for every token.
            with self.accelerator.autocast():
                return super()._generate_single_turn(*given, **kwargs)
        finally:
            del model.generate


def _unpad(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(ids_BT.cpu(), mask_BT.cpu().bool(), strict=True)]


def regroup(parts: Sequence[dict[str, Any]]) -> None:
    """Move rows between equally large micro-batches, in place, so that the responses of a prompt are adjacent.

    Every tensor with at least one axis has one row per response.
    """
    if len(parts) < 2:
        return
    size = len(parts[0]["prompt_ids"])
    prompts = [ids for part in parts for ids in _unpad(part["prompt_ids"], part["prompt_mask"])]
    order = torch.tensor([row for rows in find_groups(prompts).values() for row in rows])
    for name, values in parts[0].items():
        if isinstance(values, Tensor) and values.dim():
            moved = torch.cat([part[name] for part in parts])[order.to(values.device)].split(size)
            for part, rows in zip(parts, moved, strict=True):
                part[name] = rows


# Passes only the hidden states at `positions` on to the output head. TRL does so itself on GPUs.
@contextmanager
def _keep_positions(backbone: nn.Module, positions: Sequence[int] | slice) -> Iterator[None]:
    def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, positions]
        return output

    handle = backbone.register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


# For TRL's own forward pass: only the positions that predict the last T tokens reach the output head.
@contextmanager
def _restrict_head(model: nn.Module, backbone: nn.Module, T: int) -> Iterator[None]:
    def shift(module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> Any:
        if "labels" in kwargs:
            kwargs["shift_labels"] = kwargs.pop("labels")[:, -T:]
        return inputs, kwargs

    handle = model.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        with _keep_positions(backbone, slice(-T - 1, -1)):
            yield
    finally:
        handle.remove()


def find_obstacle(trainer: GRPOTrainer) -> str | None:
    """Return why prompts cannot be shared in this run, as far as settings and configuration tell; None if they can."""
    args, model = cast(Any, trainer.args), trainer.accelerator.unwrap_model(trainer.model)
    config = model.config.get_text_config()
    obstacle = find_model_obstacle(config)
    adapters = getattr(model, "peft_config", {}).values()
    dropout = [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [getattr(config, "attention_dropout", 0.0)]
    obstacles = {
        "this version of TRL is unknown": not _is_known_trl(),
        "the model takes images": trainer._is_vlm,  # noqa: SLF001
        str(obstacle): obstacle is not None,
        "the loss of the expert router counts every token": trainer.aux_loss_enabled,
        f"attention is {model.config._attn_implementation}, not sdpa": model.config._attn_implementation != "sdpa",  # noqa: SLF001
        "the adapter is not LoRA": any(adapter.is_prompt_learning for adapter in adapters),
        "dropout is on (trl.disable_dropout = true turns it off)": any(dropout),
        "torch.compile is on": args.torch_compile,
        "the model is sharded": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def find_difference(trainer: SharedPromptTrainer) -> str | None:
    """Return how shared computation fails or differs for the trainer's model, on two made-up groups; None if equal.

    Differences count relative to the standard deviation of the values: 0.1% for weights in float32, which are tried
    without autocast, and 10% for weights of fewer bits, whose rounding alone exceeds 0.1%. The check guards against
    models that `find_obstacle` does not know: attention that does not go through transformers' registry, absolute
    positions, keys that change after the cache.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    accelerator: Any = trainer.accelerator
    was_training, tolerance = model.training, 0.1
    handler = accelerator.autocast_handler
    if {parameter.dtype for parameter in model.parameters()} == {torch.float32}:  # neither 16 nor 4 bits
        accelerator.autocast_handler, tolerance = AutocastKwargs(enabled=False), 1e-3
    model.eval()
    try:
        with torch.no_grad(), quiet_transformers():
            shared = _try_model(trainer, model)
            trainer._shares = False  # noqa: SLF001
            usual = _try_model(trainer, model)
    except Exception as error:  # whatever a model that was written by others raises
        first_line = next(iter(str(error).splitlines()), "")
        return f"the model does not support it ({type(error).__name__}: {first_line:.100})"
    finally:
        trainer._shares, accelerator.autocast_handler = True, handler  # noqa: SLF001
        model.train(was_training)
    for what, ours, stock in zip(("log-probabilities", "generated logits"), shared, usual, strict=True):
        difference = relative_difference(ours, stock)
        if not difference <= tolerance:  # also if it is NaN
            return f"the model's {what} would change by {difference:.1%} of their spread"
    return None


# The log-probabilities of two groups of two responses, and the logits of the second token when it generates.
def _try_model(trainer: SharedPromptTrainer, model: Any) -> tuple[Tensor, Tensor]:
    prompts_BP, prompt_mask_BP = make_up_prompts(model)
    responses_BT = torch.arange(1, 17, device=model.device).view(4, 4) * 11 % model.config.get_text_config().vocab_size
    mask_BT = torch.tensor([[1] * length + [0] * (4 - length) for length in (4, 2, 3, 4)], device=model.device)
    ids_BPT, mask_BPT = torch.cat([prompts_BP, responses_BT], 1), torch.cat([prompt_mask_BP, mask_BT], 1)
    logps_BT = trainer._get_per_token_logps_and_entropies(trainer.model, ids_BPT, mask_BPT, 4)[0]  # noqa: SLF001
    generate = partial(generate_shared, model, model.generate, 2) if trainer._shares else model.generate  # noqa: SLF001
    return logps_BT * mask_BT, try_generation(model, generate)


def _is_known_trl() -> bool:
    logps, generate = GRPOTrainer._get_per_token_logps_and_entropies, GRPOTrainer._generate_single_turn  # noqa: SLF001
    return (
        hasattr(trl.trainer.utils, "add_fused_lm_head")
        and list(inspect.signature(logps).parameters)[:7] == _LOGPS_PARAMETERS
        and list(inspect.signature(generate).parameters)[:5] == _GENERATE_PARAMETERS
    )
