"""Convert verl's last checkpoint to the run's model folder, which contains the whole model or only the adapter."""

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

# The file of a verl checkpoint that exists if FSDP trained an adapter.
LORA_META = "lora_train_meta.json"


def merge_model(
    checkpoint: Path, strategy: str, target: Path, *, base: str | Path, trust_remote_code: bool = False
) -> None:
    """Write the tokenizer and model of a checkpoint to `target`; of a run that trained an adapter, only the adapter.

    `base` is the adapter's base model. An adapter keeps its dtype; FSDP's whole models are written in bfloat16. The
    folder `target` appears only when complete. UserError if it cannot be written or the checkpoint cannot be merged.
    """
    actor, part = checkpoint / "actor", target.with_name(f".{target.name}.part")
    # Megatron saves models and adapters in Hugging Face's layout, unless configured to save its own shards.
    exported = actor / "model" / "huggingface"
    tokenizer: Path | None = None
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a command that was killed here
        if (actor / LORA_META).is_file():
            write_adapter(actor, part, base)
            tokenizer = actor / "huggingface"
        elif (exported / "adapter" / ADAPTER_CONFIG).is_file():
            shutil.copytree(exported / "adapter", part)
            file, link = part / ADAPTER_CONFIG, {"base_model_name_or_path": str(base)}
            config = json.loads(file.read_text(encoding="utf-8")) | link
            file.write_text(as_json(config, indent=2), encoding="utf-8")
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
    backend = "megatron" if strategy == "megatron" else "fsdp"
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", backend]
    command += ["--local_dir", str(actor), "--target_dir", str(part)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    # For a checkpoint with an adapter, verl 0.9's merger would save the untrained base weights as the model.
    if done.returncode or (part / "lora_adapter").exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if done.returncode and lines else "an adapter without its rank, or no message"
        raise make_broken_error(actor, part, why, f"see why with: {shlex.join(command)}")


def make_broken_error(actor: Path, part: Path, why: str, remedy: str) -> UserError:
    return UserError(
        f"the checkpoint {actor.parent} cannot be merged ({why:.300})",
        remedy=f"all steps are finished: {remedy}, then run: rest-rl train --resume --out {part.parent}",
    )


# Adapters: verl's merger would save them with the untrained base weights, rounded


# Converts FSDP's shards of an adapter to peft's files.
def write_adapter(actor: Path, part: Path, base: str | Path) -> None:
    from peft import LoraConfig

    try:
        trained = json.loads((actor / LORA_META).read_text(encoding="utf-8"))
        shards = read_shards(actor)
        names = [name for name in shards[0] if ".lora_" in name]
        plain = {name: re.sub(r"(\.lora_\w+)\.default\b", r"\1", name) for name in names}
        weights = {plain[name]: join_shards([shard[name] for shard in shards]) for name in names}
        config = LoraConfig(
            base_model_name_or_path=str(base),
            r=trained["r"],
            lora_alpha=trained["lora_alpha"],
            task_type=trained["task_type"],
            inference_mode=True,
        )
        config.target_modules = find_target_modules(shards[0])  # set after __init__, which turns the list into a set
    except Exception as error:  # torch raises many types for a damaged file
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise make_broken_error(actor, part, why, f"restore {actor}") from error
    part.mkdir(parents=True)
    save_file(weights, part / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(part))


# The state of each rank, in order. With mmap, tensors that are not used are not read from disk.
def read_shards(actor: Path) -> list[dict[str, Any]]:
    # torch warns once per file about device meshes without processes; nothing is computed on them.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    ranks = json.loads((actor / "fsdp_config.json").read_text(encoding="utf-8"))["world_size"]
    files = [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]


# FSDP shards over the last axis of the device mesh; the other axis (HSDP) has replicas, of which the first row is used.
def join_shards(pieces: list[Any]) -> torch.Tensor:
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
    """Return the adapted modules for `LoraConfig.target_modules`; `names` are the parameter names of the model.

    Short names such as `q_proj` if all modules with these names have an adapter, otherwise only full names such as
    `model.layers.0.self_attn.q_proj`.
    """
    plain = [name.removeprefix("base_model.model.") for name in names]
    adapted = {name.split(".lora_")[0] for name in plain if ".lora_" in name}
    modules = (name.rpartition(".")[0].removesuffix(".base_layer") for name in plain if ".lora_" not in name)
    rest, short = set(modules) - adapted, {module.rpartition(".")[2] for module in adapted}
    return sorted(adapted if short & {module.rpartition(".")[2] for module in rest} else short)
