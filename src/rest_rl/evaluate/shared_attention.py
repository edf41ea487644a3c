"""Attention over a prompt that several responses share: packed rows, and generation that computes each prompt once.

An attention function in transformers' registry (`attend`) serves packed rows, in which each response sees its own
prompt and itself, and decoding steps, in which all responses to a prompt read one copy of its keys and values.

Shapes: B responses of at most T tokens, n prompts, G responses per prompt, P prompt tokens, V vocabulary, H heads,
K key-value heads, d their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from rest_rl.train.policy import quiet_transformers

ATTENTION = "rest_rl_shared_prompts"
"""Name of the attention function in transformers' registry."""
# A 4-D mask is passed on by transformers as it is, so that no mask is built: the layout replaces it.
NO_MASK = torch.zeros(1, 1, 1, 1)
# Arguments of `generate` that see tokens and scores only.
_HARMLESS = {"stopping_criteria", "logits_processor"}
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Segment(NamedTuple):
    """A group in a packed row: the prompt is `start:middle`, and its responses end at `ends`."""

    start: int
    middle: int
    ends: tuple[int, ...]


class PackedRow(NamedTuple):
    """A micro-batch as one row of N positions; `rows` and `columns` say which token of (B, T) a position predicts."""

    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    labels: list[int]
    scored: list[int]
    rows: list[int]
    columns: list[int]


def find_groups(prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return the rows of each distinct prompt, in the order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    return groups


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> PackedRow:
    """Pack responses behind their prompts, each prompt once. Prompts have at least one token; empty responses vanish.

    A response's piece is the prompt's last token and the response without its last token, so each of its positions
    predicts one token of the response.
    """
    packed = PackedRow([], [], [], [], [], [], [])
    for prompt, rows in find_groups(prompts).items():
        if not (rows := [row for row in rows if responses[row]]):
            continue
        start, shared = len(packed.ids), len(prompt) - 1
        packed.ids.extend(prompt[:-1])
        packed.positions.extend(range(shared))
        ends: list[int] = []
        for row in rows:
            first, length = len(packed.ids), len(responses[row])
            packed.ids.extend([prompt[-1], *responses[row][:-1]])
            packed.positions.extend(range(shared, shared + length))
            packed.labels.extend(responses[row])
            packed.scored.extend(range(first, first + length))
            packed.rows.extend([row] * length)
            packed.columns.extend(range(length))
            ends.append(first + length)
        packed.segments.append(Segment(start, start + shared, tuple(ends)))
    return packed


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in transformers' interface: over a packed row, in shared decoding, or as usual."""
    if segments is not None:
        return _attend_packed(query, key, value, segments, scaling), None
    if (layer := getattr(key, "shared_layer", None)) is not None:
        return _attend_decoding(query, key, value, layer, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, attend)
# Without a registered mask function, transformers would give `attend` no mask: generation would ignore padding.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float | None
) -> Tensor:
    sdpa = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    outputs: list[Tensor] = []
    for start, middle, ends in segments:
        prompt_key, prompt_value = key[:, :, start:middle], value[:, :, start:middle]
        if middle > start:
            outputs.append(sdpa(query[:, :, start:middle], prompt_key, prompt_value, is_causal=True))
        begin = middle
        for end in ends:
            seen_key = torch.cat([prompt_key, key[:, :, begin:end]], 2)
            seen_value = torch.cat([prompt_value, value[:, :, begin:end]], 2)
            mask = torch.ones(end - begin, seen_key.shape[2], dtype=torch.bool, device=key.device)
            outputs.append(sdpa(query[:, :, begin:end], seen_key, seen_value, attn_mask=mask.tril(middle - start)))
            begin = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


# One decoding step. `key` and `value` (B, K, t, d) are the responses' own; `query` (L, H, 1, d) has a row for each that
# has not ended. A product with the prompts' keys serves all rows of a group.
def _attend_decoding(query: Tensor, key: Tensor, value: Tensor, layer: _ResponseLayer, scaling: float | None) -> Tensor:
    (n, K, d, P), B, rows = layer.prompt_keys.shape, len(key), layer.rows
    if len(rows) < B:
        query = query.new_zeros(B, *query.shape[1:]).index_copy(0, rows, query)
    G, scale = B // n, d**-0.5 if scaling is None else scaling
    grouped = query.reshape(n, G, K, -1, d).transpose(1, 2).reshape(n * K, -1, d)
    on_prompt = torch.baddbmm(layer.bias, grouped, layer.prompt_keys.flatten(0, 1), alpha=scale)
    on_own = query.reshape(B * K, -1, d) @ key.flatten(0, 1).mT * scale
    scores = [on_prompt.view(n, K, G, -1, P).transpose(1, 2), on_own.view(n, G, K, -1, key.shape[2])]
    shares = torch.cat(scores, -1).float().softmax(-1).to(value.dtype)  # (n, G, K, H / K, P + t)
    of_prompt, of_own = shares[..., :P].transpose(1, 2), shares[..., P:]
    from_prompt = of_prompt.reshape(n * K, -1, P) @ layer.prompt_values.flatten(0, 1)
    from_own = of_own.reshape(B * K, -1, key.shape[2]) @ value.flatten(0, 1)
    d = value.shape[-1]
    output = from_prompt.view(n, K, G, -1, d).transpose(1, 2) + from_own.view(n, G, K, -1, d)
    output = output.reshape(B, 1, -1, d)
    return output if len(rows) == B else output[rows]


# The cache of one layer in shared decoding. DynamicLayer copies all keys and values for every new token; this buffer
# doubles instead. `rows` are the rows of the buffer that have not ended; only these are computed.
class _ResponseLayer(DynamicLayer):
    def __init__(self, prompt: DynamicLayer, mask_nP: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.length, self.rows, self.is_initialized = 0, rows, True
        keys, self.prompt_values = cast(Tensor, prompt.keys), cast(Tensor, prompt.values)
        self.prompt_keys = keys.mT.contiguous()  # (n, K, d, P), which is faster
        bias_nP = torch.zeros_like(mask_nP, dtype=keys.dtype).masked_fill(mask_nP == 0, -torch.inf)
        self.bias = bias_nP.repeat_interleave(keys.shape[1], 0)[:, None]  # added to scores, (n K, 1, P)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert key_states.shape[2] == 1, "shared decoding computes one token at a time"
        if self.length == 0:
            sizes = len(self.rows), key_states.shape[1], 32, key_states.shape[3]
            self.buffers = [states.new_empty(sizes) for states in (key_states, value_states)]
        elif self.length == self.buffers[0].shape[2]:
            self.buffers = [torch.cat([buffer, torch.empty_like(buffer)], 2) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.length] = states[:, :, 0]
        self.length += 1
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        # The attention function gets these tensors as they are, and finds the prompt here.
        cast(Any, self.keys).shared_layer = self
        return self.keys, self.values

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        self.bias = self.bias.view(len(self.prompt_keys), -1, self.bias.shape[-1])[groups].flatten(0, 1)[:, None]
        self.prompt_keys, self.prompt_values = self.prompt_keys[groups], self.prompt_values[groups]
        self.buffers = [buffer[rows] for buffer in self.buffers]

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-1] + self.length


# transformers computes all rows until the last one ends. These hooks leave ended rows out of the model, and prompts
# without other rows out of the cache. The scores of ended rows are 0, which keeps the random numbers of the others.
class _LiveRows:
    def __init__(self, layers: list[_ResponseLayer], group_size: int, ends: Tensor) -> None:
        self.layers, self.group_size, self.ends = layers, group_size, ends
        self.rows = self.kept = layers[0].rows  # that have not ended, and that are in the cache
        self.size = len(self.rows)

    def narrow(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> Any:
        ids, is_first = kwargs["input_ids"], self.layers[0].length == 0  # at first, the last tokens of the prompts
        live = self.rows[~torch.isin(ids[self.rows, -1], self.ends)]
        if not is_first and 0 < len(live) < len(self.rows):
            self.drop(live)
        if len(self.rows) < self.size:
            batch = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
            kwargs.update({name: values[self.rows] for name, values in batch.items() if values is not None})
        return inputs, kwargs

    def drop(self, live: Tensor) -> None:
        self.rows = live
        groups = torch.isin(self.kept, live).view(-1, self.group_size).any(1)
        if 2 * int(groups.sum()) <= len(groups):  # a copy of the cache, so not for every group
            rows = groups.repeat_interleave(self.group_size).nonzero()[:, 0]
            self.kept = self.kept[rows]
            for layer in self.layers:
                layer.keep(groups.nonzero()[:, 0], rows)
        places = torch.searchsorted(self.kept, live)
        for layer in self.layers:
            layer.rows = places

    def widen(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if len(self.rows) < self.size:
            logits = output.logits
            output.logits = logits.new_zeros(self.size, *logits.shape[1:]).index_copy(0, self.rows, logits)
        return output


def generate_shared(
    model: Any,
    generate: Callable[..., Any],
    group_size: int,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    """Call `generate` with the prompts' keys and values already computed, once per group of adjacent equal rows.

    Rows that do not form groups of `group_size` equal prompts are generated as usual. Single rows gain as well: no step
    copies their prompts' keys and values.
    """
    config, (B, P) = generation_config, input_ids.shape
    usual = partial(generate, input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **kwargs)
    is_plain = config.cache_implementation is None and (config.num_beams or 1) == 1
    if not is_plain or not kwargs.keys() <= _HARMLESS or P < 2 or B % group_size:
        return usual()
    prompts = input_ids.view(-1, group_size, P)
    if not bool((prompts == prompts[:, :1]).all()):
        return usual()
    ids_nP, mask_nP = input_ids[::group_size, :-1], attention_mask[::group_size, :-1]
    cache = DynamicCache(config=model.config)
    positions_nP = (mask_nP.cumsum(1) - 1).clamp(min=0)
    model(
        input_ids=ids_nP,
        attention_mask=mask_nP,
        position_ids=positions_nP,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    rows, bare = torch.arange(B, device=input_ids.device), without_adapter(model)
    layers = [_ResponseLayer(layer, mask_nP, rows) for layer in cast(list[DynamicLayer], cache.layers)]
    cache.layers = cast(Any, layers)
    live, hooks = _LiveRows(layers, group_size, torch.tensor(config.eos_token_id or [], dtype=torch.long)), []
    if rows.device.type == "cpu":  # on GPUs, where it has not been measured, a step hardly depends on the rows
        hooks = [
            bare.register_forward_pre_hook(live.narrow, with_kwargs=True),
            bare.register_forward_hook(live.widen),
        ]
    try:
        return usual(past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()


def without_adapter(model: Any) -> Any:
    """Return the transformers model inside a model with PEFT's adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def find_model_obstacle(config: Any) -> str | None:
    """Return what in a text model's configuration keeps prompts from being shared; None if nothing does."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    obstacles = {
        f"the model has {', '.join(sorted(layers - {'full_attention'}))} layers": layers != {"full_attention"},
        f"the model has a sliding window of {window} tokens": window is not None,
        "the model caps attention logits": getattr(config, "attn_logit_softcapping", None) is not None,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


@contextmanager
def sharing(model: Any) -> Iterator[Callable[..., Any]]:
    """Yield `model.generate` with a first argument, the group size; prompts are shared if `can_share`."""
    if not can_share(model):
        yield lambda group_size, **kwargs: model.generate(**kwargs)
        return
    usual = model.config._attn_implementation  # noqa: SLF001
    model.set_attn_implementation(ATTENTION)
    try:
        yield partial(generate_shared, model, model.generate)
    finally:
        model.set_attn_implementation(usual)


def can_share(model: Any) -> bool:
    """Return whether `sharing` shares prompts: on a CPU, if the model's outputs stay the same (tried once per model).

    On GPUs, where it has not been measured, models keep their attention.
    """
    if not isinstance(model, nn.Module) or model.device.type != "cpu":
        return False
    if model not in _TRIED:
        _TRIED[model] = _try_sharing(model)
    return _TRIED[model]


def _try_sharing(model: Any) -> bool:
    usual, was_training = model.config._attn_implementation, model.training  # noqa: SLF001
    if usual == ATTENTION:  # the trainer has tried it
        return True
    if usual != "sdpa" or find_model_obstacle(model.config.get_text_config()) is not None:
        return False
    is_float32 = {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.eval()
    try:
        with quiet_transformers(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            ids_BP, mask_BP = make_up_prompts(model)
            stock = [try_generation(model, model.generate), model(input_ids=ids_BP, attention_mask=mask_BP).logits[2]]
            model.set_attn_implementation(ATTENTION)
            prompts, responses = [ids_BP[2, :2].tolist()] * 2, [ids_BP[2, 2:].tolist()] * 2
            ours = [
                try_generation(model, partial(generate_shared, model, model.generate, 2)),
                compute_packed_logits(model, prompts, responses)[1],
            ]
    except Exception:  # whatever a model that was written by others raises
        return False
    finally:
        model.set_attn_implementation(usual)
        model.train(was_training)
    pairs = ((ours[0], stock[0]), (ours[1].float(), stock[1][1:-1].float()))
    return all(relative_difference(*pair) <= (1e-3 if is_float32 else 0.1) for pair in pairs)


def compute_packed_logits(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits from which each token of B responses was drawn; the model has the attention `ATTENTION`.

    Shape (B, T, V). Positions beyond the end of a response contain those of another token.
    """
    packed = pack(prompts, responses)
    output = model(
        input_ids=torch.tensor([packed.ids], device=model.device),
        position_ids=torch.tensor([packed.positions], device=model.device),
        attention_mask=NO_MASK.to(model.device),
        logits_to_keep=torch.tensor(packed.scored, device=model.device),
        use_cache=False,
        segments=packed.segments,
    )
    index_BT = torch.zeros(len(responses), max(map(len, responses)), dtype=torch.long)
    index_BT[packed.rows, packed.columns] = torch.arange(len(packed.scored))
    return output.logits[0, index_BT.to(model.device)]


def make_up_prompts(model: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of two left-padded prompts of 3 and 5 tokens, each in two rows. (4, 5)."""
    ids_BP = torch.arange(1, 6, device=model.device).repeat(4, 1) * 7 % model.config.get_text_config().vocab_size
    ids_BP[:2] = ids_BP[:2].flip(1)
    mask_BP = torch.ones_like(ids_BP)
    mask_BP[:2, :2] = 0
    return ids_BP, mask_BP


def try_generation(model: Any, generate: Callable[..., Any]) -> Tensor:
    """Return the logits of the second token that `generate` writes to the prompts of `make_up_prompts`."""
    ids_BP, mask_BP = make_up_prompts(model)
    config = GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    return generate(input_ids=ids_BP, attention_mask=mask_BP, generation_config=config).logits[-1].float()


def relative_difference(ours: Tensor, stock: Tensor) -> float:
    """Return the root mean square of the difference, relative to the standard deviation of `stock`."""
    return ((ours - stock).square().mean().sqrt() / stock.std()).item()
