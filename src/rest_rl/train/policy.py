"""The model to train and its tokenizer, from a directory, the hub or the package itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rest_rl.config import EMBEDDED, ModelTable


def embedded_model() -> Path:
    """The directory of the warm-started model that the package ships."""
    folder = Path(str(resources.files("rest_rl").joinpath("assets/tool_world")))
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"got no model in {folder}, expected the embedded one; rest-rl sft --out {folder} makes it")
    return folder


def load_policy(config: ModelTable) -> tuple[Any, Any]:
    """(model, tokenizer), left padded; ValueError if either cannot be read or the tokenizer has no chat template."""
    path = embedded_model() if config.path == EMBEDDED else config.path
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        raise ValueError(
            f"got {path}, whose tokenizer has no chat template, expected one that lays out tools and messages; put a "
            "chat_template.jinja beside its tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"got {path}, whose tokenizer has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), use_safetensors=True)
    except Exception as error:  # the loaders raise a dozen types: OSError, SafetensorError, KeyError, ...
        raise unreadable("model", path, error) from error
    return model, tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer from a directory or the hub; a lone tokenizer.json will do. ValueError if there is none."""
    lone = Path(path) / "tokenizer.json"
    try:
        if lone.is_file() and not (lone.parent / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(lone))
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # as above
        raise unreadable("tokenizer", path, error) from error
    if not tokenizer.is_fast:
        raise ValueError(f"got {path}, a slow tokenizer, expected a fast one; save it with a tokenizer.json")
    return tokenizer


def unreadable(what: str, path: str | Path, error: Exception) -> ValueError:
    """The error for a model or tokenizer that does not load."""
    first_line = next(iter(str(error).splitlines()), "")
    return ValueError(
        f"got {what} {path} ({type(error).__name__}: {first_line:.200}), expected a directory with config.json, "
        "model.safetensors and tokenizer.json, or a hub name; check the path"
    )
