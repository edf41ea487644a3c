"""ResT on TRL's `GRPOTrainer`: token weights folded into the advantages, everything else is TRL.

Shapes: B responses, T completion tokens, R regions. TRL's loss takes advantages of shape (B, T), and for w >= 0
min(r w A, clip(r) w A) = w min(r A, clip(r) A), so weighting the advantage is weighting the clipped surrogate.

Region statistics. The weights of optimizer step k come from a moving average over the steps up to k - 1 of the global
sums of entropies by region (all micro-batches, all processes; `EntropyTracker`). So they cost no extra forward pass and
are the same in every micro-batch and on every process: gradient accumulation equals the full batch and two processes
equal one. In step 0 nothing has been measured yet and regions count as equally uncertain. With num_iterations > 1 every
optimizer step is a step, also one over responses seen before.

The lag costs little: in three runs of 60 steps on the tool world (batches of 32 and 64, learning rates 3e-4 and 1e-3)
the average at decay 0.7 was 0.07 to 0.12 nats (RMS by token) from the exact mean of the step it weighed, within 2 % of
the best decay in each run; the last step alone was 0.09 to 0.16 nats off (benchmarks/entropy_estimate.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rest_rl.config import ENTROPY_DECAY, RestTable, rule_to_table
from rest_rl.credit import AdvantageKind, weight_advantages
from rest_rl.errors import UserError
from rest_rl.formats import format_name, get_format
from rest_rl.objects import UserObject, find_address
from rest_rl.presets import PRESETS, Preset
from rest_rl.response import NUM_REGIONS
from rest_rl.train.policy import load_tokenizer
from rest_rl.train.record import RESPONSE_INDEX, WeightedBatch
from rest_rl.train.reward import compute_progress, get_stop_ids, make_tool_reward, refuse_non_finite
from rest_rl.train.weighing import (
    NUM_SURPRISE_SUMS,
    EntropyTracker,
    TokenWeighter,
    WeightedTokens,
    check_weight_rule,
    compute_region_metrics,
    compute_surprise_metrics,
    sum_by_region,
    sum_surprise,
)
from rest_rl.weights import WeightRule, is_uniform, needs_entropies

REGION_LABELS = "regions"
"""Name of the tokens' regions in a batch."""


class EpochOrder(Sampler[int]):
    """TRL's sampler, whose order in epoch e does not depend on whether this process has seen the epochs before it.

    `RepeatSampler` shuffles with one generator that moves on from epoch to epoch, and a resumed run starts it anew:
    after the first epoch it would see other prompts than an uninterrupted run. `Trainer` calls `set_epoch` before each.
    """

    def __init__(self, sampler: Sampler[int]) -> None:
        assert isinstance(sampler, RepeatSampler), type(sampler)
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Bring the generator to where it stands after `epoch` shuffles."""
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


FROM_PRESET = "preset"
"""Value of a setting that the preset decides."""

TRL_SETTINGS: Mapping[AdvantageKind, Mapping[str, str]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group"},
}
"""What each kind of advantage is called in TRL. A departure from DAPO: TRL does not sample groups without spread anew;
they have no gradient, but their tokens stay in the token mean."""


@dataclass
class ResTConfig(GRPOConfig):
    """`GRPOConfig` with a preset of ResT; the preset decides `loss_type`, `scale_rewards` and the clip range.

    A setting of TRL that is given explicitly and differs from the preset's is kept, and a warning names it. ValueError
    for unknown names and for settings of TRL that would leave part of the objective unweighted.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "weights", "reward"]  # noqa: RUF012, SLF001 - HF's own pattern

    preset: str = field(
        default="rest",
        metadata={"help": "Training method: 'rest', 'paper', 'authors-code', 'grpo', 'dr_grpo' or 'dapo'."},
    )
    tool_format: str = field(
        default="toolrl",
        metadata={
            "help": "How the model writes tool calls: a name out of `rest_rl.FORMATS`, 'module:OBJECT' or the object."
        },
    )
    weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of `rest_rl.WeightConfig` to set differently from the preset: {'strength': 0.5}."},
    )
    reward: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of `rest_rl.RewardConfig` to set differently from the preset."}
    )
    advantage: str | None = field(
        default=None,
        metadata={"help": "Advantage to use instead of the preset's: 'grpo', 'dr_grpo' or 'dapo'."},
    )
    entropy_decay: float = field(
        default=ENTROPY_DECAY,
        metadata={"help": "Decay per step of the moving average of region entropies; 0 uses the last step only."},
    )
    progress_steps: int = field(
        default=0,
        metadata={"help": "Steps in which progress goes from 0 to 1, where it stays; 0 for all steps of the run."},
    )
    loss_type: str = field(
        default=FROM_PRESET, metadata={"help": "As in `GRPOConfig`; 'preset' (default) takes the preset's."}
    )
    scale_rewards: str = field(
        default=FROM_PRESET, metadata={"help": "As in `GRPOConfig`; 'preset' (default) takes the preset's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.preset, Preset):
            self._record_preset(self.preset)
        self.tool_format = format_name(self.tool_format)
        method = self.method()
        get_format(self.tool_format)
        self.check_method(method)
        for name, value in TRL_SETTINGS[method.advantage].items():
            self._fill_from_preset(name, value, FROM_PRESET)
        if method.epsilon_low != 0.2:
            self._fill_from_preset("epsilon", method.epsilon_low, 0.2)
        if method.epsilon_high != method.epsilon_low:
            self._fill_from_preset("epsilon_high", method.epsilon_high, None)

    def method(self) -> Preset:
        """The preset with the overrides applied."""
        table: dict[str, Any] = {
            "weights": self.weights or {},
            "reward": self.reward or {},
            "advantage": self.advantage,
        }
        return RestTable(preset=self.preset, **table).resolve()

    def _record_preset(self, preset: Preset) -> None:
        """Write a preset object as its name and what it has different, which a checkpoint can record."""
        if (named := PRESETS.get(preset.name)) is None:
            raise UserError(
                f"a preset object {preset.name!r}, which no name of rest_rl.PRESETS stands for",
                "one that a checkpoint can record",
                "give it the name of the preset that it changes, or set rest_rl.PRESETS[name] to it",
            )
        self.preset = preset.name
        self.weights = self.weights or _find_changes(named.weights, preset.weights)
        self.reward = self.reward or _find_changes(named.reward, preset.reward)
        self.advantage = self.advantage or preset.advantage
        self.epsilon = preset.epsilon_low if self.epsilon == 0.2 else self.epsilon
        self.epsilon_high = preset.epsilon_high if self.epsilon_high is None else self.epsilon_high

    def _fill_from_preset(self, name: str, value: Any, unset: Any) -> None:
        given = getattr(self, name)
        if given == unset:
            setattr(self, name, value)
        elif given != value:
            message = f"preset {self.preset!r} has {name}={value!r}; {given!r} was given and is kept"
            warnings.warn(message, stacklevel=4)  # the caller of the dataclass's __init__

    def check_method(self, method: Preset) -> None:
        """UserError for weights that could not weigh, or a part of the objective that they would not reach."""
        truncates = self.top_p < 1 or self.top_k > 0 or self.min_p is not None
        check_weight_rule(method.weights, self.tool_format, self.entropy_decay, truncates=truncates)
        if is_uniform(method.weights):
            return
        refused = {
            f"beta={self.beta}": self.beta != 0,
            f"entropy_coef={self.entropy_coef}": self.entropy_coef != 0,
            "use_adaptive_entropy=True": self.use_adaptive_entropy,
            f"top_entropy_quantile={self.top_entropy_quantile}": self.top_entropy_quantile < 1,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise UserError(
                    f"{setting} with preset {self.preset!r}",
                    "its default: the token weights would not apply to that term or no longer have mean 1",
                    "remove it, or use preset 'grpo', 'dr_grpo' or 'dapo'",
                )


def _find_changes(named: Any, given: Any) -> dict[str, Any] | None:
    """The fields of `given` that differ from those of the named preset; None if none does."""
    if named == given:
        return None
    if type(named) is not type(given) or not is_dataclass(given) or isinstance(given, type):
        if isinstance(given, UserObject) or find_address(given):
            return rule_to_table(given) or {"rule": find_address(given)}
        raise UserError(
            f"a preset object with a {type(given).__name__} of your own that no module holds",
            "one that a checkpoint can record",
            "define it in a module, or set weights or reward to {'rule': 'package.module:OBJECT'}",
        )
    return {name: value for name, value in asdict(given).items() if asdict(named)[name] != value}


def optimizer_steps_per_batch(args: Any) -> int:
    """Optimizer steps that share one batch of responses; only between batches does a resumed run go on exactly."""
    if not isinstance(args, GRPOConfig):
        return 1
    shared = cast(int, args.steps_per_generation) * args.num_iterations
    return max(1, -(-shared // args.gradient_accumulation_steps))


class _MicroBatch:
    """What one call of the loss knows before its forward pass."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch, self.advantages_B = batch, batch["advantages"]
        self.mask_BT = sampled_mask(batch).cpu()
        self.weighted: WeightedTokens | None = None
        self.has_entropies = False


def sampled_mask(batch: Mapping[str, Any]) -> Tensor:
    """1 for the tokens that the policy sampled: neither padding nor tool results, (B, T)."""
    mask_BT = batch["completion_mask"]
    return mask_BT * batch["tool_mask"] if "tool_mask" in batch else mask_BT


class ResTTrainer(GRPOTrainer):
    """`GRPOTrainer` whose advantages are reshaped by region; with weights of 1 it is stock GRPO bit for bit.

    Without `reward_funcs` the preset's rule reward is used, which reads the dataset's `gold` column
    (`build_training_dataset`). Logged from the first step on, besides what TRL logs: rest/entropy/<region>,
    rest/collision/<region>, rest/weight/<region> (means over the region's tokens, None for a region without any),
    rest/share/<region> (of all tokens), rest/rule_weight/<region> (the weight before responses are normalised, where
    the rule measures something), rest/surprise/<figure> (`train/weighing.py`, on the first step over a batch), and by
    the reward rest/format, rest/accuracy, rest/exact_match, rest/call_rate, and apart for turns with and without gold
    calls rest/reward_calls, rest/reward_answers, rest/accuracy_calls and so on.
    """

    _tag_names = ["trl", "grpo", "rest"]  # noqa: RUF012 - HF's own pattern
    _name = "ResT"
    _paper = {  # noqa: RUF012
        "title": "ResT: Reshaping Token-Level Policy Gradients for Tool-Use Large Language Models",
        "id": "2509.21826",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ResTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        weight_rule: WeightRule | None = None,
        **kwargs: Any,
    ) -> None:
        """As `GRPOTrainer`; `weight_rule` replaces the preset's rule by an object of yours."""
        args = args if args is not None else ResTConfig("rest-output")
        if not isinstance(args, ResTConfig):
            raise UserError(f"args of type {type(args).__name__}", "ResTConfig", "it takes the same settings")
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)  # noqa: SLF001
            processing_class.padding_side = processing_class.truncation_side = "left"
        self._method = args.method()
        if weight_rule is not None:
            self._method = replace(self._method, weights=weight_rule)
            args.check_method(self._method)
        self._format = get_format(args.tool_format)
        self._text_tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._weighter = TokenWeighter(self._text_tokenizer, self._format, self._method.weights)
        if reward_funcs is None:
            _check_gold_column(train_dataset)
            ends = get_stop_ids(self._text_tokenizer, model)
            reward_funcs = make_tool_reward(
                self._text_tokenizer,
                self._format,
                self._method,
                optimizer_steps_per_batch(args),
                args.seed,
                ends,
                args.progress_steps,
            )
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(
            model=model,
            reward_funcs=[refuse_non_finite(function) for function in functions],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(EntropyTracker(args.entropy_decay))
        self.on_weighed: Callable[[WeightedBatch], None] | None = None
        self._microbatch: _MicroBatch | None = None
        self._sums_4R = torch.zeros(4, NUM_REGIONS, dtype=torch.float64)
        self._surprise_4 = torch.zeros(NUM_SURPRISE_SUMS, dtype=torch.float64)
        self._rule_weights_R: Tensor | None = None

    @property
    def tracker(self) -> EntropyTracker:
        """The region statistics; looked up each time because `Trainer` may put a restored one in its place."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, EntropyTracker))

    @property
    def _training(self) -> bool:
        assert self.model is not None
        return self.model.training

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochOrder:
        """TRL's order of the prompts, also in a run that resumes after its first epoch."""
        return EpochOrder(super()._get_train_sampler(*args, **kwargs))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch of scored responses, each with its number in it and the regions of its tokens."""
        batch = super()._generate_and_score_completions(inputs)
        regions_BT = self._weighter.tag(batch["completion_ids"], sampled_mask(batch))
        return {**batch, RESPONSE_INDEX: torch.arange(len(batch["completion_ids"])), REGION_LABELS: regions_BT}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of advantages weighted by region; the buffered batch keeps its own (B,) advantages."""
        batch = dict(inputs)
        micro_batch = _MicroBatch(batch)
        self._microbatch = micro_batch
        if needs_entropies(self._weighter.rule):
            # The weights wait for the forward pass below. If TRL read the advantages before it, this would be a
            # KeyError and not an unweighted loss.
            del batch["advantages"]
        else:
            batch["advantages"] = self._weight_advantages(micro_batch)
        try:
            loss = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
            if not micro_batch.has_entropies:
                raise RuntimeError("TRL's loss made no forward pass whose entropies could be read; use trl>=1.14,<1.17")
        finally:
            self._microbatch = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's forward pass, unchanged; inside `compute_loss` its entropies are read."""
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._microbatch is not None:
            micro_batch, self._microbatch = self._microbatch, None
            logps_BT, entropies_BT = (values_BT.detach().float().cpu() for values_BT in result[:2])
            if micro_batch.weighted is None:
                micro_batch.batch["advantages"] = self._weight_advantages(micro_batch, entropies_BT)
            self._add_to_step(micro_batch, logps_BT, entropies_BT)
        return result

    def _weight_advantages(self, micro_batch: _MicroBatch, entropies_BT: Tensor | None = None) -> Tensor:
        """The weighted advantages of one micro-batch, (B, T)."""
        entropies_N = None if entropies_BT is None else self._gather_entropies(entropies_BT, micro_batch.mask_BT)
        ids_BT, regions_BT = micro_batch.batch["completion_ids"].cpu(), micro_batch.batch.get(REGION_LABELS)
        if regions_BT is None:  # a batch that this trainer did not generate
            regions_BT = self._weighter.tag(ids_BT, micro_batch.mask_BT)
        micro_batch.weighted = self._weighter.weight(
            ids_BT,
            micro_batch.mask_BT,
            self._weighter.tag(ids_BT, micro_batch.mask_BT)
            if regions_BT is None
            else regions_BT.cpu(),  # not generated here
            self.tracker.statistics(),
            compute_progress(self.state, cast(ResTConfig, self.args).progress_steps),
            self.state.global_step // optimizer_steps_per_batch(self.args) + 1,
            entropies_BT,
            entropies_N,
        )
        return weight_advantages(micro_batch.advantages_B, micro_batch.weighted.weights_BT)

    def _add_to_step(self, micro_batch: _MicroBatch, logps_BT: Tensor, entropies_BT: Tensor) -> None:
        """Add the micro-batch's sums by region to those of the step, and show its tokens to the record."""
        assert micro_batch.weighted is not None
        micro_batch.has_entropies = True
        self._rule_weights_R = micro_batch.weighted.rule_weights_R
        self._sums_4R += sum_by_region(micro_batch.weighted, micro_batch.mask_BT, entropies_BT, logps_BT)
        self._surprise_4 += sum_surprise(logps_BT, entropies_BT, micro_batch.mask_BT)
        if self.accelerator.sync_gradients or not self._training:
            self._finish_step()
        if self.on_weighed is not None and RESPONSE_INDEX in micro_batch.batch:
            weighted = micro_batch.weighted
            kept = (weighted.regions_BT, weighted.weights_BT, entropies_BT, logps_BT, micro_batch.advantages_B.cpu())
            self.on_weighed(WeightedBatch(micro_batch.batch[RESPONSE_INDEX], *kept))

    def _gather_entropies(self, entropies_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The entropies of the unmasked tokens of all processes together, as TRL's own quantile takes them."""
        own_N = entropies_BT[mask_BT.bool()]
        if self.accelerator.num_processes == 1:
            return own_N
        padded = self.accelerator.pad_across_processes(own_N.to(self.accelerator.device), pad_index=-1)
        all_N = cast(Tensor, self.accelerator.gather(padded)).cpu()
        return all_N[all_N != -1]  # rounding makes some entropies slightly negative

    def _finish_step(self) -> None:
        """Sum over processes, log, and in training move the average on for the next step."""
        sums_4R, self._sums_4R = self._sum_over_processes(self._sums_4R), torch.zeros_like(self._sums_4R)
        surprise_4, self._surprise_4 = self._sum_over_processes(self._surprise_4), torch.zeros_like(self._surprise_4)
        metrics = self._metrics["train" if self._training else "eval"]
        figures = compute_region_metrics(sums_4R, self._rule_weights_R)
        if self._is_on_policy:
            figures |= compute_surprise_metrics(surprise_4)
        for name, value in figures.items():
            metrics[name].append(value)
        if self._training:
            self.tracker.update(sums_4R[:3])

    @property
    def _is_on_policy(self) -> bool:
        """Whether the step is the first one to learn from its responses, none of which was masked for its length."""
        is_first = not self._training or self.state.global_step % optimizer_steps_per_batch(self.args) == 0
        return is_first and not cast(ResTConfig, self.args).mask_truncated_completions

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return sums
        return cast(Tensor, self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")).cpu()


def _check_gold_column(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not {"prompt", "gold"} <= set(columns):
        raise UserError(
            f"a training dataset with the columns {sorted(columns)}",
            "prompt and gold",
            "build it with build_training_dataset(samples, tokenizer), or pass reward_funcs",
        )
