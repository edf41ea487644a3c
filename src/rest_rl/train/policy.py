"""The model to train and its tokenizer, from a directory, the hub or the package itself; adapters for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from rest_rl.config import AUTO, EMBEDDED, ModelTable, unknown_key

ADAPTER = "adapter_config.json"


def embedded_model() -> Path:
    """The directory of the warm-started model that the package ships."""
    folder = Path(str(resources.files("rest_rl").joinpath("assets/tool_world")))
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"got no model in {folder}, expected the embedded one; rest-rl sft --out {folder} makes it")
    return folder


def load_policy(config: ModelTable) -> tuple[Any, Any]:
    """(model, tokenizer), left padded; ValueError if either cannot be read or the tokenizer has no chat template.

    The folder of an adapter gives its base model with the adapter merged in.
    """
    tokenizer = policy_tokenizer(config)
    path, adapter = base_and_adapter(config)
    dtype = torch.float32 if config.dtype == AUTO else getattr(torch, config.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        settings["quantization_config"] = four_bits(adapter)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except Exception as error:  # the loaders raise a dozen types: OSError, SafetensorError, KeyError, ...
        raise unreadable("model", path, error) from error
    return model, tokenizer


def policy_tokenizer(config: ModelTable) -> Any:
    """The tokenizer of a policy: fast, left padded, with a chat template and an end of sequence, or a ValueError."""
    path = embedded_model() if config.path == EMBEDDED else config.path
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
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
    return tokenizer


def policy_config(config: ModelTable) -> Any:
    """The architecture of a policy, without its weights; ValueError if it cannot be read."""
    path, _ = base_and_adapter(config)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # as above
        raise unreadable("model", path, error) from error


def base_and_adapter(config: ModelTable) -> tuple[str | Path, Path | None]:
    """(where the weights are, the adapter to merge into them or None)."""
    if config.path == EMBEDDED:
        return embedded_model(), None
    folder = Path(config.path)
    if not (folder / ADAPTER).is_file():
        return config.path, None
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"got {folder}, the folder of an adapter, without the package peft; pip install 'rest-rl[peft]'"
        )
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable("adapter", folder, error) from error
    # The embedded model lies in the package, which may have moved since the adapter was trained.
    return (embedded_model() if Path(base).name == embedded_model().name and not Path(base).exists() else base), folder


def four_bits(adapter: Path | None) -> BitsAndBytesConfig:
    """Weights in NF4, computed in bfloat16; ValueError where this cannot be."""
    if adapter is not None:
        raise ValueError(
            f"got load_in_4bit with the adapter {adapter}, expected a whole model; an adapter is merged into its base, "
            "which 4-bit weights would round: merge it once in 16 bits (load_policy, save_pretrained) and load that"
        )
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "got model.load_in_4bit = true, expected a CUDA device and the package bitsandbytes; "
            "pip install 'rest-rl[qlora]', or set load_in_4bit = false"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora_config(table: Mapping[str, Any]) -> Any | None:
    """`[peft]` as peft's LoraConfig, None without it: rank 16, alpha twice the rank, all linear layers but the head.

    ValueError without the package and for unknown or unfit fields.
    """
    if not table:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ValueError("got [peft] without the package peft, expected it; pip install 'rest-rl[peft]'")
    from peft import LoraConfig

    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name in table:
        if name not in fields:
            raise ValueError(unknown_key(f"peft.{name}", name, fields))
    rank = table.get("r", 16)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"got peft.r = {rank!r}, expected a rank of at least 1; change it")
    given = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **table}
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"got [peft] {dict(table)} ({error}), expected fields of LoraConfig; mend it") from error


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A fast tokenizer from a directory or the hub; a lone tokenizer.json will do. ValueError if there is none."""
    lone = Path(path) / "tokenizer.json"
    try:
        if lone.is_file() and not (lone.parent / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(lone))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
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
