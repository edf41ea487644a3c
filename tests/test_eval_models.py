"""Replies of a local model: batches, limits, overflow, memory, and no side effects on training."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, OPTConfig, Qwen3ForCausalLM

from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import Dialogue, ToolSample, decompose
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.evaluate.generate import generate
from rest_rl.evaluate.models.local import LocalModel, can_exceed_context, context_length
from rest_rl.evaluate.models.vllm import VllmModel
from rest_rl.evaluate.shared_attention import can_share
from rest_rl.regions import decode_ids
from rest_rl.response import Gold
from tests.model_families import DIALOGUES, FAMILIES, family_model, family_tokenizer
from tests.tiny_policy import PAD, tiny_model, tiny_tokenizer


def asked(text: str, identity: str = "s") -> Request:
    return Request(ToolSample(identity, ({"role": "user", "content": text},), (), Gold((), None)))


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer).eval(), PromptLayout(tokenizer, "toolrl")


def family_requests() -> list[Request]:
    dialogues = [Dialogue(row["id"], tuple(row["messages"]), tuple(row["tools"])) for row in DIALOGUES]
    return [Request(sample) for dialogue in dialogues for sample in decompose(dialogue)]


@pytest.mark.parametrize("family", ["qwen3", "llama3_2", "mistral"])
def test_batches_of_any_size_give_the_same_texts(family: str) -> None:
    tokenizer = family_tokenizer(family)
    layout, model = PromptLayout(tokenizer, FAMILIES[family].tool_format), family_model(family, tokenizer).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # at their small initial size only the last token would matter
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    requests = family_requests()[:6]
    one = LocalModel(model, layout, batch_size=1, max_new_tokens=12)
    many = LocalModel(model, layout, batch_size=6, max_new_tokens=12)
    alone = [one.respond([request])[0] for request in requests]
    assert many.respond(requests) == alone
    assert len({reply.text for reply in alone}) > 2
    assert all(reply.tokens and not reply.overflow and not reply.error for reply in alone)
    assert [reply.prompt_tokens for reply in alone] == [layout.count_tokens(request.sample) for request in requests]
    assert len({reply.prompt_tokens for reply in alone}) > 2  # there was padding


def test_a_reply_is_the_greedy_text_without_its_end(tiny) -> None:
    model, layout = tiny
    request = asked("do it")
    reply = LocalModel(model, layout, batch_size=4, max_new_tokens=60).respond([request])[0]
    ids = generate(
        model, layout.tokenizer, [layout.render(request.sample)], max_new_tokens=60, batch_size=1, temperature=0
    )[0]
    assert ids[-1] == layout.tokenizer.eos_token_id
    assert reply == Reply(
        decode_ids(ids, layout.tokenizer, layout.format.tags), None, layout.count_tokens(request.sample), len(ids)
    )
    assert reply.text.startswith("<think>")
    assert not reply.text.endswith("<|im_end|>")


def test_a_response_at_its_limit_is_truncated(tiny) -> None:
    model, layout = tiny
    whole = LocalModel(model, layout, batch_size=1, max_new_tokens=60).respond([asked("go")])[0]
    assert not whole.is_truncated
    assert whole.tokens
    exact = LocalModel(model, layout, batch_size=1, max_new_tokens=whole.tokens).respond([asked("go")])[0]
    assert exact == whole  # its last token is the end, so nothing is missing
    short = LocalModel(model, layout, batch_size=1, max_new_tokens=whole.tokens - 1).respond([asked("go")])[0]
    assert short.is_truncated
    assert short.tokens == whole.tokens - 1


def test_the_context_limits_a_response_independent_of_its_batch(tiny) -> None:
    model, layout = tiny
    request = asked("x" * 20)
    prompt = layout.count_tokens(request.sample)
    plenty = LocalModel(model, layout, batch_size=3, max_new_tokens=60).respond([request])[0]
    assert plenty.tokens
    assert plenty.tokens > 3
    tight = LocalModel(model, layout, batch_size=3, max_new_tokens=60, context=prompt + 3)
    alone = tight.respond([request])[0]
    assert (alone.tokens, alone.is_truncated) == (3, True)
    assert plenty.text.startswith(alone.text)
    shorter, longer = asked("x"), asked("x" * 40)
    together = tight.respond([shorter, request, longer])
    assert together[1] == alone
    assert together[0] == tight.respond([shorter])[0]
    assert together[0].tokens
    assert together[0].tokens > 3
    assert (together[2].text, together[2].tokens) == ("", None)
    assert together[2].overflow == f"the prompt has {prompt + 20} tokens, the context {prompt + 3}"
    assert tight.context_usage(request) == (prompt + 60, prompt + 3)


@pytest.mark.parametrize("has_end", [True, False])
def test_prompts_with_different_limits_share_a_batch(has_end: bool) -> None:
    tokenizer = tiny_tokenizer()
    counted, rows = tiny_model(tokenizer).eval(), []
    torch.manual_seed(2)
    for parameter in counted.parameters():  # texts without end, one for each prompt
        torch.nn.init.normal_(parameter, std=0.5)
    if not has_end:
        tokenizer.eos_token = counted.generation_config.eos_token_id = None
    layout = PromptLayout(tokenizer, "toolrl")
    requests = [asked("xyz" * n) for n in (9, 1, 5, 2, 12, 7)]
    context = layout.count_tokens(requests[4].sample) + 2
    together = LocalModel(counted, layout, batch_size=6, max_new_tokens=500, context=context)
    assert can_share(counted)  # tries the model
    counted.model.embed_tokens.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    replies = together.respond(requests)
    assert set(rows) == {6}
    for request, reply in zip(requests, replies, strict=True):
        assert together.respond([request])[0] == reply
        assert reply.tokens
        limit = context - layout.count_tokens(request.sample)
        assert (reply.tokens == limit) == reply.is_truncated
        assert reply.tokens <= limit
    assert sum(reply.is_truncated for reply in replies) > 3
    assert len({reply.tokens for reply in replies}) > 3
    assert len({reply.text[:2] for reply in replies}) > 1


def test_position_tables_are_never_exceeded() -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"n_positions": 40, "n_embd": 8, "n_layer": 1, "n_head": 1, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    asker = LocalModel(model, PromptLayout(tokenizer), batch_size=3, max_new_tokens=100)
    replies = asker.respond([asked("x" * n) for n in (1, 18, 9)])
    assert [(reply.prompt_tokens or 0) + (reply.tokens or 0) for reply in replies if reply.is_truncated] == [40] * 3


def test_only_length_independent_rope_may_exceed_the_context() -> None:
    tiny_rope = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    assert can_exceed_context(LlamaConfig())
    assert can_exceed_context(LlamaConfig(rope_parameters={"rope_type": "yarn", **tiny_rope}))
    assert not can_exceed_context(LlamaConfig(rope_parameters={"rope_type": "dynamic", **tiny_rope}))
    by_layer = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    config = LlamaConfig()
    config.rope_parameters = by_layer
    assert can_exceed_context(config)
    assert not can_exceed_context(GPT2Config())
    assert not can_exceed_context(OPTConfig())


def test_a_prompt_as_long_as_the_context_is_an_overflow(tiny) -> None:
    model, layout = tiny
    request = asked("hello")
    prompt = layout.count_tokens(request.sample)
    full = LocalModel(model, layout, batch_size=1, max_new_tokens=5, context=prompt)
    assert full.respond([request])[0].overflow
    assert full.respond([request])[0].prompt_tokens == prompt
    one_left = LocalModel(model, layout, batch_size=1, max_new_tokens=5, context=prompt + 1)
    assert one_left.respond([request])[0].tokens == 1


def test_the_context_is_the_smallest_stated_length(tiny) -> None:
    model, layout = tiny
    assert context_length(model.config, layout.tokenizer) == 256  # the tokenizer states 10**30
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 100
    assert context_length(model.config, tokenizer) == 100
    assert LocalModel(model, PromptLayout(tokenizer), batch_size=1, max_new_tokens=4).context_usage(asked(""))
    assert LocalModel(model, layout, batch_size=1, max_new_tokens=4, context=9).context == 9


def test_a_template_error_is_a_refusal() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}", "{{ raise_exception('no!') if message.content == 'bad' else message.content }}"
    )
    model = LocalModel(tiny_model(tokenizer).eval(), PromptLayout(tokenizer), batch_size=4, max_new_tokens=30)
    refused, answered = model.respond([asked("bad", "s7"), asked("good")])
    assert refused.refusal.startswith("the chat template failed on sample 's7'")
    assert answered.text
    assert not refused.overflow
    assert not answered.refusal
    assert model.context_usage(asked("bad")) == (0, model.context)


def test_random_state_and_mode_are_restored(tiny) -> None:
    model, layout = tiny
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for is_training in (True, False):
        model.train(is_training)
        LocalModel(model, layout, batch_size=2, max_new_tokens=8).respond([asked("a"), asked("b")])
        assert model.training is is_training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_penalties_of_the_generation_config_are_ignored(tiny) -> None:
    model, layout = tiny
    asker = LocalModel(model, layout, batch_size=1, max_new_tokens=60)
    plain = asker.respond([asked("go")])
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    try:
        assert asker.respond([asked("go")]) == plain
    finally:
        model.generation_config.repetition_penalty = model.generation_config.no_repeat_ngram_size = None


class SmallMemory(Qwen3ForCausalLM):
    """Runs out of memory beyond a number of rows and columns, like a small GPU."""

    rows = columns = 10**6

    def forward(self, input_ids=None, **others):
        if input_ids.shape[0] > self.rows or input_ids.shape[1] > self.columns:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(input_ids=input_ids, **others)


def test_a_batch_that_exceeds_memory_is_halved() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).eval()
    small = SmallMemory(model.config)
    small.load_state_dict(model.state_dict())
    small.generation_config = model.generation_config
    layout = PromptLayout(tokenizer)
    requests = [asked("x" * n) for n in (3, 50, 1, 7, 20)]
    expected = LocalModel(model, layout, batch_size=8, max_new_tokens=40).respond(requests)
    small.rows = 2
    asker = LocalModel(small, layout, batch_size=8, max_new_tokens=40)
    assert asker.respond(requests) == expected
    small.columns = layout.count_tokens(requests[1].sample) - 1
    replies = asker.respond(requests)
    assert [replies[i] for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]
    assert "ran out of memory" in replies[1].error
    assert not replies[1].overflow


def test_other_errors_of_the_device_are_not_hidden() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).eval()
    model.lm_head = torch.nn.Linear(3, 3)  # a shape that fits nothing
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LocalModel(model, PromptLayout(tokenizer), batch_size=1, max_new_tokens=4).respond([asked("a")])


def test_padding_works_without_a_padding_token(tiny) -> None:
    model, layout = tiny
    bare = tiny_tokenizer()
    bare.pad_token = None
    requests = [asked("x" * n) for n in (3, 30, 1)]
    with_padding = LocalModel(model, layout, batch_size=3, max_new_tokens=40).respond(requests)
    assert layout.tokenizer.pad_token == PAD
    assert LocalModel(model, PromptLayout(bare), batch_size=3, max_new_tokens=40).respond(requests) == with_padding


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_new_tokens": 0}, {"context": 0}])
def test_sizes_are_checked(tiny, wrong) -> None:
    model, layout = tiny
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}\\w* is 0, expected at least 1"):
        LocalModel(model, layout, **{"batch_size": 1, "max_new_tokens": 1, **wrong})


def test_vllm_needs_a_full_model(tiny, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, expected a full model for vLLM"):
        VllmModel(tmp_path, tiny[1], max_new_tokens=4, context=64)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_missing_vllm_is_reported(tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'trl\[vllm\]'"):
        VllmModel(tmp_path, tiny[1], max_new_tokens=4, context=64)
