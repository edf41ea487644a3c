"""Exact policy gradients of sampled responses, as plain vectors, and what each of their tokens looks like.

Shapes: B responses to one prompt, T tokens of the longest, V vocabulary, K weightings, N kept coordinates. Responses
stand right padded after the prompt, so that column t of a (B, T) tensor is token t of its response.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rest_rl.errors import UserError
from rest_rl.loss import collision_mass, token_entropy


@dataclass(frozen=True)
class Coordinates:
    """Which entries of the trainable parameters, laid end to end, a gradient vector holds.

    Of a large model a uniform random subset is kept: an inner product over it times `scale` is an unbiased estimate of
    that over all entries, and a ratio of inner products (a cosine, eff) needs no scale.
    """

    parameter_sizes: tuple[int, ...]
    """Entries of each trainable parameter, in the order of `model.parameters()`."""
    indices_N: Tensor
    """int64 (N,), ascending."""

    @classmethod
    def choose(cls, model: Any, limit: int | None = 2**20, seed: int = 0) -> Coordinates:
        """All entries where there are at most `limit` (None: no limit), else `limit` of them drawn without repeats."""
        lengths = tuple(parameter.numel() for parameter in trainable_parameters(model))
        total = sum(lengths)
        if total == 0:
            raise UserError("a model without trainable parameters", "some", "call model.requires_grad_()")
        if limit is not None and limit < 1:
            raise ValueError(f"got a limit of {limit} coordinates, expected at least 1, or None for all")
        if limit is None or total <= limit:
            return cls(lengths, torch.arange(total))
        return cls(lengths, torch.tensor(sorted(random.Random(seed).sample(range(total), limit))))

    @property
    def num_parameters(self) -> int:
        """Number of trainable entries."""
        return sum(self.parameter_sizes)

    @property
    def size(self) -> int:
        """N."""
        return len(self.indices_N)

    @property
    def scale(self) -> float:
        """All entries per kept one."""
        return self.num_parameters / self.size

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The kept entries of one gradient tensor (None: zeros) per trainable parameter: float32 (N,) on the CPU."""
        starts = list(accumulate(self.parameter_sizes, initial=0))
        bounds = torch.searchsorted(self.indices_N, torch.tensor(starts)).tolist()
        vector_N = torch.zeros(self.size)
        for gradient, start, (low, high) in zip(gradients, starts, pairwise(bounds), strict=False):
            if gradient is not None and high > low:
                own = (self.indices_N[low:high] - start).to(gradient.device)
                vector_N[low:high] = gradient.detach().flatten()[own].float().cpu()
        return vector_N


class TokenStatistics(NamedTuple):
    """Per token, at temperature 1: log pi of the token, H in nats, 1 - sum_v p_v²; float64 on the CPU, 0 on padding."""

    logps_BT: Tensor
    entropies_BT: Tensor
    collisions_BT: Tensor


def compute_weighted_gradients(
    model: Any,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    weights_KBT: Tensor,
    coordinates: Coordinates,
) -> Tensor:
    """Gradient of sum_i sum_t weights[k, i, t] log pi(y_it | prompt, y_i<t) for each k: float32 (K, N) on the CPU.

    One forward pass, K backward passes, evaluation mode, temperature 1. With weights A_i w_it / (G T_i) it is the
    ascent direction of the GRPO objective on-policy (`rest_rl.loss.clipped_surrogate` at ratio 1, with its sign
    turned). Weights past a response's end are ignored. The model, its `.grad` and its mode stay as they were. The sum
    runs over responses, so a batch too large for memory may be cut and the results added.
    """
    ids_BT, mask_BT = pad_responses(responses)
    if weights_KBT.ndim != 3 or weights_KBT.shape[1:] != ids_BT.shape:
        raise ValueError(f"got weights {tuple(weights_KBT.shape)}, expected (K, *{tuple(ids_BT.shape)})")
    parameters = trainable_parameters(model)
    if tuple(parameter.numel() for parameter in parameters) != coordinates.parameter_sizes:
        raise ValueError("got coordinates of another model, expected those that Coordinates.choose gives for this one")
    weights_KBT = torch.where(mask_BT, weights_KBT, 0)
    vectors_KN = torch.zeros(len(weights_KBT), coordinates.size)
    live = [k for k in range(len(weights_KBT)) if weights_KBT[k].any()]
    if not live:
        return vectors_KN
    with evaluation_mode(model), torch.enable_grad():
        logits_BTV = compute_response_logits(model, prompt_ids, ids_BT, mask_BT)
        logps_BT = gather_logps(logits_BTV, ids_BT.to(logits_BTV.device))
        for k in live:
            total = (logps_BT * weights_KBT[k].to(logps_BT)).sum()
            vectors_KN[k] = gather_gradient(total, parameters, coordinates, retain=k != live[-1])
    return vectors_KN


def gather_gradient(value: Tensor, parameters: Sequence[Tensor], coordinates: Coordinates, *, retain: bool) -> Tensor:
    """The kept entries of a scalar's gradient: float32 (N,) on the CPU."""
    return coordinates.gather(torch.autograd.grad(value, parameters, retain_graph=retain, allow_unused=True))


@torch.no_grad()
def compute_token_statistics(
    model: Any, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]
) -> TokenStatistics:
    """Log-probability, entropy and collision mass of every token of the responses, from one forward pass."""
    ids_BT, mask_BT = pad_responses(responses)
    found = TokenStatistics(*(torch.zeros(ids_BT.shape, dtype=torch.float64) for _ in range(3)))
    if not mask_BT.any():
        return found
    with evaluation_mode(model):
        logits_BTV = compute_response_logits(model, prompt_ids, ids_BT, mask_BT)
    for row, mask_T in enumerate(mask_BT):  # in double precision, one response at a time: V may be large
        logits_1TV = logits_BTV[row : row + 1, mask_T].double()
        ids_1T = ids_BT[row : row + 1, mask_T].to(logits_1TV.device)
        own = (gather_logps(logits_1TV, ids_1T), token_entropy(logits_1TV), collision_mass(logits_1TV))
        for values_BT, values_1T in zip(found, own, strict=True):
            values_BT[row, mask_T] = values_1T[0].cpu()
    return found


def pad_responses(responses: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Responses as (ids_BT, mask_BT), right padded."""
    if not responses:
        raise ValueError("got no responses, expected at least one")
    width = max(map(len, responses))
    ids_BT = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in responses], dtype=torch.long)
    lengths_B1 = torch.tensor([[len(row)] for row in responses])
    return ids_BT, torch.arange(width) < lengths_B1


def trainable_parameters(model: Any) -> list[Tensor]:
    """The parameters that gradients are taken for, tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def compute_response_logits(model: Any, prompt_ids: Sequence[int], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The logits from which each token of the responses was drawn: (B, T, V) on the model's device."""
    if not len(prompt_ids):
        raise ValueError("got an empty prompt, expected at least one token for the first logits to come from")
    batch, width = ids_BT.shape
    prompt_BP = torch.tensor([list(prompt_ids)] * batch, dtype=torch.long)
    mask_BS = torch.cat([torch.ones_like(prompt_BP), mask_BT.long()], dim=1)
    settings: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = width + 1
    output = model(
        input_ids=torch.cat([prompt_BP, ids_BT], dim=1).to(model.device),
        attention_mask=mask_BS.to(model.device),
        **settings,
    )
    return output.logits[:, -width - 1 : -1]


def gather_logps(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probability of the chosen tokens, in float32 at least: (B, T)."""
    logits_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return logits_BTV.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode within, the former mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
