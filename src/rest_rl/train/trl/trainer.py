"""ResT on TRL's `GRPOTrainer`: it multiplies the advantages by token weights and changes nothing else.

Shapes: B responses, T completion tokens, R regions. TRL's loss accepts advantages of shape (B, T), and for w >= 0
min(r w A, clip(r) w A) = w min(r A, clip(r) A), where r is the probability ratio, A the advantage and w the weight:
scaling a token's advantage by w scales its clipped surrogate by w.

Region statistics: the weights of step k are computed from an average of the entropy sums per region, taken over steps
before k, all micro-batches and all processes (`EntropyTracker`): a moving average, or for `entropies = "initial"` the
mean over the first batches of responses. The statistics need no extra forward pass and are equal in all processes, so
region weights depend neither on gradient accumulation nor on the number of processes. In the first step no entropy has
been measured, and all regions count as equally uncertain. With num_iterations > 1, every optimizer step updates the
average, including a second step on the same responses.

Using earlier steps costs little. In three runs on the tool world (60 steps, batches of 32 and 64, learning rates 3e-4
and 1e-3) the average with decay 0.7 differed from the mean entropy of the weighted step by 0.07 to 0.12 nats (RMS over
tokens), at most 2% more than with the best decay of each run. With only the previous step, the difference was 0.09 to
0.16 nats (benchmarks/entropy_estimate.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from rest_rl.config import ENTROPY_DECAY, RestTable, rule_to_table
from rest_rl.credit import AdvantageKind, find_part_stages, weight_advantages
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import has_ended
from rest_rl.formats import format_name, get_format
from rest_rl.objects import UserObject, find_address
from rest_rl.presets import PRESETS, RENAMED_PRESETS, Preset, get_preset
from rest_rl.regions import decode_ids, token_char_lengths
from rest_rl.response import NUM_REGIONS
from rest_rl.rewards import RewardConfig, check_reward_rule, judge, split_reward
from rest_rl.train.policy import load_tokenizer
from rest_rl.train.record import RESPONSE_INDEX, WeightedBatch
from rest_rl.train.reward import compute_progress, get_stop_ids, make_tool_reward, parse_gold, refuse_non_finite
from rest_rl.train.trl.environment import EnvironmentTrainer
from rest_rl.train.trl.resample import ResamplingTrainer, check_resampling, check_resampling_data
from rest_rl.train.trl.shared_prompts import SharedPromptTrainer
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
from rest_rl.weights import (
    WeightRule,
    get_normalization,
    get_statistics_batches,
    is_uniform,
    needs_entropies,
    scale_to_mean_one,
)

# Keys in TRL's batch: the regions of the tokens, and the tokens by region of the whole batch, repeated for every row.
REGION_LABELS, REGION_COUNTS = "regions", "region_counts"


# TRL's RepeatSampler (1.16) shuffles with one generator that advances from epoch to epoch, and a resumed process starts
# it anew: after the first epoch it would see other prompts than an uninterrupted run. `Trainer` calls `set_epoch`
# before each epoch, which is the place to restore the generator.
class EpochOrder(Sampler[int]):
    """Wraps TRL's sampler so that a resumed run reads the prompts of an epoch in the same order as the original run."""

    def __init__(self, sampler: Sampler[int]) -> None:
        assert isinstance(sampler, RepeatSampler), type(sampler)
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the random generator to its state after `epoch` epochs."""
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


# The value of a setting that the preset decides.
FROM_PRESET = "preset"

# TRL's settings for each kind of advantage. For `weighted_token_mean`, the trainer also divides the weights by their
# mean over the micro-batch: with `bnpo`, the token mean of each micro-batch, this is sum w l / sum w of each. One
# departure from DAPO: groups whose rewards are all equal are replaced only with `resample_rounds`. Otherwise they have
# no gradient, but their tokens count in the token mean.
TRL_SETTINGS: Mapping[AdvantageKind, Mapping[str, str]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group"},
    "weighted_token_mean": {"loss_type": "bnpo", "scale_rewards": "group"},
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ResTConfig(GRPOConfig):
    """`GRPOConfig` with a ResT preset, which decides `loss_type`, `scale_rewards` and the clip range.

    A TRL setting that you pass explicitly overrides the preset's value, with a warning that names the setting.

    Raises:
        ValueError: an unknown name, or a TRL setting that would leave a part of the objective unweighted.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "weights", "reward"]  # noqa: RUF012, SLF001 - HF's own pattern

    preset: str = field(default="rest", metadata=_help("A name from `rest_rl.PRESETS`, or a `Preset`."))
    tool_format: str = field(default="toolrl", metadata=_help("A name from `FORMATS`, 'module:OBJECT', or the object."))
    weights: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Fields that replace the preset's, or a rule.")
    )
    reward: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Fields that replace the preset's, or a rule.")
    )
    advantage: str | None = field(default=None, metadata=_help(f"Replaces the preset's: {', '.join(TRL_SETTINGS)}."))
    entropy_decay: float = field(default=ENTROPY_DECAY, metadata=_help("Decay per step of the region averages."))
    progress_steps: int = field(default=0, metadata=_help("Steps in which progress goes from 0 to 1; 0 for all."))
    resample_rounds: int = field(default=0, metadata=_help("Rounds that replace groups with equal rewards (DAPO)."))
    credit: str | None = field(default=None, metadata=_help("Credit of a rollout's turns: see `credit` in [rest]."))
    gamma: float = field(default=1.0, metadata=_help("Discount per turn of later rewards, in an environment."))
    share_prompts: bool = field(default=True, metadata=_help("Compute each prompt once per group where possible."))
    loss_type: str = field(default=FROM_PRESET, metadata=_help("As in `GRPOConfig`; by default the preset's."))
    scale_rewards: str = field(default=FROM_PRESET, metadata=_help("As in `GRPOConfig`; by default the preset's."))
    # The KL term of GRPO, of verl and of the published code has no such factor; TRL multiplies it by the ratio.
    use_bias_correction_kl: bool = field(default=False, metadata=_help("As in `GRPOConfig`; False by default."))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.preset, Preset):
            self._record_preset(self.preset)
        elif self.preset in RENAMED_PRESETS:
            self.preset = get_preset(self.preset).name
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
        if method.delta is not None:
            self._fill_from_preset("delta", method.delta, None)
        check_resampling(self, self.resample_rounds)

    def method(self) -> Preset:
        """Return the preset with the fields `weights`, `reward` and `advantage` applied to it."""
        table: dict[str, Any] = {"weights": self.weights or {}, "reward": self.reward or {}}
        return RestTable(preset=self.preset, advantage=cast(Any, self.advantage), **table).resolve()

    # A checkpoint records the configuration as JSON: a preset object becomes its name and the fields that differ from
    # it.
    def _record_preset(self, preset: Preset) -> None:
        if (named := PRESETS.get(preset.name)) is None:
            raise UserError(
                f"the preset object is named {preset.name!r}, which is not in rest_rl.PRESETS",
                "a name that a checkpoint can record",
                "use the name of the preset that it changes, or set rest_rl.PRESETS[name] to it",
            )
        self.preset = preset.name
        self.weights = self.weights or _find_changes(named.weights, preset.weights)
        self.reward = self.reward or _find_changes(named.reward, preset.reward)
        self.advantage = self.advantage or preset.advantage
        self.epsilon = preset.epsilon_low if self.epsilon == 0.2 else self.epsilon
        self.epsilon_high = preset.epsilon_high if self.epsilon_high is None else self.epsilon_high
        self.delta = preset.delta if self.delta is None else self.delta

    def _fill_from_preset(self, name: str, value: Any, unset: Any) -> None:
        given = getattr(self, name)
        if given == unset:
            setattr(self, name, value)
        elif given != value:
            message = f"preset {self.preset!r} has {name}={value!r}, but {given!r} was passed and is used"
            warnings.warn(message, stacklevel=4)  # the caller of the dataclass's __init__

    def check_method(self, method: Preset) -> None:
        """Raise a UserError if other settings do not allow the method's weights or its reward.

        A KL term (`beta`) is allowed with every rule: TRL adds it to each token's loss, and the weights do not apply.
        """
        truncates = self.top_p < 1 or self.top_k > 0 or self.min_p is not None
        check_weight_rule(method.weights, self.tool_format, self.entropy_decay, truncates=truncates)
        check_reward_rule(method.reward, get_format(self.tool_format))
        if is_uniform(method.weights):
            return
        refused = {
            f"entropy_coef={self.entropy_coef}": self.entropy_coef != 0,
            "use_adaptive_entropy=True": self.use_adaptive_entropy,
            f"top_entropy_quantile={self.top_entropy_quantile}": self.top_entropy_quantile < 1,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise UserError(
                    f"{setting} cannot be combined with preset {self.preset!r}: the token weights would not apply to "
                    "that term or no longer have mean 1",
                    remedy="remove it, or use preset 'grpo', 'dr_grpo' or 'dapo'",
                )


# The fields of `given` that differ from the named preset's; None if none does.
def _find_changes(named: Any, given: Any) -> dict[str, Any] | None:
    if named == given:
        return None
    if type(named) is not type(given) or not is_dataclass(given) or isinstance(given, type):
        if isinstance(given, UserObject) or find_address(given):
            return rule_to_table(given) or {"rule": find_address(given)}
        raise UserError(
            f"the preset's {type(given).__name__} is not an attribute of a module, so a checkpoint cannot record it",
            remedy="define it in a module, or set weights or reward to {'rule': 'package.module:OBJECT'}",
        )
    return {name: value for name, value in asdict(given).items() if asdict(named)[name] != value}


def optimizer_steps_per_batch(args: Any) -> int:
    """Return the number of optimizer steps per generation batch; runs resume exactly only between batches."""
    if not isinstance(args, GRPOConfig):
        return 1
    # In TRL `steps_per_generation` counts micro-batches, of which gradient accumulation makes one step (rounded up).
    shared = cast(int, args.steps_per_generation) * args.num_iterations
    return max(1, -(-shared // args.gradient_accumulation_steps))


# What `compute_loss` hands to the forward pass that it triggers, and gets back from it.
class _MicroBatch:
    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch, self.advantages_B = batch, batch["advantages"]
        self.mask_BT = sampled_mask(batch).cpu()
        self.weighted: WeightedTokens | None = None
        self.has_entropies = False


def sampled_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return a mask (B, T) with 1 for tokens that the policy sampled and 0 for padding and tool results."""
    mask_BT = batch["completion_mask"]
    return mask_BT * batch["tool_mask"] if "tool_mask" in batch else mask_BT


class ResTTrainer(EnvironmentTrainer, ResamplingTrainer, SharedPromptTrainer):
    """`GRPOTrainer` with advantages weighted by region; with weights of 1, the results are TRL's.

    They are bit-identical with `share_prompts=False`, and equal up to rounding with shared prompts.
    One default differs from TRL's: `use_bias_correction_kl` is False, which matters only with a KL term.

    Without `reward_funcs`, the trainer uses the preset's rule reward, which reads the dataset's `gold` column
    (see `build_training_dataset`). In addition to TRL's metrics it logs, from the first step on:

    - rest/entropy/<region>, rest/collision/<region>, rest/weight/<region>: means over the region's tokens, if any
    - rest/share/<region>: the region's share of all tokens
    - rest/rule_weight/<region>: the region's weight before normalization per response (rules with region weights)
    - rest/surprise/<figure>: only in the first step of a generation batch; see `compute_surprise_metrics`
    - rest/format, rest/accuracy, rest/exact_match, rest/call_rate: parts of the rule reward (`ResponseScore`)
    - rest/reward_calls, rest/reward_answers, rest/accuracy_calls, ...: separate means for call and answer turns
    - rest/resampled, rest/extra_responses: only with `resample_rounds`; see `ResamplingTrainer`
    """

    _tag_names = ["trl", "grpo", "rest"]  # noqa: RUF012 - HF's own pattern
    _name = "ResT"
    _paper = {  # noqa: RUF012
        "title": "ResT: Reshaping Token-Level Policy Gradients for Tool-Use Large Language Models",
        "id": "2509.21826",
    }

    _microbatch: _MicroBatch | None = None  # also before the end of __init__, which tries the model

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
        """Create a trainer with the arguments of `GRPOTrainer`; a `weight_rule` object replaces the preset's rule."""
        args = args if args is not None else ResTConfig("rest-output")
        if not isinstance(args, ResTConfig):
            raise UserError(f"args has type {type(args).__name__}", "a ResTConfig", "pass the settings to ResTConfig")
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
        self._stop_ids = ends = get_stop_ids(self._text_tokenizer, model)
        if args.credit not in (None, "outcome") and not kwargs.get("rollouts"):
            _check_single_turn_credit(args, reward_funcs)
        if reward_funcs is None:
            _check_gold_column(train_dataset)
            reward_funcs = make_tool_reward(
                self._text_tokenizer,
                self._format,
                self._method,
                optimizer_steps_per_batch(args),
                args.seed,
                ends,
                args.progress_steps,
            )
        if args.resample_rounds:
            check_resampling_data(train_dataset, args)
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
        self.add_callback(EntropyTracker(args.entropy_decay, get_statistics_batches(self._method.weights)))
        self.on_generated: Callable[[Tensor], None] | None = None
        self.on_weighed: Callable[[WeightedBatch], None] | None = None
        self._sums_4R = torch.zeros(4, NUM_REGIONS, dtype=torch.float64)
        self._surprise_4 = torch.zeros(NUM_SURPRISE_SUMS, dtype=torch.float64)
        self._rule_weights_R: Tensor | None = None

    @property
    def tracker(self) -> EntropyTracker:
        """The callback that keeps the region statistics; it is looked up anew because `Trainer` may replace it."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, EntropyTracker))

    @property
    def _training(self) -> bool:
        assert self.model is not None
        return self.model.training

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochOrder:
        return EpochOrder(super()._get_train_sampler(*args, **kwargs))

    # Regions depend only on the ids, so they are tagged once per generation batch. TRL shuffles the batch and splits it
    # into micro-batches by the first axis of every tensor, so regions (B, T) and response numbers (B,) stay aligned.
    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mask_BT = sampled_mask(batch)
        regions_BT = self._weighter.tag(batch["completion_ids"], mask_BT)
        if get_normalization(self._weighter.rule) == "batch":
            counts_R = torch.bincount(regions_BT[mask_BT.bool().cpu()], minlength=NUM_REGIONS).double()
            batch[REGION_COUNTS] = self._sum_over_processes(counts_R).expand(len(regions_BT), -1)
        if self.on_generated is not None:
            self.on_generated(batch[RESPONSE_INDEX])
        return {**batch, REGION_LABELS: regions_BT}

    # As in `make_tool_reward`, so that the stages' rewards add up to its reward.
    def split_response(self, row: Mapping[str, Any], ids: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return the rewards of a response's stages (`split_reward`), and the stage of each of its tokens."""
        args, steps, tags = cast(ResTConfig, self.args), optimizer_steps_per_batch(self.args), self._format.tags
        text, is_cut = decode_ids(ids, self._text_tokenizer, tags), not has_ended(ids, self._stop_ids)
        judgement = judge(text, parse_gold(row["gold"]), self._format, truncated=is_cut)
        progress, batch = compute_progress(self.state, args.progress_steps), self.state.global_step // steps + 1
        split = split_reward(judgement, self._format, self._method.reward, progress, batch)
        lengths = token_char_lengths(ids, self._text_tokenizer, tags)
        return list(split.rewards), find_part_stages(lengths, split.ends)

    # The override. `inputs` is a micro-batch from TRL's buffer, which num_iterations > 1 reads again: it is copied, and
    # only the copy gets the weighted advantages (B, T) in place of (B,). `super()` then computes TRL's own loss, so
    # clipping, loss types and distributed scaling stay TRL's. Most rules need only the statistics of earlier steps and
    # weight here. Rules that need this batch's entropies weight inside TRL's forward pass
    # (`_get_per_token_logps_and_entropies`), which TRL 1.14 to 1.16 runs before it reads the advantages.
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        micro_batch = _MicroBatch(batch)
        self._microbatch = micro_batch
        if needs_entropies(self._weighter.rule):
            # If TRL read the advantages before the forward pass, this would raise a KeyError; it could not silently
            # compute an unweighted loss.
            del batch["advantages"]
        else:
            batch["advantages"] = self._weight_advantages(micro_batch)
        try:
            loss = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
            if not micro_batch.has_entropies:
                raise RuntimeError("TRL's loss ran no forward pass that returns entropies; install trl>=1.14,<1.17")
        finally:
            self._microbatch = None
        return loss

    # TRL computes the sampled tokens' entropies in every forward pass of the loss, at least for a metric: reading them
    # here costs no second pass. TRL also calls this for old and reference log-probabilities, when no micro-batch is
    # pending. `_microbatch` is cleared first, so that each micro-batch is counted once.
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._microbatch is not None:
            micro_batch, self._microbatch = self._microbatch, None
            logps_BT, entropies_BT = (values_BT.detach().float().cpu() for values_BT in result[:2])
            if micro_batch.weighted is None:
                micro_batch.batch["advantages"] = self._weight_advantages(micro_batch, entropies_BT)
            self._add_to_step(micro_batch, logps_BT, entropies_BT)
        return result

    def _weight_advantages(self, micro_batch: _MicroBatch, entropies_BT: Tensor | None = None) -> Tensor:
        entropies_N = None if entropies_BT is None else self._gather_entropies(entropies_BT, micro_batch.mask_BT)
        batch, counts_R = micro_batch.batch, None
        ids_BT, regions_BT = batch["completion_ids"].cpu(), batch.get(REGION_LABELS)
        if regions_BT is None:  # a batch that this trainer did not generate
            regions_BT = self._weighter.tag(ids_BT, micro_batch.mask_BT)
        elif REGION_COUNTS in batch:
            counts_R = batch[REGION_COUNTS][0]
        micro_batch.weighted = self._weighter.weight(
            ids_BT,
            micro_batch.mask_BT,
            regions_BT.cpu(),
            self.tracker.statistics(),
            compute_progress(self.state, cast(ResTConfig, self.args).progress_steps),
            self.state.global_step // optimizer_steps_per_batch(self.args) + 1,
            entropies_BT,
            entropies_N,
            counts_R,
        )
        weights_BT = micro_batch.weighted.weights_BT
        if self._method.advantage == "weighted_token_mean":
            weights_BT = scale_to_mean_one(weights_BT, micro_batch.mask_BT)
        return weight_advantages(micro_batch.advantages_B, weights_BT)

    # Bookkeeping: sums of all micro-batches are collected and closed in the micro-batch that ends an optimizer step
    # (`sync_gradients`), so with gradient accumulation the statistics are those of the global batch. An evaluation has
    # no steps; each of its batches is closed at once.
    def _add_to_step(self, micro_batch: _MicroBatch, logps_BT: Tensor, entropies_BT: Tensor) -> None:
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

    # Entropies of the unmasked tokens of all processes, whose numbers differ: padded with -1 for the gather.
    def _gather_entropies(self, entropies_BT: Tensor, mask_BT: Tensor) -> Tensor:
        own_N = entropies_BT[mask_BT.bool()]
        if self.accelerator.num_processes == 1:
            return own_N
        padded = self.accelerator.pad_across_processes(own_N.to(self.accelerator.device), pad_index=-1)
        all_N = cast(Tensor, self.accelerator.gather(padded)).cpu()
        return all_N[all_N != -1]  # rounding makes some entropies slightly negative

    # Reduce over processes, log, and only then update the average: a step never sees its own statistics.
    def _finish_step(self) -> None:
        sums_4R, self._sums_4R = self._sum_over_processes(self._sums_4R), torch.zeros_like(self._sums_4R)
        surprise_4, self._surprise_4 = self._sum_over_processes(self._surprise_4), torch.zeros_like(self._surprise_4)
        metrics = self._metrics["train" if self._training else "eval"]
        figures = compute_region_metrics(sums_4R, self._rule_weights_R)
        if self._is_on_policy:
            figures |= compute_surprise_metrics(surprise_4)
        for name, value in figures.items():
            metrics[name].append(value)
        if self._training:
            self.tracker.update(sums_4R[:3], self.state.global_step // optimizer_steps_per_batch(self.args))

    # The surprise check compares sampler and loss. It is valid only for the policy that sampled, in the first step on a
    # batch, and only if no response was masked for its length or replaced because of its reward: both depend on the
    # sampled tokens.
    @property
    def _is_on_policy(self) -> bool:
        args = cast(ResTConfig, self.args)
        is_first = not self._training or self.state.global_step % optimizer_steps_per_batch(args) == 0
        return is_first and not args.mask_truncated_completions and not args.resample_rounds

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return cast(Tensor, self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")).cpu()


# Without rollouts, stages are parts of the rule reward.
def _check_single_turn_credit(args: ResTConfig, reward: Any) -> None:
    if args.credit != "return_to_go":
        problem = f"rest.credit is {args.credit!r}, but there is no environment"
        raise UserError(problem, "return_to_go or outcome", "set env.path, or change rest.credit")
    if not (reward is None or getattr(reward, "is_rule_reward", False)) or not isinstance(
        args.method().reward, RewardConfig
    ):
        problem = "rest.credit is 'return_to_go', but the reward does not come in parts"
        raise UserError(problem, "the rule reward", "remove rest.credit, or the other reward")


def _check_gold_column(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not {"prompt", "gold"} <= set(columns):
        raise UserError(
            f"the training dataset has the columns {sorted(columns)}",
            "prompt and gold",
            "build it with build_training_dataset(samples, tokenizer), or pass reward_funcs",
        )
