"""The one-page example as a reference: it must have the trainer's loss and train without TRL."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from rest_rl.presets import get_preset
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.reward import compute_progress
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.tiny_policy import tiny_model, tiny_samples, tiny_settings, tiny_tokenizer

PATH = Path(__file__).parents[1] / "examples" / "rest_in_one_page.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("rest_in_one_page", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Compared(ResTTrainer):
    """Computes the page's loss next to every loss of the trainer, on the same batch and policy."""

    def __init__(self, page, **kwargs):
        super().__init__(**kwargs)
        self.page, self.pairs = page, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known, progress = self.tracker.statistics(), compute_progress(self.state)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fields = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        rollout = self.page.Rollout(*(inputs[name] for name in fields))
        logprobs_BT, entropies_BT = self.page.forward(model, rollout)
        old_BT = inputs.get("old_per_token_logps")
        expected, _, _ = self.page.rest_loss(
            logprobs_BT,
            logprobs_BT.detach() if old_BT is None else old_BT,
            entropies_BT,
            inputs["advantages"],
            rollout,
            self.processing_class,
            get_preset(self.args.preset),
            progress,
            known,
        )
        steps = self.args.gradient_accumulation_steps
        mine, theirs = (
            torch.autograd.grad(value, model.lm_head.weight, retain_graph=True)[0] for value in (loss, expected)
        )
        self.pairs.append(
            (
                loss.item() * steps,
                expected.item(),
                (mine * steps - theirs).abs().max().item(),
                theirs.abs().max().item(),
            )
        )
        return loss


@pytest.mark.parametrize("changes", [{}, {"preset": "rest_live"}, {"num_iterations": 2, "learning_rate": 0.05}])
def test_trainer_and_page_have_the_same_loss_and_gradient(page, tmp_path, changes):
    tokenizer = tiny_tokenizer()
    trainer = Compared(
        page,
        model=tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(tmp_path, max_steps=4, **changes)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(trainer.pairs) == 4
    assert any(scale > 0 for *_, scale in trainer.pairs)
    for mine, theirs, difference, scale in trainer.pairs:
        assert mine == pytest.approx(theirs, abs=1e-6)
        assert difference <= 1e-5 * max(scale, 1e-3)


def test_the_page_is_short():
    assert len(PATH.read_text().splitlines()) <= 200


def test_the_page_trains_without_trl(page):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = argparse.Namespace(preset="rest", steps=2, prompts=2, group=4, max_tokens=20, lr=1e-3, seed=0)
    history = page.train(model, tokenizer, arguments)
    assert len(history) == 2
    assert all(0 <= accuracy <= 1 for accuracy in history)
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
