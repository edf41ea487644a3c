"""Excess surprise: sums by hand, zero for tokens drawn from the scored distribution, nonzero for any other."""

from __future__ import annotations

import math

import pytest
import torch

from rest_rl.train.weighing import compute_surprise_metrics, sum_surprise
from tests.test_trl_trainer import logged_steps, rest_trainer, tokenizer, trained  # noqa: F401


def test_sums_and_metrics_by_hand() -> None:
    # Response 1: surprises 1 and 3 over entropies 2 and 1.5, excess 0.5; response 2: 0.25 over 1, excess -0.75, its
    # second token masked.
    logps_BT = torch.tensor([[-1.0, -3.0], [-0.25, math.nan]])
    entropies_BT = torch.tensor([[2.0, 1.5], [1.0, 9.0]])
    sums_4 = sum_surprise(logps_BT, entropies_BT, torch.tensor([[1, 1], [1, 0]]))
    assert sums_4.tolist() == [3.0, 4.5, -0.25, 0.25 + 0.5625]
    metrics = compute_surprise_metrics(sums_4)
    assert metrics["rest/surprise/excess"] == pytest.approx(-0.25 / 3)
    assert metrics["rest/surprise/error"] == pytest.approx(math.sqrt(0.8125) / 3)
    assert metrics["rest/surprise/nats"] == 4.5


def test_no_tokens_give_no_metrics() -> None:
    assert compute_surprise_metrics(sum_surprise(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3))) == {}


def sampled(temperature: float, top: int | None = None, responses: int = 4000) -> dict[str, float]:
    """Responses of up to 8 tokens from 16, sampled at a temperature from the `top` likeliest, scored at temperature 1.

    Token 0 ends a response, so its length depends on the samples.
    """
    generator = torch.Generator().manual_seed(0)
    logits_BTV = 1.5 * torch.randn(responses, 8, 16, generator=generator)
    logps_BTV = logits_BTV.log_softmax(-1)
    kept_BTV = logits_BTV / temperature
    if top is not None:
        least = kept_BTV.topk(top, dim=-1).values[..., -1:]
        kept_BTV = kept_BTV.masked_fill(kept_BTV < least, -math.inf)
    ids_BT = torch.multinomial(kept_BTV.softmax(-1).flatten(0, 1), 1, generator=generator).view(responses, 8)
    ended_BT = (ids_BT == 0).long().cumsum(-1)
    mask_BT = (ended_BT - (ids_BT == 0).long()) == 0
    entropies_BT = -(logps_BTV.exp() * logps_BTV).sum(-1)
    return compute_surprise_metrics(
        sum_surprise(logps_BTV.gather(-1, ids_BT[..., None])[..., 0], entropies_BT, mask_BT)
    )


def test_samples_of_the_scored_distribution_have_no_excess() -> None:
    metrics = sampled(1.0)
    assert abs(metrics["rest/surprise/excess"]) < 3 * metrics["rest/surprise/error"]


@pytest.mark.parametrize(("temperature", "top", "sign"), [(0.9, None, -1), (1.1, None, 1), (1.0, 8, -1)])
def test_samples_of_another_distribution_have_excess(temperature: float, top: int | None, sign: int) -> None:
    metrics = sampled(temperature, top)
    assert sign * metrics["rest/surprise/excess"] > 10 * metrics["rest/surprise/error"]


def test_surprise_is_logged_on_the_first_step_of_a_batch(tokenizer, tmp_path) -> None:  # noqa: F811
    once = logged_steps(trained(rest_trainer(tokenizer, tmp_path)))
    assert all("rest/surprise/excess" in row for row in once)
    twice = logged_steps(trained(rest_trainer(tokenizer, tmp_path, num_iterations=2, max_steps=4)))
    assert ["rest/surprise/excess" in row for row in twice] == [True, False, True, False]
    masked = logged_steps(trained(rest_trainer(tokenizer, tmp_path, mask_truncated_completions=True)))
    assert not any("rest/surprise/excess" in row for row in masked)


def test_micro_batches_add_up_to_the_batch(tokenizer, tmp_path) -> None:  # noqa: F811
    whole = logged_steps(trained(rest_trainer(tokenizer, tmp_path, max_steps=1)))[0]
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    split = logged_steps(trained(rest_trainer(tokenizer, tmp_path, **halves)))[0]
    keys = [key for key in whole if key.startswith(("rest/surprise/", "rest/rule_weight/"))]
    assert len(keys) == 3 + 6
    assert {key: split[key] for key in keys} == pytest.approx({key: whole[key] for key in keys}, rel=1e-4)
