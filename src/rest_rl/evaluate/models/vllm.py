"""Run a checkpoint with vLLM (an optional dependency): greedy decoding, batched by vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError, check_minimums
from rest_rl.evaluate.conversation import Reply
from rest_rl.evaluate.models.token_prompts import TokenModel, TokenPrompt
from rest_rl.regions import decode_ids


class VllmModel(TokenModel):
    """A vLLM engine in this process, with greedy decoding and the same prompts and limits as `LocalModel`."""

    def __init__(
        self,
        path: str | Path,
        layout: PromptLayout,
        *,
        max_new_tokens: int,
        context: int,
        batch_size: int = 256,
        **engine: Any,
    ) -> None:
        """Start the engine.

        `context` is the context length that vLLM reserves memory for (`max_model_len`); `engine` contains further
        arguments of `vllm.LLM`. Raises UserError if vLLM is not installed or `path` is an adapter.
        """
        sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "context_length": context}
        check_minimums({name: (size, 1) for name, size in sizes.items()})
        if (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"{path} is an adapter",
                "a full model for vLLM",
                "merge the adapter into its base model (peft's merge_and_unload), or remove --vllm",
            )
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"cannot import vllm ({error})", remedy="pip install 'trl[vllm]'") from error
        self.layout, self.batch_size, self.max_new_tokens = layout, batch_size, max_new_tokens
        self.context = context
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(model=str(path), max_model_len=context, **engine)

    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
        tokenizer, tags = self.layout.tokenizer, self.layout.format.tags
        # vLLM adds the end tokens of the generation config
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt.ids} for prompt in prompts],
            [self._sampling(temperature=0.0, max_tokens=prompt.limit, stop_token_ids=ends) for prompt in prompts],
            use_tqdm=False,
        )
        replies = []
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            text = decode_ids(ids, tokenizer, tags)  # vLLM's text lacks special tokens
            is_truncated = completion.finish_reason == "length"
            replies.append(Reply(text, None, len(prompt.ids), len(ids), is_truncated=is_truncated))
        return replies
