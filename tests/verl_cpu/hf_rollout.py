"""A rollout named `hf` for verl: Hugging Face's model, one request and one token at a time, with log-probabilities.

verl imports this module in every process that builds the model's configuration (`model.external_lib`).
Shapes: P prompt tokens, V the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

GREEDY = 1e-6
"""A temperature at which the likeliest token has probability 1, for verl's temperature 0."""


def server_name(replica_rank: int) -> str:
    """The name of a replica's server in Ray."""
    return f"hf_server_{replica_rank}"


@ray.remote
class HfServer:
    """The model of one replica; it serves requests one by one, in the order of arrival."""

    def __init__(self, path: str, attention: str, seed: int, response_length: int):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        self.model.eval()
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.seed, self.response_length = seed, response_length
        self.global_steps: int | None = None
        self.asked: Counter[tuple[int, ...]] = Counter()

    def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        """Load these weights; RuntimeError for weights that the model does not have."""
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        left_out = set(missing) - set(self.model.all_tied_weights_keys)
        if left_out or unexpected:
            raise RuntimeError(f"got weights without {sorted(left_out)} and with {unexpected}, expected the model's")
        self.global_steps = global_steps
        self.asked.clear()

    def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        """One response; the n-th response to a prompt with the same weights is the same in every run."""
        prompt = tuple(prompt_ids)
        key = repr((self.seed, self.global_steps, prompt, self.asked[prompt]))
        self.asked[prompt] += 1
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        tokens, log_probs = [], []
        for token, log_prob in self.sampled(prompt, sampling_params, generator):
            tokens.append(token)
            log_probs.append(log_prob)
            if token in self.ends or len(tokens) == self.response_length:
                break
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    @torch.inference_mode()
    def sampled(
        self, prompt: tuple[int, ...], sampling_params: dict[str, Any], generator: torch.Generator
    ) -> Iterator[tuple[int, float]]:
        """Yield tokens endlessly, each with its log-probability at the requested temperature."""
        if sampling_params["top_p"] != 1 or sampling_params["top_k"] > 0:
            raise ValueError(f"got {sampling_params}, expected top_p 1 and no top_k; this rollout knows a temperature")
        temperature = sampling_params["temperature"] or GREEDY
        cache = DynamicCache(config=self.model.config)
        tokens_1P = torch.tensor([prompt])
        while True:
            logits_V = self.model(tokens_1P, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            log_probs_V = torch.log_softmax(logits_V / temperature, dim=-1)
            token = torch.multinomial(log_probs_V.exp(), 1, generator=generator)
            yield token.item(), log_probs_V[token].item()
            tokens_1P = token[None]


class HfAdapter(BaseRollout):
    """Sends the weights of a trainer rank to the server of its replica."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.replica_rank = torch.distributed.get_rank()

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """A CPU has nothing to release."""

    async def update_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None, **_: Any
    ) -> None:
        """Every rank gathers all weights (a collective operation) and sends them to its replica."""
        await ray.get_actor(server_name(self.replica_rank)).load.remote(dict(weights), global_steps)


class HfReplica(RolloutReplica):
    """One server next to one rank of the trainer."""

    async def launch_servers(self) -> None:
        """Start the server; its weights arrive before the first request."""
        assert self.world_size == 1, "hf has no parallelism within a replica: tensor_model_parallel_size=1"
        self._server_address = server_name(self.replica_rank)
        self._server_handle = HfServer.options(name=self._server_address).remote(
            self.model_config.path,
            self.model_config.override_config["attn_implementation"],
            self.config.seed,
            self.config.response_length,
        )
        self.servers = [self._server_handle]

    async def sleep(self) -> None:
        """A CPU has nothing to release."""

    async def wake_up(self) -> None:
        """Nothing was released."""


_ROLLOUT_REGISTRY["hf", "async"] = f"{__name__}.{HfAdapter.__name__}"
RolloutReplicaRegistry.register("hf", lambda: HfReplica)
