"""A checkpoint that answers through vLLM, where that is installed: greedy, with batches of vLLM's own making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Reply
from rest_rl.evaluate.models.token_prompts import TokenModel, TokenPrompt, check_positive
from rest_rl.regions import decode_ids


class VllmModel(TokenModel):
    """A vLLM engine in this process, asked greedily with token ids; prompts, texts and limits as for `LocalModel`."""

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
        """`context` is what vLLM makes room for (`max_model_len`); `engine` goes to `vllm.LLM` as it is.

        UserError without the package vllm and for an adapter's folder.
        """
        check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, context=context)
        if (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"{path}, an adapter",
                "a whole model for vLLM",
                "merge it into its base model and save that (peft's merge_and_unload), or leave vLLM out",
            )
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"no working package vllm ({error})", "it", "pip install 'trl[vllm]'") from error
        self.layout, self.batch_size, self.max_new_tokens = layout, batch_size, max_new_tokens
        self.context = context
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(model=str(path), max_model_len=context, **engine)

    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
        tokenizer, tags = self.layout.tokenizer, self.layout.format.tags
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # vLLM knows the model's own
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt.ids} for prompt in prompts],
            [self._sampling(temperature=0.0, max_tokens=prompt.limit, stop_token_ids=ends) for prompt in prompts],
            use_tqdm=False,
        )
        replies = []
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            text = decode_ids(ids, tokenizer, tags)  # not vLLM's text, which leaves special tokens out
            is_truncated = completion.finish_reason == "length"
            replies.append(Reply(text, None, len(prompt.ids), len(ids), is_truncated=is_truncated))
        return replies
