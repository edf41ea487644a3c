"""The expected squared norm of a token's score, from one backward pass per position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rest_rl.probe.gradients import (
    Coordinates,
    compute_response_logits,
    evaluation_mode,
    gather_gradient,
    pad_responses,
    trainable_parameters,
)


def expected_squares(
    model: Any, prompt_ids: Sequence[int], response: Sequence[int], coordinates: Coordinates, seed: int = 0
) -> Tensor:
    """Return an unbiased estimate of E_y |grad log pi(y | prompt, y_<t)|² at each position t.

    The expectation is over all tokens y of the vocabulary. Shape (T,), T response tokens, float64, on the CPU.
    """
    # A sum over V tokens would need V backward passes. With the Jacobian J of the logits, q = sqrt(p) and random signs
    # e, E_e |J'(q e - p (q . e))|² has the same expectation, because (diag q - p q')(diag q - p q')' = diag p - p p',
    # the covariance of the score: one backward pass per position. An average over sampled tokens would depend on rare
    # events: a token of probability 0.999 is almost never missing from the sample.
    parameters = trainable_parameters(model)
    squares_T = torch.zeros(len(response), dtype=torch.float64)
    if not len(response):
        return squares_T
    ids_BT, mask_BT = pad_responses([response])
    with evaluation_mode(model), torch.enable_grad():
        logits_TV = compute_response_logits(model, prompt_ids, ids_BT, mask_BT)[0]
        p_TV = logits_TV.detach().double().softmax(-1)
        signs = torch.randint(0, 2, p_TV.shape, generator=torch.Generator().manual_seed(seed))
        q_TV = p_TV.sqrt() * (2 * signs - 1).to(p_TV)
        probes_TV = (q_TV - p_TV * q_TV.sum(-1, keepdim=True)).to(logits_TV)
        for t in range(len(response)):
            along = (logits_TV[t] * probes_TV[t]).sum()
            vector_N = gather_gradient(along, parameters, coordinates, retain=t + 1 < len(response))
            squares_T[t] = coordinates.scale * vector_N.double().square().sum()
    return squares_T
