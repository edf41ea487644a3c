"""Generation for evaluation: draws that run together, and prompts that are computed once."""

from __future__ import annotations

import types

import pytest

from rest_rl.evaluate import shared_attention
from rest_rl.evaluate.generate import Draw, EntropyMeter, generate, generate_draws
from rest_rl.evaluate.shared_attention import can_share
from tests.test_shared_prompts import NAMES, count_tokens, random_llama, unsupported
from tests.tiny_policy import tiny_tokenizer

PROMPTS = ["assistant:", "a a a assistant:", "a assistant:", "<think> a", "assistant:", "a a assistant: a"]
DRAWS = [Draw(1.0, 3), Draw(0.0), Draw(0.5, 3), Draw(1.0, 4)]
LIMITS = [40, 5, 40, 7, 38, 20]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def without_sharing(monkeypatch):
    monkeypatch.setattr(shared_attention, "can_share", lambda model: False)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_a_draw_does_not_depend_on_the_others(tokenizer, monkeypatch, batch_size):
    model, together, alone = random_llama(tokenizer), EntropyMeter(), EntropyMeter()
    settings = {"max_new_tokens": LIMITS, "batch_size": batch_size}
    found = generate_draws(model, tokenizer, PROMPTS, DRAWS, **settings, meter=together)
    without_sharing(monkeypatch)
    for draw, ids in zip(DRAWS, found, strict=True):
        own = {"temperature": draw.temperature, "seed": draw.seed, "meter": alone}
        assert ids == generate(model, tokenizer, PROMPTS, **settings, **own)
    assert together.mean == pytest.approx(alone.mean, rel=1e-5)
    assert len({tuple(ids[0]) for ids in found}) == len(DRAWS)  # the draws differ
    assert len(set(map(len, found[0]))) > 2


def test_each_prompt_is_computed_once_for_all_draws_and_equal_neighbors(tokenizer):
    model = random_llama(tokenizer)
    assert can_share(model)
    counts = count_tokens(model)
    prompts = ["a a a a", "a a a a", "b b b b", "b b b b"]
    width = len(tokenizer(prompts[0])["input_ids"])
    found = generate_draws(model, tokenizer, prompts, [Draw(1.0), Draw(0.0)], max_new_tokens=9, batch_size=4)
    assert sum(counts) == 2 * (width - 1) + sum(len(ids) for draw in found for ids in draw)


# `router_loss` cannot generate with transformers: its loss wants a mask of the tokens that a step computes.
@pytest.mark.parametrize("name", [*sorted({*NAMES} - {"router_loss"}), "unregistered"])
def test_every_model_generates_what_it_would_alone(tokenizer, monkeypatch, name):
    model = unregistered(tokenizer) if name == "unregistered" else unsupported(name, tokenizer)
    attention, settings = model.config._attn_implementation, {"max_new_tokens": 12, "batch_size": 3}
    model.train()
    found = generate(model, tokenizer, PROMPTS, **settings)
    assert model.training
    assert model.config._attn_implementation == attention
    assert can_share(model) == (name in ("absolute_positions", "attention_dropout"))
    without_sharing(monkeypatch)
    assert found == generate(model, tokenizer, PROMPTS, **settings)


def test_rounding_does_not_prevent_sharing(tokenizer):
    assert can_share(random_llama(tokenizer).bfloat16())


# A model of someone else's, whose attention does not ask transformers' registry.
def unregistered(tokenizer):
    model = random_llama(tokenizer)
    for layer in model.model.layers:
        forward = type(layer.self_attn).forward

        def own(self, *args, forward=forward, **kwargs):
            chosen, self.config._attn_implementation = self.config._attn_implementation, "sdpa"
            try:
                return forward(self, *args, **kwargs)
            finally:
                self.config._attn_implementation = chosen

        layer.self_attn.forward = types.MethodType(own, layer.self_attn)
    return model


def test_the_attention_is_put_back_after_an_error(tokenizer):
    model = random_llama(tokenizer)
    assert can_share(model)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2, on_token=lambda done: 1 // 0)
    assert model.config._attn_implementation == "sdpa"
