"""Checkpoints of a small model in the layout of verl's FSDP engine, made without an engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM

from rest_rl.train.named_models import embedded_model_dir
from rest_rl.train.policy import load_tokenizer

CONTENTS = {"save_contents": ["model"], "load_contents": ["model"], "async_save": False}
STEP = Path("checkpoints", "global_step_1")


def drawn_model(lora: dict[str, Any] | None) -> Any:
    """The embedded model with randomly changed weights, or with a random adapter."""
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32, attn_implementation="eager")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.1 * drawn if lora else parameter + 0.02 * drawn)
    return model.eval()


def save_as_verl(rank: int, folder: Path, shape: tuple[int, ...], lora: dict[str, Any] | None) -> None:
    """One rank of a device mesh: the last axis shards the model, the other replicates it."""
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=math.prod(shape))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])
    model = drawn_model(lora)
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokenizer, contents = load_tokenizer(embedded_model_dir()), OmegaConf.create(CONTENTS)
    manager = FSDPCheckpointManager(model, processing_class=tokenizer, checkpoint_config=contents)
    manager.save_checkpoint(str(folder / STEP / "actor"), global_step=1)
    distributed.destroy_process_group()


def save_checkpoint(folder: Path, shape: tuple[int, ...] = (1,), lora: dict[str, Any] | None = None) -> Path:
    """Save a checkpoint of a run in this folder."""
    if math.prod(shape) == 1:
        save_as_verl(0, folder, shape, lora)
    else:
        multiprocessing.spawn(save_as_verl, (folder, shape, lora), nprocs=math.prod(shape))
    return folder / STEP
