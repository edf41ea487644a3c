"""What a run on verl leaves behind: the whole model, or its adapter alone, as on TRL."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard

from rest_rl.errors import UserError
from rest_rl.jsonl import as_json
from rest_rl.runlog import unwritable_folder_error
from rest_rl.train.policy import ADAPTER_CONFIG, load_tokenizer

LORA_META = "lora_train_meta.json"
"""The file of verl's checkpoint that is there if FSDP trained an adapter."""


def merge_model(
    checkpoint: Path, strategy: str, target: Path, *, base: str | Path, trust_remote_code: bool = False
) -> None:
    """Make `target` of a checkpoint: its adapter, over the model `base`, or without one the whole model; the tokenizer.

    An adapter keeps the type that it was trained in; verl's merger gives whole models in bfloat16. `target` is there
    when it is whole. UserError for a checkpoint that cannot be put together and for a folder that cannot be written.
    """
    actor, part = checkpoint / "actor", target.with_name(f".{target.name}.part")
    # Megatron saves whole models and adapters as Hugging Face does, unless asked for shards of its own.
    exported = actor / "model" / "huggingface"
    tokenizer: Path | None = None
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a command that was killed at this point
        if (actor / LORA_META).is_file():
            write_adapter(actor, part, base)
            tokenizer = actor / "huggingface"
        elif (exported / "adapter" / ADAPTER_CONFIG).is_file():
            shutil.copytree(exported / "adapter", part)
            config = json.loads((part / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
                "base_model_name_or_path": str(base)
            }
            (part / ADAPTER_CONFIG).write_text(as_json(config, indent=2), encoding="utf-8")
            tokenizer = exported
        elif any(exported.glob("*.safetensors")):
            shutil.copytree(exported, part)
        else:
            run_merger(actor, strategy, part, trust_remote_code=trust_remote_code)
        if tokenizer:
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code).save_pretrained(part)
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise unwritable_folder_error(target.parent, OSError(None, str(error))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run_merger(actor: Path, strategy: str, part: Path, *, trust_remote_code: bool) -> None:
    """The whole model, by verl's own merger in a process of its own; UserError with its last words if it fails."""
    backend = "megatron" if strategy == "megatron" else "fsdp"
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", backend]
    command += ["--local_dir", str(actor), "--target_dir", str(part)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    # With an adapter in it the merger would save the weights beneath, untrained, as the model.
    if done.returncode or (part / "lora_adapter").exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if done.returncode and lines else "an adapter without its rank, or no message"
        raise make_broken_error(actor, part, why, f"see why with: {shlex.join(command)}")


def make_broken_error(actor: Path, part: Path, why: str, remedy: str) -> UserError:
    """The error for a checkpoint that is no model."""
    return UserError(
        f"the checkpoint {actor.parent} ({why:.300})",
        "one that can be put together",
        f"the run's steps are done: {remedy}, then try again with: rest-rl train --resume --out {part.parent}",
    )


# Adapters, which verl's merger would save with the untrained weights beneath, rounded


def write_adapter(actor: Path, part: Path, base: str | Path) -> None:
    """FSDP's shards of an adapter as peft saves it."""
    from peft import LoraConfig

    try:
        trained = json.loads((actor / LORA_META).read_text(encoding="utf-8"))
        shards = read_shards(actor)
        names = [name for name in shards[0] if ".lora_" in name]
        weights = {
            re.sub(r"(\.lora_\w+)\.default\b", r"\1", name): join_shards([s[name] for s in shards]) for name in names
        }
        config = LoraConfig(
            base_model_name_or_path=str(base),
            r=trained["r"],
            lora_alpha=trained["lora_alpha"],
            task_type=trained["task_type"],
            inference_mode=True,
        )
        config.target_modules = find_target_modules(shards[0])  # set after __init__, which turns the list into a set
    except Exception as error:  # whatever torch finds in a broken file
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise make_broken_error(actor, part, why, f"restore {actor}") from error
    part.mkdir(parents=True)
    save_file(weights, part / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(part))


def read_shards(actor: Path) -> list[dict[str, Any]]:
    """The state that each rank saved, in their order; what is not used is not read from the disk."""
    # It warns of meshes without processes, once a file; nothing is computed on these.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    ranks = json.loads((actor / "fsdp_config.json").read_text(encoding="utf-8"))["world_size"]
    files = [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]


def join_shards(pieces: list[Any]) -> torch.Tensor:
    """A parameter from the pieces of all ranks; the ranks of a row of the mesh have one copy, the first row's."""
    first = pieces[0]
    if not isinstance(first, DTensor):
        return first.contiguous()
    place = first.placements[-1]
    if not isinstance(place, Shard):
        return first.to_local().contiguous()
    row = pieces[: first.device_mesh.mesh.shape[-1]]
    whole = torch.cat([piece.to_local() for piece in row], dim=place.dim)
    assert whole.shape == first.shape, f"{tuple(whole.shape)} of {tuple(first.shape)}"
    return whole


def find_target_modules(names: Collection[str]) -> list[str]:
    """The adapted modules by the last part of their names, in full where others that are not adapted share it.

    `q_proj` if every layer's is adapted; `model.layers.0.self_attn.q_proj` if the other layers' are not.
    """
    plain = [name.removeprefix("base_model.model.") for name in names]
    adapted = {name.split(".lora_")[0] for name in plain if ".lora_" in name}
    modules = (name.rpartition(".")[0].removesuffix(".base_layer") for name in plain if ".lora_" not in name)
    rest, short = set(modules) - adapted, {module.rpartition(".")[2] for module in adapted}
    return sorted(adapted if short & {module.rpartition(".")[2] for module in rest} else short)
