"""Exact policy gradients of sampled responses as flat vectors, and statistics of their tokens.

Shapes: B responses to one prompt, T tokens of the longest, V vocabulary, K weightings, N kept coordinates. Responses
follow the prompt and are padded on the right: column t of a (B, T) tensor is token t of its response.
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
from rest_rl.evaluate.shared_attention import can_share, compute_packed_logits, sharing, without_adapter
from rest_rl.loss import collision_mass, token_entropy


@dataclass(frozen=True)
class Coordinates:
    """Entries of the concatenated trainable parameters that a gradient vector keeps.

    A large model keeps a uniform random subset. An inner product over the subset times `scale` is an unbiased estimate
    of the inner product over all entries; ratios of inner products, such as cosines, need no scale.
    """

    # All prompts share one subset, so that their vectors can be multiplied. It is drawn before any gradient is
    # known: keeping the largest entries would bias every product. Memory is 4 N bytes per vector instead of 4 bytes per
    # parameter.
    parameter_sizes: tuple[int, ...]
    """Number of entries of each trainable parameter, in the order of `model.parameters()`."""
    indices_N: Tensor
    """int64 (N,), ascending."""

    @classmethod
    def choose(cls, model: Any, limit: int | None = 2**20, seed: int = 0) -> Coordinates:
        """Keep all entries if there are at most `limit` (None: no limit), else draw `limit` without replacement."""
        lengths = tuple(parameter.numel() for parameter in trainable_parameters(model))
        total = sum(lengths)
        if total == 0:
            raise UserError("the model has no trainable parameters", remedy="call model.requires_grad_()")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 coordinate, or None for all")
        if limit is None or total <= limit:
            return cls(lengths, torch.arange(total))
        return cls(lengths, torch.tensor(sorted(random.Random(seed).sample(range(total), limit))))

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def size(self) -> int:
        """Number of kept entries, the N in shapes."""
        return len(self.indices_N)

    @property
    def scale(self) -> float:
        """Number of all entries divided by the number of kept entries."""
        return self.num_parameters / self.size

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the kept entries of `gradients`, one per trainable parameter (None: zeros). Shape (N,), on the CPU."""
        # `indices_N` is sorted, so each parameter owns one contiguous slice: only the kept entries leave the device.
        starts = list(accumulate(self.parameter_sizes, initial=0))
        bounds = torch.searchsorted(self.indices_N, torch.tensor(starts)).tolist()
        vector_N = torch.zeros(self.size)
        for gradient, start, (low, high) in zip(gradients, starts, pairwise(bounds), strict=False):
            if gradient is not None and high > low:
                own = (self.indices_N[low:high] - start).to(gradient.device)
                vector_N[low:high] = gradient.detach().flatten()[own].float().cpu()
        return vector_N


class TokenStatistics(NamedTuple):
    """Log-probability, entropy (nats) and collision mass (1 - sum_v p_v²) of tokens at temperature 1; 0 for padding."""

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
    """Return the gradient of sum_i sum_t weights_KBT[k, i, t] log pi(y_it | prompt, y_i<t) for each k.

    Here y_it is token t of response i. With G responses of T_i tokens, advantages A_i, token weights w_it, and
    weights_KBT[k, i, t] = A_i w_it / (G T_i), this is the ascent direction of the on-policy GRPO objective: the
    negative gradient of `rest_rl.loss.clipped_surrogate` at ratio 1.

    The model runs at temperature 1 in evaluation mode; its `.grad` and its mode stay unchanged. Weights past the end of
    a response are ignored. The result is a sum over responses: split a batch that is too large for memory and add the
    results. Shape (K, N), N kept entries, float32, on the CPU.
    """
    # The objective is linear in the weights, so K weightings share one forward pass and its graph; each adds a backward
    # pass. `autograd.grad` does not touch `.grad`, and the last weighting that is not all 0 frees the graph.
    ids_BT, mask_BT = pad_responses(responses)
    if weights_KBT.ndim != 3 or weights_KBT.shape[1:] != ids_BT.shape:
        raise ValueError(f"weights are {tuple(weights_KBT.shape)}, expected (K, *{tuple(ids_BT.shape)})")
    parameters = trainable_parameters(model)
    if tuple(parameter.numel() for parameter in parameters) != coordinates.parameter_sizes:
        raise ValueError("coordinates belong to another model, expected the result of Coordinates.choose for this one")
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
    return coordinates.gather(torch.autograd.grad(value, parameters, retain_graph=retain, allow_unused=True))


@torch.no_grad()
def compute_token_statistics(
    model: Any, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]
) -> TokenStatistics:
    """Compute log-probability, entropy and collision mass of every response token in one forward pass."""
    ids_BT, mask_BT = pad_responses(responses)
    statistics = TokenStatistics(*(torch.zeros(ids_BT.shape, dtype=torch.float64) for _ in range(3)))
    if not mask_BT.any():
        return statistics
    with evaluation_mode(model):
        logits_BTV = compute_response_logits(model, prompt_ids, ids_BT, mask_BT)
    # Double precision for one response at a time: float64 logits of the whole batch could exceed memory, V is large.
    for row, mask_T in enumerate(mask_BT):
        logits_1TV = logits_BTV[row : row + 1, mask_T].double()
        ids_1T = ids_BT[row : row + 1, mask_T].to(logits_1TV.device)
        own = (gather_logps(logits_1TV, ids_1T), token_entropy(logits_1TV), collision_mass(logits_1TV))
        for values_BT, values_1T in zip(statistics, own, strict=True):
            values_BT[row, mask_T] = values_1T[0].cpu()
    return statistics


def pad_responses(responses: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return the ids of B responses, padded on the right to T tokens, and the mask of real tokens. Shapes (B, T)."""
    if not responses:
        raise ValueError("no responses, expected at least one")
    width = max(map(len, responses))
    ids_BT = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in responses], dtype=torch.long)
    lengths_B1 = torch.tensor([[len(row)] for row in responses])
    return ids_BT, torch.arange(width) < lengths_B1


def trainable_parameters(model: Any) -> list[Tensor]:
    """Return the parameters that require a gradient; tied parameters appear once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def compute_response_logits(model: Any, prompt_ids: Sequence[int], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the logits from which each response token was drawn. Shape (B, T, vocabulary), on the model's device.

    Where prompts can be shared, the prompt is computed once.
    """
    if not len(prompt_ids):
        raise ValueError("the prompt is empty, expected at least one token, which yields the first logits")
    if can_share(model) and mask_BT.any():
        responses = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        with sharing(model):
            return compute_packed_logits(model, [list(prompt_ids)] * len(responses), responses)
    batch, width = ids_BT.shape
    prompt_BP = torch.tensor([list(prompt_ids)] * batch, dtype=torch.long)
    mask_BS = torch.cat([torch.ones_like(prompt_BP), mask_BT.long()], dim=1)
    settings: dict[str, Any] = {"use_cache": False}
    # If the model can, skip the vocabulary projection of the prompt: (B, P, V) logits are most of the memory.
    if "logits_to_keep" in inspect.signature(without_adapter(model).forward).parameters:
        settings["logits_to_keep"] = width + 1
    output = model(
        input_ids=torch.cat([prompt_BP, ids_BT], dim=1).to(model.device),
        attention_mask=mask_BS.to(model.device),
        **settings,
    )
    # The logits at position t - 1 predict token t: from the last prompt token to the last but one of the response.
    return output.logits[:, -width - 1 : -1]


def gather_logps(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens `ids_BT`. Shape (B, T), float64 for float64 logits, else float32."""
    logits_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return logits_BTV.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode inside the block; restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
