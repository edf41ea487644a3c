from __future__ import annotations

import types
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PrinterCallback,
    set_seed,
)

from rest_rl.evaluate.shared_attention import ATTENTION, Segment, _ResponseLayer, generate_shared, pack
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.shared_prompts import regroup
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.tiny_policy import (
    copy_parameters,
    logged_steps,
    scripted_completions,
    tiny_model,
    tiny_samples,
    tiny_settings,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def saved_model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tokenizer).save_pretrained(folder)
    return str(folder)


class Trainer(ResTTrainer):
    """Keeps the gradients of every optimizer step."""

    def _clip_grad_norm(self, model):
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad})
        return super()._clip_grad_norm(model)


def make_trainer(model, tokenizer, folder, *, peft_config=None, rollout_func=None, samples=8, **changes):
    trainer = Trainer(
        model,
        args=ResTConfig(**tiny_settings(folder, **{"preset": "grpo", **changes})),
        train_dataset=build_training_dataset(tiny_samples(samples), tokenizer),
        processing_class=tokenizer,
        peft_config=peft_config,
        rollout_func=rollout_func,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.gradients = []
    return trainer


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None}


def random_llama(tokenizer, **changes):
    """A model whose weights are large enough that a wrong mask or position changes every probability."""
    torch.manual_seed(1)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings, **changes))


def distance(ours, reference):
    """The relative L2 distance of two sets of gradients."""
    assert ours.keys() == reference.keys()
    difference = sum((ours[name] - reference[name]).double().square().sum() for name in reference)
    return (difference / sum(value.double().square().sum() for value in reference.values())).sqrt().item()


# Packing


def test_a_packed_row_by_hand():
    # Rows 0 and 2 share the prompt [1, 2, 3]; row 3 is empty. Pieces start at the prompt's last token.
    packed = pack([[1, 2, 3], [4], [1, 2, 3], [4]], [[7, 8], [9], [5, 6, 5], []])
    assert packed.ids == [1, 2, 3, 7, 3, 5, 6, 4]
    assert packed.positions == [0, 1, 2, 3, 2, 3, 4, 0]
    assert packed.segments == [Segment(0, 2, (4, 7)), Segment(7, 7, (8,))]
    assert packed.scored == [2, 3, 4, 5, 6, 7]
    assert packed.labels == [7, 8, 5, 6, 5, 9]
    assert packed.rows == [0, 0, 2, 2, 2, 1]
    assert packed.columns == [0, 1, 0, 1, 2, 0]


TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(st.lists(st.tuples(TOKENS, st.lists(st.integers(1, 9), max_size=5)), max_size=8))
def test_every_token_is_predicted_once_from_its_own_past(rows):
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    packed = pack(prompts, responses)
    places = list(zip(packed.rows, packed.columns, strict=True))
    predicted = dict(zip(places, packed.labels, strict=True))
    assert predicted == {(b, t): token for b, ids in enumerate(responses) for t, token in enumerate(ids)}
    pieces = [(s, begin, end) for s in packed.segments for begin, end in zip((s.middle, *s.ends), s.ends, strict=False)]
    at = dict(zip(packed.scored, places, strict=True))
    for segment, begin, end in pieces:
        for position in range(begin, end):
            row, column = at[position]
            past = packed.ids[segment.start : segment.middle] + packed.ids[begin : position + 1]
            assert past == [*prompts[row], *responses[row][:column]]
            assert packed.positions[position] == len(past) - 1


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_regrouping_moves_whole_rows(order):
    prompt_ids = torch.tensor([[0, p + 1] for p in order])
    names = torch.arange(8)
    whole = {"prompt_ids": prompt_ids, "prompt_mask": torch.tensor([[0, 1]] * 8), "names": names, "total": names.sum()}
    parts = [{key: value[i : i + 4] if value.dim() else value for key, value in whole.items()} for i in (0, 4)]
    regroup(parts)
    rows = [name for part in parts for name in part["names"].tolist()]
    assert sorted(rows) == list(range(8))
    assert torch.cat([part["prompt_ids"] for part in parts]).equal(prompt_ids[rows])
    adjacent = [order[row] for row in rows]
    assert adjacent == sorted(adjacent, key=list(dict.fromkeys(order)).index)
    assert all(part["total"] == 28 for part in parts)


# The loss


RAGGED = [([5, 9, 2, 7], 6), ([5, 9, 2, 7], 3), ([8, 2], 6), ([5, 9, 2, 7], 0), ([8, 2], 1), ([3, 3, 3, 4, 5], 5)]
"""Prompts and lengths of responses: in disorder, left-padded, ragged, one empty."""


def ragged_batch(vocabulary):
    generator = torch.Generator().manual_seed(3)
    T, P = max(length for _, length in RAGGED), max(len(prompt) for prompt, _ in RAGGED)
    responses = torch.randint(1, vocabulary, (len(RAGGED), T), generator=generator)
    prompts = torch.tensor([[0] * (P - len(prompt)) + prompt for prompt, _ in RAGGED])
    mask = [[0] * (P - len(prompt)) + [1] * (len(prompt) + n) + [0] * (T - n) for prompt, n in RAGGED]
    return torch.cat([prompts, responses], 1), torch.tensor(mask), T


def plain_figures(model, ids, mask, T):
    """Log-probabilities and entropies as transformers computes them, without TRL."""
    logps_BTV = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1].log_softmax(-1)
    logps_BT = logps_BTV.gather(-1, ids[:, -T:, None])[..., 0]
    return logps_BT * mask[:, -T:], -(logps_BTV.exp() * logps_BTV).sum(-1) * mask[:, -T:]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_entropies_and_gradients_are_those_of_the_plain_model(tokenizer, tmp_path, checkpointing):
    model, reference = random_llama(tokenizer), random_llama(tokenizer)
    trainer = make_trainer(model, tokenizer, tmp_path)
    assert trainer.not_shared is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids, mask, T = ragged_batch(len(tokenizer))
    logps_BT, entropies_BT, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, T, compute_entropy=True, compute_aux_loss=False
    )
    logps, entropies = plain_figures(reference, ids, mask, T)
    torch.testing.assert_close(logps_BT, logps, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropies_BT, entropies, atol=2e-5, rtol=0)
    functional = torch.randn(logps.shape, generator=torch.Generator().manual_seed(4))
    (logps_BT * functional).sum().backward()
    (logps * functional).sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (model, reference)]
    assert distance(*gradients) < 5e-6
    in_chunks = trainer._get_per_token_logps_and_entropies(model, ids, mask, T, batch_size=4)[0]
    torch.testing.assert_close(in_chunks, logps, atol=2e-5, rtol=0)


def see_one_more(packed):
    return packed._replace(segments=[s._replace(ends=(*s.ends[1:], s.ends[-1])) for s in packed.segments])


def no_restart(packed):
    return packed._replace(positions=list(range(len(packed.ids))))


@pytest.mark.parametrize("spoil", [see_one_more, no_restart])
def test_a_wrong_layout_would_show(tokenizer, tmp_path, spoil):
    trainer = make_trainer(random_llama(tokenizer), tokenizer, tmp_path)
    packed = pack([[5, 9, 2, 7], [5, 9, 2, 7], [8, 2]], [[3, 4, 5], [6, 7, 8], [9, 9]])
    with torch.no_grad():
        right, wrong = (trainer._score(trainer.model, p).log_probs for p in (packed, spoil(packed)))
    assert (right - wrong).abs().max() > 1e-2


def count_tokens(model):
    counts = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: counts.append(output.shape[1] * len(output))
    )
    return counts


def test_the_model_computes_fewer_tokens(tokenizer, tmp_path):
    ids, mask, T = ragged_batch(len(tokenizer))
    tokens = {}
    for shares in (False, True):
        model = random_llama(tokenizer)
        trainer = make_trainer(model, tokenizer, tmp_path, share_prompts=shares)
        counts = count_tokens(model)
        trainer._get_per_token_logps_and_entropies(model, ids, mask, T)
        tokens[shares] = sum(counts)
    # Stock: 6 rows x (5 + 6). Shared: prompts without their last tokens (3 + 1 + 4), and 21 scored positions.
    assert tokens == {False: 66, True: 8 + 21}


# Whole runs against stock

RUNS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "groups_split": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "checkpointed": {"gradient_checkpointing": True, "activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "two_iterations": {"num_iterations": 2, "max_steps": 4},
    "two_steps_per_batch": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
    },
    "dapo_truncated": {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 12},
    "sampling": {"top_p": 0.9, "temperature": 0.8, "max_completion_length": 12},
    "kl": {"beta": 0.1},
    "rest": {"preset": "rest"},
    "resampled": {"resample_rounds": 1, "samples": 40},
    "rule_with_entropies": {"weights": {"rule": "top_entropy"}},
}


def run_both(saved_model, tokenizer, folder, **changes):
    runs = []
    for shares in (False, True):
        set_seed(0)
        trainer = make_trainer(saved_model, tokenizer, folder, share_prompts=shares, **changes)
        assert trainer.not_shared is None
        trainer.train()
        runs.append(trainer)
    return runs


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_equals_the_stock_run(saved_model, tokenizer, tmp_path, changes):
    stock, shared = run_both(saved_model, tokenizer, tmp_path, **changes)
    for before, after in zip(logged_steps(stock), logged_steps(shared), strict=True):
        for name in ("reward", "rest/exact_match", "completions/mean_length"):
            assert after.get(name) == before.get(name)
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5, abs=1e-6)
    errors = [distance(ours, theirs) for ours, theirs in zip(shared.gradients, stock.gradients, strict=True)]
    assert errors[0] < 1e-5
    assert max(errors) < 1e-3  # Adam divides tiny gradients by their own size, so differences grow


def test_a_lora_run_equals_the_stock_run(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    runs = []
    for shares in (False, True):
        torch.manual_seed(0)
        settings = {"share_prompts": shares, "activation_checkpointing": True, "rollout_func": scripted_completions}
        trainer = make_trainer(random_llama(tokenizer), tokenizer, tmp_path, peft_config=config, **settings)
        trainer.train()
        runs.append(trainer)
    assert runs[1].not_shared is None
    assert all(any(value.abs().sum() for value in step.values()) for step in runs[0].gradients)
    errors = [distance(ours, theirs) for theirs, ours in zip(runs[0].gradients, runs[1].gradients, strict=True)]
    assert errors[0] < 1e-5


def test_bf16_gradients_are_as_close_to_stock_as_bf16_allows(saved_model, tokenizer, tmp_path):
    # In step 1 a group has no spread: its forward pass without gradients must not cut off the others' gradients.
    stock, shared = run_both(saved_model, tokenizer, tmp_path, bf16=True, max_steps=1)
    assert logged_steps(stock)[0]["frac_reward_zero_std"] == 0.5
    assert distance(shared.gradients[0], stock.gradients[0]) < 2e-2


# Groups without spread


def test_a_step_without_any_spread_trains_like_stock(tokenizer, tmp_path):
    """All gradients are 0, but Adam's momentum from the step before still moves the weights."""
    runs = []
    for shares in (False, True):
        set_seed(0)
        trainer = make_trainer(tiny_model(tokenizer), tokenizer, tmp_path, share_prompts=shares, max_steps=2)
        plain = trainer.reward_funcs[0]
        trainer.reward_funcs[0] = lambda *args, t=trainer, f=plain, **columns: [
            0.0 if t.state.global_step else reward for reward in f(*args, **columns)
        ]
        backward = count_backward_tokens(trainer.model)
        trainer.train()
        runs.append((trainer, backward))
    (stock, _), (shared, backward) = runs
    assert [step["frac_reward_zero_std"] for step in logged_steps(shared)] == [0.5, 1.0]
    assert not any(value.any() for value in shared.gradients[1].values())
    start = copy_parameters(tiny_model(tokenizer))
    moved = [{name: value - start[name] for name, value in copy_parameters(t.model).items()} for t in (shared, stock)]
    assert distance(*moved) < 1e-3
    # One backward pass in two steps, over one of the two groups.
    assert len(backward) == 1


def count_backward_tokens(model):
    counts = []

    def note(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.append(gradient.shape[1]))

    model.model.norm.register_forward_hook(note)
    return counts


# Generation


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"temperature": 0.7, "top_k": 5}])
def test_generated_tokens_are_those_of_stock(tokenizer, tmp_path, sampling):
    prompts = [[5, 9, 2, 7, 4, 4], [8, 2], [3, 3, 3]]
    rows = [prompt for prompt in prompts for _ in range(4)]
    found, counts = {}, {}
    for shares in (False, True):
        model = random_llama(tokenizer)
        settings = {"generation_kwargs": sampling, "max_completion_length": 40}
        trainer = make_trainer(model, tokenizer, tmp_path, share_prompts=shares, **settings)
        counts[shares] = count_tokens(model)
        set_seed(5)
        found[shares] = trainer._generate_single_turn(rows, None, {}, 4)[0]
        assert "generate" not in vars(model)
    assert found[True] == found[False]
    assert len({tuple(row) for row in found[True]}) > 1
    longest = max(map(len, found[True]))
    assert longest > 33  # the buffer of 32 tokens has grown
    assert sum(counts[False]) == 12 * 6 + 12 * (longest - 1)  # 12 rows, padded to 6 tokens
    # 3 prompts without their last tokens, and a row for each token of a response: none after its end.
    assert sum(counts[True]) == 3 * 5 + sum(map(len, found[True]))


@pytest.mark.parametrize("adapted", [False, True])
def test_prompts_whose_responses_have_ended_leave_the_cache(tokenizer, monkeypatch, adapted):
    kept = []

    def keep(layer, groups, rows):
        usual(layer, groups, rows)
        kept.append((len(layer.prompt_keys), len(layer.buffers[0])))

    usual = _ResponseLayer.keep
    monkeypatch.setattr(_ResponseLayer, "keep", keep)
    model = random_llama(tokenizer)
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    ends = list(range(20, 60))
    prompts = torch.tensor([[5, 9, 20], [8, 2, 4], [3, 3, 3], [6, 6, 20]])  # the end of a prompt ends no response
    options = {
        "input_ids": prompts.repeat_interleave(3, 0),
        "attention_mask": torch.ones(12, 3, dtype=torch.long),
        "generation_config": GenerationConfig(max_new_tokens=50, do_sample=True, eos_token_id=ends, pad_token_id=0),
    }
    found = []
    for shares in (False, True):
        set_seed(7)
        model.set_attn_implementation(ATTENTION if shares else "sdpa")
        generate = partial(generate_shared, model, model.generate, 3) if shares else model.generate
        with torch.no_grad():
            found.append(generate(**options))
    assert torch.equal(*found)
    assert kept == [(groups, 3 * groups) for groups in (2, 2, 1, 1)]  # in two layers


@pytest.mark.parametrize("rows", [[[5, 6]] * 3, [[5, 6], [5, 6], [5, 6], [7, 7]], [[5]] * 4])
def test_rows_that_are_not_whole_groups_are_generated_as_usual(tokenizer, tmp_path, rows):
    found = []
    for shares in (False, True):
        trainer = make_trainer(random_llama(tokenizer), tokenizer, tmp_path, share_prompts=shares)
        set_seed(5)
        found.append(trainer._generate_single_turn(rows, None, {}, 4)[0])
    assert found[0] == found[1]


# Models and settings that cannot share


def unsupported(name, tokenizer):
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if name == "sliding_window":
        return MistralForCausalLM(MistralConfig(**SIZES, **size, sliding_window=4))
    if name == "sliding_layers":
        kinds = ["sliding_attention", "full_attention"]
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **size, head_dim=8, sliding_window=4, layer_types=kinds))
    if name == "router_loss":
        return MixtralForCausalLM(
            MixtralConfig(**SIZES, **size, num_local_experts=2, output_router_logits=True, sliding_window=None)
        )
    if name == "absolute_positions":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **size)
        )
    if name == "attention_dropout":
        return random_llama(tokenizer, attention_dropout=0.1)
    if name == "eager":
        return random_llama(tokenizer, attn_implementation="eager")
    model = random_llama(tokenizer)
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def forget(self, *args, segments=None, **kwargs):  # a model of someone else's, which drops what it does not know
        return forward(self, *args, **kwargs)

    attention.forward = types.MethodType(forget, attention)
    return model


NAMES = [
    "sliding_window",
    "sliding_layers",
    "router_loss",
    "absolute_positions",
    "attention_dropout",
    "eager",
    "foreign",
]


@pytest.mark.parametrize("name", NAMES)
def test_models_that_cannot_share_run_as_usual_with_one_warning(tokenizer, tmp_path, name):
    model = unsupported(name, tokenizer)
    before = model.config._attn_implementation
    settings = {"disable_dropout": False, "router_aux_loss_coef": 0.01 if name == "router_loss" else 0.0}
    with pytest.warns(UserWarning, match="not shared") as caught:
        trainer = make_trainer(model, tokenizer, tmp_path, rollout_func=scripted_completions, **settings)
    assert len([w for w in caught if "not shared" in str(w.message)]) == 1
    assert trainer.not_shared
    assert model.config._attn_implementation == before
    ids, mask, T = ragged_batch(len(tokenizer))
    model.eval()
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, T, compute_entropy=True)[0]
        expected, _ = plain_figures(unsupported(name, tokenizer).eval(), ids, mask, T)
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=0)
    model.train()
    trainer.train()
    assert trainer.state.global_step == 3


def test_without_sharing_only_the_responses_reach_the_head(tokenizer, tmp_path):
    ids, mask, T = ragged_batch(len(tokenizer))
    model = unsupported("eager", tokenizer)
    with pytest.warns(UserWarning, match="not shared"):
        trainer = make_trainer(model, tokenizer, tmp_path)
    lengths = []
    model.model.register_forward_hook(lambda module, inputs, output: lengths.append(output.last_hidden_state.shape[1]))
    trainer._get_per_token_logps_and_entropies(model, ids, mask, T)
    with trainer.accelerator.autocast():
        output = model(input_ids=ids, attention_mask=mask)
    assert lengths == [11, 11]  # the hook runs before ours narrows it
    assert output.logits.shape[1] == 11


@pytest.mark.parametrize("settings", [{"bf16": True}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_prevent_sharing(tokenizer, tmp_path, dtype, settings):
    trainer = make_trainer(random_llama(tokenizer).to(dtype), tokenizer, tmp_path, **settings)
    assert trainer.not_shared is None
    assert trainer.accelerator.autocast_handler is None


def test_off_means_off(tokenizer, tmp_path):
    model = random_llama(tokenizer)
    trainer = make_trainer(model, tokenizer, tmp_path, share_prompts=False)
    assert trainer.not_shared is None
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_shows_no_trace(tokenizer, tmp_path):
    model = random_llama(tokenizer)
    trainer = make_trainer(model, tokenizer, tmp_path)
    assert model.config._attn_implementation == ATTENTION
    trainer.save_model(str(tmp_path / "saved"))
    assert ATTENTION not in (tmp_path / "saved" / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    ids, mask, _ = ragged_batch(len(tokenizer))
    ours = model.eval()(input_ids=ids, attention_mask=mask).logits
    assert ours.equal(again.eval()(input_ids=ids, attention_mask=mask).logits)
